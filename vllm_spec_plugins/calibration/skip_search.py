"""Which sublayers a draft pass may leave out: a search on some texts, judged on others.

SWIFT (arXiv 2410.06916) drafts with the target less some of its attention and feed-forward
sublayers and looks for the set while serving. Here it is chosen once, offline, for the largest
predicted speed-up under measured costs. Lazy greedy selection: the gain of leaving out a
sublayer is measured for all once; then, step by step, those that promised most are measured
again in the set so far and the best is taken, to the end: one sublayer less may not pay where
ten do. The best set on the way is the result. First and last layer of a pass always run.

The search sees rounds that begin every so many tokens; the result is then judged on texts it
has not seen, from every position, exactly as exits are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .draft_pass import DraftPass
from .exits import Agreement, Continuation, compare
from .hugging_face import LocalModel
from .layer_skips import DraftRounds, KeptText
from .round_costs import RoundCosts

#: Candidates measured again at each step, the most promising ones.
_LAZY = 4
#: Rounds whose logits are held at once.
_CHUNK = 32


class MeasuredText:
    """A continuation with the full model's keys, values and laws."""

    def __init__(
        self,
        model: LocalModel,
        rounds: DraftRounds,
        continuation: Continuation,
        vocabulary: Tensor | None,
    ) -> None:
        self._model, self._rounds, self._vocabulary = model, rounds, vocabulary
        self._first = continuation.num_prompt
        self.temperature = continuation.temperature
        self._kept: KeptText = rounds.keep(torch.tensor(continuation.token_ids))

    def agreement(self, draft_pass: DraftPass, length: int, stride: int = 1) -> Agreement:
        """`[1, S, K]` agreement of rounds that begin at every `stride`-th token.

        Args:
            draft_pass: What drafts.
            length: K. With fewer tokens than that to draft, S is 0.
            stride: 1: every round there is.
        """
        text = self._kept.text
        starts = torch.arange(self._first, len(text) - length, stride, device=text.device)
        parts = [self._compare(draft_pass, chunk, length) for chunk in starts.split(_CHUNK)]

        def joined(name: str) -> np.ndarray:
            arrays = [getattr(part, name).reshape(1, -1, length) for part in parts]
            return np.concatenate(arrays, axis=1)

        return Agreement(*(joined(name) for name in Agreement.__slots__))

    def _compare(self, draft_pass: DraftPass, starts: Tensor, length: int) -> Agreement:
        model, kept = self._model, self._kept
        positions = (starts[:, None] + torch.arange(length, device=starts.device)).reshape(-1)
        states = self._rounds.states(kept, draft_pass, starts, length)
        draft = model.logits(model.final_norm(states).flatten(0, 1))
        if self._vocabulary is not None:
            draft = draft[:, self._vocabulary]
        target = model.logits(model.final_norm(kept.state[positions]))
        return compare(target, [draft], kept.text[positions + 1], self._vocabulary)


@dataclass(frozen=True, slots=True)
class Found:
    """A set on the way.

    Attributes:
        draft_pass: The set.
        speedup: Predicted on the texts searched, at its best length: geometric mean over
            temperatures.
    """

    draft_pass: DraftPass
    speedup: float


def predicted_speedup(
    texts: Sequence[MeasuredText], costs: Sequence[RoundCosts], draft_pass: DraftPass, most: int
) -> float:
    """What the search maximises: at the best length, over the texts' temperatures.

    The mean over rounds that begin every `most` tokens, wherever they begin: an estimate of
    the exact walk that needs one pass over each text.

    Args:
        texts: To draft on.
        costs: At the batch size to optimise for; one for each temperature of the texts.
        draft_pass: What drafts, with drawn drafts at temperature 1.
        most: Longest draft.
    """
    log_speedups: list[np.ndarray] = []
    for cost in costs:
        survival = [
            np.cumprod(
                text.agreement(draft_pass, most, stride=most).rounds(
                    text.temperature, "probabilistic", most
                )[0],
                axis=-1,
            )
            for text in texts
            if text.temperature == cost.temperature
        ]
        accepted = np.concatenate(survival).mean(axis=0).cumsum()
        draft = cost.draft(draft_pass)
        seconds = np.array([cost.round(k, draft) for k in range(1, most + 1)])
        log_speedups.append(np.log((1 + accepted) * cost.plain / seconds))
    return float(np.exp(np.mean(log_speedups, axis=0).max()))


def search(
    exit_layer: int,
    speedup_of: Callable[[DraftPass], float],
    budget: int,
    on_step: Callable[[int, Found], None] | None = None,
) -> list[Found]:
    """Leave out sublayers one after another, until none is left or the budget is used up.

    Args:
        exit_layer: Layers of the pass.
        speedup_of: To maximise.
        budget: How often it may be asked.
        on_step: Told how often it was asked, and the best set so far.

    Returns:
        Every set taken on the way, from nothing left out.
    """
    asked: dict[DraftPass, float] = {}

    def ask(draft_pass: DraftPass) -> float:
        if draft_pass not in asked:
            asked[draft_pass] = speedup_of(draft_pass)
        return asked[draft_pass]

    now = DraftPass(exit_layer)
    path = [Found(now, ask(now))]
    moves = list(_moves(exit_layer))
    promise: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    for move in moves:
        if len(asked) < budget:
            promise[move] = ask(now.without(*move)) - path[0].speedup
    while promise and len(asked) < budget:
        likely = sorted(promise, key=lambda move: -promise[move])[:_LAZY]
        for move in likely:
            promise[move] = ask(now.without(*move)) - path[-1].speedup
        best = max(likely, key=lambda move: promise[move])
        now = now.without(*best)
        path.append(Found(now, ask(now)))
        promise = {move: gain for move, gain in promise.items() if now.without(*move) != now}
        peak = max(path, key=lambda found: found.speedup)
        if on_step is not None:
            on_step(len(asked), peak)
    return path


def _moves(exit_layer: int) -> Iterable[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Attention, feed-forward network, or both, of every layer but the first and the last."""
    for layer in range(1, exit_layer - 1):
        yield (layer,), ()
        yield (), (layer,)
        yield (layer,), (layer,)
