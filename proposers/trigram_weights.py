"""Trigram weights learnt online from accepted text, after ADED (Liu et al. 2407.12021).

A weight belongs to (a, b) -> c: two tokens and the one that followed. ADED adds 0.04, up to a
cap of 3, at every draft call to each trigram among the last 16 tokens, so a trigram is
reinforced once per call while it is in the window, and the weights depend on how the text
happened to be split into steps. Here each accepted token adds one full reinforcement
(14 windows x 0.04 = 0.56) once, and the other successors of (a, b) fade by a constant
factor: the same text gives the same weights, recent text counts more, and no weight exceeds
`REINFORCEMENT / FADING` = 2.8.

ADED's public code scores a path with the *previous* token of each pair, which looks like an
off-by-one. Here the weight of a step belongs to the new token: scoring `x y z` after `a b`
adds up (a,b)->x, (b,x)->y, (x,y)->z.
"""

from __future__ import annotations

from collections import namedtuple
from typing import TYPE_CHECKING

import numba
import numpy as np

from .compiled import address_as_pointer, compiled

if TYPE_CHECKING:
    pass

REINFORCEMENT = np.float32(14 * 0.04)
#: Share of its weight a successor loses when another one follows the same two tokens.
FADING = np.float32(0.2)

CONTEXT = np.dtype(
    [
        ("first", np.int32),
        ("second", np.int32),
        ("seen", np.int32),  # times followed; 0: empty
        ("best_token", np.int32),
        ("best_position", np.int32),
        ("best_weight", np.float32),  # as of its own last reinforcement
        ("best_seen", np.int32),  # `seen` then
        ("total", np.float32),  # of all successors
    ]
)
TRIGRAM = np.dtype(
    [
        ("first", np.int32),
        ("second", np.int32),
        ("third", np.int32),
        ("weight", np.float32),  # as of its last reinforcement; 0: empty
        ("seen", np.int32),  # `seen` of its context then
    ]
)

#: Both are open-addressing tables, at most half full.
TrigramWeights = namedtuple("TrigramWeights", "contexts trigrams")

BYTES_PER_TOKEN = 2 * CONTEXT.itemsize + 2 * TRIGRAM.itemsize


def bytes_needed(capacity: int) -> int:
    """Bytes of the weights of a text of up to `capacity` tokens: 104 per token."""
    return BYTES_PER_TOKEN * capacity


@compiled
def weights_at(address, capacity):
    """The weights that live at `address`; memory that is all zero holds none."""
    contexts = address
    trigrams = contexts + 32 * 2 * capacity
    return TrigramWeights(
        numba.carray(address_as_pointer(contexts), (2 * capacity,), CONTEXT),
        numba.carray(address_as_pointer(trigrams), (2 * capacity,), TRIGRAM),
    )


@compiled
def clear(weights):
    """Forget everything."""
    for entry in range(len(weights.contexts)):
        weights.contexts[entry].seen = 0
    for entry in range(len(weights.trigrams)):
        weights.trigrams[entry].seen = 0
        weights.trigrams[entry].weight = 0


@compiled
def _spread(first, second, third):
    key = (np.int64(first) << 42) ^ (np.int64(second) << 21) ^ np.int64(third)
    key *= np.int64(-7046029254386353131)  # 2^64 / golden ratio
    key ^= key >> 29
    key *= np.int64(-4658895280553007687)
    return key >> 33


@compiled
def context_entry(weights, first, second):
    """Where (first, second) is, or the empty place where it belongs (`seen` is 0)."""
    contexts = weights.contexts
    mask = len(contexts) - 1
    entry = _spread(first, second, 0) & mask
    while contexts[entry].seen != 0 and (
        contexts[entry].first != first or contexts[entry].second != second
    ):
        entry = (entry + 1) & mask
    return entry


@compiled
def _trigram_entry(weights, first, second, third):
    trigrams = weights.trigrams
    mask = len(trigrams) - 1
    entry = _spread(first, second, third + 1) & mask
    while trigrams[entry].seen != 0 and (
        trigrams[entry].first != first
        or trigrams[entry].second != second
        or trigrams[entry].third != third
    ):
        entry = (entry + 1) & mask
    return entry


@compiled
def move(old, new):
    """Copy weights into larger, zeroed memory."""
    for entry in range(len(old.contexts)):
        context = old.contexts[entry]
        if context.seen != 0:
            new.contexts[context_entry(new, context.first, context.second)] = context
    for entry in range(len(old.trigrams)):
        trigram = old.trigrams[entry]
        if trigram.seen != 0:
            place = _trigram_entry(new, trigram.first, trigram.second, trigram.third)
            new.trigrams[place] = trigram


@compiled
def _faded(weight, times):
    return weight * (np.float32(1) - FADING) ** np.float32(times)


@compiled
def reinforce(weights, first, second, third, position):
    """Learn that `third`, at `position` of the text, followed `first second`."""
    context = weights.contexts[context_entry(weights, first, second)]
    trigram = weights.trigrams[_trigram_entry(weights, first, second, third)]
    if context.seen == 0:
        context.total = context.best_weight = 0
        context.best_seen = 0
    context.first, context.second = first, second
    context.seen += 1
    context.total = _faded(context.total, 1) + REINFORCEMENT
    weight = _faded(trigram.weight, context.seen - trigram.seen) + REINFORCEMENT
    trigram.first, trigram.second, trigram.third = first, second, third
    trigram.weight, trigram.seen = weight, context.seen
    if weight >= _faded(context.best_weight, context.seen - context.best_seen):
        context.best_token, context.best_position = third, position
        context.best_weight, context.best_seen = weight, context.seen


@compiled
def share(weights, first, second, third):
    """The weight of `third` among all successors of `first second`, 0 to 1; 0 if never seen."""
    context = weights.contexts[context_entry(weights, first, second)]
    trigram = weights.trigrams[_trigram_entry(weights, first, second, third)]
    if trigram.seen == 0:
        return np.float32(0)
    return _faded(trigram.weight, context.seen - trigram.seen) / context.total
