"""Our proposers and verifiers on model runner V2 (GPU; on a CPU in Triton's interpreter).

V2 keeps tokens, lengths and drafts on the device, a row for each request slot. Most of our
contracts speak of the host: so once each step, after its verification, what was emitted is copied
to the host, which waits for the device. The step after is planned with what each request drafted,
as on V1: scheduling is synchronous, and drafts differ in length from request to request. Where
nothing needs the host, `v2_async_runner` takes the place of this.

The adapter replaces what the runner looks up on itself: `load_model`, `finish_requests`,
`add_requests`, `sample`, `sample_tokens`, `take_draft_token_ids`, `rejection_sampler`. No class
is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vllm_spec_plugins.hookspecs import logger
from vllm_spec_plugins.proposer import Needs
from vllm_spec_plugins.verifier import TokenHistory

from .adapter import RunnerAdapter
from .carrier import PluginSpeculativeConfig
from .host_history import HostHistory
from .v2_target import V2Target
from .verified_step import DraftRows, StepTokens, VerifiedStep

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_spec_plugins.draft_probabilities import DraftProbabilities
    from vllm_spec_plugins.verifier import Verification, VerifyInput

    from .requests import RequestBatch


class V2Adapter(RunnerAdapter):
    """Everything between one V2 runner and our plugins."""

    def __init__(self, runner: Any, vllm_config: VllmConfig) -> None:
        super().__init__(runner, vllm_config)
        spec = vllm_config.speculative_config
        assert isinstance(spec, PluginSpeculativeConfig)
        self._spec = spec
        most = self.context.facts.max_model_len + spec.num_speculative_tokens + 1
        self.history = HostHistory(self.context.max_num_requests, most)
        #: Requests that were preempted and may come back as if they were new.
        self._preempted: set[str] = set()
        #: Draft tokens of each request of the last step.
        self._num_drafted: dict[str, int] = {}
        #: On a GPU vLLM warms its kernels up with steps like any, before proposers are warm.
        self._serves = False
        # The step at hand.
        self._hidden_states: Tensor | None = None
        self._input_batch: Any = None
        self._sampler_output: Any = None

        self._load_model_by_vllm: Callable[..., None] = runner.load_model
        self._finish_requests_by_vllm: Callable[..., None] = runner.finish_requests
        self._add_requests_by_vllm: Callable[..., None] = runner.add_requests
        self._sample_by_vllm: Callable[..., Any] = runner.sample
        self._sample_tokens_by_vllm: Callable[..., Any] = runner.sample_tokens
        self._take_drafts_by_vllm: Callable[..., Any] = runner.take_draft_token_ids
        runner.load_model = self.load_model
        runner.finish_requests = self.finish_requests
        runner.add_requests = self.add_requests
        runner.sample = self.sample
        runner.sample_tokens = self.sample_tokens
        runner.take_draft_token_ids = self.take_draft_token_ids
        if self.proposer is not None:
            runner.speculator.adapter = self

        self._announce()

    def _announce(self) -> None:
        """What an operator should know."""
        logger.info(
            "Model runner V2 serves the plugins. Each step's tokens are brought to the host, where "
            "proposers and observers read them, so scheduling is synchronous; drafting runs "
            "outside CUDA graphs."
        )

    # Before the first request.

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Wraps `GPUModelRunner.load_model`, which builds the sampler too."""
        runner = self.runner
        self._load_model_by_vllm(*args, **kwargs)
        if self.proposer is not None:
            most = self.context.facts.num_speculative_tokens
            history = None if self.keeps_texts_on_device else self.history
            self.load(V2Target(runner.model, runner, most, history))
            if self._layers:
                # Nothing has run or is compiled yet.
                runner.model.set_aux_hidden_state_layers(self._layers)
                runner.use_aux_hidden_state_outputs = True
        if self.verifiers:
            from .v2_verifier import VerifierBridge

            runner.rejection_sampler = VerifierBridge(
                self, self.verifiers, runner.sampler, self._spec, runner.device
            )

    def warm_up(self) -> None:
        super().warm_up()
        self._serves = True

    # Request events.

    def finish_requests(self, scheduler_output: Any) -> None:
        """Wraps `GPUModelRunner.finish_requests`, which every step passes first."""
        self._clock.begin_step()
        finished = list(scheduler_output.finished_req_ids)
        preempted = list(scheduler_output.preempted_req_ids or ())
        self.requests_gone(finished, preempted)
        self._preempted.difference_update(finished)
        self._preempted.update(preempted)
        self._finish_requests_by_vllm(scheduler_output)

    def add_requests(self, scheduler_output: Any) -> None:
        """Wraps `GPUModelRunner.add_requests`; who was preempted comes back through it."""
        self._add_requests_by_vllm(scheduler_output)
        slot_of = self.runner.req_states.req_id_to_index
        for new in scheduler_output.scheduled_new_reqs:
            if new.req_id in self._preempted:
                self._preempted.discard(new.req_id)
            else:
                self.request_came(new.req_id, new.sampling_params, new.prompt_embeds is None)
            self._enter(slot_of[new.req_id], new)

    def _enter(self, slot: int, new: Any) -> None:
        """A request has entered a slot, for the first time or after a preemption."""
        self.history.begin(slot, new.prefill_token_ids, new.prompt_len)

    # Verification: what the bridge asks for.

    def requests_of_rows(self, begin: int, end: int) -> RequestBatch:
        """The requests of some rows of the step."""
        return self.requests.batch(self._input_batch.req_ids[begin:end])

    def invalid_drafts(self, input_batch: Any, by_vllm: Tensor | None) -> Tensor | None:
        """`[N + R]` bool, rows whose token was never drafted; None = there are none.

        Args:
            input_batch: The step.
            by_vllm: What vLLM says of drafts under a grammar.
        """
        del input_batch
        return by_vllm

    def chunk_verified(self, batch: VerifyInput, verification: Verification) -> None:
        """Some requests of the step are verified; in row order."""

    def token_history(self, begin: int, end: int, requests: RequestBatch) -> TokenHistory | None:
        """What the requests of some rows have said."""
        history = self.history.of(self._input_batch.idx_mapping_np[begin:end])
        if requests.lacks_history is not None:
            history.num_tokens[requests.lacks_history] = 0
        return history

    def draft_hidden_states(self, rows: Tensor) -> Tensor | None:
        """`[N, H]` the target's final hidden state at some rows of the step's logits."""
        if self._hidden_states is None:
            return None
        return self._hidden_states[self._input_batch.logits_indices[rows]]

    def draft_probabilities(
        self, by_vllm: Tensor | None, drafts: DraftRows
    ) -> DraftProbabilities | None:
        """The law of the step's draft tokens, `[N]` rows; None when all were choices.

        Args:
            by_vllm: `[N, V]` law of vLLM's own drafts, or None.
            drafts: Which they are.
        """
        if self.proposer is not None:
            device = self.runner.device
            return self.law_of_our_drafts(drafts.num_draft, drafts.request_ids, device)
        if by_vllm is None:
            return None
        return self.law_of_dense_drafts(by_vllm, drafts.num_draft, drafts.request_ids)

    @property
    def keeps_target_logits(self) -> bool:
        """Whether drafting reads the logits of the last verification."""
        return Needs.TARGET_LOGITS in self._needs

    # The step.

    def sample(self, hidden_states: Tensor, input_batch: Any, grammar_output: Any) -> Any:
        """Wraps `GPUModelRunner.sample`, which verifies."""
        self._hidden_states, self._input_batch = hidden_states, input_batch
        sampled = self._sample_by_vllm(hidden_states, input_batch, grammar_output)
        self._sampler_output = sampled[0]
        return sampled

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Wraps `GPUModelRunner.sample_tokens`: verification, bookkeeping, drafting."""
        try:
            output = self._sample_tokens_by_vllm(grammar_output)
            if self._sampler_output is not None and self._serves:
                # vLLM's own method has drafted, and asked us nothing.
                self._finish_step(self._emitted())
            if (batch := self._input_batch) is not None and self._serves:
                num_draft = _num_draft(batch) or [0] * batch.num_reqs
                self.observe_step_time(num_draft, batch.num_tokens)
        finally:
            self._input_batch = self._sampler_output = self._hidden_states = None
        self._verification = self._verified = None
        self._clock.end_step()
        return output

    def propose(
        self,
        drafts: Tensor,
        hidden_states: Tensor,
        layer_states: list[Tensor] | None,
        limit: int,
    ) -> None:
        """What the speculator is asked for.

        Args:
            drafts: `[R, K]` int64 zeros, where to write.
            hidden_states: `[T, H]` final hidden states of the step.
            layer_states: `[T, H]` for each layer asked for.
            limit: Most tokens to draft for any request.
        """
        if not self._serves:
            return
        batch, emitted = self._input_batch, self._emitted()
        no_states = torch.empty(0)
        wants_states = Needs.HIDDEN_STATES in self._needs
        step = VerifiedStep(
            request_ids=batch.req_ids,
            emitted=emitted,
            num_draft=_num_draft(batch),
            history=self._finish_step(emitted),
            sample_hidden_states=hidden_states[batch.logits_indices] if wants_states else no_states,
        )
        if layer_states and self._layers:
            tokens = StepTokens(
                batch.num_scheduled_tokens.astype(np.int64), batch.input_ids, batch.positions
            )
            with self._clock.following():
                self.show_states(step, tokens, layer_states)
        with self._clock.drafting():
            table, counts = self.draft(step, limit)
        self._num_drafted = dict(zip(batch.req_ids, counts.tolist(), strict=True))
        if counts.any():
            width = table.shape[1]
            table[np.arange(width) >= counts[:, None]] = 0
            drafts[:, :width] = torch.from_numpy(table).to(drafts.device)

    def take_draft_token_ids(self) -> Any:
        """Wraps `GPUModelRunner.take_draft_token_ids`: how many of each request are scheduled."""
        taken = self._take_drafts_by_vllm()
        if taken is None:
            return None
        ids = taken.req_ids
        if self.proposer is not None:
            limits = [self._num_drafted.get(request_id, 0) for request_id in ids]
        else:
            limits = self.requests.batch(ids).draft_limits.tolist()
        drafts = [draft[:n] for draft, n in zip(taken.draft_token_ids, limits, strict=True)]
        return type(taken)(ids, drafts)

    def _emitted(self) -> list[list[int]]:
        """`[R]` tokens of each request. Waits for the device: the one time of a step."""
        output = self._sampler_output
        counts = output.num_sampled.unsqueeze(1).to(output.sampled_token_ids.dtype)
        rows = torch.cat([counts, output.sampled_token_ids], dim=1).tolist()
        return [row[1 : 1 + row[0]] for row in rows]

    def _finish_step(self, emitted: list[list[int]]) -> TokenHistory:
        """What was emitted goes to the history, the length controller and the observers."""
        batch, num_draft = self._input_batch, _num_draft(self._input_batch)
        self._sampler_output = None
        self.history.append(batch.idx_mapping_np, emitted)
        self.record(batch.req_ids, emitted, num_draft)
        return self.history.of(batch.idx_mapping_np)


def _num_draft(input_batch: Any) -> list[int]:
    """`[R]` draft tokens verified in a step; empty where no request had any."""
    if input_batch.num_draft_tokens == 0:
        return []
    return (np.diff(input_batch.cu_num_logits_np) - 1).tolist()
