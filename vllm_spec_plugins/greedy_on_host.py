"""Greedy steps of relaxed rules on the CPU: the rule is asked about mismatches that are reached.

The pass that finds the most likely tokens leaves the largest logit of each span of columns,
from which rules decide nearly always (`compiled_greedy`). The rest is a few calls: next to passes
that take microseconds a row, many small operations on tensors would be most of the step.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .verifier import Verification, VerifyInput
from .vocabulary_passes import first_argmax

if TYPE_CHECKING:
    from .compiled_greedy import Mismatches


@cache
def kernels() -> ModuleType:
    """`compiled_greedy`; numba is not loaded before it is needed."""
    from . import compiled_greedy

    return compiled_greedy


def mismatches(batch: VerifyInput, exact: Tensor | None, agreeing: int = 0) -> Tensor:
    """`[M]` int64 rows of drafted tokens that are not the most likely ones and may stand.

    Args:
        batch: The step; all requests are greedy, and `span_maxima` is there.
        exact: `[R]` bool, requests verified exactly; None: none.
        agreeing: How many draft tokens after a mismatch must be the most likely ones.
    """
    none = np.empty(0, dtype=np.bool_)
    rows = np.empty(len(batch.draft_token_ids), dtype=np.int64)
    count = kernels().find_mismatches(
        _step(batch, rows), none if exact is None else exact.numpy(), agreeing, rows
    )
    return torch.from_numpy(rows[:count])


def decide(batch: VerifyInput, rows: Tensor, rule: str, *settings: Any) -> Tensor:
    """`[M]` bool, what a function of `compiled_greedy` says of some of the mismatches.

    Args:
        batch: The step.
        rows: `[M]` int64, rising, from `mismatches`.
        rule: Name of the function.
        settings: What it takes beside `Mismatches` and its result.
    """
    stands = np.empty(len(rows), dtype=np.bool_)
    getattr(kernels(), rule)(_step(batch, rows.numpy()), *settings, stands)
    return torch.from_numpy(stands)


def lay_out(batch: VerifyInput, rows: Tensor, stands: Tensor) -> Verification:
    """The verification in which some mismatches stand and all others do not.

    Args:
        batch: The step.
        rows: `[M]` int64, rising, from `mismatches`.
        stands: `[M]` bool.
    """
    requests = len(batch.num_draft)
    token_ids = np.empty((requests, batch.max_num_draft + 1), dtype=np.int64)
    accepted = np.empty(requests, dtype=np.int64)
    extra = np.empty(len(batch.draft_token_ids), dtype=np.float32)
    bonus = first_argmax(batch.bonus_logits)
    kernels().lay_out(
        _step(batch, rows.numpy()), stands.numpy(), bonus.numpy(), token_ids, accepted, extra
    )
    return Verification(*map(torch.from_numpy, (token_ids, accepted, extra)))


def _step(batch: VerifyInput, rows: Any) -> Mismatches:
    maxima = batch.span_maxima
    assert maxima is not None
    return kernels().Mismatches(
        rows,
        batch.num_draft.contiguous().numpy(),
        batch.draft_token_ids.contiguous().numpy(),
        batch.greedy_token_ids.numpy(),
        batch.target_logits.detach().numpy(),
        maxima.numpy(),
    )
