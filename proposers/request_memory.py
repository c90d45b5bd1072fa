"""Memory that comes and goes with requests: one block per slot, reachable by address.

Blocks are cut from large chunks, for which numpy asks Linux for huge pages: the tables are read
at random, and with ordinary pages half of the time of a step goes into finding the pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GRAIN = 256
_CHUNK_BYTES = 32 << 20


def roomy(num_tokens: int) -> int:
    """A capacity up to a third above need: a growing text is moved a few times in its life.

    Multiples of an eighth of a power of two, so that freed blocks fit again.
    """
    wanted = num_tokens + num_tokens // 8
    step = max(_GRAIN, 1 << max(wanted.bit_length() - 3, 0))
    return -(-wanted // step) * step


class RequestMemory:
    """Blocks for texts of growing length, with whatever was in them before.

    Attributes:
        addresses: `[slots]` int64, where each slot's block starts; 0 without one.
        capacities: `[slots]` int64, tokens its block has room for.
    """

    def __init__(self, slots: int, bytes_needed: Callable[[int], int]) -> None:
        self.addresses: NDArray[np.int64] = np.zeros(slots, dtype=np.int64)
        self.capacities: NDArray[np.int64] = np.zeros(slots, dtype=np.int64)
        self._bytes_needed = bytes_needed
        self._blocks: dict[int, NDArray[np.uint8]] = {}
        self._freed: dict[int, list[NDArray[np.uint8]]] = {}
        self._rest: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)

    @property
    def num_bytes(self) -> int:
        """Bytes of the blocks in use. Freed ones are kept for reuse until none is in use."""
        return sum(block.nbytes for block in self._blocks.values())

    def add_slots(self, slots: int) -> None:
        """Have at least this many slots."""
        more = max(0, slots - len(self.addresses))
        self.addresses = np.pad(self.addresses, (0, more))
        self.capacities = np.pad(self.capacities, (0, more))

    def give(self, slot: int, capacity: int) -> NDArray[np.uint8] | None:
        """A block with room for this many tokens.

        Returns:
            The block it replaces, to be given to `free` once its content is moved.
        """
        old = self._blocks.get(slot)
        block = self._cut(-(-self._bytes_needed(capacity) // 64) * 64)
        self._blocks[slot] = block
        self.addresses[slot], self.capacities[slot] = block.ctypes.data, capacity
        return old

    def block(self, slot: int) -> NDArray[np.uint8]:
        """The slot's block."""
        return self._blocks[slot]

    def free(self, block: NDArray[np.uint8] | None) -> None:
        """Keep a block for whoever needs one of its size; give everything back if none is left."""
        if not self._blocks:
            self._freed.clear()
            self._rest = np.empty(0, dtype=np.uint8)
        elif block is not None:
            self._freed.setdefault(len(block), []).append(block)

    def take_back(self, slot: int) -> None:
        """Free the slot's block."""
        block = self._blocks.pop(slot, None)
        self.addresses[slot] = self.capacities[slot] = 0
        self.free(block)

    def _cut(self, size: int) -> NDArray[np.uint8]:
        if freed := self._freed.get(size):
            return freed.pop()
        if len(self._rest) < size:
            # Mapped, not written: the rest of a chunk takes no memory.
            chunk = np.empty(max(_CHUNK_BYTES, size + 64), dtype=np.uint8)
            self._rest = chunk[-chunk.ctypes.data % 64 :]
        block, self._rest = self._rest[:size], self._rest[size:]
        return block
