"""A diffusion drafter against vLLM's `draft_model`, on the zoo's `small`.

The draft model is the zoo's `nano`; give the folder of a diffusion drafter of about its size. Plain
decoding takes turns with each method, as in `self_speculation.py`. Beside speed and acceptance
length, each row has what drafting costs: milliseconds of a step, accepted tokens for each of them,
and passes of the drafter for each accepted token. One row for each method, temperature, batch size
and repeat goes to results/diffusion.jsonl as soon as it is measured; rows that are there already,
of the same run (by default: the same commit) and settings, are not measured again.

    vllm-spec calibrate diffusion-drafter small --texts zoo --output DRAFTER
    python benchmarks/diffusion.py DRAFTER
    python benchmarks/diffusion.py DRAFTER --methods 'K=8' --batches 1 --temperatures 0
    python benchmarks/diffusion.py DRAFTER --quick        # does it run?
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from engine_worker import Worker, WorkerError
from provenance import provenance
from self_speculation import (
    Plain,
    Settings,
    estimate,
    held_out_prompts,
    key_of,
    line,
    measure,
    numbers,
    physical_cores,
    report,
    todo,
)
from speculation_methods import Method
from speculation_rows import read

from vllm_spec_plugins import zoo

RESULTS = Path(__file__).parent / "results" / "diffusion.jsonl"
#: Where configs say this, `resolved` puts the folder.
DRAFTER = "the diffusion drafter"
DRAFT_MODEL = "nano"
LENGTHS = (4, 8, 16)
#: Beside drafts of a fixed length.
CONTROLLERS = ("adaptive_draft_length", "expected_speedup")
#: What is drawn or searched, as it differs from the default.
DRAFTS: Mapping[str, Mapping[str, Any]] = {
    "": {},
    " path": {"drafts": "path"},
    " two steps": {"denoising_steps": 2},
}


def all_methods(lengths: Sequence[int]) -> Iterator[Method]:
    """Every way of drafting, those of one engine together."""
    for length in lengths:
        ours = {
            "method": "draft_model",
            "model": DRAFT_MODEL,
            "num_speculative_tokens": length,
            "draft_sample_method": "probabilistic",
            "verifier": "lossless",
        }
        yield Method(f"draft_model K={length}", ours, ours)
        for suffix, options in DRAFTS.items():
            engine = {
                "method": "diffusion",
                "model": DRAFTER,
                "num_speculative_tokens": length,
                **options,
            }
            name = f"diffusion K={length}{suffix}"
            yield Method(name, engine, engine, length_control="fixed")
            for control in CONTROLLERS:
                config = {**engine, "length_control": control}
                yield Method(f"{name} {control}", config, engine, length_control=control)


def resolved(config: Mapping[str, Any], drafter: Path) -> dict[str, Any]:
    """The config with folders instead of names."""
    model = str(drafter) if config["model"] == DRAFTER else str(zoo.ensure(config["model"]))
    return {**config, "model": model}


def costs(found: Mapping[str, Any]) -> dict[str, float | None]:
    """What drafting cost in a row, and what it brought."""
    config, steps = found["speculative_config"], found["full_steps"]
    milliseconds = 1e3 * found["drafting_share"] * found["seconds"]
    accepted = (found["tokens_per_step"] - 1) * found["batch"] * steps
    one_by_one = config["method"] == "draft_model"
    passes = config["num_speculative_tokens"] if one_by_one else config.get("denoising_steps", 1)
    per_draft = (found["acceptance_length"] or 1) - 1
    return {
        "drafting_ms_per_step": milliseconds / steps,
        "accepted_per_drafting_ms": accepted / milliseconds if milliseconds else None,
        "drafter_passes_per_accepted": passes / per_draft if per_draft else None,
    }


def described(drafter: Path) -> dict[str, Any]:
    """Sizes of both drafters, for the rows."""
    from vllm_spec_plugins.diffusion.folder import read_config

    def size(shapes: Mapping[str, tuple[int, ...]]) -> int:
        total = 0
        for shape in shapes.values():
            count = 1
            for side in shape:
                count *= side
            total += count
        return total

    config = read_config(drafter)
    return {
        "drafter_parameters": size(config.weight_shapes()),
        "drafter_layers": config.num_layers,
        "drafter_attention": config.attention_pattern,
        "draft_model_parameters": size(_shapes_of(zoo.ensure(DRAFT_MODEL))),
    }


def _shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        names = list(file.keys())
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def main(
    drafter: Annotated[Path, typer.Argument(help="folder of a diffusion drafter for the model")],
    model: Annotated[str, typer.Option(help="of the zoo")] = "small",
    prompts: Annotated[int, typer.Option(min=1, help="held-out prompts")] = 32,
    tokens: Annotated[int, typer.Option(min=16, help="new tokens of each")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="of everything")] = 3,
    methods: Annotated[str, typer.Option(help="those whose name has this regex")] = "",
    lengths: Annotated[str, typer.Option(help="comma-separated")] = "4,8,16",
    temperatures: Annotated[str, typer.Option(help="comma-separated")] = "1,0",
    batches: Annotated[str, typer.Option(help="comma-separated: requests at a time")] = "1,8",
    threads: Annotated[int, typer.Option(help="of each engine; 0: physical cores")] = 0,
    output: Annotated[Path, typer.Option(help="rows are added to it")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="few prompts, K=4")] = False,
    run: Annotated[
        str, typer.Option(help="name that the rows of several commands share; default: the commit")
    ] = "",
    list_only: Annotated[bool, typer.Option("--list", help="name the methods, stop")] = False,
) -> None:
    """Measure, print and keep the rows."""
    if quick:
        prompts, tokens, repeats, threads, lengths = 4, 16, 1, threads or 1, "4"
        methods = methods or "draft_model|K=4( path)?( adaptive_draft_length)?$"
    settings = Settings(
        model, prompts, tokens, repeats, numbers(temperatures),
        [int(batch) for batch in numbers(batches)], threads or physical_cores(),
    )  # fmt: skip
    every = all_methods([int(length) for length in numbers(lengths)])
    chosen = [method for method in every if re.search(methods, method.name)]
    if list_only:
        print("\n".join(method.name for method in chosen))
        return
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)  # for the rows: the engines have it
    source = {**described(drafter), **provenance()}
    source["run"] = run or source["commit"]
    done = {key_of(row) for row in read(output) if row["run"] == source["run"]}
    turns = todo(settings, chosen, done)
    if turns:
        failed = measure_all(settings, drafter, turns, output, source)
        report(output, source["run"], settings)
        if failed:
            print("FAILED:\n" + "\n".join(failed), file=sys.stderr)
            raise typer.Exit(1)


def measure_all(
    settings: Settings,
    drafter: Path,
    turns: Sequence[tuple[Method, float, int, int]],
    output: Path,
    source: Mapping[str, Any],
) -> list[str]:
    """Measure every engine's turns. Returns what went wrong."""
    by_engine: dict[str, list[tuple[Method, float, int, int]]] = {}
    for turn in turns:
        by_engine.setdefault(json.dumps(turn[0].engine), []).append(turn)
    failed: list[str] = []
    output.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        worker = Worker(settings.engine(None), settings.threads, logs / "plain.log")
        stack.callback(worker.close)
        folder = zoo.ensure(settings.model)
        plain = Plain(worker, settings, held_out_prompts(folder, settings.prompts))
        expected = estimate(plain, turns, len(by_engine))
        print(f"{len(turns)} rows: about {expected / 60:.0f} minutes, if nothing is faster")
        began, count = time.perf_counter(), 0
        file = stack.enter_context(output.open("a"))
        for number, (config, of_engine) in enumerate(by_engine.items()):
            speculative = resolved(json.loads(config), drafter)
            log = logs / f"{number}.log"
            try:
                other = Worker(settings.engine(speculative), settings.threads, log)
                with contextlib.closing(other):
                    for found in measure(settings, plain, other, of_engine):
                        count += 1
                        row = {**found, "benchmark": "diffusion", **costs(found), **source}
                        file.write(json.dumps(row) + "\n")
                        file.flush()
                        minutes = (time.perf_counter() - began) / 60
                        print(f"{minutes:5.1f} min {count}/{len(turns)} {told(row)}", flush=True)
            except WorkerError as error:
                failed.append(f"{config}: {error}")
    return failed


def told(row: dict[str, Any]) -> str:
    """A row, for people."""
    rate, passes = row["accepted_per_drafting_ms"], row["drafter_passes_per_accepted"]
    return (
        f"{line(row)}, {row['drafting_ms_per_step']:.2f} ms drafting a step"
        + (f", {rate:.3f} accepted per ms of it" if rate is not None else "")
        + (f", {passes:.2f} passes per accepted token" if passes is not None else "")
    )


if __name__ == "__main__":
    typer.run(main)
