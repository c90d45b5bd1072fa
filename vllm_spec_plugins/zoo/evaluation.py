"""How good a trained model is on text it has not seen: at the end and at each exit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from .model import Llama

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Exit:
    """One exit on held-out text.

    Attributes:
        layers: How many layers run before the head.
        cross_entropy: Nats per token.
        agreement: Share of positions where its most likely token is the last layer's.
        accuracy: Share of positions where its most likely token is the true next one.
    """

    layers: int
    cross_entropy: float
    agreement: float
    accuracy: float


@torch.no_grad()
def evaluate(
    model: Llama,
    tokens: NDArray[np.int64],
    exits: tuple[int, ...],
    length: int = 256,
    most_windows: int = 128,
) -> list[Exit]:
    """Evaluate in float32 on windows spread evenly over `tokens`.

    Args:
        model: The model.
        tokens: `[N]` held-out text.
        exits: Layer counts in rising order; the last layer is added.
        length: Positions per window.
        most_windows: Fewer where the text is shorter.

    Returns:
        One `Exit` per entry of `exits`, then the last layer.
    """
    count = min(most_windows, (len(tokens) - 1) // length)
    starts = np.linspace(0, len(tokens) - length - 1, count).astype(np.int64)
    depths = (*exits, model.shape.num_layers)
    totals = torch.zeros(len(depths), 3, dtype=torch.float64)
    for start in starts.tolist():
        window = torch.from_numpy(tokens[start : start + length + 1])
        targets = window[1:]
        logits = [states[0] @ model.head.T for states in model(window[None, :-1], exits)]
        final = logits[-1].argmax(-1)
        for row, at_exit in zip(totals, logits, strict=True):
            best = at_exit.argmax(-1)
            row += torch.stack(
                [
                    F.cross_entropy(at_exit, targets).double(),
                    (best == final).double().mean(),
                    (best == targets).double().mean(),
                ]
            )
    means = (totals / count).tolist()
    return [Exit(depth, *row) for depth, row in zip(depths, means, strict=True)]
