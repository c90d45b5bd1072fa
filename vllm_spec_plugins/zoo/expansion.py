"""Make a model cost more and compute the same: a cost device for benchmarks, nothing else.

Speculative decoding pays where the target is dear. A model of that size cannot be trained on
a few CPU cores, so the small one is put inside a large one whose further widths and layers
contribute exactly nothing: it takes the time of 0.3 billion parameters and writes the text of
15 million. Speeds measured on it are fair; its text says nothing about large models.

Why it is identical. Embedding columns past the source's width are zero, and whatever writes
to the residual stream (attention output, MLP down) writes zero there and, in added layers,
everywhere. RMSNorm divides by the mean square over the *wide* stream, which is the narrow mean
times r = narrow / wide; so its weight and epsilon are scaled by sqrt(r) and r. With r a power
of four those scales are powers of two, and only the order of sums differs.
"""

from __future__ import annotations

import dataclasses
import re

import torch
from torch import Tensor

from .model import Llama
from .recipes import Architecture

#: Weights whose unused part must be zero: what reads the residual stream last, or writes it.
_SILENT = ("embed_tokens.weight", "lm_head.weight", "o_proj.weight", "down_proj.weight")

#: Float32 rounding in another order of sums stays far below this; logits are of size ten.
_TOLERANCE = 1e-3


class ExpansionError(RuntimeError):
    """The expanded model does not compute what its source computes."""


def expanded_shape(source: Architecture, wide: Architecture) -> Architecture:
    """`wide` with the epsilon that undoes its width.

    Raises:
        ExpansionError: `wide` cannot hold `source`.
    """
    ratio = wide.hidden_size // source.hidden_size
    fits = (
        ratio * source.hidden_size == wide.hidden_size
        and ratio in (1, 4, 16)
        and wide.head_dim == source.head_dim
        and wide.num_layers % source.num_layers == 0
        and wide.num_key_value_heads >= source.num_key_value_heads
        and _queries_per_key(wide) >= _queries_per_key(source)
        and wide.intermediate_size >= source.intermediate_size
        and wide.vocabulary == source.vocabulary
        and wide.rope_theta == source.rope_theta
    )
    if not fits:
        raise ExpansionError(f"{wide} cannot hold {source}.")
    return dataclasses.replace(wide, rms_norm_eps=source.rms_norm_eps / ratio)


def expand(source: Llama, wide: Architecture, seed: int) -> Llama:
    """A model of shape `wide` that computes what `source` computes.

    Layer `i` of the source is layer `i * n` for `n = wide.num_layers / source.num_layers`; the
    `n - 1` after it add nothing, so an exit after `e` layers is an exit after `e * n`. Unused
    weights are random: no arithmetic is skipped.

    Args:
        source: The model to hold.
        wide: Shape of the result, before its epsilon is adjusted.
        seed: Of the unused weights.

    Raises:
        ExpansionError: `wide` cannot hold `source`.
    """
    shape = expanded_shape(source.shape, wide)
    result = Llama(shape)
    result.initialise(torch.Generator().manual_seed(seed))
    narrow, weights = source.export(), result.export()
    for name, weight in weights.items():
        if weight.ndim == 1:
            weight.fill_(1.0)
        if name.endswith(_SILENT):
            weight.zero_()
    step = shape.num_layers // source.shape.num_layers
    width = source.shape.hidden_size
    for name, weight in narrow.items():
        target = weights[_deeper(name, step)]
        if weight.ndim == 1:
            target[:width] = weight * (width / shape.hidden_size) ** 0.5
            continue
        if name.endswith("q_proj.weight"):
            target[query_rows(source.shape, shape), :width] = weight
        elif name.endswith("o_proj.weight"):
            target[:width, query_rows(source.shape, shape)] = weight
        else:
            target[: weight.shape[0], : weight.shape[1]] = weight
    result.load(weights)
    return result


@torch.no_grad()
def verify_identical(source: Llama, expanded: Llama, tokens: Tensor) -> float:
    """The largest difference of two logits over `tokens`, which must not matter.

    Args:
        source: The small model.
        expanded: The large one.
        tokens: `[B, T]` int64, real text.

    Raises:
        ExpansionError: A logit differs by more than 1e-3, or the most likely token differs
            where the source does not call it a tie within that difference.
    """
    narrow = source(tokens)[-1] @ source.head.T
    wide = expanded(tokens)[-1] @ expanded.head.T
    difference = (narrow - wide).abs().max().item()
    top = narrow.topk(2, dim=-1)
    clear = top.values[..., 0] - top.values[..., 1] > 2 * difference
    differs = (wide.argmax(-1) != top.indices[..., 0]) & clear
    if not difference <= _TOLERANCE or differs.any():
        raise ExpansionError(
            f"the expanded model's logits differ from its source's by up to {difference:.2g} "
            f"and its choice in {int(differs.sum())} of {differs.numel()} places: not identical."
        )
    return difference


def _deeper(name: str, step: int) -> str:
    """The weight's name with its layer's new number."""
    return re.sub(r"layers\.(\d+)", lambda found: f"layers.{int(found[1]) * step}", name)


def query_rows(narrow: Architecture, wide: Architecture) -> Tensor:
    """`[narrow heads * head_dim]` rows of the wide query matrix that hold the narrow heads.

    A query head reads the key head its position gives it, so heads keep their place in the
    group of their key head.
    """
    heads = torch.arange(narrow.num_heads)
    group, place = heads // _queries_per_key(narrow), heads % _queries_per_key(narrow)
    first = (group * _queries_per_key(wide) + place) * narrow.head_dim
    return (first[:, None] + torch.arange(narrow.head_dim)).flatten()


def _queries_per_key(shape: Architecture) -> int:
    return shape.num_heads // shape.num_key_value_heads
