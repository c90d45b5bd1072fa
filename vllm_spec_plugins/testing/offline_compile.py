"""What a Triton kernel becomes on GPUs that are not there: registers, shared memory, spills, loads.

Launches are recorded as the product makes them, on meta tensors (shapes and types, no memory),
then compiled for each architecture with the assemblers that come with Triton. No driver is
needed. The process must not have `TRITON_INTERPRET` set.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

#: Most shared memory of one program, bytes.
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch, as the compiler sees it.

    Attributes:
        kernel: The `@triton.jit` function.
        grid: Programs in each dimension.
        signature: Type of each argument; "constexpr" for those in `constants`.
        constants: Arguments known when compiling: constexprs, None, and integers that are 1.
        divisible: Arguments known to be multiples of 16.
        options: num_warps, num_stages and the like.
    """

    kernel: Any
    grid: tuple[int, ...]
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@dataclass(frozen=True)
class Footprint:
    """What one launch takes of one architecture.

    Attributes:
        registers: A thread's (a lane's vector registers on AMD).
        shared_bytes: Of one program.
        spills: Instructions on local memory (spilled registers on AMD). Should be 0.
        loads_128: Global loads of 128 bits.
        loads: All global loads.
    """

    registers: int
    shared_bytes: int
    spills: int
    loads_128: int
    loads: int


def record_launches(run: Callable[[], object]) -> list[Launch]:
    """The launches `run` makes, in order, without making them.

    `run` calls a launcher on meta tensors. What looks at a tensor's values raises, so this also
    shows that a launcher never waits for the device.
    """
    launches: list[Launch] = []

    def record(
        kernel: JITFunction, *positional: Any, grid: Any, warmup: bool = False, **named: Any
    ) -> None:
        del warmup
        launches.append(_launch(kernel, positional, grid, named))

    with patch.object(JITFunction, "run", record):
        run()
    return launches


def _launch(kernel: Any, positional: tuple[Any, ...], grid: Any, named: dict[str, Any]) -> Launch:
    names = [parameter.name for parameter in kernel.params]
    arguments = dict(zip(names, positional, strict=False))
    options = {key: value for key, value in named.items() if key not in names}
    arguments |= {key: value for key, value in named.items() if key in names}
    signature, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        value = arguments.get(parameter.name, parameter.default)
        is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = _type_of(value)
        # Memory comes aligned from the allocator; views of whole rows keep it.
        aligned = isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)
        if aligned and not parameter.do_not_specialize:
            divisible.append(parameter.name)
    size: Any = grid(arguments) if callable(grid) else grid
    return Launch(kernel, tuple(size), signature, constants, tuple(divisible), options)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def footprint(launch: Launch, architecture: str) -> Footprint:
    """Compile one launch for one of `TARGETS` and read what came out."""
    target = TARGETS[architecture]
    names = launch.kernel.arg_names
    source = ASTSource(
        fn=launch.kernel,
        signature=launch.signature,
        constexprs={(names.index(key),): value for key, value in launch.constants.items()},
        attrs={(names.index(key),): [["tt.divisibility", 16]] for key in launch.divisible},
    )
    # Triton versions differ in their default.
    options = {"enable_fp_fusion": True, **launch.options}
    compiled = triton.compile(source, target=target, options=options)
    if target.backend == "cuda":
        return _read_cubin(compiled.asm["cubin"], compiled.metadata.shared)
    return _read_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared)


def _read_cubin(cubin: bytes, dynamic_shared: int) -> Footprint:
    """From the machine code itself: assembling the PTX again gives other numbers."""
    dump, disassembler = knobs.nvidia.cuobjdump.path, knobs.nvidia.nvdisasm.path
    # cuobjdump looks for nvdisasm on the path.
    path = os.pathsep.join([str(Path(disassembler).parent), os.environ.get("PATH", "")])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def read(flag: str) -> str:
            return subprocess.run(
                [dump, flag, file.name],
                capture_output=True, text=True, check=True, env={**os.environ, "PATH": path},
            ).stdout  # fmt: skip

        usage, code = read("-res-usage"), read("-sass")
    found = re.search(r"REG:(\d+).*?SHARED:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump -res-usage printed no register count:\n{usage}")
    return Footprint(
        registers=int(found[1]),
        shared_bytes=max(dynamic_shared, int(found[2])),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        loads_128=len(re.findall(r"\b(?:LDG|LDGSTS)\.E[\w.]*\.128", code)),
        loads=len(re.findall(r"\b(?:LDG|LDGSTS)\.E", code)),
    )


def _read_amdgcn(assembly: str, shared: int) -> Footprint:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    loads = re.findall(r"\b(?:global|buffer)_load_(\w+)", assembly)
    return Footprint(
        registers=number("vgpr_count"),
        shared_bytes=shared,
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        loads_128=sum(kind.startswith("dwordx4") for kind in loads),
        loads=len(loads),
    )
