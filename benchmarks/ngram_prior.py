"""Fits `PRIOR` of `ngram_adaptive`'s acceptance estimate; see `ngram_traces.py --fit`."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from vllm_spec_plugins.proposers import acceptance_estimate as estimate
from vllm_spec_plugins.proposers import ngram_step, suffix_index, trigram_weights
from vllm_spec_plugins.proposers.request_memory import RequestMemory

MAX_MATCH = 32
#: Matches this long are nearly always right; keep one in fifty, or they outweigh the rest.
LONG_LOG, KEPT_LONG = np.log(MAX_MATCH) - 1e-4, 0.02


@numba.njit
def collect(states, index_address, trigrams_address, capacity, tokens, features, right):
    """Features of each position's winner, and whether it was the token that came."""
    index = suffix_index.index_at(index_address, capacity)
    trigrams = trigram_weights.weights_at(trigrams_address, capacity)
    state = states[0]
    ngram_step.reset(state, index)
    trigram_weights.clear(trigrams)
    for position in range(len(tokens)):
        if position > 1:
            node, followed = suffix_index.longest_repeated(
                index, state.path[state.path_length - 1], MAX_MATCH
            )
            if node != suffix_index.ROOT:
                length = min(index.nodes[node].depth, MAX_MATCH)
                winner, _ = ngram_step.describe(
                    index, True, node, length, followed, position, state.recent,
                    state.copied, features[position],
                )  # fmt: skip
                before, last = tokens[position - 2], tokens[position - 1]
                ngram_step.add_share(trigrams, length, before, last, winner, features[position])
                right[position] = winner == tokens[position]
        ngram_step.extend(
            state, index, trigrams, tokens, position + 1, MAX_MATCH, 0.0, np.zeros(9, np.float32)
        )


def positions_of(items: list[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Features and outcomes at every output position where something matches."""
    generator = np.random.default_rng(0)
    found = []
    for prompt, output in items:
        tokens = np.concatenate([prompt, output])
        index = RequestMemory(1, suffix_index.bytes_needed)
        trigrams = RequestMemory(1, trigram_weights.bytes_needed)
        for memory in (index, trigrams):
            memory.give(0, len(tokens) + 1)
        features = np.zeros((len(tokens), estimate.NUM_FEATURES), dtype=np.float32)
        right = np.zeros(len(tokens), dtype=np.float32)
        states = np.zeros(1, dtype=ngram_step.REQUEST_STATE)
        collect(
            states, int(index.addresses[0]), int(trigrams.addresses[0]), len(tokens) + 1,
            tokens, features, right,
        )  # fmt: skip
        features, right = features[len(prompt) :], right[len(prompt) :]
        kept = features[:, 0] > 0
        kept &= (features[:, 1] < LONG_LOG) | (generator.random(len(kept)) < KEPT_LONG)
        found.append((features[kept], right[kept]))
    features, right = (np.concatenate(each).astype(float) for each in zip(*found, strict=True))
    return features, right


def log_loss(weights: NDArray[np.float64], features: Any, right: Any) -> float:
    """Mean over positions."""
    score = features @ weights
    return float((np.logaddexp(0, score) - right * score).mean())


def fitted(traces: list[tuple[Any, Any]]) -> NDArray[np.float64]:
    """Weights of least log loss, every trace counting the same."""

    def loss(weights: NDArray[np.float64]) -> float:
        return sum(log_loss(weights, *trace) for trace in traces)

    def gradient(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return sum(
            (x.T @ (1 / (1 + np.exp(-x @ weights)) - y) / len(y) for x, y in traces),
            np.zeros_like(weights),
        )

    num_features = traces[0][0].shape[1]
    return minimize(loss, np.zeros(num_features), jac=gradient, method="BFGS").x


def fit_prior(traces: dict[str, list[Any]]) -> None:
    """Fit on even texts of each trace, test on odd ones; then fit on all. Prints."""
    even = fitted([positions_of(items[::2]) for items in traces.values()])
    for name, items in traces.items():
        odd = positions_of(items[1::2])
        print(
            f"{name}: log loss on odd texts {log_loss(even, *odd):.4f} fitted on even texts, "
            f"{log_loss(estimate.PRIOR.astype(float), *odd):.4f} with PRIOR"
        )
    everything = fitted([positions_of(items) for items in traces.values()])
    print("all texts:", np.round(everything, 2).tolist())
    print("PRIOR:    ", np.round(estimate.PRIOR.astype(float), 2).tolist())
