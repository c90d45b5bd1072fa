"""relaxed_visual, rule clusters: the law of clusters stays the target's, only codes are relaxed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm_spec_plugins.verifiers.code_clusters import CodeClusters
from vllm_spec_plugins.verifiers.relaxed_visual import RelaxedVisual, RelaxedVisualOptions

from vllm_spec_plugins.acceptance_rule import token_acceptance
from vllm_spec_plugins.calibration.codebook import nearest_codes
from vllm_spec_plugins.codebook_neighbours import NeighbourCard, write_neighbours
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.errors import ConfigError
from vllm_spec_plugins.residual import residual_weights
from vllm_spec_plugins.testing.enumeration import (
    enumerated_input,
    expected_accepted,
    first_token_prices,
    output_laws,
    total_variation,
)
from vllm_spec_plugins.testing.guarantees import TOLERANCE
from vllm_spec_plugins.testing.toy_problems import (
    ToyProblem,
    near_equal,
    one_hot,
    random_problem,
    toy_context,
    truncated_draft,
    truncated_target,
    within_vocabulary,
)
from vllm_spec_plugins.verifier import VerifyInput

#: Ids 0 and 5 are text. Codes 0, 1 and 2 (ids 1 to 3) are one cluster, code 3 is alone.
VOCABULARY, FIRST = 6, 1
TABLE = [[1, 2], [0, 2], [1, 0], [2, 1]]
CLUSTER_OF = torch.tensor([0, 1, 1, 1, 2, 3])
P = [0.1, 0.2, 0.05, 0.15, 0.2, 0.3]
Q = [0.3, 0.1, 0.30, 0.10, 0.1, 0.1]

Make = Callable[..., RelaxedVisual]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(table, **options)`: of a model of `VOCABULARY` ids with codes from `FIRST` on."""

    def make(table: list[list[int]] = TABLE, **options: Any) -> RelaxedVisual:
        path, codes = tmp_path / "n.safetensors", len(table)
        card = NeighbourCard(codes, len(table[0]), 2, None, 0, "", "toy")
        write_neighbours(path, card, torch.tensor(table))
        given = {
            "rule": "clusters",
            "image_token_range": (FIRST, FIRST + codes),
            "neighbours": str(path),
            "cluster_size": 3,
        }
        context = toy_context(VOCABULARY)
        parsed = RelaxedVisualOptions(**{**given, **options})
        RelaxedVisual.check(parsed, context.facts)
        return RelaxedVisual(parsed, context)

    return make


def step(p: list[float], token_id: int, q: list[float] | None, greedy: bool = False) -> VerifyInput:
    """One draft token of one request."""
    logits = torch.tensor([p], dtype=torch.float64).log()
    draft = None if q is None else DraftProbabilities(torch.tensor([q], dtype=torch.float64))
    zero = torch.zeros(1, dtype=torch.int64)
    return VerifyInput(
        ["0"], logits, logits, torch.tensor([token_id]), torch.ones(1, dtype=torch.int64), draft,
        torch.tensor([0.0 if greedy else 1.0]), zero, zero,
        max_num_draft=1, all_greedy=greedy, any_greedy=greedy,
    )  # fmt: skip


def by_cluster(laws: Tensor) -> Tensor:
    """`[..., V]` to `[..., clusters]`."""
    indicator = torch.nn.functional.one_hot(CLUSTER_OF).double()
    return laws @ indicator


def cases() -> list[ToyProblem]:
    """Drafts of two tokens: they are drawn, chosen, cut off, and verified under masks."""
    found = []
    for seed in range(4):
        problem = random_problem(seed, vocab_size=VOCABULARY, num_draft=2, order=1)
        masked = truncated_target(problem, 3)
        found += [
            problem,
            one_hot(problem),
            masked,
            one_hot(masked),
            truncated_draft(problem, 0.6),
            near_equal(problem),
            within_vocabulary(problem, torch.tensor([0, 2, 3, 4])),
            problem.with_temperature(0.3),
            problem.with_temperature(0),
            one_hot(masked).with_temperature(0),
            replace(problem, num_placeholders=1),
        ]
    return found


# What stays the target's, and what does not.


def test_given_any_text_the_next_cluster_has_the_law_of_the_target(make: Make) -> None:
    rule, relaxed = make(), 0.0
    for problem in cases():
        for law in output_laws(rule, [problem])[0].view(-1, VOCABULARY ** (problem.num_draft + 1)):
            contexts = torch.tensor([problem.start])
            for length in range(problem.num_draft + 1):
                # [V^length, V]: how likely each text of that length is, and what follows it.
                ours = law.view(VOCABULARY**length, VOCABULARY, -1).sum(dim=2)
                exact = ours.sum(dim=1, keepdim=True) * problem.target[contexts]
                error = (by_cluster(ours) - by_cluster(exact)).abs().max()
                assert float(error) < TOLERANCE
                relaxed = max(relaxed, float((ours - exact).abs().max()))
                contexts = problem.after(contexts.unsqueeze(1), torch.arange(VOCABULARY)).flatten()
    assert relaxed > 0.05


def test_whole_texts_of_clusters_where_the_target_reads_clusters_alone(make: Make) -> None:
    rule = make()
    for seed in range(3):
        problem = random_problem(seed, vocab_size=VOCABULARY, num_draft=3, order=1)
        same = torch.tensor([0, 1, 1, 1, 4, 5])  # what follows is said by the cluster
        problem = replace(problem, target_logits=problem.target_logits[same])
        (law,) = output_laws(rule, [problem])
        laws = torch.stack([law, problem.laws_of_text(4)]).view(2, *(VOCABULARY,) * 4)
        for _ in range(4):  # each axis in turn, back to their order in the end
            laws = by_cluster(laws).movedim(-1, 1)
        assert float((laws[0] - laws[1]).abs().max()) < TOLERANCE
        assert total_variation(rule, problem) > 0.05


def test_the_price_is_the_distance_and_lies_inside_clusters(make: Make) -> None:
    rule, prices = make(), []
    for problem in cases():
        if not problem.num_placeholders:
            distance, price = first_token_prices(rule, problem)
            torch.testing.assert_close(distance, price, atol=TOLERANCE, rtol=0)
            prices.append(float(price.max()))
    assert max(prices) > 0.1
    problem = replace(cases()[0], num_draft=1)
    (law,) = output_laws(rule, [problem])
    moved = law.view(VOCABULARY, VOCABULARY).sum(dim=1) - problem.laws_of_text(1)
    assert float(moved[1:4].abs().max()) > 0.01
    assert float(moved[[0, 4, 5]].abs().max()) < TOLERANCE


def test_as_much_is_accepted_as_the_law_of_clusters_allows(make: Make) -> None:
    rule = make()
    for seed in range(5):
        problem = random_problem(seed, vocab_size=VOCABULARY, num_draft=1, order=1)
        assert problem.draft_probabilities is not None
        p, q = by_cluster(problem.target)[-1], by_cluster(problem.draft_probabilities)[-1]
        most = float(torch.minimum(p, q).sum())
        assert expected_accepted(rule, problem) == pytest.approx(most, abs=TOLERANCE)


# The formulas.


def test_acceptance_and_residual_by_hand(make: Make) -> None:
    rule, row = make(), torch.tensor([0])
    # In the cluster: up .1, 0, .05 and dn 0, .25, 0, so U = .15 and D = .25.
    accept = [float(rule.acceptance(step(P, token, Q))) for token in range(VOCABULARY)]
    cluster = 0.05 / 0.3 + (1 - 0.05 / 0.3) * 0.15 / 0.25
    assert accept == pytest.approx([1 / 3, 1, cluster, 1, 1, 1])
    for token in (0, 2):  # the same whichever token was refused
        weights = rule.residual(step(P, token, Q), row)[0].tolist()
        assert weights == pytest.approx([0, 0, 0, 0, 0.1, 0.2])
    # Less of the cluster drafted than the target has: U = .3, D = .05, and all of D stands.
    q = [0.6, 0.0, 0.1, 0.05, 0.05, 0.2]
    p = [0.1, 0.2, 0.05, 0.15, 0.2, 0.3]
    assert float(rule.acceptance(step(p, 2, q))) == pytest.approx(1)
    weights = rule.residual(step(p, 0, q), row)[0].tolist()
    left = 0.25 / 0.3
    assert weights == pytest.approx([0, 0.2 * left, 0, 0.1 * left, 0.15, 0.1])


def test_a_choice_is_accepted_with_what_its_cluster_has(make: Make) -> None:
    rule = make()
    for token, expected in ((0, 0.1), (1, 0.4), (2, 0.4), (3, 0.4), (4, 0.2)):
        assert float(rule.acceptance(step(P, token, None))) == pytest.approx(expected)
    weights = rule.residual(step(P, 2, None), torch.tensor([0]))[0].tolist()
    assert weights == pytest.approx([0.1, 0, 0, 0, 0.2, 0.3])


def test_excluded_codes_are_no_part_of_their_cluster(make: Make) -> None:
    p = [0.1, 0.2, 0.0, 0.2, 0.2, 0.3]
    rule, row = make(), torch.tensor([0])
    for q in (Q, None):
        batch = step(p, 2, q)
        assert float(rule.acceptance(batch)) == 0
        weights = rule.residual(batch, row)
        assert float(weights[0, 2]) == 0
    # Its share of q counts in neither D nor Q: id 3's excess .1 is met by id 1's shortfall.
    q = [0.1, 0.1, 0.3, 0.3, 0.1, 0.1]
    assert float(rule.acceptance(step(p, 3, q))) == pytest.approx(1)
    p, q = [0.3, 0.2, 0.0, 0.1, 0.2, 0.2], [0.3, 0.1, 0.1, 0.3, 0.1, 0.1]
    assert float(rule.acceptance(step(p, 3, q))) == pytest.approx(1 / 3 + 2 / 3 * 0.5)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (P, P),  # U = D = 0 everywhere
        ([0.1, 0.1, 0.1, 0.1, 0.3, 0.3], [0.1, 0.2, 0.2, 0.2, 0.2, 0.1]),  # U = 0 in the cluster
        ([0.1, 0.3, 0.2, 0.2, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1, 0.3, 0.3]),  # D = 0 in the cluster
        ([0, 0.5, 0.2, 0.3, 0, 0], [0, 0.2, 0.5, 0.3, 0, 0]),  # nothing but the cluster
        ([0, 0.5, 0.5, 0, 0, 0], [0, 0, 0, 0, 0.5, 0.5]),  # nothing in common
    ],
)
def test_a_residual_can_always_be_drawn_from(make: Make, p: list[float], q: list[float]) -> None:
    rule = make()
    for token_id in (-1, *range(VOCABULARY)):
        for law in (q, None):
            batch = step(p, token_id, law)
            accept = float(rule.acceptance(batch))
            assert 0 <= accept <= 1
            weights = rule.residual(batch, torch.tensor([0]))[0]
            assert bool(weights.isfinite().all())
            assert float(weights.min()) >= 0
            assert float(weights.sum()) > 0
            assert bool((weights[torch.tensor(p) == 0] == 0).all())
    # A placeholder was drawn from nothing: the target's own law.
    weights = rule.residual(step(p, -1, q), torch.tensor([0]))[0].tolist()
    assert weights == pytest.approx(p)


def test_greedy_a_code_stands_in_the_cluster_of_the_most_likely_token(make: Make) -> None:
    rule = make()
    likely = [0.1, 0.2, 0.05, 0.4, 0.15, 0.1]
    for token, stands in enumerate([0, 1, 1, 1, 0, 0]):
        verification = rule.verify(step(likely, token, None, greedy=True))
        assert int(verification.accepted) == stands
        assert verification.extra_acceptance.tolist() == [float(stands and token != 3)]
        assert int(verification.token_ids[0, stands]) == 3
    text = [0.1, 0.2, 0.05, 0.15, 0.2, 0.3]
    for token in range(VOCABULARY):
        accepted = rule.verify(step(text, token, None, greedy=True)).accepted
        assert int(accepted) == (token == 5)
    masked = [0.1, 0.3, 0.0, 0.4, 0.1, 0.1]
    assert int(rule.verify(step(masked, 2, None, greedy=True)).accepted) == 0


def test_a_request_over_its_limit_is_exact_in_a_batch_that_is_not(make: Make) -> None:
    rule = make(max_total_variation=0.01)
    free, limited = step(P, 2, Q), replace(step(P, 2, Q), request_ids=["limited"])
    rule.verify(limited)  # its price is more than .01
    row = torch.tensor([0])
    assert torch.equal(rule.acceptance(limited), token_acceptance(limited))
    assert torch.equal(rule.residual(limited, row), residual_weights(limited, row))
    assert float(rule.acceptance(free)) > float(token_acceptance(free))
    both, _, _ = enumerated_input([random_problem(0, vocab_size=VOCABULARY, num_draft=1)] * 2)
    ids = ["limited"] * VOCABULARY + [str(i) for i in range(VOCABULARY)]
    both = replace(both, request_ids=ids)
    rows = torch.arange(len(both.draft_token_ids))
    weights, exact = rule.residual(both, rows), residual_weights(both, rows)
    assert torch.equal(weights[:VOCABULARY], exact[:VOCABULARY])
    unlimited = make().residual(both, rows[VOCABULARY:])
    torch.testing.assert_close(weights[VOCABULARY:], unlimited)
    assert not torch.equal(unlimited, exact[VOCABULARY:])


# The clusters.


@pytest.mark.parametrize("size", [2, 5, 16, 200])
@pytest.mark.parametrize("max_distance", [None, 0.8])
def test_every_code_is_in_exactly_one_cluster(size: int, max_distance: float | None) -> None:
    embeddings = torch.randn(150, 2, generator=torch.Generator().manual_seed(size))
    embeddings[7] = embeddings[90]
    table = nearest_codes(embeddings, 20, max_distance)
    clusters = CodeClusters.gather(table, size, 0)
    members = clusters.members[clusters.members >= 0]
    assert members.sort().values.tolist() == list(range(150))
    assert clusters.members.shape[1] <= size
    for cluster, row in enumerate(clusters.members):
        assert bool((clusters.of_code[row[row >= 0]] == cluster).all())
        # All of them are near the first.
        assert set(row[row >= 0].tolist()[1:]) <= set(table[row[0]].tolist())
    again = CodeClusters.gather(table, size, 0)
    assert torch.equal(again.of_code, clusters.of_code)


def test_the_most_wanted_code_comes_first() -> None:
    # Code 2 is nearest to 0, 1 and 3; code 4 is far from all.
    table = torch.tensor([[2, 1, 3], [2, 0, 3], [3, 0, 1], [2, 0, 1], [5, 5, 5]])
    clusters = CodeClusters.gather(table, 2, 10)
    assert clusters.members.tolist() == [[2, 3], [0, 1], [4, -1]]
    assert clusters.of_code.tolist() == [1, 1, 0, 0, 2]


def test_codes_without_neighbours_are_exact(make: Make) -> None:
    problem = random_problem(1, vocab_size=VOCABULARY, num_draft=2, order=1)
    rule = make(num_neighbours=0)
    assert total_variation(rule, problem) < TOLERANCE
    far = make([[4, 4], [4, 4], [4, 4], [4, 4]])
    assert total_variation(far, problem) < TOLERANCE


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"neighbours": None}, 'needs "neighbours"'),
        ({"residual": "published"}, '"clusters" has one residual, ours. Remove "residual"'),
        ({"budget": 0.1}, '"budget" is no option of the rule "clusters"'),
        ({"num_neighbours": 3}, "has 2 of each code"),
        ({"cluster_size": 4}, "enough for clusters of 3"),
    ],
)
def test_what_does_not_go_together(make: Make, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(**options)
    assert said in str(error.value)
