"""`ranked_lm_head` chooses as its reference.

Hidden states and weights are small multiples of 1/4, so that every product and sum is exact
whatever its order: the logits are the same to the bit, and so are ties.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm_spec_plugins.triton_kernels.dispatch import INTERPRETED
from vllm_spec_plugins.triton_kernels.ranked_lm_head import (
    HeadChoice,
    HeadShape,
    Noise,
    ranked_lm_head,
    ranked_lm_head_reference,
)

from vllm_spec_plugins.testing.chi_square import compare

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SMALL = HeadShape(columns=64, depth=64, stages=1)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make(
    seed: int, rows: int, width: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def quarters(*shape: int) -> Tensor:
        return (torch.randint(-3, 4, shape, generator=generator) / 4).to(DEVICE, dtype)

    return quarters(rows, size), quarters(width, size), quarters(width)


def make_noise(seed: int, rows: int) -> Noise:
    generator = torch.Generator().manual_seed(seed)
    temperatures = torch.tensor([0.0, 0.5, 1.0])[torch.arange(rows) % 3]
    streams = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    positions = torch.randint(0, 5000, (rows,), generator=generator)
    return Noise(temperatures.to(DEVICE), streams.to(DEVICE), positions.to(DEVICE), seed % 5)


def assert_same(found: HeadChoice, expected: HeadChoice) -> None:
    assert torch.equal(found.columns, expected.columns), (found, expected)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.log_normaliser, expected.log_normaliser, atol=1e-5, rtol=1e-5)
    if expected.all_logits is not None:
        torch.testing.assert_close(found.all_logits, expected.all_logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "width", "size", "options"),
    [
        (1, 200, 128, {}),
        (5, 130, 100, {"num_columns": 4, "keep_logits": True}),
        (17, 192, 64, {"soft_cap": 8.0, "scale": 0.5}),
        (64, 65, 64, {"num_columns": 2}),
        (33, 300, 128, {"rounded": True, "scale": 2.0}),
    ],
    ids=["one_row", "top_4", "capped", "64_rows", "rounded"],
)
@pytest.mark.parametrize("drawn", [False, True], ids=["best", "drawn"])
def test_chooses_alike(
    dtype: torch.dtype, rows: int, width: int, size: int, options: dict, drawn: bool
) -> None:
    hidden, weight, bias = make(rows, rows, width, size, dtype)
    options = options | {"noise": make_noise(rows, rows) if drawn else None}
    assert_same(
        ranked_lm_head(hidden, weight, bias, shape=SMALL, **options),
        ranked_lm_head_reference(hidden, weight, bias, **options),
    )


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(0, 20),
    width=st.integers(1, 200),
    size=st.integers(1, 150),
    num_columns=st.integers(1, 16),
    with_bias=st.booleans(),
    drawn=st.booleans(),
    seed=st.integers(0, 2**30),
)
def test_any_shape(
    rows: int, width: int, size: int, num_columns: int, with_bias: bool, drawn: bool, seed: int
) -> None:
    hidden, weight, bias = make(seed, rows, width, size, torch.bfloat16)
    options = {
        "num_columns": min(num_columns, width),
        "noise": make_noise(seed, rows) if drawn else None,
        "keep_logits": True,
    }
    bias = bias if with_bias else None
    assert_same(
        ranked_lm_head(hidden, weight, bias, shape=SMALL, **options),
        ranked_lm_head_reference(hidden, weight, bias, **options),
    )


def test_the_choice_does_not_depend_on_the_batch() -> None:
    hidden, weight, _ = make(0, 12, 100, 64, torch.bfloat16)
    noise = make_noise(0, 12)
    together = ranked_lm_head(hidden, weight, noise=noise, shape=SMALL)
    alone = Noise(noise.temperatures[5:6], noise.streams[5:6], noise.positions[5:6], noise.index)
    found = ranked_lm_head(hidden[5:6], weight, noise=alone, shape=SMALL)
    assert torch.equal(found.columns[0], together.columns[5])


def test_drawn_columns_follow_the_softmax() -> None:
    """And the test would see noise left out of the temperature's reach."""
    width, batches = 6, 12 if INTERPRETED else 4000
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, 16, generator=generator).to(DEVICE)
    # Small logits: a law over all columns, which another temperature changes visibly.
    hidden = 0.3 * torch.randn(1, 16, generator=generator).to(DEVICE).expand(64, 16).contiguous()
    half = torch.full((64,), 0.5, device=DEVICE)
    zeros = torch.zeros(64, dtype=torch.int64, device=DEVICE)
    columns = []
    for batch in range(batches):
        streams = torch.arange(64, device=DEVICE) + 64 * batch
        noise = Noise(half, streams, zeros, 0)
        columns.append(ranked_lm_head(hidden, weight, noise=noise, shape=SMALL).columns)
    counts = torch.cat(columns).flatten().cpu().bincount(minlength=width)
    logits = (hidden[0].double() @ weight.double().T).cpu()
    assert compare("kernel", counts, torch.softmax(logits / 0.5, 0)).p_value > 1e-3
    assert compare("control", counts, torch.softmax(logits, 0)).p_value < 1e-6


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, bias = make(0, 2, 10, 64, torch.bfloat16)
    with pytest.raises(ValueError, match="at most 64"):
        ranked_lm_head(hidden.repeat(33, 1), weight)
    with pytest.raises(ValueError, match="1 to 10 can be asked for"):
        ranked_lm_head(hidden, weight, num_columns=11)
    with pytest.raises(ValueError, match="hidden size and the type"):
        ranked_lm_head(hidden.float(), weight)
    with pytest.raises(ValueError, match="weight has 10 rows"):
        ranked_lm_head(hidden, weight, bias[:3])
