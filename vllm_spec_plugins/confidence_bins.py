"""How often draft tokens of some confidence were accepted: confidences made probabilities.

The probability a draft gives its own token is not the chance that the target accepts it: heads
are over- or underconfident, and a token drawn at temperature 1 from a flat law has a low
probability and a good chance. Histogram binning (Zadrozny and Elkan, ICML 2001) learns the
chance from past verdicts, one bin of confidences at a time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class ConfidenceBins:
    """Acceptance by confidence, over all requests.

    Args:
        prior_strength: Draft tokens' worth of evidence that the fallback counts for in a bin.
        discount: Factor on past evidence at each verification.
    """

    _BINS = 16

    def __init__(self, prior_strength: float, discount: float = 0.999) -> None:
        self._prior_strength = prior_strength
        self._discount = discount
        self._seen = np.zeros(self._BINS)
        self._accepted = np.zeros(self._BINS)
        #: `[_BINS]` what `odds_ratio` returns; None after something was observed.
        self._odds_ratios: NDArray[np.float64] | None = None

    def acceptance(
        self, confidences: NDArray[np.floating], fallback: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """`[R]` chance that tokens of these confidences are accepted.

        Args:
            confidences: `[R]` in [0, 1].
            fallback: `[R]` what to believe where little was seen.
        """
        bins = self._bins(confidences)
        accepted = self._accepted[bins] + self._prior_strength * fallback
        return accepted / (self._seen[bins] + self._prior_strength)

    def odds_ratio(self, confidences: NDArray[np.floating]) -> NDArray[np.float64]:
        """`[R]` odds that tokens of these confidences are accepted, over those of any token.

        1 where little was seen. Beside a chance known from elsewhere, like the acceptance rate of a
        request, this is what a token's confidence adds: its odds are multiplied.
        """
        if self._odds_ratios is None:
            mean = (self._accepted.sum() + 1) / (self._seen.sum() + 2)
            prior = self._prior_strength
            accepted = (self._accepted + prior * mean) / (self._seen + prior)
            self._odds_ratios = odds(accepted) / odds(mean)
        return self._odds_ratios[self._bins(confidences)]

    def observe(
        self, confidences: NDArray[np.floating], accepted: NDArray[np.bool_] | NDArray[np.floating]
    ) -> None:
        """Learn from `[M]` tokens the target was asked about: all up to the first rejection.

        Args:
            confidences: `[M]` in [0, 1].
            accepted: `[M]` whether each was, or the chance that it was.
        """
        bins = self._bins(confidences)
        self._odds_ratios = None
        self._seen *= self._discount
        self._accepted *= self._discount
        self._seen += np.bincount(bins, minlength=self._BINS)
        self._accepted += np.bincount(bins, weights=accepted, minlength=self._BINS)

    def _bins(self, confidences: NDArray[np.floating]) -> NDArray[np.int64]:
        return np.minimum((confidences * self._BINS).astype(np.int64), self._BINS - 1)


def odds(chance: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """chance / (1 - chance); one below a hundredth, or that near to 1, counts as that."""
    chance = np.clip(chance, 0.01, 0.99)
    return chance / (1 - chance)
