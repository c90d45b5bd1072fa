"""Compiled passes over rows, and decisions on wide steps, against float64 arithmetic.

Elsewhere steps are narrow or in float64, which take other paths.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm_spec_plugins.verifiers.code_clusters import CodeClusters

from vllm_spec_plugins import (
    compiled_arithmetic,
    compiled_greedy,
    compiled_rows,
    greedy_on_host,
    vocabulary_passes,
)
from vllm_spec_plugins.codebook_neighbours import NeighbourCard, write_neighbours
from vllm_spec_plugins.context import EngineContext, ModelFacts
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.registry import Kind, installed
from vllm_spec_plugins.relaxed_rule import RelaxedRule
from vllm_spec_plugins.verifier import VerifyInput
from vllm_spec_plugins.vocabulary_passes import (
    closest_columns,
    divergence_of_rows,
    entropy_of_rows,
    is_compiled,
    largest_entries,
    log_normaliser_of_rows,
    marks_above,
    near_laws,
    possible,
)

VOCABULARY, FIRST, NEIGHBOURS, NUM_DRAFT = 3000, 1000, 6, 4
ROWS = torch.tensor([5, 0, 3, 7])
FACTS = ModelFacts("wide", VOCABULARY, 8, 1, 4096, NUM_DRAFT)
CONTEXT = EngineContext(FACTS, torch.device("cpu"), max_num_requests=32, seed=0)


def random_logits(rows: int, seed: int, width: int = VOCABULARY) -> Tensor:
    """`[rows, V]` float32: a few likely tokens, some excluded, one row of a single token."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, width, generator=generator) * 2
    likely = torch.randint(width, (rows, 30), generator=generator)
    logits.scatter_add_(1, likely, torch.rand(likely.shape, generator=generator) * 10)
    logits[torch.rand(logits.shape, generator=generator) < 0.1] = -torch.inf
    return logits


@pytest.fixture
def logits() -> Tensor:
    values = random_logits(8, seed=1)
    values[3, 1:] = -torch.inf
    values[3, 0] = 4.0
    assert is_compiled(values)
    assert not is_compiled(values.double())
    return values


def test_normalisers_and_entropies_of_rows(logits: Tensor) -> None:
    expected = logits[ROWS].double().logsumexp(dim=1)
    shift = log_normaliser_of_rows(logits, ROWS)
    torch.testing.assert_close(shift.double(), expected, rtol=1e-6, atol=1e-6)
    known = log_normaliser_of_rows(logits, ROWS, logits[ROWS].amax(dim=1))
    assert torch.equal(known, shift)
    law = torch.distributions.Categorical(logits=logits[ROWS].double())
    for values in (logits, logits.double()):
        found = entropy_of_rows(values, ROWS, shift.to(values.dtype)).double()
        torch.testing.assert_close(found, law.entropy(), rtol=1e-5, atol=1e-5)


def test_divergences_of_rows(logits: Tensor) -> None:
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    law = torch.softmax(logits + noise, dim=1)
    law[0, logits[0].argmax()] = 0  # misses a token the target has
    shift = log_normaliser_of_rows(logits, ROWS)
    p, q = torch.softmax(logits[ROWS].double(), dim=1), law[ROWS].double()
    expected = (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(dim=1)
    assert expected.isinf().tolist() == [False, True, False, False]
    for values in (logits, logits.double()):
        found = divergence_of_rows(values, law.to(values.dtype), ROWS, shift.to(values.dtype))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_near_laws_are_found_row_by_row(logits: Tensor) -> None:
    """Of tokens that were drawn, chosen, excluded, or are none; the rest in test_relaxed_rules."""
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    law = torch.softmax(logits + 0.3 * noise, dim=1)
    rows = torch.arange(8)
    p = torch.softmax(logits, dim=1)
    # A token that the draft finds likelier, but not by much.
    ids = torch.where((law > p) & (law < 2 * p), p, 0).argmax(dim=1)
    ids[4], ids[5] = logits[4].argmin(), -1
    law[6, logits[6].argmax()] = 0
    own, drafted = p[rows, ids], law[rows, ids]
    drafted[2] = 1  # chosen
    drafted[5] = own[5] = 0
    divergence = (torch.special.xlogy(p, p) - torch.special.xlogy(p, law)).sum(dim=1)
    assert bool((divergence[[0, 1, 2, 4, 5, 7]] < 0.2).all())
    for bound in (0.2, 1e-3):
        near = near_laws(logits, law, ids, own, drafted, bound)
        expected = (divergence <= bound) & (own < drafted)
        expected[[2, 4, 5, 6]] = False
        assert near.tolist() == expected.tolist()
        assert bool(near.any()) == (bound == 0.2)


def test_exponentials_and_logarithms() -> None:
    x = np.linspace(-87, 0, 4001).astype(np.float32)
    found = np.array([compiled_arithmetic.exp.py_func(value) for value in x])
    error = np.abs(found / np.exp(x.astype(np.float64)) - 1)
    assert error[x > -4].max() < 5e-7
    assert error.max() < 5e-6
    x = np.exp(np.linspace(-87, 3, 4001)).astype(np.float32)
    found = np.array([compiled_arithmetic.log.py_func(value) for value in x])
    np.testing.assert_allclose(found, np.log(x.astype(np.float64)), rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_possible(logits: Tensor, dtype: torch.dtype) -> None:
    ids = logits.argmax(dim=1)
    ids[[1, 6]] = logits.argmin(dim=1)[[1, 6]]
    ids[4] = -1
    found = possible(logits.to(dtype), ids)
    assert found.tolist() == [True, False, True, True, False, True, False, True]
    assert possible(logits[:0].to(dtype), ids[:0]).tolist() == []


def test_marks_above_values(logits: Tensor) -> None:
    values = logits[ROWS, 7]
    values[2] = -torch.inf  # excluded tokens are not above it
    expected = (logits[ROWS] > values.unsqueeze(1)).float()
    for table in (logits, logits.double()):
        assert torch.equal(marks_above(table, ROWS, values.to(table.dtype)), expected.to(table))


@pytest.mark.parametrize("count", [1, 3, 40])
def test_largest_entries_of_rows(logits: Tensor, count: int) -> None:
    logits[5] = logits[5].round()  # many equal
    assert torch.equal(largest_entries(logits, ROWS, count), logits[ROWS].topk(count).values)


@pytest.mark.parametrize("counts", [(1, 0), (7, 6), (40, 40)])
def test_closest_columns_are_those_of_a_sort(logits: Tensor, counts: tuple[int, int]) -> None:
    logits[0] = logits[0].round()
    logits[7, FIRST:] = -torch.inf  # nothing but itself
    logits[7, FIRST + 3] = 1.0
    own = torch.tensor([FIRST + 9, VOCABULARY - 1, FIRST, FIRST + 3])
    logits[ROWS[:2], own[:2]] = torch.tensor([1.3, 2.0])
    among = (FIRST, VOCABULARY)
    for values in (logits, logits.double()):
        found = closest_columns(values, ROWS, own, among, counts)
        for row, mine, above, below in zip(ROWS.tolist(), own.tolist(), *found, strict=True):
            here = values[row, mine]
            others = torch.arange(FIRST, VOCABULARY)
            others = others[others != mine]
            near = values[row, others]
            for columns, expected in (
                (above, near[near >= here].sort().values[: counts[0]]),
                (below, near[(near < here) & near.isfinite()].sort().values.flip(0)[: counts[1]]),
            ):
                if not here.isfinite():
                    continue
                chosen = columns[columns >= 0]
                assert len(set(chosen.tolist())) == len(chosen)
                assert mine not in chosen
                assert torch.equal(values[row, chosen], expected)


@pytest.mark.parametrize("drawn", [True, False])
def test_residuals_of_clusters(drawn: bool) -> None:
    """Of whole rows, compiled and not; the formula is held to its law in test_code_clusters."""
    codes = VOCABULARY - FIRST
    table = (torch.arange(codes).unsqueeze(1) + torch.arange(1, NEIGHBOURS + 1)) % codes
    clusters = CodeClusters.gather(table, 5, FIRST)
    batch = wide_step(4, seed=3, drawn=drawn, greedy=False)
    wide = replace(batch, target_logits=batch.target_logits.double())
    rows = torch.arange(16)
    found, expected = clusters.residual(batch, rows), clusters.residual(wide, rows)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    as_law = DraftProbabilities(
        torch.nn.functional.one_hot(batch.draft_token_ids, VOCABULARY).float()
    )
    if not drawn:
        same = clusters.residual(replace(batch, draft_probabilities=as_law), rows)
        torch.testing.assert_close(found, same, rtol=1e-4, atol=1e-6)


# Decisions.


def wide_step(requests: int, seed: int, *, drawn: bool, greedy: bool) -> VerifyInput:
    """`NUM_DRAFT` tokens of each request, from near laws or among the likeliest."""
    generator = torch.Generator().manual_seed(seed)
    logits = random_logits(requests * (NUM_DRAFT + 1), seed)
    target, bonus = logits.split([requests * NUM_DRAFT, requests])
    law = torch.softmax(target + torch.randn(target.shape, generator=generator) * 0.4, dim=1)
    if drawn:
        drafts = torch.multinomial(law, 1, generator=generator).squeeze(1)
    else:
        rank = torch.randint(3, (len(target), 1), generator=generator)
        drafts = target.topk(3, dim=1).indices.gather(1, rank).squeeze(1)
    return VerifyInput(
        [str(i) for i in range(requests)],
        target.contiguous(),
        bonus.contiguous(),
        drafts,
        torch.full((requests,), NUM_DRAFT),
        DraftProbabilities(law) if drawn else None,
        torch.full((requests,), 0.0 if greedy else 1.0),
        torch.arange(requests),
        torch.zeros(requests, dtype=torch.int64),
        max_num_draft=NUM_DRAFT,
        all_greedy=greedy,
        any_greedy=greedy,
    )


@dataclass(frozen=True)
class Position:
    """One draft position in float64, for rules written as in their papers.

    Attributes:
        p: `[V]` the target's law.
        q: `[V]` the draft's; one-hot after a choice.
        x: The draft token.
        exact: min(1, p/q); for a greedy request, whether x is the most likely token.
        later: `exact` of the draft tokens after it.
    """

    p: Tensor
    q: Tensor
    x: int
    exact: float
    later: list[float]


def _typical(at: Position) -> float:
    entropy = -float(torch.special.xlogy(at.p, at.p).sum())
    return float(at.p[at.x] > min(0.09, 0.3 * math.exp(-entropy)))


def _threshold(at: Position) -> float:
    return float(at.p[at.x].log() >= -3.0)


def _top_k(at: Position) -> float:
    best = int((at.p > at.p[at.x]).sum()) < 3 and float(at.p.max() - at.p[at.x]) <= 0.2
    return 1.0 if best else at.exact


def _kl_judge(at: Position) -> float:
    divergence = (torch.special.xlogy(at.p, at.p) - torch.special.xlogy(at.p, at.q)).sum()
    return 1.0 if float(divergence) <= 0.08 else at.exact


def _fly(at: Position) -> float:
    best = at.p.topk(3).values
    undecided = -float(torch.special.xlogy(best, best).sum()) >= 0.3
    forgiven = (1 - at.exact) * at.later[0] if at.later and undecided else 0.0
    return at.exact + forgiven


def _group(at: Position) -> float:
    if at.x < FIRST:
        return at.exact
    order = [i for i in at.p[FIRST:].argsort(stable=True).add(FIRST).tolist() if at.p[i] > 0]
    place = order.index(at.x)
    near = [*order[max(place - 2, 0) : place], *order[place + 1 : place + 4], at.x]
    near = [i for i in near if abs(at.p[i] - at.p[at.x]) < 0.15]
    return max(at.exact, min(1.0, float(at.p[near].sum() / at.q[near].sum())))


def _neighbours(x: int) -> list[int]:
    return [FIRST + (x - FIRST + i) % (VOCABULARY - FIRST) for i in range(1, NEIGHBOURS + 1)]


def _lantern(at: Position, budget: Callable[[float], float], *, greedy: bool = False) -> float:
    if at.x < FIRST:
        return at.exact
    own = float(at.p[at.x])
    lent = 0.0
    for y in _neighbours(at.x):
        if lent + float(at.p[y]) > budget(own):
            break
        lent += float(at.p[y])
    if greedy:
        return float(own + lent >= float(at.p.max()))
    return min(1.0, (own + lent) / float(at.q[at.x]))


REFERENCES: dict[str, tuple[str, dict[str, Any], Callable[..., float]]] = {
    "typical": ("typical", {}, _typical),
    "threshold": ("threshold", {"min_log_probability": -3.0}, _threshold),
    "top_k_relaxed": ("top_k_relaxed", {"k": 3, "delta": 0.2}, _top_k),
    "kl_judge": ("kl_judge", {"max_divergence": 0.08}, _kl_judge),
    "fly": ("fly", {"window_size": 1}, _fly),
    "gsd": ("relaxed_visual", {"rule": "gsd", "group_size": 6}, _group),
    "lantern": (
        "relaxed_visual",
        {"rule": "lantern", "budget": 0.2},
        lambda at, **more: _lantern(at, lambda _: 0.2, **more),
    ),
    "lantern++": (
        "relaxed_visual",
        {"rule": "lantern++", "factor": 5.0},
        lambda at, **more: _lantern(at, lambda own: 4 * own, **more),
    ),
}
#: Rules that relax greedy requests, as far as single tokens decide.
GREEDY = ("threshold", "top_k_relaxed", "fly", "lantern", "lantern++")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RelaxedRule]:
    codes = VOCABULARY - FIRST
    path = tmp_path_factory.mktemp("table") / "neighbours.safetensors"
    table = (torch.arange(codes).unsqueeze(1) + torch.arange(1, NEIGHBOURS + 1)) % codes
    write_neighbours(path, NeighbourCard(codes, NEIGHBOURS, 2, None, 0, "", "none"), table)

    def make(name: str) -> RelaxedRule:
        verifier, options, _ = REFERENCES[name]
        options = dict(options)
        if verifier == "relaxed_visual":
            options["image_token_range"] = [FIRST, VOCABULARY]
        if name.startswith("lantern"):
            options["neighbours"] = str(path)
        plugin = installed().load(Kind.VERIFIER, verifier)
        return plugin(plugin.Options.model_validate_json(json.dumps(options)), CONTEXT)

    return make


def positions(batch: VerifyInput) -> list[Position]:
    """Every draft position of a step."""
    p = torch.softmax(batch.target_logits.double(), dim=1)
    ids = batch.draft_token_ids
    q = torch.nn.functional.one_hot(ids, VOCABULARY).double()
    if batch.draft_probabilities is not None:
        q = batch.draft_probabilities.values.double()
    rows = torch.arange(len(ids))
    exact = (p[rows, ids] / q[rows, ids]).clamp(max=1)
    if batch.all_greedy:
        exact = (batch.target_logits.argmax(dim=1) == ids).double()
    found = []
    for row, (x, a) in enumerate(zip(ids.tolist(), exact.tolist(), strict=True)):
        end = row - row % NUM_DRAFT + NUM_DRAFT
        found.append(Position(p[row], q[row], x, a, exact[row + 1 : end].tolist()))
    return found


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "chosen"])
@pytest.mark.parametrize("name", REFERENCES)
def test_acceptance_on_random_steps_is_the_formula(
    name: str, drawn: bool, build: Callable[[str], RelaxedRule]
) -> None:
    batch = wide_step(12, seed=11, drawn=drawn, greedy=False)
    expected = torch.tensor([REFERENCES[name][2](at) for at in positions(batch)]).double()
    found = build(name).acceptance(batch).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    exact = torch.tensor([at.exact for at in positions(batch)]).double()
    if name != "kl_judge" or drawn:
        assert bool((expected > exact + 1e-3).any())


def drafts_beside_the_best(batch: VerifyInput) -> VerifyInput:
    """Flatter laws, and drafts that have the most likely code among their neighbours."""
    logits, rows = batch.target_logits * 0.4, torch.arange(len(batch.draft_token_ids))
    best = logits.argmax(dim=1)
    drafts = torch.where(best > FIRST + 2, best - 1 - rows % 2, best)
    gap = torch.where(drafts == best, 0.0, 0.1 + 0.6 * (rows % 4))
    logits[rows, drafts] = logits[rows, best] - gap
    return replace(batch, target_logits=logits, draft_token_ids=drafts)


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_steps_accept_what_the_formula_does(
    name: str, build: Callable[[str], RelaxedRule]
) -> None:
    batch = wide_step(24, seed=12, drawn=False, greedy=True)
    if name.startswith("lantern"):
        batch = drafts_beside_the_best(batch)
    ids, best = batch.draft_token_ids, batch.target_logits.argmax(dim=1)
    # fly forgives in blocks: its steps are computed by hand in test_relaxed_rules.
    more = {"greedy": True} if name.startswith("lantern") else {}
    stands = [at.exact == 1 or REFERENCES[name][2](at, **more) > 0 for at in positions(batch)]
    accepted, relaxed = [], 0
    for start in range(0, len(ids), NUM_DRAFT):
        run = next((i for i in range(NUM_DRAFT) if not stands[start + i]), NUM_DRAFT)
        accepted.append(run)
        relaxed += int((ids[start : start + run] != best[start : start + run]).sum())
    verification = build(name).verify(batch)
    assert verification.accepted.tolist() == accepted
    assert verification.extra_acceptance is not None
    assert float(verification.extra_acceptance.sum()) == relaxed > 0
    for request, run in enumerate(accepted):
        start = request * NUM_DRAFT
        row = verification.token_ids[request].tolist()
        after = best[start + run] if run < NUM_DRAFT else batch.bonus_logits[request].argmax()
        assert row[: run + 1] == [*ids[start : start + run].tolist(), int(after)]
        assert set(row[run + 1 :]) <= {-1}


class Watched:
    """Compiled functions, and which of them were called."""

    def __init__(self, module: ModuleType, called: set[str]) -> None:
        self.module, self.called = module, called

    def __getattr__(self, name: str) -> Any:
        self.called.add(name)
        return getattr(self.module, name)


def watch(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of compiled functions called from now on."""
    called: set[str] = set()
    for caller, module in ((vocabulary_passes, compiled_rows), (greedy_on_host, compiled_greedy)):
        watched = Watched(module, called)
        monkeypatch.setattr(caller, "kernels", lambda watched=watched: watched)
    return called


@pytest.mark.parametrize("name", REFERENCES)
def test_warm_up_compiles_what_steps_run(
    name: str, build: Callable[[str], RelaxedRule], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = build(name)
    warm = watch(monkeypatch)
    rule.warm_up()
    real = watch(monkeypatch)
    for greedy in (True, False):
        rule.verify(wide_step(12, seed=13, drawn=True, greedy=greedy))
    assert real <= warm
    assert warm
