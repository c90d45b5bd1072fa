"""Chi-square goodness of fit of generated texts to the law they should have.

Few tokens and many texts: with 16 bins and 200,000 samples a bias of a few thousandths shows,
which disappears among 4,096 bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .toy_problems import ToyProblem

#: Bins expected to hold fewer are merged: the chi-square law needs some in each.
_SMALLEST_EXPECTED = 10.0


@dataclass(frozen=True, slots=True)
class GoodnessOfFit:
    """One comparison of counts with a law.

    Attributes:
        what: Which tokens were counted.
        statistic: Chi-square.
        degrees: Of freedom.
        p_value: Chance of a statistic this large if the law is right.
        distance: Total variation between the counts' law and the right one.
        noise_floor: The distance expected from sampling alone.
    """

    what: str
    statistic: float
    degrees: int
    p_value: float
    distance: float
    noise_floor: float

    def __str__(self) -> str:
        return (
            f"{self.what}: chi-square {self.statistic:.1f} with {self.degrees} degrees of "
            f"freedom, p = {self.p_value:.2e}; total variation {self.distance:.5f}, "
            f"of which {self.noise_floor:.5f} is expected from noise"
        )


def compare(what: str, counts: Tensor, law: Tensor) -> GoodnessOfFit:
    """Counts `[B]` against probabilities `[B]`. A count where the law is 0 gives p = 0."""
    counts, law = counts.double(), law.double()
    total = counts.sum()
    expected = law * total
    large = expected >= _SMALLEST_EXPECTED
    observed = torch.cat([counts[large], counts[~large].sum().view(1)])
    wanted = torch.cat([expected[large], expected[~large].sum().view(1)])
    if wanted[-1] < _SMALLEST_EXPECTED:
        # What is merged is itself too rare: into the smallest of the others.
        smallest = int(wanted[:-1].argmin())
        observed[smallest] += observed[-1]
        wanted[smallest] += wanted[-1]
        observed, wanted = observed[:-1], wanted[:-1]
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    degrees = len(wanted) - 1
    impossible = float(counts[law <= 0].sum()) > 0
    if impossible:
        p_value = 0.0
    elif degrees == 0:
        p_value = 1.0
    else:
        half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
        p_value = float(torch.special.gammaincc(half[0], half[1]))
    return GoodnessOfFit(
        what + (" (tokens that cannot occur did)" if impossible else ""),
        statistic,
        degrees,
        p_value,
        float((counts / total - law).abs().sum() / 2),
        # Mean absolute deviation of a binomial count, normal approximation.
        float((law * (1 - law) / total * (2 / math.pi)).sqrt().sum() / 2),
    )


def goodness_of_fit(problem: ToyProblem, texts: Tensor) -> list[GoodnessOfFit]:
    """Every token, and every pair of neighbours, of `[samples, length]` texts."""
    size, length = problem.vocab_size, texts.shape[1]
    laws, law = [], torch.zeros(problem.num_contexts, dtype=torch.float64)
    law[problem.start] = 1
    contexts = torch.arange(problem.num_contexts)
    for _ in range(length):
        laws.append(law)
        joint = law.unsqueeze(1) * problem.target
        to = problem.after(contexts.unsqueeze(1), torch.arange(size)).flatten()
        law = torch.zeros_like(law).index_add_(0, to, joint.flatten())
    fits = []
    for i, law in enumerate(laws):
        token_law = (law.unsqueeze(1) * problem.target).sum(dim=0)
        counts = torch.bincount(texts[:, i], minlength=size)
        fits.append(compare(f"token {i + 1}", counts, token_law))
    for i, law in enumerate(laws[:-1]):
        # The pair's law, summed over all contexts it may stand in.
        first = law.unsqueeze(1) * problem.target
        after = problem.after(contexts.unsqueeze(1), torch.arange(size))
        pair_law = torch.einsum("cy,cyz->yz", first, problem.target[after])
        counts = torch.bincount(texts[:, i] * size + texts[:, i + 1], minlength=size * size)
        fits.append(compare(f"tokens {i + 1} and {i + 2}", counts, pair_law.flatten()))
    return fits


def failures(fits: list[GoodnessOfFit], false_alarm: float) -> list[GoodnessOfFit]:
    """Those that a right law would give with probability `false_alarm` at most, all together.

    Bonferroni: each comparison is held to its share of `false_alarm`.
    """
    return [fit for fit in fits if fit.p_value < false_alarm / len(fits)]
