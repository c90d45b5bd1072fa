"""Lifecycle hooks for observers (pluggy).

An observer watches; it decides nothing. Metrics and the step trace are observers.
Register one under the entry point group `vllm_spec_plugins.observers`: a class without
constructor arguments, or a module. Observers live in the worker that drafts and verifies;
under tensor parallelism, in its first rank.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .context import EngineContext

PROJECT = "vllm_spec_plugins"
OBSERVERS = "vllm_spec_plugins.observers"

# Below "vllm", so that vLLM's handlers print it.
logger = logging.getLogger("vllm.spec_plugins")

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one verification step did, for the R requests that sampled a token. On the host.

    Lists, not arrays: at the batch sizes of one step they are what costs least to build.

    Attributes:
        proposer: Name of the method that drafted.
        request_ids: `[R]`.
        verifiers: `[R]` name of the verifier used for each.
        num_draft: `[R]` draft tokens verified.
        num_accepted: `[R]` of those, accepted.
        token_ids: `[R]` lists of the tokens emitted: accepted drafts, then the token after them.
        sources: Names of who may have drafted.
        source_of: `[R, K]` int8, index into `sources` of who drafted each token, or None where
            there is one source only. Columns past `num_draft` mean nothing.
        extra_acceptance: `[R]` total-variation price paid by a relaxed verifier, summed over
            the positions of the step; None when all were lossless.
    """

    proposer: str
    request_ids: Sequence[str]
    verifiers: Sequence[str]
    num_draft: Sequence[int]
    num_accepted: Sequence[int]
    token_ids: Sequence[Sequence[int]]
    sources: tuple[str, ...]
    source_of: NDArray[np.int8] | None
    extra_acceptance: Sequence[float] | None

    def sources_of_request(self, row: int) -> list[str]:
        """Who drafted each verified draft token of one request."""
        count = self.num_draft[row]
        if self.source_of is None:
            return [self.sources[0]] * count
        return [self.sources[i] for i in self.source_of[row, :count].tolist()]

    def accepted_by_source(self) -> dict[str, int]:
        """Accepted draft tokens of each source."""
        if self.source_of is None:
            return {self.sources[0]: sum(self.num_accepted)}
        accepted = [
            source
            for row, count in zip(self.source_of.tolist(), self.num_accepted, strict=True)
            for source in row[:count]
        ]
        return {name: accepted.count(i) for i, name in enumerate(self.sources)}


@hookspec
def spec_engine_ready(context: EngineContext, proposer: str, verifier: str) -> None:
    """The engine can draft and verify; the target's weights are loaded."""


@hookspec
def spec_step_finished(step: StepRecord) -> None:
    """A verification step is over. On the hot path: do little.

    Under asynchronous scheduling it may come from another thread than the other hooks; no two
    hooks are ever called at once.
    """


@hookspec
def spec_request_finished(request_id: str) -> None:
    """A request finished or was aborted. Not called for preemption."""


def plugin_manager() -> pluggy.PluginManager:
    """A manager with every installed observer registered; one that fails is warned about."""
    from importlib.metadata import entry_points

    from . import hookspecs

    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    for point in entry_points(group=OBSERVERS):
        observer = None
        try:
            observer = point.load()
            observer = observer() if isinstance(observer, type) else observer
            # By value: two packages may well call theirs "metrics".
            manager.register(observer, point.value)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - third parties raise anything
            if observer is not None and manager.is_registered(observer):
                manager.unregister(observer)
            logger.warning(
                'The observer "%s" (%s) cannot be used: %s: %s',
                point.name, point.value, type(error).__name__, error,
            )  # fmt: skip
    return manager


def tell(manager: pluggy.PluginManager, hook: str, **what: object) -> None:
    """Call a hook on every observer. One that fails is unregistered, alone; serving goes on.

    pluggy's own call would stop at the first failure and not say whose it was.
    """
    for implementation in getattr(manager.hook, hook).get_hookimpls():
        try:
            implementation.function(*(what[name] for name in implementation.argnames))
        except Exception:
            logger.exception(
                'The observer "%s" failed in %s and is removed.', implementation.plugin_name, hook
            )
            manager.unregister(implementation.plugin)
