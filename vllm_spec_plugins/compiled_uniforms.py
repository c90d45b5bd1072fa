"""`random_numbers.uniforms` on the CPU, in one compiled pass."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

# splitmix64 (Steele, Lea, Flood 2014): increment and the two multipliers.
_GOLDEN, _MIX_1, _MIX_2 = map(
    np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_BY_30, _BY_27, _BY_31, _BY_12 = map(np.uint64, (30, 27, 31, 12))


@numba.njit(inline="always")
def _mix(x):
    x = (x ^ (x >> _BY_30)) * _MIX_1
    x = (x ^ (x >> _BY_27)) * _MIX_2
    return x ^ (x >> _BY_31)


def _uniform(stream, position, index, purpose):
    x = _mix(np.uint64(stream) + _GOLDEN)
    x = _mix(x ^ (np.uint64(position) * _GOLDEN + np.uint64(purpose)))
    x = _mix(x + np.uint64(index) * _MIX_2)
    # 52 bits and a half: 53 would let the largest value round to 1.
    return (np.float64(x >> _BY_12) + 0.5) * 2.0**-52


def _vectorized() -> Any:
    signature = ["float64(int64, int64, int64, int64)"]
    try:
        return numba.vectorize(signature, cache=True)(_uniform)
    except RuntimeError:  # no folder to keep it in
        return numba.vectorize(signature)(_uniform)


#: Of arrays and numbers of int64, broadcast: stream, position, index, purpose.
uniform = _vectorized()
