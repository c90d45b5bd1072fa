"""Drafting without the host: the contract of proposers that never leave the device.

The engine plans its next step before the last one is verified (asynchronous scheduling) only
where nothing between verification and drafting waits for the device. A proposer that says
`Proposer.drafts_on_device` is therefore asked with tensors, and answers with tensors: how many
tokens a request has is known to the device alone. Model runners that keep texts on the host
copy them over before they ask; the proposer sees no difference. What else a proposer may need
(`Needs`) is not to be had here, and a proposer that asks for both is refused.

Shapes: R requests asked for, K the most tokens drafted for any of them, S the engine's request
slots, L the most tokens of a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from .draft_probabilities import DraftProbabilities


@dataclass(frozen=True, slots=True)
class DeviceDraftInput:
    """One drafting step of the engine, for all that may draft in it; everything on one device.

    Requests whose prompt is not read yet may be among the R, and need not be.

    Attributes:
        token_ids: `[S, L]` int32, a row for each slot: prompt and verified output. What lies
            beyond `num_tokens` is stale.
        slots: `[R]` int64, row of each request in `token_ids`. A slot is a request's for life;
            `fresh` says when it has changed hands.
        fresh: `[R]` bool, whether the slot's request is asked for the first time since it has
            entered it, which it also does after a preemption: what is kept by slot must be
            forgotten there.
        num_tokens: `[R]` int64, prompt plus verified output tokens.
        num_prompt_tokens: `[R]` int64.
        max_draft: `[R]` int64, most tokens to draft; 0 = none: the request's prompt is not read
            yet, it asked for none, or there is no room.
        temperatures: `[R]` float32, 0 = greedy.
        streams: `[R]` int64, random stream of each request (`random_numbers`, `Purpose.DRAFT`).
        num_speculative_tokens: K.
    """

    token_ids: Tensor
    slots: Tensor
    fresh: Tensor
    num_tokens: Tensor
    num_prompt_tokens: Tensor
    max_draft: Tensor
    temperatures: Tensor
    streams: Tensor
    num_speculative_tokens: int


@dataclass(frozen=True, slots=True)
class DeviceDraft:
    """What a proposer on the device returns.

    Attributes:
        token_ids: `[R, K]` integers on the device; a row's tokens come first, then -1. At most
            `max_draft` tokens a row; what comes after the first that is no token of the target's
            does not count. Under asynchronous scheduling every request is verified with K tokens:
            a -1 costs the same as a draft token, and is never accepted.
        probabilities: The law each token was drawn from, `values` `[R, K, M]`; None = the draft
            was a choice, not a draw.
    """

    token_ids: Tensor
    probabilities: DraftProbabilities | None = None
