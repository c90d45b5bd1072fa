"""relaxed_visual: what each rule accepts, what it costs, and which tokens it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm_spec_plugins.verifiers.lossless import Lossless, LosslessOptions
from vllm_spec_plugins.verifiers.relaxed_visual import RelaxedVisual, RelaxedVisualOptions

from vllm_spec_plugins.acceptance_rule import token_acceptance
from vllm_spec_plugins.codebook_neighbours import NeighbourCard, write_neighbours
from vllm_spec_plugins.config import read_options
from vllm_spec_plugins.context import ModelFacts
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.errors import ConfigError, SpecPluginsError
from vllm_spec_plugins.registry import Kind
from vllm_spec_plugins.residual import residual_weights
from vllm_spec_plugins.testing.enumeration import (
    enumerated_input,
    first_token_prices,
    output_laws,
    total_variation,
)
from vllm_spec_plugins.testing.guarantees import (
    TOLERANCE,
    assert_keeps_its_guarantee,
    assert_lossless,
)
from vllm_spec_plugins.testing.toy_problems import (
    one_hot,
    random_problem,
    toy_context,
    truncated_target,
)
from vllm_spec_plugins.verifier import VerifyInput

Make = Callable[..., RelaxedVisual]

#: Options of each rule, as loose as the toy problems need.
LOOSE: dict[str, dict[str, Any]] = {
    "lantern": {"budget": 0.4},
    "lantern++": {"factor": 3.0},
    "gsd": {"group_size": 4, "max_probability_difference": 0.5},
    "annealed": {"factor": 2.0},
    "clusters": {"cluster_size": 2},
}
EVERY_RULE = pytest.mark.parametrize("rule", LOOSE)
WITH_TABLE = pytest.mark.parametrize("rule", ["lantern", "lantern++"])


def write_table(path: Path, rows: list[list[int]]) -> str:
    """A table of so many codes; a row may end early."""
    width = max(map(len, rows))
    table = torch.tensor([row + [len(rows)] * (width - len(row)) for row in rows])
    write_neighbours(path, NeighbourCard(len(rows), width, 2, None, 0, "", "toy"), table)
    return str(path)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(rule, first, codes, rows, **options)`: of a model with codes from id `first` on.

    Where `rows` are not given, each code has all others as its neighbours, those that follow it
    first.
    """

    def make(
        rule: str,
        first: int = 0,
        codes: int = 4,
        rows: list[list[int]] | None = None,
        vocab_size: int = 4,
        **options: Any,
    ) -> RelaxedVisual:
        given = {"rule": rule, "image_token_range": (first, first + codes), **LOOSE[rule]}
        if rule == "clusters" or rule.startswith("lantern"):
            ring = [[(c + i) % codes for i in range(1, codes)] for c in range(codes)]
            given["neighbours"] = write_table(tmp_path / "n.safetensors", rows or ring)
        context = toy_context(vocab_size)
        parsed = RelaxedVisualOptions(**{**given, **options})
        RelaxedVisual.check(parsed, context.facts)
        return RelaxedVisual(parsed, context)

    return make


def step(
    p: list[float] | Tensor,
    token_id: int,
    q: list[float] | None = None,
    greedy: bool = False,
) -> VerifyInput:
    """One draft token of one request; p and q as probabilities."""
    logits = torch.as_tensor(p, dtype=torch.float64).log().unsqueeze(0)
    draft = None if q is None else DraftProbabilities(torch.tensor([q], dtype=torch.float64))
    zero = torch.zeros(1, dtype=torch.int64)
    return VerifyInput(
        ["0"], logits, logits, torch.tensor([token_id]), torch.ones(1, dtype=torch.int64), draft,
        torch.tensor([0.0 if greedy else 1.0]), zero, zero,
        max_num_draft=1, all_greedy=greedy, any_greedy=greedy,
    )  # fmt: skip


# The price.


@EVERY_RULE
def test_it_is_not_lossless_and_its_price_is_the_distance(make: Make, rule: str) -> None:
    assert_keeps_its_guarantee(make(rule))
    with pytest.raises(AssertionError, match="enumerated, is off by"):
        assert_lossless(make(rule), cases=[])


@EVERY_RULE
def test_the_price_is_the_distance_where_codes_are_part_of_the_vocabulary(
    make: Make, rule: str
) -> None:
    prices = []
    for seed in range(10):
        problem = random_problem(seed, vocab_size=7, num_draft=1, order=1)
        for case in (problem, one_hot(problem), truncated_target(problem, 4)):
            distance, price = first_token_prices(make(rule, 2, 4, vocab_size=7), case)
            torch.testing.assert_close(distance, price, atol=TOLERANCE, rtol=0)
            prices.append(float(price.max()))
    assert max(prices) > 0.05


@pytest.mark.parametrize("rule", ["lantern", "lantern++", "gsd"])
def test_our_residual_is_nearer_to_the_target_than_the_published_one(make: Make, rule: str) -> None:
    ours, published = make(rule, vocab_size=6, codes=6), make(
        rule, vocab_size=6, codes=6, residual="published"
    )  # fmt: skip
    gains = []
    for seed in range(30):
        problem = random_problem(seed, vocab_size=6, num_draft=1, order=1)
        batch, _, _ = enumerated_input([problem])
        accept = [verifier.acceptance(batch) for verifier in (ours, published)]
        distance = [total_variation(verifier, problem) for verifier in (ours, published)]
        if rule == "gsd":
            assert bool((accept[0] >= accept[1]).all())
        else:
            assert torch.equal(*accept)
            assert distance[0] <= distance[1] + TOLERANCE
            gains.append(distance[1] - distance[0])
    if rule != "gsd":
        assert max(gains) > 0.005


def test_without_falling_back_gsd_accepts_less_than_the_exact_rule_somewhere(make: Make) -> None:
    """And pays for it: further from the target than its extra acceptance says."""
    published = make("gsd", vocab_size=6, codes=6, residual="published")
    below, further = 0, []
    for seed in range(30):
        problem = random_problem(seed, vocab_size=6, num_draft=1, order=1)
        batch, _, (weights,) = enumerated_input([problem])
        accept, exact = published.acceptance(batch), token_acceptance(batch)
        below += int((accept < exact - TOLERANCE).sum())
        gain = float((weights * (accept - exact)).sum())
        further.append(total_variation(published, problem) - gain)
    assert below > 0
    assert min(further) > -TOLERANCE
    assert max(further) > 0.01


def test_a_budget_does_not_bound_the_distance(make: Make) -> None:
    """methods: with many codes, the law moves by more than any one token borrows."""
    rule = make("lantern", codes=24, vocab_size=24, budget=0.1)
    distances = [
        total_variation(rule, random_problem(seed, vocab_size=24, num_draft=1, order=1))
        for seed in range(10)
    ]
    assert max(distances) > 0.1


# What each accepts.

P, Q = [0.1, 0.2, 0.05, 0.3, 0.35], [0.5, 0.125, 0.125, 0.125, 0.125]
#: Of codes 0, 1, 2 at ids 0, 1, 2; ids 3 and 4 are text.
NEAREST = [[2, 1], [0, 2], [1]]


@pytest.mark.parametrize(
    ("budget", "raised"), [(0.0, 0.1), (0.04, 0.1), (0.05, 0.15), (0.24, 0.15), (0.25, 0.35)]
)
def test_lantern_borrows_what_the_budget_allows(make: Make, budget: float, raised: float) -> None:
    # A hair more, for the rounding of the sum.
    rule = make("lantern", codes=3, vocab_size=5, rows=NEAREST, budget=min(1, budget + 1e-9))
    assert float(rule.acceptance(step(P, 0, Q))) == pytest.approx(raised / 0.5)
    assert float(rule.acceptance(step(P, 0))) == pytest.approx(raised)


@pytest.mark.parametrize(("factor", "raised"), [(1.0, 0.1), (1.6, 0.15), (3.6, 0.35)])
def test_lantern_plus_plus_borrows_in_proportion(make: Make, factor: float, raised: float) -> None:
    rule = make("lantern++", codes=3, vocab_size=5, rows=NEAREST, factor=factor)
    assert float(rule.acceptance(step(P, 0, Q))) == pytest.approx(raised / 0.5)


@WITH_TABLE
def test_fewer_neighbours_lend_less(make: Make, rule: str) -> None:
    loose = {"budget": 1.0} if rule == "lantern" else {"factor": 100.0}
    for count, raised in ((0, 0.1), (1, 0.15), (2, 0.35)):
        verifier = make(rule, 0, 3, NEAREST, 5, num_neighbours=count, **loose)
        assert float(verifier.acceptance(step(P, 0, Q))) == pytest.approx(raised / 0.5)


@WITH_TABLE
def test_a_code_without_neighbours_is_exact(make: Make, rule: str) -> None:
    verifier = make(rule, rows=[[], [0, 2], [3], [1]])
    for seed in range(5):
        batch, _, _ = enumerated_input([random_problem(seed, num_draft=1, order=1)])
        accept, exact = verifier.acceptance(batch), token_acceptance(batch)
        assert torch.equal(accept[batch.draft_token_ids == 0], exact[batch.draft_token_ids == 0])
    none = make(rule, rows=[[], [], [], [1]], num_neighbours=0)
    batch, _, _ = enumerated_input([random_problem(1, num_draft=2)])
    assert torch.equal(none.acceptance(batch), token_acceptance(batch))


def test_gsd_groups_what_is_about_as_likely(make: Make) -> None:
    # Ranked: 4 (.35), 3 (.3), 1 (.2), 0 (.1), 2 (.05). Group of 0, G = 4: two above, one below.
    wide = make("gsd", codes=5, vocab_size=5, group_size=4, max_probability_difference=1.0)
    expected = (0.3 + 0.2 + 0.1 + 0.05) / (0.125 + 0.125 + 0.5 + 0.125)
    assert float(wide.acceptance(step(P, 0, Q))) == pytest.approx(expected)
    # Only ids 0 to 2 are codes.
    image = make("gsd", codes=3, vocab_size=5, group_size=4, max_probability_difference=1.0)
    expected = (0.2 + 0.1 + 0.05) / (0.125 + 0.5 + 0.125)
    assert float(image.acceptance(step(P, 0, Q))) == pytest.approx(expected)
    near = make("gsd", codes=5, vocab_size=5, group_size=4, max_probability_difference=0.08)
    assert float(near.acceptance(step(P, 0, Q))) == pytest.approx(0.15 / 0.625)
    # A choice has all of the draft's probability: the group's is that of acceptance.
    assert float(near.acceptance(step(P, 0))) == pytest.approx(0.15)


def test_annealed_is_strict_late_in_a_draft(make: Make) -> None:
    rule = make("annealed", codes=8, vocab_size=8, factor=3.0, decay=0.7)
    steps = 4
    p = torch.full((steps, 8), 0.125).double()
    q = torch.tensor([0.86] + [0.02] * 7).double().expand(steps, 8)
    batch = replace(
        step([0.125] * 8, 0),
        target_logits=p.log(),
        draft_token_ids=torch.zeros(steps, dtype=torch.int64),
        num_draft=torch.tensor([steps]),
        draft_probabilities=DraftProbabilities(q),
        max_num_draft=steps,
    )
    lift = [max(1.0, 3 * math.exp(-0.7 * i)) for i in range(steps)]
    expected = torch.tensor(lift).double() * 0.125 / 0.86
    torch.testing.assert_close(rule.acceptance(batch), expected)


# Whom it leaves alone.


@EVERY_RULE
def test_only_ids_inside_the_range_are_relaxed(make: Make, rule: str) -> None:
    first, codes, vocab_size = 2, 4, 8
    verifier = make(rule, first, codes, vocab_size=vocab_size)
    relaxed: set[int] = set()
    for seed in range(20):
        problem = random_problem(seed, vocab_size=vocab_size, num_draft=1, order=1)
        batch, _, _ = enumerated_input([problem, one_hot(problem)])
        more = verifier.acceptance(batch) > token_acceptance(batch) + TOLERANCE
        relaxed |= set(batch.draft_token_ids[more].tolist())
    assert relaxed == set(range(first, first + codes))


@EVERY_RULE
def test_excluded_tokens_are_never_accepted_and_lend_nothing(make: Make, rule: str) -> None:
    plain = random_problem(5, num_draft=2, order=2)
    for kept in (truncated_target(plain, 2), truncated_target(plain, 1)):
        impossible = kept.laws_of_text(3) == 0
        for problem in (kept, one_hot(kept), one_hot(kept).with_temperature(0)):
            laws = output_laws(make(rule), [problem])[0].view(-1, 4**3)
            assert float(laws[:, impossible].max()) == 0
            torch.testing.assert_close(laws.sum(dim=1), torch.ones(len(laws)).double())


@WITH_TABLE
def test_a_token_of_probability_zero(make: Make, rule: str) -> None:
    """It borrows nothing from what it cannot stand for: the sampling options exclude it."""
    p = [0.0, 0.5, 0.5, 0.0]
    for q in (None, [0.7, 0.1, 0.1, 0.1]):
        batch = step(p, 0, q)
        verifier = make(rule)
        assert float(verifier.acceptance(batch)) == 0
        for residual in ("ours", "published"):
            weights = make(rule, residual=residual).residual(batch, torch.tensor([0]))
            assert bool(weights.isfinite().all())
            assert float(weights.sum()) > 0
            assert float(weights[0, [0, 3]].sum()) == 0


#: Codes 0, 1 and 2 have .101, .2 and .05; text has .3 and .349. By `NEAREST` code 0 can have
#: .351, the most; code 1 as much; code 2 only .25.
GREEDY = [0.101, 0.2, 0.05, 0.3, 0.349]


@WITH_TABLE
def test_greedy_a_code_stands_when_it_and_what_it_borrows_are_the_most(
    make: Make, rule: str
) -> None:
    verifier = make(rule, 0, 3, NEAREST, 5, **_all_of_it(rule))
    for token_id, stands in ((0, 1), (1, 1), (2, 0), (3, 0), (4, 1)):
        verification = verifier.verify(step(GREEDY, token_id, greedy=True))
        assert int(verification.accepted) == stands
        assert int(verification.token_ids[0, stands]) == 4
        relaxed = stands and token_id != 4
        assert verification.extra_acceptance.tolist() == [1.0 if relaxed else 0.0]


@pytest.mark.parametrize("rule", ["gsd", "annealed"])
def test_greedy_the_other_rules_match_exactly(make: Make, rule: str) -> None:
    verifier = make(rule, 0, 5, vocab_size=5)
    for token_id in range(5):
        accepted = verifier.verify(step(GREEDY, token_id, greedy=True)).accepted
        assert int(accepted) == (token_id == 4)


def _all_of_it(rule: str) -> dict[str, Any]:
    return {"budget": 1.0} if rule == "lantern" else {"factor": 1000.0}


@WITH_TABLE
def test_duplicate_codes_share_what_they_have(make: Make, rule: str) -> None:
    # Codes 0 and 1 are one picture; each is the other's first neighbour.
    verifier = make(rule, 0, 3, [[1], [0], []], 4, **_all_of_it(rule))
    p = [0.1, 0.3, 0.2, 0.4]
    assert float(verifier.acceptance(step(p, 0))) == pytest.approx(0.4)
    assert float(verifier.acceptance(step(p, 1))) == pytest.approx(0.4)
    assert float(verifier.acceptance(step(p, 2))) == pytest.approx(0.2)


@EVERY_RULE
def test_a_request_over_its_limit_is_exact_by_either_residual(make: Make, rule: str) -> None:
    for residual in ("ours", "published"):
        if rule in ("annealed", "clusters") and residual == "published":
            continue
        limited = make(rule, max_total_variation=0.0, residual=residual)
        batch, _, _ = enumerated_input([random_problem(2, num_draft=2)])
        rows = torch.arange(len(batch.draft_token_ids))
        assert torch.equal(limited.acceptance(batch), token_acceptance(batch))
        assert torch.equal(limited.residual(batch, rows), residual_weights(batch, rows))


def test_the_published_residual_of_lantern_is_its_formula(make: Make) -> None:
    verifier = make(
        "lantern", codes=3, vocab_size=5, rows=NEAREST, budget=1.0, residual="published"
    )
    row = torch.tensor([0])
    drawn = verifier.residual(step(P, 0, Q), row)[0].tolist()
    # q without ids 1 and 2; [p - q']+
    assert drawn == pytest.approx([0.0, 0.2, 0.05, 0.3 - 0.125, 0.35 - 0.125])
    chosen = verifier.residual(step(P, 0), row)[0].tolist()
    assert chosen == pytest.approx([0.0, 0.0, 0.0, 0.3, 0.35])
    # Nothing borrowed (code 2's only neighbour is code 1, dearer than the budget): ordinary.
    strict = make("lantern", codes=3, vocab_size=5, rows=NEAREST, budget=0.1, residual="published")
    batch = step(P, 2, Q)
    assert torch.equal(strict.residual(batch, row), residual_weights(batch, row))


@EVERY_RULE
def test_drafts_of_both_kinds_and_ragged_in_one_batch(make: Make, rule: str) -> None:
    """Each row's acceptance is the one it has alone."""
    problem = random_problem(9, num_draft=2)
    batch, _, _ = enumerated_input(
        [problem, one_hot(problem), replace(problem, num_placeholders=1)]
    )
    verifier = make(rule)
    together = verifier.acceptance(batch)
    for request in range(0, len(batch.num_draft), 3):
        rows = batch.request_of == request
        alone = verifier.acceptance(batch.select(torch.tensor([request])))
        torch.testing.assert_close(together[rows], alone)


def test_text_alone_never_touches_the_table(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = make("lantern", 2, 2, vocab_size=4)
    monkeypatch.setattr(verifier, "_neighbours_of", None)
    assert float(verifier.acceptance(step([0.1, 0.2, 0.3, 0.4], 1, [0.1, 0.7, 0.1, 0.1]))) == (
        pytest.approx(2 / 7)
    )


# What is refused, before anything loads.


def facts(vocab_size: int = 20, codes: tuple[int, int] | None = None) -> ModelFacts:
    return replace(toy_context(vocab_size).facts, image_token_range=codes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rule": "lanterne"}, '"rule": input should be'),
        ({}, '"rule" is missing'),
        ({"rule": "lantern", "budget": 1.5}, '"budget"'),
        ({"rule": "lantern", "budget": -0.1}, '"budget"'),
        ({"rule": "lantern++", "factor": 0.9}, '"factor"'),
        ({"rule": "annealed", "decay": -1}, '"decay"'),
        ({"rule": "gsd", "group_size": 1}, '"group_size"'),
        ({"rule": "clusters", "cluster_size": 1}, '"cluster_size"'),
        ({"rule": "gsd", "max_probability_difference": 0}, '"max_probability_difference"'),
        ({"rule": "gsd", "image_token_range": [1, 2, 3]}, '"image_token_range'),
        ({"rule": "lantern", "max_total_variation": 2}, '"max_total_variation"'),
        ({"rule": "lantern", "delta": 0.1}, 'unknown option "delta"'),
    ],
)
def test_options_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_options(Kind.VERIFIER, "relaxed_visual", RelaxedVisualOptions, options)
    assert str(error.value).startswith('The verifier "relaxed_visual":')
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("options", "model", "said"),
    [
        ({"rule": "gsd"}, facts(), 'Give "image_token_range"'),
        ({"rule": "gsd", "image_token_range": (5, 21)}, facts(), "token ids from 0 to 19"),
        ({"rule": "gsd", "image_token_range": (5, 5)}, facts(), "within them"),
        ({"rule": "gsd", "image_token_range": (-1, 5)}, facts(), "within them"),
        ({"rule": "gsd"}, facts(20, (5, 21)), "in its config.json is [5, 21]"),
        ({"rule": "lantern"}, facts(20, (5, 9)), 'needs "neighbours"'),
        ({"rule": "gsd", "budget": 0.1}, facts(20, (5, 9)), '"budget" is no option of the rule'),
        (
            {"rule": "annealed", "residual": "published"},
            facts(20, (5, 9)),
            'Remove "residual"',
        ),
    ],
)
def test_options_that_do_not_go_together(
    options: dict[str, Any], model: ModelFacts, said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        RelaxedVisual.check(RelaxedVisualOptions(**options), model)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "codes", "more", "said"),
    [
        ({}, (5, 8), {}, "has neighbours of 4 codes, but image_token_range [5, 8) holds 3"),
        ({"first_token_id": 4}, (5, 9), {}, "made for codes that begin at id 4"),
        ({"vocab_size": 21, "model": "other"}, (5, 9), {}, 'made for another model ("other")'),
        ({}, (5, 9), {"num_neighbours": 4}, "has 3 of each code"),
    ],
)
def test_tables_of_another_model(
    tmp_path: Path,
    changes: dict[str, Any],
    codes: tuple[int, int],
    more: dict[str, Any],
    said: str,
) -> None:
    path = tmp_path / "n.safetensors"
    table = torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
    card = replace(NeighbourCard(4, 3, 2, None, 0, "", "toy"), **changes)
    write_neighbours(path, card, table)
    options = RelaxedVisualOptions(
        rule="lantern", neighbours=str(path), image_token_range=codes, **more
    )
    with pytest.raises(SpecPluginsError) as error:
        RelaxedVisual.check(options, facts())
    assert said in str(error.value)


def test_a_missing_table(tmp_path: Path) -> None:
    options = RelaxedVisualOptions(
        rule="lantern", neighbours=str(tmp_path / "absent"), image_token_range=(5, 9)
    )
    with pytest.raises(SpecPluginsError, match=r"no neighbour table .*calibrate codebook"):
        RelaxedVisual.check(options, facts())


def test_the_range_is_taken_from_the_model(make: Make) -> None:
    """What its config says and what the user says are the same verifier."""
    context = toy_context(8)
    context = replace(context, facts=replace(context.facts, image_token_range=(2, 6)))
    options = RelaxedVisualOptions(rule="annealed", factor=2.0)
    RelaxedVisual.check(options, context.facts)
    read, said = RelaxedVisual(options, context), make("annealed", 2, 4, vocab_size=8)
    batch, _, _ = enumerated_input([random_problem(1, vocab_size=8, num_draft=1, order=1)])
    assert torch.equal(read.acceptance(batch), said.acceptance(batch))


def test_at_its_strictest_every_rule_is_lossless(make: Make) -> None:
    lossless = Lossless(LosslessOptions(rule="token"), toy_context(4))
    problem = random_problem(6, num_draft=2)
    [exact] = output_laws(lossless, [problem])
    strict = [
        make("lantern", budget=0.0),
        make("lantern++", factor=1.0),
        make("gsd", max_probability_difference=1e-12),
        make("annealed", factor=1.0),
        make("clusters", num_neighbours=0),
    ]
    for verifier in strict:
        [law] = output_laws(verifier, [problem])
        torch.testing.assert_close(law, exact, atol=TOLERANCE, rtol=0)


def test_equals_and_neighbours_by_rank_make_a_group() -> None:
    """Against a full sort, on many rows; equals of the draft token count as above it."""
    from vllm_spec_plugins.verifiers.probability_groups import group_of

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 30, generator=generator, dtype=torch.float64) * 2
    logits[:, 5:9] = -torch.inf
    token_ids = torch.randint(10, 30, (40,), generator=generator)
    logits[3, 20:23] = logits[3, token_ids[3]]
    batch = replace(
        step([1.0], 0),
        target_logits=logits,
        draft_token_ids=token_ids,
        num_draft=torch.ones(40, dtype=torch.int64),
    )
    rows = torch.arange(40)
    groups = group_of(batch, rows, (4, 30), 7, 1.0)
    for row, token_id, group in zip(logits, token_ids.tolist(), groups, strict=True):
        ids = [i for i in range(4, 30) if row[i] > -torch.inf and i != token_id]
        ids.sort(key=lambda i, row=row: float(row[i]))
        above = [i for i in ids if row[i] >= row[token_id]][:3]
        below = [i for i in ids if row[i] < row[token_id]][-3:]
        found = sorted(float(row[i]) for i in group.tolist() if i >= 0)
        assert found == sorted(float(row[i]) for i in [*above, token_id, *below])
    # Everything else is excluded: x is alone.
    alone = logits.clone().fill_(-torch.inf).scatter_(1, token_ids.unsqueeze(1), 0.0)
    groups = group_of(replace(batch, target_logits=alone), rows, (4, 30), 7, 1.0)
    assert torch.equal(groups.amax(dim=1), token_ids)
    assert bool(((groups >= 0).sum(dim=1) == 1).all())
