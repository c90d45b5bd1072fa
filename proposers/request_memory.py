"""Memory that comes and goes with requests: one block per slot, reachable by address."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GRAIN = 256


def roomy(num_tokens: int) -> int:
    """A capacity a quarter above need: a growing text is moved a few times in its life."""
    return -(-(num_tokens + num_tokens // 4) // _GRAIN) * _GRAIN


class RequestMemory:
    """Blocks for texts of growing length. A block is zeroed when handed out.

    Attributes:
        addresses: `[slots]` int64, where each slot's block starts; 0 without one.
        capacities: `[slots]` int64, tokens its block has room for.
    """

    def __init__(self, slots: int, bytes_needed: Callable[[int], int]) -> None:
        self.addresses: NDArray[np.int64] = np.zeros(slots, dtype=np.int64)
        self.capacities: NDArray[np.int64] = np.zeros(slots, dtype=np.int64)
        self._bytes_needed = bytes_needed
        self._blocks: dict[int, NDArray[np.uint8]] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks. Pages never written are counted, though they take no memory."""
        return sum(block.nbytes for block in self._blocks.values())

    def add_slots(self, slots: int) -> None:
        """Have at least this many slots."""
        more = max(0, slots - len(self.addresses))
        self.addresses = np.pad(self.addresses, (0, more))
        self.capacities = np.pad(self.capacities, (0, more))

    def give(self, slot: int, capacity: int) -> NDArray[np.uint8] | None:
        """A new block, with room for this many tokens. Returns the one it replaces.

        The caller keeps the old block until its content is moved.
        """
        old = self._blocks.get(slot)
        # calloc: large blocks are mapped, not written, so unused room costs nothing.
        block = np.zeros(self._bytes_needed(capacity), dtype=np.uint8)
        self._blocks[slot] = block
        self.addresses[slot], self.capacities[slot] = block.ctypes.data, capacity
        return old

    def block(self, slot: int) -> NDArray[np.uint8]:
        """The slot's block."""
        return self._blocks[slot]

    def take_back(self, slot: int) -> None:
        """Free the slot's block."""
        self._blocks.pop(slot, None)
        self.addresses[slot] = self.capacities[slot] = 0
