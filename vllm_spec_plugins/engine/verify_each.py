"""One verification step in which requests may have chosen different verifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from vllm_spec_plugins.transfers import to_device
from vllm_spec_plugins.verifier import Verification, Verifier, VerifyInput


def verify_each(
    verifiers: Mapping[str, Verifier],
    batch: VerifyInput,
    names: Sequence[str],
    num_draft: Sequence[int],
) -> Verification:
    """Each request by its own verifier, without touching each other, or waiting for the device.

    Args:
        verifiers: By name.
        batch: The step.
        names: `[R]` which verifier serves each request.
        num_draft: `[R]` `batch.num_draft` on the host.
    """
    distinct = set(names)
    if len(distinct) == 1:
        return verifiers[distinct.pop()].verify(batch)
    token_ids = batch.draft_token_ids.new_full((len(names), batch.max_num_draft + 1), -1)
    accepted = torch.zeros_like(batch.num_draft)
    extra = batch.target_logits.new_zeros(len(batch.draft_token_ids))
    name_of, device = np.array(names), token_ids.device
    for name in sorted(distinct):
        theirs = name_of == name
        rows = theirs.nonzero()[0]
        requests = to_device(rows, device)
        tokens = to_device(np.repeat(theirs, num_draft).nonzero()[0], device)
        part = verifiers[name].verify(batch.select(requests, tokens, rows))
        token_ids.index_copy_(0, requests, part.token_ids)
        accepted.index_copy_(0, requests, part.accepted)
        if part.extra_acceptance is not None:
            extra.index_copy_(0, tokens, part.extra_acceptance.to(extra.dtype))
    return Verification(token_ids, accepted, extra)
