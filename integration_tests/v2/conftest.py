"""Model runner V2 on the CPU, in Triton's interpreter: a process of its own.

`make test-v2` runs these tests; the default suite runs a part of them in a subprocess
(`integration_tests/test_model_runner_v2.py`). Elsewhere they are not collected: Triton is
interpreted from the start of a process or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ALONE = os.environ.get("VLLM_SPEC_TEST_V2") == "1"
collect_ignore_glob = [] if ALONE else ["test_*.py"]
if ALONE:
    from vllm_spec_plugins.testing.triton_interpreter import interpret

    interpret()


@pytest.fixture(scope="session")
def serve_v2(
    serve_offline: Callable[..., Any], narrow_models: tuple[Path, Path]
) -> Callable[..., Any]:
    """`serve_offline` on model runner V2, for the target of 16 tokens; more requests than slots."""

    @contextmanager
    def serve(speculative_config: Any = None, **engine_args: Any) -> Iterator[Any]:
        target, draft = narrow_models
        spec = dict(speculative_config) if speculative_config else None
        if spec is not None and spec["method"] == "draft_model":
            spec["model"] = str(draft)
        defaults = {
            "model": str(target),
            "skip_tokenizer_init": True,
            "max_model_len": 128,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 32,
            "num_gpu_blocks_override": 64,
        }
        with serve_offline(spec, **{**defaults, **engine_args}) as llm:
            executor = llm.llm_engine.engine_core.engine_core.model_executor
            runner = executor.driver_worker.worker.model_runner
            assert ".gpu." in type(runner).__mro__[1].__module__, "not model runner V2"
            yield llm

    return serve


@pytest.fixture(scope="session")
def plain_texts(
    serve_v2: Callable[..., Any], generate: Callable[..., list[list[int]]]
) -> Callable[[list[dict[str, list[int]]], int], list[list[int]]]:
    """`plain_texts(prompts, max_tokens)`: greedy texts without drafts, decoded once."""
    known: dict[str, list[list[int]]] = {}

    def plain_texts(prompts: list[dict[str, list[int]]], max_tokens: int) -> list[list[int]]:
        key = repr((prompts, max_tokens))
        if key not in known:
            with serve_v2() as llm:
                known[key] = generate(llm, prompts, max_tokens=max_tokens)
        return known[key]

    return plain_texts


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM switches asynchronous scheduling off on CPUs, last of all: what it chose is kept."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        chosen = vllm_config.scheduler_config.async_scheduling
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling = chosen

    kept = staticmethod(check_and_update_config)
    monkeypatch.setattr(CpuPlatform, "check_and_update_config", kept)
