"""`vllm-spec bench`: speculative configs on real servers, side by side with plain decoding.

For each temperature and number of concurrent requests: speed over plain decoding, acceptance,
and what the verifier promises and was measured to cost.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_spec_plugins.errors import ConfigError, SpecPluginsError, listed
from vllm_spec_plugins.registry import Kind, installed

from .comparison import distinct_ngram_share
from .served_model import model_to_serve, threads_for
from .server import Server, ServerError, free_ports
from .side_by_side import (
    environment,
    held_out_prompts,
    progress_bars,
    provenance,
    stage,
    terminated_as_interrupted,
    wait_until_ready,
)

#: Characters of a held-out file that the model is shown, where no prompts are given.
PROMPT_CHARACTERS = 1200
PLAIN = "plain decoding"
#: Keys of a config that are said shorter.
SHORT = {"num_speculative_tokens": "K", "draft_sample_method": "drafts"}


MEANING = (
    "length: tokens per verified draft, the bonus token included. accepted: of the draft tokens. "
    "price: mean total-variation distance to the target's law per draft token looked at. "
    "8-grams: share of distinct ones; texts that loop are easy to draft."
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured.

    Attributes:
        model: Of the zoo, or a folder.
        configs: Speculative configs, as `vllm serve` takes them.
        prompts: File of prompts; None: held-out source code.
        num_prompts: Of them.
        tokens: New tokens of each.
        temperatures: Each with every number of concurrent requests.
        concurrency: Requests at a time.
        repeats: Of everything.
        threads: Of each model; 0 = by its size.
        max_model_len: Room for prompt and continuation.
        output: File that rows are appended to; None: none is written.
    """

    model: str
    configs: Sequence[dict[str, Any]]
    prompts: Path | None
    num_prompts: int
    tokens: int
    temperatures: Sequence[float]
    concurrency: Sequence[int]
    repeats: int
    threads: int
    max_model_len: int
    output: Path | None


@dataclass(slots=True)
class Measured:
    """One server in one setting: `[repeats]` of each.

    Attributes:
        speeds: Tokens per second.
        counts: Differences of the server's counters, by name.
        texts: Token ids of the last repeat.
    """

    speeds: list[float] = field(default_factory=list)
    counts: list[dict[str, float]] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)

    def total(self, name: str) -> float:
        return sum(counts.get(name, 0.0) for counts in self.counts)

    def row(self, plain: Measured) -> dict[str, Any]:
        """Everything, as plain values."""
        drafts = self.total("vllm:spec_decode_num_drafts_total")
        drafted = self.total("vllm:spec_decode_num_draft_tokens_total")
        accepted = self.total("vllm:spec_decode_num_accepted_tokens_total")
        examined = self.total("vllm_spec_plugins:examined_tokens_total")
        price = self.total("vllm_spec_plugins:total_variation_total")
        ratios = [a / b for a, b in zip(self.speeds, plain.speeds, strict=True)]
        return {
            "tokens_per_second": median(self.speeds),
            "slowest": min(self.speeds),
            "fastest": max(self.speeds),
            "speed_over_plain": median(ratios),
            "acceptance_length": 1 + accepted / drafts if drafts else None,
            "drafted": round(drafted),
            "accepted": round(accepted),
            "total_variation_price": price / examined if examined else None,
            "distinct_8gram_share": distinct_ngram_share(self.texts, 8),
            "same_text_as_plain": sum(a == b for a, b in zip(self.texts, plain.texts, strict=True)),
        }


def run(settings: Settings) -> int:
    """Everything `vllm-spec bench` does. Returns the exit code."""
    console = Console()
    with terminated_as_interrupted():
        try:
            _run(console, settings)
        except (SpecPluginsError, ServerError) as error:
            console.print(f"[bold red]error:[/bold red] {error}", highlight=False, soft_wrap=True)
            return 1
        except KeyboardInterrupt:
            console.print("interrupted; every server has been stopped")
            return 130
    return 0


def _run(console: Console, settings: Settings) -> None:
    ways: dict[str, dict[str, Any] | None] = {PLAIN: None}
    for config in settings.configs:
        name = label(config)
        if name in ways:
            raise ConfigError(f"the config {json.dumps(config)} is given twice.")
        ways[name] = config
    promises = {name: guarantee_of(config) for name, config in ways.items()}
    folder, dtype = model_to_serve(settings.model, settings.threads or None)
    prompts = read_prompts(settings.prompts, settings.num_prompts)
    threads = settings.threads or threads_for(folder)
    arguments = [
        str(folder), "--served-model-name=bench", f"--dtype={dtype}", "--enforce-eager",
        f"--max-model-len={settings.max_model_len}", "--disable-uvicorn-access-log",
        f"--max-num-seqs={max(settings.concurrency)}", "--no-enable-prefix-caching",
    ]  # fmt: skip
    grid = list(itertools.product(settings.temperatures, settings.concurrency))
    found = {(name, *where): Measured() for name in ways for where in grid}
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        progress = stack.enter_context(progress_bars(console))
        servers = {}
        for number, ((name, config), port) in enumerate(
            zip(ways.items(), free_ports(len(ways)), strict=True)
        ):
            speculative = [] if config is None else ["--speculative-config", json.dumps(config)]
            servers[name] = stack.enter_context(
                Server(
                    [*arguments, *speculative],
                    port=port,
                    log=logs / f"{number}.log",
                    environment=environment(threads),
                )
            )
        wait_until_ready(servers, progress)
        task = stage(progress, "warming up", len(servers))
        for server in servers.values():
            one_pass(server, prompts[:2], settings.tokens, 0.0, 1)
            progress.advance(task)
        turns = [where for where in grid for _ in range(settings.repeats)]
        task = stage(progress, "timed passes", len(turns) * len(ways))
        names = list(ways)
        for turn, where in enumerate(turns):
            # Nobody always goes first.
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                measured = found[name, *where]
                before = servers[name].counters()
                began = perf_counter()
                measured.texts = one_pass(servers[name], prompts, settings.tokens, *where)
                seconds = perf_counter() - began
                after = servers[name].counters()
                measured.speeds.append(sum(map(len, measured.texts)) / seconds)
                measured.counts.append({k: v - before.get(k, 0.0) for k, v in after.items()})
                progress.advance(task)
    rows = list(_rows(ways, promises, grid, found))
    for where in grid:
        here = [row for row in rows if (row["temperature"], row["concurrency"]) == where]
        console.print(table(Path(settings.model).name, where, here))
    for number, name in enumerate(ways):
        if number:
            console.print(f"{number}  {name}", highlight=False)
    console.print(Text(MEANING, style="dim"))
    if settings.output is not None:
        about = {
            **provenance(Path(settings.model).name, dtype, threads),
            "prompts": len(prompts),
            "tokens_per_prompt": settings.tokens,
            "repeats": settings.repeats,
        }
        with settings.output.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**row, **about}) + "\n" for row in rows)
        console.print(f"rows added to {settings.output}", highlight=False)


def _rows(
    ways: dict[str, dict[str, Any] | None],
    promises: dict[str, str],
    grid: Sequence[tuple[float, int]],
    found: dict[tuple[str, float, int], Measured],
) -> Iterator[dict[str, Any]]:
    for temperature, concurrency in grid:
        for name, config in ways.items():
            yield {
                "way": name,
                "speculative_config": config,
                "guarantee": promises[name],
                "temperature": temperature,
                "concurrency": concurrency,
                **found[name, temperature, concurrency].row(found[PLAIN, temperature, concurrency]),
            }


def one_pass(
    server: Server, prompts: Sequence[Any], tokens: int, temperature: float, concurrency: int
) -> list[list[int]]:
    """Token ids of each continuation, so many requests at a time."""

    def ask(prompt: Any) -> list[int]:
        answer = server.post(
            "/v1/completions",
            {
                "model": "bench",
                "prompt": prompt,
                "max_tokens": tokens,
                "temperature": temperature,
                "ignore_eos": True,
                "return_token_ids": True,
            },
        )
        return answer["choices"][0]["token_ids"]

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(ask, prompts))


def read_prompts(path: Path | None, count: int) -> list[Any]:
    """Prompts of a JSON-lines file (`{"prompt": "..."}` or token ids), or held-out source code.

    Raises:
        ConfigError: The file is missing, is no such file, or has too few.
    """
    if path is None:
        return held_out_prompts(count, PROMPT_CHARACTERS)
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [json.loads(line)["prompt"] for line in lines if line.strip()]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f'{path} must hold one JSON object a line, {{"prompt": "text"}} or '
            '{"prompt": [token ids]}.'
        ) from None
    if len(found) < count:
        raise ConfigError(
            f"{path} holds {len(found)} prompts, and {count} are asked for: give more, or "
            f"--num-prompts {len(found)}."
        )
    return found[:count]


def label(config: dict[str, Any]) -> str:
    """A config as short as it can be told apart: `early_exit exit_layer=2 K=3 verifier=typical`."""

    def said(value: Any) -> str:
        if isinstance(value, dict):
            name = [str(value["name"])] if "name" in value else []
            rest = [f"{k}={said(v)}" for k, v in value.items() if k != "name"]
            return f"{' '.join(name)}({', '.join(rest)})" if rest else "".join(name)
        return Path(value).name if isinstance(value, str) else json.dumps(value)

    rest = [f"{SHORT.get(k, k)}={said(v)}" for k, v in config.items() if k != "method"]
    return " ".join([str(config.get("method", "draft_model")), *rest])


def guarantee_of(config: dict[str, Any] | None) -> str:
    """What the verifier of a config promises; "-" where vLLM verifies."""
    plugins = installed()
    if config is None:
        return "-"
    verifier = config.get("verifier")
    if verifier is None:
        # Our proposers are verified by `lossless` unless told otherwise; vLLM's by vLLM.
        if str(config.get("method")) not in plugins.names(Kind.PROPOSER):
            return "-"
        verifier = "lossless"
    name = verifier.get("name") if isinstance(verifier, dict) else verifier
    if not isinstance(name, str):
        raise ConfigError(
            f'"verifier" takes a name or {{"name": ..., options}}, got {verifier!r}. '
            f"Installed: {listed(plugins.names(Kind.VERIFIER))}."
        )
    return plugins.load(Kind.VERIFIER, name).guarantee.value


def table(model: str, where: tuple[float, int], rows: Sequence[dict[str, Any]]) -> Table:
    """One setting, for a terminal: one row per config, by its number."""
    temperature, concurrency = where
    at_a_time = "one request" if concurrency == 1 else f"{concurrency} requests"
    shown = Table(
        title=f"{model}, temperature {temperature:g}, {at_a_time} at a time",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    shown.add_column("", no_wrap=True)
    for column in (
        "tokens/s", "range", "over plain", "length", "accepted", "guarantee", "price", "8-grams"
    ):  # fmt: skip
        shown.add_column(column, justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        price, length = row["total_variation_price"], row["acceptance_length"]
        shown.add_row(
            str(number) if number else "plain",
            f"{row['tokens_per_second']:.0f}",
            f"{row['slowest']:.0f}-{row['fastest']:.0f}",
            f"[bold]{row['speed_over_plain']:.2f}[/bold]",
            "-" if length is None else f"{length:.2f}",
            f"{row['accepted'] / row['drafted']:.0%}" if row["drafted"] else "-",
            row["guarantee"],
            "-" if price is None else f"{price:.3f}",
            f"{row['distinct_8gram_share']:.2f}",
        )
    return shown
