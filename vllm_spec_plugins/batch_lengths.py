"""Draft lengths for a batch: the most expected tokens for the time of one step.

A batch is one step: a request that drafts longer than the others makes them wait, but the draft
step it asks for costs no more when others draft along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .step_cost import DraftCosts


def batch_lengths(
    acceptance: NDArray[np.float64], costs: DraftCosts
) -> tuple[NDArray[np.int64], float]:
    """The lengths with the most expected tokens for the time of the step.

    With a request's chance a that a draft token is accepted, k of them yield
    1 + a + ... + a^k tokens. Dinkelbach's method for the largest ratio, one iteration of it: the
    speed is the best that one length for all can reach; at that price of time each request
    takes its own best length, none longer than the longest that pays for its draft steps.

    Args:
        acceptance: `[R]` chance that a draft token is accepted, in [0, 1].
        costs: Of R requests.

    Returns:
        `[R]` lengths, 0 to K; and the speed: tokens per second of each request, on average.
    """
    count, k = len(acceptance), np.arange(len(costs.verify))
    chances = acceptance[:, None] ** k  # [R, K+1] that all up to it are accepted
    drafting = np.where(k > 0, costs.first + k * costs.each, 0)
    speed = float((chances.sum(axis=0).cumsum() / (costs.verify + drafting)).max()) / count
    added = chances[:, 1:] - speed * np.diff(costs.verify)
    gains = np.zeros_like(chances)
    np.cumsum(added, axis=1, out=gains[:, 1:])
    best = np.maximum.accumulate(gains, axis=1).sum(axis=0)
    longest = int((best - count * speed * drafting).argmax())
    return gains[:, : longest + 1].argmax(axis=1), speed


def goes_on(gains: NDArray[np.float64], drafting: float) -> NDArray[np.bool_]:
    """`[R]` who drafts one more token: those it is worth its verification to, together.

    Args:
        gains: `[R]` tokens that one more draft token is expected to yield, less what verifying it
            must.
        drafting: Tokens that one more draft step must yield, for all requests together.
    """
    return (gains >= 0) & (gains.clip(min=0).sum() >= drafting)
