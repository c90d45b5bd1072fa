"""Our verifiers in place of the rejection rule of model runner V2.

vLLM's `RejectionSampler` keeps running around the rule: which draft tokens are placeholders,
penalties, grammars, temperature, top-k and top-p, logprobs, and verification in chunks where
the logits are large.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_spec_plugins.transfers import to_device
from vllm_spec_plugins.verifier import Verification, Verifier, VerifyInput

from .verified_step import DraftRows
from .verify_each import verify_each

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .v2_runner import V2Adapter


class VerifierBridge(RejectionSampler):
    """vLLM's rejection sampler with our rule inside.

    Args:
        adapter: Knows the requests of the step and the draft's law.
        verifiers: By name; which one serves a request is the request's choice.
        sampler: vLLM's sampler.
        spec_config: vLLM's speculative config.
        device: Where the target runs.
    """

    def __init__(
        self,
        adapter: V2Adapter,
        verifiers: Mapping[str, Verifier],
        sampler: Any,
        spec_config: Any,
        device: torch.device,
    ) -> None:
        super().__init__(sampler, spec_config, device)
        self.adapter = adapter
        self.verifiers = dict(verifiers)
        self._device = device
        self._needs_hidden_states = any(v.needs_hidden_states for v in verifiers.values())
        # The step at hand: requests whose chunks are verified, and what was decided.
        self._input_batch: Any = None
        self._num_verified = 0
        self._decided: list[tuple[VerifyInput, Verification]] = []

    def __call__(
        self,
        logits: Tensor,
        input_batch: Any,
        draft_logits: Tensor | None = None,
        invalid_drafts: Tensor | None = None,
    ) -> Any:
        self._input_batch, self._num_verified, self._decided = input_batch, 0, []
        invalid_drafts = self.adapter.invalid_drafts(input_batch, invalid_drafts)
        output = super().__call__(logits, input_batch, draft_logits, invalid_drafts)
        batch, verification = self._decided[0]
        if len(self._decided) > 1:
            verification = _join([decided for _, decided in self._decided])
        self.adapter.verified(batch, verification)
        self._input_batch, self._decided = None, []
        return output

    def _verify_in_chunks(
        self,
        logits: Tensor,
        input_batch: Any,
        draft_logits: Tensor | None,
        draft_sampled: Tensor,
        pos: Tensor,
        max_chunk_logits: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self.adapter.keeps_target_logits:  # of the whole step
            max_chunk_logits = len(logits)
        return super()._verify_in_chunks(
            logits,
            input_batch,
            draft_logits,
            draft_sampled,
            pos,
            max_chunk_logits,
            *args,
            **kwargs,
        )

    def _verify(
        self,
        logits: Tensor,
        draft_logits: Tensor | None,
        draft_sampled: Tensor,
        pos: Tensor,
        cu_num_logits: Tensor,
        idx_mapping: Tensor,
        idx_mapping_np: NDArray[np.intp],
        expanded_idx_mapping: Tensor,
        expanded_local_pos: Tensor,
        seq_lens_upper_bound_np: NDArray[np.int32],
        verify_draft_sampled: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Processed logits, `[R, K + 1]` tokens and `[R]` how many, of one chunk of requests.

        Row j of a request's logits is the law after its j-th token of the step, so of its draft
        token j; its last row is the law of the bonus token.
        """
        adapter = self.adapter
        processed = self.sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        begin = self._num_verified
        end = self._num_verified = begin + len(idx_mapping_np)
        starts = self._input_batch.cu_num_logits_np[begin : end + 1].astype(np.int64)
        starts = starts - starts[0]
        last = starts[1:] - 1
        rows = to_device(np.delete(np.arange(starts[-1]), last), self._device)  # [N]
        num_draft_np = np.diff(starts) - 1
        requests = adapter.requests_of_rows(begin, end)
        states = self.sampler.sampling_states
        greedy = states.temperature.np[idx_mapping_np] == 0
        temperatures = states.temperature.gpu[idx_mapping]
        slots, columns = expanded_idx_mapping[rows], expanded_local_pos[rows]
        law = None
        if draft_logits is not None:
            kept = draft_logits[slots, columns, : logits.shape[1]]
            law = law_of_draft_logits(kept, states.temperature.gpu[slots])
        drafts = DraftRows(requests.request_ids, num_draft_np.tolist(), slots, columns)
        offset = int(self._input_batch.cu_num_logits_np[begin])
        batch = VerifyInput(
            request_ids=requests.request_ids,
            target_logits=processed[rows].float(),
            bonus_logits=processed[cu_num_logits[1:].long() - 1].float(),
            draft_token_ids=verify_draft_sampled[rows + 1].long(),
            num_draft=(cu_num_logits[1:] - cu_num_logits[:-1] - 1).long(),
            draft_probabilities=adapter.draft_probabilities(law, drafts),
            temperatures=temperatures,
            streams=to_device(requests.streams, self._device),
            positions=pos[cu_num_logits[:-1].long()].long() + 1,
            hidden_states=(
                adapter.draft_hidden_states(rows + 1 + offset)
                if self._needs_hidden_states
                else None
            ),
            max_num_draft=int(num_draft_np.max()),
            all_greedy=bool(greedy.all()),
            any_greedy=bool(greedy.any()),
            constrained=(
                None
                if requests.has_grammar is None
                else to_device(requests.has_grammar, self._device)
            ),
            history=adapter.token_history(begin, end, requests),
        )
        verification = verify_each(self.verifiers, batch, requests.verifiers, drafts.num_draft)
        self._decided.append((batch, verification))
        adapter.chunk_verified(batch, verification)
        tokens = verification.token_ids
        missing = self.num_speculative_steps + 1 - tokens.shape[1]
        sampled = torch.nn.functional.pad(tokens, (0, missing), value=-1)
        return processed, sampled, (verification.accepted + 1).to(torch.int32)


def law_of_draft_logits(draft_logits: Tensor, temperatures: Tensor) -> Tensor:
    """`[N, V]` the law vLLM's draft tokens were drawn from.

    Args:
        draft_logits: `[N, V]` as runner V2 keeps them: before temperature.
        temperatures: `[N]`; 0 = the token was chosen, and its law is not read.
    """
    scale = torch.where(temperatures == 0, torch.ones_like(temperatures), temperatures)
    return torch.softmax(draft_logits.float() / scale.unsqueeze(1), dim=-1)


def _join(parts: list[Verification]) -> Verification:
    """What was decided of a whole step; the tokens themselves are with the runner already."""
    accepted = torch.cat([part.accepted for part in parts])
    extras = [part.extra_acceptance for part in parts]
    if any(extra is None for extra in extras):
        extras = []
    extra = torch.cat([e for e in extras if e is not None]) if extras else None
    return Verification(parts[0].token_ids, accepted, extra)
