"""Metrics and observers: what a step's record says, what is counted, who is told."""

from __future__ import annotations

import logging
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest

from vllm_spec_plugins import hookimpl, hookspecs
from vllm_spec_plugins.hookspecs import OBSERVERS, StepRecord, plugin_manager, tell
from vllm_spec_plugins.metrics import Metrics, Tally


def step(
    num_draft: list[int],
    num_accepted: list[int],
    *,
    verifiers: list[str] | None = None,
    sources: tuple[str, ...] = ("ngram",),
    source_of: Any = None,
    extra_acceptance: list[float] | None = None,
) -> StepRecord:
    rows = range(len(num_draft))
    return StepRecord(
        proposer="ngram",
        request_ids=[f"request-{i}" for i in rows],
        verifiers=verifiers or ["lossless"] * len(num_draft),
        num_draft=num_draft,
        num_accepted=num_accepted,
        token_ids=[list(range(n + 1)) for n in num_accepted],
        sources=sources,
        source_of=None if source_of is None else np.array(source_of, dtype=np.int8),
        extra_acceptance=extra_acceptance,
    )


def metrics_of(*steps: StepRecord) -> dict[str, Any]:
    metrics = Metrics()
    for record in steps:
        metrics.spec_step_finished(record)
    return metrics.as_dict()


def test_counts_of_two_steps() -> None:
    found = metrics_of(step([3, 0, 2], [3, 0, 0]), step([1, 4], [1, 2]))
    assert found == {
        "by_method": [
            {
                "proposer": "ngram",
                "verifier": "lossless",
                "steps": 4,
                "drafted": 10,
                "accepted": 6,
                "examined": 8,
                # Four verifications of drafts emitted 4, 1, 2 and 3 tokens.
                "acceptance_length": 10 / 4,
                "acceptance_rate": 6 / 10,
                "acceptance_rate_at": [3 / 4, 2 / 3, 1 / 2, 0 / 1],
                "total_variation_price": 0.0,
            }
        ],
        "accepted_by_source": {"ngram": 6},
    }


def test_nothing_drafted() -> None:
    tally = Tally()
    assert (tally.steps, tally.acceptance_length, tally.acceptance_rate) == (0, 1.0, 0.0)
    assert (tally.acceptance_rate_at, tally.total_variation_price) == ([], 0.0)
    found = metrics_of(step([0, 0], [0, 0]))
    assert found["accepted_by_source"] == {}
    assert all(row["steps"] == row["drafted"] == 0 for row in found["by_method"])


def test_requests_of_two_verifiers() -> None:
    found = metrics_of(
        step(
            [2, 2, 1],
            [2, 0, 1],
            verifiers=["judge", "lossless", "judge"],
            extra_acceptance=[0.5, 0.0, 0.25],
        )
    )
    judge, lossless = found["by_method"]
    assert (judge["verifier"], judge["drafted"], judge["accepted"]) == ("judge", 3, 3)
    assert judge["total_variation_price"] == 0.75 / 3
    assert (lossless["verifier"], lossless["drafted"], lossless["accepted"]) == ("lossless", 2, 0)
    assert lossless["total_variation_price"] == 0


def test_accepted_by_source() -> None:
    record = step(
        [3, 2, 0],
        [2, 0, 0],
        sources=("tree", "ngram"),
        # The last columns were not verified or not drafted.
        source_of=[[1, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]],
    )
    assert record.accepted_by_source() == {"tree": 1, "ngram": 1}
    assert record.sources_of_request(0) == ["ngram", "tree", "tree"]
    assert record.sources_of_request(1) == ["tree", "tree"]
    assert record.sources_of_request(2) == []
    assert metrics_of(record)["accepted_by_source"] == {"tree": 1, "ngram": 1}


def test_one_source_needs_no_table() -> None:
    record = step([3, 1], [2, 1])
    assert record.accepted_by_source() == {"ngram": 3}
    assert record.sources_of_request(0) == ["ngram"] * 3


class Counting:
    def __init__(self) -> None:
        self.told: list[Any] = []

    @hookimpl
    def spec_step_finished(self, step: StepRecord) -> None:
        self.told.append(step)

    @hookimpl
    def spec_request_finished(self) -> None:
        """An observer may leave arguments out."""
        self.told.append("finished")


class Failing:
    @hookimpl
    def spec_step_finished(self, step: StepRecord) -> None:
        raise RuntimeError(f"asleep in {step.proposer}")


class FailingWhenBuilt:
    def __init__(self) -> None:
        raise RuntimeError("no disk")


class WithUnknownArgument:
    @hookimpl
    def spec_step_finished(self, step: StepRecord, colour: str) -> None:
        raise AssertionError((step, colour))


an_object = Counting()


@pytest.fixture
def observers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`observers("Class", ...)`: a manager in an environment with these observers."""

    def observers(*values: str) -> Any:
        points = [EntryPoint(value, f"{__name__}:{value}", OBSERVERS) for value in values]
        groups = {OBSERVERS: points}
        monkeypatch.setattr("importlib.metadata.entry_points", lambda group: groups[group])
        return plugin_manager()

    return observers


def test_the_step_trace_is_an_observer_like_any_other() -> None:
    names = [name for name, _ in plugin_manager().list_name_plugin()]
    assert "vllm_spec_plugins.step_trace:StepTrace" in names


def test_classes_and_objects_are_told(observers: Any) -> None:
    manager = observers("Counting", "an_object")
    an_object.told.clear()
    record = step([1], [1])
    tell(manager, "spec_step_finished", step=record)
    tell(manager, "spec_request_finished", request_id="a")
    assert an_object.told == [record, "finished"]
    plugins = [plugin for _, plugin in manager.list_name_plugin()]
    assert all(plugin.told == [record, "finished"] for plugin in plugins)
    assert len(plugins) == 2


def test_one_that_fails_is_removed_alone(
    observers: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hookspecs, "logger", logging.getLogger("test"))
    manager = observers("Failing", "an_object")
    metrics = Metrics()
    manager.register(metrics, "metrics")
    an_object.told.clear()
    for _ in range(3):
        tell(manager, "spec_step_finished", step=step([2], [1]))
    assert len(an_object.told) == 3
    assert metrics.as_dict()["by_method"][0]["accepted"] == 3
    [record] = caplog.records
    assert record.message.startswith(f'The observer "{__name__}:Failing" failed in spec_step_fin')
    assert record.exc_info is not None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("FailingWhenBuilt", "RuntimeError: no disk"),
        ("WithUnknownArgument", "PluginValidationError"),
        ("NoSuchObserver", "AttributeError"),
    ],
)
def test_one_that_cannot_be_registered_is_warned_about(
    value: str,
    said: str,
    observers: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hookspecs, "logger", logging.getLogger("test"))
    manager = observers(value, "an_object")
    assert [name for name, _ in manager.list_name_plugin()] == [f"{__name__}:an_object"]
    [record] = caplog.records
    assert record.message.startswith(f'The observer "{value}" ({__name__}:{value}) cannot be used')
    assert said in record.message
    tell(manager, "spec_step_finished", step=step([1], [0]))
