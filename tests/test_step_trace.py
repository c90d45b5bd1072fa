"""The step trace: what it writes, and that it is not even called without a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pluggy
import pytest
import torch

from vllm_spec_plugins import hookspecs
from vllm_spec_plugins.context import EngineContext, ModelFacts
from vllm_spec_plugins.hookspecs import StepRecord
from vllm_spec_plugins.step_trace import VARIABLE, StepTrace

HOOKS = ("spec_engine_ready", "spec_step_finished", "spec_request_finished")


def manager() -> pluggy.PluginManager:
    made = pluggy.PluginManager(hookspecs.PROJECT)
    made.add_hookspecs(hookspecs)
    made.register(StepTrace(), "step_trace")
    return made


def step(extra_acceptance: list[float] | None = None) -> StepRecord:
    return StepRecord(
        proposer="cascade",
        request_ids=["a", "b"],
        verifiers=["lossless", "lossless"],
        num_draft=[3, 0],
        num_accepted=[2, 0],
        token_ids=[[5, 8, 13], [7]],
        sources=("ngram", "tree"),
        source_of=np.array([[0, 0, 1], [0, 0, 0]], dtype=np.int8),
        extra_acceptance=extra_acceptance,
    )


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "trace.jsonl"
    monkeypatch.setenv(VARIABLE, str(path))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_per_request_and_step(trace: Path) -> None:
    hook = manager().hook
    context = EngineContext(ModelFacts("m", 10, 4, 1, 64, 3), torch.device("cpu"), 4, 0)
    hook.spec_engine_ready(context=context, proposer="cascade", verifier="lossless")
    hook.spec_step_finished(step=step())
    hook.spec_request_finished(request_id="a")
    ready, first, second, finished = lines(trace)
    assert ready == {
        "event": "ready", "proposer": "cascade", "verifier": "lossless", "model": "m",
    }  # fmt: skip
    assert first == {
        "event": "step", "step": 1, "request_id": "a", "proposer": "cascade",
        "verifier": "lossless", "drafted": 3, "accepted": 2, "token_ids": [5, 8, 13],
        "sources": ["ngram", "ngram", "tree"],
    }  # fmt: skip
    assert (second["request_id"], second["drafted"], second["token_ids"]) == ("b", 0, [7])
    assert second["sources"] == []
    assert finished == {"event": "finished", "request_id": "a"}


def test_price_of_relaxed_verifiers(trace: Path) -> None:
    manager().hook.spec_step_finished(step=step([0.25, 0.0]))
    assert [line["extra_acceptance"] for line in lines(trace)] == [0.25, 0.0]


def test_lines_are_there_at_once(trace: Path) -> None:
    made = manager()
    made.hook.spec_step_finished(step=step())
    assert len(lines(trace)) == 2  # while the file is still open


def test_appends(trace: Path) -> None:
    manager().hook.spec_request_finished(request_id="a")
    manager().hook.spec_request_finished(request_id="b")
    assert [line["request_id"] for line in lines(trace)] == ["a", "b"]


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_file_no_hook_is_registered(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    made = manager()
    assert made.has_plugin("step_trace")
    assert all(not getattr(made.hook, name).get_hookimpls() for name in HOOKS)


def test_with_a_file_every_hook_is(trace: Path) -> None:
    made = manager()
    assert all(len(getattr(made.hook, name).get_hookimpls()) == 1 for name in HOOKS)
    assert trace.exists()
