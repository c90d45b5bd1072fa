"""Where the host may not look, verifiers decide as where it may, and ask the device nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_spec_plugins.verifiers.fly import Fly, FlyOptions
from vllm_spec_plugins.verifiers.kl_judge import KLJudge, KLJudgeOptions
from vllm_spec_plugins.verifiers.lossless import Lossless, LosslessOptions
from vllm_spec_plugins.verifiers.relaxed_visual import RelaxedVisual, RelaxedVisualOptions
from vllm_spec_plugins.verifiers.threshold import Threshold, ThresholdOptions
from vllm_spec_plugins.verifiers.top_k_relaxed import TopKRelaxed, TopKRelaxedOptions
from vllm_spec_plugins.verifiers.typical import Typical, TypicalOptions

from vllm_spec_plugins.codebook_neighbours import NeighbourCard, write_neighbours
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.row_choice import may_look, replace_rows
from vllm_spec_plugins.testing.guarantees import assert_keeps_its_guarantee
from vllm_spec_plugins.testing.host_waits import waits_counted
from vllm_spec_plugins.testing.toy_problems import toy_context
from vllm_spec_plugins.verifier import Verifier, VerifyInput

V, CODES = 40, range(8, 32)

#: Each made with a folder for its files and the ids of the image tokens.
RULES: dict[str, Callable[[Path, range], Verifier]] = {
    "lossless": lambda *_: Lossless(LosslessOptions(rule="token"), toy_context(V)),
    "typical": lambda *_: Typical(TypicalOptions(), toy_context(V)),
    "threshold": lambda *_: Threshold(ThresholdOptions(min_log_probability=-3), toy_context(V)),
    "kl_judge": lambda *_: KLJudge(KLJudgeOptions(max_divergence=0.3), toy_context(V)),
    "top_k_relaxed": lambda *_: TopKRelaxed(TopKRelaxedOptions(k=3, delta=0.3), toy_context(V)),
    "fly": lambda *_: Fly(FlyOptions(window_size=1), toy_context(V)),
    "gsd": lambda _, codes: visual("gsd", codes, max_probability_difference=0.2),
    "annealed": lambda _, codes: visual("annealed", codes),
    "lantern": lambda folder, codes: visual("lantern", codes, folder, budget=0.3),
    "lantern++": lambda folder, codes: visual("lantern++", codes, folder),
    "lantern, published": lambda folder, codes: visual(
        "lantern", codes, folder, residual="published"
    ),
    "clusters": lambda folder, codes: visual("clusters", codes, folder, cluster_size=3),
    "typical, limited": lambda *_: Typical(
        TypicalOptions(max_total_variation=0.02), toy_context(V)
    ),
    "clusters, limited": lambda folder, codes: visual(
        "clusters", codes, folder, cluster_size=3, max_total_variation=0.005
    ),
}
EVERY_RULE = pytest.mark.parametrize("rule", RULES)


def visual(rule: str, codes: range, folder: Path | None = None, **options: Any) -> RelaxedVisual:
    if folder is not None:
        ring = [[(c + i) % len(codes) for i in (1, 2, 3)] for c in range(len(codes))]
        card = NeighbourCard(len(codes), 3, 2, None, 0, "", "toy")
        write_neighbours(folder / "n.safetensors", card, torch.tensor(ring))
        options["neighbours"] = str(folder / "n.safetensors")
    given: dict[str, Any] = {
        "rule": rule,
        "image_token_range": (codes.start, codes.stop),
        **options,
    }
    return RelaxedVisual(RelaxedVisualOptions(**given), toy_context(V))


def step(
    draft: str,
    temperatures: Sequence[float],
    lengths: Sequence[int] = (4, 0, 3, 1),
    seed: int = 0,
) -> VerifyInput:
    """Drafts that are near the target, some of them placeholders; some tokens are excluded."""
    generator = torch.Generator().manual_seed(seed)
    count, requests = sum(lengths), len(lengths)
    logits = 2 * torch.randn(count + requests, V, generator=generator)
    excluded = torch.rand(logits.shape, generator=generator) < 0.2
    logits = logits.masked_fill(excluded & (logits < logits.amax(dim=1, keepdim=True)), -torch.inf)
    near = logits[:count].clamp(min=-4) + 0.5 * torch.randn(count, V, generator=generator)
    columns, law = torch.arange(V), None
    if draft == "ranked":
        columns = torch.randperm(V, generator=generator)[:30].sort().values
    values = torch.softmax(near[:, columns], dim=-1)
    ids = columns[torch.multinomial(values, 1, generator=generator).squeeze(1)]
    if draft != "chosen":
        sampled = torch.rand(count, generator=generator) < 0.8
        law = DraftProbabilities(values, columns if draft == "ranked" else None, sampled)
    ids = torch.where(torch.rand(count, generator=generator) < 0.1, -1, ids)
    heat = torch.tensor(temperatures)
    return VerifyInput(
        [str(i) for i in range(requests)],
        logits[:count],
        logits[count:],
        ids,
        torch.tensor(lengths),
        law,
        heat,
        torch.randint(2**40, (requests,), generator=generator),
        torch.randint(900, (requests,), generator=generator),
        max_num_draft=max(lengths),
        all_greedy=bool((heat == 0).all()),
        any_greedy=bool((heat == 0).any()),
    )


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """`unseen()`: from now on the CPU is a device. Kernels still are not asked."""

    def call_it_a_device() -> None:
        monkeypatch.setattr("vllm_spec_plugins.row_choice.use_triton", lambda _tensor: True)

    return call_it_a_device


@EVERY_RULE
@pytest.mark.parametrize("draft", ["drawn", "ranked", "chosen"])
@pytest.mark.parametrize("heat", [(1, 1, 0.7, 1), (1, 0, 0, 1), (0, 0, 0, 0)], ids=str)
def test_unseen_the_same_is_decided_without_a_wait(
    rule: str,
    draft: str,
    heat: tuple[float, ...],
    unseen: Callable[[], None],
    tmp_path: Path,
) -> None:
    verifier = RULES[rule](tmp_path, CODES)
    seen = [verifier.verify(step(draft, heat, seed=seed)) for seed in range(12)]
    unseen()
    verifier = RULES[rule](tmp_path, CODES)
    steps = [step(draft, heat, seed=seed) for seed in range(12)]
    with waits_counted() as counted:
        found = [verifier.verify(each) for each in steps]
    assert not counted
    for ours, theirs in zip(found, seen, strict=True):
        assert torch.equal(ours.token_ids, theirs.token_ids)
        assert torch.equal(ours.accepted, theirs.accepted)
        if theirs.extra_acceptance is not None:
            torch.testing.assert_close(ours.extra_acceptance, theirs.extra_acceptance)
    assert sum(int(each.accepted.sum()) for each in seen) > 0


@pytest.mark.parametrize("rule", ["typical", "clusters"])
def test_limits_hold_somebody_back(rule: str, tmp_path: Path) -> None:
    """Negative control: without limits the same steps are decided otherwise."""
    limited, free = (RULES[name](tmp_path, CODES) for name in (f"{rule}, limited", rule))
    steps = [step("drawn", (1, 1, 0.7, 1), seed=seed) for seed in range(40)]
    found = [limited.verify(each).accepted - free.verify(each).accepted for each in steps]
    assert any(bool((less < 0).any()) for less in found)


@EVERY_RULE
def test_unseen_drafts_of_no_tokens(rule: str, unseen: Callable[[], None], tmp_path: Path) -> None:
    verifier = RULES[rule](tmp_path, CODES)
    steps = [step("drawn", heat, lengths=(0, 0)) for heat in ((1, 1), (0, 1), (0, 0))]
    seen = [verifier.verify(each).token_ids for each in steps]
    unseen()
    for each, token_ids in zip(steps, seen, strict=True):
        assert torch.equal(verifier.verify(each).token_ids, token_ids)


@pytest.mark.parametrize("rule", [r for r in RULES if r != "lossless" and "," not in r])
def test_unseen_the_price_is_the_distance(
    rule: str, unseen: Callable[[], None], tmp_path: Path
) -> None:
    unseen()
    assert_keeps_its_guarantee(RULES[rule](tmp_path, range(4)))


@EVERY_RULE
def test_seen_rows_are_looked_up(rule: str, tmp_path: Path) -> None:
    """Negative control: on the CPU the same steps do wait, so waits are counted."""
    verifier, batch = RULES[rule](tmp_path, CODES), step("drawn", (1, 0, 1, 1))
    with waits_counted() as counted:
        verifier.verify(batch)
    assert counted


@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
def test_rows_are_replaced(device: bool, unseen: Callable[[], None]) -> None:
    if device:
        unseen()
    asked: list[int] = []

    def work(rows: torch.Tensor) -> torch.Tensor:
        asked.append(len(rows))
        return 10.0 * rows.double().unsqueeze(1).expand(-1, 2)

    where = torch.tensor([False, True, True, False])
    found = replace_rows(torch.ones(4, 2), where, work)
    assert found.tolist() == [[1, 1], [10, 10], [20, 20], [1, 1]]
    assert found.dtype == torch.float32
    assert asked == [4 if device else 2]
    assert may_look(found) is not device
    nobody = replace_rows(torch.ones(3), torch.zeros(3, dtype=torch.bool), lambda _: 7.0)
    assert nobody.tolist() == [1, 1, 1]
    assert replace_rows(torch.ones(0), torch.ones(0, dtype=torch.bool), work).tolist() == []
