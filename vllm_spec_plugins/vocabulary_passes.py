"""Passes over whole `[rows, V]` tensors, the only expensive part of verification.

On the CPU they run over blocks of rows that stay in cache: a fresh `[N, V]` temporary
costs more in page faults than the arithmetic done on it. Each row is reduced on its own,
so its result does not depend on which rows share the batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Elements of a block: half a megabyte of float32. A block and the scratch it is worked on
#: in share the second-level cache of a core.
_BLOCK_ELEMENTS = 1 << 17


def row_blocks(rows: int, like: Tensor) -> Iterator[slice]:
    """Slices that cover `rows` rows as wide as `like`'s: cache-sized on the CPU, else one."""
    step = max(rows, 1)
    if like.device.type == "cpu":
        step = max(1, _BLOCK_ELEMENTS // max(like.shape[1], 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def log_normaliser(logits: Tensor) -> Tensor:
    """`[rows]` log sum exp of each row of `[rows, V]`; -inf logits allowed."""
    result = logits.new_empty(len(logits))
    for block in row_blocks(len(logits), logits):
        result[block] = torch.logsumexp(logits[block], dim=-1)
    return result


def probability_of(logits: Tensor, token_ids: Tensor) -> Tensor:
    """`[rows]` softmax of `[rows, V]` logits at one token per row, `[rows]` int64."""
    result = logits.new_empty(len(logits))
    # Reused by every block: memory fresh from the system costs as much as the arithmetic.
    scratch = logits.new_empty(0)
    for block in row_blocks(len(logits), logits):
        law = torch.softmax(logits[block], dim=-1, out=scratch.resize_(0))
        result[block] = law.gather(1, token_ids[block].unsqueeze(1)).squeeze(1)
    return result


def entropy(logits: Tensor, rows: Tensor) -> Tensor:
    """`[M]` entropy, in nats, of the softmax of some rows of `[rows, V]` logits; -inf allowed."""
    result = logits.new_empty(len(rows))
    lowest = torch.finfo(logits.dtype).min / 2
    law, product = logits.new_empty(0), logits.new_empty(0)
    for block in row_blocks(len(rows), logits):
        chosen = logits.index_select(0, rows[block])
        torch.softmax(chosen, dim=-1, out=law.resize_(0))
        best, where = chosen.max(dim=-1)
        # -sum p log p = log Z - sum p l, and log Z = l - log p at the best token.
        log_normaliser = best - law.gather(1, where.unsqueeze(1)).squeeze(1).log()
        torch.mul(law, chosen.clamp_(min=lowest), out=product.resize_(0))
        result[block] = log_normaliser - product.sum(dim=-1)
    return result.clamp_(min=0)


def first_argmax(logits: Tensor) -> Tensor:
    """`[rows]` int64 column of each row's largest value, the first of equals.

    numpy's is several times faster than torch's on the CPU and breaks ties alike.
    """
    if logits.device.type != "cpu" or logits.dtype not in (torch.float32, torch.float64):
        return logits.argmax(dim=-1)
    if not len(logits):
        return logits.new_zeros(0, dtype=torch.int64)
    return torch.from_numpy(logits.detach().numpy().argmax(axis=1))
