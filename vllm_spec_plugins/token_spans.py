"""Which draft tokens lie between an opening and a closing token: inside a tool call, say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .request_table import RequestTable
from .verifier import TokenHistory, VerifyInput

_OPENS, _CLOSES = 1, 2
#: More new tokens than any step gives a request that is past its prompt.
_LONG = 256


class TokenSpans:
    """Follows every request's text and knows whether it is inside a span now.

    A request's tokens are read once, on the host. What lies between the draft's own tokens is
    found on the device.

    Args:
        vocab_size: V.
        marks: For each kind of span the token id that opens it, then any that close it; where
            none does, it lasts to the end. Spans do not nest: any closing token closes.
        unreadable_is_inside: What a text counts as that cannot be read, its prompt having come
            as embeddings, as long as its draft says nothing else.
    """

    def __init__(
        self, vocab_size: int, marks: Iterable[Sequence[int]], *, unreadable_is_inside: bool
    ) -> None:
        #: `[V]`, on the host and, once seen, on the target's device.
        self._kind_of = np.zeros(vocab_size, dtype=np.int8)
        for opening, *closing in marks:
            self._kind_of[opening], self._kind_of[closing] = _OPENS, _CLOSES
        self._kind = torch.from_numpy(self._kind_of)
        self._any = bool(self._kind_of.any())
        self._unreadable_is_inside = unreadable_is_inside
        #: Of each request: tokens read, whether a span is open after them.
        self._read = RequestTable((0.0, 0.0), capacity=16)

    def __bool__(self) -> bool:
        return self._any

    def __len__(self) -> int:
        """Requests whose texts are being followed."""
        return len(self._read)

    def inside(self, batch: VerifyInput) -> Tensor:
        """`[N]` bool, draft tokens inside a span; the token that opens one is not."""
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
        is_open = self._read_on(batch.request_ids, history)
        if self._unreadable_is_inside:
            is_open |= history.num_tokens == 0
        return torch.from_numpy(is_open).to(batch.num_draft.device)

    def _read_on(self, request_ids: Sequence[str], history: TokenHistory) -> NDArray[np.bool_]:
        """`[R]` whether each request's text so far ends inside a span."""
        table, stop = self._read.rows(request_ids), history.num_tokens
        renewed = self._read.values[table, 0] > stop  # another text under the same name
        self._read.values[table[renewed]] = 0.0
        start = self._read.values[table, 0].astype(np.int64)
        # A prompt is read on its own: the others have a step's tokens each.
        is_long = stop - start > _LONG
        for group in (np.flatnonzero(~is_long), *np.flatnonzero(is_long)[:, None]):
            is_open = self._read.values[table[group], 1] > 0
            self._read.values[table[group], 1] = self._open_after(
                history.token_ids, history.rows[group], start[group], stop[group], is_open
            )
        self._read.values[table, 0] = stop
        return self._read.values[table, 1] > 0

    def _open_after(
        self,
        token_ids: NDArray[np.int32],
        rows: NDArray[np.int64],
        start: NDArray[np.int64],
        stop: NDArray[np.int64],
        is_open: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:
        """`[G]` whether a span is open in texts at `stop` in which one `is_open` at `start`."""
        width = int((stop - start).max(initial=0))
        if not width:
            return is_open
        columns = start[:, None] + np.arange(width)  # [G, width]
        unread = columns < stop[:, None]
        kinds = self._kind_of[token_ids[rows[:, None], np.where(unread, columns, 0)]]
        marks = unread & (kinds > 0)
        last = width - 1 - marks[:, ::-1].argmax(axis=1)
        opens = kinds[np.arange(len(rows)), last] == _OPENS
        return np.where(marks.any(axis=1), opens, is_open)
