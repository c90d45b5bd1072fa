"""Pictures of the rows of `self_speculation`: speed-up over exit and draft length, and methods.

    python benchmarks/plot_self_speculation.py --model expanded

writes results/self_speculation_<model>_exits.png and ..._methods.png.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import numpy as np
import typer
from matplotlib.figure import Figure
from speculation_rows import Cell, cells, read

# Nothing here needs a display.
mpl.use("Agg")

RESULTS = Path(__file__).parent / "results"
#: Okabe and Ito's colours, told apart by colour-blind people too.
_PLAIN, _VLLM, _OURS, _RANKED, _BY_ITSELF = "#999999", "#E69F00", "#0072B2", "#56B4E9", "#009E73"
_TEXT, _FAINT = "#202124", "#5f6368"
#: Fewer bars than there are methods: the best of each kind.
_KINDS: tuple[tuple[str, str, Callable[[Cell], bool]], ...] = (
    ("vLLM: ngram", _VLLM, lambda c: c.method.startswith("ngram")),
    (
        "vLLM: draft_model, chosen",
        _VLLM,
        lambda c: c.method.startswith("draft_model") and "greedy" in c.method,
    ),
    (
        "vLLM: draft_model, drawn",
        _VLLM,
        lambda c: c.method.startswith("draft_model") and "probabilistic" in c.method,
    ),
    (
        "early_exit, best fixed length",
        _OURS,
        lambda c: isinstance(c.exit_layer, int) and isinstance(c.length, int) and not c.ranked,
    ),
    (
        "the same, ranked vocabulary",
        _RANKED,
        lambda c: isinstance(c.exit_layer, int) and isinstance(c.length, int) and c.ranked,
    ),
    *(
        (
            f"early_exit, {control}",
            _OURS,
            lambda c, control=control: (
                c.length == control and isinstance(c.exit_layer, int) and not c.ranked
            ),
        )
        for control in ("confidence", "thompson", "expected_speedup", "additive")
    ),
    (
        "early_exit, exit auto",
        _BY_ITSELF,
        lambda c: c.exit_layer == "auto" and c.length != "del",
    ),
    ("early_exit, del", _BY_ITSELF, lambda c: c.exit_layer == "auto" and c.length == "del"),
)


def exits(found: Sequence[Cell], model: str, path: Path) -> Path | None:
    """Speed-up of `early_exit` without a ranked vocabulary: exit layers over draft lengths.

    A panel for each temperature and batch size. Blue is faster than plain decoding, red is
    slower, white the same; the framed cell is the fastest.

    Returns:
        None where no row has an exit layer.
    """
    ours = [c for c in found if isinstance(c.exit_layer, int) and not c.ranked]
    if not ours:
        return None
    layers = sorted({c.exit_layer for c in ours})  # pyright: ignore[reportArgumentType]
    fixed = sorted({c.length for c in ours if isinstance(c.length, int)})
    control = sorted({c.length for c in ours if isinstance(c.length, str)})
    lengths = [*fixed, *control]
    temperatures = sorted({c.temperature for c in ours}, reverse=True)
    batches = sorted({c.batch for c in ours})
    reach = max(0.1, *(abs(np.log2(c.speed)) for c in ours))
    figure = Figure(
        figsize=(1.6 + len(batches) * (0.72 * len(lengths) + 0.9), 1.9 + len(temperatures) * 3.2),
        layout="constrained",
        facecolor="white",
    )
    panels = figure.subplots(len(temperatures), len(batches), squeeze=False)
    image = None
    for i, temperature in enumerate(temperatures):
        for j, batch in enumerate(batches):
            axes, here = panels[i][j], np.full((len(layers), len(lengths)), np.nan)
            mine = [c for c in ours if (c.temperature, c.batch) == (temperature, batch)]
            for cell in mine:
                here[layers.index(cell.exit_layer), lengths.index(cell.length)] = cell.speed
            image = axes.imshow(
                np.log2(here), cmap="RdBu", vmin=-reach, vmax=reach, origin="lower", aspect="auto"
            )
            _write_in(axes, here)
            if fixed and control:
                axes.axvline(len(fixed) - 0.5, color=_TEXT, linewidth=1)
            axes.set_yticks(range(len(layers)), layers)
            axes.set_xticks(
                range(len(lengths)),
                [str(length).replace("_", "\n") for length in lengths],
                fontsize=8,
            )
            axes.set_title(f"temperature {temperature:g}, batch {batch}", fontsize=10, color=_TEXT)
            axes.set_xlabel("draft tokens per step, or who decides", fontsize=9)
            axes.set_ylabel("exit layer", fontsize=9)
    assert image is not None
    ticks = [s for s in (0.25, 0.5, 0.7, 0.85, 1, 1.2, 1.4, 1.7, 2, 3) if abs(np.log2(s)) <= reach]
    bar = figure.colorbar(image, ax=panels, ticks=np.log2(ticks), shrink=0.7)
    bar.ax.set_yticklabels([f"{s:g}x" for s in ticks])
    bar.set_label("tokens per second over plain decoding", fontsize=9)
    figure.suptitle(f"{model}: early_exit, speed-up over plain decoding", fontsize=12, color=_TEXT)
    figure.savefig(path, dpi=150)
    return path


def _write_in(axes: Any, speeds: Any) -> None:
    """Each cell's number; a frame around the largest."""
    for (row, column), speed in np.ndenumerate(speeds):
        if not np.isnan(speed):
            dark = abs(np.log2(speed)) > 0.6 * axes.images[0].get_clim()[1]
            axes.text(
                column, row, f"{speed:.2f}", ha="center", va="center", fontsize=8,
                color="white" if dark else _TEXT,
            )  # fmt: skip
    if not np.isnan(speeds).all():
        row, column = np.unravel_index(np.nanargmax(speeds), speeds.shape)
        frame = mpl.patches.Rectangle(  # pyright: ignore[reportAttributeAccessIssue]
            (column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2
        )
        axes.add_patch(frame)


def methods(found: Sequence[Cell], model: str, path: Path) -> Path:
    """The best setting of each kind of method, at every temperature and batch size.

    Bars: median of the repeats; whiskers: least and most.
    """
    temperatures = sorted({c.temperature for c in found}, reverse=True)
    batches = sorted({c.batch for c in found})
    shown = [kind for kind in _KINDS if any(kind[2](c) for c in found)]
    figure = Figure(
        figsize=(1.5 + 5.6 * len(batches), 1.6 + len(temperatures) * (0.34 * len(shown) + 0.9)),
        layout="constrained",
        facecolor="white",
    )
    panels = figure.subplots(len(temperatures), len(batches), squeeze=False, sharey=True)
    shares = []
    for i, temperature in enumerate(temperatures):
        for j, batch in enumerate(batches):
            axes = panels[i][j]
            here = [c for c in found if (c.temperature, c.batch) == (temperature, batch)]
            best = [
                max((c for c in here if belongs(c)), key=lambda c: c.speed, default=None)
                for _, _, belongs in shown
            ]
            _bars(axes, best, [colour for _, colour, _ in shown])
            axes.set_yticks(range(len(shown)), [name for name, _, _ in shown], fontsize=8)
            axes.set_ylim(len(shown) - 0.4, -0.6)
            axes.set_title(f"temperature {temperature:g}, batch {batch}", fontsize=10, color=_TEXT)
            axes.set_xlabel("tokens per second over plain decoding", fontsize=8)
        greedy = [c.distinct_share for c in found if c.temperature == temperature]
        shares.append(f"{min(greedy):.2f} to {max(greedy):.2f} at temperature {temperature:g}")
    for row in panels:
        most = max(axes.get_xlim()[1] for axes in row)
        for axes in row:
            axes.set_xlim(0, most)
    figure.suptitle(f"{model}: best setting of each kind of method", fontsize=12, color=_TEXT)
    caption = (
        "Bars: median of the repeats, whiskers: least and most; dashed: plain decoding, measured "
        "right before and after each. In brackets: exit layer, draft tokens, acceptance length "
        f"(bonus token included). Distinct 8-grams: {', '.join(shares)} (real source text: 0.98): "
        "greedy text of a small model loops, which is easy to draft."
    )
    figure.supxlabel("\n".join(textwrap.wrap(caption, 62 * len(batches))), fontsize=8, color=_FAINT)
    figure.savefig(path, dpi=150)
    return path


def _bars(axes: Any, best: Sequence[Cell | None], colours: Sequence[str]) -> None:
    for place, (cell, colour) in enumerate(zip(best, colours, strict=True)):
        if cell is None:
            axes.text(0.02, place, "not measured", va="center", fontsize=7, color=_FAINT)
            continue
        axes.barh(place, cell.speed, color=colour, height=0.7)
        axes.errorbar(
            cell.speed, place, xerr=[[cell.speed - cell.low], [cell.high - cell.speed]],
            color=_TEXT, capsize=2, linewidth=1,
        )  # fmt: skip
        axes.text(
            cell.high + 0.02, place, f"{cell.speed:.2f}x  {_setting(cell)}",
            va="center", fontsize=7.5, color=_TEXT,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    axes.axvline(1, color=_PLAIN, linestyle="--", linewidth=1, zorder=0)
    most = max((c.high for c in best if c), default=1.0)
    axes.set_xlim(0, 1.5 * max(1.0, most))
    axes.spines[["top", "right"]].set_visible(False)


def _setting(cell: Cell) -> str:
    """In brackets, what the bar's own name does not say."""
    parts = []
    if isinstance(cell.exit_layer, int):
        parts.append(f"exit {cell.exit_layer}")
    if isinstance(cell.length, int):
        parts.append(f"K={cell.length}")
    elif cell.exit_layer == "auto" and cell.length != "del":
        parts.append(cell.length)
    parts.append(f"length {cell.acceptance_length:.2f}" if cell.acceptance_length else "no drafts")
    return f"({', '.join(parts)})"


def main(
    model: Annotated[str, typer.Option(help="whose rows")] = "expanded",
    rows: Annotated[Path, typer.Option(help="file of rows")] = RESULTS / "self_speculation.jsonl",
    run: Annotated[str, typer.Option(help="rows of it alone; default: the last row's")] = "",
    output: Annotated[Path, typer.Option(help="folder for the pictures")] = RESULTS,
) -> None:
    """Draw."""
    of_model = [row for row in read(rows) if row["model"] == model]
    if not of_model:
        raise typer.BadParameter(f"{rows.name} has no rows of {model}")
    run = run or of_model[-1]["run"]
    found = cells(row for row in of_model if row["run"] == run)
    for picture in (
        exits(found, model, output / f"self_speculation_{model}_exits.png"),
        methods(found, model, output / f"self_speculation_{model}_methods.png"),
    ):
        if picture is not None:
            print(picture.name)


if __name__ == "__main__":
    typer.run(main)
