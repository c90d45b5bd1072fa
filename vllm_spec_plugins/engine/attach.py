"""Hangs the right adapter on a worker's runner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from .adapter import RunnerAdapter


def attach(worker: Any, vllm_config: VllmConfig) -> RunnerAdapter:
    """Hang an adapter on a worker's runner; it stays reachable as `runner.spec_plugins`."""
    adapter = _adapter_for(worker.model_runner, vllm_config)
    worker.model_runner.spec_plugins = adapter
    warm_up = worker.compile_or_warm_up_model

    def compile_or_warm_up_model() -> Any:
        times = warm_up()
        adapter.warm_up()
        return times

    worker.compile_or_warm_up_model = compile_or_warm_up_model
    # `LLM.collective_rpc("spec_plugins_metrics")` reads the tallies of every worker.
    worker.spec_plugins_metrics = adapter.tallies
    return adapter


def _adapter_for(runner: Any, vllm_config: VllmConfig) -> RunnerAdapter:
    if vllm_config.use_v2_model_runner:
        if vllm_config.scheduler_config.async_scheduling:
            from .v2_async_runner import V2AsyncAdapter

            return V2AsyncAdapter(runner, vllm_config)
        from .v2_runner import V2Adapter

        return V2Adapter(runner, vllm_config)
    from .v1_runner import V1Adapter

    return V1Adapter(runner, vllm_config)
