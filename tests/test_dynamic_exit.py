"""Length controller `del`: against the best fixed exit and length, and how it stops."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from vllm_spec_plugins.context import EngineContext, ModelFacts
from vllm_spec_plugins.dynamic_exit import DynamicExit, DynamicExitOptions
from vllm_spec_plugins.exit_selection import ExitCosts, ExitSelection
from vllm_spec_plugins.length_control import RequestKeys, Signals
from vllm_spec_plugins.registry import Kind, installed

LAYERS = (2, 4, 8, 12)
MOST = 8
FACTS = ModelFacts(
    model="toy",
    vocab_size=16,
    hidden_size=8,
    num_layers=16,
    max_model_len=1024,
    num_speculative_tokens=MOST,
)
CONTEXT = EngineContext(FACTS, torch.device("cpu"), max_num_requests=8, seed=0)


def keys(*request_ids: str) -> RequestKeys:
    count = len(request_ids)
    return RequestKeys(request_ids, np.arange(count), np.full(count, 10))


def costs(slope: float, draft: float = 1.0) -> ExitCosts:
    """Draft steps in proportion to layers; each verified token costs `slope` more."""
    share = (np.array(LAYERS) + 1) / (FACTS.num_layers + 1)
    verify = 1 + slope * np.arange(MOST + 1)
    return ExitCosts(np.ones(1, dtype=np.int64), draft * share[None], verify[None])


def controller(exit_costs: ExitCosts, **options: object) -> DynamicExit:
    made = DynamicExit(DynamicExitOptions.model_validate(options), CONTEXT)
    made.set_exits(ExitSelection(LAYERS, exit_costs, MOST, CONTEXT.max_num_requests))
    return made


@dataclass
class World:
    """Requests whose exits agree with a greedy target at known rates, and what steps cost.

    Attributes:
        rates: `[R, E]` chance that the draft of an exit agrees at a position.
        costs: Of drafting and verifying.
        informative: Whether an exit is more confident where it agrees, or, "by request", for
            requests of which it knows more.
    """

    rates: NDArray[np.float64]
    costs: ExitCosts
    informative: bool | Literal["by request"] = True
    generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def positions(self, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """`[R, count, E]` agreement and confidences of positions to come."""
        size = (len(self.rates), count, 1)
        # One hardness per position: where a shallow exit agrees, a deeper one mostly does, too.
        hardness = self.generator.random(size)
        agreement = (hardness < self.rates[:, None]).astype(np.float64)
        noise = self.generator.random((*size[:2], len(LAYERS)))
        if self.informative == "by request":
            return agreement, np.clip(self.rates[:, None] + 0.1 * (noise - 0.5), 0, 1)
        if self.informative:
            return agreement, np.where(agreement > 0, 1 - noise**2 * 0.8, noise * 0.8)
        return agreement, noise

    def cost(self, layer: int, lengths: NDArray[np.int64]) -> float:
        """Of a step in which each request drafts so many tokens, in plain steps."""
        draft, verify = self.costs.at(len(lengths))
        return lengths.max() * draft[LAYERS.index(layer)] + verify[lengths].mean()

    def serve(self, control: DynamicExit, steps: int) -> Served:
        """Draft and verify for so many steps."""
        names = [f"r{i}" for i in range(len(self.rates))]
        assert control.selection is not None
        served = Served(*self.costs.at(len(names)))
        for _ in range(steps):
            limits = control.limits(keys(*names))
            exit_ = LAYERS.index(control.layer)
            agreement, confidences = self.positions(MOST + 1)
            drafted = np.zeros(len(names), dtype=np.int64)
            drafting = np.flatnonzero(limits)
            for position in range(MOST):
                if not len(drafting):
                    break
                drafted[drafting] += 1
                stop = control.stop_after(
                    keys(*[names[i] for i in drafting]),
                    position,
                    confidences[drafting, position, exit_].astype(np.float32),
                )
                drafting = drafting[~stop & (drafted[drafting] < limits[drafting])]
            offered = np.arange(MOST + 1) < drafted[:, None]
            accepted = (offered & (agreement[:, :, exit_] > 0)).cumprod(axis=1).sum(axis=1)
            if control.selection.is_sampled(control.sample_every):
                of_request = np.repeat(np.arange(len(names)), accepted + 1)
                emitted = np.arange(MOST + 1) <= accepted[:, None]
                stood = agreement[emitted]
                control.selection.observe(names, of_request, stood, stood, confidences[emitted])
            served.tokens.append(float((accepted + 1).mean()))
            served.costs.append(self.cost(control.layer, drafted))
            served.layers.append(control.layer)
            served.drafted.append(drafted)
            served.runs.append(agreement[:, :MOST].cumprod(axis=1).sum(axis=1))
        return served


@dataclass
class Served:
    """What each step gave and cost, per request and relative to a plain step.

    Attributes:
        draft: `[E]` cost of a draft step.
        verify: `[K+1]` cost of verifying so many tokens.
        tokens: Emitted, of each step.
        costs: Of each step.
        layers: Drafted after, in each step.
        drafted: `[R]` tokens of each step.
        runs: `[R, E]` tokens, of each step, that a draft after each exit would have got right.
    """

    draft: NDArray[np.float64]
    verify: NDArray[np.float64]
    tokens: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    drafted: list[NDArray[np.int64]] = field(default_factory=list)
    runs: list[NDArray[np.float64]] = field(default_factory=list)

    def speed(self, first: int = 0) -> float:
        """Tokens per cost from some step on; 1 = plain decoding."""
        return sum(self.tokens[first:]) / sum(self.costs[first:])

    def best_fixed(self, first: int = 0) -> float:
        """The same, of the best exit and length in hindsight."""
        runs = np.array(self.runs[first:])
        tokens = [1 + np.minimum(runs, length).mean(axis=(0, 1)) for length in range(MOST + 1)]
        length = np.arange(MOST + 1)[:, None]
        return (np.array(tokens) / (self.verify[:, None] + length * self.draft)).max()

    def share(self, first: int = 0) -> float:
        """Speed relative to the best in hindsight."""
        return self.speed(first) / self.best_fixed(first)


STEEP, FLAT, LOW = (0.6, 0.72, 0.85, 0.93), (0.65, 0.68, 0.71, 0.74), (0.1, 0.2, 0.3, 0.4)
RATES = {"steep": STEEP, "flat": FLAT, "low": LOW}
COSTS = {
    "memory-bound": costs(0.02),
    "dear verification": costs(0.25),
    "dear drafts": costs(0.02, 1.6),
    "cheap drafts": costs(0.05, 0.3),
}


def test_registered() -> None:
    assert installed().load(Kind.LENGTH_CONTROLLER, "del") is DynamicExit
    assert DynamicExit.needs == Signals.CONFIDENCES | Signals.EXITS


# --- against the best fixed exit and length, known in hindsight ---


@pytest.mark.parametrize(("num_requests", "steps"), [(1, 1600), (8, 500)])
@pytest.mark.parametrize("exit_costs", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
def test_matches_the_best_fixed_choice(
    rates: tuple[float, ...], exit_costs: ExitCosts, num_requests: int, steps: int
) -> None:
    world = World(np.tile(rates, (num_requests, 1)), exit_costs)
    assert world.serve(controller(exit_costs), steps).share(first=100) >= 0.97


@pytest.mark.parametrize("exit_costs", COSTS.values(), ids=COSTS)
def test_confidence_that_tells_nothing_costs_nothing(exit_costs: ExitCosts) -> None:
    world = World(np.tile(FLAT, (1, 1)), exit_costs, informative=False)
    assert world.serve(controller(exit_costs), 1600).share(first=100) >= 0.97


@pytest.mark.parametrize("num_requests", [2, 8])
def test_what_requests_are_known_for_is_not_told_twice(num_requests: int) -> None:
    """Their confidences tell easy requests from hard ones, and no more than their rates do."""
    rates = np.array([(0.85, 0.88, 0.9, 0.92), (0.5, 0.55, 0.6, 0.62)] * (num_requests // 2))
    shares = [
        World(rates, costs(0.1, 0.5), "by request", np.random.default_rng(seed))
        .serve(controller(costs(0.1, 0.5)), 2400 // num_requests)
        .share(first=100)
        for seed in range(2)
    ]
    assert np.mean(shares) >= 1


def test_confidence_gains_where_it_tells() -> None:
    speeds = []
    for calibrated in (True, False):
        world = World(np.tile(FLAT, (1, 1)), costs(0.1))
        control = controller(world.costs, calibrated=calibrated)
        speeds.append(world.serve(control, 1000).speed(first=100))
    assert speeds[0] > 1.02 * speeds[1]


@pytest.mark.parametrize("exit_costs", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize(
    ("before", "after"), [("steep", "low"), ("low", "steep"), ("flat", "steep"), ("steep", "flat")]
)
def test_follows_a_change(exit_costs: ExitCosts, before: str, after: str) -> None:
    control = controller(exit_costs)
    first = World(np.tile(RATES[before], (8, 1)), exit_costs)
    then = World(np.tile(RATES[after], (8, 1)), exit_costs, generator=np.random.default_rng(1))
    first.serve(control, 400)
    assert then.serve(control, 600).share(first=200) >= 0.97


def test_a_mixed_batch_is_served_at_least_as_well_as_by_one_length() -> None:
    world = World(np.array([STEEP] * 3 + [LOW] * 3 + [FLAT] * 2), costs(0.1, 0.3))
    served = world.serve(controller(world.costs), 800)
    assert served.share(first=100) >= 0.99
    lengths = np.mean(served.drafted[100:], axis=0)
    assert lengths[3:6].max() < lengths[:3].min()  # the low ones draft less


@pytest.mark.parametrize("num_requests", [1, 8])
def test_hardly_drafts_where_drafting_loses(num_requests: int) -> None:
    world = World(np.tile(LOW, (num_requests, 1)), costs(0.25))
    served = world.serve(controller(world.costs), 1000)
    assert served.best_fixed() == 1
    assert np.mean(served.drafted[100:]) < 0.01
    assert served.speed(first=100) > 0.995


def test_shadow_tokens_of_some_steps_suffice() -> None:
    rare, often = controller(COSTS["cheap drafts"], sample_every=16), controller(costs(0))
    assert (rare.sample_every, often.sample_every) == (16, 4)
    world = World(np.tile(STEEP, (8, 1)), COSTS["cheap drafts"])
    assert world.serve(rare, 1000).share(first=300) >= 0.97


# --- rounds ---


def test_first_round_drafts_one_token() -> None:
    early = DynamicExit(DynamicExitOptions.model_validate({}), CONTEXT)
    assert early.limits(keys("a", "b")).tolist() == [1, 1]  # before there are exits
    control = controller(costs(0.0, 0.1))
    assert control.layer in LAYERS
    assert control.limits(keys("a")).tolist() == [1]
    assert not control.stop_after(keys("a"), 0, np.zeros(1, dtype=np.float32)).any()
    World(np.tile(STEEP, (1, 1)), costs(0.0, 0.1)).serve(control, 200)
    assert control.limits(keys("new"))[0] > 1  # the mean of the others knows better
    assert control.limits(keys()).tolist() == []


def test_every_doubt_counts() -> None:
    """The same confidence at every token of a draft: the lower, the sooner it ends."""
    control = controller(costs(0.02, 0.3))
    World(np.tile(FLAT, (1, 1)), costs(0.02, 0.3)).serve(control, 300)

    def drafted(confidence: float) -> int:
        control.limits(keys("r0"))
        doubt = np.full(1, confidence, dtype=np.float32)
        for step in range(MOST - 1):
            if control.stop_after(keys("r0"), step, doubt).any():
                return step + 1
        return MOST

    lengths = [drafted(confidence) for confidence in (0.05, 0.7, 0.99)]
    assert lengths == sorted(lengths)
    assert lengths[0] <= 2
    assert lengths[-1] == MOST


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_doubts_of_one_request_are_not_anothers(order: tuple[int, int]) -> None:
    control = controller(costs(0.1, 0.05))
    World(np.tile(FLAT, (2, 1)), costs(0.1, 0.05)).serve(control, 300)
    names, confidences = np.array(["r0", "r1"]), np.array([0.05, 0.99], dtype=np.float32)
    both = keys(*names[list(order)].tolist())
    assert (control.limits(both) == MOST).all()
    for step in range(3):
        stops = control.stop_after(both, step, confidences[list(order)])
    assert stops[order.index(0)]
    assert not stops[order.index(1)]
    control.limits(both)  # the next round starts anew
    assert not control.stop_after(both, 0, np.full(2, 0.99, dtype=np.float32)).any()


def test_without_confidence_the_length_is_that_chosen() -> None:
    control = controller(costs(0.1), calibrated=False)
    World(np.tile(STEEP, (1, 1)), costs(0.1)).serve(control, 300)
    assert control.selection is not None
    limits = control.limits(keys("r0"))
    assert 1 < limits[0] < MOST
    assert limits.tolist() == control.selection.choose(["r0"]).lengths.tolist()
    assert not control.stop_after(keys("r0"), 0, np.zeros(1, dtype=np.float32)).any()


def test_finish_forgets() -> None:
    control = controller(costs(0.1))
    World(np.array([STEEP, LOW]), costs(0.1)).serve(control, 100)
    assert control.selection is not None
    control.finish(["r0", "r1", "never seen"])
    assert len(control.selection._table) == len(control._table) == 0
    early = DynamicExit(DynamicExitOptions.model_validate({}), CONTEXT)
    early.finish(["a"])  # before there are exits


def test_discount_is_that_of_the_option() -> None:
    def after_a_change(discount: float) -> float:
        control = controller(costs(0.1), discount=discount)
        assert control.selection is not None
        for agreement in (1.0, 0.0):
            for _ in range(20):
                table = np.full((1, len(LAYERS)), agreement)
                control.selection.observe(["a"], np.zeros(1, dtype=np.int64), *[table] * 3)
        return control.selection.rates(["a"]).max()

    assert after_a_change(0.5) < 0.4 < after_a_change(1.0)


@pytest.mark.parametrize(
    "options", [{"sample_every": 0}, {"discount": 0.0}, {"discount": 1.1}, {"threshold": 0.5}]
)
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DynamicExitOptions.model_validate(options)


def test_ranks_choose_alike() -> None:
    facts = replace(FACTS, tensor_parallel_size=2)
    pair = []
    for _ in range(2):
        control = DynamicExit(DynamicExitOptions.model_validate({}), replace(CONTEXT, facts=facts))
        layer_costs = ExitCosts.from_layers(LAYERS, FACTS.num_layers, 1, MOST)
        control.set_exits(ExitSelection(LAYERS, layer_costs, MOST, CONTEXT.max_num_requests))
        served = World(np.array([STEEP, FLAT, LOW]), layer_costs).serve(control, 150)
        pair.append((served.layers, np.array(served.drafted).tolist()))
    assert pair[0] == pair[1]
