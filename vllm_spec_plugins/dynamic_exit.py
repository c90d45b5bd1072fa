"""Length controller `del`: exit layer, draft length and stopping from shadow tokens.

DEL, Entezari Zarch et al. 2504.05598 (COLM 2025); what is ours is said in `exit_selection`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

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
        4, ge=1, description="shadow tokens of all exits are computed in one of so many steps"
    )
    discount: float = Field(
        0.95, gt=0, le=1, description="factor on a request's past evidence at each new shadow step"
    )
    use_thresholds: bool = Field(
        True,
        description="whether a draft may end at a token of low confidence, where that is "
        "expected to pay; false = by length alone",
    )


class DynamicExit(ExitController):
    """Drafts after the exit, and up to the length, that promise the most tokens per cost.

    Both are chosen before drafting, from verified positions of past steps; a draft also ends
    at the first token less confident than its request's threshold. That token is kept: it is
    verified like any other, so stopping depends on drafted tokens and past verdicts only.

    The exit depends on the whole batch. A seeded request's text therefore follows the target's
    law in any company, but is not the same text in all.
    """

    Options = DynamicExitOptions
    options: DynamicExitOptions

    def __init__(self, options: DynamicExitOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        self.sample_every = options.sample_every
        self._thresholds = RequestTable([0.0], context.max_num_requests)
        self._plain_steps = PlainSteps()

    def set_exits(self, selection: ExitSelection) -> None:
        selection.discount = self.options.discount
        super().set_exits(selection)

    def limits(self, requests: RequestKeys) -> NDArray[np.int64]:
        request_ids = requests.request_ids
        if self.selection is None or not self.selection.has_evidence:
            return np.ones(len(request_ids), dtype=np.int64)
        if not len(request_ids):
            return np.zeros(0, dtype=np.int64)
        choice = self.selection.choose(request_ids, use_thresholds=self.options.use_thresholds)
        self.choose_layer(choice.layer)
        rows = self._thresholds.rows(request_ids)  # may make room
        self._thresholds.values[rows, 0] = choice.thresholds
        would_draft = self.selection.learns_times and choice.lengths.any()
        if would_draft and self._plain_steps.is_due(choice.speed_up):
            return np.zeros_like(choice.lengths)
        return choice.lengths

    def stop_after(
        self, requests: RequestKeys, step: int, confidences: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        del step
        rows = self._thresholds.rows(requests.request_ids)
        return confidences < self._thresholds.values[rows, 0]

    def finish(self, request_ids: Sequence[str]) -> None:
        self._thresholds.forget(request_ids)
        if self.selection is not None:
            self.selection.finish(request_ids)
