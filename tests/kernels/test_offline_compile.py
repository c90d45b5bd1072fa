"""Shipped launches, compiled for GPUs that are not there, held to `footprints.json`.

After a change of a kernel, look at the differences these tests print, and if they are wanted
write the table anew: `UPDATE_FOOTPRINTS=1 pytest tests/kernels/test_offline_compile.py`.

A kernel joins with a file in `shipped/`: `launches()` yields pairs of a name and a function
that makes the launches on meta tensors, and third, where a launch is not for all architectures,
those it is for. Numbers are those of one Triton version; under another
only what must always hold is tested: no spills, shared memory that fits, wide loads where the
table has them.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from vllm_spec_plugins.testing.offline_compile import (  # noqa: E402
    SHARED_LIMIT,
    TARGETS,
    Footprint,
    Launch,
    footprint,
    record_launches,
)

HERE = Path(__file__).parent
TABLE = HERE / "footprints.json"
UPDATE = os.environ.get("UPDATE_FOOTPRINTS") == "1"


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


class Shipped(NamedTuple):
    launch: Launch
    architectures: tuple[str, ...]
    is_slow: bool


def shipped() -> Iterator[tuple[str, Shipped]]:
    """Every launch of every file in `shipped/`, named `file.configuration.kernel`."""
    for file in sorted((HERE / "shipped").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"shipped_{file.stem}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        seen: list[tuple[Launch, tuple[str, ...]]] = []
        for configuration, run, *where in module.launches():
            architectures = where[0] if where else tuple(TARGETS)
            is_slow = configuration in getattr(module, "SLOW", ())
            for launch in record_launches(run):
                # Configurations often share a launch: it is compiled under its first name.
                if (launch, architectures) not in seen:
                    seen.append((launch, architectures))
                    name = f"{file.stem}.{configuration}.{launch.name}"
                    yield name, Shipped(launch, architectures, is_slow)


SHIPPED = dict(shipped())


def read_table() -> dict:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": "", "launches": {}}


def write(name: str, found: dict[str, Footprint]) -> None:
    table = read_table()
    table["triton"] = minor(triton.__version__)
    table["launches"][name] = {key: asdict(value) for key, value in found.items()}
    table["launches"] = {key: table["launches"][key] for key in sorted(table["launches"])}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


def differences(old: dict, new: dict[str, Footprint]) -> list[str]:
    """One line for each number that moved."""
    lines = []
    for architecture, found in new.items():
        before = old.get(architecture, {})
        for what, value in asdict(found).items():
            if before.get(what) != value:
                lines.append(f"  {architecture}: {what} {before.get(what)} -> {value}")
    return lines


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if s.is_slow else []) for n, s in SHIPPED.items()],
)
def test_footprint(name: str) -> None:
    launch, architectures, _ = SHIPPED[name]
    found = {architecture: footprint(launch, architecture) for architecture in architectures}
    for architecture, one in found.items():
        assert one.spills == 0, f"{name} on {architecture}: {one}"
        assert one.shared_bytes <= SHARED_LIMIT[architecture], f"{name} on {architecture}: {one}"
    if UPDATE:
        write(name, found)
    table = read_table()
    expected = table["launches"].get(name)
    assert expected is not None, f"{name} is not in {TABLE.name}"
    if table["triton"] == minor(triton.__version__):
        moved = differences(expected, found)
        assert not moved, "\n".join([f"{name} compiles to other numbers:", *moved])
    for architecture, one in found.items():
        wide = expected[architecture]["loads_128"]
        assert bool(one.loads_128) >= bool(wide), f"{name} on {architecture}: no wide loads"


def test_the_table_names_what_is_shipped() -> None:
    """A launch that is gone leaves the table with it."""
    if UPDATE:
        table = read_table()
        table["launches"] = {k: v for k, v in table["launches"].items() if k in SHIPPED}
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    assert sorted(read_table()["launches"]) == sorted(SHIPPED)


@triton.jit
def _greedy_for_registers(x_ptr, out_ptr, size: tl.constexpr):
    column = tl.arange(0, size)
    x = tl.load(x_ptr + column)
    # Everything is needed until the maximum is known.
    tl.store(out_ptr + column, x - tl.max(x, axis=0))


def test_spills_would_be_seen() -> None:
    """A control: more numbers than a warp has registers for."""
    memory = torch.empty(1 << 14, device="meta")
    (launch,) = record_launches(
        lambda: _greedy_for_registers[(1,)](memory, memory, size=1 << 14, num_warps=1)
    )
    found = footprint(launch, "sm_90")
    assert found.spills > 0
    assert found.loads_128 > 0
    assert differences({"sm_90": asdict(found) | {"spills": 0}}, {"sm_90": found}) == [
        f"  sm_90: spills 0 -> {found.spills}"
    ]
