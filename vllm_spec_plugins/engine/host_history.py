"""What requests have said, on the host, where the runner keeps it on the device only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_spec_plugins.verifier import TokenHistory


class HostHistory:
    """Prompt and verified output of every request slot of a runner.

    Memory is taken as texts grow: 4 bytes for each token of the longest text a slot has held.

    Args:
        num_slots: Most requests at once.
        max_num_tokens: Tokens of the longest text.

    Attributes:
        num_tokens: `[num_slots]` int64, prompt plus verified output; stale in free slots.
    """

    def __init__(self, num_slots: int, max_num_tokens: int) -> None:
        self._token_ids = np.zeros((num_slots, max_num_tokens), dtype=np.int32)
        self._num_prompt_tokens = np.zeros(num_slots, dtype=np.int64)
        self.num_tokens = np.zeros(num_slots, dtype=np.int64)

    def begin(self, slot: int, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """A request enters a slot.

        Args:
            slot: Its row.
            token_ids: Its prompt, and after a preemption what it had said already.
            num_prompt_tokens: How many of them are the prompt.
        """
        self._token_ids[slot, : len(token_ids)] = token_ids
        self.num_tokens[slot] = len(token_ids)
        self._num_prompt_tokens[slot] = num_prompt_tokens

    def append(self, slots: NDArray[np.int64], emitted: Sequence[Sequence[int]]) -> None:
        """What a step emitted, for each of some slots."""
        for slot, tokens in zip(slots.tolist(), emitted, strict=True):
            if tokens:
                begin = self.num_tokens[slot]
                self._token_ids[slot, begin : begin + len(tokens)] = tokens
                self.num_tokens[slot] += len(tokens)

    def of(self, slots: NDArray[np.int64]) -> TokenHistory:
        """The texts of some slots, a view."""
        return TokenHistory(
            self._token_ids, slots, self.num_tokens[slots], self._num_prompt_tokens[slots]
        )
