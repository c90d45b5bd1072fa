"""`frequency_vocab`: a draft model that chooses among the frequent tokens only.

A small draft model spends much of its time in its output head. Most of its rows are for tokens
that are hardly ever written: FR-Spec (Zhao et al. 2502.14856) and VocabTrim (Goel et al.
2506.22694) keep the frequent ones. Verification is untouched and exact: a token outside has
draft probability 0 and keeps all of its probability under the target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from vllm_spec_plugins.draft_vocabulary import DraftVocabularyOptions, check
from vllm_spec_plugins.engine_proposer import EngineProposer
from vllm_spec_plugins.proposer import ProposerOptions

if TYPE_CHECKING:
    from vllm_spec_plugins.context import ModelFacts
    from vllm_spec_plugins.draft_head import DraftHead
    from vllm_spec_plugins.target_model import LanguageModelHead


class FrequencyVocabOptions(ProposerOptions):
    draft_vocabulary: DraftVocabularyOptions = Field(
        description="Ranked vocabulary from `vllm-spec calibrate vocab`: a file, or "
        '{"file", "size", "dynamic_tokens"}.'
    )


class FrequencyVocab(EngineProposer):
    """vLLM's draft_model with an output head over the frequent tokens only."""

    Options = FrequencyVocabOptions
    options: FrequencyVocabOptions
    engine_method = "draft_model"

    @classmethod
    def check(cls, options: ProposerOptions, facts: ModelFacts) -> None:
        assert isinstance(options, FrequencyVocabOptions)
        check(options.draft_vocabulary, facts)

    def draft_head(self, head: LanguageModelHead) -> DraftHead:
        from vllm_spec_plugins.draft_head import DraftHead

        context = self.context
        return DraftHead(
            head, self.options.draft_vocabulary, context.device, context.max_num_requests
        )
