"""Every class-level patch, each wrapped once and listed in `seams`.

`install_config_seam` runs wherever vLLM loads plugins. `install_engine_seams` runs only in
processes that hold a speculative config of ours; its wrappers look at the config they are
given and step aside for any other.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_INSTALLED = "_vllm_spec_plugins"


def _wrap_once(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Replace `owner.name` by `wrapper(original)` unless that was done before."""
    done: set[str] = owner.__dict__.get(_INSTALLED, set())
    if name not in done:
        setattr(owner, name, wrapper(owner.__dict__[name]))
        setattr(owner, _INSTALLED, done | {name})


def install_config_seam() -> None:
    """Let `--speculative-config` name our methods, verifiers and options."""
    from vllm.engine.arg_utils import EngineArgs

    def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def create_speculative_config(
            self: Any, target_model_config: Any, target_parallel_config: Any
        ) -> Any:
            shield_llvmlite()
            if self.speculative_config is None and self.spec_method is None:
                _note_unknown_vllm()
                return original(self, target_model_config, target_parallel_config)
            from . import options

            raw = options.requested(self)
            if raw is None:
                _note_unknown_vllm()
                _warn_of_cpu_sampling()
                return original(self, target_model_config, target_parallel_config)
            ours = options.build(raw, self, target_model_config, target_parallel_config)
            install_engine_seams()
            shield_llvmlite()  # a plugin may have loaded numba
            return ours

        return create_speculative_config

    _wrap_once(EngineArgs, "create_speculative_config", wrapper)


def install_engine_seams() -> None:
    """Scheduling, lookahead slots, request options, prices, the runner adapter. Idempotent."""
    from vllm.config.vllm import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.engine.output_processor import RequestState
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from .async_support import decided_with_us, refused_plainly
    from .front_end import with_price

    _wrap_once(VllmConfig, "__post_init__", decided_with_us)
    _wrap_once(VllmConfig, "__init__", refused_plainly)  # generated: no seam of vLLM's source
    _wrap_once(VllmConfig, "num_lookahead_tokens", _lookahead)
    _wrap_once(VllmConfig, "_get_v2_model_runner_unsupported_features", _v2_unsupported)
    _wrap_once(SamplingParams, "_validate_spec_decode", _validate_request)
    _wrap_once(NewRequestData, "from_request", _carry_cache_salt)
    _wrap_once(RequestState, "_new_completion_output", with_price)
    _wrap_once(WorkerWrapperBase, "init_device", _attach)


def _lookahead(original: property) -> property:
    """Reserve key/value slots past the verified tokens for proposers that write there."""

    def num_lookahead_tokens(self: VllmConfig) -> int:
        from vllm_spec_plugins.proposer import Needs

        from .carrier import PluginSpeculativeConfig

        slots = original.__get__(self)
        spec = self.speculative_config
        if isinstance(spec, PluginSpeculativeConfig) and Needs.LOOKAHEAD_SLOTS in spec.needs:
            return max(slots, spec.num_speculative_tokens)
        return slots

    return property(num_lookahead_tokens, doc=original.__doc__)


def _v2_unsupported(original: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Our adapter of model runner V2 makes `custom_class` run there; some things it does not."""

    @functools.wraps(original)
    def unsupported_features(self: VllmConfig) -> list[str]:
        from .carrier import PluginSpeculativeConfig
        from .v2_support import CUSTOM_CLASS, reasons_of

        features = original(self)
        if isinstance(spec := self.speculative_config, PluginSpeculativeConfig):
            features = [feature for feature in features if feature != CUSTOM_CLASS]
            features += reasons_of(self, spec.settings)
        return features

    return unsupported_features


def _validate_request(original: Callable[..., None]) -> Callable[..., None]:
    """A request that asks for what the server does not allow is refused, alone."""

    @functools.wraps(original)
    def validate_spec_decode(self: Any, speculative_config: Any) -> None:
        from vllm.exceptions import VLLMValidationError

        from vllm_spec_plugins import request_options
        from vllm_spec_plugins.errors import RequestError

        from .carrier import PluginSpeculativeConfig

        original(self, speculative_config)
        if isinstance(speculative_config, PluginSpeculativeConfig):
            try:
                request_options.read(
                    self.extra_args,
                    verifiers_allowed=speculative_config.settings.verifiers_allowed,
                    num_speculative_tokens=speculative_config.num_speculative_tokens,
                )
            except RequestError as error:
                raise VLLMValidationError(str(error), parameter=request_options.KEY) from error

    return validate_spec_decode


def _carry_cache_salt(original: classmethod[Any, ..., Any]) -> classmethod[Any, ..., Any]:
    """The worker is not told a request's cache salt; shared draft state must respect it."""

    @functools.wraps(original.__func__)
    def from_request(cls: type[Any], request: Any, *args: Any, **kwargs: Any) -> Any:
        from .requests import CACHE_SALT

        new = original.__func__(cls, request, *args, **kwargs)
        if request.cache_salt and new.sampling_params is not None:
            extra = new.sampling_params.extra_args or {}
            new.sampling_params.extra_args = {**extra, CACHE_SALT: request.cache_salt}
        return new

    return classmethod(from_request)


def _attach(original: Callable[..., None]) -> Callable[..., None]:
    """Hang the adapter on the runner instance once it exists and before weights load."""

    @functools.wraps(original)
    def init_device(self: Any) -> None:
        from .carrier import PluginSpeculativeConfig

        ours = isinstance(self.vllm_config.speculative_config, PluginSpeculativeConfig)
        if ours and self.vllm_config.use_v2_model_runner:
            from vllm.v1.worker.gpu import model_runner

            from .v2_speculator import init_speculator_seam

            _wrap_once(model_runner, "init_speculator", init_speculator_seam)
        original(self)
        if ours:
            from .attach import attach

            attach(self.worker, self.vllm_config)

    return init_device


@functools.cache
def _note_unknown_vllm() -> None:
    """Those who ask us for nothing get one line, and a vLLM that we do not touch."""
    from vllm_spec_plugins.errors import listed
    from vllm_spec_plugins.hookspecs import logger

    from .seams import installed_version, minor, snapshots

    version = installed_version()
    if version is None or minor(version) not in snapshots():
        logger.info(
            "vllm-spec-plugins serves vLLM %s and leaves vLLM %s alone.",
            listed(snapshots()),
            version,
        )


@functools.cache
def _warn_of_cpu_sampling() -> None:
    """vLLM's own speculative sampling on a CPU is wrong at temperature > 0: say it once."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm_spec_plugins.hookspecs import logger

        logger.warning(
            "vLLM's own verification on the CPU uses uninitialised temperature, top-k and top-p "
            "for draft tokens (vllm-project/vllm#55005): at temperature > 0 its output does not "
            'follow the model. Add "verifier": "lossless" to --speculative-config.'
        )


def shield_llvmlite() -> None:
    """Let a CPU engine start in a process where numba is loaded, by an engine before it say.

    vLLM's kernel registry looks into `__dict__` of every module's every value; llvmlite's
    library handle answers any attribute with a function, and the registry fails on it. That
    can happen to an engine that asks for nothing of ours, too, so every engine passes here.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    known_functions = getattr(getattr(ffi, "lib", None), "_fntab", None)
    if isinstance(known_functions, dict):
        known_functions.setdefault("__dict__", {})
