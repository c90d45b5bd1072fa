"""`vllm-spec calibrate diffusion-drafter`: train a diffusion drafter and say what it is worth."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from vllm_spec_plugins.calibration.adapter import padded, sample_windows
from vllm_spec_plugins.calibration.diffusion_evaluation import Written, evaluate, write_texts
from vllm_spec_plugins.calibration.diffusion_start import (
    Sizes,
    anew,
    conditioned,
    from_model,
    mask_token_of,
)
from vllm_spec_plugins.calibration.diffusion_training import (
    DiffusionRecipe,
    TrainedDrafter,
    job_of,
    train,
)
from vllm_spec_plugins.calibration.hugging_face import LocalModel
from vllm_spec_plugins.calibration.texts import Corpus, TextTokenizer, windows
from vllm_spec_plugins.diffusion.conditioning import TargetStates, layers_of
from vllm_spec_plugins.diffusion.drafter import DiffusionDrafter
from vllm_spec_plugins.diffusion.folder import PROBE, check_same_tokens
from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.weight_probes import read_probes
from vllm_spec_plugins.zoo.progress import training_progress
from vllm_spec_plugins.zoo.recipes import RECIPES

from .served_model import model_to_serve
from .training_run import continued_by_target, plot_losses, training_dtype, versions, write_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Shorter texts are not worth a place in a batch.
_SHORTEST = 32

#: The report in a drafter's folder.
CARD = "card.json"


@dataclass(frozen=True, slots=True)
class Start:
    """Where training starts.

    Attributes:
        model: A model whose first layers, embedding and head are taken; "" is the target.
        num_layers: Layers of the drafter.
        sizes: Of a drafter that starts anew instead.
        condition_on_layers: Layers of the target whose hidden states it reads, see `layers_of`.
    """

    model: str = ""
    num_layers: int = 2
    sizes: Sizes | None = None
    condition_on_layers: str = "none"


def start_of(
    model: str,
    layers: int,
    hidden_size: int | None,
    heads: int | None,
    kv_heads: int | None,
    ffn_size: int | None,
    condition_on_layers: str = "none",
) -> Start:
    """From the command's options; `model` is `none` for new weights.

    Raises:
        SpecPluginsError: Sizes are given for a drafter that takes a model's, or do not fit.
    """
    given = {
        "--hidden-size": hidden_size,
        "--heads": heads,
        "--kv-heads": kv_heads,
        "--ffn-size": ffn_size,
    }
    if model != "none":
        if named := [name for name, value in given.items() if value is not None]:
            raise SpecPluginsError(
                f"{', '.join(named)} can only be chosen for new weights (--start none): otherwise "
                "the drafter has the sizes of the model it starts from."
            )
        return Start(model, layers, condition_on_layers=condition_on_layers)
    hidden_size = hidden_size or 256
    heads = heads or max(1, hidden_size // 64)
    sizes = Sizes(layers, hidden_size, heads, kv_heads or heads, ffn_size or 3 * hidden_size)
    sizes.check()
    return Start("", layers, sizes, condition_on_layers)


@dataclass(frozen=True, slots=True)
class HeldOutTexts:
    """What the target writes for the evaluation, at temperature 0 and 1.

    Attributes:
        count: Prompts, each from another place of the held-out text.
        prompt_tokens: Of each prompt.
        new_tokens: Written after each.
    """

    count: int = 32
    prompt_tokens: int = 64
    new_tokens: int = 64


def run(
    model: str,
    texts: Sequence[str],
    output: Path,
    recipe: DiffusionRecipe,
    start: Start,
    *,
    held_out: HeldOutTexts | None = None,
    generations: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    threads: int = 0,
) -> None:
    """Everything the command does.

    Args:
        model: The target: folder, or a model of the zoo.
        texts: Sources of text, see `Corpus`.
        output: Folder to write.
        recipe: How to train.
        start: From what.
        held_out: What to judge the drafter by.
        generations: Train on so many texts that the target continued; 0: on the texts.
        dtype: Of the target: `auto`, `float32` or `bfloat16`.
        device: Where.
        threads: Of torch; 0 leaves its own setting.

    Raises:
        SpecPluginsError: With one message that says what to do.
    """
    console = Console()
    _log_progress()
    if threads:
        torch.set_num_threads(threads)
    if not output.parent.is_dir():
        raise SpecPluginsError(f"there is no folder {output.parent} to write {output.name} to.")
    held_out = held_out or HeldOutTexts()
    folder, _ = model_to_serve(model, threads or None)
    corpus = Corpus(texts)
    target = LocalModel.load(folder, training_dtype(folder, dtype))
    recipe.check(target)
    _check_held_out(held_out, recipe, target)
    read = layers_of(start.condition_on_layers, target.num_layers)
    tokenizer = TextTokenizer(folder)
    mask_token_id = mask_token_of(tokenizer, target.vocab_size)
    source = None if start.sizes else _source(start.model, folder, target, threads)
    drafter = source and from_model(source, start.num_layers, mask_token_id)
    with console.status("reading texts"):
        learnt, prompts = _read(corpus, tokenizer, recipe, held_out, generations)
    if generations:
        kept = output.with_name(output.name + ".generations")
        learnt = continued_by_target(
            folder, learnt, generations, recipe.window, kept, console,
            seed=recipe.seed, threads=threads,
        )  # fmt: skip
    rows = padded(learnt)
    if drafter is None:
        assert start.sizes is not None
        drafter = anew(start.sizes, target, mask_token_id, rows[rows >= 0], recipe.seed)
    name, revision = _name_and_revision(model, folder)
    if read:
        states = TargetStates(name, revision, target.num_layers, target.hidden_size, read)
        drafter = conditioned(drafter, states)
    # Only now: vLLM takes most of a GPU's memory while it writes.
    target.module.to(device)
    drafter.to(device)
    data = hashlib.sha256(rows.tobytes()).hexdigest()
    job = job_of(recipe, drafter, target, data)
    if output.exists():
        _show_finished(console, output, job)
        return

    _announce(console, name, drafter, recipe, rows, from_target=generations > 0)
    checkpoint = output.with_name(output.name + ".unfinished")
    with training_progress(f"diffusion drafter of {name}", recipe.steps) as on_step:
        trained = train(drafter, target, recipe, rows, checkpoint, job, on_step)
    with console.status("measuring on text the target writes"):
        quality = _quality(target, trained.drafter, prompts, held_out, recipe)
    report: dict[str, Any] = {
        "job": job,
        "target": name,
        "target_revision": revision,
        "condition_on_layers": list(read),
        "start": "anew" if start.sizes else Path(start.model or model).name,
        "data_sha256": data,
        **_learnt_from(recipe, rows, texts, generations),
        **_training(trained, drafter, target, device),
        "held_out": {"texts": asdict(held_out), **quality},
        "losses": [round(loss, 5) for loss in trained.losses],
        "versions": versions(),
    }
    pictured = _write(output, folder, trained, report)
    checkpoint.unlink(missing_ok=True)
    _show(console, report)
    console.print(f"written: {output}", highlight=False, soft_wrap=True)
    if not pictured:
        console.print("no loss curve: matplotlib is not installed (extra [demo])", highlight=False)


def _log_progress() -> None:
    """Where no bar is drawn, progress is logged."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vllm_spec_plugins").setLevel(logging.INFO)


def _parameters_in_layers(drafter: DiffusionDrafter) -> int:
    return sum(weight.numel() for weight, _ in drafter.matrices())


def _announce(
    console: Console,
    name: str,
    drafter: DiffusionDrafter,
    recipe: DiffusionRecipe,
    rows: NDArray[np.int64],
    *,
    from_target: bool,
) -> None:
    """Say what is about to be trained, and on what.

    Args:
        console: Where.
        name: Of the target, for people.
        drafter: Not trained yet.
        recipe: How.
        rows: `[windows, tokens]` to learn from.
        from_target: Whether the target wrote them.
    """
    console.print(
        f"diffusion drafter for [bold]{name}[/bold]: "
        f"{_parameters_in_layers(drafter) / 1e6:.3g} million parameters in "
        f"{drafter.config.num_layers} layers, blocks of up to {recipe.block} tokens; "
        f"{recipe.steps} steps of {recipe.batch_size} windows, {rows.shape[1]} tokens each, from "
        f"{len(rows)} windows {'the target wrote' if from_target else 'of text'}; "
        f"{torch.get_num_threads()} threads",
        highlight=False,
    )


def _learnt_from(
    recipe: DiffusionRecipe, rows: NDArray[np.int64], texts: Sequence[str], generations: int
) -> dict[str, Any]:
    """The report's part on the recipe and the `[windows, tokens]` it was followed on."""
    return {
        "recipe": asdict(recipe),
        "texts": [source if source.startswith("zoo") else Path(source).name for source in texts],
        "generations": generations,
        "tokens": int((rows >= 0).sum()),
        "tokens_seen": recipe.steps * recipe.batch_size * rows.shape[1],
        "masks_seen": recipe.steps * recipe.batch_size * recipe.num_masks,
    }


def _training(
    trained: TrainedDrafter, drafter: DiffusionDrafter, target: LocalModel, device: str
) -> dict[str, Any]:
    """The report's part on the run: how long, where, how large a drafter."""
    return {
        "seconds": round(trained.seconds, 1),
        "resumed_at": trained.resumed_at,
        "threads": torch.get_num_threads(),
        "device": device,
        "dtype": str(target.dtype).removeprefix("torch."),
        "parameters": sum(weight.numel() for weight in drafter.parameters()),
        "parameters_in_layers": _parameters_in_layers(drafter),
    }


def _read(
    corpus: Corpus,
    tokenizer: TextTokenizer,
    recipe: DiffusionRecipe,
    held_out: HeldOutTexts,
    generations: int,
) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """Windows to learn from, and held-out prompts `[count, prompt_tokens]`.

    Raises:
        SpecPluginsError: There are too few.
    """
    most = max(recipe.steps * recipe.batch_size, generations)
    learnt = sample_windows(_windows(corpus, tokenizer, recipe.window), most, recipe.seed)
    prompts = _prompts(corpus, tokenizer, held_out, recipe.seed)
    if not learnt or len(prompts) < 2:
        raise SpecPluginsError(
            f"too little text: {len(learnt)} windows of {_SHORTEST} tokens or more to learn from "
            f"and {len(prompts)} held-out prompts of {held_out.prompt_tokens} tokens (one text in "
            "twenty is held out): give more of it."
        )
    return learnt, prompts


def _quality(
    target: LocalModel,
    drafter: DiffusionDrafter,
    prompts: NDArray[np.int64],
    held_out: HeldOutTexts,
    recipe: DiffusionRecipe,
) -> dict[str, Any]:
    """What the drafter is worth on what the target writes, greedily and not.

    A conditioned one is measured once more without the target's states.
    """
    written = [
        write_texts(target, prompts, held_out.new_tokens, greedy=greedy, seed=recipe.seed)
        for greedy in (True, False)
    ]
    reads_states = drafter.config.conditioned_on is not None
    return {
        "measured": [_measured(target, drafter, texts, recipe.block) for texts in written],
        "without_states": [
            _measured(target, drafter, texts, recipe.block, withheld=True)
            for texts in (written if reads_states else ())
        ],
    }


def _check_held_out(held_out: HeldOutTexts, recipe: DiffusionRecipe, target: LocalModel) -> None:
    """Raises SpecPluginsError if no block fits into what is written, or that into the target."""
    if held_out.new_tokens < recipe.block:
        raise SpecPluginsError(
            f"--new-tokens {held_out.new_tokens} is less than a block of {recipe.block} tokens: "
            "no whole draft would be measured."
        )
    longest = target.max_positions - held_out.prompt_tokens
    if held_out.new_tokens > longest:
        raise SpecPluginsError(
            f"--new-tokens {held_out.new_tokens} after prompts of {held_out.prompt_tokens} is "
            f"more than the target's {target.max_positions} positions: at most {longest}."
        )


def _source(model: str, folder: Path, target: LocalModel, threads: int) -> LocalModel:
    """The model to start from: the target, or another one with its tokens.

    Raises:
        SpecPluginsError: Its vocabulary or tokenizer is another.
    """
    if not model:
        return target
    start, _ = model_to_serve(model, threads or None)
    source = LocalModel.load(start, "float32")
    if source.vocab_size != target.vocab_size:
        raise SpecPluginsError(
            f"--start {model} has logits for {source.vocab_size} tokens, the target for "
            f"{target.vocab_size}: they must share a tokenizer."
        )
    check_same_tokens(start, folder)
    return source


def _windows(corpus: Corpus, tokenizer: TextTokenizer, length: int) -> Iterator[NDArray[np.int64]]:
    texts = (text.text for text in corpus if not text.held_out)
    return windows(tokenizer, texts, length, shortest=min(_SHORTEST, length))


def _prompts(
    corpus: Corpus, tokenizer: TextTokenizer, held_out: HeldOutTexts, seed: int
) -> NDArray[np.int64]:
    """`[count, prompt_tokens]`, fewer where there is less text."""
    texts = (text.text for text in corpus if text.held_out)
    found = windows(tokenizer, texts, held_out.prompt_tokens)
    return padded(sample_windows(found, held_out.count, seed))


def _name_and_revision(model: str, folder: Path) -> tuple[str, str | None]:
    """What a target is called: on the Hub where it comes from its cache, with the commit."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/"), folder.name
    if model in RECIPES:  # the folder's name ends with a digest of how it was trained
        return model, folder.name.removeprefix(f"{model}-")
    return Path(model).name, None


def _measured(
    target: LocalModel,
    drafter: DiffusionDrafter,
    written: Written,
    block: int,
    *,
    withheld: bool = False,
) -> dict[str, Any]:
    try:
        quality = evaluate(target, drafter, written, block, withheld=withheld)
    except ValueError as error:
        raise SpecPluginsError(
            f"the drafter cannot be judged: the target ends its texts early, {error}. Lower "
            "--block, or give other texts."
        ) from error
    return {"temperature": float(not written.greedy), **quality.rounded()}


def _write(
    output: Path, target_folder: Path, trained: TrainedDrafter, report: Mapping[str, Any]
) -> bool:
    """The folder, whole or not at all. Returns whether the loss curve was drawn."""
    from safetensors.torch import save

    fresh = output.with_name(output.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for file in _tokenizer_files(target_folder):
        shutil.copyfile(file, fresh / file.name)
    drafter = trained.drafter
    write_json(fresh / "config.json", drafter.config.as_json())
    weights = {name: weight.cpu() for name, weight in drafter.export().items()}
    if (states := drafter.config.conditioned_on) is not None:
        probes = read_probes(target_folder, states.num_layers)
        weights |= {PROBE + name: probe for name, probe in probes.items()}
    (fresh / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    title = f"diffusion drafter of {report['target']}"
    pictured = plot_losses(
        fresh / "loss.png", trained.losses, title, "divergence of a block's tokens, nats"
    )
    write_json(fresh / CARD, report)
    fresh.rename(output)
    return pictured


def _tokenizer_files(folder: Path) -> list[Path]:
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json")
    names = (*names, "merges.txt", "tokenizer.model", "added_tokens.json", "chat_template.jinja")
    return [folder / name for name in names if (folder / name).is_file()]


def _show_finished(console: Console, output: Path, job: str) -> None:
    """Show what an earlier run of the same command measured.

    Raises:
        SpecPluginsError: The folder comes from another command.
    """
    card = output / CARD
    report = json.loads(card.read_text()) if card.is_file() else {}
    if report.get("job") != job:
        raise SpecPluginsError(
            f"{output} exists and was trained for another model, text or settings: choose another "
            "output, or remove the folder."
        )
    console.print(f"{output} is already trained:", highlight=False, soft_wrap=True)
    _show(console, report)


def _show(console: Console, report: Mapping[str, Any]) -> None:
    """Tables of what was measured."""
    held_out = report["held_out"]
    for measured in held_out["measured"]:
        table = Table(
            title=f"{held_out['texts']['count']} texts the target wrote at temperature "
            f"{measured['temperature']:g}"
        )
        for column in ("draft token", "overlap", "same first choice", "tokens per step so far"):
            table.add_column(column, justify="right")
        lengths, errors = measured["acceptance_length"], measured["acceptance_length_error"]
        for number in shown(len(lengths)):
            error = errors[number - 1]
            table.add_row(
                str(number),
                f"{measured['overlap'][number - 1]:.3f}",
                f"{measured['agreement'][number - 1]:.3f}",
                f"{lengths[number - 1]:.2f}" + ("" if error is None else f" ± {error:.2f}"),
            )
        console.print(table)
    for measured in held_out.get("without_states", ()):
        console.print(
            f"With none of the target's states, as after a prefix cache hit, at temperature "
            f"{measured['temperature']:g}: {measured['acceptance_length'][-1]:.2f} tokens per step",
            highlight=False,
        )
    console.print(
        "overlap: chance that the draft token is accepted at temperature 1, once those before it "
        "were. Tokens per step: with drafts up to this token, the one after them included.",
        highlight=False,
    )


def shown(block: int) -> list[int]:
    """Which draft tokens a table has rows for: 1 to 4, powers of two, and the last."""
    return sorted({n for n in (1, 2, 3, 4, 8, 16, 32, 64, block) if n <= block})
