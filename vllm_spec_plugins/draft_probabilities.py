"""The law the draft tokens were drawn from, dense or over a subset of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .row_choice import replace_rows


@dataclass(frozen=True, slots=True)
class DraftProbabilities:
    """q, as the proposer sampled from it. Wrong q is the one unforgivable bug: it biases output.

    Attributes:
        values: `[..., M]`, each row sums to 1. `[R, K, M]` from a proposer,
            `[N, M]` when verifying.
        vocabulary: `[M]` int64, sorted target ids the columns stand for; or `[..., M]`, each
            row its own ids in any order, -1 for a column that stands for nothing (its value
            is 0). None when `M` is the whole vocabulary.
        sampled: `[...]` bool, True where the token was drawn from `values`.
            False rows are deterministic (one-hot at the draft token) and
            their values are ignored. None: all were drawn.
    """

    values: Tensor
    vocabulary: Tensor | None = None
    sampled: Tensor | None = None

    def of(self, token_ids: Tensor) -> Tensor:
        """q(x) of one token per row: 1 for deterministic rows, 0 outside the vocabulary.

        Args:
            token_ids: `[...]` int64, -1 allowed (its probability is 0).

        Returns:
            `[...]` of the dtype of `values`.
        """
        if self.vocabulary is None:
            column, inside = token_ids.clamp(min=0), token_ids >= 0
        elif self.vocabulary.ndim > 1:
            found = (self.vocabulary == token_ids.unsqueeze(-1)).to(torch.uint8)
            inside, column = found.max(dim=-1)
            inside = inside.bool() & (token_ids >= 0)
        else:
            column = torch.searchsorted(self.vocabulary, token_ids)
            column = column.clamp(max=self.vocabulary.numel() - 1)
            inside = self.vocabulary[column] == token_ids
        q = self.values.gather(-1, column.unsqueeze(-1)).squeeze(-1)
        q = torch.where(inside, q, torch.zeros_like(q))
        if self.sampled is not None:
            q = torch.where(self.sampled, q, torch.ones_like(q))
        return q

    def dense(self, rows: Tensor, token_ids: Tensor, vocab_size: int) -> Tensor:
        """Full-width laws of some rows.

        Args:
            rows: `[M']` int64, rows of a two-dimensional `values`.
            token_ids: `[M']` int64, draft tokens of those rows; -1 is a placeholder.
            vocab_size: V.

        Returns:
            `[M', V]`; deterministic rows are one-hot, ids outside the vocabulary have 0,
            rows of placeholders are all 0: nothing was drawn there.
        """
        q = self.values.index_select(0, rows)
        if self.vocabulary is not None and self.vocabulary.ndim > 1:
            own = DraftProbabilities(q, self.vocabulary.index_select(0, rows))
            q = own.over_vocabulary(vocab_size).values
        elif self.vocabulary is not None:
            q = q.new_zeros(len(rows), vocab_size).index_copy_(1, self.vocabulary, q)
        elif q.shape[1] < vocab_size:  # a draft head without the target's padding rows
            q = torch.nn.functional.pad(q, (0, vocab_size - q.shape[1]))
        if self.sampled is not None:
            one_hot = torch.zeros_like(q).scatter_(1, token_ids.clamp(min=0).unsqueeze(1), 1.0)
            q = torch.where(self.sampled[rows].unsqueeze(1), q, one_hot)
        return replace_rows(q, token_ids < 0, lambda _rows: 0.0)

    def over_vocabulary(self, vocab_size: int) -> DraftProbabilities:
        """The same laws `[N, M]` with the columns of the whole vocabulary, `[N, V]`.

        For laws of a vocabulary of each row's own.
        """
        assert self.vocabulary is not None
        whole = self.values.new_zeros(len(self.values), vocab_size)
        # Added, not written: unused columns, all of value 0, share the id 0.
        whole.scatter_add_(1, self.vocabulary.clamp(min=0), self.values)
        return DraftProbabilities(whole, None, self.sampled)

    def take(self, rows: Tensor) -> DraftProbabilities:
        """The same law for some rows of the first dimension."""
        vocabulary = self.vocabulary
        return DraftProbabilities(
            self.values[rows],
            vocabulary[rows] if vocabulary is not None and vocabulary.ndim > 1 else vocabulary,
            None if self.sampled is None else self.sampled[rows],
        )
