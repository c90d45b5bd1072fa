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
        16.0,
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
    theta_0 ... theta_j a / (a + b) tokens in expectation. It costs c plain steps (`cost_ratio`).
    That time is worth what it would bring elsewhere: r c tokens, with r the tokens per plain
    step's time that the best length yields at the acceptance rate a / (a + b), at least 1. So
    drafting goes on while theta_0 ... theta_j a / (a + b) >= r c (for stopping problems of this
    kind, where the reward is a rate, comparing with the best rate is optimal). Before the first
    token, one draw of the acceptance rate itself is compared: a request that does not pay is
    tried again now and then, the oftener the less is known of it.

    The last token is kept whatever its confidence, and verdicts of the same step are never
    seen: the text's law does not change. Draws are keyed by request and position
    (`beta_draws`); the same history gives the same lengths.
    """

    Options = ThompsonOptions
    options: ThompsonOptions
    name = "thompson"
    needs = Signals.CONFIDENCES

    #: Columns: a and b of the step, product of the thetas, r c; then K confidences.
    _A, _B, _SURVIVAL, _NEEDED, _CONFIDENCES = range(SpeedupController._OWN, 7)

    def __init__(self, options: ThompsonOptions, context: EngineContext) -> None:
        confidences = context.facts.num_speculative_tokens if options.calibrated else 0
        super().__init__(options, context, columns=[0, 0, 1, 0, *[np.nan] * confidences])
        self._bins = ConfidenceBins(options.prior_strength) if options.calibrated else None
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
        self._steps += 1
        rows = self._table.rows(requests.request_ids)
        a, b = self._evidence(rows)
        cost = self.cost_ratio(len(rows))
        if cost is None:
            needed = np.zeros(len(rows))
            lengths = np.full(len(rows), self._length_to_measure(), dtype=np.int64)
        else:
            needed = cost * expected_speedups(a / (a + b), cost, self._most).max(axis=1)
            theta = self._draw(requests, 0, a, b)
            lengths = np.where(theta >= needed, self._most, 0)
            # Where nothing is drafted nothing is observed: evidence fades here instead.
            idle = lengths == 0
            if idle.any():
                self._table.values[rows[idle], : self._OWN] *= self.options.discount
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
        return survival * rate < needed

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
