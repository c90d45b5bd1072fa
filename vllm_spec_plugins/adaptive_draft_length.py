"""`adaptive_draft_length`: as long as recent drafts were, longer where all of them was accepted.

ADL of DiffuSpec (Li et al. 2510.02358), made for drafters that write a whole block at once. Of
each draft two numbers are followed: how many tokens it had (up to and with its first end of
text, where the proposer ends it) and how many of them were accepted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from .context import EngineContext, ModelFacts
from .errors import ConfigError
from .length_control import LengthController, LengthControlOptions, RequestKeys
from .request_table import RequestTable


class AdaptiveDraftLengthOptions(LengthControlOptions):
    k_min: int | None = Field(
        None,
        ge=1,
        description="fewest tokens, and those of a request's first draft; default: two thirds "
        "of k_max",
    )
    k_max: int | None = Field(
        None, ge=1, description="most tokens; default: num_speculative_tokens"
    )
    delta: int | None = Field(
        None,
        ge=1,
        description="added while recent drafts were accepted whole; default: a third of k_max",
    )
    rho: float = Field(0.5, ge=0, lt=1, description="share of the past in both moving averages")


class AdaptiveDraftLength(LengthController):
    """Follows how long a request's drafts were, and adds `delta` while all of them is accepted.

    With L_gen the tokens of a draft, L_acc those accepted, and both averaged over a request's
    drafts, E <- rho E + (1 - rho) L, beginning with the first draft's,

        k = clip(floor(E_gen) + delta [E_acc >= E_gen], k_min, k_max)

    DiffuSpec has k_min 20, k_max 30, delta 10 and rho 0.5; the defaults keep these proportions.
    A draft becomes shorter only where it ended its text, so a drafter that never does stays at
    the length it has, until everything it drafted was accepted for a while. It depends on past
    drafts and verdicts only.
    """

    Options = AdaptiveDraftLengthOptions
    options: AdaptiveDraftLengthOptions

    #: Columns of the table. An average that has not begun is negative.
    _GENERATED, _ACCEPTED = 0, 1
    #: Averages that only rounding tells apart are equal.
    _ROUNDING = 1e-9

    def __init__(self, options: AdaptiveDraftLengthOptions, context: EngineContext) -> None:
        self.check(options, context.facts)
        super().__init__(options, context)
        self._bounds = _bounds(options, context.facts.num_speculative_tokens)
        self._delta = options.delta or max(1, round(self._bounds[1] / 3))
        self._averages = RequestTable([-1.0, -1.0], context.max_num_requests)

    @classmethod
    def check(cls, options: LengthControlOptions, facts: ModelFacts) -> None:
        assert isinstance(options, AdaptiveDraftLengthOptions)
        most = facts.num_speculative_tokens
        k_min, k_max = _bounds(options, most)
        if k_max > most:
            raise ConfigError(
                f'length_control "adaptive_draft_length": k_max is {k_max}, but '
                f"num_speculative_tokens is {most}. Raise num_speculative_tokens or lower k_max."
            )
        if k_min > k_max:
            raise ConfigError(
                f'length_control "adaptive_draft_length": k_min is {k_min} and k_max {k_max}. '
                "Give a k_min that is not larger."
            )

    def limits(self, requests: RequestKeys) -> NDArray[np.int64]:
        k_min, k_max = self._bounds
        rows = self._averages.rows(requests.request_ids)  # may make room
        averages = self._averages.values[rows]
        generated, accepted = averages[:, self._GENERATED], averages[:, self._ACCEPTED]
        whole = (generated >= 0) & (accepted >= generated - self._ROUNDING)
        lengths = np.floor(generated + self._ROUNDING).astype(np.int64) + self._delta * whole
        return np.clip(lengths, k_min, k_max)

    def observe(
        self,
        request_ids: Sequence[str],
        drafted: NDArray[np.int64],
        accepted: NDArray[np.int64],
    ) -> None:
        known = self._averages.known(request_ids)
        rows = self._averages.rows([i for i, k in zip(request_ids, known, strict=True) if k])
        latest = np.stack([drafted[known], accepted[known]], axis=1).astype(np.float64)
        before = self._averages.values[rows]
        rho = self.options.rho
        mixed = rho * before + (1 - rho) * latest
        self._averages.values[rows] = np.where(before < 0, latest, mixed)

    def finish(self, request_ids: Sequence[str]) -> None:
        self._averages.forget(request_ids)


def _bounds(options: AdaptiveDraftLengthOptions, most: int) -> tuple[int, int]:
    """`k_min` and `k_max`, given or by default."""
    k_max = most if options.k_max is None else options.k_max
    k_min = max(1, round(k_max * 2 / 3)) if options.k_min is None else options.k_min
    return k_min, k_max
