"""`early_exit` under asynchronous scheduling on model runner V2: it drafts on the device.

Prompts come in parts (32 tokens a step), six requests share four slots.
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
EARLY_EXIT = {"method": "early_exit", "exit_layer": 2, "num_speculative_tokens": 3}
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
def ranked(tmp_path: Path, write_ranked: Callable[..., str]) -> dict[str, Any]:
    """12 of the target's 16 tokens, in one list."""
    return {**EARLY_EXIT, "draft_vocabulary": write_ranked(tmp_path / "r", 16, {"all": range(12)})}


class Compared:
    """In front of a proposer: asks it on the device, then on the host for the same step."""

    def __init__(self, adapter: Any) -> None:
        self.adapter, self.proposer = adapter, adapter.proposer
        self.propose_on_device = adapter.proposer.propose_on_device
        self.caches: list[torch.Tensor] = adapter.runner.kv_caches
        #: Of every step, limit of each request.
        self.limits: list[list[int]] = []
        adapter.proposer.propose_on_device = self

    def __call__(self, batch: Any) -> Any:
        before = [cache.clone() for cache in self.caches]
        draft = self.propose_on_device(batch)
        after = [cache.clone() for cache in self.caches]
        self.limits.append(batch.max_draft.tolist())
        drafts = batch.max_draft > 0
        if drafts.any():
            for cache, was in zip(self.caches, before, strict=True):
                cache.copy_(was)
            law = draft.probabilities and draft.probabilities.values.clone()
            expected = self.proposer.propose(self.on_host(batch))
            width = expected.token_ids.shape[1]
            assert draft.token_ids[:, :width].tolist() == expected.token_ids.tolist()
            assert (draft.token_ids[:, width:] == -1).all()
            if expected.probabilities is not None:
                drawn = expected.probabilities.sampled & (expected.token_ids >= 0)
                torch.testing.assert_close(
                    law[:, :width][drawn], expected.probabilities.values[drawn]
                )
                # What the engine reads of it later is the law of its own draft.
                draft = self.propose_on_device(batch)
        # Whatever the host's route writes, and nothing else.
        for cache, ours, was in zip(self.caches, after, before, strict=True):
            torch.testing.assert_close(ours, cache if drafts.any() else was)
        return draft

    def on_host(self, batch: Any) -> DraftInput:
        return DraftInput(
            request_ids=self.adapter._input_batch.req_ids,
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


def test_it_drafts_and_writes_what_it_does_on_the_host(
    serve_v2: Any, plain_texts: Any, generate: Any, adapter_of: Any, watch: Any, drafted_by: Any
) -> None:
    """Tokens, laws, and every key and value of the cache, in every step."""
    plain = plain_texts(PROMPTS, MAX_TOKENS)
    with serve_v2(EARLY_EXIT) as llm:
        assert is_asynchronous(llm)
        adapter, watched = adapter_of(llm), watch(llm)
        compared = Compared(adapter)
        texts = generate(llm, PROMPTS, max_tokens=8, each=EACH)
        assert adapter._failures == 0
        [tally] = drafted_by(llm).values()
    for text, alone, options in zip(texts, plain, EACH, strict=True):
        assert "temperature" in options or text == alone[:8]
    assert watched.chunked_prompts > 0
    assert 0 < tally["accepted"] < tally["drafted"]
    # Some drafted beside some that did not, and some less than others.
    kinds = {tuple(np.unique(limits).tolist()) for limits in compared.limits}
    assert any(0 in kind and 3 in kind for kind in kinds)
    assert any(1 in kind and 3 in kind for kind in kinds)


@pytest.mark.slow
@pytest.mark.parametrize("config", [EARLY_EXIT, {**EARLY_EXIT, "verifier": BLOCK}])
def test_preempted_requests_go_on_as_they_would(
    config: dict[str, Any],
    serve_v2: Any,
    plain_texts: Any,
    generate: Any,
    watch: Any,
    adapter_of: Any,
    drafted_by: Any,
) -> None:
    """The prompts of four requests fit into 6 blocks of 32 tokens, their texts do not."""
    small = {"block_size": 32, "num_gpu_blocks_override": 7, "enable_prefix_caching": False}
    with serve_v2(config, **small) as llm:
        assert is_asynchronous(llm)
        watched = watch(llm)
        assert generate(llm, PROMPTS, max_tokens=MAX_TOKENS) == plain_texts(PROMPTS, MAX_TOKENS)
        assert watched.preemptions > 0
        assert adapter_of(llm)._failures == 0
        [tally] = drafted_by(llm).values()
    assert tally["accepted"] > 0


@pytest.mark.slow
def test_a_ranked_vocabulary(
    ranked: dict[str, Any], serve_v2: Any, plain_texts: Any, generate: Any, adapter_of: Any
) -> None:
    """Greedy texts are plain decoding's, and nothing outside the list is drafted."""
    with serve_v2(ranked) as llm:
        assert is_asynchronous(llm)
        proposer, drafted = adapter_of(llm).proposer, []
        propose_on_device = proposer.propose_on_device

        def watched(batch: Any) -> Any:
            draft = propose_on_device(batch)
            drafted.extend(draft.token_ids.flatten().tolist())
            return draft

        proposer.propose_on_device = watched
        plain = plain_texts(PROMPTS, MAX_TOKENS)
        assert generate(llm, PROMPTS, max_tokens=MAX_TOKENS) == plain
    assert max(drafted) == 11
    assert max(max(text) for text in plain) > 11


@pytest.mark.slow
def test_texts_end_with_the_models_length(serve_v2: Any, generate: Any) -> None:
    """Drafts stop where the model does: 128 tokens."""
    lengths = (117, 121, 126, 127)
    prompts = [
        {"prompt_token_ids": [(i * k * k + 5 * k) % 13 + 3 for k in range(length)]}
        for i, length in enumerate(lengths)
    ]
    each = [{"max_tokens": 128 - length} for length in lengths]
    with serve_v2() as llm:
        wanted = generate(llm, prompts, each=each)
    with serve_v2(EARLY_EXIT) as llm:
        assert is_asynchronous(llm)
        assert generate(llm, prompts, each=each) == wanted


@pytest.mark.slow
def test_a_seeded_request_writes_the_same_alone_and_in_company(
    serve_v2: Any, generate: Any
) -> None:
    seeded = {"temperature": 1.0, "seed": 5, "max_tokens": 12}
    with serve_v2(EARLY_EXIT) as llm:
        together = generate(llm, PROMPTS, **seeded)
        alone = generate(llm, PROMPTS[:1], **seeded)
    assert alone == together[:1]


@pytest.mark.slow
def test_prefixes_found_in_the_cache_are_what_was_computed(
    serve_v2: Any, plain_texts: Any, generate: Any, watch: Any
) -> None:
    """Drafts write beside what other requests read."""
    plain = plain_texts(PROMPTS, MAX_TOKENS)
    with serve_v2(EARLY_EXIT, enable_prefix_caching=True, block_size=32) as llm:
        watched = watch(llm)
        for _ in range(2):
            assert generate(llm, PROMPTS, max_tokens=MAX_TOKENS) == plain
    assert watched.cached_prompt_tokens > 0


@pytest.fixture
def stray_drafts(serve_v2: Any, generate: Any, adapter_of: Any) -> Callable[[], tuple[int, int]]:
    """`stray_drafts()`: drafted positions, and those beyond the blocks of their own request."""

    def stray_drafts() -> tuple[int, int]:
        counts = [0, 0]
        with serve_v2(EARLY_EXIT, block_size=32) as llm:
            assert is_asynchronous(llm)
            adapter = adapter_of(llm)
            proposer, tables = adapter.proposer, adapter.runner.block_tables
            propose_on_device = proposer.propose_on_device

            def watched(batch: Any) -> Any:
                [size], [held] = tables.block_sizes, tables.num_blocks.np
                last = (batch.num_tokens + batch.max_draft - 2).numpy()
                drafts = batch.max_draft.numpy() > 0
                counts[0] += int(drafts.sum())
                counts[1] += int((drafts & (last // size >= held[batch.rows])).sum())
                return propose_on_device(batch)

            proposer.propose_on_device = watched
            prompts = [
                {"prompt_token_ids": [(i * k * k + 5 * k) % 13 + 3 for k in range(20 + i)]}
                for i in range(4)
            ]
            generate(llm, prompts, max_tokens=16)
        return counts[0], counts[1]

    return stray_drafts


@pytest.mark.slow
def test_drafts_are_written_to_their_own_requests_blocks(
    stray_drafts: Callable[[], tuple[int, int]],
) -> None:
    drafted, stray = stray_drafts()
    assert drafted > 15
    assert stray == 0


@pytest.mark.slow
def test_without_the_reservation_they_would_not_be(
    stray_drafts: Callable[[], tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""
    from vllm.config.vllm import VllmConfig

    from vllm_spec_plugins.engine.install import install_engine_seams

    install_engine_seams()  # what was wrapped is not wrapped again
    monkeypatch.setattr(VllmConfig, "num_lookahead_tokens", 0)
    _, stray = stray_drafts()
    assert stray > 0


@pytest.fixture
def drafts_of_an_adapter(
    serve_v2: Any, generate: Any, adapter_of: Any, exiting_model: Path, exit_adapter: str
) -> Callable[..., dict[tuple[int, ...], list[int]]]:
    """`drafts_of_an_adapter(asynchronous, follows=True)`: what was drafted after which text."""
    config = {"method": "early_exit", "adapter": exit_adapter, "num_speculative_tokens": 3}

    def drafts(wanted: bool, follows: bool = True) -> dict[tuple[int, ...], list[int]]:
        found: dict[tuple[int, ...], list[int]] = {}

        def keep(table: Any, rows: Any, batch: Any, draft: Any) -> Any:
            for i, row in enumerate(rows.tolist()):
                tokens = [token for token in draft.token_ids[i].tolist() if token >= 0]
                found[tuple(table[row, : int(batch.num_tokens[i])].tolist())] = tokens
            return draft

        with serve_v2(config, model=str(exiting_model), async_scheduling=wanted) as llm:
            assert is_asynchronous(llm) == wanted
            proposer: Any = adapter_of(llm).proposer
            on_host, on_device = proposer.propose, proposer.propose_on_device
            proposer.propose = lambda b: keep(b.token_history, b.rows, b, on_host(b))
            proposer.propose_on_device = lambda b: keep(b.token_ids, b.slots, b, on_device(b))
            if not follows:
                proposer.follow_on_device = lambda _: None
            generate(llm, PROMPTS, max_tokens=MAX_TOKENS)
            assert adapter_of(llm)._failures == 0
        return found

    return drafts


@pytest.mark.slow
def test_an_adapter_follows_on_the_device(drafts_of_an_adapter: Any) -> None:
    """After every text it drafts what it drafts under synchronous scheduling."""
    expected, found = drafts_of_an_adapter(False), drafts_of_an_adapter(True)
    both = expected.keys() & found.keys()
    assert len(both) > 0.8 * len(expected)
    assert [found[text] for text in both] == [expected[text] for text in both]
    # Negative control: without the keys of the prompt.
    found = drafts_of_an_adapter(True, follows=False)
    both = expected.keys() & found.keys()
    assert [found[text] for text in both] != [expected[text] for text in both]
