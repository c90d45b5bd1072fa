"""Steps without drafts: where drafting pays by little, and ever more rarely."""

from __future__ import annotations

import numpy as np

from vllm_spec_plugins.plain_steps import PlainSteps
from vllm_spec_plugins.step_cost import CostLine


def test_the_waits_double() -> None:
    plain = PlainSteps()
    due = [step for step in range(1, 130) if plain.is_due(1.1)]
    assert np.diff([0, *due]).tolist() == [8, 16, 32, 32, 32]


def test_not_where_drafting_clearly_pays() -> None:
    plain = PlainSteps()
    assert not any(plain.is_due(1.3) for _ in range(100))


def test_a_cost_that_grows_faster_than_told() -> None:
    """Only where that is allowed; and far from what was seen a time never comes to nothing."""
    bounded, free = CostLine(), CostLine(steepest=3.0)
    for line in (bounded, free):
        for x in [1.0, 1.2] * 100:
            line.observe(x, 1.0 + 2.0 * (x - 1.0))
    x = np.array([0.1, 1.0, 1.2])
    assert abs(free.at(x)[1:] - [1.0, 1.4]).max() < 0.02
    assert bounded.at(x)[1] > 1.05
    assert free.fixed + free.slope * 0.1 < 0 < free.at(x)[0]


def test_a_steep_line_does_not_distort_times_far_from_it() -> None:
    """Batches of 8, and then single requests: a time is never taken for a negative one."""
    line = CostLine(steepest=3.0)
    for x in [1.0, 1.2] * 100:
        line.observe(x, 1.0 + 2.5 * (x - 1.0))
    assert line.fixed + line.slope * 0.3 < 0
    for _ in range(300):
        line.observe(0.3, 0.8)
        assert line.at(np.array([0.3]))[0] > 0
    assert abs(line.at(np.array([0.3]))[0] - 0.8) < 0.05
