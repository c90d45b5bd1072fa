"""Asks a proposer that drafts on the device alone where the runner keeps texts on the host.

Model runner V1 does, and V2 under synchronous scheduling. The proposer sees no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_spec_plugins.device_drafting import DeviceDraftInput
from vllm_spec_plugins.proposer import Draft
from vllm_spec_plugins.transfers import to_device

if TYPE_CHECKING:
    from vllm_spec_plugins.context import EngineContext
    from vllm_spec_plugins.proposer import DraftInput, Proposer


class DeviceAsker:
    """Keeps a copy of every text on the device, and copies what is new before each draft.

    Args:
        proposer: Drafts on the device.
        context: Of the engine.
    """

    def __init__(self, proposer: Proposer, context: EngineContext) -> None:
        self._proposer, self._context = proposer, context
        slots = context.max_num_requests
        self._token_ids = torch.zeros(
            (slots, context.facts.max_model_len), dtype=torch.int32, device=context.device
        )
        #: `[S]` tokens of each slot's text that are on the device.
        self._known = np.zeros(slots, dtype=np.int64)
        self._slot_of: dict[str, int] = {}
        self._free = list(range(slots))[::-1]

    def propose(self, batch: DraftInput) -> Draft:
        """What `Proposer.propose` would be asked."""
        slots, fresh = self._slots(batch.request_ids)
        self._copy(batch, slots)

        def on_device(values: NDArray[np.generic]) -> torch.Tensor:
            return to_device(values, self._context.device)

        draft = self._proposer.propose_on_device(
            DeviceDraftInput(
                token_ids=self._token_ids,
                slots=on_device(slots),
                fresh=on_device(fresh),
                num_tokens=on_device(batch.num_tokens),
                num_prompt_tokens=on_device(batch.num_prompt_tokens),
                max_draft=on_device(batch.max_draft),
                temperatures=on_device(batch.temperatures),
                streams=on_device(batch.streams),
                num_speculative_tokens=self._context.facts.num_speculative_tokens,
                rows=batch.rows,
                is_fresh=fresh,
                most_tokens=batch.num_tokens,
                temperatures_on_host=batch.temperatures,
            )
        )
        return Draft(draft.token_ids, draft.probabilities)

    def forget(self, request_ids: Sequence[str]) -> None:
        """Requests that are gone, preempted or begin anew. Unknown ones are ignored."""
        for request_id in request_ids:
            slot = self._slot_of.pop(request_id, None)
            if slot is not None:
                self._free.append(slot)

    def _slots(self, request_ids: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """`[R]` slot of each request, and `[R]` whether it has just got it."""
        fresh = np.array([name not in self._slot_of for name in request_ids], dtype=np.bool_)
        for name, is_fresh in zip(request_ids, fresh.tolist(), strict=True):
            if is_fresh:
                self._slot_of[name] = slot = self._free.pop()
                self._known[slot] = 0
        slots = np.array([self._slot_of[name] for name in request_ids], dtype=np.int64)
        return slots, fresh

    def _copy(self, batch: DraftInput, slots: NDArray[np.int64]) -> None:
        """What the requests have said since they drafted last."""
        begins, ends = self._known[slots], batch.num_tokens
        width = self._token_ids.shape[1]
        spans = np.stack([slots * width, batch.rows, begins, ends], axis=1).tolist()
        tokens = [batch.token_history[row, begin:end] for _, row, begin, end in spans]
        places = [np.arange(begin, end) + start for start, _, begin, end in spans]
        device = self._context.device
        self._token_ids.view(-1).index_copy_(
            0,
            to_device(np.concatenate(places), device),
            to_device(np.concatenate(tokens).astype(np.int32), device),
        )
        self._known[slots] = ends
