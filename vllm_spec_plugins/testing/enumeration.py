"""The exact law of a verifier's output, without drawing anything.

Every draft a toy proposer can make is one request of one batch. For each, the verifier says
how likely every number of accepted tokens is (`accepted_law`) and from what weights the next
token comes (`residual`); the target continues. Summed over drafts, weighted by how likely the
proposer is to make them, that is the law of the text, to rounding.

It examines the functions `verify` draws from; that `verify` draws from them is what
`simulation` shows for lossless verifiers and `step_draws` for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from vllm_spec_plugins.acceptance_rule import AcceptanceRule
from vllm_spec_plugins.relaxed_rule import RelaxedRule
from vllm_spec_plugins.verifier import Verifier, VerifyInput

from .toy_problems import DraftedStep, ToyProblem, verify_input


def every_draft(problem: ToyProblem) -> tuple[DraftedStep, Tensor]:
    """All drafts the proposer could make from the start, and how likely each is.

    A proposer that chooses is taken to choose any of them: each draft then counts as a
    problem of its own, with weight 1.

    Returns:
        The step with `[R, K]` drafts, R = V^(K - placeholders), and `[R]` weights.
    """
    size, drafted = problem.vocab_size, problem.num_draft - problem.num_placeholders
    number = torch.arange(size**drafted)
    digits = [number // size ** (drafted - 1 - i) % size for i in range(drafted)]
    digits += [torch.full_like(number, -1)] * problem.num_placeholders
    token_ids = (
        torch.stack(digits, dim=1) if digits else torch.zeros(len(number), 0, dtype=torch.int64)
    )
    step = DraftedStep(
        problem,
        torch.full_like(number, problem.start),
        token_ids,
        torch.full_like(number, problem.num_draft),
    )
    weights = torch.ones(len(number), dtype=torch.float64)
    if problem.draft_probabilities is not None:
        contexts = step.contexts_of_drafts
        for i in range(drafted):
            weights *= problem.draft_probabilities[contexts[:, i], token_ids[:, i]].double()
    return step, weights


def enumerated_input(
    problems: Sequence[ToyProblem], vocabulary: Tensor | None = None
) -> tuple[VerifyInput, list[DraftedStep], list[Tensor]]:
    """Every draft of every problem as one (ragged, mixed) float64 batch."""
    steps, weights = zip(*(every_draft(problem) for problem in problems), strict=True)
    requests = sum(len(step.counts) for step in steps)
    zeros = torch.zeros(requests, dtype=torch.int64)
    batch = verify_input(steps, torch.arange(requests), zeros, vocabulary=vocabulary)
    return batch, list(steps), list(weights)


def step_laws(
    verifier: AcceptanceRule, batch: VerifyInput, steps: Sequence[DraftedStep]
) -> list[Tensor]:
    """What one verification makes of every draft: `[R, K+1, V]` for each step's requests.

    Entry r, j, y: how likely draft r stands for exactly j tokens and y follows.

    Args:
        verifier: With `accepted_law` and `residual` that say what `verify` does.
        batch: Of all steps.
        steps: As they stand in the batch.
    """
    accepted = verifier.accepted_law(batch)
    next_law = torch.zeros(
        len(batch.num_draft), batch.max_num_draft + 1, batch.bonus_logits.shape[1]
    ).double()
    every_row = torch.arange(len(batch.draft_token_ids))
    greedy = batch.greedy[batch.request_of].unsqueeze(1)
    drawn = verifier.residual(batch, every_row)
    next_law[batch.request_of, batch.index_in_draft] = torch.where(
        greedy, _point_mass(batch.target_logits), drawn / drawn.sum(dim=1, keepdim=True)
    )
    next_law[torch.arange(len(batch.num_draft)), batch.num_draft] = torch.where(
        batch.greedy.unsqueeze(1),
        _point_mass(batch.bonus_logits),
        torch.softmax(batch.bonus_logits, dim=1),
    )
    emitted = accepted.unsqueeze(2) * next_law
    return list(emitted.split([len(step.counts) for step in steps]))


def output_laws(
    verifier: AcceptanceRule, problems: Sequence[ToyProblem], vocabulary: Tensor | None = None
) -> list[Tensor]:
    """Law of the first K+1 tokens of the text, for each problem.

    Args:
        verifier: With `accepted_law` and `residual` that say what `verify` does.
        problems: Verified together, as one batch.
        vocabulary: See `verify_input`.

    Returns:
        `[V^(K+1)]` for a problem whose proposer draws; `[V^K, V^(K+1)]`, one law per draft,
        for one whose proposer chooses.
    """
    batch, steps, weights = enumerated_input(problems, vocabulary)
    laws = []
    for step, weight, emitted in zip(
        steps, weights, step_laws(verifier, batch, steps), strict=True
    ):
        if step.problem.draft_probabilities is None:
            parts = [_law_of_text(_one(step, i), emitted[i : i + 1]) for i in range(len(weight))]
            laws.append(torch.stack(parts))
        else:
            laws.append(_law_of_text(step, emitted * weight.view(-1, 1, 1)))
    return laws


def enumeration_error(
    verifier: AcceptanceRule, problems: Sequence[ToyProblem], vocabulary: Tensor | None = None
) -> float:
    """Largest difference, over all texts, between the output's law and the target's."""
    errors = [
        (law - problem.laws_of_text(problem.num_draft + 1)).abs().max()
        for problem, law in zip(problems, output_laws(verifier, problems, vocabulary), strict=True)
    ]
    return float(torch.stack(errors).max())


def total_variation(
    verifier: AcceptanceRule, problem: ToyProblem, vocabulary: Tensor | None = None
) -> float:
    """Distance of the output's law to the target's, for a proposer that draws."""
    (law,) = output_laws(verifier, [problem], vocabulary)
    return float((law - problem.laws_of_text(problem.num_draft + 1)).abs().sum() / 2)


def first_token_prices(
    verifier: AcceptanceRule, problem: ToyProblem, vocabulary: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How far the law of a text's first token is from the target's, and what `verify` reports.

    The two are equal for every rule with the best residual: the extra acceptance at a draft's
    first token, averaged over drafts, is the distance. Later tokens are only looked at by
    chance; of those, given what came before them, the same holds.

    Args:
        verifier: Says what it draws from.
        problem: Drafts at least one token.
        vocabulary: See `verify_input`.

    Returns:
        Distance and reported price: `[1]` each for a proposer that draws; `[V^K]`, one per
        draft, for one that chooses.
    """
    batch, _, (weights,) = enumerated_input([problem], vocabulary)
    extra = verifier.verify(batch).extra_acceptance
    if extra is None:  # nothing could be relaxed
        extra = batch.target_logits.new_zeros(len(batch.draft_token_ids))
    price = extra[batch.first]
    (law,) = output_laws(verifier, [problem], vocabulary)
    law = law.view(-1, problem.vocab_size, problem.vocab_size**problem.num_draft).sum(dim=2)
    distance = (law - problem.laws_of_text(1)).abs().sum(dim=1) / 2
    if problem.draft_probabilities is not None:
        price = (weights * price).sum(dim=0, keepdim=True)
    return distance, price


def has_exact_law(verifier: Verifier) -> TypeGuard[AcceptanceRule]:
    """Whether the verifier says what it draws from: an acceptance rule, or one that overrides
    `verify` together with `accepted_law` (and `residual`)."""
    if not isinstance(verifier, AcceptanceRule):
        return False
    kind = type(verifier)
    own_verify = kind.verify not in (AcceptanceRule.verify, RelaxedRule.verify)
    return not own_verify or kind.accepted_law is not AcceptanceRule.accepted_law


def expected_accepted(verifier: AcceptanceRule, problem: ToyProblem) -> float:
    """Mean number of draft tokens accepted in one step, for a proposer that draws."""
    batch, _, (weights,) = enumerated_input([problem])
    law = verifier.accepted_law(batch)
    return float((weights.unsqueeze(1) * law * torch.arange(law.shape[1])).sum())


def _point_mass(logits: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(logits.argmax(dim=1), logits.shape[1]).double()


def _one(step: DraftedStep, i: int) -> DraftedStep:
    pick = slice(i, i + 1)
    return DraftedStep(step.problem, step.contexts[pick], step.token_ids[pick], step.counts[pick])


def _law_of_text(step: DraftedStep, emitted: Tensor) -> Tensor:
    """`[V^(K+1)]` from `emitted[r, j, y]`: how likely draft r stands for j tokens and y follows."""
    problem = step.problem
    size, drafted = problem.vocab_size, problem.num_draft
    tokens = torch.arange(size)
    contexts = torch.tensor([problem.start])
    law = torch.zeros(1, dtype=torch.float64)
    prefix = torch.zeros(len(step.counts), dtype=torch.int64)
    for j in range(drafted + 1):
        law = law.unsqueeze(1) * problem.target[contexts]
        law.index_add_(0, prefix, emitted[:, j])
        law = law.flatten()
        contexts = problem.after(contexts.unsqueeze(1), tokens).flatten()
        if j < drafted:
            # Nothing is accepted past a placeholder: `emitted` is 0 there.
            prefix = prefix * size + step.token_ids[:, j].clamp(min=0)
    return law
