"""What of ours does not run on model runner V2, told before anything loads.

vLLM chooses V2 unless something asked for does not run there. Who forced V2 gets one message;
everyone else gets V1, and the log says why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_spec_plugins.config import DRAFT_VOCABULARY
from vllm_spec_plugins.errors import UnsupportedEngineError, listed

from .carrier import PluginSpeculativeConfig
from .draft_head_support import wants_draft_head

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: The entry of vLLM's own list that our adapter takes off it.
CUSTOM_CLASS = "speculative method 'custom_class'"


def reasons_against_v2(config: VllmConfig) -> list[str]:
    """What is asked for that our adapter of V2 does not do; empty = V2 serves it."""
    spec = config.speculative_config
    assert isinstance(spec, PluginSpeculativeConfig)
    reasons = []
    if wants_draft_head(spec.settings):
        reasons.append(f'"{DRAFT_VOCABULARY}" beside a drafting method of vLLM\'s own')
    if spec.enable_adaptive_verification:
        reasons.append("adaptive verification beside a verifier of a plugin")
    if config.parallel_config.enable_batch_sharded_sampling:
        reasons.append("batch-sharded sampling beside a verifier of a plugin")
    if config.watermark_config is not None:
        reasons.append("watermarks beside a verifier of a plugin")
    return reasons


def refuse_on_v2(config: VllmConfig) -> None:
    """V2 was forced, and cannot do what is asked of us.

    Raises:
        UnsupportedEngineError: Says what, and the way out.
    """
    reasons = reasons_against_v2(config)
    if reasons:
        raise UnsupportedEngineError(
            f"{listed(reasons)}: not served on model runner V2, which VLLM_USE_V2_MODEL_RUNNER=1 "
            "or another option forces. Set VLLM_USE_V2_MODEL_RUNNER=0 to serve it on model runner "
            "V1, or remove it."
        )
