"""How long passes take, before the engine serves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray


def fastest(runs: Sequence[Callable[[], object]], repeats: int = 4) -> NDArray[np.float64]:
    """Seconds of the fastest of a few times each of the runs, after one that does not count.

    The fastest, because a busy machine makes runs slower and nothing makes them faster; and in
    turns, because it is busy for a while.
    """
    seconds = np.empty((repeats + 1, len(runs)))
    for times in seconds:
        for index, run in enumerate(runs):
            _wait_for_device()
            started = time.perf_counter()
            run()
            _wait_for_device()
            times[index] = time.perf_counter() - started
    return seconds[1:].min(axis=0)


def _wait_for_device() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
