"""Stopping at a token of low confidence leaves the text's law alone, if that token is kept.

Two ways. By enumeration: for given random numbers a controller's decision follows from the
drafted tokens alone, so the law of the text can be summed over all drafts, exactly. And by
chi-square on 200,000 texts, with controllers that learn as the texts grow. The control drops
the token that fell below the threshold, and must fail both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm_spec_plugins.verifiers.lossless import Lossless, LosslessOptions

from vllm_spec_plugins.confidence_threshold import ConfidenceThreshold, ConfidenceThresholdOptions
from vllm_spec_plugins.draw_next import sample_weights
from vllm_spec_plugins.length_control import LengthController, RequestKeys
from vllm_spec_plugins.random_numbers import Purpose, uniforms
from vllm_spec_plugins.testing import ToyProblem, goodness_of_fit, toy_context
from vllm_spec_plugins.testing.chi_square import failures
from vllm_spec_plugins.testing.enumeration import _law_of_text, every_draft
from vllm_spec_plugins.testing.guarantees import TOLERANCE
from vllm_spec_plugins.testing.toy_problems import DraftedStep, random_problem, verify_input
from vllm_spec_plugins.thompson_sampling import Thompson, ThompsonOptions

NUM_DRAFT = 3
CONTEXT = replace(toy_context(num_speculative_tokens=NUM_DRAFT), max_num_requests=64)


def calibrated_thompson() -> Thompson:
    """One that has seen that confident tokens are accepted more often."""
    controller = Thompson(ThompsonOptions(cost_ratio=0.15), CONTEXT)
    assert controller._bins is not None
    confidences = np.linspace(0, 1, 500)
    controller._bins.observe(confidences, np.arange(500) % 100 < 100 * confidences)
    return controller


CONTROLLERS: dict[str, Callable[[], LengthController]] = {
    "confidence": lambda: ConfidenceThreshold(ConfidenceThresholdOptions(threshold=0.4), CONTEXT),
    "confidence, adaptive": lambda: ConfidenceThreshold(
        ConfidenceThresholdOptions(threshold=0.4, target_acceptance=0.5), CONTEXT
    ),
    "thompson": lambda: Thompson(ThompsonOptions(cost_ratio=0.15, calibrated=False), CONTEXT),
    "thompson, calibrated": calibrated_thompson,
}
RULES = ["token", "block"]


def lossless(rule: str) -> Lossless:
    return Lossless(LosslessOptions.model_validate({"rule": rule}), CONTEXT)


def keys(streams: Tensor, positions: Tensor, first: int = 0) -> RequestKeys:
    names = [str(i) for i in range(first, first + len(streams))]
    return RequestKeys(names, streams.numpy(), positions.numpy())


def draft_lengths(
    controller: LengthController,
    requests: RequestKeys,
    confidence_of: Callable[[int], Tensor],
    drop: bool,
) -> Tensor:
    """`[R]` how many tokens each request sends, drafting token by token.

    Args:
        controller: Asked after each token.
        requests: `[R]`.
        confidence_of: Step to `[R]` own probability of each request's token.
        drop: Whether the token a request stops at is left out, as it must not be.
    """
    limits = controller.limits(requests)
    lengths = np.zeros(len(limits), dtype=np.int64)
    going = limits > 0
    for step in range(NUM_DRAFT):
        lengths += going
        asked = np.flatnonzero(going)
        confidences = confidence_of(step).numpy().astype(np.float32)[asked]
        stops = controller.stop_after(requests.select(asked), step, confidences)
        if drop:
            lengths[asked[stops]] -= 1
        going[asked[stops]] = False
        going &= limits > lengths
    return torch.from_numpy(lengths)


# --- by enumeration ---


def enumerated_distance(
    controller: LengthController, verifier: Lossless, problem: ToyProblem, stream: int, drop: bool
) -> float:
    """Total variation between the law of the first K+1 tokens and the target's.

    Every draft is a request of its own, and all have the same random numbers.
    """
    step, weights = every_draft(problem)
    assert problem.draft_probabilities is not None
    contexts = step.contexts_of_drafts[:, :-1]
    own = problem.draft_probabilities[contexts, step.token_ids]
    same = torch.full((len(weights),), stream)
    counts = draft_lengths(controller, keys(same, same * 0 + 7), lambda j: own[:, j], drop)
    step = replace(step, counts=counts)
    batch = verify_input([step], torch.arange(len(weights)), same * 0)
    following = torch.zeros(len(weights), batch.max_num_draft + 1, problem.vocab_size).double()
    residual = verifier.residual(batch, torch.arange(len(batch.draft_token_ids)))
    following[batch.request_of, batch.index_in_draft] = residual / residual.sum(1, keepdim=True)
    following[torch.arange(len(weights)), counts] = torch.softmax(batch.bonus_logits, dim=1)
    emitted = verifier.accepted_law(batch).unsqueeze(2) * following * weights.view(-1, 1, 1)
    law = _law_of_text(step, emitted)
    return float((law - problem.laws_of_text(NUM_DRAFT + 1)).abs().sum() / 2)


def distances(name: str, rule: str, drop: bool) -> list[float]:
    """Over problems and random numbers."""
    found = []
    for seed in range(3):
        problem = random_problem(seed, vocab_size=4, num_draft=NUM_DRAFT, order=NUM_DRAFT)
        for stream in range(8):
            controller = CONTROLLERS[name]()
            found.append(enumerated_distance(controller, lossless(rule), problem, stream, drop))
    return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CONTROLLERS)
def test_enumerated_law_is_the_targets(name: str, rule: str) -> None:
    assert max(distances(name, rule, drop=False)) < TOLERANCE


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["confidence", "confidence, adaptive", "thompson, calibrated"])
def test_dropping_the_token_biases_the_enumerated_law(name: str, rule: str) -> None:
    """Negative control."""
    # With some of its random numbers, thompson stops at none of the tokens, or at all.
    assert np.mean(distances(name, rule, drop=True)) > 0.01


# --- by simulation ---

TEXTS, LENGTH = 200_000, 3


def generate(
    controller: LengthController, verifier: Lossless, problem: ToyProblem, drop: bool
) -> Tensor:
    """`[TEXTS, LENGTH]` first tokens of texts; one controller serves all, in batches."""
    q = problem.draft_probabilities
    assert q is not None
    parts = []
    at_once = 20_000
    for first in range(0, TEXTS, at_once):
        streams = torch.arange(first, first + at_once) << 32
        tokens = torch.full((at_once, LENGTH + NUM_DRAFT + 1), -1)
        lengths = torch.zeros(at_once, dtype=torch.int64)
        while (lengths < LENGTH).any():
            texts = (lengths < LENGTH).nonzero().squeeze(1)
            context = torch.full((len(texts),), problem.start)
            for column in tokens[texts].unbind(dim=1):
                context = problem.after(context, column)
            starts, drafted, own = context, [], []
            for j in range(NUM_DRAFT):
                u = uniforms(streams[texts], lengths[texts], j, Purpose.DRAFT)
                token_ids = sample_weights(q[context], u)
                drafted.append(token_ids)
                own.append(q[context, token_ids])
                context = problem.after(context, token_ids)
            names = [str(first + int(i)) for i in texts]
            requests = RequestKeys(names, streams[texts].numpy(), lengths[texts].numpy())
            counts = draft_lengths(controller, requests, own.__getitem__, drop)
            step = DraftedStep(problem, starts, torch.stack(drafted, dim=1), counts)
            result = verifier.verify(
                verify_input([step], streams[texts], lengths[texts], dtype=torch.float32)
            )
            had = (counts > 0).numpy()
            controller.observe(
                [name for name, some in zip(names, had, strict=True) if some],
                counts.numpy()[had],
                result.accepted.numpy()[had],
            )
            for column in result.token_ids.unbind(dim=1):
                here = column >= 0
                tokens[texts[here], lengths[texts[here]]] = column[here]
                lengths[texts[here]] += 1
        controller.finish([str(i) for i in range(first, first + at_once)])
        parts.append(tokens[:, :LENGTH])
    return torch.cat(parts)


def wrong(name: str, rule: str, drop: bool) -> list[str]:
    problem = random_problem(5, vocab_size=6, num_draft=NUM_DRAFT, order=1, sharpness=1.0)
    texts = generate(CONTROLLERS[name](), lossless(rule), problem, drop)
    return [str(fit) for fit in failures(goodness_of_fit(problem, texts), 1e-6)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CONTROLLERS)
def test_texts_follow_the_target(name: str, rule: str) -> None:
    assert not wrong(name, rule, drop=False)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["confidence", "confidence, adaptive", "thompson, calibrated"])
def test_dropping_the_token_shows_in_the_texts(name: str, rule: str) -> None:
    """Negative control. Uncalibrated, thompson does not look at the token: nothing to bias."""
    assert wrong(name, rule, drop=True)
