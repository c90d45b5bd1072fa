"""Passes over the target's own pages: attention metadata and slots for drafted positions.

The runner's buffers are read and never written: on the CPU its device tensors alias the
host's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

if TYPE_CHECKING:
    from vllm.config import VllmConfig


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
    """

    def __init__(self, pages: Sequence[Pages], vllm_config: VllmConfig, longest: int) -> None:
        self._pages = pages
        self._vllm_config = vllm_config
        self._longest = longest
        table = pages[0].block_table
        self._num_requests = len(table)
        self._device = table.device
        #: `[R + 1]` where each request's one token starts.
        self._starts = torch.arange(self._num_requests + 1, dtype=torch.int32, device=self._device)
        self._starts_on_host = torch.arange(self._num_requests + 1, dtype=torch.int32)

    def select(self, requests: Tensor) -> Sequences:
        pages = [Pages(p.group, p.block_size, p.block_table[requests]) for p in self._pages]
        return Sequences(pages, self._vllm_config, self._longest)

    @contextmanager
    def step(self, positions: Tensor, query_lengths: Sequence[int] | None = None) -> Iterator[None]:
        starts, starts_on_host, most, owner = self._starts, self._starts_on_host, 1, None
        last = positions
        if query_lengths is not None:
            lengths = torch.tensor(query_lengths, dtype=torch.int32)
            starts_on_host = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            starts, most = starts_on_host.to(self._device), max(query_lengths)
            owner = torch.repeat_interleave(lengths.long()).to(self._device)
            last = positions[starts[1:].long() - 1]
        seq_lens = (last + 1).to(torch.int32)
        bound = seq_lens
        if self._device.type != "cpu":  # known without asking the device
            bound = torch.full((self._num_requests,), self._longest, dtype=torch.int32)
        metadata: dict[str, Any] = {}
        slots: dict[str, Tensor] = {}
        for pages in self._pages:
            slot = _slots(pages, positions, owner)
            common = CommonAttentionMetadata(
                query_start_loc=starts,
                query_start_loc_cpu=starts_on_host,
                seq_lens=seq_lens,
                num_reqs=self._num_requests,
                num_actual_tokens=len(positions),
                max_query_len=most,
                max_seq_len=self._longest,
                block_table_tensor=pages.block_table,
                slot_mapping=slot,
                causal=True,
                positions=positions,
                seq_lens_cpu_upper_bound=bound,
            )
            built = pages.group.build_metadata(common)
            for name in pages.group.layer_names:
                metadata[name], slots[name] = built, slot
        with set_forward_context(
            metadata, self._vllm_config, num_tokens=len(positions), slot_mapping=slots
        ):
            yield


def _slots(pages: Pages, positions: Tensor, owner: Tensor | None) -> Tensor:
    """`[T]` int64 key/value slot of each token; `owner` `[T]` its request, None = one each."""
    blocks = torch.div(positions, pages.block_size, rounding_mode="floor")
    if owner is None:
        block = pages.block_table.gather(1, blocks.unsqueeze(1)).squeeze(1)
    else:
        block = pages.block_table[owner, blocks]
    return block.long() * pages.block_size + positions % pages.block_size
