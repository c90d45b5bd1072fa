"""`adaptive_draft_length`: DiffuSpec's formula written out, per request, within its bounds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from vllm_spec_plugins.adaptive_draft_length import (
    AdaptiveDraftLength,
    AdaptiveDraftLengthOptions,
)
from vllm_spec_plugins.errors import ConfigError
from vllm_spec_plugins.length_control import RequestKeys
from vllm_spec_plugins.registry import Kind, installed
from vllm_spec_plugins.testing import toy_context

CONTEXT = replace(toy_context(num_speculative_tokens=30), max_num_requests=2)


def controller(**options: Any) -> AdaptiveDraftLength:
    return AdaptiveDraftLength(AdaptiveDraftLengthOptions(**options), CONTEXT)


def lengths(control: AdaptiveDraftLength, *names: str) -> list[int]:
    zeros = np.zeros(len(names), dtype=np.int64)
    return control.limits(RequestKeys(names, zeros, zeros)).tolist()


def test_registered() -> None:
    assert installed().load(Kind.LENGTH_CONTROLLER, "adaptive_draft_length") is AdaptiveDraftLength


def test_defaults_are_those_of_diffuspec() -> None:
    """20 at first, 30 at most, 10 more after drafts accepted whole."""
    control = controller()
    assert lengths(control, "a") == [20]
    control.observe(["a"], np.array([20]), np.array([20]))
    assert lengths(control, "a") == [30]
    assert lengths(controller(k_max=15), "a") == [10]


@pytest.mark.parametrize("rho", [0.5, 0.0, 0.8])
def test_formula(rho: float) -> None:
    """Step by step, against the rule written out; drafts end early by themselves now and then."""
    dice = np.random.default_rng(0)
    control = controller(k_min=3, k_max=25, delta=6, rho=rho)
    generated = accepted = None
    seen: set[int] = set()
    for _ in range(400):
        [k] = lengths(control, "a")
        if generated is not None and accepted is not None:
            bonus = 6 if accepted >= generated - 1e-9 else 0
            assert k == min(max(math.floor(generated + 1e-9) + bonus, 3), 25)
        seen.add(k)
        drafted = k if dice.random() < 0.7 else int(dice.integers(1, k + 1))
        right = drafted if dice.random() < 0.8 else int(dice.integers(0, drafted + 1))
        control.observe(["a"], np.array([drafted]), np.array([right]))
        generated = drafted if generated is None else rho * generated + (1 - rho) * drafted
        accepted = right if accepted is None else rho * accepted + (1 - rho) * right
    assert min(seen) == 3
    assert len(seen) > 8


def test_requests_are_apart_and_forgotten() -> None:
    control = controller(k_min=2, k_max=10, delta=3)
    assert lengths(control, "a", "b") == [2, 2]
    control.observe(["b", "a", "unknown"], np.array([6, 5, 9]), np.array([6, 0, 9]))
    assert lengths(control, "a", "b") == [5, 9]
    control.finish(["b", "never seen"])
    assert lengths(control, "b", "a") == [2, 5]


def test_one_rejection_is_remembered_until_only_rounding_is_left() -> None:
    control = controller(k_min=2, k_max=10, delta=3)
    lengths(control, "a")
    control.observe(["a"], np.array([4]), np.array([3]))
    for _ in range(20):
        control.observe(["a"], np.array([4]), np.array([4]))
        assert lengths(control, "a") == [4]
    for _ in range(20):
        control.observe(["a"], np.array([4]), np.array([4]))
    assert lengths(control, "a") == [7]


def test_more_requests_than_expected() -> None:
    names = [str(i) for i in range(5)]
    assert lengths(controller(), *names) == [20] * 5


@pytest.mark.parametrize(
    ("options", "said"),
    [({"k_max": 31}, "num_speculative_tokens is 30"), ({"k_min": 9, "k_max": 8}, "k_min is 9")],
)
def test_bounds_that_do_not_fit_are_refused(options: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        AdaptiveDraftLength.check(AdaptiveDraftLengthOptions(**options), CONTEXT.facts)


@pytest.mark.parametrize("options", [{"k_min": 0}, {"delta": 0}, {"rho": 1.0}, {"k": 5}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AdaptiveDraftLengthOptions.model_validate(options)
