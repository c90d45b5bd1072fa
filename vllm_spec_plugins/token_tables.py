"""From draft tokens laid end to end to a row for each request, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from .verifier import Verification, VerifyInput
from .vocabulary_passes import first_argmax


def in_table(batch: VerifyInput, values: Tensor) -> Tensor:
    """`[R, K]` of `[N]`: a row for each request, 0 past the end of its draft."""
    requests, width = len(batch.num_draft), batch.max_num_draft
    if len(values) == requests * width:  # every draft is as long as the longest
        return values.view(requests, width)
    table = values.new_zeros(requests, width)
    table[batch.request_of, batch.index_in_draft] = values
    return table


def leading_run(batch: VerifyInput, stands: Tensor) -> Tensor:
    """`[R]` how many draft tokens stand before the first that does not. `stands`: `[N]` bool."""
    return in_table(batch, stands).cumprod(dim=1).sum(dim=1)


def greedy_tokens(batch: VerifyInput, accepted: Tensor) -> Tensor:
    """`[R, K+1]` int64: the target's most likely tokens, -1 behind the one after the accepted.

    Args:
        batch: The step; all requests are greedy.
        accepted: `[R]` draft tokens that stand, all of them the most likely ones.
    """
    own, bonus = in_table(batch, batch.greedy_token_ids), first_argmax(batch.bonus_logits)
    table = torch.cat([own, bonus.unsqueeze(1)], dim=1)
    if len(batch.draft_token_ids) < own.numel():  # not every draft is as long as the longest
        table.scatter_(1, batch.num_draft.unsqueeze(1), bonus.unsqueeze(1))
    column = torch.arange(table.shape[1], device=table.device)
    return table.masked_fill_(column > accepted.unsqueeze(1), -1)


def assemble(
    batch: VerifyInput, accepted: Tensor, drawn: Tensor, extra_acceptance: Tensor | None = None
) -> Verification:
    """Accepted draft tokens, the drawn token, then -1s: `[R, K+1]`."""
    table = batch.draft_token_ids.new_full((len(accepted), batch.max_num_draft + 1), -1)
    table[batch.request_of, batch.index_in_draft] = batch.draft_token_ids
    column = torch.arange(table.shape[1], device=table.device)
    table = torch.where(column < accepted.unsqueeze(1), table, table.new_full((), -1))
    table.scatter_(1, accepted.unsqueeze(1), drawn.unsqueeze(1))
    return Verification(table, accepted, extra_acceptance)
