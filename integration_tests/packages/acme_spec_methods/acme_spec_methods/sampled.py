"""Proposers that draw their drafts from a law, and report it: rightly and wrongly."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from vllm_spec_plugins import (
    Draft,
    DraftInput,
    DraftProbabilities,
    EngineContext,
    Proposer,
    ProposerOptions,
    Purpose,
    uniforms,
)


class SampledOptions(ProposerOptions):
    """Options of `Sampled`."""

    vocabulary: Literal["whole", "compact"] = Field(
        "whole", description="Draw from all tokens, or from those with an even id."
    )


class Sampled(Proposer):
    """Draw from how often each token stands in the request so far, mixed with the uniform law."""

    Options = SampledOptions

    def __init__(self, options: SampledOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        size = context.facts.vocab_size
        self.token_ids = np.arange(0, size, 2 if options.vocabulary == "compact" else 1)
        self.is_whole = options.vocabulary == "whole"

    def propose(self, batch: DraftInput) -> Draft:
        width = int(batch.max_draft.max())
        law = torch.from_numpy(self.law(batch))  # [R, M]
        u = uniforms(
            torch.from_numpy(batch.streams).unsqueeze(1),
            torch.from_numpy(batch.num_tokens).unsqueeze(1),
            torch.arange(width),
            Purpose.DRAFT,
        )
        column = torch.searchsorted(law.cumsum(1), u).clamp(max=law.shape[1] - 1)
        drawn = self.token_ids[column.numpy()]
        drawn[np.arange(width) >= batch.max_draft[:, None]] = -1
        law = law.unsqueeze(1).expand(-1, width, -1).to(self.context.device, torch.float32)
        return Draft(drawn, self.reported(law))

    def law(self, batch: DraftInput) -> np.ndarray:
        """`[R, M]` float64."""
        rows = [
            np.bincount(batch.token_history[row, :length], minlength=self.context.facts.vocab_size)
            for row, length in zip(batch.rows, batch.num_tokens)
        ]
        counts = np.stack(rows)[:, self.token_ids] + 0.1
        return counts / counts.sum(axis=1, keepdims=True)

    def reported(self, law: torch.Tensor) -> DraftProbabilities:
        vocabulary = None
        if not self.is_whole:
            vocabulary = torch.from_numpy(self.token_ids).to(self.context.device)
        return DraftProbabilities(law, vocabulary)


class WrongLaw(Sampled):
    """Negative control: draws like `Sampled` and says that it drew uniformly."""

    def reported(self, law: torch.Tensor) -> DraftProbabilities:
        return super().reported(torch.full_like(law, 1 / law.shape[-1]))
