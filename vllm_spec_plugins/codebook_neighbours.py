"""The file of a codebook's neighbours: for each image code, the codes nearest to it.

safetensors with one tensor, `neighbours`, `[C, k]` uint16 (uint32 from 65,536 codes on): row c
holds codes by rising distance of their embedding to that of c, c itself left out, no code
twice. Rows that have fewer end in the number C, which is no code. The metadata holds the card.

Codes are counted from 0; what ids a model gives them is `image_token_range`'s business.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .card_file import CardFormat
from .errors import SpecPluginsError

if TYPE_CHECKING:
    from .context import ModelFacts

_COMMAND = "vllm-spec calibrate codebook"
_FORMAT = CardFormat("neighbour table", "codebook_neighbours", 1, _COMMAND)
_TENSOR = "neighbours"

#: Elements of the table looked at together.
_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class NeighbourCard:
    """What a file says about its table.

    Attributes:
        num_codes: C.
        num_neighbours: k, columns.
        embedding_size: Width of the embeddings that were compared.
        max_distance: Euclidean distance up to which codes are neighbours; None: any.
        duplicate_codes: Codes with the embedding of another code.
        codebook_sha256: Of the embeddings, as little-endian float32.
        source: File and tensor they were read from, for people.
        model: Model whose config was read; "" where none was.
        vocab_size: Of that model; None where none was read.
        first_token_id: Id of code 0 there; None where neither model nor user said.
    """

    num_codes: int
    num_neighbours: int
    embedding_size: int
    max_distance: float | None
    duplicate_codes: int
    codebook_sha256: str
    source: str
    model: str = ""
    vocab_size: int | None = None
    first_token_id: int | None = None

    @classmethod
    def read(cls, path: str | Path) -> NeighbourCard:
        """Read the card of a file, not its table.

        Raises:
            SpecPluginsError: No such file, not a neighbour table, or one of another version.
        """
        if not Path(path).is_file():
            raise SpecPluginsError(f"no neighbour table {path}: `{_COMMAND}` makes one.")
        values = _FORMAT.read(path)
        try:
            return cls(**values)
        except TypeError as error:
            raise _FORMAT.bad_card(path, error) from error

    def check(self, path: str, facts: ModelFacts, image_tokens: tuple[int, int]) -> None:
        """Whether the table belongs to the model about to be served.

        Args:
            path: Of the file, for messages.
            facts: Of that model.
            image_tokens: `[first, last + 1)` ids that are image codes.

        Raises:
            SpecPluginsError: It does not.
        """
        first, end = image_tokens
        if self.num_codes != end - first:
            raise SpecPluginsError(
                f"{path} has neighbours of {self.num_codes} codes, but image_token_range "
                f"[{first}, {end}) holds {end - first}: give the table of this model's codebook, "
                "or the range its codes have."
            )
        if self.first_token_id is not None and self.first_token_id != first:
            raise SpecPluginsError(
                f"{path} was made for codes that begin at id {self.first_token_id}, but "
                f"image_token_range begins at {first}."
            )
        if self.vocab_size is not None and self.vocab_size != facts.vocab_size:
            raise SpecPluginsError(
                f'{path} was made for another model ("{self.model}"): its vocabulary has '
                f"{self.vocab_size} ids, that of {facts.model} {facts.vocab_size}."
            )


def write_neighbours(path: str | Path, card: NeighbourCard, neighbours: Tensor) -> None:
    """Write a table.

    Args:
        path: Overwritten if it exists.
        card: Its metadata.
        neighbours: `[C, k]` int64; C stands for "none".

    Raises:
        ValueError: The table is not one, or not the card's.
    """
    if problem := _problem(card, neighbours):
        raise ValueError(problem)
    _FORMAT.write(path, dataclasses.asdict(card), {_TENSOR: neighbours.to(_dtype(card.num_codes))})


def read_neighbours(path: str | Path) -> tuple[NeighbourCard, Tensor]:
    """The card, and the table `[C, k]` int32.

    Raises:
        SpecPluginsError: Not a neighbour table, or its table is of another shape or type than
            its card says, or holds what is no code.
    """
    from safetensors import safe_open

    card = NeighbourCard.read(path)
    with safe_open(str(path), framework="pt") as file:
        if _TENSOR not in file.keys():  # noqa: SIM118  # it is no mapping
            raise _FORMAT.not_one(path, f'it has no tensor "{_TENSOR}"')
        stored = file.get_tensor(_TENSOR)
    if stored.dtype != _dtype(card.num_codes):
        raise _FORMAT.not_one(
            path,
            f"its table is of {stored.dtype}, that of {card.num_codes} codes must be of "
            f"{_dtype(card.num_codes)}",
        )
    table = stored.to(torch.int64).to(torch.int32)
    if problem := _problem(card, table):
        raise _FORMAT.not_one(path, problem)
    return card, table


def _dtype(num_codes: int) -> torch.dtype:
    """The narrowest type that holds every code and the number of codes."""
    return torch.uint16 if num_codes < 1 << 16 else torch.uint32


def _problem(card: NeighbourCard, table: Tensor) -> str | None:
    """What is wrong with a table, in words; None if nothing is."""
    codes, width = card.num_codes, card.num_neighbours
    if tuple(table.shape) != (codes, width):
        return f"its table is {list(table.shape)}, its card says [{codes}, {width}]"
    if not 1 <= width < codes:
        return f"a table of {codes} codes has 1 to {codes - 1} neighbours of each, not {width}"
    step = max(1, _BLOCK_ELEMENTS // width)
    for start in range(0, codes, step):
        rows = table[start : start + step]
        if bool(((rows < 0) | (rows > codes)).any()):
            return f"its table holds ids outside [0, {codes}]"
        own = torch.arange(start, start + len(rows)).unsqueeze(1)
        if bool((rows == own).any()):
            return "a code is its own neighbour"
        none = rows == codes
        if bool((none[:, :-1] & ~none[:, 1:]).any()):
            return "a row goes on after its end"
        ordered = rows.sort(dim=1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < codes)).any()):
            return "a code is neighbour of another twice"
    return None
