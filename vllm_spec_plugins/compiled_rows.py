"""What relaxed rules ask of single rows of float32 logits on the CPU, in one compiled pass each.

torch needs a call, and memory for a result as wide as the vocabulary, for each step of such a
sum; between passes that flush the caches a call takes as long as a thousand entries. These need
one call for all rows and no memory. numba compiles each on its first use and keeps the machine
code on disk where it may. Called by `vocabulary_passes`, which has the same for other devices and
number types.

No fast-math flag that assumes finite numbers: logits are -inf where sampling options exclude a
token. Sums may be reordered, so that they vectorise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

#: Columns looked at together, to see whether any of them matters.
_SPAN = 32
#: exp of less is no normal float32; it counts as 0.
_LEAST_LOG = np.float32(-87.0)
_LEAST = np.float32(1.1754944e-38)
_LOG2_E = np.float32(1.44269504)
_LOG_2 = np.float32(0.69314718)
_HALF = np.float32(0.5)
_ONE = np.float32(1)
_ZERO = np.float32(0)
_FLAGS = {"reassoc", "contract", "nsz", "arcp"}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": _FLAGS}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to keep it in
        return numba.njit(**options)(function)


@numba.njit(inline="always")
def _exp(x):
    """exp of a float32 not above 0 but by rounding, to 3e-7 of it: a power of 2 and a series.

    numba calls the C library otherwise, for one number at a time.
    """
    n = np.int32(x * _LOG2_E - _HALF)
    r = x - np.float32(n) * _LOG_2
    y = np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + _HALF
    y = y * r * r + r + _ONE
    return y * np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)


@numba.njit(inline="always")
def _log(x):
    """log of a normal float32 above 0, to 1e-7: the exponent, and a series of the rest (Cephes)."""
    bits = np.int32(np.float32(x).view(np.int32) - np.int32(0x3F3504F3))
    exponent = np.int32(bits >> np.int32(23))
    rest = np.int32((bits & np.int32(0x007FFFFF)) + np.int32(0x3F3504F3)).view(np.float32) - _ONE
    y = np.float32(7.0376836292e-2)
    y = y * rest + np.float32(-1.1514610310e-1)
    y = y * rest + np.float32(1.1676998740e-1)
    y = y * rest + np.float32(-1.2420140846e-1)
    y = y * rest + np.float32(1.4249322787e-1)
    y = y * rest + np.float32(-1.6668057665e-1)
    y = y * rest + np.float32(2.0000714765e-1)
    y = y * rest + np.float32(-2.4999993993e-1)
    y = y * rest + np.float32(3.3333331174e-1)
    square = rest * rest
    return rest - _HALF * square + rest * square * y + np.float32(exponent) * _LOG_2


@_compiled
def exponential_sums(logits, rows, shifts, sums):
    """Sum of exp(l - shift) of some rows; no logit is above its row's shift."""
    for i in range(len(rows)):
        row, shift, total = logits[rows[i]], shifts[i], _ZERO
        for column in range(row.shape[0]):
            total += _exp(max(row[column] - shift, _LEAST_LOG))
        sums[i] = total


@_compiled
def entropies(logits, rows, log_normalisers, result):
    """Entropy of some rows' softmax, in nats."""
    for i in range(len(rows)):
        row, shift, total = logits[rows[i]], log_normalisers[i], _ZERO
        for column in range(row.shape[0]):
            log_p = max(row[column] - shift, _LEAST_LOG)
            total -= _exp(log_p) * log_p
        result[i] = total


@_compiled
def divergences(logits, law, rows, log_normalisers, result):
    """KL of some rows' softmax to the same rows of a law; infinite where that misses a token."""
    for i in range(len(rows)):
        row, q, shift = logits[rows[i]], law[rows[i]], log_normalisers[i]
        total = missed = _ZERO
        for column in range(row.shape[0]):
            log_p = max(row[column] - shift, _LEAST_LOG)
            p = _exp(log_p)
            total += p * (log_p - _log(max(q[column], _LEAST)))
            missed += _ZERO if q[column] > _ZERO or log_p <= _LEAST_LOG else p
        result[i] = np.inf if missed > _ZERO else total


@_compiled
def counts_above(logits, rows, values, counts):
    """How many logits of some rows are above one value each."""
    for i in range(len(rows)):
        row, value, count = logits[rows[i]], values[i], np.int32(0)
        for column in range(row.shape[0]):
            count += np.int32(row[column] > value)
        counts[i] = count


@_compiled
def largest_entries(logits, rows, best):
    """The largest logits of some rows, falling: as many as `best`, `[M, k]`, is wide."""
    last = best.shape[1] - 1
    for i in range(len(rows)):
        row, kept = logits[rows[i]], best[i]
        kept[:] = -np.inf
        for start in range(0, row.shape[0], _SPAN):
            span, bar, hits = row[start : start + _SPAN], kept[last], np.int32(0)
            for column in range(span.shape[0]):
                hits += np.int32(span[column] > bar)
            if hits == 0:
                continue
            for value in span:
                if value > kept[last]:
                    place = last
                    while place > 0 and kept[place - 1] < value:
                        kept[place] = kept[place - 1]
                        place -= 1
                    kept[place] = value


@_compiled
def closest_columns(values, rows, own, first, end, above, below):
    """Columns of some rows whose values are nearest to one column's, nearest first; -1: none.

    Args:
        values: `[rows, V]`.
        rows: `[M]`.
        own: `[M]` columns.
        first: Of the columns that count.
        end: The one after the last of them.
        above: `[M, a]`, those not below it, itself left out; a at least 1. Filled.
        below: `[M, b]`, those below it, -inf left out; b at least 1. Filled.
    """
    last_above, last_below = above.shape[1] - 1, below.shape[1] - 1
    higher = np.empty(last_above + 1, np.float32)
    lower = np.empty(last_below + 1, np.float32)
    for i in range(len(rows)):
        row = values[rows[i]][first:end]
        mine = own[i] - first
        here = row[mine]
        higher[:], lower[:] = np.inf, -np.inf
        above[i, :], below[i, :] = -1, -1
        for start in range(0, row.shape[0], _SPAN):
            span, hits = row[start : start + _SPAN], np.int32(0)
            top, bottom = higher[last_above], lower[last_below]
            for column in range(span.shape[0]):
                value = span[column] if span[column] < top else bottom
                hits += np.int32(value > bottom)
            if hits == 0:
                continue
            for column in range(span.shape[0]):
                value = span[column]
                if not bottom < value < top:
                    continue
                if value < here and value > lower[last_below]:
                    place = last_below
                    while place > 0 and lower[place - 1] < value:
                        lower[place], below[i, place] = lower[place - 1], below[i, place - 1]
                        place -= 1
                    lower[place], below[i, place] = value, first + start + column
                elif value >= here and value < higher[last_above] and start + column != mine:
                    place = last_above
                    while place > 0 and higher[place - 1] > value:
                        higher[place], above[i, place] = higher[place - 1], above[i, place - 1]
                        place -= 1
                    higher[place], above[i, place] = value, first + start + column


@_compiled
def keep_share_of_clusters(weights, p, first, cluster_of, num_clusters):
    """`[p - q]+` with each cluster's share: r of `code_clusters`, in place of p - q.

    Args:
        weights: `[M, V]` p - q; becomes r.
        p: `[M, V]`.
        first: Column of code 0.
        cluster_of: `[C]` int64, cluster of each code.
        num_clusters: How many there are.
    """
    up = np.empty(num_clusters, np.float32)
    left = np.empty(num_clusters, np.float32)
    for i in range(len(weights)):
        row, law = weights[i], p[i]
        up[:], left[:] = 0, 0
        for code in range(len(cluster_of)):
            if law[first + code] > _ZERO:
                gap, cluster = row[first + code], cluster_of[code]
                left[cluster] += gap
                up[cluster] += max(gap, _ZERO)
        for cluster in range(num_clusters):
            left[cluster] = max(left[cluster], _ZERO) / max(up[cluster], _LEAST)
        for column in range(row.shape[0]):
            row[column] = max(row[column], _ZERO)
        for code in range(len(cluster_of)):
            row[first + code] *= left[cluster_of[code]]
