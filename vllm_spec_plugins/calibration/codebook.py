"""The nearest codes of every code of a VQ codebook, block by block."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vllm_spec_plugins.errors import SpecPluginsError, did_you_mean, listed

#: Distances held at once: 128 MB of float64.
_BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True)
class Codebook:
    """Embeddings read from a file.

    Attributes:
        embeddings: `[C, d]` float32, row c is that of code c.
        source: File and tensor.
    """

    embeddings: Tensor
    source: str

    @classmethod
    def read(cls, path: str | Path, tensor: str | None = None) -> Codebook:
        """Read a matrix from a safetensors file.

        Args:
            path: The file.
            tensor: Its name there; None where the file holds one matrix alone.

        Raises:
            SpecPluginsError: No such file or tensor, or it is no codebook.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise SpecPluginsError(
                f"no codebook file {path}: give the safetensors file of the image tokenizer "
                "(the VQ model), which is often apart from the language model."
            )
        try:
            with safe_open(str(path), framework="pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
                chosen = _choose(path, tensor, shapes)
                embeddings = file.get_tensor(chosen)
        except (SafetensorError, OSError) as error:
            raise SpecPluginsError(f"{path} is not a safetensors file: {error}.") from error
        where = f'{path}, tensor "{chosen}"'
        if not embeddings.is_floating_point():
            raise SpecPluginsError(
                f"{where} is of {embeddings.dtype}: a codebook is a matrix of floats."
            )
        embeddings = embeddings.float()
        if bad := int((~embeddings.isfinite()).any(dim=1).sum()):
            raise SpecPluginsError(f"{where}: {bad} rows hold NaN or infinity.")
        return cls(embeddings, f"{Path(path).name}:{chosen}")

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.embeddings.contiguous().numpy().tobytes()).hexdigest()

    @property
    def num_duplicates(self) -> int:
        """Codes with the embedding of another code."""
        _, counts = self.embeddings.unique(dim=0, return_counts=True)
        return int(counts[counts > 1].sum())


def _choose(path: str | Path, tensor: str | None, shapes: dict[str, list[int]]) -> str:
    """The name of the matrix to read."""
    matrices = {name for name, shape in shapes.items() if len(shape) == 2 and shape[0] > 1}
    if tensor is None:
        if len(matrices) == 1:
            return matrices.pop()
        raise SpecPluginsError(
            f"{path} holds {len(matrices)} matrices: say with --tensor which is the codebook. "
            f"It has {_some(matrices)}."
        )
    if tensor not in shapes:
        raise SpecPluginsError(
            f'{path} has no tensor "{tensor}".{did_you_mean(tensor, shapes)} Matrices in it: '
            f"{_some(matrices)}."
        )
    if tensor not in matrices:
        raise SpecPluginsError(
            f'{path}, tensor "{tensor}" has shape {shapes[tensor]}: a codebook is a matrix '
            f"[codes, width]. Matrices in it: {_some(matrices)}."
        )
    return tensor


def _some(names: set[str]) -> str:
    """Names for a message, the first twenty."""
    first = sorted(names)[:20]
    return listed(first) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def nearest_codes(
    embeddings: Tensor,
    num_neighbours: int,
    max_distance: float | None = None,
    on_codes: Callable[[int], None] = lambda _done: None,
) -> Tensor:
    """The nearest other codes of each code, by Euclidean distance.

    A block of rows at a time, so that a codebook of 65,536 codes, whose distances would be
    34 GB, needs 128 MB. Codes at the same distance stand in the order of their numbers, as
    far as they are among the nearest; a code is never its own neighbour, but a duplicate of it
    is, at distance 0.

    Args:
        embeddings: `[C, d]` float32.
        num_neighbours: k, below C.
        max_distance: Codes further away are no neighbours.
        on_codes: Told how many codes are done.

    Returns:
        `[C, k]` int32; rows of fewer than k neighbours end in C.
    """
    count = len(embeddings)
    # Distances are small differences of large squares: far from the origin float32 loses them.
    centred = embeddings.double()
    centred = centred - centred.mean(dim=0)
    squares = centred.square().sum(dim=1)
    table = torch.empty(count, num_neighbours, dtype=torch.int32)
    step = max(1, _BLOCK_ELEMENTS // count)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        distances = torch.addmm(squares, centred[rows], centred.T, alpha=-2)
        distances += squares[rows].unsqueeze(1)
        own = torch.arange(rows.start, rows.stop)
        distances[torch.arange(len(own)), own] = torch.inf
        nearest, codes = distances.topk(num_neighbours, dim=1, largest=False)
        # What differs by rounding alone is the same.
        nearest = nearest.clamp(min=0).sqrt().float()
        codes, order = codes.sort(dim=1)
        nearest, by_distance = nearest.gather(1, order).sort(dim=1, stable=True)
        codes = codes.gather(1, by_distance)
        if max_distance is not None:
            codes = torch.where(nearest <= max_distance, codes, count)
        table[rows] = codes.int()
        on_codes(rows.stop)
    return table
