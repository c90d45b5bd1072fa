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

from .length_control import LengthController, LengthControlOptions, Signals
from .request_table import RequestTable
from .step_cost import STEEPEST_VERIFICATION, CostLine, StepTime

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
        lengths: `[R]` int64 most tokens to draft, 0 to K.
        thresholds: `[R]` float64 confidence below which a drafted token is its draft's last;
            0 where stopping early is not expected to pay.
        speed_up: Expected speed over that of not drafting, 1 or more.
    """

    layer: int
    lengths: NDArray[np.int64]
    thresholds: NDArray[np.float64]
    speed_up: float


class ExitSelection:
    """What is known about each exit, per request, and what follows from it.

    With a the chance that a draft token is accepted, DEL's expected tokens per cost of d draft
    tokens are (1 - a^(d+1)) / (1 - a) over verify[d] + d draft. Ours differ in two ways. A batch
    is one step: what counts are its tokens over its cost, so that a request that drafts longer
    than the others makes them wait. And ending a draft at a doubtful token is part of the model:
    with s the chance that a token is confident, and m that it is confident and accepted, at most
    d tokens yield 1 + a (1 - m^d) / (1 - m), and the j-th is drafted in s^(j-1) of the rounds.
    Thresholds are used where that is better: not where confidence tells little, nor where a
    draft token costs so little that doubtful ones pay, too.

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

    #: Sums over positions, for each request and exit: all, those where the draft agreed, the
    #: confidences where it did and where it did not, the confident ones, those of them that agreed.
    _SEEN, _AGREED, _SURE_RIGHT, _SURE_WRONG, _CONFIDENT, _CONFIDENT_AGREED = range(6)
    _NUM_SUMS = 6
    #: Positions' worth of evidence that the mean over all requests counts for.
    _PRIOR_STRENGTH = 12.0
    #: Until more is known, every exit agrees half the time: so many positions' worth of it.
    _INITIAL_POSITIONS = 2.0
    #: Discount, at each observation, of the mean over all requests.
    _MEAN_DISCOUNT = 0.99
    #: What another exit must yield beyond the present one, as a share of the tokens that the
    #: time of a plain step is worth.
    _MARGIN = 0.01
    #: A request that drafts nothing, and of which nothing is heard, drafts one token after so
    #: many rounds: for proposers that observe only where they drafted.
    _PROBE_EVERY = 64

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
        #: Whether anything was observed yet.
        self.has_evidence = False
        self._costs = costs
        self._verification = CostLine(steepest=STEEPEST_VERIFICATION)
        self._drafting = CostLine()
        self._most = most
        #: The exit of the last round, as an index.
        self._current: int | None = None
        #: Column 0: rounds without a draft or an observation; then `[_NUM_SUMS, E]` sums.
        self._table = RequestTable([0.0] * (1 + self._NUM_SUMS * exits), max_num_requests)
        self._mean = np.zeros((self._NUM_SUMS, exits))
        self._mean[[self._SEEN, self._CONFIDENT]] = self._INITIAL_POSITIONS
        self._mean[[self._AGREED, self._CONFIDENT_AGREED]] = self._INITIAL_POSITIONS / 2

    @property
    def learns_times(self) -> bool:
        """Whether the costs are corrected by the times of the steps served."""
        return self._costs.plain is not None

    def rates(self, request_ids: Sequence[str]) -> NDArray[np.float64]:
        """`[R, E]` estimated chance that a draft token of each exit is accepted."""
        evidence = self._evidence(self._table.rows(request_ids))
        return evidence[:, self._AGREED] / evidence[:, self._SEEN]

    def thresholds(self, request_ids: Sequence[str]) -> NDArray[np.float64]:
        """`[R, E]` half-way between mean confidence where the draft agrees and where not."""
        return self._half_way(self._evidence(self._table.rows(request_ids)))

    def choose(
        self,
        request_ids: Sequence[str],
        layer: int | None = None,
        *,
        use_thresholds: bool = True,
    ) -> ExitChoice:
        """The exit, lengths and thresholds with the most expected tokens per cost.

        Args:
            request_ids: `[R]` the batch. None of them: the layer for a request of which nothing
                is known but the mean of all.
            layer: One of `layers`. None: the last round's until another is better by a margin.
            use_thresholds: Whether drafts may end at doubtful tokens.
        """
        rows = self._table.rows(request_ids)
        evidence = self._evidence(rows) if len(rows) else self._prior()[None]
        draft, verify, first = self._costs_at(len(evidence))
        if layer is not None:
            only = [self.layers.index(layer)]
            evidence, draft = evidence[..., only], draft[only]
        shares = np.ascontiguousarray((evidence / evidence[:, self._SEEN, None]).T)
        tokens, verifying, drafting = expected(
            shares[:, self._AGREED],
            shares[:, self._CONFIDENT],
            shares[:, self._CONFIDENT_AGREED],
            draft,
            verify[: self._most + 1],
        )
        drafting[1:2] += first
        if not use_thresholds:
            tokens, verifying, drafting = tokens[:, :1], verifying[:, :1], drafting[:, :1]
        gains, values, speed = step_values(tokens, verifying, drafting)
        exit_ = 0
        if layer is None:
            margin = self._MARGIN * speed * len(evidence)
            exit_ = self._best_exit(values.max(axis=(0, 1)), margin)
        longest, rule = divmod(int(values[..., exit_].argmax()), values.shape[1])
        lengths = gains[: longest + 1, rule, exit_].argmax(axis=0)
        thresholds = np.zeros(len(lengths))
        if rule:
            thresholds = self._half_way(evidence[..., [exit_]])[:, 0]
        chosen = self.layers[exit_] if layer is None else layer
        if not len(rows):
            return ExitChoice(chosen, lengths[:0], thresholds[:0], speed)
        if layer is None:
            self._current = exit_
        return ExitChoice(chosen, self._with_probes(rows, lengths), thresholds, speed)

    def observe(
        self,
        request_ids: Sequence[str],
        of_request: NDArray[np.integer],
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
            agreement: `[N, E]` chance, in [0, 1], that the draft of each exit is accepted there:
                1 or 0 where the target is greedy; where it samples, an estimate whose mean is
                sum_x min(p(x), q(x)), like min(1, p(x) / q(x)) of a token x drawn from q.
            confidences: `[N, E]` probability, under each exit, of the token it would draft, x.
        """
        if not len(of_request):
            return
        self.has_evidence = True
        order = np.argsort(of_request, kind="stable")
        present, first = np.unique(of_request[order], return_index=True)
        chosen: list[int] = present.tolist()
        names: list[str] = [request_ids[i] for i in chosen]
        counts = np.diff(first, append=len(order))
        rows = self._table.rows(names)
        threshold = np.repeat(self._half_way(self._evidence(rows)), counts, axis=0)
        agreed = agreement[order].astype(np.float64)
        confidence = confidences[order].astype(np.float64)
        confident = confidence >= threshold
        right = confidence * agreed
        positions = np.empty((len(order), self._NUM_SUMS, len(self.layers)))
        positions[:, self._SEEN] = 1
        positions[:, self._AGREED] = agreed
        positions[:, self._SURE_RIGHT] = right
        positions[:, self._SURE_WRONG] = confidence - right
        positions[:, self._CONFIDENT] = confident
        positions[:, self._CONFIDENT_AGREED] = confident * agreed
        sums = np.add.reduceat(positions, first)  # [names, _NUM_SUMS, E]
        past = self._table.values[rows, 1:] * self.discount
        self._table.values[rows, 1:] = past + sums.reshape(len(rows), -1)
        self._table.values[rows, 0] = 0
        self._mean = self._mean * self._MEAN_DISCOUNT + sums.sum(axis=0)

    def observe_time(self, step: StepTime, layer: int) -> None:
        """Learn what a step took whose drafts were made after `layer`."""
        plain = self._costs.plain_at(step.num_requests)
        if plain is None:
            return
        draft, verify = self._costs.at(step.num_requests)
        num_draft = step.num_tokens / step.num_requests - 1  # of each request, on average
        of_draft = float(np.interp(num_draft, np.arange(len(verify)), verify))
        self._verification.observe(plain * of_draft, step.seconds)
        if step.longest_draft:
            of_step = plain * float(draft[self.layers.index(layer)])
            self._drafting.observe(step.longest_draft * of_step, step.drafting_seconds)

    def finish(self, request_ids: Sequence[str]) -> None:
        """Forget requests that are gone."""
        self._table.forget(request_ids)

    def _costs_at(
        self, num_requests: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
        """`[E]` draft and `[K+1]` verification costs, and what a draft takes once.

        In plain steps of so many requests, as the engine takes them.
        """
        draft, verify = self._costs.at(num_requests)
        plain = self._costs.plain_at(num_requests)
        if plain is None or not (self._verification.is_known and self._drafting.is_known):
            return draft, verify, 0.0
        seconds = self._verification.at(plain * verify)
        drafting = self._drafting.slope * plain * draft
        return drafting / seconds[0], seconds / seconds[0], self._drafting.fixed / seconds[0]

    def _prior(self) -> NDArray[np.float64]:
        """`[_NUM_SUMS, E]` what is assumed of a request not seen before."""
        return self._mean * (self._PRIOR_STRENGTH / self._mean[self._SEEN])

    def _evidence(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """`[R, _NUM_SUMS, E]` sums of the requests in some rows, and the prior."""
        own = self._table.values[rows, 1:]
        return own.reshape(len(own), *self._mean.shape) + self._prior()

    def _half_way(self, evidence: NDArray[np.float64]) -> NDArray[np.float64]:
        """`[R, E]` thresholds from `[R, _NUM_SUMS, E]` sums."""
        right, seen = evidence[:, self._AGREED], evidence[:, self._SEEN]
        # Nothing agreed, or everything: the sum of its confidences is 0, too.
        wrong = np.maximum(seen - right, 1e-9)
        when_right = evidence[:, self._SURE_RIGHT] / np.maximum(right, 1e-9)
        when_wrong = evidence[:, self._SURE_WRONG] / wrong
        return (when_right + np.minimum(when_wrong, 1)) / 2

    def _best_exit(self, values: NDArray[np.float64], margin: float) -> int:
        best, current = int(values.argmax()), self._current
        if current is not None and values[best] <= values[current] + margin:
            return current
        return best

    def _with_probes(
        self, rows: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        if lengths.all():
            return lengths
        idle = np.where(lengths == 0, self._table.values[rows, 0] + 1, 0)
        probe = idle >= self._PROBE_EVERY
        self._table.values[rows, 0] = np.where(probe, 0, idle)
        return np.where(probe, 1, lengths)


def expected(
    accepted: NDArray[np.float64],
    confident: NDArray[np.float64],
    confident_accepted: NDArray[np.float64],
    draft: NDArray[np.float64],
    verify: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """What each further draft token is expected to add to a round; 0 stands for none at all.

    The second axis of the results, of 2, is the rule: all tokens are drafted, or a draft ends
    at a token that is not confident.

    Args:
        accepted: `[E, R]` a, chance that a draft token is accepted.
        confident: `[E, R]` s, chance that it is confident.
        confident_accepted: `[E, R]` m, chance of both.
        draft: `[E]` cost of a draft step.
        verify: `[K+1]` cost of verifying so many draft tokens.

    Returns:
        `[K+1, 2, E, R]` tokens: without any draft, the target's own;
        `[K+1, 2, E, R]` cost of verifying: without any draft, the plain step;
        `[K+1, 2, E]` cost of drafting, when each step waits for the last of the R requests.
    """
    shape = (len(verify), 2, *accepted.shape)
    tokens, drafted = np.empty(shape), np.empty(shape)
    tokens[0], tokens[1:2] = 1, accepted  # chance that all up to it are drafted and accepted
    drafted[:2], drafted[2:, 0] = 1, 1  # chance that it is drafted
    goes_on = np.stack([accepted, confident_accepted])
    for j in range(2, len(verify)):
        np.multiply(tokens[j - 1], goes_on, out=tokens[j])
        np.multiply(drafted[j - 1, 1], confident, out=drafted[j, 1])
    drafting = np.empty(shape[:3])
    drafting[0], drafting[1:] = 0, draft
    drafting[1:, 1] *= 1 - (1 - drafted[1:, 1]).prod(axis=-1)  # unless no request gets there
    increments = np.append(verify[:1], verify[1:] - verify[:-1])
    drafted *= increments[:, None, None, None]
    return tokens, drafted, drafting


def step_values(
    tokens: NDArray[np.float64], verifying: NDArray[np.float64], drafting: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """How much better than its time is worth a step is, for each way to draft in it.

    Dinkelbach's method for the largest ratio of tokens to cost, one iteration of it: the speed
    is the best that one length for all requests can reach, and at that price of time each
    request takes its own best length, none longer than the longest that is drafted.

    Args:
        tokens: `[K+1, 2, E, R]` as `expected` returns it, like the other two.
        verifying: `[K+1, 2, E, R]`.
        drafting: `[K+1, 2, E]`.

    Returns:
        `[K+1, 2, E, R]` tokens of each request, less its verification at that price;
        `[K+1, 2, E]` the sum of the best of those up to each length, less the drafting;
        the speed: tokens per cost, 1 or more.
    """
    waiting = drafting.cumsum(axis=0) * tokens.shape[-1]
    cost = verifying.sum(axis=-1).cumsum(axis=0) + waiting
    speed = float((tokens.sum(axis=-1).cumsum(axis=0) / cost).max())
    gains = tokens - speed * verifying
    # Length by length: numpy's own accumulation is several times slower along the first axis.
    for j in range(1, len(gains)):
        gains[j] += gains[j - 1]
    best = gains.copy()
    for j in range(1, len(best)):
        np.maximum(best[j], best[j - 1], out=best[j])
    return gains, best.sum(axis=-1) - speed * waiting, speed


class ExitController(LengthController):
    """A length controller that chooses the exit, too, of a proposer that has several.

    The proposer hands it what there is to choose from with `set_exits` in its first `propose`,
    drafts after `layer`, and reports verified positions to `selection.observe` from `follow`,
    in one of `sample_every` steps.
    """

    needs: ClassVar[Signals] = Signals.CONFIDENCES | Signals.EXITS

    #: Shadow tokens are computed in one of so many steps.
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
