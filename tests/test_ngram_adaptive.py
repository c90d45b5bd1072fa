"""`ngram_adaptive` against a brute-force drafter, and through a request's life."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from vllm_spec_plugins.proposers.ngram_adaptive import NgramAdaptive, NgramAdaptiveOptions

from vllm_spec_plugins.context import EngineContext, ModelFacts
from vllm_spec_plugins.errors import ConfigError
from vllm_spec_plugins.proposer import DraftInput, Needs

K = 6
FACTS = ModelFacts("model", 1000, 64, 2, 4096, K)


def proposer(slots: int = 4, **options: object) -> NgramAdaptive:
    context = EngineContext(FACTS, torch.device("cpu"), slots, 0)
    return NgramAdaptive(NgramAdaptiveOptions.model_validate(options), context)


def batch(
    texts: dict[str, list[int]],
    prompts: dict[str, int] | None = None,
    max_draft: int | list[int] = K,
    salts: list[str] | None = None,
    table: NDArray[np.int32] | None = None,
) -> DraftInput:
    """One step. What the table holds beyond each text is junk that must not be read."""
    requests = len(texts)
    if table is None:
        table = np.full((requests, 800), 999, dtype=np.int32)
    for row, text in enumerate(texts.values()):
        table[row, : len(text)] = text
    prompts = prompts or {}
    return DraftInput(
        request_ids=list(texts),
        token_history=table,
        rows=np.arange(requests),
        num_tokens=np.array([len(text) for text in texts.values()]),
        num_prompt_tokens=np.array([prompts.get(name, 1) for name in texts]),
        max_draft=np.broadcast_to(max_draft, requests).astype(np.int64),
        temperatures=np.zeros(requests, dtype=np.float32),
        streams=np.arange(requests),
        hidden_states=None,
        cache_salts=salts,
        length_control=None,  # pyright: ignore[reportArgumentType]
    )


def drafts(source: NgramAdaptive, *args: object, **keys: object) -> list[list[int]]:
    """Drafts without their -1s, which must come last."""
    token_ids = np.asarray(source.propose(batch(*args, **keys)).token_ids)  # pyright: ignore
    rows = []
    for row in token_ids.tolist():
        kept = [token for token in row if token != -1]
        assert row == kept + [-1] * (len(row) - len(kept))
        rows.append(kept)
    return rows


def brute_draft(text: list[int], most: int, max_match: int) -> list[int]:
    """Longest suffix of text and draft that came before, its successors' vote, again."""
    context = list(text)
    for _ in range(most):
        for length in range(min(max_match, len(context)), 0, -1):
            suffix = context[-length:]
            ends = [
                end
                for end in range(length - 1, len(text) - 1)
                if text[end - length + 1 : end + 1] == suffix
            ]
            if ends:
                counts: dict[int, tuple[int, int]] = {}
                for end in ends:
                    count, _ = counts.get(text[end + 1], (0, 0))
                    counts[text[end + 1]] = (count + 1, end)
                context.append(max(counts, key=lambda token: counts[token]))
                break
        else:
            break
    return context[len(text) :]


TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=100)
EVERYTHING = {"min_acceptance": 0.0, "max_match": 5}


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_drafts_are_the_brute_force_ones(text):
    assert drafts(proposer(**EVERYTHING), {"a": text}) == [brute_draft(text, K, 5)]


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.lists(st.integers(1, 30), max_size=12))
def test_any_split_into_steps_gives_the_same_drafts(text, steps):
    """With the learnt estimate, which decides how long the draft is."""
    split = proposer()
    seen = 0
    for step in steps:
        seen = min(seen + step, len(text))
        drafts(split, {"a": text[:seen]})
    assert drafts(split, {"a": text}) == drafts(proposer(), {"a": text})


def test_an_independent_request_beside_it_changes_nothing():
    text, other = [1, 2, 3, 4, 1, 2, 3], [7, 8, 7, 8, 7]
    together = drafts(proposer(**EVERYTHING), {"a": text, "b": other})
    assert together == [
        *drafts(proposer(**EVERYTHING), {"a": text}),
        *drafts(proposer(**EVERYTHING), {"b": other}),
    ]


def test_nothing_is_drafted_where_nothing_matches():
    assert drafts(proposer(**EVERYTHING), {"a": [1, 2, 3, 4]}) == [[]]
    assert drafts(proposer(**EVERYTHING), {"a": [5]}) == [[]]


def test_the_majority_wins_and_the_latest_among_equals():
    one_two = {"min_acceptance": 0.0, "max_match": 4}
    assert drafts(proposer(**one_two), {"a": [1, 2, 1, 2, 1, 3, 1]}, max_draft=1) == [[2]]
    assert drafts(proposer(**one_two), {"a": [1, 2, 5, 1, 3, 6, 1]}, max_draft=1) == [[3]]


def test_a_draft_runs_on_past_the_end_of_the_text():
    assert drafts(proposer(**EVERYTHING), {"a": [1, 2, 3, 1, 2, 3, 1]}) == [[2, 3, 1, 2, 3, 1]]


def test_each_request_has_its_own_limit():
    text = [1, 2, 3, 4, 5, 6, 7, 8, 1]
    found = drafts(proposer(**EVERYTHING), {"a": text, "b": text, "c": text}, max_draft=[2, 0, 5])
    assert [len(row) for row in found] == [2, 0, 5]
    assert drafts(proposer(), {"a": text}, max_draft=0) == [[]]
    assert len(drafts(proposer(**EVERYTHING), {"a": text}, max_draft=K + 100)[0]) == K
    assert drafts(proposer(), {}) == []


def test_drafts_end_where_acceptance_is_not_expected():
    text = [1, 2, 3, 4, 5, 6, 7, 1, 8, 9, 1]
    assert drafts(proposer(min_acceptance=0.9), {"a": text}) == [[]]
    long = list(range(30)) * 4
    assert drafts(proposer(min_acceptance=0.9), {"a": long}) == [list(range(K))]


def test_requests_learn_whether_their_matches_can_be_trusted():
    generator = np.random.default_rng(0)
    # Every token comes twice, and what followed it first never follows it again.
    misleading = [500, 501, *range(400), *generator.permutation(400)[::2].tolist(), 500]
    # Whatever came before comes again.
    copies = [500, 501, *range(400), *range(200), 500]
    for text, learnt in ((misleading, []), (copies, [501])):
        step = ({"a": text}, None, 1)
        assert drafts(proposer(min_acceptance=0.18), *step) == [learnt]
        assert drafts(proposer(min_acceptance=0.18, adaptation=False), *step) == [[501]]


def test_a_request_that_may_not_draft_takes_no_memory():
    source = proposer()
    drafts(source, {"a": [1, 2, 1], "b": [1, 2, 1]}, max_draft=[0, 0])
    assert source.num_bytes == 0


def test_only_the_verified_text_is_read():
    """The table's columns past the text hold rejected drafts; they stay out of the index."""
    table = np.full((1, 64), 3, dtype=np.int32)
    text = [1, 2, 9, 8, 1, 2]
    source = proposer(**EVERYTHING)
    source.propose(batch({"a": text[:3]}, table=table))
    table[0, 3:] = [1, 2, 7] * 20 + [1]
    assert drafts(source, {"a": text}, table=table) == drafts(proposer(**EVERYTHING), {"a": text})


def test_a_preempted_request_comes_back():
    source = proposer(**EVERYTHING)
    text = [1, 2, 3, 4, 1, 2]
    first = drafts(source, {"a": text})
    source.finish(["a", "never seen"])
    assert source.num_bytes == 0
    assert drafts(source, {"a": text}) == first


@pytest.mark.parametrize("text", [[1, 2, 3], [7, 8, 9, 7, 8, 9, 7, 8], [9, 8, 7, 6, 9, 8]])
def test_an_id_with_another_history_is_indexed_anew(text):
    source = proposer(**EVERYTHING)
    drafts(source, {"a": [1, 2, 3, 4, 1, 2]})
    assert drafts(source, {"a": text}) == drafts(proposer(**EVERYTHING), {"a": text})


def test_more_requests_than_the_engine_said_and_longer_texts_than_expected():
    source = proposer(slots=1, **EVERYTHING)
    texts = {str(i): [i, i + 1, i + 2] * 100 + [i] for i in range(9)}
    for length in (10, 200, 301):
        found = drafts(source, {name: text[:length] for name, text in texts.items()})
    assert found == [drafts(proposer(**EVERYTHING), {"a": t})[0] for t in texts.values()]


@pytest.mark.parametrize("how", ["strided", "read-only", "int64", "transposed"])
def test_histories_of_every_layout(how):
    text = [1, 2, 3, 4, 5, 1, 2]
    table = np.full((1, 64), 999, dtype=np.int32)
    if how == "strided":
        table = np.full((3, 128), 999, dtype=np.int32)[:1, 3:90]
    elif how == "transposed":
        table = np.full((64, 1), 999, dtype=np.int32).T
    step = batch({"a": text}, table=table)
    if how == "read-only":
        table.flags.writeable = False
    elif how == "int64":
        object.__setattr__(step, "token_history", table.astype(np.int64))
    found = proposer(**EVERYTHING).propose(step).token_ids
    assert np.asarray(found)[0].tolist() == brute_draft(text, K, 5)


def test_nothing_compiles_while_serving():
    source = proposer(shared_index=True)
    source.warm_up()
    before = [len(kernel.signatures) for kernel in _kernels(source)]
    table = np.full((2, 900), 1, dtype=np.int32)[:, :850]
    table.flags.writeable = False
    for length in (2, 40, 800):
        step = batch({"a": [1], "b": [1]}, table=table.copy(), salts=["x", "y"])
        object.__setattr__(step, "token_history", table)
        step.num_tokens[:] = length
        source.propose(step)
    source.trigram_shares("a", np.ones((5, 3), dtype=np.int32))
    source.finish(["a", "b"])
    assert [len(kernel.signatures) for kernel in _kernels(source)] == before


def _kernels(source: NgramAdaptive):
    kernels = source._kernels
    return [kernels.step, kernels.move, kernels.add_document, source._shares]


def test_warm_up_leaves_nothing_behind():
    source = proposer(shared_index=True)
    source.warm_up()
    assert source.num_bytes == 0


SHARED = {"min_acceptance": 0.0, "shared_index": True, "shared_index_tokens": 4096}
OUTPUT = list(range(100, 130))


def finish_one(source: NgramAdaptive, name: str, salt: str, output: list[int]) -> None:
    prompt = [1, 2, 3]
    drafts(source, {name: prompt + output}, {name: 3}, salts=[salt])
    source.finish([name])


def test_finished_outputs_are_drafted_from():
    source = proposer(**SHARED)
    finish_one(source, "a", "x", OUTPUT)
    found = source.propose(batch({"b": [9, 104, 105]}, salts=["x"]))
    assert np.asarray(found.token_ids)[0].tolist() == [106, 107, 108, 109, 110, 111]
    assert found.source_of is not None
    assert {found.sources[i] for i in found.source_of[0]} == {"shared index"}
    # Prompts are not outputs, and a text ends where it ended.
    assert drafts(source, {"c": [8, 1, 2]}, salts=["x"]) == [[]]
    assert drafts(source, {"d": [8, 127, 128]}, salts=["x"]) == [[129]]


def test_salts_are_kept_apart():
    source = proposer(**SHARED)
    finish_one(source, "a", "x", OUTPUT)
    finish_one(source, "b", "y", [104, 105, 7, 7, 7])
    texts = {"c": [9, 104, 105], "d": [9, 104, 105], "e": [9, 104, 105]}
    found = drafts(source, texts, salts=["x", "y", ""], max_draft=1)
    assert found == [[106], [7], []]


def test_shared_index_is_off_unless_asked_for():
    assert NgramAdaptive.needs_for(NgramAdaptiveOptions()) == Needs.HISTORY
    assert NgramAdaptive.needs_for(NgramAdaptiveOptions(shared_index=True)) == Needs.CACHE_SALT
    source = proposer(min_acceptance=0.0)
    drafts(source, {"a": [1, 2, 3, *OUTPUT]}, {"a": 3})
    source.finish(["a"])
    assert drafts(source, {"b": [9, 104, 105]}) == [[]]


def test_the_oldest_text_is_evicted_and_memory_stays_bounded():
    source = proposer(**SHARED)
    finish_one(source, "first", "x", OUTPUT)
    assert drafts(source, {"q": [9, 104, 105]}, max_draft=1, salts=["x"]) == [[106]]
    for number in range(40):
        finish_one(source, f"n{number}", "x", [1000 + number] * 300)
    source.finish(["q"])
    assert drafts(source, {"q": [9, 104, 105]}, max_draft=1, salts=["x"]) == [[]]
    assert drafts(source, {"r": [9, 1039, 1039]}, max_draft=1, salts=["x"]) == [[1039]]
    source.finish(["q", "r"])
    assert source.num_bytes < 4096 * 92 + 8 * 1024


def test_a_preempted_request_shares_its_output_once():
    once, twice = proposer(**SHARED), proposer(**SHARED)
    finish_one(once, "a", "", OUTPUT)
    finish_one(twice, "a", "", OUTPUT[:20])
    finish_one(twice, "a", "", OUTPUT)
    assert twice._shared.num_tokens == once._shared.num_tokens + 1  # one more separator
    assert NgramAdaptive.REMEMBERED > 0


def test_own_text_is_preferred_where_it_matches_as_far():
    source = proposer(**SHARED)
    finish_one(source, "a", "", [5, 6, 7, 8])
    assert drafts(source, {"b": [5, 6, 1, 2, 5, 6]}, max_draft=1, salts=[""]) == [[1]]


def test_impossible_options_are_refused():
    with pytest.raises(ConfigError, match="min_match"):
        NgramAdaptive.check(NgramAdaptiveOptions(min_match=9, max_match=8), FACTS)
    for wrong in ({"max_match": 1000}, {"min_acceptance": 1.0}, {"max_mach": 5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            NgramAdaptiveOptions.model_validate(wrong)


def test_listing_the_proposer_does_not_import_numba():
    code = (
        "import sys, vllm_spec_plugins.proposers.ngram_adaptive; assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_trigram_shares_of_a_request():
    source = proposer()
    drafts(source, {"a": [1, 2, 3, 9, 1, 2, 4]})
    found = source.trigram_shares("a", np.array([[1, 2, 3], [1, 2, 4], [7, 7, 7]]))
    assert found == pytest.approx([0.8 / 1.8, 1 / 1.8, 0.0], rel=1e-5)
    with pytest.raises(KeyError):
        source.trigram_shares("b", np.zeros((1, 3), dtype=np.int32))
