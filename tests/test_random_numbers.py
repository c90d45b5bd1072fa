"""The keyed uniforms: right values, uniform, independent of neighbours in every key."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vllm_spec_plugins.random_numbers import (
    Purpose,
    _on_device,
    stream_of_arrival,
    stream_of_seed,
    uniforms,
)

MASK = (1 << 64) - 1
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def mixed(x: int) -> int:
    """splitmix64's finaliser, on Python's unbounded integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def reference(stream: int, position: int, index: int, purpose: int) -> float:
    golden = 0x9E3779B97F4A7C15
    x = mixed((stream + golden) & MASK)
    x = mixed(x ^ ((position * golden + purpose) & MASK))
    x = mixed((x + index * 0x94D049BB133111EB) & MASK)
    return ((x >> 12) + 0.5) * 2.0**-52


@settings(deadline=None)  # the first one loads compiled code
@given(INT64, st.integers(0, 1 << 40), st.integers(0, 1000), st.sampled_from(Purpose))
def test_values(stream: int, position: int, index: int, purpose: Purpose) -> None:
    expected = reference(stream, position, index, int(purpose))
    streams, positions = torch.tensor([stream]), torch.tensor([position])
    by_number = uniforms(streams, positions, index, purpose)
    by_tensor = uniforms(streams, positions, torch.tensor([index]), purpose)
    assert by_number.item() == by_tensor.item() == expected
    assert 0 < expected < 1


@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (3, 4)])
@pytest.mark.parametrize("index", [0, 7, torch.arange(4)])
def test_a_device_and_the_host_draw_the_same(shape: tuple[int, ...], index: torch.Tensor | int):
    streams = torch.randint(-(2**63), 2**63 - 1, shape)
    positions = torch.randint(0, 2**40, shape)
    on_host = uniforms(streams, positions, index, Purpose.DRAFT)
    assert on_host.dtype == torch.float64
    assert torch.equal(on_host, _on_device(streams, positions, index, int(Purpose.DRAFT)))


def test_mixer_is_splitmix64() -> None:
    """First outputs of splitmix64 seeded with 1234567, as published with the algorithm."""
    state, outputs = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        outputs.append(mixed(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


COUNT = 400_000
ZERO, MANY = torch.zeros(COUNT, dtype=torch.int64), torch.arange(COUNT)
KEYS = {
    "streams": (MANY, ZERO, 0),
    "positions": (ZERO + 7, MANY, 0),
    "indices": (ZERO + 7, ZERO, MANY),
    "streams 2^32 apart": (MANY << 32, ZERO, 0),
    "every third position": (ZERO - 1, MANY * 3, 0),
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("purpose", Purpose)
def test_uniform_along_each_key(key: str, purpose: Purpose) -> None:
    u = uniforms(*KEYS[key], purpose)
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-6
    # Neighbours in pairs over a 32 x 32 grid, and at a distance.
    for lag in (1, 2, 17):
        cells = (u[:-lag] * 32).long() * 32 + (u[lag:] * 32).long()
        counts = torch.bincount(cells, minlength=1024)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-6
    low_bits = (u * 2.0**32).long() & 255
    assert stats.chisquare(torch.bincount(low_bits, minlength=256).numpy()).pvalue > 1e-6


@pytest.mark.parametrize("key", KEYS)
def test_purposes_are_independent(key: str) -> None:
    drawn = torch.stack([uniforms(*KEYS[key], purpose) for purpose in Purpose])
    correlation = torch.corrcoef(drawn).fill_diagonal_(0).abs().max()
    assert correlation < 6 / COUNT**0.5


def test_numbers_do_not_repeat() -> None:
    streams = torch.arange(100).view(-1, 1, 1)
    positions = torch.arange(200).view(1, -1, 1)
    index = torch.arange(16).view(1, 1, -1)
    drawn = torch.stack([uniforms(streams, positions, index, purpose) for purpose in Purpose])
    # 1.28 million of 2^52 numbers: a collision has probability 2e-4.
    assert len(drawn.unique()) == drawn.numel()


def test_streams() -> None:
    seeded = [stream_of_seed(seed) for seed in range(1000)]
    arrived = [stream_of_arrival(0, n, replica) for n in range(500) for replica in (0, 1)]
    assert len(set(seeded + arrived)) == 2000
    assert all(-(1 << 63) <= stream < 1 << 63 for stream in seeded + arrived)
    assert stream_of_seed(42) == stream_of_seed(42)
    assert stream_of_arrival(0, 3) != stream_of_arrival(1, 3)
