"""Speculative-decoding proposers and verifiers for vLLM, registered through entry points.

Importing this package imports neither torch nor vLLM: vLLM loads general plugins in
every one of its processes. Names below are resolved when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "AcceptanceRule": "verifier",
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
    "SpecPluginsError": "errors",
    "Verification": "verifier",
    "Verifier": "verifier",
    "VerifierOptions": "verifier",
    "VerifyInput": "verifier",
    "hookimpl": "hookspecs",
    "uniforms": "random_numbers",
}

__all__ = ["__version__", *sorted(_HOME)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
