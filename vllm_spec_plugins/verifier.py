"""Verifiers decide what is accepted and draw the token after it.

Shapes: R requests, K most draft tokens of any of them, N all draft tokens of the
step laid end to end, V vocabulary, H hidden size. p is the target's law at a
position, after every sampling constraint; q the law the draft token was drawn from.

Nearly every verifier is one acceptance probability per draft token: subclass
`acceptance_rule.AcceptanceRule`. Rules that look at the whole block subclass `Verifier`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
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
