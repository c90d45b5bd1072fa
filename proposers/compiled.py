"""How this package compiles its host kernels: numba, one thread, no OpenMP.

Never `parallel=True`: numba's default OpenMP layer makes torch's own threads spin, and the
whole engine step many times slower.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first call, for use from other compiled functions."""
    return numba.njit(nogil=True, error_model="numpy")(function)


def entry_point(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first call from Python, and keep the machine code on disk where that works.

    numba's cache notices a change of the file the function is in, but not of those it calls
    into, which are compiled into it. So the cache is stamped with all of them. Without a
    folder to write to, or with a numba that keeps its stamp elsewhere, nothing is kept.
    """
    dispatcher: Any = compiled(function)
    try:
        dispatcher.enable_caching()
        cache_file = dispatcher._cache._cache_file
        cache_file._source_stamp  # noqa: B018  # raises where there is none
        cache_file._source_stamp = _stamp()
    except (RuntimeError, AttributeError):
        return compiled(function)
    return dispatcher


@cache
def _stamp() -> str:
    """Digest of everything in this folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@intrinsic
def address_as_pointer(_context: Any, _address: Any) -> Any:
    """An int64 address as the pointer `numba.carray` wants.

    Lets one kernel reach the memory of many requests, which comes and goes, through one
    array of addresses.
    """

    def generate(_typing: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def prefetch(_context: Any, _address: Any) -> Any:
    """Start loading the cache line at an int64 address, without waiting for it."""

    def generate(_typing: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        number = ir.IntType(32)
        pointer = builder.inttoptr(arguments[0], cgutils.voidptr_t)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number]),
            "llvm.prefetch.p0",
        )
        # To read, keep in every level of the cache, data.
        builder.call(function, [pointer, number(0), number(3), number(1)])

    return types.void(types.int64), generate


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
