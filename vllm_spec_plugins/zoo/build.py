"""From a recipe to a folder in the cache."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from . import corpus, sums
from .cache import key_of, obtain
from .recipes import (
    RECIPES,
    DistilledVisualRecipe,
    ExpandedRecipe,
    Recipe,
    SumsRecipe,
    TextRecipe,
    VisualRecipe,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

logger = logging.getLogger(__name__)

#: Raise when a change of this package changes the weights a recipe gives.
_GENERATION = 1

#: What a recipe says that its weights do not depend on.
_NO_MATTER = ("summary", "minutes", "checkpoint_every")

CARD = "card.json"


def build(recipe: Recipe, threads: int | None) -> Path:
    """The folder of `recipe`, made if it is not in the cache. See `zoo.ensure`."""

    def make(folder: Path, unfinished: Path) -> None:
        if isinstance(recipe, TextRecipe):
            _train(recipe, folder, unfinished, threads)
        elif isinstance(recipe, VisualRecipe):
            _train_visual(recipe, folder, unfinished, threads)
        else:
            _expand(recipe, folder, threads)

    def waiting() -> None:
        logger.warning("another process is building %s: waiting for it", recipe.name)

    return obtain(folder_name(recipe), make, waiting)


def folder_name(recipe: Recipe) -> str:
    """The recipe's name, and a hash of all that decides its weights."""
    return f"{recipe.name}-{key_of(facts_of(recipe))}"


def facts_of(recipe: Recipe) -> Mapping[str, object]:
    """All that decides the weights, as far as it can be known without building."""
    described = dataclasses.asdict(recipe)
    facts: dict[str, object] = {
        "generation": _GENERATION,
        "recipe": {key: value for key, value in described.items() if key not in _NO_MATTER},
        "torch": _minor_version("torch"),
    }
    if isinstance(recipe, ExpandedRecipe):
        return facts | {"source": folder_name(RECIPES[recipe.source])}
    if isinstance(recipe, VisualRecipe):
        facts |= {"images": images_folder_name(recipe), "bfloat16": has_bfloat16_units()}
        if isinstance(recipe, DistilledVisualRecipe):
            facts["teacher_folder"] = folder_name(RECIPES[recipe.teacher])
        return facts
    return facts | {
        "corpus": _text_digest(recipe),
        "tokenizers": _minor_version("tokenizers"),
        "bfloat16": has_bfloat16_units(),
    }


def images_folder_name(recipe: VisualRecipe) -> str:
    """The folder of codebook and classifier, which models of one kind share."""
    from . import digits

    facts = {
        "generation": _GENERATION,
        "classifier_steps": recipe.classifier_steps,
        "digits": digits.digest(),
        "torch": _minor_version("torch"),
    }
    return f"digit-images-{key_of(facts)}"


def build_images(recipe: VisualRecipe, threads: int | None) -> Path:
    """The folder of codebook, classifier and statistics (`image_folder.py`), made if missing."""
    from .image_folder import make_images

    def make(folder: Path, _unfinished: Path) -> None:
        with _torch_threads(threads):
            card = make_images(folder, recipe.classifier_steps)
        _write_card(folder, {**card, "versions": _versions()})

    return obtain(images_folder_name(recipe), make)


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware.

    With such units training is several times faster in bfloat16; without them, several times
    slower. Only x86 on Linux is known here: elsewhere float32 is used, which is always right.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _train(recipe: TextRecipe, folder: Path, unfinished: Path, threads: int | None) -> None:
    import torch

    from .evaluation import evaluate
    from .hugging_face import save_model
    from .progress import training_progress
    from .training import train

    logger.info("training %s: about %g minutes on four cores", recipe.name, recipe.minutes)
    tokens, held_out = _prepare_text(recipe, folder)
    dtype = torch.bfloat16 if has_bfloat16_units() else torch.float32
    with _torch_threads(threads) as used:
        with training_progress(recipe.name, recipe.steps) as on_step:
            trained = train(recipe, tokens, dtype, unfinished / "checkpoint.pt", on_step)
        exits = evaluate(trained.model, held_out, recipe.exits)
    save_model(trained.model, folder)
    card = {
        "name": recipe.name,
        "recipe": dataclasses.asdict(recipe),
        "parameters": recipe.architecture.num_parameters,
        "held_out": [dataclasses.asdict(exit_) for exit_ in exits],
        "training_loss": [round(loss, 4) for loss in trained.losses],
        "tokens_seen": recipe.steps * recipe.batch_size * recipe.sequence_length,
        "corpus_tokens": len(tokens),
        "held_out_tokens": len(held_out),
        "seconds": round(trained.seconds, 1),
        "resumed_at": trained.resumed_at,
        "threads": used,
        "matrix_products": str(dtype).removeprefix("torch."),
        "corpus_sha256": _text_digest(recipe),
        "versions": _versions(),
    }
    _write_card(folder, card)


def _train_visual(
    recipe: VisualRecipe, folder: Path, unfinished: Path, threads: int | None
) -> None:
    import torch

    from .digits import load_digits
    from .hugging_face import load_model, save_model
    from .image_folder import read_images, save_image_tokenizer
    from .image_tokens import IMAGE_TOKEN_RANGE
    from .progress import training_progress
    from .visual_training import cross_entropy, texts_of_step, train_visual

    images_folder = build_images(recipe, threads)
    teacher = None
    if isinstance(recipe, DistilledVisualRecipe):
        source = RECIPES[recipe.teacher]
        teacher = load_model(source.architecture, build(source, threads)).requires_grad_(False)
    logger.info("training %s: about %g minutes on four cores", recipe.name, recipe.minutes)
    images = read_images(images_folder)
    training, held_out = load_digits()
    dtype = torch.bfloat16 if has_bfloat16_units() else torch.float32
    with _torch_threads(threads) as used:
        with training_progress(recipe.name, recipe.steps) as on_step:
            trained = train_visual(
                recipe,
                training,
                images.tokens,
                dtype,
                unfinished / "checkpoint.pt",
                on_step,
                teacher,
            )
        texts = texts_of_step(held_out, images.tokens, 0, recipe)
        held_out_loss = cross_entropy(trained.model, texts, torch.float32)
    save_model(trained.model, folder, {"image_token_range": list(IMAGE_TOKEN_RANGE)})
    save_image_tokenizer(folder, recipe.architecture.max_positions)
    card = {
        "name": recipe.name,
        "recipe": dataclasses.asdict(recipe),
        "parameters": recipe.architecture.num_parameters,
        "images": images_folder.name,
        "held_out_cross_entropy": round(held_out_loss, 4),
        "training_loss": [round(loss, 4) for loss in trained.losses],
        "images_seen": recipe.steps * recipe.batch_size,
        "seconds": round(trained.seconds, 1),
        "resumed_at": trained.resumed_at,
        "threads": used,
        "matrix_products": str(dtype).removeprefix("torch."),
        "versions": _versions(),
    }
    _write_card(folder, card)


def _expand(recipe: ExpandedRecipe, folder: Path, threads: int | None) -> None:
    from .expansion import expand, verify_identical
    from .hugging_face import load_model, save_model

    source_recipe = RECIPES[recipe.source]
    if not isinstance(source_recipe, TextRecipe):
        raise TypeError(f"{recipe.name} expands {recipe.source}, which is itself expanded")
    source_folder = build(source_recipe, threads)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source_folder / name, folder)
    with _torch_threads(threads) as used:
        source = load_model(source_recipe.architecture, source_folder)
        wide = expand(source, recipe.architecture, recipe.seed)
        save_model(wide, folder)
        wide = load_model(wide.shape, folder)  # verify what was written, not what was meant
        difference = verify_identical(source, wide, _held_out_windows(folder))
    card = {
        "name": recipe.name,
        "recipe": dataclasses.asdict(recipe),
        "cost_device": f"computes what {recipe.source} computes; only the cost is that of its size",
        "parameters": recipe.architecture.num_parameters,
        "source": source_folder.name,
        "largest_logit_difference": difference,
        "threads": used,
        "versions": _versions(),
    }
    _write_card(folder, card)


def _held_out_windows(folder: Path) -> Tensor:
    """`[8, 128]` token ids of text no model has seen, by the tokenizer in `folder`."""
    import torch
    from tokenizers import Tokenizer

    from .tokenizer import encode_files

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = (file.text for file in corpus.held_out_files()[:8])
    return torch.from_numpy(encode_files(tokenizer, text)[: 8 * 128]).view(8, 128)


def _text_digest(recipe: TextRecipe) -> str:
    return sums.digest() if isinstance(recipe, SumsRecipe) else corpus.digest()


def _prepare_text(recipe: TextRecipe, folder: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Train the tokenizer into `folder`; return training and held-out tokens."""
    from .tokenizer import encode_files, save_tokenizer, train_tokenizer

    if isinstance(recipe, SumsRecipe):
        tokenizer = sums.train_word_tokenizer(recipe.architecture.vocabulary)
        save_tokenizer(tokenizer, folder, recipe.architecture.max_positions)
        tasks = (sums.sums(0, recipe.num_tasks), sums.sums(1, recipe.num_tasks // 20))
        learnt, new = ([f"{task.prompt} {task.solution}" for task in part] for part in tasks)
        return encode_files(tokenizer, learnt), encode_files(tokenizer, new)
    training = [file.text for file in _first_bytes(corpus.training_files(), recipe.training_bytes)]
    held_out = [file.text for file in _first_bytes(corpus.held_out_files(), recipe.training_bytes)]
    tokenizer = train_tokenizer(training, recipe.architecture.vocabulary)
    save_tokenizer(tokenizer, folder, recipe.architecture.max_positions)
    return encode_files(tokenizer, training), encode_files(tokenizer, held_out)


def _first_bytes(files: list[corpus.SourceFile], most: int | None) -> Iterator[corpus.SourceFile]:
    """Files from the first on until `most` characters are passed; all with None."""
    total = 0
    for file in files:
        if most is not None and total >= most:
            return
        total += len(file.text)
        yield file


def _write_card(folder: Path, card: Mapping[str, object]) -> None:
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n")


def _versions() -> dict[str, str]:
    packages = ("torch", "tokenizers", "safetensors", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}


def _minor_version(package: str) -> str:
    return ".".join(importlib.metadata.version(package).split("+")[0].split(".")[:2])


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[int]:
    """Use so many threads inside; None leaves torch as it is. Yields the number in use."""
    import torch

    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
