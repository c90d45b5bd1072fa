"""Asynchronous scheduling on model runner V2: a step is planned before the last is verified."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [
    pytest.mark.engine,
    pytest.mark.v2,
    pytest.mark.usefixtures("acme_methods", "asynchronous"),
]

MAX_TOKENS = 24
LENGTHS = (8, 33, 40, 20, 17, 5)
PROMPTS = [
    {"prompt_token_ids": [(i * k * k + 5 * k) % 13 + 3 for k in range(length)]}
    for i, length in enumerate(LENGTHS)
]

_DRAFTS = {"num_speculative_tokens": 3}
ON_DEVICE = {"method": "acme_on_device", **_DRAFTS}
NGRAM = {"method": "ngram_gpu", "prompt_lookup_min": 1, "prompt_lookup_max": 3, **_DRAFTS}
BLOCK = {"name": "lossless", "rule": "block"}
CONFIGURATIONS = {
    "a plugin's, token": ON_DEVICE,
    "ngram of vLLM, block": {**NGRAM, "verifier": BLOCK},
}
MORE_CONFIGURATIONS = {
    "a plugin's, block": {**ON_DEVICE, "verifier": BLOCK},
    "a plugin's draws, token": {**ON_DEVICE, "draws": True},
    "ngram of vLLM, token": {**NGRAM, "verifier": "lossless"},
    "draft_model of vLLM, token": {"method": "draft_model", **_DRAFTS, "verifier": "lossless"},
    "draft_model of vLLM, block": {"method": "draft_model", **_DRAFTS, "verifier": BLOCK},
}


@pytest.fixture(scope="module")
def plain(serve_v2: Any, generate: Any) -> list[list[int]]:
    with serve_v2() as llm:
        return generate(llm, PROMPTS, max_tokens=MAX_TOKENS)


def is_asynchronous(llm: Any) -> bool:
    return llm.llm_engine.vllm_config.scheduler_config.async_scheduling


@pytest.mark.parametrize(
    "name",
    [*CONFIGURATIONS, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE_CONFIGURATIONS)],
)
def test_greedy_texts_are_plain_decodings(
    name: str, serve_v2: Any, plain: list[list[int]], generate: Any, drafted_by: Any, watch: Any
) -> None:
    """Prompts come in parts, and six requests share four slots."""
    with serve_v2({**CONFIGURATIONS, **MORE_CONFIGURATIONS}[name]) as llm:
        assert is_asynchronous(llm)
        watched = watch(llm)
        assert generate(llm, PROMPTS, max_tokens=MAX_TOKENS) == plain
        [tally] = drafted_by(llm).values()
        assert tally["accepted"] > 0
        assert tally["accepted"] < tally["drafted"]
        assert watched.chunked_prompts > 0
