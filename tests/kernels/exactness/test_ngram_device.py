"""`ngram_adaptive` on the device drafts with the kernel what it drafts with the reference."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
from vllm_spec_plugins.proposers import ngram_device
from vllm_spec_plugins.triton_kernels.suffix_match import suffix_match_reference

from vllm_spec_plugins.device_drafting import DeviceDraftInput

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS, WIDTH, K = 6, 96, 4


def test_drafts_of_growing_texts() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 4, (SLOTS, WIDTH), generator=generator, dtype=torch.int32).to(DEVICE)
    slots = torch.tensor([4, 0, 5], device=DEVICE)
    zeros = torch.zeros_like(slots)
    batch = DeviceDraftInput(
        token_ids=texts, slots=slots, fresh=zeros == 0, num_tokens=zeros, num_prompt_tokens=zeros,
        max_draft=zeros + K, temperatures=zeros.float(), streams=zeros, num_speculative_tokens=K,
        rows=slots.cpu().numpy(), is_fresh=np.ones(3, dtype=bool), most_tokens=np.full(3, WIDTH),
        temperatures_on_host=np.zeros(3, dtype=np.float32),
    )  # fmt: skip

    def drafts() -> list[list[list[int]]]:
        source = ngram_device.NgramDevice(
            SLOTS, K, min_match=1, max_match=6, min_acceptance=0.2, device=DEVICE
        )
        steps = (torch.tensor([size, size + 7, WIDTH - size]) for size in (1, 12, 14, 41, 45))
        return [
            source.propose(
                replace(batch, num_tokens=sizes.to(DEVICE), fresh=(zeros == 0) & (step == 0))
            ).token_ids.tolist()
            for step, sizes in enumerate(steps)
        ]

    found = drafts()
    with patch.object(ngram_device, "suffix_match", suffix_match_reference):
        assert found == drafts()
    lengths = {sum(token >= 0 for token in row) for step in found for row in step}
    assert len(lengths) > 2  # none, some, all
