"""What carries our settings from the front end into every worker.

A real `SpeculativeConfig` subclass with one more field, under vLLM's own `custom_class`
method: it passes vLLM's validation, is pickled by reference into engine core and workers,
and survives `vllm.config.utils.replace`. A foreign attribute would not.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import TYPE_CHECKING, Any, get_args

from pydantic import Field
from vllm.config import speculative
from vllm.config.speculative import SpeculativeConfig
from vllm.config.utils import config

from vllm_spec_plugins.config import EngineVocabulary, PluginSettings
from vllm_spec_plugins.context import ModelFacts
from vllm_spec_plugins.image_token_range import image_token_range
from vllm_spec_plugins.length_control import Signals
from vllm_spec_plugins.proposer import Needs
from vllm_spec_plugins.registry import Kind, Registry

from .front_end import Source, follow

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig


@cache
def engine_vocabulary() -> EngineVocabulary:
    """What the installed vLLM calls its own."""
    literal = speculative.SpeculativeMethod
    methods = {str(m) for m in _flatten(get_args(literal))}
    fields = {f.name for f in dataclasses.fields(SpeculativeConfig)}
    with_head = {"draft_model", "eagle", "eagle3", "mtp"} & methods
    with_head |= {method for method in methods if method.endswith("_mtp")}
    return EngineVocabulary(frozenset(methods), frozenset(fields), frozenset(with_head))


def _flatten(args: tuple[Any, ...]) -> list[Any]:
    return [leaf for a in args for leaf in (_flatten(get_args(a)) if get_args(a) else [a])]


@cache
def registry() -> Registry:
    """The installed plugins, with the installed vLLM's method names reserved."""
    return Registry(reserved=engine_vocabulary().methods)


def model_facts(
    model: ModelConfig, parallel: ParallelConfig, num_speculative_tokens: int | None
) -> ModelFacts:
    """What plugins may know before any weight is loaded."""
    config = model.hf_config.to_dict()
    ends = config.get("eos_token_id")
    return ModelFacts(
        model=model.model,
        vocab_size=model.get_vocab_size(),
        hidden_size=model.get_hidden_size(),
        num_layers=model.get_total_num_hidden_layers(),
        max_model_len=model.max_model_len,
        num_speculative_tokens=num_speculative_tokens or 0,
        tensor_parallel_size=parallel.tensor_parallel_size,
        image_token_range=image_token_range(config),
        end_token_ids=(ends,) if isinstance(ends, int) else tuple(ends or ()),
        revision=model.revision,
    )


def proposer_needs(settings: PluginSettings) -> Needs:
    """What the proposer needs, its length controller included; nothing when vLLM's own drafts."""
    if settings.proposer is None:
        return Needs.HISTORY
    proposer, options = settings.proposer.build(Kind.PROPOSER, registry())
    needs: Needs = proposer.needs_for(options)
    return needs | Needs.LAYER_STATES if chooses_exits(settings) else needs


def chooses_exits(settings: PluginSettings) -> bool:
    """Whether the length controller chooses among the proposer's exits."""
    control = registry().load(Kind.LENGTH_CONTROLLER, settings.length_control.name)
    return Signals.EXITS in control.needs


@config
class PluginSpeculativeConfig(SpeculativeConfig):
    """vLLM's speculative config with ours inside."""

    spec_plugins: dict[str, Any] = Field(default_factory=dict)
    """`PluginSettings` as plain values."""
    spec_plugins_counters: str = ""
    """File of the counters that workers write and the front end reads; "" = none."""
    spec_plugins_replicas: int = 1
    """Data-parallel engines that share the file. A replica of a dense model is told by vLLM that
    it is the only one."""

    @property
    def settings(self) -> PluginSettings:
        return PluginSettings.model_validate(self.spec_plugins)

    @property
    def needs(self) -> Needs:
        """What the proposer needs; nothing when vLLM's own drafts."""
        return proposer_needs(self.settings)

    @property
    def drafts_on_device_alone(self) -> bool:
        """Whether a proposer of ours is always asked with tensors."""
        chosen = self.settings.proposer
        if chosen is None or self.method != "custom_class":
            return False
        proposer, options = chosen.build(Kind.PROPOSER, registry())
        return not proposer.drafts_on_host(options)

    def use_ngram(self) -> bool:
        """Model runner V2 keeps texts in the device's own memory for whoever reads them there."""
        return self.drafts_on_device_alone or super().use_ngram()

    @property
    def counters(self) -> Source:
        """Where its workers count, and under which names."""
        settings = self.settings
        assert self.target_model_config is not None
        return Source(
            path=self.spec_plugins_counters,
            replicas=self.spec_plugins_replicas,
            model=str(self.target_model_config.served_model_name),
            proposer=settings.proposer.name if settings.proposer else str(self.method),
            verifiers=tuple(settings.verifiers_allowed) or ("vllm",),
        )

    def compute_hash(self) -> str:
        """Hidden states and layers a plugin asks for change the compiled graph."""
        from vllm.utils.hashing import safe_hash

        factors = repr((super().compute_hash(), sorted(self.spec_plugins.items())))
        return safe_hash(factors.encode(), usedforsecurity=False).hexdigest()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Arriving in a new process is what installs our seams there.
        from .install import install_engine_seams

        self.__dict__.update(state)
        install_engine_seams()
        if self.spec_plugins_counters:
            follow(self.counters)

    def __repr__(self) -> str:
        ours = self.settings
        drafts = ours.proposer.name if ours.proposer else self.method
        verifies = ours.verifier.name if ours.verifier else "vLLM"
        return (
            f"PluginSpeculativeConfig(proposer={drafts!r}, verifier={verifies!r}, "
            f"num_speculative_tokens={self.num_speculative_tokens})"
        )
