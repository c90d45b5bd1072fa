"""The one compiled call per step of `ngram_adaptive`: index what is new, then draft.

Nearly all of its time is waiting for memory, as each request's tables have left the cache
since its last turn. So requests go through each phase one after the other, and each phase
first asks for what the next one will read.
"""

from __future__ import annotations

import numba
import numpy as np

from . import acceptance_estimate as estimate
from . import suffix_index
from . import trigram_weights as trigram
from .compiled import address_as_pointer, compiled, place, prefetch, spread
from .suffix_index import MAX_DEPTH, NO_TOKEN, NODE_BYTES, ROOT

#: What is known of one request between steps.
REQUEST_STATE = np.dtype(
    [
        ("num_tokens", np.int64),  # indexed so far
        ("num_nodes", np.int64),
        ("path_length", np.int64),
        ("path", np.int32, (MAX_DEPTH + 2,)),  # nodes of the last context, shortest first
        ("weights", np.float32, (estimate.NUM_FEATURES,)),  # of its acceptance estimate
    ]
)
#: One request of one step: what is asked, and where its draft stands.
WORK = np.dtype(
    [
        ("slot", np.int64),
        ("row", np.int64),  # in the engine's token table
        ("num_tokens", np.int64),
        ("max_draft", np.int64),
        ("drafted", np.int64),
        ("drafting", np.int64),  # 0 when its draft is complete
        ("node", np.int64),  # of the context matched
        ("length", np.int64),  # of the context matched
        ("followed", np.int64),  # how often something followed it
        ("before", np.int64),  # last token but one of text and draft
        ("last", np.int64),  # last token of text and draft
        ("expected", np.float64),  # acceptance of the whole draft
    ]
)

#: Tokens compared to see that a request still has the text it had.
_COMPARED = 16


@compiled
def same_text(tokens, index, num_tokens):
    """Whether `tokens` still begins with the indexed text, by its end and one other token.

    The other one differs from step to step. `finish` is what tells us for sure.
    """
    for back in range(1, min(_COMPARED, num_tokens) + 1):
        if tokens[num_tokens - back] != index.tokens[MAX_DEPTH + num_tokens - back]:
            return False
    sample = place(spread(num_tokens, 0), num_tokens)
    return tokens[sample] == index.tokens[MAX_DEPTH + sample]


@compiled
def describe(index, trigrams, node, length, followed, before, last, features):
    """Fill the features of the winner after a context. Returns the winner."""
    winner = index.nodes[node]
    share = np.float32(-1)
    if length >= 2:
        share = trigram.share(trigrams, before, last, winner.best_token)
    estimate.describe(features, length, winner.best_count, followed, share)
    return winner.best_token


@compiled
def extend(state, index, trigrams, tokens, num_tokens, max_match, rate, features):
    """Index the tokens from `state.num_tokens` to `num_tokens`, learning from each."""
    path = state.path
    for position in range(state.num_tokens, num_tokens):
        token = tokens[position]
        before = index.tokens[MAX_DEPTH + position - 2]
        last = index.tokens[MAX_DEPTH + position - 1]
        known, length, context = ROOT, 0, ROOT
        if position > 0:
            context = path[state.path_length - 1]
            node, followed = suffix_index.longest_repeated(index, context, max_match)
            if node != ROOT:
                length = min(index.nodes[node].depth, max_match)
                predicted = describe(
                    index, trigrams, node, length, followed, before, last, features
                )
                if rate > 0:
                    estimate.learn(state.weights, features, predicted == token, rate)
                if predicted == token:
                    known = suffix_index.extended(index, node, length + 1)
        state.num_nodes, state.path_length = suffix_index.append(
            index, position, state.num_nodes, token, max_match, known, length + 1, path
        )
        if position > 0:
            suffix_index.vote(index, context, token, max_match, path, state.path_length)
        if position > 1:
            trigram.reinforce(trigrams, before, last, token)
    state.num_tokens = num_tokens


@compiled
def draft_token(task, state, index, trigrams, max_match, min_match, threshold, features):
    """Take the winner after the text and the draft so far, and find its own winner's context.

    Returns:
        The token, or NO_TOKEN where the draft ends.
    """
    nodes = index.nodes
    if task.node == ROOT or task.length < min_match:
        return NO_TOKEN
    winner = nodes[task.node]
    token = winner.best_token
    if task.expected * estimate.bound(
        state.weights, task.length, winner.best_count, task.followed, features
    ) < threshold:
        return NO_TOKEN
    describe(
        index, trigrams, task.node, task.length, task.followed, task.before, task.last, features
    )
    task.expected *= estimate.probability(state.weights, features)
    if task.expected < threshold:
        return NO_TOKEN
    task.before, task.last = task.last, token
    length = min(task.length + 1, max_match)
    node = suffix_index.extended(index, task.node, length)
    task.node, task.followed = suffix_index.longest_followed(
        index, node, max_match, state.path, state.path_length
    )
    task.length = min(length, nodes[task.node].depth)
    return token


@numba.njit(nogil=True, error_model="numpy")
def step(
    work,
    history_address,
    history_stride,
    states,
    index_addresses,
    index_capacities,
    trigram_addresses,
    trigram_capacities,
    max_match,
    min_match,
    threshold,
    rate,
    drafts,
):
    """Bring every request's index up to date and draft for it.

    Args:
        work: `[R]` WORK, its first four fields filled.
        history_address: Address of the engine's token table, int32 rows.
        history_stride: Bytes from one row to the next.
        states: `[slots]` REQUEST_STATE.
        index_addresses: `[slots]` int64, see `RequestMemory`.
        index_capacities: `[slots]` int64.
        trigram_addresses: `[slots]` int64.
        trigram_capacities: `[slots]` int64.
        max_match: Longest context matched, in tokens.
        min_match: Shortest context to draft from, in tokens.
        threshold: Least expected acceptance of a drafted token, with all before it.
        rate: Learning rate of the acceptance estimate; 0 keeps the prior.
        drafts: `[R, K]` int32, filled with -1.
    """
    features = np.empty(estimate.NUM_FEATURES, dtype=np.float32)
    for request in range(len(work)):
        task = work[request]
        task.drafting = 0
        if task.max_draft <= 0:
            continue
        slot, num_tokens = task.slot, task.num_tokens
        state = states[slot]
        index = suffix_index.index_at(index_addresses[slot], index_capacities[slot])
        trigrams = trigram.weights_at(trigram_addresses[slot], trigram_capacities[slot])
        row = numba.carray(
            address_as_pointer(history_address + task.row * history_stride),
            (num_tokens,),
            np.int32,
        )
        known = state.num_tokens
        if known == 0 or known > num_tokens or not same_text(row, index, known):
            state.num_nodes = suffix_index.clear(index)
            trigram.clear(trigrams)
            state.num_tokens = state.path_length = 0
            state.weights[:] = estimate.PRIOR
        extend(state, index, trigrams, row, num_tokens, max_match, rate, features)
        task.node, task.followed = suffix_index.longest_repeated(
            index, state.path[state.path_length - 1], max_match
        )
        task.length = min(index.nodes[task.node].depth, max_match)
        task.before = index.tokens[MAX_DEPTH + num_tokens - 2]
        task.last = index.tokens[MAX_DEPTH + num_tokens - 1]
        task.expected, task.drafting, task.drafted = 1.0, 1, 0
    for column in range(drafts.shape[1]):
        for request in range(len(work)):
            task = work[request]
            if task.drafting == 0:
                continue
            slot = task.slot
            index = suffix_index.index_at(index_addresses[slot], index_capacities[slot])
            trigrams = trigram.weights_at(trigram_addresses[slot], trigram_capacities[slot])
            token = draft_token(
                task, states[slot], index, trigrams, max_match, min_match, threshold, features
            )
            if token == NO_TOKEN:
                task.drafting = 0
                continue
            drafts[request, column] = token
            task.drafted += 1
            if task.drafted >= task.max_draft:
                task.drafting = 0
                continue


@numba.njit(nogil=True, error_model="numpy")
def move(states, slot, index_from, index_to, trigrams_from, trigrams_to):
    """Move one request to larger, zeroed memory. Each place is (address, capacity)."""
    state = states[slot]
    suffix_index.move(
        suffix_index.index_at(index_from[0], index_from[1]),
        suffix_index.index_at(index_to[0], index_to[1]),
        state.num_tokens,
        state.num_nodes,
    )
    trigram.move(
        trigram.weights_at(trigrams_from[0], trigrams_from[1]),
        trigram.weights_at(trigrams_to[0], trigrams_to[1]),
    )
