"""How often a decoding step on model runner V2 waits for the device, counted in the code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_spec_plugins.testing.host_waits import waits_counted
from vllm_spec_plugins.verifier import VerifyInput

pytestmark = [pytest.mark.engine, pytest.mark.v2]

#: Folders whose files are counted.
OURS = (
    "acme_spec_methods",
    "diffusion",
    "engine",
    "proposers",
    "triton_kernels",
    "verifiers",
    "vllm_spec_plugins",
)
PROMPT = [3, 4, 5, 6, 3, 4, 5]

EARLY_EXIT = {"method": "early_exit", "exit_layer": 2, "num_speculative_tokens": 3}
JACOBI = {"method": "jacobi", "num_speculative_tokens": 3}
NGRAM_ADAPTIVE = {
    "method": "ngram_adaptive",
    "min_acceptance": 0.05,
    "num_speculative_tokens": 3,
}
ON_DEVICE = {"method": "acme_on_device", "num_speculative_tokens": 3}
BLOCK = {"name": "lossless", "rule": "block"}
RELAXED = (
    {"name": "typical", "max_total_variation": 0.1},
    {"name": "threshold"},
    {"name": "fly", "window_size": 1},
    {"name": "kl_judge"},
    {"name": "top_k_relaxed", "k": 3},
    {
        "name": "relaxed_visual",
        "rule": "gsd",
        "image_token_range": [4, 16],
        "max_total_variation": 0.1,
    },
)


def ours(file: Path) -> bool:
    return file.parent.name in OURS


def waits_of_a_step(
    llm: Any,
    monkeypatch: pytest.MonkeyPatch,
    temperature: float | Sequence[float],
    verifiers: Sequence[str] | None = None,
) -> Counter[str]:
    """Of one step in which every request's draft is verified and the next one drawn.

    Three requests, all of one temperature or each of its own, and of one verifier or each of its
    own.
    """
    from vllm import SamplingParams

    each = temperature if isinstance(temperature, Sequence) else [temperature] * 3
    for i, own in enumerate(each):
        wish = {} if verifiers is None else {"verifier": verifiers[i]}
        params = SamplingParams(
            temperature=own,
            max_tokens=30,
            ignore_eos=True,
            detokenize=False,
            extra_args={"spec_decode": wish},
        )
        llm.llm_engine.add_request(str(i), {"prompt_token_ids": [*PROMPT, 7 + i]}, params)
    for _ in range(3):  # a prompt, a first draft, a step like all that follow
        llm.llm_engine.step()
    schedule, steps = llm.llm_engine.engine_core.engine_core.scheduler.schedule, []

    def watched_schedule(*args: Any) -> Any:
        steps.append(schedule(*args))
        return steps[-1]

    with monkeypatch.context() as patch, waits_counted(ours) as counted:
        patch.setattr(
            llm.llm_engine.engine_core.engine_core.scheduler, "schedule", watched_schedule
        )
        llm.llm_engine.step()
    [step] = steps
    assert len(step.scheduled_spec_decode_tokens) == 3
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


@pytest.mark.parametrize(
    ("config", "temperature"),
    [
        ({**ON_DEVICE, "draws": True}, 1.0),
        (EARLY_EXIT, (0.0, 1.0, 0.7)),
        (JACOBI, (0.0, 1.0, 0.7)),
        pytest.param(
            {**JACOBI, "coupling": "gumbel", "draft_top_k": 5, "filler": "random"},
            1.0,
            marks=pytest.mark.slow,
        ),
        pytest.param(EARLY_EXIT, 0.0, marks=pytest.mark.slow),
        pytest.param({**EARLY_EXIT, "verifier": BLOCK}, 1.0, marks=pytest.mark.slow),
        pytest.param(ON_DEVICE, 0.0, marks=pytest.mark.slow),
        pytest.param({**ON_DEVICE, "verifier": BLOCK}, 0.0, marks=pytest.mark.slow),
        pytest.param({**ON_DEVICE, "draws": True, "verifier": BLOCK}, 1.0, marks=pytest.mark.slow),
        pytest.param(
            {"method": "draft_model", "num_speculative_tokens": 3, "verifier": "lossless"},
            1.0,
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.usefixtures("acme_methods", "asynchronous")
def test_nothing_waits_under_asynchronous_scheduling(
    config: dict[str, Any],
    temperature: float | tuple[float, ...],
    serve_v2: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serve_v2(config) as llm:
        assert not waits_of_a_step(llm, monkeypatch, temperature=temperature)


@pytest.mark.parametrize(
    "temperature",
    [
        1.0,
        pytest.param(0.0, marks=pytest.mark.slow),
        pytest.param((0.0, 1.0, 0.7), marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.usefixtures("asynchronous")
def test_no_relaxed_rule_waits(
    temperature: float | tuple[float, ...], serve_v2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every one that verifies on the device and needs no file, in one engine."""
    config = {**EARLY_EXIT, "verifier": "lossless", "verifiers_allowed": list(RELAXED)}
    with serve_v2(config) as llm:
        names = [rule["name"] for rule in RELAXED]
        for three in (names[:3], names[3:]):
            assert not waits_of_a_step(llm, monkeypatch, temperature, three), three


@pytest.mark.slow
@pytest.mark.usefixtures("asynchronous")
def test_an_adapter_does_not_wait(
    serve_v2: Any, monkeypatch: pytest.MonkeyPatch, exiting_model: Path, exit_adapter: str
) -> None:
    config = {"method": "early_exit", "adapter": exit_adapter, "num_speculative_tokens": 3}
    with serve_v2(config, model=str(exiting_model)) as llm:
        assert not waits_of_a_step(llm, monkeypatch, temperature=1.0)


@pytest.mark.slow
@pytest.mark.usefixtures("asynchronous")
def test_a_ranked_vocabulary_does_not_wait(
    serve_v2: Any, monkeypatch: pytest.MonkeyPatch, write_ranked: Any, tmp_path: Path
) -> None:
    file = write_ranked(tmp_path / "ranked", 16, {"all": range(12)})
    with serve_v2({**EARLY_EXIT, "draft_vocabulary": file}) as llm:
        assert not waits_of_a_step(llm, monkeypatch, temperature=1.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(
            {"denoising_steps": 2, "block_size": 5, "verifier": BLOCK}, marks=pytest.mark.slow
        ),
        pytest.param({"pattern": "full", "context_window": 6}, marks=pytest.mark.slow),
        pytest.param({"draft_top_k": 5}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.usefixtures("asynchronous")
def test_a_diffusion_drafter_does_not_wait(
    options: dict[str, Any],
    serve_v2: Any,
    monkeypatch: pytest.MonkeyPatch,
    begun_as: Callable[..., str],
    narrow_models: tuple[Path, Path],
) -> None:
    model = begun_as(narrow_models[1], options.get("pattern", "block"))
    others = {name: value for name, value in options.items() if name != "pattern"}
    config = {"method": "diffusion", "model": model, "num_speculative_tokens": 3, **others}
    with serve_v2(config) as llm:
        assert not waits_of_a_step(llm, monkeypatch, temperature=(0.0, 1.0, 0.7))


def test_requests_of_several_verifiers_are_picked_without_waiting() -> None:
    """Whose rows are whose is known on the host."""
    from vllm_spec_plugins.verifiers.lossless import (  # pyright: ignore[reportMissingImports]
        Lossless,
        LosslessOptions,
    )

    from vllm_spec_plugins.context import EngineContext, ModelFacts
    from vllm_spec_plugins.engine.verify_each import verify_each

    context = EngineContext(ModelFacts("", 8, 8, 1, 64, 3), torch.device("cpu"), 3, 0)
    rules = {
        "token": Lossless(LosslessOptions(), context),
        "block": Lossless(LosslessOptions(rule="block"), context),
    }
    batch = step_of([2, 0, 3])
    with waits_counted(ours) as counted:
        verify_each(rules, batch, ["token", "token", "block"], [2, 0, 3])
    assert not counted


@pytest.mark.slow
@pytest.mark.usefixtures("acme_methods", "asynchronous")
def test_a_proposer_that_looks_is_seen(serve_v2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    with serve_v2({**ON_DEVICE, "looks": True}) as llm:
        counted = waits_of_a_step(llm, monkeypatch, temperature=0.0)
    assert counted == {"on_device.py": 1}


def test_waits_are_counted() -> None:
    """Negative control: where the host is not asked, requests are picked with two looks."""
    batch = step_of([2])
    with waits_counted(ours) as counted:
        batch.select(torch.tensor([0]))
    assert counted == {"verifier.py": 2}


def step_of(num_draft: list[int]) -> VerifyInput:
    """A step of sampled requests with that many draft tokens each."""
    count, total = len(num_draft), sum(num_draft)
    return VerifyInput(
        request_ids=[str(i) for i in range(count)],
        target_logits=torch.zeros(total, 8),
        bonus_logits=torch.zeros(count, 8),
        draft_token_ids=torch.arange(total),
        num_draft=torch.tensor(num_draft),
        draft_probabilities=None,
        temperatures=torch.ones(count),
        streams=torch.ones(count, dtype=torch.int64),
        positions=torch.ones(count, dtype=torch.int64),
        max_num_draft=max(num_draft),
        all_greedy=False,
        any_greedy=False,
    )
