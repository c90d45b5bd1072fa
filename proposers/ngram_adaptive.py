"""`ngram_adaptive`: drafts what followed the longest matching context in the request's own text.

Prompt lookup (Saxena 2023; vLLM's `ngram`) with the vote and the counts of SuffixDecoding
(Oliaro et al. 2411.04975), scored by online trigram weights (ADED, Liu et al. 2407.12021) and
cut where the path is no longer expected to be accepted.

Each token is indexed once (`suffix_index`), so a step costs the same at any length of history.
Nothing is drafted where nothing matches. The draft is a choice, not a draw: exact under every
verifier. Memory: 208 bytes for each token of a request's text, rounded up to a power of two
tokens; freed when the request finishes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from vllm_spec_plugins.errors import ConfigError
from vllm_spec_plugins.proposer import Draft, DraftInput, Proposer, ProposerOptions

from .request_memory import RequestMemory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vllm_spec_plugins.context import EngineContext, ModelFacts


class NgramAdaptiveOptions(ProposerOptions):
    max_match: int = Field(32, ge=4, le=120, description="Longest context compared, in tokens.")
    min_match: int = Field(1, ge=1, le=32, description="Shortest context to draft from, in tokens.")
    min_acceptance: float = Field(
        0.4,
        ge=0.0,
        lt=1.0,
        description="Draft a token only while it is expected to be accepted, with all before "
        "it, at least this often.",
    )
    adaptation: bool = Field(
        True,
        description="Learn from each request's text how far its matches can be trusted.",
    )


class NgramAdaptive(Proposer):
    """Drafts from an incremental suffix index of each request's own text."""

    Options = NgramAdaptiveOptions
    options: NgramAdaptiveOptions

    #: Step of the gradient when `adaptation` is on.
    LEARNING_RATE = 0.02

    def __init__(self, options: NgramAdaptiveOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        # Here, not above: numba and the kernels take a second to import.
        from . import ngram_step, suffix_index, trigram_weights

        self._kernels = ngram_step
        slots = context.max_num_requests
        self._indexes = RequestMemory(slots, suffix_index.bytes_needed)
        self._trigrams = RequestMemory(slots, trigram_weights.bytes_needed)
        self._states = np.zeros(slots, dtype=ngram_step.REQUEST_STATE)
        self._slot_of: dict[str, int] = {}
        self._free = list(range(slots - 1, -1, -1))

    @classmethod
    def check(cls, options: ProposerOptions, facts: ModelFacts) -> None:
        assert isinstance(options, NgramAdaptiveOptions)
        if options.min_match > options.max_match:
            raise ConfigError(
                f"ngram_adaptive: min_match ({options.min_match}) is larger than max_match "
                f"({options.max_match}); give a smaller min_match"
            )

    def warm_up(self) -> None:
        # A history just longer than the smallest block also grows one.
        history = np.arange(600, dtype=np.int32).reshape(1, -1) % 7
        for num_tokens in (100, 600):
            self.propose(_one_request("warm up", history, num_tokens))
        self.finish(["warm up"])

    def propose(self, batch: DraftInput) -> Draft:
        requests = len(batch.request_ids)
        most = int(batch.max_draft.max(initial=0))
        token_ids = np.full((requests, most), -1, dtype=np.int32)
        if most > 0:
            history = batch.token_history
            if history.dtype != np.int32 or history.strides[1] != 4:
                history = np.ascontiguousarray(history, dtype=np.int32)
            self._kernels.step(
                self._work(batch),
                history.ctypes.data,
                history.strides[0],
                self._states,
                self._indexes.addresses,
                self._indexes.capacities,
                self._trigrams.addresses,
                self._trigrams.capacities,
                self.options.max_match,
                self.options.min_match,
                self.options.min_acceptance,
                self.LEARNING_RATE if self.options.adaptation else 0.0,
                token_ids,
            )
        return Draft(token_ids)

    def finish(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            slot = self._slot_of.pop(request_id, None)
            if slot is not None:
                self._states["num_tokens"][slot] = 0
                self._indexes.take_back(slot)
                self._trigrams.take_back(slot)
                self._free.append(slot)

    @property
    def num_bytes(self) -> int:
        """Bytes held for requests that have not finished."""
        return self._indexes.num_bytes + self._trigrams.num_bytes

    def _work(self, batch: DraftInput) -> NDArray[np.void]:
        """One row for each request, with memory for its whole text."""
        requests = len(batch.request_ids)
        work = np.zeros(requests, dtype=self._kernels.WORK)
        slot_of = self._slot_of
        try:
            work["slot"] = [slot_of[request_id] for request_id in batch.request_ids]
        except KeyError:
            work["slot"] = [self._slot(request_id) for request_id in batch.request_ids]
        work["row"], work["num_tokens"] = batch.rows, batch.num_tokens
        work["max_draft"] = batch.max_draft
        short = work["num_tokens"] > self._indexes.capacities[work["slot"]]
        if short.any():
            for slot, num_tokens in zip(
                work["slot"][short].tolist(), work["num_tokens"][short].tolist(), strict=True
            ):
                self._grow(slot, num_tokens)
        return work

    def _slot(self, request_id: str) -> int:
        if request_id not in self._slot_of:
            if not self._free:
                old = len(self._states)
                new = 2 * old
                self._states = np.pad(self._states, (0, new - old))
                self._indexes.add_slots(new)
                self._trigrams.add_slots(new)
                self._free.extend(range(new - 1, old - 1, -1))
            self._slot_of[request_id] = self._free.pop()
        return self._slot_of[request_id]

    def _grow(self, slot: int, num_tokens: int) -> None:
        """Have room for `num_tokens` in this slot, keeping what is indexed."""
        places = []
        kept = []
        for memory in (self._indexes, self._trigrams):
            before = (int(memory.addresses[slot]), int(memory.capacities[slot]))
            kept.append(memory.give(slot, num_tokens))  # alive until its content is moved
            after = (int(memory.addresses[slot]), int(memory.capacities[slot]))
            places += [np.array(before), np.array(after)]
        if self._states["num_tokens"][slot] > 0:
            self._kernels.move(self._states, slot, *places)
        del kept


def _one_request(request_id: str, history: NDArray[np.int32], num_tokens: int) -> DraftInput:
    """A step with a single greedy request that may draft 4 tokens."""
    one = np.ones(1, dtype=np.int64)
    return DraftInput(
        request_ids=[request_id],
        token_history=history,
        rows=0 * one,
        num_tokens=num_tokens * one,
        num_prompt_tokens=one,
        max_draft=4 * one,
        temperatures=np.zeros(1, dtype=np.float32),
        streams=0 * one,
        hidden_states=None,
        cache_salts=None,
        length_control=None,  # pyright: ignore[reportArgumentType]  # never asked
    )
