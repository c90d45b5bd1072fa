"""The text the zoo learns: the standard library of the Python that runs.

Every machine has it, nobody has to download it, and its files are real source code. Tests,
encodings tables and bundled third parties are left out, since distributions differ in them.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllm_spec_plugins.errors import SpecPluginsError

#: Folders that some distributions strip, or that hold tables rather than code.
_LEFT_OUT = frozenset({
    "__pycache__", "dist-packages", "encodings", "idle_test", "lib2to3", "site-packages", "test",
    "tests", "turtledemo",
})  # fmt: skip

#: Shorter files are licence notes and re-exports.
_SHORTEST = 400

#: One file in this many is held out.
_HELD_OUT = 20


class CorpusError(SpecPluginsError):
    """The standard library's source is not on this machine, or too little of it."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file: its path relative to the standard library, with `/`, and its text."""

    path: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether no model has seen it: decided by its path alone, so the same everywhere."""
        return int(hashlib.sha1(self.path.encode()).hexdigest(), 16) % _HELD_OUT == 0


@cache
def source_files(root: Path | None = None) -> tuple[SourceFile, ...]:
    """All files of the corpus, sorted by path.

    Args:
        root: Folder to read; default the running Python's standard library.

    Raises:
        CorpusError: Fewer than 100 files under the default folder: a stripped Python.
    """
    folder = root or Path(sysconfig.get_path("stdlib"))
    found: list[SourceFile] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for name in names:
            path = Path(parent, name)
            if path.suffix != ".py":
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue  # a file of odd encoding, or one that vanished: not worth failing for
            if len(text) > _SHORTEST:
                found.append(SourceFile(path.relative_to(folder).as_posix(), text))
    if root is None and len(found) < 100:
        raise CorpusError(
            f"only {len(found)} source files in {folder}: the zoo learns from the standard "
            "library's .py files, and this Python comes without them; use another Python."
        )
    return tuple(sorted(found, key=lambda file: file.path))


def training_files() -> list[SourceFile]:
    """The files models are trained on, sorted by path."""
    return [file for file in source_files() if not file.held_out]


def held_out_files() -> list[SourceFile]:
    """The files no model has seen, sorted by path: prompts for demo, benchmarks and tests."""
    return [file for file in source_files() if file.held_out]


@cache
def digest() -> str:
    """SHA-256 over every path and text, in hexadecimal."""
    total = hashlib.sha256()
    for file in source_files():
        for part in (file.path, file.text):
            data = part.encode()
            total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()
