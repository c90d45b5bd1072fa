"""Both lossless rules, enumerated: the law of the text is the target's to 1e-12."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from vllm_spec_plugins.verifiers.lossless import Lossless, LosslessOptions

from vllm_spec_plugins.acceptance_rule import AcceptanceRule, token_acceptance
from vllm_spec_plugins.testing.enumeration import (
    enumerated_input,
    enumeration_error,
    expected_accepted,
    output_laws,
    total_variation,
)
from vllm_spec_plugins.testing.guarantees import (
    TOLERANCE,
    Case,
    assert_keeps_its_guarantee,
    assert_lossless,
    assert_price_is_measured,
    build_verifier,
    enumeration_cases,
)
from vllm_spec_plugins.testing.toy_problems import (
    ToyProblem,
    near_equal,
    random_problem,
    toy_context,
    truncated_draft,
    within_vocabulary,
)
from vllm_spec_plugins.verifier import Guarantee, VerifierOptions, VerifyInput

TOKEN = Lossless(LosslessOptions(rule="token"), toy_context())
BLOCK = Lossless(LosslessOptions(rule="block"), toy_context())
RULES = pytest.mark.parametrize("verifier", [TOKEN, BLOCK], ids=["token", "block"])


@RULES
@pytest.mark.parametrize("case", enumeration_cases(), ids=lambda case: case.name)
def test_law_of_text_is_the_targets(verifier: Lossless, case: Case) -> None:
    assert enumeration_error(verifier, case.problems, case.vocabulary) <= TOLERANCE


@RULES
@pytest.mark.parametrize("seed", range(40))
def test_law_of_text_on_random_problems(verifier: Lossless, seed: int) -> None:
    sharpness = (0.1, 1.0, 3.0, 10.0)[seed % 4]
    problem = random_problem(100 + seed, vocab_size=3, num_draft=3, order=4, sharpness=sharpness)
    assert enumeration_error(verifier, [problem]) <= TOLERANCE


@RULES
def test_accepted_counts_are_a_law(verifier: Lossless) -> None:
    for case in enumeration_cases():
        batch, _, _ = enumerated_input(case.problems, case.vocabulary)
        law = verifier.accepted_law(batch)
        assert (law >= 0).all()
        torch.testing.assert_close(law.sum(dim=1), torch.ones(len(law)).double())


@pytest.mark.parametrize("seed", range(60))
def test_block_never_accepts_fewer(seed: int) -> None:
    problem = random_problem(seed, vocab_size=3, num_draft=1 + seed % 4, order=4)
    token, block = expected_accepted(TOKEN, problem), expected_accepted(BLOCK, problem)
    assert block >= token - TOLERANCE
    if problem.num_draft == 1:
        assert block == pytest.approx(token, abs=TOLERANCE)


def two_coins(num_draft: int) -> ToyProblem:
    """Tokens independent of each other: p = (1/3, 2/3), q = (2/3, 1/3)."""
    p = torch.tensor([[1.0, 2.0]], dtype=torch.float64) / 3
    return ToyProblem(p.log(), p.flip(1), num_draft)


def test_expected_accepted_of_two_coins() -> None:
    """By hand (the example of Sun et al. 2403.10444): 2/3 + 4/9, and a ninth more by block."""
    assert expected_accepted(TOKEN, two_coins(1)) == pytest.approx(2 / 3, abs=TOLERANCE)
    assert expected_accepted(TOKEN, two_coins(2)) == pytest.approx(10 / 9, abs=TOLERANCE)
    assert expected_accepted(BLOCK, two_coins(2)) == pytest.approx(11 / 9, abs=TOLERANCE)


@RULES
def test_equal_laws_accept_everything(verifier: Lossless) -> None:
    problem = near_equal(random_problem(0, num_draft=3, order=3), distance=0.0)
    assert expected_accepted(verifier, problem) == pytest.approx(3, abs=1e-9)
    assert enumeration_error(verifier, [problem]) <= TOLERANCE


@RULES
def test_no_common_token_accepts_nothing(verifier: Lossless) -> None:
    target = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]], dtype=torch.float64)
    draft = torch.tensor([[0.0, 0.0, 0.5, 0.5]], dtype=torch.float64)
    problem = ToyProblem(target, draft, 2)
    assert expected_accepted(verifier, problem) == 0
    assert enumeration_error(verifier, [problem]) <= TOLERANCE


@RULES
def test_tokens_outside_the_draft_vocabulary_keep_their_probability(verifier: Lossless) -> None:
    vocabulary = torch.tensor([1, 3])
    problem = within_vocabulary(random_problem(4, num_draft=1, order=2), vocabulary)
    (law,) = output_laws(verifier, [problem], vocabulary)
    first_token = law.view(4, 4).sum(dim=1)
    torch.testing.assert_close(first_token, problem.target[problem.start], atol=1e-12, rtol=0)
    assert first_token[[0, 2]].min() > 0.01


class Lenient(AcceptanceRule):
    """Accepts with min(1, p / (0.7 q)): relaxed on purpose (Leviathan et al., lenience)."""

    guarantee = Guarantee.HEURISTIC

    def acceptance(self, batch: VerifyInput) -> Tensor:
        p, q = batch.draft_token_probability, batch.draft_law_of_token
        return torch.where(p > 0, p / (0.7 * q), 0).clamp(max=1)


class FloorAndCeiling(AcceptanceRule):
    """Accepts likely tokens always and unlikely ones at half the exact rate: more and less."""

    guarantee = Guarantee.HEURISTIC

    def acceptance(self, batch: VerifyInput) -> Tensor:
        exact = token_acceptance(batch)
        return torch.where(batch.draft_token_probability > 0.3, 1.0, exact / 2)

    def acceptance_over_vocabulary(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        p = torch.softmax(batch.target_logits[rows], dim=1)
        q = torch.ones_like(p)
        if batch.draft_probabilities is not None:
            q = batch.draft_probabilities.dense(rows, batch.draft_token_ids[rows], p.shape[1])
        exact = torch.where(p < q, p / q, 1.0)
        return torch.where(p > 0.3, 1.0, exact / 2)


class HalfHearted(AcceptanceRule):
    """Accepts at half the exact rate and makes up for it: lossless, only slower."""

    guarantee = Guarantee.LOSSLESS

    def acceptance(self, batch: VerifyInput) -> Tensor:
        return token_acceptance(batch) / 2

    def acceptance_over_vocabulary(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        p = torch.softmax(batch.target_logits[rows], dim=1)
        q = torch.ones_like(p)
        if batch.draft_probabilities is not None:
            q = batch.draft_probabilities.dense(rows, batch.draft_token_ids[rows], p.shape[1])
        return torch.where(p < q, p / q, 1.0) / 2


@pytest.mark.parametrize("kind", [Lenient, FloorAndCeiling])
def test_relaxed_rule_is_not_lossless_and_reports_its_price(kind: type[AcceptanceRule]) -> None:
    verifier = kind(VerifierOptions(), toy_context())
    assert_keeps_its_guarantee(verifier)
    with pytest.raises(AssertionError, match="enumerated, is off by"):
        assert_lossless(verifier, cases=[])
    distances = [
        total_variation(verifier, random_problem(seed, num_draft=1, order=1)) for seed in range(9)
    ]
    assert max(distances) > 0.05


def test_price_of_the_two_coins() -> None:
    """By hand: the likely draft token is accepted with 1/3 / (0.7 * 2/3) instead of 1/2."""
    verifier = Lenient(VerifierOptions(), toy_context())
    expected = 2 / 3 * (1 / 1.4 - 1 / 2)
    assert total_variation(verifier, two_coins(1)) == pytest.approx(expected, abs=TOLERANCE)


def test_rule_that_accepts_less_stays_exact_through_its_residual() -> None:
    verifier = HalfHearted(VerifierOptions(), toy_context())
    for seed in range(10):
        plain = random_problem(seed, num_draft=2, order=2)
        problems = [plain, truncated_draft(plain, 0.7), replace(plain, num_placeholders=1)]
        assert enumeration_error(verifier, problems) <= TOLERANCE


def test_understated_price_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = Lenient(VerifierOptions(), toy_context())
    honest = verifier.verify

    def flattering(batch: VerifyInput) -> object:
        result = honest(batch)
        assert result.extra_acceptance is not None
        return replace(result, extra_acceptance=result.extra_acceptance * 0.9)

    monkeypatch.setattr(verifier, "verify", flattering)
    with pytest.raises(AssertionError, match="reports an extra acceptance"):
        assert_price_is_measured(verifier)


def test_mislabelled_verifier_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lenient, "guarantee", Guarantee.LOSSLESS)
    with pytest.raises(AssertionError, match="enumerated, is off by"):
        assert_keeps_its_guarantee(Lenient(VerifierOptions(), toy_context()))


def test_built_in_verifier_by_name() -> None:
    verifier = build_verifier("lossless", '{"rule": "block"}')
    assert isinstance(verifier, Lossless)
    assert verifier.options.rule == "block"
    by_path = build_verifier("vllm_spec_plugins.verifiers.lossless:Lossless")
    assert isinstance(by_path, Lossless)
