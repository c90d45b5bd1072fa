"""Verifiers decide what is accepted and draw the token after it.

Shapes: R requests, K most draft tokens of any of them, N all draft tokens of the
step laid end to end, V vocabulary, H hidden size. p is the target's law at a
position, after every sampling constraint; q the law the draft token was drawn from.

Nearly every verifier is one acceptance probability per draft token: subclass
`AcceptanceRule`. Rules that look at the whole block subclass `Verifier`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .options import PluginOptions
from .random_numbers import Purpose, uniforms
from .row_choice import may_look, replace_rows
from .vocabulary_passes import (
    argmax_and_maxima,
    first_argmax,
    is_single,
    log_normaliser,
    log_normaliser_from,
    log_normaliser_of_rows,
    possible,
    probability_and_entropy,
    probability_of,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .context import EngineContext, ModelFacts
    from .draft_probabilities import DraftProbabilities


class Guarantee(Enum):
    """What a verifier promises about the law of the text. Tests hold it to that."""

    LOSSLESS = "lossless"
    BOUNDED = "bounded"
    HEURISTIC = "heuristic"

    @property
    def meaning(self) -> str:
        return {
            Guarantee.LOSSLESS: "reproduces the target's law exactly",
            Guarantee.BOUNDED: "its distance to the target's law is bounded and measured",
            Guarantee.HEURISTIC: "its distance to the target's law is measured, not bounded",
        }[self]


class VerifierOptions(PluginOptions):
    """Options of one verifier: the keys it accepts beside `name`."""


@dataclass(frozen=True, slots=True)
class TokenHistory:
    """What the requests of a step have said so far. On the host; nothing is copied.

    Attributes:
        token_ids: `[rows, max_model_len]` int32, a view of the engine's own table. Row
            `rows[i]`, columns below `num_tokens[i]`, are request i's prompt and verified
            output. Everything else in it is stale: do not read it.
        rows: `[R]` int64, row of each request in `token_ids`. Rows move between steps.
        num_tokens: `[R]` int64, prompt plus verified output; 0 where the prompt came as
            embeddings and nothing may be read.
        num_prompt_tokens: `[R]` int64.
    """

    token_ids: NDArray[np.int32]
    rows: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    num_prompt_tokens: NDArray[np.int64]

    def select(self, requests: NDArray[np.int64]) -> TokenHistory:
        """The same for some requests only."""
        return TokenHistory(
            self.token_ids,
            self.rows[requests],
            self.num_tokens[requests],
            self.num_prompt_tokens[requests],
        )


@dataclass(frozen=True)
class VerifyInput:
    """One verification step.

    Attributes:
        request_ids: `[R]`.
        target_logits: `[N, V]` float, row j is the target's law *of* draft token j. Penalties,
            bad words, grammar, temperature, top-k and top-p are already in it.
            Greedy requests have temperature 1 here.
        bonus_logits: `[R, V]` the same after the last draft token of each request.
        draft_token_ids: `[N]` int64; -1 is a placeholder and is never accepted.
        num_draft: `[R]` int64, draft tokens of each request; 0 is normal. Sums to N.
        draft_probabilities: Over `[N]` rows, or None when every draft is deterministic.
        temperatures: `[R]` float, 0 = greedy.
        streams: `[R]` int64 random stream of each request.
        positions: `[R]` int64 sequence position of the first draft token.
        hidden_states: `[N, H]` final hidden state *at* each draft token, if asked for.
        constrained: `[R]` bool, requests whose text must follow a grammar (structured
            output); None when there are none.
        history: Tokens before the draft, on the host; None outside an engine, and where the
            host does not know them yet (`Verifier.verifies_on_device`).
    """

    request_ids: Sequence[str]
    target_logits: Tensor
    bonus_logits: Tensor
    draft_token_ids: Tensor
    num_draft: Tensor
    draft_probabilities: DraftProbabilities | None
    temperatures: Tensor
    streams: Tensor
    positions: Tensor
    hidden_states: Tensor | None = None
    # Known on the host, so that no device has to be asked:
    #: Most draft tokens of any request (K).
    max_num_draft: int = field(kw_only=True)
    #: Whether every / any request is greedy.
    all_greedy: bool = field(kw_only=True)
    any_greedy: bool = field(kw_only=True)
    constrained: Tensor | None = field(default=None, kw_only=True)
    history: TokenHistory | None = field(default=None, kw_only=True)

    @cached_property
    def greedy(self) -> Tensor:
        """`[R]` bool."""
        return self.temperatures == 0

    @cached_property
    def first(self) -> Tensor:
        """`[R]` int64, index of each request's first draft token in the N."""
        return self.num_draft.cumsum(0) - self.num_draft

    @cached_property
    def request_of(self) -> Tensor:
        """`[N]` int64, which request each draft token belongs to."""
        requests = torch.arange(len(self.num_draft), device=self.num_draft.device)
        return requests.repeat_interleave(self.num_draft, output_size=len(self.draft_token_ids))

    @cached_property
    def index_in_draft(self) -> Tensor:
        """`[N]` int64, 0 for a request's first draft token."""
        here = torch.arange(len(self.draft_token_ids), device=self.num_draft.device)
        return here - self.first[self.request_of]

    @cached_property
    def target_log_normaliser(self) -> Tensor:
        """`[N]` log sum exp of the target's logits."""
        if "draft_token_probability" in self.__dict__ and may_look(self.target_logits):
            every_row = torch.arange(len(self.draft_token_ids), device=self.num_draft.device)
            return self.target_log_normaliser_at(every_row)
        return log_normaliser(self.target_logits)

    @cached_property
    def greedy_token_ids(self) -> Tensor:
        """`[N]` int64, the target's most likely token; -1 in rows of sampled requests."""
        if self.all_greedy:
            return first_argmax(self.target_logits)
        return replace_rows(
            torch.full_like(self.draft_token_ids, -1),
            self.greedy[self.request_of],
            lambda rows: first_argmax(self.target_logits.index_select(0, rows)),
        )

    @cached_property
    def span_maxima(self) -> Tensor | None:
        """`[N, spans]` largest target logits of spans of columns; `argmax_and_maxima` has more.

        None where not all requests are greedy, or the logits are not float32 on the CPU. Asked for
        first, it gives `greedy_token_ids` for the same pass.
        """
        if not self.all_greedy or not is_single(self.target_logits):
            return None
        token_ids, maxima = argmax_and_maxima(self.target_logits)
        self.__dict__.setdefault("greedy_token_ids", token_ids)
        return maxima

    @cached_property
    def allowed(self) -> Tensor:
        """`[N]` bool, draft tokens the sampling options do not exclude; False for placeholders."""
        return possible(self.target_logits, self.draft_token_ids)

    @cached_property
    def draft_token_probability(self) -> Tensor:
        """`[N]` p(x), the target's probability of each draft token; 0 for placeholders."""
        p = probability_of(self.target_logits, self.draft_token_ids.clamp(min=0))
        return torch.where(self.draft_token_ids >= 0, p, torch.zeros_like(p))

    @cached_property
    def target_entropy(self) -> Tensor:
        """`[N]` entropy of the target's law, in nats.

        Asked for first, it gives `draft_token_probability` for the same pass.
        """
        p, entropy = probability_and_entropy(self.target_logits, self.draft_token_ids.clamp(min=0))
        p = torch.where(self.draft_token_ids >= 0, p, torch.zeros_like(p))
        self.__dict__.setdefault("draft_token_probability", p)
        return entropy

    def target_entropy_up_to(self, probability: float) -> Tensor:
        """`[N]` `target_entropy` where p(x) is not above `probability`, 0 elsewhere: for less.

        Asked for first, it gives `draft_token_probability` for the same pass.
        """
        known: dict[float, Tensor] = self.__dict__.setdefault("_entropies_up_to", {})
        if probability not in known:
            ids = self.draft_token_ids
            p, entropy = probability_and_entropy(self.target_logits, ids.clamp(min=0), probability)
            self.__dict__.setdefault("draft_token_probability", torch.where(ids >= 0, p, 0))
            known[probability] = entropy
        return known[probability]

    def target_log_normaliser_at(self, rows: Tensor) -> Tensor:
        """`[M]` `target_log_normaliser` of some rows, from what is known of them if it can be."""
        if "target_log_normaliser" in self.__dict__ or not may_look(self.target_logits):
            return self.target_log_normaliser[rows]
        if "draft_token_probability" not in self.__dict__:
            best = None
            if self.all_greedy and "greedy_token_ids" in self.__dict__:
                best = self.target_logits[rows, self.greedy_token_ids[rows]]
            return log_normaliser_of_rows(self.target_logits, rows, best)
        ids, p = self.draft_token_ids[rows].clamp(min=0), self.draft_token_probability[rows]
        return log_normaliser_from(self.target_logits, rows, ids, p)

    @cached_property
    def draft_law_of_token(self) -> Tensor:
        """`[N]` q(x), the draft's probability of each draft token; 1 where deterministic."""
        if self.draft_probabilities is None:
            return torch.ones_like(self.draft_token_probability)
        return self.draft_probabilities.of(self.draft_token_ids)

    def uniforms(self, purpose: Purpose) -> Tensor:
        """Random numbers in (0, 1): `[N]` for ACCEPT, `[R]` for RESAMPLE."""
        if purpose is Purpose.ACCEPT:
            owner = self.request_of
            return uniforms(
                self.streams[owner], self.positions[owner], self.index_in_draft, purpose
            )
        return uniforms(self.streams, self.positions, 0, purpose)

    def select(
        self,
        requests: Tensor,
        tokens: Tensor | None = None,
        on_host: NDArray[np.int64] | None = None,
    ) -> VerifyInput:
        """The same step for some requests only.

        Args:
            requests: `[R']` int64 indices, ascending.
            tokens: `[N']` int64, which of the N draft tokens are theirs. None: the device is asked,
                which waits for it.
            on_host: `requests` on the host. None: the same.
        """
        if tokens is None:
            chosen = torch.zeros_like(self.num_draft, dtype=torch.bool)
            chosen[requests] = True
            tokens = chosen[self.request_of].nonzero().squeeze(1)
        if on_host is None:
            on_host = requests.cpu().numpy()
        q = self.draft_probabilities
        return VerifyInput(
            [self.request_ids[int(i)] for i in on_host],
            self.target_logits[tokens],
            self.bonus_logits[requests],
            self.draft_token_ids[tokens],
            self.num_draft[requests],
            None if q is None else q.take(tokens),
            self.temperatures[requests],
            self.streams[requests],
            self.positions[requests],
            None if self.hidden_states is None else self.hidden_states[tokens],
            max_num_draft=self.max_num_draft,
            all_greedy=self.all_greedy,
            any_greedy=self.any_greedy,
            constrained=None if self.constrained is None else self.constrained[requests],
            history=None if self.history is None else self.history.select(on_host),
        )


@dataclass(frozen=True, slots=True)
class Verification:
    """What a verifier returns.

    Attributes:
        token_ids: `[R, K+1]` int64: the accepted draft tokens, the token drawn after them, -1s.
        accepted: `[R]` int64, how many draft tokens were accepted.
        extra_acceptance: `[N]` float, acceptance probability above min(1, p/q): the price paid
            in total variation at that position (0 where the chain had already ended).
            None for lossless verifiers.
    """

    token_ids: Tensor
    accepted: Tensor
    extra_acceptance: Tensor | None = None


class Verifier(ABC):
    """Decides which draft tokens stand and draws the token after them."""

    Options: ClassVar[type[VerifierOptions]] = VerifierOptions
    guarantee: ClassVar[Guarantee]
    #: Whether `VerifyInput.hidden_states` must be filled.
    needs_hidden_states: ClassVar[bool] = False

    def __init__(self, options: VerifierOptions, context: EngineContext) -> None:
        self.options = options
        self.context = context

    @classmethod
    def check(cls, options: VerifierOptions, facts: ModelFacts) -> None:
        """Refuse what the options' types cannot. Raises `SpecPluginsError`."""

    @classmethod
    def looks_ahead(cls, options: VerifierOptions) -> bool:
        """Whether what it decides at a draft token may depend on the draft tokens after it.

        Proposers that draft tokens behind a rejection again rely on nobody having looked at them.
        """
        del options
        return True

    @classmethod
    def verifies_on_device(cls, options: VerifierOptions) -> bool:
        """Whether it can decide before the host knows what the step before this one decided.

        It may then read neither `VerifyInput.history`, which is None, nor anything it keeps of
        single requests on the host. Where every verifier that a request may choose says so,
        the engine can plan a step before the last one is verified (asynchronous scheduling).
        """
        del options
        return False

    @classmethod
    def total_variation_bound(cls, options: VerifierOptions) -> float | None:
        """Most distance to the target's law at a draft position; None: it has none to declare.

        Verifiers that are `Guarantee.BOUNDED` declare one. It is said at startup, and the test
        kit holds them to it.
        """
        del options

    def warm_up(self) -> None:
        """Compile and touch everything the first real step would otherwise wait for."""

    @abstractmethod
    def verify(self, batch: VerifyInput) -> Verification:
        """Verify one step."""

    def finish(self, request_ids: Sequence[str]) -> None:
        """Forget requests that finished or were aborted. Not called for preemption."""


class AcceptanceRule(Verifier):
    """A verifier that is one acceptance probability per draft token.

    The base class walks the chain to the first rejection, draws the token after it and
    appends the bonus token. With f the acceptance probability, the token after a rejection
    comes from norm([p - q f]+), the best residual for that f (Cool-SD); where
    f >= min(1, p/q) everywhere this is the ordinary norm([p - q]+). With that residual the mean
    of [f - min(1, p/q)]+ over q, the extra acceptance, is exactly the total-variation distance
    to the target's law.
    """

    @classmethod
    def looks_ahead(cls, options: VerifierOptions) -> bool:
        """False: tokens are looked at one after the other. Override beside another `verify`."""
        del options
        return False

    @abstractmethod
    def acceptance(self, batch: VerifyInput) -> Tensor:
        """`[N]` probability, in [0, 1], that each draft token is accepted."""

    def acceptance_over_vocabulary(self, batch: VerifyInput, rows: Tensor) -> Tensor | None:
        """`[M, V]` f(y) for every token y at some of the N rows.

        Only for rules that may accept *less* than min(1, p/q): the residual needs it.
        None (the default) says the rule never does.
        """
        del batch, rows

    def greedy_acceptance(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        """`[M]` bool for rows of greedy requests: exact matching unless overridden.

        On a device it is asked of other rows, too (`row_choice`).
        """
        return batch.greedy_token_ids[rows] == batch.draft_token_ids[rows]

    def residual(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        """`[M, V]` unnormalised law of the token drawn after a rejection at some of the N rows."""
        return residual_weights(batch, rows, f=self.acceptance_over_vocabulary(batch, rows))

    def accepted_law(self, batch: VerifyInput) -> Tensor:
        """`[R, K+1]` probability that exactly that many draft tokens are accepted.

        What `verify` draws from, without drawing: with `residual` it gives the exact law of
        the output (`vllm_spec_plugins.testing`).
        """
        accept = self._decided_acceptance(batch)
        table = accept.new_zeros(len(batch.num_draft), batch.max_num_draft + 1)
        table[batch.request_of, batch.index_in_draft] = accept
        reached = torch.cat([torch.ones_like(table[:, :1]), table[:, :-1].cumprod(dim=1)], dim=1)
        return reached * (1 - table)

    def verify(self, batch: VerifyInput) -> Verification:
        if batch.all_greedy and self._matches_exactly:
            return verify_exact_match(batch)
        accept = self._decided_acceptance(batch)
        stands = accept > 0 if batch.all_greedy else batch.uniforms(Purpose.ACCEPT) < accept
        accepted = leading_run(batch, stands)
        extra = None
        if self.guarantee is not Guarantee.LOSSLESS:
            extra = _extra_acceptance(batch, accept, accepted)
        return assemble(batch, accepted, draw_next(batch, accepted, self.residual), extra)

    @property
    def _matches_exactly(self) -> bool:
        """Whether greedy requests are left to the default rule."""
        return type(self).greedy_acceptance is AcceptanceRule.greedy_acceptance

    def _decided_acceptance(self, batch: VerifyInput) -> Tensor:
        """`[N]` acceptance of every row: 0 or 1 for greedy requests, 0 for placeholders."""
        if batch.all_greedy:
            rows = torch.arange(len(batch.draft_token_ids), device=batch.num_draft.device)
            accept = self.greedy_acceptance(batch, rows).to(batch.target_logits.dtype)
        else:
            accept = self.acceptance(batch)
            if batch.any_greedy:
                greedy = batch.greedy[batch.request_of]
                accept = replace_rows(
                    accept.clone(), greedy, lambda rows: self.greedy_acceptance(batch, rows)
                )
        return torch.where(batch.draft_token_ids >= 0, accept, torch.zeros_like(accept))


def verify_exact_match(batch: VerifyInput) -> Verification:
    """Greedy requests under exact matching, the shortest way."""
    matches = in_table(batch, batch.greedy_token_ids == batch.draft_token_ids)
    accepted = matches.cumprod(dim=1).sum(dim=1)
    return Verification(greedy_tokens(batch, accepted), accepted)


def greedy_tokens(batch: VerifyInput, accepted: Tensor) -> Tensor:
    """`[R, K+1]` int64: the target's most likely tokens, -1 behind the one after the accepted.

    Args:
        batch: The step; all requests are greedy.
        accepted: `[R]` draft tokens that stand, all of them the most likely ones.
    """
    own, bonus = in_table(batch, batch.greedy_token_ids), first_argmax(batch.bonus_logits)
    table = torch.cat([own, bonus.unsqueeze(1)], dim=1)
    if len(batch.draft_token_ids) < own.numel():  # not every draft is as long as the longest
        table.scatter_(1, batch.num_draft.unsqueeze(1), bonus.unsqueeze(1))
    column = torch.arange(table.shape[1], device=table.device)
    return table.masked_fill_(column > accepted.unsqueeze(1), -1)


def in_table(batch: VerifyInput, values: Tensor) -> Tensor:
    """`[R, K]` of `[N]`: a row for each request, 0 past the end of its draft."""
    requests, width = len(batch.num_draft), batch.max_num_draft
    if len(values) == requests * width:  # every draft is as long as the longest
        return values.view(requests, width)
    table = values.new_zeros(requests, width)
    table[batch.request_of, batch.index_in_draft] = values
    return table


def token_acceptance(batch: VerifyInput) -> Tensor:
    """`[N]` min(1, p(x)/q(x)): Leviathan et al. 2211.17192, Chen et al. 2302.01318."""
    if "_token_acceptance" not in batch.__dict__:
        p, q = batch.draft_token_probability, batch.draft_law_of_token.to(batch.target_logits.dtype)
        # A placeholder has p = q = 0 and is never accepted.
        accept = torch.where(p < q, p / q, (p > 0).to(p.dtype))
        batch.__dict__["_token_acceptance"] = accept
    return batch.__dict__["_token_acceptance"].clone()  # callers may change theirs


def exact_acceptance(batch: VerifyInput) -> Tensor:
    """`[N]` what the exact rule accepts with: min(1, p/q), 0 or 1 for greedy requests."""
    if batch.all_greedy:
        return greedy_matches(batch).to(batch.target_logits.dtype)
    exact = token_acceptance(batch)
    if batch.any_greedy:
        matches = greedy_matches(batch).to(exact.dtype)
        exact = torch.where(batch.greedy[batch.request_of], matches, exact)
    return exact


def _extra_acceptance(batch: VerifyInput, accept: Tensor, accepted: Tensor) -> Tensor:
    """`[N]` what was accepted beyond the exact rule, at the positions that were looked at."""
    looked_at = batch.index_in_draft <= accepted[batch.request_of]
    excess = (accept - exact_acceptance(batch)).clamp(min=0)
    return torch.where(looked_at, excess, torch.zeros_like(excess))


def greedy_matches(batch: VerifyInput) -> Tensor:
    """`[N]` bool, draft tokens that are the target's most likely; False for sampled requests."""
    return (batch.greedy_token_ids == batch.draft_token_ids) & (batch.draft_token_ids >= 0)


def unclaimed(
    batch: VerifyInput, rows: Tensor, scale: Tensor | None = None, f: Tensor | None = None
) -> Tensor:
    """What the target's law leaves after the draft's accepted share: [scale p - q f]+.

    Args:
        batch: The step.
        rows: `[M]` int64, some of the N rows. A placeholder has q = 0.
        scale: `[M]` factor on p; None = 1.
        f: `[M, V]` acceptance of every token; None where it is at least min(1, p/q), in which
            case q itself gives the same.

    Returns:
        `[M, V]`; all 0 where p and q are equal.
    """
    left = torch.softmax(batch.target_logits.index_select(0, rows), dim=-1)
    if scale is not None:
        left *= scale.unsqueeze(1)
    ids = batch.draft_token_ids[rows].unsqueeze(1)
    if batch.draft_probabilities is None:
        column = ids.clamp(min=0)
        # q f is f(x) at the draft token and nothing elsewhere.
        share = left.gather(1, column) if f is None else f.gather(1, column)
        left.scatter_add_(1, column, torch.where(ids >= 0, -share, 0))
    else:
        q = batch.draft_probabilities.dense(rows, ids.squeeze(1), left.shape[1]).to(left.dtype)
        left = left.sub_(q) if f is None else left.addcmul_(q, f, value=-1)
    return left.clamp_(min=0)


def residual_weights(
    batch: VerifyInput, rows: Tensor, *, scale: Tensor | None = None, f: Tensor | None = None
) -> Tensor:
    """`[M, V]` weights of the token after a rejection: `unclaimed`, and p where that is nothing.

    p and q equal up to rounding leave nothing; a rejection is then itself rounding.
    """
    left = unclaimed(batch, rows, scale, f)
    return or_target_law(batch, rows, left)


def or_target_law(batch: VerifyInput, rows: Tensor, weights: Tensor) -> Tensor:
    """`[M, V]` weights at some of the N rows, used up; p where a row is nothing but 0."""
    return replace_rows(
        weights,
        weights.sum(dim=-1) <= 0,
        lambda empty: torch.softmax(batch.target_logits.index_select(0, rows[empty]), dim=-1),
    )


def leading_run(batch: VerifyInput, stands: Tensor) -> Tensor:
    """`[R]` how many draft tokens stand before the first that does not. `stands`: `[N]` bool."""
    return in_table(batch, stands).cumprod(dim=1).sum(dim=1)


def draw_next(
    batch: VerifyInput,
    accepted: Tensor,
    residual: Callable[[VerifyInput, Tensor], Tensor],
) -> Tensor:
    """The token after the accepted ones: from the residual after a rejection, else the bonus.

    Only one row per request is ever made full width; on a device, which of a request's two that is
    is not looked at, and both are.

    Args:
        batch: The step.
        accepted: `[R]` draft tokens that stand.
        residual: Gives `[M, V]` weights for M rows of the N.

    Returns:
        `[R]` int64.
    """
    if not may_look(accepted):
        return _draw_next_unseen(batch, accepted, residual)
    drawn = torch.empty_like(accepted)
    rejected = accepted < batch.num_draft
    rows = batch.first + accepted  # of the N, where a token was rejected
    if batch.any_greedy:
        chosen = (batch.greedy & rejected).nonzero().squeeze(1)
        drawn[chosen] = batch.greedy_token_ids[rows[chosen]]
        chosen = (batch.greedy & ~rejected).nonzero().squeeze(1)
        drawn[chosen] = first_argmax(batch.bonus_logits.index_select(0, chosen))
    if not batch.all_greedy:
        u = batch.uniforms(Purpose.RESAMPLE)
        chosen = (~batch.greedy & rejected).nonzero().squeeze(1)
        drawn[chosen] = sample_weights(residual(batch, rows[chosen]), u[chosen])
        chosen = (~batch.greedy & ~rejected).nonzero().squeeze(1)
        bonus = torch.softmax(batch.bonus_logits.index_select(0, chosen), dim=-1)
        drawn[chosen] = sample_weights(bonus, u[chosen])
    return drawn


def _draw_next_unseen(
    batch: VerifyInput,
    accepted: Tensor,
    residual: Callable[[VerifyInput, Tensor], Tensor],
) -> Tensor:
    """`draw_next` for every request as if rejected and as if not, of which one is taken."""
    rejected, drafted = accepted < batch.num_draft, len(batch.draft_token_ids)
    rows = (batch.first + accepted).clamp(max=max(drafted - 1, 0))
    drawn = likeliest = torch.empty_like(accepted)
    if batch.any_greedy:
        likeliest = first_argmax(batch.bonus_logits)
        if drafted:
            likeliest = torch.where(rejected, batch.greedy_token_ids[rows], likeliest)
    if not batch.all_greedy:
        weights = torch.softmax(batch.bonus_logits, dim=-1)
        if drafted:
            weights = torch.where(rejected.unsqueeze(1), residual(batch, rows), weights)
        drawn = sample_weights(weights, batch.uniforms(Purpose.RESAMPLE))
    return torch.where(batch.greedy, likeliest, drawn)


#: Columns summed at once by `sample_weights`, and most columns of one running sum.
_SPAN = 512
_SHORT = 16_384


def sample_weights(weights: Tensor, u: Tensor) -> Tensor:
    """Inverse transform sampling: one uniform per row, no noise per token.

    Over a large vocabulary, finds the span of columns first and the token inside it second,
    so that the running sum, which does not vectorise, is short.

    Args:
        weights: `[M, V]` non-negative, not normalised, each row with a positive sum.
        u: `[M]` float64 in (0, 1).

    Returns:
        `[M]` int64; a token of weight zero is never returned.
    """
    rows, width = weights.shape
    if width <= _SHORT:
        running = weights.cumsum(dim=-1, dtype=torch.float64)
        total = running[:, -1:]
        value = torch.minimum(u.unsqueeze(1) * total, _below(total))
        # Only where the weights are no numbers is nothing found.
        return torch.searchsorted(running, value, right=True).squeeze(1).clamp_(max=width - 1)
    span = _SPAN
    whole = width // span * span
    sums = weights[:, :whole].reshape(rows, width // span, span).sum(dim=-1)
    if whole < width:
        sums = torch.cat([sums, weights[:, whole:].sum(dim=-1, keepdim=True)], dim=1)
    cumulative = sums.cumsum(dim=-1, dtype=torch.float64)
    which, remaining = _first_above(cumulative, u * cumulative[:, -1])
    columns = which.unsqueeze(1) * span + torch.arange(span, device=weights.device)
    inside = weights.gather(1, columns.clamp(max=width - 1))
    inside = inside.masked_fill(columns >= width, 0)
    token, _ = _first_above(inside.cumsum(dim=-1, dtype=torch.float64), remaining)
    return (which * span + token).clamp(max=width - 1)


def _below(total: Tensor) -> Tensor:
    """The next smaller number: what rounding lifted to the total counts as just below it."""
    return torch.nextafter(total, torch.zeros_like(total))


def _first_above(cumulative: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Per row, the first column whose running sum exceeds `value`, and what `value` has left.

    A value that rounding lifted to the total or past it counts as just below the total.
    """
    total = cumulative[:, -1]
    value = torch.minimum(value, _below(total)).unsqueeze(1)
    column = torch.searchsorted(cumulative, value, right=True)
    column = column.clamp(max=cumulative.shape[1] - 1)
    before = torch.where(column > 0, cumulative.gather(1, (column - 1).clamp(min=0)), 0.0)
    return column.squeeze(1), (value - before).squeeze(1)


def assemble(
    batch: VerifyInput, accepted: Tensor, drawn: Tensor, extra_acceptance: Tensor | None = None
) -> Verification:
    """Accepted draft tokens, the drawn token, then -1s: `[R, K+1]`."""
    table = batch.draft_token_ids.new_full((len(accepted), batch.max_num_draft + 1), -1)
    table[batch.request_of, batch.index_in_draft] = batch.draft_token_ids
    column = torch.arange(table.shape[1], device=table.device)
    table = torch.where(column < accepted.unsqueeze(1), table, table.new_full((), -1))
    table.scatter_(1, accepted.unsqueeze(1), drawn.unsqueeze(1))
    return Verification(table, accepted, extra_acceptance)
