"""How passes over rows are compiled, and the arithmetic that they share.

numba compiles a function on its first use and keeps the machine code beside its file where it may.
What is here becomes part of the functions that use it, and numba looks only at the date of their
own files: after a change here, delete `__pycache__`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

#: exp of less is no normal float32; it counts as 0.
LEAST_LOG = np.float32(-87.0)
LEAST = np.float32(1.1754944e-38)
ONE = np.float32(1)
ZERO = np.float32(0)
_LOG2_E = np.float32(1.44269504)
_LOG_2 = np.float32(0.69314718)
_HALF = np.float32(0.5)
#: None that assumes finite numbers: logits are -inf where sampling options exclude a token. Sums
#: may be reordered, so that they vectorise.
_FLAGS = {"reassoc", "contract", "nsz", "arcp"}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in machine code, from its first call on."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": _FLAGS}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to keep it in
        return numba.njit(**options)(function)


@numba.njit(inline="always")
def exp(x):
    """exp of a float32 not above 0 but by rounding: a power of 2 and a polynomial.

    To 5e-7 of it down to -4, and 5e-6 of the least. numba calls the C library otherwise, for one
    number at a time.
    """
    n = np.int32(x * _LOG2_E - _HALF)
    r = x - np.float32(n) * _LOG_2
    y = np.float32(8.31157e-3)
    y = y * r + np.float32(4.189893e-2)
    y = y * r + np.float32(1.6667153e-1)
    y = y * r + np.float32(4.9999171e-1)
    y = y * r * r + r + ONE
    return y * np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)


@numba.njit(inline="always")
def log(x):
    """log of a normal float32 above 0, to 2e-7: the exponent, and a polynomial of the rest."""
    bits = np.int32(np.float32(x).view(np.int32) - np.int32(0x3F3504F3))
    exponent = np.int32(bits >> np.int32(23))
    rest = np.int32((bits & np.int32(0x007FFFFF)) + np.int32(0x3F3504F3)).view(np.float32) - ONE
    y = np.float32(-1.0224205e-1)
    y = y * rest + np.float32(1.6141184e-1)
    y = y * rest + np.float32(-1.7166908e-1)
    y = y * rest + np.float32(1.9910238e-1)
    y = y * rest + np.float32(-2.4980574e-1)
    y = y * rest + np.float32(3.3334691e-1)
    square = rest * rest
    return rest - _HALF * square + rest * square * y + np.float32(exponent) * _LOG_2


@numba.njit(inline="always")
def sum_of_exponentials(row, shift):
    """Sum of exp(l - shift) of a row of float32; none is above the shift."""
    total = ZERO
    for column in range(row.shape[0]):
        total += exp(max(row[column] - shift, LEAST_LOG))
    return total
