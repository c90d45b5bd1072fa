"""Compaction of a Llama-like model's caches: bf16, fp8, and fp8 with inline scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from vllm_spec_plugins.triton_kernels.kv_compaction import cache_layers, compact_accepted


def compact(dtype: torch.dtype, row_size: int) -> None:
    caches = [
        torch.empty(64, 16, 8, row_size, dtype=dtype, device="meta").transpose(1, 2)
        for _ in range(2)
    ]
    compact_accepted(
        cache_layers(caches, "FLASH_ATTN"),
        torch.empty(8, 16, dtype=torch.int32, device="meta"),
        torch.empty(8, dtype=torch.int64, device="meta"),
        torch.empty(8, 8, dtype=torch.int32, device="meta"),
    )


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    yield "bf16", lambda: compact(torch.bfloat16, 256)
    yield "fp8", lambda: compact(torch.float8_e4m3fn, 256)
    yield "inline_scales", lambda: compact(torch.uint8, 264)
