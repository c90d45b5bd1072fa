"""`thompson`: after each drafted token, draw what it may be worth, and go on while that pays.

The idea is EESD's (Liu et al. 2406.03853): a Beta posterior of the acceptance rate, drawn from
after every token (Thompson sampling), optionally with the draft's confidence in it. When to
stop is decided here by what a token yields and costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from .batch_lengths import batch_lengths, goes_on
from .beta_draws import beta_draws
from .confidence_bins import ConfidenceBins
from .errors import ConfigError
from .length_control import (
    LengthControlOptions,
    RequestKeys,
    Signals,
    SpeedupController,
    SpeedupOptions,
    expected_speedups,
)
from .random_numbers import Purpose

if TYPE_CHECKING:
    from .context import EngineContext, ModelFacts


class ThompsonOptions(SpeedupOptions):
    discount: float = Field(
        0.98, gt=0, le=1, description="factor on a request's past evidence at each step"
    )
    calibrated: bool = Field(
        True,
        description="judge each draft token by how often tokens of its confidence were accepted, "
        "beside the request's acceptance rate",
    )
    confidence_strength: float = Field(
        64.0,
        gt=0,
        description="draft tokens' worth of evidence that a token's confidence counts for; "
        "with `calibrated`",
    )


class Thompson(SpeedupController):
    """Goes on drafting while another token is expected to yield more than it costs.

    A request's acceptance rate has the posterior Beta(a, b): discounted accepted draft tokens
    and first rejections, on a prior that is the mean over all requests. After draft token j
    its chance theta_j is drawn from Beta(a, b), or, calibrated, from
    Beta(a + s f_j, b + s (1 - f_j)): f_j is how often tokens of its confidence were accepted
    (`ConfidenceBins`), s the option `confidence_strength`.

    The next token yields one more token of text if it and all before it are accepted, so
    theta_0 ... theta_j a / (a + b) tokens in expectation. Its time is worth what it would bring
    elsewhere: its cost, times the speed that the best length yields at the acceptance rate
    a / (a + b). So drafting goes on while the tokens are worth the time (for stopping problems
    of this kind, where the reward is a rate, comparing with the best rate is optimal). In a
    batch each request bears its verification, and together they bear the draft step.
    Before the first token, one draw of the acceptance rate itself is compared: a request that
    does not pay is tried again now and then, the oftener the less is known of it.

    The last token is kept whatever its confidence, and verdicts of the same step are never
    seen: the text's law does not change. Draws are keyed by request and position
    (`beta_draws`); the same history gives the same lengths.
    """

    Options = ThompsonOptions
    options: ThompsonOptions
    name = "thompson"
    needs = Signals.CONFIDENCES

    #: Columns: a and b of the step, product of the thetas, what a token must yield at the cost
    #: given as an option; then K confidences.
    _A, _B, _SURVIVAL, _NEEDED, _CONFIDENCES = range(
        SpeedupController._OWN, SpeedupController._OWN + 5
    )

    #: Draft tokens' worth of evidence that a request's rate counts for in a bin of confidences.
    _PRIOR_OF_BINS = 4.0

    def __init__(self, options: ThompsonOptions, context: EngineContext) -> None:
        confidences = context.facts.num_speculative_tokens if options.calibrated else 0
        super().__init__(options, context, columns=[0, 0, 1, 0, *[np.nan] * confidences])
        self._bins = ConfidenceBins(self._PRIOR_OF_BINS) if options.calibrated else None
        #: Of this round, at the costs measured: tokens that verifying one more must yield, `[K]`
        #: and a 0, and that drafting one must, for all requests together.
        self._verifying = np.zeros(self._most + 1)
        self._drafting = 0.0
        # Compiles what the first request would otherwise wait for.
        one, zero = np.ones(1), np.zeros(1, dtype=np.int64)
        self._draw(RequestKeys([""], zero, zero), 0, one, one)

    @classmethod
    def check(cls, options: LengthControlOptions, facts: ModelFacts) -> None:
        assert isinstance(options, ThompsonOptions)
        super().check(options, facts)
        if not options.calibrated and "confidence_strength" in options.model_fields_set:
            raise ConfigError(
                'length_control "thompson": confidence_strength is what confidences count for, '
                "and calibrated is false. Remove one of them."
            )

    def limits(self, requests: RequestKeys) -> NDArray[np.int64]:
        rows = self._table.rows(requests.request_ids)
        if not len(rows):
            return np.zeros(0, dtype=np.int64)
        a, b = self._evidence(rows)
        rates, theta = a / (a + b), self._draw(requests, 0, a, b)
        cost, costs = self._given_cost, self.costs(len(rows))
        self._verifying[:] = self._drafting = 0.0
        needed = np.zeros(len(rows))
        lengths = np.full(len(rows), self._most, dtype=np.int64)
        if cost is not None:
            needed = cost * expected_speedups(rates, cost, self._most).max(axis=1)
            lengths[theta < needed] = 0
        elif costs is not None:
            _, speed = batch_lengths(rates, costs)
            self._verifying[: self._most] = speed * np.diff(costs.verify)
            self._drafting = speed * costs.each * len(rows)
            lengths[batch_lengths(theta, costs)[0] == 0] = 0
            if lengths.any() and self._plain_steps.is_due(speed * costs.verify[0]):
                lengths[:] = 0
        else:
            lengths[:] = self._length_to_measure
        # Where nothing is drafted nothing is observed: evidence fades here instead.
        self._fade(rows[lengths == 0])
        state = np.full((len(rows), self._table.values.shape[1] - self._A), np.nan)
        state[:, 0], state[:, 1], state[:, 2], state[:, 3] = a, b, 1.0, needed
        self._table.values[rows, self._A :] = state
        return lengths

    def stop_after(
        self, requests: RequestKeys, step: int, confidences: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        rows = self._table.rows(requests.request_ids)
        a, b, survival, needed = self._table.values[rows, self._A : self._CONFIDENCES].T
        rate = a / (a + b)
        if self._bins is None:
            theta = self._draw(requests, step + 1, a, b)
        else:
            self._table.values[rows, self._CONFIDENCES + step] = confidences
            strength = self.options.confidence_strength
            share = strength * self._bins.acceptance(confidences, fallback=rate)
            theta = self._draw(requests, step + 1, a + share, b + (strength - share))
        survival = survival * theta
        self._table.values[rows, self._SURVIVAL] = survival
        gains = survival * rate - needed - self._verifying[step + 1]
        return ~goes_on(gains, self._drafting)

    def observe(
        self,
        request_ids: Sequence[str],
        drafted: NDArray[np.int64],
        accepted: NDArray[np.int64],
    ) -> None:
        super().observe(request_ids, drafted, accepted)
        if self._bins is None:
            return
        known = self._table.known(request_ids)
        rows = self._table.rows([i for i, k in zip(request_ids, known, strict=True) if k])
        confidences = self._table.values[rows, self._CONFIDENCES :]
        column = np.arange(confidences.shape[1])
        # Tokens after the first rejection were not judged; of some no confidence was told.
        judged = column < np.minimum(accepted + 1, drafted)[known, None]
        judged &= ~np.isnan(confidences)
        stood = column < accepted[known, None]
        self._bins.observe(confidences[judged], stood[judged])

    @staticmethod
    def _draw(
        requests: RequestKeys, index: int, a: NDArray[np.float64], b: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        return beta_draws(a, b, requests.streams, requests.positions, index, Purpose.LENGTH)
