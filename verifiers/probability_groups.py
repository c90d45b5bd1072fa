"""GSD's idea: tokens the target finds about equally likely are verified as one.

The group C(x) of a draft token holds the tokens ranked next to it by the target's probability
(grouped speculative decoding, So et al. 2508.07747). It is accepted with
min(1, sum of p over C / sum of q over C). Groups of different tokens overlap, so this can
also be *less* than min(1, p/q), which costs acceptance and buys nothing: callers take the larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_spec_plugins.verifier import VerifyInput
from vllm_spec_plugins.vocabulary_passes import closest_columns

from .law_entries import draft_entries, target_entries


def group_of(
    batch: VerifyInput,
    rows: Tensor,
    image_tokens: tuple[int, int],
    size: int,
    max_difference: float,
) -> Tensor:
    """`[M, G]` int64 ids of the groups of some rows' draft tokens; -1: none.

    Half of a group are the tokens just above x in probability, its equals among them, and half
    x and those just below it; only ids in the image range, and only such with |p(y) - p(x)| below
    `max_difference`. No other part of the vocabulary is sorted.

    Args:
        batch: The step.
        rows: `[M]` int64, some of the N rows, of draft tokens in the image range.
        image_tokens: `[first, last + 1)`.
        size: G, at least 2.
        max_difference: Of probabilities.
    """
    first, end = image_tokens
    own = batch.draft_token_ids[rows].clamp(first, end - 1)  # see `row_choice`
    counts = size // 2, size - size // 2 - 1
    above, below = closest_columns(batch.target_logits, rows, own, image_tokens, counts)
    ids = torch.cat([own.unsqueeze(1), above, below], dim=1)
    own_p = batch.draft_token_probability[rows].unsqueeze(1)
    near = (target_entries(batch, rows, ids.clamp(min=0)) - own_p).abs() < max_difference
    near &= ids >= 0
    near[:, 0] = True  # x itself
    return torch.where(near, ids, ids.new_full((), -1))


def group_acceptance(batch: VerifyInput, rows: Tensor, groups: Tensor) -> Tensor:
    """`[M]` min(1, sum of p over the group / sum of q over the group).

    Args:
        batch: The step.
        rows: `[M]` int64, some of the N rows.
        groups: `[M, G]` int64 ids, the draft token among them; -1: none.
    """
    columns, used = groups.clamp(min=0), groups >= 0
    p, q = target_entries(batch, rows, columns), draft_entries(batch, rows, columns)
    p_sum = torch.where(used, p, 0).sum(dim=1)
    q_sum = torch.where(used, q, 0).sum(dim=1)
    return torch.where(p_sum < q_sum, p_sum / q_sum, torch.ones_like(p_sum))
