"""The picture `vllm-spec calibrate exit` leaves behind."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from vllm_spec_plugins.calibration.draft_pass import DraftPass
from vllm_spec_plugins.calibration.draft_table import Row

# Nothing here needs a display.
mpl.use("Agg")

_TEXT, _QUIET = "#202124", "#5f6368"
#: Cells of a heat map above which their values are no longer written in.
_MOST_CELLS = 320
#: Of the colour scale.
_TICKS = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)


def speedups(
    rows: Sequence[Row], recommended: Sequence[Row], title: str, caption: str, path: Path
) -> None:
    """Predicted speed-up of every draft pass and draft length; one map per temperature and batch.

    Args:
        rows: Every setting.
        recommended: Rows of the recommended setting, framed; none: nothing pays.
        title: Above all.
        caption: Below all.
        path: PNG to write.
    """
    batches = sorted({row.batch for row in rows})
    temperatures = sorted({row.temperature for row in rows})
    passes = sorted({row.draft_pass for row in rows})
    lengths = sorted({row.num_speculative_tokens for row in rows})
    best: dict[tuple[int, float, DraftPass, int], float] = {}
    for row in rows:
        key = (row.batch, row.temperature, row.draft_pass, row.num_speculative_tokens)
        best[key] = max(best.get(key, 0.0), row.speedup)
    width = 2.6 + len(temperatures) * (0.8 + 0.52 * len(lengths))
    height = 1.5 + len(batches) * (0.9 + 0.34 * len(passes))
    figure = Figure(
        figsize=(max(width, 7.5), max(height, 3.6)), layout="constrained", facecolor="white"
    )
    grid = figure.subplots(len(batches), len(temperatures), squeeze=False, sharex=True, sharey=True)
    # One scale, white at 1: blue is faster than plain decoding, red slower, both alike.
    farthest = max(1.1, *best.values(), *(1 / value for value in best.values()))
    norm = LogNorm(1 / farthest, farthest)
    chosen = {
        (row.batch, row.temperature, row.draft_pass, row.num_speculative_tokens)
        for row in recommended
    }
    image: Any = None
    for line, batch in zip(grid, batches, strict=True):
        for axes, temperature in zip(line, temperatures, strict=True):
            table = np.array([[best[batch, temperature, p, k] for k in lengths] for p in passes])
            image = axes.imshow(table, cmap="RdBu", norm=norm, aspect="auto")
            axes.set_xticks(range(len(lengths)), [str(k) for k in lengths])
            axes.set_yticks(range(len(passes)), [_label(p) for p in passes], fontsize=8)
            axes.set_title(_heading(temperature, batch), fontsize=10, color=_TEXT)
            if table.size <= _MOST_CELLS:
                _write_values(axes, table, norm)
            for number, draft_pass in enumerate(passes):
                for column, length in enumerate(lengths):
                    if (batch, temperature, draft_pass, length) in chosen:
                        axes.add_patch(
                            mpl.patches.Rectangle(  # pyright: ignore[reportAttributeAccessIssue]
                                (column - 0.5, number - 0.5), 1, 1, fill=False, lw=2.5, ec="#111"
                            )
                        )
    for axes in grid[-1]:
        axes.set_xlabel("draft tokens per round")
    for axes in grid[:, 0]:
        axes.set_ylabel("layers run while drafting")
    ticks = [tick for tick in _TICKS if 1 / farthest <= tick <= farthest]
    bar = figure.colorbar(
        image, ax=grid, label="predicted speed-up over plain decoding", shrink=0.9, ticks=ticks
    )
    bar.ax.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    bar.ax.minorticks_off()
    figure.suptitle(title, fontsize=12, color=_TEXT)
    columns = int(14 * max(width, 7.5))
    figure.supxlabel("\n".join(textwrap.wrap(caption, columns)), fontsize=8, color=_QUIET)
    figure.savefig(path, dpi=150)


def _heading(temperature: float, batch: int) -> str:
    requests = "1 request" if batch == 1 else f"{batch} requests"
    return f"{'greedy' if temperature == 0 else f'temperature {temperature:g}'}, {requests}"


def _label(draft_pass: DraftPass) -> str:
    """Short: a skip set in full belongs in the table."""
    if draft_pass.num_skipped:
        return f"{draft_pass.exit_layer}, {draft_pass.num_skipped} sublayers\nleft out"
    return str(draft_pass)


def _write_values(axes: Any, table: Any, norm: Any) -> None:
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            dark = abs(float(norm(value)) - 0.5) > 0.32
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=7,
                color="white" if dark else _TEXT,
            )  # fmt: skip
