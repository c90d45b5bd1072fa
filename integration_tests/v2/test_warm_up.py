"""On a GPU vLLM warms V2's kernels up with steps of requests that nobody sent."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.v2]

EARLY_EXIT = {"method": "early_exit", "exit_layer": 2, "num_speculative_tokens": 3}


def test_steps_of_the_warm_up_are_verified_and_nobody_is_told(
    serve_v2: Any, adapter_of: Any, drafted_by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come with full drafts, whatever was drafted."""
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    # With vLLM's own, every option at once, one of its kernels cannot be interpreted.
    monkeypatch.setattr(SamplingParams, "for_sampler_warmup", SamplingParams)

    with serve_v2(EARLY_EXIT, max_num_seqs=2) as llm:
        adapter = adapter_of(llm)
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        proposer, verified = adapter.proposer, []
        proposer.propose = None  # not callable: it would be a failure
        tell_of, adapter._serves = adapter.verified, False
        adapter.verified = lambda batch, decided: (
            verified.append(batch.max_num_draft),
            tell_of(batch, decided),
        )
        warmup_kernels(adapter.runner, worker.execute_model, worker.sample_tokens)
        assert EARLY_EXIT["num_speculative_tokens"] in verified
        assert not drafted_by(llm)
        assert adapter._failures == 0
        assert len(adapter.requests) == 0
