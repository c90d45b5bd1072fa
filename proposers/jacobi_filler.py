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

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_spec_plugins.draft_probabilities import DraftProbabilities

from .jacobi_drafts import Places

Filler = Literal["random", "repeat_left", "above"]


def copy_from_above(
    text: Tensor,
    places: Places,
    verified: Tensor,
    row_length: int,
    random: Tensor,
    codes: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Filler `above`, column by column: what is filled may stand above what comes later.

    Args:
        text: `[R, 1 + K]` int64, the last verified token and the draft; places are filled in.
        places: n of the draft.
        verified: `[R, K]` int64 from `tokens_above`.
        row_length: Tokens from a code to the one below it.
        random: `[n]` int64 random tokens.
        codes: `[first, last + 1)` ids of image codes.

    Returns:
        `[n]` int64 tokens, and `[n]` bool which of them are random.
    """
    draft, index = text[:, 1:], places.index(text.device)
    empty = torch.zeros_like(draft, dtype=torch.bool)
    empty[index] = True
    chance = torch.zeros_like(draft)
    chance[index] = random
    is_random = torch.zeros_like(empty)
    for column in range(int(places.columns.min()), draft.shape[1]):
        above = verified[:, column] if column < row_length else draft[:, column - row_length]
        left = text[:, column]
        has_above, has_left = ((t >= codes[0]) & (t < codes[1]) for t in (above, left))
        filled = torch.where(has_left, left, chance[:, column])
        filled = torch.where(has_above, above, filled)
        draft[:, column] = torch.where(empty[:, column], filled, draft[:, column])
        is_random[:, column] = ~(has_above | has_left)
    return draft[index], is_random[index]


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
