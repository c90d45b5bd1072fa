"""Our proposers and verifiers on model runner V1 (CPU, and GPU where V1 is chosen).

The adapter replaces what the runner looks up on itself: `drafter`, `propose_draft_token_ids`,
`rejection_sampler`, `sample_tokens`, `_update_states`. No class is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vllm_spec_plugins.hookspecs import logger
from vllm_spec_plugins.proposer import Needs
from vllm_spec_plugins.verifier import TokenHistory

from .adapter import RunnerAdapter
from .carrier import PluginSpeculativeConfig
from .ranked_drafter import RankedDrafter
from .target import Target
from .verified_step import StepTokens, VerifiedStep

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_spec_plugins.draft_probabilities import DraftProbabilities

    from .requests import RequestBatch


class V1Adapter(RunnerAdapter):
    """Everything between one V1 runner and our plugins."""

    def __init__(self, runner: Any, vllm_config: VllmConfig) -> None:
        super().__init__(runner, vllm_config)
        spec = vllm_config.speculative_config
        assert isinstance(spec, PluginSpeculativeConfig)
        logger.info("Model runner V1 serves the plugins; scheduling is synchronous.")
        self._state: Any = None
        self._propose_by_vllm: Callable[..., Any] = runner.propose_draft_token_ids
        self._sample_tokens_by_vllm: Callable[..., Any] = runner.sample_tokens
        self._update_states_by_vllm: Callable[..., Any] = runner._update_states
        runner.propose_draft_token_ids = self.propose_draft_token_ids
        runner.sample_tokens = self.sample_tokens
        runner._update_states = self.update_states
        self._ranked = RankedDrafter.of(runner, spec.settings, self.context, self.requests)
        if self.proposer is not None:
            runner.drafter = self
            if Needs.LAYER_STATES in self._needs:
                runner.use_aux_hidden_state_outputs = True
                runner._get_eagle3_aux_layers_from_config = lambda: self._layers
            # vLLM would draft zeros for the whole batch once one request comes near the model
            # length; we leave room per request instead.
            runner.effective_drafter_max_model_len = (
                self.context.facts.max_model_len + spec.num_speculative_tokens + 1
            )
        if self.verifiers:
            from .v1_verifier import VerifierBridge

            runner.rejection_sampler = VerifierBridge(
                self, self.verifiers, runner.sampler, spec, runner.device
            )

    # What the runner asks of its drafter.

    def load_model(self, target: Any, *args: Any, **kwargs: Any) -> None:
        """The target's weights are there."""
        del args, kwargs
        self.load(Target(target, self.runner, self.context.facts.num_speculative_tokens))

    def propose(self, *args: Any, **kwargs: Any) -> Any:
        """Reached only if the runner bypassed `propose_draft_token_ids`."""
        del args, kwargs
        raise RuntimeError("the runner bypassed the adapter: run `vllm-spec doctor`")

    # Request events.

    def update_states(self, scheduler_output: Any) -> Any:
        """Wraps `GPUModelRunner._update_states`, which every step passes, drafting or not."""
        self._clock.begin_step()
        self.requests_gone(
            list(scheduler_output.finished_req_ids), list(scheduler_output.preempted_req_ids or ())
        )
        for new in scheduler_output.scheduled_new_reqs:
            self.request_came(new.req_id, new.sampling_params, new.prompt_embeds is None)
        result = self._update_states_by_vllm(scheduler_output)
        if self.verifiers:
            # Our random numbers are keyed and vLLM's drafts ignore seeds, so nobody draws from
            # these; but vLLM winds them back after a part of a prompt, which a generator on the
            # CPU refuses: a seeded request with a long prompt would end the engine.
            self.runner.input_batch.generators.clear()
        return result

    def _forget(self, request_ids: Sequence[str]) -> None:
        super()._forget(request_ids)
        if self._ranked is not None:
            self._ranked.finish(request_ids)

    # Verification: what the bridge asks for.

    def requests_of_step(self, count: int) -> RequestBatch:
        """The `count` requests of the step, in row order; warm-up rows belong to nobody."""
        ids = self.runner.input_batch.req_ids[:count]
        return self.requests.batch(ids + [""] * (count - len(ids)))

    def first_draft_positions(self, count: int) -> Tensor:
        """`[R]` sequence position of the first draft token (or of the token to draw).

        The bookkeeping of the step has not run yet, so it is the number of known tokens.
        """
        known = self.runner.input_batch.num_tokens_no_spec[:count].astype(np.int64)
        return torch.from_numpy(known).to(self.runner.device)

    def token_history(self, requests: RequestBatch) -> TokenHistory | None:
        """What the requests of the step have said; None in warm-up, whose rows are nobody's."""
        batch, count = self.runner.input_batch, len(requests.request_ids)
        if len(batch.req_ids) < count:
            return None
        num_tokens = batch.num_tokens_no_spec[:count].astype(np.int64)
        if requests.lacks_history is not None:
            num_tokens[requests.lacks_history] = 0
        return TokenHistory(
            batch.token_ids_cpu,
            np.arange(count),
            num_tokens,
            batch.num_prompt_tokens[:count].astype(np.int64),
        )

    def draft_hidden_states(self, metadata: Any) -> Tensor | None:
        """`[N, H]` the target's final hidden state at each draft token."""
        if self._state is None:
            return None
        return self._state.sample_hidden_states[metadata.target_logits_indices.long() + 1]

    def draft_probabilities(
        self,
        by_vllm: Tensor | None,
        num_draft: Sequence[int],
        request_ids: Sequence[str],
        device: torch.device,
    ) -> DraftProbabilities | None:
        """The law of the step's draft tokens, `[N]` rows; None when all were choices.

        Args:
            by_vllm: `[N, V]` law vLLM's own proposer kept, or None.
            num_draft: `[R]` draft tokens scheduled; may be fewer than were drafted.
            request_ids: `[R]`.
            device: Where the target runs.
        """
        if self.proposer is not None:
            return self.law_of_our_drafts(num_draft, request_ids, device)
        if self._ranked is not None:
            return self._ranked.law(by_vllm, num_draft, request_ids)
        if by_vllm is None:
            return None
        return self.law_of_dense_drafts(by_vllm, num_draft, request_ids)

    # The step.

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Wraps `GPUModelRunner.sample_tokens`: verification, bookkeeping, drafting."""
        # The runner clears its state before it samples; verifiers read hidden states from it.
        self._state = state = self.runner.execute_model_state
        try:
            output = self._sample_tokens_by_vllm(grammar_output)
        finally:
            self._state = None
        if state is not None:
            self._finish_step(state, output)
        self._verification = self._verified = None
        self._clock.end_step()
        return output

    def _finish_step(self, state: Any, output: Any) -> None:
        scheduled, metadata = state.scheduler_output, state.spec_decode_metadata
        ids = self.runner.input_batch.req_ids
        # Without any draft there is no metadata.
        num_draft = metadata.num_draft_tokens if metadata else [0] * len(ids)
        if self.proposer is None and metadata:
            # vLLM's own methods may draft before the step's tokens are known to the host, or
            # not be asked at all.
            self.record(ids, output.sampled_token_ids, num_draft)
        self.observe_step_time(num_draft, scheduled.total_num_scheduled_tokens)

    def propose_draft_token_ids(
        self,
        scheduler_output: Any,
        sampled_token_ids: Any,
        sampling_metadata: Any,
        hidden_states: Tensor,
        sample_hidden_states: Tensor,
        aux_hidden_states: list[Tensor] | None,
        spec_decode_metadata: Any,
        common_attn_metadata: Any,
        slot_mappings: Any,
    ) -> Any:
        """Wraps `GPUModelRunner.propose_draft_token_ids`; returns lists, empty = no draft."""
        if self.proposer is None:
            if self._ranked is not None:
                self._ranked.begin(sampled_token_ids)
            drafts = self._propose_by_vllm(
                scheduler_output,
                sampled_token_ids,
                sampling_metadata,
                hidden_states,
                sample_hidden_states,
                aux_hidden_states,
                spec_decode_metadata,
                common_attn_metadata,
                slot_mappings,
            )
            return self._limit_vllm_drafts(drafts)
        batch = self.runner.input_batch
        count = len(sampled_token_ids)
        step = VerifiedStep(
            request_ids=batch.req_ids,
            emitted=sampled_token_ids,
            num_draft=spec_decode_metadata.num_draft_tokens if spec_decode_metadata else [],
            history=TokenHistory(
                batch.token_ids_cpu,
                np.arange(count),
                batch.num_tokens_no_spec[:count].astype(np.int64),
                batch.num_prompt_tokens[:count].astype(np.int64),
            ),
            sample_hidden_states=sample_hidden_states,
        )
        # Before the next draft replaces the one that was verified.
        self.record(step.request_ids, step.emitted, step.num_draft)
        if aux_hidden_states and self._layers:
            with self._clock.following():
                self.show_states(step, self._step_tokens(scheduler_output), aux_hidden_states)
        with self._clock.drafting():
            table, counts = self.draft(step, scheduler_output.num_spec_tokens_to_schedule)
        return [row[:n] for row, n in zip(table.tolist(), counts.tolist(), strict=True)]

    def _step_tokens(self, scheduler_output: Any) -> StepTokens:
        """What the step computed on."""
        runner = self.runner
        scheduled = np.array(
            [scheduler_output.num_scheduled_tokens[name] for name in runner.input_batch.req_ids],
            dtype=np.int64,
        )
        count = int(scheduled.sum())
        return StepTokens(scheduled, runner.input_ids.gpu, runner._get_positions(count))

    def _limit_vllm_drafts(self, drafts: Any) -> Any:
        """Per-request choices on drafts of vLLM's own methods, decided before they were drawn."""
        ids = self.runner.input_batch.req_ids
        limits = self.requests.batch(ids).draft_limits
        if not len(limits) or limits.min() >= self.context.facts.num_speculative_tokens:
            return drafts
        if isinstance(drafts, Tensor):
            drafts = drafts.tolist()
        return [draft[:limit] for draft, limit in zip(drafts, limits.tolist(), strict=True)]
