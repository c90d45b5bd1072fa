"""`jacobi` where nothing may wait for the host: the same drafts, over all places at once.

How many draft tokens were accepted is known to the device alone, so every place of every draft is
computed, and what a place is (known to the last verification, to be filled, none) is a mask. Random
numbers have the keys of the host's route: from one state both draft the same tokens.

Shapes: R requests, K draft tokens, S slots, V the vocabulary, M columns of a law.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_spec_plugins.device_drafting import DeviceDraft
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.random_numbers import Purpose, uniforms
from vllm_spec_plugins.vocabulary_passes import first_argmax

from .jacobi_coupling import Past, draw_fresh, draw_maximal, draw_race, law_of
from .jacobi_filler import Filler, copy_from_above, tokens_above

if TYPE_CHECKING:
    from vllm_spec_plugins.device_drafting import DeviceDraftInput


@dataclass(frozen=True, slots=True)
class _Drafts:
    """What was drafted in one step.

    Attributes:
        token_ids: `[R, K]` int64; those past `counts` count for nothing.
        law: `[R, K, M]` they came from; None when all requests are greedy.
        first: `[R]` int64, sequence position of column 0.
        counts: `[R]` int64.
        row_of_slot: `[S]` int64; -1 = the slot's request did not draft.
    """

    token_ids: Tensor
    law: DraftProbabilities | None
    first: Tensor
    counts: Tensor
    row_of_slot: Tensor

    def at(self, slots: Tensor, positions: Tensor) -> Past | None:
        """What stands at `[R, K]` sequence positions of the requests in `[R]` slots, flat."""
        if self.law is None:
            return None
        row = self.row_of_slot[slots]
        column = positions - self.first[row].unsqueeze(1)
        known = (row >= 0).unsqueeze(1) & (column >= 0) & (column < self.counts[row].unsqueeze(1))
        index = row.clamp(min=0).unsqueeze(1), column.clamp(0, self.token_ids.shape[1] - 1)
        law = self.law
        assert law.sampled is not None
        return Past(
            known.flatten(),
            self.token_ids[index].flatten(),
            DraftProbabilities(
                law.values[index].flatten(0, 1),
                None if law.vocabulary is None else law.vocabulary[index].flatten(0, 1),
                law.sampled[index].flatten(),
            ),
        )


class JacobiOnDevice:
    """Drafts from the target's laws of the last verification, and never looks at a value.

    Args:
        coupling: See `JacobiOptions`.
        filler: See `JacobiOptions`.
        row_length: Tokens from an image code to the one below it, with filler "above".
        codes: `[first, last + 1)` ids of image codes.
        random: `[C]` int64 ids of random tokens.
        uniform: `[M]`, their law.
        num_slots: S.
    """

    def __init__(
        self,
        *,
        coupling: str,
        filler: Filler,
        row_length: int | None,
        codes: tuple[int, int],
        random: Tensor,
        uniform: DraftProbabilities,
        num_slots: int,
    ) -> None:
        self._coupling, self._filler = coupling, filler
        self._row_length, self._codes = row_length, codes
        self._random, self._uniform = random, uniform
        self._num_slots = num_slots
        #: Of the last step, for maximal coupling.
        self._last: _Drafts | None = None

    def propose(self, batch: DeviceDraftInput) -> DeviceDraft:
        """What `Proposer.propose_on_device` answers."""
        count, width = len(batch.slots), batch.num_speculative_tokens
        column = torch.arange(width, device=batch.slots.device)
        wanted = column < batch.max_draft.unsqueeze(1)  # [R, K]
        drawn, law = self._drawn(batch, column)
        known = torch.zeros_like(wanted)
        if (rows := batch.target_rows) is not None:
            known = wanted & (column < rows.counts.unsqueeze(1))
        filled, is_random = self._filled(batch, column, known, wanted, drawn)
        token_ids = torch.where(known, drawn, filled)
        if batch.temperatures_on_host.any():
            law = self._law(law, known, is_random, batch.temperatures > 0, (count, width))
        if self._coupling == "maximal":
            none = torch.full((self._num_slots,), -1, device=column.device)
            row_of_slot = none.index_copy(0, batch.slots, torch.arange(count, device=column.device))
            self._last = _Drafts(token_ids, law, batch.num_tokens, batch.max_draft, row_of_slot)
        return DeviceDraft(token_ids.masked_fill(~wanted, -1), law)

    def _drawn(
        self, batch: DeviceDraftInput, column: Tensor
    ) -> tuple[Tensor, DraftProbabilities | None]:
        """`[R, K]` tokens from the laws of the last verification, and `[R, K, M]` those laws.

        Anything where it computed none. No laws where all requests are greedy.
        """
        shape = len(batch.slots), len(column)
        if batch.target_rows is None:
            return torch.zeros(shape, dtype=torch.int64, device=column.device), None
        logits = batch.target_rows.take(len(column)).flatten(0, 1)  # [R K, V]
        draws = batch.temperatures_on_host > 0
        if not draws.any():
            return first_argmax(logits).view(shape), None
        law = law_of(logits, self._uniform.values.shape[-1])
        token_ids = self._tokens_from(law, batch, column).view(shape)
        if not draws.all():
            chosen = first_argmax(logits).view(shape)
            token_ids = torch.where((batch.temperatures > 0).unsqueeze(1), token_ids, chosen)
        vocabulary = law.vocabulary
        return token_ids, DraftProbabilities(
            law.values.unflatten(0, shape),
            None if vocabulary is None else vocabulary.unflatten(0, shape),
        )

    def _tokens_from(
        self, law: DraftProbabilities, batch: DeviceDraftInput, column: Tensor
    ) -> Tensor:
        """`[R K]` int64 drawn from `[R K, M]`, coupled to what stood there."""
        positions = batch.num_tokens.unsqueeze(1) + column  # [R, K]
        if self._coupling == "gumbel":
            return draw_race(law, self._race(law, batch, positions.flatten()))
        u = self._fresh(batch, column).flatten()
        past = None if self._last is None else self._last.at(batch.slots, positions)
        if past is None:
            return draw_fresh(law, u)
        new = batch.fresh.repeat_interleave(len(column), output_size=len(past.known))
        past = Past(past.known & ~new, past.token_ids, past.law)
        keep = self._fresh(batch, column + batch.num_speculative_tokens).flatten()
        return draw_maximal(law, past, keep=keep, others=u)

    def _fresh(self, batch: DeviceDraftInput, index: Tensor) -> Tensor:
        """`[R, K]` float64 uniforms that no other step looks at."""
        return uniforms(
            batch.streams.unsqueeze(1), batch.num_tokens.unsqueeze(1), index, Purpose.DRAFT
        )

    def _race(self, law: DraftProbabilities, batch: DeviceDraftInput, positions: Tensor) -> Tensor:
        """`[R K, M]` float64 uniforms of each position and token, the same in every step."""
        ids = law.vocabulary
        if ids is None:
            ids = torch.arange(law.values.shape[1], device=positions.device)
        width = len(positions) // len(batch.streams)
        streams = batch.streams.repeat_interleave(width, output_size=len(positions))
        return uniforms(streams.unsqueeze(1), positions.unsqueeze(1), ids, Purpose.COUPLED_DRAFT)

    def _filled(
        self,
        batch: DeviceDraftInput,
        column: Tensor,
        known: Tensor,
        wanted: Tensor,
        drawn: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`[R, K]` tokens for places of which no law is known, and `[R, K]` which are random."""
        random = self._random[(self._fresh(batch, column) * len(self._random)).long()]
        if self._filler == "random":
            return random, ~known
        last = batch.token_ids[batch.slots, (batch.num_tokens - 1).clamp(min=0)].long()
        text = torch.cat([last.unsqueeze(1), torch.where(known, drawn, -1)], dim=1)
        if self._filler == "repeat_left":
            left = text.gather(1, known.sum(dim=1, keepdim=True))
            return left.expand_as(known), torch.zeros_like(known)
        assert self._row_length is not None
        above = tokens_above(
            batch.token_ids, batch.slots, batch.num_tokens, self._row_length, len(column)
        )
        empty = wanted & ~known
        return copy_from_above(text, empty, above, self._row_length, random, self._codes)

    def _law(
        self,
        law: DraftProbabilities | None,
        known: Tensor,
        is_random: Tensor,
        draws: Tensor,
        shape: tuple[int, int],
    ) -> DraftProbabilities:
        """`[R, K, M]` what each token was drawn from; copies and greedy tokens are choices."""
        values, vocabulary = self._uniform.values, self._uniform.vocabulary
        if law is None:
            values = values.expand(*shape, -1)
            vocabulary = None if vocabulary is None else vocabulary.expand(*shape, -1)
        else:
            here = known.unsqueeze(2)
            values = torch.where(here, law.values, values)
            if vocabulary is not None:
                assert law.vocabulary is not None
                vocabulary = torch.where(here, law.vocabulary, vocabulary)
        sampled = (known | is_random) & draws.unsqueeze(1)
        return DraftProbabilities(values, vocabulary, sampled)
