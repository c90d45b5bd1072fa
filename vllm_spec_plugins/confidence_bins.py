"""How often draft tokens of some confidence were accepted: confidences made probabilities.

The probability a draft gives its own token is not the chance that the target accepts it: heads
are over- or underconfident, and a token drawn at temperature 1 from a flat law has a low
probability and a good chance. Histogram binning (Zadrozny and Elkan, ICML 2001) learns the
chance from past verdicts, one bin of confidences at a time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Of confidences, equally wide.
BINS = 16


class ConfidenceBins:
    """Acceptance by confidence, over all requests.

    Args:
        prior_strength: Draft tokens' worth of evidence that the fallback counts for in a bin.
        discount: Factor on past evidence at each verification.
    """

    def __init__(self, prior_strength: float, discount: float = 0.999) -> None:
        self._prior_strength = prior_strength
        self._discount = discount
        self._seen = np.zeros(BINS)
        self._accepted = np.zeros(BINS)

    def acceptance(
        self, confidences: NDArray[np.floating], fallback: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """`[R]` chance that tokens of these confidences are accepted.

        Args:
            confidences: `[R]` in [0, 1].
            fallback: `[R]` what to believe where little was seen.
        """
        bins = bins_of(confidences)
        accepted = self._accepted[bins] + self._prior_strength * fallback
        return accepted / (self._seen[bins] + self._prior_strength)

    def observe(self, confidences: NDArray[np.floating], accepted: NDArray[np.bool_]) -> None:
        """Learn from `[M]` tokens the target was asked about: all up to the first rejection."""
        bins = bins_of(confidences)
        self._seen *= self._discount
        self._accepted *= self._discount
        self._seen += np.bincount(bins, minlength=BINS)
        self._accepted += np.bincount(bins[accepted], minlength=BINS)


def bins_of(confidences: NDArray[np.floating]) -> NDArray[np.int64]:
    """The bin of each confidence in [0, 1]; same shape."""
    return np.minimum((confidences * BINS).astype(np.int64), BINS - 1)
