"""Time vLLM serving `early_exit`: plain steps, draft tokens, verification of so many of them.

Each engine runs in a process of its own, one after the other, as a server would start it: same
environment variables, same threads. Inside, requests say themselves how long their drafts are
(`spec_decode.num_speculative_tokens`), so one engine times every length; lengths, batch sizes
and temperatures take turns. What `early_exit` takes is read off around its `propose`; the rest
of the step is verification.

Of each kind of step the lower quartile counts: whatever else the machine does only adds. On a
CPU with one thread it is the process's own processor time, which leaves most of that out. Every
engine also decodes without drafts, and engines are scaled to agree on that: a machine that was
slower while one of them ran does not count against it.

Run as a module this is that process: it reads a job as JSON from its input and writes what it
timed as JSON to the file the job names.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vllm_spec_plugins.errors import SpecPluginsError

from .draft_pass import DraftPass
from .round_costs import RoundCosts

#: Tokens of a timed request's prompt, and the longest sequence of the timed engine.
_PROMPT, _MAX_MODEL_LEN = 128, 1024
#: Every kind of step is timed so often in a row, in so many turns.
_STEPS, _TURNS = 8, 2
#: Steps after the first full one that are not counted.
_WARM_UP = 1


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engine to time, as it will serve.

    Attributes:
        model: Folder.
        dtype: vLLM's `--dtype`.
        eager: vLLM's `--enforce-eager`.
        early_exit: Options of every `early_exit` beside the layers it runs.
        adapter: File of an adapter, and the exit it stands behind; None: there is none.
    """

    model: str
    dtype: str = "auto"
    eager: bool = False
    early_exit: Mapping[str, Any] = field(default_factory=dict)
    adapter: tuple[str, int] | None = None

    def speculative(self, draft_pass: DraftPass, most: int) -> dict[str, Any]:
        """The speculative config of an engine with that draft pass."""
        adapter = {"adapter": self.adapter[0]} if self.adapter and draft_pass.adapter else {}
        return {
            "method": "early_exit",
            "num_speculative_tokens": most,
            **self.early_exit,
            **adapter,
            **draft_pass.options(),
        }


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of one kind of step, lower quartile.

    Attributes:
        batch: Requests.
        temperature: Theirs.
        length: Draft tokens of each; 0: none.
        step: The whole step.
        propose: Of it, drafting.
    """

    batch: int
    temperature: float
    length: int
    step: float
    propose: float


def measure_costs(
    choice: EngineChoice,
    exits: Sequence[int],
    num_layers: int,
    most: int,
    batches: Sequence[int],
    temperatures: Sequence[float],
    sublayers: bool = False,
    on_engine: Callable[[int, str], None] | None = None,
) -> list[RoundCosts]:
    """Start engines and time them.

    Args:
        choice: The engine.
        exits: Exits that are of interest; a few of them are timed, and all layers.
        num_layers: Of the target.
        most: Most draft tokens.
        batches: Numbers of requests.
        temperatures: Of the requests.
        sublayers: Whether to time what leaving out attention or feed-forward networks saves.
        on_engine: Told how many engines are done, and which one starts.

    Raises:
        SpecPluginsError: An engine cannot run; with the end of what it said.
    """
    engines = engines_to_time(choice, exits, num_layers, sublayers)
    timed: dict[DraftPass | None, list[Timed]] = {}
    for done, engine in enumerate(engines):
        if on_engine is not None:
            on_engine(done, f"exit {engine}" if engine else "plain decoding")
        timed[engine] = _in_process(choice, engine, most, batches, temperatures)
    return [
        _fit(timed, batch, temperature, num_layers)
        for batch in batches
        for temperature in temperatures
    ]


def engines_to_time(
    choice: EngineChoice, exits: Sequence[int], num_layers: int, sublayers: bool
) -> list[DraftPass | None]:
    """What is timed, each in an engine of its own; None: plain decoding."""
    inner = tuple(range(1, num_layers - 1))
    engines: list[DraftPass | None] = [None]
    engines += [DraftPass(e) for e in exits_to_time(exits, num_layers)]
    if sublayers and inner:
        engines.append(DraftPass(num_layers, skip_attention=inner))
        engines.append(DraftPass(num_layers, skip_ffn=inner))
    if choice.adapter:
        engines.append(DraftPass(choice.adapter[1], adapter=True))
    return engines


def exits_to_time(exits: Sequence[int], num_layers: int) -> list[int]:
    """The lowest exit, one in the middle, and all layers: the others lie on lines between."""
    return sorted({min(exits), (min(exits) + num_layers) // 2, num_layers})


def lengths_to_time(most: int) -> list[int]:
    """Draft lengths to time; the others lie on lines between."""
    return sorted({length for length in (1, 2, 4, most) if length <= most})


def _fit(
    timed: Mapping[DraftPass | None, Sequence[Timed]],
    batch: int,
    temperature: float,
    num_layers: int,
) -> RoundCosts:
    """The cost table of one batch size and temperature."""

    def of(engine: DraftPass | None) -> dict[int, Timed]:
        here = [t for t in timed[engine] if (t.batch, t.temperature) == (batch, temperature)]
        return {t.length: t for t in here}

    undrafted = {engine: of(engine)[0].step for engine in timed if engine is not None}
    usual = statistics.median(undrafted.values())
    verification: dict[int, list[float]] = {}
    per_token: dict[DraftPass, float] = {}
    for engine, without in undrafted.items():
        scale = usual / without
        drafted = {k: t for k, t in of(engine).items() if k}
        lengths, seconds = list(drafted), [t.propose for t in drafted.values()]
        # Slope: each token; the rest of drafting happens once a round, as verification does.
        slope = float(np.polyfit(lengths, seconds, 1)[0]) if len(lengths) > 1 else seconds[0]
        per_token[engine] = scale * slope
        for k, t in drafted.items():
            verification.setdefault(k, []).append(scale * (t.step - k * slope))
    whole = per_token[DraftPass(num_layers)]
    inner = max(num_layers - 2, 1)

    def saved(kind: str) -> float:
        found = [s for e, s in per_token.items() if getattr(e, kind)]
        return max(whole - found[0], 0.0) / inner if found else 0.0

    costs = RoundCosts(
        batch=batch,
        temperature=temperature,
        # Plain vLLM is no slower than vLLM with us in it: if it was, the machine was.
        plain=min(of(None)[0].step, usual),
        verification={k: statistics.median(seconds) for k, seconds in verification.items()},
        draft_step={
            e.exit_layer: s for e, s in per_token.items() if not e.num_skipped and not e.adapter
        },
        attention=saved("skip_attention"),
        ffn=saved("skip_ffn"),
    )
    for engine, seconds in per_token.items():
        if engine.adapter:
            bare = costs.draft(DraftPass(engine.exit_layer))
            costs = replace(costs, adapter=max(seconds - bare, 0.0))
    return costs


def _in_process(
    choice: EngineChoice,
    engine: DraftPass | None,
    most: int,
    batches: Sequence[int],
    temperatures: Sequence[float],
) -> list[Timed]:
    """Time one engine in a process of its own."""
    speculative = choice.speculative(engine, most) if engine else None
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "timed.json")
        job = {
            "model": choice.model,
            "dtype": choice.dtype,
            "eager": choice.eager,
            "speculative": speculative,
            "lengths": [0, *lengths_to_time(most)] if engine else [0],
            "batches": list(batches),
            "temperatures": list(temperatures),
            "output": str(output),
        }
        # In one process the proposer can be timed; a server runs the same code in another.
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        finished = subprocess.run(
            # -P: the folder we are called from holds no modules of ours.
            [sys.executable, "-P", "-m", __spec__.name],
            input=json.dumps(job),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if finished.returncode or not output.exists():
            end = "\n".join(finished.stdout.splitlines()[-12:])
            raise SpecPluginsError(f"timing {engine or 'plain decoding'} in vLLM failed:\n{end}")
        return [Timed(**row) for row in json.loads(output.read_text())]


class _Stopwatch:
    """Wraps the proposer's `propose`; remembers the last call.

    Attributes:
        clock: Seconds, as the whole timing counts them.
    """

    def __init__(self) -> None:
        self.clock: Callable[[], float] = time.perf_counter
        self.seconds = 0.0
        self.lengths: list[int] = []

    def wrap(self, proposer: Any) -> None:
        original = proposer.propose

        def propose(instance: Any, batch: Any) -> Any:
            _synchronise()
            started = self.clock()
            draft = original(instance, batch)
            _synchronise()
            self.seconds = self.clock() - started
            self.lengths = batch.max_draft.tolist()
            return draft

        proposer.propose = propose

    def take(self) -> tuple[float, list[int]]:
        """Seconds and draft lengths of the call since the last `take`; 0 and none if there was
        none."""
        taken = (self.seconds, self.lengths)
        self.seconds, self.lengths = 0.0, []
        return taken


def _synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _one_thread() -> bool:
    """Whether all of the engine's work is done by one thread of this process."""
    import torch

    return not torch.cuda.is_available() and torch.get_num_threads() == 1


def _lower_quartile(seconds: Iterable[float]) -> float:
    return float(np.quantile(list(seconds), 0.25))


def _time_steps(
    llm: Any, stopwatch: _Stopwatch, batch: int, temperature: float, length: int, turn: int
) -> list[tuple[float, float]]:
    """Seconds of steps and of drafting in them, for steps that verify and draft in full."""
    from vllm import SamplingParams

    core = llm.llm_engine
    options = {"num_speculative_tokens": length} if length else {"enabled": False}
    params = SamplingParams(
        temperature=temperature,
        max_tokens=_MAX_MODEL_LEN - _PROMPT - 1,
        ignore_eos=True,
        detokenize=False,
        seed=turn,
        extra_args={"spec_decode": options},
    )
    rng = np.random.default_rng(turn)
    vocab_size = llm.llm_engine.model_config.get_vocab_size()
    names = [f"{batch}-{temperature}-{length}-{turn}-{i}" for i in range(batch)]
    for name in names:
        prompt = rng.integers(0, vocab_size, size=_PROMPT).tolist()
        core.add_request(name, {"prompt_token_ids": prompt}, params)
    full = [length] * batch if length else []
    found: list[tuple[float, float]] = []
    # Drafted in full in the step before: this one verifies them all.
    verifies = False
    stopwatch.take()
    while core.has_unfinished_requests() and len(found) < _STEPS + _WARM_UP:
        started = stopwatch.clock()
        outputs = core.step()
        seconds = stopwatch.clock() - started
        emitted = sum(bool(o.outputs and o.outputs[0].token_ids) for o in outputs)
        propose, lengths = stopwatch.take()
        drafts = lengths == full
        if verifies and drafts and emitted == batch:
            found.append((seconds, propose))
        verifies = drafts and emitted == batch
    core.abort_request(names)
    while core.has_unfinished_requests():
        core.step()
    return found[_WARM_UP:]


def _child() -> None:
    """The process that holds one engine."""
    job = json.load(sys.stdin)
    from vllm import LLM

    stopwatch = _Stopwatch()
    if job["speculative"]:
        from vllm_spec_plugins.registry import Kind, installed

        stopwatch.wrap(installed().load(Kind.PROPOSER, job["speculative"]["method"]))
    llm = LLM(
        model=job["model"],
        dtype=job["dtype"],
        enforce_eager=job["eager"],
        skip_tokenizer_init=True,
        max_model_len=_MAX_MODEL_LEN,
        max_num_seqs=max(job["batches"]),
        enable_prefix_caching=False,
        speculative_config=job["speculative"],
    )
    kinds = [
        (batch, temperature, length)
        for batch in job["batches"]
        for temperature in job["temperatures"]
        for length in job["lengths"]
    ]
    if _one_thread():
        stopwatch.clock = time.process_time
    steps: dict[tuple[int, float, int], list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for turn in range(_TURNS):
        for kind in kinds:
            steps[kind] += _time_steps(llm, stopwatch, *kind, turn)
    timed = [
        {
            "batch": batch,
            "temperature": temperature,
            "length": length,
            "step": _lower_quartile(step for step, _ in steps[batch, temperature, length]),
            "propose": _lower_quartile(p for _, p in steps[batch, temperature, length]),
        }
        for batch, temperature, length in kinds
    ]
    Path(job["output"]).write_text(json.dumps(timed))


if __name__ == "__main__":
    _child()
