"""LANTERN's and LANTERN++'s idea: a code may stand for codes that look like it.

The nearest codes z1, z2, ... of a draft token x lend it their probability, in that order, as
long as what they lend together stays within a budget: p~(x) = p(x) + p(z1) + ... + p(zJ).
The budget is a number (LANTERN, Jang et al. 2410.03355) or (factor - 1) p(x) (LANTERN++,
2502.06352). It limits what one draft token borrows, not how far the output's law moves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_spec_plugins.residual import or_target_law
from vllm_spec_plugins.verifier import VerifyInput

from .law_entries import draft_laws, target_entries


def borrowed_mass(
    batch: VerifyInput,
    rows: Tensor,
    neighbours: Tensor,
    budget: Tensor,
) -> Tensor:
    """`[M]` p(z1) + ... + p(zJ), the longest sum within the budget; 0 where none is.

    Args:
        batch: The step.
        rows: `[M]` int64, some of the N rows.
        neighbours: `[M, k]` int64 token ids by rising distance; -1: none.
        budget: `[M]` most that may be borrowed.
    """
    lent = target_entries(batch, rows, neighbours.clamp(min=0))  # [M, k]
    sums = lent.masked_fill_(neighbours < 0, 0).cumsum(dim=1)
    # Sums only rise: those within the budget are the first ones, and the last of them is the
    # largest.
    sums.masked_fill_(sums > budget.unsqueeze(1), 0)
    return sums.amax(dim=1) if sums.shape[1] else torch.zeros_like(budget)


def published_residual(
    batch: VerifyInput, rows: Tensor, neighbours: Tensor, borrowed: Tensor
) -> Tensor:
    """`[M, V]` weights after a rejection as LANTERN's code has them.

    The draft's law loses its neighbours where x borrowed anything: norm([p - q']+) with q' = q
    except 0 at every neighbour looked at. After a deterministic draft, p without x and them.

    Args:
        batch: The step.
        rows: `[M]` int64, some of the N rows.
        neighbours: `[M, k]` int64 token ids, as given to `borrowed_mass`; -1: none.
        borrowed: `[M]` what it returned.
    """
    left = torch.softmax(batch.target_logits.index_select(0, rows), dim=-1)
    ids = batch.draft_token_ids[rows]
    used = (neighbours >= 0) & (borrowed > 0).unsqueeze(1)
    q, law = draft_laws(batch, rows), batch.draft_probabilities
    deterministic = torch.full_like(ids, law is None, dtype=torch.bool)
    if law is not None and law.sampled is not None:
        deterministic = ~law.sampled[rows]
    # At neighbours: nothing is subtracted after a draw, everything (p <= 1) after a choice.
    values = deterministic.to(q.dtype).unsqueeze(1).expand_as(neighbours)
    # Unused entries go to a column of their own.
    columns = torch.where(used, neighbours, neighbours.new_full((), q.shape[1]))
    q = torch.nn.functional.pad(q, (0, 1)).scatter_(1, columns, values)[:, :-1]
    left = (left - q).clamp_(min=0)
    return or_target_law(batch, rows, left)
