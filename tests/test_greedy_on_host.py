"""Greedy steps on the CPU: compiled, lazily, what the PyTorch route says of every mismatch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vllm_spec_plugins.codebook_neighbours import NeighbourCard, write_neighbours
from vllm_spec_plugins.compiled_rows import MAXIMUM_OF
from vllm_spec_plugins.context import EngineContext, ModelFacts
from vllm_spec_plugins.judge_head import NORM_STATE, JudgeCard, JudgeHead
from vllm_spec_plugins.registry import Kind, installed
from vllm_spec_plugins.relaxed_rule import RelaxedRule
from vllm_spec_plugins.verifier import Verification, VerifyInput
from vllm_spec_plugins.vocabulary_passes import argmax_and_maxima

HIDDEN, NUM_DRAFT = 16, 5
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "threshold": ("threshold", {"min_log_probability": -3.0}),
    "threshold, lax": ("threshold", {"min_log_probability": -9.0}),
    "top_k_relaxed": ("top_k_relaxed", {"k": 4, "delta": 0.1}),
    "top_k_relaxed, far": ("top_k_relaxed", {"k": 200, "delta": 0.5}),
    "fly": ("fly", {"window_size": 1}),
    "fly, of one": ("fly", {"window_size": 2, "entropy_top_k": 1, "entropy_threshold": 0.2}),
    "judge": ("judge", {"never_judge": [3, 5]}),
    "lantern": ("relaxed_visual", {"rule": "lantern", "budget": 0.1}),
    "lantern++": ("relaxed_visual", {"rule": "lantern++", "factor": 3.0}),
    "clusters": ("relaxed_visual", {"rule": "clusters", "cluster_size": 7}),
}
Build = Callable[..., RelaxedRule]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("tables")

    def make(name: str, vocab_size: int, **more: Any) -> RelaxedRule:
        verifier, options = RULES[name]
        options = {**options, **more}
        facts = ModelFacts("any", vocab_size, HIDDEN, 1, 4096, NUM_DRAFT)
        if verifier == "judge":
            options["head"] = write_head(folder / f"head_{vocab_size}", vocab_size)
        if verifier == "relaxed_visual":
            first = vocab_size // 4
            options["image_token_range"] = [first, vocab_size]
            options["neighbours"] = write_table(folder / f"{vocab_size}", vocab_size - first)
        plugin = installed().load(Kind.VERIFIER, verifier)
        context = EngineContext(facts, torch.device("cpu"), max_num_requests=32, seed=0)
        return plugin(plugin.Options.model_validate_json(json.dumps(options)), context)

    return make


def write_head(path: Path, vocab_size: int) -> str:
    """A head that lets every second token stand."""
    card = JudgeCard("any", HIDDEN, 1, vocab_size, 1, NORM_STATE, "float32", 0.5, [], "", {})
    weight = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0))
    JudgeHead(card, weight, torch.zeros(1), torch.tensor([2]), {}).write(path)
    return str(path)


def write_table(path: Path, codes: int) -> str:
    """Neighbours of each code are the codes after it; every third has few."""
    table = (torch.arange(codes).unsqueeze(1) + torch.arange(1, 13)) % codes
    table[::3, 4:] = codes
    write_neighbours(path, NeighbourCard(codes, 12, 2, None, 0, "", "none"), table)
    return str(path)


def ragged_step(vocab_size: int, seed: int) -> VerifyInput:
    """Greedy requests with 0 to 5 draft tokens: the best, nearly the best, any, none.

    Logits are peaked or flat, -inf in places or nearly everywhere, and rounded, so that there are
    equals.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    lengths = torch.randint(NUM_DRAFT + 1, (9,), generator=generator)
    count = int(lengths.sum())
    logits = torch.randn(count + 9, vocab_size, generator=generator)
    scale = torch.randint(4, (len(logits), 1), generator=generator)
    logits *= torch.tensor([0.1, 1.0, 2.5, 6.0])[scale]
    likely = torch.randint(vocab_size, (len(logits), 20), generator=generator)
    logits.scatter_add_(1, likely, random(*likely.shape) * 9 * (random(len(logits), 1) < 0.7))
    coarse = (random(len(logits), 1) < 0.3).expand_as(logits)
    logits = torch.where(coarse, (logits * 2).round() / 2, logits)
    logits[random(*logits.shape) < 0.1] = -torch.inf
    few = random(*logits.shape) < 0.9
    logits[few & (random(len(logits), 1) < 0.1)] = -torch.inf
    target, bonus = logits.split([count, 9])
    rank = (random(count, 1) ** 3 * 8).long()
    drafts = target.topk(8, dim=1).indices.gather(1, rank).squeeze(1)
    # Beside the most likely token, where codes may be neighbours.
    beside = (target.argmax(dim=1) - torch.randint(6, (count,), generator=generator)).clamp(min=0)
    drafts = torch.where(random(count) < 0.3, beside, drafts)
    drafts[random(count) < 0.05] = -1
    return VerifyInput(
        [str(i) for i in range(9)],
        target.contiguous(),
        bonus.contiguous(),
        drafts,
        lengths,
        None,
        torch.zeros(9),
        torch.arange(9),
        torch.zeros(9, dtype=torch.int64),
        torch.randn(count, HIDDEN, generator=generator),
        max_num_draft=int(lengths.max()),
        all_greedy=True,
        any_greedy=True,
        constrained=random(9) < 0.2,
    )


def in_pytorch(rule: RelaxedRule, batch: VerifyInput) -> Verification:
    """The same step by the route of other devices: all mismatches, nothing compiled."""
    eager = replace(batch)
    eager.__dict__["span_maxima"] = None
    return rule.verify(eager)


def assert_same(found: Verification, expected: Verification) -> None:
    assert torch.equal(found.accepted, expected.accepted)
    assert torch.equal(found.token_ids, expected.token_ids)
    assert found.extra_acceptance is not None
    assert expected.extra_acceptance is not None
    assert torch.equal(found.extra_acceptance, expected.extra_acceptance)


@pytest.mark.parametrize("vocab_size", [40, 3000])
@pytest.mark.parametrize("name", RULES)
def test_lazy_and_eager_steps_are_the_same(name: str, vocab_size: int, build: Build) -> None:
    rule, forgiven, refused = build(name, vocab_size), 0, 0
    for seed in range(40):
        batch = ragged_step(vocab_size, seed)
        found = rule.verify(batch)
        assert_same(found, in_pytorch(rule, batch))
        assert found.extra_acceptance is not None
        forgiven += int(found.extra_acceptance.sum())
        refused += int((found.accepted < batch.num_draft).sum())
    assert refused > 100
    assert forgiven > 4


@pytest.mark.parametrize("name", ["threshold", "fly", "judge", "lantern++"])
def test_limits_are_spent_alike(name: str, build: Build) -> None:
    lazy, eager = (build(name, 3000, max_total_variation=0.02) for _ in range(2))
    free, held_back = build(name, 3000), 0
    for seed in range(30):
        batch = ragged_step(3000, seed)
        found = lazy.verify(batch)
        assert_same(found, in_pytorch(eager, batch))
        assert lazy._accounts._sums == eager._accounts._sums
        held_back += int((found.accepted < free.verify(batch).accepted).sum())
    assert held_back > 5


@pytest.mark.parametrize("name", RULES)
def test_a_step_without_drafts_is_a_bonus_token_each(name: str, build: Build) -> None:
    batch = ragged_step(300, 0)
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = replace(
        batch,
        target_logits=batch.target_logits[nothing],
        draft_token_ids=nothing,
        hidden_states=torch.zeros(0, HIDDEN),
        num_draft=torch.zeros(9, dtype=torch.int64),
        max_num_draft=0,
    )
    found = build(name, 300).verify(batch)
    assert found.token_ids.tolist() == batch.bonus_logits.argmax(dim=1, keepdim=True).tolist()


def row_of(logits: Tensor, draft: int) -> VerifyInput:
    """One draft token of one greedy request."""
    batch = ragged_step(len(logits), 0)
    one = torch.ones(1, dtype=torch.int64)
    return replace(
        batch.select(torch.tensor([0]), torch.tensor([0])),
        target_logits=logits.unsqueeze(0),
        draft_token_ids=one * draft,
        num_draft=one,
        max_num_draft=1,
        constrained=None,
    )


@pytest.mark.parametrize("rest", [-12.0, -2.0, 0.9, 1.5])
def test_bounds_and_whole_rows_agree_at_the_bar(rest: float, build: Build) -> None:
    """A logit is moved past the bar in small steps, before tails that bounds see or do not."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.full((5000,), rest) + 0.1 * torch.rand(5000, generator=generator)
    logits[7] = 8.0
    others = torch.cat([logits[:9], logits[10:]]).double().exp().sum()
    rule, accepted = build("threshold", 5000), []
    for distance in (-0.3, -0.01, -0.001, 0.001, 0.01, 0.3):
        # p = e^-3 at the distance 0.
        odds = math.exp(-3.0 + distance) / (1 - math.exp(-3.0 + distance))
        logits[9] = float(others.log()) + math.log(odds)
        accepted.append(int(rule.verify(row_of(logits.clone(), 9)).accepted))
    assert accepted == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("width", [1, MAXIMUM_OF - 1, MAXIMUM_OF, MAXIMUM_OF + 1, 1000])
def test_the_largest_of_rows_and_spans_are_those_of_numpy(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn(60, width, generator=generator) * 3
    logits[10:20] = logits[10:20].round()  # equals, 0 and -0 among them
    logits[20:30] = -logits[20:30].abs()
    logits[30:40][torch.rand(10, width, generator=generator) < 0.5] = -torch.inf
    logits[40] = -torch.inf
    logits[41] = torch.inf
    logits[42:50].abs_().neg_()[:, width // 2] = 0.0
    logits[50:60] = logits[50:60].round() * 0.0
    ids, maxima = argmax_and_maxima(logits)
    assert np.array_equal(ids.numpy(), logits.numpy().argmax(axis=1))
    spans = -(-width // MAXIMUM_OF)
    padded = torch.nn.functional.pad(logits, (0, spans * MAXIMUM_OF - width), value=-torch.inf)
    assert torch.equal(maxima, padded.unflatten(1, (spans, MAXIMUM_OF)).amax(dim=2))
    for bad in (torch.nan, -torch.nan):
        logits[torch.arange(60), torch.randint(width, (60,), generator=generator)] = bad
        ids, _ = argmax_and_maxima(logits)
        assert np.array_equal(ids.numpy(), logits.numpy().argmax(axis=1))


@pytest.mark.parametrize("name", RULES)
def test_what_is_no_number_is_refused(name: str, build: Build) -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0))
    logits[200] = torch.nan
    assert int(build(name, 300).verify(row_of(logits, 201)).accepted) == 0
