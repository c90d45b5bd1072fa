"""Which configs want a draft head of ours, and which drafters of vLLM's can have one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_spec_plugins.config import DRAFT_VOCABULARY, PluginSettings
from vllm_spec_plugins.engine_proposer import EngineProposer
from vllm_spec_plugins.errors import ConfigError, listed
from vllm_spec_plugins.registry import Kind

from .carrier import engine_vocabulary, registry

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig


def wants_draft_head(settings: PluginSettings) -> bool:
    """Whether vLLM's drafter is to draft through a head of ours."""
    if settings.proposer is None:
        return settings.draft_vocabulary is not None
    plugin = registry().load(Kind.PROPOSER, settings.proposer.name)
    return issubclass(plugin, EngineProposer) and plugin.draft_head is not EngineProposer.draft_head


def refuse_unranked(spec: SpeculativeConfig) -> None:
    """What vLLM made of the config must be a drafter whose head can be replaced.

    Raises:
        ConfigError: Before any weight is loaded.
    """
    known = engine_vocabulary().methods_with_head
    if spec.method not in known:
        raise ConfigError(
            f'"{DRAFT_VOCABULARY}": vLLM takes {spec.model} for a model of its method '
            f'"{spec.method}", which has no output head that can be cut down. It works beside: '
            f"{listed(method for method in known if not method.endswith('_mtp'))}."
        )
    reasons = {
        "use_local_argmax_reduction": "chooses draft tokens without computing their logits",
        "use_heterogeneous_vocab": "drafts tokens of another tokenizer, and a draft vocabulary "
        "ranks the target's",
        "parallel_drafting": "drafts all tokens in one pass, one row per token instead of one "
        "per request",
    }
    for key, reason in reasons.items():
        if getattr(spec, key):
            raise ConfigError(f'"{key}" {reason}: it cannot stand beside "{DRAFT_VOCABULARY}".')
    own = getattr(spec.draft_model_config.hf_config, "draft_vocab_size", None)
    whole = spec.target_model_config.get_vocab_size()
    if own not in (None, whole):
        raise ConfigError(
            f"{spec.model} was trained with a draft vocabulary of its own, {own} of the target's "
            f'{whole} tokens. Remove "{DRAFT_VOCABULARY}".'
        )
