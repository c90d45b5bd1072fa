"""`top_k_relaxed`: a draft token stands when it is among the target's best.

    x is one of the k most likely tokens under p, and p(x) >= max p - delta

The relaxed acceptance of TensorRT-LLM, made for reasoning models: with the ids of the thinking
tags, only tokens between them are relaxed, and the answer is exact. A token stands, too, when
the exact rule accepts it; after a rejection the ordinary residual is the best there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vllm_spec_plugins.acceptance_rule import token_acceptance
from vllm_spec_plugins.errors import ConfigError
from vllm_spec_plugins.greedy_on_host import decide
from vllm_spec_plugins.relaxed_rule import RelaxedOptions, RelaxedRule
from vllm_spec_plugins.row_choice import replace_rows
from vllm_spec_plugins.token_spans import TokenSpans
from vllm_spec_plugins.verifier import VerifierOptions, VerifyInput
from vllm_spec_plugins.vocabulary_passes import count_above, largest_of_rows

if TYPE_CHECKING:
    from vllm_spec_plugins.context import EngineContext, ModelFacts


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
        self._thinking: TokenSpans | None = None
        begin, end = options.begin_thinking_token_id, options.end_thinking_token_id
        if begin is not None and end is not None:
            # What cannot be read is not known to be a thought: it stays exact.
            self._thinking = TokenSpans(
                context.facts.vocab_size, [(begin, end)], unreadable_is_inside=False
            )

    @classmethod
    def check(cls, options: TopKRelaxedOptions, facts: ModelFacts) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for name in ("begin_thinking_token_id", "end_thinking_token_id"):
            token_id = getattr(options, name)
            if token_id is not None and token_id >= facts.vocab_size:
                raise ConfigError(
                    f'top_k_relaxed: "{name}" is {token_id}, and {facts.model} has token ids '
                    f"below {facts.vocab_size}."
                )

    @classmethod
    def verifies_on_device(cls, options: VerifierOptions) -> bool:
        """Not between tags, which are looked for in texts on the host."""
        assert isinstance(options, TopKRelaxedOptions)
        return options.begin_thinking_token_id is None

    def relaxed_acceptance(self, batch: VerifyInput) -> Tensor:
        accept = token_acceptance(batch)
        return replace_rows(
            accept,
            accept < 1,
            lambda rows: torch.where(self._among_the_best(batch, rows), 1, accept[rows]),
        )

    def relaxed_greedy_acceptance(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        if batch.span_maxima is None:
            return self._among_the_best(batch, rows)
        stands = decide(batch, rows, "among_the_best", self.options.k, self.options.delta)
        return self._where_relaxed(batch, rows, stands)

    def _among_the_best(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        """`[M]` bool."""
        stands = among_the_best(batch, rows, self.options.k, self.options.delta)
        return self._where_relaxed(batch, rows, stands)

    def _where_relaxed(self, batch: VerifyInput, rows: Tensor, stands: Tensor) -> Tensor:
        """`[M]` bool: between thinking tags."""
        if self._thinking is None:
            return stands
        return stands & self._thinking.inside(batch)[rows]

    def finish(self, request_ids: Sequence[str]) -> None:
        super().finish(request_ids)
        if self._thinking is not None:
            self._thinking.finish(request_ids)


def among_the_best(batch: VerifyInput, rows: Tensor, k: int, delta: float) -> Tensor:
    """`[M]` bool: fewer than k tokens are likelier than x, and none by more than delta."""
    logits, ids = batch.target_logits, batch.draft_token_ids[rows].clamp(min=0)
    own = logits[rows, ids]
    if "draft_token_probability" in batch.__dict__:
        p = batch.draft_token_probability[rows]
        # No token is likelier by more than 1 - 2p, and r likelier ones leave 1 / (r + 1) for x.
        stands = 1 - 2 * p <= delta

        def within_delta(which: Tensor) -> Tensor:
            best = largest_of_rows(logits, rows[which])
            return p[which] * ((best - own[which]).exp() - 1) <= delta

        stands = replace_rows(stands, ~stands, within_delta)
        uncertain = stands & (p * (k + 1) <= 1)
    else:
        # The two alone have at most 1 between them, which often decides without a normaliser.
        best = logits[rows, batch.greedy_token_ids[rows].clamp(min=0)]
        ratio = (own - best).exp()
        stands = 1 - ratio <= delta * (1 + ratio)

        def within_delta(which: Tensor) -> Tensor:
            p = (best[which] - batch.target_log_normaliser_at(rows[which])).exp()
            return p * (1 - ratio[which]) <= delta

        uncertain = stands = replace_rows(stands, ~stands, within_delta)
    return replace_rows(
        stands, uncertain, lambda which: count_above(logits, rows[which], own[which]) < k
    )
