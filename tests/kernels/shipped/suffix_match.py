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


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    yield "8k", lambda: match(8192, torch.int32)
    yield "128k", lambda: match(131072, torch.int32)
    yield "8k_int64", lambda: match(8192, torch.int64)
