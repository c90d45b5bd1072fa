"""Lets vLLM's model runner V2 run on a CPU, in Triton's interpreter. For tests only.

V2 computes its inputs, its samples and its bookkeeping in Triton kernels, and refuses to start
where Triton has no device. The interpreter runs such kernels on the CPU, program by program:
correct, and some thousand times slower. Two things stand in the way and are put right here, in
this process only: Triton must be told of a device called "cpu", and the interpreter must take
masks that are not booleans, which compiled kernels take.

    from vllm_spec_plugins.testing.triton_interpreter import interpret
    interpret()  # before torch, triton or vllm are imported
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from typing import Any


def interpret() -> None:
    """Run Triton kernels in the interpreter, and engines on model runner V2, in this process.

    Raises:
        RuntimeError: Triton was imported before; its own functions are compiled then.
    """
    if "triton" in sys.modules:
        raise RuntimeError("interpret() must be called before Triton is imported.")
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    _name_a_device()
    _take_any_mask()


def _name_a_device() -> None:
    """vLLM counts Triton's active drivers: one, for "cpu"."""
    from triton.backends import backends
    from triton.runtime import driver

    class CpuDriver:
        """What of a driver is asked for when nothing is compiled."""

        @staticmethod
        def is_active() -> bool:
            return True

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            del device
            return 0

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("cpu")

        def get_device_interface(self) -> Any:
            import torch

            return torch.cpu

        def get_current_target(self) -> Any:
            from triton.backends.compiler import GPUTarget

            return GPUTarget("cpu", 0, 1)

    listed: Any = backends
    listed["cpu"] = types.SimpleNamespace(driver=CpuDriver, compiler=None)
    active: Any = driver
    active.set_active(CpuDriver())


def _take_any_mask() -> None:
    """Integer masks of loads and stores, as booleans."""
    from triton.runtime.interpreter import InterpreterBuilder

    builder: Any = InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    builder.create_masked_load = _with_boolean_mask(load, 1)
    builder.create_masked_store = _with_boolean_mask(store, 2)


def _with_boolean_mask(original: Callable[..., Any], index: int) -> Callable[..., Any]:
    """`original` whose argument `index`, after `self`, is a mask."""
    import numpy as np

    def with_boolean_mask(self: Any, *args: Any, **kwargs: Any) -> Any:
        mask = args[index] if len(args) > index else kwargs.get("mask")
        if mask is not None and hasattr(mask, "data") and mask.data.dtype != np.bool_:
            mask.data = mask.data.astype(np.bool_)
        return original(self, *args, **kwargs)

    return with_boolean_mask
