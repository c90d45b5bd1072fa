"""Acceptance rules that accept more than the target's law allows, and count what it costs.

By how much a rule accepts a draft token beyond min(1, p/q) is, with the residual the base
class draws from, exactly the total-variation distance it adds at that position. A relaxed
rule therefore knows its price while it serves, and can be told to stop at one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from .acceptance_rule import AcceptanceRule, greedy_matches, token_acceptance
from .greedy_on_host import lay_out, mismatches
from .nobodys_step import verify_nobodys_steps
from .price_accounts import price_accounts
from .row_choice import may_look, replace_rows
from .triton_kernels.relaxations import (  # pyright: ignore[reportMissingImports]
    GivenAcceptance,
    Judge,
    Relaxation,
)
from .triton_kernels.verify_fused import (  # pyright: ignore[reportMissingImports]
    can_verify_fused,
    verify_fused,
)
from .verifier import Guarantee, Verification, VerifierOptions, VerifyInput

if TYPE_CHECKING:
    from .context import EngineContext


class RelaxedOptions(VerifierOptions):
    """What every relaxed verifier accepts."""

    max_total_variation: float | None = Field(
        None,
        ge=0,
        le=1,
        description="A request whose mean price per draft token looked at reaches this is "
        "verified exactly until the mean is below it again; 0: always. Absent: no limit.",
    )


class RelaxedRule(AcceptanceRule):
    """A verifier that accepts more than the exact rule, token by token.

    Subclasses say how likely they accept (`relaxed_acceptance`, `relaxed_greedy_acceptance`).
    This class holds them to three things:

    - A token that the request's sampling options exclude (logit -inf: grammar, bad words,
      allowed tokens, top-k, top-p) is never accepted.
    - A greedy request's most likely token is always accepted.
    - A request that has used up `max_total_variation` is verified exactly, whatever the
      rule says, and without touching the other requests of the batch.
    """

    Options: ClassVar[type[VerifierOptions]] = RelaxedOptions
    guarantee = Guarantee.HEURISTIC

    def __init__(self, options: RelaxedOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        self._max_total_variation = options.max_total_variation
        self._accounts = price_accounts(context.device)

    @abstractmethod
    def relaxed_acceptance(self, batch: VerifyInput) -> Tensor:
        """`[N]` probability, in [0, 1], that each draft token is accepted.

        What it says about rows of greedy requests and placeholders is not used.
        """

    def relaxed_greedy_acceptance(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        """`[M]` bool for rows of greedy requests: accepted though not the most likely token.

        Asked about such tokens only, on a device about others, too (`row_choice`); rows rise.
        Behind a row that is refused, those of the same request do not matter, and may be refused
        unseen.
        """
        del batch
        return torch.zeros_like(rows, dtype=torch.bool)

    def relaxed_acceptance_over_vocabulary(self, batch: VerifyInput, rows: Tensor) -> Tensor | None:
        """`[M, V]` f(y) for every token y at some of the N rows.

        Only for rules that may accept *less* than min(1, p/q); see
        `AcceptanceRule.acceptance_over_vocabulary`.
        """
        del batch, rows

    def exact_requests(self, batch: VerifyInput) -> Tensor | None:
        """`[R]` bool, requests verified exactly in this step; None when there are none.

        On a device None only where no request has a limit.
        """
        limit = self._max_total_variation
        return None if limit is None else self._accounts.at_limit(batch, limit)

    # What the base class asks for.

    def acceptance(self, batch: VerifyInput) -> Tensor:
        accept = self.relaxed_acceptance(batch)
        accept = torch.where(batch.allowed, accept, torch.zeros_like(accept))
        exact = self.exact_requests(batch)
        if exact is None:
            return accept
        return torch.where(exact[batch.request_of], token_acceptance(batch), accept)

    def greedy_acceptance(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        accept = greedy_matches(batch)[rows]
        open_ = ~accept & batch.allowed[rows]
        exact = self.exact_requests(batch)
        if exact is not None:
            open_ &= ~exact[batch.request_of[rows]]
        return replace_rows(
            accept, open_, lambda which: self.relaxed_greedy_acceptance(batch, rows[which])
        )

    def acceptance_over_vocabulary(self, batch: VerifyInput, rows: Tensor) -> Tensor | None:
        exact = self.exact_requests(batch)
        if exact is None:
            return self.relaxed_acceptance_over_vocabulary(batch, rows)
        exact_rows = exact[batch.request_of[rows]]
        if may_look(exact_rows) and exact_rows.all():
            return None
        accept = self.relaxed_acceptance_over_vocabulary(batch, rows)
        # [p - q]+ is the residual of the exact rule.
        return None if accept is None else accept.masked_fill_(exact_rows.unsqueeze(1), 1.0)

    def warm_up(self) -> None:
        verify_nobodys_steps(self, self.warm_up_tokens)

    @property
    def warm_up_tokens(self) -> tuple[int, int]:
        """`[first, last + 1)` ids among which some are relaxed, for steps of nobody's."""
        return 0, self.context.facts.vocab_size

    def verify(self, batch: VerifyInput) -> Verification:
        if self.draws_exact_residual and can_verify_fused(batch):
            relaxation, judge = self.relaxation(batch)
            verification = verify_fused(batch, relaxation=relaxation, judge=judge)
        elif self._is_asked_of_mismatches and batch.span_maxima is not None:
            verification = self._verify_greedy(batch)
        else:
            verification = super().verify(batch)
        self.pay(batch, verification)
        return verification

    def _verify_greedy(self, batch: VerifyInput) -> Verification:
        """Greedy requests on the host."""
        rows = mismatches(batch, self.exact_requests(batch))
        if not len(rows):
            return lay_out(batch, rows, torch.empty(0, dtype=torch.bool))
        return lay_out(batch, rows, self.relaxed_greedy_acceptance(batch, rows))

    @property
    def draws_exact_residual(self) -> bool:
        """Whether the token after a rejection comes from norm([p - q]+), the one of the kernel."""
        kind = type(self)
        over_vocabulary = kind.relaxed_acceptance_over_vocabulary
        return (
            over_vocabulary is RelaxedRule.relaxed_acceptance_over_vocabulary
            and kind.acceptance_over_vocabulary is RelaxedRule.acceptance_over_vocabulary
            and kind.residual is AcceptanceRule.residual
        )

    def relaxation(self, batch: VerifyInput) -> tuple[Relaxation | None, Judge | None]:
        """What the kernel is told of this step: the acceptance of every draft token.

        For rules that it can work out itself: override.
        """
        if batch.all_greedy and self._matches_exactly:
            return None, None
        accept = self._decided_acceptance(batch)
        if not batch.any_greedy or self._matches_exactly:
            return GivenAcceptance(accept), None
        # Greedy requests accept what is judged, beside their most likely tokens.
        scores = accept.masked_fill(~batch.greedy[batch.request_of], 0)
        return GivenAcceptance(accept), Judge(scores.float(), threshold=1.0)

    def pay(self, batch: VerifyInput, verification: Verification) -> None:
        """Add a step to what its requests have spent. For rules that override `verify`."""
        if self._max_total_variation is None or verification.extra_acceptance is None:
            return
        self._accounts.pay(batch, verification)

    def finish(self, request_ids: Sequence[str]) -> None:
        self._accounts.forget(request_ids)

    @property
    def _is_asked_of_mismatches(self) -> bool:
        kind = type(self)
        inherits = kind.greedy_acceptance is RelaxedRule.greedy_acceptance
        return inherits and not self._matches_exactly

    @property
    def _matches_exactly(self) -> bool:
        kind = type(self)
        return (
            kind.relaxed_greedy_acceptance is RelaxedRule.relaxed_greedy_acceptance
            and kind.greedy_acceptance is RelaxedRule.greedy_acceptance
        )
