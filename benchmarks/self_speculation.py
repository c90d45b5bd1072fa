"""Self-speculation against plain decoding and vLLM's own methods, on a model of the zoo.

Every engine has a process of its own. The plain one stays; beside it one other at a time takes
turns with it (plain, method, plain, method, plain ...), so that each method is compared with
plain decoding measured right before and after it. `--turn` makes turns short: a few prompts of
every method of an engine, then the next few, so that a machine whose speed swings is as fast for
one as for the other, and `--together` keeps all engines alive for that, in as much memory.
Prompts are held-out source code; all
requests write the same number of tokens. One row for each method, temperature, batch size and
repeat goes to results/self_speculation.jsonl as soon as it is measured; rows that are there
already, of the same run (by default: the same commit) and settings, are not measured again.

    python benchmarks/self_speculation.py                       # all on `expanded`: hours
    python benchmarks/self_speculation.py --methods 'ngram$|early_exit 4' --batches 1
    python benchmarks/self_speculation.py --quick               # does it run? (nano)
    python benchmarks/plot_self_speculation.py                  # pictures of the rows
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from engine_worker import EngineSettings, Job, Timed, Worker, WorkerError
from provenance import provenance
from speculation_methods import ADAPTER, VOCABULARY, Method, all_methods, resolved
from speculation_rows import cells, read

from vllm_spec_plugins import zoo
from vllm_spec_plugins.adapter_file import AdapterCard
from vllm_spec_plugins.calibration.texts import TextTokenizer, windows
from vllm_spec_plugins.cli.comparison import distinct_ngram_share
from vllm_spec_plugins.registry import Kind, installed
from vllm_spec_plugins.zoo.adapter_expansion import expand_adapter
from vllm_spec_plugins.zoo.corpus import held_out_files
from vllm_spec_plugins.zoo.recipes import ExpandedRecipe

RESULTS = Path(__file__).parent / "results" / "self_speculation.jsonl"
PROMPT_TOKENS = 128
#: Plain decoding does not depend on the text: each of its turns takes a share of the prompts.
PLAIN_SHARE = 4
#: Seconds after which idle threads of the engine that had its turn are asleep.
SETTLE = 0.25
#: What `--quick` measures, of `nano`.
QUICK = r"draft_model K=2 probabilistic$|early_exit 2 (K=2|expected_speedup)( ranked)?$|auto del"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run measures, beside its methods.

    Attributes:
        model: Of the zoo.
        prompts: How many.
        tokens: New tokens of each.
        repeats: Of everything.
        temperatures: Each with every batch size.
        batches: Requests at a time.
        threads: Of each engine.
        turn: Prompts of a turn.
    """

    model: str
    prompts: int
    tokens: int
    repeats: int
    temperatures: Sequence[float]
    batches: Sequence[int]
    threads: int
    turn: int

    def turns(self, batch: int) -> Iterator[slice]:
        """Prompts of each turn of a repeat; none has fewer than a batch."""
        size = max(self.turn, batch)
        ends = [*range(size, self.prompts - batch + 1, size), self.prompts]
        yield from map(slice, [0, *ends[:-1]], ends)

    def engine(self, speculative_config: dict[str, Any] | None) -> EngineSettings:
        return EngineSettings(
            str(zoo.ensure(self.model)),
            speculative_config,
            max(self.batches),
            PROMPT_TOKENS,
            self.tokens,
        )

    def key(self, method: str, temperature: float, batch: int, repeat: int) -> tuple[Any, ...]:
        """What makes a row this one."""
        return (
            self.model, self.prompts, self.tokens, str(self.threads),
            method, temperature, batch, repeat,
        )  # fmt: skip


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """`Settings.key` of a row."""
    names = ("model", "prompts", "tokens_per_prompt", "threads")
    return tuple(row[name] for name in (*names, "method", "temperature", "batch", "repeat"))


@dataclass(slots=True)
class Plain:
    """Plain decoding, which takes its turns between the methods.

    Attributes:
        worker: Its engine.
        settings: Of the run.
        prompts: All of them.
        greedy_texts: Continuations at temperature 0, by number of the prompt.
    """

    worker: Worker
    settings: Settings
    prompts: Sequence[Sequence[int]]
    greedy_texts: dict[int, list[int]] = field(default_factory=dict)
    _next: int = 0

    def turn(self, temperature: float, batch: int) -> Timed:
        """The next few prompts."""
        time.sleep(SETTLE)
        count = max(batch, -(-self.settings.turn // PLAIN_SHARE))
        chosen = [(self._next + i) % len(self.prompts) for i in range(count)]
        self._next = (self._next + count) % len(self.prompts)
        tokens = self.settings.tokens
        timed = self.worker.run(Job([self.prompts[i] for i in chosen], temperature, batch, tokens))
        if temperature == 0:
            self.greedy_texts.update(zip(chosen, timed.texts, strict=True))
        return timed


def held_out_prompts(folder: Path, number: int) -> list[list[int]]:
    """Parts of source files that no model of the zoo has seen, in turns from all files."""
    tokenizer = TextTokenizer(folder)
    by_file = [list(windows(tokenizer, [file.text], PROMPT_TOKENS)) for file in held_out_files()]
    in_turns = [
        part.tolist()
        for turn in itertools.zip_longest(*by_file)
        for part in turn
        if part is not None
    ]
    if len(in_turns) < number:
        raise typer.BadParameter(f"there are {len(in_turns)} held-out prompts, not {number}")
    return in_turns[:number]


def make_vocabulary(model: str, folder: Path) -> None:
    """A ranked vocabulary counted in the zoo's training text, by `vllm-spec calibrate vocab`."""
    path = folder / VOCABULARY
    command = ("-m", "vllm_spec_plugins.cli", "calibrate", "vocab", model)
    subprocess.run(
        [sys.executable, "-P", *command, "--texts", "zoo", "--output", str(path)],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def make_adapter(model: str, path: Path, folder: Path) -> int:
    """An adapter of `model`, or of the model it was expanded from, as one of `model`.

    Returns:
        The layers before it.
    """
    recipe, output = zoo.RECIPES[model], folder / ADAPTER
    if isinstance(recipe, ExpandedRecipe):
        source = zoo.RECIPES[recipe.source]
        return expand_adapter(path, source.architecture, recipe.architecture, output).exit_layer
    shutil.copyfile(path, output)
    return AdapterCard.read(output).exit_layer


def row(
    settings: Settings, method: Method, temperature: float, batch: int, repeat: int,
    turns: Sequence[Timed], beside: Sequence[Timed], greedy_texts: dict[int, list[int]],
) -> dict[str, Any]:  # fmt: skip
    """One repeat of a method, and plain decoding before and after its turns."""
    timed = together(turns)
    speed = timed.tokens / timed.seconds
    plain = sum(p.tokens for p in beside) / sum(p.seconds for p in beside)
    found: dict[str, Any] = {
        "benchmark": "self_speculation",
        "model": settings.model,
        "method": method.name,
        "exit_layer": method.exit_layer,
        "length": method.length,
        "ranked": method.ranked,
        "speculative_config": method.speculative_config,
        "temperature": temperature,
        "batch": batch,
        "prompts": settings.prompts,
        "tokens_per_prompt": settings.tokens,
        "repeat": repeat,
        "tokens_per_second": speed,
        "plain_tokens_per_second": plain,
        "speed_over_plain": speed / plain,
        "acceptance_length": 1 + timed.accepted / timed.drafts if timed.drafts else None,
        "acceptance_rate": timed.accepted / timed.drafted if timed.drafted else None,
        "drafted_per_draft": timed.drafted / timed.drafts if timed.drafts else 0.0,
        "tokens_per_step": timed.tokens / timed.steps / batch,
        "step_ms": timed.step_ms,
        "plain_step_ms": [p.step_ms for p in beside],
        "turns": [[t.tokens, t.seconds] for t in turns],
        "plain_turns": [[p.tokens, p.seconds] for p in beside],
        "drafting_share": timed.draft_seconds / timed.seconds,
        "full_steps": timed.steps,
        "seconds": timed.seconds,
        "wall_seconds": timed.wall_seconds,
        "distinct_8gram_share": distinct_ngram_share(timed.texts, 8),
    }
    if temperature == 0:
        compared = {i: text for i, text in greedy_texts.items() if i < len(timed.texts)}
        same = sum(timed.texts[i] == text for i, text in compared.items())
        found["same_text_as_plain"] = [same, len(compared)]
    return {**found, "load_average": round(os.getloadavg()[0], 1)}


def physical_cores() -> int:
    """Cores, of which each may be two or more CPUs to the system."""
    with contextlib.suppress(OSError):
        pairs = re.findall(
            r"physical id\s*:\s*(\d+).*?core id\s*:\s*(\d+)",
            Path("/proc/cpuinfo").read_text(),
            re.DOTALL,
        )
        if pairs:
            return len(set(pairs))
    return os.cpu_count() or 1


def todo(
    settings: Settings, methods: Sequence[Method], done: set[tuple[Any, ...]]
) -> list[tuple[Method, float, int, int]]:
    """Every turn that has no row yet."""
    return [
        (method, temperature, batch, repeat)
        for method in methods
        for temperature in settings.temperatures
        for batch in settings.batches
        for repeat in range(settings.repeats)
        if not (method.greedy_only and temperature)
        and settings.key(method.name, temperature, batch, repeat) not in done
    ]


def measure(
    settings: Settings,
    plain: Plain,
    workers: Mapping[str, Worker],
    turns: Sequence[tuple[Method, float, int, int]],
) -> Iterator[dict[str, Any]]:
    """The turns of some engines: all methods in each setting and repeat, plain in between.

    `workers`: by the config they started with, as JSON.
    """
    prompts, warm = plain.prompts, set()

    def job(method: Method, temperature: float, batch: int, part: slice) -> Job:
        limit, control = method.draft_limit, method.length_control
        return Job(prompts[part], temperature, batch, settings.tokens, limit, control)

    def run(method: Method, temperature: float, batch: int, part: slice) -> Timed:
        return workers[json.dumps(method.engine)].run(job(method, temperature, batch, part))

    for temperature, batch, repeat in itertools.product(
        settings.temperatures, settings.batches, range(settings.repeats)
    ):
        here = [method for method, *where in turns if where == [temperature, batch, repeat]]
        if not here:
            continue
        for method in here:
            if (kind := (method.name, temperature, batch)) not in warm:
                run(method, temperature, batch, slice(batch))
                warm.add(kind)
        taken: dict[str, list[Timed]] = {method.name: [] for method in here}
        beside: dict[str, list[Timed]] = {method.name: [] for method in here}
        before = plain.turn(temperature, batch)
        for part in settings.turns(batch):
            for method in here:
                time.sleep(SETTLE)
                taken[method.name].append(run(method, temperature, batch, part))
                after = plain.turn(temperature, batch)
                beside[method.name] += before, after
                before = after
        for method in here:
            yield row(
                settings, method, temperature, batch, repeat,
                taken[method.name], beside[method.name], plain.greedy_texts,
            )  # fmt: skip


def together(turns: Sequence[Timed]) -> Timed:
    """Several turns as one; the median step is that of the median turn."""
    return Timed(
        step_ms=median(turn.step_ms for turn in turns),
        texts=[text for turn in turns for text in turn.texts],
        **{
            name: sum(getattr(turn, name) for turn in turns)
            for name in (
                "wall_seconds", "seconds", "tokens", "steps",
                "draft_seconds", "drafts", "drafted", "accepted",
            )
        },
    )  # fmt: skip


def estimate(plain: Plain, turns: Sequence[tuple[Method, float, int, int]], engines: int) -> float:
    """Seconds all turns may take, from one pass of plain decoding: no method faster than it."""
    settings, total = plain.settings, engines * plain.worker.start_seconds
    for temperature, batch in itertools.product(settings.temperatures, settings.batches):
        timed = plain.turn(temperature, batch)
        per_prompt = timed.wall_seconds / len(timed.texts) + SETTLE / len(timed.texts)
        here = [turn for turn in turns if turn[1:3] == (temperature, batch)]
        warm_ups = batch * len({turn[0].name for turn in here})
        between = len(timed.texts) * len(list(settings.turns(batch)))
        total += per_prompt * (warm_ups + len(here) * (settings.prompts + between))
    return total


def numbers(text: str) -> list[float]:
    """Comma-separated."""
    return [float(part) for part in text.split(",")]


def main(
    model: Annotated[str, typer.Option(help="of the zoo")] = "expanded",
    prompts: Annotated[int, typer.Option(min=1, help="held-out prompts")] = 32,
    tokens: Annotated[int, typer.Option(min=16, help="new tokens of each")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="of everything")] = 3,
    methods: Annotated[str, typer.Option(help="those whose name has this regex")] = "",
    temperatures: Annotated[str, typer.Option(help="comma-separated")] = "1,0",
    batches: Annotated[str, typer.Option(help="comma-separated: requests at a time")] = "1,8",
    threads: Annotated[int, typer.Option(help="of each engine; 0: physical cores")] = 0,
    turn: Annotated[
        int, typer.Option(min=0, help="prompts of a turn, or a batch if that is more; 0: all")
    ] = 0,
    vocabulary_size: Annotated[int, typer.Option(help="tokens of the ranked vocabulary")] = 2048,
    dynamic_tokens: Annotated[int, typer.Option(help="beside the ranked ones")] = 64,
    adapter: Annotated[
        Path | None, typer.Option(help="of the model, or of the one it was expanded from")
    ] = None,
    output: Annotated[Path, typer.Option(help="rows are added to it")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="a few methods on nano")] = False,
    together: Annotated[bool, typer.Option("--together", help="all engines take turns")] = False,
    run: Annotated[
        str, typer.Option(help="name that the rows of several commands share; default: the commit")
    ] = "",
    list_only: Annotated[bool, typer.Option("--list", help="name the methods, stop")] = False,
) -> None:
    """Measure, print and keep the rows."""
    if quick:
        model, prompts, tokens, repeats, threads = "nano", 8, 16, 1, threads or 1
        methods = methods or QUICK
    settings = Settings(
        model, prompts, tokens, repeats, numbers(temperatures),
        [int(batch) for batch in numbers(batches)], threads or physical_cores(), turn or prompts,
    )  # fmt: skip
    controllers = installed().names(Kind.LENGTH_CONTROLLER)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        adapter_exit = None if adapter is None else make_adapter(model, adapter, files)
        chosen = [
            method
            for method in all_methods(
                model, controllers, vocabulary_size, dynamic_tokens, adapter_exit
            )
            if re.search(methods, method.name)
        ]
        if list_only:
            print("\n".join(method.name for method in chosen))
            return
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)  # for the rows: the engines have it
        source = provenance()
        source = {"run": run or source["commit"], **source}
        done = {key_of(r) for r in read(output) if r["run"] == source["run"]}
        turns = todo(settings, chosen, done)
        by_engine: dict[str, list[tuple[Method, float, int, int]]] = {}
        for wanted in turns:
            by_engine.setdefault(json.dumps(wanted[0].engine), []).append(wanted)
        print(f"{len(chosen)} methods on {len(by_engine)} engines, {len(turns)} rows to measure")
        if turns:
            groups = [list(by_engine)] if together else [[config] for config in by_engine]
            failed = measure_all(settings, by_engine, groups, files, output, source)
            report(output, source["run"], settings)
            if failed:
                print("FAILED:\n" + "\n".join(failed), file=sys.stderr)
                raise typer.Exit(1)


def measure_all(
    settings: Settings,
    by_engine: dict[str, list[tuple[Method, float, int, int]]],
    groups: Sequence[Sequence[str]],
    files: Path,
    output: Path,
    source: dict[str, Any],
) -> list[str]:
    """Measure every engine's turns, with what the methods' configs name in `files`.

    Engines of a group, named by their configs, live together and take turns.

    Returns:
        What went wrong.
    """
    failed: list[str] = []
    output.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        model = zoo.ensure(settings.model)
        if any(turns[0][0].ranked for turns in by_engine.values()):
            make_vocabulary(str(model), files)
        worker = Worker(settings.engine(None), settings.threads, files / "plain.log")
        stack.callback(worker.close)
        plain = Plain(worker, settings, held_out_prompts(model, settings.prompts))
        turns = [turn for turns in by_engine.values() for turn in turns]
        expected = estimate(plain, turns, len(by_engine))
        print(f"about {expected / 60:.0f} minutes, if no method is faster than plain decoding")
        began, count = time.perf_counter(), 0
        file = stack.enter_context(output.open("a"))
        for group in groups:
            of_group = [turn for config in group for turn in by_engine[config]]
            try:
                with contextlib.ExitStack() as alive:
                    workers = {}
                    for config in group:
                        speculative = resolved(json.loads(config), files)
                        log = files / f"{list(by_engine).index(config)}.log"
                        worker = Worker(settings.engine(speculative), settings.threads, log)
                        alive.callback(worker.close)
                        workers[config] = worker
                    for found in measure(settings, plain, workers, of_group):
                        count += 1
                        file.write(json.dumps({**found, **source}) + "\n")
                        file.flush()
                        minutes = (time.perf_counter() - began) / 60
                        print(f"{minutes:5.1f} min {count}/{len(turns)} {line(found)}", flush=True)
            except WorkerError as error:
                failed.append(f"{', '.join(group)}: {error}")
    return failed


def line(found: dict[str, Any]) -> str:
    """A row, for people."""
    length = found["acceptance_length"]
    same = found.get("same_text_as_plain")
    return (
        f"{found['method']:<42} T={found['temperature']:g} batch {found['batch']}: "
        f"{found['tokens_per_second']:7.1f} tokens/s, {found['speed_over_plain']:.3f}x plain, "
        f"acceptance length {f'{length:.2f}' if length else '-'}, "
        f"drafting {found['drafting_share']:.0%}, "
        f"distinct 8-grams {found['distinct_8gram_share']:.2f}"
        + (f", same text {same[0]}/{same[1]}" if same else "")
    )


def report(output: Path, run: str, settings: Settings) -> None:
    """Medians over repeats, best first."""
    rows = [r for r in read(output) if (r["run"], r["model"]) == (run, settings.model)]
    for temperature, batch in itertools.product(settings.temperatures, settings.batches):
        here = [c for c in cells(rows) if (c.temperature, c.batch) == (temperature, batch)]
        print(
            f"\n{settings.model}, temperature {temperature:g}, batch {batch}: over plain decoding"
        )
        for cell in sorted(here, key=lambda c: -c.speed):
            print(f"  {cell.speed:.3f} ({cell.low:.3f}-{cell.high:.3f})  {cell.method}")


if __name__ == "__main__":
    typer.run(main)
