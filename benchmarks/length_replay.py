"""Every length controller against every fixed exit and length, on recorded drafts and step times.

Nothing is timed here: rows depend on the recordings of `length_traces.py` alone. Speeds are
tokens per second of the steps recorded, over those of plain decoding; each controller starts
anew for every replay, so what it needs to learn counts.

    python benchmarks/length_replay.py tests/traces/small --times tests/traces/small_times.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace as changed
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from provenance import provenance

from vllm_spec_plugins.registry import Kind, installed
from vllm_spec_plugins.testing import toy_context
from vllm_spec_plugins.testing.length_replay import (
    ControllerPolicy,
    DraftTraces,
    FixedPolicy,
    StepTimes,
    best_fixed,
    replay,
)

RESULTS = Path(__file__).parent / "results" / "length_replay.jsonl"
#: Layers drafted after by controllers that do not choose them.
EXIT = 2
CONTROLLERS = ("confidence", "additive", "expected_speedup", "thompson", "del")


def rows(
    traces: DraftTraces, times: StepTimes, batch: int, passes: int, seeds: int
) -> Iterator[dict[str, Any]]:
    """One for every fixed choice and controller."""
    exits = traces.exits.tolist()
    plain = replay(FixedPolicy(0, 0), traces, times, batch).speed
    for index, layer in enumerate(exits):
        for length in range(1, times.verify.shape[1]):
            fixed = replay(FixedPolicy(index, length), traces, times, batch)
            yield {"method": "fixed", "exit_layer": layer, "length": length,
                   "speed_over_plain": fixed.speed / plain}  # fmt: skip
    for name in CONTROLLERS:
        cls = installed().load(Kind.LENGTH_CONTROLLER, name)
        chooses = name == "del"
        index = exits.index(EXIT)
        best = best_fixed(traces, times, batch, range(len(exits)) if chooses else [index])
        context = toy_context(num_speculative_tokens=traces.most)
        context = changed(context, max_num_requests=int(times.batch_sizes[-1]))
        replayed = [
            replay(
                ControllerPolicy(
                    cls(cls.Options.model_validate({}), context), traces, times, index
                ),
                traces, times, batch, passes, seed,
            )
            for seed in range(seeds)
        ]  # fmt: skip
        yield {
            "method": name,
            "exit_layer": "auto" if chooses else EXIT,
            "best_fixed": [exits[best.exit_], best.length],
            "best_fixed_over_plain": best.speed / plain,
            "speed_over_plain": mean(r.speed for r in replayed) / plain,
            "speeds_over_best_fixed": [r.speed / best.speed for r in replayed],
            "speed_over_best_fixed": mean(r.speed for r in replayed) / best.speed,
            "drafted_per_step": mean(mean(r.drafted) for r in replayed),
            "steps": mean(len(r.drafted) for r in replayed),
        }


def show(row: dict[str, Any]) -> str:
    """A row, for people."""
    where = f"T={row['temperature']:g} batch {row['batch']}: "
    if row["method"] == "fixed":
        return (
            f"{where}exit {row['exit_layer']} K={row['length']}: "
            f"{row['speed_over_plain']:.3f}x plain"
        )
    layer, length = row["best_fixed"]
    spread = row["speeds_over_best_fixed"]
    return (
        f"{where}{row['method']:<16} {row['speed_over_plain']:.3f}x plain, "
        f"{row['speed_over_best_fixed']:.3f} ({min(spread):.3f}-{max(spread):.3f}) of the best "
        f"(exit {layer} K={length}, {row['best_fixed_over_plain']:.3f}x), "
        f"{row['drafted_per_step']:.2f} tokens drafted a step"
    )


def main(
    traces: Annotated[Path, typer.Argument(help="beginning of the files' names")],
    times: Annotated[Path, typer.Option(help="step times")],
    temperatures: Annotated[str, typer.Option(help="comma-separated")] = "1,0",
    batches: Annotated[str, typer.Option(help="comma-separated: requests at a time")] = "1,8",
    passes: Annotated[int, typer.Option(min=1, help="how often all texts are served")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="replays of each controller")] = 3,
    output: Annotated[Path, typer.Option(help="rows are added to it")] = RESULTS,
) -> None:
    """Replay, print and keep the rows."""
    timed = [json.loads(line) for line in times.read_text().splitlines()]
    source = {"traces": traces.name, "times": times.name, "model": timed[0]["model"]}
    source |= {"times_taken": {k: timed[0][k] for k in ("commit", "date", "cpu", "threads")}}
    source |= {"passes": passes, **provenance()}
    for temperature in map(float, temperatures.split(",")):
        drafts = DraftTraces.load(traces.with_name(f"{traces.name}_{temperature:g}.npz"))
        steps = StepTimes.of_rows(timed)
        for batch in map(int, batches.split(",")):
            for found in rows(drafts, steps, batch, passes, seeds):
                row = {"temperature": temperature, "batch": batch, **found}
                with output.open("a") as file:
                    file.write(json.dumps({**row, **source}) + "\n")
                print(show(row), flush=True)


if __name__ == "__main__":
    typer.run(main)
