"""Launches of `ranked_lm_head` at the sizes it is meant for: 32k of 128k rows, 4096 features."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from vllm_spec_plugins.triton_kernels.ranked_lm_head import Noise, ranked_lm_head

HIDDEN, RANKED = 4096, 32_768

SLOW = {"drawn_64_rows", "best_8_columns"}


def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def noise(rows: int) -> Noise:
    integers = meta(rows, dtype=torch.int64)
    return Noise(meta(rows, dtype=torch.float32), integers, integers, 0)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    weight = meta(RANKED, HIDDEN)
    yield "best_of_8_rows", lambda: ranked_lm_head(meta(8, HIDDEN), weight, rounded=True)
    yield (
        "drawn_64_rows",
        lambda: ranked_lm_head(meta(64, HIDDEN), weight, noise=noise(64), keep_logits=True),
    )
    yield "best_8_columns", lambda: ranked_lm_head(meta(8, HIDDEN), weight, num_columns=8)
