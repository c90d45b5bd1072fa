"""Length controllers decide how many tokens to draft, per request and step.

They see past acceptance and, while drafting, confidences; never the target's verdict
on the tokens of the same round. `limits` decides before anything is drawn, and
`stop_after` keeps the token it stops at. Dropping a drawn token because of its own
probability would bias the output (the draft's law is then no longer q).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Flag, auto
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from .batch_lengths import batch_lengths
from .errors import ConfigError
from .options import PluginOptions
from .plain_steps import PlainSteps
from .request_table import RequestTable
from .step_cost import DraftCosts, StepCost, StepTime

if TYPE_CHECKING:
    from .context import EngineContext, ModelFacts


class Signals(Flag):
    """What a proposer tells while it drafts, and what a length controller lives on."""

    NONE = 0
    #: The proposer drafts token by token and asks `LengthController.stop_after`.
    CONFIDENCES = auto()
    #: The proposer can leave the target after one of several layers and reports how each
    #: would have done (`exit_selection.ExitController`).
    EXITS = auto()


@dataclass(frozen=True, slots=True)
class RequestKeys:
    """The requests of a drafting round: what memory and random numbers are keyed by.

    Attributes:
        request_ids: `[R]`.
        streams: `[R]` int64 random stream of each (`random_numbers`, `Purpose.LENGTH`).
        positions: `[R]` int64 sequence position of the first draft token.
    """

    request_ids: Sequence[str]
    streams: NDArray[np.int64]
    positions: NDArray[np.int64]

    def select(self, requests: NDArray[np.integer] | NDArray[np.bool_]) -> RequestKeys:
        """Some of the requests: indices or a mask."""
        chosen: list[int] = np.arange(len(self.request_ids))[requests].tolist()
        names: list[str] = [self.request_ids[i] for i in chosen]
        return RequestKeys(names, self.streams[chosen], self.positions[chosen])


class LengthControlOptions(PluginOptions):
    """Options of one length controller."""


class LengthController(ABC):
    """How many tokens each request drafts."""

    Options: ClassVar[type[LengthControlOptions]] = LengthControlOptions
    #: What it cannot work without: refused at start beside a proposer that does not tell it.
    needs: ClassVar[Signals] = Signals.NONE

    def __init__(self, options: LengthControlOptions, context: EngineContext) -> None:
        self.options = options
        self.context = context

    @classmethod
    def check(cls, options: LengthControlOptions, facts: ModelFacts) -> None:
        """Refuse what the options' types cannot. Raises `SpecPluginsError`."""

    @abstractmethod
    def limits(self, requests: RequestKeys) -> NDArray[np.int64]:
        """`[R]` most tokens to draft now, 0 to `num_speculative_tokens`."""

    def stop_after(
        self, requests: RequestKeys, step: int, confidences: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        """Whether the token just drafted is the last one. It is kept either way.

        Asked only of controllers that need `Signals.CONFIDENCES`.

        Args:
            requests: `[R]` those still drafting.
            step: 0 for the first token of the draft.
            confidences: `[R]` probability of the drafted token under the draft.

        Returns:
            `[R]` bool.
        """
        del step, confidences
        return np.zeros(len(requests.request_ids), dtype=np.bool_)

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

    def set_pass_times(self, num_tokens: NDArray[np.int64], seconds: NDArray[np.float64]) -> None:
        """Told once, before serving: what a target pass of `[P]` so many tokens takes.

        Passes are timed only for a controller that overrides this.
        """

    def observe_step_time(self, step: StepTime) -> None:
        """Learn from one engine step without prompts."""

    def finish(self, request_ids: Sequence[str]) -> None:
        """Forget requests that are gone."""


class Fixed(LengthController):
    """Always `num_speculative_tokens`."""

    def limits(self, requests: RequestKeys) -> NDArray[np.int64]:
        return np.full(
            len(requests.request_ids), self.context.facts.num_speculative_tokens, dtype=np.int64
        )


class AdditiveOptions(LengthControlOptions):
    start: int | None = Field(
        None, ge=1, description="tokens of a request's first draft; default: maximum"
    )
    minimum: int = Field(1, ge=1, description="fewest tokens; with 0 nothing would be learned")
    maximum: int | None = Field(
        None, ge=1, description="most tokens; default: num_speculative_tokens"
    )
    increase: int = Field(1, ge=1, description="added after a draft that was accepted whole")
    decrease: int = Field(1, ge=1, description="taken off after any other draft")


class Additive(LengthController):
    """Longer by a step after a draft accepted whole, shorter by a step after any other."""

    Options = AdditiveOptions
    options: AdditiveOptions

    def __init__(self, options: AdditiveOptions, context: EngineContext) -> None:
        self.check(options, context.facts)
        super().__init__(options, context)
        maximum = options.maximum or context.facts.num_speculative_tokens
        self._bounds = (options.minimum, maximum)
        self._lengths = RequestTable([options.start or maximum], context.max_num_requests)

    @classmethod
    def check(cls, options: LengthControlOptions, facts: ModelFacts) -> None:
        assert isinstance(options, AdditiveOptions)
        most = facts.num_speculative_tokens
        maximum = options.maximum or most
        if maximum > most:
            raise ConfigError(
                f'length_control "additive": maximum is {maximum}, but num_speculative_tokens '
                f"is {most}. Raise num_speculative_tokens or lower maximum."
            )
        start = options.start or maximum
        if not options.minimum <= start <= maximum:
            raise ConfigError(
                f'length_control "additive": start must lie between minimum and maximum, but '
                f"minimum is {options.minimum}, start {start} and maximum {maximum}."
            )

    def limits(self, requests: RequestKeys) -> NDArray[np.int64]:
        rows = self._lengths.rows(requests.request_ids)
        return self._lengths.values[rows, 0].astype(np.int64)

    def observe(
        self,
        request_ids: Sequence[str],
        drafted: NDArray[np.int64],
        accepted: NDArray[np.int64],
    ) -> None:
        known = self._lengths.known(request_ids)
        rows = self._lengths.rows([i for i, k in zip(request_ids, known, strict=True) if k])
        whole = accepted[known] >= drafted[known]
        change = np.where(whole, self.options.increase, -self.options.decrease)
        self._lengths.values[rows, 0] = np.clip(
            self._lengths.values[rows, 0] + change, *self._bounds
        )

    def finish(self, request_ids: Sequence[str]) -> None:
        self._lengths.forget(request_ids)


class SpeedupOptions(LengthControlOptions):
    """Options of controllers that weigh what a draft token yields against what it costs."""

    cost_ratio: float | None = Field(
        None,
        gt=0,
        description="cost of one more draft token (drafting and verifying it) relative to one "
        "request's share of a step without drafts; default: measured while serving",
    )
    initial_acceptance: float = Field(
        0.6, gt=0, lt=1, description="acceptance rate assumed before anything was verified"
    )
    discount: float = Field(
        0.95, gt=0, le=1, description="factor on a request's past evidence at each new draft"
    )
    prior_strength: float | None = Field(
        None,
        gt=0,
        description="draft tokens' worth of evidence that the mean over all requests counts for; "
        "default: learned from how much requests differ",
    )


class SpeedupController(LengthController):
    """Knows, of each request, the chance that a draft token is accepted, and what one costs.

    The chance is measured from past verdicts (accepted tokens against first rejections,
    discounted) and drawn towards the mean over all requests: the more, the less requests differ
    beyond what chance makes of the few tokens each of them drafts (`_learn_spread`). The cost is
    an option, the same
    for every request whatever the others do; or it is learned from the times of past steps,
    for the batch as it is (`StepCost`).
    """

    Options = SpeedupOptions
    #: As registered, for messages.
    name: ClassVar[str]

    #: Columns of the table: discounted numbers of tokens accepted and rejected, and the sum of
    #: the squared weights of both; those of a subclass follow.
    _ACCEPTED, _REJECTED, _SQUARES, _OWN = 0, 1, 2, 3
    #: Discount, at each step, of the mean over all requests.
    _MEAN_DISCOUNT = 0.99
    #: Draft tokens' worth of evidence that `initial_acceptance` counts for in that mean.
    _INITIAL_TOKENS = 4.0
    #: Least and most that the mean counts for where that is learned, what it counts for before,
    #: and the weight of this first guess.
    _STRENGTHS, _FIRST_STRENGTH, _FIRST_WEIGHT = (2.0, 64.0), 16.0, 100.0

    def __init__(
        self, options: SpeedupOptions, context: EngineContext, columns: Sequence[float]
    ) -> None:
        self.check(options, context.facts)
        super().__init__(options, context)
        self._given_strength, self._initial = options.prior_strength, options.initial_acceptance
        self._discount = options.discount
        self._given_cost = options.cost_ratio
        self._table = RequestTable([0.0] * self._OWN + [*columns], context.max_num_requests)
        self._cost, self._plain_steps = StepCost(), PlainSteps()
        self._most = context.facts.num_speculative_tokens
        self._accepted, self._rejected = 0.0, 0.0
        #: Variance between requests, and what it would be if each were always or never right.
        self._variance, self._most_variance = (
            self._FIRST_WEIGHT / (1 + self._FIRST_STRENGTH),
            self._FIRST_WEIGHT,
        )

    @classmethod
    def check(cls, options: LengthControlOptions, facts: ModelFacts) -> None:
        assert isinstance(options, SpeedupOptions)
        if options.cost_ratio is None and facts.tensor_parallel_size > 1:
            raise ConfigError(
                f'length_control "{cls.name}" measures step times, which differ between the '
                f"{facts.tensor_parallel_size} tensor-parallel ranks, and ranks must draft the "
                f'same number of tokens. Give it a cost_ratio: {{"name": "{cls.name}", '
                '"cost_ratio": 0.1}.'
            )

    def costs(self, num_requests: int) -> DraftCosts | None:
        """Measured costs of a step of so many requests; None until drafts were timed."""
        return self._cost.at(num_requests, self._most)

    def _evidence(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """`[R]` draft tokens accepted and rejected, the mean's share included: both positive."""
        mean, strength = self._mean, self.prior_strength
        own = self._table.values[rows, : self._OWN]
        return (
            own[:, self._ACCEPTED] + strength * mean,
            own[:, self._REJECTED] + strength * (1 - mean),
        )

    @property
    def prior_strength(self) -> float:
        """Draft tokens' worth of evidence that the mean over all requests counts for."""
        if self._given_strength is not None:
            return self._given_strength
        least, most = self._STRENGTHS
        share = self._variance / self._most_variance  # 1 / (1 + strength)
        return min(max(1 / max(share, 1e-9) - 1, least), most)

    @property
    def _mean(self) -> float:
        """Chance that a draft token is accepted, over all requests."""
        accepted = self._accepted + self._INITIAL_TOKENS * self._initial
        return accepted / (self._accepted + self._rejected + self._INITIAL_TOKENS)

    def _learn_spread(self, own: NDArray[np.float64]) -> None:
        """Learn how much requests differ from `[R, _OWN]` evidence, by the method of moments.

        If chances of acceptance are Beta-distributed over requests with mean m and strength s,
        the n tokens of a request are accepted m n times on average, with variance
        m (1 - m) (Q + (n^2 - Q) / (1 + s)), Q the sum of their squared weights.
        """
        mean = self._mean
        binomial = mean * (1 - mean)
        accepted, squares = own[:, self._ACCEPTED], own[:, self._SQUARES]
        count = accepted + own[:, self._REJECTED]
        beyond_chance = (accepted - mean * count) ** 2 - binomial * squares
        most = binomial * (count**2 - squares)
        self._variance = self._variance * self._MEAN_DISCOUNT + float(beyond_chance.sum())
        self._most_variance = self._most_variance * self._MEAN_DISCOUNT + float(most.sum())

    @property
    def _length_to_measure(self) -> int:
        """What is drafted while nothing is known of the costs: for one step."""
        return (self._most + 1) // 2

    def observe(
        self,
        request_ids: Sequence[str],
        drafted: NDArray[np.int64],
        accepted: NDArray[np.int64],
    ) -> None:
        rejected = accepted < drafted
        self._accepted = self._accepted * self._MEAN_DISCOUNT + float(accepted.sum())
        self._rejected = self._rejected * self._MEAN_DISCOUNT + float(rejected.sum())
        known = self._table.known(request_ids)
        rows = self._table.rows([i for i, k in zip(request_ids, known, strict=True) if k])
        self._fade(rows)
        evidence = self._table.values
        evidence[rows, self._ACCEPTED] += accepted[known]
        evidence[rows, self._REJECTED] += rejected[known]
        evidence[rows, self._SQUARES] += accepted[known] + rejected[known]
        if self._given_strength is None:
            self._learn_spread(evidence[rows, : self._OWN])

    def _fade(self, rows: NDArray[np.int64]) -> None:
        """Past evidence of some requests counts less."""
        self._table.values[rows, : self._SQUARES] *= self._discount
        self._table.values[rows, self._SQUARES] *= self._discount**2

    def set_pass_times(self, num_tokens: NDArray[np.int64], seconds: NDArray[np.float64]) -> None:
        self._cost.set_pass_times(num_tokens, seconds)

    def observe_step_time(self, step: StepTime) -> None:
        self._cost.observe(step)

    def finish(self, request_ids: Sequence[str]) -> None:
        self._table.forget(request_ids)


class ExpectedSpeedupOptions(SpeedupOptions):
    probe_every: int = Field(
        16,
        ge=1,
        description="a request for which drafting does not pay drafts one token every so many "
        "steps; where it pays for no request of a batch, one of them does, up to four times as "
        "rarely",
    )


class ExpectedSpeedup(SpeedupController):
    """The length k with the largest expected speed-up over not drafting.

    With a the chance that a draft token is accepted and c the cost of one more of them, a
    draft of k tokens yields (1 - a^(k+1)) / (1 - a) tokens for k c + 1 plain steps (Leviathan
    et al. 2211.17192). Where the costs are measured, a batch is one step: its tokens over its
    time are what counts (`batch_lengths`).

    It depends on past verdicts only, and the same history gives the same lengths.
    """

    Options = ExpectedSpeedupOptions
    options: ExpectedSpeedupOptions
    name = "expected_speedup"

    _IDLE = SpeedupController._OWN
    #: Most that waiting for the next attempt grows to, in `probe_every`.
    _LONGEST_WAIT = 4

    def __init__(self, options: ExpectedSpeedupOptions, context: EngineContext) -> None:
        super().__init__(options, context, columns=[0.0])
        #: Steps in which nobody drafted, and after how many of them one request does.
        self._idle_steps, self._wait = 0, options.probe_every

    def acceptance(self, request_ids: Sequence[str]) -> NDArray[np.float64]:
        """`[R]` estimated chance that a draft token of each request is accepted."""
        accepted, rejected = self._evidence(self._table.rows(request_ids))
        return accepted / (accepted + rejected)

    def limits(self, requests: RequestKeys) -> NDArray[np.int64]:
        request_ids = requests.request_ids
        rows = self._table.rows(request_ids)
        if not len(rows):
            return np.zeros(0, dtype=np.int64)
        if self._given_cost is not None:
            lengths = best_lengths(self.acceptance(request_ids), self._given_cost, self._most)
        elif (costs := self.costs(len(rows))) is not None:
            lengths, speed = batch_lengths(self.acceptance(request_ids), costs)
            if lengths.any() and self._plain_steps.is_due(speed * costs.verify[0]):
                return np.zeros_like(lengths)
        else:
            return np.full(len(rows), self._length_to_measure, dtype=np.int64)
        idle = np.where(lengths == 0, self._table.values[rows, self._IDLE] + 1, 0)
        if self._given_cost is not None or lengths.any():
            self._idle_steps, self._wait = 0, self.options.probe_every
            probe = idle >= self.options.probe_every
        else:
            probe = self._probe_of_idle_batch(idle)
        self._table.values[rows, self._IDLE] = np.where(probe, 0, idle)
        return np.where(probe, 1, lengths)

    def _probe_of_idle_batch(self, idle: NDArray[np.float64]) -> NDArray[np.bool_]:
        """`[R]` who drafts a token where it pays for nobody: the one that did not for longest.

        A draft step takes its time whoever drafts. If each request had its own turn, a batch
        would hardly have a step without one.
        """
        probe = np.zeros(len(idle), dtype=np.bool_)
        self._idle_steps += 1
        if self._idle_steps >= self._wait:
            self._idle_steps = 0
            self._wait = min(2 * self._wait, self._LONGEST_WAIT * self.options.probe_every)
            probe[idle.argmax()] = True
        return probe


def best_lengths(
    acceptance: NDArray[np.float64], cost_ratio: float, most: int
) -> NDArray[np.int64]:
    """`[R]` the k in 0..most of the largest expected speed-up, least on ties."""
    return expected_speedups(acceptance, cost_ratio, most).argmax(axis=1)


def expected_speedups(
    acceptance: NDArray[np.float64], cost_ratio: float, most: int
) -> NDArray[np.float64]:
    """`[R, K+1]` (1 - a^(k+1)) / ((1 - a)(k c + 1)) for k = 0..K: tokens per plain step's time.

    Args:
        acceptance: `[R]` a, in [0, 1].
        cost_ratio: c.
        most: K.
    """
    k = np.arange(most + 1)
    # The geometric sum term by term: right at a = 1, too.
    expected_tokens = np.cumsum(acceptance[:, None] ** k, axis=1)
    return expected_tokens / (k * cost_ratio + 1)
