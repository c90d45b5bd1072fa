"""What the worker remembers of each request between its first step and its last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vllm_spec_plugins import request_options
from vllm_spec_plugins.random_numbers import stream_of_arrival, stream_of_seed

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from vllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class RequestState:
    """Constant over a request's life.

    Attributes:
        stream: Its random stream (see `random_numbers`).
        verifier: Name of the verifier it is served with.
        draft_limit: Most tokens drafted for it per step; 0 = decoded without drafts.
        max_tokens: Most tokens it may produce, or None.
        temperature: 0 = drafted for greedily: greedy requests, and those under a grammar. The
            scheduler drops draft tokens that a grammar forbids; dropping a token for what it is
            biases the text if it was drawn, and costs nothing if it was chosen.
        cache_salt: "" when it came without one.
        has_token_history: False when its prompt came as embeddings.
        has_grammar: Whether its text must follow a grammar (structured output).
    """

    stream: int
    verifier: str
    draft_limit: int
    max_tokens: int | None
    temperature: float
    cache_salt: str
    has_token_history: bool
    has_grammar: bool


#: Key of `SamplingParams.extra_args` under which the worker finds a request's cache salt.
CACHE_SALT = "vllm_spec_plugins.cache_salt"
#: Batches kept: the whole one, those that draft, and their like while prompts come in.
_KEPT_BATCHES = 8
#: More tokens than any request may produce.
_UNBOUNDED = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class RequestBatch:
    """The constants of the R requests of a step, as the arrays a step works with.

    Attributes:
        request_ids: `[R]`.
        verifiers: `[R]` names.
        streams: `[R]` int64.
        temperatures: `[R]` float32, 0 = drafted for greedily.
        draft_limits: `[R]` int64.
        max_tokens: `[R]` int64, very large where unbounded.
        cache_salts: `[R]`.
        has_grammar: `[R]` bool, or None when none of them has one.
        lacks_history: `[R]` bool, whose prompt came as embeddings, or None when none did.
    """

    request_ids: list[str]
    verifiers: list[str]
    streams: NDArray[np.int64]
    temperatures: NDArray[np.float32]
    draft_limits: NDArray[np.int64]
    max_tokens: NDArray[np.int64]
    cache_salts: list[str]
    has_grammar: NDArray[np.bool_] | None
    lacks_history: NDArray[np.bool_] | None


class RequestStates:
    """States by request id. Equal on every tensor-parallel rank: built from scheduler output.

    Args:
        verifier: Name of the configured verifier ("vllm" when its own runs).
        verifiers_allowed: Names a request may choose.
        num_speculative_tokens: The server's number.
        engine_seed: Of the random streams of requests without a seed.
        replica: Data-parallel rank.
    """

    def __init__(
        self,
        verifier: str,
        verifiers_allowed: Collection[str],
        num_speculative_tokens: int,
        engine_seed: int,
        replica: int,
    ) -> None:
        self._verifier = verifier
        self._allowed = verifiers_allowed
        self._num_speculative_tokens = num_speculative_tokens
        self._engine_seed = engine_seed
        self._replica = replica
        self._arrivals = 0
        self._states: dict[str, RequestState] = {}
        # A decoding batch is the same for many steps.
        self._batches: dict[tuple[str, ...], RequestBatch] = {}
        # Rows of warm-up batches belong to no request.
        self._nobody = RequestState(0, verifier, num_speculative_tokens, None, 0.0, "", True, False)

    def __getitem__(self, request_id: str) -> RequestState:
        return self._states.get(request_id, self._nobody)

    def batch(self, request_ids: Sequence[str]) -> RequestBatch:
        """The constants of these requests, in this order."""
        key = tuple(request_ids)
        batch = self._batches.get(key)
        if batch is None:
            if len(self._batches) >= _KEPT_BATCHES:
                self._batches.clear()
            batch = self._batches[key] = self._collect(list(key))
        return batch

    def _collect(self, request_ids: list[str]) -> RequestBatch:
        states = [self[request_id] for request_id in request_ids]
        return RequestBatch(
            request_ids=request_ids,
            verifiers=[state.verifier for state in states],
            streams=np.array([state.stream for state in states], dtype=np.int64),
            temperatures=np.array([state.temperature for state in states], dtype=np.float32),
            draft_limits=np.array([state.draft_limit for state in states], dtype=np.int64),
            max_tokens=np.array(
                [_UNBOUNDED if s.max_tokens is None else s.max_tokens for s in states],
                dtype=np.int64,
            ),
            cache_salts=[state.cache_salt for state in states],
            has_grammar=_if_any([state.has_grammar for state in states]),
            lacks_history=_if_any([not state.has_token_history for state in states]),
        )

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._states

    def add(self, request_id: str, params: SamplingParams | None, has_token_history: bool) -> None:
        """A request's first step, or a new turn of a streaming session."""
        self._arrivals += 1
        self._batches.clear()
        extra: dict[str, Any] = (params.extra_args if params else None) or {}
        options = request_options.read(
            extra,
            verifiers_allowed=self._allowed,
            num_speculative_tokens=self._num_speculative_tokens,
        )
        limit = self._num_speculative_tokens
        if options.num_speculative_tokens is not None:
            limit = options.num_speculative_tokens
        if not options.enabled:
            limit = 0
        seed = params.seed if params else None
        has_grammar = params is not None and params.structured_outputs is not None
        self._states[request_id] = RequestState(
            stream=(
                stream_of_arrival(self._engine_seed, self._arrivals, self._replica)
                if seed is None
                else stream_of_seed(seed)
            ),
            verifier=options.verifier or self._verifier,
            draft_limit=limit,
            max_tokens=params.max_tokens if params else None,
            temperature=0.0 if has_grammar or params is None else params.temperature,
            cache_salt=extra.get(CACHE_SALT, ""),
            has_token_history=has_token_history,
            has_grammar=has_grammar,
        )

    def remove(self, request_id: str) -> None:
        """Finished or aborted."""
        if self._states.pop(request_id, None) is not None:
            self._batches.clear()


def _if_any(flags: list[bool]) -> NDArray[np.bool_] | None:
    return np.array(flags, dtype=np.bool_) if any(flags) else None
