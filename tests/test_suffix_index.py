"""The suffix index and the trigram weights against brute force over the text."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_spec_plugins.proposers import compiled as compiled_module
from vllm_spec_plugins.proposers import ngram_step, suffix_index, trigram_weights
from vllm_spec_plugins.proposers.request_memory import RequestMemory, roomy

TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=120)
#: Short, so that the cut at the longest context is met all the time.
MAX_MATCH = 6


class Indexed:
    """One text in a suffix index, appended to token by token."""

    def __init__(self, capacity: int = 512, max_match: int = MAX_MATCH) -> None:
        self.memory = RequestMemory(1, suffix_index.bytes_needed)
        self.memory.give(0, capacity)
        self.max_match = max_match
        self.states = np.zeros(1, dtype=ngram_step.REQUEST_STATE)
        self.fresh = True

    def append(self, tokens: list[int]) -> None:
        """As a document: the tokens and one separator."""
        ngram_step.add_document(
            self.states,
            0,
            int(self.memory.addresses[0]),
            int(self.memory.capacities[0]),
            self.fresh,
            np.array(tokens, dtype=np.int32),
            self.max_match,
        )
        self.fresh = False

    def arrays(self):
        """The index as numpy arrays over the same memory."""
        block, capacity = self.memory.block(0), int(self.memory.capacities[0])
        at = 4 * (suffix_index.MAX_DEPTH + capacity)
        nodes = block[at : at + 32 * (2 * capacity + 1)].view(suffix_index.NODE)
        return nodes[: int(self.states["num_nodes"][0])]


def contexts_of(text: list[int], depth: int) -> dict[tuple[int, ...], list[int]]:
    """Every context of up to `depth` tokens, and where it ends."""
    found: dict[tuple[int, ...], list[int]] = {}
    for end in range(len(text)):
        for length in range(1, min(depth, end + 1) + 1):
            found.setdefault(tuple(text[end - length + 1 : end + 1]), []).append(end)
    return found


def vote(text: list[int], ends: list[int]) -> tuple[int, int]:
    """Most frequent successor, the latest among equals, and its count."""
    followers = [(text[end + 1], end) for end in ends if end + 1 < len(text)]
    counts = {t: sum(1 for other, _ in followers if other == t) for t, _ in followers}
    latest = {t: max(end for other, end in followers if other == t) for t in counts}
    best = max(counts, key=lambda t: (counts[t], latest[t]))
    return best, counts[best]


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_every_node_counts_and_votes_as_brute_force_does(tokens):
    index = Indexed()
    index.append(tokens)
    nodes = index.arrays()
    text = [*tokens, suffix_index.NO_TOKEN]
    contexts = contexts_of(text, MAX_MATCH + 1)
    for node in nodes[1:]:
        end, depth = int(node["position"]), int(node["depth"])
        shallow = int(nodes[node["parent"]]["depth"])
        for length in range(shallow + 1, min(depth, end + 1) + 1):
            ends = contexts[tuple(text[end - length + 1 : end + 1])]
            assert node["occurrences"] == len(ends)
            if length <= MAX_MATCH and any(e + 1 < len(text) for e in ends):
                assert (node["best_token"], node["best_count"]) == vote(text, ends)
    # Every context has a node: as many occurrences under the root as tokens.
    under_root = nodes[1:][nodes[1:]["parent"] == 0]
    assert under_root["occurrences"].sum() == len(text)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=200))
def test_memory_holds_the_worst_text(tokens):
    index = Indexed(capacity=256)
    index.append(tokens)
    assert len(index.arrays()) <= 2 * (len(tokens) + 1) + 1


def test_bytes_per_token_are_those_in_the_docstrings():
    many = 1 << 20
    assert suffix_index.bytes_needed(many) == pytest.approx(92 * many, rel=1e-3)
    assert trigram_weights.bytes_needed(many) == pytest.approx(48 * many, rel=1e-3)
    assert 1000 < roomy(1000) <= 1536


def taught(tokens: list[int]) -> RequestMemory:
    """Trigram weights of a text, through the kernel that serves."""
    memory = RequestMemory(1, trigram_weights.bytes_needed)
    memory.give(0, 512)
    weights = trigram_weights.weights_at(int(memory.addresses[0]), 512)
    trigram_weights.clear(weights)
    for a, b, c in zip(tokens, tokens[1:], tokens[2:], strict=False):
        trigram_weights.reinforce(weights, a, b, c)
    return memory


def brute_shares(tokens: list[int], first: int, second: int) -> dict[int, float]:
    """Weights of all successors, from the definition, normalised."""
    weights: dict[int, float] = {}
    for a, b, c in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if (a, b) == (first, second):
            weights = {t: w * (1 - float(trigram_weights.FADING)) for t, w in weights.items()}
            weights[c] = weights.get(c, 0.0) + float(trigram_weights.REINFORCEMENT)
    return {t: w / sum(weights.values()) for t, w in weights.items()}


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_trigram_shares_follow_their_definition(tokens):
    memory = taught(tokens)
    triples = np.array([(a, b, c) for a in range(4) for b in range(4) for c in range(4)], np.int32)
    scores = np.zeros(len(triples), np.float32)
    trigram_weights.shares(int(memory.addresses[0]), 512, triples, scores)
    for (a, b, c), score in zip(triples.tolist(), scores, strict=True):
        assert score == pytest.approx(brute_shares(tokens, a, b).get(c, 0.0), abs=1e-5)


def test_a_path_is_scored_by_its_new_tokens():
    """ADED's code scores the token before: after 5 6, `7` has a weight and `6` has none."""
    memory = taught([5, 6, 7, 8])
    scores = np.zeros(2, np.float32)
    triples = np.array([(5, 6, 7), (5, 6, 6)], np.int32)
    trigram_weights.shares(int(memory.addresses[0]), 512, triples, scores)
    assert scores.tolist() == [1.0, 0.0]


def test_weights_fade_and_stay_below_the_cap():
    memory = taught([1, 2, 3] * 100 + [1, 2, 4])
    weights = trigram_weights.weights_at(int(memory.addresses[0]), 512)
    cap = trigram_weights.REINFORCEMENT / trigram_weights.FADING
    assert trigram_weights.weight(weights, 1, 2, 3) == pytest.approx(0.8 * cap, rel=1e-4)
    assert trigram_weights.weight(weights, 1, 2, 4) == pytest.approx(0.56, rel=1e-4)


def test_machine_code_is_kept_until_a_source_changes(monkeypatch, tmp_path):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def fresh() -> tuple[int, int]:
        """Loaded from and not found in the cache, by a new dispatcher of the same function."""
        kernel = compiled_module.entry_point(trigram_weights.shares.py_func)
        taught_weights = taught([1, 2, 3])
        out = np.zeros(1, np.float32)
        triple = np.array([[1, 2, 3]], np.int32)
        kernel(int(taught_weights.addresses[0]), 512, triple, out)
        assert out.tolist() == [1.0]
        return sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values())

    assert fresh() == (0, 1)
    assert fresh() == (1, 0)
    monkeypatch.setattr(compiled_module, "_stamp", lambda: "another source")
    assert fresh() == (0, 1)


def test_no_folder_to_keep_machine_code_in_is_no_error(monkeypatch):
    def refuse(_self: object) -> None:
        raise RuntimeError("no locator available")

    monkeypatch.setattr(type(trigram_weights.shares), "enable_caching", refuse)
    kernel = compiled_module.entry_point(lambda number: number + 1)
    assert kernel(1) == 2
