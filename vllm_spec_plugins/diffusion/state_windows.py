"""What a conditioned drafter keeps of the target's states: the last ones of each request.

A row is one request, as in `PrefixCache`; what the token at position p says to the next one
(`Conditioning.project`) lies in slot p mod W. Tokens come in whether or not the request drafts.
Rejected draft tokens are left out, so what a row holds of a position never changes while its text
stands, and keys and values made with it stay right.

Which position a slot holds stands beside it, on the device: nothing here waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .conditioning import Conditioning

#: Indices of rows, or one number for each of them.
Rows = NDArray[np.int64] | Sequence[int]


class StateWindows:
    """Windows of projected states, preallocated.

    Attributes:
        window: W, tokens that a row can be asked for at most.
        kept: `[N, W, H]` projected states.
        held: `[N, W]` int64 position of each, -1 where there is none.
    """

    def __init__(self, conditioning: Conditioning, num_rows: int, window: int) -> None:
        """Allocate everything, beside the weights.

        Args:
            conditioning: What projects.
            num_rows: N, requests at most.
            window: W, at least 1.
        """
        self.window = window
        self._conditioning = conditioning
        like = conditioning.unknown.detach()
        self.kept = like.new_zeros(num_rows, window, len(like))
        self.held = torch.full((num_rows, window), -1, device=like.device)

    @torch.no_grad()
    def forget(self, rows: Rows) -> None:
        """Empty some rows: their requests ended, or were preempted."""
        self.held[self._index(np.asarray(rows, dtype=np.int64))] = -1

    @torch.no_grad()
    def write(
        self,
        rows: Rows,
        counts: NDArray[np.int64],
        offsets: NDArray[np.int64],
        positions: Tensor,
        layer_states: Sequence[Tensor],
    ) -> None:
        """Take in states of a step.

        Args:
            rows: `[R]`, each once.
            counts: `[R]` tokens of each that stand.
            offsets: `[R]` where they begin among the T tokens of the step.
            positions: `[T]` int64 on the device.
            layer_states: `[T, G]` after each of the layers.
        """
        # Of a long prompt, what the window holds.
        lengths = np.minimum(counts, self.window)
        ends = offsets + counts
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths), lengths)
        numbers = np.stack([np.repeat(ends, lengths) + within, np.repeat(rows, lengths)])
        source, row = self._index(numbers)
        position = positions[source]
        states = [state[source] for state in layer_states]
        self.kept[row, position % self.window] = self._conditioning.project(states)
        self.held[row, position % self.window] = position

    @torch.no_grad()
    def read(self, rows: Rows, begins: NDArray[np.int64], length: int) -> Tensor:
        """What is added to the embeddings of some tokens: what the one before each says.

        Args:
            rows: `[R]`.
            begins: `[R]` position of each row's first token.
            length: T, tokens of each.

        Returns:
            `[R, T, H]`; the learned vector where nothing is known.
        """
        before = begins[:, None] + np.arange(-1, length - 1)
        row, position = self._index(
            np.stack(np.broadcast_arrays(np.asarray(rows)[:, None], before))
        )
        slot = position % self.window
        # There is nothing before the first token, and -1 is what an empty slot holds.
        known = (self.held[row, slot] == position) & (position >= 0)
        return self._conditioning.where_known(self.kept[row, slot], known)

    def _index(self, numbers: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(numbers).to(self.kept.device)
