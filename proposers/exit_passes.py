"""One draft step through part of the target: embedding, layers, norm, head.

Each pass writes keys and values of its layers into the target's own pages. Verification
writes them again, so what a draft leaves there never outlives it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from vllm_spec_plugins.draft_sampling import most_likely_probability
from vllm_spec_plugins.target_model import LayerState

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from vllm_spec_plugins.draft_sampling import MostLikely
    from vllm_spec_plugins.target_model import LayerStack, PagedSequences, TargetModel

    from .exit_adapter import ExitAdapter

#: Normed hidden states `[T, H]` and the request of each row to logits `[T, M]` and their
#: vocabulary (None = whole).
ReadLogits = Callable[["Tensor", "NDArray[np.int64]"], "tuple[Tensor, Tensor | None]"]
#: The same where the most likely columns may be all that is read of the logits.
ReadHead = Callable[["Tensor", "NDArray[np.int64]"], "tuple[Tensor | MostLikely, Tensor | None]"]


@dataclass(frozen=True, slots=True)
class DraftStep:
    """One token of each of R requests.

    Attributes:
        token_ids: `[R]` int64, the last token of each.
        positions: `[R]` int64, where it stands.
        sequences: Their pages.
        requests: `[R]` int64, which requests of the round they are.
    """

    token_ids: Tensor
    positions: Tensor
    sequences: PagedSequences
    requests: NDArray[np.int64]


class ExitPass(Protocol):
    """A way of getting from a token to the logits of the next."""

    def begin(self, num_requests: int) -> None:
        """A new round of drafts for so many requests."""
        ...

    def __call__(self, step: DraftStep) -> tuple[Tensor | MostLikely, Tensor | None]:
        """`[R, M]` float32 logits, or their best columns, and the vocabulary of columns."""
        ...


class SingleExit:
    """Always the same layers, then the target's norm and head (LayerSkip, 2404.16710).

    Args:
        target: The target.
        stack: The layers.
        read: The head.
    """

    def __init__(self, target: TargetModel, stack: LayerStack, read: ReadHead) -> None:
        self._target, self._stack, self._read = target, stack, read

    def begin(self, num_requests: int) -> None:
        del num_requests

    def __call__(self, step: DraftStep) -> tuple[Tensor | MostLikely, Tensor | None]:
        with step.sequences.step(step.positions):
            state = self._stack(self._target.embed(step.token_ids), step.positions)
        return self._read(self._target.final_norm(state), step.requests)


class AdaptedExit:
    """The same layers, then a trained block with pages of its own (Kangaroo, 2404.18911).

    Args:
        target: The target.
        stack: The layers.
        adapter: The block; its last norm takes the place of the target's.
        read: The head.
    """

    def __init__(
        self, target: TargetModel, stack: LayerStack, adapter: ExitAdapter, read: ReadHead
    ) -> None:
        self._target, self._stack, self._adapter, self._read = target, stack, adapter, read

    def begin(self, num_requests: int) -> None:
        del num_requests

    def __call__(self, step: DraftStep) -> tuple[Tensor | MostLikely, Tensor | None]:
        with step.sequences.step(step.positions):
            state = self._stack(self._target.embed(step.token_ids), step.positions)
            normed = self._adapter.forward(state.merged, step.positions)
        return self._read(normed, step.requests)


class DeepeningExits:
    """Each token leaves at the first exit that is sure enough (S2D, 2407.01955).

    How sure an exit is, is the probability of its most likely token: known before anything is
    drawn, so the law of the token drawn there is the exit's own, and sampling stays exact.

    Tokens that left early have no keys and values in deeper layers. They wait, and are run
    through those layers together with the first token of their request that goes deeper: what
    deeper layers attend to is what they would have computed.

    Args:
        target: The target.
        stacks: One for each exit: the layers from the exit before it to itself.
        confidences: One for each exit but the last; below it a token goes deeper.
        read: The head.
    """

    def __init__(
        self,
        target: TargetModel,
        stacks: Sequence[LayerStack],
        confidences: Sequence[float],
        read: ReadLogits,
    ) -> None:
        self._target, self._stacks, self._read = target, stacks, read
        self._confidences = confidences
        self._waiting: list[list[list[_Waiting]]] = []

    def begin(self, num_requests: int) -> None:
        self._waiting = [[[] for _ in range(num_requests)] for _ in self._confidences]

    def __call__(self, step: DraftStep) -> tuple[Tensor, Tensor | None]:
        with step.sequences.step(step.positions):
            state = self._stacks[0](self._target.embed(step.token_ids), step.positions)
        logits, vocabulary = self._read(self._target.final_norm(state), step.requests)
        merged, deeper = state.merged, torch.arange(len(step.token_ids), device=logits.device)
        here = [[_Waiting(merged[i], step.positions[i])] for i in range(len(deeper))]
        for exit_index, confidence in enumerate(self._confidences):
            waiting = self._waiting[exit_index]
            for row, new in zip(deeper.tolist(), here, strict=True):
                waiting[step.requests[row]] += new
            unsure = most_likely_probability(logits[deeper]) < confidence
            deeper = deeper[unsure]
            if not len(deeper):
                break
            here = self._go_deeper(exit_index, step, deeper)
            last = torch.stack([tokens[-1].hidden for tokens in here])
            normed = self._target.final_norm(LayerState(last))
            rows = step.requests[deeper.cpu().numpy()]
            logits[deeper] = self._read(normed, rows)[0]
        return logits, vocabulary

    def _go_deeper(self, exit_index: int, step: DraftStep, rows: Tensor) -> list[list[_Waiting]]:
        """Run everything that waits at an exit, of some requests, to the next one."""
        owners = step.requests[rows.cpu().numpy()].tolist()
        tokens = [self._waiting[exit_index][owner] for owner in owners]
        lengths = [len(waiting) for waiting in tokens]
        hidden = torch.stack([token.hidden for waiting in tokens for token in waiting])
        positions = torch.stack([token.position for waiting in tokens for token in waiting])
        with step.sequences.select(rows).step(positions, lengths):
            state = self._stacks[exit_index + 1](LayerState(hidden), positions)
        for owner in owners:
            self._waiting[exit_index][owner] = []
        deeper = [_Waiting(h, p) for h, p in zip(state.merged, positions, strict=True)]
        ends = torch.tensor(lengths).cumsum(0).tolist()
        return [deeper[end - length : end] for end, length in zip(ends, lengths, strict=True)]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A token that left at an exit: its `[H]` residual stream there, and its position."""

    hidden: Tensor
    position: Tensor
