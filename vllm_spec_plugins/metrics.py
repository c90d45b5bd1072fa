"""What was drafted, accepted and relaxed, by whom. An observer like any other."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .hookspecs import StepRecord, hookimpl


@dataclass(slots=True)
class Tally:
    """Sums over verification steps, of one proposer under one verifier.

    Attributes:
        steps: Verifications with at least one draft token, counted per request.
        drafted: Draft tokens verified.
        accepted: Draft tokens accepted.
        accepted_at: Accepted at position i of the draft.
        drafted_at: Drafts that reached position i.
        extra_acceptance: Sum of acceptance probability above min(1, p/q).
    """

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: Counter[int] = field(default_factory=Counter)
    drafted_at: Counter[int] = field(default_factory=Counter)
    extra_acceptance: float = 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted per verification, the bonus token included."""
        return 1 + self.accepted / self.steps if self.steps else 1.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted draft tokens over drafted ones."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def total_variation_price(self) -> float:
        """Mean distance to the target's law paid per drafted position; 0 when lossless."""
        return self.extra_acceptance / self.drafted if self.drafted else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        length = max(self.drafted_at, default=-1) + 1
        return {
            "steps": self.steps,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_length": self.acceptance_length,
            "acceptance_rate": self.acceptance_rate,
            "acceptance_rate_at": [self.accepted_at[i] / self.drafted_at[i] for i in range(length)],
            "total_variation_price": self.total_variation_price,
        }


class Metrics:
    """Tallies by (proposer, verifier), and accepted tokens by source."""

    def __init__(self) -> None:
        self.tallies: defaultdict[tuple[str, str], Tally] = defaultdict(Tally)
        self.accepted_by_source: Counter[str] = Counter()

    @hookimpl
    def spec_step_finished(self, step: StepRecord) -> None:
        drafted, accepted = step.num_draft, step.num_accepted
        if not drafted.any():
            return
        for verifier, of_it in _requests_by_name(step.verifiers):
            num_draft, num_accepted = drafted[of_it], accepted[of_it]
            tally = self.tallies[step.proposer, verifier]
            tally.steps += int((num_draft > 0).sum())
            tally.drafted += int(num_draft.sum())
            tally.accepted += int(num_accepted.sum())
            for i in range(int(num_draft.max(initial=0))):
                tally.drafted_at[i] += int((num_draft > i).sum())
                tally.accepted_at[i] += int((num_accepted > i).sum())
            if step.extra_acceptance is not None:
                tally.extra_acceptance += float(step.extra_acceptance[of_it].sum())
        self.accepted_by_source.update(step.accepted_by_source)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain values for JSON."""
        return {
            "by_method": [
                {"proposer": proposer, "verifier": verifier, **tally.as_dict()}
                for (proposer, verifier), tally in sorted(self.tallies.items())
            ],
            "accepted_by_source": dict(self.accepted_by_source),
        }


def _requests_by_name(names: Any) -> Iterator[tuple[str, Any]]:
    """Each verifier with the requests it served; a slice where one served all."""
    distinct = set(names)
    if len(distinct) == 1:
        yield distinct.pop(), slice(None)
        return
    for name in sorted(distinct):
        yield name, [i for i, other in enumerate(names) if other == name]
