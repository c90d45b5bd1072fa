"""`jacobi`: the law of the text through many redrawn drafts, couplings, fillers, bookkeeping.

Laws are held to the target's in two ways: by enumeration of every draft and decision of a tiny
problem, with the product's own coupling and verifier, and by sampling with the proposer itself.
Every way has negative controls, which must fail.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm_spec_plugins.proposers import jacobi, jacobi_coupling
from vllm_spec_plugins.proposers.jacobi import Jacobi, JacobiOptions
from vllm_spec_plugins.proposers.jacobi_coupling import (
    Past,
    draw_fresh,
    draw_maximal,
    draw_race,
    keep_probability,
    law_of,
    weights_of_others,
)
from vllm_spec_plugins.proposers.jacobi_filler import copy_from_above, tokens_above, uniform_law
from vllm_spec_plugins.verifiers.lossless import Lossless, LosslessOptions

from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.errors import ConfigError
from vllm_spec_plugins.proposer import Draft, DraftInput
from vllm_spec_plugins.random_numbers import Purpose, uniforms
from vllm_spec_plugins.target_rows import TargetRows
from vllm_spec_plugins.testing import toy_context
from vllm_spec_plugins.testing.chi_square import GoodnessOfFit, failures, goodness_of_fit
from vllm_spec_plugins.testing.toy_problems import (
    DraftedStep,
    ToyProblem,
    random_problem,
    truncated_target,
    verify_input,
)
from vllm_spec_plugins.verifier import VerifyInput

FALSE_ALARM = 1e-6
COUPLINGS = ("none", "maximal", "gumbel")


def lossless(rule: str = "token") -> Lossless:
    return Lossless(LosslessOptions(rule=rule), toy_context())  # type: ignore[arg-type]


# --- the law, by enumeration --------------------------------------------------------------------

#: `redraw(p, old, q)`: every token that may follow `old`, drawn from q `[V]`, at a place whose new
#: law is p `[V]`; how likely it is, and the law it is then verified with.
Redraw = Callable[[Tensor, int, Tensor], list[tuple[int, float, Tensor]]]

#: Texts and how likely each is.
Outcomes = list[tuple[tuple[int, ...], float]]


def redrawn_fresh(p: Tensor, old: int, q: Tensor) -> list[tuple[int, float, Tensor]]:
    del old, q
    return [(x, float(p[x]), p) for x in range(len(p))]


def redrawn_maximal(p: Tensor, old: int, q: Tensor) -> list[tuple[int, float, Tensor]]:
    """By the functions that the proposer draws with."""
    past = Past(torch.tensor([True]), torch.tensor([old]), DraftProbabilities(q.unsqueeze(0)))
    law = DraftProbabilities(p.unsqueeze(0))
    keep = float(keep_probability(law, past))
    others = weights_of_others(law, past)[0]
    chances = (1 - keep) * others / others.sum()
    chances[old] += keep
    return [(x, float(chances[x]), p) for x in range(len(p))]


def kept_with_its_old_law(p: Tensor, old: int, q: Tensor) -> list[tuple[int, float, Tensor]]:
    """Wrong: a kept token is verified with the law it came from at first."""
    drawn = redrawn_maximal(p, old, q)
    return [(x, chance, q if x == old else law) for x, chance, law in drawn]


def always_kept(p: Tensor, old: int, q: Tensor) -> list[tuple[int, float, Tensor]]:
    """Wrong: kept whatever the new law says, and verified with the new one."""
    del q
    return [(old, 1.0, p)]


@dataclass(frozen=True)
class Enumeration:
    """Every way a text of `length` tokens can come about.

    Attributes:
        problem: Its `draft_probabilities` are not used.
        verifier: Says what it accepts and draws from.
        redraw: What becomes of a token past a rejection.
        new: `[V]` law of tokens at places of which nothing is known.
        length: Of the text.
    """

    problem: ToyProblem
    verifier: Lossless
    redraw: Redraw
    new: Tensor
    length: int

    def law(self) -> Tensor:
        """`[V^length]`."""
        size = self.problem.vocab_size
        self_law = torch.zeros(size**self.length, dtype=torch.float64)
        for text, chance in self._after((), self._filled(0)):
            number = 0
            for token in text:
                number = number * size + token
            self_law[number] += chance
        return self_law

    def _filled(self, known: int, width: int | None = None) -> list[Any]:
        width = min(self.problem.num_draft, self.length) if width is None else width
        fresh = [(x, float(c), self.new) for x, c in enumerate(self.new) if c > 0]
        return [fresh] * (width - known)

    def _context(self, text: Sequence[int]) -> int:
        context = torch.tensor(self.problem.start)
        for token in text:
            context = self.problem.after(context, torch.tensor(token))
        return int(context)

    def _after(self, text: tuple[int, ...], places: list[Any]) -> Outcomes:
        """Texts and their chances from here; `places`: for each draft token its (x, chance, q)."""
        found = []
        for draft in itertools.product(*places):
            drawn = 1.0
            for _, chance, _ in draft:
                drawn *= chance
            if drawn:
                found += [
                    (longer, drawn * chance) for longer, chance in self._verified(text, draft)
                ]
        return found

    def _verified(self, text: tuple[int, ...], draft: Any) -> Outcomes:
        tokens = [x for x, _, _ in draft]
        step = DraftedStep(
            self.problem,
            torch.tensor([self._context(text)]),
            torch.tensor([tokens]),
            torch.tensor([len(tokens)]),
        )
        batch = verify_input([step], torch.tensor([0]), torch.tensor([0]))
        q = torch.stack([law for _, _, law in draft])
        batch = replace(batch, draft_probabilities=DraftProbabilities(q))
        accepted = self.verifier.accepted_law(batch)[0]
        found = []
        for a, chance in enumerate(accepted.tolist()):
            if not chance:
                continue
            if a == len(tokens):
                following = torch.softmax(batch.bonus_logits[0], dim=0)
            else:
                following = self.verifier.residual(batch, torch.tensor([a]))[0]
                following = following / following.sum()
            rows = [
                torch.softmax(logits, dim=0)
                for logits in [*batch.target_logits[a + 1 :], *batch.bonus_logits][
                    : len(tokens) - a
                ]
            ]
            for y, its in enumerate(following.tolist()):
                if its:
                    longer = (*text, *tokens[:a], y)
                    found += self._next(longer, rows, draft[a + 1 :], chance * its)
        return found

    def _next(self, text: tuple[int, ...], rows: list[Tensor], old: Any, chance: float) -> Outcomes:
        if len(text) >= self.length:
            return [(text[: self.length], chance)]
        width = min(self.problem.num_draft, self.length - len(text))
        places = []
        for p, past in itertools.zip_longest(rows[:width], old[:width]):
            places.append(
                redrawn_fresh(p, 0, p) if past is None else self.redraw(p, past[0], past[2])
            )
        places += self._filled(len(places), width)
        return [(longer, chance * then) for longer, then in self._after(text, places)]


def enumeration_error(
    redraw: Redraw, rule: str = "token", *, one_hot: bool = False, size: int = 2
) -> float:
    problem = random_problem(5, vocab_size=size, num_draft=2, order=3)
    new = torch.full((size,), 1 / size, dtype=torch.float64)
    if one_hot:
        new = torch.nn.functional.one_hot(torch.tensor(1), size).double()
    found = Enumeration(problem, lossless(rule), redraw, new, length=3).law()
    return float((found - problem.laws_of_text(3)).abs().max())


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("redraw", [redrawn_fresh, redrawn_maximal])
def test_the_enumerated_law_is_the_targets(redraw: Redraw, one_hot: bool) -> None:
    assert enumeration_error(redraw, one_hot=one_hot) < 1e-12


@pytest.mark.slow
def test_the_enumerated_law_is_the_targets_over_three_tokens() -> None:
    assert enumeration_error(redrawn_maximal, size=3) < 1e-12


@pytest.mark.parametrize("redraw", [kept_with_its_old_law, always_kept])
def test_a_wrong_law_of_kept_tokens_is_noticed(redraw: Redraw) -> None:
    """Negative controls."""
    assert enumeration_error(redraw) > 1e-3


def test_block_verification_looks_at_what_it_rejects() -> None:
    """Exact with fresh draws; with tokens kept that it has looked at, it is not."""
    assert enumeration_error(redrawn_fresh, "block") < 1e-12
    assert enumeration_error(redrawn_maximal, "block") > 1e-3


# --- the law, sampled with the proposer itself --------------------------------------------------


class Texts:
    """Many texts of one problem, drafted by a proposer and verified step by step.

    Args:
        problem: The target; `num_draft` tokens are drafted.
        proposer: Asked for all unfinished texts at once.
        samples: Number of texts.
        length: Of each.
        ragged: Drafts are cut, lost and preempted by turns.
        rule: Of the verifier.
    """

    def __init__(
        self,
        problem: ToyProblem,
        proposer: Jacobi,
        *,
        samples: int = 25_000,
        length: int = 6,
        ragged: bool = False,
        rule: str = "token",
    ) -> None:
        self.problem, self.proposer, self.ragged = problem, proposer, ragged
        self.verifier, self.length = lossless(rule), length
        #: Three prompt tokens, which the context at the start is made of.
        self.prompt = 3
        room = self.prompt + length + problem.num_draft + 1
        self.history = np.full((samples, room), problem.vocab_size - 1, dtype=np.int32)
        self.num_tokens = np.full(samples, self.prompt)
        self.names = [str(i) for i in range(samples)]
        self.streams = np.arange(samples) << 32
        #: Drafts under way: counts `[samples]`, tokens `[samples, K]`.
        self.counts = np.zeros(samples, dtype=np.int64)
        self.draft: Draft | None = None
        self.row_in_draft = np.zeros(samples, dtype=np.int64)
        self.steps = self.accepted = 0

    def run(self) -> Tensor:
        """`[samples, length]` int64."""
        end = self.prompt + self.length
        while (active := np.flatnonzero(self.num_tokens < end)).size:
            self.advance(active)
        return torch.from_numpy(self.history[:, self.prompt : end].astype(np.int64))

    def advance(self, active: Any) -> None:
        batch = self.verify_input_of(active)
        verification = self.verifier.verify(batch)
        accepted = verification.accepted.numpy()
        self.steps, self.accepted = self.steps + len(active), self.accepted + int(accepted.sum())
        room = self.history.shape[1]
        for column, tokens in enumerate(verification.token_ids.numpy().T):
            places = self.num_tokens[active] + column
            there = (tokens >= 0) & (places < room)
            self.history[active[there], places[there]] = tokens[there]
        self.num_tokens[active] += accepted + 1
        rows = TargetRows.after(
            batch.target_logits,
            batch.bonus_logits,
            batch.num_draft.numpy(),
            accepted,
            np.arange(len(active)),
        )
        self.ask(active, rows)

    def verify_input_of(self, active: Any) -> VerifyInput:
        counts = torch.from_numpy(self.counts[active])
        width = int(counts.max()) if len(counts) else 0
        table = torch.full((len(active), width), -1)
        if self.draft is not None:
            table = torch.as_tensor(self.draft.token_ids)[self.row_in_draft[active], :width]
        order = self.prompt
        last = self.num_tokens[active][:, None] - order + np.arange(order)
        digits = torch.from_numpy(self.history[active[:, None], last].astype(np.int64))
        size = self.problem.vocab_size
        contexts = (digits * size ** torch.arange(order - 1, -1, -1)).sum(dim=1)
        step = DraftedStep(self.problem, contexts % self.problem.num_contexts, table, counts)
        batch = verify_input(
            [step],
            torch.from_numpy(self.streams[active]),
            torch.from_numpy(self.num_tokens[active].astype(np.int64)),
            dtype=torch.float32,
        )
        law = self.draft.probabilities if self.draft else None
        if law is None:
            return batch
        sent = torch.arange(width) < counts.unsqueeze(1)
        row = torch.from_numpy(self.row_in_draft[active]).unsqueeze(1).expand_as(sent)[sent]
        column = torch.arange(width).expand_as(sent)[sent]
        assert law.sampled is not None
        vocabulary = law.vocabulary
        found = DraftProbabilities(
            law.values[row, column],
            None if vocabulary is None else vocabulary[row, column],
            law.sampled[row, column],
        )
        return replace(batch, draft_probabilities=found)

    def ask(self, active: Any, rows: TargetRows) -> None:
        width, turn = self.problem.num_draft, self.num_tokens[active] + active
        most = np.full(len(active), width)
        if self.ragged:
            most = turn % (width + 1)
        self.draft = self.proposer.propose(
            draft_input(
                [self.names[i] for i in active],
                most,
                rows,
                history=self.history,
                rows=active,
                num_tokens=self.num_tokens[active],
                streams=self.streams[active],
                temperature=0.0 if self.problem.greedy else 1.0,
            )
        )
        self.row_in_draft[active] = np.arange(len(active))
        if self.ragged:  # the scheduler cuts; some are preempted and come back without a draft
            most = np.minimum(most, turn // 2 % (width + 2))
            preempted = turn % 7 == 0
            self.proposer.finish([self.names[i] for i in active[preempted]])
            most[preempted] = 0
        self.counts[active] = most


def draft_input(
    names: Sequence[str],
    max_draft: Any,
    target_rows: TargetRows | None,
    *,
    history: Any = None,
    rows: Any = None,
    num_tokens: Any = 1,
    streams: Any = None,
    temperature: float = 1.0,
) -> DraftInput:
    count = len(names)
    return DraftInput(
        request_ids=list(names),
        token_history=np.zeros((count, 64), dtype=np.int32) if history is None else history,
        rows=np.arange(count) if rows is None else rows,
        num_tokens=np.broadcast_to(np.asarray(num_tokens, dtype=np.int64), (count,)).copy(),
        num_prompt_tokens=np.ones(count, dtype=np.int64),
        max_draft=np.asarray(max_draft, dtype=np.int64),
        temperatures=np.full(count, temperature, dtype=np.float32),
        streams=np.arange(count) if streams is None else streams,
        hidden_states=None,
        cache_salts=None,
        length_control=None,  # pyright: ignore[reportArgumentType]  # never asked
        target_rows=target_rows,
    )


def proposer_of(vocab_size: int = 4, width: int = 3, **options: Any) -> Jacobi:
    parsed = JacobiOptions(**options)
    context = toy_context(vocab_size, width)
    Jacobi.check(parsed, context.facts)
    return Jacobi(parsed, context)


PROBLEM = random_problem(3, vocab_size=4, num_draft=3, order=2)


def sampled(
    problem: ToyProblem = PROBLEM, rule: str = "token", ragged: bool = False, **options: Any
) -> list[GoodnessOfFit]:
    proposer = proposer_of(problem.vocab_size, problem.num_draft, **options)
    texts = Texts(problem, proposer, ragged=ragged, rule=rule)
    tokens = texts.run()
    assert texts.accepted > 0.1 * texts.steps, "the test would pass if nothing was accepted"
    return goodness_of_fit(problem, tokens)


ABOVE = {"filler": "above", "image_row_length": 2, "image_token_range": (1, 4)}


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize(
    "options",
    [
        {"filler": "random"},
        {"filler": "repeat_left", "draft_top_k": 2},
        {**ABOVE, "draft_top_k": 3},
    ],
    ids=["random", "repeat_left, compact", "above, compact"],
)
@pytest.mark.parametrize("ragged", [False, True])
def test_the_sampled_law_is_the_targets(
    coupling: str, options: dict[str, Any], ragged: bool
) -> None:
    found = sampled(coupling=coupling, ragged=ragged, **options)
    assert not failures(found, FALSE_ALARM), "\n".join(map(str, found))


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_truncated_target_keeps_its_law(coupling: str) -> None:
    found = sampled(truncated_target(PROBLEM, 2), coupling=coupling, filler="random")
    assert not failures(found, FALSE_ALARM), "\n".join(map(str, found))


def test_greedy_texts_are_the_targets() -> None:
    problem = replace(PROBLEM, greedy=True)
    texts = Texts(problem, proposer_of(filler="random"), samples=50, length=30, ragged=True).run()
    assert (texts == texts[0]).all()
    context = torch.tensor(problem.start)
    for token in texts[0]:
        assert token == problem.target_logits[context].argmax()
        context = problem.after(context, token)


# Negative controls: each must be noticed.


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_noise_used_at_two_positions_is_noticed(
    coupling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise that belongs to a place in the draft comes again at the next position."""

    def of_places(streams: Tensor, positions: Tensor, index: Any, purpose: Purpose) -> Tensor:
        if purpose is Purpose.COUPLED_DRAFT:
            positions = torch.ones_like(positions)
        return uniforms(streams, 0 * positions, index, purpose)

    monkeypatch.setattr(jacobi, "uniforms", of_places)
    assert failures(sampled(coupling=coupling, filler="random"), FALSE_ALARM)


def test_noise_shared_with_verification_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_acceptance(streams: Tensor, positions: Tensor, index: Any, _purpose: Purpose) -> Tensor:
        return uniforms(streams, positions, index, Purpose.ACCEPT)

    monkeypatch.setattr(jacobi, "uniforms", of_acceptance)
    assert failures(sampled(coupling="none", filler="random"), FALSE_ALARM)


def test_tokens_kept_too_often_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        jacobi_coupling, "keep_probability", lambda law, past: past.known.to(law.values.dtype)
    )
    assert failures(sampled(coupling="maximal", filler="random"), FALSE_ALARM)


def test_block_verification_beside_fresh_draws() -> None:
    """What coupling would do beside it is too little to show here: it is enumerated above."""
    found = sampled(coupling="none", filler="random", rule="block")
    assert not failures(found, FALSE_ALARM), "\n".join(map(str, found))


# --- couplings ----------------------------------------------------------------------------------

SAMPLES = 100_000


def two_laws(seed: int, size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(size, generator=generator, dtype=torch.float64)
    new = old + 0.7 * torch.randn(size, generator=generator, dtype=torch.float64)
    return torch.softmax(old, dim=0), torch.softmax(new, dim=0)


def many(law: Tensor) -> DraftProbabilities:
    return DraftProbabilities(law.expand(SAMPLES, -1))


def noise(purpose: Purpose, index: int | Tensor = 0) -> Tensor:
    streams = torch.arange(SAMPLES)
    if isinstance(index, Tensor):
        streams = streams.unsqueeze(1)
    return uniforms(streams, torch.zeros_like(streams), index, purpose)


@pytest.mark.parametrize("seed", range(3))
def test_how_often_tokens_stay(seed: int) -> None:
    q, p = two_laws(seed)
    total_variation = float((p - q).abs().sum() / 2)
    old = draw_fresh(many(q), noise(Purpose.DRAFT))
    past = Past(torch.ones(SAMPLES, dtype=torch.bool), old, many(q))
    maximal = draw_maximal(
        many(p), past, keep=noise(Purpose.DRAFT, 1), others=noise(Purpose.DRAFT, 2)
    )
    shared = noise(Purpose.COUPLED_DRAFT, torch.arange(len(p)))
    raced = draw_race(many(q), shared), draw_race(many(p), shared)

    error = 5 * 0.5 / SAMPLES**0.5
    assert float((maximal == old).double().mean()) == pytest.approx(1 - total_variation, abs=error)
    # Both first in the race: a's time over q_a and over p_a is below everybody's.
    exact = (1 / torch.maximum(q / q.unsqueeze(1), p / p.unsqueeze(1)).sum(dim=1)).sum()
    stayed = float((raced[0] == raced[1]).double().mean())
    assert stayed == pytest.approx(float(exact), abs=error)
    bound = (1 - total_variation) / (1 + total_variation)
    assert exact >= bound - 1e-12
    assert stayed > bound - error
    assert stayed > float((p * q).sum()) + error, "more than independent draws"


def test_a_race_can_be_as_bad_as_its_bound() -> None:
    """Laws that share a part and differ in tokens of their own: equality."""
    for share in (0.2, 0.9):
        q = torch.tensor([share, 1 - share, 0.0])
        p = torch.tensor([share, 0.0, 1 - share])
        shared = noise(Purpose.COUPLED_DRAFT, torch.arange(3))
        stayed = (draw_race(many(q), shared) == draw_race(many(p), shared)).double().mean()
        bound = share / (2 - share)  # total variation: 1 - share
        assert float(stayed) == pytest.approx(bound, abs=5 * 0.5 / SAMPLES**0.5)


def test_old_laws_are_read_at_the_columns_of_the_new() -> None:
    law = law_of(torch.randn(6, 20, generator=torch.Generator().manual_seed(0)), 5)
    old = law_of(torch.randn(6, 20, generator=torch.Generator().manual_seed(1)), 5)
    assert law.vocabulary is not None
    assert old.vocabulary is not None
    drawn = torch.tensor([True] * 4 + [False] * 2)
    tokens = old.vocabulary[:, 2]
    past = Past(torch.ones(6, dtype=torch.bool), tokens, replace(old, sampled=drawn))
    dense = past.law.dense(torch.arange(6), tokens, 20) if past.law.sampled is not None else None
    assert dense is not None
    found = jacobi_coupling.old_probabilities(law, past)
    assert found.equal(dense.gather(1, law.vocabulary))


def test_equal_laws_keep_every_token() -> None:
    p = two_laws(0)[0].float()
    old = draw_fresh(many(p), noise(Purpose.DRAFT))
    past = Past(torch.ones(SAMPLES, dtype=torch.bool), old, many(p))
    kept = draw_maximal(many(p), past, keep=noise(Purpose.DRAFT, 1), others=noise(Purpose.DRAFT, 2))
    assert kept.equal(old)


# --- rows of the last verification --------------------------------------------------------------


def test_rows_past_the_token_a_verification_ended_with() -> None:
    """Four requests: rejected at once, rejected later, all accepted, no draft."""
    num_draft, accepted = np.array([3, 4, 2, 0]), np.array([0, 2, 2, 0])
    draft_logits = torch.arange(9.0).unsqueeze(1)
    bonus_logits = 100 + torch.arange(4.0).unsqueeze(1)
    rows = TargetRows.after(draft_logits, bonus_logits, num_draft, accepted, np.array([3, 1, 0]))
    assert rows.counts.tolist() == [0, 2, 3]
    taken = rows.take(np.array([2, 2, 1, 2, 1]), np.array([0, 2, 1, 1, 0]))
    assert taken.squeeze(1).tolist() == [1, 100, 101, 2, 6]


# --- the proposer's bookkeeping -----------------------------------------------------------------


def rows_of(logits: Tensor, counts: Sequence[int]) -> TargetRows:
    """Every request was rejected at its first token: `counts` rows of `[R, K + 1, V]` are left."""
    drafted = np.array(counts)
    sent = [logits[i, : n + 1] for i, n in enumerate(drafted)]
    return TargetRows.after(
        torch.cat([part[:-1] for part in sent]),
        torch.stack([part[-1] for part in sent]),
        drafted,
        np.zeros_like(drafted),
        np.arange(len(drafted)),
    )


def law_at(draft: Draft, cell: tuple[int, int]) -> Tensor:
    assert draft.probabilities is not None
    return draft.probabilities.values[cell]


def test_each_token_is_handed_over_with_the_law_it_was_drawn_from() -> None:
    logits = 2 * torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    for coupling in COUPLINGS:
        proposer = proposer_of(8, 4, coupling=coupling, filler="random")
        draft = proposer.propose(draft_input("abc", [4, 2, 3], rows_of(logits, [3, 4, 0])))
        tokens = torch.as_tensor(draft.token_ids)
        assert (tokens >= 0).sum(dim=1).tolist() == [4, 2, 3]
        law = draft.probabilities
        assert law is not None
        assert law.sampled is not None
        assert law.sampled.equal(tokens >= 0)
        for i, j in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]:
            assert law_at(draft, (i, j)).equal(torch.softmax(logits[i, j + 1], dim=0))
        for cell in [(0, 3), (2, 0), (2, 2)]:
            assert law_at(draft, cell).equal(torch.full((8,), 1 / 8))
        assert law.sampled.sum() == 9


def test_tokens_stay_where_their_law_did_through_partial_acceptance_and_moved_rows() -> None:
    """With equal laws at a position, maximal coupling and a race keep the token there."""
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))  # of positions 1 to 6
    for coupling, kept in (("none", False), ("maximal", True), ("gumbel", True)):
        proposer = proposer_of(8, 4, coupling=coupling)
        names = [str(i) for i in range(40)]
        first = torch.stack([logits[:5]] * 40)
        one = proposer.propose(draft_input(names, [4] * 40, rows_of(first, [4] * 40)))
        # One more token each, half the requests gone, the others in another order.
        order = list(range(30, 10, -1))
        again = torch.stack([logits[1:6]] * 20)
        two = proposer.propose(
            draft_input(
                [names[i] for i in order],
                [4] * 20,
                rows_of(again, [4] * 20),
                num_tokens=2,
                streams=np.array(order),
            )
        )
        before = torch.as_tensor(one.token_ids)[order, 1:]
        after = torch.as_tensor(two.token_ids)[:, :3]
        assert bool((before == after).all()) == kept
        assert law_at(two, (0, 0)).equal(torch.softmax(logits[2], dim=0))


def test_nothing_is_remembered_of_a_preempted_request() -> None:
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    proposer, names = proposer_of(8, 4, coupling="maximal"), [str(i) for i in range(40)]
    one = proposer.propose(
        draft_input(names, [4] * 40, rows_of(torch.stack([logits[:5]] * 40), [4] * 40))
    )
    proposer.finish(names[:20])
    two = proposer.propose(
        draft_input(
            names, [4] * 40, rows_of(torch.stack([logits[1:]] * 40), [4] * 40), num_tokens=2
        )
    )
    same = torch.as_tensor(one.token_ids)[:, 1:] == torch.as_tensor(two.token_ids)[:, :3]
    assert same[20:].all()
    assert not same[:20].all()
    proposer.finish(names)
    assert proposer._last is None


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_drafts_do_not_depend_on_the_batch(coupling: str) -> None:
    logits = 2 * torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    together = proposer_of(8, 4, coupling=coupling, filler="random").propose(
        draft_input("abc", [4, 4, 4], rows_of(logits, [2, 4, 0]))
    )
    alone = proposer_of(8, 4, coupling=coupling, filler="random").propose(
        draft_input("b", [4], rows_of(logits[1:2], [4]), streams=np.array([1]))
    )
    assert torch.as_tensor(together.token_ids)[1].equal(torch.as_tensor(alone.token_ids)[0])


def test_greedy_and_sampled_requests_side_by_side() -> None:
    logits = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    batch = draft_input("ab", [4, 4], rows_of(logits, [4, 4]))
    batch.temperatures[0] = 0
    draft = proposer_of(8, 4).propose(batch)
    assert torch.as_tensor(draft.token_ids)[0].equal(logits[0, 1:].argmax(dim=1))
    assert draft.probabilities is not None
    assert draft.probabilities.sampled is not None
    assert draft.probabilities.sampled.tolist() == [[False] * 4, [True] * 4]
    batch.temperatures[1] = 0
    assert proposer_of(8, 4).propose(batch).probabilities is None


# --- fillers ------------------------------------------------------------------------------------


def test_copies_from_above() -> None:
    """The code above, else the one before, else a random token; drafted tokens are left alone."""
    text = torch.tensor([[5, 7, -1, -1, -1], [1, -1, -1, -1, -1], [5, -1, -1, -1, -1]])
    verified = torch.tensor([[6, 1, 4, 6], [1, 1, 5, 1], [4, 1, 1, -1]])
    empty = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    random = torch.full_like(verified, 2)
    found, is_random = copy_from_above(text, empty, verified, 3, random, (4, 8))
    # Column 3 is below column 0 of the draft.
    assert found.tolist() == [[7, 7, 4, 7], [2, 2, 5, 5], [4, 4, -1, -1]]
    assert is_random.tolist() == [[False] * 4, [True, True, False, False], [False] * 4]


def test_repeated_and_random_tokens() -> None:
    history = np.array([[3, 3, 5], [3, 6, 0]], dtype=np.int32)
    logits = torch.full((1, 3, 8), -30.0)
    logits[0, 1:, 4] = 0
    rows = rows_of(logits.expand(2, -1, -1), [2, 0])
    batch = draft_input("ab", [4, 3], rows, history=history, num_tokens=np.array([3, 2]))
    repeated = proposer_of(8, 4, filler="repeat_left").propose(batch)
    assert torch.as_tensor(repeated.token_ids).tolist() == [[4, 4, 4, 4], [6, 6, 6, -1]]
    assert repeated.probabilities is not None
    assert repeated.probabilities.sampled is not None
    assert repeated.probabilities.sampled.tolist() == [[True, True, False, False], [False] * 4]


def test_tokens_above() -> None:
    history = torch.arange(20, dtype=torch.int32).view(2, 10)
    found = tokens_above(history, torch.tensor([1, 0]), torch.tensor([4, 2]), 3, 5)
    assert found.tolist() == [[11, 12, 13, -1, -1], [-1, 0, 1, -1, -1]]


def test_a_whole_draft_from_the_row_above() -> None:
    """Longer than a row: its own first tokens are what stands above the later ones."""
    history = np.array([[0, 5, 6, 7, 4, 6, 0, 0, 0, 0, 0]], dtype=np.int32)
    proposer = proposer_of(8, 5, filler="above", image_row_length=3, image_token_range=(4, 8))
    draft = proposer.propose(draft_input("a", [5], None, history=history, num_tokens=6))
    assert torch.as_tensor(draft.token_ids).tolist() == [[7, 4, 6, 7, 4]]
    assert draft.probabilities is not None
    assert draft.probabilities.sampled is not None
    assert not draft.probabilities.sampled.any()


def test_uniform_laws() -> None:
    ids, law = uniform_law((2, 6), 8, 100, torch.device("cpu"))
    assert ids.tolist() == [2, 3, 4, 5]
    assert law.values.tolist() == [0, 0, 0.25, 0.25, 0.25, 0.25, 0, 0]
    ids, law = uniform_law((2, 8), 8, 3, torch.device("cpu"))
    assert ids.tolist() == [2, 4, 6]
    assert law.vocabulary is not None
    assert law.vocabulary.tolist() == [2, 4, 6]
    ids, law = uniform_law((2, 4), 8, 3, torch.device("cpu"))
    assert law.vocabulary is not None
    assert law.vocabulary.tolist() == [-1, 2, 3]
    assert law.values.tolist() == [0, 0.5, 0.5]


def test_compact_laws() -> None:
    law = law_of(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), 2)
    assert law.vocabulary is not None
    assert law.vocabulary.tolist() == [[1, 3]]
    assert law.values.sum() == pytest.approx(1)
    assert law_of(torch.zeros(1, 4), 4).vocabulary is None


# --- bad options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"filler": "above"}, '"image_row_length"'),
        ({"image_row_length": 8}, "together or not at all"),
        ({"image_token_range": (4, 8)}, 'says nothing to "filler": "repeat_left"'),
        ({"filler": "above", "image_row_length": 8}, 'Give "image_token_range"'),
        ({"filler": "random", "image_token_range": (4, 99)}, "from 0 to 15"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Jacobi.check(JacobiOptions(**options), toy_context().facts)
    assert said in str(raised.value)
