"""The reference of `verify_fused`: the verifiers' own path, and the kernel's relaxations."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from vllm_spec_plugins.acceptance_rule import AcceptanceRule, token_acceptance
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.verifier import Guarantee, Verification, VerifierOptions, VerifyInput

from .relaxations import DraftLogits, GivenAcceptance, GroupSum, Judge, NeighbourSum, Relaxation


def verify_fused_reference(
    batch: VerifyInput,
    rule: Literal["token", "block"] = "token",
    *,
    raw: bool = False,
    draft_logits: DraftLogits | None = None,
    relaxation: Relaxation | None = None,
    judge: Judge | None = None,
) -> Verification:
    """The same in PyTorch, on any device: the verifiers' own path. See `verify_fused`."""
    if batch.target_logits.dtype in (torch.bfloat16, torch.float16):
        batch = replace(
            batch,
            target_logits=batch.target_logits.float(),
            bonus_logits=batch.bonus_logits.float(),
        )
    if raw:
        scale = torch.where(batch.greedy, 1, 1 / batch.temperatures).to(batch.target_logits.dtype)
        scale = scale.unsqueeze(1)
        if draft_logits is not None:
            values = draft_logits.values.to(scale.dtype) * scale[batch.request_of]
            draft_logits = replace(draft_logits, values=values)
        batch = replace(
            batch,
            target_logits=batch.target_logits * scale[batch.request_of],
            bonus_logits=batch.bonus_logits * scale,
        )
    if draft_logits is not None:
        values = torch.softmax(draft_logits.values.to(batch.target_logits.dtype), dim=-1)
        q = DraftProbabilities(values, draft_logits.vocabulary, draft_logits.sampled)
        batch = replace(batch, draft_probabilities=q)
    if rule == "block":
        from ..verifiers.block_verification import verify_block_reference  # noqa: TID252

        return verify_block_reference(batch)
    if relaxation is None and judge is None:
        return _ExactReference().verify(batch)
    return _RelaxedReference(relaxation, judge).verify(batch)


class _ExactReference(AcceptanceRule):
    """The token rule."""

    guarantee = Guarantee.LOSSLESS

    def __init__(self) -> None:
        self.options = VerifierOptions()

    def acceptance(self, batch: VerifyInput) -> Tensor:
        return token_acceptance(batch)


class _RelaxedReference(_ExactReference):
    """The token rule with the kernel's relaxations."""

    guarantee = Guarantee.HEURISTIC

    def __init__(self, relaxation: Relaxation | None, judge: Judge | None) -> None:
        super().__init__()
        self.relaxation, self.judge = relaxation, judge

    def acceptance(self, batch: VerifyInput) -> Tensor:
        accept = super().acceptance(batch)
        if isinstance(self.relaxation, NeighbourSum):
            accept = _neighbour_acceptance(batch, self.relaxation)
        elif isinstance(self.relaxation, GroupSum):
            accept = torch.maximum(accept, _group_acceptance(batch, self.relaxation))
        elif isinstance(self.relaxation, GivenAcceptance):
            accept = self.relaxation.acceptance.to(accept.dtype)
        return torch.where(self._passed(batch), torch.ones_like(accept), accept)

    def greedy_acceptance(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        return super().greedy_acceptance(batch, rows) | self._passed(batch)[rows]

    def _passed(self, batch: VerifyInput) -> Tensor:
        if self.judge is None:
            return torch.zeros_like(batch.allowed)
        return (self.judge.scores >= self.judge.threshold) & batch.allowed


def _ratio(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p < q, p / q, (p > 0).to(p.dtype))


def _neighbour_acceptance(batch: VerifyInput, relaxation: NeighbourSum) -> Tensor:
    p, q = batch.draft_token_probability, batch.draft_law_of_token.to(batch.target_logits.dtype)
    code = batch.draft_token_ids - relaxation.first_code
    is_code = (code >= 0) & (code < len(relaxation.neighbours))
    ids = relaxation.neighbours[torch.where(is_code, code, 0)].long()
    law = torch.softmax(batch.target_logits, dim=-1).gather(1, ids.clamp(min=0))
    law = torch.where(is_code.unsqueeze(1) & (ids >= 0), law, torch.zeros_like(law))
    within = law.cumsum(dim=1)
    budget = p * relaxation.budget if relaxation.multiplicative else relaxation.budget
    budget = torch.as_tensor(budget, dtype=p.dtype, device=p.device).expand(len(p))
    added = torch.where(within <= budget.unsqueeze(1), law, torch.zeros_like(law)).sum(dim=1)
    return torch.where(batch.allowed, _ratio(p + added, q), torch.zeros_like(p))


def _group_acceptance(batch: VerifyInput, relaxation: GroupSum) -> Tensor:
    group_of = relaxation.group_of
    group = group_of[batch.draft_token_ids.clamp(min=0)]
    member = (group_of == group.unsqueeze(1)) & (group >= 0).unsqueeze(1)
    member.scatter_(1, batch.draft_token_ids.clamp(min=0).unsqueeze(1), True)
    law = torch.softmax(batch.target_logits, dim=-1)
    p = (law * member).sum(dim=1)
    q = torch.ones_like(p)
    if batch.draft_probabilities is not None:
        rows = torch.arange(len(p), device=p.device)
        dense = batch.draft_probabilities.dense(rows, batch.draft_token_ids, law.shape[1])
        q = (dense.to(p.dtype) * member).sum(dim=1)
    return torch.where(batch.allowed, _ratio(p, q), torch.zeros_like(p))
