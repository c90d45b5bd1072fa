"""`confidence`: stops at the first token below the threshold; the threshold adapts as published."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from vllm_spec_plugins.confidence_threshold import ConfidenceThreshold, ConfidenceThresholdOptions
from vllm_spec_plugins.length_control import RequestKeys
from vllm_spec_plugins.registry import Kind, installed
from vllm_spec_plugins.testing import toy_context

CONTEXT = replace(toy_context(num_speculative_tokens=4), max_num_requests=4)


def controller(**options: float) -> ConfidenceThreshold:
    return ConfidenceThreshold(ConfidenceThresholdOptions(**options), CONTEXT)


def keys(count: int) -> RequestKeys:
    zeros = np.zeros(count, dtype=np.int64)
    return RequestKeys([str(i) for i in range(count)], zeros, zeros)


def verdict(control: ConfidenceThreshold, drafted: list[int], accepted: list[int]) -> float:
    names = [str(i) for i in range(len(drafted))]
    control.observe(names, np.array(drafted), np.array(accepted))
    return control.threshold


def test_registered() -> None:
    assert installed().load(Kind.LENGTH_CONTROLLER, "confidence") is ConfidenceThreshold


def test_stops_below_the_threshold() -> None:
    control = controller()
    assert control.limits(keys(3)).tolist() == [4, 4, 4]
    confidences = np.array([0.59, 0.61, 0.0], dtype=np.float32)
    assert control.stop_after(keys(3), 0, confidences).tolist() == [True, False, True]
    assert controller(threshold=0.0).stop_after(keys(3), 2, confidences).tolist() == [False] * 3


def test_threshold_stays_unless_told_to_adapt() -> None:
    assert verdict(controller(), [4, 2], [0, 0]) == 0.6


def test_adapts_as_draft_and_verify_does() -> None:
    """Step by step, against the rule written out."""
    generator = np.random.default_rng(0)
    control, threshold, acceptance = controller(target_acceptance=0.7), 0.6, 0.0
    seen = set()
    for _ in range(300):
        drafted = int(generator.integers(1, 5))
        accepted = int(generator.integers(0, drafted + 1)) if generator.random() < 0.5 else drafted
        acceptance = 0.5 * acceptance + 0.5 * accepted / drafted
        if acceptance < 0.7:
            case, wanted = "up", threshold + 0.01
        elif drafted == 4:
            case, wanted = "stay", threshold
        else:
            case, wanted = "down", threshold - 0.01
        threshold = 0.9 * threshold + 0.1 * wanted
        seen.add(case)
        assert verdict(control, [drafted], [accepted]) == pytest.approx(threshold, abs=1e-12)
    assert seen == {"up", "stay", "down"}


def test_requests_of_a_step_count_as_one_draft() -> None:
    control = controller(target_acceptance=0.4)
    assert verdict(control, [4, 2], [3, 3 - 1]) == pytest.approx(0.599)  # 5 of 6, halved: 0.42
    assert verdict(control, [4, 4], [4, 4]) == pytest.approx(0.599)  # all of full length


def test_threshold_stays_a_probability() -> None:
    high, low = (controller(threshold=t, target_acceptance=0.5) for t in (0.999, 0.001))
    for _ in range(10):
        verdict(high, [2], [0])
        verdict(low, [2], [2])
    assert high.threshold == 1
    assert low.threshold == 0


@pytest.mark.parametrize(
    "options", [{"threshold": -0.1}, {"threshold": 1.1}, {"target_acceptance": 1.0}, {"beta1": 0.5}]
)
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        ConfidenceThresholdOptions.model_validate(options)
