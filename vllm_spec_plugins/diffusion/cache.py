"""What a diffusion drafter remembers of each request's text: a sliding window, preallocated.

A row is one request. It holds the tokens at positions `first` to `next - 1` of the request's
text, at most W of them (the context window): position p lies in slot p mod W, so that one more
token replaces the oldest. Positions are absolute; rotary embeddings only care for differences,
so a text may be longer than the model's positions. One slot more takes what nobody will read:
padding, and text that the window has left already.

All bookkeeping is on the device, and nothing here asks for it: how many tokens a text has may be
known there alone. What the host has to know are bounds, on which shapes depend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .folder import DrafterConfig


@dataclass(frozen=True, slots=True)
class NewText:
    """What is to be read of R texts. Tensors on the device, int64.

    Attributes:
        rows: `[R]` of the cache, each once.
        token_ids: `[R, T]`, padded at its end with any tokens.
        counts: `[R]` tokens of each, 0 to T.
        longest: On the host; at least the position after the last token that any of the rows
            holds already, 0 if none holds anything.
    """

    rows: Tensor
    token_ids: Tensor
    counts: Tensor
    longest: int


class PrefixCache:
    """Windows of verified text: keys and values, or token ids where nothing else can be kept.

    Attributes:
        window: W, tokens that a block sees at most.
        next: `[N]` int64, position of each row's next token.
        first: `[N]` int64, position of the earliest token held; equal to `next` when the row is
            empty.
        keys: `[L, N, W + 1, kv_heads, D]`, rotated; empty for the pattern "full".
        values: Likewise.
        token_ids: `[N, W + 1]` int64; only for the pattern "full".
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
        kept, slots = config.attention_pattern == "block", window + 1
        shape = (config.num_layers, num_rows, slots, config.num_key_value_heads, config.head_dim)
        self.window = window
        self._spans = torch.zeros((num_rows, 2), device=device, dtype=torch.int64)
        self.first, self.next = self._spans.unbind(dim=1)
        self.keys = torch.zeros(shape if kept else 0, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.token_ids = torch.zeros(
            0 if kept else (num_rows, slots), device=device, dtype=torch.int64
        )
        self.last = torch.zeros((num_rows, config.hidden_size), device=device, dtype=dtype)

    @staticmethod
    def num_bytes(config: DrafterConfig, num_rows: int, window: int, dtype: torch.dtype) -> int:
        """Memory that such a cache takes."""
        slots, of_last = window + 1, config.hidden_size * dtype.itemsize
        if config.attention_pattern == "full":
            return num_rows * (8 * slots + of_last + 16)
        keys = config.num_layers * slots * config.num_key_value_heads * config.head_dim
        return num_rows * (2 * keys * dtype.itemsize + of_last + 16)

    def begin(self, rows: Tensor, positions: Tensor, where: Tensor | None = None) -> None:
        """Empty some rows; their next token will be the one at these positions.

        A long text need not be read whole: beginning W tokens before its end fills the window.

        Args:
            rows: `[R]` int64, each once.
            positions: `[R]` int64.
            where: `[R]` bool, which of them; None: all.
        """
        if where is None:
            self.next[rows] = self.first[rows] = positions
            return
        self.next[rows] = torch.where(where, positions, self.next[rows])
        self.first[rows] = torch.where(where, positions, self.first[rows])

    def catch_up(self, rows: Tensor, ends: Tensor, fresh: Tensor) -> Tensor:
        """How many of a text's last tokens each row has to read.

        Of a text longer than the window only the window is read; what a row held before its gap
        is forgotten then.

        Args:
            rows: `[R]` int64, each once.
            ends: `[R]` int64 tokens of each row's text, no fewer than it has read.
            fresh: `[R]` bool, rows whose text is another one now.

        Returns:
            `[R]` int64, up to W.
        """
        anew = fresh | (ends - self.next[rows] > self.window)
        self.begin(rows, (ends - self.window).clamp(min=0), anew)
        return ends - self.next[rows]

    def span(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`first` and `next` of some rows, `[R, 1]` each."""
        first, following = self._spans[rows].split(1, dim=1)
        return first, following

    def append(self, rows: Tensor, first: Tensor, after: Tensor) -> None:
        """Move the ends of some rows on: tokens were written after them.

        Args:
            rows: `[R]` int64, each once.
            first: `[R, 1]`, as it was.
            after: `[R, 1]` what `next` is now.
        """
        first = torch.maximum(first, after - self.window)
        self._spans[rows] = torch.cat([first, after], dim=1)

    def slots_in_use(self, longest: int) -> int:
        """Slots that can hold anything, where texts are read up to that position; later: none."""
        return min(longest, self.window)

    def positions(self, first: Tensor, following: Tensor, slots: int) -> Tensor:
        """`[R, slots]` position of each slot's token, -1 where there is none; from a `span`."""
        last = following - 1
        held = last - (last - torch.arange(slots, device=last.device)) % self.window
        return torch.where(held >= first, held, -1)

    def places(self, positions: Tensor, after: Tensor) -> Tensor:
        """Slots that new tokens are written to.

        Args:
            positions: `[R, T]` int64, -1 for padding.
            after: `[R, 1]` int64 position after the last of them.

        Returns:
            `[R, T]` int64; the slot that nobody reads for what the window does not hold then.
        """
        stays = (positions >= 0) & (positions >= after - self.window)
        return torch.where(stays, positions % self.window, self.window)
