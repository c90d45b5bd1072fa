"""How often a decoding step on model runner V2 waits for the device, counted in the code.

On a GPU each of these calls waits until everything before it has run: reading a tensor on the
host, and asking which elements of it are not zero. Here both are the CPU, and the calls are
counted by the file of ours that makes them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.v2]

#: Methods of a tensor that wait for its device.
WAITING = ("tolist", "item", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")
OURS = ("engine", "proposers", "verifiers", "triton_kernels", "vllm_spec_plugins")
PROMPT = [3, 4, 5, 6, 3, 4, 5]

EARLY_EXIT = {"method": "early_exit", "exit_layer": 2, "num_speculative_tokens": 3}
NGRAM_ADAPTIVE = {
    "method": "ngram_adaptive",
    "min_acceptance": 0.05,
    "num_speculative_tokens": 3,
}


@contextmanager
def waits_counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Waits by name of the file of ours that called, until the context ends."""
    import torch

    counted: Counter[str] = Counter()
    counting = True

    def counting_calls(original: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            caller = Path(sys._getframe(1).f_code.co_filename)
            if counting and caller.parent.name in OURS:
                counted[caller.name] += 1
            return original(self, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in WAITING:
            patch.setattr(torch.Tensor, name, counting_calls(getattr(torch.Tensor, name)))
        yield counted
        counting = False


def waits_of_a_step(llm: Any, monkeypatch: pytest.MonkeyPatch, **sampling: Any) -> Counter[str]:
    """Of one step in which every request's draft is verified and the next one drawn."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=30, ignore_eos=True, detokenize=False, **sampling)
    for i in range(3):
        llm.llm_engine.add_request(str(i), {"prompt_token_ids": [*PROMPT, 7 + i]}, params)
    for _ in range(3):  # a prompt, a first draft, a step like all that follow
        llm.llm_engine.step()
    with waits_counted(monkeypatch) as counted:
        llm.llm_engine.step()
    llm.llm_engine.abort_request([str(i) for i in range(3)])
    llm.llm_engine.step()
    return counted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_of_early_exit_waits_for_what_was_emitted_and_for_the_draft(
    temperature: float, serve_v2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the verification by the token rule nor a round of drafting waits."""
    with serve_v2(EARLY_EXIT) as llm:
        counted = waits_of_a_step(llm, monkeypatch, temperature=temperature)
    assert counted == {"v2_runner.py": 1, "adapter.py": 1}


def test_a_draft_of_the_host_waits_for_what_was_emitted_only(
    serve_v2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_v2(NGRAM_ADAPTIVE) as llm:
        counted = waits_of_a_step(llm, monkeypatch, temperature=0.0)
    assert counted == {"v2_runner.py": 1}


def test_waits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: requests of one verifier are picked with two looks at the device."""
    import torch

    from vllm_spec_plugins.verifier import VerifyInput

    batch = VerifyInput(
        request_ids=["a"],
        target_logits=torch.zeros(2, 8),
        bonus_logits=torch.zeros(1, 8),
        draft_token_ids=torch.tensor([1, 2]),
        num_draft=torch.tensor([2]),
        draft_probabilities=None,
        temperatures=torch.ones(1),
        streams=torch.ones(1, dtype=torch.int64),
        positions=torch.ones(1, dtype=torch.int64),
        max_num_draft=2,
        all_greedy=False,
        any_greedy=False,
    )
    with waits_counted(monkeypatch) as counted:
        batch.select(torch.tensor([0]))
    assert counted == {"verifier.py": 2}
