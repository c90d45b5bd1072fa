"""Length controllers decide how many tokens to draft, per request and step.

They see past acceptance and, while drafting, confidences; never the target's verdict
on the tokens of the same round. `limits` decides before anything is drawn, and
`stop_after` keeps the token it stops at. Dropping a drawn token because of its own
probability would bias the output (the draft's law is then no longer q).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from .options import PluginOptions

if TYPE_CHECKING:
    from .context import EngineContext


class LengthControlOptions(PluginOptions):
    """Options of one length controller."""


class LengthController(ABC):
    """How many tokens each request drafts."""

    Options: ClassVar[type[LengthControlOptions]] = LengthControlOptions

    def __init__(self, options: LengthControlOptions, context: EngineContext) -> None:
        self.options = options
        self.context = context

    @abstractmethod
    def limits(self, request_ids: Sequence[str]) -> NDArray[np.int64]:
        """`[R]` most tokens to draft now, 0 to `num_speculative_tokens`."""

    def stop_after(
        self, request_ids: Sequence[str], step: int, confidences: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        """Whether the token just drafted is the last one. It is kept either way.

        Args:
            request_ids: `[R]`.
            step: 0 for the first token of the draft.
            confidences: `[R]` probability of the drafted token under the draft.

        Returns:
            `[R]` bool.
        """
        del step, confidences
        return np.zeros(len(request_ids), dtype=np.bool_)

    def observe(
        self,
        request_ids: Sequence[str],
        drafted: NDArray[np.int64],
        accepted: NDArray[np.int64],
    ) -> None:
        """Learn from one verification.

        Args:
            request_ids: `[R]` requests whose drafts were verified.
            drafted: `[R]` draft tokens verified, at least 1.
            accepted: `[R]` of those, accepted.
        """

    def observe_step_time(self, num_tokens: int, seconds: float) -> None:
        """Learn from one engine step: tokens in the forward pass, seconds it took."""

    def finish(self, request_ids: Sequence[str]) -> None:
        """Forget requests that are gone."""


class Fixed(LengthController):
    """Always `num_speculative_tokens`."""

    def limits(self, request_ids: Sequence[str]) -> NDArray[np.int64]:
        return np.full(len(request_ids), self.context.facts.num_speculative_tokens, dtype=np.int64)
