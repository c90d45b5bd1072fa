"""Relaxed verifiers decide through the kernel as they do in PyTorch, and pay the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from test_verify_fused import DEVICE, make_batch
from torch import Tensor
from vllm_spec_plugins.verifiers.judge import Judge
from vllm_spec_plugins.verifiers.kl_judge import KLJudge, KLJudgeOptions
from vllm_spec_plugins.verifiers.relaxed_visual import RelaxedVisual, RelaxedVisualOptions
from vllm_spec_plugins.verifiers.threshold import Threshold, ThresholdOptions
from vllm_spec_plugins.verifiers.top_k_relaxed import TopKRelaxed, TopKRelaxedOptions
from vllm_spec_plugins.verifiers.typical import Typical, TypicalOptions

from vllm_spec_plugins import relaxed_rule
from vllm_spec_plugins.codebook_neighbours import NeighbourCard, write_neighbours
from vllm_spec_plugins.relaxed_rule import RelaxedOptions, RelaxedRule
from vllm_spec_plugins.testing.toy_problems import toy_context
from vllm_spec_plugins.verifier import Verification, VerifyInput

VOCAB_SIZE, FIRST_CODE, CODES = 300, 20, 250
CONTEXT = replace(toy_context(VOCAB_SIZE, 3), device=DEVICE)
LENGTHS = (3, 0, 2, 3)
DRAWN = (1.0, 0.7, 1.0, 0.5)
MIXED = (1.0, 0.0, 0.0, 0.7)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class EveryThird(Judge):
    """Lets tokens stand whose ids divide by three."""

    def __init__(self, options: RelaxedOptions) -> None:
        RelaxedRule.__init__(self, options, CONTEXT)

    def judged(self, batch: VerifyInput, rows: Tensor | None = None) -> Tensor:
        stands = (batch.draft_token_ids % 3 == 0) & (batch.draft_token_ids >= 0)
        return stands if rows is None else stands[rows]


def visual(path: Path, rule: str, **options: Any) -> RelaxedVisual:
    if rule.startswith("lantern"):
        generator = torch.Generator().manual_seed(0)
        others = [torch.randperm(CODES - 1, generator=generator)[:70] + 1 for _ in range(CODES)]
        table = (torch.stack(others) + torch.arange(CODES).unsqueeze(1)) % CODES
        table[::4, 40:] = CODES  # fewer neighbours
        card = NeighbourCard(CODES, table.shape[1], 2, None, 0, "", "toy")
        write_neighbours(path / "codes.safetensors", card, table)
        options["neighbours"] = str(path / "codes.safetensors")
    image_tokens = (FIRST_CODE, FIRST_CODE + CODES)
    given = RelaxedVisualOptions.model_validate(
        {"rule": rule, "image_token_range": image_tokens, **options}
    )
    return RelaxedVisual(given, CONTEXT)


Make = Callable[..., RelaxedRule]
RULES: dict[str, Make] = {
    "lantern": lambda path, **o: visual(path, "lantern", budget=0.2, **o),
    "lantern++": lambda path, **o: visual(path, "lantern++", factor=4.0, **o),
    "gsd": lambda path, **o: visual(path, "gsd", **o),
    "gsd, published": lambda path, **o: visual(path, "gsd", residual="published", **o),
    "annealed": lambda path, **o: visual(path, "annealed", **o),
    "top_k_relaxed": lambda _, **o: TopKRelaxed(TopKRelaxedOptions(k=20, **o), CONTEXT),
    "kl_judge": lambda _, **o: KLJudge(KLJudgeOptions(max_divergence=0.6, **o), CONTEXT),
    "judge": lambda _, **o: EveryThird(RelaxedOptions(**o)),
}


def both_ways(
    make: Callable[[], RelaxedRule], batch: VerifyInput, monkeypatch: pytest.MonkeyPatch
) -> tuple[Verification, Verification]:
    """Two steps of one verifier, the second knowing what the first cost: kernel, PyTorch."""
    results = []
    for fused in (True, False):
        verify_fused = Mock(wraps=relaxed_rule.verify_fused)
        with monkeypatch.context() as patch:
            patch.setattr(relaxed_rule, "verify_fused", verify_fused)
            if not fused:
                patch.setattr(relaxed_rule, "can_verify_fused", lambda _: False)
            verifier = make()
            verifier.verify(batch)
            results.append(verifier.verify(replace(batch, positions=batch.positions + 7)))
        assert verify_fused.call_count == 2 * fused
    return results[0], results[1]


#: Kind of draft, temperatures, limit of the price; the first two in the default suite.
CASES = [("dense", DRAWN, None), ("ranked", MIXED, 0.02)]
MORE_CASES = [
    (draft, temperatures, limit)
    for draft in ("one_hot", "dense", "ranked")
    for temperatures in (DRAWN, MIXED)
    for limit in (None, 0.02)
    if (draft, temperatures, limit) not in CASES
]


@pytest.mark.parametrize(
    ("draft", "temperatures", "limit"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES)],
)
@pytest.mark.parametrize("rule", RULES)
def test_the_same_decisions_at_the_same_price(
    rule: str,
    draft: str,
    temperatures: tuple[float, ...],
    limit: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = 120 if draft == "ranked" else None
    batch = make_batch(11, LENGTHS, temperatures, VOCAB_SIZE, draft, size, excluded=0.2)
    found, expected = both_ways(
        lambda: RULES[rule](tmp_path, max_total_variation=limit), batch, monkeypatch
    )
    assert torch.equal(found.token_ids, expected.token_ids)
    assert torch.equal(found.accepted, expected.accepted)
    assert found.extra_acceptance is not None
    assert expected.extra_acceptance is not None
    torch.testing.assert_close(
        found.extra_acceptance, expected.extra_acceptance, check_dtype=False, atol=1e-9, rtol=1e-9
    )
    if (draft, temperatures, limit) == CASES[0]:  # equal prices are not all nothing
        assert found.extra_acceptance.sum() > 0


def test_rules_with_another_residual_keep_their_path(tmp_path: Path) -> None:
    """They may accept less than the exact rule, or draw as the authors' code does."""
    assert not Typical(TypicalOptions(), CONTEXT).draws_exact_residual
    assert not Threshold(ThresholdOptions(), CONTEXT).draws_exact_residual
    published = visual(tmp_path, "lantern", residual="published")
    assert not published.draws_exact_residual
