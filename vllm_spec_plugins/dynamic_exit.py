"""Length controller `del`: exit layer, draft length and stopping from shadow tokens.

DEL, Entezari Zarch et al. 2504.05598 (COLM 2025); what is ours is said in the classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from .batch_lengths import goes_on
from .confidence_odds import odds
from .exit_selection import ExitController
from .length_control import LengthControlOptions
from .plain_steps import PlainSteps
from .request_table import RequestTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .context import EngineContext
    from .exit_selection import ExitSelection
    from .length_control import RequestKeys


class DynamicExitOptions(LengthControlOptions):
    sample_every: int = Field(
        4,
        ge=1,
        description="shadow tokens of all exits are computed in the first 16 steps, then in one "
        "of so many",
    )
    discount: float = Field(
        0.95, gt=0, le=1, description="factor on a request's past evidence at each new shadow step"
    )
    calibrated: bool = Field(
        True,
        description="judge each draft token by its confidence, too; "
        "false = draft as many tokens as were chosen before",
    )


class DynamicExit(ExitController):
    """Drafts after the exit that promises the most tokens per cost, as long as that pays.

    Exit and length are chosen before drafting, from verified positions of past steps. DEL ends a
    draft sooner at a token less confident than half-way between tokens that agreed and tokens
    that did not. Here a token's confidence multiplies the odds of its request's rate, by as much
    as past tokens of such confidence after this exit were accepted more often than the rates of
    their requests foretold (`ConfidenceOdds`). A draft goes on while one more token is worth its
    time at the speed of the choice: it ends at the length chosen where confidences are as usual,
    sooner after doubts, later without. The last token is kept: it is verified like any other, so
    stopping depends on drafted tokens and past verdicts only.

    The exit depends on the whole batch. A seeded request's text therefore follows the target's
    law in any company, but is not the same text in all.
    """

    Options = DynamicExitOptions
    options: DynamicExitOptions

    #: Columns: chance that a token of the request is accepted; its odds; chance that all of the
    #: round are.
    _RATE, _ODDS, _SURVIVAL = range(3)

    def __init__(self, options: DynamicExitOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        self.sample_every = options.sample_every
        self._table = RequestTable([0.0, 0.0, 1.0], context.max_num_requests)
        self._most = context.facts.num_speculative_tokens
        self._plain_steps = PlainSteps()
        #: Of this round: tokens that verifying one more must yield, `[K]` and a 0, and that
        #: drafting one must, for all requests together.
        self._verifying = np.zeros(self._most + 1)
        self._drafting = 0.0

    def set_exits(self, selection: ExitSelection) -> None:
        selection.discount = self.options.discount
        super().set_exits(selection)

    def limits(self, requests: RequestKeys) -> NDArray[np.int64]:
        request_ids = requests.request_ids
        if self.selection is None or not self.selection.has_evidence:
            return np.ones(len(request_ids), dtype=np.int64)
        if not len(request_ids):
            return np.zeros(0, dtype=np.int64)
        choice = self.selection.choose(request_ids)
        self.choose_layer(choice.layer)
        if choice.lengths.any() and self._tries_without(choice.speed_up):
            return np.zeros_like(choice.lengths)
        if not self.options.calibrated:
            return choice.lengths
        rows = self._table.rows(request_ids)  # may make room
        self._table.values[rows, self._RATE] = choice.acceptance
        self._table.values[rows, self._ODDS] = odds(choice.acceptance)
        self._table.values[rows, self._SURVIVAL] = 1
        self._verifying[: self._most] = choice.speed_up * np.diff(choice.costs.verify)
        self._drafting = choice.speed_up * choice.costs.each * len(rows)
        return np.where(choice.lengths > 0, self._most, 0)

    def _tries_without(self, speed_up: float) -> bool:
        """Whether the batch takes a step without drafts, to see what that takes."""
        assert self.selection is not None
        return self.selection.learns_times and self._plain_steps.is_due(speed_up)

    def stop_after(
        self, requests: RequestKeys, step: int, confidences: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        if self.selection is None or not self.options.calibrated:
            return np.zeros(len(confidences), dtype=np.bool_)
        rows = self._table.rows(requests.request_ids)
        rate, its_odds, survival = self._table.values[rows].T
        its_odds = its_odds * self.selection.odds_ratio(self.layer, confidences)
        survival = survival * (its_odds / (1 + its_odds))
        self._table.values[rows, self._SURVIVAL] = survival
        return ~goes_on(survival * rate - self._verifying[step + 1], self._drafting)

    def finish(self, request_ids: Sequence[str]) -> None:
        self._table.forget(request_ids)
        if self.selection is not None:
            self.selection.finish(request_ids)
