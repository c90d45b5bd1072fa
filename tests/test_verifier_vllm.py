"""vLLM's own CPU verification under the losslessness kit.

On the CPU, vLLM 0.32 hands uninitialised temperatures to draft rows (its issue 55005): the
kit must see that, and must see nothing once the rows are right.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_spec_plugins.testing.guarantees import Case, assert_lossless
from vllm_spec_plugins.testing.toy_problems import random_problem, toy_context
from vllm_spec_plugins.verifier import (
    Guarantee,
    Verification,
    Verifier,
    VerifierOptions,
    VerifyInput,
)

vllm = pytest.importorskip("vllm")

TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def cpu_kernels() -> None:
    """vLLM's CPU replacements of its Triton kernels, as a worker installs them."""
    from vllm.platforms import current_platform

    from vllm_spec_plugins.engine.install import shield_llvmlite

    if not current_platform.is_cpu():
        pytest.skip("vLLM's CPU path needs its CPU build")
    shield_llvmlite()  # other tests of this process have loaded numba
    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()


class VllmRejectionSampler(Verifier):
    """`RejectionSampler.forward`, fed as the V1 runner feeds it."""

    guarantee = Guarantee.LOSSLESS

    def __init__(self) -> None:
        super().__init__(VerifierOptions(), toy_context())
        from vllm.v1.sample.rejection_sampler import RejectionSampler
        from vllm.v1.sample.sampler import Sampler

        self.sampler = RejectionSampler(Sampler())
        torch.manual_seed(0)

    def verify(self, batch: VerifyInput) -> Verification:
        from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

        requests = len(batch.num_draft)
        rows = batch.num_draft.cumsum(0) + torch.arange(requests)
        is_bonus = torch.zeros(requests + len(batch.draft_token_ids), dtype=torch.bool)
        is_bonus[rows] = True
        logits = torch.empty(len(is_bonus), batch.bonus_logits.shape[1])
        # The sampler divides by the temperature itself.
        logits[is_bonus] = batch.bonus_logits * TEMPERATURE
        logits[~is_bonus] = batch.target_logits * TEMPERATURE
        metadata = SpecDecodeMetadata(
            draft_token_ids=batch.draft_token_ids.int(),
            num_draft_tokens=batch.num_draft.tolist(),
            cu_num_draft_tokens=batch.num_draft.cumsum(0).int(),
            cu_num_sampled_tokens=(batch.num_draft + 1).cumsum(0).int(),
            target_logits_indices=(~is_bonus).nonzero().squeeze(1),
            bonus_logits_indices=rows,
            logits_indices=torch.arange(len(is_bonus)),
        )
        q = batch.draft_probabilities
        output = self.sampler(
            metadata, None if q is None else q.values, logits, self._sampling(requests)
        )
        tokens = output.sampled_token_ids.long()
        return Verification(tokens, (tokens >= 0).sum(dim=1) - 1)

    def _sampling(self, requests: int) -> object:
        from vllm.v1.sample.logits_processor import LogitsProcessors
        from vllm.v1.sample.metadata import SamplingMetadata

        nothing = torch.empty(0)
        return SamplingMetadata(
            temperature=torch.full((requests,), TEMPERATURE),
            all_greedy=False,
            all_random=True,
            top_p=None,
            top_k=None,
            generators={},
            max_num_logprobs=None,
            no_penalties=True,
            prompt_token_ids=None,
            frequency_penalties=nothing,
            presence_penalties=nothing,
            repetition_penalties=nothing,
            output_token_ids=[[] for _ in range(requests)],
            allowed_token_ids_mask=None,
            bad_words_token_ids={},
            logitsprocs=LogitsProcessors(),
        )


def right_expand(
    values: Tensor,
    cu_num_tokens: Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> Tensor:
    """What `expand_batch_to_tokens` is documented to do."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(values == replace_from, replace_to, values)
    return values.repeat_interleave(counts, output_size=num_tokens)


CASES = [Case("K = 2", (random_problem(1, vocab_size=16, num_draft=2, order=1),), length=3)]


@pytest.mark.usefixtures("cpu_kernels")
def test_unpatched_cpu_path_fails() -> None:
    with pytest.raises(AssertionError, match="not the target's law"):
        assert_lossless(VllmRejectionSampler(), cases=CASES)


@pytest.mark.usefixtures("cpu_kernels")
def test_repaired_cpu_path_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.v1.sample.rejection_sampler as module

    monkeypatch.setattr(module, "expand_batch_to_tokens", right_expand)
    assert_lossless(VllmRejectionSampler(), cases=CASES)
