"""What the last verification computed past the token it ended with.

A verification reads the target's law at every draft token and one further. Past a rejection
those laws are of a text that will not be: they follow the rejected token. As guesses of what the
target says there they cost nothing, and a draft may come from any law.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TargetRows:
    """Views of the step's logits, after every sampling constraint; rows of greedy requests have
    temperature 1.

    Row j of request i is the target's law at sequence position `num_tokens[i] + j`, given the
    draft tokens that stood before it.

    Attributes:
        draft_logits: `[N, V]` float32 on the device, a row for each draft token verified.
        bonus_logits: `[S, V]` the same after the last draft token of each request.
        first: `[R]` int64 on the host, row of `draft_logits` that is row 0 of each request.
        bonus: `[R]` int64 on the host, row of `bonus_logits` that is each request's last.
        counts: `[R]` int64 on the host, rows of each request; 0 = nothing is known of it. A
            draft of k tokens, a of them accepted, leaves k - a.
    """

    draft_logits: Tensor
    bonus_logits: Tensor
    first: NDArray[np.int64]
    bonus: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def after(
        cls,
        draft_logits: Tensor,
        bonus_logits: Tensor,
        num_draft: NDArray[np.int64],
        accepted: NDArray[np.int64],
        requests: NDArray[np.int64],
    ) -> TargetRows:
        """From a whole verification.

        Args:
            draft_logits: `[N, V]`.
            bonus_logits: `[S, V]`.
            num_draft: `[S]` draft tokens verified; sums to N.
            accepted: `[S]`.
            requests: `[R]` which of the S are asked for.
        """
        ends = num_draft.cumsum()
        first = ends - num_draft + accepted + 1
        return cls(
            draft_logits,
            bonus_logits,
            first[requests],
            requests,
            (num_draft - accepted)[requests],
        )

    def take(self, requests: NDArray[np.int64], rows: NDArray[np.int64]) -> Tensor:
        """`[n, V]` a copy of row `rows[m]` of request `requests[m]`, for n of them."""
        device = self.draft_logits.device
        result = self.draft_logits.new_empty(len(requests), self.draft_logits.shape[1])
        is_bonus = rows == self.counts[requests] - 1
        inside = np.flatnonzero(~is_bonus)
        last = np.flatnonzero(is_bonus)
        for places, source, index in (
            (inside, self.draft_logits, self.first[requests[inside]] + rows[inside]),
            (last, self.bonus_logits, self.bonus[requests[last]]),
        ):
            if len(places):
                taken = source.index_select(0, torch.from_numpy(index).to(device))
                result.index_copy_(0, torch.from_numpy(places).to(device), taken)
        return result


@dataclass(frozen=True, slots=True)
class DeviceTargetRows:
    """The same where the host does not know yet how many draft tokens were accepted.

    A step verifies as many tokens of each request as were scheduled, and only the first of them
    may have been drafted. The rows that follow the others are nobody's.

    Attributes:
        draft_logits: `[N, V]` float32, a row for each token verified.
        bonus_logits: `[R, V]` the same after the last token of each request.
        first: `[R]` int64, row of `draft_logits` that is row 0 of each request.
        ends: `[R]` int64, row behind each request's last; that one is in `bonus_logits`.
        counts: `[R]` int64, rows of each request; 0 = nothing is known of it.
    """

    draft_logits: Tensor
    bonus_logits: Tensor
    first: Tensor
    ends: Tensor
    counts: Tensor

    @classmethod
    def after(
        cls,
        draft_logits: Tensor,
        bonus_logits: Tensor,
        num_verified: Tensor,
        num_draft: Tensor,
        accepted: Tensor,
    ) -> DeviceTargetRows:
        """From a whole verification.

        Args:
            draft_logits: `[N, V]`.
            bonus_logits: `[R, V]`.
            num_verified: `[R]` int64 tokens verified; sums to N.
            num_draft: `[R]` int64, how many of them were drafted.
            accepted: `[R]` int64.
        """
        ends = num_verified.cumsum(0)
        first = ends - num_verified + accepted + 1
        return cls(draft_logits, bonus_logits, first, ends, num_draft - accepted)

    def take(self, width: int) -> Tensor:
        """`[R, width, V]` a copy of rows 0 to `width - 1`; anything where a request has none."""
        row = self.first.unsqueeze(1) + torch.arange(width, device=self.first.device)
        inside = row.clamp(max=len(self.draft_logits) - 1)
        taken = self.draft_logits.index_select(0, inside.flatten()).unflatten(0, row.shape)
        is_bonus = (row >= self.ends.unsqueeze(1)).unsqueeze(2)
        return torch.where(is_bonus, self.bonus_logits.unsqueeze(1), taken)
