"""Speculative-decoding proposers and verifiers for vLLM, registered through entry points.

Importing this package imports neither torch nor vLLM: vLLM loads general plugins in
every one of its processes. Names below are resolved when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .acceptance_rule import AcceptanceRule
    from .context import EngineContext, ModelFacts
    from .device_drafting import DeviceDraft, DeviceDraftInput, DeviceStepStates
    from .draft_probabilities import DraftProbabilities
    from .errors import SpecPluginsError
    from .hookspecs import StepRecord, hookimpl
    from .length_control import LengthController, LengthControlOptions, RequestKeys, Signals
    from .proposer import Draft, DraftInput, Needs, Proposer, ProposerOptions, StepStates
    from .random_numbers import Purpose, uniforms
    from .relaxed_rule import RelaxedOptions, RelaxedRule
    from .target_model import TargetModel
    from .verifier import (
        Guarantee,
        TokenHistory,
        Verification,
        Verifier,
        VerifierOptions,
        VerifyInput,
    )

__version__ = "0.1.0"

__all__ = [
    "AcceptanceRule",
    "DeviceDraft",
    "DeviceDraftInput",
    "DeviceStepStates",
    "Draft",
    "DraftInput",
    "DraftProbabilities",
    "EngineContext",
    "Guarantee",
    "LengthControlOptions",
    "LengthController",
    "ModelFacts",
    "Needs",
    "Proposer",
    "ProposerOptions",
    "Purpose",
    "RelaxedOptions",
    "RelaxedRule",
    "RequestKeys",
    "Signals",
    "SpecPluginsError",
    "StepRecord",
    "StepStates",
    "TargetModel",
    "TokenHistory",
    "Verification",
    "Verifier",
    "VerifierOptions",
    "VerifyInput",
    "hookimpl",
    "uniforms",
]

#: The module each name lives in.
_HOME = {
    "AcceptanceRule": "acceptance_rule",
    "DeviceDraft": "device_drafting",
    "DeviceDraftInput": "device_drafting",
    "DeviceStepStates": "device_drafting",
    "Draft": "proposer",
    "DraftInput": "proposer",
    "DraftProbabilities": "draft_probabilities",
    "EngineContext": "context",
    "Guarantee": "verifier",
    "LengthControlOptions": "length_control",
    "LengthController": "length_control",
    "ModelFacts": "context",
    "Needs": "proposer",
    "Proposer": "proposer",
    "ProposerOptions": "proposer",
    "Purpose": "random_numbers",
    "RelaxedOptions": "relaxed_rule",
    "RelaxedRule": "relaxed_rule",
    "RequestKeys": "length_control",
    "Signals": "length_control",
    "SpecPluginsError": "errors",
    "StepRecord": "hookspecs",
    "StepStates": "proposer",
    "TargetModel": "target_model",
    "TokenHistory": "verifier",
    "Verification": "verifier",
    "Verifier": "verifier",
    "VerifierOptions": "verifier",
    "VerifyInput": "verifier",
    "hookimpl": "hookspecs",
    "uniforms": "random_numbers",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
