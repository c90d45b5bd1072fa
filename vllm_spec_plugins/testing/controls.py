"""Verifiers with one mistake each. A test that they pass shows nothing about those it passes.

Every one of these mistakes has been made in a published implementation, and every one leaves
text that looks right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from vllm_spec_plugins.acceptance_rule import AcceptanceRule, token_acceptance
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.random_numbers import Purpose, uniforms
from vllm_spec_plugins.verifier import (
    Guarantee,
    Verification,
    Verifier,
    VerifierOptions,
    VerifyInput,
)

from .toy_problems import toy_context


class Altered(Verifier):
    """A verifier that is shown something else than what it was given."""

    guarantee = Guarantee.LOSSLESS

    def __init__(self, inner: Verifier, alter: Callable[[VerifyInput], VerifyInput]) -> None:
        super().__init__(inner.options, inner.context)
        self.inner = inner
        self.alter = alter

    def verify(self, batch: VerifyInput) -> Verification:
        return self.inner.verify(self.alter(batch))


class DroppedResidual(AcceptanceRule):
    """The token rule, but after a rejection the token comes from p itself."""

    guarantee = Guarantee.LOSSLESS

    def acceptance(self, batch: VerifyInput) -> Tensor:
        return token_acceptance(batch)

    def residual(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        return torch.softmax(batch.target_logits[rows], dim=-1)


class _SharedUniforms(VerifyInput):
    """The number that decided acceptance also draws the token after a rejection."""

    def uniforms(self, purpose: Purpose) -> Tensor:
        if purpose is Purpose.RESAMPLE:
            return uniforms(self.streams, self.positions, 0, Purpose.ACCEPT)
        return super().uniforms(purpose)


class _RepeatedUniforms(VerifyInput):
    """One number decides every position of a draft."""

    def uniforms(self, purpose: Purpose) -> Tensor:
        if purpose is Purpose.ACCEPT:
            owner = self.request_of
            return uniforms(self.streams[owner], self.positions[owner], 0, purpose)
        return super().uniforms(purpose)


class _UniformsOfPosition(VerifyInput):
    """Numbers belong to sequence positions: looked at in one step, they return in the next.

    Harmless for the token rule, which never looks past the position it stops at; a bias for
    block verification, which does. The reason why our numbers belong to steps.
    """

    def uniforms(self, purpose: Purpose) -> Tensor:
        if purpose is Purpose.ACCEPT:
            owner = self.request_of
            position = self.positions[owner] + self.index_in_draft
            return uniforms(self.streams[owner], position, 0, purpose)
        return super().uniforms(purpose)


class _DraftNoise(VerifyInput):
    """Verification draws the numbers the proposer drew its tokens with."""

    def uniforms(self, purpose: Purpose) -> Tensor:
        if purpose is Purpose.ACCEPT:
            owner = self.request_of
            return uniforms(
                self.streams[owner], self.positions[owner], self.index_in_draft, Purpose.DRAFT
            )
        return super().uniforms(purpose)


def _as(kind: type[VerifyInput]) -> Callable[[VerifyInput], VerifyInput]:
    def alter(batch: VerifyInput) -> VerifyInput:
        return kind(**{field.name: getattr(batch, field.name) for field in fields(batch)})

    return alter


def _wrong_draft_probabilities(batch: VerifyInput) -> VerifyInput:
    """A tenth of q is spread evenly: off by a little, everywhere."""
    q = batch.draft_probabilities
    if q is None:
        return batch
    values = 0.9 * q.values + 0.1 / q.values.shape[-1]
    return replace(batch, draft_probabilities=DraftProbabilities(values, q.vocabulary, q.sampled))


def _bonus_from_last_draft_row(batch: VerifyInput) -> VerifyInput:
    """The bonus token comes from one position too early."""
    last = (batch.first + batch.num_draft - 1).clamp(min=0)
    row = batch.target_logits[last] if len(batch.target_logits) else batch.bonus_logits
    drafted = (batch.num_draft > 0).unsqueeze(1)
    return replace(batch, bonus_logits=torch.where(drafted, row, batch.bonus_logits))


def position_keyed(inner: Verifier) -> Verifier:
    """`inner` with random numbers that belong to sequence positions instead of steps."""
    return Altered(inner, _as(_UniformsOfPosition))


def negative_controls(inner: Verifier) -> dict[str, Verifier]:
    """Broken versions of a lossless verifier, by the mistake in them. All must fail the kit."""
    return {
        "wrong draft probabilities": Altered(inner, _wrong_draft_probabilities),
        "dropped residual": DroppedResidual(VerifierOptions(), toy_context()),
        "accept and resample share a number": Altered(inner, _as(_SharedUniforms)),
        "one number for all positions": Altered(inner, _as(_RepeatedUniforms)),
        "verification reuses the draft's numbers": Altered(inner, _as(_DraftNoise)),
        "bonus token off by one": Altered(inner, _bonus_from_last_draft_row),
    }


class Misstated(AcceptanceRule):
    """Says of itself what `inner` says, and draws what `inner` draws from something else."""

    guarantee = Guarantee.HEURISTIC

    def __init__(self, inner: AcceptanceRule, alter: Callable[[VerifyInput], VerifyInput]) -> None:
        super().__init__(inner.options, inner.context)
        self.inner = inner
        self.alter = alter

    def acceptance(self, batch: VerifyInput) -> Tensor:
        return self.inner.acceptance(batch)

    def residual(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        return self.inner.residual(batch, rows)

    def accepted_law(self, batch: VerifyInput) -> Tensor:
        return self.inner.accepted_law(batch)

    def verify(self, batch: VerifyInput) -> Verification:
        return self.inner.verify(self.alter(batch))

    def finish(self, request_ids: Sequence[str]) -> None:
        self.inner.finish(request_ids)


def _slightly_other_target(batch: VerifyInput) -> VerifyInput:
    """Logits a twentieth sharper than the law is: a temperature applied twice, say."""
    return replace(batch, target_logits=batch.target_logits * 1.05)


def misstated(inner: AcceptanceRule) -> dict[str, Verifier]:
    """Verifiers, relaxed ones too, whose `verify` is not what they say, by the mistake."""
    return {
        "wrong target law": Misstated(inner, _slightly_other_target),
        "accept and resample share a number": Misstated(inner, _as(_SharedUniforms)),
        "one number for all positions": Misstated(inner, _as(_RepeatedUniforms)),
        "bonus token off by one": Misstated(inner, _bonus_from_last_draft_row),
    }
