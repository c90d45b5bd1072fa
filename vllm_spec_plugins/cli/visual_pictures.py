"""The picture `vllm-spec demo visual` leaves behind: the same digits, by every way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

# Nothing here needs a display.
mpl.use("Agg")

_COLUMNS = 10


def draw(path: Path, titles: Sequence[tuple[str, str]], grids: Sequence[Tensor]) -> None:
    """Write one PNG with a panel for every way.

    Args:
        path: PNG to write.
        titles: Of each way: its name and a line about it.
        grids: Of each way, `[10 * rows, 1, height, width]` images in [0, 1].
    """
    across = 2
    down = -(-len(grids) // across)
    figure = Figure(figsize=(11, 2.7 * down), layout="constrained", facecolor="white")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, (name, line), images in zip(axes, titles, grids, strict=False):
        axis.imshow(_tiled(images).numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(f"{name}\n{line}", fontsize=9, loc="left")
    figure.savefig(path, dpi=120)


def _tiled(images: Tensor) -> Tensor:
    """`[rows * (height + 2), 10 * (width + 2)]`: images side by side, with a margin."""
    padded = torch.nn.functional.pad(images[:, 0], (1, 1, 1, 1))
    count, height, width = padded.shape
    rows = padded.view(count // _COLUMNS, _COLUMNS, height, width)
    return rows.transpose(1, 2).reshape(-1, _COLUMNS * width)
