"""Relaxed rules: what each accepts, that its price is the distance, and whom it leaves alone."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from vllm_spec_plugins.verifiers.fly import Fly, FlyOptions
from vllm_spec_plugins.verifiers.kl_judge import (
    KLJudge,
    KLJudgeOptions,
    divergence,
    near_draft_tokens,
)
from vllm_spec_plugins.verifiers.lossless import Lossless, LosslessOptions
from vllm_spec_plugins.verifiers.threshold import Threshold, ThresholdOptions
from vllm_spec_plugins.verifiers.top_k_relaxed import TopKRelaxed, TopKRelaxedOptions
from vllm_spec_plugins.verifiers.typical import Typical, TypicalOptions

from vllm_spec_plugins.acceptance_rule import exact_acceptance, token_acceptance
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.errors import ConfigError
from vllm_spec_plugins.price_accounts import PricesOnHost
from vllm_spec_plugins.random_numbers import Purpose
from vllm_spec_plugins.relaxed_rule import RelaxedOptions, RelaxedRule
from vllm_spec_plugins.residual import residual_weights
from vllm_spec_plugins.testing.enumeration import (
    enumerated_input,
    enumeration_error,
    output_laws,
    total_variation,
)
from vllm_spec_plugins.testing.guarantees import (
    TOLERANCE,
    assert_keeps_its_guarantee,
    assert_lossless,
    assert_relaxes,
    assert_stays_within_its_bound,
    enumeration_cases,
)
from vllm_spec_plugins.testing.toy_problems import (
    adversarial,
    one_hot,
    random_problem,
    toy_context,
    truncated_target,
)
from vllm_spec_plugins.verifier import Guarantee, TokenHistory, VerifierOptions, VerifyInput
from vllm_spec_plugins.vocabulary_passes import (
    count_above,
    largest_of_rows,
    probability_and_entropy,
    probability_of,
    top_entries,
)

CONTEXT = toy_context()
LOSSLESS = Lossless(LosslessOptions(rule="token"), CONTEXT)


def typical(**options: Any) -> Typical:
    return Typical(TypicalOptions(**options), CONTEXT)


def threshold(**options: Any) -> Threshold:
    return Threshold(ThresholdOptions(**{"min_log_probability": -2.0, **options}), CONTEXT)


def kl_judge(**options: Any) -> KLJudge:
    return KLJudge(KLJudgeOptions(**{"max_divergence": 1.0, **options}), CONTEXT)


def top_k_relaxed(**options: Any) -> TopKRelaxed:
    return TopKRelaxed(TopKRelaxedOptions(**{"k": 2, **options}), CONTEXT)


def fly(**options: Any) -> Fly:
    return Fly(FlyOptions(**{"window_size": 1, **options}), CONTEXT)


MAKERS = {f.__name__: f for f in (typical, threshold, kl_judge, top_k_relaxed, fly)}
EVERY_RULE = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def step(
    logits: Tensor,
    token_ids: list[int],
    num_draft: list[int],
    *,
    temperatures: list[float] | None = None,
    draft: Tensor | None = None,
    **more: Any,
) -> VerifyInput:
    """A step over given `[N, V]` logits; bonus rows are flat."""
    heat = torch.tensor(temperatures or [1.0] * len(num_draft))
    return VerifyInput(
        [str(i) for i in range(len(num_draft))],
        logits,
        torch.zeros(len(num_draft), logits.shape[1], dtype=logits.dtype),
        torch.tensor(token_ids, dtype=torch.int64),
        torch.tensor(num_draft),
        None if draft is None else DraftProbabilities(draft),
        heat,
        torch.arange(len(num_draft)) + 1,
        torch.zeros(len(num_draft), dtype=torch.int64),
        max_num_draft=max(num_draft, default=0),
        all_greedy=bool((heat == 0).all()),
        any_greedy=bool((heat == 0).any()),
        **more,
    )


def law(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64)


# The price.


@EVERY_RULE
def test_it_is_not_lossless_and_its_price_is_the_distance(make: Any) -> None:
    assert_keeps_its_guarantee(make())
    with pytest.raises(AssertionError, match="enumerated, is off by"):
        assert_lossless(make(), cases=[])


@pytest.mark.parametrize("make", [typical, threshold])
def test_the_best_residual_is_nearer_to_the_target_than_the_ordinary_one(make: Any) -> None:
    best, ordinary, paper = make(), make(), make()
    ordinary.residual = residual_weights  # type: ignore[method-assign]
    paper.residual = lambda batch, rows: torch.softmax(batch.target_logits[rows], dim=1)
    gains = []
    for seed in range(30):
        problem = random_problem(seed, num_draft=1, order=1)
        distances = [total_variation(rule, problem) for rule in (best, ordinary, paper)]
        assert distances[0] <= min(distances[1:]) + TOLERANCE
        gains.append(distances[2] - distances[0])
    assert max(gains) > 0.05


def test_a_rule_that_never_relaxes_is_told_that_its_label_is_wrong() -> None:
    class Exact(RelaxedRule):
        def relaxed_acceptance(self, batch: VerifyInput) -> Tensor:
            return token_acceptance(batch)

    with pytest.raises(AssertionError, match="label it LOSSLESS"):
        assert_relaxes(Exact(RelaxedOptions(), CONTEXT))


def test_the_price_of_kl_judge_is_bounded() -> None:
    for bound in (0.05, 0.3, 1.0):
        rule = kl_judge(max_divergence=bound)
        for seed in range(20):
            problem = random_problem(seed, num_draft=1, order=1, sharpness=0.7)
            assert total_variation(rule, problem) <= math.sqrt(bound / 2)


def test_a_bound_is_declared_and_kept() -> None:
    for bound in (0.05, 0.3):
        assert_stays_within_its_bound(kl_judge(max_divergence=bound))
    assert KLJudge.total_variation_bound(KLJudgeOptions(max_divergence=0.08)) == pytest.approx(0.2)
    assert KLJudge.total_variation_bound(KLJudgeOptions(max_divergence=9.0)) == 1
    assert Typical.total_variation_bound(TypicalOptions()) is None

    class TooSure(KLJudge):
        @classmethod
        def total_variation_bound(cls, options: VerifierOptions) -> float:
            return KLJudge.total_variation_bound(options) / 10

    class Silent(Everything):
        guarantee = Guarantee.BOUNDED

    with pytest.raises(AssertionError, match=r"a total variation of at most 0\.07"):
        assert_stays_within_its_bound(TooSure(KLJudgeOptions(max_divergence=1.0), CONTEXT))
    with pytest.raises(AssertionError, match="Silent is BOUNDED: override total_variation_bound"):
        assert_stays_within_its_bound(Silent(RelaxedOptions(), CONTEXT))


# Whom they leave alone.


@EVERY_RULE
def test_tokens_the_sampling_options_exclude_are_never_accepted(make: Any) -> None:
    plain = random_problem(5, num_draft=3, order=3)
    kept = truncated_target(plain, 2)
    drawn = replace(kept, draft_probabilities=adversarial(plain).draft_probabilities)
    chosen = one_hot(kept)  # taken to choose any token
    impossible = kept.laws_of_text(4) == 0
    for problem in (kept, drawn, chosen, chosen.with_temperature(0)):
        laws = output_laws(make(), [problem])[0].view(-1, 4**4)
        assert float(laws[:, impossible].max()) == 0
        torch.testing.assert_close(laws.sum(dim=1), torch.ones(len(laws), dtype=torch.float64))


@EVERY_RULE
def test_placeholders_are_never_accepted(make: Any) -> None:
    problem = replace(random_problem(3, num_draft=3, order=3), num_placeholders=2)
    batch, _, _ = enumerated_input([problem])
    assert float(make().accepted_law(batch)[:, 2:].max()) == 0
    verification = make().verify(batch)
    assert int(verification.accepted.max()) == 1
    assert float(verification.extra_acceptance[batch.index_in_draft > 0].max()) == 0


@pytest.mark.parametrize("make", [typical, kl_judge])
def test_greedy_requests_are_exact(make: Any) -> None:
    for case in enumeration_cases():
        greedy = tuple(p.with_temperature(0) for p in case.problems)
        assert enumeration_error(make(), greedy, case.vocabulary) <= TOLERANCE


@EVERY_RULE
def test_relaxed_and_exact_requests_of_a_batch_do_not_touch_each_other(make: Any) -> None:
    from vllm_spec_plugins.engine.verify_each import verify_each

    plain = random_problem(8, vocab_size=4, num_draft=3, order=3)
    batch, _, _ = enumerated_input([plain, one_hot(plain), plain.with_temperature(0)])
    names = ["exact" if i % 3 else "relaxed" for i in range(len(batch.num_draft))]
    mixed = verify_each(
        {"exact": LOSSLESS, "relaxed": make()}, batch, names, batch.num_draft.tolist()
    )
    for name, rule in (("exact", LOSSLESS), ("relaxed", make())):
        alone = rule.verify(batch)
        rows = torch.tensor([i for i, other in enumerate(names) if other == name])
        assert torch.equal(mixed.token_ids[rows], alone.token_ids[rows])
        assert mixed.extra_acceptance is not None
        tokens = torch.isin(batch.request_of, rows)
        expected = 0 if alone.extra_acceptance is None else alone.extra_acceptance[tokens]
        assert torch.equal(
            mixed.extra_acceptance[tokens], torch.zeros(int(tokens.sum())).double() + expected
        )


# The limit.


class Everything(RelaxedRule):
    """Accepts whatever is allowed."""

    def relaxed_acceptance(self, batch: VerifyInput) -> Tensor:
        return torch.ones_like(batch.draft_token_probability)


def spend(rule: RelaxedRule, batch: VerifyInput) -> list[float]:
    """`[R]` price of one step."""
    extra = rule.verify(batch).extra_acceptance
    assert extra is not None
    total = torch.zeros(len(batch.num_draft), dtype=extra.dtype)
    return total.index_add(0, batch.request_of, extra).tolist()


def test_a_request_over_its_limit_is_exact_until_its_mean_is_below_it_again() -> None:
    rule = Everything(RelaxedOptions(max_total_variation=0.21), CONTEXT)
    # One request drafts what the target rarely says, another what it nearly always says.
    rows = torch.cat([law(0.1, 0.9), law(0.9, 0.1)]).log()
    batch = step(rows, [0, 0], [1, 1])
    prices = [spend(rule, batch) for _ in range(12)]
    # 0.9 after one token, 1.8 after six: below 0.21 each again after five and nine.
    assert [round(price, 9) for price, _ in prices] == [0.9, *[0] * 4, 0.9, *[0] * 3, 0.9, 0, 0]
    assert all(price == pytest.approx(0.1) for _, price in prices)


def test_the_mean_price_stays_at_the_limit() -> None:
    rule = Everything(RelaxedOptions(max_total_variation=0.25), CONTEXT)
    batch = step(torch.tensor([[0.0, 1.0, -1.0]] * 4).double(), [2, 2, 0, 2], [1, 3])
    spent, steps = torch.zeros(2), 300
    looked_at = torch.zeros(2)
    for number in range(steps):
        now = replace(batch, positions=torch.tensor([number, number]))
        verification = rule.verify(now)
        spent += torch.tensor(
            [
                float(verification.extra_acceptance[:1]),
                float(verification.extra_acceptance[1:].sum()),
            ]
        )
        looked_at += (verification.accepted + 1).clamp(max=batch.num_draft)
    mean = spent / looked_at
    assert bool((mean > 0.2).all())
    assert bool((mean < 0.26).all())


@EVERY_RULE
def test_without_any_allowance_every_rule_is_lossless(make: Any) -> None:
    for case in enumeration_cases():
        assert enumeration_error(make(max_total_variation=0.0), case.problems, case.vocabulary) <= (
            TOLERANCE
        )


@EVERY_RULE
def test_requests_over_their_limit_are_exact_and_the_others_are_not_touched(make: Any) -> None:
    """Of both kinds in one batch: the law of the text, by enumeration."""
    problem = random_problem(17, num_draft=3, order=3, sharpness=0.8)
    rule, free = make(max_total_variation=0.01), make()
    batch, _, _ = enumerated_input([problem, problem])
    half = len(batch.num_draft) // 2
    assert isinstance(rule._accounts, PricesOnHost)
    rule._accounts._sums.update(dict.fromkeys(batch.request_ids[:half], (5.0, 10)))
    exact, relaxed = output_laws(rule, [problem, problem])
    assert float((exact - problem.laws_of_text(4)).abs().max()) <= TOLERANCE
    assert torch.equal(relaxed, output_laws(free, [problem])[0])
    extra = rule.verify(batch).extra_acceptance
    assert float(extra[batch.request_of < half].max()) == 0


def test_the_exact_acceptance_is_the_callers_to_change() -> None:
    class InPlace(RelaxedRule):
        def relaxed_acceptance(self, batch: VerifyInput) -> Tensor:
            return token_acceptance(batch).fill_(1.0)

    batch = step(law(0.1, 0.9).log(), [0], [1])
    assert spend(InPlace(RelaxedOptions(), CONTEXT), batch) == pytest.approx([0.9])


def test_a_finished_request_is_forgotten() -> None:
    rule = Everything(RelaxedOptions(max_total_variation=0.2), CONTEXT)
    batch = step(law(0.1, 0.9).log(), [0], [1])
    assert spend(rule, batch) == pytest.approx([0.9])
    assert spend(rule, batch) == [0]
    rule.finish(["0"])
    assert spend(rule, batch) == pytest.approx([0.9])
    assert len(rule._accounts) == 1


@pytest.mark.parametrize("limit", [-0.1, 1.1, "0.5", math.nan])
def test_a_limit_is_a_distance(limit: Any) -> None:
    with pytest.raises(ValidationError, match="max_total_variation"):
        RelaxedOptions(max_total_variation=limit)


# What each accepts.


@pytest.mark.parametrize("width", [300, 3000])
def test_probability_and_entropy_of_rows(width: int) -> None:
    logits = torch.randn(5, width, generator=torch.Generator().manual_seed(0)) * 4
    logits[1, 5:] = -torch.inf
    logits[2, 1:] = -torch.inf
    token_ids = torch.tensor([7, 2, 0, 299, 5])
    p, entropy = probability_and_entropy(logits, token_ids)
    law = torch.distributions.Categorical(logits=logits.double())
    torch.testing.assert_close(entropy.double(), law.entropy(), atol=1e-5, rtol=0)
    assert torch.equal(p, probability_of(logits, token_ids))
    assert [len(part) for part in probability_and_entropy(logits[:0], token_ids[:0])] == [0, 0]
    # Where the token is likely, the entropy is not asked for.
    bound = float(p.median())
    same, some = probability_and_entropy(logits, token_ids, up_to=bound)
    assert torch.equal(p, same)
    torch.testing.assert_close(some, torch.where(p > bound, 0, entropy))
    assert 0 < int((p > bound).sum()) < 5


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(("width", "count"), [(40, 6), (5000, 1), (5000, 3), (4992, 9)])
def test_top_entries_are_those_of_a_sort(width: int, count: int, largest: bool) -> None:
    logits = torch.randn(6, width, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    logits[0, 2:] = -torch.inf
    logits[1, width // 3 :] = 0.0
    before = logits.clone()
    values, columns = top_entries(logits, count, largest=largest)
    assert torch.equal(values, logits.topk(count, dim=1, largest=largest).values)
    assert torch.equal(values, logits.gather(1, columns))
    assert all(len(set(row)) == count for row in columns.tolist())
    assert torch.equal(logits, before)


@pytest.mark.parametrize("width", [300, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_counts_and_maxima_of_some_rows(dtype: torch.dtype, width: int) -> None:
    logits = torch.randn(6, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = torch.tensor([4, 0, 5])
    values = logits[rows, 7]
    assert torch.equal(largest_of_rows(logits, rows), logits[rows].amax(dim=1))
    above = (logits[rows] > values.unsqueeze(1)).sum(dim=1)
    assert torch.equal(count_above(logits, rows, values), above)
    assert len(count_above(logits, rows[:0], values[:0])) == 0


def test_the_normaliser_from_what_is_known() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    logits[1, 3] = -torch.inf
    logits[2, 3] = -200.0
    rows = torch.tensor([5, 1, 2])
    for known in ("", "draft_token_probability", "target_log_normaliser", "target_entropy"):
        batch = step(logits, [3, 3, 3, 3, 3, -1], [6])
        if known:
            getattr(batch, known)
        found = batch.target_log_normaliser_at(rows)
        torch.testing.assert_close(found, logits[rows].logsumexp(dim=1))


def test_typical_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(400, 50, generator=generator, dtype=torch.float64) * 2
    token_ids = torch.randint(50, (400,), generator=generator)
    batch = step(logits, token_ids.tolist(), [400])
    p = torch.softmax(logits, dim=1)
    bar = (0.3 * (p * p.log()).sum(dim=1).exp()).clamp(max=0.09).unsqueeze(1)
    everywhere = (p > bar).double()
    rows = torch.arange(400)
    own = everywhere.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    assert torch.equal(typical().relaxed_acceptance(batch), own)
    assert torch.equal(typical().relaxed_acceptance_over_vocabulary(batch, rows), everywhere)
    assert 0 < own.mean() < 1


def test_threshold_is_absolute_and_relaxes_greedy_requests() -> None:
    logits = law(0.6, 0.3, 0.1).log().repeat(4, 1)
    batch = step(logits, [0, 1, 2, 1], [1, 1, 1, 1], temperatures=[0.0, 0.0, 0.0, 1.0])
    rule = threshold(min_log_probability=math.log(0.2))
    verification = rule.verify(batch)
    assert verification.accepted.tolist() == [1, 1, 0, 1]
    assert verification.token_ids[2].tolist() == [0, -1]
    assert verification.extra_acceptance.tolist() == pytest.approx([0, 1, 0, 0.7])


def test_top_k_relaxed_takes_the_best_within_delta() -> None:
    logits = law(0.45, 0.35, 0.15, 0.05).log().repeat(4, 1)
    drafted = step(logits, [0, 1, 2, 3], [1] * 4, temperatures=[0.0] * 4)

    def accepted(**options: Any) -> list[int]:
        return top_k_relaxed(**options).verify(drafted).accepted.tolist()

    assert accepted(k=1) == [1, 0, 0, 0]
    assert accepted(k=2) == [1, 1, 0, 0]
    assert accepted(k=3) == [1, 1, 1, 0]
    assert accepted(k=3, delta=0.2) == [1, 1, 0, 0]
    assert accepted(k=9, delta=0.0) == [1, 0, 0, 0]
    sampled = replace(drafted, temperatures=torch.ones(4), all_greedy=False, any_greedy=False)
    accept = top_k_relaxed(k=2).acceptance(sampled)
    assert accept.tolist() == pytest.approx([1, 1, 0.15, 0.05])


def test_top_k_relaxed_ranks_like_a_sort() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(300, 40, generator=generator, dtype=torch.float64)
    token_ids = torch.randint(40, (300,), generator=generator)
    batch = step(logits, token_ids.tolist(), [300], temperatures=[0.0])
    for k in (1, 3, 10, 40):
        ranked = (logits.topk(k, dim=1).indices == token_ids.unsqueeze(1)).any(dim=1)
        rows = torch.arange(300)
        assert torch.equal(top_k_relaxed(k=k).relaxed_greedy_acceptance(batch, rows), ranked)


BEGIN, END = 6, 7


def thinking(texts: list[list[int]]) -> TokenHistory:
    table = np.full((len(texts), 600), END, dtype=np.int32)  # stale beyond each text
    for row, text in enumerate(texts):
        table[row, : len(text)] = text
    lengths = np.array([len(text) for text in texts])
    return TokenHistory(table, np.arange(len(texts)), lengths, lengths)


def test_top_k_relaxed_only_between_thinking_tags() -> None:
    rule = top_k_relaxed(k=8, begin_thinking_token_id=BEGIN, end_thinking_token_id=END)
    # The most likely token is 0 and everything drafted is second.
    texts = [[1, 2], [1, BEGIN, 2], [BEGIN, 1, END, 3], [BEGIN] + [1] * 500, []]
    drafts = [[1, 1, 1], [1, END, 1], [BEGIN, 1, END], [1, 1, 1], [BEGIN, 1, END]]
    flat = [token for draft in drafts for token in draft]
    logits = torch.zeros(15, 8, dtype=torch.float64)
    logits[:, 0] = 0.1
    batch = step(logits, flat, [3] * 5, temperatures=[0.0] * 5, history=thinking(texts))
    thoughts = rule._thinking
    assert thoughts is not None
    relaxed = thoughts.inside(batch).view(5, 3).int().tolist()
    assert relaxed == [[0, 0, 0], [1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 1, 1]]
    assert rule.verify(batch).accepted.tolist() == [0, 2, 0, 3, 0]
    # The next step reads on from where it was; another text under a name is read anew.
    texts = [[1, 2, BEGIN], [1, BEGIN, 2, 1, END, 5], [BEGIN, 1, END, 3, 3], [1, 1], [5] * 400]
    batch = replace(batch, history=thinking(texts))
    assert thoughts.inside(batch).view(5, 3)[:, 0].int().tolist() == [1, 0, 0, 0, 0]
    rule.finish(batch.request_ids)
    assert not len(thoughts)
    assert not thoughts.inside(replace(batch, history=None)).view(5, 3)[:, 0].any()


def test_selecting_requests_keeps_their_history_and_their_grammar() -> None:
    logits = torch.zeros(3, 8)
    texts = [[1], [2, 2], [3, 3, 3]]
    batch = step(
        logits,
        [1, 2, 3],
        [1, 1, 1],
        history=thinking(texts),
        constrained=torch.tensor([True, False, True]),
    )
    part = batch.select(torch.tensor([0, 2]))
    assert part.constrained is not None
    assert part.constrained.tolist() == [True, True]
    assert part.history is not None
    assert part.history.num_tokens.tolist() == [1, 3]
    assert part.history.token_ids[part.history.rows[1], 0] == 3
    assert batch.select(torch.tensor([1])).constrained.tolist() == [False]


def test_kl_judge_trusts_near_laws_only() -> None:
    p = torch.cat([law(0.5, 0.3, 0.2), law(0.5, 0.5, 0), law(0.9, 0.1, 0), law(0.3, 0.3, 0.4)])
    q = torch.cat([law(0.4, 0.3, 0.3), law(0.4, 0.4, 0.2), law(0, 1, 0), law(0.6, 0.3, 0.1)])
    batch = step(p.log(), [2, 1, 1, 0], [4], draft=q)
    found = divergence(batch, torch.arange(4)).tolist()
    expected = [
        sum(a * math.log(a / b) for a, b in zip(x, y, strict=True) if a and b)
        for x, y in zip(p.tolist(), q.tolist(), strict=True)
    ]
    assert found[:2] == pytest.approx(expected[:2])
    assert found[3] == pytest.approx(expected[3])
    assert found[2] == math.inf
    accept = kl_judge(max_divergence=0.1).acceptance(batch)
    assert accept.tolist() == pytest.approx([1, 1, 0.1, 0.5])


@pytest.mark.parametrize("width", [300, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_judge_measures_the_divergence_of_whole_laws(dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(60, width, generator=generator, dtype=dtype) * 3
    logits[:20, 200:] = -torch.inf
    logits[20:24, 0] = -250.0  # p(x) as good as 0
    q = torch.softmax(logits + torch.randn(60, width, generator=generator, dtype=dtype), dim=1)
    q[5, 3] = q[6, 250:] = 0  # misses a token p has; misses none
    token_ids = torch.multinomial(q, 1, generator=generator).squeeze(1)
    token_ids[20:24], q[20:24, 0] = 0, 1e-3
    batch = step(logits, token_ids.tolist(), [60], draft=q)
    p = torch.softmax(logits.double(), dim=1)
    true = (torch.special.xlogy(p, p) - torch.special.xlogy(p, q.double())).sum(dim=1)
    found = divergence(batch, torch.arange(60)).double()
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)
    below = batch.draft_token_probability < batch.draft_law_of_token
    assert 20 < int(below.sum()) < 60
    assert math.isinf(float(true[5]))
    for row in below.nonzero().squeeze(1).tolist():
        for factor in (1 - 1e-4, 1 + 1e-4):
            bound = min(float(true[row]) * factor, 1e6)
            near = near_draft_tokens(step(logits, token_ids.tolist(), [60], draft=q), bound)
            assert bool(near[row]) == (factor > 1 and math.isfinite(true[row])), row
            assert not bool((near & ~below).any())


def test_kl_judge_verifies_choices_exactly_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    rule = kl_judge(max_divergence=1e6)
    chosen = one_hot(random_problem(4, num_draft=2, order=2))
    with caplog.at_level(logging.WARNING, logger="vllm.spec_plugins"):
        logging.getLogger("vllm.spec_plugins").addHandler(caplog.handler)
        for _ in range(2):
            assert enumeration_error(rule, [chosen]) <= TOLERANCE
        logging.getLogger("vllm.spec_plugins").removeHandler(caplog.handler)
    messages = {id(record): record.getMessage() for record in caplog.records}
    assert sum("verified exactly" in message for message in messages.values()) == 1
    # Of a batch of both kinds, only what was drawn is relaxed.
    drawn = random_problem(4, num_draft=2, order=2, sharpness=0.5)
    laws = output_laws(rule, [chosen, drawn])
    assert float((laws[0] - chosen.laws_of_text(3)).abs().max()) <= TOLERANCE
    assert float((laws[1] - drawn.laws_of_text(3)).abs().max()) > 0.01


# fly


def test_fly_forgives_a_mismatch_that_agreement_follows() -> None:
    """Greedy, by hand; 0 is the most likely token everywhere, of an undecided target."""
    undecided = [0.4, 0.3, 0.2, 0.1]
    sure = [0.97, 0.01, 0.01, 0.01]
    rows = [undecided] * 12
    rows[8] = sure
    logits = torch.tensor(rows, dtype=torch.float64).log()
    # A forgiven mismatch; one without its window; one where the target is sure.
    drafts = [*[1, 0, 0, 1], *[0, 1, 0, 1], *[1, 0, 0, 0]]
    batch = step(logits, drafts, [4, 4, 4], temperatures=[0.0] * 3)
    verification = fly(window_size=2).verify(batch)
    assert verification.accepted.tolist() == [3, 1, 0]
    assert verification.extra_acceptance.tolist() == [1] + [0] * 11
    assert fly(window_size=1).verify(batch).accepted.tolist() == [3, 3, 0]
    assert fly(window_size=1, entropy_threshold=2.0).verify(batch).accepted.tolist() == [0, 1, 0]
    # The three likeliest of the sure row: 0.03 + 2 * 0.046.
    assert fly(entropy_threshold=0.12).verify(batch).accepted.tolist() == [3, 3, 4]
    assert fly(entropy_threshold=0.13).verify(batch).accepted.tolist() == [3, 3, 0]


@pytest.mark.parametrize(("window", "num_draft"), [(1, 2), (1, 4), (2, 3), (2, 5)])
def test_fly_draws_from_the_law_it_states(window: int, num_draft: int) -> None:
    """How many tokens are accepted, over many steps with drafts of every length."""
    generator = torch.Generator().manual_seed(num_draft)
    rule = fly(window_size=window, entropy_threshold=0.6)
    rows = torch.randn(num_draft, 4, generator=generator, dtype=torch.float64)
    law_of_draft = torch.softmax(torch.randn(num_draft, 4, generator=generator).double(), dim=1)
    token_ids = torch.randint(4, (num_draft,), generator=generator).tolist()
    samples = 20_000
    one = step(rows, token_ids, [num_draft], draft=law_of_draft)
    [expected] = rule.accepted_law(one)
    assert float(expected.sum()) == pytest.approx(1, abs=1e-12)
    many = step(
        rows.repeat(samples, 1),
        token_ids * samples,
        [num_draft] * samples,
        draft=law_of_draft.repeat(samples, 1),
    )
    verification = rule.verify(many)
    found = torch.bincount(verification.accepted, minlength=num_draft + 1) / samples
    error = (expected * (1 - expected) / samples).sqrt()
    assert bool(((found - expected).abs() <= 5 * error + 1e-9).all())
    # The price is, in the mean, how many tokens beyond the exact rule's were let pass.
    exact = exact_acceptance(many)
    mismatch = many.uniforms(Purpose.ACCEPT) >= exact
    passed = (mismatch & (many.index_in_draft < verification.accepted[many.request_of])).double()
    extra = verification.extra_acceptance
    noise = float((passed - extra).view(samples, -1).sum(dim=1).std()) / math.sqrt(samples)
    assert float(passed.sum() - extra.sum()) / samples == pytest.approx(0, abs=5 * noise + 1e-9)


def test_the_price_of_fly_bounds_the_distance_of_the_text() -> None:
    for seed in range(4):
        problem = random_problem(seed, num_draft=3, order=3)
        rule = fly(entropy_threshold=0.5)
        samples = 4_000
        batch, _, (weights,) = enumerated_input([problem])
        rows = torch.multinomial(
            weights, samples, replacement=True, generator=torch.Generator().manual_seed(seed)
        )
        token_ids = batch.draft_token_ids.view(-1, 3)[rows].flatten()
        drawn = step(
            batch.target_logits.view(-1, 3, 4)[rows].flatten(0, 1),
            token_ids.tolist(),
            [3] * samples,
            draft=batch.draft_probabilities.values.view(-1, 3, 4)[rows].flatten(0, 1),
        )
        price = rule.verify(drawn).extra_acceptance.view(samples, 3).sum(dim=1)
        noise = float(price.std()) / math.sqrt(samples)
        assert total_variation(rule, problem) <= float(price.mean()) + 4 * noise


def test_fly_needs_drafts_longer_than_its_window() -> None:
    facts = replace(CONTEXT.facts, num_speculative_tokens=5)
    Fly.check(FlyOptions(window_size=4), facts)
    with pytest.raises(ConfigError, match="Raise num_speculative_tokens above it"):
        Fly.check(FlyOptions(window_size=5), facts)
    # Left to the draft model's config, the length is known when the verifier is built.
    Fly.check(FlyOptions(window_size=5), replace(facts, num_speculative_tokens=0))
    with pytest.raises(ConfigError, match="at most 5 tokens"):
        Fly(FlyOptions(window_size=5), replace(CONTEXT, facts=facts))


# Bad input.


@pytest.mark.parametrize(
    ("options", "bad"),
    [
        (TypicalOptions, {"epsilon": 0}),
        (TypicalOptions, {"delta": 1.5}),
        (ThresholdOptions, {"min_log_probability": 0.5}),
        (ThresholdOptions, {"min_log_probability": -math.inf}),
        (KLJudgeOptions, {"max_divergence": -1}),
        (KLJudgeOptions, {"max_divergence": math.inf}),
        (TopKRelaxedOptions, {"k": 0}),
        (TopKRelaxedOptions, {"delta": 2}),
        (TopKRelaxedOptions, {"begin_thinking_token_id": 5}),
        (TopKRelaxedOptions, {"begin_thinking_token_id": 5, "end_thinking_token_id": 5}),
        (FlyOptions, {"window_size": 0}),
        (FlyOptions, {"entropy_threshold": -1}),
        (FlyOptions, {"entropy_top_k": 0}),
        (FlyOptions, {"window": 3}),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: Any, bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        options(**bad)


def test_thinking_tags_are_token_ids_of_the_model() -> None:
    options = TopKRelaxedOptions(begin_thinking_token_id=3, end_thinking_token_id=16)
    with pytest.raises(ConfigError, match=r"end_thinking_token_id.* below 16"):
        TopKRelaxed.check(options, CONTEXT.facts)
