"""The one compiled call per step of `ngram_adaptive`: index what is new, then draft."""

from __future__ import annotations

import numba
import numpy as np

from . import acceptance_estimate as estimate
from . import suffix_index, trigram_weights
from .compiled import address_as_pointer, compiled
from .suffix_index import MAX_DEPTH, ROOT

#: What is known of one request between steps.
REQUEST_STATE = np.dtype(
    [
        ("num_tokens", np.int64),  # indexed so far
        ("num_nodes", np.int64),
        ("weights", np.float32, (estimate.NUM_FEATURES,)),  # of its acceptance estimate
    ]
)
#: One request of one step.
WORK = np.dtype(
    [
        ("slot", np.int64),
        ("row", np.int64),
        ("num_tokens", np.int64),
        ("max_draft", np.int64),
    ]
)
OWN_TEXT, TRIGRAM = 0, 1

#: Tokens compared at the end of the known text, and spread over it, to see that a request
#: still has the text it had.
_COMPARED = 16


@compiled
def same_text(tokens, index, num_tokens):
    """Whether `tokens` still begins with the indexed text, by its end and a few samples."""
    for back in range(1, min(_COMPARED, num_tokens) + 1):
        if tokens[num_tokens - back] != index.tokens[MAX_DEPTH + num_tokens - back]:
            return False
    for sample in range(_COMPARED):
        position = sample * num_tokens // _COMPARED
        if tokens[position] != index.tokens[MAX_DEPTH + position]:
            return False
    return True


@compiled
def winner(index, trigrams, node, length, followed, before, last, features):
    """The token to draft after a matched context.

    Args:
        index: The request's suffix index.
        trigrams: The request's trigram weights.
        node: Node of the matched context.
        length: Tokens matched.
        followed: How often they were followed.
        before: Last token but one of the context.
        last: Last token of the context.
        features: `[6]` float32, filled for the estimate.

    Returns:
        The token, where it last stood after this context, and its source.
    """
    best = index.nodes[node]
    token, position, source = best.best_token, best.best_position, OWN_TEXT
    trigram_share = np.float32(-1)
    if length >= 2:
        if length == 2:
            # Nothing longer to go by: the trigram weights hold the same successors, with
            # the recent ones counting more.
            favourite = trigrams.contexts[trigram_weights.context_entry(trigrams, before, last)]
            if favourite.seen > 0 and favourite.best_token != token:
                token, position = favourite.best_token, favourite.best_position
                source = TRIGRAM
        trigram_share = trigram_weights.share(trigrams, before, last, token)
    estimate.describe(features, length, best.best_count, followed, trigram_share)
    return token, position, source


@compiled
def extend(state, index, trigrams, tokens, num_tokens, max_match, rate, path, features):
    """Index the tokens from `state.num_tokens` to `num_tokens`, learning from each."""
    for position in range(state.num_tokens, num_tokens):
        token = tokens[position]
        known = index.tokens[MAX_DEPTH + position - 2 : MAX_DEPTH + position]
        if position > 0 and rate > 0:
            node, followed = suffix_index.longest_repeated(index, position - 1, max_match)
            if node != ROOT:
                length = min(index.nodes[node].depth, max_match)
                predicted, _, _ = winner(
                    index, trigrams, node, length, followed, known[0], known[1], features
                )
                estimate.learn(state.weights, features, predicted == token, rate)
        state.num_nodes, length = suffix_index.append(
            index, position, state.num_nodes, token, max_match, path
        )
        if position > 0:
            suffix_index.vote(index, position, max_match, path, length)
        if position > 1:
            trigram_weights.reinforce(trigrams, known[0], known[1], token, position)
    state.num_tokens = num_tokens


@compiled
def draft(state, index, trigrams, most, max_match, min_match, threshold, path, features, out, by):
    """Draft after the whole indexed text while the path is expected to be accepted.

    Args:
        state: Of the request.
        index: Its suffix index.
        trigrams: Its trigram weights.
        most: Most tokens to draft.
        max_match: Longest context matched, in tokens.
        min_match: Shortest context to draft from, in tokens.
        threshold: Stop where the expected acceptance of the path falls below this.
        path: Scratch, `[MAX_DEPTH + 2]` int32.
        features: Scratch, `[6]` float32.
        out: `[K]` int32, the draft, written.
        by: `[K]` int8, the source of each token, written.
    """
    nodes, end = index.nodes, state.num_tokens - 1
    on_path = suffix_index.path_to(index, index.terminals[end], path)
    node, followed = suffix_index.longest_repeated(index, end, max_match)
    before, last = index.tokens[MAX_DEPTH + end - 1], index.tokens[MAX_DEPTH + end]
    length = min(nodes[node].depth, max_match)
    expected = np.float32(1)
    for step in range(most):
        if node == ROOT or length < min_match:
            return
        token, position, source = winner(
            index, trigrams, node, length, followed, before, last, features
        )
        expected *= estimate.probability(state.weights, features)
        if expected < threshold:
            return
        out[step], by[step] = token, source
        before, last = last, token
        length = min(length + 1, max_match)
        deeper = suffix_index.context_node(index, position, length)
        node, followed = suffix_index.longest_followed(index, deeper, max_match, path, on_path)
        length = min(length, nodes[node].depth)


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
    out,
    by,
):
    """Bring every request's index up to date and draft for it.

    Args:
        work: `[R]` WORK.
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
        out: `[R, K]` int32, filled with -1.
        by: `[R, K]` int8.
    """
    path = np.empty(MAX_DEPTH + 2, dtype=np.int32)
    features = np.empty(estimate.NUM_FEATURES, dtype=np.float32)
    for request in range(len(work)):
        task = work[request]
        if task.max_draft <= 0:
            continue
        slot, num_tokens = task.slot, task.num_tokens
        state = states[slot]
        index = suffix_index.index_at(index_addresses[slot], index_capacities[slot])
        trigrams = trigram_weights.weights_at(trigram_addresses[slot], trigram_capacities[slot])
        row = numba.carray(
            address_as_pointer(history_address + task.row * history_stride),
            (num_tokens,),
            np.int32,
        )
        known = state.num_tokens
        if known == 0 or known > num_tokens or not same_text(row, index, known):
            state.num_nodes = suffix_index.clear(index)
            trigram_weights.clear(trigrams)
            state.num_tokens = 0
            state.weights[:] = estimate.PRIOR
        extend(state, index, trigrams, row, num_tokens, max_match, rate, path, features)
        draft(
            state,
            index,
            trigrams,
            min(task.max_draft, out.shape[1]),
            max_match,
            min_match,
            threshold,
            path,
            features,
            out[request],
            by[request],
        )


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
    trigram_weights.move(
        trigram_weights.weights_at(trigrams_from[0], trigrams_from[1]),
        trigram_weights.weights_at(trigrams_to[0], trigrams_to[1]),
    )
