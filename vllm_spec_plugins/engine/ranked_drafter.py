"""vLLM's own model drafters with an output head of ours.

The drafter keeps running its model and its cache. What it does with the hidden states is
replaced on the instance: only the rows of the draft vocabulary are computed, tokens are drawn
with our keyed random numbers (so drafts follow the seeds of requests), and the law they were
drawn from stays compact until it is verified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

from vllm_spec_plugins.config import DRAFT_VOCABULARY, PluginSettings
from vllm_spec_plugins.draft_head import DraftHead
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.draft_sampling import Draws, draw, token_ids_of
from vllm_spec_plugins.errors import ConfigError, listed
from vllm_spec_plugins.random_numbers import Purpose, uniforms
from vllm_spec_plugins.registry import Kind

from .carrier import registry
from .draft_head_support import wants_draft_head
from .language_model_head import EngineHead

if TYPE_CHECKING:
    from vllm_spec_plugins.context import EngineContext
    from vllm_spec_plugins.target_model import LanguageModelHead

    from .requests import RequestStates

#: What a drafter must not have replaced: the loop over draft steps, and what we put in its place.
_LOOP = ("propose", "_sample_draft_tokens", "_greedy_sample")


class RankedDrafter:
    """One of vLLM's drafters, drafting through a head of ours from the time it is loaded.

    Args:
        runner: The model runner that has it.
        make_head: The head to draft through, from the drafter's own; None keeps that.
        requests: The requests of the runner.
        vocab_size: V of the target.

    Raises:
        ConfigError: The drafter has a draft loop of its own.
    """

    def __init__(
        self,
        runner: Any,
        make_head: Callable[[LanguageModelHead], DraftHead | None],
        requests: RequestStates,
        vocab_size: int,
    ) -> None:
        self._runner, self._drafter = runner, runner.drafter
        self._make_head, self._requests = make_head, requests
        self._vocab_size = vocab_size
        self._head: DraftHead | None = None
        drafter = type(self._drafter)
        own = [name for name in _LOOP if getattr(drafter, name, None) is not _base(name)]
        if own:
            raise ConfigError(
                f"vLLM's {drafter.__name__} chooses its draft tokens in a way of its own "
                f'({listed(own)}), so its head cannot be replaced. Remove "{DRAFT_VOCABULARY}".'
            )
        self._most_tokens: int = self._drafter.num_speculative_tokens
        # Without it draft tokens are chosen, not drawn.
        self._draws: bool = self._drafter._enable_probabilistic_draft_probs
        self._load_by_vllm: Callable[..., Any] = self._drafter.load_model
        self._drafter.load_model = self.load_model

        # The round at hand; what of it is verified in the next step stays until then.
        self._row_of: dict[str, int] = {}
        self._everyone = np.zeros(0, np.int64)
        #: `[R, K]`.
        #: How the tokens of the round are drawn; None: they are chosen.
        self._round: Draws | None = None
        self._index = 0
        self._vocabulary: Tensor | None = None

    @classmethod
    def of(
        cls, runner: Any, settings: PluginSettings, context: EngineContext, requests: RequestStates
    ) -> RankedDrafter | None:
        """The runner's drafter, if the settings want it to draft through a head of ours."""
        if not wants_draft_head(settings):
            return None
        if settings.proposer is not None:
            plugin, options = settings.proposer.build(Kind.PROPOSER, registry())
            make_head = plugin(options, context).draft_head
        else:
            vocabulary = settings.draft_vocabulary
            assert vocabulary is not None

            def make_head(head: LanguageModelHead) -> DraftHead:
                return DraftHead(head, vocabulary, context.device, context.max_num_requests)

        return cls(runner, make_head, requests, context.facts.vocab_size)

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        """Wraps the drafter's `load_model`. On every rank at the same time."""
        result = self._load_by_vllm(*args, **kwargs)
        drafter = self._drafter
        module = drafter.model.unwrap() if hasattr(drafter.model, "unwrap") else drafter.model
        own = EngineHead(module, drafter.hidden_size, drafter.dtype, drafter.device)
        if own.vocab_size != self._vocab_size:
            raise ConfigError(
                f"The drafter's output head has {own.vocab_size} tokens, the target "
                f'{self._vocab_size}: a vocabulary of its own. Remove "{DRAFT_VOCABULARY}".'
            )
        with torch.inference_mode():
            self._head = self._make_head(own)
        if self._head is not None:
            drafter._sample_draft_tokens = self.sample_draft_tokens
        return result

    def begin(self, sampled_token_ids: Tensor | list[list[int]]) -> None:
        """Before the drafter is asked for a round.

        Args:
            sampled_token_ids: `[R, K+1]` what the step emitted, -1 padded and not yet in the
                token history; or lists, which already are.
        """
        if self._head is None:
            return
        batch, device = self._runner.input_batch, self._runner.device
        names = list(batch.req_ids)
        requests, count = self._requests.batch(names), len(names)
        num_tokens = batch.num_tokens_no_spec[:count].astype(np.int64)
        self._row_of = {name: row for row, name in enumerate(names)}
        self._everyone = np.arange(count)
        self._head.begin(
            names,
            batch.token_ids_cpu,
            self._everyone,
            num_tokens,
            batch.num_prompt_tokens[:count].astype(np.int64),
        )
        self._index, self._vocabulary, self._round = 0, None, None
        if self._draws and requests.temperatures.any():
            streams = torch.from_numpy(requests.streams).to(device)
            positions = torch.from_numpy(num_tokens).to(device)
            if isinstance(sampled_token_ids, Tensor):
                positions = positions + (sampled_token_ids >= 0).sum(dim=1)
            # One call for the whole round: it is many small kernels.
            index = torch.arange(self._most_tokens, device=device)
            random = uniforms(streams.unsqueeze(1), positions.unsqueeze(1), index, Purpose.DRAFT)
            self._round = Draws.of(requests.temperatures, random)

    def sample_draft_tokens(
        self, hidden_states: Tensor, sampling_metadata: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Replaces the drafter's `_sample_draft_tokens`: `[R]` tokens and `[R, M]` their law."""
        del sampling_metadata
        assert self._head is not None
        logits, self._vocabulary = self._head.read(
            hidden_states, self._everyone, all_chosen=self._round is None
        )
        drawn = draw(logits, self._round, self._index)
        self._index += 1
        return token_ids_of(drawn.columns, self._vocabulary), drawn.probabilities

    def law(
        self, by_vllm: Tensor | None, num_draft: Sequence[int], request_ids: Sequence[str]
    ) -> DraftProbabilities | None:
        """The law of the step's draft tokens, `[N]` rows; None when all were choices.

        Args:
            by_vllm: `[N, M]` what vLLM kept of the last round; None also when a request drafts
                of an older one. A token whose law is lost is verified as a choice, which is
                exact.
            num_draft: `[R]` draft tokens scheduled.
            request_ids: `[R]`.
        """
        if by_vllm is None or self._round is None:
            return None
        rows = [self._row_of[name] for name, n in zip(request_ids, num_draft, strict=True) if n]
        each = [n for n in num_draft if n]
        index = torch.from_numpy(np.repeat(rows, each)).to(by_vllm.device)
        vocabulary = self._vocabulary
        if vocabulary is not None and vocabulary.ndim > 1:
            vocabulary = vocabulary[index]
        return DraftProbabilities(by_vllm, vocabulary, self._round.sampled[index])

    def finish(self, request_ids: Sequence[str]) -> None:
        """Forget requests that are gone."""
        if self._head is not None:
            self._head.finish(request_ids)


def _base(name: str) -> Any:
    return getattr(SpecDecodeBaseProposer, name)
