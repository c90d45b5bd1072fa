"""Beta-distributed numbers from keyed uniforms: the same alone, in a batch, and on every rank.

A Beta(a, b) number is X / (X + Y) with X from Gamma(a) and Y from Gamma(b). Gamma numbers
come from rejection (Marsaglia and Tsang, ACM TOMS 26(3), 2000). The uniforms are those of
`random_numbers.uniforms`, hashed one by one as they are wanted: a batch of 64 takes some ten
microseconds, where torch needs a hundred to make the uniforms alone.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vllm_spec_plugins.proposers.compiled import compiled  # pyright: ignore[reportMissingImports]

from .random_numbers import _GOLDEN, _MIX_1, _MIX_2, Purpose

#: Of a gamma number. At least 95 % of attempts are accepted, so not once in 10^20 do all fail.
_ATTEMPTS = 16
#: Uniforms of one gamma number: two for a normal and a decision per attempt, one for the shape.
_PER_GAMMA = 3 * _ATTEMPTS + 1
_PER_BETA = 2 * _PER_GAMMA


def beta_draws(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    streams: NDArray[np.int64],
    positions: NDArray[np.int64],
    index: int,
    purpose: Purpose,
) -> NDArray[np.float64]:
    """One number per request. The first call compiles.

    Args:
        a: `[R]` first shape, positive.
        b: `[R]` second shape, positive.
        streams: `[R]` random stream of each request.
        positions: `[R]` sequence position of the first draft token.
        index: Which beta number of the step; those of other indices are independent.
        purpose: What they are for. Uniforms of this purpose belong to beta numbers alone.

    Returns:
        `[R]` in [0, 1].
    """
    draws = np.empty(len(a))
    # Arrays of another layout would be another thing to compile.
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    streams, positions = np.ascontiguousarray(streams), np.ascontiguousarray(positions)
    _beta_draws(a, b, streams, positions, index, int(purpose), draws)
    return draws


@compiled
def _beta_draws(a, b, streams, positions, index, purpose, draws):
    for i in range(len(draws)):
        key = _key(streams[i], positions[i], purpose)
        first = _log_gamma_draw(a[i], key, index * _PER_BETA)
        second = _log_gamma_draw(b[i], key, index * _PER_BETA + _PER_GAMMA)
        # By logarithms: shapes near 0 give numbers below the smallest float.
        draws[i] = 1 / (1 + math.exp(second - first))


@compiled
def _log_gamma_draw(shape, key, index):
    """Logarithm of a number from Gamma(shape), scale 1."""
    log_gamma = 0.0
    if shape < 1:
        # Gamma(s) is Gamma(s + 1) U^(1/s).
        log_gamma = math.log(_uniform(key, index + _PER_GAMMA - 1)) / shape
        shape += 1
    d = shape - 1 / 3
    for attempt in range(_ATTEMPTS):
        place = index + 3 * attempt
        # Box and Muller.
        normal = math.sqrt(-2 * math.log(_uniform(key, place)))
        normal *= math.cos(2 * math.pi * _uniform(key, place + 1))
        root = 1 + normal / math.sqrt(9 * d)
        if root > 0:
            v = root * root * root
            bound = 0.5 * normal * normal + d * (1 - v + math.log(v))
            if math.log(_uniform(key, place + 2)) < bound:
                return log_gamma + math.log(d * v)
    return log_gamma + math.log(d)


# `random_numbers.uniforms` once more, in compiled arithmetic.


@compiled
def _key(stream, position, purpose):
    """What the uniforms of a request, position and purpose have in common."""
    key = _mix(stream + np.int64(_GOLDEN))
    return _mix(key ^ (position * np.int64(_GOLDEN) + purpose))


@compiled
def _uniform(key, index):
    x = _mix(key + index * np.int64(_MIX_2))
    return (((x >> 12) & np.int64((1 << 52) - 1)) + 0.5) * 2.0**-52


@compiled
def _mix(x):
    x = (x ^ ((x >> 30) & np.int64((1 << 34) - 1))) * np.int64(_MIX_1)
    x = (x ^ ((x >> 27) & np.int64((1 << 37) - 1))) * np.int64(_MIX_2)
    return x ^ ((x >> 31) & np.int64((1 << 33) - 1))
