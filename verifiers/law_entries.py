"""Entries of target and draft laws: a few without a pass over the vocabulary, or all."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_spec_plugins.verifier import VerifyInput


def target_entries(batch: VerifyInput, rows: Tensor, columns: Tensor) -> Tensor:
    """`[M, k]` p of some tokens of some rows.

    Args:
        batch: The step.
        rows: `[M]` int64, some of the N rows, none of a placeholder.
        columns: `[M, k]` int64 token ids.
    """
    shift = batch.target_log_normaliser_at(rows).unsqueeze(1)
    return torch.exp(batch.target_logits[rows.unsqueeze(1), columns] - shift)


def draft_entries(batch: VerifyInput, rows: Tensor, columns: Tensor) -> Tensor:
    """`[M, k]` q of some tokens of some rows; one-hot where nothing was drawn. As above."""
    one_hot = columns == batch.draft_token_ids[rows].unsqueeze(1)
    law = batch.draft_probabilities
    if law is None:
        return one_hot.to(batch.target_logits.dtype)
    if law.vocabulary is not None:
        dense = law.dense(rows, batch.draft_token_ids[rows], batch.target_logits.shape[1])
        return dense.gather(1, columns).to(batch.target_logits.dtype)
    known = columns < law.values.shape[1]  # a draft head may lack the target's padding rows
    q = law.values[rows.unsqueeze(1), torch.where(known, columns, 0)] * known
    if law.sampled is not None:
        q = torch.where(law.sampled[rows].unsqueeze(1), q, one_hot.to(q.dtype))
    return q.to(batch.target_logits.dtype)


def draft_laws(batch: VerifyInput, rows: Tensor) -> Tensor:
    """`[M, V]` q of some rows; one-hot where nothing was drawn, all 0 at placeholders."""
    ids = batch.draft_token_ids[rows]
    if batch.draft_probabilities is not None:
        q = batch.draft_probabilities.dense(rows, ids, batch.target_logits.shape[1])
        return q.to(batch.target_logits.dtype)
    q = batch.target_logits.new_zeros(len(rows), batch.target_logits.shape[1])
    chosen = (ids >= 0).to(q.dtype).unsqueeze(1)
    return q.scatter_(1, ids.clamp(min=0).unsqueeze(1), chosen)
