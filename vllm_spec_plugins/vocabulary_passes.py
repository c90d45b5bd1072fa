"""Passes over whole `[rows, V]` tensors, the only expensive part of verification.

On the CPU they run over blocks of rows that stay in cache: a fresh `[N, V]` temporary
costs more in page faults than the arithmetic done on it. Each row is reduced on its own,
so its result does not depend on which rows share the batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

#: Elements of a block: half a megabyte of float32. A block and the scratch it is worked on
#: in share the second-level cache of a core.
_BLOCK_ELEMENTS = 1 << 17
#: Columns of a row that take longer than the call that works on them.
_WIDE = 2048
#: Columns of which only the best is looked at first, where a few of many are wanted.
_SPAN = 128


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


def probability_and_entropy(
    logits: Tensor, token_ids: Tensor, up_to: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Both for little more than `probability_of` alone.

    Args:
        logits: `[rows, V]`; -inf allowed, but not throughout a row.
        token_ids: `[rows]` int64.
        up_to: Entropies of rows whose token is likelier are not asked for.

    Returns:
        `[rows]` softmax at one token per row, and `[rows]` entropy of the softmax, in nats; 0
        where it is not asked for.
    """
    probability, mean = logits.new_empty(len(logits)), logits.new_zeros(len(logits))
    law, column = logits.new_empty(0), token_ids.unsqueeze(1)
    for block in row_blocks(len(logits), logits):
        torch.softmax(logits[block], dim=-1, out=law.resize_(0))
        of_token = law.gather(1, column[block]).squeeze(1)
        probability[block] = of_token
        if up_to >= 1 or not rows_apart(logits):
            mean[block] = row_products(law, logits[block])
            continue
        for row, p in enumerate(of_token.tolist()):
            if not p > up_to:  # what is no number is looked at
                at = slice(block.start + row, block.start + row + 1)
                mean[at] = row_products(law[row : row + 1], logits[at])
    # -sum p log p = log Z - sum p l, with log Z = l - log p at any token.
    entropy = logits.gather(1, column).squeeze(1) - probability.log() - mean
    # 0 times -inf; or a probability so small that it may have lost digits.
    asked = ~(probability > up_to)
    rest = (asked & (mean.isnan() | (probability < 1e-30))).nonzero().squeeze(1)
    for block in row_blocks(len(rest), logits):
        log_law = torch.log_softmax(logits.index_select(0, rest[block]), dim=-1)
        log_law.clamp_(min=torch.finfo(logits.dtype).min)
        entropy[rest[block]] = -row_products(log_law.exp(), log_law)
    return probability, torch.where(asked, entropy.clamp_(min=0), 0)


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """`[rows]` inner product of each row of two `[rows, V]` tensors, without a third.

    numpy's takes half the time of torch's on the CPU.
    """
    if not rows_apart(a) or not len(a):
        return torch.linalg.vecdot(a, b)
    pairs = zip(a.detach().numpy(), b.detach().numpy(), strict=True)
    with np.errstate(invalid="ignore"):  # 0 times infinity is for the caller to see
        return a.new_tensor([np.dot(x, y) for x, y in pairs])


def largest_of_rows(logits: Tensor, rows: Tensor) -> Tensor:
    """`[M]` the largest logit of some rows; on the CPU none of them is copied."""
    if not rows_apart(logits):
        return logits.index_select(0, rows).amax(dim=-1)
    table = logits.detach().numpy()
    return logits.new_tensor([table[row].max() for row in rows.tolist()])


def count_above(logits: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """`[M]` int64, how many logits of some rows are above one value each, `[M]`. As above."""
    if not rows_apart(logits):
        return (logits.index_select(0, rows) > values.unsqueeze(1)).sum(dim=-1)
    table = logits.detach().numpy()
    pairs = zip(rows.tolist(), values.detach().numpy(), strict=True)
    return rows.new_tensor([np.count_nonzero(table[row] > value) for row, value in pairs])


def top_entries(values: Tensor, count: int, *, largest: bool = True) -> tuple[Tensor, Tensor]:
    """`[rows, count]` values and columns, as `Tensor.topk` finds them; of equals any.

    On the CPU it looks only into the spans of columns with the best single entries, which hold
    all that is looked for: several times faster over a vocabulary.
    """
    rows, width = values.shape
    whole = width // _SPAN * _SPAN
    if values.device.type != "cpu" or count * _SPAN * 4 > whole:
        found = values.topk(count, dim=1, largest=largest)
        return found.values, found.indices
    spans = values[:, :whole].unflatten(1, (-1, _SPAN))
    best = spans.amax(dim=2) if largest else spans.amin(dim=2)
    chosen = best.topk(count, dim=1, largest=largest).indices.unsqueeze(2)
    columns = (chosen * _SPAN + torch.arange(_SPAN)).flatten(1)
    rest = torch.arange(whole, width).expand(rows, -1)
    columns = torch.cat([columns, rest], dim=1)
    found = values.gather(1, columns).topk(count, dim=1, largest=largest)
    return found.values, columns.gather(1, found.indices)


def first_argmax(logits: Tensor) -> Tensor:
    """`[rows]` int64 column of each row's largest value, the first of equals.

    numpy's is several times faster than torch's on the CPU and breaks ties alike.
    """
    if not _is_numpy(logits):
        return logits.argmax(dim=-1)
    if not len(logits):
        return logits.new_zeros(0, dtype=torch.int64)
    return torch.from_numpy(logits.detach().numpy().argmax(axis=1))


def rows_apart(tensor: Tensor) -> bool:
    """Whether rows of `[rows, V]` are best worked on one by one: wide ones, on the CPU."""
    return _is_numpy(tensor) and tensor.shape[1] >= _WIDE


def _is_numpy(tensor: Tensor) -> bool:
    """Whether numpy can work on it where it is."""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)
