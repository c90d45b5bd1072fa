"""The token after the accepted ones is drawn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .random_numbers import Purpose
from .row_choice import may_look
from .verifier import VerifyInput
from .vocabulary_passes import drawn_columns, first_argmax, is_compiled

#: Columns summed at once by `sample_weights`, and most columns of one running sum.
_SPAN = 512
_SHORT = 16_384


def draw_next(
    batch: VerifyInput,
    accepted: Tensor,
    residual: Callable[[VerifyInput, Tensor], Tensor],
) -> Tensor:
    """The token after the accepted ones: from the residual after a rejection, else the bonus.

    Only one row per request is ever made full width; on a device, which of a request's two that is
    is not looked at, and both are.

    Args:
        batch: The step.
        accepted: `[R]` draft tokens that stand.
        residual: Gives `[M, V]` weights for M rows of the N.

    Returns:
        `[R]` int64.
    """
    if not may_look(accepted):
        return _draw_next_unseen(batch, accepted, residual)
    drawn = torch.empty_like(accepted)
    rejected = accepted < batch.num_draft
    rows = batch.first + accepted  # of the N, where a token was rejected
    if batch.any_greedy:
        chosen = (batch.greedy & rejected).nonzero().squeeze(1)
        drawn[chosen] = batch.greedy_token_ids[rows[chosen]]
        chosen = (batch.greedy & ~rejected).nonzero().squeeze(1)
        drawn[chosen] = first_argmax(batch.bonus_logits.index_select(0, chosen))
    if not batch.all_greedy:
        u = batch.uniforms(Purpose.RESAMPLE)
        chosen = (~batch.greedy & rejected).nonzero().squeeze(1)
        drawn[chosen] = sample_weights(residual(batch, rows[chosen]), u[chosen])
        chosen = (~batch.greedy & ~rejected).nonzero().squeeze(1)
        bonus = torch.softmax(batch.bonus_logits.index_select(0, chosen), dim=-1)
        drawn[chosen] = sample_weights(bonus, u[chosen])
    return drawn


def _draw_next_unseen(
    batch: VerifyInput,
    accepted: Tensor,
    residual: Callable[[VerifyInput, Tensor], Tensor],
) -> Tensor:
    """`draw_next` for every request as if rejected and as if not, of which one is taken."""
    rejected, drafted = accepted < batch.num_draft, len(batch.draft_token_ids)
    rows = (batch.first + accepted).clamp(max=max(drafted - 1, 0))
    drawn = likeliest = torch.empty_like(accepted)
    if batch.any_greedy:
        likeliest = first_argmax(batch.bonus_logits)
        if drafted:
            likeliest = torch.where(rejected, batch.greedy_token_ids[rows], likeliest)
    if not batch.all_greedy:
        weights = torch.softmax(batch.bonus_logits, dim=-1)
        if drafted:
            weights = torch.where(rejected.unsqueeze(1), residual(batch, rows), weights)
        drawn = sample_weights(weights, batch.uniforms(Purpose.RESAMPLE))
    return torch.where(batch.greedy, likeliest, drawn)


def sample_weights(weights: Tensor, u: Tensor) -> Tensor:
    """Inverse transform sampling: one uniform per row, no noise per token.

    Over a large vocabulary, finds the span of columns first and the token inside it second,
    so that the running sum, which does not vectorise, is short; on the CPU in one compiled pass.

    Args:
        weights: `[M, V]` non-negative, not normalised, each row with a positive sum.
        u: `[M]` float64 in (0, 1).

    Returns:
        `[M]` int64; a token of weight zero is never returned.
    """
    if is_compiled(weights):
        return drawn_columns(weights, u)
    rows, width = weights.shape
    if width <= _SHORT:
        running = weights.cumsum(dim=-1, dtype=torch.float64)
        total = running[:, -1:]
        value = torch.minimum(u.unsqueeze(1) * total, _below(total))
        # Only where the weights are no numbers is nothing found.
        return torch.searchsorted(running, value, right=True).squeeze(1).clamp_(max=width - 1)
    span = _SPAN
    whole = width // span * span
    sums = weights[:, :whole].reshape(rows, width // span, span).sum(dim=-1)
    if whole < width:
        sums = torch.cat([sums, weights[:, whole:].sum(dim=-1, keepdim=True)], dim=1)
    cumulative = sums.cumsum(dim=-1, dtype=torch.float64)
    which, remaining = _first_above(cumulative, u * cumulative[:, -1])
    columns = which.unsqueeze(1) * span + torch.arange(span, device=weights.device)
    inside = weights.gather(1, columns.clamp(max=width - 1))
    inside = inside.masked_fill(columns >= width, 0)
    token, _ = _first_above(inside.cumsum(dim=-1, dtype=torch.float64), remaining)
    return (which * span + token).clamp(max=width - 1)


def _below(total: Tensor) -> Tensor:
    """The next smaller number: what rounding lifted to the total counts as just below it."""
    return torch.nextafter(total, torch.zeros_like(total))


def _first_above(cumulative: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Per row, the first column whose running sum exceeds `value`, and what `value` has left.

    A value that rounding lifted to the total or past it counts as just below the total.
    """
    total = cumulative[:, -1]
    value = torch.minimum(value, _below(total)).unsqueeze(1)
    column = torch.searchsorted(cumulative, value, right=True)
    column = column.clamp(max=cumulative.shape[1] - 1)
    before = torch.where(column > 0, cumulative.gather(1, (column - 1).clamp(min=0)), 0.0)
    return column.squeeze(1), (value - before).squeeze(1)
