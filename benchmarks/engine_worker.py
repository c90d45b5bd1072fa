"""One vLLM engine in a process of its own, timed step by step on request.

As a script it reads one JSON object per line: first `EngineSettings`, then one `Job` after the
other; it answers each with one line. `Worker` is the other end. An engine that is not asked
sleeps, so several can be alive and take turns.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    # Without it vLLM's ngram takes threads from the target (`vllm-spec doctor`).
    "NUMBA_THREADING_LAYER": "workqueue",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

#: Of Linux's prctl.
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """An engine.

    Attributes:
        model: Folder.
        speculative_config: None for plain decoding.
        max_num_seqs: Most requests at once.
        prompt_tokens: Of every prompt.
        max_tokens: Most new tokens of a request.
        prefix_caching: Whether prompts that begin alike are read once.
    """

    model: str
    speculative_config: Mapping[str, Any] | None
    max_num_seqs: int
    prompt_tokens: int
    max_tokens: int
    prefix_caching: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """Prompts to continue.

    Attributes:
        prompts: Token ids of each.
        temperature: Of all.
        batch: So many requests are kept running.
        tokens: New tokens of each.
        draft_limit: Most draft tokens per step, asked for by each request; None: the engine's.
        length_control: Length controller beside a proposer of ours, as in a speculative config;
            None: the engine's own. Each is built once for a temperature and batch, and learns on.
    """

    prompts: Sequence[Sequence[int]]
    temperature: float
    batch: int
    tokens: int
    draft_limit: int | None = None
    length_control: Any = None


@dataclass(slots=True)
class Timed:
    """What one job took.

    Full steps are those with `batch` requests and no prompt among them: what serving does most
    of the time. Everything but `wall_seconds`, `texts` and the drafts is of full steps.

    Attributes:
        wall_seconds: Everything, prompts included.
        seconds: Of full steps.
        tokens: Emitted in full steps.
        step_ms: Median.
        steps: How many.
        draft_seconds: Of `seconds`, spent in the proposer.
        drafts: Drafts verified, in all steps.
        drafted: Their tokens.
        accepted: Of those, accepted.
        texts: Token ids of each continuation, in the order of the prompts.
    """

    wall_seconds: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    step_ms: float = 0.0
    steps: int = 0
    draft_seconds: float = 0.0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    texts: list[list[int]] = field(default_factory=list)


class WorkerError(Exception):
    """The engine's process ended; with the end of what it said."""


class Worker:
    """The process of one engine, from outside.

    Args:
        settings: The engine.
        threads: OpenMP threads.
        log: File for what the process says.

    Raises:
        WorkerError: From the constructor when the engine does not start, and from `run`.
    """

    def __init__(self, settings: EngineSettings, threads: int, log: Path) -> None:
        self._log = log
        started = time.perf_counter()
        with log.open("w") as said:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)},
            )
        self._ask(asdict(settings))
        #: Seconds until it was ready.
        self.start_seconds = time.perf_counter() - started

    def run(self, job: Job) -> Timed:
        """Have it do a job."""
        return Timed(**self._ask(asdict(job)))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            line = ""
        else:
            line = self._process.stdout.readline()
        if not line:
            self._process.kill()
            self._process.wait()
            end = "\n".join(self._log.read_text().splitlines()[-15:])
            raise WorkerError(f"the engine's process ended:\n{end}")
        return json.loads(line)


class Engine:
    """The engine, from inside its process."""

    def __init__(self, settings: EngineSettings) -> None:
        from vllm import LLM

        speculative = settings.speculative_config
        self.llm = LLM(
            model=settings.model,
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            enable_prefix_caching=settings.prefix_caching,
            # vLLM's draft model drafts for nobody where its drafts would pass this.
            max_model_len=settings.prompt_tokens + settings.max_tokens + 64,
            max_num_seqs=settings.max_num_seqs,
            # All prompts of a batch in one step.
            max_num_batched_tokens=settings.max_num_seqs * settings.prompt_tokens,
            speculative_config=None if speculative is None else dict(speculative),
            seed=0,
        )
        core: Any = self.llm.llm_engine.engine_core
        executor = core.engine_core.model_executor
        self.runner = executor.driver_worker.worker.model_runner
        self._controllers: dict[str, Any] = {}
        self._number = 0
        #: Of the job at hand: seconds in the proposer, and what became of drafts.
        self._draft_seconds = 0.0
        self._outcomes: list[tuple[int, int]] = []
        self._watch(core.engine_core.scheduler)

    def _watch(self, scheduler: Any) -> None:
        """Have proposing timed and drafts counted, whoever drafts."""
        propose = self.runner.propose_draft_token_ids

        def timed_propose(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = propose(*args, **kwargs)
            self._draft_seconds += time.perf_counter() - started
            return result

        def count(_stats: Any, num_draft_tokens: int, num_accepted_tokens: int, **_: Any) -> None:
            self._outcomes.append((num_draft_tokens, num_accepted_tokens))

        self.runner.propose_draft_token_ids = timed_propose
        scheduler.make_spec_decoding_stats = count

    def run(self, job: Job) -> Timed:
        """Keep `batch` requests running until all prompts are continued."""
        core: Any = self.llm.llm_engine
        params = self._sampling(job)
        if job.length_control is not None:
            self._use(job)
        self._outcomes = []
        texts: dict[str, list[int]] = {}
        running: set[str] = set()
        waiting = list(job.prompts)[::-1]
        timed, seconds_of_steps = Timed(), []
        began = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < job.batch:
                self._number += 1
                name = str(self._number)
                core.add_request(name, {"prompt_token_ids": waiting.pop()}, params)
                running.add(name)
                texts[name] = []
            self._draft_seconds = 0.0
            started = time.perf_counter()
            outputs = core.step()
            seconds = time.perf_counter() - started
            emitted = 0
            is_full = len(outputs) == job.batch
            for output in outputs:
                text, new = texts[output.request_id], output.outputs[0].token_ids
                is_full &= bool(text)
                text += new
                emitted += len(new)
                if output.finished:
                    running.remove(output.request_id)
            if is_full:
                seconds_of_steps.append(seconds)
                timed.tokens += emitted
                timed.draft_seconds += self._draft_seconds
        timed.wall_seconds = time.perf_counter() - began
        core.step()  # tells the proposer and the controller who is gone
        timed.seconds, timed.steps = sum(seconds_of_steps), len(seconds_of_steps)
        timed.step_ms = 1e3 * median(seconds_of_steps)
        timed.drafts = len(self._outcomes)
        timed.drafted = sum(drafted for drafted, _ in self._outcomes)
        timed.accepted = sum(accepted for _, accepted in self._outcomes)
        timed.texts = list(texts.values())
        return timed

    def _sampling(self, job: Job) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        ours = None
        if job.draft_limit is not None:
            ours = {"spec_decode": {"num_speculative_tokens": job.draft_limit}}
        return SamplingParams(
            temperature=job.temperature,
            max_tokens=job.tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=ours,
        )

    def _use(self, job: Job) -> None:
        """Put a length controller in the place of the engine's, which saves loading weights."""
        from vllm_spec_plugins.config import Choice
        from vllm_spec_plugins.length_control import Fixed
        from vllm_spec_plugins.registry import Kind, installed

        adapter = self.runner.spec_plugins
        given = job.length_control
        options = {"name": given} if isinstance(given, str) else dict(given)
        key = json.dumps([options, job.temperature, job.batch], sort_keys=True)
        if key not in self._controllers:
            choice = Choice(name=options.pop("name"), options=options)
            cls, parsed = choice.build(Kind.LENGTH_CONTROLLER, installed())
            self._controllers[key] = cls(parsed, adapter.context)
            adapter.time_passes(self._controllers[key])
        adapter.length_control = self._controllers[key]
        adapter._has_length_control = not isinstance(adapter.length_control, Fixed)


def main() -> None:
    """Answer questions until there are no more."""
    # However the benchmark ends, this process ends with it.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # Whatever else writes to the output goes to the log.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = Engine(EngineSettings(**json.loads(sys.stdin.readline())))
    answers.write("{}\n")
    for line in sys.stdin:
        answers.write(json.dumps(asdict(engine.run(Job(**json.loads(line))))) + "\n")


if __name__ == "__main__":
    main()
