"""Triton kernels on a GPU: correctness first, then time, in one table.

    python benchmarks/kernels.py [--only verify] [--quick]

Cases come from every `kernels_*.py` beside this file (`cases(device)`, see `kernel_case.py`).
Of each, the check against the reference runs first; a case that fails it is not timed, and the
command ends with an error. Method and how to read the table: `benchmarks/kernels.md`. Rows are
appended to benchmarks/results/kernels.jsonl.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from kernel_case import KernelCase
from provenance import provenance
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "kernels.jsonl"

#: Bytes written between runs so that nothing is left in the second-level cache.
FLUSH_BYTES = 256 << 20
#: Launches whose time on the host is taken.
EAGER_LAUNCHES = 1000

Timer = Callable[[Callable[[], object], bool, int], list[float]]


def cases(device: torch.device, only: str) -> Iterator[KernelCase]:
    """Of every module of cases, those whose kernel's name contains `only`."""
    for file in sorted(HERE.glob("kernels_*.py")):
        module = importlib.import_module(file.stem)
        for case in module.cases(device):
            if only in case.kernel:
                yield case


def gpu_microseconds(run: Callable[[], object], cold: bool, repeats: int) -> list[float]:
    """Time of each run between two events on the device's own clock, sorted.

    Args:
        run: What is timed.
        cold: Whether the second-level cache is flushed before each run.
        repeats: Runs.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda") if cold else None
    for _ in range(10):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    for before, after in events:
        if flush is not None:
            flush.zero_()
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return sorted(before.elapsed_time(after) * 1e3 for before, after in events)


def host_microseconds(run: Callable[[], object], launches: int = EAGER_LAUNCHES) -> float:
    """What one call costs the host: the device is left behind, not waited for."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(launches):
        run()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / launches * 1e6


def copy_bandwidth() -> float:
    """Bytes a second, read plus written, of copying 1 GiB on this card."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    times = gpu_microseconds(lambda: target.copy_(source), False, 50)
    return 2 * source.numel() / (statistics.median(times) * 1e-6)


def quantiles(times: list[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile of sorted times."""
    last = len(times) - 1
    return {f"p{p}": times[round(last * p / 100)] for p in (20, 50, 80)}


def measure(
    case: KernelCase, bandwidth: float, repeats: int, timer: Timer = gpu_microseconds
) -> dict[str, Any]:
    """Check one case, then time it and its peers: ours, each peer, ours again.

    Raises:
        AssertionError: The results are not those of the reference; nothing was timed.
    """
    case.check()
    ours = {temperature: timer(case.run, temperature == "cold", repeats)
            for temperature in ("cold", "warm")}  # fmt: skip
    peers = {name: quantiles(timer(run, True, repeats)) for name, run in case.peers.items()}
    again = timer(case.run, True, repeats)
    cold, warm = quantiles(ours["cold"]), quantiles(ours["warm"])
    rate = case.minimum_bytes / (cold["p50"] * 1e-6)
    best = min(peers, key=lambda name: peers[name]["p50"], default=None)
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "launches": case.launches,
        "minimum_bytes": case.minimum_bytes,
        "cold_us": cold,
        "warm_us": warm,
        "drift": statistics.median(again) / cold["p50"] - 1,
        "bytes_per_second": rate,
        "share_of_copy_bandwidth": rate / bandwidth,
        "peers_us": peers,
        "best_peer": best,
        "times_faster": None if best is None else peers[best]["p50"] / cold["p50"],
    }


def machine() -> dict[str, Any]:
    """The card as it is: nothing of it is set here."""
    properties = torch.cuda.get_device_properties(0)
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found = dict(zip(query.split(","), done.stdout.splitlines()[0].split(", "), strict=True))
    except (OSError, subprocess.CalledProcessError, IndexError):
        found = {}
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda or torch.version.hip,
        **found,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """One line for each case."""
    result = Table(title="Kernels, microseconds")
    for name in ("kernel", "shape", "cold p50 [p20, p80]", "warm p50", "launches", "MB",
                 "of copy", "host", "best peer", "its p50", "times faster"):  # fmt: skip
        result.add_column(name)
    for row in rows:
        cold, best = row["cold_us"], row["best_peer"]
        result.add_row(
            row["kernel"],
            " ".join(f"{key}={value}" for key, value in row["shape"].items()),
            f"{cold['p50']:.1f} [{cold['p20']:.1f}, {cold['p80']:.1f}]",
            f"{row['warm_us']['p50']:.1f}",
            str(row["launches"]),
            f"{row['minimum_bytes'] / 1e6:.1f}",
            f"{row['share_of_copy_bandwidth']:.0%}",
            f"{row['host_us']:.1f}" if "host_us" in row else "-",
            best or "-",
            f"{row['peers_us'][best]['p50']:.1f}" if best else "-",
            f"{row['times_faster']:.2f}" if best else "-",
        )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument("--quick", action="store_true", help="20 runs of each, no rows written")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU here, so there is nothing to time. Without one, "
              "`pytest tests/kernels` holds the kernels to their references and to the table "
              "of what they compile to.", file=sys.stderr)  # fmt: skip
        return 1
    console = Console()
    bandwidth = copy_bandwidth()
    console.print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    where = provenance() | machine() | {"copy_bytes_per_second": bandwidth}
    rows, failed = [], []
    for case in cases(torch.device("cuda"), args.only):
        try:
            row = measure(case, bandwidth, 20 if args.quick else 300)
        except AssertionError as error:
            failed.append(f"{case.kernel} {case.shape}: {error}")
            console.print(f"[red]wrong[/red] {failed[-1]}")
            continue
        row["host_us"] = host_microseconds(case.run)
        rows.append(row)
        console.print(f"{case.kernel} {case.shape}: {row['cold_us']['p50']:.1f} us")
        if not args.quick:
            with RESULTS.open("a") as file:
                file.write(json.dumps(row | where) + "\n")
    console.print(table(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
