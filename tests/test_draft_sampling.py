"""One draft token per request: what is drawn for a row depends on that row alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vllm_spec_plugins.draft_sampling import DraftLaws, Draws, draw

ROWS, WIDTH, K = 6, 50, 2
TEMPERATURES = {
    "drawn": [1.0] * ROWS,
    "hot and cold": [0.5, 1.0, 2.0, 0.7, 1.0, 1.3],
    "mixed": [0.0, 1.0, 0.0, 0.7, 1.3, 0.0],
}


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture
def uniforms() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(ROWS, K, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", TEMPERATURES)
def test_rows_are_drawn_as_if_alone(name: str, logits: Tensor, uniforms: Tensor) -> None:
    temperatures = np.array(TEMPERATURES[name], dtype=np.float32)
    found = draw(logits.clone(), Draws.of(temperatures, uniforms), 1, wants_confidences=True)
    assert found.probabilities is not None
    assert found.sampled is not None
    assert found.confidences is not None
    assert found.sampled.tolist() == (temperatures > 0).tolist()
    for row, temperature in enumerate(temperatures.tolist()):
        law = torch.softmax(logits[row] / (temperature or 1.0), dim=0)
        column = int(logits[row].argmax())
        if temperature:
            column = int((law.double().cumsum(0) > uniforms[row, 1]).long().argmax())
            torch.testing.assert_close(found.probabilities[row], law)
        assert int(found.columns[row]) == column
        torch.testing.assert_close(found.confidences[row], law[column])


def test_some_of_the_requests_go_on(logits: Tensor, uniforms: Tensor) -> None:
    temperatures = np.array(TEMPERATURES["mixed"], dtype=np.float32)
    draws = Draws.of(temperatures, uniforms)
    whole = draw(logits.clone(), draws, 1)
    for rows in ([1, 2, 4], [3, 4], [0, 5]):
        some = draw(logits[rows], draws.select(np.array(rows)), 1)
        assert some.columns.tolist() == whole.columns[rows].tolist()
        assert some.sampled is not None
        assert some.sampled.tolist() == (temperatures[rows] > 0).tolist()


def test_laws_written_in_place_are_those_put_there() -> None:
    generator = torch.Generator().manual_seed(3)
    steps = [torch.randn(3, 11, generator=generator) for _ in range(4)]
    uniforms = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    draws = Draws.of(np.array([1.0, 0.0, 0.6], dtype=np.float32), uniforms)
    in_place, put = DraftLaws(), DraftLaws()
    for _ in range(2):  # the memory is used again
        for laws in (in_place, put):
            laws.begin(3, 4)
            for index, logits in enumerate(steps):
                mine = logits.clone()
                room = laws.room(index, mine) if laws is in_place else None
                laws.put(None, index, draw(mine, draws, index, room=room), None)
        found, expected = in_place.result(), put.result()
        assert found is not None
        assert expected is not None
        assert torch.equal(found.values, expected.values)
        assert found.values.shape == (3, 4, 11)
        assert found.sampled is not None
        assert expected.sampled is not None
        assert torch.equal(found.sampled, expected.sampled)
