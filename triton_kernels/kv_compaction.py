"""Move the accepted branch of a token tree into place in the paged KV cache, all layers at once.

A tree of draft tokens is verified with node `i` of a request stored at position
`first_position + i` of its cache. After verification only one path of the tree is kept, and its
keys and values have to stand one after the other, as if they had been decoded one by one: the
node that comes `i`-th on the path belongs at `first_position + i`. Keys carry the rotary angle
of their depth already, so nothing is recomputed: each move copies one row of bytes per layer
and head, K, V and inline scales together, whatever their type.

**Order.** Within a request, moves may overlap: a slot that is written may be one that another
move reads. A path names its nodes in ascending order, so the `i`-th node is at least `i`, each
move goes down or nowhere, and moves made in order never overwrite a row that is still to be
read. The kernel keeps that order per byte: one thread reads and writes a given byte of a row for
all moves of its request, first to last. Different requests must not share the blocks written to,
which holds for vLLM's blocks past the computed tokens (prefix caching shares only full, hashed
blocks before them).

Bytes moved: 2 * layers * moves * heads * row bytes; one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_spec_plugins.errors import UnsupportedEngineError, listed

from .dispatch import tl, triton, use_triton

#: Attention backends that keep K | V of one token and head as one row of bytes.
ROW_BACKENDS = frozenset({"FLASH_ATTN", "FLASHINFER", "FLEX_ATTENTION", "TRITON_ATTN"})
#: Types of cache whose row is complete in itself: scales per tensor, or inline.
ROW_CACHE_DTYPES = frozenset(
    {
        "auto",
        "bfloat16",
        "float16",
        "float32",
        "fp8",
        "fp8_e4m3",
        "fp8_e5m2",
        "fp8_inc",
        "fp8_per_token_head",
        "int4_per_token_head",
        "int8_per_token_head",
    }
)
_REASONS = {
    "CPU_ATTN": "it packs each block for its instruction set, so a token has no row of its own",
    "ROCM_AITER_FA": "it may shuffle keys inside a block",
    "nvfp4": "the scales of a block are stored apart from its tokens",
}


@dataclass(frozen=True, eq=False)
class CacheLayers:
    """KV caches of the layers that share block tables, checked and ready to be moved.

    Attributes:
        caches: One `[num_blocks, num_heads, block_size, row_size]` view per layer, any strides
            in the first three dimensions.
        addresses: `[num_layers]` int64 on the caches' device: where each layer begins.
        word_size: Bytes moved at a time by one lane: 4, or 1 where rows are not aligned to 4.
        alignment: Every row begins at a multiple of so many bytes: 16, 8, 4 or 1.
    """

    caches: tuple[Tensor, ...]
    addresses: Tensor
    word_size: int
    alignment: int


def cache_layers(
    caches: Sequence[Tensor],
    attention_backend: str,
    *,
    cache_dtype: str = "auto",
    context_parallel_size: int = 1,
) -> CacheLayers:
    """Check that the KV caches are laid out in rows, and prepare them. Once, at load time.

    Args:
        caches: One `[num_blocks, num_heads, block_size, row_size]` view per layer, as vLLM binds
            them: K | V in the last dimension. All layers of one KV-cache group: same shape,
            strides and type.
        attention_backend: vLLM's name of the backend that writes them, for example `FLASH_ATTN`.
        cache_dtype: vLLM's `kv_cache_dtype`.
        context_parallel_size: Decode or prefill context-parallel ranks, whichever is larger.

    Raises:
        UnsupportedEngineError: The caches are not made of rows that can be moved one by one.
    """
    _check_backend(attention_backend, cache_dtype, context_parallel_size)
    _check_views(caches)
    first = caches[0]
    size = first.element_size()
    byte_counts = [stride * size for stride in first.stride()[:3]] + [first.shape[3] * size]
    byte_counts += [cache.data_ptr() for cache in caches]
    alignment = next(a for a in (16, 8, 4, 1) if all(count % a == 0 for count in byte_counts))
    return CacheLayers(
        caches=tuple(caches),
        addresses=torch.tensor([cache.data_ptr() for cache in caches], device=first.device),
        word_size=min(alignment, 4),
        alignment=alignment,
    )


def compact_accepted(
    layers: CacheLayers, block_tables: Tensor, first_positions: Tensor, accepted_nodes: Tensor
) -> None:
    """Move each accepted node to its place on the path. In place, one launch, no sync.

    Node `accepted_nodes[r, i]` goes from position `first_positions[r] + accepted_nodes[r, i]` to
    `first_positions[r] + i`. Nodes of a request must ascend, as those of a path do; a node that is
    in place already, a block that the table does not list and vLLM's null block 0 are left alone.

    Args:
        layers: From `cache_layers`.
        block_tables: `[num_reqs, max_blocks]` int32, blocks of the caches' own block size.
        first_positions: `[num_reqs]` int32 or int64, position of node 0 of each tree.
        accepted_nodes: `[num_reqs, max_accepted]` int32, ascending, -1 after the last.

    Raises:
        ValueError: A tensor has another shape, type or device.
    """
    _check_moves(layers, block_tables, first_positions, accepted_nodes)
    if not use_triton(block_tables):
        compact_accepted_reference(layers.caches, block_tables, first_positions, accepted_nodes)
        return
    num_reqs, max_accepted = accepted_nodes.shape
    if num_reqs == 0 or max_accepted == 0:
        return
    cache = layers.caches[0]
    _, num_heads, block_size, row_size = cache.shape
    words = [stride * cache.element_size() // layers.word_size for stride in cache.stride()[:3]]
    row_words = row_size * cache.element_size() // layers.word_size
    piece = min(PIECE_WORDS, triton.next_power_of_2(num_heads * row_words))
    _compact_kernel[(num_reqs, triton.cdiv(num_heads * row_words, piece), len(layers.caches))](
        layers.addresses,
        *words,
        block_tables,
        block_tables.stride(0),
        block_tables.shape[1],
        first_positions,
        accepted_nodes,
        accepted_nodes.stride(0),
        max_accepted,
        WORD=tl.int32 if layers.word_size == 4 else tl.uint8,
        ALIGNMENT=layers.alignment,
        NUM_HEADS=num_heads,
        ROW_WORDS=row_words,
        BLOCK_SIZE=block_size,
        NODES=triton.next_power_of_2(max_accepted),
        PIECE=piece,
        num_warps=4,
    )


def compact_accepted_reference(
    caches: Sequence[Tensor], block_tables: Tensor, first_positions: Tensor, accepted_nodes: Tensor
) -> None:
    """`compact_accepted` in PyTorch: all rows are read before any is written."""
    num_reqs, max_accepted = accepted_nodes.shape
    block_size = caches[0].shape[2]
    steps = torch.arange(max_accepted, device=accepted_nodes.device).expand(num_reqs, -1)
    first = first_positions.long().unsqueeze(1)
    count = (accepted_nodes >= 0).sum(dim=1, keepdim=True)
    moved = (steps < count) & (accepted_nodes > steps)  # [num_reqs, max_accepted]

    def blocks_and_offsets(positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        column = positions // block_size
        listed_here = column < block_tables.shape[1]
        blocks = block_tables.gather(1, column.clamp(0, block_tables.shape[1] - 1)).long()
        return blocks, positions % block_size, listed_here & (blocks > 0)

    from_block, from_offset, readable = blocks_and_offsets(first + accepted_nodes.clamp(min=0))
    to_block, to_offset, writable = blocks_and_offsets(first + steps)
    moved = moved & readable & writable
    for layer in caches:
        cache = layer.view(torch.uint8)  # indexing knows not every fp8 type
        rows = cache[from_block[moved], :, from_offset[moved]]  # [num_moves, num_heads, row_size]
        cache[to_block[moved], :, to_offset[moved]] = rows


#: Words of one request and layer moved by one program.
PIECE_WORDS = 1024


@triton.jit
def _row_offset(
    block_table_ptr,
    position,
    active,
    max_blocks,
    block_stride,
    slot_stride,
    BLOCK_SIZE: tl.constexpr,
):
    """Words from a layer's begin to the row of a position, and whether there is one."""
    column = position // BLOCK_SIZE
    active = active & (column < max_blocks)
    block = tl.load(block_table_ptr + column, mask=active, other=0).to(tl.int64)
    return block * block_stride + (position % BLOCK_SIZE) * slot_stride, active & (block > 0)


@triton.jit
def _read(
    layer_ptr,
    word,
    words,
    block_table_ptr,
    node_ptr,
    step,
    count,
    first,
    max_blocks,
    block_stride,
    slot_stride,
    BLOCK_SIZE: tl.constexpr,
    ALL_WORDS: tl.constexpr,
):
    """A piece of the rows that belong at step `step`, where to, and how many words of it."""
    node = tl.load(node_ptr + step, mask=step < count, other=0).to(tl.int64)
    moves = (step < count) & (node > step)
    source, moves = _row_offset(
        block_table_ptr, first + node, moves, max_blocks, block_stride, slot_stride, BLOCK_SIZE
    )
    target, moves = _row_offset(
        block_table_ptr, first + step, moves, max_blocks, block_stride, slot_stride, BLOCK_SIZE
    )
    num_words = tl.where(moves, ALL_WORDS, 0)
    piece = tl.load(layer_ptr + source + words, mask=word < num_words)
    return piece, target, num_words


@triton.jit
def _compact_kernel(
    addresses_ptr,
    block_stride,
    head_stride,
    slot_stride,
    block_tables_ptr,
    block_tables_stride,
    max_blocks,
    first_positions_ptr,
    nodes_ptr,
    nodes_stride,
    max_accepted,
    WORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NODES: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One piece of all rows of one request in one layer; strides in words.

    Four rows are read before four are written, so that their latencies overlap. Ascending moves
    allow it: a row is only ever written after its own read.
    """
    request = tl.program_id(0).to(tl.int64)
    node_ptr = nodes_ptr + request * nodes_stride
    steps = tl.arange(0, NODES)
    nodes = tl.load(node_ptr + steps, mask=steps < max_accepted, other=-1)
    count = tl.sum((nodes >= 0).to(tl.int32), axis=0)
    first = tl.load(first_positions_ptr + request).to(tl.int64)
    block_table_ptr = block_tables_ptr + request * block_tables_stride

    layer_ptr = tl.load(addresses_ptr + tl.program_id(2)).to(tl.pointer_type(WORD))
    layer_ptr = tl.multiple_of(layer_ptr, ALIGNMENT)
    word = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    words = (word // ROW_WORDS).to(tl.int64) * head_stride + word % ROW_WORDS

    for step in range(0, count, 4):
        piece0, target0, num_words0 = _read(
            layer_ptr, word, words, block_table_ptr, node_ptr, step, count, first,
            max_blocks, block_stride, slot_stride, BLOCK_SIZE, NUM_HEADS * ROW_WORDS,
        )  # fmt: skip
        piece1, target1, num_words1 = _read(
            layer_ptr, word, words, block_table_ptr, node_ptr, step + 1, count, first,
            max_blocks, block_stride, slot_stride, BLOCK_SIZE, NUM_HEADS * ROW_WORDS,
        )  # fmt: skip
        piece2, target2, num_words2 = _read(
            layer_ptr, word, words, block_table_ptr, node_ptr, step + 2, count, first,
            max_blocks, block_stride, slot_stride, BLOCK_SIZE, NUM_HEADS * ROW_WORDS,
        )  # fmt: skip
        piece3, target3, num_words3 = _read(
            layer_ptr, word, words, block_table_ptr, node_ptr, step + 3, count, first,
            max_blocks, block_stride, slot_stride, BLOCK_SIZE, NUM_HEADS * ROW_WORDS,
        )  # fmt: skip
        tl.store(layer_ptr + target0 + words, piece0, mask=word < num_words0)
        tl.store(layer_ptr + target1 + words, piece1, mask=word < num_words1)
        tl.store(layer_ptr + target2 + words, piece2, mask=word < num_words2)
        tl.store(layer_ptr + target3 + words, piece3, mask=word < num_words3)


def _check_backend(attention_backend: str, cache_dtype: str, context_parallel_size: int) -> None:
    remedy = "verify a chain instead of a tree, which leaves nothing to move"
    if attention_backend not in ROW_BACKENDS:
        reason = _REASONS.get(attention_backend, "how it lays out its blocks is not known here")
        raise UnsupportedEngineError(
            f"KV compaction: attention backend {attention_backend} is not supported: {reason}. "
            f"Supported: {listed(ROW_BACKENDS)}. Choose one of them or {remedy}."
        )
    if cache_dtype not in ROW_CACHE_DTYPES:
        reason = _REASONS.get(cache_dtype.split("_")[0], "a token has no row of its own in it")
        raise UnsupportedEngineError(
            f"KV compaction: kv_cache_dtype {cache_dtype!r} is not supported: {reason}. "
            f"Supported: {listed(ROW_CACHE_DTYPES)}. Choose one of them or {remedy}."
        )
    if context_parallel_size != 1:
        raise UnsupportedEngineError(
            f"KV compaction: with {context_parallel_size} context-parallel ranks the tokens of a "
            f"tree are spread over ranks. Use 1, or {remedy}."
        )


def _check_views(caches: Sequence[Tensor]) -> None:
    if not caches:
        raise UnsupportedEngineError("KV compaction: no layers given; give at least one KV cache.")
    first = caches[0]
    for layer, cache in enumerate(caches):
        if cache.ndim != 4 or cache.stride(3) != 1 or 0 in cache.stride():
            raise UnsupportedEngineError(
                f"KV compaction: cache of layer {layer} has shape {tuple(cache.shape)} and strides "
                f"{cache.stride()}; allowed is [num_blocks, num_heads, block_size, row_size] with "
                "the last dimension contiguous. Recurrent state and MLA caches cannot be compacted."
            )
        same = (
            cache.shape == first.shape
            and cache.stride() == first.stride()
            and cache.dtype == first.dtype
            and cache.device == first.device
        )
        if not same:
            raise UnsupportedEngineError(
                f"KV compaction: layer {layer} is {tuple(cache.shape)} {cache.dtype} with strides "
                f"{cache.stride()} on {cache.device}, layer 0 is {tuple(first.shape)} "
                f"{first.dtype} with strides {first.stride()} on {first.device}; they must agree. "
                "Make one CacheLayers for each KV-cache group."
            )


def _check_moves(
    layers: CacheLayers, block_tables: Tensor, first_positions: Tensor, accepted_nodes: Tensor
) -> None:
    num_reqs = accepted_nodes.shape[0]
    checks = (
        ("block_tables", block_tables, 2, (torch.int32,)),
        ("first_positions", first_positions, 1, (torch.int32, torch.int64)),
        ("accepted_nodes", accepted_nodes, 2, (torch.int32,)),
    )
    device = layers.addresses.device
    for name, tensor, ndim, dtypes in checks:
        fits = tensor.ndim == ndim and tensor.dtype in dtypes and tensor.shape[0] == num_reqs
        contiguous = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
        if not fits or not contiguous or tensor.device != device:
            raise ValueError(
                f"compact_accepted: {name} is {list(tensor.shape)} {tensor.dtype} on "
                f"{tensor.device}; needed: {ndim} dimensions, {num_reqs} requests, "
                f"{' or '.join(str(dtype) for dtype in dtypes)}, contiguous rows, on {device}"
            )
