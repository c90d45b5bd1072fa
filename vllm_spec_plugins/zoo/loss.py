"""Cross entropy of a linear head, without ever holding all logits.

The logits of a training step (2,048 positions x 8,192 tokens) are 64 MB, and softmax, its
gradient and the gradient's two products each walk them through main memory. Here a chunk of
rows is made, turned into its own gradient in place, multiplied back and forgotten.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Rows per chunk: 512 x 8,192 float32 logits are 16 MB.
_CHUNK = 512


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        gradient_hidden = torch.empty_like(hidden)
        gradient_head = torch.zeros_like(head)
        losses = torch.empty_like(weights)
        head_low = head.to(dtype)
        for start in range(0, len(hidden), _CHUNK):
            rows = slice(start, start + _CHUNK)
            h, y = hidden[rows].to(dtype), targets[rows, None]
            logits = (h @ head_low.T).float()
            log_total = logits.logsumexp(-1, keepdim=True)
            losses[rows] = (log_total - logits.gather(1, y)).squeeze(1)
            # d loss / d logits = softmax - one_hot, in the memory of the logits.
            gradient = logits.sub_(log_total).exp_()
            gradient.scatter_add_(1, y, gradient.new_full(y.shape, -1.0))
            low = gradient.mul_(weights[rows, None]).to(dtype)
            gradient_hidden[rows] = (low @ head_low).to(hidden.dtype)
            gradient_head += low.T @ h
        ctx.save_for_backward(gradient_hidden, gradient_head)
        ctx.mark_non_differentiable(losses)
        return losses @ weights, losses

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        gradient_hidden, gradient_head = ctx.saved_tensors
        return gradient_hidden * upstream, gradient_head * upstream, None, None, None


def head_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weighted sum of `-log softmax(hidden @ head.T)[target]`.

    Args:
        hidden: `[N, H]`, any float dtype.
        head: `[V, H]` float32.
        targets: `[N]` int64.
        weights: `[N]` float32, weight of each row in the sum.
        dtype: What the matrix products are done in.

    Returns:
        The weighted sum, a differentiable scalar, and each row's loss `[N]` float32,
        which is not differentiable.
    """
    return _HeadCrossEntropy.apply(hidden, head, targets, weights, dtype)  # pyright: ignore[reportReturnType]
