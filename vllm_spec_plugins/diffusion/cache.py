"""What a diffusion drafter remembers of each request's text: a sliding window, preallocated.

A row is one request. It holds the tokens at positions `first` to `next - 1` of the request's
text, at most W of them (the context window): position p lies in slot p mod W, so that one more
token replaces the oldest. Positions are absolute; rotary embeddings only care for differences,
so a text may be longer than the model's positions.

The bookkeeping is on the host, as the engine's is: no pass waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from .folder import DrafterConfig

#: Indices of rows, or one number for each of them.
Rows = NDArray[np.int64] | Sequence[int]


class PrefixCache:
    """Windows of verified text: keys and values, or token ids where nothing else can be kept.

    Attributes:
        window: W, tokens that a block sees at most.
        next: `[N]` position of each row's next token.
        first: `[N]` position of the earliest token held; equal to `next` when the row is empty.
        keys: `[L, N, W, kv_heads, D]`, rotated; empty for the pattern "full".
        values: Likewise.
        token_ids: `[N, W]` int64; only for the pattern "full".
        last: `[N, H]` normed hidden state of each row's last token; only where tokens predict
            the next one in the pattern "block".
    """

    def __init__(
        self,
        config: DrafterConfig,
        num_rows: int,
        window: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate everything.

        Args:
            config: Of the drafter.
            num_rows: N, requests at most.
            window: W, at least 1.
            device: Where the drafter computes.
            dtype: Of its weights.
        """
        kept = config.attention_pattern == "block"
        shape = (config.num_layers, num_rows, window, config.num_key_value_heads, config.head_dim)
        self.window = window
        self.next = np.zeros(num_rows, dtype=np.int64)
        self.first = np.zeros(num_rows, dtype=np.int64)
        self.keys = torch.zeros(shape if kept else 0, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.token_ids = torch.zeros(
            0 if kept else (num_rows, window), device=device, dtype=torch.int64
        )
        self.last = torch.zeros((num_rows, config.hidden_size), device=device, dtype=dtype)

    @staticmethod
    def num_bytes(config: DrafterConfig, num_rows: int, window: int, dtype: torch.dtype) -> int:
        """Memory that such a cache takes."""
        if config.attention_pattern == "full":
            return num_rows * (8 * window + config.hidden_size * dtype.itemsize)
        keys = config.num_layers * window * config.num_key_value_heads * config.head_dim
        return num_rows * (2 * keys + config.hidden_size) * dtype.itemsize

    def begin(self, rows: Rows, positions: Rows) -> None:
        """Empty some rows; their next token will be the one at these positions.

        A long text need not be read whole: beginning W tokens before its end fills the window.
        """
        self.next[rows] = positions
        self.first[rows] = positions

    def forget(self, rows: Rows) -> None:
        """Empty some rows: their requests ended, or were preempted."""
        self.begin(rows, np.zeros(len(rows), dtype=np.int64))

    def append(self, rows: Rows, counts: NDArray[np.int64]) -> None:
        """Move the ends of some rows on: so many tokens were written after them."""
        self.next[rows] += counts
        self.first[rows] = np.maximum(self.first[rows], self.next[rows] - self.window)

    def slots_in_use(self, rows: Rows) -> int:
        """Slots of a row that can hold anything, 0 to W; all later ones are empty."""
        first, last = self.first[rows], self.next[rows] - 1
        held = last >= first
        if not held.any():
            return 0
        wraps = held & (last // self.window > first // self.window)
        return self.window if wraps.any() else int((last[held] % self.window + 1).max())

    def positions(self, rows: Rows, slots: int) -> NDArray[np.int64]:
        """`[R, slots]` position of the token in each slot, -1 where there is none."""
        last = self.next[rows][:, None] - 1
        held = last - (last - np.arange(slots)) % self.window
        return np.where(held >= self.first[rows][:, None], held, -1)
