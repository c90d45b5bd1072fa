"""Which draft tokens lie between an opening and a closing token: inside a tool call, say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from .request_table import RequestTable
from .verifier import VerifyInput

_OPENS, _CLOSES = 1, 2


class TokenSpans:
    """Follows every request's text and knows whether it is inside a span now.

    A request's tokens are read once, on the host. What lies between the draft's own tokens is
    found on the device.

    Args:
        vocab_size: V.
        marks: For each kind of span the token id that opens it, then any that close it; where
            none does, it lasts to the end. Spans do not nest: any closing token closes.
    """

    def __init__(self, vocab_size: int, marks: Iterable[Sequence[int]]) -> None:
        #: `[V]`, on the host and, once seen, on the target's device.
        self._kind_of = np.zeros(vocab_size, dtype=np.int8)
        for opening, *closing in marks:
            self._kind_of[opening], self._kind_of[closing] = _OPENS, _CLOSES
        self._kind = torch.from_numpy(self._kind_of)
        self._any = bool(self._kind_of.any())
        #: Of each request: tokens read, whether a span is open after them.
        self._read = RequestTable((0.0, 0.0), capacity=16)

    def __bool__(self) -> bool:
        return self._any

    def inside(self, batch: VerifyInput) -> Tensor:
        """`[N]` bool, draft tokens inside a span; the token that opens one is not.

        A text that cannot be read, whose prompt came as embeddings, counts as inside.
        """
        ids, device = batch.draft_token_ids, batch.draft_token_ids.device
        if self._kind.device != device:
            self._kind = self._kind.to(device)
        kind = torch.where(ids >= 0, self._kind[ids.clamp(min=0)], 0)
        here = torch.arange(len(ids), device=device)
        # The last opening or closing token before each draft token, among all rows.
        last = torch.where(kind > 0, here, -1).cummax(0).values.roll(1)
        last[:1] = -1
        of_this_draft = last >= batch.first[batch.request_of]
        opened_here = kind[last.clamp(min=0)] == _OPENS
        before = self._open_before(batch)[batch.request_of]
        return torch.where(of_this_draft, opened_here, before)

    def finish(self, request_ids: Sequence[str]) -> None:
        """Forget requests that are gone."""
        self._read.forget(request_ids)

    def _open_before(self, batch: VerifyInput) -> Tensor:
        """`[R]` bool, whether a span is open where each draft begins."""
        history = batch.history
        if history is None:
            return torch.zeros_like(batch.num_draft, dtype=torch.bool)
        table = self._read.rows(batch.request_ids)
        for row, place, end in zip(
            table.tolist(), history.rows.tolist(), history.num_tokens.tolist(), strict=True
        ):
            start = int(self._read.values[row, 0])
            if end > start:
                kinds = self._kind_of[history.token_ids[place, start:end]]
                marks = np.flatnonzero(kinds)
                if len(marks):
                    self._read.values[row, 1] = kinds[marks[-1]] == _OPENS
                self._read.values[row, 0] = end
        is_open = (self._read.values[table, 1] > 0) | (history.num_tokens == 0)
        return torch.from_numpy(is_open).to(batch.num_draft.device)
