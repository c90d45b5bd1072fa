"""One verification step in which requests may have chosen different verifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vllm_spec_plugins.verifier import Verification, Verifier, VerifyInput


def verify_each(
    verifiers: Mapping[str, Verifier], batch: VerifyInput, names: Sequence[str]
) -> Verification:
    """Each request by its own verifier, without touching each other.

    Args:
        verifiers: By name.
        batch: The step.
        names: `[R]` which verifier serves each request.
    """
    distinct = set(names)
    if len(distinct) == 1:
        return verifiers[distinct.pop()].verify(batch)
    token_ids = batch.draft_token_ids.new_full((len(names), batch.max_num_draft + 1), -1)
    accepted = torch.zeros_like(batch.num_draft)
    extra = batch.target_logits.new_zeros(len(batch.draft_token_ids))
    for name in sorted(distinct):
        rows = [i for i, other in enumerate(names) if other == name]
        requests = torch.tensor(rows, device=token_ids.device)
        part = verifiers[name].verify(batch.select(requests))
        token_ids[requests] = part.token_ids
        accepted[requests] = part.accepted
        if part.extra_acceptance is not None:
            tokens = torch.isin(batch.request_of, requests)
            extra[tokens] = part.extra_acceptance.to(extra.dtype)
    return Verification(token_ids, accepted, extra)
