"""One draft token per request from its logits: the most likely, or drawn with its law kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .draft_probabilities import DraftProbabilities
from .draw_next import sample_weights
from .transfers import to_device
from .triton_kernels.ranked_lm_head import (  # pyright: ignore[reportMissingImports]
    has_fused_head,
    ranked_lm_head,
)
from .vocabulary_passes import first_argmax, log_normaliser


@dataclass(frozen=True, slots=True)
class Drawn:
    """R draft tokens.

    Attributes:
        columns: `[R]` int64, which column of the logits each token is.
        confidences: `[R]` float32, its probability under the draft; None unless asked for.
        probabilities: `[R, M]` the laws they were drawn from; None when all were choices.
        sampled: `[R]` bool, which were drawn; None with `probabilities` None.
    """

    columns: Tensor
    confidences: Tensor | None
    probabilities: Tensor | None
    sampled: Tensor | None


@dataclass(frozen=True, slots=True)
class MostLikely:
    """All that is read of R rows of logits where every token is a choice.

    Attributes:
        columns: `[R]` int64, the most likely column of each row; of equals the first.
        probabilities: `[R]` float32, its probability.
    """

    columns: Tensor
    probabilities: Tensor


@dataclass(frozen=True, slots=True)
class Draws:
    """How the tokens of R requests are drawn in one round of up to K each.

    Attributes:
        temperatures: `[R]` float32 on the host, 0 = the most likely token is taken.
        scale: `[R, 1]` float32 temperatures, 1 where that is so; None when all are 1.
        sampled: `[R]` bool, which requests draw.
        chosen: `[C]` int64, the rows of those that do not; None = all do.
        uniforms: `[R, K]` float64 in (0, 1) (`Purpose.DRAFT`).
    """

    temperatures: NDArray[np.float32]
    scale: Tensor | None
    sampled: Tensor
    chosen: Tensor | None
    uniforms: Tensor

    @classmethod
    def of(cls, temperatures: NDArray[np.float32], uniforms: Tensor) -> Draws:
        """From `[R]` temperatures on the host, 0 = the most likely token."""
        device, sampled = uniforms.device, temperatures > 0
        scale, chosen = None, None
        if (temperatures[sampled] != 1).any():
            scale = to_device(np.where(sampled, temperatures, np.float32(1)), device).unsqueeze(1)
        if not sampled.all():
            chosen = to_device(np.flatnonzero(~sampled), device)
        return cls(temperatures, scale, to_device(sampled, device), chosen, uniforms)

    def select(self, rows: NDArray[np.int64]) -> Draws:
        """Some of the requests."""
        uniforms = self.uniforms[to_device(rows, self.uniforms.device)]
        return Draws.of(self.temperatures[rows], uniforms)


def draw(
    logits: Tensor | MostLikely,
    draws: Draws | None,
    index: int,
    wants_confidences: bool = False,
    room: Tensor | None = None,
) -> Drawn:
    """Draw, or choose where the temperature is 0.

    Args:
        logits: `[R, M]` float32, changed in place. -inf = cannot be drafted. Where `draws` is None
            also what a fused head keeps of them.
        draws: None: the most likely token everywhere.
        index: Which token of the round, 0 for the first.
        wants_confidences: Whether `Drawn.confidences` is read.
        room: `[R, M]` memory for `Drawn.probabilities`; None: new.
    """
    if isinstance(logits, MostLikely):
        assert draws is None
        confidences = logits.probabilities if wants_confidences else None
        return Drawn(logits.columns, confidences, None, None)
    if draws is None:
        columns, confidences = first_argmax(logits), None
        if wants_confidences:
            best = logits.gather(1, columns.unsqueeze(1)).squeeze(1)
            confidences = (best - log_normaliser(logits)).exp()
        return Drawn(columns, confidences, None, None)
    if draws.scale is not None:
        logits.div_(draws.scale)
    probabilities = torch.softmax(logits, dim=-1, out=room)
    columns = sample_weights(probabilities, draws.uniforms[:, index])
    if draws.chosen is not None:
        columns[draws.chosen] = first_argmax(logits.index_select(0, draws.chosen))
    confidences = None
    if wants_confidences:
        confidences = probabilities.gather(1, columns.unsqueeze(1)).squeeze(1)
    return Drawn(columns, confidences, probabilities, draws.sampled)


def most_likely_column(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, soft_cap: float | None
) -> MostLikely | None:
    """The first of the largest logits of each row, in the kernel that writes no logits.

    It chooses what `draw` chooses from logits of the type of `hidden`, which share its ties.

    Args:
        hidden: `[R, H]`.
        weight: `[M, H]`, of the same type.
        bias: `[M]` or None.
        scale: Factor on logits, above 0, applied last.
        soft_cap: c: a logit becomes c tanh(logit / c) before that; None: as it is.

    Returns:
        None where the kernel does not run: on the CPU, or for more rows than it takes.
    """
    if not has_fused_head(hidden, weight):
        return None
    # The kernel scales first and caps then.
    cap = None if soft_cap is None else soft_cap * scale
    choice = ranked_lm_head(hidden, weight, bias, scale=scale, soft_cap=cap, rounded=True)
    # A row without a number in it has no column: any is as good.
    columns = choice.columns[:, 0].clamp(min=0)
    return MostLikely(columns, (choice.logits[:, 0] - choice.log_normaliser).exp())


def token_ids_of(columns: Tensor, vocabulary: Tensor | None) -> Tensor:
    """`[R]` int64 target ids of the columns of a draft vocabulary.

    Args:
        columns: `[R]` int64.
        vocabulary: None for the whole vocabulary, `[M]`, or `[R, M]`.
    """
    if vocabulary is None:
        return columns
    if vocabulary.ndim == 1:
        return vocabulary[columns]
    return vocabulary.gather(1, columns.unsqueeze(1)).squeeze(1)


def most_likely_probability(logits: Tensor) -> Tensor:
    """`[R]` float32 probability of each row's most likely token."""
    return (logits.amax(dim=-1) - torch.logsumexp(logits, dim=-1)).exp()


class DraftLaws:
    """The laws a round of draft tokens were drawn from, in memory that rounds use again."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        #: `[K, R, M]`: the laws of one token of every request lie side by side.
        self._values: Tensor | None = None
        self._room: Tensor | None = None
        self._shape = (0, 0)
        self._sampled = torch.empty(0)
        self._vocabulary: Tensor | None = None

    def begin(self, num_requests: int, width: int) -> None:
        """A round of up to `width` tokens for each request."""
        self._values, self._vocabulary, self._room = None, None, None
        self._shape = (num_requests, width)

    def room(self, index: int, logits: Tensor) -> Tensor:
        """`[R, M]` where the laws of the `index`-th token of all requests may be written.

        Spares `put` a copy: into memory that has left the caches meanwhile.

        Args:
            index: Of the round.
            logits: `[R, M]` that the laws are made of.
        """
        if self._values is None:
            self._start(logits)
        assert self._values is not None
        self._room = self._values[index]
        return self._room

    def put(self, rows: Tensor | None, index: int, drawn: Drawn, vocabulary: Tensor | None) -> None:
        """Keep the laws of the `index`-th token of some requests, `[n]` int64; None = of all.

        The vocabulary of a request stays what it was at its first token.
        """
        law, sampled = drawn.probabilities, drawn.sampled
        if law is None or sampled is None:
            return
        if self._values is None:
            self._start(law)
        if index == 0:
            self._vocabulary = vocabulary
            if vocabulary is not None and vocabulary.ndim > 1 and rows is not None:
                table = vocabulary.new_full((self._shape[0], vocabulary.shape[1]), -1)
                self._vocabulary = table.index_copy(0, rows, vocabulary)
        assert self._values is not None
        if rows is not None:
            self._values[index, rows] = law
            self._sampled[index, rows] = sampled
            return
        if law is not self._room:
            self._values[index] = law
        self._sampled[index] = sampled

    def _start(self, like: Tensor) -> None:
        requests, width = self._shape
        shape = (width, requests, like.shape[1])
        needed = shape[0] * shape[1] * shape[2]
        if self._memory.numel() < needed or self._memory.device != like.device:
            self._memory = like.new_empty(needed)
        self._values = self._memory[:needed].view(shape)
        self._sampled = torch.zeros(shape[:2], dtype=torch.bool, device=like.device)

    def result(self) -> DraftProbabilities | None:
        """`[R, K, M]`, valid until the next `begin`; None when every token was a choice."""
        if self._values is None:
            return None
        values, vocabulary = self._values.transpose(0, 1), self._vocabulary
        if vocabulary is not None and vocabulary.ndim > 1:
            vocabulary = vocabulary.unsqueeze(1).expand(values.shape)
        return DraftProbabilities(values, vocabulary, self._sampled.T)
