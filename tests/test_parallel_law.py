"""Drafts of a whole block keep the target's law: drawn, cut, and settled in several passes.

By enumeration, with the product's own cutting and settling and the real verifier: every draft of
a tiny problem, weighted by how likely it is. And by sampling, with the proposer itself. Each with
negative controls, which must fail.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from vllm_spec_plugins.proposers.block_draws import (
    BlockDraws,
    draft_lengths,
    stop_at_confidences,
)
from vllm_spec_plugins.proposers.diffusion import (
    Diffusion,
    DiffusionOptions,
    columns_to_settle,
)
from vllm_spec_plugins.proposers.parallel import Block, ParallelOptions, ParallelProposer
from vllm_spec_plugins.verifiers.lossless import Lossless, LosslessOptions

from vllm_spec_plugins.adaptive_draft_length import (
    AdaptiveDraftLength,
    AdaptiveDraftLengthOptions,
)
from vllm_spec_plugins.confidence_threshold import ConfidenceThreshold, ConfidenceThresholdOptions
from vllm_spec_plugins.diffusion.conditioning import TargetStates
from vllm_spec_plugins.diffusion.drafter import DiffusionDrafter
from vllm_spec_plugins.diffusion.folder import DrafterConfig
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.length_control import Fixed, LengthController, LengthControlOptions
from vllm_spec_plugins.proposer import Draft, DraftInput, StepStates
from vllm_spec_plugins.testing import goodness_of_fit, toy_context
from vllm_spec_plugins.testing.chi_square import failures
from vllm_spec_plugins.testing.enumeration import _law_of_text
from vllm_spec_plugins.testing.guarantees import TOLERANCE
from vllm_spec_plugins.testing.toy_problems import (
    DraftedStep,
    ToyProblem,
    random_problem,
    verify_input,
)
from vllm_spec_plugins.verifier import Verification, VerifyInput

K, V = 3, 4
#: Ends a text, as far as drafting is concerned.
END = 2
CONTEXT = replace(toy_context(num_speculative_tokens=K), max_num_requests=64)
FALSE_ALARM = 1e-6
BIAS = 0.005

#: `lengths(drafts [n, K], own probability of each token [n, K])`: `[n]` tokens sent.
Cut = Callable[[NDArray[np.int64], NDArray[np.float64]], NDArray[np.int64]]
#: `law(tokens [n, K], -1 = masked)`: `[n, K, V]`.
Laws = Callable[[Tensor], Tensor]


def lossless(rule: str = "token") -> Lossless:
    return Lossless(LosslessOptions.model_validate({"rule": rule}), CONTEXT)


def batch_of(
    names: Sequence[str],
    most: Any,
    control: LengthController,
    *,
    history: Any = None,
    num_tokens: Any = 3,
    streams: Any = None,
    temperatures: Any = 1.0,
) -> DraftInput:
    count = len(names)
    return DraftInput(
        request_ids=list(names),
        token_history=np.zeros((count, 8), dtype=np.int32) if history is None else history,
        rows=np.arange(count),
        num_tokens=np.broadcast_to(np.asarray(num_tokens, dtype=np.int64), (count,)).copy(),
        num_prompt_tokens=np.ones(count, dtype=np.int64),
        max_draft=np.broadcast_to(np.asarray(most, dtype=np.int64), (count,)).copy(),
        temperatures=np.broadcast_to(np.float32(temperatures), (count,)).copy(),
        streams=np.arange(count) << 32 if streams is None else streams,
        hidden_states=None,
        cache_salts=None,
        length_control=control,
    )


# --- by enumeration -----------------------------------------------------------------------------


def every_draft() -> Tensor:
    """`[V^K, K]`."""
    return torch.tensor(list(itertools.product(range(V), repeat=K)))


def verified(
    problem: ToyProblem, drafts: Tensor, counts: NDArray[np.int64], q: Tensor
) -> tuple[DraftedStep, VerifyInput]:
    """All drafts as one batch; `q` `[n, K, V]`, what each token is verified with."""
    start = torch.full((len(drafts),), problem.start)
    step = DraftedStep(problem, start, drafts, torch.from_numpy(counts))
    batch = verify_input([step], torch.arange(len(drafts)), 0 * start)
    sent = torch.arange(K) < step.counts.unsqueeze(1)
    return step, replace(batch, draft_probabilities=DraftProbabilities(q[sent]))


def distance(
    problem: ToyProblem, weights: Tensor, counts: NDArray[np.int64], q: Tensor, rule: str = "token"
) -> float:
    """Total variation between the law of the first K+1 tokens and the target's."""
    verifier = lossless(rule)
    step, batch = verified(problem, every_draft(), counts, q)
    following = torch.zeros(len(weights), K + 1, V, dtype=torch.float64)
    residual = verifier.residual(batch, torch.arange(len(batch.draft_token_ids)))
    following[batch.request_of, batch.index_in_draft] = residual / residual.sum(1, keepdim=True)
    following[torch.arange(len(weights)), step.counts] = torch.softmax(batch.bonus_logits, dim=1)
    accepted = verifier.accepted_law(batch)
    accepted = torch.nn.functional.pad(accepted, (0, K + 1 - accepted.shape[1]))
    law = _law_of_text(step, accepted.unsqueeze(2) * following * weights.view(-1, 1, 1))
    return float((law - problem.laws_of_text(K + 1)).abs().sum() / 2)


def problem_and_laws(seed: int) -> tuple[ToyProblem, Tensor]:
    """A target, and `[K, V]` the law of each position, which know nothing of each other."""
    noise = torch.randn(K, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return random_problem(seed, vocab_size=V, num_draft=K, order=K), torch.softmax(noise, dim=1)


def as_drafted(laws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights `[n]`, laws `[n, K, V]` and own probabilities `[n, K]` of independent drafts."""
    drafts = every_draft()
    q = laws.expand(len(drafts), K, V)
    own = q.gather(2, drafts.unsqueeze(2)).squeeze(2)
    return own.prod(dim=1), q, own


def whole(drafts: NDArray[np.int64], own: NDArray[np.float64]) -> NDArray[np.int64]:
    del own
    return np.full(len(drafts), K)


def cut_at_ends(drafts: NDArray[np.int64], own: NDArray[np.float64]) -> NDArray[np.int64]:
    del own
    return draft_lengths(drafts, np.full(len(drafts), K), np.array([END]))


def cut_by(control: LengthController) -> Cut:
    """What the length controller allows, then by its `stop_after`."""

    def lengths(drafts: NDArray[np.int64], own: NDArray[np.float64]) -> NDArray[np.int64]:
        batch = batch_of(["a"] * len(drafts), K, control)
        most = np.minimum(control.limits(batch.keys), K)
        sent = draft_lengths(drafts, most, np.array([END]))
        everyone = np.arange(len(drafts))
        return stop_at_confidences(batch, everyone, sent, own.astype(np.float32))

    return lengths


def adaptive(generated: int, accepted: int) -> AdaptiveDraftLength:
    """One that has seen a draft of request "a"."""
    control = AdaptiveDraftLength(AdaptiveDraftLengthOptions(k_min=1, delta=1), CONTEXT)
    control.limits(batch_of(["a"], 1, control).keys)
    control.observe(["a"], np.array([generated]), np.array([accepted]))
    return control


CUTS: dict[str, Cut] = {
    "whole": whole,
    "at ends": cut_at_ends,
    "adaptive_draft_length 1": cut_by(adaptive(1, 0)),
    "adaptive_draft_length 2": cut_by(adaptive(1, 1)),
    "confidence": cut_by(ConfidenceThreshold(ConfidenceThresholdOptions(threshold=0.3), CONTEXT)),
}


def without_the_last(cut: Cut) -> Cut:
    """Wrong: the token a draft stops at, for what it is, is left out."""

    def lengths(drafts: NDArray[np.int64], own: NDArray[np.float64]) -> NDArray[np.int64]:
        kept = cut(drafts, own)
        return np.where(kept < K, kept - 1, kept)

    return lengths


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("name", CUTS)
def test_cut_drafts_keep_the_law(name: str, rule: str) -> None:
    lengths = set()
    for seed in range(4):
        problem, laws = problem_and_laws(seed)
        weights, q, own = as_drafted(laws)
        counts = CUTS[name](every_draft().numpy(), own.numpy())
        lengths |= {*counts.tolist()}
        assert distance(problem, weights, counts, q, rule) < TOLERANCE
    assert len(lengths) > 1 or name == "whole" or name.startswith("adaptive")


@pytest.mark.parametrize("name", ["at ends", "confidence"])
def test_dropping_the_token_a_draft_stops_at_is_noticed(name: str) -> None:
    """Negative control."""
    found = []
    for seed in range(4):
        problem, laws = problem_and_laws(seed)
        weights, q, own = as_drafted(laws)
        counts = without_the_last(CUTS[name])(every_draft().numpy(), own.numpy())
        found.append(distance(problem, weights, counts, q))
    assert min(found) > BIAS


def test_verifying_on_after_a_rejection_is_noticed() -> None:
    """Negative control: DEER's loop as printed, which replaces a token and looks at the next."""
    for seed in range(4):
        problem, laws = problem_and_laws(seed)
        weights, q, _ = as_drafted(laws)
        _, batch = verified(problem, every_draft(), np.full(V**K, K), q)
        p = torch.softmax(batch.target_logits, dim=1).view(-1, K, V)
        drafts = every_draft()
        accept = (p / q).clamp(max=1).gather(2, drafts.unsqueeze(2)).squeeze(2)
        residual = (p - q).clamp(min=0)
        residual = residual / residual.sum(dim=2, keepdim=True)
        one_hot = torch.nn.functional.one_hot(drafts, V).double()
        # Each position for itself: the draft's token, or one from the residual.
        each = accept.unsqueeze(2) * one_hot + (1 - accept).unsqueeze(2) * residual
        law = torch.einsum("n,na,nb,nc->abc", weights, *each.unbind(dim=1)).flatten()
        assert float((law - problem.laws_of_text(K)).abs().sum() / 2) > BIAS


# Several passes.


def settling_law(seed: int) -> Laws:
    """`[n, K, V]` laws of a block, each position's depending on every other settled token."""
    generator = torch.Generator().manual_seed(100 + seed)
    own = torch.randn(K, V, dtype=torch.float64, generator=generator)
    of_others = torch.randn(K, K, V + 1, V, dtype=torch.float64, generator=generator) * 1.5

    def laws(tokens: Tensor) -> Tensor:
        logits = own.expand(len(tokens), K, V).clone()
        for position, other in itertools.permutations(range(K), 2):
            logits[:, position] += of_others[position, other, tokens[:, other]]
        return torch.softmax(logits, dim=2)

    return laws


def settled_in_passes(laws: Laws, passes: int, from_left: bool) -> tuple[Tensor, Tensor]:
    """How likely each draft is, `[n]`, and the laws its tokens were drawn from, `[n, K, V]`."""
    drafts = every_draft()
    known = torch.full_like(drafts, -1)
    weights = torch.ones(len(drafts), dtype=torch.float64)
    q, left = torch.zeros(len(drafts), K, V, dtype=torch.float64), K
    for step in range(passes):
        law = laws(known)
        count = -(-left // (passes - step))
        sampled = np.full(len(drafts), from_left)
        columns = columns_to_settle(law.log(), known < 0, sampled, count)
        own = law.gather(2, drafts.unsqueeze(2)).squeeze(2).gather(1, columns)
        weights *= own.prod(dim=1)
        known = known.scatter(1, columns, drafts.gather(1, columns))
        wide = columns.unsqueeze(2).expand(-1, -1, V)
        q = q.scatter(1, wide, law.gather(1, wide))
        left -= count
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64))
    return weights, q


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("passes", [2, 3])
def test_blocks_settled_from_left_to_right_keep_the_law(passes: int, rule: str) -> None:
    for seed in range(2):
        problem, _ = problem_and_laws(seed)
        weights, q = settled_in_passes(settling_law(seed), passes, from_left=True)
        assert distance(problem, weights, np.full(V**K, K), q, rule) < TOLERANCE


@pytest.mark.parametrize("passes", [2, 3])
def test_drawing_in_order_of_confidence_is_noticed(passes: int) -> None:
    """Negative control: the surest positions first, verified with the laws they were drawn from."""
    found = []
    for seed in range(4):
        problem, _ = problem_and_laws(seed)
        weights, q = settled_in_passes(settling_law(seed), passes, from_left=False)
        found.append(distance(problem, weights, np.full(V**K, K), q))
    assert max(found) > BIAS


# --- by sampling, with the proposer itself ------------------------------------------------------


class Toy(ParallelProposer):
    """Laws that depend on the last token of the text alone."""

    def __init__(self, table: Tensor, **options: Any) -> None:
        context = replace(CONTEXT, facts=replace(CONTEXT.facts, end_token_ids=(END,)))
        super().__init__(ParallelOptions.model_validate(options), context)
        #: `[V, K, V]` log laws by the last token.
        self.table = table

    def logits(self, batch: DraftInput, requests: NDArray[np.int64]) -> Tensor:
        last = torch.from_numpy(batch.last_token_ids[requests].astype(np.int64))
        return self.table[last].float()


class Texts:
    """Texts of one problem, drafted by the proposer and verified step by step."""

    def __init__(self, problem: ToyProblem, proposer: ParallelProposer, control: LengthController):
        self.problem, self.proposer, self.control = problem, proposer, control
        self.verifier = lossless()

    def generate(self, count: int, length: int) -> Tensor:
        """`[count, length]`."""
        history = np.full((count, 1 + length + 2 * K + 1), -1, dtype=np.int32)
        history[:, 0] = V - 1  # the problem's start, of order 1
        known = np.ones(count, dtype=np.int64)
        names = [str(i) for i in range(count)]
        while (going := np.flatnonzero(known < 1 + length)).size:
            chosen = [names[i] for i in going]
            batch = batch_of(
                chosen, 0, self.control, history=history, num_tokens=known[going],
                streams=going << 32,
            )  # fmt: skip
            most = np.minimum(self.control.limits(batch.keys), K)
            most[known[going] % 4 == 2] = 0  # some do not draft in every step
            batch = replace(batch, rows=going, max_draft=most)
            self.step(batch, history, known, going)
        return torch.from_numpy(history[:, 1 : 1 + length].astype(np.int64))

    def step(self, batch: DraftInput, history: Any, known: Any, going: Any) -> None:
        count = len(going)
        draft = Draft(np.full((count, K), -1))
        if batch.max_draft.any():
            draft = self.proposer.propose(batch)
        table = torch.as_tensor(draft.token_ids)
        counts = (table >= 0).sum(dim=1)
        last = torch.from_numpy(batch.last_token_ids.astype(np.int64))
        step = DraftedStep(self.problem, last, table, counts)
        verify = verify_input(
            [step],
            torch.from_numpy(batch.streams),
            torch.from_numpy(batch.num_tokens),
            dtype=torch.float32,
        )
        law = draft.probabilities
        if law is not None:
            sent = torch.arange(table.shape[1]) < counts.unsqueeze(1)
            row, column = sent.nonzero(as_tuple=True)
            assert law.sampled is not None
            vocabulary = None if law.vocabulary is None else law.vocabulary[row, column]
            law = DraftProbabilities(law.values[row, column], vocabulary, law.sampled[row, column])
        verify = replace(verify, draft_probabilities=law)
        result = self.verifier.verify(verify)
        had = (counts > 0).numpy()
        self.control.observe(
            [name for name, some in zip(batch.request_ids, had, strict=True) if some],
            counts.numpy()[had],
            result.accepted.numpy()[had],
        )
        self.follow(batch, step, result)
        for column in result.token_ids.numpy().T:
            there = np.flatnonzero(column >= 0)
            history[going[there], known[going[there]]] = column[there]
            known[going[there]] += 1

    def follow(self, batch: DraftInput, step: DraftedStep, result: Verification) -> None:
        """Show the proposer what the target computed: its logits are the states of a token."""
        if not self.proposer.needs_for(self.proposer.options):
            return
        drafted, places = step.counts.numpy(), np.arange(step.token_ids.shape[1] + 1)
        computed = places <= drafted[:, None]  # [R, K + 1], the last token and the draft
        states = self.problem.target_logits[step.contexts_of_drafts].float()
        positions = batch.num_tokens[:, None] - 1 + places
        flat = torch.from_numpy(computed)
        self.proposer.follow(
            StepStates(
                request_ids=batch.request_ids,
                rows=batch.rows,
                num_scheduled=1 + drafted,
                num_verified=1 + result.accepted.numpy(),
                num_draft=drafted,
                emitted=[],
                token_ids=torch.empty(0),
                positions=torch.from_numpy(positions)[flat],
                layer_states={1: states[flat]},
                temperatures=batch.temperatures,
                streams=batch.streams,
            )
        )


def wrong(proposer: ParallelProposer, control: LengthController, count: int = 30_000) -> list[str]:
    problem = random_problem(7, vocab_size=V, num_draft=K, order=1, sharpness=1.0)
    context = replace(CONTEXT, max_num_requests=count)
    control.context = context
    texts = Texts(problem, proposer, control).generate(count, 4)
    return [str(fit) for fit in failures(goodness_of_fit(problem, texts), FALSE_ALARM)]


def toy(**options: Any) -> Toy:
    table = torch.randn(V, K, V, generator=torch.Generator().manual_seed(3))
    return Toy(table, **options)


CONTROLS: dict[str, Callable[[], LengthController]] = {
    "fixed": lambda: Fixed(LengthControlOptions(), CONTEXT),
    "adaptive_draft_length": lambda: AdaptiveDraftLength(
        AdaptiveDraftLengthOptions(k_min=1, delta=1), CONTEXT
    ),
    "confidence": lambda: ConfidenceThreshold(ConfidenceThresholdOptions(threshold=0.4), CONTEXT),
}


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"draft_top_k": 2}, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("name", CONTROLS)
def test_texts_follow_the_target(name: str, options: dict[str, Any]) -> None:
    assert not wrong(toy(**options), CONTROLS[name]())


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusion drafter that makes much of the target's states, with random weights."""
    states = TargetStates("toy", None, num_layers=1, hidden_size=V, layers=(1,))
    config = DrafterConfig(
        vocab_size=V, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1,
        num_key_value_heads=1, head_dim=8, max_positions=32, rope_theta=1e4, rms_norm_eps=1e-6,
        tie_word_embeddings=False, attention_bias=False, mask_token_id=V,
        attention_pattern="block", predicts="next_token", conditioned_on=states,
    )  # fmt: skip
    drafter, generator = DiffusionDrafter(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in drafter.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.6, generator=generator)
    folder = tmp_path_factory.mktemp("drafter")
    save_file(drafter.export(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.as_json()))
    return folder


def conditioned(folder: Path, count: int, **options: Any) -> Diffusion:
    context = replace(CONTEXT, max_num_requests=count)
    made = Diffusion(DiffusionOptions(model=str(folder), context_window=6, **options), context)
    made.load(None)  # type: ignore[arg-type]  # the target is not asked for anything
    return made


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"denoising_steps": 2, "draft_top_k": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_texts_of_a_drafter_that_reads_states_follow_the_target(
    options: dict[str, Any], reader: Path
) -> None:
    """What it drafts depends on states that come after rejections, pauses and drafts cut short."""
    count = 8_000
    assert not wrong(conditioned(reader, count, **options), CONTROLS["confidence"](), count)


@pytest.mark.slow
def test_texts_of_searched_paths_follow_the_target() -> None:
    """A path may be cut anywhere: it is a choice. Trigrams of 8,000 texts take some memory."""
    assert not wrong(toy(drafts="path"), CONTROLS["confidence"](), count=8_000)


def test_texts_drafted_from_another_law_are_noticed() -> None:
    """Negative control: drawn warmer than they say."""

    class Warmer(Toy):
        def block(self, batch: DraftInput, requests: NDArray[np.int64], draws: BlockDraws) -> Block:
            block = super().block(batch, requests, draws)
            tokens, _ = draws(block.logits / 2, torch.arange(block.logits.shape[1]).unsqueeze(0))
            return replace(block, token_ids=tokens)

    table = torch.randn(V, K, V, generator=torch.Generator().manual_seed(3))
    assert wrong(Warmer(table), CONTROLS["fixed"]())


def test_noise_that_comes_again_is_noticed() -> None:
    """Negative control: the random numbers of a draft's first token, for all of its tokens."""

    class Again(Toy):
        def block(self, batch: DraftInput, requests: NDArray[np.int64], draws: BlockDraws) -> Block:
            logits = self.logits(batch, requests)
            tokens, law = draws(logits, torch.zeros(1, K, dtype=torch.int64))
            return Block(tokens, logits, law)

    table = torch.randn(V, K, V, generator=torch.Generator().manual_seed(3))
    assert wrong(Again(table), CONTROLS["fixed"]())
