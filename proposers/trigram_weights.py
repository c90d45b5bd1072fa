"""Trigram weights learnt online from accepted text, after ADED (Liu et al. 2407.12021).

A weight belongs to (a, b) -> c: two tokens and the one that followed. ADED adds 0.04, up to a
cap of 3, at every draft call to each trigram among the last 16 tokens, so a trigram is
reinforced once per call while it is in the window, and the weights depend on how the text
happened to be split into steps. Here each accepted token adds one full reinforcement
(14 windows x 0.04 = 0.56) once, and the successors of (a, b) fade by a constant factor: the
same text gives the same weights, recent text counts more, and no weight exceeds
`REINFORCEMENT / FADING` = 2.8.

ADED's public code scores a path with the *previous* token of each pair, which looks like an
off-by-one. Here the weight of a step belongs to the new token: scoring `x y z` after `a b`
uses (a,b)->x, (b,x)->y, (x,y)->z.
"""

from __future__ import annotations

from collections import namedtuple

import numba
import numpy as np

from .compiled import address_as_pointer, compiled, entry_point, place, spread

REINFORCEMENT = np.float32(14 * 0.04)
#: Share of its weight a successor loses each time the two tokens occur again.
FADING = np.float32(0.2)
#: What is left of a weight after so many times; the last is as good as nothing.
_FADED = ((1 - FADING) ** np.arange(128, dtype=np.float32)).astype(np.float32)

CONTEXT = np.dtype(
    [
        ("first", np.int32),
        ("second", np.int32),
        ("seen", np.int32),  # times followed; 0: empty
        ("total", np.float32),  # weight of all successors
    ]
)
TRIGRAM = np.dtype(
    [
        ("context", np.int32),  # place of its first two tokens
        ("third", np.int32),
        ("seen", np.int32),  # `seen` of its context at its last reinforcement; 0: empty
        ("weight", np.float32),  # as of then
    ]
)

#: Two open-addressing tables, at most two thirds full.
TrigramWeights = namedtuple("TrigramWeights", "contexts trigrams")

ENTRY_BYTES = CONTEXT.itemsize
assert TRIGRAM.itemsize == ENTRY_BYTES


@compiled
def table_size(capacity):
    """Entries in each of the two tables."""
    return capacity + capacity // 2


def bytes_needed(capacity: int) -> int:
    """Bytes of the weights of a text of up to `capacity` tokens: 48 per token."""
    return 2 * ENTRY_BYTES * table_size(capacity)


@compiled
def weights_at(address, capacity):
    """The weights in the memory at `address`; `clear` them before first use."""
    size = table_size(capacity)
    return TrigramWeights(
        numba.carray(address_as_pointer(address), (size,), CONTEXT),
        numba.carray(address_as_pointer(address + ENTRY_BYTES * size), (size,), TRIGRAM),
    )


@compiled
def clear(weights):
    """Forget everything."""
    for entry in range(len(weights.contexts)):
        weights.contexts[entry].seen = 0
        weights.trigrams[entry].seen = 0


@compiled
def context_entry(weights, first, second):
    """Where (first, second) is, or the empty place where it belongs (`seen` is 0)."""
    contexts = weights.contexts
    entry = place(spread(first, second), len(contexts))
    while contexts[entry].seen != 0 and (
        contexts[entry].first != first or contexts[entry].second != second
    ):
        entry += 1
        if entry == len(contexts):
            entry = 0
    return entry


@compiled
def trigram_entry(weights, context, third):
    """Where the trigram is, or the empty place where it belongs (`seen` is 0)."""
    trigrams = weights.trigrams
    entry = place(spread(context, third), len(trigrams))
    while trigrams[entry].seen != 0 and (
        trigrams[entry].context != context or trigrams[entry].third != third
    ):
        entry += 1
        if entry == len(trigrams):
            entry = 0
    return entry


@compiled
def move(old, new):
    """Copy weights into larger memory."""
    clear(new)
    for entry in range(len(old.trigrams)):
        trigram = old.trigrams[entry]
        if trigram.seen != 0:
            context = old.contexts[trigram.context]
            to = context_entry(new, context.first, context.second)
            new.contexts[to] = context
            copy = new.trigrams[trigram_entry(new, to, trigram.third)]
            copy.context, copy.third = to, trigram.third
            copy.seen, copy.weight = trigram.seen, trigram.weight


@compiled
def _faded(weight, times):
    return weight * _FADED[min(times, len(_FADED) - 1)]


@compiled
def reinforce(weights, first, second, third):
    """Learn that `third` followed `first second`."""
    entry = context_entry(weights, first, second)
    context = weights.contexts[entry]
    if context.seen == 0:
        context.first, context.second, context.total = first, second, 0
    context.seen += 1
    context.total = _faded(context.total, 1) + REINFORCEMENT
    trigram = weights.trigrams[trigram_entry(weights, entry, third)]
    if trigram.seen == 0:
        trigram.context, trigram.third, trigram.weight = entry, third, 0
    trigram.weight = _faded(trigram.weight, context.seen - trigram.seen) + REINFORCEMENT
    trigram.seen = context.seen


@compiled
def weight(weights, first, second, third):
    """The weight of (first, second) -> third now, 0 to 2.8; 0 if never seen."""
    entry = context_entry(weights, first, second)
    trigram = weights.trigrams[trigram_entry(weights, entry, third)]
    if weights.contexts[entry].seen == 0 or trigram.seen == 0:
        return np.float32(0)
    return _faded(trigram.weight, weights.contexts[entry].seen - trigram.seen)


@compiled
def share(weights, first, second, third):
    """The weight among all successors of `first second`, 0 to 1; -1 if they have none."""
    context = weights.contexts[context_entry(weights, first, second)]
    if context.seen == 0:
        return np.float32(-1)
    return weight(weights, first, second, third) / context.total


@entry_point
def shares(address, capacity, trigrams, out):
    """Score many trigrams of one request in one call.

    Args:
        address: Of the request's weights.
        capacity: Tokens they have room for.
        trigrams: `[N, 3]` int32 token ids: two tokens and the one whose share is wanted.
        out: `[N]` float32, written: 0 to 1, 0 for what was never seen.
    """
    weights = weights_at(address, capacity)
    for row in range(len(trigrams)):
        found = share(weights, trigrams[row, 0], trigrams[row, 1], trigrams[row, 2])
        out[row] = max(found, np.float32(0))
