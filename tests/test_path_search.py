"""Path search against every path of small lattices, and the weights it reads against the text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm_spec_plugins.proposers.path_search import PathSearch, PathSearchOptions, lattice_of
from vllm_spec_plugins.proposers.trigram_texts import TrigramTexts
from vllm_spec_plugins.proposers.trigram_weights import shares

from vllm_spec_plugins.proposer import DraftInput

VOCABULARY = 7
#: Ends the text.
END = 6
#: More paths than any lattice here has: nothing is ever given up.
EVERYTHING = 64
ONCE = 0.56


def step(texts: Sequence[Sequence[int]], most: int | Sequence[int]) -> DraftInput:
    """Requests "0", "1", ... with these texts, in rows that are not in order."""
    count, longest = len(texts), max(map(len, texts))
    history = np.full((count, longest + 3), -7, dtype=np.int32)
    rows = np.arange(count)[::-1].copy()
    for row, text in zip(rows, texts, strict=True):
        history[row, : len(text)] = text
    return DraftInput(
        request_ids=[str(i) for i in range(count)],
        token_history=history,
        rows=rows,
        num_tokens=np.array([len(text) for text in texts]),
        num_prompt_tokens=np.ones(count, dtype=np.int64),
        max_draft=np.broadcast_to(np.asarray(most, dtype=np.int64), (count,)).copy(),
        temperatures=np.zeros(count, dtype=np.float32),
        streams=np.zeros(count, dtype=np.int64),
        hidden_states=None,
        cache_salts=None,
        length_control=None,  # type: ignore[arg-type]  # never asked
    )


def search(ends: Sequence[int] = (), **options: Any) -> PathSearch:
    return PathSearch(PathSearchOptions(**options), 2, ends)


def chosen(finder: PathSearch, batch: DraftInput, logits: Tensor) -> list[list[int]]:
    table = finder.choose(batch, np.arange(len(batch.request_ids)), logits)
    return [[token for token in row if token >= 0] for row in table.tolist()]


def trigram_probability(text: Sequence[int], before: int, last: int, token: int, q: float) -> float:
    """From the text itself: each occurrence counts 0.56, and 0.8 of that with every later one."""
    followers = [
        c for a, b, c in zip(text, text[1:], text[2:], strict=False) if (a, b) == (before, last)
    ]
    if not followers:
        return q
    weight = total = 0.0
    for age, follower in enumerate(reversed(followers)):
        total += ONCE * 0.8**age
        weight += ONCE * 0.8**age * (follower == token)
    return (weight + ONCE * q) / (total + ONCE)


def every_path(
    logits: Tensor, text: Sequence[int], most: int, ends: Sequence[int], options: PathSearchOptions
) -> dict[tuple[int, ...], float]:
    """Score of every path through the lattice, by its definition."""
    q = torch.softmax(logits.double(), dim=-1)
    columns: list[list[int]] = []
    for law in q[:most]:
        order = law.argsort(descending=True, stable=True).tolist()
        kept, mass = [], 0.0
        for token in order[: options.max_candidates]:
            if mass >= options.mass:
                break
            kept.append(token)
            mass += float(law[token])
        columns.append(kept + [end for end in ends if end not in kept])
        if any(end in kept for end in ends):
            break
    scores = {}
    for draft in itertools.product(*columns):
        stop = next((i + 1 for i, token in enumerate(draft) if token in ends), len(draft))
        path, score = draft[:stop], 0.0
        whole = [*text, *path]
        for i, token in enumerate(path):
            at = len(text) + i
            own = float(q[i, token])
            ngram = trigram_probability(text, whole[at - 2], whole[at - 1], token, own)
            score += options.draft_weight * math.log(own)
            score += (1 - options.draft_weight) * math.log(ngram)
        scores[path] = score / len(path) if options.length_normalised else score
    return scores


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("ends", [(), (END,), (END, 2)])
def test_a_wide_beam_finds_the_best_of_all_paths(ends: tuple[int, ...], normalised: bool) -> None:
    dice = np.random.default_rng(len(ends))
    lengths = set()
    for _ in range(25):
        texts = [dice.integers(0, 4, size=int(dice.integers(2, 40))).tolist() for _ in range(3)]
        logits = torch.from_numpy(dice.normal(0, 1.5, (3, 4, VOCABULARY))).float()
        options = {
            "beam": EVERYTHING,
            "mass": float(dice.uniform(0.3, 1)),
            "max_candidates": int(dice.integers(1, 5)),
            "draft_weight": float(dice.uniform(0, 1)),
            "length_normalised": normalised,
        }
        most = dice.integers(1, 5, size=3)
        finder = search(ends, **options)
        for i, path in enumerate(chosen(finder, step(texts, most), logits)):
            scores = every_path(logits[i], texts[i], most[i], ends, finder.options)
            best = max(scores.values())
            assert scores[tuple(path)] == pytest.approx(best, abs=1e-4)
            lengths.add(len(path))
    assert len(lengths) > 2


def test_a_narrow_beam_may_miss_it_and_never_beats_it() -> None:
    dice, missed = np.random.default_rng(1), 0
    for _ in range(30):
        text = dice.integers(0, 3, size=20).tolist()
        logits = torch.from_numpy(dice.normal(0, 0.3, (1, 4, 3))).float()
        narrow = search(beam=1, mass=1.0, draft_weight=0.1)
        [path] = chosen(narrow, step([text], 4), logits)
        scores = every_path(logits[0], text, 4, (), narrow.options)
        assert scores[tuple(path)] <= max(scores.values()) + 1e-9
        missed += scores[tuple(path)] < max(scores.values()) - 1e-4
    assert missed > 5


def test_where_the_text_says_nothing_the_most_likely_tokens_are_drafted() -> None:
    logits = torch.randn(1, 5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    [path] = chosen(search(), step([[0, 1]], 5), logits)
    assert path == logits[0].argmax(dim=-1).tolist()


def test_the_text_decides_between_likely_tokens() -> None:
    """Position by position 0 is as good as 1, but 1 0 1 0 is what the text does."""
    logits = torch.full((1, 4, VOCABULARY), -9.0)
    logits[..., 0], logits[..., 1] = 1.0, 0.9
    [path] = chosen(search(), step([[0, 1] * 6], 4), logits)
    assert path == [0, 1, 0, 1]
    assert chosen(search(draft_weight=1.0), step([[0, 1] * 6], 4), logits) == [[0, 0, 0, 0]]


def test_a_sum_favours_ending_and_a_mean_does_not() -> None:
    logits = torch.zeros(1, 4, VOCABULARY)
    logits[:, :, :3] = 3.0
    logits[:, 1, END] = 2.6
    batch = step([[5, 4]], 4)
    [summed] = chosen(search((END,), length_normalised=False, mass=0.7), batch, logits)
    [mean] = chosen(search((END,), mass=0.7), batch, logits)
    assert summed[-1] == END
    assert len(summed) < len(mean) == 4


def test_the_lattice_keeps_the_mass_and_the_ends() -> None:
    law = torch.tensor([[0.5, 0.25, 0.15, 0.06, 0.04], [0.1, 0.1, 0.1, 0.1, 0.6]])
    logits = torch.stack([law, law.flip(0)]).log()
    lattice = lattice_of(logits, torch.tensor([4]), mass=0.8, max_candidates=3)
    assert lattice.token_ids[0].tolist()[0] == [0, 1, 2, 4]
    assert lattice.token_ids[0, 1, 0] == 4
    assert lattice.token_ids[0, 1, 3] == -1  # there already
    assert lattice.lengths.tolist() == [2, 1]  # the end is among the likeliest
    assert np.exp(lattice.log_probabilities[0, 0]) == pytest.approx([0.5, 0.25, 0.15, 0.04])
    assert lattice_of(logits, torch.tensor([]).long(), 0.5, 3).token_ids[0, 0].tolist() == [
        0,
        -1,
        -1,
    ]


def test_tokens_that_cannot_be_drafted_are_no_candidates() -> None:
    logits = torch.zeros(1, 2, 4)
    logits[..., 3], logits[..., 1] = -torch.inf, -torch.inf
    lattice = lattice_of(logits, torch.tensor([3]), mass=1.0)
    assert {token for token in lattice.token_ids.flatten().tolist() if token >= 0} == {0, 2}
    assert lattice.lengths.tolist() == [2]


def test_requests_that_may_not_draft_get_nothing() -> None:
    logits = torch.randn(2, 3, VOCABULARY)
    finder = search()
    assert chosen(finder, step([[1, 2, 3], [1, 2]], [0, 2]), logits)[0] == []


@given(st.lists(st.integers(0, 2), min_size=1, max_size=300), st.data())
@settings(max_examples=40, deadline=None)
def test_texts_read_in_parts_weigh_what_they_weigh_at_once(text: list[int], data: Any) -> None:
    whole, parts = TrigramTexts(1), TrigramTexts(1)
    history = np.array([text], dtype=np.int32)
    zero = np.zeros(1, dtype=np.int64)

    def read(texts: TrigramTexts, count: int) -> np.ndarray[Any, Any]:
        [slot] = texts.read(["a"], history, zero, zero + count).tolist()
        every = np.array(list(itertools.product(range(3), repeat=3)), dtype=np.int32)
        found = np.zeros(len(every), dtype=np.float32)
        memory = texts.memory
        shares(int(memory.addresses[slot]), int(memory.capacities[slot]), every, found)
        return found

    at = 0
    while at < len(text):
        at = data.draw(st.integers(at + 1, len(text)))
        found = read(parts, at)
    np.testing.assert_allclose(found, read(whole, len(text)), rtol=1e-6)
    # Another text under the name: all that was learned is dropped.
    changed = [(token + 1) % 3 for token in text]
    history[0] = changed
    np.testing.assert_allclose(read(parts, len(text)), read(TrigramTexts(1), len(text)), rtol=1e-6)


def test_finished_requests_are_forgotten_and_more_than_expected_served() -> None:
    finder = search()
    texts = [[i % 3, 1, 2, 0, 1, 2, 0] for i in range(5)]
    logits = torch.randn(5, 3, VOCABULARY, generator=torch.Generator().manual_seed(2))
    first = chosen(finder, step(texts, 3), logits)
    names = [str(i) for i in range(5)]
    finder.finish(names)
    finder.finish(["never seen"])
    assert finder._texts.memory.num_bytes == 0
    assert chosen(finder, step(texts, 3), logits) == first
