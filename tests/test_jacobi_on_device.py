"""`jacobi` on the device: from one state, the tokens and laws that it drafts on the host."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from vllm_spec_plugins.proposers.jacobi import Jacobi, JacobiOptions

from vllm_spec_plugins.device_drafting import DeviceDraft, DeviceDraftInput
from vllm_spec_plugins.proposer import Draft, DraftInput
from vllm_spec_plugins.target_rows import DeviceTargetRows, TargetRows
from vllm_spec_plugins.testing import toy_context

VOCABULARY, K, SLOTS, LONGEST = 12, 4, 5, 64
CONTEXT = replace(toy_context(VOCABULARY, K), max_num_requests=SLOTS)


def proposer_of(**options: Any) -> Jacobi:
    parsed = JacobiOptions(**options)
    Jacobi.check(parsed, CONTEXT.facts)
    return Jacobi(parsed, CONTEXT)


def test_rows_past_the_token_a_verification_ended_with() -> None:
    """Three tokens verified of each: all drafted, rejected; two drafted, one accepted; none."""
    rows = DeviceTargetRows.after(
        torch.arange(9.0).unsqueeze(1),
        100 + torch.arange(3.0).unsqueeze(1),
        torch.tensor([3, 3, 3]),
        torch.tensor([3, 2, 0]),
        torch.tensor([0, 1, 0]),
    )
    assert rows.counts.tolist() == [3, 1, 0]
    taken = rows.take(3).squeeze(2)
    assert taken[0].tolist() == [1, 2, 100]
    assert taken[1, 0] == 5


@dataclass
class Engine:
    """Texts in slots, verified at random, drafted for by two proposers.

    Attributes:
        host: Asked with what the host knows.
        device: Asked with tensors.
        temperatures: Which its requests have.
    """

    host: Jacobi
    device: Jacobi
    temperatures: tuple[float, ...]
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    drafted: int = 0
    redrawn: int = 0

    def __post_init__(self) -> None:
        self.texts = self.random.integers(0, VOCABULARY, (SLOTS, LONGEST)).astype(np.int32)
        self.num_tokens = np.full(SLOTS, 5)
        self.temperature_of = np.resize(np.array(self.temperatures, dtype=np.float32), SLOTS)
        #: Requests that have been in each slot.
        self.entered = np.ones(SLOTS, dtype=np.int64)
        self.is_fresh = np.ones(SLOTS, dtype=np.bool_)
        #: Draft tokens of each slot that are verified in the next step.
        self.num_draft = np.zeros(SLOTS, dtype=np.int64)

    def step(self, active: list[int]) -> None:
        slots = np.array(active)
        drafted = self.num_draft[slots]
        accepted = self.random.integers(0, drafted + 1)
        logits = torch.from_numpy(
            2 * self.random.standard_normal((len(slots), K + 1, VOCABULARY))
        ).float()
        self.num_tokens[slots] += accepted + 1
        most = self.random.integers(0, K + 1, len(slots))
        draft = self.ask_host(slots, most, logits, drafted, accepted)
        found = self.ask_device(slots, most, logits, drafted, accepted)
        same(draft, found, most)
        self.drafted += int(most.sum())
        self.redrawn += int(np.minimum(most, drafted - accepted).sum())
        self.is_fresh[slots] = False
        # The scheduler may cut; a text at its end makes room for another.
        self.num_draft[slots] = self.random.integers(0, most + 1)
        for slot in slots[self.num_tokens[slots] > LONGEST - 2 * K]:
            self.begin(int(slot))

    def begin(self, slot: int) -> None:
        """Another request in this slot."""
        self.host.finish([self.name(slot)])
        self.entered[slot] += 1
        self.is_fresh[slot], self.num_tokens[slot], self.num_draft[slot] = True, 5, 0

    def name(self, slot: int) -> str:
        return f"{slot} {self.entered[slot]}"

    def ask_host(self, slots: Any, most: Any, logits: Any, drafted: Any, accepted: Any) -> Draft:
        sent = [logits[i, : n + 1] for i, n in enumerate(drafted)]
        rows = TargetRows.after(
            torch.cat([part[:-1] for part in sent]),
            torch.stack([part[-1] for part in sent]),
            drafted,
            accepted,
            np.arange(len(slots)),
        )
        return self.host.propose(
            DraftInput(
                request_ids=[self.name(slot) for slot in slots],
                token_history=self.texts,
                rows=slots,
                num_tokens=self.num_tokens[slots],
                num_prompt_tokens=np.ones(len(slots), dtype=np.int64),
                max_draft=most,
                temperatures=self.temperature_of[slots],
                streams=self.entered[slots] * SLOTS + slots,
                hidden_states=None,
                cache_salts=None,
                length_control=None,  # pyright: ignore[reportArgumentType]  # never asked
                target_rows=rows if drafted.any() else None,
            )
        )

    def ask_device(
        self, slots: Any, most: Any, logits: Any, drafted: Any, accepted: Any
    ) -> DeviceDraft:
        """K tokens of each were verified, whatever was drafted."""
        rows = DeviceTargetRows.after(
            logits[:, :-1].flatten(0, 1),
            logits[:, -1],
            torch.full((len(slots),), K),
            torch.from_numpy(drafted),
            torch.from_numpy(accepted),
        )
        given = self.num_tokens[slots]
        return self.device.propose_on_device(
            DeviceDraftInput(
                token_ids=torch.from_numpy(self.texts),
                slots=torch.from_numpy(slots),
                fresh=torch.from_numpy(self.is_fresh[slots]),
                num_tokens=torch.from_numpy(given),
                num_prompt_tokens=torch.ones(len(slots), dtype=torch.int64),
                max_draft=torch.from_numpy(most),
                temperatures=torch.from_numpy(self.temperature_of[slots]),
                streams=torch.from_numpy(self.entered[slots] * SLOTS + slots),
                num_speculative_tokens=K,
                rows=slots,
                is_fresh=self.is_fresh[slots],
                most_tokens=given,
                temperatures_on_host=self.temperature_of[slots],
                target_rows=rows if drafted.any() else None,
            )
        )


def same(expected: Draft, found: DeviceDraft, most: Any) -> None:
    wanted = torch.as_tensor(expected.token_ids)
    width = wanted.shape[1]
    assert found.token_ids[:, :width].tolist() == wanted.tolist()
    assert (found.token_ids[:, width:] == -1).all()
    if (law := expected.probabilities) is None:
        assert found.probabilities is None
        return
    assert found.probabilities is not None
    assert law.sampled is not None
    assert found.probabilities.sampled is not None
    there = torch.arange(width) < torch.from_numpy(most).unsqueeze(1)
    sampled = found.probabilities.sampled[:, :width]
    assert (sampled == law.sampled)[there].all()
    drawn = law.sampled & there
    torch.testing.assert_close(found.probabilities.values[:, :width][drawn], law.values[drawn])
    if law.vocabulary is not None:
        assert found.probabilities.vocabulary is not None
        ids = found.probabilities.vocabulary[:, :width]
        assert torch.equal(ids[drawn], law.vocabulary[drawn])


def engine(temperatures: tuple[float, ...], **options: Any) -> Engine:
    return Engine(proposer_of(**options), proposer_of(**options), temperatures)


def run(texts: Engine, steps: int = 60) -> None:
    for step in range(steps):
        # Not everybody is in every step, and rows change places.
        chosen = texts.random.permutation(SLOTS)[: 1 + (step + 3) % SLOTS]
        texts.step(chosen.tolist())
        if step % 11 == 10:
            texts.begin(step % SLOTS)
    assert texts.entered.sum() > 2 * SLOTS
    assert texts.redrawn > 50
    assert texts.drafted > texts.redrawn


@pytest.mark.parametrize("temperatures", [(1.0,), (0.0,), (0.0, 0.7, 1.3)], ids=str)
@pytest.mark.parametrize("coupling", ["none", "maximal", "gumbel"])
@pytest.mark.parametrize("draft_top_k", [1024, 5])
def test_the_same_drafts_as_on_the_host(
    coupling: str, draft_top_k: int, temperatures: tuple[float, ...]
) -> None:
    run(engine(temperatures, coupling=coupling, draft_top_k=draft_top_k))


@pytest.mark.parametrize(
    "filler",
    [
        {"filler": "random"},
        {"filler": "above", "image_row_length": 3, "image_token_range": (4, 10)},
        {"filler": "above", "image_row_length": 7, "image_token_range": (4, 10)},
    ],
    ids=str,
)
def test_the_same_fillers_as_on_the_host(filler: dict[str, Any]) -> None:
    run(engine((0.0, 0.7, 1.3), **filler))


def as_long_as_before(texts: Engine, steps: int) -> None:
    """Slots change hands, and the next request stands where the last one did."""
    for _ in range(steps):
        texts.step(list(range(SLOTS)))
        slot = int(texts.random.integers(SLOTS))
        length = texts.num_tokens[slot]
        texts.begin(slot)
        texts.num_tokens[slot] = length
        texts.num_draft[slot] = K


def test_what_a_slot_held_before_is_forgotten() -> None:
    as_long_as_before(engine((1.0,), coupling="maximal"), steps=15)


def test_it_would_be_noticed_if_it_was_not() -> None:
    """Negative control."""
    texts = engine((1.0,), coupling="maximal")
    propose = texts.device.propose_on_device
    texts.device.propose_on_device = lambda batch: propose(  # type: ignore[method-assign]
        replace(batch, fresh=torch.zeros_like(batch.fresh))
    )
    with pytest.raises(AssertionError):
        as_long_as_before(texts, steps=15)
