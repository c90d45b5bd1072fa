"""The drafts of one step of `jacobi`: tokens, the laws they came from, where they stand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_spec_plugins.draft_probabilities import DraftProbabilities

from .jacobi_coupling import Past


@dataclass(frozen=True, slots=True)
class Places:
    """n places in the drafts of R requests.

    Attributes:
        requests: `[n]` int64 on the host.
        columns: `[n]` int64 on the host, 0 for a draft's first token.
    """

    requests: NDArray[np.int64]
    columns: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.requests)

    @classmethod
    def between(cls, start: NDArray[np.int64], stop: NDArray[np.int64]) -> Places:
        """Columns `start[i]` to `stop[i] - 1` of every request i, `[R]` each."""
        counts = np.maximum(stop - start, 0)
        before = counts.cumsum() - counts
        return cls(
            np.repeat(np.arange(len(counts)), counts),
            np.arange(counts.sum()) - np.repeat(before - start, counts),
        )

    def index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where they are in `[R, K]`."""
        requests, columns = torch.from_numpy(self.requests), torch.from_numpy(self.columns)
        return requests.to(device), columns.to(device)


@dataclass(frozen=True, slots=True)
class Drafts:
    """Drafts of R requests.

    Attributes:
        token_ids: `[R, K]` int64, -1 = none.
        law: `[R, K, M]`, what each token was drawn from; None when all requests are greedy.
        first: `[R]` int64 on the host, sequence position of column 0.
        counts: `[R]` int64 on the host, tokens of each.
    """

    token_ids: Tensor
    law: DraftProbabilities | None
    first: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def empty(
        cls,
        first: NDArray[np.int64],
        counts: NDArray[np.int64],
        device: torch.device,
        like: DraftProbabilities | None,
    ) -> Drafts:
        """Room for drafts.

        Args:
            first: `[R]`.
            counts: `[R]`.
            device: Where the tokens go.
            like: A law of the `[M]` columns kept, compact or not; None: no law is kept.
        """
        shape = (len(counts), int(counts.max()))
        token_ids = torch.full(shape, -1, device=device)
        if like is None:
            return cls(token_ids, None, first, counts)
        values, vocabulary = like.values, like.vocabulary
        law = DraftProbabilities(
            values.new_zeros(*shape, values.shape[-1]),
            None if vocabulary is None else vocabulary.new_full((*shape, values.shape[-1]), -1),
            torch.zeros(shape, dtype=torch.bool, device=device),
        )
        return cls(token_ids, law, first, counts)

    def put(
        self, places: Places, token_ids: Tensor, law: DraftProbabilities | None, sampled: Tensor
    ) -> None:
        """Tokens of n places.

        Args:
            places: Of n.
            token_ids: `[n]` int64.
            law: `[n, M]` or `[M]`.
            sampled: `[n]` bool, which were drawn from it; the others are choices.
        """
        index = places.index(self.token_ids.device)
        self.token_ids[index] = token_ids
        if self.law is None or law is None:
            return
        self.law.values[index] = law.values
        if self.law.vocabulary is not None:
            assert law.vocabulary is not None
            self.law.vocabulary[index] = law.vocabulary
        assert self.law.sampled is not None
        self.law.sampled[index] = sampled

    def at(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> Past | None:
        """What stands in n places, given by row (-1 = none) and sequence position."""
        columns = positions - self.first[rows]
        known = (rows >= 0) & (columns >= 0) & (columns < self.counts[rows])
        if self.law is None or not known.any():
            return None
        device = self.token_ids.device
        index = Places(np.where(known, rows, 0), np.where(known, columns, 0)).index(device)
        vocabulary, sampled = self.law.vocabulary, self.law.sampled
        assert sampled is not None
        return Past(
            torch.from_numpy(known).to(device),
            self.token_ids[index],
            DraftProbabilities(
                self.law.values[index],
                None if vocabulary is None else vocabulary[index],
                sampled[index],
            ),
        )
