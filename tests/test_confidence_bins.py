"""Confidence bins: how often tokens of some confidence are accepted."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_spec_plugins.confidence_bins import ConfidenceBins


def test_bins_learn_what_confidences_are_worth() -> None:
    generator = np.random.default_rng(0)
    bins = ConfidenceBins(prior_strength=4.0)
    asked, fallback = np.array([0.1, 0.5, 0.9]), np.array([0.2, 0.4, 0.6])
    assert bins.acceptance(asked, fallback) == pytest.approx(fallback)
    for _ in range(2000):
        confidences = generator.random(16)
        bins.observe(confidences, generator.random(16) < confidences**2)
    assert bins.acceptance(asked, fallback) == pytest.approx(asked**2, abs=0.06)
    assert bins.acceptance(np.array([1.0]), fallback[:1])[0] > 0.85
