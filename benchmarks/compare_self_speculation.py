"""Rows of `self_speculation` as a table: speed over plain decoding, and over a fixed length.

Turns of all repeats are pooled: tokens over seconds, divided by those of plain decoding before and
after them. Intervals hold 95 % of 2,000 resamples of the turns (bootstrap), the same turns of every
method: other prompts, and another minute of the machine, would have given something in between.
Methods whose engines took turns side by side (`--together`) can be compared directly, without the
disturbances of plain decoding.

    python benchmarks/compare_self_speculation.py --run "expanded, short turns"
    python benchmarks/compare_self_speculation.py --run "expanded, side by side" --directly
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from speculation_rows import read

RESULTS = Path(__file__).parent / "results" / "self_speculation.jsonl"
_RESAMPLES, _INTERVAL = 2000, (2.5, 97.5)


def turns_of(rows: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    """`[turns, 4]` tokens and seconds of each turn, and of plain decoding beside it."""
    table: list[list[float]] = []
    for row in sorted(rows, key=lambda row: row["repeat"]):
        plain = np.array(row["plain_turns"]).reshape(len(row["turns"]), 2, 2).sum(axis=1)
        table += [[*own, *beside] for own, beside in zip(row["turns"], plain.tolist(), strict=True)]
    return np.array(table)


def speeds(
    turns: NDArray[np.float64], chosen: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`[S]` tokens per second of `[S, turns]` chosen turns, and of plain decoding beside them."""
    tokens, seconds, plain_tokens, plain_seconds = turns[chosen].sum(axis=1).T
    return tokens / seconds, plain_tokens / plain_seconds


def resamples(count: int) -> NDArray[np.int64]:
    """`[S + 1, turns]`: every turn once, then resamples."""
    chosen = np.random.default_rng(0).integers(0, count, (_RESAMPLES, count))
    return np.concatenate([np.arange(count)[None], chosen])


def shown(values: NDArray[np.float64]) -> str:
    """The first of `[S + 1]` values, and the interval of the others."""
    low, high = np.percentile(values[1:], _INTERVAL)
    return f"{values[0]:.2f} ({low:.2f}-{high:.2f})"


def table(rows: Sequence[dict[str, Any]], directly: bool) -> list[str]:
    """Lines of Markdown for one temperature and batch size, the fastest first.

    The best fixed length is that of the highest speed among all exits without more (no adapter,
    no ranked vocabulary). Methods with another number of turns than it are not compared with it.
    """
    methods: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    found, compared = {}, {}
    for method, own in methods.items():
        turns = turns_of(own)
        speed, plain = speeds(turns, resamples(len(turns)))
        found[method] = speed / plain
        compared[method] = speed if directly else speed / plain
    counts = {method: sum(len(row["turns"]) for row in own) for method, own in methods.items()}
    fixed = [
        method
        for method, own in methods.items()
        if isinstance(own[0]["length"], int)
        and isinstance(own[0]["exit_layer"], int)
        and not own[0]["ranked"]
        and not method.endswith("adapter")
    ]
    best = max(fixed, key=lambda method: found[method][0], default=None)
    lines = [
        f"| method | over plain decoding | over {best or 'the best fixed length'} "
        "| acceptance length | drafted | tokens |",
        "|---|---|---|---|---|---|",
    ]
    for method in sorted(found, key=lambda method: -found[method][0]):
        own = methods[method]
        drafted = [row for row in own if row["acceptance_length"]]
        length, of_draft = (
            f"{np.mean([row[name] for row in drafted]):.2f}" if drafted else "-"
            for name in ("acceptance_length", "drafted_per_draft")
        )
        over_best = ""
        if best is not None and method != best and counts[method] == counts[best]:
            over_best = shown(compared[method] / compared[best])
        tokens = sum(tokens for row in own for tokens, _ in row["turns"])
        lines.append(
            f"| {method} | {shown(found[method])} | {over_best} "
            f"| {length} | {of_draft} | {tokens:,} |"
        )
    return lines


def main(
    run: Annotated[str, typer.Option(help="name of the run")],
    model: Annotated[str, typer.Option(help="of the zoo")] = "expanded",
    rows: Annotated[Path, typer.Option(help="the rows")] = RESULTS,
    directly: Annotated[
        bool, typer.Option("--directly", help="compare methods by tokens per second alone")
    ] = False,
) -> None:
    """Print a table for each temperature and batch size."""
    ours = [r for r in read(rows) if (r["run"], r["model"]) == (run, model) and "turns" in r]
    if not ours:
        raise typer.BadParameter(f"{rows} has no rows of {model} with turns in the run {run!r}")
    for temperature, batch in sorted({(-r["temperature"], r["batch"]) for r in ours}):
        here = [r for r in ours if (-r["temperature"], r["batch"]) == (temperature, batch)]
        share = np.mean([r["distinct_8gram_share"] for r in here])
        print(f"\n{model}, temperature {-temperature:g}, batch {batch}")
        print(f"({share:.2f} of 8-grams are distinct)\n")
        print("\n".join(table(here, directly)))


if __name__ == "__main__":
    typer.run(main)
