"""What the commands that train something beside a target have in common."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from vllm_spec_plugins.zoo.cache import write_atomically

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: The target continues the first so-manieth part of a window.
_PROMPT_PART = 4


def training_dtype(folder: Path, dtype: str) -> str:
    """float32 for `auto`, but bfloat16 where the model is saved so and a GPU will compute it."""
    if dtype != "auto":
        return dtype
    config = json.loads((folder / "config.json").read_text())
    saved = config.get("dtype") or config.get("torch_dtype")
    return "bfloat16" if saved == "bfloat16" else "float32"


def continued_by_target(
    folder: Path,
    windows: Sequence[NDArray[np.int64]],
    count: int,
    length: int,
    kept: Path,
    console: Console,
    *,
    seed: int = 0,
    threads: int = 0,
) -> list[NDArray[np.int64]]:
    """Windows whose first part is text and whose rest the target wrote at temperature 1.

    Args:
        folder: Of the target.
        windows: Of text.
        count: How many of them are continued.
        length: Tokens of a window.
        kept: Folder for what is written, so that a killed run goes on.
        console: For a bar.
        seed: Of the draws.
        threads: Of the engine; 0 leaves it to the environment.
    """
    from vllm_spec_plugins.calibration.generations import Engine, Sampling, generate

    prompt = max(1, length // _PROMPT_PART)
    prompts = [window[:prompt] for window in islice(windows, count)]
    bars = Progress(
        TextColumn("the target writes"), BarColumn(), MofNCompleteColumn(), console=console
    )
    with bars:
        task = bars.add_task("", total=len(prompts))
        written = generate(
            folder,
            prompts,
            kept,
            Sampling(max_tokens=length - prompt, seed=seed),
            Engine(threads=threads or None),
            lambda done: bars.update(task, completed=done),
        )
    return [np.concatenate(pair) for pair in zip(prompts, written, strict=True)]


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a report, whole or not at all."""
    text = json.dumps(values, indent=2) + "\n"

    def write(neighbour: Path) -> None:
        neighbour.write_text(text)

    write_atomically(path, write)


def plot_losses(path: Path, losses: Sequence[float], title: str, quantity: str) -> bool:
    """A loss curve as a PNG; False where matplotlib is missing.

    Args:
        path: To write.
        losses: At each step.
        title: Of the picture.
        quantity: What the losses are, with their unit.
    """
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
    axes.set(xlabel="step", ylabel=quantity, title=title)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return True


def versions() -> dict[str, str]:
    """Of Python and of what computes."""
    packages: Iterable[str] = ("torch", "transformers", "safetensors", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}
