"""Work on the rows that a condition picks, where the host may not look which those are.

On the CPU looking costs nothing and spares the work on all other rows. On a device the host would
wait until the condition is known, and so would the next step, which could be planned meanwhile:
there all rows are worked on, and those that were not picked keep what they had.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .triton_kernels.dispatch import use_triton  # pyright: ignore[reportMissingImports]


def may_look(tensor: Tensor) -> bool:
    """Whether the host may branch on values of this tensor: it is on the CPU.

    Not in Triton's interpreter, where the CPU stands in for a device.
    """
    return tensor.device.type == "cpu" and not use_triton(tensor)


def replace_rows(values: Tensor, where: Tensor, work: Callable[[Tensor], Tensor | float]) -> Tensor:
    """Values with those of some rows replaced.

    Args:
        values: `[N, ...]`; used up, the result may be the same tensor.
        where: `[N]` bool, the rows.
        work: Gives `[M, ...]` new values of M rows, `[M]` int64. On a device these are all rows:
            what it gives for others is dropped, and may be anything but an index out of bounds.

    Returns:
        `[N, ...]` of the dtype of `values`.
    """
    if may_look(values):
        rows = where.nonzero().squeeze(1)
        if len(rows):
            values[rows] = _like(work(rows), values)
        return values
    if not len(where):
        return values
    new = _like(work(torch.arange(len(where), device=where.device)), values)
    return torch.where(where.view(-1, *[1] * (values.ndim - 1)), new, values)


def _like(new: Tensor | float, values: Tensor) -> Tensor:
    return new.to(values.dtype) if isinstance(new, Tensor) else values.new_tensor(new)
