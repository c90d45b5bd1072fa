"""The loaded target, as proposers see it: its layers over its own paged cache, and its head.

Shapes: T tokens of a pass laid end to end, request by request; H hidden size; V vocabulary;
M entries of a draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from .draft_sampling import MostLikely


@dataclass(frozen=True, slots=True)
class LayerState:
    """Hidden states between two layers, as the model itself hands them on.

    Attributes:
        hidden: `[T, H]` what the last sublayer put out.
        residual: `[T, H]` the sum before it, added by the next norm; None when it is in `hidden`.
    """

    hidden: Tensor
    residual: Tensor | None = None

    @property
    def merged(self) -> Tensor:
        """`[T, H]` the residual stream itself."""
        return self.hidden if self.residual is None else self.hidden + self.residual

    def select(self, rows: Tensor) -> LayerState:
        """Some of the T rows."""
        residual = None if self.residual is None else self.residual[rows]
        return LayerState(self.hidden[rows], residual)


class LayerStack(Protocol):
    """Some of the target's layers, in order; call it inside `PagedSequences.step`."""

    def __call__(self, state: LayerState, positions: Tensor) -> LayerState:
        """Run the layers on T tokens at `positions`, `[T]` int64."""
        ...


class PagedAttention(Protocol):
    """One more attention layer, with key/value pages of its own beside the target's."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write keys and values of T tokens, then attend causally; inside a step only.

        Args:
            query: `[T, num_heads * head_dim]`, rotated.
            key: `[T, num_kv_heads * head_dim]`, rotated.
            value: `[T, num_kv_heads * head_dim]`.

        Returns:
            `[T, num_heads * head_dim]`.
        """
        ...

    def write(self, key: Tensor, value: Tensor) -> None:
        """Write keys and values of T tokens and attend to nothing; inside a step only."""
        ...

    def rotate(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """The target's rotary position embedding, `[T]` positions."""
        ...


class PagedSequences(Protocol):
    """The pages of some requests, for the tokens of one draft."""

    def step(
        self, positions: Tensor, query_lengths: Sequence[int] | None = None
    ) -> AbstractContextManager[None]:
        """A pass over T tokens: inside, layers write and read these requests' pages.

        Args:
            positions: `[T]` int64, request by request; consecutive within a request.
            query_lengths: `[R]` tokens of each request, at least 1; None = one each.
        """
        ...

    def prepare(self, positions: Tensor, count: int) -> list[Tensor]:
        """Get ready for steps of one token each, at `positions` `[R]` and the next ones.

        All at once this takes a fraction of what it takes between passes, which leave nothing
        in the processor's caches. Hand `step` the tensors returned here.

        Returns:
            Positions of `count` steps; a request stays at its end (`TargetModel.sequences`).
        """
        ...

    def select(self, requests: Tensor) -> PagedSequences:
        """Some of the requests, `[R']` int64 indices."""
        ...


class LanguageModelHead(Protocol):
    """The output head: hidden states to logits, over the whole vocabulary or rows of it."""

    vocab_size: int
    hidden_size: int

    def logits(self, hidden: Tensor) -> Tensor:
        """`[T, V]` float32 from `[T, H]` normed hidden states."""
        ...

    def rows(self, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights `[M, H]` and bias `[M]` (or None) of some tokens, copied, on every rank whole.

        Raises:
            SpecPluginsError: The head is quantised, or of a kind unknown to us.
        """
        ...

    def row_logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Logits of such rows, scaled and capped like the head's own, float32.

        Args:
            hidden: `[T, H]`.
            weight: `[M, H]`, or `[T, M, H]` for rows of its own for each token.
            bias: `[M]` or `[T, M]`, or None.

        Returns:
            `[T, M]`.
        """
        ...

    def most_likely_row(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> MostLikely | None:
        """The first of the largest `row_logits`, where a kernel finds it without writing them.

        Args:
            hidden: `[T, H]`.
            weight: `[M, H]`.
            bias: `[M]` or None.

        Returns:
            None where there is no such kernel: on the CPU, for too many rows.
        """
        ...


class TargetModel(Protocol):
    """The target as loaded in this worker."""

    @property
    def module(self) -> nn.Module:
        """The target itself."""
        ...

    @property
    def num_layers(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def head(self) -> LanguageModelHead: ...

    @property
    def head_in_layers(self) -> float:
        """Weights of the head, in weights of a layer: what it costs beside them."""
        ...

    @property
    def tensor_parallel_rank(self) -> int: ...

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum over tensor-parallel ranks; every rank must call it."""
        ...

    def attention(self, name: str) -> PagedAttention:
        """One more attention layer shaped like the target's own. Only in `Proposer.load`.

        Raises:
            SpecPluginsError: The target's pages cannot take one.
        """
        ...

    def layers(
        self,
        start: int,
        stop: int,
        *,
        skip_layers: Sequence[int] = (),
        skip_attention: Sequence[int] = (),
        skip_ffn: Sequence[int] = (),
    ) -> LayerStack:
        """Layers start to stop-1 (counted from 0), without some of them or their sublayers.

        Raises:
            SpecPluginsError: The target has no such layer, or its parts have unknown names.
        """
        ...

    def embed(self, token_ids: Tensor) -> LayerState:
        """What the first layer reads, for `[T]` int64 tokens."""
        ...

    def final_norm(self, state: LayerState) -> Tensor:
        """`[T, H]` what the head reads."""
        ...

    def sequences(
        self,
        rows: NDArray[np.int64],
        most_tokens: NDArray[np.int64] | None = None,
        ends: Tensor | None = None,
    ) -> PagedSequences:
        """The pages of the requests in some rows (`DraftInput.rows`) of the step's batch.

        Args:
            rows: `[R]`.
            most_tokens: `[R]` on the host, not less than the tokens of each; None = the engine
                knows, or takes the most that a request can have.
            ends: `[R]` int64 on the device: from this position on nothing of a request is
                written, and what is computed there has no meaning; None = all that is asked for
                is written.
        """
        ...

    def warm_up_sequences(self, num_requests: int) -> PagedSequences:
        """Pages that no request holds yet, of so many requests. Only in `Proposer.warm_up`.

        Up to 64 positions each; requests may share a page where memory is short, so what is
        computed over them has the right cost and no meaning.
        """
        ...
