"""Where asynchronous scheduling is kept, and what of ours ends it, told before anything loads.

The engine then plans a step before the last one is verified. So what a plugin decides may not
depend on anything that only the host knows of the last step: the tokens it emitted, how many
tokens a request drafts. Model runner V2 can work like that, our adapter of V1 cannot.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from vllm_spec_plugins.config import PluginSettings
from vllm_spec_plugins.engine_proposer import EngineProposer
from vllm_spec_plugins.errors import ConfigError, SpecPluginsError
from vllm_spec_plugins.hookspecs import logger
from vllm_spec_plugins.registry import Kind, Registry

from .carrier import PluginSpeculativeConfig, registry

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

ON_V1 = "plugins on model runner V1"


def reasons_against_async(settings: PluginSettings, plugins: Registry | None = None) -> list[str]:
    """What is asked for that needs the host between two steps; empty = nothing is.

    Args:
        settings: Ours.
        plugins: Where to look plugins up; the installed ones by default.
    """
    plugins = plugins or registry()
    reasons = []
    if settings.proposer is not None:
        proposer, options = settings.proposer.build(Kind.PROPOSER, plugins)
        by_engine = issubclass(proposer, EngineProposer)
        if not by_engine and not proposer.drafts_on_device(options):
            reasons.append(f'method "{settings.proposer.name}" with these options')
        control = settings.length_control.name
        if control != "fixed":
            reasons.append(f'length_control "{control}"')
    for name, choice in sorted(settings.verifiers_allowed.items()):
        verifier, options = choice.build(Kind.VERIFIER, plugins)
        if not verifier.verifies_on_device(options):
            reasons.append(f'verifier "{name}" with these options')
    return reasons


def settle(settings: PluginSettings, args: EngineArgs) -> None:
    """Switch asynchronous scheduling off where it cannot be kept, or refuse it if it was forced.

    Raises:
        ConfigError: It was forced.
    """
    reasons = reasons_against_async(settings)
    if _is_v1_for_certain():
        reasons.append(ON_V1)
    if not reasons:
        return
    if args.async_scheduling:
        raise ConfigError(refusal(reasons))
    if args.async_scheduling is None:
        args.async_scheduling = False
        logger.info("Asynchronous scheduling is off, because of %s.", "; ".join(reasons))


def refusal(reasons: list[str]) -> str:
    """What is said to who forced it."""
    *others, last = reasons
    what = f"{', '.join(others)}, and {last}" if others else last
    return (
        f"--async-scheduling cannot be used here: {what} cannot plan a step before the last one "
        "is verified. Remove it."
    )


def _is_v1_for_certain() -> bool:
    """Whether it is known already that vLLM chooses model runner V1."""
    from vllm import envs
    from vllm.config.vllm import HAS_TRITON  # as the choice of runner sees it

    forced = envs.VLLM_USE_V2_MODEL_RUNNER
    return forced is False or (forced is None and not HAS_TRITON)


def decided_with_us(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps `VllmConfig.__post_init__`, which decides on asynchronous scheduling.

    vLLM 0.32 has a list of methods that it keeps it with, on both runners, and ours is not in it.
    """

    @functools.wraps(original)
    def __post_init__(self: VllmConfig) -> None:  # noqa: N807
        if not isinstance(self.speculative_config, PluginSpeculativeConfig):
            original(self)
            return
        scheduler = self.scheduler_config
        if scheduler.async_scheduling is not False and not self.use_v2_model_runner:
            # V1 for a reason that only the whole config shows.
            if scheduler.async_scheduling:
                raise ConfigError(refusal([ON_V1]))
            scheduler.async_scheduling = False
        with _listed_by_vllm():
            original(self)

    return __post_init__


def refused_plainly(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps `VllmConfig.__init__`: what `__post_init__` refuses is shown as it was said.

    Pydantic puts every `ValueError` of a `__post_init__` into a report of its own.
    """
    from pydantic import ValidationError

    @functools.wraps(original)
    def __init__(self: VllmConfig, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        try:
            original(self, *args, **kwargs)
        except ValidationError as report:
            for error in report.errors():
                if isinstance(ours := error.get("ctx", {}).get("error"), SpecPluginsError):
                    raise ours from None
            raise

    return __init__


@contextmanager
def _listed_by_vllm() -> Iterator[None]:
    """Our method is in the list, as long as a config of ours is looked at."""
    from vllm.config import vllm as module

    listed: Any = module
    kept = listed.NgramGPUTypes
    listed.NgramGPUTypes = Literal["ngram_gpu", "custom_class"]
    try:
        yield
    finally:
        listed.NgramGPUTypes = kept
