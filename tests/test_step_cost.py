"""What steps cost, learned from their times; and the lengths that follow for a batch."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_spec_plugins import step_clock
from vllm_spec_plugins.batch_lengths import batch_lengths
from vllm_spec_plugins.step_clock import StepClock
from vllm_spec_plugins.step_cost import CostLine, DraftCosts, StepCost, StepTime
from vllm_spec_plugins.stopwatch import fastest

# --- a line ---


def test_a_line_is_found() -> None:
    line = CostLine()
    assert not line.is_known
    for step in range(300):
        line.observe(1 + step % 5, 0.02 + 0.002 * (1 + step % 5))
    assert line.slope == pytest.approx(0.002, rel=0.1)
    assert line.fixed == pytest.approx(0.02, rel=0.05)


def test_steps_that_are_alike_tell_no_slope() -> None:
    line = CostLine()
    for _ in range(100):
        line.observe(4, 0.028)
    assert line.slope == pytest.approx(0.007)
    assert line.fixed == pytest.approx(0)


def test_outliers_and_nonsense_change_little() -> None:
    line = CostLine()
    for step in range(300):
        line.observe(1 + step % 5, 0.02 + 0.002 * (1 + step % 5))
    before = line.fixed + 3 * line.slope
    line.observe(3, 60.0)  # a pause
    line.observe(0, 1.0)
    line.observe(5, 0.0)
    line.observe(5, float("nan"))
    assert line.fixed + 3 * line.slope == pytest.approx(before, rel=0.05)


def test_a_line_follows_a_change() -> None:
    line = CostLine(discount=0.95)
    for slope in (0.002, 0.010):
        for step in range(400):
            line.observe(1 + step % 5, 0.02 + slope * (1 + step % 5))
    assert line.slope == pytest.approx(0.010, rel=0.05)


def test_a_line_never_falls_below_nothing() -> None:
    falling, steep = CostLine(), CostLine()
    for step in range(100):
        x = 1 + step % 5
        falling.observe(x, 0.02 - 0.002 * x)
        steep.observe(x, 0.02 * x - 0.01)
    assert falling.slope == 0
    assert steep.fixed == pytest.approx(0, abs=1e-12)


# --- a step ---


def taught(first: float = 0.001, each: float = 0.003) -> StepCost:
    """Passes of 10 ms, and a tenth of one more a token, which the engine's steps double."""
    cost = StepCost()
    tokens = np.array([1, 2, 1024])
    cost.set_pass_times(tokens, 0.010 + 0.001 * (tokens - 1))
    for step in range(400):
        requests, longest = 1 + step % 3, step % 7
        num_tokens = requests * (1 + longest)
        one_each = 0.010 + 0.001 * (requests - 1)
        seconds = 0.005 + 2 * (0.010 + 0.001 * (num_tokens - 1))
        drafting = (first + each * longest * one_each / 0.010) * bool(longest)
        cost.observe(StepTime(requests, num_tokens, longest, seconds, drafting))
    return cost


@pytest.mark.parametrize("requests", [1, 2, 8])
def test_costs_of_a_step(requests: int) -> None:
    costs = taught().at(requests, most=4)
    assert costs is not None
    tokens = requests * (1 + np.arange(5))
    assert costs.verify == pytest.approx(0.005 + 2 * (0.010 + 0.001 * (tokens - 1)), rel=0.03)
    assert costs.each == pytest.approx(0.003 * (1 + 0.1 * (requests - 1)), rel=0.03)
    assert costs.first == pytest.approx(0.001, abs=4e-4)


def test_nothing_is_known_before_a_draft_was_timed() -> None:
    cost = StepCost()
    assert cost.at(1, 4) is None
    cost.observe(StepTime(1, 1, 0, 0.01, 0.0))
    assert cost.at(1, 4) is None
    cost.observe(StepTime(1, 3, 2, 0.01, 0.002))
    costs = cost.at(1, 4)
    assert costs is not None
    assert costs.first + 2 * costs.each == pytest.approx(0.002)
    assert (np.diff(costs.verify) >= 0).all()


def test_a_disturbed_pass_time_is_not_believed() -> None:
    cost = StepCost()
    cost.set_pass_times(np.array([1, 2, 4, 8]), np.array([0.010, 0.500, 0.012, 0.016]))
    assert [cost._pass(n) for n in (1, 2, 3, 4, 8, 16)] == pytest.approx(
        [0.010, 0.012, 0.012, 0.012, 0.016, 0.024]
    )


# --- the lengths ---


def speed_of(lengths: tuple[int, ...], acceptance: list[float], costs: DraftCosts) -> float:
    """Tokens per second of each request."""
    tokens = sum(sum(a**i for i in range(k + 1)) for a, k in zip(acceptance, lengths, strict=True))
    verify = np.mean([costs.verify[k] for k in lengths])
    drafting = costs.first + costs.each * max(lengths) if max(lengths) else 0
    return tokens / (verify + drafting) / len(lengths)


@settings(max_examples=100)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
    st.lists(st.floats(0, 0.2), min_size=3, max_size=3),
    st.floats(0, 0.3),
    st.floats(0, 0.4),
)
def test_lengths_are_about_the_best(
    acceptance: list[float], increments: list[float], first: float, each: float
) -> None:
    costs = DraftCosts(np.cumsum([1.0, *increments]), first, each)
    lengths, speed = batch_lengths(np.array(acceptance), costs)
    count = len(acceptance)
    common = max(speed_of((k,) * count, acceptance, costs) for k in range(4))
    assert speed == pytest.approx(common)
    own = speed_of(tuple(lengths.tolist()), acceptance, costs)
    assert own >= common * (1 - 1e-9)
    best = max(speed_of(each_, acceptance, costs) for each_ in product(range(4), repeat=count))
    assert own >= 0.95 * best


def test_a_batch_waits_for_its_longest_draft() -> None:
    costs = DraftCosts(1 + 0.05 * np.arange(7), 0.0, 0.3)
    assert batch_lengths(np.array([0.9]), costs)[0][0] >= 2
    assert batch_lengths(np.array([0.9] + [0.01] * 7), costs)[0].tolist() == [0] * 8
    lengths = batch_lengths(np.array([0.9] * 7 + [0.01]), costs)[0]
    assert lengths[0] >= 2
    assert lengths[7] == 0


# --- clocks ---


def test_the_clock_books_drafting_on_the_step_that_verifies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: now[0])
    clock, found = StepClock(), []
    for gap in (5.0, 0.5, 0.25, 9.0):  # waiting for requests is no cost of a step
        now[0] += gap
        clock.begin_step()
        now[0] += 1.0
        with clock.following():
            now[0] += 0.125
        with clock.drafting():
            now[0] += 2.0 + gap
        found.append(clock.step())
        clock.end_step()
    assert found == [(1.0, 0.0), (1.5, 7.0), (1.25, 2.5), (1.25, 2.25)]


def test_fastest_counts_the_fastest() -> None:
    runs = [0, 0]

    def run(which: int) -> None:
        runs[which] += 1

    seconds = fastest([lambda: run(0), lambda: run(1)], repeats=3)
    assert runs == [4, 4]
    assert seconds.shape == (2,)
    assert (seconds > 0).all()


def test_a_machine_that_swings_does_not_tilt_the_line() -> None:
    """Slow for a minute while drafts are long, fast while they are short, and the other way."""
    generator = np.random.default_rng(0)
    slopes = []
    for seed in range(2):
        line = CostLine()
        for step in range(400):
            swing = 1 + 0.3 * np.sin(step / 40)
            likely = (0.3, 0.7) if np.sin(step / 40) > 0 else (0.7, 0.3)
            x = float(generator.choice([1.0, 1.5], p=likely[:: 1 if seed else -1]))
            line.observe(x, swing * (0.8 + 0.4 * x) * np.exp(0.05 * generator.standard_normal()))
        slopes.append(line.slope)
    assert slopes == pytest.approx([0.4, 0.4], abs=0.12)
