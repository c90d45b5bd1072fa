"""Counters in a file: what the worker writes is what the front end reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_spec_plugins import shared_counters
from vllm_spec_plugins.hookspecs import StepRecord
from vllm_spec_plugins.shared_counters import CountersWriter, SharedCounters, key_of

VERIFIERS = ("lossless", "typical")


def step(
    request_ids: list[str],
    verifiers: list[str],
    num_draft: list[int],
    num_accepted: list[int],
    prices: list[float] | None,
) -> StepRecord:
    tokens = [[0] * (n + 1) for n in num_accepted]
    return StepRecord(
        "ngram", request_ids, verifiers, num_draft, num_accepted, tokens, ("ngram",), None, prices
    )


@pytest.fixture
def path() -> str:
    return SharedCounters.create(replicas=2, verifiers=2)


def writer(path: str, replica: int = 0, of_requests: bool = True) -> CountersWriter:
    return CountersWriter(SharedCounters(path, 2, 2), replica, VERIFIERS, of_requests)


def test_steps_add_up_by_replica_and_verifier(path: str) -> None:
    first, second = writer(path), writer(path, replica=1)
    mixed = ["lossless", "typical", "typical"]
    first.spec_step_finished(step(["a", "b", "c"], mixed, [3, 2, 0], [3, 1, 0], [0, 0.25, 0]))
    first.spec_step_finished(step(["a"], ["lossless"], [4], [0], None))
    second.spec_step_finished(step(["d"], ["typical"], [1], [1], [0.5]))
    found = SharedCounters(path, 2, 2)
    assert found.methods.tolist() == [
        [[2, 7, 3, 4, 0], [1, 2, 1, 2, 0.25]],
        [[0, 0, 0, 0, 0], [1, 1, 1, 1, 0.5]],
    ]
    assert found.of_request("a") == (0, 4, 0)
    assert found.of_request("b") == (1, 2, 0.25)
    assert found.of_request("d") == (1, 1, 0.5)
    assert found.of_request("e") is None


def test_single_requests_only_when_asked_for(path: str) -> None:
    silent = writer(path, of_requests=False)
    silent.spec_step_finished(step(["a"], ["typical"], [3], [1], [0.5]))
    found = SharedCounters(path, 2, 2)
    assert found.of_request("a") is None
    assert found.methods[0, 1].tolist() == [1, 3, 1, 2, 0.5]


def test_a_finished_request_is_kept_until_its_place_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_counters, "REQUESTS", 3)
    path = SharedCounters.create(2, 2)
    counts, found = writer(path), SharedCounters(path, 2, 2)
    for name in ("a", "b"):
        counts.spec_step_finished(step([name], ["typical"], [1], [1], [0.5]))
        counts.spec_request_finished(name)
    counts.spec_step_finished(step(["c"], ["typical"], [1], [1], [0.5]))
    assert found.of_request("a") == (1, 1, 0.5)
    counts.spec_step_finished(step(["d"], ["lossless"], [2], [1], [0]))
    assert found.of_request("a") is None
    assert found.of_request("d") == (0, 2, 0)
    # More at a time than are kept: the one that has been there longest starts again.
    counts.spec_step_finished(step(["e", "f"], ["typical"] * 2, [1, 1], [1, 1], [0.5, 0.5]))
    assert found.of_request("c") is None
    counts.spec_step_finished(step(["c"], ["typical"], [1], [1], [0.25]))
    assert found.of_request("c") == (1, 1, 0.25)
    counts.spec_request_finished("nobody")


def test_a_long_request_outlives_many_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_counters, "REQUESTS", 3)
    path = SharedCounters.create(2, 2)
    counts, found = writer(path), SharedCounters(path, 2, 2)
    for i in range(7):
        counts.spec_step_finished(step(["long", str(i)], ["typical"] * 2, [1, 1], [1, 1], [0.5, 0]))
        counts.spec_request_finished(str(i))
    assert found.of_request("long") == (1, 7, 3.5)
    assert found.of_request("6") == (1, 1, 0)


def test_another_process_sees_the_numbers_and_does_not_remove_the_file(path: str) -> None:
    code = (
        "import sys; from vllm_spec_plugins.shared_counters import SharedCounters; "
        "SharedCounters(sys.argv[1], 2, 2).methods[1, 1] += (1, 2, 3, 4, 0.5)"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True)
    assert SharedCounters(path, 2, 2).methods[1, 1].tolist() == [1, 2, 3, 4, 0.5]


def test_the_file_goes_with_its_maker() -> None:
    code = (
        "from vllm_spec_plugins.shared_counters import SharedCounters; "
        "print(SharedCounters.create(1, 1))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    made = Path(done.stdout.strip())
    assert made.name.startswith("vllm_spec_plugins_")
    assert not made.exists()


def test_no_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        SharedCounters(str(tmp_path / "absent"), 1, 1)


def test_keys_are_never_zero() -> None:
    assert len({key_of(str(i)) for i in range(1000)} - {0}) == 1000
