"""What was drafted, accepted and relaxed, by whom. An observer like any other."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from .hookspecs import StepRecord, hookimpl


@dataclass(slots=True)
class Tally:
    """Verifications of one proposer under one verifier, counted by their outcome.

    Attributes:
        outcomes: How often (draft tokens verified, draft tokens accepted) happened.
        extra_acceptance: Sum of acceptance probability above min(1, p/q).
    """

    outcomes: Counter[tuple[int, int]] = field(default_factory=Counter)
    extra_acceptance: float = 0.0

    @property
    def steps(self) -> int:
        """Verifications with at least one draft token, per request."""
        return sum(times for (drafted, _), times in self.outcomes.items() if drafted)

    @property
    def drafted(self) -> int:
        return sum(drafted * times for (drafted, _), times in self.outcomes.items())

    @property
    def accepted(self) -> int:
        return sum(accepted * times for (_, accepted), times in self.outcomes.items())

    @property
    def examined(self) -> int:
        """Draft tokens a verdict depended on: the accepted ones and the first rejected."""
        return sum(
            min(accepted + 1, drafted) * times
            for (drafted, accepted), times in self.outcomes.items()
        )

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted per verification of a draft, the bonus token included."""
        return 1 + self.accepted / self.steps if self.steps else 1.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted draft tokens over verified ones."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_rate_at(self) -> list[float]:
        """Accepted over verified at each position of the draft, among drafts that reach it."""
        longest = max((drafted for drafted, _ in self.outcomes), default=0)
        reached, accepted = [0] * longest, [0] * longest
        for (num_draft, num_accepted), times in self.outcomes.items():
            for i in range(num_draft):
                reached[i] += times
                accepted[i] += times * (i < num_accepted)
        return [a / r for a, r in zip(accepted, reached, strict=True)]

    @property
    def total_variation_price(self) -> float:
        """Mean distance to the target's law paid per examined draft token; 0 when lossless."""
        return self.extra_acceptance / self.examined if self.drafted else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "steps": self.steps,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "examined": self.examined,
            "acceptance_length": self.acceptance_length,
            "acceptance_rate": self.acceptance_rate,
            "acceptance_rate_at": self.acceptance_rate_at,
            "total_variation_price": self.total_variation_price,
        }


class Metrics:
    """Tallies by (proposer, verifier), and accepted tokens by source."""

    def __init__(self) -> None:
        self.tallies: defaultdict[tuple[str, str], Tally] = defaultdict(Tally)
        self.accepted_by_source: Counter[str] = Counter()

    @hookimpl
    def spec_step_finished(self, step: StepRecord) -> None:
        outcomes = list(zip(step.num_draft, step.num_accepted, strict=True))
        distinct = set(step.verifiers)
        for verifier in distinct:
            tally = self.tallies[step.proposer, verifier]
            if len(distinct) == 1:
                tally.outcomes.update(outcomes)
            else:
                tally.outcomes.update(
                    outcome
                    for outcome, name in zip(outcomes, step.verifiers, strict=True)
                    if name == verifier
                )
            if step.extra_acceptance is not None:
                tally.extra_acceptance += sum(
                    price
                    for price, name in zip(step.extra_acceptance, step.verifiers, strict=True)
                    if name == verifier
                )
        if any(step.num_accepted):
            self.accepted_by_source.update(step.accepted_by_source())

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain values for JSON."""
        return {
            "by_method": [
                {"proposer": proposer, "verifier": verifier, **tally.as_dict()}
                for (proposer, verifier), tally in sorted(self.tallies.items())
            ],
            "accepted_by_source": {k: n for k, n in self.accepted_by_source.items() if n},
        }
