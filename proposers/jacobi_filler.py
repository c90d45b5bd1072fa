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

import torch
from torch import Tensor

from vllm_spec_plugins.draft_probabilities import DraftProbabilities

Filler = Literal["random", "repeat_left", "above"]


def copy_from_above(
    text: Tensor,
    empty: Tensor,
    verified: Tensor,
    row_length: int,
    random: Tensor,
    codes: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Filler `above`, column by column: what is filled may stand above what comes later.

    Args:
        text: `[R, 1 + K]` int64, the last verified token and the draft.
        empty: `[R, K]` bool, where the draft is to be filled.
        verified: `[R, K]` int64 from `tokens_above`.
        row_length: Tokens from a code to the one below it.
        random: `[R, K]` int64 random tokens.
        codes: `[first, last + 1)` ids of image codes.

    Returns:
        `[R, K]` int64 the draft, and `[R, K]` bool which of what was filled in is random.
    """
    text = text.clone()
    draft = text[:, 1:]
    is_random = torch.zeros_like(empty)
    for column in range(draft.shape[1]):
        above = verified[:, column] if column < row_length else draft[:, column - row_length]
        left = text[:, column]
        has_above, has_left = ((t >= codes[0]) & (t < codes[1]) for t in (above, left))
        filled = torch.where(has_left, left, random[:, column])
        filled = torch.where(has_above, above, filled)
        draft[:, column] = torch.where(empty[:, column], filled, draft[:, column])
        is_random[:, column] = empty[:, column] & ~(has_above | has_left)
    return draft, is_random


def tokens_above(
    texts: Tensor, rows: Tensor, num_tokens: Tensor, row_length: int, width: int
) -> Tensor:
    """`[R, width]` int64 verified tokens a row of the image above each draft token; -1 = none.

    Args:
        texts: `[S, L]` int32, prompt and verified output.
        rows: `[R]` int64, of each request in `texts`.
        num_tokens: `[R]` int64.
        row_length: Tokens from a code to the one below it.
        width: Draft tokens.
    """
    end = num_tokens.unsqueeze(1)
    positions = end + torch.arange(width, device=texts.device) - row_length
    known = (positions >= 0) & (positions < end)
    tokens = texts[rows.unsqueeze(1), torch.where(known, positions, 0)]
    return torch.where(known, tokens.long(), -1)


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
