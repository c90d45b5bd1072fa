"""The pictures `vllm-spec demo` leaves behind."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from .comparison import MarkedToken

# Nothing here needs a display.
mpl.use("Agg")

_GREY, _BLUE, _GREEN = "#9aa0a6", "#5b8def", "#2f9e63"
_COLOURS = (_GREY, _BLUE, _GREEN)
_TEXT = "#202124"


def comparison(rows: Sequence[dict[str, Any]], model: str, caption: str, path: Path) -> Path:
    """Speed, tokens per step and what became of the drafts, side by side.

    Args:
        rows: As `Result.row` gives them, plain decoding first.
        model: For the title.
        caption: Printed below.
        path: PNG to write.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained", facecolor="white")
    speed, step, drafts = figure.subplots(1, 3)
    names = [row["way"] for row in rows]

    speeds = [row["tokens_per_second"] for row in rows]
    below = [row["tokens_per_second"] - row["slowest_pass"] for row in rows]
    above = [row["fastest_pass"] - row["tokens_per_second"] for row in rows]
    bars = speed.bar(names, speeds, yerr=[below, above], capsize=4, color=_COLOURS)
    labels = [f"{row['tokens_per_second']:.0f}\n{row['speed_over_plain']:.2f}x" for row in rows]
    speed.bar_label(bars, labels, label_type="center", color="white", weight="bold")
    _title(speed, "tokens per second", "median of the passes, slowest to fastest")

    bars = step.bar(names, [row["tokens_per_step"] for row in rows], color=_COLOURS)
    lengths = [row["acceptance_length"] for row in rows]
    labels = [
        f"{row['tokens_per_step']:.2f}" + (f"\n({length:.2f})" if length else "")
        for row, length in zip(rows, lengths, strict=True)
    ]
    step.bar_label(bars, labels, label_type="center", color="white", weight="bold")
    _title(
        step, "tokens per forward pass", "in brackets: acceptance length, of passes with a draft"
    )

    drafted = [row["drafted"] for row in rows]
    accepted = [row["accepted"] for row in rows]
    all_of_them = drafts.bar(names, drafted, color="#d7dbe0")
    drafts.bar(names, accepted, color=_COLOURS)
    shares = [
        f"{a} of {d}\n({a / d:.0%})" if d else "no drafts"
        for a, d in zip(accepted, drafted, strict=True)
    ]
    drafts.bar_label(all_of_them, shares, padding=2, color=_TEXT, fontsize=9)
    drafts.margins(y=0.15)
    _title(drafts, "draft tokens", "accepted, and in light grey rejected")

    for axes in (speed, step, drafts):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", labelsize=8)
    same = all(row["same_text"] == row["prompts"] for row in rows)
    share = ", ".join(f"{row['way']} {row['distinct_8gram_share']:.2f}" for row in rows)
    text = "identical" if same else "not identical on every prompt"
    figure.suptitle(f"{model}: greedy text {text} in all three", fontsize=13, color=_TEXT)
    figure.supxlabel(
        "\n".join(textwrap.wrap(f"Distinct 8-grams: {share}. {caption}", 150)),
        fontsize=8,
        color="#5f6368",
    )
    figure.savefig(path, dpi=150)
    return path


def _title(axes: Any, title: str, below: str) -> None:
    axes.set_title(f"{title}\n", fontsize=11, color=_TEXT)
    axes.text(0.5, 1.02, below, transform=axes.transAxes, ha="center", fontsize=8, color="#5f6368")


#: Characters per line, and the size of one in points at the font size below.
_COLUMNS = 96
_FONT = 9
_WIDTH, _HEIGHT = _FONT * 0.602, _FONT * 1.45


def continuation(prompt: str, marked: Sequence[MarkedToken], model: str, path: Path) -> Path:
    """The end of a prompt and its continuation; drafted-and-accepted tokens on green."""
    before = "\n".join(prompt.splitlines()[-6:]) + "\n"
    cells = [(character, "prompt") for character in before]
    for token in marked:
        cells += [(character, "accepted" if token.accepted else "own") for character in token.text]
    lines = _wrapped(cells)

    margin, header = 14.0, 46.0
    width = _COLUMNS * _WIDTH + 2 * margin
    height = len(lines) * _HEIGHT + header + margin
    figure = Figure(figsize=(width / 72, height / 72), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    drafted = sum(token.accepted for token in marked)
    axes.text(margin, 16, f"{model}, ngram_adaptive", fontsize=11, weight="bold", color=_TEXT)
    axes.text(
        margin,
        32,
        f"grey: prompt.  green: {drafted} of {len(marked)} tokens, drafted and accepted.  "
        "black: drawn from the model.",
        fontsize=8.5,
        color="#5f6368",
    )
    colours = {"prompt": "#9aa0a6", "accepted": "#0b5d33", "own": _TEXT}
    for row, line in enumerate(lines):
        y = header + row * _HEIGHT
        for column, (character, kind) in enumerate(line):
            x = margin + column * _WIDTH
            if kind == "accepted":
                box = axes.barh(
                    y + _HEIGHT / 2, _WIDTH, height=_HEIGHT * 0.92, left=x, color="#c6ecd4"
                )
                box[0].set_linewidth(0)
            axes.text(
                x, y + _HEIGHT * 0.72, character,
                family="monospace", fontsize=_FONT, color=colours[kind], parse_math=False,
            )  # fmt: skip
    figure.savefig(path, dpi=150)
    return path


def _wrapped(cells: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Cells in lines of at most `_COLUMNS`; tabs as four spaces, what cannot be drawn as a dot."""
    lines: list[list[tuple[str, str]]] = [[]]
    for character, kind in cells:
        if character == "\n":
            lines.append([])
            continue
        drawn = character if character.isprintable() else "\u00b7"
        for one in "    " if character == "\t" else drawn:
            if len(lines[-1]) == _COLUMNS:
                lines.append([])
            lines[-1].append((one, kind))
    return lines
