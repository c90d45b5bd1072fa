"""How likely the target is to accept the next token of an n-gram draft.

A logistic model of six things known before drafting: how many tokens match, how often the
winner and the losers followed them, and the winner's share of the trigram weights. It starts
from weights fitted once (`PRIOR`) and learns from every token of the request's own text: at
each position the index would have predicted some token, and the text says what came. So a
request that copies is soon trusted further than one that does not, drafts depend on nothing
but the request's own text, and nothing has to be reported back after verification.
"""

from __future__ import annotations

import numpy as np

from .compiled import compiled

NUM_FEATURES = 6
#: Fitted by `benchmarks/ngram_traces.py --fit` on the three development traces, each with
#: the same total weight.
PRIOR = np.array([-0.75, 1.51, 1.02, -1.03, -2.32, 2.00], dtype=np.float32)

_LOG = np.log(np.arange(1, 4097)).astype(np.float32)


@compiled
def _log(count):
    return _LOG[min(count, 4096) - 1]


@compiled
def describe(features, length, best_count, followed, trigram_share):
    """Fill `features` for a winner.

    Args:
        features: `[6]` float32, written.
        length: Tokens matched, at least 1.
        best_count: How often the winner followed them.
        followed: How often anything did.
        trigram_share: Winner's share of the trigram weights; negative with no trigram known.
    """
    features[0] = 1
    features[1] = _log(length)
    features[2] = _log(best_count)
    features[3] = _log(1 + followed - best_count)
    features[4] = 0 if trigram_share < 0 else 1
    features[5] = max(trigram_share, np.float32(0))


@compiled
def probability(weights, features):
    """Expected acceptance, float32 in (0, 1)."""
    total = np.float32(0)
    for feature in range(NUM_FEATURES):
        total += weights[feature] * features[feature]
    return np.float32(1) / (np.float32(1) + np.exp(-total))


@compiled
def bound(weights, length, best_count, followed, features):
    """What `probability` cannot exceed whatever the winner's share: cheap, no table is read."""
    describe(features, length, best_count, followed, np.float32(1 if length >= 2 else -1))
    features[5] = 1 if weights[5] > 0 and length >= 2 else 0
    return probability(weights, features)


@compiled
def learn(weights, features, accepted, rate):
    """One step of stochastic gradient on the log loss."""
    step = rate * (np.float32(accepted) - probability(weights, features))
    for feature in range(NUM_FEATURES):
        weights[feature] += step * features[feature]
