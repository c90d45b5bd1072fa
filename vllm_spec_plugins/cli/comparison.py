"""What `vllm-spec demo` measures, as plain data: one way of decoding, one pass, one row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """One way of decoding.

    Attributes:
        name: As shown.
        speculative_config: None for plain decoding.
    """

    name: str
    speculative_config: dict[str, Any] | None


PLAIN = Way("plain decoding", None)
#: Lookup 2 to 4: vLLM's documentation uses 4, and shorter matches draft junk.
NGRAM = Way(
    "vLLM's ngram",
    {
        "method": "ngram",
        "num_speculative_tokens": 5,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    },
)
ADAPTIVE = Way("ngram_adaptive", {"method": "ngram_adaptive", "num_speculative_tokens": 5})
WAYS = (PLAIN, NGRAM, ADAPTIVE)


@dataclass(frozen=True, slots=True)
class Pass:
    """All prompts once, one after the other, on one server.

    Attributes:
        seconds: From the first request to the last answer.
        completions: Token ids of each prompt's continuation.
        steps: Steps of the engine; one forward pass each.
        drafts: Verifications with at least one draft token.
        drafted: Draft tokens verified.
        accepted: Draft tokens accepted.
    """

    seconds: float
    completions: tuple[tuple[int, ...], ...]
    steps: int
    drafts: int
    drafted: int
    accepted: int

    @property
    def tokens(self) -> int:
        return sum(len(tokens) for tokens in self.completions)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(slots=True)
class Result:
    """Everything measured about one way of decoding."""

    way: Way
    passes: list[Pass] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Tokens per second, median over the passes."""
        return median(one.tokens_per_second for one in self.passes)

    @property
    def spread(self) -> tuple[float, float]:
        """Slowest and fastest pass, in tokens per second."""
        speeds = [one.tokens_per_second for one in self.passes]
        return min(speeds), max(speeds)

    @property
    def drafted(self) -> int:
        """Draft tokens of one pass (greedy: the same in each, but for near ties)."""
        return round(median(one.drafted for one in self.passes))

    @property
    def accepted(self) -> int:
        return round(median(one.accepted for one in self.passes))

    @property
    def acceptance_length(self) -> float | None:
        """Tokens emitted per verified draft, the bonus token included; vLLM's definition."""
        drafts = median(one.drafts for one in self.passes)
        return 1 + self.accepted / drafts if drafts else None

    @property
    def tokens_per_step(self) -> float:
        """Tokens emitted per forward pass, those without a draft included."""
        return median(one.tokens / one.steps for one in self.passes)

    @property
    def distinct_share(self) -> float:
        """Distinct 8-grams over all 8-grams, within each continuation."""
        return distinct_ngram_share(self.passes[-1].completions, 8)

    def same_text_as(self, other: Result) -> tuple[int, int]:
        """Prompts continued with the same tokens as by `other`, in every pass; and all prompts."""
        expected = other.passes[0].completions
        same = [
            all(one.completions[i] == tokens for one in self.passes)
            for i, tokens in enumerate(expected)
        ]
        return sum(same), len(same)

    def row(self, plain: Result, ngram: Result) -> dict[str, Any]:
        """Everything, as plain values."""
        same, prompts = self.same_text_as(plain)
        return {
            "way": self.way.name,
            "speculative_config": self.way.speculative_config,
            "tokens_per_second": self.speed,
            "slowest_pass": self.spread[0],
            "fastest_pass": self.spread[1],
            "speed_over_plain": self.speed / plain.speed,
            "speed_over_vllm_ngram": self.speed / ngram.speed,
            "acceptance_length": self.acceptance_length,
            "tokens_per_step": self.tokens_per_step,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "distinct_8gram_share": self.distinct_share,
            "same_text": same,
            "prompts": prompts,
            "seconds": [one.seconds for one in self.passes],
            "tokens": [one.tokens for one in self.passes],
        }


def distinct_ngram_share(completions: Iterable[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams, within each sequence; 1 where none is long enough."""
    distinct = total = 0
    for tokens in completions:
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        distinct += len(set(grams))
        total += len(grams)
    return distinct / total if total else 1.0


@dataclass(frozen=True, slots=True)
class MarkedToken:
    """One token of a continuation.

    Attributes:
        text: What it adds to the text.
        accepted: Whether it was drafted and accepted, rather than drawn from the target.
    """

    text: str
    accepted: bool


def marks(trace: Iterable[dict[str, Any]], request: str) -> list[tuple[int, bool]]:
    """Token ids of one request in order, each with whether it was drafted and accepted.

    Args:
        trace: Lines of a step trace.
        request: Id the server answered with; the engine's own ids begin with it.
    """
    marked: list[tuple[int, bool]] = []
    for line in trace:
        if line["event"] == "step" and line["request_id"].startswith(request):
            marked += [(token, i < line["accepted"]) for i, token in enumerate(line["token_ids"])]
    return marked
