"""What an engine step costs, measured while serving: seconds = fixed + per token x tokens."""

from __future__ import annotations


class StepCost:
    """Least squares over past steps, older ones counting less and less.

    The line is only trusted when enough steps of different sizes back it, and it is kept
    while later steps are all alike. A step many times slower than the line says (a
    compilation, a pause) is counted as only a few times slower.

    Args:
        discount: Factor on the weight of all past steps at each new one.
        min_steps: Weight, in steps, below which nothing is known.
    """

    #: Largest ratio of a step's time to the line's that is taken at face value.
    _OUTLIER = 3.0
    #: Smallest spread of step sizes, relative to their mean, that determines a slope.
    _MIN_SPREAD = 0.05

    def __init__(self, discount: float = 0.99, min_steps: float = 16.0) -> None:
        self._discount = discount
        self._min_steps = min_steps
        self._weight = 0.0
        self._tokens = 0.0  # discounted means and second moments
        self._seconds = 0.0
        self._tokens_squared = 0.0
        self._tokens_seconds = 0.0
        #: Seconds of a step without tokens, and of each token; None while unknown.
        self.fixed: float | None = None
        self.per_token: float | None = None

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Count one step. Steps without tokens or time are ignored."""
        if num_tokens <= 0 or not seconds > 0:
            return
        if self.fixed is not None and self.per_token is not None:
            line = self.fixed + self.per_token * num_tokens
            seconds = min(seconds, self._OUTLIER * line)
        self._weight = self._weight * self._discount + 1
        share = 1 / self._weight
        # Centred updates: sums of squares would lose the small differences that matter.
        off_tokens, off_seconds = num_tokens - self._tokens, seconds - self._seconds
        self._tokens += share * off_tokens
        self._seconds += share * off_seconds
        keep = 1 - share
        self._tokens_squared = keep * (self._tokens_squared + share * off_tokens**2)
        self._tokens_seconds = keep * (self._tokens_seconds + share * off_tokens * off_seconds)
        self._fit()

    def ratio(self, num_requests: int) -> float | None:
        """Cost of one more token, relative to one request's share of a step without drafts.

        With R requests such a step takes fixed + R per_token, shared by R: the more
        requests, the nearer to 1. None while unknown.
        """
        if self.fixed is None or self.per_token is None:
            return None
        plain = self.fixed + num_requests * self.per_token
        return num_requests * self.per_token / plain

    def _fit(self) -> None:
        spread = self._tokens_squared**0.5
        if self._weight < self._min_steps or spread < self._MIN_SPREAD * self._tokens:
            return
        slope = max(self._tokens_seconds / self._tokens_squared, 0.0)
        # A line through the origin at most: no step costs less than nothing at rest.
        slope = min(slope, self._seconds / self._tokens)
        self.per_token = slope
        self.fixed = self._seconds - slope * self._tokens
