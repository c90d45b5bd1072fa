"""`thompson`: as good as the best fixed length known in hindsight, seeded, and it recovers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vllm_spec_plugins.errors import ConfigError
from vllm_spec_plugins.length_control import RequestKeys, expected_speedups
from vllm_spec_plugins.registry import Kind, installed
from vllm_spec_plugins.step_cost import StepTime
from vllm_spec_plugins.testing import toy_context
from vllm_spec_plugins.thompson_sampling import Thompson, ThompsonOptions

MOST = 8
CONTEXT = replace(toy_context(num_speculative_tokens=MOST), max_num_requests=64)


def thompson(**options: Any) -> Thompson:
    return Thompson(ThompsonOptions.model_validate(options), CONTEXT)


def keys(names: list[str], positions: int | np.ndarray = 0) -> RequestKeys:
    streams = np.array([hash_of(name) for name in names], dtype=np.int64)
    return RequestKeys(names, streams, np.zeros(len(names), dtype=np.int64) + positions)


def hash_of(name: str) -> int:
    return int.from_bytes(name.encode().ljust(7, b"\0")[:7], "little")


# --- what it is worth ---


class Service:
    """Requests whose draft tokens are accepted at known rates, one plain step costing 1.

    Args:
        controller: Decides.
        rates: `[R]` mean chance that a draft token is accepted.
        cost: Of each draft token.
        variety: Concentration of the Beta law of the tokens' own chances around `rates`;
            None: all tokens of a request are alike.
        seed: Of everything drawn here.
    """

    def __init__(
        self,
        controller: Thompson,
        rates: np.ndarray,
        cost: float,
        variety: float | None = None,
        seed: int = 0,
    ) -> None:
        self.controller, self.rates, self.cost, self.variety = controller, rates, cost, variety
        self.generator = np.random.default_rng(seed)

    def serve(self, wave: int, num_tokens: int) -> np.ndarray:
        """`[R]` cost of each request's text: the requests of one wave, side by side."""
        count = len(self.rates)
        names = [f"{wave}-{i}" for i in range(count)]
        tokens, costs = np.zeros(count, dtype=np.int64), np.zeros(count)
        while (running := np.flatnonzero(tokens < num_tokens)).size:
            drafted, accepted = self._round([names[i] for i in running], running, tokens[running])
            tokens[running] += accepted + 1
            costs[running] += 1 + self.cost * drafted
        self.controller.finish(names)
        return costs / tokens

    def _round(
        self, names: list[str], requests: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        controller, rates = self.controller, self.rates[requests]
        asked = keys(names, positions)
        limits = controller.limits(asked)
        going, standing = limits > 0, np.ones(len(names), dtype=bool)
        drafted, accepted = np.zeros((2, len(names)), dtype=np.int64)
        for step in range(MOST):
            if not going.any():
                break
            chances = rates
            if self.variety is not None:
                chances = self.generator.beta(rates * self.variety, (1 - rates) * self.variety)
            standing &= ~going | (self.generator.random(len(names)) < chances)
            drafted += going
            accepted += going & standing
            going &= drafted < limits
            still = np.flatnonzero(going)
            # Overconfident, as heads are.
            confidences = np.sqrt(chances[still]).astype(np.float32)
            going[still] = ~controller.stop_after(asked.select(still), step, confidences)
        had = np.flatnonzero(drafted)
        controller.observe([names[i] for i in had], drafted[had], accepted[had])
        return drafted, accepted


RATES = np.array([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])


def relative_speeds(cost: float, variety: float | None, **options: Any) -> np.ndarray:
    """`[8]` speed at each of `RATES`, relative to the best fixed length of that rate."""
    waves = 6
    service = Service(thompson(cost_ratio=cost, **options), np.repeat(RATES, 8), cost, variety)
    seconds = np.mean([service.serve(wave, 256) for wave in range(waves)], axis=0)
    return 1 / seconds.reshape(8, 8).mean(axis=1) / expected_speedups(RATES, cost, MOST).max(axis=1)


@pytest.mark.parametrize("cost", [0.05, 0.1, 0.2, 0.3, 0.4])
@pytest.mark.parametrize("calibrated", [False, True])
def test_matches_the_best_fixed_length_in_hindsight(cost: float, calibrated: bool) -> None:
    """Each request against the length that is best for it: no one length could do that."""
    relative = relative_speeds(cost, None, calibrated=calibrated)
    assert relative.mean() > 0.97
    assert relative.min() > 0.94


@pytest.mark.parametrize("cost", [0.1, 0.3])
def test_confidences_beat_every_fixed_length(cost: float) -> None:
    with_them = relative_speeds(cost, 2.0)
    without = relative_speeds(cost, 2.0, calibrated=False)
    assert with_them.mean() > 1.0
    assert with_them.mean() > without.mean() + 0.01


def test_a_rule_that_ignores_costs_would_be_noticed() -> None:
    """Negative control: it believes in another cost than it pays."""
    service = Service(thompson(cost_ratio=0.02, calibrated=False), np.repeat(RATES, 8), 0.4)
    speeds = 1 / service.serve(0, 256).reshape(8, 8).mean(axis=1)
    assert (speeds / expected_speedups(RATES, 0.4, MOST).max(axis=1)).mean() < 0.9


def test_new_requests_start_from_the_mean_of_all() -> None:
    """The first text of a request is no slower once others were served."""
    rates = np.full(8, 0.9)
    service = Service(thompson(cost_ratio=0.1), rates, 0.1)
    best = expected_speedups(rates, 0.1, MOST).max()
    for wave in range(4):
        service.serve(wave, 128)
    short = np.mean([service.serve(wave, 16) for wave in range(4, 24)])
    # A text of 16 tokens ends in the middle of a draft: compare with the same length fixed.
    assert 1 / short > 0.94 * best


def test_probes_and_recovers() -> None:
    """A request that did not pay for long is drafted for again when it does."""
    controller = thompson(cost_ratio=0.3)
    name = ["a"]
    one = np.ones(1, dtype=np.int64)
    lengths = []
    for position in range(800):
        length = int(controller.limits(keys(name, position))[0] > 0)
        lengths.append(length)
        if length:
            controller.observe(name, one, one * (position >= 400))
    assert np.mean(lengths[100:400]) < 0.2
    assert np.mean(lengths[600:]) > 0.8


# --- that it is the same for all ranks, and in any company ---


def play(controller: Thompson, names: list[str], rounds: int = 30) -> list[list[int]]:
    """Lengths each request drafted, its tokens' confidences and verdicts being its own."""
    found = []
    for position in range(rounds):
        asked = keys(names, position)
        going = controller.limits(asked) > 0
        drafted = np.zeros(len(names), dtype=np.int64)
        for step in range(MOST):
            drafted += going
            still = np.flatnonzero(going)
            confidences = [(hash_of(names[i]) * (step + position + 1)) % 97 / 97 for i in still]
            stops = controller.stop_after(
                asked.select(still), step, np.array(confidences, dtype=np.float32)
            )
            going[still] = ~stops
        found.append(drafted.tolist())
        had = np.flatnonzero(drafted)
        accepted = np.array([(hash_of(names[i]) + position) % (drafted[i] + 1) for i in had])
        controller.observe([names[i] for i in had], drafted[had], accepted.astype(np.int64))
    return found


@pytest.mark.parametrize("calibrated", [False, True])
def test_same_history_same_lengths(calibrated: bool) -> None:
    names = ["a", "b", "c", "d"]
    first = play(thompson(cost_ratio=0.15, prior_strength=4.0, calibrated=calibrated), names)
    assert first == play(
        thompson(cost_ratio=0.15, prior_strength=4.0, calibrated=calibrated), names
    )
    assert len({length for lengths in first for length in lengths}) > 3
    backwards = play(
        thompson(cost_ratio=0.15, prior_strength=4.0, calibrated=calibrated), names[::-1]
    )
    assert [lengths[::-1] for lengths in backwards] == first


def test_draws_do_not_depend_on_the_company() -> None:
    """Before anything is learned from others, a request decides alone as in a batch."""
    unsure: dict[str, Any] = {"cost_ratio": 0.2, "prior_strength": 4.0}
    together = thompson(**unsure).limits(keys([f"r{i}" for i in range(40)], 9))
    alone = [int(thompson(**unsure).limits(keys([f"r{i}"], 9))[0]) for i in range(40)]
    assert together.tolist() == alone
    assert set(alone) == {0, MOST}


# --- memory, costs, options ---


def test_registered() -> None:
    assert installed().load(Kind.LENGTH_CONTROLLER, "thompson") is Thompson


def test_late_verdicts_do_not_bring_a_request_back() -> None:
    controller = thompson(cost_ratio=0.1)
    play(controller, ["a", "b"], rounds=3)
    controller.finish(["a", "never seen"])
    controller.observe(["a"], np.array([3]), np.array([2]))
    assert len(controller._table) == 1


def test_nobody_is_no_problem() -> None:
    controller = thompson(cost_ratio=0.1)
    assert controller.limits(keys([])).tolist() == []
    assert controller.stop_after(keys([]), 0, np.zeros(0, dtype=np.float32)).tolist() == []


def test_tokens_nobody_judged_teach_nothing() -> None:
    controller = thompson(cost_ratio=0.01)
    assert controller._bins is not None
    controller.limits(keys(["a"]))
    for step, confidence in enumerate([0.1, 0.3, 0.5, 0.7]):
        controller.stop_after(keys(["a"]), step, np.array([confidence], dtype=np.float32))
    # The fifth token's confidence is not told: it is the last anyway.
    controller.observe(["a"], np.array([5]), np.array([1]))
    assert controller._bins._seen.nonzero()[0].tolist() == [1, 4]
    assert controller._bins._accepted.nonzero()[0].tolist() == [1]
    controller.limits(keys(["a"], 2))
    controller.stop_after(keys(["a"], 2), 0, np.array([0.9], dtype=np.float32))
    controller.observe(["a"], np.array([5]), np.array([5]))
    assert controller._bins._seen.nonzero()[0].tolist() == [1, 4, 14]


def test_cost_is_measured() -> None:
    """A draft step takes a quarter of a plain step, whoever drafts along."""
    controller = thompson(calibrated=False)
    names, verify, each, rate = [f"r{i}" for i in range(4)], 0.010, 0.0025, 0.8
    generator, longest = np.random.default_rng(0), []
    for step in range(300):
        asked = keys(names, step)
        limits = controller.limits(asked)
        drafted, going = np.zeros(4, dtype=np.int64), limits > 0
        for index in range(MOST):
            drafted += going
            still = np.flatnonzero(going & (drafted < limits))
            going[:] = False
            stops = controller.stop_after(asked.select(still), index, np.ones(len(still), "f4"))
            going[still] = ~stops
        longest.append(int(drafted.max()))
        if drafted.any():
            accepted = (generator.random((4, MOST)) < rate).cumprod(axis=1).sum(axis=1)
            had = np.flatnonzero(drafted)
            controller.observe(
                [names[i] for i in had], drafted[had], np.minimum(accepted, drafted)[had]
            )
        drafting = each * longest[-1]
        controller.observe_step_time(
            StepTime(4, 4 + int(drafted.sum()), longest[-1], verify, drafting)
        )
    assert longest[0] == (MOST + 1) // 2  # neither is cut short while nothing is known
    speeds = [sum(rate**i for i in range(k + 1)) / (verify + each * k) for k in range(MOST + 1)]
    assert np.mean([speeds[k] for k in longest[100:]]) > 0.97 * max(speeds)


def test_tensor_parallel_needs_a_cost_ratio() -> None:
    facts = replace(CONTEXT.facts, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match=r'"thompson" measures .* {"name": "thompson", "cost'):
        Thompson.check(ThompsonOptions.model_validate({}), facts)
    Thompson.check(ThompsonOptions.model_validate({"cost_ratio": 0.1}), facts)


def test_no_option_is_ignored() -> None:
    with pytest.raises(ConfigError, match="calibrated is false"):
        thompson(calibrated=False, confidence_strength=4.0)
