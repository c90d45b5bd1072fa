"""Stands where model runner V2 expects a speculator, and passes on to the adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

if TYPE_CHECKING:
    from .v2_runner import V2Adapter


class PluginSpeculator(BaseSpeculator):
    """A proposer of ours, as the runner sees it.

    The runner reads attributes that `BaseSpeculator` does not declare: `supports_mm_inputs`,
    `draft_logits`, `pcp_manager`. `draft_logits` is None: the adapter keeps the law of its
    drafts, and vLLM's own rejection sampler never verifies them.

    Nothing is captured in a CUDA graph: proposers run eagerly.

    Args:
        vllm_config: Of the engine.
        device: Where the target runs.
    """

    supports_mm_inputs = False
    draft_logits: Tensor | None = None
    pcp_manager: Any = None

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        #: Set once the runner exists, before weights load.
        self.adapter: V2Adapter | None = None
        self._shape = (
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.speculative_config.num_speculative_tokens,
        )
        self._device = device

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        del cudagraph_mode

    def capture(self) -> None:
        pass

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Tensor,
        aux_hidden_states: list[Tensor] | None,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        next_prefill_tokens: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> Tensor:
        """`[R, K]` int64. Where less is drafted, 0: ids the embedding can read."""
        del attn_metadata, slot_mappings, num_rejected, last_sampled, next_prefill_tokens
        del num_sampled, temperature, seeds, dp_sync_state, skip_attn_for_dummy_run, mm_inputs
        del is_profile
        count, most = input_batch.num_reqs, self._shape[1]
        drafts = torch.zeros((count, most), dtype=torch.int64, device=self._device)
        if dummy_run:
            return drafts
        if self.adapter is None:
            raise RuntimeError(
                "vllm-spec-plugins is not attached to this model runner: the worker was started "
                "by a route that does not call WorkerWrapperBase.init_device. `vllm-spec doctor` "
                "says which seams hold."
            )
        limit = most if num_speculative_tokens is None else num_speculative_tokens
        self.adapter.propose(drafts, last_hidden_states, aux_hidden_states, limit)
        return drafts


def init_speculator_seam(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `init_speculator` in the module of runner V2."""

    def init_speculator(vllm_config: Any, device: torch.device, req_states: Any) -> Any:
        from .carrier import PluginSpeculativeConfig

        spec = vllm_config.speculative_config
        if isinstance(spec, PluginSpeculativeConfig) and spec.method == "custom_class":
            return PluginSpeculator(vllm_config, device)
        return original(vllm_config, device, req_states)

    return init_speculator
