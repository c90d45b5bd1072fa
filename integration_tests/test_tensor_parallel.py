"""Two tensor-parallel ranks decode what one rank decodes, and agree with each other.

Every rank drafts and verifies for itself. Drafts come from the text, random numbers from the
request and the position, so nothing has to be sent between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CONFIG = {
    "method": "ngram_adaptive",
    "num_speculative_tokens": 4,
    "min_acceptance": 0.05,
    "verifier": "lossless",
}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 3},
    # Streams of requests without a seed follow from the engine's seed and their arrival.
    "without a seed": {"temperature": 0.7},
}


@dataclass(frozen=True)
class Decoded:
    """Texts by sampling; metrics and known output tokens by request, of each rank."""

    texts: dict[str, list[list[int]]]
    metrics: list[dict[str, Any]]
    known: list[dict[str, list[int]]]


def known_output(worker: Any) -> dict[str, list[int]]:
    """Runs on a rank: the output of the requests it has not yet been told are finished."""
    states = worker.model_runner.requests.items()
    return {request_id: list(state.output_token_ids) for request_id, state in states}


@pytest.fixture(scope="module")
def decode(
    serve_offline: Callable[..., Any],
    generate: Callable[..., list[list[int]]],
    prompts: list[dict[str, list[int]]],
) -> Callable[..., Decoded]:
    def decode(speculative_config: Any, num_ranks: int) -> Decoded:
        with serve_offline(speculative_config, tensor_parallel_size=num_ranks) as llm:
            texts = {name: generate(llm, prompts, **s) for name, s in SAMPLINGS.items()}
            known = llm.collective_rpc(known_output)
            has_metrics = speculative_config is not None
            metrics = llm.collective_rpc("spec_plugins_metrics") if has_metrics else []
        return Decoded(texts, metrics, known)

    return decode


@pytest.fixture(scope="module")
def one_rank(decode: Callable[..., Decoded]) -> Decoded:
    return decode(CONFIG, 1)


@pytest.fixture(scope="module")
def two_ranks(decode: Callable[..., Decoded], one_rank: Decoded) -> Decoded:
    del one_rank  # one engine at a time
    return decode(CONFIG, 2)


def test_greedy_text_is_plain_decodings(decode: Callable[..., Decoded], two_ranks: Decoded) -> None:
    assert two_ranks.texts["greedy"] == decode(None, 1).texts["greedy"]


@pytest.mark.parametrize("sampling", ["seeded", "without a seed"])
def test_sampled_text_is_that_of_one_rank(
    sampling: str, one_rank: Decoded, two_ranks: Decoded
) -> None:
    assert two_ranks.texts[sampling] == one_rank.texts[sampling]


def test_the_ranks_agree(two_ranks: Decoded, prompts: list[Any]) -> None:
    """vLLM reads the tokens of the first rank only; the others must have drawn the same."""
    first, second = two_ranks.known
    assert len(first) == len(prompts)
    assert first == second


def test_steps_are_recorded_once(one_rank: Decoded, two_ranks: Decoded) -> None:
    [wanted] = one_rank.metrics
    first, second = two_ranks.metrics
    assert first == wanted
    assert first["by_method"][0]["accepted"] > 50
    assert second["by_method"] == []
