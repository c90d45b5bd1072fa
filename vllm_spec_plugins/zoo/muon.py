"""Muon: momentum whose direction is made orthogonal (Jordan et al. 2024), for hidden matrices.

torch has one since 2.9, always in bfloat16 and one matrix at a time. On a CPU without
bfloat16 units that is several times slower than this one: float32, equal shapes together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Quintic of Jordan et al.: steep at 0, near 1 on (0.5, 1.5) after five rounds.
_A, _B, _C = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonal updates and decoupled weight decay.

    Args:
        matrices: Parameters `[rows, columns]`, each with the row counts of the independent
            matrices stacked in it: q, k and v are three matrices in one parameter.
        lr: Step size; an update of a matrix has singular values near 1, times
            sqrt(rows / columns) where it is tall.
        momentum: Decay of the gradient average.
        weight_decay: Each step shrinks weights by `lr * weight_decay`.
    """

    def __init__(
        self,
        matrices: Sequence[tuple[Tensor, Sequence[int]]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        groups = [{"params": [parameter], "blocks": list(rows)} for parameter, rows in matrices]
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of all matrices. `closure` is not supported."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        blocks: defaultdict[tuple[int, int], list[_Block]] = defaultdict(list)
        for group in self.param_groups:
            (parameter,) = group["params"]
            if parameter.grad is None:
                continue
            average = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
            average.lerp_(parameter.grad, 1 - group["momentum"])
            direction = parameter.grad.lerp(average, group["momentum"])
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parts = parameter.split(group["blocks"]), direction.split(group["blocks"])
            for weight, block in zip(*parts, strict=True):
                rows, columns = block.shape
                step = _Block(weight, block, group["lr"] * max(1, rows / columns) ** 0.5)
                step = step if rows <= columns else _Block(weight.T, block.T, step.lr)
                blocks[step.direction.shape[0], step.direction.shape[1]].append(step)
        for same_shape in blocks.values():
            updates = orthogonalise(torch.stack([block.direction for block in same_shape]))
            for block, update in zip(same_shape, updates, strict=True):
                block.weight.add_(update, alpha=-block.lr)


class _Block(NamedTuple):
    """One matrix to update, at most as many rows as columns: views into its parameter."""

    weight: Tensor
    direction: Tensor
    lr: float


def orthogonalise(x: Tensor, rounds: int = 5) -> Tensor:
    """`U V^T` of `x = U S V^T`, roughly (singular values in 0.5..1.5), by Newton-Schulz.

    Args:
        x: `[B, m, n]` float32, m <= n.
        rounds: Of the quintic iteration.
    """
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(rounds):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.baddbmm(x, polynomial, x, beta=_A)
    return x
