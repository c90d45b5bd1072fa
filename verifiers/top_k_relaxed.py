"""`top_k_relaxed`: a draft token stands when it is among the target's best.

    x is one of the k most likely tokens under p, and p(x) >= max p - delta

The relaxed acceptance of TensorRT-LLM, made for reasoning models: with the ids of the thinking
tags, only tokens between them are relaxed, and the answer is exact. A token stands, too, when
the exact rule accepts it; after a rejection the ordinary residual is the best there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from vllm_spec_plugins.errors import ConfigError
from vllm_spec_plugins.relaxed_rule import RelaxedOptions, RelaxedRule
from vllm_spec_plugins.request_table import RequestTable
from vllm_spec_plugins.verifier import TokenHistory, VerifyInput, token_acceptance
from vllm_spec_plugins.vocabulary_passes import row_blocks

if TYPE_CHECKING:
    from vllm_spec_plugins.context import EngineContext, ModelFacts

#: More new tokens than any step gives a request that is past its prompt.
_LONG = 256


class TopKRelaxedOptions(RelaxedOptions):
    k: int = Field(10, ge=1, description="How many of the target's most likely tokens count.")
    delta: float = Field(
        0.6, ge=0, le=1, description="Largest distance in probability to the most likely token."
    )
    begin_thinking_token_id: int | None = Field(
        None, ge=0, description="Token after which drafts are relaxed. Absent: everywhere."
    )
    end_thinking_token_id: int | None = Field(
        None, ge=0, description="Token after which drafts are exact again."
    )

    @model_validator(mode="after")
    def _both_tags(self) -> TopKRelaxedOptions:
        begin, end = self.begin_thinking_token_id, self.end_thinking_token_id
        if (begin is None) != (end is None) or (begin is not None and begin == end):
            raise ValueError(
                "begin_thinking_token_id and end_thinking_token_id are two different token ids, "
                "given both or not at all"
            )
        return self


class TopKRelaxed(RelaxedRule):
    """Accepts the target's best few, everywhere or only between thinking tags."""

    Options = TopKRelaxedOptions
    options: TopKRelaxedOptions

    def __init__(self, options: TopKRelaxedOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        #: Of each request: tokens looked at, whether they end inside thinking tags.
        self._read = RequestTable((0.0, 0.0), capacity=16)

    @classmethod
    def check(cls, options: TopKRelaxedOptions, facts: ModelFacts) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for name in ("begin_thinking_token_id", "end_thinking_token_id"):
            token_id = getattr(options, name)
            if token_id is not None and token_id >= facts.vocab_size:
                raise ConfigError(
                    f'top_k_relaxed: "{name}" is {token_id}, and {facts.model} has token ids '
                    f"below {facts.vocab_size}."
                )

    def relaxed_acceptance(self, batch: VerifyInput) -> Tensor:
        accept = token_acceptance(batch)
        rows = (accept < 1).nonzero().squeeze(1)
        best = rows[self._among_the_best(batch, rows)]
        return accept.index_fill(0, best, 1.0)

    def relaxed_greedy_acceptance(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        return self._among_the_best(batch, rows)

    def _among_the_best(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        """`[M]` bool."""
        stands = among_the_best(batch, rows, self.options.k, self.options.delta)
        if self.options.begin_thinking_token_id is not None:
            stands &= self._thinking(batch)[rows]
        return stands

    def _thinking(self, batch: VerifyInput) -> Tensor:
        """`[N]` bool, whether each draft token comes inside thinking tags."""
        begin, end = self.options.begin_thinking_token_id, self.options.end_thinking_token_id
        before = np.zeros(len(batch.num_draft), dtype=np.bool_)
        if batch.history is not None:
            before = self._read_on(batch.request_ids, batch.history)
        device = batch.num_draft.device
        # The state before draft token j is that after the last tag before it.
        table = batch.draft_token_ids.new_full((len(before), batch.max_num_draft + 1), -1)
        table[batch.request_of, batch.index_in_draft + 1] = batch.draft_token_ids
        is_tag = (table == begin) | (table == end)
        is_tag[:, 0] = True
        state = table == begin
        state[:, 0] = torch.from_numpy(before).to(device)
        column = torch.arange(table.shape[1], device=device)
        last_tag = torch.where(is_tag, column, torch.zeros_like(column)).cummax(dim=1).values
        return state.gather(1, last_tag)[batch.request_of, batch.index_in_draft]

    def _read_on(self, request_ids: Sequence[str], history: TokenHistory) -> NDArray[np.bool_]:
        """`[R]` whether each request's text so far ends inside thinking tags."""
        table, stop = self._read.rows(request_ids), history.num_tokens
        renewed = self._read.values[table, 0] > stop  # another text under the same name
        self._read.values[table[renewed]] = 0.0
        start = self._read.values[table, 0].astype(np.int64)
        # A prompt is read on its own: the others have a step's tokens each.
        is_long = stop - start > _LONG
        for group in (np.flatnonzero(~is_long), *np.flatnonzero(is_long)[:, None]):
            inside = self._read.values[table[group], 1] > 0
            self._read.values[table[group], 1] = self._ends_inside(
                history.token_ids, history.rows[group], start[group], stop[group], inside
            )
        self._read.values[table, 0] = stop
        return self._read.values[table, 1] > 0

    def _ends_inside(
        self,
        token_ids: NDArray[np.int32],
        rows: NDArray[np.int64],
        start: NDArray[np.int64],
        stop: NDArray[np.int64],
        inside: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:
        """`[G]` whether text ends inside tags that was `inside` at `start`, read to `stop`."""
        width = int((stop - start).max(initial=0))
        if not width:
            return inside
        columns = start[:, None] + np.arange(width)  # [G, width]
        unread = columns < stop[:, None]
        tokens = token_ids[rows[:, None], np.where(unread, columns, 0)]
        begins = tokens == self.options.begin_thinking_token_id
        tags = unread & (begins | (tokens == self.options.end_thinking_token_id))
        last = width - 1 - tags[:, ::-1].argmax(axis=1)
        return np.where(tags.any(axis=1), begins[np.arange(len(rows)), last], inside)

    def finish(self, request_ids: Sequence[str]) -> None:
        super().finish(request_ids)
        self._read.forget(request_ids)


def among_the_best(batch: VerifyInput, rows: Tensor, k: int, delta: float) -> Tensor:
    """`[M]` bool: fewer than k tokens are likelier than x, and none by more than delta."""
    logits, ids = batch.target_logits, batch.draft_token_ids[rows].clamp(min=0)
    own = logits[rows, ids]
    p = (own - batch.target_log_normaliser_at(rows)).exp()
    # No token is likelier by more than 1 - 2p, and r likelier ones leave 1 / (r + 1) for x.
    stands = 1 - 2 * p <= delta
    which = (~stands).nonzero().squeeze(1)
    best = torch.empty_like(p[which])
    for block in row_blocks(len(which), logits):
        best[block] = logits.index_select(0, rows[which[block]]).amax(dim=-1)
    stands[which] = p[which] * ((best - own[which]).exp() - 1) <= delta
    which = (stands & (p * (k + 1) <= 1)).nonzero().squeeze(1)
    for block in row_blocks(len(which), logits):
        here = which[block]
        likelier = logits.index_select(0, rows[here]).gt_(own[here].unsqueeze(1))  # 0 or 1
        stands[here] = likelier.sum(dim=-1) < k
    return stands
