"""Tree attention at the head sizes of common models, with few rows and with many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import patch

import torch
from vllm_spec_plugins.triton_kernels import tree_attention as module
from vllm_spec_plugins.triton_kernels.tree_attention import PagedContext, tree_attention


def attend(
    head_size: int,
    *,
    num_nodes: int = 64,
    group: int = 4,
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    num_splits: int = 1,
    softcap: float = 0.0,
    sliding_window: int | None = None,
) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    cache = empty(64, block_size, 8, 2 * head_size, dtype=cache_dtype or dtype).transpose(1, 2)
    keys, values = cache.split(head_size, dim=-1)
    fp8 = cache_dtype is not None
    scale = empty(1, dtype=torch.float32) if fp8 else None
    num_tokens = 4 * num_nodes
    tree_attention(
        empty(num_tokens, 8 * group, head_size, dtype=dtype),
        PagedContext(keys, values, empty(4, 512), empty(4), 8192, scale, scale),
        empty(num_tokens, dtype=torch.int64),
        empty(5),
        max_query_len=num_nodes,
        scale=head_size**-0.5,
        softcap=softcap,
        sliding_window=sliding_window,
        positions=empty(num_tokens, dtype=torch.int64) if sliding_window else None,
        num_splits=num_splits,
    )


LARGE, SMALL = ("sm_90", "sm_100"), ("sm_80", "gfx942")


def with_small_tiles(run: Callable[[], None]) -> None:
    with patch.object(module, "_large_tiles", lambda _: False):
        run()


FP8 = torch.float8_e4m3fn
CONFIGURATIONS: dict[str, Callable[[], None]] = {
    "head128_64_nodes": lambda: attend(128),
    "head256_softcap_window": lambda: attend(256, group=2, softcap=50.0, sliding_window=4096),
    "head128_8_nodes_split": lambda: attend(128, num_nodes=8, num_splits=8),
    "head128_16_nodes": lambda: attend(128, num_nodes=16),
    "head128_16_nodes_fp8_e5m2": lambda: attend(128, num_nodes=16, cache_dtype=torch.float8_e5m2),
    "head128_8_nodes_fp8_e5m2": lambda: attend(128, num_nodes=8, cache_dtype=torch.float8_e5m2),
    "head256_fp8_e5m2": lambda: attend(256, group=2, cache_dtype=torch.float8_e5m2),
    "head128_4_nodes_no_group_fp8_e5m2": lambda: attend(
        128, num_nodes=4, group=1, cache_dtype=torch.float8_e5m2
    ),
    "head128_4_nodes_no_group": lambda: attend(128, num_nodes=4, group=1),
    "head128_blocks_of_64": lambda: attend(128, block_size=64),
    "head128_fp32": lambda: attend(128, dtype=torch.float32),
    "head128_fp8_e5m2": lambda: attend(128, cache_dtype=torch.float8_e5m2),
    "head64": lambda: attend(64),
    "head256_split": lambda: attend(256, num_nodes=16, group=2, num_splits=32),
}
SLOW = {
    f"{name}.{tiles}"
    for name in list(CONFIGURATIONS)[2:]
    for tiles in ("large_tiles", "small_tiles")
}


def launches() -> Iterator[tuple[str, Callable[[], object], tuple[str, ...]]]:
    """Every configuration at the tiles of Hopper and later, and at those of the others."""
    for name, run in CONFIGURATIONS.items():
        yield f"{name}.large_tiles", run, LARGE
        yield f"{name}.small_tiles", partial(with_small_tiles, run), SMALL
    yield "head128_fp8_e4m3.large_tiles", lambda: attend(128, cache_dtype=FP8), LARGE
