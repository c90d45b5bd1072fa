"""From agreement and costs to one row per setting, and to the setting to serve with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .acceptance_walk import ratio_with_error, walk
from .draft_pass import DraftPass
from .exits import Agreement
from .round_costs import RoundCosts

METHODS = ("probabilistic", "greedy")


@dataclass(frozen=True, slots=True)
class Judged:
    """Draft passes on the continuations of one temperature.

    Attributes:
        temperature: Of the texts.
        passes: E of them.
        agreements: One for each text, of all passes.
    """

    temperature: float
    passes: Sequence[DraftPass]
    agreements: Sequence[Agreement]


@dataclass(frozen=True, slots=True)
class Row:
    """One setting at one temperature and batch size.

    Attributes:
        draft_pass: What a draft runs.
        draft_sample_method: The option of `early_exit`; without effect at temperature 0.
        temperature: Of texts and requests.
        batch: Requests in a step.
        num_speculative_tokens: Draft tokens of every round.
        agreement: Share of positions at which draft and target have the same first choice.
        overlap: Mean of sum over x of min(p(x), q(x)), laws at temperature 1.
        acceptance_length: Tokens per round, the one after the accepted draft tokens included.
        acceptance_length_error: Standard error of it, from text to text.
        acceptance_by_position: Share of draft tokens accepted of those reached, by position.
        draft_step_ms: One draft step.
        round_ms: Drafting and verification.
        plain_ms: A step without drafts.
        speedup: Predicted, over plain decoding.
    """

    draft_pass: DraftPass
    draft_sample_method: str
    temperature: float
    batch: int
    num_speculative_tokens: int
    agreement: float
    overlap: float
    acceptance_length: float
    acceptance_length_error: float
    acceptance_by_position: tuple[float, ...]
    draft_step_ms: float
    round_ms: float
    plain_ms: float
    speedup: float

    @property
    def setting(self) -> tuple[DraftPass, str, int]:
        """What a user can choose."""
        return self.draft_pass, self.draft_sample_method, self.num_speculative_tokens

    def as_dict(self) -> dict[str, Any]:
        """Flat, for JSON."""
        values = asdict(self)
        values["draft_pass"] = str(self.draft_pass)
        values["acceptance_by_position"] = list(self.acceptance_by_position)
        if np.isnan(self.acceptance_length_error):
            values["acceptance_length_error"] = None
        return {**self.draft_pass.options(), "adapter": self.draft_pass.adapter, **values}


def rows_of(judged: Judged, costs: Sequence[RoundCosts], most: int) -> list[Row]:
    """Every draft length of every pass and method, at every batch size with known costs.

    Texts shorter than `most` draft tokens are left out: all lengths are judged on the same.
    """
    temperature = judged.temperature
    here = [c for c in costs if c.temperature == temperature]
    agreements = [a for a in judged.agreements if _room(a) >= most]
    same = _mean_by_pass([a.agreement for a in agreements])
    overlap = _mean_by_pass([a.overlap for a in agreements])
    rows: list[Row] = []
    for method in METHODS:
        chances = [a.rounds(temperature, method, most) for a in agreements]
        for length in range(1, most + 1):
            walks = [walk(chance, length) for chance in chances]
            emitted = np.stack([w.emitted for w in walks])
            rounds = np.stack([w.rounds for w in walks])
            lengths, errors = ratio_with_error(emitted, rounds)
            reached = sum(w.reached for w in walks)
            accepted = sum(w.accepted for w in walks)
            by_position = np.divide(
                accepted, reached, out=np.zeros_like(accepted), where=reached > 0
            )
            for e, draft_pass in enumerate(judged.passes):
                for cost in here:
                    draft = _draft_seconds(cost, costs, draft_pass, method)
                    round_seconds = cost.round(length, draft)
                    rows.append(
                        Row(
                            draft_pass=draft_pass,
                            draft_sample_method=method,
                            temperature=temperature,
                            batch=cost.batch,
                            num_speculative_tokens=length,
                            agreement=float(same[e]),
                            overlap=float(overlap[e]),
                            acceptance_length=float(lengths[e]),
                            acceptance_length_error=float(errors[e]),
                            acceptance_by_position=tuple(by_position[e].tolist()),
                            draft_step_ms=1e3 * draft,
                            round_ms=1e3 * round_seconds,
                            plain_ms=1e3 * cost.plain,
                            speedup=float(lengths[e]) * cost.plain / round_seconds,
                        )
                    )
    return rows


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The setting with the largest predicted speed-up.

    Attributes:
        rows: Its rows, one for each temperature.
        speedup: Geometric mean of theirs: what is optimised.
    """

    rows: tuple[Row, ...]
    speedup: float

    @property
    def pays(self) -> bool:
        """Whether it is predicted to be faster than plain decoding at all."""
        return self.speedup > 1

    def config(
        self, beside: Mapping[str, Any] | None = None, adapter: str | None = None
    ) -> dict[str, Any]:
        """What `--speculative-config` takes.

        Args:
            beside: Further options of `early_exit`.
            adapter: File of the adapter, for a setting that uses one.
        """
        draft_pass, method, length = self.rows[0].setting
        return {
            "method": "early_exit",
            "num_speculative_tokens": length,
            **draft_pass.options(),
            "draft_sample_method": method,
            **({"adapter": adapter} if draft_pass.adapter else {}),
            **(beside or {}),
        }


def recommend(rows: Sequence[Row], batch: int) -> Recommendation:
    """The best setting at one batch size, over all temperatures in the rows.

    Ties go to the shorter draft, then to the shallower pass, then to drawn drafts.
    """
    by_setting: dict[tuple[DraftPass, str, int], list[Row]] = {}
    for row in rows:
        if row.batch == batch:
            by_setting.setdefault(row.setting, []).append(row)

    def value(found: Sequence[Row]) -> float:
        return float(np.exp(np.mean([np.log(row.speedup) for row in found])))

    def order(setting: tuple[DraftPass, str, int]) -> tuple[Any, ...]:
        draft_pass, method, length = setting
        return -value(by_setting[setting]), length, draft_pass, METHODS.index(method)

    best = by_setting[min(by_setting, key=order)]
    return Recommendation(tuple(best), value(best))


def best_of_each(rows: Sequence[Row], batch: int, temperature: float) -> dict[DraftPass, Row]:
    """For each pass its fastest row at one batch size and temperature."""
    best: dict[DraftPass, Row] = {}
    for row in rows:
        if (row.batch, row.temperature) != (batch, temperature):
            continue
        known = best.get(row.draft_pass)
        if known is None or row.speedup > known.speedup:
            best[row.draft_pass] = row
    return best


def _draft_seconds(
    cost: RoundCosts, costs: Sequence[RoundCosts], draft_pass: DraftPass, method: str
) -> float:
    """A greedy draft at temperature 1 costs what one at temperature 0 does, if that is known."""
    if method == "greedy" and cost.temperature > 0:
        for other in costs:
            if other.batch == cost.batch and other.temperature == 0:
                cost = other
    return cost.draft(draft_pass)


def _room(agreement: Agreement) -> int:
    """The longest round that fits: C, or K of passes that skip."""
    return agreement.overlap.shape[-1] if agreement.overlap.size else 0


def _mean_by_pass(arrays: Sequence[Any]) -> Any:
    """`[E]` mean over all positions of all texts."""
    total = sum(array.reshape(len(array), -1).sum(axis=1) for array in arrays)
    return total / sum(array[0].size for array in arrays)
