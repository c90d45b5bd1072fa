"""Where kernels run, and Triton where there is one.

Kernel modules import `triton` and `tl` from here, never from vLLM, whose own names are
placeholders on the CPU. Each module has the kernel, the operation (one function, dispatched on
the tensor's device) and its PyTorch reference, and imports without Triton.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    # Inside kernels nothing has the type that Python would give it.
    class _Language(type):
        def __getattr__(cls, name: str) -> Any: ...

    class tl(metaclass=_Language):  # noqa: N801
        constexpr: TypeAlias = Any

    triton: Any
    HAS_TRITON = True
else:
    try:
        import triton
        import triton.language as tl

        HAS_TRITON = True
    except ImportError:
        HAS_TRITON = False

        class tl:  # noqa: N801
            """Lets kernels be defined: annotations and constants, nothing that runs."""

            constexpr = staticmethod(lambda value=None: value)

        class triton:  # noqa: N801
            """Decorates kernels; they are never launched, `use_triton` sees to that."""

            jit = staticmethod(lambda kernel: kernel)


#: `tl.constexpr` for constants of a module.
constant: Any = getattr(tl, "constexpr")  # noqa: B009

#: Set before Triton is imported, or its own functions are not interpreted.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(tensor: Tensor) -> bool:
    """Whether operations on this tensor use the Triton kernel rather than the reference.

    On the CPU only in Triton's interpreter. Meta tensors do, so that launches can be recorded
    (`vllm_spec_plugins.testing.offline_compile`).
    """
    if tensor.device.type == "cpu":
        return INTERPRETED
    return HAS_TRITON and tensor.device.type in ("cuda", "xpu", "meta")
