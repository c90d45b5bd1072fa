"""Rows of `self_speculation`, and their medians over repeats."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass(frozen=True, slots=True)
class Cell:
    """One method at one temperature and batch size.

    Attributes:
        model: Of the zoo.
        method: Its name.
        exit_layer: Layers drafted with, "auto", or None.
        length: Draft tokens per step, or the length controller.
        ranked: Whether drafts come from a ranked vocabulary.
        temperature: Of the requests.
        batch: How many at a time.
        repeats: Rows that make this cell.
        speed: Tokens per second over those of plain decoding, median.
        low: The least of the repeats.
        high: The most.
        acceptance_length: Bonus token included; median; None where nothing was drafted.
        distinct_share: Distinct 8-grams over all, median.
    """

    model: str
    method: str
    exit_layer: int | str | None
    length: int | str
    ranked: bool
    temperature: float
    batch: int
    repeats: int
    speed: float
    low: float
    high: float
    acceptance_length: float | None
    distinct_share: float


def cells(rows: Iterable[dict[str, Any]]) -> list[Cell]:
    """Rows by method, temperature and batch size, in the order they first come."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("model", "method", "temperature", "batch"))
        groups.setdefault(key, []).append(row)
    found = []
    for (model, method, temperature, batch), group in groups.items():
        first = group[0]
        speeds = [row["speed_over_plain"] for row in group]
        lengths = [row["acceptance_length"] for row in group if row["acceptance_length"]]
        found.append(
            Cell(
                model,
                method,
                first["exit_layer"],
                first["length"],
                first["ranked"],
                temperature,
                batch,
                len(group),
                median(speeds),
                min(speeds),
                max(speeds),
                median(lengths) if lengths else None,
                median(row["distinct_8gram_share"] for row in group),
            )
        )
    return found
