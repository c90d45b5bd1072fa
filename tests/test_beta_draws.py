"""Beta numbers from keyed uniforms: their law, their uniforms, and that they stay in place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vllm_spec_plugins.beta_draws import _key, _uniform, beta_draws
from vllm_spec_plugins.random_numbers import Purpose, uniforms

COUNT = 200_000
ZEROS, MANY = np.zeros(COUNT, dtype=np.int64), np.arange(COUNT)
KEYS = {"streams": (MANY, ZEROS), "positions": (ZEROS + 7, MANY * 3)}
SHAPES = [
    (1, 1),
    (0.5, 0.5),
    (0.01, 0.3),  # most numbers are next to nothing
    (0.9, 3),
    (2.4, 1.6),
    (1.001, 1),  # where attempts are rejected most
    (50, 20),
    (300, 1),
]


def draws(a: float, b: float, key: str = "streams", index: int = 3) -> np.ndarray:
    a_of, b_of = np.full(COUNT, float(a)), np.full(COUNT, float(b))
    return beta_draws(a_of, b_of, *KEYS[key], index, Purpose.LENGTH)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_law(a: float, b: float, key: str) -> None:
    assert stats.kstest(draws(a, b, key), stats.beta(a, b).cdf).pvalue > 1e-5


def test_a_wrong_law_would_be_noticed() -> None:
    """Negative control: a shape that is off by a hundredth."""
    assert stats.kstest(draws(2.4, 1.6), stats.beta(2.42, 1.6).cdf).pvalue < 1e-5


def test_indices_are_independent() -> None:
    first, second = draws(2, 3, index=0), draws(2, 3, index=1)
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / COUNT**0.5
    # Both large, or both small, as often as chance has it.
    median = stats.beta(2, 3).median()
    both = ((first > median) == (second > median)).mean()
    assert both == pytest.approx(0.5, abs=5 / COUNT**0.5)


@pytest.mark.parametrize(("a", "b"), [(1e-9, 1e-9), (1e-9, 50), (1e6, 1e-6), (1e8, 1e8)])
def test_extreme_shapes(a: float, b: float) -> None:
    numbers = draws(a, b)
    assert ((numbers >= 0) & (numbers <= 1)).all()
    assert numbers.mean() == pytest.approx(a / (a + b), abs=0.01)


INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


@given(INT64, st.integers(0, 1 << 40), st.integers(0, 100_000), st.sampled_from(Purpose))
def test_uniforms_are_those_of_random_numbers(
    stream: int, position: int, index: int, purpose: Purpose
) -> None:
    expected = uniforms(torch.tensor([stream]), torch.tensor([position]), index, purpose)
    assert _uniform(_key(stream, position, int(purpose)), index) == expected.item()


def test_a_request_draws_the_same_alone_and_in_a_batch() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.gamma(3.0, size=(2, 37))
    streams = generator.integers(-(1 << 63), (1 << 63) - 1, 37)
    positions = generator.integers(0, 4096, 37)
    together = beta_draws(a, b, streams, positions, 5, Purpose.LENGTH)
    for i in range(37):
        own = slice(i, i + 1)
        alone = beta_draws(a[own], b[own], streams[own], positions[own], 5, Purpose.LENGTH)
        assert alone[0] == together[i]
    backwards = beta_draws(a[::-1], b[::-1], streams[::-1], positions[::-1], 5, Purpose.LENGTH)
    assert (backwards[::-1] == together).all()
    nobody = np.zeros(0, dtype=np.int64)
    assert len(beta_draws(np.zeros(0), np.zeros(0), nobody, nobody, 0, Purpose.LENGTH)) == 0
