"""A diffusion drafter on disk: a Hugging Face folder with a few more keys in its `config.json`.

    config.json        sizes as of a Llama, and `mask_token_id`, `attention_pattern`, `predicts`
    model.safetensors  weights under Llama's names (or shards and their index)
    tokenizer.json     the target's, byte for byte where we trained it

`vocab_size` counts the tokens that have logits: the target's. `mask_token_id` is either one of
them that texts do not hold (a `<mask>` of the tokenizer), or `vocab_size` itself: then the
embedding has one row more than the head. In both cases a draft never contains the mask.

`attention_pattern`:
    "block"  tokens of the context see those before them; the tokens of the block see the context
             and each other. Keys and values of the context do not depend on the block and are
             kept from step to step. What `vllm-spec calibrate diffusion-drafter` trains.
    "full"   every token sees every other, as in LLaDA (2502.09992) and Dream (2508.15487):
             nothing can be kept, each step reads the whole window again.

`predicts`:
    "next_token"  a token's logits are the law of the token after it, as in the causal models
                  that such a drafter starts from (Dream does so, too).
    "own_token"   a masked token's logits are the law of that token.

`conditioned_on`, only in "block": the drafter reads hidden states of one target
(`conditioning.py`), which the weights then hold samples of, to know it again.

Architectures: `DiffusionDrafter` (ours), `DreamModel` (published; full, next_token).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_spec_plugins.card_file import check_sizes
from vllm_spec_plugins.errors import SpecPluginsError, did_you_mean, listed
from vllm_spec_plugins.weight_probes import difference, read_probes

from .conditioning import TargetStates

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_spec_plugins.context import ModelFacts

COMMAND = "vllm-spec calibrate diffusion-drafter"

#: What an architecture's config leaves unsaid.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "DiffusionDrafter": {"attention_bias": False},
    "DreamModel": {
        "attention_pattern": "full",
        "predicts": "next_token",
        # As in Qwen 2, which it began as: on queries, keys and values.
        "attention_bias": True,
    },
}
ATTENTION_PATTERNS = ("block", "full")
PREDICTS = ("next_token", "own_token")

#: Before the names of samples of the target's weights, among a conditioned drafter's own.
PROBE = "target_states.probe."


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """Sizes and conventions of a drafter.

    Attributes:
        vocab_size: V, tokens that have logits.
        hidden_size: H.
        intermediate_size: Width of the feed-forward parts.
        num_layers: Number of layers.
        num_heads: Query heads.
        num_key_value_heads: Key/value heads.
        head_dim: D, width of a head.
        max_positions: Longest stretch of text it was made for, block included.
        rope_theta: Base of the rotary position embedding.
        rms_norm_eps: Added to the mean square by every norm.
        tie_word_embeddings: The head is the embedding.
        attention_bias: Queries, keys and values have a bias.
        mask_token_id: Stands for a token not known yet.
        attention_pattern: One of `ATTENTION_PATTERNS`.
        predicts: One of `PREDICTS`.
        conditioned_on: The target whose hidden states it reads; None: it reads text alone.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    max_positions: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    mask_token_id: int
    attention_pattern: str
    predicts: str
    conditioned_on: TargetStates | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DrafterConfig:
        """From the keys of a `config.json`.

        Raises:
            KeyError: One is missing.
            ValueError: A value is none that we can serve.
        """
        heads, hidden = int(values["num_attention_heads"]), int(values["hidden_size"])
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind != "default":
            raise ValueError(f'rotary embedding "{kind}" is not supported: only "default" is')
        if (activation := values.get("hidden_act", "silu")) != "silu":
            raise ValueError(f'hidden_act "{activation}" is not supported: only "silu" is')
        for key, known in (("attention_pattern", ATTENTION_PATTERNS), ("predicts", PREDICTS)):
            if values[key] not in known:
                raise ValueError(f'{key} must be one of {listed(known)}, not "{values[key]}"')
        theta = rope.get("rope_theta") or values.get("rope_theta")
        if theta is None:
            raise KeyError("rope_theta")
        conditioned_on = None
        if values.get("conditioned_on") is not None:
            conditioned_on = TargetStates.from_json(values["conditioned_on"])
            if values["attention_pattern"] != "block":
                raise ValueError('conditioned_on needs attention_pattern "block"')
        config = cls(
            vocab_size=int(values["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(values["intermediate_size"]),
            num_layers=int(values["num_hidden_layers"]),
            num_heads=heads,
            num_key_value_heads=int(values.get("num_key_value_heads") or heads),
            head_dim=int(values.get("head_dim") or hidden // heads),
            max_positions=int(values["max_position_embeddings"]),
            rope_theta=float(theta),
            rms_norm_eps=float(values["rms_norm_eps"]),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
            attention_bias=bool(values["attention_bias"]),
            mask_token_id=int(values["mask_token_id"]),
            attention_pattern=values["attention_pattern"],
            predicts=values["predicts"],
            conditioned_on=conditioned_on,
        )
        if not 0 <= config.mask_token_id <= config.vocab_size:
            raise ValueError(
                f"mask_token_id {config.mask_token_id} is neither one of the {config.vocab_size} "
                f"tokens nor the one after them ({config.vocab_size})"
            )
        return config

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding: those of the vocabulary, and one for a mask beyond it."""
        return max(self.vocab_size, self.mask_token_id + 1)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor in the folder."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        outputs = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            **{f"self_attn.{name}.weight": (rows, hidden) for name, rows in outputs.items()},
            "self_attn.o_proj.weight": (hidden, queries),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        if self.attention_bias:
            layer |= {f"self_attn.{name}.bias": (rows,) for name, rows in outputs.items()}
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.num_embeddings, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        for index in range(self.num_layers):
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        if (states := self.conditioned_on) is not None:
            width = len(states.layers) * states.hidden_size
            shapes["target_states.projection.weight"] = (hidden, width)
            shapes["target_states.unknown"] = (hidden,)
        return shapes

    def as_json(self) -> dict[str, Any]:
        """What `config.json` of a folder of ours says."""
        states = self.conditioned_on
        conditioned_on = {} if states is None else {"conditioned_on": states.as_json()}
        return {
            "architectures": ["DiffusionDrafter"],
            "model_type": "diffusion_drafter",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mask_token_id": self.mask_token_id,
            "attention_pattern": self.attention_pattern,
            "predicts": self.predicts,
            **conditioned_on,
        }


def read_config(path: str | Path) -> DrafterConfig:
    """The config of a drafter's folder.

    Raises:
        SpecPluginsError: No such folder, no config, or one of a model that is no drafter we know.
    """
    folder = Path(path)
    file = folder / "config.json"
    if not file.is_file():
        raise SpecPluginsError(
            f"{folder} is not the folder of a diffusion drafter: it has no config.json. "
            f"`{COMMAND}` writes such folders."
        )
    try:
        values: dict[str, Any] = json.loads(file.read_text())
        architecture = (values.get("architectures") or ["none"])[0]
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise SpecPluginsError(f"{file} is not a model's config: {error!r}.") from error
    if architecture not in ARCHITECTURES:
        raise SpecPluginsError(
            f'{file}: architecture "{architecture}" is not a diffusion drafter we know.'
            f"{did_you_mean(architecture, ARCHITECTURES)} Known: {listed(ARCHITECTURES)}. "
            f"`{COMMAND}` trains one for any target."
        )
    values = {**ARCHITECTURES[architecture], **values}
    if values.get("mask_token_id") is None:
        raise SpecPluginsError(
            f"{file} has no mask_token_id: a diffusion drafter needs the token that stands for "
            "those not known yet. Add it if the model has one; a causal model has none."
        )
    try:
        config = DrafterConfig.from_json(values)
    except KeyError as error:
        raise SpecPluginsError(f"{file} lacks {error.args[0]}.") from error
    except (TypeError, ValueError) as error:
        raise SpecPluginsError(f"{file}: {error}.") from error
    return config


def check_folder(
    path: str | Path, facts: ModelFacts, context_window: int | None = None
) -> DrafterConfig:
    """Whether a folder holds a drafter for the model about to be served. Loads no weight.

    Args:
        path: The drafter's folder.
        facts: Of the target.
        context_window: Tokens of context the drafter shall see; None: not checked.

    Returns:
        Its config.

    Raises:
        SpecPluginsError: It is incomplete, of an unknown architecture, made for another tokenizer
            or vocabulary, conditioned on another target, or made for shorter contexts.
    """
    folder = Path(path)
    config = read_config(folder)
    _check_weights(folder, config)
    if config.vocab_size != facts.vocab_size:
        raise SpecPluginsError(
            f"the diffusion drafter {folder} drafts from {config.vocab_size} tokens, but "
            f"{facts.model} has logits for {facts.vocab_size}: they must share a tokenizer. "
            f"`{COMMAND}` trains a drafter for this target."
        )
    _check_tokenizer(folder, facts.model)
    if config.conditioned_on is not None:
        _recognise(folder, config.conditioned_on, facts)
    longest = config.max_positions - facts.num_speculative_tokens
    if context_window is not None and context_window > longest:
        raise SpecPluginsError(
            f"context_window {context_window} and {facts.num_speculative_tokens} draft tokens are "
            f"longer than the {config.max_positions} positions of the diffusion drafter {folder}: "
            f"set context_window to {longest} or less."
        )
    return config


def check_same_tokens(drafter: Path, target: Path) -> None:
    """Whether two models' folders have the same tokens, where both have a tokenizer.json.

    Raises:
        SpecPluginsError: They have not.
    """
    files = [folder / "tokenizer.json" for folder in (drafter, target)]
    if not all(file.is_file() for file in files):
        return
    if files[0].read_bytes() == files[1].read_bytes():
        return
    ours, theirs = (dict(_tokens_of(file)) for file in files)
    if ours != theirs:
        differing = sum(theirs.get(token) != number for token, number in ours.items())
        raise SpecPluginsError(
            f"{drafter} has another tokenizer than the target {target}: {differing} of its "
            f"{len(ours)} tokens have another id there, or none. `{COMMAND}` trains a drafter "
            "for any target."
        )


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a model's folder: one, or the shards its index names.

    Raises:
        SpecPluginsError: There is none, or a shard is missing.
    """
    folder = Path(path)
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise SpecPluginsError(f"{index} is not an index of weights: {error!r}.") from error
    files = [folder / name for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise SpecPluginsError(
            f"the diffusion drafter {folder} is incomplete: {', '.join(missing)} is missing."
        )
    return files


def _check_weights(folder: Path, config: DrafterConfig) -> None:
    """Names and shapes of all tensors, from the headers alone."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        try:
            with safe_open(str(file), framework="pt") as tensors:
                # A header's offsets must reach the end of the file: a cut one fails here.
                found |= {
                    name: tuple(tensors.get_slice(name).get_shape())
                    for name in tensors.keys()  # noqa: SIM118  # it is no dict
                }
        except (SafetensorError, OSError) as error:
            raise SpecPluginsError(f"{file} is not a whole safetensors file: {error}.") from error
    for name, shape in config.weight_shapes().items():
        if name not in found:
            raise SpecPluginsError(
                f"the diffusion drafter {folder} is incomplete: its weights lack {name}."
            )
        if found[name] != shape:
            raise SpecPluginsError(
                f"the diffusion drafter {folder} does not match its config.json: {name} is "
                f"{list(found[name])}, not {list(shape)}."
            )


def _check_tokenizer(folder: Path, model: str) -> None:
    """The drafter's tokens must be the target's, as far as the target's tokenizer is at hand."""
    if not (folder / "tokenizer.json").is_file():
        raise SpecPluginsError(
            f"the diffusion drafter {folder} is incomplete: tokenizer.json is missing. Copy the "
            "one it was trained with, which must be the target's."
        )
    targets = _tokenizer_of_target(model)
    if targets is not None:
        check_same_tokens(folder, targets.parent)


def _recognise(folder: Path, states: TargetStates, facts: ModelFacts) -> None:
    """Whether a target is the one whose hidden states a drafter learned to read."""
    sizes = {name: getattr(states, name) for name in ("hidden_size", "num_layers")}
    advice = f"`{COMMAND}` trains a drafter for this target; one without conditioning fits any"
    try:
        check_sizes("diffusion drafter", states.model, sizes, facts)
    except SpecPluginsError as error:
        raise SpecPluginsError(f"{folder}: {error} {advice}.") from error
    target = _folder_of_target(facts)
    if target is None:
        return
    differs = difference(_probes_in(folder), read_probes(target, states.num_layers))
    if differs is not None:
        raise SpecPluginsError(
            f'{folder} reads hidden states of another model ("{states.model}") than {facts.model}: '
            f"{differs}. {advice}."
        )


def _probes_in(folder: Path) -> dict[str, Tensor]:
    """Samples of the target's weights that a drafter's folder holds."""
    from safetensors import safe_open

    probes: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with safe_open(str(file), framework="pt") as tensors:
            probes |= {
                name.removeprefix(PROBE): tensors.get_tensor(name)
                for name in tensors.keys()  # noqa: SIM118  # it is no dict
                if name.startswith(PROBE)
            }
    return probes


def _folder_of_target(facts: ModelFacts) -> Path | None:
    """Where the target's weights are; None if they are not on this machine yet."""
    if Path(facts.model).is_dir():
        return Path(facts.model)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(facts.model, revision=facts.revision, local_files_only=True))
    except (ImportError, OSError, ValueError):  # not installed; not there; no repository's name
        return None


def _tokenizer_of_target(model: str) -> Path | None:
    """The target's tokenizer.json, if it lies on this machine already."""
    if (local := Path(model) / "tokenizer.json").is_file():
        return local
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, "tokenizer.json")
    except (ImportError, ValueError):  # not installed; not a repository's name
        return None
    return Path(cached) if isinstance(cached, str) else None


def _tokens_of(file: Path) -> Iterator[tuple[str, int]]:
    """Token and id of a tokenizer.json, without those added for control."""
    try:
        vocabulary = json.loads(file.read_text())["model"]["vocab"]
        # A unigram model lists [token, score] in the order of ids.
        if isinstance(vocabulary, list):
            vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
        yield from vocabulary.items()
    except (ValueError, KeyError, TypeError, AttributeError, LookupError) as error:
        raise SpecPluginsError(f"{file} is not a tokenizer: {error!r}.") from error
