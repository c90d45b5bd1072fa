"""A proposer that never looks at a tensor's values: it can draft before the host knows them."""

from __future__ import annotations

import torch
from pydantic import Field

from vllm_spec_plugins import (
    DeviceDraft,
    DeviceDraftInput,
    Draft,
    DraftInput,
    DraftProbabilities,
    EngineContext,
    Proposer,
    ProposerOptions,
    Purpose,
    uniforms,
)


class OnDeviceOptions(ProposerOptions):
    """Options of `OnDevice`."""

    draws: bool = Field(
        False,
        description="Draw from how often each token stands in the text, a number of tokens that "
        "differs from step to step; else continue as after the last token's last occurrence.",
    )
    looks: bool = Field(False, description="Look at a tensor's values, as nobody should.")


class OnDevice(Proposer):
    """Bigrams of the text, or draws from its tokens."""

    Options = OnDeviceOptions
    options: OnDeviceOptions

    def __init__(self, options: OnDeviceOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        #: Steps each slot's request was in, since it came.
        self.steps = torch.zeros(context.max_num_requests, dtype=torch.int64, device=context.device)

    @classmethod
    def drafts_on_device(cls, options: ProposerOptions) -> bool:
        del options
        return True

    @classmethod
    def drafts_on_host(cls, options: ProposerOptions) -> bool:
        del options
        return False

    def propose(self, batch: DraftInput) -> Draft:
        raise AssertionError("asked for a draft on the host")

    def propose_on_device(self, batch: DeviceDraftInput) -> DeviceDraft:
        steps = self.steps[batch.slots].masked_fill(batch.fresh, 0)
        self.steps.index_copy_(0, batch.slots, steps + 1)
        if self.options.looks:
            batch.num_tokens.tolist()
        return self.drawn(batch) if self.options.draws else self.bigrams(batch)

    def bigrams(self, batch: DeviceDraftInput) -> DeviceDraft:
        texts, length = self.texts(batch)
        last = texts.gather(1, length - 1)
        column = torch.arange(texts.shape[1], device=texts.device)
        # Where the last token stood before, the latest place last.
        found = torch.where((texts == last) & (column < length - 1), column, -1).amax(dim=1)
        ahead = torch.arange(1, batch.num_speculative_tokens + 1, device=texts.device)
        place = found.unsqueeze(1) + ahead  # [R, K]
        drafted = texts.gather(1, place.clamp(max=texts.shape[1] - 1))
        wanted = torch.where(found >= 0, batch.max_draft, 0).unsqueeze(1)
        keep = (place < length) & (ahead <= wanted)
        return DeviceDraft(torch.where(keep, drafted, -1))

    def drawn(self, batch: DeviceDraftInput) -> DeviceDraft:
        texts, length = self.texts(batch)
        column = torch.arange(texts.shape[1], device=texts.device)
        counts = torch.full(
            (len(texts), self.context.facts.vocab_size), 0.1, device=texts.device
        ).scatter_add_(1, texts, (column < length).float())
        law = counts / counts.sum(dim=1, keepdim=True)  # [R, V]
        width = batch.num_speculative_tokens
        u = uniforms(
            batch.streams.unsqueeze(1),
            batch.num_tokens.unsqueeze(1),
            torch.arange(width, device=texts.device),
            Purpose.DRAFT,
        )
        tokens = torch.searchsorted(law.cumsum(1), u.float()).clamp(max=law.shape[1] - 1)
        wanted = torch.minimum(batch.num_tokens % (width + 1), batch.max_draft)
        beyond = torch.arange(width, device=texts.device) >= wanted.unsqueeze(1)
        tokens = tokens.masked_fill(beyond, -1)
        law = law.unsqueeze(1).expand(-1, width, -1)
        sampled = (batch.temperatures > 0).unsqueeze(1).expand(-1, width)
        return DeviceDraft(tokens, DraftProbabilities(law, None, sampled))

    def texts(self, batch: DeviceDraftInput) -> tuple[torch.Tensor, torch.Tensor]:
        """`[R, L]` texts, stale where they have not come to, and `[R, 1]` their lengths."""
        texts = batch.token_ids[batch.slots].long().clamp(0, self.context.facts.vocab_size - 1)
        return texts, batch.num_tokens.unsqueeze(1)
