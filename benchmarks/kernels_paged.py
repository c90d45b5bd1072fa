"""Benchmark cases of the kernels that read the paged cache and the token history.

Peers: for compaction, indexed copies layer by layer, eager and compiled; for tree attention,
FlashAttention from vLLM with a causal mask over the same pages (the same work, less the mask) and
PyTorch's attention with a mask over keys gathered beforehand; for suffix match, vLLM's
`ngram_gpu` compiled as vLLM compiles it, and our reference, compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import torch
from kernel_case import KernelCase
from torch import Tensor
from vllm_spec_plugins.triton_kernels.kv_compaction import (
    cache_layers,
    compact_accepted,
    compact_accepted_reference,
)
from vllm_spec_plugins.triton_kernels.suffix_match import suffix_match, suffix_match_reference
from vllm_spec_plugins.triton_kernels.tree_attention import (
    PagedContext,
    tree_ancestors,
    tree_attention,
    tree_attention_reference,
)

from vllm_spec_plugins.testing.offline_compile import record_launches

BLOCK_SIZE = 16


def cases(device: torch.device) -> Iterator[KernelCase]:
    """Every case, smallest first; each makes its tensors when it is asked for."""
    for num_requests in (1, 8, 64, 256):
        yield compaction(device, num_requests)
    for num_requests, context_len in ((1, 1024), (1, 8192), (8, 8192), (64, 2048)):
        for num_nodes in (4, 16, 64):
            yield attention(device, num_requests, context_len, num_nodes)
    for num_requests, num_tokens in ((1, 8192), (64, 1024), (64, 8192), (8, 131072)):
        yield matching(device, num_requests, num_tokens)


def block_tables(num_requests: int, columns: int, device: torch.device) -> Tensor:
    """Blocks in random order, as in a cache that has been used."""
    generator = torch.Generator().manual_seed(0)
    blocks = 1 + torch.randperm(num_requests * columns, generator=generator)
    return blocks.view(num_requests, columns).to(torch.int32).to(device)


def compaction(
    device: torch.device,
    num_requests: int,
    *,
    num_layers: int = 32,
    num_heads: int = 8,
    head_size: int = 128,
    num_moved: int = 4,
) -> KernelCase:
    """A bf16 model of 8 B parameters; each path moves 4 nodes after its root."""
    columns = 8
    num_blocks = num_requests * columns + 1
    shape = (num_layers, num_blocks, BLOCK_SIZE, num_heads, 2 * head_size)
    memory = torch.randn(shape, dtype=torch.bfloat16, device=device)
    caches = list(memory.transpose(2, 3))
    tables = block_tables(num_requests, columns, device)
    first = torch.full((num_requests,), 40, dtype=torch.int32, device=device)
    path = [0, *range(2, 2 + 3 * num_moved, 3)]
    nodes = torch.tensor([path], dtype=torch.int32, device=device).repeat(num_requests, 1)
    layers = cache_layers(caches, "FLASH_ATTN")

    sources = (first.unsqueeze(1) + nodes).long()
    targets = first.unsqueeze(1) + torch.arange(len(path), device=device)
    from_block = tables.gather(1, sources // BLOCK_SIZE)[:, 1:].long()
    to_block = tables.gather(1, targets // BLOCK_SIZE)[:, 1:].long()
    from_offset, to_offset = (sources % BLOCK_SIZE)[:, 1:], (targets % BLOCK_SIZE)[:, 1:]

    def layer_by_layer() -> None:
        for cache in caches:
            cache[to_block, :, to_offset] = cache[from_block, :, from_offset]

    def check() -> None:
        expected = [cache.clone() for cache in caches]
        compact_accepted_reference(expected, tables, first, nodes)
        compact_accepted(layers, tables, first, nodes)
        for cache, wanted in zip(caches, expected, strict=True):
            assert torch.equal(cache, wanted)

    row_bytes = num_heads * 2 * head_size * 2
    return KernelCase(
        kernel="kv_compaction",
        shape={"requests": num_requests, "layers": num_layers, "moved": num_moved, "dtype": "bf16"},
        run=lambda: compact_accepted(layers, tables, first, nodes),
        launches=1,
        minimum_bytes=2 * num_layers * num_requests * num_moved * row_bytes,
        check=check,
        peers={
            "layer by layer": layer_by_layer,
            "layer by layer, torch.compile": torch.compile(layer_by_layer),
        },
    )


def attention(
    device: torch.device,
    num_requests: int,
    context_len: int,
    num_nodes: int,
    *,
    num_kv_heads: int = 8,
    group: int = 4,
    head_size: int = 128,
) -> KernelCase:
    """One layer of a bf16 model of 8 B parameters; random trees, all contexts alike."""
    generator = torch.Generator().manual_seed(0)
    num_keys = context_len + num_nodes
    columns = -(-num_keys // BLOCK_SIZE)
    rows = torch.randn(
        (num_requests * columns + 1, BLOCK_SIZE, num_kv_heads, 2 * head_size),
        dtype=torch.bfloat16,
        device=device,
    )
    keys, values = rows.transpose(1, 2).split(head_size, dim=-1)
    tables = block_tables(num_requests, columns, device)
    lens = torch.full((num_requests,), context_len, dtype=torch.int32, device=device)
    starts = torch.arange(num_requests + 1, dtype=torch.int32, device=device) * num_nodes
    node = torch.arange(num_nodes)
    parents = (torch.rand(num_requests, num_nodes, generator=generator) * node).long()
    parents[:, 0] = -1
    ancestors = tree_ancestors(parents.flatten().to(device), starts)
    shape = (num_requests * num_nodes, num_kv_heads * group, head_size)
    query = torch.randn(shape, dtype=torch.bfloat16, device=device)
    context = PagedContext(keys, values, tables, lens, context_len)
    scale = head_size**-0.5

    def run() -> Tensor:
        return tree_attention(
            query, context, ancestors, starts, max_query_len=num_nodes, scale=scale
        )

    def check() -> None:
        expected = tree_attention_reference(query, context, ancestors, starts, scale=scale)
        assert (run().float() - expected.float()).abs().max() < 2e-2

    dense = _dense_attention(query, context, ancestors, num_requests, num_nodes, scale)
    peers: dict[str, Callable[[], object]] = {"torch, masked, keys gathered before": dense}
    flash = _flash_attention(query, context, starts, num_nodes, scale)
    if flash is not None:
        peers["FlashAttention, causal"] = flash
    cache_bytes = num_requests * num_keys * num_kv_heads * 2 * head_size * 2
    return KernelCase(
        kernel="tree_attention",
        shape={
            "requests": num_requests,
            "context": context_len,
            "nodes": num_nodes,
            "dtype": "bf16",
        },
        run=run,
        launches=len(record_launches(run)),
        minimum_bytes=cache_bytes + 2 * query.numel() * 2,
        check=check,
        peers=peers,
    )


def _dense_attention(
    query: Tensor,
    context: PagedContext,
    ancestors: Tensor,
    num_requests: int,
    num_nodes: int,
    scale: float,
) -> Callable[[], object]:
    num_keys = context.max_context_len + num_nodes

    def gathered(cache: Tensor) -> Tensor:
        pages = cache[
            context.block_tables.long()
        ]  # [num_requests, blocks, heads, slots, head_size]
        return pages.permute(0, 2, 1, 3, 4).flatten(2, 3)[:, :, :num_keys].contiguous()

    keys, values = gathered(context.keys), gathered(context.values)
    nodes = torch.arange(num_nodes, device=query.device)
    seen = torch.ones(num_requests, num_nodes, num_keys, dtype=torch.bool, device=query.device)
    bits = (ancestors.unsqueeze(1) >> nodes) & 1
    seen[:, :, context.max_context_len :] = (bits == 1).view(num_requests, num_nodes, num_nodes)
    rows = query.view(num_requests, num_nodes, *query.shape[1:]).transpose(1, 2)
    return partial(
        torch.nn.functional.scaled_dot_product_attention,
        rows, keys, values, attn_mask=seen.unsqueeze(1), scale=scale, enable_gqa=True,
    )  # fmt: skip


def _flash_attention(
    query: Tensor, context: PagedContext, starts: Tensor, num_nodes: int, scale: float
) -> Callable[[], object] | None:
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    num_keys = context.max_context_len + num_nodes
    return partial(
        flash_attn_varlen_func,
        query,
        context.keys.transpose(1, 2),
        context.values.transpose(1, 2),
        max_seqlen_q=num_nodes,
        cu_seqlens_q=starts,
        max_seqlen_k=num_keys,
        seqused_k=context.context_lens + num_nodes,
        block_table=context.block_tables,
        softmax_scale=scale,
        causal=True,
    )


def matching(device: torch.device, num_requests: int, num_tokens: int) -> KernelCase:
    """Random text that repeats itself, in rows of its own length."""
    generator = torch.Generator().manual_seed(0)
    history = torch.randint(0, 2000, (num_requests, num_tokens), generator=generator)
    history[:, -6:] = history[:, num_tokens // 2 : num_tokens // 2 + 6]
    history = history.to(torch.int32).to(device)
    lengths = torch.full((num_requests,), num_tokens, dtype=torch.int32, device=device)
    options = {"min_match": 2, "max_match": 8, "num_draft": 8, "max_num_tokens": num_tokens}
    run = partial(suffix_match, history, lengths, **options)
    reference = partial(suffix_match_reference, history, lengths, **options)

    def check() -> None:
        for found, expected in zip(run(), reference(), strict=True):
            assert torch.equal(found, expected)

    peers: dict[str, Callable[[], object]] = {
        "reference, torch.compile": partial(
            torch.compile(suffix_match_reference), history, lengths, **options
        )
    }
    ngram_gpu = _ngram_gpu(history, lengths)
    if ngram_gpu is not None:
        peers["vLLM ngram_gpu"] = ngram_gpu
    return KernelCase(
        kernel="suffix_match",
        shape={"requests": num_requests, "tokens": num_tokens},
        run=run,
        launches=1 if num_tokens <= 16384 else 2,
        minimum_bytes=4 * num_requests * num_tokens,
        check=check,
        peers=peers,
    )


def _ngram_gpu(history: Tensor, lengths: Tensor) -> Callable[[], object] | None:
    try:
        from vllm.v1.spec_decode.ngram_proposer_gpu import NgramGPUKernel
    except ImportError:
        return None
    find: Callable[..., object] = NgramGPUKernel._find_first_and_extract_all_n_parallel
    return partial(torch.compile(find), SimpleNamespace(), history, lengths, 2, 8, 8)
