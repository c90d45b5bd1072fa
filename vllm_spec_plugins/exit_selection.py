"""Which layer to leave the target after, and how many tokens to draft there.

After DEL (Entezari Zarch et al. 2504.05598, COLM 2025). The layers of a verified position
tell, for one pass of the head, what the draft of *every* exit would have been there: shadow
tokens. From how often those agree with the target, and from what drafting and verifying cost,
follow the exit and the length with the most expected tokens per cost.

Shapes: R requests of a batch, E exits, K most draft tokens, N verified positions, B batch sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from .batch_lengths import batch_lengths
from .confidence_odds import ConfidenceOdds
from .length_control import LengthController, LengthControlOptions, Signals
from .request_table import RequestTable
from .step_cost import STEEPEST_VERIFICATION, CostLine, DraftCosts, StepTime

if TYPE_CHECKING:
    from .context import EngineContext


@dataclass(frozen=True, slots=True, eq=False)
class ExitCosts:
    """What drafting and verifying cost, in units of one plain decoding step of the same batch.

    Attributes:
        batch_sizes: `[B]` int64, rising: requests in the step. Between two of them costs are
            interpolated, beyond them the nearest holds.
        draft: `[B, E]` float64, one draft step after each exit.
        verify: `[B, K+1]` float64, verifying 0 to K draft tokens of every request; `[:, 0]` is 1.
        plain: `[B]` float64, seconds of that plain step; None where nothing was timed.

    Raises:
        ValueError: The shapes do not agree, or a number cannot be such a cost.
    """

    batch_sizes: NDArray[np.int64]
    draft: NDArray[np.float64]
    verify: NDArray[np.float64]
    plain: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        sizes = len(self.batch_sizes)
        if sizes == 0 or not (np.diff(self.batch_sizes) > 0).all():
            raise ValueError("batch_sizes must be rising and not empty")
        for name, table in (("draft", self.draft), ("verify", self.verify)):
            if table.ndim != 2 or len(table) != sizes or not (table > 0).all():
                raise ValueError(f"{name} must be positive, with a row for each of {sizes} sizes")
        if not (self.verify[:, 0] == 1).all():
            raise ValueError("verify[:, 0] must be 1: costs are relative to a plain step")
        if self.plain is not None and not (len(self.plain) == sizes and (self.plain > 0).all()):
            raise ValueError(f"plain must be positive, one for each of {sizes} sizes")

    @classmethod
    def from_layers(
        cls, layers: Sequence[int], num_layers: int, head_layers: float, most: int
    ) -> ExitCosts:
        """Costs from layer counts: right where a step waits for memory bandwidth alone.

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
        return self._between(self.draft, num_requests), self._between(self.verify, num_requests)

    def plain_at(self, num_requests: int) -> float | None:
        """Seconds of a plain step of so many requests; None where nothing was timed."""
        return None if self.plain is None else float(self._between(self.plain, num_requests))

    def _between(self, table: NDArray[np.float64], num_requests: int) -> NDArray[np.float64]:
        sizes = self.batch_sizes
        place = float(np.interp(num_requests, sizes, np.arange(len(sizes))))
        low = int(place)
        high, share = min(low + 1, len(sizes) - 1), place - low
        return table[low] + share * (table[high] - table[low])


@dataclass(frozen=True, slots=True, eq=False)
class ExitChoice:
    """How a batch drafts in one round.

    Attributes:
        layer: The exit, one for all requests: the rows of a batch run the same layers.
        lengths: `[R]` int64 tokens to draft, 0 to K, as far as is known before drafting.
        speed_up: Expected speed over that of not drafting, 1 or more.
        acceptance: `[R]` chance that a draft token is accepted.
        costs: Of R requests that draft after this exit, in plain steps.
    """

    layer: int
    lengths: NDArray[np.int64]
    speed_up: float
    acceptance: NDArray[np.float64]
    costs: DraftCosts


class ExitSelection:
    """What is known about each exit, per request, and what follows from it.

    With a the chance that a draft token is accepted, DEL's expected tokens per cost of d draft
    tokens are (1 - a^(d+1)) / (1 - a) over verify[d] + d draft. A batch is one step: what counts
    are its tokens over its cost, so that a request that drafts longer than the others makes them
    wait.

    Each request's evidence is drawn towards the mean over all, so that a new one starts well.

    Costs timed before serving leave out what an engine adds to each step: they are corrected by
    the times of the steps served (`CostLine`), of verification and of drafting.

    Args:
        layers: `[E]` the exits, as numbers of layers run, rising.
        costs: Of those exits, up to K draft tokens at least.
        most: K, most tokens of a draft.
        max_num_requests: Most requests in one step.
        discount: Factor on a request's past evidence at each new observation.

    Raises:
        ValueError: The costs are for other exits or too few tokens.
    """

    #: Positions' worth of evidence that the mean over all requests counts for.
    _PRIOR_STRENGTH = 12.0
    #: Until more is known, every exit agrees half the time: so many positions' worth of it.
    _INITIAL_POSITIONS = 2.0
    #: Discount, at each observation, of the mean over all requests.
    _MEAN_DISCOUNT = 0.98
    #: By how much, as a share of the speed, another exit must be better than the present one.
    _MARGIN = 0.01
    #: Steps that are all sampled, before only some are.
    _FIRST_STEPS = 16
    #: Times of so many steps, or an observation, make a new choice.
    _TIMES_OF_A_CHOICE = 8

    def __init__(
        self,
        layers: Sequence[int],
        costs: ExitCosts,
        most: int,
        max_num_requests: int,
        discount: float = 0.95,
    ) -> None:
        exits, lengths = costs.draft.shape[1], costs.verify.shape[1]
        if exits != len(layers) or lengths <= most:
            raise ValueError(
                f"the costs are of {exits} exits and up to {lengths - 1} draft tokens; "
                f"there are {len(layers)} exits and up to {most} draft tokens"
            )
        self.layers = tuple(layers)
        self.discount = discount
        self._confidence_odds = ConfidenceOdds(exits)
        self._costs = costs
        self._verification = CostLine(steepest=STEEPEST_VERIFICATION)
        self._drafting = CostLine()
        self._most = most
        #: `_told`, by number of requests.
        self._known: dict[int, tuple[NDArray[np.float64], NDArray[np.float64], float | None]] = {}
        self._steps = self._observations = self._times = 0
        #: The exit of the last round, as an index.
        self._current: int | None = None
        #: What `choose` was asked with last, and its answer.
        self._last: tuple[tuple[int | str, ...], ExitChoice] | None = None
        #: Positions seen, and of those the chances to be accepted after each exit, `[1 + E]`.
        self._table = RequestTable([0.0] * (1 + exits), max_num_requests)
        half = self._INITIAL_POSITIONS / 2
        self._mean = np.array([self._INITIAL_POSITIONS] + [half] * exits)

    @property
    def has_evidence(self) -> bool:
        """Whether anything was observed yet."""
        return self._observations > 0

    @property
    def learns_times(self) -> bool:
        """Whether the costs are corrected by the times of the steps served."""
        return self._costs.plain is not None

    def rates(self, request_ids: Sequence[str]) -> NDArray[np.float64]:
        """`[R, E]` estimated chance that a draft token of each exit is accepted."""
        evidence = self._evidence(self._table.rows(request_ids))
        return evidence[:, 1:] / evidence[:, :1]

    def choose(self, request_ids: Sequence[str]) -> ExitChoice:
        """The exit and the lengths with the most expected tokens per cost.

        The exit is the one that is best when all requests draft equally long, but the last
        round's until another is better by a margin. Lengths are each request's own. The same
        requests get the same choice until something is observed, or a few steps were timed.

        Args:
            request_ids: `[R]` the batch. None of them: the layer for a request of which nothing
                is known but the mean of all.
        """
        asked = (self._observations, self._times // self._TIMES_OF_A_CHOICE, *request_ids)
        if self._last is None or self._last[0] != asked:
            self._last = asked, self._choose(request_ids)
        return self._last[1]

    def _choose(self, request_ids: Sequence[str]) -> ExitChoice:
        rows = self._table.rows(request_ids)
        evidence = self._evidence(rows) if len(rows) else self._prior()[None]
        rates = evidence[:, 1:] / evidence[:, :1]
        draft, verify, first = self._costs_at(len(evidence))
        speeds = expected_speeds(rates, draft, verify[: self._most + 1], first)
        exit_ = self._best_exit(speeds)
        costs = DraftCosts(verify[: self._most + 1], first, float(draft[exit_]))
        lengths, speed = batch_lengths(rates[:, exit_], costs)
        if len(rows):
            self._current = exit_
        count = len(rows)
        return ExitChoice(
            self.layers[exit_],
            lengths[:count],
            speed,
            rates[:count, exit_],
            costs,
        )

    def is_sampled(self, every: int) -> bool:
        """Whether a step's positions are observed: of the first steps, then in one of so many.

        Asked once for each step that emits a token.
        """
        self._steps += 1
        return self._steps <= self._FIRST_STEPS or self._steps % every == 0

    def odds_ratio(self, layer: int, confidences: NDArray[np.floating]) -> NDArray[np.float64]:
        """`[N]` factor on the odds of draft tokens of some confidence, made after `layer`.

        On the odds of their requests' rates (`ConfidenceOdds`).
        """
        return self._confidence_odds.ratio(self.layers.index(layer), confidences)

    def observe(
        self,
        request_ids: Sequence[str],
        of_request: NDArray[np.integer],
        acceptance: NDArray[np.floating],
        agreement: NDArray[np.floating],
        confidences: NDArray[np.floating],
    ) -> None:
        """Learn from verified positions, whether tokens were drafted there or not.

        Every position whose token stands belongs here, or all those of some steps chosen
        without looking: leaving out where a draft failed would overrate the exits. Requests
        not seen before are taken in, so this is for those of the present step.

        Args:
            request_ids: `[R]`.
            of_request: `[N]` index into `request_ids`; a request may have no position.
            acceptance: `[N, E]` chance, in [0, 1], that a draft of each exit is accepted there:
                1 or 0 where the target is greedy; where it samples, the overlap
                sum_x min(p(x), q(x)), or an estimate of that mean.
            agreement: `[N, E]` the same chance of one token x that the exit drafted there:
                min(1, p(x) / q(x)) where x was drawn from q.
            confidences: `[N, E]` probability of x under each exit.
        """
        if not len(of_request):
            return
        self._observations += 1
        foretold = self.rates(request_ids)[of_request]
        order = np.argsort(of_request, kind="stable")
        present, first = np.unique(of_request[order], return_index=True)
        chosen: list[int] = present.tolist()
        rows = self._table.rows([request_ids[i] for i in chosen])
        positions = np.ones((len(order), self._table.values.shape[1]))
        positions[:, 1:] = acceptance[order]
        sums = np.add.reduceat(positions, first)  # [requests, 1 + E]
        self._table.values[rows] = self._table.values[rows] * self.discount + sums
        self._mean = self._mean * self._MEAN_DISCOUNT + sums.sum(axis=0)
        self._confidence_odds.observe(confidences, agreement, foretold)

    def observe_time(self, step: StepTime, layer: int) -> None:
        """Learn what a step took whose drafts were made after `layer`."""
        draft, verify, plain = self._told(step.num_requests)
        if plain is None:
            return
        self._times += 1
        num_draft = step.num_tokens / step.num_requests - 1  # of each request, on average
        of_draft = float(np.interp(num_draft, np.arange(len(verify)), verify))
        self._verification.observe(plain * of_draft, step.seconds)
        if step.longest_draft:
            of_step = plain * float(draft[self.layers.index(layer)])
            self._drafting.observe(step.longest_draft * of_step, step.drafting_seconds)

    def finish(self, request_ids: Sequence[str]) -> None:
        """Forget requests that are gone."""
        self._table.forget(request_ids)
        self._last = None

    def _told(
        self, num_requests: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], float | None]:
        """`[E]` draft and `[K+1]` verification costs, seconds of a plain step: before serving."""
        if num_requests not in self._known:
            costs = self._costs
            self._known[num_requests] = (*costs.at(num_requests), costs.plain_at(num_requests))
        return self._known[num_requests]

    def _costs_at(
        self, num_requests: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
        """`[E]` draft and `[K+1]` verification costs, and what a draft takes once.

        In plain steps of so many requests, as the engine takes them.
        """
        draft, verify, plain = self._told(num_requests)
        if plain is None or not (self._verification.is_known and self._drafting.is_known):
            return draft, verify, 0.0
        seconds = self._verification.at(plain * verify)
        drafting = self._drafting.slope * plain * draft
        return drafting / seconds[0], seconds / seconds[0], self._drafting.fixed / seconds[0]

    def _prior(self) -> NDArray[np.float64]:
        """`[1 + E]` what is assumed of a request not seen before."""
        return self._mean * (self._PRIOR_STRENGTH / self._mean[0])

    def _evidence(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """`[R, 1 + E]` sums of the requests in some rows, and the prior."""
        return self._table.values[rows] + self._prior()

    def _best_exit(self, speeds: NDArray[np.float64]) -> int:
        best, current = int(speeds.argmax()), self._current
        if current is not None and speeds[best] <= speeds[current] * (1 + self._MARGIN):
            return current
        return best


def expected_speeds(
    rates: NDArray[np.float64],
    draft: NDArray[np.float64],
    verify: NDArray[np.float64],
    first: float = 0.0,
) -> NDArray[np.float64]:
    """`[E]` tokens per cost of each exit, at the best length that all requests draft alike.

    Args:
        rates: `[R, E]` chance that a draft token is accepted.
        draft: `[E]` cost of a draft step.
        verify: `[K+1]` cost of verifying so many draft tokens.
        first: What a draft costs once.
    """
    lengths = np.arange(len(verify))
    tokens = (rates[:, :, None] ** lengths).sum(axis=0).cumsum(axis=1)  # [E, K+1]
    cost = verify + lengths * draft[:, None] + first * (lengths > 0)
    return (tokens / cost).max(axis=1) / len(rates)


class ExitController(LengthController):
    """A length controller that chooses the exit, too, of a proposer that has several.

    The proposer hands it what there is to choose from with `set_exits` in its first `propose`,
    drafts after `layer`, and reports verified positions to `selection.observe` from `follow`,
    of the steps for which `selection.is_sampled(sample_every)`.
    """

    needs: ClassVar[Signals] = Signals.CONFIDENCES | Signals.EXITS

    #: After the first few, shadow tokens are computed in one of so many steps.
    sample_every: int = 1
    #: The layer to draft after in this round; known once there are exits.
    layer: int

    def __init__(self, options: LengthControlOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        #: None until the proposer has set its exits.
        self.selection: ExitSelection | None = None
        #: The layer after which the drafts of the step at hand were made.
        self._verified_layer: int | None = None

    def set_exits(self, selection: ExitSelection) -> None:
        """Take what there is to choose from, once."""
        self.selection = selection
        self.layer = selection.choose(()).layer

    def choose_layer(self, layer: int) -> None:
        """Draft after this layer in this round, called in every `limits`."""
        self._verified_layer, self.layer = self.layer, layer

    def observe_step_time(self, step: StepTime) -> None:
        if self.selection is not None and self._verified_layer is not None:
            self.selection.observe_time(step, self._verified_layer)
