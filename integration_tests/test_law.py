"""The law of the text under speculation is plain decoding's, on the real engine.

A target of 16 tokens, so that every pair of tokens has a bin of its own and a small bias shows.
Its exact law is read from plain decoding's own logprobs, after temperature, top-k and top-p;
texts decoded with drafts are held to it with the chi-square test of the losslessness kit.

All comparisons of one test together raise a false alarm with probability `FALSE_ALARM` at most,
over the choice of the engine's seed, which is fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vllm_spec_plugins.testing.chi_square import GoodnessOfFit, compare, failures

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.engine

FALSE_ALARM = 1e-6
#: Token ids of the target.
VOCABULARY = 16
#: Tokens drafted after the first: one long draft, then a shorter one that ends at `max_tokens`.
NUM_SPECULATIVE_TOKENS = 3
#: The first token, and one full draft with its bonus token.
LENGTH = 5

SAMPLED = {"temperature": 1.0}
TRUNCATED = {"temperature": 0.7, "top_k": 6, "top_p": 0.9}
GREEDY = {"temperature": 0.0}

#: Texts like the target's own, in which n-grams of its next tokens can be looked up.
PROMPTS = [
    [1, 3, 3, 11, 9, 12, 8, 6, 15, 8, 6, 11, 0, 5, 6, 15, 7, 8, 11, 1, 2, 13, 4, 15, 9, 9, 9, 10],
    [1, 11, 1, 2, 9, 9, 9, 0, 9, 11, 1, 2, 2, 4, 15, 9, 9, 3, 11, 1, 11, 2, 2, 7, 0, 9, 9, 9, 5],
]

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
NGRAM_ADAPTIVE = {
    "method": "ngram_adaptive",
    "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
    # Draft nearly always: here it is rejections that are wanted too.
    "min_acceptance": 0.05,
}
DRAFT_MODEL = {
    "method": "draft_model",
    "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
    "draft_sample_method": "probabilistic",
}
EARLY_EXIT = {
    "method": "early_exit",
    "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
    "exit_layer": 2,
}
JACOBI = {"method": "jacobi", "num_speculative_tokens": NUM_SPECULATIVE_TOKENS}
#: Replaced by a file of 10 of the 16 tokens.
RANKED = {"file": "RANKED", "size": 10}
CONFIDENCE = {"name": "confidence", "threshold": 0.5}
THIRD_PARTY = {"method": "acme_sampled", "num_speculative_tokens": NUM_SPECULATIVE_TOKENS}
BLOCK = {"name": "lossless", "rule": "block"}

CONFIGURATIONS = {
    "ngram_adaptive, token": {**NGRAM_ADAPTIVE, "verifier": "lossless"},
    "draft_model of vLLM, block": {**DRAFT_MODEL, "verifier": BLOCK},
    "early_exit, ranked and dynamic, block": {
        **EARLY_EXIT,
        "draft_vocabulary": {**RANKED, "dynamic_tokens": 2},
        "verifier": BLOCK,
    },
    "early_exit, confidence, block": {
        **EARLY_EXIT,
        "length_control": CONFIDENCE,
        "verifier": BLOCK,
    },
    "early_exit, del": {**EARLY_EXIT, "exit_layer": "auto", "length_control": "del"},
    "jacobi, maximal": {**JACOBI, "filler": "random"},
}
MORE_CONFIGURATIONS = {
    "early_exit, exits per token": {
        "method": "early_exit",
        "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
        "exit_layers": [1, 2, 3],
        "exit_confidence": 0.5,
    },
    "early_exit, del, ranked and dynamic": {
        **EARLY_EXIT,
        "exit_layer": "auto",
        "length_control": "del",
        "draft_vocabulary": {**RANKED, "dynamic_tokens": 2},
    },
    "early_exit, token": EARLY_EXIT,
    "third party, compact, block": {**THIRD_PARTY, "vocabulary": "compact", "verifier": BLOCK},
    "ngram_adaptive, block": {**NGRAM_ADAPTIVE, "verifier": BLOCK},
    "ngram of vLLM": {**NGRAM, "verifier": "lossless"},
    "draft_model of vLLM, token": {**DRAFT_MODEL, "verifier": "lossless"},
    "third party": THIRD_PARTY,
    "early_exit, block": {**EARLY_EXIT, "verifier": BLOCK},
    "early_exit, thompson": {
        **EARLY_EXIT,
        "length_control": {"name": "thompson", "cost_ratio": 0.1},
    },
    "early_exit, without its law": {**EARLY_EXIT, "draft_sample_method": "greedy"},
    "early_exit, ranked": {**EARLY_EXIT, "draft_vocabulary": RANKED},
    "early_exit, expected_speedup": {
        **EARLY_EXIT,
        "length_control": {"name": "expected_speedup", "cost_ratio": 0.1},
    },
    "jacobi, gumbel, compact": {**JACOBI, "coupling": "gumbel", "draft_top_k": 5},
    "jacobi, block": {**JACOBI, "coupling": "none", "filler": "random", "verifier": BLOCK},
    "jacobi, above, compact": {
        **JACOBI,
        "filler": "above",
        "image_row_length": 2,
        "image_token_range": [4, 12],
        "draft_top_k": 5,
    },
    "early_exit, skips": {**EARLY_EXIT, "exit_layer": 4, "skip_attention": [1], "skip_ffn": [2]},
}


@dataclass(frozen=True)
class PlainDecoding:
    """What plain decoding does, for each prompt.

    Attributes:
        sampled: `[V, V, V]` law of the first three tokens at temperature 1.
        truncated: The same at a lower temperature, with top-k and top-p.
        greedy: The greedy texts.
    """

    sampled: list[Tensor]
    truncated: list[Tensor]
    greedy: list[list[int]]


@pytest.fixture(scope="module")
def ranked_file(write_ranked: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A draft vocabulary that ranks 12 of the 16 tokens."""
    path = tmp_path_factory.mktemp("ranked") / "ranked.safetensors"
    return write_ranked(path, VOCABULARY, {"all": sorted({*range(VOCABULARY)} - {5, 7, 10, 12})})


@pytest.fixture(scope="module")
def serve_narrow(
    serve_offline: Callable[..., Any],
    narrow_models: tuple[Path, Path],
    ranked_file: str,
    acme_methods: None,
) -> Callable[..., Any]:
    """`serve_offline` for the target of 16 tokens and large batches."""
    del acme_methods  # must be installed

    @contextmanager
    def serve(speculative_config: Any = None, **engine_args: Any) -> Iterator[Any]:
        target, draft = narrow_models
        speculative_config = dict(speculative_config) if speculative_config else None
        if speculative_config is not None and speculative_config["method"] == "draft_model":
            speculative_config["model"] = str(draft)
        if speculative_config is not None and "draft_vocabulary" in speculative_config:
            options = speculative_config["draft_vocabulary"]
            speculative_config["draft_vocabulary"] = {**options, "file": ranked_file}
        with serve_offline(
            speculative_config,
            model=str(target),
            skip_tokenizer_init=True,
            max_num_seqs=256,
            max_num_batched_tokens=4096,
            num_gpu_blocks_override=1024,
            **engine_args,
        ) as llm:
            yield llm

    return serve


@pytest.fixture(scope="module")
def plain(
    serve_narrow: Callable[..., Any],
    exact_law: Callable[..., Tensor],
    generate: Callable[..., list[list[int]]],
) -> PlainDecoding:
    """The law, after checking that plain decoding itself follows it."""
    prompts = as_prompts(PROMPTS)
    with serve_narrow(logprobs_mode="processed_logprobs", max_logprobs=VOCABULARY) as llm:
        law = PlainDecoding(
            [exact_law(llm, prompt, SAMPLED) for prompt in PROMPTS],
            [exact_law(llm, prompt, TRUNCATED) for prompt in PROMPTS],
            generate(llm, prompts, max_tokens=LENGTH, **GREEDY),
        )
        run = mixed_batch(llm, generate, law, of_each=500)
        assert not failures(run, FALSE_ALARM), "\n".join(map(str, run))
    return law


def as_prompts(token_ids: Sequence[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": prompt} for prompt in token_ids]


def fits(what: str, texts: list[list[int]], law: Tensor) -> list[GoodnessOfFit]:
    """Tokens 1 and 2, and tokens 2 and 3, of texts of one prompt against their exact laws."""
    import torch

    tokens = torch.tensor(texts)
    return [
        compare(
            f"{what}, tokens {i + 1} and {i + 2}",
            torch.bincount(tokens[:, i] * VOCABULARY + tokens[:, i + 1], minlength=VOCABULARY**2),
            law.sum(dim=2 if i == 0 else 0).flatten(),
        )
        for i in range(2)
    ]


def sampled_batch(
    llm: Any, generate: Callable[..., Any], law: PlainDecoding, of_each: int
) -> list[GoodnessOfFit]:
    """Every request at temperature 1."""
    texts = generate(llm, as_prompts(PROMPTS * of_each), max_tokens=LENGTH, **SAMPLED)
    return [
        fit
        for i in range(len(PROMPTS))
        for fit in fits(f"all sampled, prompt {i}", texts[i :: len(PROMPTS)], law.sampled[i])
    ]


def mixed_batch(
    llm: Any, generate: Callable[..., Any], law: PlainDecoding, of_each: int
) -> list[GoodnessOfFit]:
    """Requests with their own temperature, top-k and top-p side by side, greedy ones among them.

    The greedy ones must be exactly plain decoding's.
    """
    settings = [TRUNCATED, SAMPLED] * 4 + [GREEDY]
    kinds = [(i, s) for s in settings for i in range(len(PROMPTS))]
    texts = generate(
        llm,
        as_prompts([PROMPTS[i] for i, _ in kinds] * of_each),
        max_tokens=LENGTH,
        each=[s for _, s in kinds] * of_each,
    )
    found = []
    for i in range(len(PROMPTS)):

        def of(setting: dict[str, Any], prompt: int = i) -> list[list[int]]:
            wanted = [kind == (prompt, setting) for kind in kinds] * of_each
            return [text for text, is_wanted in zip(texts, wanted, strict=True) if is_wanted]

        assert all(text == law.greedy[i] for text in of(GREEDY)), "a greedy row differs"
        found += fits(f"sampled in a mixed batch, prompt {i}", of(SAMPLED), law.sampled[i])
        found += fits(f"top-k and top-p, prompt {i}", of(TRUNCATED), law.truncated[i])
    return found


def every_batch(llm: Any, generate: Callable[..., Any], law: PlainDecoding) -> list[GoodnessOfFit]:
    """Texts of an engine against the law: 1,600 of each prompt and setting."""
    return sampled_batch(llm, generate, law, 1600) + mixed_batch(llm, generate, law, 400)


def costs_of_layers(_target: Any, passes: Any, most: int, *_: Any) -> Any:
    """In place of `exit_timing.measure_costs`: what exits cost a large model."""
    from vllm_spec_plugins.exit_selection import ExitCosts

    return ExitCosts.from_layers(range(1, len(passes) + 1), 32, 0.0, most)


@pytest.mark.parametrize(
    "name",
    [*CONFIGURATIONS, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE_CONFIGURATIONS)],
)
def test_the_law_is_plain_decodings(
    name: str,
    serve_narrow: Any,
    plain: PlainDecoding,
    generate: Any,
    drafted_by: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Timed on this model and in these batches, drafting never pays, and `del` would not draft.
    monkeypatch.setattr("vllm_spec_plugins.proposers.early_exit.measure_costs", costs_of_layers)
    with serve_narrow({**CONFIGURATIONS, **MORE_CONFIGURATIONS}[name]) as llm:
        found = every_batch(llm, generate, plain)
        [tally] = drafted_by(llm).values()
    assert not failures(found, FALSE_ALARM), "\n".join(map(str, found))
    # The test would pass if nothing was drafted, or all of it accepted.
    texts = len(PROMPTS) * (1600 + 9 * 400)
    assert tally["steps"] > 0.4 * texts
    assert tally["accepted"] > 0.1 * tally["steps"]
    assert tally["drafted"] - tally["accepted"] > 0.1 * tally["steps"]


def test_a_wrong_draft_law_is_noticed(
    serve_narrow: Any, plain: PlainDecoding, generate: Any
) -> None:
    """Negative control: a proposer that draws from one law and reports another."""
    config = {"method": "acme_wrong_law", "num_speculative_tokens": NUM_SPECULATIVE_TOKENS}
    with serve_narrow(config) as llm:
        found = sampled_batch(llm, generate, plain, of_each=1600)
    assert failures(found, FALSE_ALARM), "\n".join(map(str, found))


def test_a_dropped_unlikely_token_is_noticed(
    serve_narrow: Any, plain: PlainDecoding, generate: Any, adapter_of: Any
) -> None:
    """Negative control: a draft that loses the token whose own probability fell too low.

    Kept, as `confidence` does, the same token changes nothing.
    """
    from vllm_spec_plugins.proposer import Draft

    with serve_narrow({**EARLY_EXIT, "length_control": CONFIDENCE}) as llm:
        proposer = adapter_of(llm).proposer
        propose = proposer.propose

        def dropping(batch: Any) -> Draft:
            draft = propose(batch)
            q = draft.probabilities.of(draft.token_ids)
            unlikely = (q < CONFIDENCE["threshold"]) & (draft.token_ids >= 0)
            return Draft(draft.token_ids.masked_fill(unlikely, -1), draft.probabilities)

        proposer.propose = dropping
        found = sampled_batch(llm, generate, plain, of_each=1600)
    assert failures(found, FALSE_ALARM), "\n".join(map(str, found))


def test_a_dropped_residual_is_noticed(
    serve_narrow: Any, plain: PlainDecoding, generate: Any, adapter_of: Any
) -> None:
    """Negative control: after a rejection, a token from the target's law, not the residual."""
    import torch

    with serve_narrow({**NGRAM, "verifier": "lossless"}) as llm:
        adapter_of(llm).verifiers["lossless"].residual = lambda batch, rows: torch.softmax(
            batch.target_logits[rows], dim=-1
        )
        found = sampled_batch(llm, generate, plain, of_each=1600)
    assert failures(found, FALSE_ALARM), "\n".join(map(str, found))


def test_vllms_own_cpu_path_is_noticed(
    serve_narrow: Any, plain: PlainDecoding, generate: Any
) -> None:
    """Negative control: vLLM's own verification on the CPU (vllm-project/vllm#55005)."""
    with serve_narrow(NGRAM) as llm:
        found = sampled_batch(llm, generate, plain, of_each=1600)
    assert failures(found, FALSE_ALARM), "\n".join(map(str, found))
