"""`verify` on batches: who else is in them, raggedness, placeholders, greedy, odd inputs."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm_spec_plugins.verifiers.block_verification import (
    block_acceptance,
    capped_ratio,
    longest_acceptable,
)
from vllm_spec_plugins.verifiers.lossless import Lossless, LosslessOptions

from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.draw_next import sample_weights
from vllm_spec_plugins.random_numbers import Purpose
from vllm_spec_plugins.testing.toy_problems import toy_context
from vllm_spec_plugins.verifier import VerifyInput
from vllm_spec_plugins.vocabulary_passes import first_argmax, log_normaliser, probability_of

TOKEN = Lossless(LosslessOptions(rule="token"), toy_context())
BLOCK = Lossless(LosslessOptions(rule="block"), toy_context())
RULES = pytest.mark.parametrize("verifier", [TOKEN, BLOCK], ids=["token", "block"])
DRAFTS = pytest.mark.parametrize("draft", ["one-hot", "dense", "compact", "mixed"])


def make_batch(
    counts: list[int],
    draft: str = "dense",
    *,
    vocab_size: int = 700,
    greedy: list[bool] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> VerifyInput:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    requests, tokens = len(counts), sum(counts)
    logits = normal(tokens, vocab_size) * 3
    # top-k 50, as a request may ask for.
    logits[logits < logits.topk(50, dim=1).values[:, -1:]] = -torch.inf
    noisy = logits + normal(tokens, vocab_size) * 0.3
    q = None
    if draft == "one-hot":
        ids = noisy.argmax(dim=1)
    else:
        vocabulary = None
        if draft == "compact":
            vocabulary = torch.randperm(vocab_size, generator=generator)[:400].sort().values
            noisy = normal(tokens, vocab_size)[:, vocabulary]
        values = torch.softmax(noisy, dim=1)
        ids = (
            torch.multinomial(values, 1, generator=generator).squeeze(1)
            if tokens
            else torch.zeros(0, dtype=torch.int64)
        )
        ids = ids if vocabulary is None else vocabulary[ids]
        sampled = torch.rand(tokens, generator=generator) < 0.5 if draft == "mixed" else None
        q = DraftProbabilities(values, vocabulary, sampled)
    is_greedy = torch.tensor(greedy if greedy is not None else [False] * requests)
    return VerifyInput(
        [f"r{i}" for i in range(requests)],
        logits,
        normal(requests, vocab_size) * 3,
        ids,
        torch.tensor(counts),
        q,
        torch.where(is_greedy, 0.0, 0.8),
        torch.randint(-(1 << 62), 1 << 62, (requests,), generator=generator),
        torch.randint(0, 4000, (requests,), generator=generator),
        max_num_draft=max(counts),
        all_greedy=bool(is_greedy.all()),
        any_greedy=bool(is_greedy.any()),
    )


def reordered(batch: VerifyInput, order: list[int]) -> VerifyInput:
    """Some requests of a batch, in some order, cut out without the code under test."""
    starts = batch.num_draft.cumsum(0) - batch.num_draft
    rows = torch.cat(
        [torch.arange(int(starts[i]), int(starts[i] + batch.num_draft[i])) for i in order]
    )
    q, pick = batch.draft_probabilities, torch.tensor(order)
    greedy = batch.temperatures[pick] == 0
    return VerifyInput(
        [batch.request_ids[i] for i in order],
        batch.target_logits[rows],
        batch.bonus_logits[pick],
        batch.draft_token_ids[rows],
        batch.num_draft[pick],
        q
        and DraftProbabilities(
            q.values[rows], q.vocabulary, None if q.sampled is None else q.sampled[rows]
        ),
        batch.temperatures[pick],
        batch.streams[pick],
        batch.positions[pick],
        max_num_draft=int(batch.num_draft[pick].max()),
        all_greedy=bool(greedy.all()),
        any_greedy=bool(greedy.any()),
    )


def texts(token_ids: Tensor) -> list[list[int]]:
    return [[token for token in row if token >= 0] for row in token_ids.tolist()]


@RULES
@DRAFTS
@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_tokens_do_not_depend_on_who_else_is_there(
    verifier: Lossless, draft: str, data: st.DataObject, seed: int
) -> None:
    counts = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=7))
    greedy = data.draw(st.lists(st.booleans(), min_size=len(counts), max_size=len(counts)))
    batch = make_batch(counts, draft, greedy=greedy, seed=seed)
    together = texts(verifier.verify(batch).token_ids)
    order = data.draw(st.permutations(range(len(counts))))
    order = order[: data.draw(st.integers(1, len(counts)))]
    apart = texts(verifier.verify(reordered(batch, order)).token_ids)
    assert apart == [together[i] for i in order]


@RULES
@DRAFTS
def test_select_is_the_same_step_for_some_requests(verifier: Lossless, draft: str) -> None:
    batch = make_batch([3, 0, 5, 1, 2], draft, greedy=[False, True, False, True, False])
    whole = verifier.verify(batch)
    part = verifier.verify(batch.select(torch.tensor([0, 2, 3])))
    assert part.token_ids.shape == (3, 6)
    assert torch.equal(part.token_ids, whole.token_ids[[0, 2, 3]])
    assert batch.select(torch.tensor([0, 2, 3])).request_ids == ["r0", "r2", "r3"]


@RULES
@DRAFTS
@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    greedy=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_shape_of_the_answer(
    verifier: Lossless, draft: str, counts: list[int], greedy: bool, seed: int
) -> None:
    batch = make_batch(counts, draft, greedy=[greedy and i % 2 == 0 for i in range(len(counts))])
    result = verifier.verify(replace(batch, streams=batch.streams + seed))
    assert result.token_ids.shape == (len(counts), max(counts) + 1)
    assert result.token_ids.dtype == result.accepted.dtype == torch.int64
    assert result.extra_acceptance is None
    drafts = batch.draft_token_ids.split(counts)
    for row, accepted, ids in zip(result.token_ids, result.accepted, drafts, strict=True):
        assert 0 <= accepted <= len(ids)
        assert torch.equal(row[:accepted], ids[:accepted])
        assert 0 <= row[accepted] < 700
        assert (row[accepted + 1 :] == -1).all()


@RULES
@DRAFTS
def test_excluded_tokens_never_come(verifier: Lossless, draft: str) -> None:
    batch = make_batch([4] * 200, draft)
    result = verifier.verify(batch)
    for i, (row, accepted) in enumerate(zip(result.token_ids, result.accepted, strict=True)):
        for j in range(min(int(accepted) + 1, 4)):
            assert batch.target_logits[4 * i + j, row[j]] > -torch.inf


@RULES
@DRAFTS
def test_nothing_stands_past_a_placeholder(verifier: Lossless, draft: str) -> None:
    # Drafts equal to the target, so that everything else is accepted.
    batch = make_batch([5] * 50, draft)
    everything = batch.target_logits.clone()
    everything.scatter_(1, batch.draft_token_ids.unsqueeze(1), 80.0)
    ids = batch.draft_token_ids.clone().view(50, 5)
    ids[:, 2] = -1
    batch = replace(batch, target_logits=everything, draft_token_ids=ids.flatten())
    result = verifier.verify(batch)
    assert (result.accepted == 2).all()
    # The row of the placeholder draws from p itself, here all on the token first drafted.
    assert torch.equal(result.token_ids[:, 2], everything.view(50, 5, -1)[:, 2].argmax(1))


@RULES
def test_greedy_is_exact_matching(verifier: Lossless) -> None:
    batch = make_batch([3, 0, 4], "one-hot", greedy=[True] * 3, dtype=torch.float32)
    likely = batch.target_logits.argmax(1)
    ids = likely.clone()
    ids[4] = (ids[4] + 1) % 700  # second draft token of the last request
    result = verifier.verify(replace(batch, draft_token_ids=ids))
    bonus = batch.bonus_logits.argmax(1)
    assert texts(result.token_ids) == [
        [*likely[:3].tolist(), int(bonus[0])],
        [int(bonus[1])],
        [int(likely[3]), int(likely[4])],
    ]
    assert result.accepted.tolist() == [3, 0, 1]


@RULES
def test_greedy_ties_go_to_the_first_token(verifier: Lossless) -> None:
    """As in plain decoding; bfloat16 logits tie often."""
    batch = make_batch([1], "one-hot", greedy=[True])
    logits = torch.zeros(1, 700)
    logits[0, [7, 300]] = 5.0
    for drafted, expected in ((7, 1), (300, 0)):
        ids = torch.tensor([drafted])
        result = verifier.verify(replace(batch, target_logits=logits, draft_token_ids=ids))
        assert result.accepted.tolist() == [expected]
        assert result.token_ids[0, 0] == 7


@RULES
def test_one_greedy_request_does_not_change_the_others(verifier: Lossless) -> None:
    batch = make_batch([4, 4, 4])
    mixed = make_batch([4, 4, 4], greedy=[False, True, False])
    assert torch.equal(
        verifier.verify(batch).token_ids[[0, 2]], verifier.verify(mixed).token_ids[[0, 2]]
    )


@RULES
def test_the_same_request_draws_anew_at_each_position(verifier: Lossless) -> None:
    batch = make_batch([3])
    drawn = {
        tuple(verifier.verify(replace(batch, positions=torch.tensor([n]))).token_ids[0].tolist())
        for n in range(40)
    }
    assert len(drawn) > 5


@RULES
def test_inputs_are_left_alone(verifier: Lossless) -> None:
    for draft in ("one-hot", "dense", "compact", "mixed"):
        batch = make_batch([3, 0, 2], draft, greedy=[False, False, True])
        before = {f.name: getattr(batch, f.name) for f in fields(batch)}
        copies = {k: v.clone() for k, v in before.items() if isinstance(v, Tensor)}
        values = None if batch.draft_probabilities is None else batch.draft_probabilities.values
        kept = None if values is None else values.clone()
        verifier.verify(batch)
        for name, copy in copies.items():
            assert torch.equal(before[name], copy), name
        assert values is None or kept is None or torch.equal(values, kept)


@RULES
def test_hopeless_logits_give_a_token_in_range(verifier: Lossless) -> None:
    """NaN or all excluded: nothing is right, but nothing may crash the engine either."""
    for value in (torch.nan, -torch.inf):
        batch = make_batch([2, 1])
        bad = torch.full_like(batch.target_logits, value)
        result = verifier.verify(
            replace(batch, target_logits=bad, bonus_logits=torch.full((2, 700), value))
        )
        first = result.token_ids[:, 0]
        assert ((first >= 0) & (first < 700)).all()


@DRAFTS
@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=8), seed=st.integers(0, 10_000))
def test_looking_backwards_finds_the_longest(draft: str, counts: list[int], seed: int) -> None:
    batch = make_batch(counts, draft, seed=seed, dtype=torch.float64)
    if len(batch.draft_token_ids) > 4:
        batch.draft_token_ids[3] = -1
    ratio, u = capped_ratio(batch), batch.uniforms(Purpose.ACCEPT)
    h = block_acceptance(batch, ratio, torch.arange(len(ratio)))
    assert (h <= ratio + 1e-12).all()
    longest = torch.zeros_like(batch.num_draft)
    for row in (u < h).nonzero().squeeze(1).tolist():  # in order: later rows overwrite
        longest[batch.request_of[row]] = batch.index_in_draft[row] + 1
    assert torch.equal(longest_acceptable(batch, ratio, u), longest)


# --- what they are made of ---


@pytest.mark.parametrize("width", [1, 2, 511, 512, 513, 1024, 3000, 20_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sample_weights_inverts_the_running_sum(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    weights = torch.rand(64, width, generator=generator, dtype=dtype)
    weights[torch.rand(64, width, generator=generator) < 0.5] = 0
    weights[:, width // 2] += 0.1
    u = torch.rand(64, generator=generator, dtype=torch.float64)
    drawn = sample_weights(weights, u)
    running = weights.double().cumsum(1)
    before = running.gather(1, drawn.unsqueeze(1)).squeeze(1)
    weight = weights.gather(1, drawn.unsqueeze(1)).squeeze(1).double()
    value, slack = u * running[:, -1], 1e-6 * running[:, -1]
    assert (weight > 0).all()
    assert (before - weight - slack <= value).all()
    assert (value < before + slack).all()


@pytest.mark.parametrize("width", [3, 512, 2000, 2048, 2049, 20_001])
@pytest.mark.parametrize("u", [2.0**-53, 0.5, 1 - 2.0**-53])
def test_sample_weights_never_draws_weight_zero(width: int, u: float) -> None:
    for token in (0, 1, width // 2, width - 1):
        weights = torch.zeros(4, width)
        weights[:, token] = torch.tensor([1e-38, 1e-7, 0.3, 1e30])
        drawn = sample_weights(weights, torch.full((4,), u, dtype=torch.float64))
        assert (drawn == token).all()


def test_sample_weights_of_nobody() -> None:
    assert sample_weights(torch.zeros(0, 9), torch.zeros(0).double()).tolist() == []


@pytest.mark.parametrize(("rows", "width"), [(0, 5), (1, 5), (7, 40_000), (3, 300_000)])
def test_passes_agree_with_torch(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, width, generator=generator).bfloat16().float() * 3
    logits[:, 1::3] = -torch.inf
    ids = torch.randint(width, (rows,), generator=generator)
    torch.testing.assert_close(log_normaliser(logits), torch.logsumexp(logits, 1))
    expected = torch.softmax(logits.double(), 1).gather(1, ids.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(probability_of(logits, ids).double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(first_argmax(logits), logits.argmax(1))
    assert torch.equal(first_argmax(logits.bfloat16()), logits.bfloat16().argmax(1))


def test_draft_probabilities_of_a_token() -> None:
    vocabulary = torch.tensor([2, 5, 6])
    values = torch.tensor([[0.1, 0.2, 0.7]] * 6)
    sampled = torch.tensor([True, True, True, True, False, True])
    q = DraftProbabilities(values, vocabulary, sampled)
    ids = torch.tensor([2, 6, 0, 7, 3, -1])
    torch.testing.assert_close(q.of(ids), torch.tensor([0.1, 0.7, 0.0, 0.0, 1.0, 0.0]))
    dense = q.dense(torch.tensor([0, 4, 5]), torch.tensor([2, 3, -1]), 8)
    expected = torch.zeros(3, 8)
    expected[0, vocabulary] = values[0]
    expected[1, 3] = 1
    torch.testing.assert_close(dense, expected)


def test_draft_head_narrower_than_the_target() -> None:
    """A draft head without the target's padding rows."""
    q = DraftProbabilities(torch.full((2, 3), 1 / 3))
    dense = q.dense(torch.tensor([0, 1]), torch.tensor([0, 2]), 5)
    assert dense.shape == (2, 5)
    assert (dense[:, 3:] == 0).all()
