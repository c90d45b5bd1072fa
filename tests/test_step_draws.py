"""Relaxed `verify`s draw what their rules say; those that draw something else are caught."""

from __future__ import annotations

import pytest

from vllm_spec_plugins.acceptance_rule import AcceptanceRule
from vllm_spec_plugins.testing.controls import misstated
from vllm_spec_plugins.testing.enumeration import has_exact_law
from vllm_spec_plugins.testing.guarantees import assert_draws_its_law, build_verifier

RULES = {
    "typical": "{}",
    "threshold": '{"min_log_probability": -1.5}',
    "top_k_relaxed": '{"k": 2}',
    "kl_judge": '{"max_divergence": 0.3}',
    "fly": '{"window_size": 1, "entropy_threshold": 0.1}',
    "lossless": '{"rule": "block"}',
}


def rule(name: str) -> AcceptanceRule:
    verifier = build_verifier(name, RULES[name])
    assert has_exact_law(verifier)
    return verifier


@pytest.mark.parametrize("name", RULES)
def test_verify_draws_what_the_rule_says(name: str) -> None:
    assert_draws_its_law(rule(name), samples=30_000)


@pytest.mark.parametrize("mistake", misstated(rule("top_k_relaxed")))
def test_each_mistake_is_caught(mistake: str) -> None:
    with pytest.raises(AssertionError, match="another law than accepted_law"):
        assert_draws_its_law(misstated(rule("top_k_relaxed"))[mistake])
