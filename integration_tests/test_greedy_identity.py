"""Greedy text under speculation is plain decoding's, token by token.

64 prompts in float32, in an engine that has to preempt requests, reads prompts in chunks and
finds prefixes in its cache; the reference decodes at leisure, with none of the three.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

MAX_TOKENS = 48
#: A change of batch shape changes the order of float32 sums, so two tokens whose logprobs
#: differ by less than this may change places.
NEAR_TIE = 1e-3

#: Key/value blocks for about a third of a full batch, and prompts in chunks.
TIGHT = {
    "num_gpu_blocks_override": 24,
    "block_size": 32,
    "max_num_batched_tokens": 96,
    "enable_prefix_caching": True,
}
AT_LEISURE = {"max_num_batched_tokens": 4096, "max_num_seqs": 64, "enable_prefix_caching": False}

LOSSLESS = {"verifier": "lossless"}
BLOCK = {"verifier": {"name": "lossless", "rule": "block"}}
NGRAM_ADAPTIVE = {"method": "ngram_adaptive", "num_speculative_tokens": 4}
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 4,
}
EARLY_EXIT = {"method": "early_exit", "num_speculative_tokens": 4}
DRAFT_MODEL = {"method": "draft_model", "num_speculative_tokens": 3}

CONFIGURATIONS = {
    "ngram_adaptive, token": {**NGRAM_ADAPTIVE, **LOSSLESS},
    "ngram_adaptive, block": {**NGRAM_ADAPTIVE, **BLOCK},
    "ngram_adaptive, on the device": {**NGRAM_ADAPTIVE, "matching": "device", **LOSSLESS},
    "ngram of vLLM": {**NGRAM, **LOSSLESS},
    "draft_model of vLLM": {**DRAFT_MODEL, **LOSSLESS},
    "third party": {"method": "acme_sampled", "num_speculative_tokens": 4},
    "jacobi": {"method": "jacobi", "num_speculative_tokens": 4},
    "early_exit": {**EARLY_EXIT, "exit_layer": 1},
    "early_exit, adapter": {**EARLY_EXIT, "adapter": ""},
    "early_exit, exit chosen, del": {**EARLY_EXIT, "length_control": "del"},
    "early_exit, exits per token": {**EARLY_EXIT, "exit_layers": [1, 2, 3], "exit_confidence": 0.4},
    "early_exit, thompson": {
        **EARLY_EXIT,
        "exit_layer": 2,
        "length_control": {"name": "thompson", "cost_ratio": 0.1},
    },
}
#: Kin of configurations that run by default.
SLOW = {
    "ngram_adaptive, block",
    "ngram_adaptive, on the device",
    "ngram of vLLM",
    "third party",
    "early_exit, exits per token",
    "early_exit, thompson",
}


@pytest.fixture(scope="module")
def many_prompts() -> list[dict[str, list[int]]]:
    """64 prompts of 5 to 130 tokens; half of them begin alike, all of them repeat themselves."""
    dice = random.Random(1)
    shared = [dice.randrange(3, 512) for _ in range(70)]
    found = []
    for i in range(64):
        own = [dice.randrange(3, 512) for _ in range(dice.randrange(5, 30))]
        found.append({"prompt_token_ids": (shared if i % 2 else []) + own + own[: len(own) // 2]})
    return found


@pytest.fixture(scope="module")
def draft_model(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`random_model` with some noise in its weights: sometimes right, sometimes not."""
    import torch
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("draft_model")
    model = LlamaForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for weights in model.parameters():
            if weights.ndim == 2:
                weights.add_(torch.randn_like(weights) * weights.std() * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain_texts(
    serve_offline: Callable[..., Any],
    generate: Callable[..., list[list[int]]],
    many_prompts: list[dict[str, list[int]]],
) -> Callable[[Path], list[list[int]]]:
    """`plain_texts(model)`: what plain decoding writes."""

    @cache
    def texts(model: Path) -> list[list[int]]:
        with serve_offline(model=str(model), skip_tokenizer_init=True, **AT_LEISURE) as llm:
            return generate(llm, many_prompts, max_tokens=MAX_TOKENS)

    return texts


@pytest.mark.usefixtures("acme_methods")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in CONFIGURATIONS
    ],
)
def test_greedy_text_is_plain_decodings(
    name: str,
    serve_offline: Callable[..., Any],
    generate: Callable[..., list[list[int]]],
    watch: Callable[..., Any],
    drafted_by: Callable[..., Any],
    random_model: Path,
    exiting_model: Path,
    exit_adapter: str,
    draft_model: Path,
    many_prompts: list[dict[str, list[int]]],
    plain_texts: Callable[[Path], list[list[int]]],
) -> None:
    config = dict(CONFIGURATIONS[name])
    model = exiting_model if config["method"] == "early_exit" else random_model
    wanted = plain_texts(model)
    if config["method"] == "draft_model":
        config["model"] = str(draft_model)
    if "adapter" in config:
        config["adapter"] = exit_adapter
    with serve_offline(config, model=str(model), skip_tokenizer_init=True, **TIGHT) as llm:
        watched = watch(llm)
        texts = generate(llm, many_prompts, max_tokens=MAX_TOKENS)
        [tally] = drafted_by(llm).values()

    assert watched.preemptions > 5
    assert watched.resumptions > 5
    assert watched.cached_prompt_tokens > 500
    assert watched.chunked_prompts > 5
    # `del` drafts as much as its steps' times tell it to.
    assert tally["accepted"] > (0 if config.get("length_control") == "del" else 50)
    assert tally["drafted"] - tally["accepted"] > 200
    assert_same_texts(texts, wanted, many_prompts, model, serve_offline)


def assert_same_texts(
    texts: Sequence[list[int]],
    wanted: Sequence[list[int]],
    prompts: Sequence[dict[str, list[int]]],
    model: Path,
    serve_offline: Callable[..., Any],
) -> None:
    """Equal, but for at most one text in 64 that took the other side of a near tie."""
    assert [len(text) for text in texts] == [len(text) for text in wanted]
    different = [i for i, text in enumerate(texts) if text != wanted[i]]
    assert len(different) <= len(texts) // 64, f"texts {different} differ"
    for i in different:
        same = next(n for n, (a, b) in enumerate(zip(texts[i], wanted[i], strict=True)) if a != b)
        pair = texts[i][same], wanted[i][same]
        context = prompts[i]["prompt_token_ids"] + wanted[i][:same]
        gap = logprob_gap(context, pair, model, serve_offline)
        assert gap < NEAR_TIE, f"text {i} has {pair[0]} for {pair[1]}, {gap:.4f} less likely"


def logprob_gap(
    context: list[int], pair: tuple[int, int], model: Path, serve_offline: Callable[..., Any]
) -> float:
    """How much more likely plain decoding finds the second token than the first."""
    from vllm import SamplingParams

    leisure = {"model": str(model), "skip_tokenizer_init": True, **AT_LEISURE}
    with serve_offline(**leisure, max_logprobs=-1) as llm:
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False)
        [output] = llm.generate([{"prompt_token_ids": context}], params, use_tqdm=False)
        logprobs = output.outputs[0].logprobs[0]
    return logprobs[pair[1]].logprob - logprobs[pair[0]].logprob
