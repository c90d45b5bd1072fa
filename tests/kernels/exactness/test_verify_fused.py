"""`verify_fused` decides as its reference: always in float64, and in what the engine hands over."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm_spec_plugins.triton_kernels.dispatch import INTERPRETED, tl, triton
from vllm_spec_plugins.triton_kernels.relaxations import (
    DraftLogits,
    GivenAcceptance,
    GroupSum,
    Judge,
    NeighbourSum,
)
from vllm_spec_plugins.triton_kernels.verify_fused import LaunchShape, verify_fused
from vllm_spec_plugins.triton_kernels.verify_kernels import uniform
from vllm_spec_plugins.triton_kernels.verify_reference import verify_fused_reference

from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.random_numbers import Purpose, uniforms
from vllm_spec_plugins.testing.chi_square import compare
from vllm_spec_plugins.verifier import Verification, VerifyInput

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
#: Several blocks, tiles and programs at a small vocabulary; the interpreter is slow.
SMALL = LaunchShape(block=256, tile=128, programs=8)
LENGTHS = (3, 0, 1, 2)
TEMPERATURES = (1.0, 0.7, 0.0, 1.0)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make_batch(
    seed: int,
    lengths: tuple[int, ...] = LENGTHS,
    temperatures: tuple[float, ...] = TEMPERATURES,
    vocab_size: int = 300,
    draft: str = "one_hot",
    draft_size: int | None = None,
    excluded: float = 0.0,
    placeholders: float = 0.1,
    dtype: torch.dtype = torch.float64,
) -> VerifyInput:
    """A step whose draft is near the target, so that some tokens stand and some do not.

    Args:
        seed: Of everything random.
        lengths: Draft tokens of each request.
        temperatures: Of each request.
        vocab_size: V.
        draft: "one_hot", "dense", or "ranked" (over `draft_size` ids).
        draft_size: M; None = V.
        excluded: Share of the logits that are -inf.
        placeholders: Share of the draft tokens that are -1.
        dtype: Of the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    random = partial(torch.rand, generator=generator, dtype=torch.float64)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    num_tokens = sum(lengths)
    target = 2 * normal(num_tokens, vocab_size)
    bonus = 2 * normal(len(lengths), vocab_size)
    for logits in (target, bonus):
        keep = random(logits.shape) >= excluded
        keep[:, seed % vocab_size] = True  # some law is left
        logits[~keep] = -torch.inf
    likely, law, ids = target.argmax(dim=-1), None, torch.zeros(num_tokens, dtype=torch.int64)
    if draft == "one_hot":
        if num_tokens:
            drawn = torch.multinomial(torch.softmax(target, -1), 1, generator=generator)
            ids = torch.where(random(num_tokens) < 0.4, likely, drawn.squeeze(1))
    else:
        size = draft_size or vocab_size
        vocabulary = None
        columns = torch.arange(size)
        if draft == "ranked":
            vocabulary = columns = torch.randperm(vocab_size, generator=generator)[:size].sort()[0]
        near = target[:, columns].clamp(min=-20) + normal(num_tokens, size)
        values = torch.softmax(near, -1)
        if num_tokens:
            ids = columns[torch.multinomial(values, 1, generator=generator).squeeze(1)]
        sampled = random(num_tokens) < 0.85
        values = values if dtype == torch.float64 else values.float()
        law = DraftProbabilities(values, vocabulary, sampled)
    ids = torch.where(random(num_tokens) < placeholders, -1, ids)
    tensor = torch.tensor(temperatures, dtype=torch.float32)
    wide = partial(torch.randint, generator=generator, size=(len(lengths),))
    return on_device(
        VerifyInput(
            [str(i) for i in range(len(lengths))],
            target.to(dtype),
            bonus.to(dtype),
            ids,
            torch.tensor(lengths, dtype=torch.int64),
            law,
            tensor,
            wide(-(2**62), 2**62),
            wide(0, 5000),
            max_num_draft=max(lengths, default=0),
            all_greedy=bool((tensor == 0).all()),
            any_greedy=bool((tensor == 0).any()),
        )
    )


def on_device(batch: VerifyInput) -> VerifyInput:
    names = ("target_logits", "bonus_logits", "draft_token_ids", "num_draft", "temperatures",
             "streams", "positions")  # fmt: skip
    moved = {name: getattr(batch, name).to(DEVICE) for name in names}
    law = batch.draft_probabilities
    if law is not None:
        vocabulary, sampled = law.vocabulary, law.sampled
        law = DraftProbabilities(
            law.values.to(DEVICE),
            None if vocabulary is None else vocabulary.to(DEVICE),
            None if sampled is None else sampled.to(DEVICE),
        )
    return replace(batch, draft_probabilities=law, **moved)


def wide(batch: VerifyInput) -> VerifyInput:
    """The same logits in float64."""
    return replace(
        batch,
        target_logits=batch.target_logits.double(),
        bonus_logits=batch.bonus_logits.double(),
    )


def assert_same(found: Verification, expected: Verification) -> None:
    assert torch.equal(found.accepted, expected.accepted), (found, expected)
    assert torch.equal(found.token_ids, expected.token_ids), (found, expected)
    if expected.extra_acceptance is not None:
        assert found.extra_acceptance is not None
        torch.testing.assert_close(
            found.extra_acceptance.double(), expected.extra_acceptance.double(), atol=1e-6, rtol=0
        )


RULES = pytest.mark.parametrize("rule", ["token", "block"])
DRAFTS = {
    "one_hot": {},
    "dense": {"draft": "dense"},
    "narrow": {"draft": "dense", "draft_size": 250},
    "ranked": {"draft": "ranked", "draft_size": 100},
}


@RULES
@pytest.mark.parametrize("draft", DRAFTS)
def test_every_draft(rule: str, draft: str) -> None:
    batch = make_batch(hash_of(rule, draft), **DRAFTS[draft])
    assert_same(verify_fused(batch, rule, shape=SMALL), verify_fused_reference(batch, rule))


def hash_of(*words: str) -> int:
    """A seed that is the same in every process."""
    return sum(ord(letter) * (i + 1) for i, letter in enumerate("".join(words)))


@RULES
@pytest.mark.parametrize(
    "case",
    [
        {"temperatures": (0.0,) * 4},
        {"lengths": (0, 0), "temperatures": (1.0, 0.0)},
        {"excluded": 0.5, "draft": "dense"},
        {"excluded": 0.995, "draft": "dense"},
        {"vocab_size": 256, "draft": "ranked", "draft_size": 3},
        {"placeholders": 1.0},
        {"lengths": (1, 1), "temperatures": (1.0, 1.0), "vocab_size": 5, "draft": "dense"},
    ],
    ids=[
        "greedy",
        "no_drafts",
        "half_excluded",
        "few_left",
        "whole_blocks",
        "placeholders",
        "tiny",
    ],
)
def test_edges(rule: str, case: dict) -> None:
    batch = make_batch(3, **case)
    assert_same(verify_fused(batch, rule, shape=SMALL), verify_fused_reference(batch, rule))


def test_no_requests() -> None:
    found = verify_fused(make_batch(0, (), ()))
    assert found.token_ids.shape == (0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("draft", ["one_hot", "ranked"])
def test_narrow_types(dtype: torch.dtype, draft: str) -> None:
    """Computed in float32, compared with the decisions of float64. bfloat16 ties are frequent."""
    batch = make_batch(7, dtype=dtype, **DRAFTS[draft])
    assert_same(verify_fused(batch, shape=SMALL), verify_fused_reference(wide(batch)))


@RULES
@pytest.mark.parametrize("vocabulary", [False, True], ids=["whole", "ranked"])
def test_raw_logits(rule: str, vocabulary: bool) -> None:
    """Temperatures and the draft's normalisation happen on the way."""
    batch = make_batch(11, draft="ranked" if vocabulary else "dense", draft_size=200)
    law = batch.draft_probabilities
    assert law is not None
    logits = DraftLogits(law.values.log() * 1.5 + 2, law.vocabulary, law.sampled)
    batch = replace(batch, draft_probabilities=None)
    options = {"raw": True, "draft_logits": logits}
    assert_same(
        verify_fused(batch, rule, shape=SMALL, **options),
        verify_fused_reference(batch, rule, **options),
    )


@RULES
def test_a_vocabulary_of_each_row(rule: str) -> None:
    """Columns in any order, some that stand for nothing."""
    batch = make_batch(11, draft="dense")
    law = batch.draft_probabilities
    assert law is not None
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(law.values.shape, generator=generator).to(DEVICE)
    ids = noise.scatter(1, batch.draft_token_ids.clamp(min=0).unsqueeze(1), 2.0).topk(40).indices
    values = law.values.gather(1, ids)
    values[:, 30:], ids[:, 30:] = 0, -1
    values /= values.sum(dim=1, keepdim=True)
    batch = replace(batch, draft_probabilities=DraftProbabilities(values, ids, law.sampled))
    assert_same(verify_fused(batch, rule, shape=SMALL), verify_fused_reference(batch, rule))


@RULES
@pytest.mark.parametrize("greedy", [False, True], ids=["sampled", "greedy"])
def test_rows_without_a_law(rule: str, greedy: bool) -> None:
    """A NaN, only -inf, an infinite logit: never outside the vocabulary, and as the reference."""
    temperatures = (0.0 if greedy else 1.0,) * 4
    batch = make_batch(5, (1, 1, 1, 0), temperatures, placeholders=0.0)
    batch.target_logits[0, 17] = torch.nan
    batch.target_logits[1] = -torch.inf
    batch.target_logits[2, 200] = torch.inf
    batch.bonus_logits[3, 299] = torch.nan
    found = verify_fused(batch, rule, shape=SMALL)
    assert_same(found, verify_fused_reference(batch, rule))
    assert int(found.token_ids.max()) < 300


def test_equal_laws_leave_no_residual() -> None:
    """q = p, up to rounding: what is rejected all the same is drawn from p."""
    batch = make_batch(2, draft="dense", placeholders=0.0)
    law = DraftProbabilities(torch.softmax(batch.target_logits, -1) * (1 + 1e-12))
    batch = replace(batch, draft_probabilities=law)
    given = GivenAcceptance(torch.zeros(len(batch.draft_token_ids), device=DEVICE))
    assert_same(
        verify_fused(batch, relaxation=given, shape=SMALL),
        verify_fused_reference(batch, relaxation=given),
    )


def relaxations() -> dict[str, dict]:
    generator = torch.Generator().manual_seed(9)
    table = torch.stack([torch.randperm(300, generator=generator)[:70] for _ in range(150)])
    table = table.to(torch.int32)
    table[3, 5:] = -1
    table[7] = -1
    groups = torch.randint(-1, 20, (300,), generator=generator).to(torch.int32)
    scores = torch.rand(sum(LENGTHS), generator=generator).to(DEVICE)
    table, groups = table.to(DEVICE), groups.to(DEVICE)
    judge = Judge(scores, 0.5)
    return {
        "neighbours": {"relaxation": NeighbourSum(table, 90, 0.25)},
        "neighbours_multiplied": {"relaxation": NeighbourSum(table, 90, 4.0, True)},
        "groups": {"relaxation": GroupSum(groups)},
        "given": {"relaxation": GivenAcceptance(1 - scores.double())},
        "judge": {"judge": judge},
        "both": {"relaxation": GroupSum(groups), "judge": judge},
    }


@pytest.mark.parametrize("name", list(relaxations()))
@pytest.mark.parametrize("draft", ["one_hot", "ranked"])
def test_relaxed(name: str, draft: str) -> None:
    batch, options = make_batch(hash_of(name), **DRAFTS[draft]), relaxations()[name]
    expected = verify_fused_reference(batch, **options)
    assert_same(verify_fused(batch, shape=SMALL, **options), expected)
    assert expected.extra_acceptance is not None


@pytest.mark.parametrize("name", ["neighbours", "groups", "given", "judge"])
def test_relaxed_accepts_more(name: str) -> None:
    """A control of the test above: the relaxations are at work in it."""
    accepted = []
    for options in ({}, relaxations()[name]):
        batches = [make_batch(seed, placeholders=0.0) for seed in range(40)]
        accepted.append(
            sum(int(verify_fused_reference(b, **options).accepted.sum()) for b in batches)
        )
    assert accepted[1] > accepted[0]


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    vocab_size=st.integers(2, 400),
    rule=st.sampled_from(["token", "block"]),
    draft=st.sampled_from(["one_hot", "dense", "ranked"]),
    share=st.floats(0.01, 1),
    shape=st.sampled_from([SMALL, LaunchShape(block=64, tile=512, programs=1)]),
    seed=st.integers(0, 2**30),
)
def test_any_shape(
    lengths: list[int], vocab_size: int, rule: str, draft: str, share: float, shape: LaunchShape,
    seed: int,
) -> None:  # fmt: skip
    temperatures = tuple([1.0, 0.0, 0.5][: len(lengths)])
    size = max(1, int(share * vocab_size))
    batch = make_batch(
        seed, tuple(lengths), temperatures, vocab_size, draft, size, excluded=share / 2
    )
    assert_same(verify_fused(batch, rule, shape=shape), verify_fused_reference(batch, rule))


@triton.jit
def _uniform_kernel(out_ptr, streams_ptr, positions_ptr, index_ptr, count: tl.constexpr):
    i = tl.arange(0, count)
    stream, position = tl.load(streams_ptr + i), tl.load(positions_ptr + i)
    tl.store(out_ptr + i, uniform(stream, position, tl.load(index_ptr + i), 1))


def test_uniforms_are_the_librarys() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randint, -(2**62), 2**62, (64,), generator=generator)
    streams, positions, index = (draw().to(DEVICE) for _ in range(3))
    found = torch.empty(64, dtype=torch.float64, device=DEVICE)
    _uniform_kernel[(1,)](found, streams, positions, index, count=64)
    assert torch.equal(found, uniforms(streams, positions, index, Purpose.RESAMPLE))


def many(count: int, target: Tensor, law: Tensor) -> VerifyInput:
    """`count` requests with one draft token each, drawn from `law`, all of the same laws."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.multinomial(law, count, replacement=True, generator=generator)
    ones = torch.ones(count)
    return on_device(
        VerifyInput(
            [str(i) for i in range(count)],
            target.log().expand(count, -1).contiguous(),
            target.log().expand(count, -1).contiguous(),
            ids,
            ones.long(),
            DraftProbabilities(law.expand(count, -1).contiguous()),
            ones,
            torch.arange(count),
            torch.zeros(count, dtype=torch.int64),
            max_num_draft=1,
            all_greedy=False,
            any_greedy=False,
        )
    )


@pytest.mark.parametrize("rule", [pytest.param("token", marks=pytest.mark.slow), "block"])
def test_first_token_follows_the_target(rule: str) -> None:
    """And the test would see a residual that is not one."""
    target = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    law = torch.tensor([0.05, 0.1, 0.15, 0.3, 0.4])
    count = 250 if INTERPRETED else 1_000_000
    batch = many(count, target, law)
    shape = LaunchShape(block=16, tile=16, programs=1)
    found = verify_fused(batch, rule, shape=shape)
    assert_same(found, verify_fused_reference(wide(batch), rule))
    tokens = found.token_ids[:, 0].cpu()
    assert compare("kernel", tokens.bincount(minlength=5), target).p_value > 1e-3

    # What is emitted when tokens after a rejection are drawn from p in place of the residual.
    generator = torch.Generator().manual_seed(2)
    from_target = torch.multinomial(target, count, True, generator=generator)
    wrong = torch.where(found.accepted.cpu() == 0, from_target, tokens)
    assert compare("control", wrong.bincount(minlength=5), target).p_value < 1e-3
