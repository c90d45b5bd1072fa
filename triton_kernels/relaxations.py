"""What `verify_fused` is told beside the batch: the draft's law as logits, and what is relaxed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class DraftLogits:
    """The draft's law as logits: they are normalised where they are read.

    Attributes:
        values: `[N, M]`, -inf allowed.
        vocabulary: `[M]` int64 sorted target ids of the columns; None when M <= V columns are
            the first M ids.
        sampled: `[N]` bool, False for rows that are deterministic (one-hot at the draft
            token); None: all were drawn.
    """

    values: Tensor
    vocabulary: Tensor | None = None
    sampled: Tensor | None = None


@dataclass(frozen=True, slots=True)
class NeighbourSum:
    """Relaxed acceptance by neighbours in a codebook (LANTERN 2410.03355, LANTERN++ 2502.06352).

    p(x) + p(z_1) + .. + p(z_J) stands in for p(x), with the largest J whose sum of neighbours
    is within the budget.

    Attributes:
        neighbours: `[codes, k]` int32 target ids, nearest first; -1 for none.
        first_code: Target id of row 0. Other ids are verified exactly.
        budget: Most probability added, or with `multiplicative` how many times p(x) itself.
        multiplicative: Whether the budget is a multiple of p(x).
    """

    neighbours: Tensor
    first_code: int
    budget: float
    multiplicative: bool = False


@dataclass(frozen=True, slots=True)
class GroupSum:
    """Relaxed acceptance by groups of tokens (grouped speculative decoding 2508.07747).

    Accepts with the larger of min(1, P/Q), the sums of p and q over the draft token's group,
    and min(1, p/q).

    Attributes:
        group_of: `[V]` int32, group of each token; -1 for a token on its own.
    """

    group_of: Tensor


@dataclass(frozen=True, slots=True)
class GivenAcceptance:
    """Acceptance worked out elsewhere: `[N]`, what greedy requests have there is not used."""

    acceptance: Tensor


@dataclass(frozen=True, slots=True)
class Judge:
    """A learned verdict on draft tokens: accepted by the rule, or from this score on.

    Never for a token the sampling options exclude. Greedy requests are judged too.

    Attributes:
        scores: `[N]` float32.
        threshold: Lowest score accepted.
    """

    scores: Tensor
    threshold: float


Relaxation = NeighbourSum | GroupSum | GivenAcceptance
