"""The model a command was given: where it is, what it is, and how many threads it has work for."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vllm_spec_plugins.errors import ConfigError, did_you_mean, listed
from vllm_spec_plugins.image_token_range import image_token_range

#: Weights that keep one thread busy, in bytes. With less, threads mostly wait for each other.
BYTES_PER_THREAD = 40_000_000


def model_to_serve(model: str, threads: int | None) -> tuple[Path, str]:
    """A model's folder and precision; a model of the zoo is trained first if need be.

    In float32 greedy text is the same however the batch is shaped. Models from elsewhere keep
    the precision their authors chose.
    """
    from vllm_spec_plugins import zoo

    if model in zoo.RECIPES:
        return zoo.ensure(model, threads), "float32"
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve(), "auto"
    raise ConfigError(
        f'"{model}" is neither a model of the zoo nor a folder with a config.json.'
        f"{did_you_mean(model, zoo.RECIPES)} Of the zoo: {listed(zoo.RECIPES)}."
    )


def image_model(folder: Path) -> bool:
    """Whether a model's config says that it writes images."""
    return image_token_range(json.loads((folder / "config.json").read_text())) is not None


def threads_for(folder: Path) -> int:
    """As many as the model has work for; a core is left for front end and scheduler."""
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return max(1, min((os.cpu_count() or 2) - 1, weights // BYTES_PER_THREAD))
