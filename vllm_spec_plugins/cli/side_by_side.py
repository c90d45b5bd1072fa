"""Servers that stay up together and take turns, idle while another is timed.

Whatever else the machine does so falls on all of them alike. Here, too, is what every command has
that starts engines: one way to be stopped, prompts no model has seen, pictures at the end.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from vllm_spec_plugins.errors import ConfigError

from .server import Server

#: Seconds a server may take to start: machines that compile or swap are slow, not broken.
START_LIMIT = 300.0


def environment(threads: int) -> dict[str, str]:
    """Variables of a server whose model has so many CPU threads."""
    return {
        "HF_HUB_OFFLINE": "1",
        "NUMBA_THREADING_LAYER": "workqueue",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM unwinds the stack like Ctrl-C: the servers are stopped on the way."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def pictures_module() -> Any:
    """The module that draws, or one error before anything is started."""
    try:
        from . import pictures
    except ImportError as error:
        raise ConfigError(
            f"the demo draws with matplotlib, which cannot be imported ({error}). "
            'Install the extra [demo]: pip install "vllm-spec-plugins[demo]".'
        ) from None
    return pictures


def held_out_prompts(count: int, characters: int) -> list[str]:
    """Beginnings of source files that no model of the zoo has seen, whole lines."""
    from vllm_spec_plugins.zoo import corpus

    long_enough = [f.text for f in corpus.held_out_files() if len(f.text) > 2 * characters]
    return [text[:characters].rpartition("\n")[0] + "\n" for text in long_enough[:count]]


def progress_bars(console: Console) -> Progress:
    """One bar per stage: what, how far, how long."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def stage(progress: Progress, description: str, total: int) -> TaskID:
    """One bar. Into a file, where bars appear only at the end, also a line when it begins."""
    if not progress.console.is_terminal:
        progress.console.print(description, highlight=False)
    return progress.add_task(description, total=total)


def wait_until_ready(servers: Mapping[Any, Server], progress: Progress) -> None:
    """Raises `ServerError` when one ends, or is not ready in time."""
    task = stage(progress, f"starting {len(servers)} servers", len(servers))
    waiting = dict(servers)
    deadline = time.monotonic() + START_LIMIT
    while waiting:
        for way in [way for way, server in waiting.items() if server.is_ready()]:
            del waiting[way]
            progress.advance(task)
        if waiting and time.monotonic() > deadline:
            next(iter(waiting.values())).wait_until_ready(0)
        time.sleep(0.2)


def provenance(model: str, dtype: str, threads: int) -> dict[str, Any]:
    """What it takes to judge a row that was measured here."""
    versions = {"python": platform.python_version()}
    for package in ("vllm-spec-plugins", "vllm", "vllm-cpu", "torch", "numba"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "model": model,
        "dtype": dtype,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "threads": threads,
        "cores": os.cpu_count(),
        "processor": _processor(),
        "versions": versions,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
