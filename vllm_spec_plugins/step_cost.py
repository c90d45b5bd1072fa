"""What drafting and verifying cost, learned from the steps that are served."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class StepTime:
    """What one engine step without prompts took.

    Attributes:
        num_requests: R, at least 1.
        num_tokens: In the forward pass: R, and all draft tokens.
        longest_draft: Most draft tokens of any request.
        seconds: From the end of the step before to its own end, without any drafting.
        drafting_seconds: What drafting the tokens verified here took.
    """

    num_requests: int
    num_tokens: int
    longest_draft: int
    seconds: float
    drafting_seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class DraftCosts:
    """What a step costs, for R requests that draft alike. In seconds.

    Attributes:
        verify: `[K+1]` everything but drafting, with 0 to K draft tokens of each request.
        first: What a draft takes once, however long it is.
        each: What each further token of the longest draft takes.
    """

    verify: NDArray[np.float64]
    first: float
    each: float


#: Passes timed alone are less slowed down by more tokens than steps of an engine are.
STEEPEST_VERIFICATION = 3.0


class CostLine:
    """seconds = fixed + slope x: least squares over what was seen, older times counting less.

    The slope is fitted to how times differ from those of the steps just before: a machine that is
    faster in one minute than in another, for whatever x it has then, would tilt a line through all.
    The line is drawn towards the one through the origin, as if `_PRIOR_STEPS` steps, whose x
    differed by a tenth, had lain on that: steps that are all alike tell nothing about a slope.
    A time far above the line and the last few (a compilation, a pause) counts as only half as
    much again as they.

    Args:
        discount: Factor on the weight of everything seen at each new time.
        steepest: Largest slope, over that through the origin. 1: what is fixed cannot be negative.
            More, where x may tell too little of how the time grows.
    """

    _PRIOR_STEPS = 8.0
    _PRIOR_SPREAD = 0.1
    #: Weight of each time in the mean of the last few.
    _NEAR = 0.2
    #: Largest ratio of a time to what was expected that is taken at face value.
    _OUTLIER = 1.5

    def __init__(self, discount: float = 0.99, steepest: float = 1.0) -> None:
        self._discount, self._steepest = discount, steepest
        self._weight = 0.0
        # Discounted means.
        self._x = self._seconds = 0.0
        # Means of the last few; discounted sums of squares and products of what differs from them.
        self._near_x = self._near_seconds = self._x_squared = self._x_seconds = 0.0
        #: Both 0 until something was seen.
        self.fixed = self.slope = 0.0

    @property
    def is_known(self) -> bool:
        """Whether anything was seen."""
        return self._weight > 0

    def observe(self, x: float, seconds: float) -> None:
        """Count one time. What is not positive is ignored."""
        if not (x > 0 and seconds > 0):
            return
        if self.is_known:
            expected = max(float(self.at(np.float64(x))), self._near_seconds)
            seconds = min(seconds, self._OUTLIER * expected)
        off_x, off_seconds = x - self._near_x, seconds - self._near_seconds
        if self.is_known:
            self._x_squared = self._discount * self._x_squared + off_x**2
            self._x_seconds = self._discount * self._x_seconds + off_x * off_seconds
        near = self._NEAR if self.is_known else 1.0
        self._near_x += near * off_x
        self._near_seconds += near * off_seconds
        self._weight = self._weight * self._discount + 1
        self._x += (x - self._x) / self._weight
        self._seconds += (seconds - self._seconds) / self._weight
        through_origin = self._seconds / self._x
        prior = self._PRIOR_STEPS * (self._PRIOR_SPREAD * self._x) ** 2
        slope = (self._x_seconds + prior * through_origin) / (self._x_squared + prior)
        self.slope = min(max(slope, 0.0), self._steepest * through_origin)
        self.fixed = self._seconds - self.slope * self._x

    def at(self, x: NDArray[np.float64] | np.float64) -> NDArray[np.float64]:
        """Seconds at each x, once something was seen; at least half of a line's through the origin.

        A steep line, continued far from what was seen, would come to nothing.
        """
        through_origin = self.slope + self.fixed / self._x
        return np.maximum(self.fixed + self.slope * x, 0.5 * through_origin * x)


class StepCost:
    """What a step of so many requests and draft tokens would take.

    Two lines, over the time of a target pass of as many tokens: of verification, over a pass of
    all tokens of the step; of drafting, over the longest draft times a pass of one token for
    each request. So times at one batch size tell something about another.
    """

    def __init__(self) -> None:
        # Until told otherwise: as a pass that mostly waits for its weights.
        self._tokens = np.array([0.0, 1.0])
        self._pass_seconds = np.array([32.0, 33.0])
        self._verification = CostLine(steepest=STEEPEST_VERIFICATION)
        self._drafting = CostLine()

    def set_pass_times(self, num_tokens: NDArray[np.int64], seconds: NDArray[np.float64]) -> None:
        """`[P]` what a pass of so many tokens takes, rising, two at least: its shape is used."""
        self._tokens = num_tokens.astype(np.float64)
        # Nothing makes a pass too fast: one that took longer than a larger one was disturbed.
        self._pass_seconds = np.minimum.accumulate(seconds[::-1])[::-1]

    def observe(self, step: StepTime) -> None:
        """Count one step."""
        self._verification.observe(self._pass(step.num_tokens), step.seconds)
        if step.longest_draft:
            x = step.longest_draft * self._pass(step.num_requests)
            self._drafting.observe(x, step.drafting_seconds)

    def at(self, num_requests: int, most: int) -> DraftCosts | None:
        """Costs of so many requests, up to `most` draft tokens; None until drafts were timed."""
        verification, drafting = self._verification, self._drafting
        if not (verification.is_known and drafting.is_known):
            return None
        passes = [self._pass(num_requests * (1 + k)) for k in range(most + 1)]
        return DraftCosts(
            verification.at(np.array(passes)), drafting.fixed, drafting.slope * passes[0]
        )

    def _pass(self, num_tokens: int) -> float:
        """Time of a target pass, in the unit it was told in; beyond the last along a line."""
        tokens, seconds = self._tokens, self._pass_seconds
        if num_tokens <= tokens[-1]:
            return float(np.interp(num_tokens, tokens, seconds))
        slope = (seconds[-1] - seconds[-2]) / (tokens[-1] - tokens[-2])
        return float(seconds[-1] + slope * (num_tokens - tokens[-1]))
