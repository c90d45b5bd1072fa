"""Quality against speed of `relaxed_visual`, drawn from the rows of `relaxed_visual.py`.

    python benchmarks/plot_relaxed_visual.py

Acceptance length over price, Frechet distance and accuracy; drafts of all lengths beside
lossless, hollow at a lower temperature; and the distance to the target's law against the extra
acceptance, which are equal for the best residual. Points are means over seeds, bars one standard
deviation.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import matplotlib as mpl
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.use("Agg")

RESULTS = Path(__file__).parent / "results" / "relaxed_visual.jsonl"
PICTURE = RESULTS.with_suffix(".png")
COLOURS = {
    "lossless": "#202124",
    "lantern": "#d9482b",
    "lantern++": "#e3a008",
    "gsd": "#2f9e63",
    "annealed": "#5b8def",
    "clusters": "#8e44ad",
}
Row = dict[str, Any]


def points(rows: Sequence[Row], kind: str) -> list[tuple[Row, dict[str, list[float]]]]:
    """Rows of one kind by setting: one of them, and every number of all seeds.

    Of simulations only those of most images: a small trial does not mix with the run.
    """
    chosen = [row for row in rows if row["kind"] == kind]
    most = max((row["images"] for row in chosen), default=0)
    grouped: defaultdict[tuple[str, int, str], list[Row]] = defaultdict(list)
    for row in chosen:
        if row["images"] == most:
            grouped[row["key"], row["num_draft"], drafted_by(row)].append(row)
    numbers = (
        "acceptance_length", "price", "accuracy", "frechet_distance",
        "distance", "acceptance", "extra_acceptance",
    )  # fmt: skip
    return [
        (group[0], {name: [row[name] for row in group if name in row] for name in numbers})
        for group in grouped.values()
    ]


def drafted_by(row: Row) -> str:
    """Rows from before there were two draft models do not name theirs."""
    return row.get("draft", "digits-draft")


def way(row: Row) -> tuple[str, int]:
    """What lossless verification is compared at: the draft model, and tokens of a draft."""
    return drafted_by(row), row["num_draft"]


def curve(axes: Axes, found: list[Any], x: str, y: str, temperature: float) -> None:
    """Every rule's points, joined in the order of their acceptance, by both residuals."""
    for name, colour in COLOURS.items():
        for residual, style in (("ours", "o-"), ("published", "x:")):
            mine = [
                values
                for row, values in found
                if row["name"] == name
                and row["residual"] == residual
                and row["temperature"] == temperature
                and values[x]
                and values[y]
            ]
            if not mine:
                continue
            mine.sort(key=lambda values: mean(values[y]))
            marker = {"lossless": "D"}.get(name, style)
            axes.errorbar(
                [mean(v[x]) for v in mine],
                [mean(v[y]) for v in mine],
                [_spread(v[y]) for v in mine],
                [_spread(v[x]) for v in mine],
                marker,
                color=colour,
                markersize=5,
                capsize=2,
                label=name if residual == "ours" else f"{name}, published residual",
            )


def gains(axes: Axes, found: list[Any]) -> None:
    """Acceptance length over lossless with drafts as long, over the Frechet distance."""
    ours = [
        (row, values)
        for row, values in found
        if row["temperature"] == 1.0 and row["residual"] == "ours" and row["name"] != "plain"
    ]
    cooler = [
        (row, values)
        for row, values in found
        if row["name"] == "lossless" and 0.9 <= row["temperature"] < 1
    ]
    lossless = {
        way(row): mean(values["acceptance_length"])
        for row, values in ours
        if row["name"] == "lossless"
    }
    named: set[str] = set()
    for (drafted, bound), marker in zip(sorted(lossless.items()), "P*o^sv", strict=False):
        for name, colour in COLOURS.items():
            mine = [v for row, v in ours if row["name"] == name and way(row) == drafted]
            if mine:
                axes.errorbar(
                    [mean(v["frechet_distance"]) for v in mine],
                    [mean(v["acceptance_length"]) / bound for v in mine],
                    None,
                    [_spread(v["frechet_distance"]) for v in mine],
                    marker,
                    color=colour,
                    markersize=5,
                    capsize=2,
                    label=None if name in named else name,
                )
                named.add(name)
        axes.plot([], [], marker, color="#202124", label="{}, drafts of {}".format(*drafted))
        for row, values in cooler:
            if way(row) == drafted:
                at = mean(values["frechet_distance"]), mean(values["acceptance_length"]) / bound
                axes.plot(*at, marker, color=COLOURS["lossless"], markersize=5, fillstyle="none")
                axes.annotate(
                    f"{row['temperature']:g}", at, fontsize=7, xytext=(3, 4),
                    textcoords="offset points",
                )  # fmt: skip
    axes.axhline(1.3, color="#202124", linewidth=0.8, linestyle=":")
    axes.set_title("drafts of all lengths over lossless with drafts as long", fontsize=10)
    axes.set_xlabel(NAMES["frechet_distance"])
    axes.set_ylabel("acceptance length over lossless")
    axes.grid(alpha=0.3)


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def main(
    rows_file: Annotated[Path, typer.Option("--rows")] = RESULTS,
    output: Annotated[Path, typer.Option()] = PICTURE,
) -> None:
    """Draw what rows there are."""
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    every_length, enumerated = points(rows, "simulation"), points(rows, "law")
    shortest = min(row["num_draft"] for row, _ in every_length)
    # Plain decoding has the law of `lossless` and one token a pass: it would only squeeze the axes.
    simulated = [
        point
        for point in every_length
        if way(point[0]) == ("digits-draft", shortest) and point[0]["name"] != "plain"
    ]
    figure = Figure(figsize=(13, 8.2), layout="constrained", facecolor="white")
    axes = figure.subplots(2, 3).flatten()
    panels = [
        (simulated, "frechet_distance", "acceptance_length", 1.0),
        (simulated, "accuracy", "acceptance_length", 1.0),
        (simulated, "price", "acceptance_length", 1.0),
        (enumerated, "distance", "acceptance", 1.0),
    ]
    for axis, (found, x, y, temperature) in zip(axes, panels, strict=False):
        curve(axis, found, x, y, temperature)
        _label(axis, x, y)
    axes[1].invert_xaxis()
    axes[3].set_title("exact laws: distance to the target, by enumeration", fontsize=10)
    everywhere: defaultdict[str, list[Any]] = defaultdict(list)
    for row, values in simulated:
        if row["residual"] == "ours":
            everywhere[row["name"]].append((row, values))
    for name, found in everywhere.items():
        axes[4].errorbar(
            [mean(v["frechet_distance"]) for _, v in found],
            [mean(v["acceptance_length"]) for _, v in found],
            [_spread(v["acceptance_length"]) for _, v in found],
            [_spread(v["frechet_distance"]) for _, v in found],
            "D" if name == "lossless" else "o",
            color=COLOURS[name],
            markersize=5,
            capsize=2,
        )
        for row, values in found:
            if row["temperature"] != 1.0:
                axes[4].annotate(
                    f"{row['temperature']:g}",
                    (mean(values["frechet_distance"]), mean(values["acceptance_length"])),
                    fontsize=7,
                    xytext=(3, 4),
                    textcoords="offset points",
                )
    _label(axes[4], "frechet_distance", "acceptance_length")
    axes[4].set_title("temperature 1, and 0.8 and 0.9 where written", fontsize=10)
    gains(axes[5], every_length)
    shown: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True)) | shown
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5, fontsize=8)
    count = max(row["images"] for row, _ in simulated)
    figure.suptitle(
        f"relaxed_visual on the zoo's digits: {count} images a seed and point, drafts of "
        f"{shortest} (last picture: all)"
    )
    figure.savefig(output, dpi=130)
    print(output.name)


NAMES = {
    "frechet_distance": "Frechet distance to real digits",
    "acceptance_length": "acceptance length, bonus token included",
    "accuracy": "share recognised by the classifier",
    "price": "price: total variation per draft token looked at",
    "distance": "total variation to the target's law",
    "acceptance": "acceptance of a draft token",
}


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(NAMES[x])
    axes.set_ylabel(NAMES[y])
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    typer.run(main)
