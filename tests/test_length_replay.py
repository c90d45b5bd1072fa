"""Length controllers on drafts of a real engine, against the best fixed length in hindsight.

`traces/small_*.npz` are what drafts of `early_exit` came to at every position of 32 texts of the
zoo's `small`, at temperatures 0 and 1 (`benchmarks/length_traces.py drafts`). Step times are those
of the engine that served it, `traces/small_times.jsonl` (`benchmarks/length_traces.py times`), or
made up: a pass that waits for its weights, and then for each of its tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vllm_spec_plugins import exit_selection, step_cost
from vllm_spec_plugins.exit_selection import ExitController, ExitCosts
from vllm_spec_plugins.length_control import LengthController
from vllm_spec_plugins.plain_steps import PlainSteps
from vllm_spec_plugins.registry import Kind, installed
from vllm_spec_plugins.step_cost import StepTime
from vllm_spec_plugins.testing import toy_context
from vllm_spec_plugins.testing.length_replay import (
    ControllerPolicy,
    DraftTraces,
    FixedChoice,
    FixedPolicy,
    Replayed,
    StepTimes,
    best_fixed,
    replay,
)

TRACES = Path(__file__).parent / "traces"
MOST, LAYERS = 6, 8
#: Of the traces; where a controller does not choose, the second.
EXITS = (1, 2, 4, 6)
EXIT = 1
SIZES = np.array([1, 2, 4, 8])


@dataclass(frozen=True)
class Machine:
    """What each further token of a pass takes, of a pass of one token."""

    per_token: float

    def passes(self, num_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        return 0.010 * (1 + self.per_token * (num_tokens - 1.0)).astype(np.float64)

    @property
    def times(self) -> StepTimes:
        """Of an engine that adds 3 ms to a step and 0.5 ms to a draft."""
        lengths = np.arange(MOST + 1)
        passes = self.passes(SIZES[:, None] * (1 + lengths))
        share = (np.array(EXITS) + 1.5) / (LAYERS + 1.5)  # embedding, norm and head: 1.5 layers
        each = share * passes[:, :1]  # [B, E]
        draft = 0.0005 * (lengths > 0) + each[:, :, None] * lengths
        pass_tokens = np.array([1, 2, 4, 8, 16, 32])
        # Half of all times are on the spot, some are pauses.
        noise = np.exp(0.1 * np.random.default_rng(0).standard_normal(500))
        noise[::50] *= 4
        timed = ExitCosts(SIZES, each / passes[:, :1], passes / passes[:, :1], passes[:, 0])
        return StepTimes(
            SIZES, 0.003 + passes, draft, noise, pass_tokens, self.passes(pass_tokens), timed
        )


@cache
def times_of(machine: str) -> StepTimes:
    if machine == "engine":
        lines = (TRACES / "small_times.jsonl").read_text().splitlines()
        return StepTimes.of_rows([json.loads(line) for line in lines])
    return MACHINES[machine].times


#: More tokens cost next to nothing; something; so much that drafting loses in a batch.
MACHINES = {"memory": Machine(0.005), "between": Machine(0.05), "compute": Machine(0.6)}
CONTEXT = replace(toy_context(num_speculative_tokens=MOST), max_num_requests=8)


@cache
def traces(temperature: int) -> DraftTraces:
    return DraftTraces.load(TRACES / f"small_{temperature}.npz")


@cache
def best(temperature: int, machine: str, batch: int, chooses: bool) -> FixedChoice:
    exits = range(len(EXITS)) if chooses else [EXIT]
    return best_fixed(traces(temperature), times_of(machine), batch, exits)


def controller(name: str, **options: object) -> LengthController:
    cls = installed().load(Kind.LENGTH_CONTROLLER, name)
    return cls(cls.Options.model_validate(options), CONTEXT)


def replayed(
    control: LengthController,
    temperature: int,
    machine: str,
    batch: int,
    passes: int = 2,
    seed: int = 0,
) -> Replayed:
    drafts, times = traces(temperature), times_of(machine)
    policy = ControllerPolicy(control, drafts, times, EXIT)
    return replay(policy, drafts, times, batch, passes, seed)


def share(
    control: LengthController, temperature: int, machine: str, batch: int, seed: int = 0
) -> float:
    """Speed over that of the best fixed choice: of all exits, if it chooses among them."""
    chooses = isinstance(control, ExitController)
    speed = replayed(control, temperature, machine, batch, seed=seed).speed
    return speed / best(temperature, machine, batch, chooses).speed


NAMES = ("expected_speedup", "thompson", "del")


@pytest.mark.parametrize(
    ("temperature", "machine"),
    [(0, "engine"), (1, "engine"), (0, "memory"), (1, "memory"), (1, "between")],
)
@pytest.mark.parametrize("name", NAMES)
def test_matches_the_best_fixed_choice_in_a_batch(
    name: str, temperature: int, machine: str
) -> None:
    """From its first text on, of 64 texts of 64 tokens."""
    assert share(controller(name), temperature, machine, batch=8) >= 0.97


@pytest.mark.parametrize("machine", ["engine", "memory"])
@pytest.mark.parametrize("name", NAMES[:2])
def test_matches_the_best_fixed_length_alone(name: str, machine: str) -> None:
    assert share(controller(name), 1, machine, batch=1) >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("machine", ["engine", *MACHINES])
@pytest.mark.parametrize("name", NAMES)
def test_matches_the_best_fixed_choice_alone(name: str, temperature: int, machine: str) -> None:
    shares = [share(controller(name), temperature, machine, batch=1, seed=i) for i in range(3)]
    assert np.mean(shares) >= 0.97


@pytest.mark.parametrize("name", NAMES)
def test_hardly_drafts_in_a_batch_where_even_one_token_loses(name: str) -> None:
    temperature, machine, batch = 1, "compute", 8
    drafts, times = traces(temperature), times_of(machine)
    plain, one = (replay(FixedPolicy(EXIT, k), drafts, times, batch).speed for k in (0, 1))
    assert one < 0.8 * plain
    served = replayed(controller(name), temperature, machine, batch)
    assert np.mean(served.drafted) < 0.05
    assert served.speed > 0.97 * plain


@cache
def misjudged_times() -> StepTimes:
    """A batch costs more than a draft of one token is worth, and seemed cheap before serving."""
    times, told = Machine(0.15).times, Machine(0.05).times
    return replace(times, pass_seconds=told.pass_seconds, exit_costs=told.exit_costs)


def drafted_where_misjudged(name: str) -> tuple[float, float]:
    """Tokens drafted in each step of the second half, and speed over plain decoding."""
    drafts, times, batch = traces(1), misjudged_times(), 8
    plain, one = (replay(FixedPolicy(EXIT, k), drafts, times, batch).speed for k in (0, 1))
    assert 0.9 < one / plain < 0.97
    policy = ControllerPolicy(controller(name), drafts, times, EXIT)
    served = replay(policy, drafts, times, batch, passes=3)
    return float(np.mean(served.drafted[len(served.drafted) // 2 :])), served.speed / plain


@pytest.mark.parametrize("name", NAMES)
def test_steps_without_drafts_show_where_drafting_does_not_pay(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafted, speed = drafted_where_misjudged(name)
    assert drafted < 0.4
    # What was told before serving cannot be outgrown, and there are no such steps.
    monkeypatch.setattr(step_cost, "STEEPEST_VERIFICATION", 1.0)
    monkeypatch.setattr(exit_selection, "STEEPEST_VERIFICATION", 1.0)
    monkeypatch.setattr(PlainSteps, "is_due", lambda _self, _speed_up: False)
    always_drafted, slower = drafted_where_misjudged(name)
    assert always_drafted > 0.9
    assert slower < speed


# --- negative controls: what the replay would notice ---


def told_times(factor: float) -> Callable[[LengthController], None]:
    """It believes drafting takes `factor` of what it does."""

    def change(control: LengthController) -> None:
        told = control.observe_step_time

        def observe(step: StepTime) -> None:
            told(replace(step, drafting_seconds=factor * step.drafting_seconds))

        control.observe_step_time = observe

    return change


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [0.02, 8.0])
def test_a_wrong_cost_of_drafting_is_noticed(name: str, factor: float) -> None:
    control = controller(name)
    told_times(factor)(control)
    assert share(control, 1, "memory", batch=8) < 0.95


def test_evidence_of_few_tokens_at_face_value_is_noticed() -> None:
    """Requests that hardly differ, each judged by its own few tokens."""
    alone = controller("expected_speedup", prior_strength=0.5, discount=0.5)
    assert share(alone, 1, "memory", batch=1) < 0.96


def test_texts_are_served_whole() -> None:
    """Every token but the prompt's own, whatever is drafted."""
    for length in (0, 3):
        served = replay(FixedPolicy(EXIT, length), traces(1), MACHINES["memory"].times, 8)
        assert served.tokens == 32 * 63
        assert max(served.drafted) == length
    plain = replay(FixedPolicy(EXIT, 0), traces(1), MACHINES["memory"].times, 8)
    assert plain.seconds == pytest.approx(4 * 63 * (0.003 + 0.010 * (1 + 7 * 0.005)))


def test_step_times_are_read_from_rows() -> None:
    """Other work makes some steps slower: what is left is the machine's."""
    wanted, generator = MACHINES["between"].times, np.random.default_rng(0)
    rows: list[dict[str, object]] = [
        {
            "kind": "step",
            "batch": int(size),
            "exit_layer": layer,
            "length": length,
            "seconds": wanted.verify[b, length] * (1 + generator.random(20) ** 4),
            "drafting_seconds": wanted.draft[b, e, length] * (1 + generator.random(20) ** 4),
        }
        for b, size in enumerate(SIZES)
        for e, layer in enumerate(EXITS)
        for length in range(MOST + 1)
    ]
    costs = wanted.exit_costs
    assert costs.plain is not None
    rows += [
        {"kind": "passes", "num_tokens": [1, 2], "seconds": [0.1, 0.2]},
        {
            "kind": "exit_costs",
            "batch_sizes": SIZES.tolist(),
            "draft": costs.draft.tolist(),
            "verify": costs.verify.tolist(),
            "plain": costs.plain.tolist(),
        },
    ]
    found = StepTimes.of_rows(rows)
    assert found.batch_sizes.tolist() == SIZES.tolist()
    assert found.verify == pytest.approx(wanted.verify, rel=0.03)
    assert found.draft == pytest.approx(wanted.draft, rel=0.1)
    assert found.step(np.array([2, 4]), EXIT) == pytest.approx(
        wanted.step(np.array([2, 4]), EXIT), rel=0.05
    )


def test_traces_are_read_as_they_were_written(tmp_path: Path) -> None:
    traces(0).save(tmp_path / "copy.npz")
    copy = DraftTraces.load(tmp_path / "copy.npz")
    assert (copy.accepted == traces(0).accepted).all()
    assert (copy.confidences == traces(0).confidences).all()
    assert copy.most == MOST
