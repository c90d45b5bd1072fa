"""Verifiers that are one acceptance probability per draft token, and the exact one."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from .draw_next import draw_next
from .random_numbers import Purpose
from .residual import residual_weights
from .row_choice import replace_rows
from .token_tables import assemble, greedy_tokens, in_table, leading_run
from .verifier import Guarantee, Verification, Verifier, VerifierOptions, VerifyInput


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
