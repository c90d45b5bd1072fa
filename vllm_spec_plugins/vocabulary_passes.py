"""Passes over whole `[rows, V]` tensors, the only expensive part of verification.

On the CPU they run over blocks of rows that stay in cache: a fresh `[N, V]` temporary
costs more in page faults than the arithmetic done on it. Each row is reduced on its own,
so its result does not depend on which rows share the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .row_choice import may_look, replace_rows

#: Elements of a block: half a megabyte of float32. A block and the scratch it is worked on
#: in share the second-level cache of a core.
_BLOCK_ELEMENTS = 1 << 17
#: Columns of a row that take longer than the call that works on them.
_WIDE = 2048
#: A probability below this may have lost digits.
_FEW_DIGITS = 1e-30
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


def possible(logits: Tensor, token_ids: Tensor) -> Tensor:
    """`[rows]` bool, whether one token per row is one (-1: none) and its logit is above -inf."""
    if is_numpy(logits):  # whose small operations take a fraction of torch's
        ids, table = token_ids.numpy(), logits.detach().numpy()
        return torch.from_numpy((ids >= 0) & (table[np.arange(len(ids)), ids] > -np.inf))
    own = logits.gather(1, token_ids.clamp(min=0).unsqueeze(1)).squeeze(1)
    return (token_ids >= 0) & (own > -torch.inf)


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
    column = token_ids.unsqueeze(1)
    if is_compiled(logits):
        probability = probability_of(logits, token_ids)
        entropy = torch.empty_like(probability)
        kernels().entropies_up_to(
            logits.detach().numpy(), token_ids.numpy(), probability.numpy(), up_to, entropy.numpy()
        )
        return probability, entropy.clamp_(min=0)
    probability, mean = logits.new_empty(len(logits)), logits.new_zeros(len(logits))
    law = logits.new_empty(0)
    for block in row_blocks(len(logits), logits):
        torch.softmax(logits[block], dim=-1, out=law.resize_(0))
        probability[block] = law.gather(1, column[block]).squeeze(1)
        mean[block] = torch.linalg.vecdot(law, logits[block])
    # -sum p log p = log Z - sum p l, with log Z = l - log p at any token.
    entropy = logits.gather(1, column).squeeze(1) - probability.log() - mean
    # 0 times -inf; or a probability so small that it may have lost digits.
    asked = ~(probability > up_to)
    entropy = replace_rows(
        entropy,
        asked & (mean.isnan() | (probability < _FEW_DIGITS)),
        lambda rest: entropy_of_rows(logits, rest, log_normaliser(logits.index_select(0, rest))),
    )
    return probability, torch.where(asked, entropy.clamp_(min=0), 0)


def log_normaliser_from(
    logits: Tensor, rows: Tensor, token_ids: Tensor, probability: Tensor
) -> Tensor:
    """`[M]` log sum exp of some rows, from the probability of a token of each where it can be.

    Args:
        logits: `[rows, V]`.
        rows: `[M]` int64.
        token_ids: `[M]` int64.
        probability: `[M]` softmax of the row at that token; 0 where it is not known.
    """
    result = logits[rows, token_ids] - probability.log()
    return replace_rows(
        result,
        ~(probability >= _FEW_DIGITS),
        lambda unknown: log_normaliser_of_rows(logits, rows[unknown]),
    )


def log_normaliser_of_rows(logits: Tensor, rows: Tensor, largest: Tensor | None = None) -> Tensor:
    """`[M]` log sum exp of some rows; `largest`: their largest logits, where they are known."""
    if not is_compiled(logits):
        return log_normaliser(logits.index_select(0, rows))
    if largest is None:
        largest = largest_of_rows(logits, rows)
    sums = torch.empty_like(largest)
    kernels().exponential_sums(logits.detach().numpy(), rows.numpy(), largest.numpy(), sums.numpy())
    return sums.log_().add_(largest)


def entropy_of_rows(logits: Tensor, rows: Tensor, log_normaliser: Tensor) -> Tensor:
    """`[M]` entropy of the softmax of some rows, in nats, given their normalisers, `[M]`."""
    result = torch.zeros_like(log_normaliser)
    if is_compiled(logits):
        kernels().entropies(
            logits.detach().numpy(), rows.numpy(), log_normaliser.numpy(), result.numpy()
        )
        return result.clamp_(min=0)
    for block in row_blocks(len(rows), logits):
        log_law = logits.index_select(0, rows[block]) - log_normaliser[block].unsqueeze(1)
        log_law.clamp_(min=torch.finfo(logits.dtype).min)
        result[block] = -torch.linalg.vecdot(log_law.exp(), log_law)
    return result.clamp_(min=0)


def divergence_of_rows(logits: Tensor, law: Tensor, rows: Tensor, log_normaliser: Tensor) -> Tensor:
    """`[M]` KL of the softmax of some rows to the same rows of a law; infinite where it misses one.

    Args:
        logits: `[rows, V]`.
        law: `[rows, V]`.
        rows: `[M]` int64.
        log_normaliser: `[M]` of those rows.
    """
    result = torch.empty_like(log_normaliser)
    if is_compiled(logits) and is_compiled(law):
        kernels().divergences(
            logits.detach().numpy(), law.detach().numpy(), rows.numpy(), log_normaliser.numpy(),
            result.numpy(),
        )  # fmt: skip
        return result
    for block in row_blocks(len(rows), logits):
        here = rows[block]
        log_p = logits.index_select(0, here) - log_normaliser[block].unsqueeze(1)
        p, q = log_p.exp(), law.index_select(0, here).to(log_p.dtype)
        # 0 times infinity is 0, in rows where p or q is 0 somewhere.
        log_p.clamp_(min=torch.finfo(p.dtype).min)
        result[block] = torch.linalg.vecdot(p, log_p) - torch.special.xlogy(p, q).sum(dim=-1)
    return result


def near_laws(
    logits: Tensor,
    law: Tensor,
    token_ids: Tensor,
    probability: Tensor,
    draft_probability: Tensor,
    bound: float,
) -> Tensor:
    """`[rows]` bool: tokens the draft finds likelier, in rows where the KL to its law is small.

    Args:
        logits: `[rows, V]`, for which `is_compiled`.
        law: `[rows, V]`, the same.
        token_ids: `[rows]` int64; -1: none, and not near.
        probability: `[rows]` softmax at that token.
        draft_probability: `[rows]` the law at that token; 1 where it was chosen, and is not near.
        bound: Largest KL of softmax to law, in nats.
    """
    near = torch.empty_like(token_ids, dtype=torch.bool)
    kernels().near_laws(
        logits.detach().numpy(), law.detach().numpy(), token_ids.numpy(), probability.numpy(),
        draft_probability.numpy(), bound, near.numpy(),
    )  # fmt: skip
    return near


def undecided_rows(
    logits: Tensor,
    token_ids: Tensor,
    probability: Tensor,
    among: Tensor,
    count: int,
    least: float,
) -> Tensor:
    """`[rows]` bool: the `count` largest of a softmax, as they are, have at least so much entropy.

    Args:
        logits: `[rows, V]`, for which `is_compiled`.
        token_ids: `[rows]` int64.
        probability: `[rows]` softmax at that token.
        among: `[rows]` bool, those that are asked about; False of others.
        count: At most V.
        least: In nats.
    """
    undecided = torch.empty_like(among)
    kernels().undecided_rows(
        logits.detach().numpy(), token_ids.numpy(), probability.numpy(), among.numpy(), count,
        least, undecided.numpy(),
    )  # fmt: skip
    return undecided


def scores_at_least(
    states: Tensor,
    rows: Tensor | None,
    lengths: Tensor,
    token_ids: Tensor,
    counts: Tensor,
    weight: Tensor,
    bias: float,
    least: float,
) -> Tensor:
    """`[M]` bool: a linear score of some rows, `state @ weight + bias`, reaches a bar.

    A row's score does not depend on which others are asked for.

    Args:
        states: `[N, H]`, for which `is_single`.
        rows: `[M]` int64, rising, some of the N. None: all.
        lengths: `[R]` int64, how many of the N each request has. Of some rows, those behind one of
            the same request that does not reach the bar are not looked at: False.
        token_ids: `[N]` int64; -1: none, and False.
        counts: `[V]` bool, tokens that count; False for others.
        weight: `[H]` float32.
        bias: Added.
        least: The bar.
    """
    if rows is None:
        rows, lengths = torch.arange(len(states)), lengths[:0]
    stands = torch.empty_like(rows, dtype=torch.bool)
    kernels().scores_at_least(
        states.detach().numpy(), rows.numpy(), lengths.numpy(), token_ids.numpy(), counts.numpy(),
        weight.numpy(), np.float32(bias), np.float32(least), stands.numpy(),
    )  # fmt: skip
    return stands


def largest_of_rows(logits: Tensor, rows: Tensor) -> Tensor:
    """`[M]` the largest logit of some rows; on the CPU none of them is copied."""
    if not rows_apart(logits):
        return logits.index_select(0, rows).amax(dim=-1)
    table = logits.detach().numpy()
    result = np.empty(len(rows), dtype=table.dtype)
    for place, row in enumerate(rows.tolist()):
        result[place] = table[row].max()
    return torch.from_numpy(result)


def marks_above(logits: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """`[M, V]` 1 for logits of some rows above one value each, `[M]`, and 0 for others."""
    if not is_compiled(logits):
        return logits.index_select(0, rows).gt_(values.unsqueeze(1))
    marks = logits.new_empty(len(rows), logits.shape[1])
    kernels().marks_above(logits.detach().numpy(), rows.numpy(), values.numpy(), marks.numpy())
    return marks


def count_above(logits: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """`[M]` int64, how many logits of some rows are above one value each, `[M]`. As above."""
    if not is_compiled(logits):
        return (logits.index_select(0, rows) > values.unsqueeze(1)).sum(dim=-1)
    counts = torch.empty_like(rows)
    kernels().counts_above(logits.detach().numpy(), rows.numpy(), values.numpy(), counts.numpy())
    return counts


def largest_entries(logits: Tensor, rows: Tensor, count: int) -> Tensor:
    """`[M, count]` the largest logits of some rows, falling."""
    if not is_compiled(logits):
        return top_entries(logits.index_select(0, rows), count)[0]
    best = logits.new_empty(len(rows), count)
    kernels().largest_entries(logits.detach().numpy(), rows.numpy(), best.numpy())
    return best


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


def closest_columns(
    values: Tensor,
    rows: Tensor,
    own: Tensor,
    among: tuple[int, int],
    counts: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Columns of some rows whose values are nearest to one column's; -1: none.

    Args:
        values: `[rows, V]`.
        rows: `[M]` int64.
        own: `[M]` int64, the column of each of those rows, one of `among`.
        among: First of the columns that count, and the one after the last.
        counts: a, how many whose values are not below its own, itself left out; and b, how many
            whose values are, -inf left out. At least 1 and 0.

    Returns:
        `[M, a]` and `[M, b]` int64.
    """
    (first, end), (num_above, num_below) = among, counts
    if is_compiled(values):
        above = rows.new_empty(len(rows), num_above)
        below = rows.new_empty(len(rows), max(num_below, 1))
        kernels().closest_columns(
            values.detach().numpy(), rows.numpy(), own.numpy(), first, end,
            above.numpy(), below.numpy(),
        )  # fmt: skip
        return above, below[:, :num_below]
    column, closeness = (own - first).unsqueeze(1), values[:, first:end].index_select(0, rows)
    # 1 / (y - x) is largest just above x and smallest just below it; equals of x are infinite,
    # -inf is 0. Masks over the vocabulary would cost several times as much.
    here = closeness.gather(1, column)
    closeness.sub_(here).reciprocal_().scatter_(1, column, 0)
    above, above_columns = top_entries(closeness, min(num_above, end - first))
    below, below_columns = top_entries(closeness, min(num_below, end - first), largest=False)
    return (
        torch.where(above > 0, above_columns + first, -1),
        torch.where(below < 0, below_columns + first, -1),
    )


def drawn_columns(weights: Tensor, u: Tensor) -> Tensor:
    """`[rows]` int64 columns drawn from weights for which `is_compiled`; `draw_next` has the rest.

    Args:
        weights: `[rows, V]` non-negative, not normalised, each row with a positive sum.
        u: `[rows]` float64 in (0, 1).
    """
    columns = torch.empty(len(weights), dtype=torch.int64)
    # Contiguous: for others the kernel would be compiled anew.
    kernels().drawn_columns(weights.detach().numpy(), u.contiguous().numpy(), columns.numpy())
    return columns


def first_argmax(logits: Tensor) -> Tensor:
    """`[rows]` int64 column of each row's largest value, the first of equals.

    numpy's is several times faster than torch's on the CPU and breaks ties alike.
    """
    if not is_numpy(logits):
        return logits.argmax(dim=-1)
    if not len(logits):
        return logits.new_zeros(0, dtype=torch.int64)
    return torch.from_numpy(logits.detach().numpy().argmax(axis=1))


def argmax_and_maxima(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`first_argmax` of rows that are `is_single`, and the largest of each span of columns.

    Returns:
        `[rows]` int64, and `[rows, spans]` float32; `compiled_rows.MAXIMUM_OF` columns are a span.
    """
    rows, width = logits.shape
    ids = torch.empty(rows, dtype=torch.int64)
    maxima = torch.empty(rows, -(-width // kernels().MAXIMUM_OF))
    kernels().argmax_and_maxima(logits.detach().numpy(), ids.numpy(), maxima.numpy())
    return ids, maxima


def rows_apart(tensor: Tensor) -> bool:
    """Whether rows of `[rows, V]` are best worked on one by one: wide ones, on the CPU."""
    return is_numpy(tensor) and tensor.shape[1] >= _WIDE


def is_compiled(tensor: Tensor) -> bool:
    """Whether `compiled_rows` takes it: wide rows of float32 on the CPU."""
    return rows_apart(tensor) and is_single(tensor)


def is_single(tensor: Tensor) -> bool:
    """Whether it is contiguous float32 on the CPU."""
    return may_look(tensor) and tensor.dtype == torch.float32 and tensor.is_contiguous()


@cache
def kernels() -> ModuleType:
    """`compiled_rows`; numba is not loaded before it is needed."""
    from . import compiled_rows

    return compiled_rows


def is_numpy(tensor: Tensor) -> bool:
    """Whether numpy can work on it where it is."""
    return may_look(tensor) and tensor.dtype in (torch.float32, torch.float64)
