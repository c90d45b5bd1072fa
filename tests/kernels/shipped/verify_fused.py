"""Launches of `verify_fused` at the sizes it is meant for: 8 requests, 5 draft tokens, 128k ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from vllm_spec_plugins.triton_kernels.relaxations import (
    DraftLogits,
    GivenAcceptance,
    GroupSum,
    Judge,
    NeighbourSum,
)
from vllm_spec_plugins.triton_kernels.verify_fused import verify_fused

from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.verifier import VerifyInput

REQUESTS, DRAFT, VOCABULARY, RANKED = 8, 5, 128_256, 32_768
TOKENS = REQUESTS * DRAFT

SLOW = {
    "neighbours",
    "token_dense",
    "token_compact",
    "block_one_hot",
    "judge",
    "given",
    "groups",
    "raw_one_hot",
    "raw_block_ranked",
}


def meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def batch(dtype: torch.dtype, draft: DraftProbabilities | None = None) -> VerifyInput:
    integers = torch.int64
    return VerifyInput(
        ["request"] * REQUESTS,
        meta(TOKENS, VOCABULARY, dtype=dtype),
        meta(REQUESTS, VOCABULARY, dtype=dtype),
        meta(TOKENS, dtype=integers),
        meta(REQUESTS, dtype=integers),
        draft,
        meta(REQUESTS),
        meta(REQUESTS, dtype=integers),
        meta(REQUESTS, dtype=integers),
        max_num_draft=DRAFT,
        all_greedy=False,
        any_greedy=True,
    )


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    bf16, fp32 = torch.bfloat16, torch.float32
    ranked = meta(RANKED, dtype=torch.int64)
    sampled = meta(TOKENS, dtype=torch.bool)
    dense = DraftProbabilities(meta(TOKENS, VOCABULARY), None, sampled)
    compact = DraftProbabilities(meta(TOKENS, RANKED), ranked, sampled)
    logits = DraftLogits(meta(TOKENS, VOCABULARY, dtype=bf16))
    ranked_logits = DraftLogits(meta(TOKENS, RANKED, dtype=bf16), ranked, sampled)
    neighbours = NeighbourSum(meta(16_384, 1000, dtype=torch.int32), 32_000, 0.1)
    groups = GroupSum(meta(VOCABULARY, dtype=torch.int32))
    given = GivenAcceptance(meta(TOKENS))
    judge = Judge(meta(TOKENS), 0.5)

    # The engine hands over processed float32 logits.
    yield "token_one_hot", lambda: verify_fused(batch(fp32))
    yield "token_dense", lambda: verify_fused(batch(fp32, dense))
    yield "token_compact", lambda: verify_fused(batch(fp32, compact))
    yield "block_one_hot", lambda: verify_fused(batch(fp32), "block")
    yield "block_compact", lambda: verify_fused(batch(fp32, compact), "block")
    yield "judge", lambda: verify_fused(batch(fp32), judge=judge)
    yield "neighbours", lambda: verify_fused(batch(fp32), relaxation=neighbours)
    yield "groups", lambda: verify_fused(batch(fp32, dense), relaxation=groups)
    yield "given", lambda: verify_fused(batch(fp32, compact), relaxation=given)
    # Straight from the output head, temperature on the way.
    yield "raw_one_hot", lambda: verify_fused(batch(bf16), raw=True)
    yield "raw_logits", lambda: verify_fused(batch(bf16), raw=True, draft_logits=logits)
    yield (
        "raw_block_ranked",
        lambda: verify_fused(batch(bf16), "block", raw=True, draft_logits=ranked_logits),
    )
