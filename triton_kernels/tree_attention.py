"""Attention of draft trees over the paged KV cache: every request brings its own tree.

A request has some context in its cache and up to 64 new tokens, the *nodes*, whose keys and
values stand behind the context, node `i` at position `context + i`. Each node sees the whole
context and those nodes whose bits are set in its 64-bit mask. That covers

* token trees (ancestors and itself): `tree_ancestors`,
* chains, the ordinary causal mask: `causal_ancestors`,
* blocks that see each other both ways, as diffusion drafters write them: `block_ancestors`,

side by side in one batch, with any number of nodes and any length of context per request.

The query heads that share a KV head are rows of one tile (GQA packing), so keys and values are
read once for all of them; long contexts are split over programs and the parts combined in fixed
order. With the same `num_splits` results are the same bits in every run, whatever else is in the
batch; the number chosen when none is given depends on the shape of the batch.

Softmax over several parts: Milakov and Gimelshein 1805.02867; splitting the context:
Flash-Decoding. Bytes read: (context + nodes) * KV heads * 2 * head size, times
`nodes * group / 128` where that is more than 1, mostly from L2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vllm_spec_plugins.errors import UnsupportedEngineError

from .dispatch import tl, triton, use_triton

#: Nodes of one request: bits of a mask.
MAX_NODES = 64
MAX_HEAD_SIZE = 256
MAX_SPLITS = 32
QUERY_TYPES = (torch.bfloat16, torch.float16, torch.float32)
#: KV caches have the type of the query or one of these, scaled per tensor.
FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, eq=False)
class PagedContext:
    """Keys and values of a batch of requests, one layer.

    Attributes:
        keys: `[num_blocks, num_kv_heads, block_size, head_size]`, any strides but the last, which
            is 1; any block size. K and V are the halves of the row of vLLM's cache views.
        values: Likewise.
        block_tables: `[num_reqs, max_blocks]` int32.
        context_lens: `[num_reqs]` int32: tokens before the nodes, which are in the cache too.
        max_context_len: A bound on `context_lens` known on the host; it shapes the launch only.
        key_scale: `[1]` float32, what fp8 keys are multiplied by; None: 1.
        value_scale: Likewise for values.
    """

    keys: Tensor
    values: Tensor
    block_tables: Tensor
    context_lens: Tensor
    max_context_len: int
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None


def tree_attention(
    query: Tensor,
    context: PagedContext,
    ancestors: Tensor,
    query_starts: Tensor,
    *,
    max_query_len: int,
    scale: float,
    softcap: float = 0.0,
    sliding_window: int | None = None,
    positions: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Attention of each request's nodes over its context and the nodes they see. No sync.

    A node that sees nothing gets zeros.

    Args:
        query: `[num_tokens, num_heads, head_size]`, requests one after the other; head sizes that
            are multiples of 8 up to 256 (those that are no power of two pay for the next one).
        context: With the nodes' own keys and values written already.
        ancestors: `[num_tokens]` int64 or uint64: bit `i` of a node's mask lets it see node `i`.
        query_starts: `[num_reqs + 1]` int32: where each request's nodes begin in `query`.
        max_query_len: Most nodes of a request, known on the host.
        scale: Scores are multiplied by it.
        softcap: If not 0, scores become `softcap * tanh(score / softcap)` (Gemma 2).
        sliding_window: A node at position `p` sees positions above `p - sliding_window`.
        positions: `[num_tokens]` int32 or int64, rotary positions; needed by `sliding_window`
            alone, as the depth of a node in a tree is not its place in the cache.
        num_splits: Programs that share a context, up to 32. Default: as many as fill the device.

    Returns:
        `[num_tokens, num_heads, head_size]`, as `query`. Tokens past the last request are not
        written.

    Raises:
        ValueError: An argument is out of range or a tensor has another shape, type or device.
        UnsupportedEngineError: The GPU cannot read the cache's type.
    """
    _check(query, context, ancestors, query_starts, max_query_len, num_splits)
    if (sliding_window is None) != (positions is None):
        raise ValueError("tree_attention: give sliding_window and positions together or not at all")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"tree_attention: sliding_window is {sliding_window}; at least 1")
    if not use_triton(query):
        return tree_attention_reference(
            query,
            context,
            ancestors,
            query_starts,
            scale=scale,
            softcap=softcap,
            sliding_window=sliding_window,
            positions=positions,
            compute_dtype=torch.float32,
        )
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    num_reqs, num_tokens = query_starts.shape[0] - 1, query.shape[0]
    if num_reqs == 0 or num_tokens == 0:
        return output
    num_heads, head_size = query.shape[1:]
    num_kv_heads, block_size = context.keys.shape[1:3]
    group = num_heads // num_kv_heads
    large = _large_tiles(query.device)
    tile = _tile(max_query_len * group, head_size, query.dtype, context.keys.dtype, large)
    row_tiles = triton.cdiv(max_query_len * group, tile.rows)
    if num_splits is None:
        num_splits = _splits(
            row_tiles * num_reqs * num_kv_heads,
            triton.cdiv(context.max_context_len + max_query_len, tile.keys),
            query.device,
        )
    head_pad = triton.next_power_of_2(head_size)
    part_outputs, log_sums = output, None
    if num_splits > 1:
        part_outputs = query.new_empty((num_splits, *query.shape), dtype=torch.float32)
        log_sums = query.new_empty((num_splits, num_tokens, num_heads), dtype=torch.float32)
    _attend_kernel[(row_tiles, num_reqs * num_kv_heads, num_splits)](
        query,
        *query.stride()[:2],
        context.keys,
        *context.keys.stride()[:3],
        context.values,
        *context.values.stride()[:3],
        context.block_tables,
        context.block_tables.stride(0),
        context.context_lens,
        query_starts,
        ancestors.view(torch.int64),
        positions,
        context.key_scale,
        context.value_scale,
        part_outputs,
        log_sums,
        num_tokens,
        float(scale),
        float(softcap),
        SOFTCAP=softcap != 0.0,
        SLIDING_WINDOW=sliding_window or 0,
        NUM_HEADS=num_heads,
        GROUP=group,
        HEAD_SIZE=head_size,
        HEAD_PAD=head_pad,
        BLOCK_SIZE=block_size,
        ROWS=tile.rows,
        KEYS=tile.keys,
        # The interpreter multiplies the bits of bfloat16 numbers as integers.
        UPCAST=query.device.type == "cpu",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if num_splits > 1:
        _combine_kernel[(num_tokens, num_heads)](
            part_outputs,
            log_sums,
            query_starts,
            output,
            num_reqs,
            num_tokens,
            num_splits,
            NUM_HEADS=num_heads,
            HEAD_SIZE=head_size,
            HEAD_PAD=head_pad,
            SPLITS=triton.next_power_of_2(num_splits),
            num_warps=2,
        )
    return output


def tree_attention_reference(
    query: Tensor,
    context: PagedContext,
    ancestors: Tensor,
    query_starts: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sliding_window: int | None = None,
    positions: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`tree_attention` in PyTorch, request by request, computed in `compute_dtype`.

    It reads the lengths of the requests from the device.
    """
    num_kv_heads = context.keys.shape[1]
    output = torch.zeros_like(query)
    starts, lens = query_starts.tolist(), context.context_lens.tolist()
    for request, context_len in enumerate(lens):
        begin, end = starts[request], starts[request + 1]
        nodes = torch.arange(end - begin, device=query.device)
        places = torch.arange(context_len + end - begin, device=query.device)  # [num_keys]
        table = context.block_tables[request]
        keys = _gather(context.keys, table, places, context.key_scale, compute_dtype)
        values = _gather(context.values, table, places, context.value_scale, compute_dtype)

        bits = (ancestors[begin:end].view(torch.int64).unsqueeze(1) >> nodes) & 1
        seen = torch.ones(end - begin, len(places), dtype=torch.bool, device=query.device)
        seen[:, context_len:] = bits == 1  # [num_nodes, num_keys]
        if sliding_window is not None and positions is not None:
            here = positions[begin:end]
            key_positions = torch.cat([places[:context_len], here])
            seen &= key_positions > here.unsqueeze(1) - sliding_window

        rows = query[begin:end].unflatten(1, (num_kv_heads, -1)).to(compute_dtype)
        scores = torch.einsum("nhgd,khd->nhgk", rows, keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
        weights = scores.softmax(dim=-1).masked_fill(~seen.any(dim=1)[:, None, None, None], 0.0)
        output[begin:end] = torch.einsum("nhgk,khd->nhgd", weights, values).flatten(1, 2)
    return output


def tree_ancestors(parents: Tensor, query_starts: Tensor) -> Tensor:
    """Masks of token trees: each node sees itself and all nodes above it.

    Args:
        parents: `[num_tokens]` int32 or int64: each node's parent, counted within its request;
            -1 for those that hang on the context.
        query_starts: `[num_reqs + 1]`: where each request's nodes begin.

    Returns:
        `[num_tokens]` int64.
    """
    node, begin = _nodes(query_starts, parents.shape[0])
    masks = torch.ones_like(node) << node
    above = torch.where(parents >= 0, begin + parents, -1)  # token of an ancestor
    for _ in range(MAX_NODES.bit_length() - 1):  # each pass doubles the distance looked up
        reaches = above >= 0
        index = above.clamp(min=0)
        masks = torch.where(reaches, masks | masks[index], masks)
        above = torch.where(reaches, above[index], -1)
    return masks


def causal_ancestors(query_starts: Tensor, num_tokens: int) -> Tensor:
    """Masks `[num_tokens]` of chains: each node sees itself and all nodes before it."""
    node, _ = _nodes(query_starts, num_tokens)
    return _lowest_bits(node)


def block_ancestors(query_starts: Tensor, num_tokens: int) -> Tensor:
    """Masks `[num_tokens]` of blocks: all nodes of a request see each other."""
    _, begin = _nodes(query_starts, num_tokens)
    sizes = torch.bincount(begin, minlength=num_tokens)
    return _lowest_bits(sizes[begin] - 1)


def _nodes(query_starts: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Each token's place in its request, and where that begins."""
    tokens = torch.arange(num_tokens, device=query_starts.device)
    request = torch.bucketize(tokens, query_starts, right=True) - 1
    begin = query_starts.long()[request]
    return tokens - begin, begin


def _lowest_bits(last: Tensor) -> Tensor:
    """Masks with bits 0 to `last` set, without leaving 64 bits."""
    highest = torch.ones_like(last) << last
    return highest | (highest - 1)


def _gather(
    cache: Tensor, table: Tensor, places: Tensor, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Rows of one request at its `places`: `[num_keys, num_kv_heads, head_size]`."""
    block_size = cache.shape[2]
    as_bytes = cache.view(torch.uint8)  # indexing knows not every fp8 type
    rows = as_bytes[table[places // block_size].long(), :, places % block_size]
    rows = rows.view(cache.dtype).to(dtype)
    return rows if scale is None else rows * scale.to(dtype)


@dataclass(frozen=True)
class _Tile:
    """Rows (nodes times query heads of a KV head) and keys of one step of a program."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def _tile(
    num_rows: int, head_size: int, query_type: torch.dtype, cache_type: torch.dtype, large: bool
) -> _Tile:
    """As large as registers allow without spilling: see the table of the offline tests."""
    wide = head_size > 128
    if query_type == torch.float32:
        return _Tile(16, 16 if wide else 32, num_warps=4, num_stages=1)
    rows = min(max(16, triton.next_power_of_2(num_rows)), 64 if wide else 128)
    keys, most_rows_of_4_warps = (32 if wide else 64), 64
    if not large and (wide or rows > 32):
        # Numbers on their way from fp8 take registers too.
        keys = 16 if wide or (rows == 128 and cache_type != query_type) else 32
        most_rows_of_4_warps = 32
    num_warps = 8 if wide or rows > most_rows_of_4_warps else 4
    return _Tile(rows, keys, num_warps, num_stages=2)


@cache
def _large_tiles(device: torch.device) -> bool:
    """Whether matrix units read operands from shared memory, which leaves registers free."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _splits(num_programs: int, num_key_tiles: int, device: torch.device) -> int:
    """Parts of a context so that the device is busy, of at least 4 key tiles each."""
    wanted = 2 * _num_processors(device) // max(num_programs, 1)
    return max(1, min(wanted, num_key_tiles // 4, MAX_SPLITS))


@cache
def _num_processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132


@triton.jit
def _attend_tile(
    accumulated,
    highest,
    weight_sum,
    rows,
    tile,
    key_ptr,
    key_block_stride,
    key_slot_stride,
    value_ptr,
    value_block_stride,
    value_slot_stride,
    block_table_ptr,
    context_len,
    num_nodes,
    masks,
    row_positions,
    positions_ptr,
    scale,
    softcap,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add one tile of keys to the running softmax, whose scores are in units of log 2."""
    dims = tl.arange(0, HEAD_PAD)
    places = tile * KEYS + tl.arange(0, KEYS)
    if BLOCK_SIZE % KEYS == 0:  # the tile lies in one block
        block = tl.load(block_table_ptr + tile * KEYS // BLOCK_SIZE).to(tl.int64)
        slots = (tile * KEYS) % BLOCK_SIZE + tl.arange(0, KEYS)
        key_offsets = block * key_block_stride + slots * key_slot_stride
        value_offsets = block * value_block_stride + slots * value_slot_stride
    else:
        known = places < context_len + num_nodes
        blocks = tl.load(block_table_ptr + places // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
        slots = places % BLOCK_SIZE
        key_offsets = blocks * key_block_stride + slots * key_slot_stride
        value_offsets = blocks * value_block_stride + slots * value_slot_stride
    key_ptrs = key_ptr + key_offsets[None, :] + dims[:, None]  # [HEAD_PAD, KEYS]
    value_ptrs = value_ptr + value_offsets[:, None] + dims[None, :]  # [KEYS, HEAD_PAD]
    if HEAD_SIZE == HEAD_PAD:
        keys = tl.load(key_ptrs)
    else:
        keys = tl.load(key_ptrs, mask=(dims < HEAD_SIZE)[:, None], other=0.0)
    keys = keys.to(rows.dtype)
    if UPCAST:
        scores = tl.dot(rows.to(tl.float32), keys.to(tl.float32), input_precision="ieee")
    else:
        scores = tl.dot(rows, keys, input_precision="ieee")
    if SOFTCAP:
        # tanh(x) = 2 sigmoid(2 x) - 1
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores * scale / softcap) - 1.0)
        scores = scores * 1.4426950408889634
    else:
        scores = scores * (scale * 1.4426950408889634)
    if MASKED:
        node = places - context_len
        shift = tl.minimum(tl.maximum(node, 0), 63).to(tl.int64)
        bits = (masks[:, None] >> shift[None, :]) & 1
        seen = (node < 0)[None, :] | ((bits == 1) & (node < num_nodes)[None, :])
        if SLIDING_WINDOW > 0:
            in_tree = (node >= 0) & (node < num_nodes)
            key_positions = tl.load(positions_ptr + node, mask=in_tree, other=0).to(tl.int32)
            key_positions = tl.where(in_tree, key_positions, places)
            seen = seen & (key_positions[None, :] > row_positions[:, None] - SLIDING_WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    finite = new_highest
    if MASKED:  # rows that have seen nothing yet
        finite = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp2(scores - finite[:, None])
    decay = tl.exp2(highest - finite)
    weight_sum = weight_sum * decay + tl.sum(weights, axis=1)
    # What was never written may be NaN, which a weight of 0 does not undo.
    if MASKED:
        written = (places < context_len + num_nodes)[:, None] & (dims < HEAD_SIZE)[None, :]
        values = tl.load(value_ptrs, mask=written, other=0.0)
    elif HEAD_SIZE == HEAD_PAD:
        values = tl.load(value_ptrs)
    else:
        values = tl.load(value_ptrs, mask=(dims < HEAD_SIZE)[None, :], other=0.0)
    accumulated = accumulated * decay[:, None]
    if UPCAST:
        values = values.to(tl.float32)
        accumulated = tl.dot(weights, values, accumulated, input_precision="ieee")
    else:
        values = values.to(rows.dtype)
        accumulated = tl.dot(weights.to(rows.dtype), values, accumulated, input_precision="ieee")
    return accumulated, new_highest, weight_sum


@triton.jit
def _attend_kernel(
    query_ptr,
    query_token_stride,
    query_head_stride,
    key_ptr,
    key_block_stride,
    key_head_stride,
    key_slot_stride,
    value_ptr,
    value_block_stride,
    value_head_stride,
    value_slot_stride,
    block_tables_ptr,
    block_tables_stride,
    context_lens_ptr,
    query_starts_ptr,
    ancestors_ptr,
    positions_ptr,
    key_scale_ptr,
    value_scale_ptr,
    outputs_ptr,
    log_sums_ptr,
    num_tokens,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of rows of one request and KV head, over one part of the keys.

    With `log_sums_ptr` the output is that of the part alone, in float32, and its log sum of
    exponentials in base 2 is stored with it: -inf where the part is empty, its output unwritten.
    """
    request = tl.program_id(1) // (NUM_HEADS // GROUP)
    kv_head = (tl.program_id(1) % (NUM_HEADS // GROUP)).to(tl.int64)
    split = tl.program_id(2)
    begin = tl.load(query_starts_ptr + request)
    num_nodes = tl.load(query_starts_ptr + request + 1) - begin
    first_row = tl.program_id(0) * ROWS
    if first_row >= num_nodes * GROUP:
        return
    context_len = tl.load(context_lens_ptr + request)
    row = first_row + tl.arange(0, ROWS)
    real = row < num_nodes * GROUP
    token = (begin + row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    dims = tl.arange(0, HEAD_PAD)
    in_head = dims < HEAD_SIZE
    row_offsets = token * query_token_stride + head * query_head_stride
    rows = tl.load(
        query_ptr + row_offsets[:, None] + dims[None, :],
        mask=real[:, None] & in_head[None, :],
        other=0.0,
    )
    masks = tl.load(ancestors_ptr + token, mask=real, other=0)
    if key_scale_ptr is not None:
        scale = scale * tl.load(key_scale_ptr)

    num_tiles = tl.cdiv(context_len + num_nodes, KEYS)
    first_tile = 0
    unmasked_end = context_len // KEYS
    row_positions = row
    if SLIDING_WINDOW > 0:
        row_positions = tl.load(positions_ptr + token, mask=real, other=2147483647).to(tl.int32)
        first_tile = tl.maximum(tl.min(row_positions, axis=0) - SLIDING_WINDOW + 1, 0) // KEYS
        # The nodes may be anywhere in the window, so every tile with one is looked at.
        first_tile = tl.minimum(first_tile, unmasked_end)
        unmasked_end = 0
    tiles_per_split = tl.cdiv(num_tiles - first_tile, tl.num_programs(2))
    tile_begin = first_tile + split * tiles_per_split
    tile_end = tl.minimum(tile_begin + tiles_per_split, num_tiles)
    unmasked_end = tl.maximum(tl.minimum(unmasked_end, tile_end), tile_begin)

    key_ptr += kv_head * key_head_stride
    value_ptr += kv_head * value_head_stride
    block_table_ptr = block_tables_ptr + request.to(tl.int64) * block_tables_stride
    node_positions_ptr = positions_ptr
    if SLIDING_WINDOW > 0:
        node_positions_ptr = positions_ptr + begin
    accumulated = tl.zeros((ROWS, HEAD_PAD), dtype=tl.float32)
    highest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    weight_sum = tl.zeros((ROWS,), dtype=tl.float32)
    for tile in range(tile_begin, unmasked_end):
        accumulated, highest, weight_sum = _attend_tile(
            accumulated, highest, weight_sum, rows, tile,
            key_ptr, key_block_stride, key_slot_stride,
            value_ptr, value_block_stride, value_slot_stride,
            block_table_ptr, context_len, num_nodes, masks, row_positions, node_positions_ptr,
            scale, softcap, False, SOFTCAP, SLIDING_WINDOW,
            HEAD_SIZE, HEAD_PAD, BLOCK_SIZE, KEYS, UPCAST,
        )  # fmt: skip
    for tile in range(unmasked_end, tile_end):
        accumulated, highest, weight_sum = _attend_tile(
            accumulated, highest, weight_sum, rows, tile,
            key_ptr, key_block_stride, key_slot_stride,
            value_ptr, value_block_stride, value_slot_stride,
            block_table_ptr, context_len, num_nodes, masks, row_positions, node_positions_ptr,
            scale, softcap, True, SOFTCAP, SLIDING_WINDOW,
            HEAD_SIZE, HEAD_PAD, BLOCK_SIZE, KEYS, UPCAST,
        )  # fmt: skip

    outputs = accumulated / tl.where(weight_sum == 0.0, 1.0, weight_sum)[:, None]
    if value_scale_ptr is not None:
        outputs = outputs * tl.load(value_scale_ptr)
    target = split.to(tl.int64) * num_tokens * NUM_HEADS + token * NUM_HEADS + head
    stored = real
    if log_sums_ptr is not None:
        seen_any = weight_sum > 0.0
        log_sums = highest + tl.log2(tl.where(seen_any, weight_sum, 1.0))  # -inf: highest is
        tl.store(log_sums_ptr + target, log_sums, mask=real)
        stored = real & seen_any
    tl.store(
        outputs_ptr + target[:, None] * HEAD_SIZE + dims[None, :],
        outputs.to(outputs_ptr.dtype.element_ty),
        mask=stored[:, None] & in_head[None, :],
    )


@triton.jit
def _combine_kernel(
    part_outputs_ptr,
    log_sums_ptr,
    query_starts_ptr,
    output_ptr,
    num_reqs,
    num_tokens,
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One head of one token: the parts, weighted by their sums of exponentials."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if token >= tl.load(query_starts_ptr + num_reqs):
        return
    splits = tl.arange(0, SPLITS)
    parts = splits.to(tl.int64) * num_tokens * NUM_HEADS + token * NUM_HEADS + head
    log_sums = tl.load(log_sums_ptr + parts, mask=splits < num_splits, other=float("-inf"))
    highest = tl.max(log_sums, axis=0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(log_sums - highest)
    total = tl.sum(weights, axis=0)
    weights = weights / tl.where(total == 0.0, 1.0, total)
    dims = tl.arange(0, HEAD_PAD)
    in_head = dims < HEAD_SIZE
    outputs = tl.load(
        part_outputs_ptr + parts[:, None] * HEAD_SIZE + dims[None, :],
        mask=(log_sums > float("-inf"))[:, None] & in_head[None, :],
        other=0.0,
    )
    output = tl.sum(outputs * weights[:, None], axis=0)
    target = (token * NUM_HEADS + head) * HEAD_SIZE
    tl.store(output_ptr + target + dims, output.to(output_ptr.dtype.element_ty), mask=in_head)


def _check(
    query: Tensor,
    context: PagedContext,
    ancestors: Tensor,
    query_starts: Tensor,
    max_query_len: int,
    num_splits: int | None,
) -> None:
    def refuse(what: str, needed: str) -> None:
        raise ValueError(f"tree_attention: {what}; needed: {needed}")

    if query.ndim != 3 or query.dtype not in QUERY_TYPES or query.stride(2) != 1:
        refuse(
            f"query is {list(query.shape)} {query.dtype} with strides {query.stride()}",
            "[num_tokens, num_heads, head_size] bfloat16, float16 or float32, contiguous heads",
        )
    num_tokens, num_heads, head_size = query.shape
    if head_size % 8 or not 8 <= head_size <= MAX_HEAD_SIZE:
        refuse(f"head size is {head_size}", f"a multiple of 8 up to {MAX_HEAD_SIZE}")
    for name, cache_view in (("keys", context.keys), ("values", context.values)):
        shape = tuple(cache_view.shape)
        if (
            len(shape) != 4
            or shape != tuple(context.keys.shape)
            or shape[3] != head_size
            or num_heads % shape[1]
            or cache_view.stride(3) != 1
            or cache_view.dtype not in (query.dtype, *FP8_TYPES)
            or cache_view.device != query.device
        ):
            refuse(
                f"{name} are {list(shape)} {cache_view.dtype} on {cache_view.device} with strides "
                f"{cache_view.stride()}",
                f"[num_blocks, a divisor of {num_heads}, block_size, {head_size}] {query.dtype} "
                f"or fp8 on {query.device}, last dimension contiguous, keys and values alike",
            )
    num_reqs = query_starts.shape[0] - 1
    tensors = (
        ("ancestors", ancestors, (num_tokens,), (torch.int64, torch.uint64)),
        ("query_starts", query_starts, (num_reqs + 1,), (torch.int32,)),
        ("context_lens", context.context_lens, (num_reqs,), (torch.int32,)),
        (
            "block_tables",
            context.block_tables,
            (num_reqs, context.block_tables.shape[-1]),
            (torch.int32,),
        ),
    )
    for name, tensor, shape, types in tensors:
        contiguous = tensor.shape[-1:] == (1,) or tensor.stride(-1) == 1
        if tuple(tensor.shape) != shape or tensor.dtype not in types or not contiguous:
            refuse(
                f"{name} is {list(tensor.shape)} {tensor.dtype}",
                f"{list(shape)} {types[0]}, contiguous rows",
            )
    if not 1 <= max_query_len <= MAX_NODES:
        refuse(f"max_query_len is {max_query_len}", f"1 to {MAX_NODES}, the bits of a mask")
    if num_splits is not None and not 1 <= num_splits <= MAX_SPLITS:
        refuse(f"num_splits is {num_splits}", f"1 to {MAX_SPLITS}")
    if query.is_cuda and torch.float8_e4m3fn in (context.keys.dtype, context.values.dtype):
        capability = torch.cuda.get_device_capability(query.device)
        if capability < (8, 9):
            raise UnsupportedEngineError(
                f"tree_attention: GPUs of compute capability {capability[0]}.{capability[1]} "
                "cannot read fp8_e4m3 caches; 8.9 and later can. Use kv_cache_dtype fp8_e5m2 "
                "or auto."
            )
