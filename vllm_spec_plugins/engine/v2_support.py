"""What of ours does not run on model runner V2, told before anything loads.

vLLM chooses V2 unless something asked for does not run there. Who forced V2 gets one message;
everyone else gets V1, and vLLM's log says why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_spec_plugins.config import DRAFT_VOCABULARY, PluginSettings
from vllm_spec_plugins.errors import UnsupportedEngineError, listed

from .draft_head_support import wants_draft_head

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

#: The entry of vLLM's own list that our adapter takes off it.
CUSTOM_CLASS = "speculative method 'custom_class'"


def reasons_against_v2(
    settings: PluginSettings, adaptive: bool, sharded: bool | None, watermarks: bool
) -> list[str]:
    """What is asked for that our adapter of V2 does not do; empty = V2 serves it.

    Args:
        settings: Ours.
        adaptive: Whether vLLM is to choose how many drafts of each request it verifies.
        sharded: Whether tensor-parallel ranks are to sample for a part of the requests each.
        watermarks: Whether texts are to carry watermarks.
    """
    reasons = []
    if wants_draft_head(settings):
        reasons.append(f'"{DRAFT_VOCABULARY}" beside a drafting method of vLLM\'s own')
    if settings.verifiers_allowed:
        asked = {
            "adaptive verification": adaptive,
            "batch-sharded sampling": sharded,
            "watermarks": watermarks,
        }
        reasons += [f"{what} beside a verifier of a plugin" for what, on in asked.items() if on]
    return reasons


def reasons_of(config: VllmConfig, settings: PluginSettings) -> list[str]:
    """The same, of a whole config."""
    spec = config.speculative_config
    assert spec is not None
    return reasons_against_v2(
        settings,
        spec.enable_adaptive_verification,
        config.parallel_config.enable_batch_sharded_sampling,
        config.watermark_config is not None,
    )


def refuse_on_forced_v2(
    settings: PluginSettings, native: Mapping[str, Any], args: EngineArgs
) -> None:
    """V2 is forced and cannot do what is asked of us.

    Args:
        settings: Ours.
        native: vLLM's share of the speculative config.
        args: The engine's arguments.

    Raises:
        UnsupportedEngineError: Says what, and the way out.
    """
    from vllm import envs

    watermarks = args.watermark_config is not None
    if not (envs.VLLM_USE_V2_MODEL_RUNNER or watermarks):
        return
    reasons = reasons_against_v2(
        settings,
        bool(native.get("enable_adaptive_verification")),
        args.enable_batch_sharded_sampling,
        watermarks,
    )
    if reasons:
        way_out = "Remove it." if watermarks else "Set VLLM_USE_V2_MODEL_RUNNER=0, or remove it."
        raise UnsupportedEngineError(
            f"Not served on model runner V2, which this engine is told to use: {listed(reasons)}. "
            f"{way_out}"
        )
