"""Texts of the host on the device, for proposers that draft there: slots, copies, what is new."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vllm_spec_plugins.context import EngineContext, ModelFacts
from vllm_spec_plugins.device_drafting import DeviceDraft, DeviceDraftInput
from vllm_spec_plugins.engine.device_asker import DeviceAsker
from vllm_spec_plugins.proposer import DraftInput

MAX_LEN, SLOTS, MOST = 16, 3, 4


class Keeps:
    """Stands for a proposer; keeps what it is asked with."""

    def propose_on_device(self, batch: DeviceDraftInput) -> DeviceDraft:
        self.batch = batch
        return DeviceDraft(batch.max_draft.unsqueeze(1))

    def texts(self) -> list[list[int]]:
        """What the requests asked for have said."""
        rows = zip(self.batch.slots.tolist(), self.batch.num_tokens.tolist(), strict=True)
        return [self.batch.token_ids[slot, :length].tolist() for slot, length in rows]


@pytest.fixture
def proposer() -> Keeps:
    return Keeps()


@pytest.fixture
def asker(proposer: Any) -> DeviceAsker:
    facts = ModelFacts("model", 100, 8, 1, MAX_LEN, MOST)
    return DeviceAsker(proposer, EngineContext(facts, torch.device("cpu"), SLOTS, seed=0))


def batch(texts: dict[str, list[int]], rows: list[int]) -> DraftInput:
    """The runner's table has stale tokens beyond each text, and rows in its own order."""
    history = np.full((SLOTS + 2, MAX_LEN), 99, dtype=np.int32)
    for row, text in zip(rows, texts.values(), strict=True):
        history[row, : len(text)] = text
    count = len(texts)
    return DraftInput(
        request_ids=list(texts),
        token_history=history,
        rows=np.array(rows, dtype=np.int64),
        num_tokens=np.array([len(text) for text in texts.values()], dtype=np.int64),
        num_prompt_tokens=np.full(count, 2, dtype=np.int64),
        max_draft=np.full(count, MOST, dtype=np.int64),
        temperatures=np.zeros(count, dtype=np.float32),
        streams=np.arange(count),
        hidden_states=None,
        cache_salts=None,
        length_control=None,  # pyright: ignore[reportArgumentType]
    )


def test_texts_follow_their_requests(asker: DeviceAsker, proposer: Keeps) -> None:
    asker.propose(batch({"a": [1, 2, 3], "b": [4, 5]}, rows=[0, 1]))
    assert proposer.texts() == [[1, 2, 3], [4, 5]]
    assert proposer.batch.fresh.tolist() == [True, True]
    first = proposer.batch.slots.tolist()
    # Rows move, another request comes between them, and each has said more.
    draft = asker.propose(
        batch({"b": [4, 5, 6, 7], "c": [8, 9], "a": [1, 2, 3, 1]}, rows=[4, 0, 2])
    )
    assert proposer.texts() == [[4, 5, 6, 7], [8, 9], [1, 2, 3, 1]]
    assert proposer.batch.fresh.tolist() == [False, True, False]
    assert [proposer.batch.slots.tolist()[i] for i in (2, 0)] == first
    assert isinstance(draft.token_ids, torch.Tensor)
    assert draft.token_ids.tolist() == [[MOST]] * 3


def test_only_what_is_new_is_copied(asker: DeviceAsker, proposer: Keeps) -> None:
    """Tokens that are on the device already are not read again."""
    asker.propose(batch({"a": [1, 2, 3]}, rows=[0]))
    asker.propose(batch({"a": [7, 7, 7, 4]}, rows=[0]))
    assert proposer.texts() == [[1, 2, 3, 4]]


def test_slots_are_given_back(asker: DeviceAsker, proposer: Keeps) -> None:
    """A request that comes back, or another in its slot, starts afresh."""
    for name in "abcde":
        asker.propose(batch({name: [1, 2]}, rows=[0]))
        asker.forget([name, "unknown"])
    asker.propose(batch({"a": [5, 6, 7]}, rows=[0]))
    assert proposer.texts() == [[5, 6, 7]]
    assert proposer.batch.fresh.tolist() == [True]


def test_a_text_of_the_full_length_fits(asker: DeviceAsker, proposer: Keeps) -> None:
    text = list(range(MAX_LEN))
    asker.propose(batch({"a": text, "b": text[:1]}, rows=[1, 0]))
    assert proposer.texts() == [text, [0]]
