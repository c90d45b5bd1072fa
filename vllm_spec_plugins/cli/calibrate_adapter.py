"""`vllm-spec calibrate adapter`: train an exit adapter and say plainly what it is worth."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from vllm_spec_plugins.adapter_file import AdapterCard, write_adapter
from vllm_spec_plugins.calibration.adapter import (
    AdapterRecipe,
    DraftQuality,
    HeldOut,
    TrainedBlock,
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
from .training_run import continued_by_target, plot_losses, training_dtype, versions, write_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Windows the adapter is judged on: 16,000 positions of 256-token windows.
_HELD_OUT_WINDOWS = 64

#: Shorter texts are not worth a place in a batch.
_SHORTEST = 16


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
        raise SpecPluginsError(f"there is no folder {output.parent} to write {output.name} to.")
    folder, _ = model_to_serve(model, threads or None)
    corpus = Corpus(texts)
    target = LocalModel.load(folder, training_dtype(folder, dtype))
    recipe.check(target)
    with console.status("reading texts"):
        learnt, held_out = _read(corpus, TextTokenizer(folder), recipe, generations)
    if generations:
        kept = output.with_name(output.name + ".generations")
        learnt = continued_by_target(
            folder,
            learnt,
            generations,
            recipe.window,
            kept,
            console,
            seed=recipe.seed,
            threads=threads,
        )
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
        "parameters": sum(weight.numel() for weight in trained.block.parameters()),
        "parameters_of_a_layer": target.layer_parameters,
        "held_out": _rounded(result),
    }
    pictured = _write(output, name, target, recipe, trained, report)
    checkpoint.unlink(missing_ok=True)
    _show(console, report)
    beside = f"{output.with_suffix('.json').name}" + (
        f" and {output.with_suffix('.png').name}" if pictured else ""
    )
    console.print(f"written: {output}, beside it {beside}", highlight=False, soft_wrap=True)
    if not pictured:
        console.print("no loss curve: matplotlib is not installed (extra [demo])", highlight=False)


def _read(
    corpus: Corpus, tokenizer: TextTokenizer, recipe: AdapterRecipe, generations: int
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Windows to learn from, and windows held out.

    Raises:
        SpecPluginsError: There are none of one kind.
    """
    most = max(recipe.steps * recipe.batch_size, generations)
    learnt = sample_windows(_windows(corpus, tokenizer, recipe, held_out=False), most, recipe.seed)
    held_out = sample_windows(
        _windows(corpus, tokenizer, recipe, held_out=True), _HELD_OUT_WINDOWS, recipe.seed
    )
    if not learnt or not held_out:
        raise SpecPluginsError(
            f"too little text: {len(learnt)} windows to learn from and {len(held_out)} held out "
            f"(one text in twenty is held out; texts need {_SHORTEST} tokens): give more of it."
        )
    return learnt, held_out


def _write(
    output: Path,
    name: str,
    target: LocalModel,
    recipe: AdapterRecipe,
    trained: TrainedBlock,
    report: dict[str, Any],
) -> bool:
    """The adapter, its report and its loss curve; whether the last could be drawn."""
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
    write_json(output.with_suffix(".json"), {**full, "versions": versions()})
    return plot_losses(
        output.with_suffix(".png"),
        trained.losses,
        f"adapter of {name} after {recipe.exit_layer} layers",
        "KL divergence from the target, nats per token",
    )


def _windows(
    corpus: Corpus, tokenizer: TextTokenizer, recipe: AdapterRecipe, *, held_out: bool
) -> Iterator[NDArray[np.int64]]:
    """Windows of the texts to learn from, or of those held out."""
    texts = (text.text for text in corpus if text.held_out == held_out)
    return windows(tokenizer, texts, recipe.window, shortest=min(_SHORTEST, recipe.window))


def _show_finished(console: Console, output: Path, job: str) -> None:
    """Show what an earlier run of the same command measured.

    Raises:
        SpecPluginsError: The file comes from another command.
    """
    card = AdapterCard.read(output)
    if card.training.get("job") != job:
        raise SpecPluginsError(
            f"{output} exists and was trained for another model, text or settings: choose another "
            "output, or remove the file."
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
