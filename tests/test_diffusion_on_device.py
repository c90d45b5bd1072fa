"""`diffusion` on the device: texts live as on the engine, and are drafted for as on the host."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm_spec_plugins.proposers.block_draws import draft_lengths, end_on_device
from vllm_spec_plugins.proposers.diffusion import Diffusion, DiffusionOptions

from vllm_spec_plugins.device_drafting import DeviceDraft, DeviceDraftInput
from vllm_spec_plugins.diffusion.conditioning import TargetStates
from vllm_spec_plugins.diffusion.drafter import DiffusionDrafter
from vllm_spec_plugins.diffusion.folder import DrafterConfig
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.length_control import Fixed, LengthControlOptions
from vllm_spec_plugins.proposer import Draft, DraftInput
from vllm_spec_plugins.testing import toy_context

VOCABULARY, K, SLOTS, LONGEST, END = 20, 3, 5, 96, 7
WINDOW = 16
CONTEXT = toy_context(vocab_size=VOCABULARY, num_speculative_tokens=K)
CONTEXT = replace(
    CONTEXT, max_num_requests=SLOTS, facts=replace(CONTEXT.facts, end_token_ids=(END, 99))
)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`folder_of(pattern, predicts)`: a drafter with random weights."""

    def folder_of(
        pattern: str = "block", predicts: str = "next_token", conditioned: bool = False
    ) -> Path:
        states = TargetStates("a toy", None, 2, 8, (1,)) if conditioned else None
        config = DrafterConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_layers=2,
            num_heads=2, num_key_value_heads=1, head_dim=8, max_positions=64, rope_theta=1e4,
            rms_norm_eps=1e-6, tie_word_embeddings=False, attention_bias=False,
            mask_token_id=VOCABULARY, attention_pattern=pattern, predicts=predicts,
            conditioned_on=states,
        )  # fmt: skip
        drafter, generator = DiffusionDrafter(config), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in drafter.parameters():
                if weight.ndim == 2:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4)
        folder = tmp_path_factory.mktemp("drafter")
        save_file(drafter.export(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config.as_json()))
        return folder

    return folder_of


def proposer_of(folder: Path, **options: Any) -> Diffusion:
    options = {"context_window": WINDOW, **options}
    proposer = Diffusion(DiffusionOptions(model=str(folder), **options), CONTEXT)
    proposer.load(None)  # type: ignore[arg-type]  # the target is not asked for anything
    return proposer


class Engine:
    """Requests that come, write texts, are preempted and go, in slots of one table."""

    def __init__(self, seed: int) -> None:
        self.dice = np.random.default_rng(seed)
        self.table = self.dice.integers(0, VOCABULARY, (SLOTS, LONGEST), dtype=np.int32)
        self.names: list[str | None] = [None] * SLOTS
        self.lengths = np.zeros(SLOTS, dtype=np.int64)
        self.prompts = np.zeros(SLOTS, dtype=np.int64)
        #: Most tokens of each, as the host knows.
        self.most = np.zeros(SLOTS, dtype=np.int64)
        self.fresh = np.zeros(SLOTS, dtype=np.bool_)
        self.warmth = np.zeros(SLOTS, dtype=np.float32)
        self.arrived = 0
        self.gone: list[str] = []

    def move(self) -> None:
        """Between two steps: some end, some are preempted, some come."""
        self.gone = []
        for slot, name in enumerate(self.names):
            if name is None:
                if self.dice.random() < 0.6:
                    self.enter(slot)
                continue
            chance = self.dice.random()
            if chance < 0.08 or self.lengths[slot] > LONGEST - K - 2:
                self.gone.append(name)
                self.names[slot] = None
            elif chance < 0.14:  # its text as it is, in the same slot
                self.gone.append(name)
                self.fresh[slot] = True

    def enter(self, slot: int) -> None:
        self.names[slot] = str(self.arrived)
        self.arrived += 1
        self.lengths[slot] = self.prompts[slot] = self.dice.integers(1, 40)
        self.table[slot] = self.dice.integers(0, VOCABULARY, LONGEST)
        self.fresh[slot], self.most[slot] = True, 0
        self.warmth[slot] = self.dice.choice([0, 0, 0.7, 1.3])

    def step(self) -> tuple[DeviceDraftInput, DraftInput]:
        """Some of the requests, in any order; some may not draft, as while prompts are read."""
        slots = np.flatnonzero([name is not None for name in self.names])
        slots = self.dice.permutation(slots)[: self.dice.integers(1, SLOTS + 1)]
        num_tokens, limits = self.lengths[slots], self.dice.integers(0, K + 1, len(slots))
        names = [str(self.names[slot]) for slot in slots]
        streams = np.array([int(name) << 32 for name in names])
        # The host knows a prompt's length, then that a step may have added all drafts and one more.
        fresh = self.fresh[slots]
        self.most[slots] = np.where(fresh, num_tokens, self.most[slots] + K + 1)
        self.fresh[slots] = False
        on_device = DeviceDraftInput(
            token_ids=torch.from_numpy(self.table.copy()),
            slots=torch.from_numpy(slots),
            fresh=torch.from_numpy(fresh),
            num_tokens=torch.from_numpy(num_tokens),
            num_prompt_tokens=torch.from_numpy(self.prompts[slots]),
            max_draft=torch.from_numpy(limits),
            temperatures=torch.from_numpy(self.warmth[slots]),
            streams=torch.from_numpy(streams),
            num_speculative_tokens=K,
            rows=slots,
            is_fresh=fresh,
            most_tokens=self.most[slots].copy(),
            temperatures_on_host=self.warmth[slots],
        )
        on_host = DraftInput(
            request_ids=names,
            token_history=self.table.copy(),
            rows=slots,
            num_tokens=num_tokens,
            num_prompt_tokens=self.prompts[slots],
            max_draft=limits,
            temperatures=self.warmth[slots],
            streams=streams,
            hidden_states=None,
            cache_salts=None,
            length_control=Fixed(LengthControlOptions(), CONTEXT),
        )
        # What was asked for grows; who read nothing of its prompt yet may not have.
        grown = np.where(limits > 0, self.dice.integers(1, K + 2, len(slots)), 0)
        self.lengths[slots] += grown
        return on_device, on_host


def same(found: DeviceDraft, expected: Draft) -> tuple[int, int]:
    """Tokens and laws are alike. How many tokens were drafted, and how many of them drawn."""
    wanted = torch.as_tensor(expected.token_ids)
    width = wanted.shape[1]
    assert found.token_ids.shape[1] == K
    assert found.token_ids[:, :width].tolist() == wanted.tolist()
    assert (found.token_ids[:, width:] == -1).all()
    drafted = wanted >= 0
    if expected.probabilities is None:
        return int(drafted.sum()), 0
    ours, theirs = found.probabilities, expected.probabilities
    assert ours is not None
    assert ours.sampled is not None
    assert theirs.sampled is not None
    drawn = theirs.sampled & drafted
    assert torch.equal(ours.sampled[:, :width] & drafted, drawn)

    def parts(law: DraftProbabilities) -> list[Tensor]:
        kept = [law.values] if law.vocabulary is None else [law.values, law.vocabulary]
        return [part[:, :width][drawn] for part in kept]

    torch.testing.assert_close(parts(ours), parts(theirs), rtol=1e-3, atol=1e-5)
    return int(drafted.sum()), int(drawn.sum())


def differences(
    folder: Path, seed: int, ours: Diffusion | None = None, **options: Any
) -> tuple[int, int]:
    """Drafted and drawn tokens of 60 steps, on host and device; AssertionError where they differ.

    Args:
        folder: Of the drafter.
        seed: Of what happens.
        ours: What drafts on the device.
        options: Of the proposer.
    """
    host, device = proposer_of(folder, **options), ours or proposer_of(folder, **options)
    engine, totals, wrapped = Engine(seed), np.zeros(2, dtype=np.int64), False
    for _ in range(60):
        engine.move()
        host.finish(engine.gone)
        if not any(engine.names):
            continue
        on_device, on_host = engine.step()
        found = device.propose_on_device(on_device)
        wrapped |= bool((on_host.num_tokens > WINDOW + K).any())
        if on_host.max_draft.any():
            totals += same(found, host.propose(on_host))
        else:
            assert (found.token_ids == -1).all()
    assert wrapped
    assert engine.arrived > SLOTS
    return int(totals[0]), int(totals[1])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (("block", "next_token"), {}),
        (("block", "own_token"), {"denoising_steps": 2, "draft_top_k": 6}),
        (("block", "next_token"), {"context_window": 2, "block_size": 5, "denoising_steps": 3}),
        (("full", "next_token"), {"draft_top_k": 4}),
    ],
    ids=str,
)
def test_host_and_device_draft_the_same(
    kind: tuple[str, str], options: dict[str, Any], folder_of: Callable[..., Path]
) -> None:
    """Through requests' lives: slots change hands, texts outgrow the window, some do not draft."""
    folder = folder_of(*kind)
    for seed in range(2):
        drafted, drawn = differences(folder, seed, **options)
        assert drafted > 100
        assert 30 < drawn < drafted - 30


def test_a_slot_that_is_not_forgotten_is_seen(folder_of: Callable[..., Path]) -> None:
    """Negative control."""

    class Forgetful(Diffusion):
        def propose_on_device(self, batch: DeviceDraftInput) -> DeviceDraft:
            fresh = batch.fresh & (batch.num_tokens > 99)
            return super().propose_on_device(replace(batch, fresh=fresh))

    folder = folder_of()
    ours = Forgetful(DiffusionOptions(model=str(folder), context_window=WINDOW), CONTEXT)
    ours.load(None)  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        differences(folder, 0, ours)


def test_prompts_are_read_in_parts_there_too(
    folder_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Diffusion, "TOKENS_PER_PASS", WINDOW)
    assert differences(folder_of(), 2)[0] > 100


def test_drafts_end_with_the_text() -> None:
    dice = np.random.default_rng(0)
    drafts, most = dice.integers(0, 5, (200, K)), dice.integers(0, K + 1, 200)
    for ends in ([], [3], [1, 4]):
        lengths = draft_lengths(drafts, most, np.array(ends, dtype=np.int64))
        found = end_on_device(
            torch.from_numpy(drafts),
            torch.from_numpy(most),
            torch.tensor(ends, dtype=torch.int64),
        )
        wanted = np.where(np.arange(K) < lengths[:, None], drafts, -1)
        assert found.tolist() == wanted.tolist()


def test_which_options_can(folder_of: Callable[..., Path]) -> None:
    """Not where a path is searched through texts, or the target's states are read."""

    def able(folder: Path, **options: Any) -> bool:
        return Diffusion.drafts_on_device(DiffusionOptions(model=str(folder), **options))

    assert able(folder_of())
    assert able(folder_of("full"), denoising_steps=2, draft_top_k=3, block_size=8)
    assert not able(folder_of(), drafts="path")
    assert not able(folder_of(conditioned=True))
