"""Beam search through a lattice of draft tokens, scored by the draft and by trigrams: compiled."""

from __future__ import annotations

import math

import numpy as np

from . import trigram_weights as trigram
from .compiled import compiled, entry_point

NO_TOKEN = -1


@compiled
def trigram_log_probability(weights, before, last, token, draft):
    """log p(token | before last) of the request's text so far.

    Weights of the trigrams seen, and of the draft's own law as if it had been seen once: where
    the text says nothing, the trigrams agree with the draft.

    Args:
        weights: The request's trigram weights.
        before: Last token but one.
        last: Last token.
        token: Whose probability is wanted.
        draft: log of its probability under the draft.
    """
    context = weights.contexts[trigram.context_entry(weights, before, last)]
    if context.seen == 0:
        return draft
    seen = trigram.weight(weights, before, last, token)
    once = trigram.REINFORCEMENT
    return np.float32(math.log((seen + once * math.exp(draft)) / (context.total + once) + 1e-30))


@compiled
def best_path(
    weights,
    token_ids,
    log_probabilities,
    length,
    before,
    last,
    is_end,
    beam,
    draft_weight,
    normalised,
    path,
):
    """The path of the highest score through one lattice, as far as the beam sees.

    Args:
        weights: The request's trigram weights.
        token_ids: `[K, C]` int32 candidates of each position; NO_TOKEN = none.
        log_probabilities: `[K, C]` float32 of each under the draft.
        length: Positions in use, at least 1.
        before: Last token but one of the text.
        last: Its last token.
        is_end: `[K, C]` whether a candidate ends the text.
        beam: Paths kept.
        draft_weight: Share of the draft in the score; the rest is the trigrams'.
        normalised: Whether paths of different lengths compare by score per token.
        path: `[K]` int32, written: the path, NO_TOKEN behind it.

    Returns:
        Its score, normalised or not.
    """
    positions = token_ids.shape[0]
    scores = np.zeros(beam, dtype=np.float32)
    next_scores = np.empty(beam, dtype=np.float32)
    parents, columns = np.empty(beam, dtype=np.int64), np.empty(beam, dtype=np.int64)
    paths = np.full((beam, positions), NO_TOKEN, dtype=np.int32)
    next_paths = np.full((beam, positions), NO_TOKEN, dtype=np.int32)
    alive, best = 1, -np.inf
    path[:] = NO_TOKEN
    for position in range(length):
        found = 0
        for hypothesis in range(alive):
            first, second = before, last
            if position > 0:
                second = paths[hypothesis, position - 1]
                first = last if position == 1 else paths[hypothesis, position - 2]
            for column in range(token_ids.shape[1]):
                token = token_ids[position, column]
                if token == NO_TOKEN:
                    continue
                draft = log_probabilities[position, column]
                ngram = trigram_log_probability(weights, first, second, token, draft)
                score = scores[hypothesis] + draft_weight * draft + (1 - draft_weight) * ngram
                if is_end[position, column] or position == length - 1:
                    value = score / (position + 1) if normalised else score
                    if value > best:
                        best = value
                        path[:position] = paths[hypothesis, :position]
                        path[position] = token
                        path[position + 1 :] = NO_TOKEN
                    continue
                if found == beam and score <= next_scores[beam - 1]:
                    continue
                # Into its place among the best, which are few; the first of equals stays first.
                place = min(found, beam - 1)
                while place > 0 and score > next_scores[place - 1]:
                    next_scores[place] = next_scores[place - 1]
                    parents[place], columns[place] = parents[place - 1], columns[place - 1]
                    place -= 1
                next_scores[place], parents[place], columns[place] = score, hypothesis, column
                found = min(found + 1, beam)
        for hypothesis in range(found):
            next_paths[hypothesis, :position] = paths[parents[hypothesis], :position]
            next_paths[hypothesis, position] = token_ids[position, columns[hypothesis]]
        scores, next_scores = next_scores, scores
        paths, next_paths = next_paths, paths
        alive = found
    return best


@entry_point
def best_paths(
    slots,
    addresses,
    capacities,
    token_ids,
    log_probabilities,
    lengths,
    contexts,
    end_token_ids,
    beam,
    draft_weight,
    normalised,
    paths,
):
    """`best_path` of each request.

    Args:
        slots: `[R]` int64, of each in its `TrigramTexts`.
        addresses: `[slots]` int64, see `RequestMemory`.
        capacities: `[slots]` int64.
        token_ids: `[R, K, C]` int32.
        log_probabilities: `[R, K, C]` float32.
        lengths: `[R]` int64.
        contexts: `[R, 2]` int32, last two tokens of each text.
        end_token_ids: `[E]` int32, tokens that end a text.
        beam: As in `best_path`.
        draft_weight: As in `best_path`, float32.
        normalised: As in `best_path`.
        paths: `[R, K]` int32, written.
    """
    is_end = np.empty(token_ids.shape[1:], dtype=np.bool_)
    for request in range(len(slots)):
        paths[request] = NO_TOKEN
        if lengths[request] <= 0:
            continue
        for position in range(token_ids.shape[1]):
            for column in range(token_ids.shape[2]):
                token = token_ids[request, position, column]
                is_end[position, column] = False
                for end in end_token_ids:
                    if token == end:
                        is_end[position, column] = True
        weights = trigram.weights_at(addresses[slots[request]], capacities[slots[request]])
        best_path(
            weights, token_ids[request], log_probabilities[request], lengths[request],
            contexts[request, 0], contexts[request, 1], is_end, beam, draft_weight, normalised,
            paths[request],
        )  # fmt: skip
