"""Runner V2 keeps draft logits before temperature; what we make of them is the drafts' law."""

from __future__ import annotations

import pytest

from vllm_spec_plugins.testing.chi_square import compare, failures

pytestmark = pytest.mark.v2

FALSE_ALARM = 1e-9
TEMPERATURE = 0.5
DRAWS = 300


@pytest.mark.slow
def test_kept_draft_logits_give_the_law_the_drafts_were_drawn_from() -> None:
    """vLLM's own kernel draws; a law without the temperature, or with it twice, is noticed."""
    import torch
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    from vllm_spec_plugins.engine.v2_verifier import law_of_draft_logits

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 8, generator=generator).expand(DRAWS, -1).contiguous()
    kept = torch.zeros(DRAWS, 2, 8)
    slots, temperatures = torch.arange(DRAWS), torch.full((DRAWS,), TEMPERATURE)
    drawn = gumbel_sample(
        logits,
        slots,
        temperatures,
        torch.arange(DRAWS),  # a seed each
        torch.full((DRAWS,), 7),
        apply_temperature=True,
        is_drafting=True,
        logits_cache=kept,
        logits_cache_col=torch.tensor(1),
    )
    counts = torch.bincount(drawn, minlength=8)
    ours = law_of_draft_logits(kept[:1, 1], temperatures[:1])[0].double()
    assert not failures([compare("ours", counts, ours / ours.sum())], FALSE_ALARM)
    for wrong in (1.0, TEMPERATURE**2):
        law = torch.softmax(kept[0, 1].double() / wrong, dim=0)
        assert failures([compare(f"at temperature {wrong}", counts, law)], FALSE_ALARM)


def test_the_law_of_a_greedy_request_is_not_a_division_by_zero() -> None:
    import torch

    from vllm_spec_plugins.engine.v2_verifier import law_of_draft_logits

    law = law_of_draft_logits(torch.zeros(1, 4), torch.zeros(1))
    assert torch.equal(law, torch.full((1, 4), 0.25))
