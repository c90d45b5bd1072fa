"""Numbers that the worker writes and the front end reads: one small file mapped into both.

vLLM's own channel from the engine to its HTTP server has no room for a plugin's statistics;
a file of counters needs none, works across processes of one machine, and costs a few
additions per step.
"""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from .hookspecs import StepRecord, hookimpl

#: What is counted for each verifier.
COUNTED = ("steps", "draft_tokens", "accepted_tokens", "examined_tokens", "total_variation")
#: Requests of which a record is kept: those running, and those that finished last.
REQUESTS = 4096

_REQUEST = np.dtype([("key", "u8"), ("verifier", "i8"), ("examined", "f8"), ("price", "f8")])


class SharedCounters:
    """The file, mapped.

    Args:
        path: An existing file, from `create`.
        replicas: Data-parallel engines that share it, each with its own part.
        verifiers: How many verifiers are counted apart.

    Attributes:
        methods: `[replicas, verifiers, 5]` float64, columns as in `COUNTED`.
        requests: `[replicas, REQUESTS]` records of single requests.

    Raises:
        OSError: No such file here.
        ValueError: It is smaller than that.
    """

    def __init__(self, path: str, replicas: int, verifiers: int) -> None:
        shape = (replicas, verifiers, len(COUNTED))
        self.methods = np.memmap(path, np.float64, "r+", 0, shape)
        self.requests = np.memmap(path, _REQUEST, "r+", self.methods.nbytes, (replicas, REQUESTS))

    @staticmethod
    def create(replicas: int, verifiers: int) -> str:
        """A file of zeros, removed when this process exits. Returns its path."""
        size = replicas * (verifiers * len(COUNTED) * 8 + REQUESTS * _REQUEST.itemsize)
        handle, path = tempfile.mkstemp(prefix="vllm_spec_plugins_", suffix=".counters")
        os.close(handle)
        atexit.register(_remove, Path(path), os.getpid())
        # Written, not only made so long: a full disk is an error here, and not the end of the
        # worker that writes to the map.
        Path(path).write_bytes(bytes(size))
        return path

    def of_request(self, request_id: str) -> tuple[int, float, float] | None:
        """Verifier, draft tokens examined and summed price of a request; None if not kept."""
        found = self.requests[self.requests["key"] == key_of(request_id)]
        if not len(found):
            return None
        record = found[0]
        return int(record["verifier"]), float(record["examined"]), float(record["price"])


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a child that was forked
        path.unlink(missing_ok=True)


def key_of(request_id: str) -> int:
    """Never 0, which marks an unused record."""
    return int.from_bytes(blake2b(request_id.encode(), digest_size=8).digest(), "little") or 1


class CountersWriter:
    """An observer that adds each step to the counters of one replica.

    Args:
        counters: Where to.
        replica: Its data-parallel index.
        verifiers: Names, in the order of the counters.
        of_requests: Whether single requests are recorded, too.
    """

    def __init__(
        self, counters: SharedCounters, replica: int, verifiers: Sequence[str], of_requests: bool
    ) -> None:
        self._methods = counters.methods[replica]
        self._requests = counters.requests[replica]
        self._index = {name: i for i, name in enumerate(verifiers)}
        self._of_requests = of_requests
        self._slot_of: dict[str, int] = {}
        self._owner_of: list[str | None] = [None] * len(self._requests)
        self._next = 0

    @hookimpl
    def spec_step_finished(self, step: StepRecord) -> None:
        prices = step.extra_acceptance or [0.0] * len(step.request_ids)
        outcomes = zip(step.num_accepted, step.num_draft, strict=True)
        examined = [min(accepted + 1, drafted) for accepted, drafted in outcomes]
        for name in set(step.verifiers):
            rows = [i for i, other in enumerate(step.verifiers) if other == name]
            drafted = [step.num_draft[i] for i in rows]
            self._methods[self._index[name]] += (
                sum(count > 0 for count in drafted),
                sum(drafted),
                sum(step.num_accepted[i] for i in rows),
                sum(examined[i] for i in rows),
                sum(prices[i] for i in rows),
            )
        if self._of_requests:
            named = zip(step.request_ids, step.verifiers, strict=True)
            slots = [self._slot(request_id, verifier) for request_id, verifier in named]
            # One request is in a step once: no slot is added to twice.
            self._requests["examined"][slots] += examined
            self._requests["price"][slots] += prices

    @hookimpl
    def spec_request_finished(self, request_id: str) -> None:
        # The record stays until its place is needed: the front end may not have read it.
        slot = self._slot_of.pop(request_id, None)
        if slot is not None:
            self._owner_of[slot] = None

    def _slot(self, request_id: str, verifier: str) -> int:
        """Where a request is recorded; a new one takes the place of one that finished long ago."""
        slot = self._slot_of.get(request_id)
        if slot is None:
            size = len(self._owner_of)
            turns = (i % size for i in range(self._next, self._next + size))
            slot = next((i for i in turns if self._owner_of[i] is None), self._next)
            self._next = (slot + 1) % size
            previous = self._owner_of[slot]
            if previous is not None:  # more at a time than are kept: it starts again
                del self._slot_of[previous]
            self._owner_of[slot], self._slot_of[request_id] = request_id, slot
            self._requests[slot] = (key_of(request_id), self._index[verifier], 0.0, 0.0)
        return slot
