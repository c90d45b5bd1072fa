"""Greedy texts on model runner V2 are plain decoding's, on V2 and on V1.

Prompts come in parts (32 tokens a step), six requests share four slots, and of a small cache
they lose their pages to each other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.v2]

NUM_SPECULATIVE_TOKENS = 3
MAX_TOKENS = 24
#: Token ids below 16, in ragged lengths, with n-grams that come again.
LENGTHS = (8, 33, 40, 20, 17, 5)
PROMPTS = [
    [(i * k * k + 5 * k) % 13 + 3 for k in range(length)] for i, length in enumerate(LENGTHS)
]

_DRAFTS = {"num_speculative_tokens": NUM_SPECULATIVE_TOKENS}
EARLY_EXIT = {"method": "early_exit", "exit_layer": 2, **_DRAFTS}
NGRAM_ADAPTIVE = {"method": "ngram_adaptive", "min_acceptance": 0.05, **_DRAFTS}
NGRAM = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3, **_DRAFTS}
BLOCK = {"name": "lossless", "rule": "block"}
CONFIGURATIONS = {
    "early_exit, token": EARLY_EXIT,
    "ngram_adaptive, block": {**NGRAM_ADAPTIVE, "verifier": BLOCK},
}
MORE_CONFIGURATIONS = {
    "early_exit, block": {**EARLY_EXIT, "verifier": BLOCK},
    "early_exit, confidence": {
        **EARLY_EXIT,
        "length_control": {"name": "confidence", "threshold": 0.5},
    },
    "early_exit, exits per token": {
        "method": "early_exit",
        "exit_layers": [1, 2, 3],
        "exit_confidence": 0.5,
        **_DRAFTS,
    },
    "early_exit, del": {
        "method": "early_exit",
        "exit_layer": "auto",
        "length_control": "del",
        **_DRAFTS,
    },
    "early_exit, ranked": {**EARLY_EXIT, "draft_vocabulary": {"file": "RANKED", "size": 8}},
    "early_exit, ranked and dynamic, typical": {
        **EARLY_EXIT,
        "draft_vocabulary": {"file": "RANKED", "size": 8, "dynamic_tokens": 2},
        "verifier": "typical",
    },
    "ngram_adaptive, token": NGRAM_ADAPTIVE,
    "ngram of vLLM, token": {**NGRAM, "verifier": "lossless"},
    "draft_model of vLLM, block": {"method": "draft_model", **_DRAFTS, "verifier": BLOCK},
    "jacobi": {"method": "jacobi", "filler": "random", **_DRAFTS},
}


@pytest.fixture(scope="module")
def plain(plain_texts: Any) -> list[list[int]]:
    return plain_texts(as_prompts(), MAX_TOKENS)


def as_prompts() -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": prompt} for prompt in PROMPTS]


def costs_of_layers(_target: Any, passes: Any, most: int, *_: Any) -> Any:
    """In place of `exit_timing.measure_costs`: what exits cost a large model."""
    from vllm_spec_plugins.exit_selection import ExitCosts

    return ExitCosts.from_layers(range(1, len(passes) + 1), 32, 0.0, most)


@pytest.mark.parametrize(
    "name",
    [*CONFIGURATIONS, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE_CONFIGURATIONS)],
)
def test_greedy_texts_are_plain_decodings(
    name: str,
    serve_v2: Any,
    plain: list[list[int]],
    generate: Any,
    drafted_by: Any,
    watch: Any,
    write_ranked: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Timed on this model, drafting never pays, and `del` would not draft.
    monkeypatch.setattr("vllm_spec_plugins.proposers.early_exit.measure_costs", costs_of_layers)
    config = {**CONFIGURATIONS, **MORE_CONFIGURATIONS}[name]
    if "draft_vocabulary" in config:
        ranked = write_ranked(tmp_path / "ranked.safetensors", 16, {"all": range(3, 13)})
        config = {**config, "draft_vocabulary": {**config["draft_vocabulary"], "file": ranked}}
    with serve_v2(config) as llm:
        watched = watch(llm)
        assert generate(llm, as_prompts(), max_tokens=MAX_TOKENS) == plain
        [tally] = drafted_by(llm).values()
        assert tally["accepted"] > 0
        assert tally["accepted"] < tally["drafted"]
        assert watched.chunked_prompts > 0


@pytest.mark.parametrize(
    "config", [EARLY_EXIT, pytest.param(NGRAM_ADAPTIVE, marks=pytest.mark.slow)]
)
def test_preempted_requests_go_on_as_they_would(
    config: dict[str, Any],
    serve_v2: Any,
    plain: list[list[int]],
    generate: Any,
    watch: Any,
    adapter_of: Any,
) -> None:
    """The prompts of four requests fit into 6 blocks of 32 tokens, their texts do not."""
    small = {"block_size": 32, "num_gpu_blocks_override": 7, "enable_prefix_caching": False}
    with serve_v2(config, **small) as llm:
        watched = watch(llm)
        assert generate(llm, as_prompts(), max_tokens=MAX_TOKENS) == plain
        assert watched.preemptions > 0
        adapter = adapter_of(llm)
        generate(llm, as_prompts()[:1], max_tokens=1)
        assert len(adapter.requests) == 1
        assert not adapter._preempted


@pytest.mark.slow
def test_greedy_texts_are_those_of_runner_v1(
    plain: list[list[int]],
    narrow_models: tuple[Path, Path],
    engine_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """V1 runs in a process of its own, where Triton is not interpreted."""
    script = tmp_path / "on_v1.py"
    script.write_text(
        "import json, sys\n"
        "from vllm import LLM, SamplingParams\n"
        "model, prompts, max_tokens = json.loads(sys.argv[1])\n"
        "llm = LLM(model=model, skip_tokenizer_init=True, enforce_eager=True, dtype='float32',\n"
        "          max_model_len=128, max_num_seqs=4, max_num_batched_tokens=32,\n"
        "          num_gpu_blocks_override=64, disable_log_stats=True, seed=0)\n"
        "assert not llm.llm_engine.vllm_config.use_v2_model_runner\n"
        "params = SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False,\n"
        "                        ignore_eos=True)\n"
        "outputs = llm.generate([{'prompt_token_ids': p} for p in prompts], params,\n"
        "                       use_tqdm=False)\n"
        "print('TEXTS' + json.dumps([list(o.outputs[0].token_ids) for o in outputs]))\n"
    )
    apart = ("TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER")
    environment = {k: v for k, v in os.environ.items() if k not in apart}
    argument = json.dumps([str(narrow_models[0]), PROMPTS, MAX_TOKENS])
    done = subprocess.run(
        [sys.executable, str(script), argument],
        env={**environment, **engine_environment},
        capture_output=True,
        text=True,
        check=True,
    )
    [line] = [line for line in done.stdout.splitlines() if line.startswith("TEXTS")]
    assert json.loads(line.removeprefix("TEXTS")) == plain


@pytest.mark.slow
@pytest.mark.usefixtures("acme_methods")
@pytest.mark.parametrize("draws", [False, True])
def test_a_proposer_on_the_device_is_served_synchronously_too(
    draws: bool, serve_v2: Any, plain: list[list[int]], generate: Any, drafted_by: Any
) -> None:
    """Beside a length controller, say: with a copy of the texts."""
    config = {"method": "acme_on_device", "draws": draws, **_DRAFTS}
    with serve_v2({**config, "length_control": "additive"}) as llm:
        assert not llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        assert generate(llm, as_prompts(), max_tokens=MAX_TOKENS) == plain
        [tally] = drafted_by(llm).values()
        assert 0 < tally["accepted"] < tally["drafted"]


def test_options_of_requests(
    serve_v2: Any, plain: list[list[int]], generate: Any, drafted_by: Any
) -> None:
    """A request without drafts, one with one token each, one by another verifier."""
    options = [
        {"spec_decode": {"enabled": False}},
        {"spec_decode": {"num_speculative_tokens": 1}},
        {"spec_decode": {"verifier": "lossless"}},
        {},
    ]
    config = {**EARLY_EXIT, "verifier": "typical"}
    each = [{"extra_args": options[i % 4]} for i in range(len(PROMPTS))]
    with serve_v2(config) as llm:
        assert generate(llm, as_prompts(), max_tokens=MAX_TOKENS, each=each) == plain
        tallies = drafted_by(llm)
    assert {verifier for _, verifier in tallies} == {"typical", "lossless"}


def test_what_v2_does_not_serve_is_refused(
    serve_v2: Any, write_ranked: Any, tmp_path: Path
) -> None:
    """One message before anything loads, with the way out."""
    from vllm_spec_plugins.errors import UnsupportedEngineError

    ranked = write_ranked(tmp_path / "ranked.safetensors", 16, {"all": range(3, 12)})
    config = {"method": "draft_model", **_DRAFTS, "draft_vocabulary": {"file": ranked, "size": 8}}
    with (
        pytest.raises(UnsupportedEngineError, match="VLLM_USE_V2_MODEL_RUNNER=0"),
        serve_v2(config),
    ):
        pass
