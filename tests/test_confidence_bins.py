"""Confidence bins: what confidences are worth, alone and beside an acceptance rate."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from vllm_spec_plugins.confidence_bins import ConfidenceBins, odds

ASKED = np.array([0.1, 0.5, 0.9])


def taught(chances: bool = False) -> ConfidenceBins:
    """By tokens that are accepted with their confidence squared."""
    generator = np.random.default_rng(0)
    bins = ConfidenceBins(prior_strength=4.0)
    for _ in range(2000):
        confidences = generator.random(16)
        chance: NDArray[np.float64] = confidences**2
        bins.observe(confidences, chance if chances else generator.random(16) < chance)
    return bins


def test_nothing_seen_nothing_told() -> None:
    bins, fallback = ConfidenceBins(prior_strength=4.0), np.array([0.2, 0.4, 0.6])
    assert bins.acceptance(ASKED, fallback) == pytest.approx(fallback)
    assert bins.odds_ratio(ASKED) == pytest.approx(np.ones(3))


@pytest.mark.parametrize("chances", [False, True])
def test_bins_learn_what_confidences_are_worth(chances: bool) -> None:
    bins, fallback = taught(chances), np.array([0.2, 0.4, 0.6])
    assert bins.acceptance(ASKED, fallback) == pytest.approx(ASKED**2, abs=0.06)
    assert bins.acceptance(np.array([1.0]), fallback[:1])[0] > 0.85


def test_odds_ratio_leads_from_the_mean_to_the_bin() -> None:
    bins = taught()
    ratio = bins.odds_ratio(ASKED)
    assert (np.diff(ratio) > 0).all()
    assert ratio[0] < 1 < ratio[2]
    own = odds(1 / 3) * ratio  # a third is accepted on average
    assert own / (1 + own) == pytest.approx(ASKED**2, abs=0.06)


def test_what_is_observed_next_counts() -> None:
    bins = taught()
    before = bins.odds_ratio(ASKED[:1])[0]
    for _ in range(200):
        bins.observe(np.full(16, ASKED[0]), np.ones(16, dtype=np.bool_))
    assert bins.odds_ratio(ASKED[:1])[0] > 2 * before


def test_a_mean_shared_by_all_bins_tells_nothing() -> None:
    generator = np.random.default_rng(1)
    bins = ConfidenceBins(prior_strength=4.0)
    for _ in range(500):
        bins.observe(generator.random(16), np.full(16, 0.7))
    assert bins.odds_ratio(ASKED) == pytest.approx(np.ones(3), abs=0.02)


def test_odds_of_the_ends_are_finite() -> None:
    assert odds(np.array([0.0, 0.5, 1.0])) == pytest.approx([1 / 99, 1.0, 99.0])
