"""`diffusion` under asynchronous scheduling on model runner V2: it drafts on the device.

Prompts come in parts (32 tokens a step), six requests share four slots, and texts outgrow the
drafter's window. The drafter begins as a model near the target, and has not learned what a mask is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm_spec_plugins.proposer import DraftInput

pytestmark = [pytest.mark.engine, pytest.mark.v2, pytest.mark.usefixtures("asynchronous")]

MAX_TOKENS = 24
LENGTHS = (8, 33, 40, 20, 17, 5)
PROMPTS = [
    {"prompt_token_ids": [(i * k * k + 5 * k) % 13 + 3 for k in range(length)]}
    for i, length in enumerate(LENGTHS)
]
BLOCK = {"name": "lossless", "rule": "block"}
#: One without drafts, one with short ones; greedy and drawn.
EACH: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"extra_args": {"spec_decode": {"num_speculative_tokens": 1}}},
    {"temperature": 0.7, "seed": 3},
    {"extra_args": {"spec_decode": {"enabled": False}}},
    {"temperature": 1.3, "seed": 5},
]


@pytest.fixture
def config_of(begun_as: Callable[..., str], narrow_models: tuple[Path, Path]) -> Any:
    """`config_of(pattern="block", **options)`, of a drafter for the target of 16 tokens."""

    def config_of(pattern: str = "block", **options: Any) -> dict[str, Any]:
        model = begun_as(narrow_models[1], pattern)
        window = {"context_window": 24}
        return {
            "method": "diffusion", "model": model, "num_speculative_tokens": 3, **window, **options
        }  # fmt: skip

    return config_of


class Compared:
    """In front of a proposer: asks it on the device, and another one on the host beside it."""

    def __init__(self, adapter: Any) -> None:
        proposer = adapter.proposer
        self.adapter, self.propose_on_device = adapter, proposer.propose_on_device
        self.other = type(proposer)(proposer.options, proposer.context)
        self.other.load(None)
        #: Requests that have been in each slot.
        self.entered = np.zeros(proposer.context.max_num_requests, dtype=np.int64)
        self.drafted = self.drawn = 0
        proposer.propose_on_device = self

    def __call__(self, batch: Any) -> Any:
        draft = self.propose_on_device(batch)
        gone = batch.rows[batch.is_fresh]
        self.other.finish([f"{slot} {self.entered[slot]}" for slot in gone])
        self.entered[gone] += 1
        assert (batch.most_tokens >= batch.num_tokens.numpy()).all()
        if not batch.max_draft.any():
            assert (draft.token_ids == -1).all()
            return draft
        expected = self.other.propose(self.on_host(batch))
        wanted = torch.as_tensor(expected.token_ids)
        width, drafted = wanted.shape[1], wanted >= 0
        assert draft.token_ids[:, :width].tolist() == wanted.tolist()
        assert (draft.token_ids[:, width:] == -1).all()
        self.drafted += int(drafted.sum())
        if expected.probabilities is not None:
            drawn = expected.probabilities.sampled & drafted
            torch.testing.assert_close(
                draft.probabilities.values[:, :width][drawn],
                expected.probabilities.values[drawn],
                rtol=1e-3,
                atol=1e-5,
            )
            self.drawn += int(drawn.sum())
        return draft

    def on_host(self, batch: Any) -> DraftInput:
        return DraftInput(
            request_ids=[f"{slot} {self.entered[slot]}" for slot in batch.rows],
            token_history=batch.token_ids.numpy(),
            rows=batch.rows,
            num_tokens=batch.num_tokens.numpy(),
            num_prompt_tokens=batch.num_prompt_tokens.numpy(),
            max_draft=batch.max_draft.numpy(),
            temperatures=batch.temperatures_on_host,
            streams=batch.streams.numpy(),
            hidden_states=None,
            cache_salts=None,
            length_control=self.adapter.length_control,
        )


def is_asynchronous(llm: Any) -> bool:
    return llm.llm_engine.vllm_config.scheduler_config.async_scheduling


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("block", {}),
        pytest.param(
            "block",
            {"denoising_steps": 2, "block_size": 5, "draft_top_k": 6, "verifier": BLOCK},
            marks=pytest.mark.slow,
        ),
        pytest.param("full", {"context_window": 12}, marks=pytest.mark.slow),
    ],
)
def test_it_drafts_what_it_does_on_the_host(
    pattern: str,
    options: dict[str, Any],
    config_of: Any,
    serve_v2: Any,
    plain_texts: Any,
    generate: Any,
    adapter_of: Any,
    watch: Any,
    drafted_by: Any,
) -> None:
    """Tokens and laws, in every step; greedy texts are plain decoding's."""
    plain = plain_texts(PROMPTS, MAX_TOKENS)
    with serve_v2(config_of(pattern, **options)) as llm:
        assert is_asynchronous(llm)
        adapter, watched = adapter_of(llm), watch(llm)
        compared = Compared(adapter)
        texts = generate(llm, PROMPTS, max_tokens=12, each=EACH)
        assert adapter._failures == 0
        [tally] = drafted_by(llm).values()
    for text, alone, wishes in zip(texts, plain, EACH, strict=True):
        assert "temperature" in wishes or text == alone[:12]
    assert watched.chunked_prompts > 0
    assert 0 < tally["accepted"] < tally["drafted"]
    assert 20 < compared.drawn < compared.drafted - 20
    assert compared.entered.max() > 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"denoising_steps": 3, "verifier": BLOCK}], ids=str)
def test_preempted_requests_go_on_as_they_would(
    options: dict[str, Any],
    config_of: Any,
    serve_v2: Any,
    plain_texts: Any,
    generate: Any,
    watch: Any,
    adapter_of: Any,
) -> None:
    """The prompts of four requests fit into 6 blocks of 32 tokens, their texts do not."""
    small = {"block_size": 32, "num_gpu_blocks_override": 7, "enable_prefix_caching": False}
    with serve_v2(config_of(**options), **small) as llm:
        assert is_asynchronous(llm)
        watched, adapter = watch(llm), adapter_of(llm)
        compared = Compared(adapter)
        assert generate(llm, PROMPTS, max_tokens=MAX_TOKENS) == plain_texts(PROMPTS, MAX_TOKENS)
        assert watched.preemptions > 0
        assert adapter._failures == 0
    assert compared.drafted > 0
    # Who was preempted comes as somebody new.
    assert compared.entered.sum() > len(PROMPTS)


@pytest.mark.slow
def test_a_seeded_request_writes_the_same_alone_and_in_company(
    config_of: Any, serve_v2: Any, generate: Any
) -> None:
    seeded = {"temperature": 1.0, "seed": 5, "max_tokens": 12}
    with serve_v2(config_of()) as llm:
        together = generate(llm, PROMPTS, **seeded)
        alone = generate(llm, PROMPTS[:1], **seeded)
    assert alone == together[:1]


@pytest.mark.slow
def test_texts_end_with_the_models_length(config_of: Any, serve_v2: Any, generate: Any) -> None:
    """Drafts stop where the model does: 128 tokens."""
    lengths = (117, 121, 126, 127)
    prompts = [
        {"prompt_token_ids": [(i * k * k + 5 * k) % 13 + 3 for k in range(length)]}
        for i, length in enumerate(lengths)
    ]
    each = [{"max_tokens": 128 - length} for length in lengths]
    with serve_v2() as llm:
        wanted = generate(llm, prompts, each=each)
    with serve_v2(config_of()) as llm:
        assert is_asynchronous(llm)
        assert generate(llm, prompts, each=each) == wanted


@pytest.mark.slow
def test_a_path_is_searched_on_the_host(
    config_of: Any, serve_v2: Any, plain_texts: Any, generate: Any
) -> None:
    """Scheduling is synchronous then, and texts are the same."""
    plain = plain_texts(PROMPTS, MAX_TOKENS)
    with serve_v2(config_of(drafts="path")) as llm:
        assert not is_asynchronous(llm)
        assert generate(llm, PROMPTS, max_tokens=MAX_TOKENS) == plain
