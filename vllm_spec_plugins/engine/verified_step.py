"""What one engine step decided, in the terms of no runner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vllm_spec_plugins.verifier import TokenHistory


@dataclass(frozen=True)
class VerifiedStep:
    """The S requests of a step, in row order, after its verification.

    Attributes:
        request_ids: `[S]`.
        emitted: `[S]` tokens each emitted; empty where a prompt is not read yet.
        num_draft: `[S]` draft tokens verified; empty where no request had any.
        history: Prompt and output of all S, what they emitted included.
        sample_hidden_states: `[N + S, H]` final hidden states at the tokens verified, the token
            before each draft included.
    """

    request_ids: Sequence[str]
    emitted: Sequence[Sequence[int]]
    num_draft: Sequence[int]
    history: TokenHistory
    sample_hidden_states: Tensor

    @cached_property
    def accepted(self) -> NDArray[np.int64]:
        """`[S]` draft tokens accepted."""
        return np.array([max(len(tokens) - 1, 0) for tokens in self.emitted], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class StepTokens:
    """The T tokens that a step computed, request by request; padding may follow.

    Attributes:
        num_scheduled: `[S]` int64 tokens of each request; sums to T.
        token_ids: `[T]` or more.
        positions: `[T]` or more.
    """

    num_scheduled: NDArray[np.int64]
    token_ids: Tensor
    positions: Tensor


@dataclass(frozen=True, slots=True)
class DraftRows:
    """The N draft tokens that are verified together, request by request.

    Attributes:
        request_ids: `[R]`.
        num_draft: `[R]` draft tokens scheduled; may be fewer than were drafted.
        slots: `[N]` int64 on the device, request slot of each.
        columns: `[N]` on the device, 0 for a request's first.
    """

    request_ids: Sequence[str]
    num_draft: Sequence[int]
    slots: Tensor
    columns: Tensor
