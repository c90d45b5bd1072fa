"""Samples of a model's weights, read from its files, by which trained parts know it again.

Sizes alone would not tell two models of one family apart, nor a fine-tuned model from the one
it was made of. The samples are read from the safetensors files, so before any model loads, and
compared in bfloat16: a copy saved in 16 bits is still the same model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

#: Rows of each matrix that are kept.
_ROWS = 8

#: A copy in another dtype has a larger share of equal numbers than this: rounding to float16
#: first moves about one in twenty. A fine-tuned model has fewer, in the last layer at the latest.
_EQUAL = 0.85


def read_probes(folder: str | Path, num_layers: int) -> dict[str, Tensor]:
    """Samples of the first and last weights of a model.

    Args:
        folder: Of the model, with its safetensors files.
        num_layers: It has.

    Returns:
        bfloat16, by name; empty where the folder has no such files, or stores these weights
        as integers.
    """
    from safetensors import safe_open

    probes: dict[str, Tensor] = {}
    for name, (key, path) in _places(Path(folder), num_layers).items():
        with safe_open(str(path), framework="pt") as file:
            part = file.get_slice(key)
            size = part.get_shape()[0]
            if len(part.get_shape()) == 1:
                sample = part[:]
            else:
                rows = [(2 * i + 1) * size // (2 * _ROWS) for i in range(_ROWS)]
                sample = torch.cat([part[row : row + 1] for row in rows])
        if sample.is_floating_point():
            probes[name] = sample.to(torch.bfloat16)
    return probes


def difference(known: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """What differs between two models, in words; None if they are one.

    Weights that one of them lacks (quantised ones, say) are not compared.
    """
    for name in sorted(known.keys() & found.keys()):
        if known[name].shape != found[name].shape:
            return f"its {name} has another shape"
        equal = (known[name] == found[name]).float().mean().item()
        if equal < _EQUAL:
            return f"{1 - equal:.0%} of the sampled numbers of its {name} differ"
    return None


def _places(folder: Path, num_layers: int) -> dict[str, tuple[str, Path]]:
    """Tensor name and file of each probe, as far as they are there."""
    where: dict[str, Path] = {}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        where = {key: folder / file for key, file in files.items()}
    elif (folder / "model.safetensors").is_file():
        from safetensors import safe_open

        with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
            where = dict.fromkeys(file.keys(), folder / "model.safetensors")
    last = f"layers.{num_layers - 1}."
    endings = {
        "embedding": "embed_tokens.weight",
        "final norm": "model.norm.weight",
        "last attention": f"{last}self_attn.o_proj.weight",
        "last feed-forward layer": f"{last}mlp.down_proj.weight",
    }
    return {
        name: (key, where[key])
        for name, ending in endings.items()
        for key in sorted(where)
        if key.endswith(ending)
    }
