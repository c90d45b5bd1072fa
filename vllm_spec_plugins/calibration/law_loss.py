"""Loss of a linear head against given laws, without ever holding all logits or all laws.

Several drafts predict the same token of a text: they are taken together, so that its law is
computed once. A chunk of logits is made, turned into its own gradient in place, multiplied back
and forgotten, as in `zoo/loss.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Logits held at once: 16 MB of float32.
_CHUNK_ELEMENTS = 1 << 22

#: Laws of some of the tokens to predict: their numbers `[n]` to probabilities `[n, V]` float32.
Law = Callable[[Tensor], Tensor]


class _LawLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, tokens: Tensor, weights: Tensor, law: Law
    ) -> tuple[Tensor, Tensor]:
        order = tokens.argsort(stable=True)
        gradient_hidden, gradient_head = torch.empty_like(hidden), torch.zeros_like(head)
        divergences = torch.empty_like(weights)
        for rows in order.split(max(1, _CHUNK_ELEMENTS // len(head))):
            wanted, which = tokens[rows].unique_consecutive(return_inverse=True)
            p = law(wanted)
            entropy = -torch.special.xlogy(p, p).sum(-1)
            p, h = p[which], hidden[rows]
            logits = (h @ head.T).float()
            log_total = logits.logsumexp(-1, keepdim=True)
            # KL(p, q) = log sum exp - sum p * logits - entropy of p
            divergences[rows] = log_total[:, 0] - torch.linalg.vecdot(p, logits) - entropy[which]
            # d KL / d logits = q - p, in the memory of the logits.
            gradient = logits.sub_(log_total).exp_().sub_(p).mul_(weights[rows, None])
            gradient = gradient.to(h.dtype)
            gradient_hidden[rows] = gradient @ head
            gradient_head += gradient.T @ h
        ctx.save_for_backward(gradient_hidden, gradient_head)
        ctx.mark_non_differentiable(divergences)
        return divergences @ weights, divergences

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        gradient_hidden, gradient_head = ctx.saved_tensors
        return gradient_hidden * upstream, gradient_head * upstream, None, None, None


def law_loss(
    hidden: Tensor, head: Tensor, tokens: Tensor, weights: Tensor, law: Law
) -> tuple[Tensor, Tensor]:
    """Weighted sum of `KL(law(token), softmax(hidden @ head.T))`.

    For a law that gives all to one token this is that token's negative log-likelihood.

    Args:
        hidden: `[N, H]`.
        head: `[V, H]`.
        tokens: `[N]` int64, which token of the text each row predicts.
        weights: `[N]` float32.
        law: Of the tokens.

    Returns:
        The sum, a differentiable scalar, and each row's divergence `[N]` in nats, which is not
        differentiable.
    """
    return _LawLoss.apply(hidden, head, tokens, weights, law)  # pyright: ignore[reportReturnType]
