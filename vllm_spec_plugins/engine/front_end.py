"""What the front end tells of its engines: prices at `/metrics` and in single answers.

The front end is the process that holds the HTTP server (or the `LLM` object). It reads the
counters its engines' workers write (`shared_counters`).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vllm_spec_plugins.hookspecs import logger
from vllm_spec_plugins.shared_counters import COUNTED, CountersWriter, SharedCounters

if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily
    from vllm.config import VllmConfig

    from .carrier import PluginSpeculativeConfig

#: Name and meaning of each counter, in the order of `COUNTED`.
METRICS = {
    "vllm_spec_plugins:steps": "Verifications with at least one draft token, per request.",
    "vllm_spec_plugins:draft_tokens": "Draft tokens verified.",
    "vllm_spec_plugins:accepted_tokens": "Draft tokens accepted.",
    "vllm_spec_plugins:examined_tokens": "Draft tokens a verdict depended on: the accepted ones "
    "and the first rejected of each draft.",
    "vllm_spec_plugins:total_variation": "Total-variation distance to the target's law paid by "
    "relaxed verification, summed over draft tokens. Divided by examined_tokens: the mean price.",
}
LABELS = ("model_name", "engine", "proposer", "verifier")


@dataclass(frozen=True)
class Source:
    """The counters of one engine and its replicas.

    Attributes:
        path: Of the file.
        replicas: Data-parallel engines.
        model: As served.
        proposer: Name of the method that drafts.
        verifiers: Names, in the order of the counters.
    """

    path: str
    replicas: int
    model: str
    proposer: str
    verifiers: tuple[str, ...]

    @cached_property
    def counters(self) -> SharedCounters | None:
        """None on a machine that does not have the file."""
        try:
            return SharedCounters(self.path, self.replicas, len(self.verifiers))
        except (OSError, ValueError):
            return None


#: Engines whose configuration was made in, or sent to, this process, by path.
_SOURCES: dict[str, Source] = {}


def follow(source: Source) -> None:
    """Let this process tell of an engine's counters."""
    _SOURCES.setdefault(source.path, source)
    _register_collector()


def counters_writer(
    spec: PluginSpeculativeConfig, vllm_config: VllmConfig
) -> CountersWriter | None:
    """What a worker counts with; None where the front end is on another machine."""
    source = spec.counters
    if source.counters is None:
        logger.info(
            "The front end runs on another machine: /metrics will not show what this worker's "
            'verifiers cost. `collective_rpc("spec_plugins_metrics")` does.'
        )
        return None
    return CountersWriter(
        source.counters,
        vllm_config.parallel_config.data_parallel_index,
        source.verifiers,
        of_requests=vllm_config.observability_config.per_request_spec_decode_metrics != "none",
    )


@functools.cache
def _register_collector() -> None:
    from prometheus_client import REGISTRY

    REGISTRY.register(Collector())


class Collector:
    """Asked whenever somebody reads `/metrics`."""

    def describe(self) -> list[CounterMetricFamily]:
        """Nothing in advance: the registry would otherwise collect once to find out."""
        return []

    def collect(self) -> Iterator[CounterMetricFamily]:
        from prometheus_client.core import CounterMetricFamily

        # Several engines of a process may serve the same under the same labels.
        totals: defaultdict[tuple[str, ...], Any] = defaultdict(lambda: [0.0] * len(COUNTED))
        for source in list(_SOURCES.values()):
            if source.counters is None:
                continue
            for replica, by_verifier in enumerate(source.counters.methods.tolist()):
                for verifier, counts in zip(source.verifiers, by_verifier, strict=True):
                    key = (source.model, str(replica), source.proposer, verifier)
                    totals[key] = [a + b for a, b in zip(totals[key], counts, strict=True)]
        for column, (name, meaning) in enumerate(METRICS.items()):
            family = CounterMetricFamily(name, meaning, labels=LABELS)
            for key, counts in totals.items():
                family.add_metric(key, counts[column])
            yield family


def with_price(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `RequestState._new_completion_output`: acceptance metrics get the price."""

    @functools.wraps(original)
    def new_completion_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if output.spec_decode_metrics is not None:
            output.spec_decode_metrics = priced(output.spec_decode_metrics, self.request_id)
        return output

    return new_completion_output


def priced(metrics: Any, request_id: str) -> Any:
    """vLLM's metrics of one request with our three fields; as they are where we have none."""
    for source in list(_SOURCES.values()):
        found = source.counters.of_request(request_id) if source.counters else None
        if found is not None:
            verifier, examined, price = found
            return _priced_metrics()(
                **{field.name: getattr(metrics, field.name) for field in fields(metrics)},
                verifier=source.verifiers[verifier],
                num_examined_draft_tokens=round(examined),
                total_variation_price=price / examined if examined else 0.0,
            )
    return metrics


@functools.cache
def _priced_metrics() -> type[Any]:
    """Made when first needed: vLLM's class is not imported in every process."""
    from vllm.v1.metrics.stats import RequestSpecDecodeMetrics

    @dataclass
    class PricedSpecDecodeMetrics(RequestSpecDecodeMetrics):
        """vLLM's acceptance metrics of one request, and what its verifier cost.

        Attributes:
            verifier: Name of the verifier it was served with.
            num_examined_draft_tokens: The accepted ones and the first rejected of each draft.
            total_variation_price: Mean distance to the target's law per examined draft token.
        """

        verifier: str = ""
        num_examined_draft_tokens: int = 0
        total_variation_price: float = 0.0

        def to_dict(self) -> dict[str, Any]:
            ours = {
                "verifier": self.verifier,
                "num_examined_draft_tokens": self.num_examined_draft_tokens,
                "total_variation_price": self.total_variation_price,
            }
            return {**super().to_dict(), **ours}

    return PricedSpecDecodeMetrics
