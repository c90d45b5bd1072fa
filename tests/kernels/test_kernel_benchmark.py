"""`benchmarks/kernels.py` where there is no GPU: what it times, in what order, and what it says."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def kernels() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("kernels")
    sys.path.remove(str(BENCHMARKS))


def make_case(calls: list[str], right: bool = True):
    from kernel_case import KernelCase

    def check() -> None:
        calls.append("check")
        assert right

    peers = {name: lambda name=name: calls.append(name) for name in ("slow", "fast")}
    return KernelCase("k", {"B": 1}, lambda: calls.append("ours"), 1, 4_000_000, check, peers)


def timer(calls: list[str]) -> Callable[[Callable[[], object], bool, int], list[float]]:
    """Pretends: ours takes 4 us, the peers 40 and 8."""
    seconds = {"ours": 4.0, "slow": 40.0, "fast": 8.0}

    def time(run: Callable[[], object], cold: bool, repeats: int) -> list[float]:
        del cold
        run()
        return [seconds[calls[-1]]] * repeats

    return time


def test_checked_before_timed_and_the_best_peer_is_named(kernels: ModuleType) -> None:
    calls: list[str] = []
    row = kernels.measure(make_case(calls), 2e12, 5, timer(calls))
    assert calls == ["check", "ours", "ours", "slow", "fast", "ours"]
    assert row["best_peer"] == "fast"
    assert row["times_faster"] == pytest.approx(2)
    assert row["share_of_copy_bandwidth"] == pytest.approx(0.5)
    assert kernels.table([row]).row_count == 1


def test_a_wrong_kernel_is_not_timed(kernels: ModuleType) -> None:
    calls: list[str] = []
    with pytest.raises(AssertionError):
        kernels.measure(make_case(calls, right=False), 2e12, 5, timer(calls))
    assert calls == ["check"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    assert kernels.main() == 1
    assert "no GPU" in capsys.readouterr().err
