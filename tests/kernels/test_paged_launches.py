"""Kernels of the paged cache outside the interpreter: what they launch, and what runs without."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from vllm_spec_plugins.triton_kernels.kv_compaction import cache_layers, compact_accepted
from vllm_spec_plugins.triton_kernels.suffix_match import PART, suffix_match
from vllm_spec_plugins.triton_kernels.tree_attention import (
    PagedContext,
    block_ancestors,
    tree_attention,
)

pytest.importorskip("triton")

from vllm_spec_plugins.testing.offline_compile import record_launches


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_compaction_is_one_launch_however_many_layers() -> None:
    caches = [meta(64, 2, 16, 64, dtype=torch.bfloat16)] * 30
    layers = cache_layers(caches, "FLASH_ATTN")
    (launch,) = record_launches(lambda: compact_accepted(layers, meta(5, 8), meta(5), meta(5, 4)))
    assert launch.grid == (5, 1, 30)


@pytest.mark.parametrize(("max_num_tokens", "parts"), [(PART, 1), (PART + 1, 2), (5 * PART, 5)])
def test_the_grid_of_a_match_follows_real_lengths(max_num_tokens: int, parts: int) -> None:
    launches = record_launches(
        lambda: suffix_match(
            meta(7, 10 * PART),
            meta(7),
            min_match=1,
            max_match=4,
            num_draft=3,
            max_num_tokens=max_num_tokens,
        )
    )
    assert launches[0].grid == (7, parts)
    assert len(launches) == (1 if parts == 1 else 2)


def attend(num_reqs: int, max_context_len: int, num_splits: int | None) -> list[tuple[int, ...]]:
    cache = meta(64, 8, 16, 128, dtype=torch.bfloat16)
    context = PagedContext(cache, cache, meta(num_reqs, 64), meta(num_reqs), max_context_len)
    launches = record_launches(
        lambda: tree_attention(
            meta(num_reqs * 8, 32, 128, dtype=torch.bfloat16),
            context,
            meta(num_reqs * 8, dtype=torch.int64),
            meta(num_reqs + 1),
            max_query_len=8,
            scale=1.0,
            num_splits=num_splits,
        )
    )
    return [launch.grid for launch in launches]


def test_long_contexts_of_few_requests_are_split() -> None:
    assert attend(64, 8192, None) == [(1, 512, 1)]
    assert attend(1, 100, None) == [(1, 8, 1)]
    assert attend(1, 8192, None) == [(1, 8, 32), (8, 32)]
    assert attend(1, 8192, 5) == [(1, 8, 5), (8, 32)]


def test_attention_on_the_cpu_is_the_reference() -> None:
    cache = torch.randn(3, 1, 16, 16)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    tables, lens = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([20], dtype=torch.int32)
    query = torch.randn(4, 2, 16)
    found = tree_attention(
        query,
        PagedContext(cache, cache, tables, lens, 20),
        block_ancestors(starts, 4),
        starts,
        max_query_len=4,
        scale=0.25,
    )
    keys = cache[1:, 0].flatten(0, 1)[:24]  # the block sees all there is
    expected = torch.softmax(query @ keys.T * 0.25, dim=-1) @ keys
    torch.testing.assert_close(found, expected)


def test_they_import_and_run_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from vllm_spec_plugins.triton_kernels import kv_compaction, suffix_match, tree_attention\n"
        "import torch; one = torch.tensor([3], dtype=torch.int32)\n"
        "match = suffix_match.suffix_match(torch.tensor([[7, 8, 7]]), one, min_match=1,\n"
        "                                  max_match=2, num_draft=2)\n"
        "assert match.token_ids.tolist() == [[8, 7]]\n"
        "cache = torch.arange(64.0).view(2, 1, 32, 1)\n"
        "layers = kv_compaction.cache_layers([cache], 'FLASH_ATTN')\n"
        "table, path = one.view(1, 1) - 2, torch.tensor([[0, 3, 5]], dtype=torch.int32)\n"
        "kv_compaction.compact_accepted(layers, table, one, path)\n"
        "assert cache[1, 0, 3:6, 0].tolist() == [35, 38, 40]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
