"""Picture of `results/diffusion_training.jsonl`: tokens per step over the text trained on.

python benchmarks/plot_diffusion_training.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
COLOURS = {1: "#9aa5b1", 2: "#5b8def", 4: "#2f9e6e", 8: "#d9822b"}


def main() -> None:
    lines = (RESULTS / "diffusion_training.jsonl").read_text().splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    rows = [row for row in rows if not row.get("states_withheld")]
    names = sorted({row["drafter"] for row in rows if "steps" in row})
    figure = Figure(figsize=(5 * len(names), 7), layout="constrained", facecolor="white")
    grid = figure.subplots(2, len(names), squeeze=False, sharex=True, sharey="row")
    for column, name in enumerate(names):
        for line, temperature in enumerate((0.0, 1.0)):
            here = [row for row in rows if row["temperature"] == temperature]
            _draw(grid[line][column], here, name)
            grid[line][column].set_title(f"{name}, temperature {temperature:g}", fontsize=10)
    figure.savefig(RESULTS / "diffusion_training.png", dpi=150)


def _draw(axes: Axes, rows: list[dict[str, Any]], name: str) -> None:
    """Lines of the drafter, dashes of the draft model that writes token by token."""
    ours = sorted((row for row in rows if row["drafter"] == name), key=lambda row: row["steps"])
    causal = next(row for row in rows if "steps" not in row)
    for length, colour in COLOURS.items():
        axes.errorbar(
            [row["text_tokens"] / 1000 for row in ours],
            [row["acceptance_length"][length - 1] for row in ours],
            [row["acceptance_length_error"][length - 1] for row in ours],
            color=colour,
            marker="o",
            markersize=3,
            label=f"{length} draft tokens, one pass",
        )
        axes.axhline(causal["acceptance_length"][length - 1], color=colour, ls="--", lw=1)
    axes.plot([], [], color="#555", ls="--", lw=1, label=f"{causal['drafter']}: a pass per token")
    axes.set(xlabel="thousand text tokens trained on", ylabel="tokens per step, bonus included")
    axes.set_ylim(top=3.2)  # room for the legend
    axes.legend(frameon=False, fontsize=7, loc="upper left", ncols=2)


if __name__ == "__main__":
    main()
