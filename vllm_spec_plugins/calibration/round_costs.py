"""What one round of drafting and verification takes, and what it gains.

Seconds come from the clock of a real engine (`engine_clock.py`), never from counting layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .draft_pass import DraftPass


@dataclass(frozen=True, slots=True)
class RoundCosts:
    """Seconds per step, with so many requests in every step, all at one temperature.

    Attributes:
        batch: Requests in a step.
        temperature: Theirs; drawing a token costs more than choosing it.
        plain: A decoding step without drafts.
        verification: By number of draft tokens k of each request, a step that verifies them,
            less the time of drafting.
        draft_step: By number of layers run, one draft token of each request: layers, norm,
            head and the choice of the token.
        attention: Of a draft step, saved by leaving out the attention of one layer.
        ffn: The same for a feed-forward network.
        adapter: Of a draft step, added by an adapter after its exit.
    """

    batch: int
    temperature: float
    plain: float
    verification: Mapping[int, float]
    draft_step: Mapping[int, float]
    attention: float = 0.0
    ffn: float = 0.0
    adapter: float = 0.0

    def draft(self, draft_pass: DraftPass) -> float:
        """Seconds of one draft step; between measured exits a straight line.

        Layers are alike, so what one sublayer saves was measured on many at once.
        """
        saved = (
            len(draft_pass.skip_attention) * self.attention + len(draft_pass.skip_ffn) * self.ffn
        )
        added = self.adapter if draft_pass.adapter else 0.0
        # Noise in small savings must not make a draft free.
        return max(_line(self.draft_step, draft_pass.exit_layer) - saved + added, 0.01 * self.plain)

    def round(self, length: int, draft: float) -> float:
        """Seconds to draft `length` tokens of `draft` seconds each, and to verify them."""
        return length * draft + _line(self.verification, length)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which makes strings of numbers that are keys; `from_dict` undoes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> RoundCosts:
        """The inverse of `as_dict`.

        Raises:
            KeyError, TypeError, ValueError: It is something else.
        """

        def table(key: str) -> dict[int, float]:
            return {int(k): float(v) for k, v in stored[key].items()}

        return cls(
            batch=int(stored["batch"]),
            temperature=float(stored["temperature"]),
            plain=float(stored["plain"]),
            verification=table("verification"),
            draft_step=table("draft_step"),
            attention=float(stored["attention"]),
            ffn=float(stored["ffn"]),
            adapter=float(stored["adapter"]),
        )


def _line(table: Mapping[int, float], at: int) -> float:
    """Between measured points a straight line; beyond them, the last two points' line."""
    known = sorted(table)
    if at in table or len(known) == 1:
        return table.get(at, table[known[0]])
    if known[0] <= at <= known[-1]:
        return float(np.interp(at, known, [table[key] for key in known]))
    first, second = known[:2] if at < known[0] else known[-2:]
    slope = (table[second] - table[first]) / (second - first)
    return table[first] + slope * (at - first)
