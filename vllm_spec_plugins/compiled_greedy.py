"""Greedy steps on the CPU, compiled: what relaxed rules say of mismatches, and the tokens out.

A mismatch is a draft token that is not the target's most likely one. Passes over the vocabulary
are what takes time, and the pass that finds the most likely tokens leaves the largest logit of
each span of columns (`compiled_rows.argmax_and_maxima`). From those follows nearly always what a
rule asks: logits above some value are in few spans, and the sum of exponentials lies between
bounds. A whole row is read again only where the bounds leave it open.

Decisions take `Mismatches` and fill `[M]` bools; behind a refusal nothing more of that request is
looked at, and all is refused. What is no number is refused. Called by `greedy_on_host`.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from .compiled_arithmetic import LEAST_LOG, ONE, ZERO, compiled, exp, sum_of_exponentials
from .compiled_rows import MAXIMUM_OF

#: Spans whose largest logit is so far below the row's (in nats) are bounded, not summed.
_FAR = np.float32(4)
_ONE_OVER_E = np.float32(1 / np.e)
#: By how much more than rounding bounds are put apart.
_ROUNDING = np.float32(1e-4)


class Mismatches(NamedTuple):
    """Rows of greedy requests that a rule is asked about, and the whole step's.

    Attributes:
        rows: `[M]` int64, rising, of the N.
        lengths: `[R]` int64, draft tokens of each request.
        drafted: `[N]` int64, the draft tokens; those asked about have finite logits.
        likeliest: `[N]` int64, the target's most likely tokens.
        logits: `[N, V]` float32.
        maxima: `[N, spans]` float32, the largest logit of each `MAXIMUM_OF` columns.
    """

    rows: NDArray[np.int64]
    lengths: NDArray[np.int64]
    drafted: NDArray[np.int64]
    likeliest: NDArray[np.int64]
    logits: NDArray[np.float32]
    maxima: NDArray[np.float32]


@compiled
def find_mismatches(step, exact, agreeing, rows):
    """Mismatches that a rule may let pass, up to the first of each request that none may.

    None passes that is a placeholder, is excluded by the sampling options, or has a request that
    is verified exactly.

    Args:
        step: `Mismatches`; its rows are not read.
        exact: `[R]` bool, requests verified exactly; empty: none.
        agreeing: How many draft tokens after a mismatch must be the most likely ones.
        rows: `[N]` int64. Filled from its beginning.

    Returns:
        How many there are.
    """
    count = end = 0
    width = step.logits.shape[1]
    for request in range(len(step.lengths)):
        start, end = end, end + step.lengths[request]
        if len(exact) and exact[request]:
            continue
        for row in range(start, end):
            token, best = step.drafted[row], step.likeliest[row]
            if token == best:
                continue
            passes = 0 <= token < width and row + agreeing < end
            # Comparisons with what is no number are false.
            passes = passes and step.logits[row, token] > -np.inf
            passes = passes and step.logits[row, best] > -np.inf
            for after in range(row + 1, row + 1 + agreeing):
                passes = passes and step.drafted[after] == step.likeliest[after]
            if not passes:
                break
            rows[count] = row
            count += 1
    return count


@compiled
def lay_out(step, stands, bonus, token_ids, accepted, extra):
    """What a verification returns: see `verifier.Verification`.

    Args:
        step: `Mismatches`.
        stands: `[M]` bool, mismatches that pass; those that are not among `rows` do not.
        bonus: `[R]` int64, the most likely token after each draft.
        token_ids: `[R, K+1]` int64. Filled.
        accepted: `[R]` int64. Filled.
        extra: `[N]` float32. Filled.
    """
    end = asked = 0
    extra[:] = 0
    token_ids[:] = -1
    for request in range(len(step.lengths)):
        start, end = end, end + step.lengths[request]
        while asked < len(step.rows) and step.rows[asked] < start:
            asked += 1
        last = start
        while last < end:
            if step.drafted[last] != step.likeliest[last]:
                if asked == len(step.rows) or step.rows[asked] != last or not stands[asked]:
                    break
                asked += 1
                extra[last] = 1
            token_ids[request, last - start] = step.drafted[last]
            last += 1
        accepted[request] = last - start
        token_ids[request, last - start] = bonus[request] if last == end else step.likeliest[last]


@numba.njit(inline="always")
def _same_request(row, end, lengths, request):
    """The request of a row, after that of the row before, and its end."""
    while row >= end:
        request += 1
        end += lengths[request]
    return request, end


@numba.njit(inline="always")
def _least_sum(maxima, shift):
    """Least that the sum of exp(l - shift) of a row can be: that of its largest logits."""
    return sum_of_exponentials(maxima, shift) * (ONE - _ROUNDING)


@numba.njit(inline="always")
def _sum_bounds(row, maxima, shift):
    """The same, nearer, and the most that it can be: spans of large logits are summed."""
    least = most = ZERO
    for span in range(len(maxima)):
        distance = maxima[span] - shift
        least += ZERO if distance > -_FAR else exp(max(distance, LEAST_LOG))
    most = least * MAXIMUM_OF
    for span in range(len(maxima)):
        if maxima[span] - shift > -_FAR:
            start = span * MAXIMUM_OF
            near = sum_of_exponentials(row[start : start + MAXIMUM_OF], shift)
            least += near
            most += near
    return least * (ONE - _ROUNDING), most * (ONE + _ROUNDING)


@numba.njit(inline="always")
def _fewer_above(row, maxima, value, limit):
    """Whether fewer than `limit` logits are above a value."""
    count = 0
    for span in range(len(maxima)):
        if maxima[span] > value:
            start = span * MAXIMUM_OF
            for logit in row[start : start + MAXIMUM_OF]:
                count += logit > value
            if count >= limit:
                return False
    return count < limit


@compiled
def likely_enough(asked, least_log_probability, stands):
    """log p(x) >= a bar."""
    end, request, goes_on = 0, -1, True
    for i in range(len(asked.rows)):
        row = asked.rows[i]
        if row >= end:
            request, end = _same_request(row, end, asked.lengths, request)
            goes_on = True
        stands[i] = False
        if not goes_on:
            continue
        logits = asked.logits[row]
        own, best = logits[asked.drafted[row]], logits[asked.likeliest[row]]
        # The most that the sum may be, in units of the most likely token.
        room = np.exp(own - best - least_log_probability)
        if room >= _least_sum(asked.maxima[row], best):
            least, most = _sum_bounds(logits, asked.maxima[row], best)
            stands[i] = room >= most
            if least <= room < most:
                total = sum_of_exponentials(logits, best)
                stands[i] = own >= np.log(total) + best + least_log_probability
        goes_on = stands[i]


@compiled
def among_the_best(asked, k, delta, stands):
    """Fewer than k tokens are likelier than x, and none by more than delta."""
    end, request, goes_on = 0, -1, True
    for i in range(len(asked.rows)):
        row = asked.rows[i]
        if row >= end:
            request, end = _same_request(row, end, asked.lengths, request)
            goes_on = True
        stands[i] = False
        if not goes_on:
            continue
        logits, maxima = asked.logits[row], asked.maxima[row]
        own, best = logits[asked.drafted[row]], logits[asked.likeliest[row]]
        ratio = np.exp(own - best)
        # In units of the most likely token.
        near = ONE - ratio <= delta * _least_sum(maxima, best)
        if not near:
            least, most = _sum_bounds(logits, maxima, best)
            near = ONE - ratio <= delta * least
            if not near and ONE - ratio <= delta * most:
                total = np.log(sum_of_exponentials(logits, best))
                near = np.exp(best - (total + best)) * (ONE - ratio) <= delta
        stands[i] = near and _fewer_above(logits, maxima, own, k)
        goes_on = stands[i]


@numba.njit(inline="always")
def _entropy_term(p):
    return -p * np.log(p) if p > ZERO else ZERO


@numba.njit(inline="always")
def _entropy_bounds(kept, least, most):
    """Least and most entropy of some logits, given those of the sum in units of the first."""
    low = high = ZERO
    for logit in kept:
        share = np.exp(logit - kept[0])
        one, other = _entropy_term(share / most), _entropy_term(share / least)
        low += min(one, other)
        # The term rises up to p = 1/e, where it is as much.
        inside = share / most < _ONE_OVER_E < share / least
        high += _ONE_OVER_E if inside else max(one, other)
    return low, high


@compiled
def undecided(asked, count, least_entropy, stands):
    """The entropy of the `count` likeliest tokens, as they are, is at least so much."""
    end, request, goes_on = 0, -1, True
    kept = np.empty(count, np.float32)
    for i in range(len(asked.rows)):
        row = asked.rows[i]
        if row >= end:
            request, end = _same_request(row, end, asked.lengths, request)
            goes_on = True
        stands[i] = False
        if not goes_on:
            continue
        logits, maxima = asked.logits[row], asked.maxima[row]
        kept[:] = -np.inf
        for span in range(len(maxima)):
            if maxima[span] > kept[count - 1]:
                start = span * MAXIMUM_OF
                for logit in logits[start : start + MAXIMUM_OF]:
                    if logit > kept[count - 1]:
                        place = count - 1
                        while place > 0 and kept[place - 1] < logit:
                            kept[place] = kept[place - 1]
                            place -= 1
                        kept[place] = logit
        least, most = _sum_bounds(logits, maxima, kept[0])
        low, high = _entropy_bounds(kept, least, most)
        stands[i] = low >= least_entropy + _ROUNDING
        if not stands[i] and high >= least_entropy - _ROUNDING:
            total = sum_of_exponentials(logits, kept[0])
            stands[i] = _entropy_bounds(kept, total, total)[0] >= least_entropy
        goes_on = stands[i]


@numba.njit(inline="always")
def _borrows_enough(row, neighbours, best, own, budget):
    """Whether a token and what it borrows within a budget have the most; in units of the best."""
    borrowed = ZERO
    for token in neighbours:
        if token >= 0:
            borrowed += np.exp(row[token] - best)
            if borrowed > budget:
                return False
            if own + borrowed >= ONE:
                return True
    return False


@compiled
def wins_with_neighbours(asked, neighbours, first, budget, factor, stands):
    """An image code and what it borrows have the most (`verifiers/neighbour_mass.py`).

    Args:
        asked: `Mismatches`.
        neighbours: `[C, k]` int token ids by rising distance; -1: none.
        first: Token id of code 0.
        budget: Most probability borrowed; negative: (factor - 1) times its own.
        factor: See `budget`.
        stands: `[M]` bool. Filled.
    """
    end, request, goes_on = 0, -1, True
    for i in range(len(asked.rows)):
        row = asked.rows[i]
        if row >= end:
            request, end = _same_request(row, end, asked.lengths, request)
            goes_on = True
        stands[i] = False
        code = asked.drafted[row] - first
        if not goes_on or not 0 <= code < len(neighbours):
            goes_on = False
            continue
        logits = asked.logits[row]
        best = logits[asked.likeliest[row]]
        own = np.exp(logits[asked.drafted[row]] - best)
        if own >= ONE:  # equals: the most likely token is the first of them
            stands[i] = True
        elif budget < 0:
            stands[i] = _borrows_enough(logits, neighbours[code], best, own, (factor - ONE) * own)
        else:
            # Budgets grow with the sum, and what may be borrowed with them.
            near, maxima = neighbours[code], asked.maxima[row]
            least = budget * _least_sum(maxima, best)
            stands[i] = own + least >= ONE and _borrows_enough(logits, near, best, own, least)
            if not stands[i]:
                most = budget * _sum_bounds(logits, maxima, best)[1]
                could = own + most >= ONE and _borrows_enough(logits, near, best, own, most)
                if could:
                    total = budget * sum_of_exponentials(logits, best)
                    stands[i] = _borrows_enough(logits, near, best, own, total)
        goes_on = stands[i]


@compiled
def of_one_cluster(asked, cluster_of, first, stands):
    """An image code is in the cluster of the most likely token.

    Args:
        asked: `Mismatches`.
        cluster_of: `[C]` int64, cluster of each code.
        first: Token id of code 0.
        stands: `[M]` bool. Filled.
    """
    for i in range(len(asked.rows)):
        row, codes = asked.rows[i], len(cluster_of)
        own, best = asked.drafted[row] - first, asked.likeliest[row] - first
        inside = 0 <= own < codes and 0 <= best < codes
        stands[i] = inside and cluster_of[own] == cluster_of[best]
