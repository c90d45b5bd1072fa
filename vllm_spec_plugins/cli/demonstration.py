"""`vllm-spec demo`: three ways of decoding, each on a real server, side by side."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from vllm_spec_plugins.errors import ConfigError, SpecPluginsError

from .comparison import (
    ADAPTIVE,
    NGRAM,
    PLAIN,
    WAYS,
    MarkedToken,
    Pass,
    Result,
    Way,
    distinct_ngram_share,
    marks,
)
from .served_model import image_model, model_to_serve, threads_for
from .server import Server, ServerError, free_ports
from .side_by_side import (
    environment,
    held_out_prompts,
    pictures_module,
    progress_bars,
    provenance,
    stage,
    terminated_as_interrupted,
    wait_until_ready,
)

PROMPTS = 8
#: Characters of a held-out file that the model is shown; cut at the end of a line.
PROMPT_CHARACTERS = 1200
TOKENS = 128
#: Room for prompt and continuation under any tokenizer.
MAX_MODEL_LEN = 1024

LOOPS = (
    "Greedy decoding by a small model falls into loops, which n-gram drafts predict too easily: "
    "read every speed-up beside its distinct-8-gram share (real source text: 0.98)."
)
THREADS = (
    "All servers run with NUMBA_THREADING_LAYER=workqueue: without it vLLM's ngram is far slower "
    "on a CPU (`vllm-spec doctor`), so this setting is in its favour."
)


def run(model: str, output: Path, repeats: int, threads: int) -> int:
    """Everything `vllm-spec demo` does. Returns the exit code."""
    console = Console()
    with terminated_as_interrupted():
        try:
            _run(console, model, output, repeats, threads)
        except (SpecPluginsError, ServerError) as error:
            console.print(f"[bold red]error:[/bold red] {error}", highlight=False, soft_wrap=True)
            return 1
        except KeyboardInterrupt:
            console.print("interrupted; every server has been stopped")
            return 130
    return 0


def _run(console: Console, model: str, output: Path, repeats: int, threads: int) -> None:
    start = time.monotonic()
    pictures = pictures_module()
    folder, dtype = model_to_serve(model, threads or None)
    if image_model(folder):
        raise ConfigError(
            f'"{model}" writes images, not text: `vllm-spec demo visual` shows those of the zoo.'
        )
    model = Path(model).name
    threads = threads or threads_for(folder)
    output.mkdir(parents=True, exist_ok=True)
    trace = output / "step_trace.jsonl"
    trace.unlink(missing_ok=True)
    prompts = held_out_prompts(PROMPTS, PROMPT_CHARACTERS)
    console.print(
        f"[bold]{model}[/bold]: {len(prompts)} held-out source files, {TOKENS} greedy tokens each, "
        f"one request at a time, {repeats} passes, threads of each model: {threads}",
        highlight=False,
    )
    progress = progress_bars(console)
    results = {way: Result(way) for way in WAYS}
    answer_ids: dict[Way, list[str]] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(progress)
        servers = {
            way: stack.enter_context(_server(way, folder, dtype, port, output, threads, trace))
            for way, port in zip(WAYS, free_ports(len(WAYS)), strict=True)
        }
        wait_until_ready(servers, progress)
        left = repeats * _warm_up(servers, prompts, progress)
        task = stage(progress, f"timed passes (about {left:.0f} s)", repeats * len(WAYS))
        for turn in range(repeats):
            for i in range(len(WAYS)):
                way = WAYS[(turn + i) % len(WAYS)]  # nobody always goes first
                one, answer_ids[way] = timed_pass(servers[way], prompts)
                results[way].passes.append(one)
                progress.advance(task)
        shown = _typical(results[ADAPTIVE])
        tokens = results[ADAPTIVE].passes[-1].completions[shown]
        marked = _mark(servers[ADAPTIVE], trace, answer_ids[ADAPTIVE][shown], tokens)

    rows = [results[way].row(results[PLAIN], results[NGRAM]) for way in WAYS]
    _write_rows(output / "rows.jsonl", rows, model, dtype, threads)
    console.print(table(rows, model))
    console.print(Text(f"{LOOPS}\n{THREADS}", style="dim"))
    console.print(continuation(prompts[shown], marked))
    saved = [
        pictures.comparison(rows, model, LOOPS, output / "comparison.png"),
        pictures.continuation(prompts[shown], marked, model, output / "continuation.png"),
    ]
    files = " and ".join(str(path) for path in saved)
    console.print(f"{files}  ({time.monotonic() - start:.0f} s in all)", highlight=False)


def _server(
    way: Way, folder: Path, dtype: str, port: int, output: Path, threads: int, trace: Path
) -> Server:
    arguments = [
        str(folder),
        "--served-model-name=demo",
        f"--dtype={dtype}",
        "--enforce-eager",
        f"--max-model-len={MAX_MODEL_LEN}",
        "--max-num-seqs=4",
        "--disable-uvicorn-access-log",
    ]
    variables = environment(threads)
    if way.speculative_config is not None:
        arguments += ["--speculative-config", json.dumps(way.speculative_config)]
    if way is ADAPTIVE:
        variables["VLLM_SPEC_PLUGINS_TRACE"] = str(trace.resolve())
    name = way.name.replace(" ", "_").replace("'", "")
    return Server(arguments, port=port, log=output / f"{name}.log", environment=variables)


def _warm_up(servers: dict[Way, Server], prompts: Sequence[str], progress: Progress) -> float:
    """A few prompts on each server, thrown away.

    Returns:
        Seconds that one pass over all prompts may take, on all servers together.
    """
    task = stage(progress, "warming up", len(servers))
    some = prompts[: max(1, len(prompts) // 4)]
    seconds = 0.0
    for server in servers.values():
        seconds += timed_pass(server, some)[0].seconds
        progress.advance(task)
    return seconds * len(prompts) / len(some)


def timed_pass(server: Server, prompts: Sequence[str]) -> tuple[Pass, list[str]]:
    """All prompts, one after the other; and the ids of the answers."""
    before = server.counters()
    answers = []
    start = time.perf_counter()
    for prompt in prompts:
        body = {"model": "demo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        answers.append(server.post("/v1/completions", {**body, "return_token_ids": True}))
    seconds = time.perf_counter() - start
    after = server.counters()

    def counted(name: str) -> int:
        return round(after.get(name, 0.0) - before.get(name, 0.0))

    return Pass(
        seconds=seconds,
        completions=tuple(tuple(a["choices"][0]["token_ids"]) for a in answers),
        steps=counted("vllm:iteration_tokens_total_count"),
        drafts=counted("vllm:spec_decode_num_drafts_total"),
        drafted=counted("vllm:spec_decode_num_draft_tokens_total"),
        accepted=counted("vllm:spec_decode_num_accepted_tokens_total"),
    ), [answer["id"] for answer in answers]


def _typical(result: Result) -> int:
    """The prompt whose continuation has the median distinct-8-gram share: no cherry-picking."""
    completions = result.passes[-1].completions
    order = sorted(range(len(completions)), key=lambda i: distinct_ngram_share([completions[i]], 8))
    return order[len(order) // 2]


def _mark(server: Server, trace: Path, answer_id: str, tokens: Sequence[int]) -> list[MarkedToken]:
    """One continuation, token by token, from the step trace."""
    lines = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
    # The last step may have drafted past the end of the answer.
    marked = marks(lines, answer_id)[: len(tokens)]
    if [token for token, _ in marked] != list(tokens):
        raise ServerError(f"the step trace {trace} does not hold the tokens the server answered.")
    pieces: list[MarkedToken] = []
    shown = ""
    for i, (_, accepted) in enumerate(marked):
        text = server.post("/detokenize", {"model": "demo", "tokens": tokens[: i + 1]})["prompt"]
        # A character of several tokens appears with its last one.
        text = text if not text.endswith("\ufffd") else shown
        pieces.append(MarkedToken(text[len(shown) :], accepted))
        shown = text
    return pieces


def table(rows: Sequence[dict[str, Any]], model: str) -> Table:
    """The comparison, for a terminal: one column per way of decoding."""
    shown = Table(title=f"{model}, greedy, one request at a time", title_justify="left")
    shown.add_column("")
    for row in rows:
        shown.add_column(row["way"], justify="right")

    def line(name: str, cell: Callable[[dict[str, Any]], str]) -> None:
        shown.add_row(name, *(cell(row) for row in rows))

    line("tokens per second, median", lambda r: f"[bold]{r['tokens_per_second']:.0f}[/bold]")
    line("  slowest to fastest pass", lambda r: f"{r['slowest_pass']:.0f}-{r['fastest_pass']:.0f}")
    line(
        "  over plain / over ngram",
        lambda r: f"{r['speed_over_plain']:.2f} / {r['speed_over_vllm_ngram']:.2f}",
    )
    line("tokens per forward pass", lambda r: f"{r['tokens_per_step']:.2f}")
    line(
        "acceptance length (passes with a draft)",
        lambda r: f"{r['acceptance_length']:.2f}" if r["acceptance_length"] else "-",
    )
    line(
        "accepted / drafted tokens",
        lambda r: f"{r['accepted']} / {r['drafted']}" if r["drafted"] else "-",
    )
    line("distinct-8-gram share", lambda r: f"{r['distinct_8gram_share']:.2f}")
    line("same text as plain decoding", _same_text)
    return shown


def _same_text(row: dict[str, Any]) -> str:
    if row["same_text"] == row["prompts"]:
        return "[green]yes[/green]"
    return f"[red]{row['same_text']} of {row['prompts']} prompts[/red]"


def continuation(prompt: str, marked: Sequence[MarkedToken]) -> Text:
    """The end of the prompt and its continuation; drafted-and-accepted tokens in green."""
    drafted = sum(token.accepted for token in marked)
    text = Text()
    text.append(
        f"\nOne continuation (the prompt of median distinct-8-gram share): {drafted} of "
        f"{len(marked)} tokens were drafted by ngram_adaptive and accepted ",
        style="bold",
    )
    text.append("like this", style="black on green").append("\n")
    text.append("\n".join(prompt.splitlines()[-4:]) + "\n", style="dim")
    for token in marked:
        # A background on a line break would colour the rest of the line.
        for piece in token.text.splitlines(keepends=True):
            line = piece.rstrip("\n")
            text.append(line, style="black on green" if token.accepted else "")
            text.append(piece[len(line) :])
    return text.append("\n")


def _write_rows(
    path: Path, rows: Sequence[dict[str, Any]], model: str, dtype: str, threads: int
) -> None:
    """One JSON line per way of decoding, with what it takes to judge it."""
    about = {**provenance(model, dtype, threads), "tokens_per_prompt": TOKENS}
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**row, **about}) + "\n")
