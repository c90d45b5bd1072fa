"""Tokens of many positions from their laws: the most likely, or drawn with the laws kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.random_numbers import Purpose, uniforms
from vllm_spec_plugins.transfers import to_device
from vllm_spec_plugins.vocabulary_passes import first_argmax

from .jacobi_coupling import draw_fresh, law_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vllm_spec_plugins.device_drafting import DeviceDraftInput
    from vllm_spec_plugins.proposer import DraftInput


@dataclass(frozen=True, slots=True)
class BlockDraws:
    """How the tokens of n requests are drawn, each with noise of its own position.

    Attributes:
        sampled: `[n]` bool on the host, which requests draw; the others take the most likely.
        scale: `[n, 1, 1]` float32 temperatures, 1 where nothing is drawn.
        streams: `[n, 1]` int64.
        first: `[n, 1]` int64 sequence position of the first draft token.
        top_k: Most tokens of a law; None: all of them.
    """

    sampled: NDArray[np.bool_]
    scale: Tensor
    streams: Tensor
    first: Tensor
    top_k: int | None

    @classmethod
    def of(
        cls,
        batch: DraftInput,
        requests: NDArray[np.int64],
        device: torch.device,
        *,
        top_k: int | None = None,
        chooses: bool = False,
    ) -> BlockDraws:
        """For some requests of a step.

        Args:
            batch: The step.
            requests: `[n]` which of its requests.
            device: Of the logits.
            top_k: Most tokens of a law; None: all of them.
            chooses: Whether the most likely token is taken at every temperature.
        """
        temperatures = 0 * batch.temperatures[requests] if chooses else batch.temperatures[requests]
        sampled = temperatures > 0
        scale = np.where(sampled, temperatures, np.float32(1))

        def column(values: NDArray[np.int64]) -> Tensor:
            return to_device(values[requests], device).unsqueeze(1)

        return cls(
            sampled,
            to_device(scale, device).view(-1, 1, 1),
            column(batch.streams),
            column(batch.num_tokens),
            top_k,
        )

    @classmethod
    def on_device(cls, batch: DeviceDraftInput, *, top_k: int | None = None) -> BlockDraws:
        """The same for all requests of a step whose lengths are known to the device alone."""
        warm = batch.temperatures > 0
        return cls(
            batch.temperatures_on_host > 0,
            torch.where(warm, batch.temperatures, 1).view(-1, 1, 1),
            batch.streams.unsqueeze(1),
            batch.num_tokens.unsqueeze(1),
            top_k,
        )

    def __call__(self, logits: Tensor, columns: Tensor) -> tuple[Tensor, DraftProbabilities | None]:
        """Tokens of m positions of every request.

        Args:
            logits: `[n, m, V]` float32.
            columns: `[n, m]` or `[1, m]` int64, which draft token each is, 0 for the first: a
                number is looked at once, for the draft that begins here and the token it decides.

        Returns:
            `[n, m]` int64 tokens; and `[n, m, M]` the laws they were drawn from, None when none
            was drawn.
        """
        count, width, vocab_size = logits.shape
        if not self.sampled.any():
            return first_argmax(logits.reshape(-1, vocab_size)).view(count, width), None
        law = law_of((logits / self.scale).reshape(-1, vocab_size), self.top_k or vocab_size)
        u = uniforms(self.streams, self.first, columns, Purpose.DRAFT)
        token_ids = draw_fresh(law, u.expand(count, width).reshape(-1)).view(count, width)
        sampled = to_device(self.sampled, logits.device)
        if not self.sampled.all():
            chosen = to_device(np.flatnonzero(~self.sampled), logits.device)
            rows = logits.index_select(0, chosen).view(-1, vocab_size)
            token_ids[chosen] = first_argmax(rows).view(len(chosen), width)
        ids = law.vocabulary
        return token_ids, DraftProbabilities(
            law.values.view(count, width, -1),
            None if ids is None else ids.view(count, width, -1),
            sampled.unsqueeze(1).expand(count, width),
        )


def draft_lengths(
    token_ids: NDArray[np.int64],
    most: NDArray[np.int64],
    end_token_ids: NDArray[np.int64],
) -> NDArray[np.int64]:
    """How many tokens of each draft are sent: up to and with the first that ends the text.

    That token is kept, so what is sent was drawn from its law, whatever is left out behind it.

    Args:
        token_ids: `[n, K]`, -1 = none.
        most: `[n]` tokens that may be sent.
        end_token_ids: `[E]`.

    Returns:
        `[n]`.
    """
    counts = np.minimum((token_ids >= 0).cumprod(axis=1).sum(axis=1), most)
    ends = np.isin(token_ids, end_token_ids)
    first = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, counts)
    return np.minimum(counts, first)


def end_on_device(token_ids: Tensor, most: Tensor, end_token_ids: Tensor) -> Tensor:
    """What `draft_lengths` sends, where lengths are known to the device alone.

    Args:
        token_ids: `[n, K]` int64.
        most: `[n]` tokens that may be sent.
        end_token_ids: `[E]`.

    Returns:
        `[n, K]`, -1 behind what is sent.
    """
    ends = (token_ids.unsqueeze(2) == end_token_ids).any(dim=2)
    goes_on = ends.cumsum(dim=1) - ends.long() == 0
    column = torch.arange(token_ids.shape[1], device=token_ids.device)
    return torch.where(goes_on & (column < most.unsqueeze(1)), token_ids, -1)


def stop_at_confidences(
    batch: DraftInput,
    requests: NDArray[np.int64],
    lengths: NDArray[np.int64],
    confidences: NDArray[np.float32],
) -> NDArray[np.int64]:
    """Ask the length controller after each token, as if they had been drafted one by one.

    It knows the tokens up to the one it stops at, and that one is kept: exact.

    Args:
        batch: The step.
        requests: `[n]` which of its requests.
        lengths: `[n]` tokens of each draft.
        confidences: `[n, K]` probability of each token under the draft.

    Returns:
        `[n]` lengths, none longer.
    """
    lengths, keys = lengths.copy(), batch.keys.select(requests)
    for index in range(int(lengths.max(initial=0)) - 1):
        drafting = np.flatnonzero(lengths > index)
        stops = batch.length_control.stop_after(
            keys.select(drafting), index, confidences[drafting, index]
        )
        lengths[drafting[stops]] = index + 1
    return lengths
