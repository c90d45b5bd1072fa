"""Small real models, trained on this machine: text from its own Python's source code, and
images of handwritten digits.

    from vllm_spec_plugins import zoo
    folder = zoo.ensure("nano")     # about two minutes the first time, then from the cache
    LLM(str(folder), dtype="float32")

Serve them with `dtype="float32"`: vLLM's "auto" would turn them to bfloat16, in which equal
texts cannot be expected of differently shaped batches.

Importing this package loads neither torch nor vLLM.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_spec_plugins.errors import SpecPluginsError, did_you_mean, listed

from .recipes import (
    RECIPES,
    Architecture,
    ExpandedRecipe,
    Recipe,
    SumsRecipe,
    TextRecipe,
    VisualRecipe,
)

__all__ = [
    "RECIPES",
    "Architecture",
    "ExpandedRecipe",
    "Recipe",
    "SumsRecipe",
    "TextRecipe",
    "VisualRecipe",
    "card",
    "describe",
    "ensure",
    "images",
    "recipe",
]


def ensure(name: str, threads: int | None = None) -> Path:
    """The folder of a model that vLLM can serve, built first if the cache has none.

    Safe to call from several processes: one builds, the others wait. A killed build goes on
    where it was.

    Args:
        name: One of `RECIPES`.
        threads: For building; None leaves torch's own setting (`OMP_NUM_THREADS`).

    Raises:
        SpecPluginsError: No such model.
    """
    from .build import build

    return build(recipe(name), threads)


def images(name: str) -> Path:
    """The folder of codebook and classifier of an image model, built first if need be.

    Read it with `image_folder.read_images`; `codebook.safetensors` in it is what
    `vllm-spec calibrate codebook` takes.

    Raises:
        SpecPluginsError: No such model, or none of images.
    """
    chosen = recipe(name)
    if not isinstance(chosen, VisualRecipe):
        known = (n for n, r in RECIPES.items() if isinstance(r, VisualRecipe))
        raise SpecPluginsError(
            f'"{name}" is no image model of the zoo. Those are: {listed(known)}.'
        )
    from .build import build_images

    return build_images(chosen, None)


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        SpecPluginsError: There is none.
    """
    if name not in RECIPES:
        raise SpecPluginsError(
            f'no model "{name}" in the zoo.{did_you_mean(name, RECIPES)} Known: {listed(RECIPES)}.'
        )
    return RECIPES[name]


def describe(name: str) -> str:
    """One line for people: what it is, how large, how long it takes to build, space on disk.

    Raises:
        SpecPluginsError: No such model.
    """
    chosen = recipe(name)
    parameters = chosen.architecture.num_parameters
    after = f" after {chosen.source}" if isinstance(chosen, ExpandedRecipe) else ""
    return (
        f"{chosen.name}: {chosen.summary}; {parameters / 1e6:.3g} million parameters, "
        f"{chosen.architecture.num_layers} layers, about {chosen.minutes:g} minutes{after} to "
        f"build on four cores, {parameters * 4 / 1e6:,.0f} MB"
    )


def card(name: str) -> dict[str, Any]:
    """What was measured when the model was built; builds it if need be. Keys: see `build.py`."""
    from .build import CARD

    return json.loads((ensure(name) / CARD).read_text())
