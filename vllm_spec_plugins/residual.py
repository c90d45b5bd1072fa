"""What the target's law leaves for the token after a rejection."""

from __future__ import annotations

import torch
from torch import Tensor

from .row_choice import replace_rows
from .verifier import VerifyInput


def unclaimed(
    batch: VerifyInput, rows: Tensor, scale: Tensor | None = None, f: Tensor | None = None
) -> Tensor:
    """What the target's law leaves after the draft's accepted share: [scale p - q f]+.

    Args:
        batch: The step.
        rows: `[M]` int64, some of the N rows. A placeholder has q = 0.
        scale: `[M]` factor on p; None = 1.
        f: `[M, V]` acceptance of every token; None where it is at least min(1, p/q), in which
            case q itself gives the same.

    Returns:
        `[M, V]`; all 0 where p and q are equal.
    """
    left = torch.softmax(batch.target_logits.index_select(0, rows), dim=-1)
    if scale is not None:
        left *= scale.unsqueeze(1)
    ids = batch.draft_token_ids[rows].unsqueeze(1)
    if batch.draft_probabilities is None:
        column = ids.clamp(min=0)
        # q f is f(x) at the draft token and nothing elsewhere.
        share = left.gather(1, column) if f is None else f.gather(1, column)
        left.scatter_add_(1, column, torch.where(ids >= 0, -share, 0))
    else:
        q = batch.draft_probabilities.dense(rows, ids.squeeze(1), left.shape[1]).to(left.dtype)
        left = left.sub_(q) if f is None else left.addcmul_(q, f, value=-1)
    return left.clamp_(min=0)


def residual_weights(
    batch: VerifyInput, rows: Tensor, *, scale: Tensor | None = None, f: Tensor | None = None
) -> Tensor:
    """`[M, V]` weights of the token after a rejection: `unclaimed`, and p where that is nothing.

    p and q equal up to rounding leave nothing; a rejection is then itself rounding.
    """
    left = unclaimed(batch, rows, scale, f)
    return or_target_law(batch, rows, left)


def or_target_law(batch: VerifyInput, rows: Tensor, weights: Tensor) -> Tensor:
    """`[M, V]` weights at some of the N rows, used up; p where a row is nothing but 0."""
    return replace_rows(
        weights,
        weights.sum(dim=-1) <= 0,
        lambda empty: torch.softmax(batch.target_logits.index_select(0, rows[empty]), dim=-1),
    )
