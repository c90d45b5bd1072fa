"""Lifecycle hooks for observers (pluggy).

An observer watches; it decides nothing. Metrics and the step trace are observers.
Register one under the entry point group `vllm_spec_plugins.observers`: a class without
constructor arguments, or a module. Observers live in the worker that drafts and verifies;
under tensor parallelism, in its first rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .context import EngineContext

PROJECT = "vllm_spec_plugins"
OBSERVERS = "vllm_spec_plugins.observers"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class StepRecord:
    """What one verification step did. Arrays are on the host.

    Attributes:
        proposer: Name of the method that drafted.
        request_ids: `[R]` every request that sampled a token in the step.
        verifiers: `[R]` name of the verifier used for each.
        num_draft: `[R]` draft tokens verified.
        num_accepted: `[R]` of those, accepted.
        token_ids: `[R, K+1]` emitted tokens: accepted drafts, the token after them, -1s.
        sources: Names of who drafted.
        source_of: `[R, K]` int8 index into `sources`, -1 where nothing was drafted.
        extra_acceptance: `[R]` total-variation price paid by a relaxed verifier, summed over
            the positions of the step; None when all were lossless.
    """

    proposer: str
    request_ids: Sequence[str]
    verifiers: Sequence[str]
    num_draft: NDArray[np.int64]
    num_accepted: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    sources: tuple[str, ...]
    source_of: NDArray[np.int8]
    extra_acceptance: NDArray[np.float64] | None

    @cached_property
    def accepted_by_source(self) -> dict[str, int]:
        """Accepted draft tokens of each source."""
        import numpy as np

        if not self.source_of.size:
            return {}
        stands = np.arange(self.source_of.shape[1]) < self.num_accepted[:, None]
        counts = np.bincount(self.source_of[stands & (self.source_of >= 0)])
        return {name: int(n) for name, n in zip(self.sources, counts, strict=False) if n}


@hookspec
def spec_engine_ready(context: EngineContext, proposer: str, verifier: str) -> None:
    """The engine can draft and verify; the target's weights are loaded."""


@hookspec
def spec_step_finished(step: StepRecord) -> None:
    """A verification step is over. On the hot path: do little."""


@hookspec
def spec_request_finished(request_id: str) -> None:
    """A request finished or was aborted. Not called for preemption."""


def plugin_manager() -> pluggy.PluginManager:
    """A manager with every installed observer registered; one that fails is warned about."""
    import logging
    from importlib.metadata import entry_points

    from . import hookspecs

    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    for point in entry_points(group=OBSERVERS):
        try:
            observer = point.load()
            manager.register(observer() if isinstance(observer, type) else observer, point.name)
        except Exception as error:  # noqa: BLE001 - third-party code may raise anything
            logging.getLogger(__name__).warning(
                'The observer "%s" (%s) cannot be used: %s: %s',
                point.name, point.value, type(error).__name__, error,
            )  # fmt: skip
    return manager
