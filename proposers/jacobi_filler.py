"""Tokens for places of a draft of which no law is known yet.

    random        uniform over the image codes, or over the vocabulary where there are none.
                  Uniform is then also the law it is verified with
    repeat_left   the token before, again
    above         the image code a row of the image higher; where there is none the one before;
                  where that is no image code either, a random one

Copies are choices, not draws: they are verified as such. A copy looks only at tokens that stand
before its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_spec_plugins.draft_probabilities import DraftProbabilities

Filler = Literal["random", "repeat_left", "above"]


@dataclass(frozen=True, slots=True)
class Place:
    """One column of the drafts of R requests, to be filled.

    Attributes:
        left: `[R]` int64 token before it.
        above: `[R]` int64 token a row of the image higher, -1 where there is none.
        random: `[R]` int64 a random token.
    """

    left: Tensor
    above: Tensor
    random: Tensor


def fill(filler: Filler, place: Place, codes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`[R]` int64 tokens, and `[R]` bool which of them are random.

    Args:
        filler: How.
        place: What stands around it.
        codes: `[first, last + 1)` ids of image codes.
    """
    if filler == "random":
        return place.random, torch.ones_like(place.random, dtype=torch.bool)
    if filler == "repeat_left":
        return place.left, torch.zeros_like(place.left, dtype=torch.bool)
    has_above, has_left = (
        (tokens >= codes[0]) & (tokens < codes[1]) for tokens in (place.above, place.left)
    )
    copied = torch.where(has_above, place.above, place.left)
    is_copy = has_above | has_left
    return torch.where(is_copy, copied, place.random), ~is_copy


def tokens_above(
    token_history: NDArray[np.int32],
    rows: NDArray[np.int64],
    num_tokens: NDArray[np.int64],
    row_length: int,
    width: int,
) -> NDArray[np.int64]:
    """`[R, width]` verified tokens a row of the image above each draft token; -1 = not verified.

    Args:
        token_history: As in `DraftInput`.
        rows: `[R]`.
        num_tokens: `[R]`.
        row_length: Tokens from a code to the one below it.
        width: Draft tokens.
    """
    positions = num_tokens[:, None] + np.arange(width) - row_length
    known = (positions >= 0) & (positions < num_tokens[:, None])
    tokens = token_history[rows[:, None], np.where(known, positions, 0)]
    return np.where(known, tokens, -1).astype(np.int64)


def uniform_law(
    codes: tuple[int, int], vocab_size: int, most: int, device: torch.device
) -> tuple[Tensor, DraftProbabilities]:
    """What random tokens are drawn from: all codes, or `most` evenly spaced ones.

    Returns:
        `[C]` int64 ascending ids, and their law in the columns that laws are kept in: the
        vocabulary, or `most` where it is larger, `[M]`.
    """
    first, end = codes
    count = min(end - first, most)
    ids = first + torch.arange(count, device=device) * (end - first) // count
    if most >= vocab_size:
        values = torch.zeros(vocab_size, device=device).index_fill_(0, ids, 1 / count)
        return ids, DraftProbabilities(values)
    values = torch.zeros(most, device=device)
    vocabulary = torch.full((most,), -1, device=device)
    values[most - count :] = 1 / count
    vocabulary[most - count :] = ids
    return ids, DraftProbabilities(values, vocabulary)
