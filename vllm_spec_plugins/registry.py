"""Entry points to classes, lazily. Ours come in the same way as anyone's.

Reading the registry imports no plugin. A plugin is imported when it is asked for, or when
somebody lists it; one that is broken disturbs only those who ask for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import ConfigError, PluginError, did_you_mean, listed


class Kind(Enum):
    """The three things a plugin can add. The value is the entry point group."""

    PROPOSER = "vllm_spec_plugins.proposers"
    VERIFIER = "vllm_spec_plugins.verifiers"
    LENGTH_CONTROLLER = "vllm_spec_plugins.length_controllers"

    @property
    def noun(self) -> str:
        return self.name.lower().replace("_", " ")

    @property
    def base(self) -> type:
        """The class a plugin of this kind derives from."""
        from .length_control import LengthController
        from .proposer import Proposer
        from .verifier import Verifier

        return {
            Kind.PROPOSER: Proposer,
            Kind.VERIFIER: Verifier,
            Kind.LENGTH_CONTROLLER: LengthController,
        }[self]


#: Names vLLM 0.32 and 0.33 use for methods of their own. `engine.carrier` adds whatever the
#: installed vLLM knows; this list is for when it cannot be asked.
VLLM_METHODS = frozenset(
    {
        "custom_class",
        "dflash",
        "draft_model",
        "dspark",
        "eagle",
        "eagle3",
        "extract_hidden_states",
        "medusa",
        "mlp_speculator",
        "mtp",
        "ngram",
        "ngram_gpu",
        "suffix",
    }
)


@dataclass(frozen=True, slots=True)
class PluginEntry:
    """One entry point.

    Attributes:
        kind: What it adds.
        name: What a user writes.
        value: `module:Class`.
        distribution: The installed package it comes from.
        version: Of that package.
        problem: Why it cannot be used, as far as can be said without importing it.
    """

    kind: Kind
    name: str
    value: str
    distribution: str
    version: str
    problem: str | None = None

    @property
    def origin(self) -> str:
        return f"{self.distribution} {self.version}".strip()


class Registry:
    """All installed plugins.

    Args:
        points: Entry points to read instead of the installed ones (for tests).
        reserved: Method names that belong to vLLM.
    """

    def __init__(
        self, points: Iterable[EntryPoint] | None = None, reserved: Iterable[str] = VLLM_METHODS
    ) -> None:
        self.reserved = frozenset(reserved)
        found = [p for k in Kind for p in entry_points(group=k.value)] if points is None else points
        self._entries: dict[Kind, dict[str, PluginEntry]] = {kind: {} for kind in Kind}
        self._points: dict[tuple[Kind, str], EntryPoint] = {}
        for point in found:
            self._add(Kind(point.group), point)

    def _add(self, kind: Kind, point: EntryPoint) -> None:
        distribution = point.dist.name if point.dist else "(unknown package)"
        version = point.dist.version if point.dist else ""
        problem = None
        if kind is Kind.PROPOSER and point.name in self.reserved:
            problem = (
                f'the package {distribution} registers the {kind.noun} "{point.name}", a name '
                "reserved for vLLM's own method; its author must choose another"
            )
        entry = PluginEntry(kind, point.name, point.value, distribution, version, problem)
        known = self._entries[kind].get(point.name)
        if known and (known.value, known.distribution) != (entry.value, entry.distribution):
            problem = (
                f'two installed packages register the {kind.noun} "{point.name}": '
                f"{known.origin} ({known.value}) and {entry.origin} ({entry.value}); "
                "uninstall one of them"
            )
            entry = PluginEntry(kind, point.name, point.value, distribution, version, problem)
        self._entries[kind][point.name] = entry
        self._points[kind, point.name] = point

    def entries(self, kind: Kind) -> list[PluginEntry]:
        """Everything registered, sorted by name. Imports nothing."""
        return sorted(self._entries[kind].values(), key=lambda entry: entry.name)

    def names(self, kind: Kind) -> list[str]:
        """What a user may write for this kind."""
        hidden = self.reserved if kind is Kind.PROPOSER else frozenset()
        return [entry.name for entry in self.entries(kind) if entry.name not in hidden]

    def get(self, kind: Kind, name: str) -> PluginEntry:
        """Raises `ConfigError` with the nearest name when there is none."""
        entry = self._entries[kind].get(name)
        if entry is None:
            raise ConfigError(
                f'Unknown {kind.noun} "{name}".{did_you_mean(name, self.names(kind))} '
                f"Installed: {listed(self.names(kind))}. `vllm-spec list` describes them."
            )
        return entry

    def load(self, kind: Kind, name: str) -> type[Any]:
        """Import a plugin and hold it to its contract.

        Raises:
            ConfigError: Nobody registered the name.
            PluginError: It cannot be imported, clashes, or does not meet the contract.
        """
        entry = self.get(kind, name)
        problem, plugin = entry.problem, None
        if problem is None:
            try:
                plugin = self._points[kind, name].load()
            except (Exception, SystemExit) as error:  # noqa: BLE001 - third parties raise anything
                problem = f"importing {entry.value} failed: {type(error).__name__}: {error}"
            else:
                problem = contract_problem(kind, plugin)
        if problem is not None or plugin is None:
            raise PluginError(
                f'The {kind.noun} "{name}" from {entry.origin} cannot be used: {problem}.'
            )
        return plugin


def contract_problem(kind: Kind, plugin: object) -> str | None:
    """What keeps an object from being a plugin of this kind, or None."""
    base = kind.base
    if not (inspect.isclass(plugin) and issubclass(plugin, base)):
        return f"{plugin!r} is not a subclass of {base.__module__}.{base.__name__}"
    missing = sorted(getattr(plugin, "__abstractmethods__", ()))
    if missing:
        return f"{plugin.__name__} does not define {', '.join(missing)}"
    options, expected = getattr(plugin, "Options", None), base.Options  # pyright: ignore[reportAttributeAccessIssue]
    if not (inspect.isclass(options) and issubclass(options, expected)):
        return f"{plugin.__name__}.Options is not a subclass of {expected.__name__}"
    from .engine_proposer import EngineProposer
    from .verifier import Guarantee

    if issubclass(plugin, EngineProposer) and not isinstance(
        getattr(plugin, "engine_method", None), str
    ):
        return f"{plugin.__name__}.engine_method is not the name of a method of vLLM's"
    if kind is Kind.VERIFIER and not isinstance(getattr(plugin, "guarantee", None), Guarantee):
        return f"{plugin.__name__}.guarantee is not one of {listed(str(g) for g in Guarantee)}"
    return None


@cache
def installed() -> Registry:
    """The registry of this environment, read once."""
    return Registry()
