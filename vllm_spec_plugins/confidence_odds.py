"""How much more likely a draft token is accepted for its confidence than its request's rate says.

The probability a draft gives its own token is not the chance that the target accepts it
(`confidence_bins`), and part of what it tells is known already: a request whose drafts are good
has confident ones. So past tokens of some confidence are compared with what the rates of their own
requests foretold, in odds: beside another rate, those odds are multiplied.

Shapes: E exits, B bins of confidence, N tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .confidence_bins import BINS, bins_of


class ConfidenceOdds:
    """Odds of acceptance over those foretold, by exit and confidence, over all requests.

    Args:
        num_exits: E.
        prior_strength: Tokens, accepted as often as foretold, that a bin starts with.
        discount: Factor on past evidence at each observation.
    """

    def __init__(
        self, num_exits: int, prior_strength: float = 4.0, discount: float = 0.999
    ) -> None:
        self._prior_strength = prior_strength
        self._discount = discount
        #: `[3, E, B]` sums over tokens: all, the chances they had, the chances foretold.
        self._sums = np.zeros((3, num_exits, BINS))
        #: `[E, B]`.
        self._ratios = np.ones((num_exits, BINS))

    def ratio(self, exit_: int, confidences: NDArray[np.floating]) -> NDArray[np.float64]:
        """`[N]` what the odds of tokens are multiplied by; 1 where little was seen.

        Args:
            exit_: Index of the exit they were drafted after.
            confidences: `[N]` in [0, 1].
        """
        return self._ratios[exit_, bins_of(confidences)]

    def observe(
        self,
        confidences: NDArray[np.floating],
        accepted: NDArray[np.floating],
        foretold: NDArray[np.floating],
    ) -> None:
        """Learn from N tokens of each exit.

        Args:
            confidences: `[N, E]` in [0, 1].
            accepted: `[N, E]` chance that each was accepted, or whether it was.
            foretold: `[N, E]` acceptance rate of its request and exit.
        """
        exits, bins = self._ratios.shape
        where = (bins_of(confidences) + bins * np.arange(exits)).ravel()
        new = [
            np.bincount(where, weights=weights, minlength=exits * bins).reshape(exits, bins)
            for weights in (None, accepted.ravel(), foretold.ravel())
        ]
        self._sums = self._sums * self._discount + np.stack(new)
        seen, had, expected = self._sums
        # A bin starts with tokens that were accepted as often as foretold, on average.
        mean = (expected.sum(axis=1) + 1) / (seen.sum(axis=1) + 2)
        prior = self._prior_strength * mean[:, None]
        count = seen + self._prior_strength
        self._ratios = odds((had + prior) / count) / odds((expected + prior) / count)


def odds(chance: NDArray[np.float64]) -> NDArray[np.float64]:
    """chance / (1 - chance); one below a hundredth, or that near to 1, counts as that."""
    chance = chance.clip(0.01, 0.99)
    return chance / (1 - chance)
