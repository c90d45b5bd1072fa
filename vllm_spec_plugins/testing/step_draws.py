"""Whether `verify` draws what a verifier says of itself (`accepted_law`, `residual`).

Many drafts of one problem are verified, once each. How often each draft stood for how many
tokens, and what followed, is compared with the law that enumeration gives: a relaxed verifier
has no other law to be held to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_spec_plugins.acceptance_rule import AcceptanceRule

from .chi_square import GoodnessOfFit, compare
from .enumeration import every_draft, step_laws
from .toy_problems import DraftedStep, ToyProblem, verify_input

#: Drafts verified side by side: bounds memory.
_AT_ONCE = 50_000


def fit_of_step(
    what: str,
    verifier: AcceptanceRule,
    problem: ToyProblem,
    *,
    samples: int = 100_000,
    vocabulary: Tensor | None = None,
    seed: int = 0,
) -> GoodnessOfFit:
    """Draft, tokens accepted and token after them, drawn by `verify`, against their joint law.

    Args:
        what: For messages.
        verifier: Says what it draws from; one that remembers requests meets each but once.
        problem: Its drafts are drawn; of a proposer that chooses, each is taken as often.
        samples: Drafts verified.
        vocabulary: See `verify_input`.
        seed: Of drafts and streams.
    """
    every, weights = every_draft(problem)
    count = len(weights)
    zeros = torch.zeros(count, dtype=torch.int64)
    (law,) = step_laws(
        verifier, verify_input([every], torch.arange(count), zeros, vocabulary=vocabulary), [every]
    )
    weights = weights / weights.sum()
    generator = torch.Generator().manual_seed(seed)
    drafts = torch.multinomial(weights, samples, replacement=True, generator=generator)
    outcomes = torch.zeros(law.numel(), dtype=torch.int64)
    for first in range(0, samples, _AT_ONCE):
        chosen = drafts[first : first + _AT_ONCE]
        step = DraftedStep(
            problem, every.contexts[chosen], every.token_ids[chosen], every.counts[chosen]
        )
        streams = torch.arange(first, first + len(chosen)) + (seed << 32)
        batch = verify_input(
            [step], streams, torch.zeros_like(chosen), dtype=torch.float32, vocabulary=vocabulary
        )
        verification = verifier.verify(batch)
        verifier.finish(batch.request_ids)  # the next ones bear the same names
        accepted = verification.accepted
        token = verification.token_ids.gather(1, accepted.unsqueeze(1)).squeeze(1)
        index = (chosen * law.shape[1] + accepted) * law.shape[2] + token
        outcomes += torch.bincount(index, minlength=law.numel())
    return compare(what, outcomes, (weights.view(-1, 1, 1) * law).flatten())
