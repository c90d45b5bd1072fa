"""Random numbers that depend on who asks and where, never on who else is in the batch.

Each uniform is a hash of (stream, position, index, purpose). The same request at
the same position therefore draws the same number alone or among others, on every
tensor-parallel rank, and after preemption. Nothing is stored, nothing is shared.

`position` is the sequence position of the first draft token of a step. Every step
emits at least one token, so no two steps of a request share a position, and a
number looked at in one step is never looked at again in the next. Block
verification needs exactly this: it looks at the numbers of positions it then
discards (Sun et al. 2403.10444).
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """Keeps the streams apart: drafting and verifying must never share noise."""

    ACCEPT = 0
    RESAMPLE = 1
    DRAFT = 2
    LENGTH = 3
    #: Draft tokens of one sequence position that share their noise from step to step: keyed by
    #: that position itself, the token id the index.
    COUPLED_DRAFT = 4


def _signed(value: int) -> int:
    """The 64 bits of `value` as Python's torch-compatible signed integer."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


# splitmix64 (Steele, Lea, Flood 2014): increment and the two multipliers.
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's `>>` on int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniforms(streams: Tensor, positions: Tensor, index: Tensor | int, purpose: Purpose) -> Tensor:
    """Uniform numbers in the open interval (0, 1), one per element.

    Args:
        streams: Stream of each request, any broadcastable shape, int64.
        positions: Sequence position of the first draft token, same, int64.
        index: Which number of the step, int64 or an integer.
        purpose: What the number is for.

    Returns:
        float64, broadcast shape. Never 0 or 1, so `log` is always finite.
    """
    if streams.device.type != "cpu":
        return _on_device(streams, positions, index, int(purpose))
    on_host = index.numpy() if isinstance(index, Tensor) else index
    drawn = _on_host()(streams.numpy(), positions.numpy(), on_host, int(purpose))
    return torch.from_numpy(np.asarray(drawn))


def _on_device(streams: Tensor, positions: Tensor, index: Tensor | int, purpose: int) -> Tensor:
    """`uniforms`, in torch's arithmetic."""
    x = _mix(streams + _GOLDEN)
    x = _mix(x ^ (positions * _GOLDEN + purpose))
    x = _mix(x + (index * _MIX_2 if isinstance(index, Tensor) else _signed(index * _MIX_2)))
    # 52 bits and a half: 53 would let the largest value round to 1.
    return (_shift_right(x, 12).to(torch.float64) + 0.5) * 2.0**-52


@cache
def _on_host() -> Any:
    """`uniforms` of arrays: small operations of numpy and torch take many times as long.

    numba is not loaded before it is needed.
    """
    from .compiled_uniforms import uniform

    return uniform


def stream_of_seed(seed: int) -> int:
    """Stream of a request that came with its own seed: the same in every run."""
    return _digest("seed", seed)


def stream_of_arrival(engine_seed: int, arrival: int, replica: int = 0) -> int:
    """Stream of the `arrival`-th request without a seed, apart for each data-parallel replica."""
    return _digest("arrival", engine_seed, replica, arrival)


def _digest(*parts: object) -> int:
    data = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(data, "little", signed=True)
