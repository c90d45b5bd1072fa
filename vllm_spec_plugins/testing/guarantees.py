"""Assertions that hold a verifier to what it promises."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module

import torch
from torch import Tensor

from vllm_spec_plugins.config import read_options
from vllm_spec_plugins.errors import ConfigError, PluginError
from vllm_spec_plugins.registry import Kind, contract_problem, installed
from vllm_spec_plugins.verifier import Guarantee, Verifier

from .chi_square import failures, goodness_of_fit
from .enumeration import (
    enumeration_error,
    first_token_prices,
    has_exact_law,
)
from .simulation import generate
from .step_draws import fit_of_step
from .toy_problems import (
    ToyProblem,
    adversarial,
    near_equal,
    one_hot,
    random_problem,
    toy_context,
    truncated_draft,
    truncated_target,
    within_vocabulary,
)

#: Rounding of float64 sums over a few hundred texts stays far below this.
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Case:
    """Problems examined as one batch.

    Attributes:
        name: For messages.
        problems: All over the same vocabulary.
        length: Tokens of each generated text.
        ragged: Whether drafts have 0 to K tokens.
        vocabulary: Of compact draft probabilities.
    """

    name: str
    problems: tuple[ToyProblem, ...]
    length: int = 4
    ragged: bool = False
    vocabulary: Tensor | None = None


def enumeration_cases() -> list[Case]:
    """Small enough to sum over every draft and text: V = 4, K = 0 to 3, all kinds of draft."""
    cases = []
    for num_draft in range(4):
        plain = random_problem(num_draft, num_draft=num_draft, order=max(num_draft, 1))
        alone = [
            plain,
            adversarial(plain),
            near_equal(plain),
            one_hot(plain),
            truncated_target(plain, 2),
            truncated_draft(plain, 0.7),
            truncated_draft(truncated_target(plain, 2), 0.7),
            one_hot(truncated_target(plain, 2)),
            plain.with_temperature(0),
            one_hot(plain).with_temperature(0),
        ]
        if num_draft:
            alone += [replace(p, num_placeholders=1) for p in (plain, one_hot(plain))]
        cases += [Case(f"K = {num_draft}, problem {i}", (p,)) for i, p in enumerate(alone)]
        cases.append(Case(f"K = {num_draft}, all in one batch", tuple(alone)))
    mixed = [random_problem(9, num_draft=k, order=3) for k in (3, 0, 1, 2)]
    cases.append(Case("ragged", tuple(mixed)))
    vocabulary = torch.tensor([0, 2, 3])
    compact = tuple(within_vocabulary(p, vocabulary) for p in mixed)
    cases.append(Case("compact draft probabilities", compact, vocabulary=vocabulary))
    cases.append(Case("compact and one-hot", (*compact, one_hot(mixed[0])), vocabulary=vocabulary))
    return cases


def simulation_cases() -> list[Case]:
    """16 tokens, so that a small bias has nowhere to hide."""

    def problem(seed: int, num_draft: int, sharpness: float = 1.0) -> ToyProblem:
        return random_problem(
            seed, vocab_size=16, num_draft=num_draft, order=1, sharpness=sharpness
        )

    vocabulary = torch.tensor([1, 2, 3, 5, 8, 13])
    plain = problem(2, 2)
    return [
        Case("adversarial draft, K = 3", (adversarial(problem(1, 3)),)),
        Case("one-hot draft, K = 3", (one_hot(problem(1, 3, sharpness=2.0)),)),
        Case(
            "top-k target, top-p draft, K = 4",
            (truncated_draft(truncated_target(problem(3, 4), 5), 0.6),),
        ),
        Case("draft like the target, K = 8", (near_equal(problem(4, 8), 0.5),), length=10),
        Case("K = 1", (problem(5, 1),), length=3),
        Case(
            "mixed temperatures, greedy, one-hot and placeholders, ragged",
            (
                plain.with_temperature(0.5),
                plain.with_temperature(0),
                one_hot(plain),
                replace(adversarial(plain), num_placeholders=1),
            ),
            length=3,
            ragged=True,
        ),
        Case(
            "compact draft probabilities, K = 2",
            (within_vocabulary(plain, vocabulary),),
            vocabulary=vocabulary,
        ),
    ]


def check_texts(
    verifier: Verifier, case: Case, *, samples: int = 200_000, false_alarm: float = 1e-6
) -> list[str]:
    """What is wrong with the law of a verifier's texts; empty when nothing is.

    Args:
        verifier: Examined through `verify`, in float32 as served.
        case: What it is given.
        samples: Texts of each problem.
        false_alarm: Chance that a right verifier is accused, over all comparisons of the case.
    """
    texts = generate(
        verifier,
        case.problems,
        samples=samples,
        length=case.length,
        ragged=case.ragged,
        vocabulary=case.vocabulary,
    )
    fits = [
        replace(fit, what=f"{case.name}, problem {i}, {fit.what}")
        for i, (problem, drawn) in enumerate(zip(case.problems, texts, strict=True))
        for fit in goodness_of_fit(problem, drawn)
    ]
    return [str(fit) for fit in failures(fits, false_alarm)]


def assert_lossless(
    verifier: Verifier,
    *,
    samples: int = 200_000,
    false_alarm: float = 1e-6,
    cases: Sequence[Case] | None = None,
) -> None:
    """The verifier reproduces the target's law.

    By enumeration where it says what it draws from, and by chi-square on generated texts.

    Args:
        verifier: Built on `toy_context()` or the like.
        samples: Texts of each problem; a bias of a few thousandths needs 200,000.
        false_alarm: Chance that a right verifier fails, over the whole call.
        cases: Simulated cases; None: `simulation_cases()`.

    Raises:
        AssertionError: Saying which law is off, by how much, and what noise would explain.
    """
    if has_exact_law(verifier):
        for case in enumeration_cases():
            error = enumeration_error(verifier, case.problems, case.vocabulary)
            assert error <= TOLERANCE, (
                f"{case.name}: the output's law, enumerated, is off by {error:.2e}"
            )
    cases = simulation_cases() if cases is None else cases
    wrong = [
        line
        for case in cases
        for line in check_texts(
            verifier, case, samples=samples, false_alarm=false_alarm / len(cases)
        )
    ]
    assert not wrong, (
        f"not the target's law (false alarm {false_alarm:.0e} in all):\n  " + "\n  ".join(wrong)
    )


def price_cases() -> list[Case]:
    """One problem each: all kinds of draft, of one token and of several."""
    vocabulary = torch.tensor([0, 2, 3])
    cases = []
    for num_draft, seeds in ((1, range(12)), (2, range(12, 16)), (3, range(16, 17))):
        for seed in seeds:
            plain = random_problem(seed, num_draft=num_draft, order=num_draft)
            problems = {
                "plain": plain,
                "adversarial": adversarial(plain),
                "near equal": near_equal(plain, 0.5),
                "top-p draft": truncated_draft(plain, 0.7),
                "top-k target": truncated_target(plain, 2),
                "one-hot draft": one_hot(plain),
                "one-hot draft, top-k target": one_hot(truncated_target(plain, 2)),
                "greedy": one_hot(plain).with_temperature(0),
                "placeholder": replace(plain, num_placeholders=1),
            }
            cases += [
                Case(f"seed {seed}, K = {num_draft}, {name}", (problem,))
                for name, problem in problems.items()
            ]
            compact = within_vocabulary(plain, vocabulary)
            name = f"seed {seed}, K = {num_draft}, compact draft"
            cases.append(Case(name, (compact,), vocabulary=vocabulary))
    return cases


def assert_price_is_measured(verifier: Verifier) -> None:
    """The `extra_acceptance` a verifier reports is its distance to the target's law, exactly.

    Examined at the first token of a draft, which is always looked at.

    Raises:
        AssertionError: It reports more or less, or cannot be enumerated.
    """
    assert has_exact_law(verifier), "override accepted_law and residual together with verify"
    for case in price_cases():
        (problem,) = case.problems
        distances, prices = first_token_prices(verifier, problem, case.vocabulary)
        worst = int((distances - prices).abs().argmax())
        distance, price = float(distances[worst]), float(prices[worst])
        assert abs(distance - price) <= TOLERANCE, (
            f"{case.name}: reports an extra acceptance of {price:.6f}, "
            f"but its total variation is {distance:.6f}"
        )


def step_cases() -> list[Case]:
    """One problem each: all kinds of draft, of three tokens and of one."""
    vocabulary = torch.tensor([0, 2, 3])
    plain = random_problem(21, num_draft=3, order=2)
    problems = {
        "plain": plain,
        "adversarial": adversarial(plain),
        "near equal": near_equal(plain, 0.5),
        "top-k target, top-p draft": truncated_draft(truncated_target(plain, 3), 0.7),
        "one-hot draft": one_hot(plain),
        "greedy": one_hot(plain).with_temperature(0),
        "placeholder": replace(plain, num_placeholders=1),
        "one token": random_problem(22, num_draft=1, order=1),
    }
    cases = [Case(name, (problem,)) for name, problem in problems.items()]
    compact = within_vocabulary(plain, vocabulary)
    return [*cases, Case("compact draft", (compact,), vocabulary=vocabulary)]


def assert_draws_its_law(
    verifier: Verifier, *, samples: int = 50_000, false_alarm: float = 1e-6
) -> None:
    """`verify` draws from what the verifier says of itself: `accepted_law` and `residual`.

    The enumeration examines what a verifier says; this closes the gap to what it does. By
    chi-square over drafts, numbers of accepted tokens and tokens after them, jointly.

    Args:
        verifier: Built on `toy_context()` or the like.
        samples: Steps of each case.
        false_alarm: Chance that a right verifier fails, over the whole call.

    Raises:
        AssertionError: It draws from something else, or does not say from what.
    """
    assert has_exact_law(verifier), "override accepted_law and residual together with verify"
    fits = [
        fit_of_step(case.name, verifier, problem, samples=samples, vocabulary=case.vocabulary)
        for case in step_cases()
        for problem in case.problems
    ]
    wrong = [str(fit) for fit in failures(fits, false_alarm)]
    assert not wrong, (
        f"verify draws from another law than accepted_law and residual say (false alarm "
        f"{false_alarm:.0e} in all):\n  " + "\n  ".join(wrong)
    )


def assert_relaxes(verifier: Verifier) -> None:
    """A verifier that calls itself relaxed is not lossless: the label says something.

    Raises:
        AssertionError: The law of its output is the target's in every enumerated case.
    """
    assert has_exact_law(verifier), "override accepted_law and residual together with verify"
    error = max(enumeration_error(verifier, c.problems, c.vocabulary) for c in enumeration_cases())
    assert error > TOLERANCE, (
        f"{type(verifier).__name__} says that it {verifier.guarantee.meaning}, but reproduces the "
        "target's law in every case of the kit: label it LOSSLESS, or test it with options that "
        "relax something over 4 tokens."
    )


def assert_stays_within_its_bound(verifier: Verifier) -> None:
    """A verifier that is `BOUNDED` says by what, and is never further from the target's law.

    Examined at the first token of a draft, averaged over drafts that were drawn.

    Raises:
        AssertionError: It declares no bound, passes it, or cannot be enumerated.
    """
    name, bound = type(verifier).__name__, verifier.total_variation_bound(verifier.options)
    assert bound is not None, f"{name} is BOUNDED: override total_variation_bound to say by what"
    assert has_exact_law(verifier), "override accepted_law and residual together with verify"
    for case in price_cases():
        (problem,) = case.problems
        distances, _ = first_token_prices(verifier, problem, case.vocabulary)
        distance = float(distances.max())
        assert distance <= bound + TOLERANCE, (
            f"{case.name}: {name} declares a total variation of at most {bound:.6f} per draft "
            f"token, but it is {distance:.6f}"
        )


def assert_keeps_its_guarantee(verifier: Verifier, *, samples: int = 200_000) -> None:
    """What `guarantee` promises: the target's law, or a price that is measured right.

    A relaxed verifier must also draw what it says it draws.
    """
    if verifier.guarantee is Guarantee.LOSSLESS:
        assert_lossless(verifier, samples=samples)
    else:
        assert_relaxes(verifier)
        assert_price_is_measured(verifier)
        assert_draws_its_law(verifier)
        if verifier.guarantee is Guarantee.BOUNDED:
            assert_stays_within_its_bound(verifier)


def build_verifier(name: str, options: str = "{}") -> Verifier:
    """A verifier on toy facts.

    Args:
        name: A registered name, or `module:Class`.
        options: JSON object of its options.

    Raises:
        SpecPluginsError: There is none of that name, it does not meet its contract, or the
            options are not its own.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            plugin = getattr(import_module(module), attribute, None)
        except ModuleNotFoundError as error:
            raise PluginError(
                f"{name} cannot be used: {error}. Install its package, or put its folder on "
                "PYTHONPATH."
            ) from error
        problem = contract_problem(Kind.VERIFIER, plugin)
        if problem is not None:
            raise PluginError(f"{name} cannot be used: {problem}.")
        assert plugin is not None
    else:
        plugin = installed().load(Kind.VERIFIER, name)
    try:
        values = json.loads(options)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"The options of {name} must be JSON, got {options!r}: {error}."
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"The options of {name} must be a JSON object, got {options!r}.")
    parsed = read_options(Kind.VERIFIER, name, plugin.Options, values)
    context = toy_context()
    plugin.check(parsed, context.facts)
    return plugin(parsed, context)
