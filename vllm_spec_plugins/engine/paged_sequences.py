"""Passes over the target's own pages: attention metadata and slots for drafted positions.

The runner's buffers are read and never written: on the CPU its device tensors alias the
host's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import (
    ForwardContext,
    get_forward_context,
    override_forward_context,
    set_forward_context,
)
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_spec_plugins.transfers import to_device

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Slot of tokens whose keys and values vLLM's kernels do not write; its padding.
_NOWHERE = -1


@dataclass(frozen=True, slots=True)
class Pages:
    """The pages of some requests in one group of layers that share block tables.

    Attributes:
        group: vLLM's attention group: builds the metadata its layers read.
        block_size: Tokens per block.
        block_table: `[R, blocks]` int32.
    """

    group: Any
    block_size: int
    block_table: Tensor


class Sequences:
    """Implements `target_model.PagedSequences`.

    Args:
        pages: One for each attention group of the target.
        vllm_config: Of the engine.
        longest: No request has more positions than this during the draft.
        ends: `[R]` int64, where each request's own positions end; None = all are its own.
    """

    def __init__(
        self,
        pages: Sequence[Pages],
        vllm_config: VllmConfig,
        longest: int,
        ends: Tensor | None = None,
    ) -> None:
        self._pages = pages
        self._vllm_config = vllm_config
        self._longest = longest
        self._ends = ends
        table = pages[0].block_table
        self._num_requests = len(table)
        self._device = table.device
        #: `[R + 1]` where each request's one token starts.
        self._starts = _counted(self._num_requests + 1, self._device)
        self._starts_on_host = _counted(self._num_requests + 1, torch.device("cpu"))
        #: By identity of their positions, which are kept so that none other gets it.
        self._prepared: dict[int, tuple[Tensor, ForwardContext]] = {}

    def select(self, requests: Tensor) -> Sequences:
        pages = [Pages(p.group, p.block_size, p.block_table[requests]) for p in self._pages]
        ends = None if self._ends is None else self._ends[requests]
        return Sequences(pages, self._vllm_config, self._longest, ends)

    def prepare(self, positions: Tensor, count: int) -> list[Tensor]:
        # Metadata of GPU backends share buffers: only the last built would be right.
        if self._device.type != "cpu":
            return [self._within(positions + index) for index in range(count)]
        # Small operations take longer than what they compute: one for all steps.
        at = self._within(positions + torch.arange(count).unsqueeze(1))  # [count, R]
        seq_lens = at.to(torch.int32) + 1
        slots = [_slots(pages, at, None, self._ends) for pages in self._pages]
        steps = list(at.unbind())
        by_layer = []
        for index, step in enumerate(steps):
            batch = _Batch(self._starts, self._starts_on_host, 1, seq_lens[index], seq_lens[index])
            by_layer.append(self._by_layer(batch, step, [slot[index] for slot in slots]))
        with self._context(by_layer[0], self._num_requests):
            context = get_forward_context()
        for step, (metadata, slot_of) in zip(steps, by_layer, strict=True):
            own = copy.copy(context)
            own.attn_metadata, own.slot_mapping = metadata, slot_of
            self._prepared[id(step)] = step, own
        return steps

    def _within(self, positions: Tensor) -> Tensor:
        """`[..., R]` where no request has gone past its end."""
        return positions if self._ends is None else torch.minimum(positions, self._ends)

    def step(
        self, positions: Tensor, query_lengths: Sequence[int] | None = None
    ) -> AbstractContextManager[None]:
        prepared = self._prepared.get(id(positions))
        if query_lengths is None and prepared is not None:
            return override_forward_context(prepared[1])
        starts, starts_on_host, most, owner = self._starts, self._starts_on_host, 1, None
        last = positions
        if query_lengths is not None:
            lengths = torch.tensor(query_lengths, dtype=torch.int32)
            starts_on_host = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            starts = to_device(starts_on_host.numpy(), self._device)
            most = max(query_lengths)
            owner = to_device(np.repeat(np.arange(len(lengths)), query_lengths), self._device)
            last = positions[starts[1:].long() - 1]
        seq_lens = last.to(torch.int32) + 1
        bound = seq_lens
        if self._device.type != "cpu":  # known without asking the device
            bound = torch.full((self._num_requests,), self._longest, dtype=torch.int32)
        batch = _Batch(starts, starts_on_host, most, seq_lens, bound)
        slots = [_slots(pages, positions, owner, self._ends) for pages in self._pages]
        return self._context(self._by_layer(batch, positions, slots), len(positions))

    def _by_layer(
        self, batch: _Batch, positions: Tensor, slots: Sequence[Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Attention metadata and slots of a pass over `[T]` tokens, by name of the layer."""
        metadata: dict[str, Any] = {}
        slot_of: dict[str, Tensor] = {}
        for pages, slot in zip(self._pages, slots, strict=True):
            common = CommonAttentionMetadata(
                query_start_loc=batch.starts,
                query_start_loc_cpu=batch.starts_on_host,
                seq_lens=batch.seq_lens,
                num_reqs=self._num_requests,
                num_actual_tokens=len(positions),
                max_query_len=batch.longest_query,
                max_seq_len=self._longest,
                block_table_tensor=pages.block_table,
                slot_mapping=slot,
                causal=True,
                positions=positions,
                seq_lens_cpu_upper_bound=batch.seq_lens_bound,
            )
            built = pages.group.build_metadata(common)
            metadata.update(dict.fromkeys(pages.group.layer_names, built))
            slot_of.update(dict.fromkeys(pages.group.layer_names, slot))
        return metadata, slot_of

    def _context(
        self, by_layer: tuple[dict[str, Any], dict[str, Tensor]], num_tokens: int
    ) -> AbstractContextManager[None]:
        """vLLM's forward context for a pass."""
        metadata, slots = by_layer
        return set_forward_context(
            metadata, self._vllm_config, num_tokens=num_tokens, slot_mapping=slots
        )


@dataclass(frozen=True, slots=True)
class _Batch:
    """What attention asks of a pass.

    Attributes:
        starts: `[R + 1]` int32, where each request's tokens start; and the same on the host.
        longest_query: Most tokens of a request.
        seq_lens: `[R]` int32, tokens of each, those of the pass included.
        seq_lens_bound: `[R]` int32 on the host, not less.
    """

    starts: Tensor
    starts_on_host: Tensor
    longest_query: int
    seq_lens: Tensor
    seq_lens_bound: Tensor


@cache
def _counted(count: int, device: torch.device) -> Tensor:
    """0 to count - 1, int32. Read only: every round of as many requests shares it."""
    return torch.arange(count, dtype=torch.int32, device=device)


def _slots(
    pages: Pages, positions: Tensor, owner: Tensor | None, ends: Tensor | None = None
) -> Tensor:
    """Key/value slot of each position, int64; where it is not its request's, vLLM's padding.

    Args:
        pages: Where the requests write.
        positions: `[T]`, or one for each request: `[R]`, or of several steps `[steps, R]`.
        owner: `[T]` request of each; None = one each.
        ends: `[R]` first position that is not a request's; None = all are.
    """
    if owner is None:
        owner = _counted(positions.shape[-1], positions.device)
    look_up = _slots_on_host if positions.device.type == "cpu" else _slots_on_device
    slots = look_up(pages, positions, owner)
    return slots if ends is None else slots.masked_fill_(positions >= ends[owner], _NOWHERE)


def _slots_on_host(pages: Pages, positions: Tensor, owner: Tensor) -> Tensor:
    """Where numpy's small operations cost a third of torch's."""
    where, size = positions.numpy(), pages.block_size
    block = pages.block_table.numpy()[owner.numpy(), where // size]
    return torch.from_numpy(block.astype(np.int64) * size + where % size)


def _slots_on_device(pages: Pages, positions: Tensor, owner: Tensor) -> Tensor:
    size = pages.block_size
    block = pages.block_table[owner, torch.div(positions, size, rounding_mode="floor")]
    return block.long() * size + positions % size
