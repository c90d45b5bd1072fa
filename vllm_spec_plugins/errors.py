"""The errors a user meets. Each message says what, where, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SpecPluginsError(ValueError):
    """Anything wrong with what the user asked for. Raised before the model loads."""


class ConfigError(SpecPluginsError):
    """`--speculative-config` asks for something we cannot serve."""


class PluginError(SpecPluginsError):
    """An installed plugin cannot be used: broken, clashing, or not meeting its contract."""


class UnsupportedEngineError(SpecPluginsError):
    """This vLLM, or this arrangement of its workers, is not one the bridge knows."""


class RequestError(SpecPluginsError):
    """One request asks for what the server does not allow: HTTP 400 for it, others unharmed."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`' Did you mean "ngram"?'`, or nothing when no known word is near."""
    near = difflib.get_close_matches(str(word), sorted(known), n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else ""


def listed(words: Iterable[str]) -> str:
    """The words sorted and comma-separated, or `(none)`."""
    return ", ".join(sorted(words)) or "(none)"
