"""Two tensor-parallel ranks decode what one rank decodes, and agree with each other.

Every rank drafts and verifies for itself. Drafts come from the text or from the shared layers,
random numbers from the request and the position, so no decision has to be sent between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]

EARLY_EXIT = {"method": "early_exit", "num_speculative_tokens": 4, "exit_layer": 2}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "ngram_adaptive": {
        "method": "ngram_adaptive",
        "num_speculative_tokens": 4,
        "min_acceptance": 0.05,
        "verifier": "lossless",
    },
    #: Ranks must have the same logits, not only the same tokens.
    "jacobi": {"method": "jacobi", "num_speculative_tokens": 4, "filler": "random"},
    "early_exit": {**EARLY_EXIT, "length_control": {"name": "confidence", "threshold": 0.2}},
    #: Rows of the head are gathered from both ranks.
    "early_exit, ranked": {**EARLY_EXIT, "draft_vocabulary": {"file": "", "dynamic_tokens": 32}},
    #: Every rank has the adapter whole, over pages of its own.
    "early_exit, adapter": {
        "method": "early_exit",
        "num_speculative_tokens": 4,
        "adapter": "",
    },
    #: Ranks must choose the same exit and length.
    "early_exit, del": {**EARLY_EXIT, "exit_layer": "auto", "length_control": "del"},
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


# Ranks cannot import this file: the function itself must travel, not its name.
known_output.__module__ = "__main__"


@pytest.fixture(scope="module")
def decode(
    serve_offline: Callable[..., Any],
    generate: Callable[..., list[list[int]]],
    exiting_model: Path,
    prompts: list[dict[str, list[int]]],
) -> Callable[..., Decoded]:
    def decode(speculative_config: Any, num_ranks: int) -> Decoded:
        with serve_offline(
            speculative_config,
            model=str(exiting_model),
            skip_tokenizer_init=True,
            tensor_parallel_size=num_ranks,
        ) as llm:
            texts = {name: generate(llm, prompts, **s) for name, s in SAMPLINGS.items()}
            known = llm.collective_rpc(known_output)
            has_metrics = speculative_config is not None
            metrics = llm.collective_rpc("spec_plugins_metrics") if has_metrics else []
        return Decoded(texts, metrics, known)

    return decode


@pytest.fixture(scope="module", params=list(CONFIGURATIONS))
def config(
    request: pytest.FixtureRequest,
    write_ranked: Callable[..., str],
    exit_adapter: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    chosen = dict(CONFIGURATIONS[request.param])
    if "draft_vocabulary" in chosen:
        path = tmp_path_factory.mktemp("ranked") / "even.safetensors"
        file = write_ranked(path, 512, {"even": range(0, 512, 2)})
        chosen["draft_vocabulary"] = {**chosen["draft_vocabulary"], "file": file}
    if "adapter" in chosen:
        chosen["adapter"] = exit_adapter
    return chosen


@pytest.fixture(scope="module")
def one_rank(decode: Callable[..., Decoded], config: dict[str, Any]) -> Decoded:
    # Timed costs differ from run to run, and those of two ranks are not timed.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_spec_plugins.proposers.early_exit.measure_costs", costs_of_layers)
        return decode(config, 1)


def costs_of_layers(target: Any, passes: Any, most: int, *_: Any) -> Any:
    """What is used under tensor parallelism, in place of `exit_timing.measure_costs`."""
    from vllm_spec_plugins.exit_selection import ExitCosts

    layers = range(1, len(passes) + 1)
    return ExitCosts.from_layers(layers, target.num_layers, target.head_in_layers, most)


@pytest.fixture(scope="module")
def two_ranks(decode: Callable[..., Decoded], config: dict[str, Any], one_rank: Decoded) -> Decoded:
    del one_rank  # one engine at a time
    return decode(config, 2)


@pytest.fixture(scope="module")
def plain(decode: Callable[..., Decoded]) -> Decoded:
    return decode(None, 1)


def test_greedy_text_is_plain_decodings(plain: Decoded, two_ranks: Decoded) -> None:
    assert two_ranks.texts["greedy"] == plain.texts["greedy"]


@pytest.mark.parametrize("sampling", ["seeded", "without a seed"])
def test_sampled_text_is_that_of_one_rank(
    sampling: str, one_rank: Decoded, two_ranks: Decoded
) -> None:
    assert two_ranks.texts[sampling] == one_rank.texts[sampling]


def test_the_ranks_agree(two_ranks: Decoded) -> None:
    """vLLM reads the tokens of the first rank only; the others must have drawn the same.

    Of the last batch, whose last step the ranks have not been told is over.
    """
    first, second = two_ranks.known
    assert any(first.values())
    assert first == second


def test_steps_are_recorded_once(one_rank: Decoded, two_ranks: Decoded) -> None:
    [wanted] = one_rank.metrics
    first, second = two_ranks.metrics
    assert first == wanted
    # Up to here a rank that drew otherwise would have drafted and accepted otherwise.
    assert first["by_method"][0]["drafted"] > 10
    assert first["by_method"][0]["accepted"] > 3
    assert second["by_method"] == []
