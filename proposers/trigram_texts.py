"""The trigram weights of many requests' texts, without the suffix index of `ngram_adaptive`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numba
import numpy as np

from . import trigram_weights as trigram
from .compiled import address_as_pointer, entry_point
from .request_memory import RequestMemory, roomy

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Columns of one request.
SLOT, ROW, NUM_TOKENS = range(3)


@entry_point
def read_texts(work, known, ends, history_address, history_stride, addresses, capacities):
    """Learn every trigram of each text that is not learned yet.

    Args:
        work: `[R, 3]` int64: slot, row in the engine's table, tokens.
        known: `[slots]` int64, tokens learned so far; updated.
        ends: `[slots]` int32, the last of them; updated.
        history_address: Address of the engine's token table, int32 rows.
        history_stride: Bytes from one row to the next.
        addresses: `[slots]` int64, see `RequestMemory`.
        capacities: `[slots]` int64, at least the tokens of the text.
    """
    for request in range(len(work)):
        slot, num_tokens = work[request, SLOT], work[request, NUM_TOKENS]
        weights = trigram.weights_at(addresses[slot], capacities[slot])
        tokens = numba.carray(
            address_as_pointer(history_address + work[request, ROW] * history_stride),
            (num_tokens,),
            np.int32,
        )
        first = known[slot]
        if first == 0 or first > num_tokens or tokens[first - 1] != ends[slot]:
            trigram.clear(weights)
            first = 0
        for position in range(max(first, 2), num_tokens):
            trigram.reinforce(weights, tokens[position - 2], tokens[position - 1], tokens[position])
        known[slot] = num_tokens
        if num_tokens > 0:
            ends[slot] = tokens[num_tokens - 1]


@entry_point
def move(address, capacity, to_address, to_capacity):
    """Copy the weights of one text into larger memory."""
    trigram.move(trigram.weights_at(address, capacity), trigram.weights_at(to_address, to_capacity))


class TrigramTexts:
    """Trigram weights by request, read on in every step; 48 bytes and up to 40 % more per token.

    Args:
        capacity: Requests to begin with.
    """

    def __init__(self, capacity: int) -> None:
        slots = max(capacity, 1)
        self.memory = RequestMemory(slots, trigram.bytes_needed)
        self._known: NDArray[np.int64] = np.zeros(slots, dtype=np.int64)
        self._ends: NDArray[np.int32] = np.zeros(slots, dtype=np.int32)
        self._slot_of: dict[str, int] = {}
        self._free = list(range(slots))[::-1]

    def read(
        self,
        request_ids: Sequence[str],
        history: NDArray[np.int32],
        rows: NDArray[np.int64],
        num_tokens: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Bring the weights of some requests up to date.

        Args:
            request_ids: `[R]`.
            history: `[rows, max_model_len]` int32, the engine's table.
            rows: `[R]` of each request in it.
            num_tokens: `[R]` of its text.

        Returns:
            `[R]` slot of each in `memory`.
        """
        slots = np.array([self._slot(name) for name in request_ids], dtype=np.int64)
        short = np.flatnonzero(self.memory.capacities[slots] < num_tokens)
        for slot, count in zip(slots[short].tolist(), num_tokens[short].tolist(), strict=True):
            self._grow(slot, count)
        if history.dtype != np.int32 or history.strides[1] != 4:
            history = np.ascontiguousarray(history, dtype=np.int32)
        read_texts(
            np.stack([slots, rows, num_tokens], axis=1).astype(np.int64),
            self._known,
            self._ends,
            history.ctypes.data,
            history.strides[0],
            self.memory.addresses,
            self.memory.capacities,
        )
        return slots

    def finish(self, request_ids: Sequence[str]) -> None:
        """Forget requests; unknown ones are ignored."""
        for request_id in request_ids:
            slot = self._slot_of.pop(request_id, None)
            if slot is not None:
                self._known[slot] = 0
                self.memory.take_back(slot)
                self._free.append(slot)

    def _slot(self, request_id: str) -> int:
        if request_id not in self._slot_of:
            if not self._free:
                old = len(self._known)
                self._known = np.pad(self._known, (0, old))
                self._ends = np.pad(self._ends, (0, old))
                self.memory.add_slots(2 * old)
                self._free = list(range(old, 2 * old))[::-1]
            self._slot_of[request_id] = self._free.pop()
        return self._slot_of[request_id]

    def _grow(self, slot: int, num_tokens: int) -> None:
        """Have room for `num_tokens` in this slot, keeping what is learned."""
        memory = self.memory
        before = int(memory.addresses[slot]), int(memory.capacities[slot])
        replaced = memory.give(slot, roomy(num_tokens))
        if self._known[slot] > 0:
            move(*before, int(memory.addresses[slot]), int(memory.capacities[slot]))
        memory.free(replaced)
