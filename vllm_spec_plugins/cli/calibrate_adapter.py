"""`vllm-spec calibrate adapter`: train an exit adapter and say plainly what it is worth."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from vllm_spec_plugins.adapter_file import AdapterCard, write_adapter
from vllm_spec_plugins.calibration.adapter import (
    AdapterRecipe,
    DraftQuality,
    HeldOut,
    evaluate,
    job_of,
    padded,
    sample_windows,
    train,
)
from vllm_spec_plugins.calibration.adapter_block import probes_of, target_shape
from vllm_spec_plugins.calibration.hugging_face import LocalModel
from vllm_spec_plugins.calibration.texts import Corpus, TextTokenizer, windows
from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.zoo.cache import write_atomically
from vllm_spec_plugins.zoo.progress import training_progress

from .served_model import model_to_serve

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Windows the adapter is judged on: 16,000 positions of 256-token windows.
_HELD_OUT_WINDOWS = 64

#: Shorter texts are not worth a place in a batch.
_SHORTEST = 16

#: The target continues the first so-manieth part of a window.
_PROMPT_PART = 4


def run(
    model: str,
    texts: Sequence[str],
    output: Path,
    recipe: AdapterRecipe,
    *,
    generations: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    threads: int = 0,
) -> None:
    """Everything the command does.

    Args:
        model: Folder, or a model of the zoo.
        texts: Sources of text, see `Corpus`.
        output: Adapter file to write; a JSON report and a loss curve are put beside it.
        recipe: What to train.
        generations: Train on so many texts that the target continued; 0: on the texts.
        dtype: `auto`, `float32` or `bfloat16`.
        device: Where.
        threads: Of torch; 0 leaves its own setting.

    Raises:
        SpecPluginsError: With one message that says what to do.
    """
    console = Console()
    # Where no bar is drawn, progress is logged.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vllm_spec_plugins").setLevel(logging.INFO)
    if threads:
        torch.set_num_threads(threads)
    if not output.parent.is_dir():
        raise SpecPluginsError(f"there is no folder {output.parent} to write {output.name} to")
    folder, _ = model_to_serve(model, threads or None)
    corpus = Corpus(texts)
    target = LocalModel.load(folder, _dtype(folder, dtype))
    recipe.check(target)
    most = max(recipe.steps * recipe.batch_size, generations)
    with console.status("reading texts"):
        tokenizer = TextTokenizer(folder)
        learnt = sample_windows(
            _windows(corpus, tokenizer, recipe, held_out=False), most, recipe.seed
        )
        held_out = sample_windows(
            _windows(corpus, tokenizer, recipe, held_out=True), _HELD_OUT_WINDOWS, recipe.seed
        )
    if not learnt or not held_out:
        raise SpecPluginsError(
            f"too little text: {len(learnt)} windows to learn from and {len(held_out)} held out "
            f"(one text in twenty is held out; texts need {_SHORTEST} tokens): give more of it"
        )
    if generations:
        learnt = _generated(folder, learnt, generations, recipe, output, console, threads)
    # Only now: vLLM takes most of a GPU's memory while it writes.
    target.module.to(device)
    rows = padded(learnt)
    data = hashlib.sha256(rows.tobytes()).hexdigest()
    job = job_of(target, recipe, data)
    if output.exists():
        _show_finished(console, output, job)
        return

    name = Path(model).name
    console.print(
        f"[bold]{name}[/bold], exit after {recipe.exit_layer} of {target.num_layers} layers: "
        f"{recipe.steps} steps of {recipe.batch_size} windows, {rows.shape[1]} tokens each, from "
        f"{len(rows)} windows {'the target wrote' if generations else 'of text'}; "
        f"{torch.get_num_threads()} threads",
        highlight=False,
    )
    checkpoint = output.with_name(output.name + ".unfinished")
    with training_progress(f"adapter of {name}", recipe.steps) as on_step:
        trained = train(target, recipe, rows, checkpoint, job, on_step)
    with console.status("measuring on held-out text"):
        result = evaluate(target, trained.block, recipe.exit_layer, padded(held_out))
    weights = sum(weight.numel() for weight in trained.block.parameters())
    report: dict[str, Any] = {
        "job": job,
        "data_sha256": data,
        "recipe": asdict(recipe),
        "texts": [source if source.startswith("zoo") else Path(source).name for source in texts],
        "generations": generations,
        "tokens": int((rows >= 0).sum()),
        "tokens_seen": recipe.steps * recipe.batch_size * rows.shape[1],
        "seconds": round(trained.seconds, 1),
        "resumed_at": trained.resumed_at,
        "threads": torch.get_num_threads(),
        "device": device,
        "dtype": str(target.dtype).removeprefix("torch."),
        "parameters": weights,
        "parameters_of_a_layer": target.layer_parameters,
        "held_out": _rounded(result),
    }
    card = AdapterCard(
        model=name,
        target=target_shape(target),
        exit_layer=recipe.exit_layer,
        ffn_size=recipe.ffn_size,
        norm_epsilon=target.norm_epsilon,
        training=report,
    )
    state = trained.block.state_dict()
    write_atomically(output, lambda path: write_adapter(path, card, state, probes_of(target)))
    full = {**report, "model": name, "losses": [round(loss, 5) for loss in trained.losses]}
    _write_json(output.with_suffix(".json"), {**full, "versions": _versions()})
    pictured = _plot(output.with_suffix(".png"), trained.losses, name, recipe.exit_layer)
    checkpoint.unlink(missing_ok=True)
    _show(console, report)
    beside = f"{output.with_suffix('.json').name}" + (
        f" and {output.with_suffix('.png').name}" if pictured else ""
    )
    console.print(f"written: {output}, beside it {beside}", highlight=False, soft_wrap=True)
    if not pictured:
        console.print("no loss curve: matplotlib is not installed (extra [demo])", highlight=False)


def _windows(
    corpus: Corpus, tokenizer: TextTokenizer, recipe: AdapterRecipe, *, held_out: bool
) -> Iterator[NDArray[np.int64]]:
    """Windows of the texts to learn from, or of those held out."""
    texts = (text.text for text in corpus if text.held_out == held_out)
    return windows(tokenizer, texts, recipe.window, shortest=min(_SHORTEST, recipe.window))


def _generated(
    folder: Path,
    learnt: Sequence[NDArray[np.int64]],
    count: int,
    recipe: AdapterRecipe,
    output: Path,
    console: Console,
    threads: int,
) -> list[NDArray[np.int64]]:
    """Windows whose first part is text and whose rest the target wrote at temperature 1."""
    from vllm_spec_plugins.calibration.generations import Engine, Sampling, generate

    length = max(1, recipe.window // _PROMPT_PART)
    prompts = [window[:length] for window in islice(learnt, count)]
    bars = Progress(
        TextColumn("the target writes"), BarColumn(), MofNCompleteColumn(), console=console
    )
    with bars:
        task = bars.add_task("", total=len(prompts))
        written = generate(
            folder,
            prompts,
            output.with_name(output.name + ".generations"),
            Sampling(max_tokens=recipe.window - length, seed=recipe.seed),
            Engine(threads=threads or None),
            lambda done: bars.update(task, completed=done),
        )
    return [np.concatenate(pair) for pair in zip(prompts, written, strict=True)]


def _dtype(folder: Path, dtype: str) -> str:
    """float32 for `auto`, but bfloat16 where the model is saved so and a GPU will compute it."""
    if dtype != "auto":
        return dtype
    config = json.loads((folder / "config.json").read_text())
    saved = config.get("dtype") or config.get("torch_dtype")
    return "bfloat16" if saved == "bfloat16" else "float32"


def _show_finished(console: Console, output: Path, job: str) -> None:
    """Show what an earlier run of the same command measured.

    Raises:
        SpecPluginsError: The file comes from another command.
    """
    card = AdapterCard.read(output)
    if card.training.get("job") != job:
        raise SpecPluginsError(
            f"{output} exists and was trained for another model, text or settings: choose another "
            "output, or remove the file"
        )
    console.print(f"{output} is already trained:", highlight=False, soft_wrap=True)
    _show(console, card.training)


def _show(console: Console, report: Mapping[str, Any]) -> None:
    """Table and verdict."""
    held_out = report["held_out"]
    table = Table(title=f"{held_out['windows']} held-out windows")
    for column in ("draft", "layers", "accepted, temperature 1", "temperature 0", "KL divergence"):
        table.add_column(column, justify="left" if column == "draft" else "right")
    for draft in held_out["drafts"]:
        table.add_row(
            draft["name"],
            str(draft["layers"]),
            f"{draft['acceptance']:.3f}",
            f"{draft['agreement']:.3f}",
            f"{draft['divergence']:.3f}",
        )
    console.print(table)
    for line in verdict(held_out, report["parameters"] / report["parameters_of_a_layer"]):
        console.print(line, highlight=False, soft_wrap=True)


def verdict(held_out: Mapping[str, Any], cost: float) -> list[str]:
    """What the numbers say, in sentences.

    Args:
        held_out: A `HeldOut` as plain values.
        cost: Weights of the adapter as a share of one layer's.
    """
    gain, error = held_out["gain"], held_out["gain_error"]
    lines = [
        f"The adapter changes acceptance at temperature 1 by {gain:+.3f} (standard error "
        f"{error:.3f}), for {cost:.0%} of a layer's weights read with every draft token."
    ]
    if not gain > 2 * error:
        return [*lines, "That is no more than chance: this adapter is not worth serving."]
    drafts = {draft["name"]: draft for draft in held_out["drafts"]}
    later = drafts.get("next exit")
    if later is not None and later["acceptance"] >= drafts["adapter"]["acceptance"]:
        lines.append(
            f"The bare exit after {later['layers']} layers accepts {later['acceptance']:.3f}, no "
            "less, for a whole layer more: compare the two with `vllm-spec calibrate exit`."
        )
    return lines


def _rounded(result: HeldOut) -> dict[str, Any]:
    def plain(draft: DraftQuality) -> dict[str, Any]:
        return {
            key: round(value, 5) if isinstance(value, float) else value
            for key, value in asdict(draft).items()
        }

    return {
        "drafts": [plain(draft) for draft in result.drafts],
        "windows": result.windows,
        "gain": round(result.gain, 5),
        "gain_error": round(result.gain_error, 5),
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2) + "\n"

    def write(neighbour: Path) -> None:
        neighbour.write_text(text)

    write_atomically(path, write)


def _plot(path: Path, losses: Sequence[float], name: str, exit_layer: int) -> bool:
    """The loss curve as a PNG; False where matplotlib is missing."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        return False
    mpl.use("Agg")  # nothing here needs a display
    figure = Figure(figsize=(7, 4), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color="#d7dbe0", label="each step")
    width = max(1, len(losses) // 25)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(range(width, len(losses) + 1), smooth, color="#5b8def", label=f"mean of {width}")
    axes.set(
        xlabel="step",
        ylabel="KL divergence from the target, nats per token",
        title=f"adapter of {name} after {exit_layer} layers",
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return True


def _versions() -> dict[str, str]:
    packages: Iterable[str] = ("torch", "transformers", "safetensors", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}
