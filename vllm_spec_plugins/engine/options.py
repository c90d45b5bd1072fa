"""`--speculative-config` in, our settings out, into every worker.

The carrier is a real `SpeculativeConfig` subclass with one more field, under vLLM's own
`custom_class` method: it passes vLLM's validation, is pickled by reference into engine core
and workers, and survives `vllm.config.utils.replace`. A foreign attribute would not.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, get_args

from pydantic import Field
from vllm.config import speculative
from vllm.config.speculative import SpeculativeConfig
from vllm.config.utils import config

from vllm_spec_plugins.config import EngineVocabulary, PluginSettings, concerns_us, split
from vllm_spec_plugins.context import ModelFacts
from vllm_spec_plugins.errors import ConfigError, UnsupportedEngineError
from vllm_spec_plugins.proposer import Needs
from vllm_spec_plugins.registry import Kind, Registry, installed

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.engine.arg_utils import EngineArgs

logger = logging.getLogger("vllm.spec_plugins")

#: What vLLM's custom_class method builds; the runner adapter takes its place at once.
PLACEHOLDER = "vllm_spec_plugins.engine.placeholder.PlaceholderProposer"


@config
class PluginSpeculativeConfig(SpeculativeConfig):
    """vLLM's speculative config with ours inside."""

    spec_plugins: dict[str, Any] = Field(default_factory=dict)
    """`PluginSettings` as plain values."""

    @property
    def settings(self) -> PluginSettings:
        return PluginSettings.model_validate(self.spec_plugins)

    @property
    def needs(self) -> Needs:
        """What the proposer needs; nothing when vLLM's own drafts."""
        choice = self.settings.proposer
        if choice is None:
            return Needs.HISTORY
        proposer, options = choice.build(Kind.PROPOSER, installed())
        return proposer.needs_for(options)

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

    def __repr__(self) -> str:
        ours = self.settings
        drafts = ours.proposer.name if ours.proposer else self.method
        verifies = ours.verifier.name if ours.verifier else "vLLM"
        return (
            f"PluginSpeculativeConfig(proposer={drafts!r}, verifier={verifies!r}, "
            f"num_speculative_tokens={self.num_speculative_tokens})"
        )


@cache
def engine_vocabulary() -> EngineVocabulary:
    """What the installed vLLM calls its own."""
    literal = speculative.SpeculativeMethod
    methods = {str(m) for m in _flatten(get_args(literal))}
    fields = {f.name for f in dataclasses.fields(SpeculativeConfig)}
    return EngineVocabulary(methods=frozenset(methods), fields=frozenset(fields))


def _flatten(args: tuple[Any, ...]) -> list[Any]:
    return [leaf for a in args for leaf in (_flatten(get_args(a)) if get_args(a) else [a])]


@cache
def registry() -> Registry:
    """The installed plugins, with the installed vLLM's method names reserved."""
    return Registry(reserved=engine_vocabulary().methods)


def requested(engine_args: EngineArgs) -> dict[str, Any] | None:
    """The speculative config a user gave, when it asks for anything of ours."""
    raw = {k.replace("-", "_"): v for k, v in (engine_args.speculative_config or {}).items()}
    method = engine_args.spec_method
    if method is not None and method in registry().names(Kind.PROPOSER):
        raise ConfigError(
            f'"--spec-method {method}" is not possible: vLLM accepts only its own methods there. '
            f'Use --speculative-config \'{{"method": "{method}", "num_speculative_tokens": 5}}\'.'
        )
    for key, value in (
        ("method", method),
        ("model", engine_args.spec_model),
        ("num_speculative_tokens", engine_args.spec_tokens),
    ):
        if value is not None:
            raw.setdefault(key, value)
    return raw if concerns_us(raw, engine_vocabulary(), registry()) else None


def build(
    raw: Mapping[str, Any],
    engine_args: EngineArgs,
    target_model_config: ModelConfig,
    target_parallel_config: ParallelConfig,
) -> PluginSpeculativeConfig:
    """Our config from what the user wrote. Raises `SpecPluginsError`, one message."""
    from .seams import require_supported

    require_supported()
    _refuse_unserved(engine_args, target_model_config, target_parallel_config)

    def facts(num_speculative_tokens: int | None) -> ModelFacts:
        return model_facts(target_model_config, target_parallel_config, num_speculative_tokens)

    native, settings = split(raw, engine_vocabulary(), facts, registry())
    if settings.proposer is not None:
        native = {**native, "method": "custom_class", "model": PLACEHOLDER}
    _announce(settings, native)
    # The verification of drafts must be finished before the next step is planned: per-request
    # choices decide then how many tokens each request drafts.
    if engine_args.async_scheduling is None:
        engine_args.async_scheduling = False
    from .install import install_engine_seams

    install_engine_seams()
    return PluginSpeculativeConfig(
        **native,
        target_model_config=target_model_config,
        target_parallel_config=target_parallel_config,
        spec_plugins=settings.model_dump(mode="json"),
    )


def model_facts(
    model: ModelConfig, parallel: ParallelConfig, num_speculative_tokens: int | None
) -> ModelFacts:
    """What plugins may know before any weight is loaded."""
    return ModelFacts(
        model=model.model,
        vocab_size=model.get_vocab_size(),
        hidden_size=model.get_hidden_size(),
        num_layers=model.get_total_num_hidden_layers(),
        max_model_len=model.max_model_len,
        num_speculative_tokens=num_speculative_tokens or 0,
        tensor_parallel_size=parallel.tensor_parallel_size,
    )


def _refuse_unserved(args: EngineArgs, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Arrangements of the engine in which our seams would be wrong."""
    if args.async_scheduling:
        raise ConfigError(
            "Asynchronous scheduling plans a step before the last one is verified; proposers and "
            "verifiers from plugins are served without it on model runner V1. "
            "Remove --async-scheduling."
        )
    if parallel.pipeline_parallel_size > 1:
        raise UnsupportedEngineError(
            f"pipeline_parallel_size is {parallel.pipeline_parallel_size}: proposers and verifiers "
            "from plugins run with 1. Use tensor_parallel_size to spread the model instead."
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise UnsupportedEngineError(
                f"{name} is {getattr(parallel, name)}: proposers and verifiers from plugins run "
                "with 1, because the key/value slots of one sequence must be on one rank."
            )
    if model.runner_type != "generate":
        raise UnsupportedEngineError(
            f'The model is served as "{model.runner_type}": only generation drafts tokens. '
            "Remove --speculative-config."
        )


def _announce(settings: PluginSettings, native: Mapping[str, Any]) -> None:
    """What will run and what it promises: the line an operator looks for."""
    plugins = registry()
    proposer = settings.proposer.name if settings.proposer else f"{native.get('method')} (vLLM)"
    if settings.verifier is None:
        return
    promises = [
        f"{name} [{plugins.load(Kind.VERIFIER, name).guarantee.value}]"
        for name in settings.verifiers_allowed
    ]
    guarantee = plugins.load(Kind.VERIFIER, settings.verifier.name).guarantee
    logger.info(
        "Speculative decoding: proposer %s, verifier %s, which %s. Requests may choose: %s.",
        proposer,
        settings.verifier.name,
        guarantee.meaning,
        ", ".join(sorted(promises)),
    )
