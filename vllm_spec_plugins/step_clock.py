"""Where the time of an engine step goes, as seen from the worker."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class StepClock:
    """Times steps: what drafting took counts with the step that verifies the drafts.

    The time between two steps (scheduling, output) belongs to a step, too, but an engine may
    also have been waiting for requests: the shortest of the last few gaps is taken.
    """

    #: Gaps that are remembered.
    _GAPS = 16

    def __init__(self) -> None:
        self._started = self._ended = 0.0
        self._gaps: deque[float] = deque(maxlen=self._GAPS)
        #: Seconds of this step: drafting for the next one, and showing it to the proposer.
        self._drafting = self._following = 0.0
        #: Seconds that drafting for this step took, in the step before.
        self._drafted_for = 0.0

    def begin_step(self) -> None:
        self._started = time.perf_counter()
        if self._ended:
            self._gaps.append(self._started - self._ended)

    def end_step(self) -> None:
        self._ended = time.perf_counter()
        self._drafted_for, self._drafting, self._following = self._drafting, 0.0, 0.0

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Around the proposer's drafting for the next step."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._drafting = time.perf_counter() - started

    @contextmanager
    def following(self) -> Iterator[None]:
        """Around what the proposer learns from this step, which belongs to no draft token."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._following = time.perf_counter() - started

    def step(self) -> tuple[float, float]:
        """Seconds of the step at hand without drafting, and of drafting for it."""
        elapsed = time.perf_counter() - self._started - self._drafting - self._following
        return elapsed + min(self._gaps, default=0.0), self._drafted_for
