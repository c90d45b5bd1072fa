"""The one compiled call per step of `ngram_adaptive`: index what is new, then draft."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from . import acceptance_estimate as estimate
from . import suffix_index
from . import trigram_weights as trigram
from .compiled import address_as_pointer, compiled, entry_point, place, prefetch, spread
from .suffix_index import CHILD_BYTES, MAX_DEPTH, NO_TOKEN, NODE_BYTES, ROOT

#: What is known of one request, or one shared segment, between steps.
REQUEST_STATE = np.dtype(
    [
        ("num_tokens", np.int64),  # indexed so far
        ("num_nodes", np.int64),
        ("path_length", np.int64),
        ("weights", np.float32, (estimate.NUM_FEATURES,)),  # of its acceptance estimate
        ("recent", np.float32),  # share of the latest tokens that were predicted
        ("copied", np.int64),  # where the last right prediction stood, and on from there
        ("resets", np.int64),  # times it was emptied
        # What the shared index would have drafted next, to learn from what comes instead.
        ("watched", np.int64),  # the segment, plus one; 0 = none
        ("watched_resets", np.int64),  # of the segment then
        ("watched_token", np.int64),
        ("watched_features", np.float32, (estimate.NUM_FEATURES,)),
        ("path", np.int32, (MAX_DEPTH + 2,)),  # nodes of the last context, shortest first
    ]
)
STATE_BYTES = REQUEST_STATE.itemsize
#: Columns of one request of one step.
SLOT, ROW, NUM_TOKENS, MAX_DRAFT = range(4)

#: Who drafted a token.
OWN_TEXT, SHARED_TEXT = 0, 1
SOURCES = ("own text", "shared index")

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
def describe(index, own, node, length, followed, now, recent, copied, features):
    """Fill the features of the winner after a context, but for its share of trigram weights.

    Args:
        index: Where the context was matched.
        own: Whether that is the request's own text.
        node: Of the context.
        length: Tokens matched.
        followed: How often something followed them.
        now: Position the winner is to stand at.
        recent: Of the request's state.
        copied: Of the request's state, or of the draft.
        features: `[9]` float32, written.

    Returns:
        The winner, and where it last stood after this context.
    """
    nodes = index.nodes
    position = np.int64(nodes[nodes[node].best_node].position)
    distance = now - position if own else 0
    jump = position - copied - 1
    estimate.describe(features, length, nodes[node].best_count, followed, recent, distance, jump)
    return nodes[node].best_token, position


@compiled
def add_share(trigrams, length, before, last, token, features):
    """The feature `describe` leaves out: it has to be looked up."""
    if length >= 2:
        share = trigram.share(trigrams, before, last, token)
        features[estimate.SHARE] = max(share, np.float32(0))


@compiled
def append_token(state, index, token, max_match):
    """Index one token after the `state.num_tokens` that are there."""
    path = state.path
    context = path[state.path_length - 1] if state.num_tokens > 0 else ROOT
    start = suffix_index.known_extension(index, context, token, max_match)
    state.num_nodes, state.path_length = suffix_index.append(
        index, state.num_tokens, state.num_nodes, token, max_match, start, path
    )
    suffix_index.vote(index, context, token, max_match, path, state.path_length)
    state.num_tokens += 1


@compiled
def extend(state, index, trigrams, tokens, num_tokens, max_match, rate, features):
    """Index the tokens from `state.num_tokens` to `num_tokens`, learning from each."""
    for position in range(state.num_tokens, num_tokens):
        token = tokens[position]
        before = index.tokens[MAX_DEPTH + position - 2]
        last = index.tokens[MAX_DEPTH + position - 1]
        right = False
        state.copied += 1
        if position > 0:
            node, followed = suffix_index.longest_repeated(
                index, state.path[state.path_length - 1], max_match
            )
            if node != ROOT:
                length = min(index.nodes[node].depth, max_match)
                predicted, stood = describe(
                    index, True, node, length, followed, position, state.recent,
                    state.copied - 1, features,
                )  # fmt: skip
                right = predicted == token
                if rate > 0:
                    add_share(trigrams, length, before, last, predicted, features)
                    estimate.learn(state.weights, features, right, rate)
                if right:
                    state.copied = stood
        state.recent += estimate.FORGETTING * (np.float32(right) - state.recent)
        append_token(state, index, token, max_match)
        if position > 1:
            trigram.reinforce(trigrams, before, last, token)


@compiled
def draft(
    state,
    weights,
    index,
    own,
    node,
    followed,
    length,
    path,
    trigrams,
    before,
    last,
    most,
    max_match,
    min_match,
    threshold,
    features,
    out,
):
    """Draft from a matched context, while the draft is expected to be accepted to its end.

    Args:
        state: Of the request.
        weights: Of the acceptance estimate.
        index: Where to draft from: the request's own index or a shared one.
        own: Whether it is the request's own.
        node: Node of the matched context, or ROOT.
        followed: How often something followed it.
        length: Tokens matched.
        path: Nodes of the last context of the index, which nothing followed yet.
        trigrams: The request's trigram weights.
        before: Last token but one of the request's text.
        last: Last token of the request's text.
        most: Most tokens to draft.
        max_match: Longest context matched, in tokens.
        min_match: Shortest context to draft from, in tokens.
        threshold: Least expected acceptance of a drafted token, with all before it.
        features: Scratch, `[9]` float32.
        out: `[K]` int32, the draft, written.

    Returns:
        Number of tokens drafted and how many of them should be accepted.
    """
    nodes, copied = index.nodes, state.copied
    expected, total = np.float32(1), np.float32(0)
    for column in range(most):
        if node == ROOT or length < min_match or nodes[node].best_token == NO_TOKEN:
            return column, total
        token, copied = describe(
            index, own, node, length, followed, state.num_tokens + column, state.recent,
            copied, features,
        )  # fmt: skip
        # With the largest share, and mostly that is enough to see that the draft ends here.
        most_likely = estimate.probability(weights, features)
        if weights[estimate.SHARE] >= 0 and expected * most_likely < threshold:
            return column, total
        add_share(trigrams, length, before, last, token, features)
        expected *= estimate.probability(weights, features)
        if expected < threshold:
            return column, total
        out[column] = token
        total += expected
        before, last = last, token
        # The match grows by the token, unless it now ends where the text does.
        length = min(length + 1, max_match)
        node, followed = suffix_index.longest_followed(
            index, suffix_index.extended(index, node, length), max_match, path, len(path)
        )
        length = min(length, nodes[node].depth)
    return most, total


@compiled
def ask_for(state, num_tokens, history_row, index_address, index_capacity, trigrams_address):
    """Prefetch what indexing the next tokens of a request reads first.

    A step would spend most of its time waiting for memory: the tables of a request have left
    the cache since its last turn. So they are asked for while the request before is served.
    """
    known = state.num_tokens
    if known < 2 or known >= num_tokens:
        return
    nodes = index_address + suffix_index.nodes_offset(index_capacity)
    prefetch(nodes)  # the root
    prefetch(nodes + NODE_BYTES * state.num_nodes)  # where new nodes go
    prefetch(index_address + 4 * (MAX_DEPTH + known - 1))
    for step in range(state.path_length):
        prefetch(nodes + NODE_BYTES * state.path[step])
    tokens = numba.carray(address_as_pointer(history_row), (num_tokens,), np.int32)
    children = index_address + suffix_index.children_offset(index_capacity)
    entry = place(spread(ROOT, tokens[known]), 3 * index_capacity)
    prefetch(children + CHILD_BYTES * entry)
    size = trigram.table_size(index_capacity)
    context = place(spread(tokens[known - 2], tokens[known - 1]), size)
    prefetch(trigrams_address + trigram.ENTRY_BYTES * context)
    following = place(spread(context, tokens[known]), size)
    prefetch(trigrams_address + trigram.ENTRY_BYTES * (size + following))


@compiled
def ask_for_state(state_address, num_tokens, history_row):
    """Prefetch what `ask_for` reads: the state, with a path of up to 16 nodes, and new tokens."""
    for line in range(4):
        prefetch(state_address + 64 * line)
    prefetch(history_row + 4 * (num_tokens - 2))


@entry_point
def step(
    work,
    history_address,
    history_stride,
    states_address,
    index_addresses,
    index_capacities,
    trigram_addresses,
    trigram_capacities,
    segments,
    segment_states_address,
    segment_addresses,
    segment_capacities,
    max_match,
    min_match,
    threshold,
    rate,
    drafts,
    source_of,
):
    """Bring every request's index up to date and draft for it.

    Args:
        work: `[R, 4]` int64: slot, row in the engine's table, tokens, most to draft.
        history_address: Address of the engine's token table, int32 rows.
        history_stride: Bytes from one row to the next.
        states_address: Of `[slots]` REQUEST_STATE. An address, like those below, because
            numba takes ten microseconds to recognise each array of records.
        index_addresses: `[slots]` int64, see `RequestMemory`.
        index_capacities: `[slots]` int64.
        trigram_addresses: `[slots]` int64.
        trigram_capacities: `[slots]` int64.
        segments: `[R, S]` int64, shared segments each request may draft from, newest first;
            -1 = none.
        segment_states_address: Of `[segments]` REQUEST_STATE.
        segment_addresses: `[segments]` int64.
        segment_capacities: `[segments]` int64.
        max_match: Longest context matched, in tokens.
        min_match: Shortest context to draft from, in tokens.
        threshold: Least expected acceptance of a drafted token, with all before it.
        rate: Learning rate of the acceptance estimate; 0 keeps the prior.
        drafts: `[R, K]` int32, written; -1 behind each draft.
        source_of: `[R, K]` int8, written: OWN_TEXT or SHARED_TEXT; -1 behind each draft.

    Returns:
        False, and nothing is done, if some request lacks memory for its text.
    """
    features = np.empty(estimate.NUM_FEATURES, dtype=np.float32)
    path = np.empty(MAX_DEPTH + 2, dtype=np.int32)
    other = np.empty(drafts.shape[1], dtype=np.int32)
    states: Any = numba.carray(
        address_as_pointer(states_address), (len(index_addresses),), REQUEST_STATE
    )
    segment_states: Any = numba.carray(
        address_as_pointer(segment_states_address), (len(segment_addresses),), REQUEST_STATE
    )
    drafts[:] = NO_TOKEN
    source_of[:] = -1
    for request in range(len(work)):
        if work[request, MAX_DRAFT] > 0 and (
            work[request, NUM_TOKENS] > index_capacities[work[request, SLOT]]
        ):
            return False
    for request in range(len(work)):
        if request + 2 < len(work) and work[request + 2, MAX_DRAFT] > 0:
            ask_for_state(
                states_address + STATE_BYTES * work[request + 2, SLOT],
                work[request + 2, NUM_TOKENS],
                history_address + work[request + 2, ROW] * history_stride,
            )
        if request + 1 < len(work) and work[request + 1, MAX_DRAFT] > 0:
            slot = work[request + 1, SLOT]
            ask_for(
                states[slot],
                work[request + 1, NUM_TOKENS],
                history_address + work[request + 1, ROW] * history_stride,
                index_addresses[slot],
                index_capacities[slot],
                trigram_addresses[slot],
            )
        slot, num_tokens = work[request, SLOT], work[request, NUM_TOKENS]
        most = min(work[request, MAX_DRAFT], drafts.shape[1])
        if most <= 0:
            continue
        state = states[slot]
        index = suffix_index.index_at(index_addresses[slot], index_capacities[slot])
        trigrams = trigram.weights_at(trigram_addresses[slot], trigram_capacities[slot])
        row = numba.carray(
            address_as_pointer(history_address + work[request, ROW] * history_stride),
            (num_tokens,),
            np.int32,
        )
        known = state.num_tokens
        if known == 0 or known > num_tokens or not same_text(row, index, known):
            reset(state, index)
            trigram.clear(trigrams)
        elif known < num_tokens:
            learn_shared(state, segment_states, row[known], rate)
        extend(state, index, trigrams, row, num_tokens, max_match, rate, features)

        end = MAX_DEPTH + num_tokens - 1
        before, last = index.tokens[end - 1], index.tokens[end]
        own_path = state.path[: state.path_length]
        node, followed = suffix_index.longest_repeated(
            index, own_path[len(own_path) - 1], max_match
        )
        length = min(index.nodes[node].depth, max_match)
        drafted, score = draft(
            state, state.weights, index, True, node, followed, length, own_path, trigrams,
            before, last, most, max_match, min_match, threshold, features, drafts[request],
        )  # fmt: skip
        source_of[request, :drafted] = OWN_TEXT

        for column in range(segments.shape[1]):
            if segments[request, column] < 0:
                break
            segment = segments[request, column]
            shared = suffix_index.index_at(segment_addresses[segment], segment_capacities[segment])
            depth, matched = suffix_index.descend(shared, index.tokens, end, max_match, ROOT, path)
            if depth == 0 or matched <= length:
                continue  # the request's own text, or a newer segment, knows as much
            length, node = matched, path[depth - 1]
            followed = shared.nodes[node].occurrences
            weights = segment_states[segment].weights
            watch(state, segment, segment_states[segment].resets)
            state.watched_token, _ = describe(
                shared, False, node, length, followed, num_tokens, state.recent, 0,
                state.watched_features,
            )  # fmt: skip
            add_share(trigrams, length, before, last, state.watched_token, state.watched_features)
            other_drafted, other_score = draft(
                state, weights, shared, False, node, followed, length, path[:0], trigrams,
                before, last, most, max_match, min_match, threshold, features, other,
            )  # fmt: skip
            if other_score > score:
                score = other_score
                drafts[request, :] = NO_TOKEN
                source_of[request, :] = -1
                drafts[request, :other_drafted] = other[:other_drafted]
                source_of[request, :other_drafted] = SHARED_TEXT
    return True


@compiled
def watch(state, segment, resets):
    """Remember that this segment predicts the next token of the request."""
    state.watched, state.watched_resets = segment + 1, resets


@compiled
def learn_shared(state, segment_states, token, rate):
    """Teach the segment watched in the last step what really came, if it still is the same."""
    segment = state.watched - 1
    state.watched = 0
    if segment >= 0 and segment_states[segment].resets == state.watched_resets:
        estimate.learn(
            segment_states[segment].weights,
            state.watched_features,
            state.watched_token == token,
            rate,
        )


@compiled
def reset(state, index):
    """Make an empty index, with an untaught estimate."""
    state.num_nodes = suffix_index.clear(index)
    state.num_tokens = state.path_length = state.watched = 0
    state.resets += 1
    state.weights[:] = estimate.PRIOR
    state.recent, state.copied = estimate.RECENT_AT_FIRST, 0


@entry_point
def add_document(states, segment, address, capacity, fresh, tokens, max_match):
    """Append a finished text to a shared segment, with a NO_TOKEN after it.

    Args:
        states: `[segments]` REQUEST_STATE.
        segment: Which one.
        address: Of its index.
        capacity: Of its index.
        fresh: Empty it first.
        tokens: `[n]` int32; the segment has room for n + 1.
        max_match: As in `step`.
    """
    state, index = states[segment], suffix_index.index_at(address, capacity)
    if fresh:
        reset(state, index)
    for position in range(len(tokens)):
        append_token(state, index, tokens[position], max_match)
    append_token(state, index, NO_TOKEN, max_match)


@entry_point
def move(states, slot, index_from, index_to, trigrams_from, trigrams_to):
    """Move one request to larger memory. Each place is (address, capacity)."""
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
