"""Tests for anyone's verifier:

pytest --pyargs vllm_spec_plugins.testing.conformance --spec-verifier my_package:MyVerifier
"""

from __future__ import annotations

import pytest

from vllm_spec_plugins.verifier import Guarantee, Verifier

from .enumeration import enumeration_error, has_exact_law
from .guarantees import (
    TOLERANCE,
    Case,
    assert_draws_its_law,
    assert_price_is_measured,
    assert_relaxes,
    check_texts,
    enumeration_cases,
    simulation_cases,
)


def _lossless(verifier: Verifier) -> Verifier:
    if verifier.guarantee is not Guarantee.LOSSLESS:
        pytest.skip(f"the verifier promises only that it {verifier.guarantee.meaning}")
    return verifier


@pytest.mark.parametrize("case", enumeration_cases(), ids=lambda case: case.name)
def test_enumerated_law_is_the_targets(verifier_under_test: Verifier, case: Case) -> None:
    verifier = _lossless(verifier_under_test)
    if not has_exact_law(verifier):
        pytest.skip("the verifier does not say what it draws from (accepted_law, residual)")
    assert enumeration_error(verifier, case.problems, case.vocabulary) <= TOLERANCE


@pytest.mark.parametrize("case", simulation_cases(), ids=lambda case: case.name)
def test_generated_texts_follow_the_target(verifier_under_test: Verifier, case: Case) -> None:
    wrong = check_texts(_lossless(verifier_under_test), case)
    assert not wrong, "\n".join(wrong)


def test_price_is_measured(verifier_under_test: Verifier) -> None:
    if verifier_under_test.guarantee is Guarantee.LOSSLESS:
        pytest.skip("a lossless verifier has no price")
    assert_price_is_measured(verifier_under_test)


def test_a_relaxed_verifier_is_not_lossless(verifier_under_test: Verifier) -> None:
    if verifier_under_test.guarantee is Guarantee.LOSSLESS:
        pytest.skip("the verifier promises the target's law")
    assert_relaxes(verifier_under_test)


def test_verify_draws_what_the_verifier_says(verifier_under_test: Verifier) -> None:
    if not has_exact_law(verifier_under_test):
        pytest.skip("the verifier does not say what it draws from (accepted_law, residual)")
    assert_draws_its_law(verifier_under_test)
