"""Engines in which the target's layers cannot be run apart, told before anything loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_spec_plugins.errors import ConfigError, UnsupportedEngineError
from vllm_spec_plugins.proposer import Needs

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import EngineArgs

_OTHERS = "Use another proposer (`vllm-spec list`)."


def refuse_unrunnable_layers(name: str, needs: Needs, args: EngineArgs, model: ModelConfig) -> None:
    """Refuse a proposer that needs the target's layers where they are not its own to use.

    Args:
        name: Of the proposer.
        needs: What it needs.
        args: The engine's arguments.
        model: The target.

    Raises:
        ConfigError: The engine serves LoRA adapters, or overlaps halves of a batch.
        UnsupportedEngineError: The target has a state beside keys and values, or the like; or
            its states are followed and its positions are not one number each.
    """
    if Needs.TARGET_LAYERS not in needs:
        if Needs.LAYER_STATES in needs and model.uses_mrope:
            raise UnsupportedEngineError(
                f'"{name}" keeps hidden states of the target by position, and {model.model} gives '
                "tokens positions in several dimensions (M-RoPE). Use options that need no hidden "
                "states (for diffusion a drafter trained without --condition-on-layers), or "
                "another proposer (`vllm-spec list`)."
            )
        return
    if args.enable_lora:
        raise ConfigError(
            f'"{name}" drafts with the layers of the target, and with --enable-lora those layers '
            "look up an adapter for each token of the step being verified, not of the draft. "
            f"Remove --enable-lora. {_OTHERS}"
        )
    if args.enable_dbo:
        raise ConfigError(
            f'"{name}" drafts with the layers of the target, and --enable-dbo runs them on half a '
            f"batch at a time. Remove --enable-dbo. {_OTHERS}"
        )
    reasons = {
        "keeps a recurrent state (Mamba, linear attention), which a draft would overwrite": (
            model.is_hybrid or model.is_attention_free or model.has_inner_state
        ),
        "gives tokens positions in several dimensions (M-RoPE)": model.uses_mrope,
        "is an encoder-decoder": model.is_encoder_decoder,
        "shares keys and values between layers": bool(
            getattr(model.hf_text_config, "num_kv_shared_layers", 0)
        ),
        "compresses keys and values (multi-head latent attention)": model.use_mla,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedEngineError(
                f'"{name}" drafts with the layers of the target, and {model.model} {reason}: its '
                f"layers cannot be run apart. {_OTHERS}"
            )
