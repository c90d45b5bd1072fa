"""One launch for short histories, two for long ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from vllm_spec_plugins.triton_kernels.suffix_match import suffix_match


def match(max_model_len: int, dtype: torch.dtype) -> None:
    suffix_match(
        torch.empty(64, max_model_len, dtype=dtype, device="meta"),
        torch.empty(64, dtype=torch.int32, device="meta"),
        min_match=2,
        max_match=8,
        num_draft=8,
        repeat=True,
    )


def match_slots(max_model_len: int) -> None:
    """As `ngram_adaptive` asks."""
    suffix_match(
        torch.empty(256, max_model_len, dtype=torch.int32, device="meta"),
        torch.empty(64, dtype=torch.int64, device="meta"),
        min_match=1,
        max_match=32,
        num_draft=6,
        rows=torch.empty(64, dtype=torch.int64, device="meta"),
        repeat=True,
    )


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    yield "8k", lambda: match(8192, torch.int32)
    yield "128k", lambda: match(131072, torch.int32)
    yield "8k_int64", lambda: match(8192, torch.int64)
    yield "slots_8k", lambda: match_slots(8192)
    yield "slots_128k", lambda: match_slots(131072)
