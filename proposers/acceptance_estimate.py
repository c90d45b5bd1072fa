"""How likely the target is to accept the next token of an n-gram draft.

A logistic model of nine things known before drafting. It starts from weights fitted once
(`PRIOR`) and learns from every token of the request's own text: at each position the index
would have predicted some token, and the text says what came. So a request that copies is soon
trusted further than one that does not, drafts depend on nothing but the request's own text,
and nothing has to be reported back after verification.
"""

from __future__ import annotations

import numpy as np

from .compiled import compiled

NUM_FEATURES = 9
#: Place of the winner's share of the trigram weights among the features.
SHARE = 5
#: Fitted by `benchmarks/ngram_traces.py --fit` on the three development traces, each with
#: the same total weight.
PRIOR = np.array([-0.9, 1.15, 0.96, -0.99, -2.33, 2.07, 1.33, 0.0, 0.52], dtype=np.float32)

#: Share of `recent` that each token replaces: about the last thirty count.
FORGETTING = np.float32(0.03)
#: `recent` of a request that has only begun.
RECENT_AT_FIRST = np.float32(0.3)
#: How far, in tokens, a copy may jump and still be the same copy.
NEAR = 16

_LOG = np.log(np.arange(1, 4097)).astype(np.float32)


@compiled
def _log(count):
    return _LOG[min(count, 4096) - 1]


@compiled
def describe(features, length, best_count, followed, recent, distance, jump):
    """Fill `features` for a winner, with the largest share of the trigram weights it may have.

    Args:
        features: `[9]` float32, written.
        length: Tokens matched, at least 1.
        best_count: How often the winner followed them.
        followed: How often anything did.
        recent: Share of the request's latest tokens that were predicted, 0 to 1.
        distance: Tokens since the winner last stood there; 0 = in another text.
        jump: Tokens between there and where the last right prediction leads.
    """
    features[0] = 1
    features[1] = _log(length)
    features[2] = _log(best_count)
    features[3] = _log(1 + followed - best_count)
    features[4] = 1 if length >= 2 else 0  # then its trigram is known
    features[SHARE] = features[4]
    features[6] = recent - RECENT_AT_FIRST
    features[7] = _log(distance) - np.float32(5) if distance > 0 else 0
    features[8] = 1 if distance > 0 and -NEAR < jump < NEAR else 0


@compiled
def probability(weights, features):
    """Expected acceptance, float32 in (0, 1)."""
    total = np.float32(0)
    for feature in range(NUM_FEATURES):
        total += weights[feature] * features[feature]
    return np.float32(1) / (np.float32(1) + np.exp(-total))


@compiled
def learn(weights, features, accepted, rate):
    """One step of stochastic gradient on the log loss."""
    step = rate * (np.float32(accepted) - probability(weights, features))
    for feature in range(NUM_FEATURES):
        weights[feature] += step * features[feature]
