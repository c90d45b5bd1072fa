"""Shadow tokens: what they say of each exit, against the laws themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm_spec_plugins.proposers.shadow_tokens import ShadowTokens, shadow_tokens

from vllm_spec_plugins.proposer import StepStates

VOCAB, LAYERS, EXITS = 12, 6, (1, 3)
#: Hidden states are logits here.
TARGET: Any = SimpleNamespace(
    num_layers=LAYERS,
    head=SimpleNamespace(logits=lambda hidden: hidden.clone()),
    final_norm=lambda state: state.merged,
)


def states(
    temperatures: list[float],
    *,
    scheduled: list[int],
    verified: list[int],
    emitted: list[int],
    seed: int = 0,
) -> StepStates:
    total, count = sum(scheduled), len(scheduled)
    generator = torch.Generator().manual_seed(seed)
    logits = {
        layer: 2 * torch.randn(total, VOCAB, generator=generator) for layer in (*EXITS, LAYERS)
    }
    return StepStates(
        request_ids=[f"r{i}" for i in range(count)],
        rows=np.arange(count),
        num_scheduled=np.array(scheduled),
        num_verified=np.array(verified),
        num_draft=np.zeros(count, dtype=np.int64),
        emitted=[[0] * tokens for tokens in emitted],
        token_ids=torch.zeros(total, dtype=torch.int64),
        positions=torch.arange(total),
        layer_states=logits,
        temperatures=np.array(temperatures, dtype=np.float32),
        streams=np.arange(count) + 1000 * seed,
    )


def law(step: StepStates, layer: int, row: int, temperature: float) -> torch.Tensor:
    return torch.softmax(step.layer_states[layer][row] / temperature, dim=-1)


def seen_from(step: StepStates, draws: bool = True) -> ShadowTokens:
    found = shadow_tokens(TARGET, step, EXITS, draws)
    assert found is not None
    return found


def test_positions_are_those_whose_tokens_were_emitted() -> None:
    # A prompt's last part, a rejected draft token, a prompt that is not read yet.
    step = states([0, 0, 0], scheduled=[4, 4, 3], verified=[4, 3, 3], emitted=[1, 3, 0])
    found = seen_from(step)
    assert found.of_request.tolist() == [0, 1, 1, 1]
    for place, row in enumerate([3, 4, 5, 6]):
        best = step.layer_states[LAYERS][row].argmax()
        for exit_, layer in enumerate(EXITS):
            own = law(step, layer, row, 1.0)
            same = float(own.argmax() == best)
            assert found.acceptance[place, exit_] == found.agreement[place, exit_] == same
            assert found.confidences[place, exit_] == pytest.approx(float(own.max()))


def test_nothing_emitted_nothing_seen() -> None:
    step = states([1.0], scheduled=[3], verified=[3], emitted=[0])
    assert shadow_tokens(TARGET, step, EXITS, True) is None


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_acceptance_is_the_overlap_of_the_laws(temperature: float) -> None:
    step = states([temperature, 0], scheduled=[3, 1], verified=[3, 1], emitted=[3, 1])
    found = seen_from(step)
    for row in range(3):
        p = law(step, LAYERS, row, temperature)
        for exit_, layer in enumerate(EXITS):
            overlap = torch.minimum(p, law(step, layer, row, temperature)).sum()
            assert found.acceptance[row, exit_] == pytest.approx(float(overlap), abs=1e-6)
    assert set(found.acceptance[3].tolist()) <= {0.0, 1.0}  # the greedy request


def test_one_drawn_token_is_accepted_as_often_on_average() -> None:
    step = states([1.0], scheduled=[1], verified=[1], emitted=[1])
    found, agreement, confidences = seen_from(step), [], []
    for stream in range(4000):
        step.streams[0] = stream
        found = seen_from(step)
        agreement.append(found.agreement[0])
        confidences.append(found.confidences[0])
    assert np.mean(agreement, axis=0) == pytest.approx(found.acceptance[0], abs=0.03)
    for exit_, layer in enumerate(EXITS):
        q = law(step, layer, 0, 1.0)
        # A token is drawn with its own probability.
        assert np.mean(confidences, axis=0)[exit_] == pytest.approx(float((q**2).sum()), abs=0.03)


def test_choices_of_a_sampling_request_are_accepted_with_the_targets_probability() -> None:
    step = states([1.0], scheduled=[2], verified=[2], emitted=[2])
    found = seen_from(step, draws=False)
    for row in range(2):
        p = law(step, LAYERS, row, 1.0)
        for exit_, layer in enumerate(EXITS):
            chosen = law(step, layer, row, 1.0).argmax()
            assert found.acceptance[row, exit_] == pytest.approx(float(p[chosen]), abs=1e-6)
            assert found.agreement[row, exit_] == found.acceptance[row, exit_]


def test_tokens_that_cannot_be_drafted_are_left_out() -> None:
    step = states([1.0, 0], scheduled=[2, 1], verified=[2, 1], emitted=[2, 1])
    allowed = torch.zeros(2, VOCAB, dtype=torch.bool)
    allowed[0, [1, 4, 7]] = True
    allowed[1, [2, 3]] = True
    found = shadow_tokens(TARGET, step, EXITS, True, allowed)
    assert found is not None
    for row, request in enumerate([0, 0, 1]):
        p = law(step, LAYERS, row, 1.0)
        for exit_, layer in enumerate(EXITS):
            q = law(step, layer, row, 1.0) * allowed[request]
            q /= q.sum()
            wanted = torch.minimum(p, q).sum() if request == 0 else q.argmax() == p.argmax()
            assert found.acceptance[row, exit_] == pytest.approx(float(wanted), abs=1e-6)
            assert found.confidences[row, exit_] <= float(q.max()) + 1e-6
