"""What `kernels.py` needs to know of a kernel at one shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class KernelCase:
    """One kernel at one shape, with its peers on the same tensors.

    Attributes:
        kernel: Name of the operation.
        shape: What tells this case from others of the kernel; goes into the row.
        run: Does it once.
        launches: Kernels it launches.
        minimum_bytes: What any implementation has to read and write.
        check: Raises AssertionError where the results are not those of the reference. Run first.
        peers: Other ways to the same end, by name; those not installed are left out.
    """

    kernel: str
    shape: dict[str, Any]
    run: Callable[[], object]
    launches: int
    minimum_bytes: int
    check: Callable[[], None]
    peers: dict[str, Callable[[], object]] = field(default_factory=dict)
