"""`vllm-spec calibrate vocab`: a ranked draft vocabulary, and how much text each size covers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_spec_plugins.calibration import vocabulary
from vllm_spec_plugins.calibration.generations import Engine, Sampling, generate
from vllm_spec_plugins.calibration.texts import Corpus, TextTokenizer
from vllm_spec_plugins.calibration.vocabulary import Request, Row, SpeedModel
from vllm_spec_plugins.draft_vocabulary import (
    RankedList,
    RankedVocabulary,
    rank,
    tokenizer_fingerprint,
)
from vllm_spec_plugins.errors import SpecPluginsError

from .served_model import model_to_serve

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Job:
    """What the command line asks for.

    Attributes:
        model: Folder, or a model of the zoo.
        lists: Sources of text of each list, by its name.
        output: File to write; the table, the plot and unfinished work lie beside it.
        generations: Prompts of each list that the target continues; 0: text alone is counted.
        sampling: How it continues them.
        engine: How vLLM runs it.
        size: Recommended by the file; None: by the rule.
        dynamic_tokens: Shown beside each coverage.
        draft_share: Bytes of the draft's layers over the target's.
    """

    model: str
    lists: Mapping[str, Sequence[str]]
    output: Path
    generations: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    engine: Engine = field(default_factory=Engine)
    size: int | None = None
    dynamic_tokens: int = 64
    draft_share: float = 0.25


@dataclass(frozen=True, slots=True)
class _Counted:
    """One list's tokens: counted, and held out to measure on."""

    counts: NDArray[np.int64]
    text: list[Request]
    generated: list[Request]
    summary: str


def lists_of(texts: Sequence[str], named: Sequence[str]) -> dict[str, list[str]]:
    """`--texts` as the list "text", each `--list NAME=SOURCE` as its own; a name may recur.

    Raises:
        SpecPluginsError: There is nothing to count, or a list is written otherwise.
    """
    lists: dict[str, list[str]] = {"text": list(texts)} if texts else {}
    for item in named:
        name, equals, source = item.partition("=")
        if not (name and equals and source):
            raise SpecPluginsError(f'--list takes NAME=SOURCE, got "{item}".')
        lists.setdefault(name, []).append(source)
    if not lists:
        raise SpecPluginsError("there is nothing to count: give --texts, or --list NAME=SOURCE.")
    return lists


def run(job: Job) -> None:
    """Everything the command does.

    Raises:
        SpecPluginsError: What was asked for cannot be done.
    """
    console = Console()
    if job.output.suffix != ".safetensors":
        raise SpecPluginsError(f"--output must end in .safetensors, got {job.output}.")
    folder, _ = model_to_serve(job.model, job.engine.threads)
    tokenizer = TextTokenizer(folder)
    vocab_size = vocabulary.vocab_size_of(folder)
    always = vocabulary.control_token_ids(folder, tokenizer, vocab_size)
    fingerprint = tokenizer_fingerprint(folder) or ""
    body, head = vocabulary.weights_of(folder, vocab_size)
    model = SpeedModel(body, head, vocab_size, draft_share=job.draft_share)
    corpora = {name: Corpus(sources) for name, sources in job.lists.items()}

    job.output.parent.mkdir(parents=True, exist_ok=True)
    states = {name: job.output.with_name(f"{job.output.name}.{name}.counting") for name in corpora}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        tasks = {
            name: progress.add_task(f"counting {name}", total=corpus.num_bytes)
            for name, corpus in corpora.items()
        }
        counted = {
            name: vocabulary.count(
                tokenizer,
                corpus,
                vocab_size,
                states[name],
                fingerprint,
                _teller(progress, tasks[name]),
            )
            for name, corpus in corpora.items()
        }
        results = {
            name: _with_generations(
                job, folder, tokenizer, name, corpora[name], counted[name], progress
            )
            for name in corpora
        }

    ranked, rows = [], []
    for name, result in results.items():
        found, measured = _ranked(name, result, always, model, job)
        ranked.append(found)
        rows += measured
    summary = "; ".join(f"{name}: {result.summary}" for name, result in results.items())
    written = RankedVocabulary(
        vocab_size, always, tuple(ranked), fingerprint, f"{Path(job.model).name}, {summary}"
    )
    written.write(job.output)
    table = job.output.with_suffix(".json")
    table.write_text(json.dumps(_as_json(written, rows, model, job), indent=2) + "\n")
    for state in states.values():
        state.unlink(missing_ok=True)
    _show(console, written, rows, model, job)
    _plot(console, written, rows, model, job)


def _teller(progress: Progress, task: TaskID) -> Any:
    return lambda done: progress.update(task, completed=done)


def _with_generations(
    job: Job,
    folder: Path,
    tokenizer: TextTokenizer,
    name: str,
    corpus: Corpus,
    counted: vocabulary.Counted,
    progress: Progress,
) -> _Counted:
    """A list's counts with the target's own text among them, if that was asked for."""
    summary = f"{counted.counts.sum():,} tokens of {', '.join(corpus.sources)}"
    text = [Request(token_ids) for token_ids in counted.held_out]
    if not job.generations:
        return _Counted(counted.counts, text, [], summary)
    prompts = vocabulary.prompts(tokenizer, corpus, job.generations)
    task = progress.add_task(f"generating {name}", total=len(prompts))
    written = generate(
        folder,
        prompts,
        job.output.parent,
        job.sampling,
        job.engine,
        _teller(progress, task),
    )
    to_count, held_out = vocabulary.split_generations(prompts, written)
    of_target = np.bincount(np.concatenate(to_count), minlength=len(counted.counts))
    return _Counted(
        vocabulary.merge(counted.counts, of_target),
        text,
        held_out,
        f"{summary}, {of_target.sum():,} written by the model",
    )


def _ranked(
    name: str,
    result: _Counted,
    always: NDArray[np.int64],
    model: SpeedModel,
    job: Job,
) -> tuple[RankedList, list[Row]]:
    """A list with its recommended size, and the rows it is chosen from."""
    ranked = rank(name, result.counts, always, 0)
    longest = len(always) + len(ranked.token_ids)
    if job.size is not None and not len(always) < job.size <= longest:
        raise SpecPluginsError(
            f'--size {job.size}: list "{name}" can have {len(always) + 1} to {longest} tokens, '
            f"{len(always)} of them control tokens."
        )
    sizes = vocabulary.sizes_to_try(model.vocab_size, len(always), longest)
    if job.size is not None:
        sizes = sorted({*sizes, job.size})
    rows = list(
        vocabulary.measure(
            ranked, always, result.text, result.generated, job.dynamic_tokens, model, sizes
        )
    )
    size = job.size or vocabulary.recommend(rows)
    return rank(name, result.counts, always, size), rows


def _as_json(
    written: RankedVocabulary, rows: Sequence[Row], model: SpeedModel, job: Job
) -> dict[str, Any]:
    return {
        "description": written.description,
        "vocab_size": written.vocab_size,
        "control_tokens": len(written.always),
        "recommended_sizes": {ranked.name: ranked.recommended_size for ranked in written.lists},
        "rule": "given" if job.size else model.rule,
        "dynamic_tokens": job.dynamic_tokens,
        "speed_model": {**asdict(model), "whole_vocabulary": model.speed_up(model.vocab_size, 1.0)},
        "rows": [asdict(row) for row in rows],
    }


def _show(
    console: Console,
    written: RankedVocabulary,
    rows: Sequence[Row],
    model: SpeedModel,
    job: Job,
) -> None:
    with_generations = any(row.generated is not None for row in rows)
    table = Table(
        title="Share of held-out tokens that a draft vocabulary has",
        caption=f"Predicted with the whole vocabulary: {model.speed_up(model.vocab_size, 1):.3f}x",
    )
    dynamic = f"and {job.dynamic_tokens} dynamic"
    table.add_column("list")
    for column in (
        "size",
        "text",
        dynamic,
        *(("model's own", dynamic) if with_generations else ()),
        "predicted speed-up",
    ):
        table.add_column(column, justify="right")
    recommended = {ranked.name: ranked.recommended_size for ranked in written.lists}
    for row in rows:
        shares = (row.text, row.text_dynamic, row.generated, row.generated_dynamic)
        table.add_row(
            row.list,
            f"{row.size:,}",
            *(f"{share:.2%}" for share in shares if share is not None),
            f"{row.speed_up:.3f}x",
            style="bold green" if row.size == recommended[row.list] else "",
        )
    console.print(table)
    for ranked in written.lists:
        chosen = "as asked for" if job.size else f"recommended, {model.rule}"
        console.print(
            f"{ranked.name}: [bold]{ranked.recommended_size:,}[/bold] of {written.vocab_size:,} "
            f"tokens, {chosen}.",
            highlight=False,
        )
    console.print(
        f'Wrote {job.output}. Use it: "draft_vocabulary": "{job.output}" beside a proposer '
        "that takes one (vllm-spec list).",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _plot(
    console: Console,
    written: RankedVocabulary,
    rows: Sequence[Row],
    model: SpeedModel,
    job: Job,
) -> None:
    """Coverage and predicted speed-up against size."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        console.print("No plot: it needs matplotlib (pip install 'vllm-spec-plugins\\[demo]').")
        return
    path = job.output.with_suffix(".png")
    figure = Figure(figsize=(11, 4.6), layout="constrained", facecolor="white")
    shares, speeds = figure.subplots(1, 2)
    for number, ranked in enumerate(written.lists):
        own = [row for row in rows if row.list == ranked.name]
        sizes = [row.size for row in own]
        colour = f"C{number}"
        label = f"{ranked.name}: " if len(written.lists) > 1 else ""
        lines = (
            ("held-out text", "text", "-", "o"),
            (f"held-out text, {job.dynamic_tokens} dynamic tokens", "text_dynamic", ":", "o"),
            ("the model's own text", "generated", "-", "s"),
            (f"its own text, {job.dynamic_tokens} dynamic tokens", "generated_dynamic", ":", "s"),
        )
        for name, attribute, style, marker in lines:
            values = [getattr(row, attribute) for row in own]
            if values[0] is not None:
                behind = own[0].generated is not None and attribute.startswith("text")
                shares.plot(
                    sizes, values, style, marker=marker, markersize=4, color=colour,
                    alpha=0.45 if behind else 1.0, label=label + name,
                )  # fmt: skip
        speeds.plot(
            sizes, [row.speed_up for row in own], "-o", markersize=4, color=colour,
            label=ranked.name,
        )  # fmt: skip
        for axes in (shares, speeds):
            axes.axvline(
                ranked.recommended_size, color=colour, linestyle="--", linewidth=1,
                label=f"{label}{'chosen' if job.size else 'recommended'}: "
                f"{ranked.recommended_size:,}",
            )  # fmt: skip
    speeds.axhline(
        model.speed_up(model.vocab_size, 1.0), color="#9aa0a6", linewidth=1,
        label=f"whole vocabulary ({model.vocab_size:,})",
    )  # fmt: skip
    for axes, title in (
        (shares, "Share of tokens the draft vocabulary has"),
        (speeds, "Predicted speed-up over plain decoding"),
    ):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda size, _: f"{size:,.0f}")
        axes.set_xlabel("tokens in the draft vocabulary")
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8)
    shares.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    figure.suptitle(f"Draft vocabulary of {Path(job.model).name}", fontsize=13)
    figure.savefig(path, dpi=150)
    console.print(f"Wrote {path}.", highlight=False)
