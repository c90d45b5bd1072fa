"""Expected acceptance length, exactly, from a text the target wrote itself.

Let y be text drawn from the target's law p, and let a draft token y_j be proposed with
probability q_j. Verification (Leviathan et al. 2211.17192) emits exactly the first n draft
tokens y_1..y_n and then y_(n+1) with probability

    min(p_1, q_1) ... min(p_n, q_n) (p_(n+1) - min(p_(n+1), q_(n+1)))

(the last factor: rejected there and drawn from the residual; after a whole draft it is
p_(n+1)). Divided by the law of the emitted text, p_1 ... p_(n+1), this leaves

    a_1 ... a_n (1 - a_(n+1)),    a_j = min(1, q_j(y_j) / p_j(y_j)).

So, given the text, each draft token that equals it is accepted with chance a_j on its own, and
the rounds that could have written the text are a Markov chain over its positions. No drafts
need to be sampled. Greedy decoding is the same with a_j = 1 where the draft's first choice is
the target's and 0 elsewhere; so are greedy drafts at temperature 1. Nothing is approximated
but the prompts: they are a sample.

`tests/test_calibrate_exit.py` compares this with enumeration and with sampled walks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Walk:
    """Rounds that draft k tokens each, over one text.

    Attributes:
        rounds: `[...]` expected rounds.
        emitted: `[...]` expected tokens they emitted, the one after each draft included.
        reached: `[..., k]` expected rounds in which so many draft tokens were accepted before
            this one, which was then tried.
        accepted: `[..., k]` expected rounds in which it was accepted, too.
    """

    rounds: NDArray[np.float64]
    emitted: NDArray[np.float64]
    reached: NDArray[np.float64]
    accepted: NDArray[np.float64]


def rounds_of(chance: NDArray[np.floating], most: int) -> NDArray[np.floating]:
    """One row for each round of `most` draft tokens that fits into a text.

    Args:
        chance: `[..., C]` chance that each token of the text is accepted as a draft token, the
            same whichever round tries it.
        most: Draft tokens per round, at most C.

    Returns:
        `[..., C - most + 1, most]`, a view.
    """
    return np.lib.stride_tricks.sliding_window_view(chance, most, axis=-1)


def walk(chance: NDArray[np.floating], length: int) -> Walk:
    """Decode one text in rounds of `length` draft tokens, the first starting at its start.

    Rounds that would start past the last row are left out, so that every length is judged on
    the same starts and no draft is cut short by the end of the text.

    Args:
        chance: `[..., S, K]` chance that draft token j of the round starting at s is accepted
            once those before it were.
        length: k, at most K.
    """
    a = chance[..., :length].astype(np.float64)
    starts = a.shape[-2]
    survival = np.cumprod(a, axis=-1)
    # [..., S, k + 1] chance that exactly so many tokens are accepted.
    exactly = np.concatenate([np.ones_like(survival[..., :1]), survival], axis=-1)
    exactly[..., :-1] -= exactly[..., 1:]
    visits = np.zeros((*a.shape[:-2], starts + length + 1))
    visits[..., 0] = 1
    for start in range(starts):
        here = visits[..., start, None]
        visits[..., start + 1 : start + length + 2] += here * exactly[..., start, :]
    visits = visits[..., :starts]
    accepted = np.einsum("...s,...sk->...k", visits, survival)
    rounds = visits.sum(axis=-1)
    reached = np.concatenate([rounds[..., None], accepted[..., :-1]], axis=-1)
    return Walk(rounds, rounds + accepted.sum(axis=-1), reached, accepted)


def ratio_with_error(
    numerators: NDArray[np.float64], denominators: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ratio of two sums over texts, and its standard error (delta method).

    Args:
        numerators: `[W, ...]` one per text.
        denominators: `[W, ...]`.

    Returns:
        `[...]` and `[...]`; with a single text the error is not known: NaN.
    """
    total = denominators.sum(axis=0)
    ratio = numerators.sum(axis=0) / total
    texts = len(numerators)
    if texts < 2:
        return ratio, np.full_like(ratio, np.nan)
    spread = ((numerators - ratio * denominators) ** 2).sum(axis=0) * texts / (texts - 1)
    return ratio, np.sqrt(spread) / total
