"""Our verifiers in place of vLLM's rejection rule, inside vLLM's rejection sampler.

`RejectionSampler.forward` keeps running: it gathers the rows, applies penalties, bad words,
allowed tokens, minimum tokens and thinking budgets, and computes logprobs. Three things in it
are ours: the rule, the expansion of temperature, top-k and top-p to draft rows (wrong on CPU
in vLLM 0.32 and 0.33, vllm-project/vllm#55005), and the bonus row, which is not sampled
before anybody knows whether it is needed, and whose minimum of tokens counts the draft.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import MinTokensLogitsProcessor
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import RejectionSampler

from vllm_spec_plugins.verifier import Verifier, VerifyInput

from .verify_each import verify_each

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    from .v1_runner import V1Adapter


class BonusLogits(nn.Module):
    """Stands in for the sampler of bonus tokens: constrains their logits, draws nothing.

    `RejectionSampler.forward` calls it as it would call vLLM's sampler, and later uses its
    logprob helpers. The token it returns is a placeholder that our rule does not read.
    """

    def __init__(self, sampler: nn.Module) -> None:
        super().__init__()
        self.sampler: Any = sampler
        self.logprobs_mode = self.sampler.logprobs_mode
        self.compute_logprobs = self.sampler.compute_logprobs
        self.gather_logprobs = self.sampler.gather_logprobs
        #: `[R]` draft tokens of the step at hand.
        self.num_draft: Sequence[int] = ()
        #: Whether anybody asked; vLLM always asks for all logprobs here.
        self.wants_logprobs = False
        #: `[R, V]` of the step at hand.
        self.logits: Tensor = torch.empty(0)

    def forward(
        self,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool = False,
        logprobs_mode_override: str | None = None,
    ) -> SamplerOutput:
        mode = logprobs_mode_override or self.logprobs_mode
        constrained = logits.to(torch.float32)
        keeps_raw = self.wants_logprobs and mode == "raw_logits"
        raw = constrained.clone() if keeps_raw else constrained
        with min_tokens_after_drafts(sampling_metadata, self.num_draft):
            constrained = self.sampler.apply_logits_processors(
                constrained, sampling_metadata, predict_bonus_token
            )
        constrained = constrain(constrained, sampling_metadata, None)
        self.logits = constrained
        tensors = None
        if self.wants_logprobs:
            nothing = torch.empty(0)
            tensors = LogprobsTensors(nothing, raw if keeps_raw else constrained, nothing)
        return SamplerOutput(
            sampled_token_ids=torch.empty(
                (len(logits), 1), dtype=torch.int32, device=logits.device
            ),
            logprobs_tensors=tensors,
        )


@contextmanager
def min_tokens_after_drafts(
    sampling_metadata: SamplingMetadata, num_draft: Sequence[int]
) -> Iterator[None]:
    """Count draft tokens toward `min_tokens` where the bonus row is constrained.

    vLLM counts only verified tokens there, and so forbids a text to stop at a bonus token
    where it would have stopped without drafts.

    Args:
        sampling_metadata: Of the R requests.
        num_draft: `[R]` draft tokens before each bonus token.
    """
    processors = [
        processor
        for processor in sampling_metadata.logitsprocs.non_argmax_invariant
        if isinstance(processor, MinTokensLogitsProcessor) and processor.min_toks
    ]
    before = [(p.logits_slice, p.restore_logits_slice) for p in processors]
    for processor in processors:
        still_short = [
            row
            for row, (least, output, *_) in processor.min_toks.items()
            if len(output) + num_draft[row] < least
        ]

        def of_short(entries: tuple[Tensor, Tensor], rows: list[int]) -> tuple[Tensor, Tensor]:
            kept = torch.isin(entries[0], entries[0].new_tensor(rows))
            return entries[0][kept], entries[1][kept]

        processor.logits_slice = of_short(processor.logits_slice, still_short)
        processor.restore_logits_slice = of_short(processor.restore_logits_slice, still_short)
    try:
        yield
    finally:
        for processor, slices in zip(processors, before, strict=True):
            processor.logits_slice, processor.restore_logits_slice = slices


def constrain(
    logits: Tensor, sampling_metadata: SamplingMetadata, num_draft: Tensor | None
) -> Tensor:
    """Temperature, top-k and top-p of each request on its rows.

    Args:
        logits: `[rows, V]` float32, may be changed in place.
        sampling_metadata: Of the R requests.
        num_draft: `[R]` rows of each request; None = one each.

    Returns:
        `[rows, V]`; rows of greedy requests keep temperature 1.
    """
    if sampling_metadata.all_greedy:
        return logits

    def per_row(of_request: Tensor | None) -> Tensor | None:
        if of_request is None or num_draft is None:
            return of_request
        return of_request.repeat_interleave(num_draft, output_size=len(logits))

    temperature = per_row(sampling_metadata.temperature)
    assert temperature is not None
    if not sampling_metadata.all_random:
        temperature = torch.where(temperature == 0, torch.ones_like(temperature), temperature)
    logits.div_(temperature.unsqueeze(1))
    return apply_top_k_top_p(
        logits, per_row(sampling_metadata.top_k), per_row(sampling_metadata.top_p)
    )


class VerifierBridge(RejectionSampler):
    """vLLM's rejection sampler with our rule inside.

    Args:
        adapter: Knows the requests of the step and the draft's law.
        verifiers: By name; which one serves a request is the request's choice.
        sampler: vLLM's sampler.
        spec_config: vLLM's speculative config.
        device: Where the target runs.
    """

    adapter: V1Adapter

    def __init__(
        self,
        adapter: V1Adapter,
        verifiers: Mapping[str, Verifier],
        sampler: Any,
        spec_config: Any,
        device: torch.device,
    ) -> None:
        super().__init__(sampler, spec_config, device)
        self.sampler: Any = BonusLogits(sampler)
        # Not a submodule: the adapter holds the runner.
        self.__dict__["adapter"] = adapter
        self.verifiers = dict(verifiers)
        self._keeps_no_raw_logits = self.is_processed_logprobs_mode
        self.needs_hidden_states = any(v.needs_hidden_states for v in verifiers.values())
        self._metadata: Any = None
        self._num_draft: Tensor = torch.empty(0)
        original = RejectionSampler.forward
        self._vllm_forward = types.FunctionType(
            original.__code__,
            {
                **original.__globals__,
                "rejection_sample": self._rule,
                "apply_sampling_constraints": self._constraints,
            },
            original.__name__,
            original.__defaults__,
            original.__closure__,
        )

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: Tensor | None,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        # vLLM copies the `[N, V]` logits before it constrains them, for the logprobs of the raw
        # ones; without logprobs nobody reads the copy.
        wants_logprobs = sampling_metadata.max_num_logprobs is not None
        self.is_processed_logprobs_mode = self._keeps_no_raw_logits or not wants_logprobs
        self.sampler.wants_logprobs = wants_logprobs
        self._metadata = metadata
        self.sampler.num_draft = metadata.num_draft_tokens
        self._num_draft = torch.tensor(
            metadata.num_draft_tokens, dtype=torch.int64, device=logits.device
        )
        return self._vllm_forward(self, metadata, draft_probs, logits, sampling_metadata)

    def _constraints(
        self, logits: Tensor, cu_num_draft_tokens: Tensor, sampling_metadata: SamplingMetadata
    ) -> Tensor:
        del cu_num_draft_tokens
        return constrain(logits, sampling_metadata, self._num_draft)

    def _rule(
        self,
        draft_token_ids: Tensor,
        num_draft_tokens: list[int],
        max_spec_len: int,
        cu_num_draft_tokens: Tensor,
        draft_probs: Tensor | None,
        target_logits: Tensor,
        bonus_token_ids: Tensor,
        sampling_metadata: SamplingMetadata,
        **of_other_rules: Any,
    ) -> Tensor:
        """vLLM's arguments in, `[R, max_spec_len + 1]` int32 out, -1 padded."""
        del cu_num_draft_tokens, bonus_token_ids, of_other_rules
        adapter, metadata = self.adapter, self._metadata
        count = len(num_draft_tokens)
        requests = adapter.requests_of_step(count)
        device = target_logits.device
        temperatures = sampling_metadata.temperature
        if temperatures is None:  # all greedy
            temperatures = torch.zeros(count, device=device)
        batch = VerifyInput(
            request_ids=requests.request_ids,
            target_logits=target_logits,
            bonus_logits=self.sampler.logits,
            draft_token_ids=draft_token_ids.long(),
            num_draft=self._num_draft,
            draft_probabilities=adapter.draft_probabilities(
                draft_probs, num_draft_tokens, requests.request_ids, device
            ),
            temperatures=temperatures,
            streams=torch.from_numpy(requests.streams).to(device),
            positions=adapter.first_draft_positions(count),
            hidden_states=(
                adapter.draft_hidden_states(metadata) if self.needs_hidden_states else None
            ),
            max_num_draft=max_spec_len,
            all_greedy=sampling_metadata.all_greedy,
            any_greedy=not sampling_metadata.all_random,
            constrained=(
                None
                if requests.has_grammar is None
                else torch.from_numpy(requests.has_grammar).to(device)
            ),
            history=adapter.token_history(requests),
        )
        verification = verify_each(self.verifiers, batch, requests.verifiers, num_draft_tokens)
        adapter.verified(batch, verification)
        return verification.token_ids.to(torch.int32)
