"""A proposer that drafts on the device, on model runner V1, whose texts are on the host."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("acme_methods")]

CONFIG = {"method": "acme_on_device", "num_speculative_tokens": 4}
NGRAM_ADAPTIVE = {
    "method": "ngram_adaptive",
    "matching": "device",
    "num_speculative_tokens": 4,
    "min_acceptance": 0.05,
}
#: Eight requests of some 50 tokens share 6 blocks of 32 tokens.
PREEMPTING = {
    "block_size": 32,
    "num_gpu_blocks_override": 7,
    "max_model_len": 128,
    "max_num_seqs": 4,
    "enable_prefix_caching": False,
}


@pytest.fixture(scope="module")
def plain(serve_offline: Any, prompts: list[Any], generate: Any) -> list[list[int]]:
    with serve_offline() as llm:
        return generate(llm, prompts)


@pytest.mark.parametrize(
    ("config", "engine_args"),
    [
        (CONFIG, PREEMPTING),
        (NGRAM_ADAPTIVE, PREEMPTING),
        pytest.param({**CONFIG, "draws": True}, {}, marks=pytest.mark.slow),
    ],
)
def test_greedy_texts_are_plain_decodings(
    config: dict[str, Any],
    engine_args: dict[str, Any],
    serve_offline: Any,
    plain: list[list[int]],
    prompts: list[Any],
    generate: Any,
    drafted_by: Any,
    adapter_of: Any,
    watch: Any,
) -> None:
    """With more requests than slots, which lose their pages to each other."""
    with serve_offline(config, **engine_args) as llm:
        watched = watch(llm)
        assert generate(llm, prompts) == plain
        [tally] = drafted_by(llm).values()
        adapter = adapter_of(llm)
        generate(llm, prompts[:1], max_tokens=1)
        assert len(adapter._asker._slot_of) <= 1
        assert adapter._failures == 0
    assert 0 < tally["accepted"] < tally["drafted"]
    assert (watched.preemptions > 0) == bool(engine_args)
