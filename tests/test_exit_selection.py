"""Exit selection: expected tokens per cost, what is learned, and the best choice for a batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from vllm_spec_plugins.proposers.early_exit import candidates

from vllm_spec_plugins.batch_lengths import batch_lengths
from vllm_spec_plugins.exit_selection import ExitCosts, ExitSelection, expected_speeds
from vllm_spec_plugins.step_cost import DraftCosts, StepTime

LAYERS = (2, 4, 8)
MOST = 6
chances = st.floats(0, 1)


def costs(draft: list[float], verify: list[float]) -> ExitCosts:
    return ExitCosts(np.ones(1, dtype=np.int64), np.array([draft]), np.array([verify]))


def linear(slope: float, *draft: float) -> ExitCosts:
    return costs(list(draft), (1 + slope * np.arange(MOST + 1)).tolist())


CHEAP = linear(0.01, 0.02, 0.04, 0.08)
DEAR = linear(0.05, 0.2, 0.3, 0.55)
HOPELESS = linear(0.5, 0.6, 0.8, 1.2)


def selection(exit_costs: ExitCosts = DEAR, **options: float) -> ExitSelection:
    return ExitSelection(LAYERS, exit_costs, MOST, max_num_requests=4, **options)


def teach(
    learner: ExitSelection,
    rates: dict[str, tuple[float, ...]],
    rounds: int = 400,
    seed: int = 0,
) -> None:
    """Verified positions, two for each request and round, at known rates."""
    generator = np.random.default_rng(seed)
    names = list(rates)
    chance = np.repeat(np.array(list(rates.values())), 2, axis=0)
    of_request = np.repeat(np.arange(len(names)), 2)
    for _ in range(rounds):
        agreement = (generator.random(chance.shape) < chance).astype(np.float32)
        noise = generator.random(chance.shape)
        learner.observe(names, of_request, agreement, agreement, noise)


# --- costs ---


def test_costs_from_layers() -> None:
    made = ExitCosts.from_layers((2, 8), num_layers=16, head_layers=1, most=3)
    draft, verify = made.at(5)
    assert draft == pytest.approx([3 / 17, 9 / 17])
    assert verify.tolist() == [1, 1, 1, 1]


def test_costs_are_interpolated_between_batch_sizes() -> None:
    made = ExitCosts(
        np.array([1, 4, 16]),
        np.array([[0.1, 0.2], [0.2, 0.4], [0.4, 0.4]]),
        np.array([[1.0, 1.0], [1.0, 1.3], [1.0, 1.9]]),
    )
    for size, draft, verify in (
        (1, [0.1, 0.2], [1, 1.0]),
        (2, [0.1 + 0.1 / 3, 0.2 + 0.2 / 3], [1, 1.1]),
        (10, [0.3, 0.4], [1, 1.6]),
        (16, [0.4, 0.4], [1, 1.9]),
        (900, [0.4, 0.4], [1, 1.9]),
    ):
        at = made.at(size)
        assert at[0] == pytest.approx(draft)
        assert at[1] == pytest.approx(verify)


@pytest.mark.parametrize(
    ("sizes", "draft", "verify", "message"),
    [
        ([], [], [], "rising and not empty"),
        ([4, 1], [[0.1], [0.1]], [[1.0], [1.0]], "rising"),
        ([1], [[0.0]], [[1.0]], "draft must be positive"),
        ([1], [[0.1]], [[1.0, -2.0]], "verify must be positive"),
        ([1, 2], [[0.1]], [[1.0], [1.0]], "row for each of 2"),
        ([1], [[0.1]], [[1.1, 1.2]], "verify\\[:, 0\\] must be 1"),
    ],
)
def test_impossible_costs(sizes: list, draft: list, verify: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExitCosts(np.array(sizes), np.array(draft), np.array(verify))


def test_impossible_plain_times() -> None:
    for plain in ([0.0], [0.1, 0.2]):
        with pytest.raises(ValueError, match="plain must be positive, one for each of 1 sizes"):
            ExitCosts(np.ones(1, dtype=int), np.ones((1, 1)), np.ones((1, 2)), np.array(plain))


def test_costs_must_be_of_the_exits() -> None:
    with pytest.raises(ValueError, match="of 3 exits and up to 6 draft tokens"):
        ExitSelection((2, 4), DEAR, MOST, 4)
    with pytest.raises(ValueError, match="3 exits and up to 9 draft tokens"):
        ExitSelection(LAYERS, DEAR, 9, 4)
    assert ExitSelection(LAYERS, DEAR, 3, 4).choose(["a"]).lengths.max() <= 3


def test_served_steps_correct_what_was_timed() -> None:
    timed = ExitCosts(
        np.array([1, 4]),
        np.tile([0.1, 0.2, 0.4], (2, 1)),
        np.tile(1 + 0.05 * np.arange(MOST + 1), (2, 1)),
        np.array([0.010, 0.020]),
    )
    learner = selection(timed)
    draft, verify, first = learner._costs_at(2)
    assert first == 0
    assert verify == pytest.approx(1 + 0.05 * np.arange(MOST + 1))
    for step in range(400):
        requests, longest = (1, 4)[step % 2], step % 7
        plain = timed.plain_at(requests)
        assert plain is not None
        # The engine adds 10 ms to each step and half a millisecond to each draft.
        seconds = 0.010 + plain * (1 + 0.05 * longest)
        drafting = (0.0005 + longest * 0.2 * plain) * bool(longest)
        learner.observe_time(
            StepTime(requests, requests * (1 + longest), longest, seconds, drafting), 4
        )
    draft, verify, first = learner._costs_at(1)
    assert verify[0] == 1
    assert verify[-1] == pytest.approx((0.010 + 0.010 * 1.3) / 0.020, rel=0.02)
    assert draft == pytest.approx([0.05, 0.1, 0.2], rel=0.1)
    assert first == pytest.approx(0.025, abs=0.02)


def test_layer_counts_are_not_corrected() -> None:
    """Ranks of a tensor-parallel group measure different times."""
    learner = selection(DEAR)
    before = learner._costs_at(2)
    learner.observe_time(StepTime(2, 6, 2, 0.5, 0.1), 4)
    after = learner._costs_at(2)
    assert before[0].tolist() == after[0].tolist()
    assert before[1].tolist() == after[1].tolist()


# --- expected tokens and costs ---


@given(
    st.floats(0, 0.999), st.floats(0.01, 2), st.floats(0, 1), st.floats(0, 0.5), st.integers(1, 3)
)
def test_expected_speeds_are_dels_formula(
    a: float, draft: float, slope: float, first: float, count: int
) -> None:
    d = np.arange(MOST + 1)
    speeds = expected_speeds(
        np.full((count, 2), [a, a / 2]), np.array([draft, 2 * draft]), 1 + slope * d, first
    )
    for speed, rate, each in zip(speeds, (a, a / 2), (draft, 2 * draft), strict=True):
        cost = 1 + slope * d + each * d + first * (d > 0)
        assert speed == pytest.approx(((1 - rate ** (d + 1)) / (1 - rate) / cost).max())


@settings(max_examples=60)
@given(
    st.lists(st.tuples(chances, chances), min_size=1, max_size=5),
    st.floats(0.01, 1),
    st.floats(0, 0.5),
)
def test_own_lengths_are_never_worse_than_one_for_all(
    rates: list[tuple[float, float]], draft: float, slope: float
) -> None:
    a, k = np.array(rates), np.arange(5)
    verify, each = 1 + slope * k, draft * np.array([1.0, 2.0])
    speeds = expected_speeds(a, each, verify)

    def per_cost(exit_: int, lengths: NDArray[np.int64]) -> float:
        tokens = (a[:, exit_, None] ** k).cumsum(axis=1)[np.arange(len(a)), lengths]
        cost = verify[lengths].sum() + len(a) * each[exit_] * lengths.max()
        return tokens.sum() / cost

    for exit_ in range(2):
        common = max(per_cost(exit_, np.full(len(a), length)) for length in k)
        assert speeds[exit_] == pytest.approx(common)
        own, speed = batch_lengths(a[:, exit_], DraftCosts(verify, 0.0, each[exit_]))
        assert speed == pytest.approx(common)
        assert per_cost(exit_, own) >= common - 1e-9


# --- the choice ---


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(chances, chances, chances),
    st.tuples(st.floats(0.02, 0.5), st.floats(0.02, 0.5), st.floats(0.02, 0.5)),
    st.floats(0, 0.3),
)
def test_one_request_gets_dels_choice(
    rates: tuple[float, ...], draft: tuple[float, ...], slope: float
) -> None:
    learner = selection(linear(slope, *draft))
    teach(learner, {"a": rates}, rounds=20)
    (a,) = learner.rates(["a"])
    choice = learner.choose(["a"])
    value = {
        (layer, d): sum(a[e] ** i for i in range(d + 1)) / (1 + slope * d + d * draft[e])
        for e, layer in enumerate(LAYERS)
        for d in range(MOST + 1)
    }
    assert value[choice.layer, int(choice.lengths[0])] == pytest.approx(max(value.values()))
    assert choice.speed_up == pytest.approx(max(value.values()))
    assert choice.acceptance.tolist() == [a[LAYERS.index(choice.layer)]]


def test_deeper_exits_where_they_are_worth_it() -> None:
    rising = {"a": (0.3, 0.7, 0.95)}
    cheap, dear, hopeless = selection(CHEAP), selection(DEAR), selection(HOPELESS)
    for learner in (cheap, dear, hopeless):
        teach(learner, rising)
    assert cheap.choose(["a"]).layer == 8
    assert cheap.choose(["a"]).lengths.tolist() == [MOST]
    assert dear.choose(["a"]).layer == 4
    assert hopeless.choose(["a"]).lengths.tolist() == [0]


def test_requests_of_a_batch_have_their_own_lengths() -> None:
    learner = selection(linear(0.1, 0.05, 0.3, 0.5))
    teach(learner, {"good": (0.95, 0.95, 0.95), "bad": (0.02, 0.02, 0.02)})
    choice = learner.choose(["bad", "good"])
    assert choice.layer == 2
    assert choice.lengths.tolist() == [0, MOST]


def test_a_batch_waits_for_its_longest_draft() -> None:
    # Alone it pays to draft; among seven that gain nothing the step is too dear.
    learner = ExitSelection((4,), linear(0.05, 0.3), MOST, max_num_requests=8)
    names = ["good", *(f"bad{i}" for i in range(7))]
    teach(learner, {name: (0.9 if name == "good" else 0.01,) for name in names})
    assert learner.choose(["good"]).lengths[0] >= 2
    assert learner.choose(names).lengths.tolist() == [0] * 8


def test_the_exit_changes_for_a_margin_only() -> None:
    learner = ExitSelection((2, 4), linear(0.0, 0.2, 0.2), MOST, 4)
    layers = []
    for rates in ((0.7, 0.69), (0.7, 0.703), (0.7, 0.75), (0.753, 0.75), (0.8, 0.75)):
        for _ in range(400):
            table = np.array([rates])
            learner.observe(["a"], np.zeros(1, dtype=int), table, table, np.ones((1, 2)))
        layers.append(learner.choose(["a"]).layer)
    assert layers == [2, 2, 4, 4, 2]


# --- what is learned ---


def test_rates_converge() -> None:
    learner = selection(discount=1.0)
    teach(learner, {"a": (0.2, 0.5, 0.9), "b": (0.6, 0.7, 0.8)}, rounds=3000)
    assert learner.rates(["a", "b"]) == pytest.approx(
        np.array([[0.2, 0.5, 0.9], [0.6, 0.7, 0.8]]), abs=0.03
    )


def test_sampled_targets_are_learned_from_the_overlap() -> None:
    """The overlap itself, or the chance of one token drawn from either law."""
    generator = np.random.default_rng(0)
    p, q = generator.dirichlet(np.ones(8)), generator.dirichlet(np.ones(8), size=3)
    overlap = np.minimum(p, q).sum(axis=1)
    whole, drawn, judged = (selection(discount=1.0) for _ in range(3))
    request = np.zeros(1, dtype=int)
    for _ in range(2000):
        x = np.array([generator.choice(8, p=law) for law in q])
        of_x = q[np.arange(3), x]
        of_draw = np.minimum(1, p[x] / of_x)[None]
        y = generator.choice(8, p=p)
        whole.observe(["a"], request, overlap[None], of_draw, of_x[None])
        drawn.observe(["a"], request, of_draw, of_draw, of_x[None])
        judged.observe(["a"], request, np.minimum(1, q[:, y] / p[y])[None], of_draw, of_x[None])
    assert whole.rates(["a"])[0] == pytest.approx(overlap, abs=0.001)
    assert drawn.rates(["a"])[0] == pytest.approx(overlap, abs=0.03)
    assert judged.rates(["a"])[0] == pytest.approx(overlap, abs=0.03)


def test_each_exits_confidences_are_learned() -> None:
    learner = selection()
    agreement = np.array([[1, 1, 0.5], [1, 0, 0.5]])
    confidences = np.array([[0.9, 0.6, 0.8], [0.7, 0.2, 0.4]])
    for _ in range(3000):
        learner.observe(["a"], np.zeros(2, dtype=int), agreement, agreement, confidences)
    first, second, third = (
        learner.odds_ratio(layer, confidences[:, exit_]) for exit_, layer in enumerate(LAYERS)
    )
    assert first == pytest.approx([1, 1], abs=0.05)  # both always agree, as the rate says
    assert second[0] > 20  # certain, where half agree
    assert second[1] < 0.05
    assert third == pytest.approx([1, 1], abs=0.05)


def test_first_steps_are_all_observed() -> None:
    learner = selection()
    sampled = []
    for _ in range(40):
        sampled.append(learner.is_sampled(8))
        if sampled[-1]:
            table = np.ones((1, 3))
            learner.observe(["a"], np.zeros(1, dtype=int), table, table, table)
    assert sampled == [True] * 16 + ([False] * 7 + [True]) * 3


def test_new_request_starts_from_the_mean_of_all() -> None:
    learner = selection()
    assert not learner.has_evidence
    assert learner.rates(["new"]).tolist() == [[0.5, 0.5, 0.5]]
    teach(learner, {"a": (0.2, 0.5, 0.9), "b": (0.2, 0.5, 0.9)})
    assert learner.has_evidence
    assert learner.rates(["newer"])[0] == pytest.approx([0.2, 0.5, 0.9], abs=0.08)
    alone = learner.choose(["newest"])
    assert learner.choose(()).layer == alone.layer
    nobody = learner.choose(())
    assert nobody.lengths.shape == nobody.acceptance.shape == (0,)


def test_old_evidence_fades() -> None:
    quick, slow = selection(discount=0.8), selection(discount=1.0)
    for learner in (quick, slow):
        teach(learner, {"a": (0.9, 0.9, 0.9)}, rounds=100)
        teach(learner, {"a": (0.1, 0.1, 0.1)}, rounds=20)
    assert (quick.rates(["a"]) < 0.55).all()
    assert (slow.rates(["a"]) > 0.65).all()


def test_a_choice_stands_until_something_is_learned() -> None:
    timed = ExitCosts(
        np.ones(1, dtype=np.int64),
        np.array([[0.02, 0.04, 0.08]]),
        np.ones((1, MOST + 1)),
        np.array([0.010]),
    )
    learner = selection(timed)
    teach(learner, {"a": (0.6, 0.6, 0.6)})
    choice = learner.choose(["a"])
    assert learner.choose(["a"]) is choice
    assert learner.choose(["b"]) is not choice
    choice = learner.choose(["a"])
    teach(learner, {"c": (0.6, 0.6, 0.6)}, rounds=1)
    assert learner.choose(["a"]) is not choice
    # Drafting turns out to be slow.
    for _ in range(200):
        learner.observe_time(StepTime(1, 1 + MOST, MOST, 0.010, 0.120), 2)
    assert learner.choose(["a"]).lengths[0] < choice.lengths[0]
    # Another request of the same name.
    choice = learner.choose(["a"])
    learner.finish(["a"])
    assert learner.choose(["a"]) is not choice


def test_finish_forgets() -> None:
    learner = selection()
    teach(learner, {"a": (0.9, 0.9, 0.9), "b": (0.1, 0.1, 0.1)})
    before = learner.rates(["b"])
    learner.finish(["a", "never seen"])
    assert len(learner._table) == 1
    assert (learner.rates(["b"]) == before).all()
    assert learner.rates(["a"]) == pytest.approx(learner.rates(["anyone"]))


def test_requests_without_positions_keep_what_they_know() -> None:
    learner = selection()
    teach(learner, {"a": (0.2, 0.5, 0.9), "b": (0.9, 0.9, 0.9)})
    sums = learner._table.values[learner._table.rows(["b"])]
    none = np.zeros((0, 3))
    learner.observe(["a", "b"], np.zeros(0, dtype=int), none, none, none)
    learner.observe(["b", "a"], np.ones(2, dtype=int), *[np.ones((2, 3))] * 3)
    assert (learner._table.values[learner._table.rows(["b"])] == sums).all()


def test_order_of_the_batch_does_not_matter() -> None:
    generator = np.random.default_rng(1)
    names = [f"r{i}" for i in range(9)]
    chance = generator.random((9, 3))
    forward, shuffled = selection(), selection()
    for _ in range(60):
        of_request = np.sort(generator.integers(0, 9, 25))
        agreement = (generator.random((25, 3)) < chance[of_request]).astype(float)
        confidences = generator.random((25, 3))
        forward.observe(names, of_request, agreement, agreement, confidences)
        order = generator.permutation(9)
        place = np.argsort(order)
        mixed = np.argsort(place[of_request], kind="stable")
        moved = [names[i] for i in order]
        same = agreement[mixed]
        shuffled.observe(moved, place[of_request][mixed], same, same, confidences[mixed])
        ours, theirs = forward.choose(names), shuffled.choose(moved)
        assert ours.layer == theirs.layer
        assert ours.lengths[order].tolist() == theirs.lengths.tolist()
        assert ours.acceptance[order] == pytest.approx(theirs.acceptance)


def test_recovers_from_what_is_seen_without_drafting() -> None:
    learner = selection(DEAR)
    teach(learner, {"a": (0.01, 0.02, 0.03)})
    assert learner.choose(["a"]).lengths.tolist() == [0]
    teach(learner, {"a": (0.9, 0.9, 0.9)}, rounds=60)
    assert learner.choose(["a"]).lengths[0] >= 2


@given(st.integers(1, 200))
def test_candidates_are_denser_where_layers_cost_more_of_a_draft(num_layers: int) -> None:
    layers = candidates(num_layers)
    assert 1 <= len(layers) <= 8
    assert list(layers) == sorted(set(layers))
    assert 1 <= layers[0] <= layers[-1] <= max(1, num_layers - 1)
    for layer in range(max(1, round(num_layers / 16)), 3 * num_layers // 4 + 1):
        assert min(max(layer / c, c / layer) for c in layers) <= 1.34  # 3 to 4: layers are whole


def test_candidates_of_common_depths() -> None:
    assert candidates(16) == (1, 2, 3, 4, 6, 8, 12)
    assert candidates(32) == (2, 3, 4, 6, 8, 12, 17, 24)
