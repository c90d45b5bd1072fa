"""Acceptance rules that accept more than the target's law allows, and count what it costs.

By how much a rule accepts a draft token beyond min(1, p/q) is, with the residual the base
class draws from, exactly the total-variation distance it adds at that position. A relaxed
rule therefore knows its price while it serves, and can be told to stop at one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from .nobodys_step import nobodys_step
from .request_table import RequestTable
from .triton_kernels.relaxations import (  # pyright: ignore[reportMissingImports]
    GivenAcceptance,
    Judge,
    Relaxation,
)
from .triton_kernels.verify_fused import (  # pyright: ignore[reportMissingImports]
    can_verify_fused,
    verify_fused,
)
from .verifier import (
    AcceptanceRule,
    Guarantee,
    Verification,
    VerifierOptions,
    VerifyInput,
    greedy_matches,
    token_acceptance,
)
from .vocabulary_passes import first_argmax, is_numpy

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


def keeps_no_budget(options: VerifierOptions) -> bool:
    """Whether nothing is remembered of what requests have paid: that is done on the host."""
    return getattr(options, "max_total_variation", None) is None


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
        #: Of each request with a limit: price paid, draft tokens looked at.
        self._spent = RequestTable((0.0, 0.0), capacity=16)

    @abstractmethod
    def relaxed_acceptance(self, batch: VerifyInput) -> Tensor:
        """`[N]` probability, in [0, 1], that each draft token is accepted.

        What it says about rows of greedy requests and placeholders is not used.
        """

    def relaxed_greedy_acceptance(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        """`[M]` bool for rows of greedy requests: accepted though not the most likely token.

        Asked about such tokens only.
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
        """`[R]` bool, requests verified exactly in this step; None when there are none."""
        limit = self._max_total_variation
        if limit is None:
            return None
        rows = self._spent.rows(batch.request_ids)  # new requests have paid nothing
        price, looked_at = self._spent.values[rows].T
        exact = price >= limit * looked_at
        if limit > 0:
            exact &= looked_at > 0
        return torch.from_numpy(exact).to(batch.num_draft.device) if exact.any() else None

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
        which = open_.nonzero().squeeze(1)
        return accept.index_copy(0, which, self.relaxed_greedy_acceptance(batch, rows[which]))

    def acceptance_over_vocabulary(self, batch: VerifyInput, rows: Tensor) -> Tensor | None:
        exact = self.exact_requests(batch)
        if exact is None:
            return self.relaxed_acceptance_over_vocabulary(batch, rows)
        exact_rows = exact[batch.request_of[rows]]
        if exact_rows.all():
            return None
        accept = self.relaxed_acceptance_over_vocabulary(batch, rows)
        # [p - q]+ is the residual of the exact rule.
        return None if accept is None else accept.masked_fill_(exact_rows.unsqueeze(1), 1.0)

    def warm_up(self) -> None:
        """On the CPU passes over rows are compiled when they are first used (`compiled_rows`)."""
        if self.context.device.type != "cpu":
            return
        for temperature in (1.0, 0.0):
            step = nobodys_step(self.context, temperature, self.warm_up_tokens)
            self.verify(step)
            self.finish(step.request_ids)

    @property
    def warm_up_tokens(self) -> tuple[int, int]:
        """`[first, last + 1)` ids among which some are relaxed, for steps of nobody's."""
        return 0, self.context.facts.vocab_size

    def verify(self, batch: VerifyInput) -> Verification:
        if self.draws_exact_residual and can_verify_fused(batch):
            relaxation, judge = self.relaxation(batch)
            verification = verify_fused(batch, relaxation=relaxation, judge=judge)
        elif self._asks_of_rows(batch):
            verification = self._verify_greedy(batch)
        else:
            verification = super().verify(batch)
        self.pay(batch, verification)
        return verification

    def _verify_greedy(self, batch: VerifyInput) -> Verification:
        """Greedy requests on the host: the rule is asked about mismatches that are reached.

        In lists: a walk over the step's draft tokens takes less than a few calls on tensors.
        """
        drafted, own = batch.draft_token_ids.tolist(), batch.greedy_token_ids.tolist()
        lengths, bonus = batch.num_draft.tolist(), first_argmax(batch.bonus_logits).tolist()
        ends = list(accumulate(lengths))
        mismatches = [
            [row for row in range(end - length, end) if drafted[row] != own[row]]
            for length, end in zip(lengths, ends, strict=True)
        ]
        passed = self._let_pass(batch, [rows[0] for rows in mismatches if rows])
        if passed:
            # All that follow at once: one by one would take longer than what it saves.
            goes_on = (rows for rows in mismatches if rows and rows[0] in passed)
            passed |= self._let_pass(batch, [row for rows in goes_on for row in rows[1:]])
        tokens, accepted, extra = [], [], [0.0] * len(drafted)
        for request, (length, end) in enumerate(zip(lengths, ends, strict=True)):
            rows = mismatches[request]
            last = next((row for row in rows if row not in passed), end)
            for row in rows:
                extra[row] = float(row < last)
            accepted.append(last - (end - length))
            drawn = bonus[request] if last == end else own[last]
            rest = [-1] * (batch.max_num_draft - accepted[-1])
            tokens.append([*drafted[end - length : last], drawn, *rest])
        table = torch.tensor(tokens, dtype=torch.int64)
        return Verification(
            table.view(len(lengths), batch.max_num_draft + 1),
            torch.tensor(accepted, dtype=torch.int64),
            torch.tensor(extra, dtype=batch.target_logits.dtype),
        )

    def _let_pass(self, batch: VerifyInput, rows: list[int]) -> set[int]:
        """Those of some rows of greedy requests, all mismatches, that the rule accepts."""
        if not rows:
            return set()
        asked = torch.tensor(rows)
        drafted = batch.draft_token_ids[asked]
        logits = batch.target_logits[asked, drafted.clamp(min=0)]
        open_ = (drafted >= 0) & (logits > -torch.inf)
        exact = self.exact_requests(batch)
        if exact is not None:
            open_ &= ~exact[batch.request_of[asked]]
        asked = asked[open_]
        if not len(asked):
            return set()
        return set(asked[self.relaxed_greedy_acceptance(batch, asked)].tolist())

    def _asks_of_rows(self, batch: VerifyInput) -> bool:
        """Whether `_verify_greedy` does it."""
        kind = type(self)
        return (
            batch.all_greedy
            and not self._matches_exactly
            and kind.greedy_acceptance is RelaxedRule.greedy_acceptance
            and is_numpy(batch.target_logits)
        )

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
        looked_at = batch.index_in_draft <= verification.accepted[batch.request_of]
        looked_at &= batch.draft_token_ids >= 0
        step = torch.stack([verification.extra_acceptance.double(), looked_at.double()], dim=1)
        of_request = step.new_zeros(len(batch.num_draft), 2)
        of_request.index_add_(0, batch.request_of, step)
        rows = self._spent.rows(batch.request_ids)
        np.add.at(self._spent.values, rows, of_request.cpu().numpy())

    def finish(self, request_ids: Sequence[str]) -> None:
        self._spent.forget(request_ids)

    @property
    def _matches_exactly(self) -> bool:
        kind = type(self)
        return (
            kind.relaxed_greedy_acceptance is RelaxedRule.relaxed_greedy_acceptance
            and kind.greedy_acceptance is RelaxedRule.greedy_acceptance
        )
