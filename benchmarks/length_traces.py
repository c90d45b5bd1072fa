"""Records what `testing.length_replay` replays: drafts at every position, and step times.

Texts are written by an engine that serves `early_exit` with all exits. Then every position of
every text becomes a request of its own, which drafts the most tokens after one exit, has them
verified, and is ended. One file of drafts for each temperature; it does not depend on time.

Step times are those of an engine whose draft length changes at random from step to step, one
JSON line for each kind of step with the times of all its steps; they want a quiet machine.

    python benchmarks/length_traces.py drafts small tests/traces/small
    python benchmarks/length_traces.py times small tests/traces/small_times.jsonl
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from engine_worker import ENVIRONMENT, Engine, EngineSettings, Job

os.environ.update(ENVIRONMENT)

import numpy as np
import typer
from numpy.typing import NDArray
from provenance import provenance
from self_speculation import PROMPT_TOKENS, held_out_prompts
from speculation_methods import EXITS, MOST

from vllm_spec_plugins import zoo
from vllm_spec_plugins.exit_selection import ExitController, ExitSelection
from vllm_spec_plugins.length_control import (
    ExpectedSpeedup,
    ExpectedSpeedupOptions,
    LengthControlOptions,
    RequestKeys,
)
from vllm_spec_plugins.step_cost import StepTime
from vllm_spec_plugins.testing.length_replay import DraftTraces

app = typer.Typer(add_completion=False, no_args_is_help=True)
#: Requests that draft side by side while traces are recorded.
AT_ONCE = 32


class Recorder(ExitController):
    """Drafts as many tokens as it is told after the exit it is told, and keeps what it sees."""

    sample_every = 1

    def __init__(self, context: Any) -> None:
        super().__init__(LengthControlOptions(), context)
        self.wanted = self.layer = 1
        self.length = context.facts.num_speculative_tokens
        #: By request: draft tokens accepted, and their confidences.
        self.accepted: dict[str, int] = {}
        self.confidences: dict[str, list[float]] = {}
        #: By request, at the last position of its prompt: what `ExitSelection.observe` is told
        #: of each exit.
        self.shadow: dict[str, list[NDArray[np.floating]]] = {}

    def set_exits(self, selection: ExitSelection) -> None:
        super().set_exits(selection)
        selection.observe = self._observe_exits

    def limits(self, requests: RequestKeys) -> NDArray[np.int64]:
        self.choose_layer(self.wanted)
        return np.full(len(requests.request_ids), self.length, dtype=np.int64)

    def stop_after(
        self, requests: RequestKeys, step: int, confidences: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        for name, confidence in zip(requests.request_ids, confidences.tolist(), strict=True):
            seen = self.confidences.setdefault(name, [])
            if len(seen) == step:  # of a request's first draft
                seen.append(confidence)
        return np.zeros(len(confidences), dtype=np.bool_)

    def observe(
        self, request_ids: Sequence[str], drafted: NDArray[np.int64], accepted: NDArray[np.int64]
    ) -> None:
        del drafted
        for name, count in zip(request_ids, accepted.tolist(), strict=True):
            self.accepted.setdefault(name, count)

    def _observe_exits(
        self,
        request_ids: Sequence[str],
        of_request: NDArray[np.integer],
        *told: NDArray[np.floating],
    ) -> None:
        requests: list[int] = of_request.tolist()
        for row, request in enumerate(requests):
            self.shadow.setdefault(request_ids[request], [table[row] for table in told])


class Changing(Recorder):
    """Another exit and length in every step, and what each took."""

    def __init__(self, context: Any, exits: Sequence[int], seed: int) -> None:
        super().__init__(context)
        self._exits, self._generator = exits, np.random.default_rng(seed)
        #: By requests, exit and draft tokens of each: seconds of verification and of drafting.
        self.seconds: dict[tuple[int, int, int], list[tuple[float, float]]] = {}

    def limits(self, requests: RequestKeys) -> NDArray[np.int64]:
        self.wanted = int(self._generator.choice(self._exits))
        self.length = int(self._generator.integers(self.context.facts.num_speculative_tokens + 1))
        return super().limits(requests)

    def observe_step_time(self, step: StepTime) -> None:
        if step.num_tokens == step.num_requests * (1 + step.longest_draft):  # all drafted alike
            key = step.num_requests, self._verified_layer or self.wanted, step.longest_draft
            self.seconds.setdefault(key, []).append((step.seconds, step.drafting_seconds))


def speculative_config(exits: Sequence[int]) -> dict[str, Any]:
    """With everything that choosing exits needs."""
    return {
        "method": "early_exit",
        "num_speculative_tokens": MOST,
        "exit_candidates": list(exits),
        "length_control": "del",
    }


def put(engine: Engine, controller: Any) -> Any:
    """Put a controller in the place of the engine's."""
    adapter = engine.runner.spec_plugins
    adapter.length_control, adapter._has_length_control = controller, True
    return controller


def record(
    engine: Engine,
    recorder: Recorder,
    exits: Sequence[int],
    prompts: Sequence[list[int]],
    temperature: float,
    count: int,
) -> DraftTraces:
    """Have texts of `count` tokens written, and drafts made at every position of them."""
    batch = min(AT_ONCE, len(prompts))
    texts = engine.run(Job(prompts, temperature, batch, count)).texts
    shape = (len(prompts), count, len(exits))
    accepted = np.zeros(shape, dtype=np.uint8)
    confidences = np.zeros((*shape, MOST - 1), dtype=np.float16)
    shadow = np.zeros((3, *shape), dtype=np.float16)
    began = time.perf_counter()
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        for index, layer in enumerate(exits):
            recorder.wanted = layer
            for first in range(0, count, AT_ONCE):
                places = range(first, min(first + AT_ONCE, count))
                names = draft_once(
                    engine, recorder, [prompt + text[:i] for i in places], temperature
                )
                for place, name in zip(places, names, strict=True):
                    accepted[number, place, index] = recorder.accepted.pop(name)
                    confidences[number, place, index] = recorder.confidences.pop(name)
                    shadow[:, number, place] = recorder.shadow.pop(name)
        seconds = time.perf_counter() - began
        print(
            f"T={temperature:g}: {number + 1} of {len(prompts)} texts, {seconds:.0f} s", flush=True
        )
    return DraftTraces(np.array(exits), accepted, confidences, *shadow)


def draft_once(
    engine: Engine, recorder: Recorder, prompts: Sequence[Sequence[int]], temperature: float
) -> list[str]:
    """Requests that draft once, side by side, and are ended; returns their names."""
    from vllm import SamplingParams

    core: Any = engine.llm.llm_engine
    # Room for the token before the draft, the draft, and the token after it.
    params = SamplingParams(
        temperature=temperature, max_tokens=MOST + 2, ignore_eos=True, detokenize=False
    )
    given = [str(time.perf_counter_ns()) + f" {i}" for i in range(len(prompts))]
    names = [
        core.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        for name, prompt in zip(given, prompts, strict=True)
    ]
    while not all(name in recorder.accepted for name in names):
        core.step()
    core.abort_request(given)
    core.step()  # tells who is gone
    return names


def started(
    model: str, exits: Sequence[int], most_requests: int, max_tokens: int, *, prefix_caching: bool
) -> Engine:
    """An engine that can draft after every one of some exits."""
    return Engine(
        EngineSettings(
            str(zoo.ensure(model)),
            speculative_config(exits),
            max_num_seqs=most_requests,
            prompt_tokens=PROMPT_TOKENS + max_tokens,
            max_tokens=max_tokens + MOST,
            prefix_caching=prefix_caching,
        )
    )


@app.command()
def drafts(
    model: Annotated[str, typer.Argument(help="of the zoo")],
    output: Annotated[Path, typer.Argument(help="beginning of the files' names")],
    prompts: Annotated[int, typer.Option(min=1, help="held-out prompts")] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="of each text")] = 64,
    temperatures: Annotated[str, typer.Option(help="comma-separated")] = "0,1",
) -> None:
    """Record what drafts at every position come to."""
    engine = started(model, EXITS[model], AT_ONCE, tokens, prefix_caching=True)
    recorder = put(engine, Recorder(engine.runner.spec_plugins.context))
    chosen = held_out_prompts(zoo.ensure(model), prompts)
    for temperature in map(float, temperatures.split(",")):
        traces = record(engine, recorder, EXITS[model], chosen, temperature, tokens)
        traces.save(output.with_name(f"{output.name}_{temperature:g}.npz"))


@app.command()
def times(
    model: Annotated[str, typer.Argument(help="of the zoo")],
    output: Annotated[Path, typer.Argument(help="rows are written to it")],
    batches: Annotated[str, typer.Option(help="comma-separated: requests at a time")] = "1,2,4,8",
    steps: Annotated[int, typer.Option(min=1, help="of every kind, about")] = 12,
    exits: Annotated[str, typer.Option(help="comma-separated; default: those of the drafts")] = "",
) -> None:
    """Time steps of all exits, lengths and batch sizes.

    `expanded` computes what `small` computes, so with `--exits 1,3,7,11` its times belong to the
    drafts of `small`.
    """
    sizes = [int(size) for size in batches.split(",")]
    layers = [int(layer) for layer in exits.split(",")] if exits else EXITS[model]
    engine = started(model, layers, max(sizes), 256, prefix_caching=False)
    adapter = engine.runner.spec_plugins
    told = Told(adapter.context)
    adapter.time_passes(told)
    source = {"model": model, **provenance()}
    costs = adapter.proposer._selection._costs
    rows = [
        {"kind": "passes", "num_tokens": told.num_tokens, "seconds": told.seconds},
        {
            "kind": "exit_costs",
            "batch_sizes": costs.batch_sizes.tolist(),
            "draft": costs.draft.tolist(),
            "verify": costs.verify.tolist(),
            "plain": costs.plain.tolist(),
        },
    ]
    changing = put(engine, Changing(adapter.context, layers, seed=0))
    chosen = held_out_prompts(zoo.ensure(model), max(sizes))
    wanted = steps * len(layers) * (MOST + 1)
    for size in sizes:
        while sum(len(s) for k, s in changing.seconds.items() if k[0] == size) < wanted:
            engine.run(Job(chosen[:size], 1.0, size, 256))
        print(f"batch {size} done", flush=True)
    for (size, layer, length), seconds in sorted(changing.seconds.items()):
        if size not in sizes:  # the last requests of a job
            continue
        kind = {"batch": size, "exit_layer": layer, "length": length}
        verify, draft = zip(*seconds, strict=True)
        rows.append({"kind": "step", **kind, "seconds": verify, "drafting_seconds": draft})
    output.write_text("".join(json.dumps({**row, **source}) + "\n" for row in rows))


class Told(ExpectedSpeedup):
    """Keeps the pass times it is told."""

    def __init__(self, context: Any) -> None:
        super().__init__(ExpectedSpeedupOptions.model_validate({}), context)
        self.num_tokens: list[int] = []
        self.seconds: list[float] = []

    def set_pass_times(self, num_tokens: NDArray[np.int64], seconds: NDArray[np.float64]) -> None:
        self.num_tokens, self.seconds = num_tokens.tolist(), seconds.tolist()


if __name__ == "__main__":
    app()
