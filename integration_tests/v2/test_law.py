"""The law of the text on model runner V2, with drafts, is the target's.

The exact law of the first three tokens of a target of 16 token ids comes from the model itself,
run by Transformers. All comparisons of one test together raise a false alarm with probability
`FALSE_ALARM` at most, over the choice of the engine's seed, which is fixed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vllm_spec_plugins.testing.chi_square import GoodnessOfFit, compare, failures

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = [pytest.mark.engine, pytest.mark.v2]

FALSE_ALARM = 1e-6
VOCABULARY = 16
NUM_SPECULATIVE_TOKENS = 3
#: The first token comes without a draft; the next ones are drafted and verified.
LENGTH = 4
#: A text like the target's own, in which n-grams of its next tokens can be looked up.
PROMPT = [1, 3, 3, 11, 9, 12, 8, 6, 15, 8, 6, 11, 0, 5, 6, 15, 7, 8, 11, 1, 2, 13, 4, 15, 9, 9, 9]
TEXTS = 512

_DRAFTS = {"num_speculative_tokens": NUM_SPECULATIVE_TOKENS}
EARLY_EXIT = {"method": "early_exit", "exit_layer": 2, **_DRAFTS}
NGRAM_ADAPTIVE = {"method": "ngram_adaptive", "min_acceptance": 0.05, **_DRAFTS}
DRAFT_MODEL = {"method": "draft_model", "draft_sample_method": "probabilistic", **_DRAFTS}
BLOCK = {"name": "lossless", "rule": "block"}
CONFIGURATIONS = {
    "early_exit, token": EARLY_EXIT,
    "early_exit, block": {**EARLY_EXIT, "verifier": BLOCK},
    "ngram_adaptive, token": NGRAM_ADAPTIVE,
    "draft_model of vLLM, token": {**DRAFT_MODEL, "verifier": "lossless"},
    "draft_model of vLLM, block": {**DRAFT_MODEL, "verifier": BLOCK},
    "jacobi": {"method": "jacobi", "filler": "random", **_DRAFTS},
}


ON_DEVICE = {"method": "acme_on_device", "draws": True, **_DRAFTS}
ASYNCHRONOUS = {
    "early_exit, token": EARLY_EXIT,
    "early_exit, block": {**EARLY_EXIT, "verifier": BLOCK},
    "early_exit, ranked": {**EARLY_EXIT, "draft_vocabulary": "RANKED"},
    "diffusion, token": {"method": "diffusion", "model": "DRAFTER", **_DRAFTS},
    "diffusion, two steps, compact, block": {
        "method": "diffusion",
        "model": "DRAFTER",
        "denoising_steps": 2,
        "draft_top_k": 5,
        "verifier": BLOCK,
        **_DRAFTS,
    },
    "jacobi, maximal": {"method": "jacobi", "filler": "random", **_DRAFTS},
    "jacobi, gumbel, compact": {
        "method": "jacobi",
        "coupling": "gumbel",
        "draft_top_k": 5,
        **_DRAFTS,
    },
    "jacobi, fresh, block": {"method": "jacobi", "coupling": "none", "verifier": BLOCK, **_DRAFTS},
    "on the device, token": ON_DEVICE,
    "on the device, block": {**ON_DEVICE, "verifier": BLOCK},
    "draft_model of vLLM, token": {**DRAFT_MODEL, "verifier": "lossless"},
    "draft_model of vLLM, block": {**DRAFT_MODEL, "verifier": BLOCK},
}


@pytest.fixture(scope="module")
def law(narrow_models: tuple[Path, Path]) -> Tensor:
    """`[V, V, V]` joint law of the first three tokens at temperature 1."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(narrow_models[0], dtype=torch.float32)

    def next_laws(contexts: list[list[int]]) -> Tensor:
        with torch.inference_mode():
            logits = model(torch.tensor(contexts)).logits[:, -1]
        return torch.softmax(logits.double(), dim=-1)

    every = range(VOCABULARY)
    first = next_laws([PROMPT])[0]
    second = next_laws([[*PROMPT, x] for x in every])
    third = next_laws([[*PROMPT, x, y] for x in every for y in every])
    third = third.view(VOCABULARY, VOCABULARY, VOCABULARY)
    return first[:, None, None] * second[:, :, None] * third


def fits(llm: Any, generate: Any, law: Tensor) -> list[GoodnessOfFit]:
    """Tokens 1 and 2, and tokens 2 and 3, against their exact laws."""
    import torch

    prompts = [{"prompt_token_ids": PROMPT}] * TEXTS
    texts = torch.tensor(generate(llm, prompts, max_tokens=LENGTH, temperature=1.0))
    return [
        compare(
            f"tokens {i + 1} and {i + 2}",
            torch.bincount(texts[:, i] * VOCABULARY + texts[:, i + 1], minlength=VOCABULARY**2),
            law.sum(dim=2 if i == 0 else 0).flatten(),
        )
        for i in range(2)
    ]


@pytest.fixture
def many(serve_v2: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`serve_v2` in large batches. Our own kernel is not what is tested here; it is interpreted
    like vLLM's, and its reference is faster."""
    monkeypatch.setattr("vllm_spec_plugins.triton_kernels.dispatch.INTERPRETED", False)

    def serve(speculative_config: Any) -> Any:
        return serve_v2(
            speculative_config,
            max_num_seqs=96,
            max_num_batched_tokens=4096,
            num_gpu_blocks_override=512,
        )

    return serve


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_law_is_the_targets(
    name: str, many: Any, law: Tensor, generate: Any, drafted_by: Any
) -> None:
    holds_to_the_law(CONFIGURATIONS[name], many, law, generate, drafted_by)


@pytest.mark.slow
@pytest.mark.usefixtures("acme_methods", "asynchronous")
@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_the_law_is_the_targets_under_asynchronous_scheduling(
    name: str,
    many: Any,
    law: Tensor,
    generate: Any,
    drafted_by: Any,
    write_ranked: Any,
    begun_as: Any,
    narrow_models: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    """The plugin's drafts have 0 to 3 tokens, by their place in the text; all are padded to 3."""
    config = ASYNCHRONOUS[name]
    if "draft_vocabulary" in config:
        # Tokens 12 to 15 are never drafted, and come from the residual distribution.
        file = write_ranked(tmp_path / "ranked", VOCABULARY, {"all": range(12)})
        config = {**config, "draft_vocabulary": file}
    if config.get("model") == "DRAFTER":
        config = {**config, "model": begun_as(narrow_models[1])}
    holds_to_the_law(config, many, law, generate, drafted_by)


@pytest.mark.slow
@pytest.mark.usefixtures("asynchronous")
def test_a_wrong_law_of_drafts_on_the_device_is_seen(
    many: Any, law: Tensor, generate: Any, adapter_of: Any
) -> None:
    """Negative control: verified as if every draft token had been as likely as any."""
    import torch

    from vllm_spec_plugins import DeviceDraft
    from vllm_spec_plugins.draft_probabilities import DraftProbabilities

    with many(EARLY_EXIT) as llm:
        proposer = adapter_of(llm).proposer
        propose_on_device = proposer.propose_on_device

        def with_another_law(batch: Any) -> DeviceDraft:
            draft = propose_on_device(batch)
            flat = torch.full_like(draft.probabilities.values, 1 / VOCABULARY)
            kept = DraftProbabilities(flat, None, draft.probabilities.sampled)
            return DeviceDraft(draft.token_ids, kept)

        proposer.propose_on_device = with_another_law
        found = fits(llm, generate, law)
    assert failures(found, FALSE_ALARM)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0.0, None])
@pytest.mark.usefixtures("asynchronous")
def test_a_relaxed_rule_without_allowance_follows_the_target(
    limit: float | None,
    many: Any,
    law: Tensor,
    generate: Any,
    drafted_by: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Accounts and rows stay on the device; with a free hand the same rule is seen to relax."""
    monkeypatch.setattr("vllm_spec_plugins.row_choice.use_triton", lambda _tensor: True)
    config = {**EARLY_EXIT, "verifier": {"name": "typical", "max_total_variation": limit}}
    if limit is not None:
        holds_to_the_law(config, many, law, generate, drafted_by)
        return
    with many(config) as llm:
        assert failures(fits(llm, generate, law), FALSE_ALARM)


def holds_to_the_law(
    config: dict[str, Any], many: Any, law: Tensor, generate: Any, drafted_by: Any
) -> None:
    with many(config) as llm:
        found = fits(llm, generate, law)
        [tally] = drafted_by(llm).values()
    assert not failures(found, FALSE_ALARM), "\n".join(map(str, found))
    # The test would pass if nothing was drafted, or all of it accepted.
    assert tally["steps"] > 0.4 * TEXTS
    assert tally["accepted"] > 0.1 * tally["steps"]
    assert tally["drafted"] - tally["accepted"] > 0.1 * tally["steps"]
