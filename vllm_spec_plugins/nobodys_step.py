"""A step to verify that belongs to no request, for warm-up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .draft_probabilities import DraftProbabilities
from .verifier import VerifyInput

if TYPE_CHECKING:
    from .context import EngineContext
    from .verifier import Verifier

NUM_REQUESTS, NUM_DRAFT = 2, 4


def verify_nobodys_steps(verifier: Verifier, tokens: tuple[int, int] | None = None) -> None:
    """On the CPU passes over rows are compiled (`compiled_rows`) when they are first used: here.

    Args:
        verifier: Verifies steps that its requests will not see.
        tokens: `[first, last + 1)` ids of the draft tokens; None: all.
    """
    context = verifier.context
    if context.device.type != "cpu":
        return
    for temperature in (1.0, 0.0):
        step = nobodys_step(context, temperature, tokens or (0, context.facts.vocab_size))
        verifier.verify(step)
        verifier.finish(step.request_ids)


def nobodys_step(
    context: EngineContext, temperature: float, tokens: tuple[int, int]
) -> VerifyInput:
    """Two requests with four draft tokens each: a mismatch, then the target's most likely, twice.

    The draft's laws are near the target's.

    Args:
        context: Of the verifier; the step has its device, vocabulary and hidden size.
        temperature: Of both requests; 0 = greedy.
        tokens: `[first, last + 1)` ids of the draft tokens.
    """
    facts, device = context.facts, context.device
    count, (first, end) = NUM_REQUESTS * NUM_DRAFT, tokens
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count + NUM_REQUESTS, facts.vocab_size, generator=generator)
    drafted = torch.randint(first, end, (count,), generator=generator)
    likely = torch.arange(1, count, 2)
    logits[likely, drafted[likely]] = logits.max() + 1
    noise = torch.randn(count, facts.vocab_size, generator=generator)
    law = torch.softmax(logits[:count] + 0.01 * noise, dim=-1)
    per_request = torch.zeros(NUM_REQUESTS, dtype=torch.int64, device=device)
    greedy = temperature == 0
    return VerifyInput(
        request_ids=[f"nobody's request {i}" for i in range(NUM_REQUESTS)],
        target_logits=logits[:count].to(device),
        bonus_logits=logits[count:].to(device),
        draft_token_ids=drafted.to(device),
        num_draft=per_request + NUM_DRAFT,
        draft_probabilities=DraftProbabilities(law.to(device)),
        temperatures=torch.full((NUM_REQUESTS,), temperature, device=device),
        streams=per_request,
        positions=per_request + 1,
        hidden_states=torch.zeros(count, facts.hidden_size, device=device),
        max_num_draft=NUM_DRAFT,
        all_greedy=greedy,
        any_greedy=greedy,
    )
