"""`ngram_adaptive` with `matching: device` against plain Python, and through a slot's life."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_spec_plugins.proposers.ngram_adaptive import NgramAdaptive, NgramAdaptiveOptions
from vllm_spec_plugins.proposers.ngram_device import (
    FORGETTING,
    PRIOR,
    RECENT_AT_FIRST,
    NgramDevice,
)

from vllm_spec_plugins.context import EngineContext, ModelFacts
from vllm_spec_plugins.device_drafting import DeviceDraftInput
from vllm_spec_plugins.errors import ConfigError

K, SLOTS, WIDTH = 5, 6, 130
FACTS = ModelFacts("model", 1000, 64, 2, WIDTH, K)
THRESHOLD = 0.25


def drafter(threshold: float = THRESHOLD, **options: Any) -> NgramDevice:
    return NgramDevice(
        SLOTS,
        K,
        **{"min_match": 1, "max_match": 8, **options},
        min_acceptance=threshold,
        device=torch.device("cpu"),
    )


def batch(
    texts: dict[int, list[int]],
    fresh: set[int] | None = None,
    max_draft: list[int] | None = None,
    stale: int = 7,
) -> DeviceDraftInput:
    """One step, `texts` by slot. Beyond each text the table is full of `stale`."""
    table = torch.full((SLOTS, WIDTH), stale, dtype=torch.int32)
    for slot, text in texts.items():
        table[slot, : len(text)] = torch.tensor(text, dtype=torch.int32)
    zeros = torch.zeros(len(texts), dtype=torch.int64)
    return DeviceDraftInput(
        token_ids=table,
        slots=torch.tensor(list(texts), dtype=torch.int64),
        fresh=torch.tensor([fresh is None or slot in fresh for slot in texts], dtype=torch.bool),
        num_tokens=torch.tensor([len(text) for text in texts.values()], dtype=torch.int64),
        num_prompt_tokens=zeros + 1,
        max_draft=zeros + K if max_draft is None else torch.tensor(max_draft),
        temperatures=zeros.float(),
        streams=zeros,
        num_speculative_tokens=K,
        rows=np.array(list(texts)),
        is_fresh=np.array([fresh is None or slot in fresh for slot in texts]),
        most_tokens=np.array([len(text) for text in texts.values()]),
        temperatures_on_host=np.zeros(len(texts), dtype=np.float32),
    )


def drafts(source: NgramDevice, *args: Any, **keys: Any) -> list[list[int]]:
    """Drafts without their -1s, which must come last."""
    rows = []
    for row in source.propose(batch(*args, **keys)).token_ids.tolist():
        kept = [token for token in row if token != -1]
        assert row == kept + [-1] * (K - len(kept))
        rows.append(kept)
    return rows


class Plain:
    """One request, as the documentation says it."""

    def __init__(self, max_match: int = 8, threshold: float = THRESHOLD) -> None:
        self.recent, self.known, self.predicted = RECENT_AT_FIRST, -1, [-1] * (K + 1)
        self.max_match, self.threshold = max_match, threshold

    def draft(self, text: list[int], most: int = K) -> tuple[list[int], float]:
        """The draft, and how near its end was to the threshold."""
        if self.known >= 0:
            for predicted, token in zip(self.predicted, text[self.known :], strict=False):
                right = predicted == token
                self.recent += FORGETTING * (right - self.recent)
                if not right:
                    break
        self.known = len(text)
        length, ends = self.matches(text)
        if not ends:
            self.predicted = [-1] * (K + 1)
            return [], 1.0
        latest = self.read_on(text, ends[-1])
        before = self.read_on(text, ends[-2]) if len(ends) > 1 else None
        self.predicted = latest
        expected, kept, margin = 1.0, [], 1.0
        for column in range(K):
            same = before is not None and before[: column + 1] == latest[: column + 1]
            other = before is not None and not same
            log_length = math.log(length + column)
            features = (
                1.0,
                log_length,
                math.log(len(ends)) if column == 0 else 0.0,
                (self.recent - RECENT_AT_FIRST) * log_length,
                float(same),
                float(other),
            )
            score = sum(w * x for w, x in zip(PRIOR, features, strict=True))
            expected /= 1 + math.exp(-score)
            margin = min(margin, abs(expected - self.threshold))
            if expected < self.threshold or column >= most:
                break
            kept.append(latest[column])
        return kept, margin

    def matches(self, text: list[int]) -> tuple[int, list[int]]:
        for length in range(min(self.max_match, len(text) - 1), 0, -1):
            suffix = text[len(text) - length :]
            ends = [end for end in range(length, len(text)) if text[end - length : end] == suffix]
            if ends:
                return length, ends
        return 0, []

    def read_on(self, text: list[int], position: int) -> list[int]:
        text = list(text)
        size = len(text)
        for step in range(K + 1):
            text.append(text[position + step])
        return text[size:]


TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=90)
STEPS = st.lists(st.integers(0, K + 3), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, STEPS), min_size=1, max_size=3))
def test_drafts_are_those_of_the_plain_model(requests):
    """Over several steps, of requests that grow by different numbers of tokens."""
    ours, plain = drafter(), [Plain() for _ in requests]
    known = [1 for _ in requests]
    for step in range(max(len(steps) for _, steps in requests)):
        for i, (text, steps) in enumerate(requests):
            known[i] = min(len(text), known[i] + (steps[step] if step < len(steps) else 0))
        shown = {2 * i: text[: known[i]] for i, (text, _) in enumerate(requests)}
        found = drafts(ours, shown, fresh=set(shown) if step == 0 else set())
        for i, text in enumerate(shown.values()):
            expected, margin = plain[i].draft(text)
            if margin > 1e-5:  # else rounding decides
                assert found[i] == expected


def test_the_plain_model_drafts_and_ends_drafts():
    """Control of the test above: it is neither always nothing nor always everything."""
    assert Plain().draft([1, 2, 3] * 5)[0] == [1, 2, 3, 1, 2]
    assert Plain().draft([1, 2, 3, 4, 1, 5, 6, 7, 1])[0] == []
    assert 0 < len(Plain().draft([1, 2, 3, 4, 9, 1, 2, 3])[0]) < K


def test_nothing_is_drafted_where_nothing_matches():
    everything = drafter(0.0)
    assert drafts(everything, {0: [1, 2, 3, 4], 3: [5], 4: [8, 9, 8]}) == [[], [], [9, 8, 9, 8, 9]]


def test_each_request_has_its_own_limit():
    text = [1, 2, 3, 4] * 6
    texts = dict.fromkeys(range(4), text)
    found = drafts(drafter(0.0), texts, max_draft=[2, 0, K, K + 9])
    assert [len(row) for row in found] == [2, 0, K, K]


def test_short_matches_are_not_drafted_from():
    assert drafts(drafter(0.0, min_match=2), {0: [1, 2, 9, 2]}) == [[]]
    assert drafts(drafter(0.0, min_match=2), {0: [1, 2, 9, 1, 2]}) == [[9, 1, 2, 9, 1]]


def test_what_lies_beyond_the_text_is_not_read():
    text = [1, 2, 3, 1, 2, 4, 1, 2]
    for threshold in (0.0, THRESHOLD):
        found = []
        for stale in (1, 2, 3, 999):
            source = drafter(threshold)
            first = drafts(source, {0: text[:-2]}, stale=stale)
            found.append((first, drafts(source, {0: text}, fresh=set(), stale=stale)))
        assert found.count(found[0]) == len(found)


def test_a_text_that_was_predicted_is_trusted_further():
    text = [9, 3, 7, 9, *range(20, 90), 9]
    trusting, doubting = drafter(), drafter()
    copied, strange = [1, 2, 3, 4] * 12, [5, 6, 1, 2, 3, 1, 3, 2, 4, 2, 1, 4, 3, 3, 1, 1, 2]
    for source, before in ((trusting, copied), (doubting, strange)):
        for size in range(4, len(before)):
            drafts(source, {0: before[:size]}, fresh={0} if size == 4 else set())
    shares = [float(source._recent[0]) for source in (trusting, doubting)]
    assert shares[0] > 0.7 > 0.3 > shares[1]
    # As a new request both are the same again.
    assert (
        drafts(trusting, {0: text}) == drafts(doubting, {0: text}) == drafts(drafter(), {0: text})
    )
    for source in (trusting, doubting):
        assert float(source._recent[0]) == pytest.approx(RECENT_AT_FIRST)


def test_a_slot_is_not_touched_by_others():
    text = [1, 2, 3, 4] * 5
    alone, together = drafter(), drafter()
    for size in range(3, len(text)):
        fresh = {1, 4} if size == 3 else set()
        one = drafts(alone, {1: text[:size]}, fresh=fresh)
        both = drafts(together, {4: text[size // 2 : size], 1: text[:size]}, fresh=fresh)
        assert both[1:] == one
    assert drafts(alone, {}) == []


def test_nothing_looks_at_a_value():
    """On tensors that have none: what looked would raise."""
    pytest.importorskip("triton")
    from vllm_spec_plugins.testing.offline_compile import record_launches

    meta = torch.device("meta")
    source = NgramDevice(SLOTS, K, min_match=1, max_match=32, min_acceptance=0.2, device=meta)

    def step() -> None:
        told = batch({0: [1], 2: [1, 2]})
        said = {name: getattr(told, name) for name in DeviceDraftInput.__slots__}
        there = {
            name: value.to(meta) for name, value in said.items() if isinstance(value, torch.Tensor)
        }
        draft = source.propose(replace(told, **there))
        assert draft.token_ids.shape == (2, K)
        assert draft.token_ids.dtype == torch.int32

    (launch,) = record_launches(step)
    assert launch.name == "_match_kernel"
    assert launch.grid == (2, 1)


def test_memory_is_given_out_once():
    source = drafter()
    before = [tensor.data_ptr() for tensor in vars(source).values() if torch.is_tensor(tensor)]
    drafts(source, {0: [1, 2, 1]})
    drafts(source, {0: [1, 2, 1, 2], 5: [3, 3]}, fresh={5})
    after = [tensor.data_ptr() for tensor in vars(source).values() if torch.is_tensor(tensor)]
    assert after == before


def proposer(**options: Any) -> NgramAdaptive:
    context = EngineContext(FACTS, torch.device("cpu"), SLOTS, 0)
    return NgramAdaptive(NgramAdaptiveOptions.model_validate(options), context)


def test_the_option_chooses():
    on_device, on_host = NgramAdaptiveOptions(matching="device"), NgramAdaptiveOptions()
    assert NgramAdaptive.drafts_on_device(on_device)
    assert not NgramAdaptive.drafts_on_device(on_host)
    source = proposer(matching="device", min_acceptance=0.0, max_match=4)
    source.warm_up()
    draft = source.propose_on_device(batch({0: [1, 2, 3, 1, 2]}))
    assert draft.token_ids.tolist() == [[3, 1, 2, 3, 1]]
    assert draft.probabilities is None
    source.finish(["a request"])
    text = {0: [1, 2, 3, 4, 9, 1, 2, 3]}
    by_default = proposer(matching="device").propose_on_device(batch(text))
    explicit = NgramDevice(
        SLOTS, K, min_match=1, max_match=32, min_acceptance=0.54 / math.sqrt(K),
        device=torch.device("cpu"),
    )  # fmt: skip
    assert by_default.token_ids.tolist() == explicit.propose(batch(text)).token_ids.tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shared_index": True}, "shared_index cannot"),
        ({"adaptation": True}, "adaptation cannot"),
        (
            {"shared_index": False, "shared_index_tokens": 5000},
            "shared_index, shared_index_tokens cannot .* remove them",
        ),
    ],
)
def test_options_of_the_host_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        NgramAdaptive.check(NgramAdaptiveOptions(matching="device", **options), FACTS)
    NgramAdaptive.check(NgramAdaptiveOptions(**options), FACTS)


def test_options_of_both_are_taken():
    options = NgramAdaptiveOptions(matching="device", max_match=8, min_match=2, min_acceptance=0.1)
    NgramAdaptive.check(options, FACTS)
