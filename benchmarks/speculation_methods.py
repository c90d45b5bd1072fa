"""The ways of decoding that `self_speculation` compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_spec_plugins import zoo

#: Exits measured of each model of the zoo.
EXITS: Mapping[str, Sequence[int]] = {
    "nano": (1, 2),
    "small": (1, 2, 4, 6),
    "expanded-nano": (2, 4),
    "expanded": (1, 3, 5, 7, 11),
}
#: Fixed draft lengths, and the most tokens that a length controller may choose.
LENGTHS, MOST = (1, 2, 3, 4, 6), 6
#: Length controllers measured at each exit, as far as they are installed.
CONTROLLERS = ("confidence", "thompson", "expected_speedup", "additive")
#: The model of the zoo that drafts for vLLM's `draft_model`, and its draft lengths.
DRAFTER, DRAFTER_LENGTHS = "nano", (1, 2, 4)
#: vLLM's documentation looks up 2 to 4 tokens.
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_min": 2,
    "prompt_lookup_max": 4,
}
#: Where configs say this, `resolved` puts the file.
VOCABULARY = "vocab.safetensors"
ADAPTER = "adapter.safetensors"
#: vLLM's own verification draws from the wrong law on the CPU, but not at temperature 0.
VLLM_VERIFIES = "vLLM's verification"


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """One way of decoding.

    Attributes:
        name: Unique.
        speculative_config: As a user would write it, models and files by name.
        engine: The config its engine starts with, which serves other methods, too.
        draft_limit: Of each request; None: the engine's.
        length_control: Put in the place of the engine's; None: the engine's stays.
        exit_layer: None where nobody leaves the target early.
        ranked: Whether drafts come from a ranked vocabulary.
        greedy_only: Whether it is right at temperature 0 alone.
    """

    name: str
    speculative_config: Mapping[str, Any]
    engine: Mapping[str, Any]
    draft_limit: int | None = None
    length_control: str | None = None
    exit_layer: int | str | None = None
    ranked: bool = False
    greedy_only: bool = False

    @property
    def length(self) -> int | str:
        """Draft tokens per step, or who decides it."""
        if self.length_control in (None, "fixed"):
            return self.speculative_config["num_speculative_tokens"]
        return self.length_control


def all_methods(
    model: str,
    installed: Sequence[str],
    ranked_size: int,
    dynamic_tokens: int,
    adapter_exit: int | None,
) -> Iterator[Method]:
    """Every method for a model of the zoo, those of one engine together.

    Args:
        model: One of `EXITS`.
        installed: Names of length controllers.
        ranked_size: Tokens of the ranked vocabulary.
        dynamic_tokens: Beside them.
        adapter_exit: Layers before the adapter, if one is to be measured.
    """
    yield from engine_methods()
    vocabulary = {"file": VOCABULARY, "size": ranked_size, "dynamic_tokens": dynamic_tokens}
    controllers = [name for name in CONTROLLERS if name in installed]
    for layer in EXITS[model]:
        for ranked in (None, vocabulary):
            yield from early_exits(layer, controllers, ranked)
    if adapter_exit is not None:
        yield from early_exits(adapter_exit, controllers, None, with_adapter=True)
    yield from early_exits("auto", [*controllers, *({"del"} & set(installed))], None)


def engine_methods() -> Iterator[Method]:
    """vLLM's own, under our verification, which is right at every temperature, and its own."""

    def pair(name: str, config: dict[str, Any]) -> Iterator[Method]:
        ours = {**config, "verifier": "lossless"}
        yield Method(name, ours, ours)

    yield from pair("ngram", NGRAM)
    yield Method(f"ngram, {VLLM_VERIFIES}", NGRAM, NGRAM, greedy_only=True)
    for length in DRAFTER_LENGTHS:
        for draws in ("greedy", "probabilistic"):
            config = {
                "method": "draft_model",
                "model": DRAFTER,
                "num_speculative_tokens": length,
                "draft_sample_method": draws,
            }
            name = f"draft_model K={length} {draws}"
            yield from pair(name, config)
            if draws == "greedy":
                yield Method(f"{name}, {VLLM_VERIFIES}", config, config, greedy_only=True)


def early_exits(
    layer: int | str,
    controllers: Sequence[str],
    vocabulary: Mapping[str, Any] | None,
    with_adapter: bool = False,
) -> Iterator[Method]:
    """`early_exit` after one layer, with every fixed length and length controller."""
    base: dict[str, Any] = {"method": "early_exit", "exit_layer": layer}
    if vocabulary is not None:
        base["draft_vocabulary"] = dict(vocabulary)
    if with_adapter:
        base["adapter"] = ADAPTER
    engine = {**base, "num_speculative_tokens": MOST}
    if layer == "auto" and "del" in controllers:
        engine["length_control"] = "del"  # so that the engine has what it needs
    after = " ranked" if vocabulary is not None else " adapter" if with_adapter else ""

    def method(suffix: str, config: dict[str, Any], **how: Any) -> Method:
        name = f"early_exit {layer} {suffix}{after}"
        return Method(name, config, engine, exit_layer=layer, ranked=vocabulary is not None, **how)

    for length in LENGTHS:
        yield method(
            f"K={length}",
            {**base, "num_speculative_tokens": length},
            draft_limit=length,
            length_control="fixed",
        )
    for name in controllers:
        config = {**base, "num_speculative_tokens": MOST, "length_control": name}
        yield method(name, config, length_control=name)


def resolved(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The config with folders, and files of `folder`, instead of names."""
    whole = dict(config)
    if "model" in whole:
        whole["model"] = str(zoo.ensure(whole["model"]))
    if "draft_vocabulary" in whole:
        whole["draft_vocabulary"] = {**whole["draft_vocabulary"], "file": str(folder / VOCABULARY)}
    if "adapter" in whole:
        whole["adapter"] = str(folder / ADAPTER)
    return whole
