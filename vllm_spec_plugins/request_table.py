"""A few numbers per request, as columns numpy can work on for all requests at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class RequestTable:
    """Rows of float64 numbers, one per request; rows of forgotten requests are reused.

    Args:
        initial: Value of each column for a request not seen before.
        capacity: Rows to begin with; more are added when needed.
    """

    def __init__(self, initial: Sequence[float], capacity: int) -> None:
        self._initial = np.array(initial, dtype=np.float64)
        self._row_of: dict[str, int] = {}
        self._free = list(range(max(capacity, 1)))[::-1]
        #: `[rows, columns]`. Index it with what `rows` returns.
        self.values = np.tile(self._initial, (len(self._free), 1))

    def __len__(self) -> int:
        return len(self._row_of)

    def rows(self, request_ids: Sequence[str]) -> NDArray[np.int64]:
        """`[R]` row of each request; new requests get one with the initial values."""
        for request_id in request_ids:
            if request_id not in self._row_of:
                self._add(request_id)
        return np.array([self._row_of[i] for i in request_ids], dtype=np.int64)

    def known(self, request_ids: Sequence[str]) -> NDArray[np.bool_]:
        """`[R]` whether each request has a row."""
        return np.array([i in self._row_of for i in request_ids], dtype=np.bool_)

    def forget(self, request_ids: Sequence[str]) -> None:
        """Give the rows back. Unknown requests are ignored."""
        for request_id in request_ids:
            row = self._row_of.pop(request_id, None)
            if row is not None:
                self._free.append(row)

    def _add(self, request_id: str) -> None:
        if not self._free:
            size = len(self.values)
            self.values = np.concatenate([self.values, np.tile(self._initial, (size, 1))])
            self._free = list(range(size, 2 * size))[::-1]
        row = self._free.pop()
        self.values[row] = self._initial
        self._row_of[request_id] = row
