"""`ngram_adaptive`: drafts what followed the longest matching context in the request's own text.

Prompt lookup (Saxena 2023; vLLM's `ngram`) with the counts and the vote of SuffixDecoding
(Oliaro et al. 2411.04975), scored by online trigram weights (ADED, Liu et al. 2407.12021) and
cut where the draft is no longer expected to be accepted.

Each token is indexed once (`suffix_index`), so a step costs the same at any length of history;
a prompt is indexed when it is first seen, in about a millisecond per thousand tokens. Nothing
is drafted where nothing matches. The draft is a choice, not a draw: exact under every verifier.
With `matching: device` the texts stay on the device and are searched there: `ngram_device`.

Memory: 140 bytes for each token of a request's text and up to 40 % more, reused when the
request finishes.

The trigram weights say how far to trust a winner; they do not choose it. Letting them choose
among the successors of a two-token match changed 1 token in 1000 on the development traces,
and of longer matches made drafts worse.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from vllm_spec_plugins.errors import ConfigError, listed
from vllm_spec_plugins.proposer import Draft, DraftInput, Needs, Proposer, ProposerOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vllm_spec_plugins.context import EngineContext, ModelFacts
    from vllm_spec_plugins.device_drafting import DeviceDraft, DeviceDraftInput

    from .ngram_device import NgramDevice


#: Options of the index on the host.
_HOST_OPTIONS = ("adaptation", "shared_index", "shared_index_tokens")


class NgramAdaptiveOptions(ProposerOptions):
    matching: Literal["host", "device"] = Field(
        "host",
        description="Where the text is searched. `host`: in an index that grows with it; drafts "
        "are better. `device`: anew in each step, on the GPU, so that a step never waits for "
        "the host.",
    )
    max_match: int = Field(32, ge=4, le=120, description="Longest context compared, in tokens.")
    min_match: int = Field(1, ge=1, le=32, description="Shortest context to draft from, in tokens.")
    min_acceptance: float | None = Field(
        None,
        ge=0.0,
        lt=1.0,
        description="Draft a token only while it is expected to be accepted, with all before "
        "it, at least this often. Default: 0.54 / sqrt(num_speculative_tokens), as who asks "
        "for longer drafts holds a drafted token to be cheaper.",
    )
    adaptation: bool = Field(
        True,
        description="Learn from each request's text how far its matches can be trusted. With "
        "`matching: host`; so do the two below.",
    )
    shared_index: bool = Field(
        False,
        description="Also draft from the finished outputs of requests with the same cache salt. "
        "How fast a request runs then tells what others with its salt have written.",
    )
    shared_index_tokens: int = Field(
        1_000_000,
        ge=4096,
        le=1_000_000_000,
        description="Output tokens the shared index keeps, 92 bytes each; oldest leave first.",
    )


class NgramAdaptive(Proposer):
    """Drafts from an incremental suffix index of each request's own text."""

    Options = NgramAdaptiveOptions
    options: NgramAdaptiveOptions

    #: Step of the gradient when `adaptation` is on.
    LEARNING_RATE = 0.01
    #: Requests remembered for what they already gave to the shared index: a preempted
    #: request is reported finished, comes back, and finishes again.
    REMEMBERED = 4096

    def __init__(self, options: NgramAdaptiveOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        threshold = options.min_acceptance
        if threshold is None:
            threshold = 0.54 / math.sqrt(context.facts.num_speculative_tokens)
        self._threshold = float(threshold)
        self._on_device = self._drafter_on_device() if options.matching == "device" else None
        if self._on_device is None:
            self._make_indexes()

    def _drafter_on_device(self) -> NgramDevice:
        from .ngram_device import NgramDevice

        return NgramDevice(
            self.context.max_num_requests,
            self.context.facts.num_speculative_tokens,
            min_match=self.options.min_match,
            max_match=self.options.max_match,
            min_acceptance=self._threshold,
            device=self.context.device,
        )

    def _make_indexes(self) -> None:
        # Here, not above: numba and the kernels take a second to import.
        from . import ngram_step, shared_index, suffix_index, trigram_weights
        from .request_memory import RequestMemory, roomy

        options, context = self.options, self.context
        self._kernels, self._roomy, self._shares = ngram_step, roomy, trigram_weights.shares
        self._text = suffix_index.text
        self._rate = self.LEARNING_RATE if options.adaptation else 0.0
        slots = context.max_num_requests
        self._indexes = RequestMemory(slots, suffix_index.bytes_needed)
        self._trigrams = RequestMemory(slots, trigram_weights.bytes_needed)
        self._states: NDArray[np.void] = np.zeros(slots, dtype=ngram_step.REQUEST_STATE)
        self._states_address = self._states.ctypes.data
        self._slot_of: dict[str, int] = {}
        self._free = list(range(slots - 1, -1, -1))
        self._shared = shared_index.SharedIndex(options.shared_index_tokens, options.max_match)
        self._salt_of: dict[str, str] = {}
        self._prompt_of: dict[str, int] = {}
        self._given: OrderedDict[str, int] = OrderedDict()

    @classmethod
    def check(cls, options: ProposerOptions, facts: ModelFacts) -> None:
        del facts
        assert isinstance(options, NgramAdaptiveOptions)
        if options.min_match > options.max_match:
            raise ConfigError(
                f"ngram_adaptive: min_match ({options.min_match}) is larger than max_match "
                f"({options.max_match}); give a smaller min_match."
            )

        set_anyhow = [name for name in _HOST_OPTIONS if name in options.model_fields_set]
        if options.matching == "device" and set_anyhow:
            raise ConfigError(
                f"ngram_adaptive: {listed(set_anyhow)} cannot be given with "
                '"matching": "device", which keeps no index on the host; remove '
                f'{"it" if len(set_anyhow) == 1 else "them"}, or take "matching": "host".'
            )

    @classmethod
    def drafts_on_device(cls, options: ProposerOptions) -> bool:
        assert isinstance(options, NgramAdaptiveOptions)
        return options.matching == "device"

    @classmethod
    def drafts_on_host(cls, options: ProposerOptions) -> bool:
        return not cls.drafts_on_device(options)

    @classmethod
    def needs_for(cls, options: ProposerOptions) -> Needs:
        assert isinstance(options, NgramAdaptiveOptions)
        return Needs.CACHE_SALT if options.shared_index else Needs.HISTORY

    def warm_up(self) -> None:
        """Compile every kernel: some twenty seconds once, then read from numba's cache."""
        if self._on_device is not None:
            self._on_device.warm_up(self.context.facts.max_model_len)
            return
        history = np.arange(1200, dtype=np.int32).reshape(1, -1) % 7
        for num_tokens in (100, 1200):  # the second outgrows the memory of the first
            self.propose(_one_request("warm up", history, num_tokens))
        self.trigram_shares("warm up", np.zeros((1, 3), dtype=np.int32))
        type(self._shared)(4096, self.options.max_match).add("", history[0, :10])
        self._free_slot("warm up")

    def propose(self, batch: DraftInput) -> Draft:
        history = batch.token_history
        if history.dtype != np.int32 or history.strides[1] != 4:
            history = np.ascontiguousarray(history, dtype=np.int32)
        shape = (len(batch.request_ids), self.context.facts.num_speculative_tokens)
        token_ids, source_of = np.empty(shape, dtype=np.int32), np.empty(shape, dtype=np.int8)
        work, segments = self._work(batch), self._segments(batch)
        # Addresses, not arrays: one compiled signature for views of every layout.
        address, stride = history.ctypes.data, history.strides[0]
        while not self._kernels.step(
            work,
            address,
            stride,
            self._states_address,
            self._indexes.addresses,
            self._indexes.capacities,
            self._trigrams.addresses,
            self._trigrams.capacities,
            segments,
            self._shared.states_address,
            self._shared.memory.addresses,
            self._shared.memory.capacities,
            self.options.max_match,
            self.options.min_match,
            self._threshold,
            self._rate,
            token_ids,
            source_of,
        ):
            self._make_room(work)
        return Draft(token_ids, sources=self._kernels.SOURCES, source_of=source_of)

    def propose_on_device(self, batch: DeviceDraftInput) -> DeviceDraft:
        assert self._on_device is not None, "asked only where `drafts_on_device` says so"
        return self._on_device.propose(batch)

    def finish(self, request_ids: Sequence[str]) -> None:
        if self._on_device is not None:
            return  # what is kept by slot is forgotten when the slot is `fresh`
        for request_id in request_ids:
            if request_id in self._slot_of:
                if self.options.shared_index:
                    self._share(request_id)
                self._free_slot(request_id)

    def trigram_shares(self, request_id: str, trigrams: NDArray[np.int32]) -> NDArray[np.float32]:
        """Score trigrams by the online weights of one request's text.

        Args:
            request_id: A request that was drafted for and has not finished.
            trigrams: `[N, 3]` token ids: two tokens and the one to score after them.

        Returns:
            `[N]` 0 to 1: the weight of the third token among all that followed the first
            two, recent ones counting more; 0 for what was never seen.

        Raises:
            KeyError: The request is not known.
        """
        slot = self._slot_of[request_id]
        scores = np.zeros(len(trigrams), dtype=np.float32)
        self._shares(
            int(self._trigrams.addresses[slot]),
            int(self._trigrams.capacities[slot]),
            np.array(trigrams, dtype=np.int32, order="C"),
            scores,
        )
        return scores

    @property
    def num_bytes(self) -> int:
        """Bytes held on the host: for requests that have not finished, and the shared index."""
        if self._on_device is not None:
            return 0
        return self._indexes.num_bytes + self._trigrams.num_bytes + self._shared.memory.num_bytes

    def _work(self, batch: DraftInput) -> NDArray[np.int64]:
        """`[R, 4]`, the columns of `ngram_step.step`."""
        slot_of = self._slot_of
        try:
            slots = [slot_of[request_id] for request_id in batch.request_ids]
        except KeyError:
            slots = [self._slot(request_id) for request_id in batch.request_ids]
        work = np.empty((len(slots), 4), dtype=np.int64)
        work[:, 0], work[:, 1] = slots, batch.rows
        work[:, 2], work[:, 3] = batch.num_tokens, batch.max_draft
        return work

    def _segments(self, batch: DraftInput) -> NDArray[np.int64]:
        """`[R, S]` shared segments each request may draft from; S is 0 with none."""
        if not self.options.shared_index:
            return np.empty((len(batch.request_ids), 0), dtype=np.int64)
        salts = batch.cache_salts or [""] * len(batch.request_ids)
        for request_id, salt, prompt in zip(
            batch.request_ids, salts, batch.num_prompt_tokens.tolist(), strict=True
        ):
            self._salt_of[request_id], self._prompt_of[request_id] = salt, prompt
        return self._shared.segments_of(salts)

    def _share(self, request_id: str) -> None:
        """Give the request's output to the shared index, less what it gave before."""
        slot = self._slot_of[request_id]
        num_tokens = int(self._states["num_tokens"][slot])
        begin = max(self._prompt_of[request_id], self._given.pop(request_id, 0))
        text = self._text(self._indexes.block(slot))
        self._shared.add(self._salt_of[request_id], text[begin:num_tokens])
        self._given[request_id] = max(begin, num_tokens)
        if len(self._given) > self.REMEMBERED:
            self._given.popitem(last=False)

    def _free_slot(self, request_id: str) -> None:
        """Free the memory of one request."""
        slot = self._slot_of.pop(request_id)
        self._salt_of.pop(request_id, None)
        self._prompt_of.pop(request_id, None)
        self._states["num_tokens"][slot] = 0
        self._indexes.take_back(slot)
        self._trigrams.take_back(slot)
        self._free.append(slot)

    def _slot(self, request_id: str) -> int:
        if request_id not in self._slot_of:
            if not self._free:
                old = len(self._states)
                new = 2 * old
                self._states = np.pad(self._states, (0, new - old))
                self._states_address = self._states.ctypes.data
                self._indexes.add_slots(new)
                self._trigrams.add_slots(new)
                self._free.extend(range(new - 1, old - 1, -1))
            self._slot_of[request_id] = self._free.pop()
        return self._slot_of[request_id]

    def _make_room(self, work: NDArray[np.int64]) -> None:
        """Give every request that drafts memory for its whole text."""
        short = (work[:, 2] > self._indexes.capacities[work[:, 0]]) & (work[:, 3] > 0)
        for slot, _, num_tokens, _ in work[short].tolist():
            self._grow(slot, num_tokens)

    def _grow(self, slot: int, num_tokens: int) -> None:
        """Have room for `num_tokens` in this slot, keeping what is indexed."""
        places, replaced = [], []
        for memory in (self._indexes, self._trigrams):
            places.append(np.array([memory.addresses[slot], memory.capacities[slot]]))
            replaced.append(memory.give(slot, self._roomy(num_tokens)))
            places.append(np.array([memory.addresses[slot], memory.capacities[slot]]))
        if self._states["num_tokens"][slot] > 0:
            self._kernels.move(self._states, slot, *places)
        for memory, block in zip((self._indexes, self._trigrams), replaced, strict=True):
            memory.free(block)


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
