"""The accepted branch moves into place, byte for byte, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm_spec_plugins.triton_kernels.kv_compaction import (
    cache_layers,
    compact_accepted,
    compact_accepted_reference,
)

from vllm_spec_plugins.errors import UnsupportedEngineError

#: Physical order of [layer, block, head, slot, row], as vLLM names them.
LAYOUTS = {
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}


def caches_of(
    layout: str,
    device: torch.device,
    *,
    shape: tuple[int, int, int, int, int] = (2, 9, 2, 16, 64),
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> list[Tensor]:
    """One `[num_blocks, num_heads, block_size, row_size]` view per layer, of random bytes."""
    order = LAYOUTS[layout]
    size = dtype.itemsize
    physical = [shape[axis] for axis in order]
    physical[-1] *= size
    generator = torch.Generator().manual_seed(seed)
    memory = torch.randint(0, 256, physical, dtype=torch.uint8, generator=generator)
    memory = memory.to(device).view(dtype)
    return list(memory.permute([order.index(axis) for axis in range(5)]))


def as_bytes(caches: list[Tensor]) -> Tensor:
    return torch.stack([cache.view(torch.uint8) for cache in caches])


def moved_one_by_one(caches: list[Tensor], tables: Tensor, first: Tensor, nodes: Tensor) -> Tensor:
    """The definition, move by move, in ascending order."""
    after = as_bytes(caches).clone()
    block_size = caches[0].shape[2]
    for request, path in enumerate(nodes.tolist()):
        for step, node in enumerate(path):
            if node <= step:
                continue
            (source, target) = (int(first[request]) + node, int(first[request]) + step)
            if source // block_size >= tables.shape[1]:
                continue
            from_block = int(tables[request, source // block_size])
            to_block = int(tables[request, target // block_size])
            if from_block and to_block:
                row = after[:, from_block, :, source % block_size].clone()
                after[:, to_block, :, target % block_size] = row
    return after


def check(caches: list[Tensor], tables: Tensor, first: Tensor, nodes: Tensor) -> None:
    device = caches[0].device
    arguments = (tables.to(device), first.to(device), nodes.to(device))
    expected = moved_one_by_one(caches, tables, first, nodes)
    reference = [cache.clone() for cache in caches]
    compact_accepted_reference(reference, *arguments)
    assert torch.equal(as_bytes(reference), expected)
    compact_accepted(cache_layers(caches, "FLASH_ATTN"), *arguments)
    assert torch.equal(as_bytes(caches), expected)


def int32(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


#: Three requests over blocks 1 to 8; the second crosses into its next block.
TABLES = int32([[3, 1, 7], [8, 2, 5], [4, 6, 0]])
FIRST = int32([5, 13, 14])
NODES = int32([[0, 2, 5, 9, -1], [1, 3, 4, 5, 9], [0, 1, 2, 3, -1]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, device: torch.device) -> None:
    check(caches_of(layout, device), TABLES, FIRST, NODES)


@pytest.mark.parametrize(
    ("dtype", "row_size"),
    [
        (torch.float8_e4m3fn, 64),
        (torch.float8_e5m2, 64),
        (torch.float32, 64),
        (torch.uint8, 72),  # inline scales: 32 + 4 bytes for K, as many for V
        (torch.uint8, 33),  # no alignment at all: byte by byte
        (torch.bfloat16, 160),
    ],
)
@pytest.mark.parametrize("layout", ["LBHNC", "BLNHC"])
def test_every_type(layout: str, dtype: torch.dtype, row_size: int, device: torch.device) -> None:
    caches = caches_of(layout, device, shape=(2, 9, 2, 16, row_size), dtype=dtype)
    check(caches, TABLES, FIRST, NODES)


def test_rows_longer_than_a_piece(device: torch.device) -> None:
    caches = caches_of("LBNHC", device, shape=(1, 9, 5, 16, 500))
    check(caches, TABLES, FIRST, NODES)


def test_padded_pages(device: torch.device) -> None:
    """Blocks further apart than they are large, as vLLM pads pages of unequal layers."""
    memory = torch.randint(0, 256, (9, 2 * 16 * 64 + 48), dtype=torch.uint8, device=device)
    cache = memory.as_strided((9, 2, 16, 64), (memory.stride(0), 16 * 64, 64, 1))
    check([cache], TABLES, FIRST, NODES)


@pytest.mark.parametrize("path", [[1, 2, 3, 4, 5, 6, 7, 8], [3, 4, 5, 6, 7, 8, 9, 10]])
def test_slots_written_are_read_by_other_moves(path: list[int], device: torch.device) -> None:
    """Chains of moves where each writes what an earlier one has read, within one batch of four
    reads and across two."""
    caches = caches_of("LBHNC", device)
    before = as_bytes(caches).clone()
    nodes = int32([path])
    check(caches, TABLES[:1], FIRST[:1], nodes)
    positions = [5 + node for node in path]
    rows = [before[:, int(TABLES[0, p // 16]), :, p % 16] for p in positions]
    for step, row in enumerate(rows):
        target = 5 + step
        assert torch.equal(as_bytes(caches)[:, int(TABLES[0, target // 16]), :, target % 16], row)


def test_a_wrong_order_would_be_noticed(device: torch.device) -> None:
    """Control: the same moves last to first destroy rows before they are read."""
    caches = caches_of("LBHNC", device)
    path = [1, 2, 3, 4]
    expected = moved_one_by_one(caches, TABLES[:1], FIRST[:1], int32([path]))
    backwards = as_bytes(caches).clone()
    for step in reversed(range(4)):
        backwards[:, 3, :, 5 + step] = backwards[:, 3, :, 5 + path[step]]
    assert not torch.equal(backwards, expected)


def test_null_block_and_unlisted_blocks_stay(device: torch.device) -> None:
    caches = caches_of("LBHNC", device)
    before = as_bytes(caches).clone()
    # The first request's path ends in the null block, the second's past its table.
    compact_accepted(
        cache_layers(caches, "TRITON_ATTN"),
        int32([[3, 0], [4, 5]]).to(device),
        int32([14, 28]).to(device),
        int32([[0, 3], [0, 5]]).to(device),
    )
    assert torch.equal(as_bytes(caches), before)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_to_move(shape: tuple[int, int], device: torch.device) -> None:
    caches = caches_of("LBHNC", device)
    before = as_bytes(caches).clone()
    compact_accepted(
        cache_layers(caches, "FLASHINFER"),
        TABLES[: shape[0]].to(device),
        FIRST[: shape[0]].to(device),
        torch.zeros(shape, dtype=torch.int32, device=device),
    )
    assert torch.equal(as_bytes(caches), before)


@st.composite
def compactions(draw: st.DrawFn) -> tuple[str, tuple, Tensor, Tensor, Tensor, int]:
    block_size = draw(st.sampled_from([1, 7, 16, 48]))
    num_reqs, columns = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    shape = (
        draw(st.integers(1, 2)),
        num_reqs * columns + 1,
        draw(st.integers(1, 3)),
        block_size,
        draw(st.integers(1, 20)),
    )
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    tables = 1 + torch.randperm(num_reqs * columns, generator=generator).view(num_reqs, columns)
    first = torch.tensor([draw(st.integers(0, block_size * columns - 1)) for _ in range(num_reqs)])
    nodes = torch.full((num_reqs, 6), -1, dtype=torch.int32)
    for request in range(num_reqs):
        room = block_size * columns - int(first[request])
        most = min(room, 12)
        path = sorted(draw(st.sets(st.integers(0, most - 1), max_size=6)))
        nodes[request, : len(path)] = torch.tensor(path, dtype=torch.int32)
    return draw(st.sampled_from(sorted(LAYOUTS))), shape, tables.to(torch.int32), first, nodes, seed


@settings(max_examples=40, deadline=None, derandomize=True)
@given(compactions())
def test_any_shape(case: tuple[str, tuple, Tensor, Tensor, Tensor, int]) -> None:
    layout, shape, tables, first, nodes, seed = case
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    caches = caches_of(layout, device, shape=shape, dtype=torch.bfloat16, seed=seed)
    check(caches, tables, first, nodes)


@pytest.mark.parametrize(
    ("backend", "options", "words"),
    [
        ("CPU_ATTN", {}, "packs each block"),
        ("ROCM_AITER_FA", {}, "shuffle"),
        ("MY_ATTN", {}, "not known"),
        ("FLASHINFER", {"cache_dtype": "nvfp4"}, "stored apart"),
        ("TRITON_ATTN", {"cache_dtype": "turboquant_k8v4"}, "no row"),
        ("FLASH_ATTN", {"context_parallel_size": 2}, "context-parallel"),
    ],
)
def test_layouts_it_must_not_touch(
    backend: str, options: dict, words: str, device: torch.device
) -> None:
    with pytest.raises(UnsupportedEngineError, match=words):
        cache_layers(caches_of("LBHNC", device), backend, **options)


def test_views_it_must_not_touch(device: torch.device) -> None:
    caches = caches_of("LBHNC", device)
    wrong = {
        "at least one": [],
        "last dimension": [cache.transpose(2, 3) for cache in caches],
        "MLA": [cache[:, 0] for cache in caches],
        "must agree": [caches[0], caches[1][:, :1]],
        "strides": [caches[0][:1].expand(9, -1, -1, -1)],
    }
    for words, views in wrong.items():
        with pytest.raises(UnsupportedEngineError, match=words):
            cache_layers(views, "FLASH_ATTN")


def test_wrong_arguments(device: torch.device) -> None:
    layers = cache_layers(caches_of("LBHNC", device), "FLASH_ATTN")
    good = [TABLES.to(device), FIRST.to(device), NODES.to(device)]
    wrong = [TABLES.long(), FIRST[:2], NODES.long()]
    for place, name in enumerate(("block_tables", "first_positions", "accepted_nodes")):
        arguments = [wrong[i].to(device) if i == place else good[i] for i in range(3)]
        with pytest.raises(ValueError, match=name):
            compact_accepted(layers, *arguments)
