"""The losslessness kit: holds a verifier to its guarantee. For our tests and for anyone's.

    from vllm_spec_plugins.testing import assert_keeps_its_guarantee
    assert_keeps_its_guarantee(MyVerifier(MyOptions(), toy_context()))

or, without writing a test, from the command line:

    pytest --pyargs vllm_spec_plugins.testing.conformance --spec-verifier my_package:MyVerifier

Names are resolved when first used: the pytest plugin lives in this package, and loading it
must cost nothing to the test runs of people who do not use the kit.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "GoodnessOfFit": "chi_square",
    "ToyProblem": "toy_problems",
    "assert_draws_its_law": "guarantees",
    "assert_keeps_its_guarantee": "guarantees",
    "assert_lossless": "guarantees",
    "assert_price_is_measured": "guarantees",
    "assert_relaxes": "guarantees",
    "assert_stays_within_its_bound": "guarantees",
    "build_verifier": "guarantees",
    "check_texts": "guarantees",
    "enumeration_error": "enumeration",
    "expected_accepted": "enumeration",
    "first_token_prices": "enumeration",
    "fit_of_step": "step_draws",
    "generate": "simulation",
    "goodness_of_fit": "chi_square",
    "misstated": "controls",
    "negative_controls": "controls",
    "output_laws": "enumeration",
    "total_variation": "enumeration",
    "toy_context": "toy_problems",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOME)
