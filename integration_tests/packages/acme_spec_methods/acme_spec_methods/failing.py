"""A proposer that works for a while."""

from __future__ import annotations

from pydantic import Field

from vllm_spec_plugins import Draft, DraftInput, EngineContext, ProposerOptions

from .bigram import Bigram


class FailingOptions(ProposerOptions):
    """Options of `Failing`."""

    good_steps: int = Field(2, ge=0, description="Steps before it raises.")


class Failing(Bigram):
    """Drafts like `Bigram` for some steps, then raises in every step."""

    Options = FailingOptions

    def __init__(self, options: FailingOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        self.left = options.good_steps

    def propose(self, batch: DraftInput) -> Draft:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("acme_failing has run out of good steps")
        return super().propose(batch)
