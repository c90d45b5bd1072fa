"""Drafting without the host: the contract of proposers that never leave the device.

The engine plans its next step before the last one is verified (asynchronous scheduling) only
where nothing between verification and drafting waits for the device. A proposer that says
`Proposer.drafts_on_device` is therefore asked with tensors there, and answers with tensors: how
many tokens a request has is known to the device alone. What the host knows without asking, as
bounds, comes along in numpy. Of what else a proposer may need (`Needs`) there is what
`NEEDS_ON_DEVICE` names; a proposer that asks for more is refused.

Where scheduling is synchronous a proposer is asked by `Proposer.propose`; one that has none
(`Proposer.drafts_on_host`) is asked with tensors there too: texts are copied to the device first,
and it may need the token history alone.

Shapes: R requests asked for, K the most tokens drafted for any of them, S the engine's request
slots, L the most tokens of a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .proposer import Needs

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from .draft_probabilities import DraftProbabilities
    from .target_rows import DeviceTargetRows

#: What a proposer may need and draft on the device.
NEEDS_ON_DEVICE = Needs.TARGET_LAYERS | Needs.LAYER_STATES | Needs.TARGET_LOGITS


@dataclass(frozen=True, slots=True)
class DeviceStepStates:
    """What one engine step computed, where the host does not know yet what of it stands.

    The T tokens of the step lie end to end, request by request; rejected draft tokens are
    among them, and what is kept of those is overwritten when their positions come again.

    Attributes:
        rows: `[R]` int64 on the host, for `TargetModel.sequences`.
        most_tokens: `[R]` int64 on the host, as `DeviceDraftInput.most_tokens`.
        num_scheduled: `[R]` int64 on the host, tokens of each; sums to T.
        token_ids: `[T]` int64 on the device.
        positions: `[T]` int64 on the device.
        layer_states: By number of layers run, `[T, H]` hidden states after that many layers,
            before any norm. `num_layers` itself: what the final norm reads.
    """

    rows: NDArray[np.int64]
    most_tokens: NDArray[np.int64]
    num_scheduled: NDArray[np.int64]
    token_ids: Tensor
    positions: Tensor
    layer_states: Mapping[int, Tensor]


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
        rows: `[R]` int64 on the host, for `TargetModel.sequences`.
        is_fresh: `fresh`, on the host. A request that is not fresh has up to K + 1 tokens more than
            when it was asked for last.
        most_tokens: `[R]` int64 on the host, not less than `num_tokens`.
        temperatures_on_host: `temperatures`, on the host.
        target_rows: With `Needs.TARGET_LOGITS`: as `DraftInput.target_rows`.
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
    rows: NDArray[np.int64]
    is_fresh: NDArray[np.bool_]
    most_tokens: NDArray[np.int64]
    temperatures_on_host: NDArray[np.float32]
    target_rows: DeviceTargetRows | None = None


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
