"""What relaxed rules ask of single rows of float32 logits on the CPU, in one compiled pass each.

torch needs a call, and memory for a result as wide as the vocabulary, for each step of such a
sum; between passes that flush the caches a call takes as long as a thousand entries. These need
one call for all rows and no memory. Called by `vocabulary_passes`, which has the same for other
devices and number types.
"""

from __future__ import annotations

import numba
import numpy as np

from .compiled_arithmetic import (
    LEAST,
    LEAST_LOG,
    ONE,
    ZERO,
    compiled,
    exp,
    log,
    sum_of_exponentials,
)

#: Columns looked at together, to see whether any of them matters.
_SPAN = 32
#: A probability below this may have lost digits.
FEW_DIGITS = 1e-30
#: Columns summed at once where one is drawn: their sums vectorise, a running sum does not.
_SUM_OF = 128
#: Columns whose largest logit is kept, by `argmax_and_maxima`.
MAXIMUM_OF = 128
#: Their bits; those of what is no number are above.
_INFINITY, _MINUS_INFINITY = np.int32(0x7F800000), np.uint32(0xFF800000)


@numba.njit(inline="always")
def _largest(signed, unsigned, start, end):
    """Bits of the largest of some float32 numbers, and whether they are all numbers.

    Compared as integers, which vectorises where a comparison of numbers that may be none does not.
    """
    most, least, highest = np.int32(-(2**31)), np.uint32(2**32 - 1), np.uint32(0)
    for column in range(start, end):
        most = max(most, signed[column])
        least = min(least, unsigned[column])
        highest = max(highest, unsigned[column])
    # Of numbers below 0 the largest has the smallest bits.
    largest = most if most >= 0 else np.int32(least)
    return largest, most <= _INFINITY and highest <= _MINUS_INFINITY


@compiled
def argmax_and_maxima(logits, ids, maxima):
    """Column of each row's largest value, as numpy finds it, and the largest of each span.

    Args:
        logits: `[rows, V]`.
        ids: `[rows]`. Filled.
        maxima: `[rows, ceil(V / MAXIMUM_OF)]`. Filled.
    """
    signed, unsigned, bits = logits.view(np.int32), logits.view(np.uint32), maxima.view(np.int32)
    width = logits.shape[1]
    whole = width // MAXIMUM_OF
    for i in range(len(logits)):
        row, largest, numbers = logits[i], maxima[i], True
        for span in range(whole):
            start = span * MAXIMUM_OF
            bits[i, span], good = _largest(signed[i], unsigned[i], start, start + MAXIMUM_OF)
            numbers &= good
        if whole < len(largest):
            bits[i, whole], good = _largest(signed[i], unsigned[i], whole * MAXIMUM_OF, width)
            numbers &= good
        best = 0
        for span in range(1, len(largest)):
            if largest[span] > largest[best]:
                best = span
        ids[i] = 0
        for column in range(best * MAXIMUM_OF if numbers else 0, width):
            value = row[column]
            if value != value or (numbers and value == largest[best]):
                ids[i] = column
                break


@compiled
def drawn_columns(weights, u, columns):
    """Inverse transform sampling: the first column whose running sum is above u of the total.

    Args:
        weights: `[rows, V]`, none negative, each row with a positive sum.
        u: `[rows]` float64 in (0, 1).
        columns: `[rows]`. Filled; never with a column of weight 0.
    """
    width = weights.shape[1]
    whole = width // _SUM_OF
    sums = np.empty(whole + 1)
    for i in range(len(weights)):
        row = weights[i]
        for span in range(whole):
            of_span = 0.0
            for column in range(span * _SUM_OF, span * _SUM_OF + _SUM_OF):
                of_span += row[column]
            sums[span] = of_span
        rest = 0.0
        for column in range(whole * _SUM_OF, width):
            rest += row[column]
        sums[whole] = rest
        left, chosen = u[i] * sums.sum(), -1
        for span in range(whole + 1):
            if sums[span] > 0:
                chosen = span
                if left < sums[span]:
                    break
                left -= sums[span]
        # Where the weights are no numbers, any.
        columns[i] = width - 1
        if chosen < 0:
            continue
        start = chosen * _SUM_OF
        for column in range(start, min(start + _SUM_OF, width)):
            # Rounding may leave more than there is: the last one stands.
            if row[column] > 0:
                columns[i] = column
                if left < row[column]:
                    break
                left -= row[column]


@compiled
def exponential_sums(logits, rows, shifts, sums):
    """Sum of exp(l - shift) of some rows; no logit is above its row's shift."""
    for i in range(len(rows)):
        sums[i] = sum_of_exponentials(logits[rows[i]], shifts[i])


@numba.njit(inline="always")
def _log_normaliser(row, token, probability):
    """log sum exp of a row, from the softmax at one token if that has its digits."""
    if probability >= FEW_DIGITS:
        return row[token] - np.log(probability)
    largest = row.max()
    return largest + np.log(sum_of_exponentials(row, largest))


@numba.njit(inline="always")
def _entropy(row, log_normaliser):
    total = ZERO
    for column in range(row.shape[0]):
        log_p = max(row[column] - log_normaliser, LEAST_LOG)
        total -= exp(log_p) * log_p
    return total


@numba.njit(inline="always")
def _divergence(row, law, log_normaliser):
    total = missed = ZERO
    for column in range(row.shape[0]):
        log_p = max(row[column] - log_normaliser, LEAST_LOG)
        p = exp(log_p)
        total += p * (log_p - log(max(law[column], LEAST)))
        missed += ZERO if law[column] > ZERO or log_p <= LEAST_LOG else p
    return np.inf if missed > ZERO else total


@compiled
def entropies(logits, rows, log_normalisers, result):
    """Entropy of some rows' softmax, in nats."""
    for i in range(len(rows)):
        result[i] = _entropy(logits[rows[i]], log_normalisers[i])


@compiled
def entropies_up_to(logits, token_ids, probability, up_to, result):
    """The same of rows in which one token's probability is not above a bar; 0 of others.

    Args:
        logits: `[rows, V]`.
        token_ids: `[rows]`.
        probability: `[rows]` softmax at that token.
        up_to: The bar.
        result: `[rows]`. Filled.
    """
    for i in range(len(logits)):
        result[i] = ZERO
        if not probability[i] > up_to:  # what is no number is looked at
            row = logits[i]
            result[i] = _entropy(row, _log_normaliser(row, token_ids[i], probability[i]))


@compiled
def divergences(logits, law, rows, log_normalisers, result):
    """KL of some rows' softmax to the same rows of a law; infinite where that misses a token."""
    for i in range(len(rows)):
        result[i] = _divergence(logits[rows[i]], law[rows[i]], log_normalisers[i])


@compiled
def near_laws(logits, law, token_ids, probability, draft_probability, bound, near):
    """`near_draft_tokens` of `kl_judge`: tokens the draft finds likelier, where KL is small.

    Args:
        logits: `[rows, V]`.
        law: `[rows, V]` the draft's.
        token_ids: `[rows]`; -1 where there is no token, which the draft finds no likelier.
        probability: `[rows]` softmax at that token.
        draft_probability: `[rows]` the law at that token; 1 where it was chosen.
        bound: Largest KL of what is near, in nats.
        near: `[rows]` bool. Filled.
    """
    for i in range(len(logits)):
        row, token = logits[i], token_ids[i]
        p, q = np.float64(probability[i]), np.float64(draft_probability[i])
        near[i] = False
        if not p < q or not row[token] > -np.inf:
            continue
        # KL between "it is x" under p and under q: at most that of the laws. Infinite for q = 1.
        binary = (1 - p) * np.log((1 - p) / (1 - q))
        if p > 0:
            binary += p * np.log(p / q)
        if binary <= bound:
            log_normaliser = _log_normaliser(row, token, probability[i])
            near[i] = _divergence(row, law[i], log_normaliser) <= bound


@compiled
def marks_above(logits, rows, values, result):
    """1 for logits of some rows above one value each, 0 for others: `[M, V]`."""
    for i in range(len(rows)):
        row, value, marks = logits[rows[i]], values[i], result[i]
        for column in range(row.shape[0]):
            marks[column] = ONE if row[column] > value else ZERO


@compiled
def counts_above(logits, rows, values, counts):
    """How many logits of some rows are above one value each."""
    for i in range(len(rows)):
        row, value, count = logits[rows[i]], values[i], np.int32(0)
        for column in range(row.shape[0]):
            count += np.int32(row[column] > value)
        counts[i] = count


@numba.njit(inline="always")
def _keep_largest(row, kept):
    """Fill `kept` with the largest numbers of a row, falling."""
    last = len(kept) - 1
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


@compiled
def largest_entries(logits, rows, best):
    """The largest logits of some rows, falling: as many as `best`, `[M, k]`, is wide."""
    for i in range(len(rows)):
        _keep_largest(logits[rows[i]], best[i])


@numba.njit(inline="always")
def _entropy_term(p):
    return -p * np.log(p) if p > ZERO else ZERO


@compiled
def undecided_rows(logits, token_ids, probability, among, count, least, undecided):
    """Whether the `count` largest of a softmax, as they are, have at least so much entropy.

    Args:
        logits: `[rows, V]`.
        token_ids: `[rows]`.
        probability: `[rows]` softmax at that token.
        among: `[rows]` bool, those that are asked about; False of others.
        count: Of numbers.
        least: The bar, in nats.
        undecided: `[rows]` bool. Filled.
    """
    kept, others = np.empty(count, np.float32), count - 1
    for i in range(len(logits)):
        p = np.float64(probability[i])
        undecided[i] = False
        if not among[i]:
            continue
        if p > 0.5:  # surely among the largest: most entropy if the others share what is left
            share = min((1 - p) / max(others, 1), np.exp(-1.0))
            if _entropy_term(p) + others * _entropy_term(share) + 1e-5 < least:
                continue
        row = logits[i]
        _keep_largest(row, kept)
        log_normaliser, entropy = _log_normaliser(row, token_ids[i], probability[i]), ZERO
        for value in kept:
            entropy += _entropy_term(np.exp(value - log_normaliser))
        undecided[i] = entropy >= least


@compiled
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


@compiled
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
            if law[first + code] > ZERO:
                gap, cluster = row[first + code], cluster_of[code]
                left[cluster] += gap
                up[cluster] += max(gap, ZERO)
        for cluster in range(num_clusters):
            left[cluster] = max(left[cluster], ZERO) / max(up[cluster], LEAST)
        for column in range(row.shape[0]):
            row[column] = max(row[column], ZERO)
        for code in range(len(cluster_of)):
            row[first + code] *= left[cluster_of[code]]


@compiled
def scores_at_least(states, rows, lengths, token_ids, counts, weight, bias, least, stands):
    """Whether a linear score of some rows reaches a bar, of tokens that count.

    A row's score does not depend on which others are asked for.

    Args:
        states: `[N, H]`.
        rows: `[M]`, rising.
        lengths: `[R]` rows of each request, in which those behind one that does not reach the bar
            are not looked at and do not either; empty: all are looked at.
        token_ids: `[N]`; -1: no token.
        counts: `[V]` bool.
        weight: `[H]`.
        bias: Number.
        least: The bar.
        stands: `[M]` bool. Filled.
    """
    end, request, goes_on = 0, -1, True
    for i in range(len(rows)):
        state, token, score = states[rows[i]], token_ids[rows[i]], bias
        while len(lengths) and rows[i] >= end:
            request += 1
            end += lengths[request]
            goes_on = True
        stands[i] = goes_on and token >= 0 and counts[token]
        if stands[i]:
            for column in range(len(weight)):
                score += state[column] * weight[column]
            stands[i] = score >= least
        goes_on = stands[i] or not len(lengths)
