"""Confidence odds: what confidences add to an acceptance rate that is known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from vllm_spec_plugins.confidence_odds import ConfidenceOdds, odds

ASKED = np.array([0.1, 0.5, 0.9])


def believed(told: ConfidenceOdds, rate: float, exit_: int = 0) -> NDArray[np.float64]:
    """Chances of tokens of the confidences asked for, of a request of some rate."""
    own = odds(np.full(3, rate)) * told.ratio(exit_, ASKED)
    return own / (1 + own)


@pytest.fixture(params=[False, True], ids=["verdicts", "chances"])
def taught(request: pytest.FixtureRequest) -> ConfidenceOdds:
    """Two exits; tokens of the second are accepted with their confidence squared."""
    generator, told = np.random.default_rng(0), ConfidenceOdds(2)
    for _ in range(3000):
        confidences = generator.random((16, 2))
        chance = np.stack([np.full(16, 0.7), confidences[:, 1] ** 2], axis=1)
        verdicts = (generator.random((16, 2)) < chance).astype(np.float64)
        rates = np.tile([0.7, 1 / 3], (16, 1))
        told.observe(confidences, chance if request.param else verdicts, rates)
    return told


def test_nothing_seen_nothing_told() -> None:
    assert ConfidenceOdds(3).ratio(2, ASKED).tolist() == [1, 1, 1]


def test_from_the_rate_to_the_chance_of_the_confidence(taught: ConfidenceOdds) -> None:
    assert believed(taught, 1 / 3, 1) == pytest.approx(ASKED**2, abs=0.06)
    assert (np.diff(taught.ratio(1, ASKED)) > 0).all()


def test_each_exit_has_its_own(taught: ConfidenceOdds) -> None:
    assert believed(taught, 0.7, 0) == pytest.approx(np.full(3, 0.7), abs=0.04)


def test_what_the_rate_tells_is_not_told_twice() -> None:
    """Confidence tells which request it is, and no more."""
    generator, told = np.random.default_rng(0), ConfidenceOdds(1)
    for _ in range(2000):
        rates = np.repeat([0.9, 0.5], 8)[:, None]
        confidences = rates + 0.05 * generator.random((16, 1)) - 0.02
        told.observe(confidences, (generator.random((16, 1)) < rates).astype(float), rates)
    assert told.ratio(0, np.array([0.9, 0.5])) == pytest.approx(np.ones(2), abs=0.1)


def test_old_tokens_fade() -> None:
    generator = np.random.default_rng(0)
    quick, slow = (ConfidenceOdds(1, discount=discount) for discount in (0.9, 1.0))
    for told in (quick, slow):
        for accepted in (0.9, 0.5):
            for _ in range(100):
                told.observe(generator.random((8, 1)), *np.array([[[accepted]] * 8, [[0.5]] * 8]))
    assert believed(quick, 0.5)[1] == pytest.approx(0.5, abs=0.02)
    assert believed(slow, 0.5)[1] > 0.6


def test_odds_of_the_ends_are_finite() -> None:
    assert odds(np.array([0.0, 0.5, 1.0])) == pytest.approx([1 / 99, 1.0, 99.0])
