"""Length controllers: bounds, adaptation, memory, and that they choose the best length."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_spec_plugins.context import EngineContext, ModelFacts
from vllm_spec_plugins.errors import ConfigError
from vllm_spec_plugins.length_control import (
    Additive,
    AdditiveOptions,
    ExpectedSpeedup,
    ExpectedSpeedupOptions,
    Fixed,
    LengthController,
    LengthControlOptions,
    RequestKeys,
    best_lengths,
)
from vllm_spec_plugins.registry import Kind, installed
from vllm_spec_plugins.request_table import RequestTable
from vllm_spec_plugins.step_cost import StepTime

FACTS = ModelFacts(
    model="toy",
    vocab_size=16,
    hidden_size=8,
    num_layers=2,
    max_model_len=1024,
    num_speculative_tokens=6,
)
CONTEXT = EngineContext(FACTS, torch.device("cpu"), max_num_requests=4, seed=0)
PARALLEL = replace(CONTEXT, facts=replace(FACTS, tensor_parallel_size=2))


def counts(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def keys(*request_ids: str) -> RequestKeys:
    """Requests as controllers are asked about them; those here draw no random numbers."""
    zeros = np.zeros(len(request_ids), dtype=np.int64)
    return RequestKeys(request_ids, zeros, zeros)


def additive(**options: int) -> Additive:
    return Additive(AdditiveOptions(**options), CONTEXT)


def speedup(**options: float) -> ExpectedSpeedup:
    return ExpectedSpeedup(ExpectedSpeedupOptions.model_validate(options), CONTEXT)


def test_fixed() -> None:
    controller = Fixed(LengthControlOptions(), CONTEXT)
    assert controller.limits(keys("a", "b")).tolist() == [6, 6]
    assert controller.limits(keys()).tolist() == []


@pytest.mark.parametrize("name", ["fixed", "additive", "expected_speedup"])
def test_registered(name: str) -> None:
    assert issubclass(installed().load(Kind.LENGTH_CONTROLLER, name), LengthController)


# --- additive ---


def test_additive_starts_at_the_maximum_or_where_it_is_told() -> None:
    assert additive().limits(keys("a")).tolist() == [6]
    assert additive(maximum=4).limits(keys("a")).tolist() == [4]
    assert additive(start=2).limits(keys("a")).tolist() == [2]


def test_additive_steps_up_and_down_for_each_request() -> None:
    controller = additive(start=3, minimum=2, maximum=5, increase=2, decrease=1)
    controller.limits(keys("a", "b"))
    controller.observe(["b", "a"], counts(3, 3), counts(3, 2))
    assert controller.limits(keys("a", "b")).tolist() == [2, 5]
    controller.observe(["a", "b"], counts(2, 5), counts(0, 5))
    assert controller.limits(keys("a", "b")).tolist() == [2, 5]  # at the bounds


def test_additive_forgets() -> None:
    controller = additive(start=3)
    controller.limits(keys("a"))
    controller.observe(["a"], counts(3), counts(0))
    controller.finish(["a", "never seen"])
    # A verdict that arrives late must not bring the request back.
    controller.observe(["a"], counts(3), counts(0))
    assert len(controller._lengths) == 0
    assert controller.limits(keys("a")).tolist() == [3]


@given(
    st.integers(1, 6),
    st.integers(0, 5),
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=40),
)
def test_additive_stays_within_bounds(
    minimum: int, width: int, verdicts: list[tuple[int, int]]
) -> None:
    maximum = min(minimum + width, 6)
    controller = additive(minimum=minimum, maximum=maximum, increase=2, decrease=3)
    for drafted, accepted in verdicts:
        (before,) = controller.limits(keys("a"))
        controller.observe(["a"], counts(drafted), counts(min(drafted, accepted)))
        (after,) = controller.limits(keys("a"))
        assert minimum <= after <= maximum
        assert (after >= before) == (accepted >= drafted) or after == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maximum": 7}, "num_speculative_tokens is 6"),
        ({"minimum": 7}, "start must lie between"),
        ({"start": 1, "minimum": 2}, "start must lie between"),
        ({"start": 5, "maximum": 4}, "start must lie between"),
    ],
)
def test_additive_refuses(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Additive.check(AdditiveOptions(**options), FACTS)
    with pytest.raises(ConfigError, match=message):
        additive(**options)


@pytest.mark.parametrize("options", [{"minimum": 0}, {"increase": 0}, {"star": 3}, {"start": "3"}])
def test_additive_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AdditiveOptions.model_validate(options)


# --- expected speed-up ---


@given(
    st.floats(0, 1),
    st.floats(1e-4, 3),
    st.integers(0, 12),
)
def test_best_length_is_the_best(acceptance: float, cost: float, most: int) -> None:
    (chosen,) = best_lengths(np.array([acceptance]), cost, most)
    value = [sum(acceptance**i for i in range(k + 1)) / (k * cost + 1) for k in range(most + 1)]
    assert value[chosen] == pytest.approx(max(value), rel=1e-12)


def test_best_length_agrees_with_the_closed_form() -> None:
    a, c = 0.8, 0.1
    closed = [(1 - a ** (k + 1)) / ((1 - a) * (k * c + 1)) for k in range(13)]
    assert best_lengths(np.array([a]), c, 12).tolist() == [int(np.argmax(closed))] == [6]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.floats(1e-3, 2))
def test_better_drafts_are_longer_and_dearer_ones_shorter(rates: list[float], cost: float) -> None:
    acceptance = np.sort(np.array(rates))
    lengths = best_lengths(acceptance, cost, 8)
    assert (np.diff(lengths) >= 0).all()
    assert (best_lengths(acceptance, cost * 1.5, 8) <= lengths).all()


def test_nothing_is_drafted_where_it_does_not_pay() -> None:
    # One token pays if its chance exceeds its cost.
    assert best_lengths(np.array([0.29, 0.31, 0.0, 1.0]), 0.3, 6).tolist() == [0, 1, 0, 6]


def test_expected_speedup_adapts_to_each_request() -> None:
    controller = speedup(cost_ratio=0.15)
    for _ in range(60):
        controller.limits(keys("good", "bad"))
        controller.observe(["good", "bad"], counts(4, 2), counts(4, 0))
    good, bad = controller.acceptance(["good", "bad"])
    assert good > 0.9
    assert bad < 0.15
    assert controller.limits(keys("good", "bad")).tolist() == [6, 0]


def test_estimate_converges_to_the_acceptance_rate() -> None:
    controller = speedup(cost_ratio=0.1, discount=1.0)
    generator = np.random.default_rng(0)
    for _ in range(3000):
        controller.limits(keys("a"))
        accepted = int((generator.random(4) < 0.7).cumprod().sum())
        controller.observe(["a"], counts(4), counts(accepted))
    assert controller.acceptance(["a"])[0] == pytest.approx(0.7, abs=0.02)


def test_new_request_starts_from_the_mean_of_all() -> None:
    controller = speedup(cost_ratio=0.1, initial_acceptance=0.6)
    assert controller.acceptance(["first"])[0] == pytest.approx(0.6)
    for _ in range(200):
        controller.observe(["first"], counts(5), counts(5))
    assert controller.acceptance(["new"])[0] > 0.95


def test_old_evidence_fades() -> None:
    controller = speedup(cost_ratio=0.1, discount=0.8)
    controller.limits(keys("a"))
    for _ in range(50):
        controller.observe(["a"], counts(4), counts(4))
    before = controller.acceptance(["a"])[0]
    for _ in range(10):
        controller.observe(["a"], counts(4), counts(0))
    assert before > 0.9
    assert controller.acceptance(["a"])[0] < 0.6


def test_probes_now_and_then_and_recovers() -> None:
    controller = speedup(cost_ratio=0.5, probe_every=5, initial_acceptance=0.1)
    lengths = [int(controller.limits(keys("a"))[0]) for _ in range(15)]
    assert lengths == [0, 0, 0, 0, 1] * 3
    for _ in range(30):  # from now on, every probe succeeds
        for _ in range(5):
            if controller.limits(keys("a"))[0]:
                controller.observe(["a"], counts(1), counts(1))
    assert controller.limits(keys("a"))[0] >= 1


def test_the_mean_counts_for_more_where_requests_do_not_differ() -> None:
    def learned(rates: list[float]) -> float:
        controller, generator = speedup(cost_ratio=0.1), np.random.default_rng(0)
        names = [f"r{i}" for i in range(len(rates))]
        controller.limits(keys(*names))
        for _ in range(200):
            drawn = generator.random((len(rates), 6)) < np.array(rates)[:, None]
            controller.observe(names, counts(*[6] * len(rates)), drawn.cumprod(axis=1).sum(axis=1))
        return controller.prior_strength

    assert learned([0.7] * 8) > 30
    assert learned([0.3, 0.9] * 4) < 5
    assert speedup(prior_strength=7.0).prior_strength == 7


def test_in_a_batch_where_drafting_loses_one_request_tries_now_and_then() -> None:
    """A draft step takes its time whoever drafts: taking turns, few steps would be without."""
    controller = speedup(probe_every=4)
    names, drafted_steps = [f"r{i}" for i in range(6)], []
    for _ in range(200):
        lengths = controller.limits(keys(*names))
        longest, total = int(lengths.max()), int(lengths.sum())
        drafted_steps.append(total)
        time = StepTime(6, 6 + total, longest, 0.010 + 0.010 * total / 6, 0.020 * longest)
        controller.observe_step_time(time)
        had = np.flatnonzero(lengths)
        controller.observe(
            [names[i] for i in had], lengths[had], np.zeros(len(had), dtype=np.int64)
        )
    assert set(drafted_steps[20:]) == {0, 1}
    assert sum(drafted_steps[40:]) == 10  # one step of sixteen


def test_expected_speedup_forgets() -> None:
    controller = speedup(cost_ratio=0.1)
    controller.limits(keys("a"))
    for _ in range(50):
        controller.observe(["a"], counts(4), counts(0))
    controller.finish(["a"])
    controller.observe(["a"], counts(4), counts(0))
    assert len(controller._table) == 0


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 9), unique=True, max_size=6), st.integers(0, 6)),
        max_size=30,
    ),
    st.sampled_from([None, 0.05, 0.4]),
)
def test_expected_speedup_is_deterministic_and_within_bounds(
    steps: list[tuple[list[int], int]], cost: float | None
) -> None:
    options = {} if cost is None else {"cost_ratio": cost}
    pair = [speedup(**options), speedup(**options)]
    for numbers, accepted in steps:
        ids = [str(n) for n in numbers]
        lengths = [controller.limits(keys(*ids)) for controller in pair]
        assert (lengths[0] == lengths[1]).all()
        assert ((lengths[0] >= 0) & (lengths[0] <= 6)).all()
        drafted = np.maximum(lengths[0], 1)
        for controller in pair:
            controller.observe(ids, drafted, np.minimum(drafted, accepted))
            tokens, longest = len(ids) + int(drafted.sum()), int(drafted.max(initial=0))
            if ids:
                time = StepTime(len(ids), tokens, longest, 0.01 + 0.001 * accepted, 0.002 * longest)
                controller.observe_step_time(time)
            controller.finish([i for i in ids if int(i) % 3 == accepted % 3])


def test_verdicts_of_a_request_do_not_depend_on_its_place_in_the_batch() -> None:
    ids = [f"r{i}" for i in range(6)]
    drafted, accepted = counts(3, 3, 3, 3, 3, 3), counts(0, 1, 2, 3, 0, 3)
    forward, backward = speedup(cost_ratio=0.2), speedup(cost_ratio=0.2)
    for _ in range(20):
        forward.limits(keys(*ids))
        backward.limits(keys(*ids[::-1]))
        forward.observe(ids, drafted, accepted)
        backward.observe(ids[::-1], drafted[::-1], accepted[::-1])
    assert forward.limits(keys(*ids)).tolist() == backward.limits(keys(*ids[::-1]))[::-1].tolist()


def serve(controller: ExpectedSpeedup, rate: float, each: float, steps: int = 300) -> list[int]:
    """Lengths drafted by one request, whose plain step takes 10 ms and a draft token `each`."""
    generator = np.random.default_rng(0)
    lengths = []
    for _ in range(steps):
        (length,) = controller.limits(keys("a")).tolist()
        lengths.append(length)
        time = StepTime(1, 1 + length, length, 0.010, 0.001 * bool(length) + each * length)
        controller.observe_step_time(time)
        if length:
            accepted = int((generator.random(length) < rate).cumprod().sum())
            controller.observe(["a"], counts(length), counts(accepted))
    return lengths


@pytest.mark.parametrize(("rate", "each"), [(0.8, 0.002), (0.8, 0.0002), (0.3, 0.008)])
def test_cost_is_measured(rate: float, each: float) -> None:
    controller = speedup(probe_every=32)
    controller.set_pass_times(counts(1, 2, 1024), np.array([0.01, 0.01, 0.01]))
    lengths = serve(controller, rate, each)
    assert lengths[0] == 3  # one step to get to know the cost
    speeds = [
        sum(rate**i for i in range(k + 1)) / (0.010 + 0.001 * bool(k) + each * k) for k in range(7)
    ]
    assert np.mean([speeds[length] for length in lengths[100:]]) > 0.97 * max(speeds)
    assert (lengths.count(0) > 200) == (speeds[0] == max(speeds))


def test_given_cost_is_not_overruled() -> None:
    timed, told = speedup(cost_ratio=0.2), speedup(cost_ratio=0.2)
    for step in range(100):
        timed.observe_step_time(StepTime(1, 1 + step % 7, step % 7, 0.001, 1.0))
    for controller in (timed, told):
        controller.observe(["a"], counts(6), counts(5))
    assert timed.limits(keys("a", "b")).tolist() == told.limits(keys("a", "b")).tolist()
    assert timed.limits(keys("b"))[0] > 0


def test_tensor_parallel_needs_a_cost_ratio() -> None:
    measured = ExpectedSpeedupOptions.model_validate({})
    with pytest.raises(ConfigError, match="Give it a cost_ratio"):
        ExpectedSpeedup.check(measured, PARALLEL.facts)
    with pytest.raises(ConfigError, match="2 tensor-parallel ranks"):
        ExpectedSpeedup(measured, PARALLEL)
    given_cost = ExpectedSpeedupOptions.model_validate({"cost_ratio": 0.1})
    assert ExpectedSpeedup(given_cost, PARALLEL).limits(keys("a")).tolist() == [3]


# --- what they are made of ---


def test_request_table_reuses_rows_with_initial_values() -> None:
    table = RequestTable([1.0, 2.0], capacity=2)
    rows = table.rows(["a", "b"])
    table.values[rows] = 9
    table.forget(["a"])
    (row,) = table.rows(["c"])
    assert row == rows[0]
    assert table.values[row].tolist() == [1, 2]
    assert table.rows([]).tolist() == []


def test_request_table_grows() -> None:
    table = RequestTable([0.5], capacity=1)
    ids = [str(i) for i in range(300)]
    rows = table.rows(ids)
    assert len(set(rows.tolist())) == 300
    assert (table.values[rows, 0] == 0.5).all()
    table.forget(ids)
    assert len(table) == 0
    assert len(table.rows(ids)) == 300
