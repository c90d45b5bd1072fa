"""Which layer to leave the target after, and how many tokens to draft there.

After DEL (Entezari Zarch et al. 2504.05598, COLM 2025). The layers of a verified position
tell, for one pass of the head, what the draft of *every* exit would have been there: shadow
tokens. From how often those agree with the target, and from what drafting and verifying cost,
follows the exit and the length with the most expected tokens per cost.

Shapes: R requests of a batch, E exits, K most draft tokens, N verified positions, B batch sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from .length_control import LengthController, LengthControlOptions, Signals
from .context import EngineContext
from .request_table import RequestTable


@dataclass(frozen=True, slots=True, eq=False)
class ExitCosts:
    """What drafting and verifying cost, in units of one plain decoding step of the same batch.

    Attributes:
        batch_sizes: `[B]` int64, rising: requests in the step. Between two of them costs are
            interpolated, beyond them the nearest holds.
        draft: `[B, E]` float64, one draft step after each exit.
        verify: `[B, K+1]` float64, verifying 0 to K draft tokens of every request; `[:, 0]` is 1.
    """

    batch_sizes: NDArray[np.int64]
    draft: NDArray[np.float64]
    verify: NDArray[np.float64]

    def __post_init__(self) -> None:
        sizes = len(self.batch_sizes)
        if sizes == 0 or not (np.diff(self.batch_sizes) > 0).all():
            raise ValueError("batch_sizes must be rising and not empty")
        for name, table in (("draft", self.draft), ("verify", self.verify)):
            if table.ndim != 2 or len(table) != sizes or not (table > 0).all():
                raise ValueError(f"{name} must be positive, with a row for each of {sizes} sizes")
        if not (self.verify[:, 0] == 1).all():
            raise ValueError("verify[:, 0] must be 1: costs are relative to a plain step")

    @classmethod
    def from_layers(
        cls, layers: Sequence[int], num_layers: int, head_layers: float, most: int
    ) -> ExitCosts:
        """Costs from layer counts: right where memory bandwidth is what a step waits for.

        Nothing is measured, so tensor-parallel ranks agree.

        Args:
            layers: `[E]` layers run for a draft token at each exit.
            num_layers: Layers of the target.
            head_layers: Cost of embedding, norm and head, in layers.
            most: K.
        """
        draft = (np.array(layers, dtype=np.float64) + head_layers) / (num_layers + head_layers)
        return cls(np.ones(1, dtype=np.int64), draft[None], np.ones((1, most + 1)))

    def at(self, num_requests: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """`[E]` draft and `[K+1]` verification costs in a batch of so many requests."""
        sizes = self.batch_sizes
        place = float(np.interp(num_requests, sizes, np.arange(len(sizes))))
        low = int(place)
        high, share = min(low + 1, len(sizes) - 1), place - low
        draft = self.draft[low] + share * (self.draft[high] - self.draft[low])
        return draft, self.verify[low] + share * (self.verify[high] - self.verify[low])


class ExitSelection:
    """What is known about each exit, per request, and what follows from it.

    Args:
        layers: `[E]` the exits, as numbers of layers run, rising.
        costs: Of those exits; K there at least `most`.
        most: K, most tokens of a draft.
        max_num_requests: Most requests in one step.
        discount: Factor on a request's past evidence at each new observation.
    """

    def __init__(
        self,
        layers: Sequence[int],
        costs: ExitCosts,
        most: int,
        max_num_requests: int,
        discount: float = 0.95,
    ) -> None:
        self.layers = tuple(layers)

    @property
    def has_evidence(self) -> bool:
        """Whether anything was observed yet."""
        raise NotImplementedError

    def rates(self, request_ids: Sequence[str]) -> NDArray[np.float64]:
        """`[R, E]` estimated chance that a draft token of each exit is accepted."""
        raise NotImplementedError

    def layer(self, request_ids: Sequence[str]) -> int:
        """The exit for a batch: one for all, since its rows run the same layers.

        Without requests: for one of which nothing is known but the mean of all.
        """
        raise NotImplementedError

    def lengths(self, request_ids: Sequence[str], layer: int) -> NDArray[np.int64]:
        """`[R]` tokens each request of a batch should draft after that layer, 0 to K."""
        raise NotImplementedError

    def thresholds(self, request_ids: Sequence[str], layer: int) -> NDArray[np.float64]:
        """`[R]` confidence below which a drafted token should be its draft's last; 0 = none."""
        raise NotImplementedError

    def observe(
        self,
        request_ids: Sequence[str],
        of_request: NDArray[np.integer],
        agreement: NDArray[np.floating],
        confidences: NDArray[np.floating],
    ) -> None:
        """Learn from verified positions, whether their tokens were drafted or not.

        Args:
            request_ids: `[R]`.
            of_request: `[N]` index into `request_ids`; requests may have no position.
            agreement: `[N, E]` chance, in [0, 1], that the draft of each exit is accepted there:
                1 or 0 where the target is greedy; min(1, q(y) / p(y)) at the emitted token y
                where it samples, which is sum_x min(p, q) in the mean.
            confidences: `[N, E]` probability, under each exit, of the token it would draft.
        """
        raise NotImplementedError

    def finish(self, request_ids: Sequence[str]) -> None:
        """Forget requests that are gone."""
        raise NotImplementedError


class ExitController(LengthController):
    """A length controller that chooses the exit, too, of a proposer that has several.

    The proposer hands it an `ExitSelection` with `set_exits` in its first `propose`, drafts
    after `layer`, and reports verified positions to `selection.observe` from `follow`, in one
    of `sample_every` steps.
    """

    needs: ClassVar[Signals] = Signals.CONFIDENCES | Signals.EXITS

    #: Shadow tokens are computed in one of so many steps.
    sample_every: int = 1
    #: The layer to draft after in this round: the one the last `limits` were made for.
    layer: int

    def __init__(self, options: LengthControlOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        self.selection: ExitSelection | None = None

    def set_exits(self, selection: ExitSelection) -> None:
        """What there is to choose from; once."""
        self.selection = selection
        self.layer = selection.layer(())
