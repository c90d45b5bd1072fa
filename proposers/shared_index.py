"""Finished outputs of other requests, to draft from: suffix decoding's global tree.

Oliaro et al. 2411.04975. Texts are kept in segments, each one suffix index that belongs to one
cache salt: what one tenant wrote never shapes another's drafts, or their timing. Memory is
allocated up to a fixed number of tokens; when all segments are in use the oldest is emptied,
whoever owns it. How far its matches can be trusted is learnt by segment, from what came where
they predicted something.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from . import ngram_step, suffix_index
from .request_memory import RequestMemory

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_SEGMENTS = 8


class SharedIndex:
    """Bounded memory of finished texts, by cache salt.

    Args:
        max_tokens: Tokens kept in all, 92 bytes each; an eighth of them is evicted at a time.
        max_match: Longest context matched, in tokens.
    """

    def __init__(self, max_tokens: int, max_match: int) -> None:
        self.capacity = max_tokens // NUM_SEGMENTS
        self.memory = RequestMemory(NUM_SEGMENTS, suffix_index.bytes_needed)
        self._max_match = max_match
        self.states: NDArray[np.void] = np.zeros(NUM_SEGMENTS, dtype=ngram_step.REQUEST_STATE)
        self.states_address = self.states.ctypes.data
        self._salts: list[str | None] = [None] * NUM_SEGMENTS
        self._oldest_first: list[int] = list(range(NUM_SEGMENTS))

    def add(self, salt: str, tokens: NDArray[np.int32]) -> None:
        """Remember a finished text, `[n]` int32; of a very long one, its end."""
        tokens = tokens[-(self.capacity - 1) :]
        if len(tokens) == 0:
            return
        segment = self._newest(salt)
        fresh = segment is None or self._room(segment) <= len(tokens)
        if fresh:
            segment = self._oldest_first.pop(0)
            self._oldest_first.append(segment)
            self._salts[segment] = salt
            if self.memory.capacities[segment] == 0:
                self.memory.give(segment, self.capacity)
        ngram_step.add_document(
            self.states,
            segment,
            int(self.memory.addresses[segment]),
            self.capacity,
            fresh,
            np.array(tokens, dtype=np.int32),
            self._max_match,
        )

    def segments_of(self, salts: Sequence[str]) -> NDArray[np.int64]:
        """`[R, S]` segments of each salt, newest first, then -1."""
        found: dict[str, list[int]] = {salt: [] for salt in salts}
        for segment in reversed(self._oldest_first):
            salt = self._salts[segment]
            if salt is not None and salt in found:
                found[salt].append(segment)
        width = max(map(len, found.values()), default=0)
        padded = {salt: own + [-1] * (width - len(own)) for salt, own in found.items()}
        return np.array([padded[salt] for salt in salts], dtype=np.int64).reshape(len(salts), width)

    @property
    def num_tokens(self) -> int:
        """Tokens kept now, with one more for each text."""
        return int(self.states["num_tokens"].sum())

    def _newest(self, salt: str) -> int | None:
        return next((s for s in reversed(self._oldest_first) if self._salts[s] == salt), None)

    def _room(self, segment: int) -> int:
        return self.capacity - int(self.states["num_tokens"][segment])
