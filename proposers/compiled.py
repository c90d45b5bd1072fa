"""How this package compiles its host kernels: numba, one thread, no OpenMP.

Never `parallel=True`: numba's default OpenMP layer makes torch's own threads spin, and the
whole engine step many times slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first call, for use from other compiled functions."""
    return numba.njit(nogil=True, error_model="numpy")(function)


@intrinsic
def address_as_pointer(_context: Any, _address: Any) -> Any:
    """An int64 address as the pointer `numba.carray` wants.

    Lets one kernel reach the memory of many requests, which comes and goes, through one
    array of addresses.
    """

    def generate(_typing: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@compiled
def spread(high, low):
    """63 well-mixed bits of two integers below 2^31, for open-addressing tables."""
    key = (np.int64(high) << 32) ^ np.int64(low)
    key *= np.int64(-7046029254386353131)  # 2^64 / golden ratio
    key ^= (key >> 29) & np.int64(0x7FFFFFFFF)
    key *= np.int64(-4658895280553007687)
    return (key >> 1) & np.int64(0x7FFFFFFFFFFFFFFF)


@compiled
def place(bits, size):
    """A place in a table of any `size` below 2^31."""
    return ((bits >> 31) * size) >> 32
