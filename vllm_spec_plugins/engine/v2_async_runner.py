"""Our plugins on model runner V2 under asynchronous scheduling: nothing waits for the device.

The next step is planned, and its inputs are queued, before this one has run. So every request is
scheduled with `num_speculative_tokens` draft tokens. Those that nobody drafted are 0 for the
target, which must embed something, and -1 for the verification, which never accepts them; how
many count is known to the device alone. Observers and metrics hear of a step when vLLM itself
takes its tokens to the host (`AsyncOutput.get_output`), in whichever thread does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vllm_spec_plugins.device_drafting import DeviceDraft, DeviceDraftInput, DeviceStepStates
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.errors import PluginError
from vllm_spec_plugins.hookspecs import StepRecord, logger
from vllm_spec_plugins.target_rows import DeviceTargetRows
from vllm_spec_plugins.transfers import to_device, to_host_later

from .adapter import MAX_FAILURES
from .v2_runner import V2Adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from vllm.config import VllmConfig

    from vllm_spec_plugins.verifier import Verification, VerifyInput

    from .requests import RequestBatch
    from .verified_step import DraftRows


@dataclass(frozen=True, slots=True)
class _Constants:
    """What does not change over the lives of the R requests of a step, on the device.

    Attributes:
        limits: `[R]` int64 most draft tokens of each; 0 where its text cannot be read.
        max_tokens: `[R]` int64.
        temperatures: `[R]` float32.
        streams: `[R]` int64.
    """

    limits: Tensor
    max_tokens: Tensor
    temperatures: Tensor
    streams: Tensor


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What is told of a step once its tokens are on the host.

    Attributes:
        request_ids: `[R]`.
        verifiers: `[R]` names.
        num_draft: `[R]` draft tokens that counted, on their way to the host.
        extra_acceptance: `[R]` price of the step, on its way to the host; None = nothing.
    """

    request_ids: Sequence[str]
    verifiers: Sequence[str]
    num_draft: Tensor
    extra_acceptance: Tensor | None


class V2AsyncAdapter(V2Adapter):
    """Everything between one V2 runner and plugins that stay on the device."""

    keeps_texts_on_device = True

    def __init__(self, runner: Any, vllm_config: VllmConfig) -> None:
        super().__init__(runner, vllm_config)
        slots, device = self.context.max_num_requests, self.context.device
        #: `[S]` draft tokens of each slot that count, of those it is scheduled with.
        self._num_valid = torch.zeros(slots, dtype=torch.int64, device=device)
        #: `[S]` row of each slot in the last draft; -1 = none.
        self._row_of_slot = torch.full((slots,), -1, dtype=torch.int64, device=device)
        self._law: DraftProbabilities | None = None
        #: Slots whose requests our proposer has not seen yet.
        self._fresh: set[int] = set()
        self._constants: tuple[RequestBatch, _Constants] | None = None
        #: Of each chunk of the step at hand: draft tokens that counted, price.
        self._chunks: list[tuple[Tensor, Tensor | None]] = []
        self._outcome: _Outcome | None = None

    def _announce(self) -> None:
        logger.info(
            "Model runner V2 serves the plugins, under asynchronous scheduling: neither drafting "
            "nor verifying waits for the host; drafting of plugins runs outside CUDA graphs."
        )

    # Request events.

    def _enter(self, slot: int, new: Any) -> None:
        self._fresh.add(slot)
        # vLLM's own method drafts for all alike; ours says after each draft what counts.
        self._num_valid[slot] = self.requests[new.req_id].draft_limit

    # Verification.

    def invalid_drafts(self, input_batch: Any, by_vllm: Tensor | None) -> Tensor | None:
        count = self._num_valid[input_batch.expanded_idx_mapping]
        ours = input_batch.expanded_local_pos > count
        return ours if by_vllm is None else ours | by_vllm

    def token_history(self, begin: int, end: int, requests: RequestBatch) -> None:
        """The host does not know yet."""
        del begin, end, requests

    def draft_probabilities(
        self, by_vllm: Tensor | None, drafts: DraftRows
    ) -> DraftProbabilities | None:
        if self.proposer is None:
            return super().draft_probabilities(by_vllm, drafts)
        if (kept := self._law) is None:
            return None
        row = self._row_of_slot[drafts.slots]
        index = row.clamp(min=0), drafts.columns.long().clamp(max=kept.values.shape[1] - 1)
        # What was drafted before the last draft is verified as a choice, which is exact.
        sampled = row >= 0
        if kept.sampled is not None:
            sampled &= kept.sampled[index]
        vocabulary = kept.vocabulary
        if vocabulary is not None and vocabulary.ndim > 1:
            vocabulary = vocabulary[index]
        return DraftProbabilities(kept.values[index], vocabulary, sampled)

    def chunk_verified(self, batch: VerifyInput, verification: Verification) -> None:
        none = torch.zeros_like(batch.num_draft)
        counted = none.index_add(0, batch.request_of, (batch.draft_token_ids >= 0).long())
        price = verification.extra_acceptance
        if price is not None:
            price = none.double().index_add_(0, batch.request_of, price.double())
        self._chunks.append((counted, price))

    # The step.

    def sample(self, hidden_states: Tensor, input_batch: Any, grammar_output: Any) -> Any:
        sampled = super().sample(hidden_states, input_batch, grammar_output)
        if self._chunks and self._serves and self._is_first_rank:
            # Queued before vLLM's copy of the tokens, and so done when that is.
            counts, prices = zip(*self._chunks, strict=True)
            known = [price for price in prices if price is not None]
            self._outcome = _Outcome(
                input_batch.req_ids,
                self.requests.batch(input_batch.req_ids).verifiers,
                to_host_later(torch.cat(counts)),
                to_host_later(torch.cat(known)) if len(known) == len(prices) else None,
            )
        self._chunks = []
        return sampled

    def sample_tokens(self, grammar_output: Any) -> Any:
        try:
            output = self._sample_tokens_by_vllm(grammar_output)
            if (outcome := self._outcome) is not None:
                output.get_output = partial(self._tell_outcome, output.get_output, outcome)
        finally:
            self._input_batch = self._sampler_output = self._hidden_states = None
            self._outcome = None
        self._verification = self._verified = None
        return output

    def propose(
        self,
        drafts: Tensor,
        hidden_states: Tensor,
        layer_states: list[Tensor] | None,
        limit: int,
    ) -> None:
        del hidden_states
        if not self._serves:
            return
        if layer_states and self._layers:
            self._show_states_on_device(layer_states)
        slots = self._input_batch.idx_mapping
        asked = self._ask(self._device_draft_input(limit))
        if asked is None:
            self._law = None
            self._num_valid.index_fill_(0, slots, 0)
            return
        draft, counts = asked
        width = min(draft.token_ids.shape[1], drafts.shape[1])
        ids = draft.token_ids[:, :width]
        counts = counts.clamp(max=width)
        column = torch.arange(width, device=ids.device)
        drafts[:, :width] = torch.where(column < counts.unsqueeze(1), ids, 0)
        self._num_valid.index_copy_(0, slots, counts)
        self._law = draft.probabilities
        self._row_of_slot.fill_(-1)
        self._row_of_slot.index_copy_(0, slots, torch.arange(len(slots), device=ids.device))

    def take_draft_token_ids(self) -> Any:
        """How many count is known to the device alone: all are scheduled."""
        return self._take_drafts_by_vllm()

    def _show_states_on_device(self, layer_states: list[Tensor]) -> None:
        """Show our proposer what the step computed; see `show_states`."""
        assert self.proposer is not None
        if self._failures >= MAX_FAILURES:
            return
        batch = self._input_batch
        count = int(batch.num_scheduled_tokens.sum())
        states = DeviceStepStates(
            rows=batch.idx_mapping_np.astype(np.int64),
            most_tokens=self._most_tokens(),
            num_scheduled=batch.num_scheduled_tokens.astype(np.int64),
            token_ids=batch.input_ids[:count].long(),
            positions=batch.positions[:count].long(),
            layer_states={
                layer: state[:count]
                for layer, state in zip(self._layers, layer_states, strict=True)
            },
        )
        try:
            self.proposer.follow_on_device(states)
        except Exception:  # noqa: BLE001 - third-party code may raise anything
            self._failed()

    def _most_tokens(self) -> NDArray[np.int64]:
        """`[R]` not less than the tokens of each request of the step."""
        batch = self._input_batch
        bound = batch.seq_lens_cpu_upper_bound.numpy()[: batch.num_reqs].astype(np.int64)
        # All drafts accepted, and one token more; a prompt is there from the start.
        return np.maximum(bound + 1, batch.prefill_len_np)

    def _device_draft_input(self, limit: int) -> DeviceDraftInput:
        """What our proposer is asked with, for all requests of the step."""
        batch, states = self._input_batch, self.runner.req_states
        facts, slots = self.context.facts, batch.idx_mapping
        requests = self.requests.batch(batch.req_ids)
        constants = self._constants_of(requests)
        num_tokens = states.total_len.gpu[slots].long()
        num_prompt = states.prompt_len.gpu[slots].long()
        # Every step emits one token beyond the accepted drafts, and all must fit.
        max_draft = torch.minimum(
            constants.limits.clamp(max=limit), constants.max_tokens + (num_prompt - num_tokens) - 1
        )
        max_draft = torch.minimum(max_draft, facts.max_model_len - 1 - num_tokens).clamp_(min=0)
        max_draft.masked_fill_(self._sampler_output.num_sampled == 0, 0)
        fresh = np.isin(batch.idx_mapping_np, list(self._fresh))
        return DeviceDraftInput(
            token_ids=states.all_token_ids.gpu,
            slots=slots,
            fresh=to_device(fresh, slots.device),
            num_tokens=num_tokens,
            num_prompt_tokens=num_prompt,
            max_draft=max_draft,
            temperatures=constants.temperatures,
            streams=constants.streams,
            num_speculative_tokens=facts.num_speculative_tokens,
            rows=batch.idx_mapping_np.astype(np.int64),
            is_fresh=fresh,
            most_tokens=self._most_tokens(),
            temperatures_on_host=requests.temperatures,
            target_rows=self._device_target_rows(),
        )

    def _device_target_rows(self) -> DeviceTargetRows | None:
        """What the step's verification computed past the token it ended with."""
        verified = self._verified
        if verified is None or self._verification is None:
            return None
        none = torch.zeros_like(verified.num_draft)
        drafted = (verified.draft_token_ids >= 0).long()
        return DeviceTargetRows.after(
            verified.target_logits,
            verified.bonus_logits,
            verified.num_draft,
            none.index_add(0, verified.request_of, drafted),
            self._verification.accepted.long(),
        )

    def _constants_of(self, requests: RequestBatch) -> _Constants:
        """A decoding batch is the same for many steps."""
        if self._constants is None or self._constants[0] is not requests:
            limits, device = requests.draft_limits, self.context.device
            if requests.lacks_history is not None:
                limits = np.where(requests.lacks_history, 0, limits)
            arrays = limits, requests.max_tokens, requests.temperatures, requests.streams
            self._constants = requests, _Constants(*(to_device(a, device) for a in arrays))
        return self._constants[1]

    def _ask(self, batch: DeviceDraftInput) -> tuple[DeviceDraft, Tensor] | None:
        """A draft, and `[R]` how many tokens of each request count."""
        assert self.proposer is not None
        if self._failures >= MAX_FAILURES:
            return None
        try:
            draft = self.proposer.propose_on_device(batch)
            ids = draft.token_ids
            if (
                ids.ndim != 2
                or ids.shape[0] != len(batch.slots)
                or ids.device != batch.slots.device
            ):
                raise PluginError(
                    f'"{self.proposer_name}" returned token_ids of shape {tuple(ids.shape)} on '
                    f"{ids.device}; expected ({len(batch.slots)}, K) on {batch.slots.device}."
                )
        except Exception:  # noqa: BLE001 - third-party code may raise anything
            self._failed()
            # What it keeps may be of the middle of this draft.
            self._fresh.update(self._input_batch.idx_mapping_np.tolist())
            return None
        self._failures = 0
        self._fresh.difference_update(self._input_batch.idx_mapping_np.tolist())
        # Nobody looks at a tensor's values here: what is no token ends the draft.
        is_token = (ids >= 0) & (ids < self.context.facts.vocab_size)
        return draft, torch.minimum(is_token.long().cumprod(dim=1).sum(dim=1), batch.max_draft)

    def _tell_outcome(self, get_output: Callable[[], Any], outcome: _Outcome) -> Any:
        """Wraps `AsyncOutput.get_output`, which waits until a step's tokens are on the host."""
        output = get_output()
        emitted: list[list[int]] = output.sampled_token_ids
        # A request may have ended in the step before, which the plan of this one did not know.
        rows = [
            row
            for row, name in enumerate(outcome.request_ids)
            if emitted[row] and name in self.requests
        ]
        if rows:
            prices = outcome.extra_acceptance
            num_draft = outcome.num_draft.numpy().tolist()
            self._tell(
                "spec_step_finished",
                step=StepRecord(
                    proposer=self.proposer_name,
                    request_ids=[outcome.request_ids[row] for row in rows],
                    verifiers=[outcome.verifiers[row] for row in rows],
                    num_draft=[num_draft[row] for row in rows],
                    num_accepted=[len(emitted[row]) - 1 for row in rows],
                    token_ids=[list(emitted[row]) for row in rows],
                    sources=(self.proposer_name,),
                    source_of=None,
                    extra_acceptance=None if prices is None else prices.numpy()[rows].tolist(),
                ),
            )
        return output
