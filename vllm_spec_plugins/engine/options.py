"""`--speculative-config` in, our carrier out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_spec_plugins.config import PluginSettings, concerns_us, split
from vllm_spec_plugins.context import ModelFacts
from vllm_spec_plugins.errors import ConfigError, UnsupportedEngineError
from vllm_spec_plugins.hookspecs import logger
from vllm_spec_plugins.registry import Kind
from vllm_spec_plugins.shared_counters import SharedCounters

from .async_support import settle
from .carrier import (
    PluginSpeculativeConfig,
    engine_vocabulary,
    model_facts,
    proposer_needs,
    registry,
)
from .draft_head_support import refuse_unranked, wants_draft_head
from .front_end import follow
from .seams import require_supported
from .target_support import refuse_unrunnable_layers
from .v2_support import refuse_on_forced_v2

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.engine.arg_utils import EngineArgs

#: What vLLM's custom_class method builds; the runner adapter takes its place at once.
PLACEHOLDER = "vllm_spec_plugins.engine.placeholder.PlaceholderProposer"


def requested(engine_args: EngineArgs) -> dict[str, Any] | None:
    """The speculative config a user gave, when it asks for anything of ours."""
    given = engine_args.speculative_config or {}
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"--speculative-config must be an object, got {given!r}. For example: "
            '{"method": "ngram_adaptive", "num_speculative_tokens": 5}.'
        )
    raw = {key.replace("-", "_"): value for key, value in given.items()}
    method = engine_args.spec_method
    if method is not None and method in registry().names(Kind.PROPOSER):
        raise ConfigError(
            f'"--spec-method {method}" is not possible: vLLM accepts only its own methods there. '
            f'Use --speculative-config \'{{"method": "{method}", "num_speculative_tokens": 5}}\'.'
        )
    flags = {
        "method": method,
        "model": engine_args.spec_model,
        "num_speculative_tokens": engine_args.spec_tokens,
    }
    flags = {key: value for key, value in flags.items() if value is not None}
    if not concerns_us({**flags, **raw}, engine_vocabulary(), registry()):
        return None
    for key in flags.keys() & raw.keys():
        flag = f"--spec-{key.removeprefix('num_speculative_')}"
        raise ConfigError(
            f'"{key}" is given twice: in --speculative-config and by {flag}. Remove {flag}.'
        )
    return {**flags, **raw}


def build(
    raw: Mapping[str, Any],
    engine_args: EngineArgs,
    target_model_config: ModelConfig,
    target_parallel_config: ParallelConfig,
) -> PluginSpeculativeConfig:
    """Our config from what the user wrote. Raises `SpecPluginsError`, one message."""
    require_supported()
    _refuse_unserved(target_model_config, target_parallel_config)

    def facts(num_speculative_tokens: int | None) -> ModelFacts:
        return model_facts(target_model_config, target_parallel_config, num_speculative_tokens)

    native, settings = split(raw, engine_vocabulary(), facts, registry())
    if settings.proposer is not None and native["method"] == settings.proposer.name:
        native = {**native, "method": "custom_class", "model": PLACEHOLDER}
    if settings.proposer is not None:
        refuse_unrunnable_layers(
            settings.proposer.name, proposer_needs(settings), engine_args, target_model_config
        )
    refuse_on_forced_v2(settings, native, engine_args)
    _announce(settings, native)
    settle(settings, engine_args)
    replicas = target_parallel_config.data_parallel_size
    ours = PluginSpeculativeConfig(
        **native,
        target_model_config=target_model_config,
        target_parallel_config=target_parallel_config,
        spec_plugins=settings.model_dump(mode="json"),
        spec_plugins_counters=SharedCounters.create(
            replicas, max(len(settings.verifiers_allowed), 1)
        ),
        spec_plugins_replicas=replicas,
    )
    follow(ours.counters)
    if wants_draft_head(settings):
        refuse_unranked(ours)
    return ours


def _refuse_unserved(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Arrangements of the engine in which our seams would be wrong."""
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
    verifier, options = settings.verifier.build(Kind.VERIFIER, plugins)
    bound = verifier.total_variation_bound(options)
    logger.info(
        "Speculative decoding: proposer %s, verifier %s (%s: %s%s). Requests may choose: %s.",
        proposer,
        settings.verifier.name,
        verifier.guarantee.value,
        verifier.guarantee.meaning,
        "" if bound is None else f", at most {bound:.3g} per draft token",
        ", ".join(sorted(promises)),
    )
