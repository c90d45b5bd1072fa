"""`vllm-spec calibrate codebook`: which codes of an image tokenizer look alike."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_spec_plugins import zoo
from vllm_spec_plugins.calibration.codebook import Codebook, nearest_codes
from vllm_spec_plugins.codebook_neighbours import NeighbourCard, write_neighbours
from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.image_token_range import image_token_range
from vllm_spec_plugins.zoo.image_folder import CODEBOOK

from .served_model import model_to_serve


@dataclass(frozen=True, slots=True)
class Job:
    """What the command line asks for.

    Attributes:
        codebook: safetensors file with the VQ embeddings, or an image model of the zoo.
        tensor: Its name in the file; None: the only matrix there.
        output: File to write.
        num_neighbours: k.
        max_distance: Euclidean; None: any.
        model: Folder, or a model of the zoo, that the table is for; None: not checked.
        first_token_id: Id of code 0; None: what the model's config says.
    """

    codebook: str
    tensor: str | None
    output: Path
    num_neighbours: int = 100
    max_distance: float | None = None
    model: str | None = None
    first_token_id: int | None = None


def run(job: Job) -> None:
    """Everything the command does.

    Raises:
        SpecPluginsError: What was asked for cannot be done.
    """
    console = Console()
    if job.output.suffix != ".safetensors":
        raise SpecPluginsError(f"--output must end in .safetensors, got {job.output}.")
    path = zoo.images(job.codebook) / CODEBOOK if job.codebook in zoo.RECIPES else job.codebook
    codebook = Codebook.read(path, job.tensor)
    count, width = codebook.embeddings.shape
    if not 1 <= job.num_neighbours < count:
        raise SpecPluginsError(
            f"--neighbours must be from 1 to {count - 1} for {count} codes, "
            f"got {job.num_neighbours}."
        )
    name, vocab_size, first = _of_model(job, count)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(f"{count} codes", total=count)
        table = nearest_codes(
            codebook.embeddings,
            job.num_neighbours,
            job.max_distance,
            lambda done: progress.update(task, completed=done),
        )
    card = NeighbourCard(
        num_codes=count,
        num_neighbours=job.num_neighbours,
        embedding_size=width,
        max_distance=job.max_distance,
        duplicate_codes=codebook.num_duplicates,
        codebook_sha256=codebook.sha256,
        source=codebook.source,
        model=name,
        vocab_size=vocab_size,
        first_token_id=first,
    )
    job.output.parent.mkdir(parents=True, exist_ok=True)
    write_neighbours(job.output, card, table)
    _show(console, job, card, table, codebook)


def _of_model(job: Job, num_codes: int) -> tuple[str, int | None, int | None]:
    """Name and vocabulary of the model the table is for, and the id of code 0 there."""
    if job.model is None:
        return "", None, job.first_token_id
    folder, _ = model_to_serve(job.model, None)
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise SpecPluginsError(f"{folder / 'config.json'} cannot be read: {error}.") from None
    name = Path(job.model).name
    vocab_size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    if not isinstance(vocab_size, int):
        raise SpecPluginsError(f"the config of {name} does not say its vocab_size.")
    said = image_token_range(config)
    first = said[0] if job.first_token_id is None and said else job.first_token_id
    if first is None:
        raise SpecPluginsError(
            f"the config of {name} does not say which of its ids are image codes: give "
            "--first-token-id, the id of code 0."
        )
    if said and said != (first, first + num_codes):
        raise SpecPluginsError(
            f"the codebook has {num_codes} codes from id {first} on, but the config of {name} says "
            f"its image codes are [{said[0]}, {said[1]}): give the codebook of this model."
        )
    if first + num_codes > vocab_size:
        raise SpecPluginsError(
            f"{num_codes} codes from id {first} on do not fit in the vocabulary of {name}, "
            f"which has {vocab_size} ids."
        )
    return name, vocab_size, first


def _show(
    console: Console, job: Job, card: NeighbourCard, table: torch.Tensor, codebook: Codebook
) -> None:
    """What was found, and how to use it."""
    embeddings = codebook.embeddings
    rows = Table(title=f"{card.source}: {card.num_codes} codes", title_justify="left")
    rows.add_column("neighbour")
    rows.add_column("median distance", justify="right")
    rows.add_column("codes that have it", justify="right")
    places = sorted({1, 2, 5, 10, 20, 50, 100, card.num_neighbours})
    for place in (p for p in places if p <= card.num_neighbours):
        codes = table[:, place - 1].long()
        has = (codes < card.num_codes).nonzero().squeeze(1)
        far = (embeddings[has] - embeddings[codes[has]]).norm(dim=1)
        median = f"{float(far.median()):.4g}" if len(has) else "-"
        rows.add_row(str(place), median, str(len(has)))
    console.print(rows)
    if card.duplicate_codes:
        console.print(f"{card.duplicate_codes} codes have the embedding of another code")
    megabytes = job.output.stat().st_size / 1e6
    console.print(f"wrote {job.output} ({megabytes:.1f} MB). Use it with", highlight=False)
    verifier: dict[str, Any] = {"name": "relaxed_visual", "rule": "lantern++"}
    verifier |= {"neighbours": str(job.output), "num_neighbours": min(10, card.num_neighbours)}
    if card.model == "":
        verifier["image_token_range"] = [card.first_token_id or 0, "..."]
    console.print(f'  "verifier": {json.dumps(verifier)}', highlight=False, soft_wrap=True)
