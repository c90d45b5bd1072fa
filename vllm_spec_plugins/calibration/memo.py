"""Answers that took long to get, kept in a .jsonl so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Memo:
    """Values by key. Every value is on the disk before it is used.

    Args:
        path: File; created with the first value. A line cut short by a killed run is dropped.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: dict[str, Any] = {}
        if path.is_file():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                os.truncate(path, len(whole))
            for line in whole.splitlines():
                self._values.update(json.loads(line))

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __len__(self) -> int:
        return len(self._values)

    def add(self, values: Mapping[str, Any]) -> None:
        """Keep some values; all of them are plain JSON."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            for key, value in values.items():
                file.write(json.dumps({key: value}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._values.update(values)


def memo_key(*parts: object) -> str:
    """Sixteen hexadecimal digits of what decides a value."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]
