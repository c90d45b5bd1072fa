"""Without a GPU or the interpreter: how many launches, what is refused, who takes the kernel."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from vllm_spec_plugins.triton_kernels.ranked_lm_head import Noise, ranked_lm_head
from vllm_spec_plugins.triton_kernels.relaxations import DraftLogits, Judge
from vllm_spec_plugins.triton_kernels.verify_fused import can_verify_fused, verify_fused
from vllm_spec_plugins.verifiers.lossless import Lossless, LosslessOptions

from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.testing.toy_problems import toy_context
from vllm_spec_plugins.verifier import VerifyInput

pytest.importorskip("triton")

from vllm_spec_plugins.testing.offline_compile import record_launches

TWO = ["_statistics_kernel", "_decide_kernel"]


def step(device: str = "meta", law: DraftProbabilities | None = None) -> VerifyInput:
    """Two requests, three draft tokens, 50 ids."""

    def filled(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    integers = partial(filled, dtype=torch.int64)
    counts = torch.tensor([1, 2]) if device == "cpu" else integers(2)
    return VerifyInput(
        ["a", "b"], filled(3, 50), filled(2, 50), integers(3), counts, law, filled(2),
        integers(2), integers(2), max_num_draft=2, all_greedy=False, any_greedy=True,
    )  # fmt: skip


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("drawn", [False, True])
def test_verifiers_take_two_launches_on_a_gpu(rule: str, drawn: bool) -> None:
    law = DraftProbabilities(torch.empty(3, 50, device="meta")) if drawn else None
    verifier = Lossless(LosslessOptions.model_validate({"rule": rule}), toy_context())
    launches = record_launches(lambda: verifier.verify(step(law=law)))
    assert [launch.name for launch in launches] == TWO


def test_the_head_takes_two_launches_on_a_gpu() -> None:
    integers = torch.empty(8, dtype=torch.int64, device="meta")
    noise = Noise(torch.empty(8, device="meta"), integers, integers, 0)
    hidden, weight = torch.empty(8, 64, device="meta"), torch.empty(100, 64, device="meta")
    launches = record_launches(lambda: ranked_lm_head(hidden, weight, noise=noise))
    assert [launch.name for launch in launches] == ["_block_kernel", "_reduce_kernel"]


def test_the_cpu_keeps_its_path() -> None:
    batch = step("cpu")
    assert not can_verify_fused(batch)
    launches = record_launches(lambda: verify_fused(batch))
    assert not launches


def test_a_vocabulary_of_each_row_is_spread_out() -> None:
    ids = torch.empty(3, 20, dtype=torch.int64, device="meta")
    values = torch.empty(3, 20, device="meta")
    batch = step(law=DraftProbabilities(values, ids))
    assert [launch.name for launch in record_launches(lambda: verify_fused(batch))] == TWO
    with pytest.raises(ValueError, match="vocabulary of its own"):
        record_launches(lambda: verify_fused(step(), draft_logits=DraftLogits(values, ids)))


def test_what_does_not_go_together_is_refused() -> None:
    values = torch.ones(3, 50)
    batch = replace(step("cpu"), draft_probabilities=DraftProbabilities(values / 50))
    with pytest.raises(ValueError, match="one law"):
        verify_fused(batch, draft_logits=DraftLogits(values))
    with pytest.raises(ValueError, match="cannot be relaxed"):
        verify_fused(batch, "block", judge=Judge(torch.ones(3), 0.5))


def test_kernels_import_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from vllm_spec_plugins.triton_kernels import dispatch, ranked_lm_head, verify_fused\n"
        "import torch; assert not dispatch.use_triton(torch.empty(1, device='meta'))\n"
        "w = torch.eye(4); assert ranked_lm_head.ranked_lm_head(w, w).columns[2] == 2\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
