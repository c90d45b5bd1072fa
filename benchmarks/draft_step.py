"""What one draft token of `early_exit` costs, and what a ranked vocabulary takes off it.

In a running engine, at one step of real requests, the step's drafting is repeated: whole
(`propose`); bare, the same layers, norm, head and draw token by token inside one persistent
step, without anything around them; and each part by itself. What `propose` takes above the bare
loop is overhead. Times are given of the clock and of the processor: beside other work the
former says little. Proposers with other draft vocabularies stand on
the same engine and take turns with the one that serves. Acceptance lengths are those of whole
texts, each proposer serving in turn. `expanded` computes what `small` computes, so its exit 2e
accepts like exit e there.

    OMP_NUM_THREADS=1 python benchmarks/draft_step.py
    OMP_NUM_THREADS=1 python benchmarks/draft_step.py --targets expanded:4 --prompts 0
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from engine_worker import ENVIRONMENT, Engine, EngineSettings, Job

os.environ.update(ENVIRONMENT)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import typer
from provenance import provenance
from self_speculation import PROMPT_TOKENS, held_out_prompts, make_vocabulary
from speculation_methods import VOCABULARY
from vllm_spec_plugins.proposers.early_exit import (  # pyright: ignore[reportMissingImports]
    EarlyExit,
    EarlyExitOptions,
)

from vllm_spec_plugins import zoo
from vllm_spec_plugins.draft_sampling import Draws, draw
from vllm_spec_plugins.proposer import DraftInput

RESULTS = Path(__file__).parent / "results" / "draft_step.jsonl"
#: Tokens of a draft.
MOST = 6
#: Draft tokens of the step that is taken apart come after so many tokens of text.
SETTLED_AFTER = 8
MAX_TOKENS = 128


class TakenApart:
    """Repeats one call of `propose` and its parts, once, in the middle of a request.

    Args:
        engine: Serves `early_exit` after `exit_layer` layers.
        exit_layer: E.
        variants: Proposers to compare, by name; "whole" is the one that serves.
        repeats: Of each.
    """

    def __init__(
        self, engine: Engine, exit_layer: int, variants: dict[str, EarlyExit], repeats: int
    ) -> None:
        self._adapter = engine.runner.spec_plugins
        self._stack = self._adapter.target.layers(0, exit_layer)
        self._variants, self._repeats = variants, repeats
        self._propose = variants["whole"].propose
        variants["whole"].propose = self.propose
        self.milliseconds: dict[str, list[float]] = {}
        self.processor_ms: dict[str, list[float]] = {}
        self._batch = 0

    def ask(self, batch: int) -> None:
        """Take the next settled step of so many requests apart."""
        self._batch, self.milliseconds, self.processor_ms = batch, {}, {}

    def propose(self, batch: DraftInput) -> Any:
        written = batch.num_tokens - batch.num_prompt_tokens
        if len(written) == self._batch and written.min() > SETTLED_AFTER:
            self._batch = 0
            # All of them draft in full: their slots are there, whoever asked for fewer.
            batch.max_draft[:] = MOST
            self._take_apart(batch)
        return self._propose(batch)

    def _time(self, name: str, run: Callable[[], Any], tokens: int = MOST) -> Any:
        """Keep the milliseconds per draft token of one call."""
        began, worked = time.perf_counter(), time.process_time()
        result = run()
        worked, ended = time.process_time() - worked, time.perf_counter()
        self.milliseconds.setdefault(name, []).append(1e3 * (ended - began) / tokens)
        self.processor_ms.setdefault(name, []).append(1e3 * worked / tokens)
        return result

    @torch.inference_mode()
    def _take_apart(self, batch: DraftInput) -> None:
        target = self._adapter.target
        count = len(batch.request_ids)
        token_ids = torch.from_numpy(batch.last_token_ids).to(torch.int64)
        positions = torch.from_numpy(batch.num_tokens - 1)
        sequences = target.sequences(batch.rows)
        half = torch.full((count, 1), 0.5, dtype=torch.float64)
        draws = Draws.of(batch.temperatures, half) if batch.temperatures.any() else None

        def layers() -> Any:
            for _ in range(MOST - 1):
                self._stack(target.embed(token_ids), positions)
            return self._stack(target.embed(token_ids), positions)

        def bare() -> None:
            for _ in range(MOST):
                state = self._stack(target.embed(token_ids), positions)
                draw(target.head.logits(target.final_norm(state)), draws, 0)

        def enter() -> None:
            for _ in range(MOST):
                with sequences.step(positions):
                    pass

        for _ in range(self._repeats):
            for name, variant in self._variants.items():
                run = self._propose if name == "whole" else variant.propose
                self._time(f"propose, {name}", lambda run=run: run(batch))
            with sequences.step(positions):
                self._time("bare", bare)
                state = self._time("layers", layers)
            self._time("enter a step", enter)
            normed = self._time("norm", lambda state=state: target.final_norm(state), 1)
            logits = self._time("head", lambda normed=normed: target.head.logits(normed), 1)
            self._time("draw", lambda x=logits: draw(x, draws, 0), 1)
        for name, variant in self._variants.items():
            if name != "whole":  # nobody else tells it that the requests go
                variant.finish(batch.request_ids)


def acceptance_lengths(
    engine: Engine, variants: dict[str, EarlyExit], prompts: list[list[int]], temperature: float
) -> dict[str, float]:
    """Tokens per verified draft, bonus token included, with each proposer serving."""
    found = {}
    for name, variant in variants.items():
        engine.runner.spec_plugins.proposer = variant
        timed = engine.run(Job(prompts, temperature, 8, MAX_TOKENS))
        found[name] = 1 + timed.accepted / timed.drafts
    engine.runner.spec_plugins.proposer = variants["whole"]
    return found


def measure(
    model: str, exit_layer: int, sizes: list[int], num_prompts: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Rows of one model and exit."""
    folder = zoo.ensure(model)
    engine = Engine(
        EngineSettings(
            str(folder),
            {"method": "early_exit", "exit_layer": exit_layer, "num_speculative_tokens": MOST},
            max_num_seqs=8,
            prompt_tokens=PROMPT_TOKENS,
            max_tokens=MAX_TOKENS,
        )
    )
    adapter = engine.runner.spec_plugins
    variants: dict[str, EarlyExit] = {"whole": adapter.proposer}
    with tempfile.TemporaryDirectory() as place:
        make_vocabulary(str(folder), Path(place))
        path = Path(place) / VOCABULARY
        for size in sizes:
            for dynamic in (0, 64):
                options = EarlyExitOptions.model_validate(
                    {
                        "exit_layer": exit_layer,
                        "draft_vocabulary": {
                            "file": str(path),
                            "size": size,
                            "dynamic_tokens": dynamic,
                        },
                    }
                )
                name = f"{size} + {dynamic} dynamic" if dynamic else str(size)
                variants[name] = EarlyExit(options, adapter.context)
                variants[name].load(adapter.target)
    prompts = held_out_prompts(folder, max(num_prompts, 8))
    apart = TakenApart(engine, exit_layer, variants, repeats)
    for temperature in (1.0, 0.0):
        lengths = {}
        if num_prompts:
            lengths = acceptance_lengths(engine, variants, prompts[:num_prompts], temperature)
        for batch in (1, 8):
            apart.ask(batch)
            engine.run(Job(prompts[:batch], temperature, batch, MAX_TOKENS))
            spread = {
                name: [float(q) for q in np.quantile(taken, (0.25, 0.5, 0.75))]
                for name, taken in apart.milliseconds.items()
            }
            took = {name: median(taken) for name, taken in apart.milliseconds.items()}
            worked = {name: median(taken) for name, taken in apart.processor_ms.items()}
            whole = took["propose, whole"]
            common = {
                "benchmark": "draft_step",
                "model": model,
                "exit_layer": exit_layer,
                "temperature": temperature,
                "batch": batch,
                "draft_tokens": MOST,
                "repeats": repeats,
                "load_average": round(os.getloadavg()[0], 1),
            }
            yield {
                **common,
                "kind": "overhead",
                "propose_ms": whole,
                "parts_ms": {n: t for n, t in took.items() if not n.startswith("propose")},
                "over_layers_ms": whole - took["layers"],
                "overhead_ms": whole - took["bare"],
                "overhead_processor_ms": worked["propose, whole"] - worked["bare"],
                "quartiles_ms": spread,
                "processor_ms": worked,
            }
            for name in variants:
                here = took[f"propose, {name}"]
                yield {
                    **common,
                    "kind": "vocabulary",
                    "vocabulary": name,
                    "propose_ms": here,
                    "time_over_whole": here / whole,
                    "processor_time_over_whole": (
                        worked[f"propose, {name}"] / worked["propose, whole"]
                    ),
                    "prompts": num_prompts,
                    "acceptance_length": lengths.get(name),
                    "acceptance_over_whole": (
                        lengths[name] / lengths["whole"] if lengths else None
                    ),
                }


def show(row: dict[str, Any]) -> str:
    """A row, for people."""
    where = f"{row['model']} exit {row['exit_layer']} T={row['temperature']:g} batch {row['batch']}"
    if row["kind"] == "overhead":
        parts = ", ".join(f"{name} {ms:.3f}" for name, ms in row["parts_ms"].items())
        return (
            f"{where}: {row['propose_ms']:.3f} ms per draft token; {parts}; above the layers "
            f"{row['over_layers_ms']:.3f}, above the bare loop {row['overhead_ms']:.3f} "
            f"(processor {row['overhead_processor_ms']:.3f})"
        )
    length, share = row["acceptance_length"], row["acceptance_over_whole"]
    accepted = f", acceptance length {length:.3f} ({share - 1:+.1%})" if length else ""
    return (
        f"{where}: vocabulary {row['vocabulary']:<18} {row['propose_ms']:.3f} ms "
        f"({row['time_over_whole'] - 1:+.1%}, processor "
        f"{row['processor_time_over_whole'] - 1:+.1%}){accepted}"
    )


def main(
    targets: Annotated[
        str, typer.Option(help="comma-separated, model of the zoo:exit layer")
    ] = "nano:2,small:2,expanded:4",
    sizes: Annotated[str, typer.Option(help="of ranked vocabularies")] = "512,1024,2048,4096",
    prompts: Annotated[int, typer.Option(help="for acceptance lengths; 0: without")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="of every part")] = 100,
    output: Annotated[Path, typer.Option(help="rows are added to it")] = RESULTS,
) -> None:
    """Measure, print and keep the rows."""
    source = provenance()
    numbers = [int(size) for size in sizes.split(",") if size]
    for target in targets.split(","):
        model, exit_layer = target.split(":")
        for row in measure(model, int(exit_layer), numbers, prompts, repeats):
            with output.open("a") as file:
                file.write(json.dumps({**row, **source}) + "\n")
            print(show(row), flush=True)


if __name__ == "__main__":
    typer.run(main)
