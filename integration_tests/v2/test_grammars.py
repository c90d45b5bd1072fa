"""Structured outputs on model runner V2: grammars hold beside drafts that know nothing of them.

Under asynchronous scheduling a step with grammars waits for the tokens before it, and its draft
is held against the grammar on the host after the target has run: what breaks it is cut there.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vllm_spec_plugins.testing.chi_square import compare, failures

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = [pytest.mark.engine, pytest.mark.v2, pytest.mark.usefixtures("acme_methods")]

#: Token 3 + i of the target of 16 tokens is letter i.
LETTERS = "abcdefghijklm"
END = 2
MAX_TOKENS = 16
PAIRS = r"([a-e][f-m]){4,7}"
TRIPLES = r"([a-g][a-m][h-m]){3,5}"
#: Of each request, in turn: most batches hold requests with a grammar and without.
GRAMMARS = (PAIRS, None, TRIPLES, None, PAIRS, TRIPLES)
LENGTHS = (8, 33, 40, 20, 17, 5)
PROMPTS = [
    {"prompt_token_ids": [(i * k * k + 5 * k) % 13 + 3 for k in range(length)]}
    for i, length in enumerate(LENGTHS)
]

#: Drafts of vLLM's own that are drawn cost its interpreted sampler most.
FEW_TEXTS = 256
#: A text like the target's own, and a grammar that forbids about half of what would come next.
PROMPT = {"prompt_token_ids": [3, 3, 11, 9, 12, 8, 6, 15, 8, 6, 11, 5, 6, 15, 7, 8, 11, 9, 9]}
FOUR = "[a-h][d-k][a-h][d-k]"
TEXTS = 768
VOCABULARY = 16
FALSE_ALARM = 1e-6

_DRAFTS = {"num_speculative_tokens": 3}
ON_DEVICE = {"method": "acme_on_device", **_DRAFTS}
NGRAM = {"method": "ngram_gpu", "prompt_lookup_min": 1, "prompt_lookup_max": 3, **_DRAFTS}
NGRAM_ADAPTIVE = {"method": "ngram_adaptive", "min_acceptance": 0.05, **_DRAFTS}
DRAFT_MODEL = {"method": "draft_model", **_DRAFTS}
BLOCK = {"name": "lossless", "rule": "block"}
SLOW = pytest.mark.slow
ASYNCHRONOUS = {
    "ngram_adaptive, token": {**NGRAM_ADAPTIVE, "matching": "device"},
    "a plugin's, block": {**ON_DEVICE, "verifier": BLOCK},
    "a plugin's, typical": {**ON_DEVICE, "verifier": "typical"},
    "ngram of vLLM, token": {**NGRAM, "verifier": "lossless"},
    "draft_model of vLLM, block": {**DRAFT_MODEL, "verifier": BLOCK},
}
DRAWN_BY_VLLM = {**DRAFT_MODEL, "draft_sample_method": "probabilistic", "verifier": "lossless"}
SAMPLED = {
    "a plugin's draws, token": ({**ON_DEVICE, "draws": True}, TEXTS),
    "draft_model of vLLM, draws, token": (DRAWN_BY_VLLM, FEW_TEXTS),
}
SYNCHRONOUS = {
    "ngram_adaptive, block": {**NGRAM_ADAPTIVE, "verifier": BLOCK},
    "a plugin's, token": {**ON_DEVICE, "length_control": "additive"},
}


@pytest.fixture(scope="session")
def folder(narrow_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target of 16 tokens with a tokenizer, which grammars are compiled for."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *LETTERS])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    folder = tmp_path_factory.mktemp("target_of_letters")
    shutil.copytree(narrow_models[0], folder, dirs_exist_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def serve_letters(serve_v2: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """`serve_v2` for the target that grammars are compiled for."""

    def serve(speculative_config: Any = None, **engine_args: Any) -> Any:
        return serve_v2(
            speculative_config,
            model=str(folder),
            skip_tokenizer_init=False,
            structured_outputs_config={"backend": "xgrammar"},
            **engine_args,
        )

    return serve


def under(grammar: str | None) -> dict[str, Any]:
    """Sampling options of a request; its text ends where the grammar does."""
    from vllm.sampling_params import StructuredOutputsParams

    if grammar is None:
        return {}
    return {"structured_outputs": StructuredOutputsParams(regex=grammar), "ignore_eos": False}


def decode(llm: Any, generate: Any) -> list[list[int]]:
    each = [under(grammar) for grammar in GRAMMARS]
    return generate(llm, PROMPTS, max_tokens=MAX_TOKENS, each=each)


def obeys(token_ids: list[int], grammar: str) -> bool:
    """Whether a text that has come to its end is one of the grammar's."""
    *letters, end = token_ids
    return end == END and re.fullmatch(grammar, letters_of(letters)) is not None


def letters_of(token_ids: list[int]) -> str:
    return "".join(LETTERS[token_id - 3] if token_id > END else "?" for token_id in token_ids)


@pytest.fixture(scope="module")
def plain(serve_letters: Any, generate: Any) -> list[list[int]]:
    """Greedy texts of runner V2 under the same grammars, without drafts."""
    with serve_letters() as llm:
        texts = decode(llm, generate)
    for text, grammar in zip(texts, GRAMMARS, strict=True):
        assert grammar is None or obeys(text, grammar)
    return texts


@pytest.fixture(autouse=True)
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our fused kernel is not what is tested here, and its reference is faster than it on CPUs."""
    monkeypatch.setattr("vllm_spec_plugins.triton_kernels.dispatch.INTERPRETED", False)


@pytest.mark.usefixtures("asynchronous")
@pytest.mark.parametrize(
    "name", [next(iter(ASYNCHRONOUS)), *(pytest.param(n, marks=SLOW) for n in [*ASYNCHRONOUS][1:])]
)
def test_grammars_hold_under_asynchronous_scheduling(
    name: str,
    serve_letters: Any,
    generate: Any,
    adapter_of: Any,
    drafted_by: Any,
    plain: list[list[int]],
) -> None:
    """Greedy texts are plain decoding's; of what was drafted, the grammar cuts a part."""
    with serve_letters(ASYNCHRONOUS[name]) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        adapter: Any = adapter_of(llm)
        cut = drafts_cut(adapter)
        assert decode(llm, generate) == plain
        [tally] = drafted_by(llm).values()
        assert adapter._failures == 0
    assert tally["accepted"] > 0
    assert sum(cut) > 0, "no draft breaks the grammar here"


def drafts_cut(adapter: Any) -> list[int]:
    """Of each step from now on, how many draft tokens the grammars cut; padding is none."""
    cut: list[int] = []
    invalid_drafts = adapter.invalid_drafts

    def counted(input_batch: Any, by_grammar: Any) -> Any:
        undrafted = invalid_drafts(input_batch, None)
        if by_grammar is not None:
            cut.append(int((by_grammar & ~undrafted).sum()))
        return invalid_drafts(input_batch, by_grammar)

    adapter.invalid_drafts = counted
    return cut


@pytest.mark.slow
@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_grammars_hold_under_synchronous_scheduling(
    name: str, serve_letters: Any, generate: Any, drafted_by: Any, plain: list[list[int]]
) -> None:
    with serve_letters(SYNCHRONOUS[name]) as llm:
        assert not llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        assert decode(llm, generate) == plain
        [tally] = drafted_by(llm).values()
    assert tally["accepted"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("asynchronous")
@pytest.mark.parametrize("name", SAMPLED)
def test_the_law_under_a_grammar(
    name: str, serve_letters: Any, generate: Any, adapter_of: Any, drafted_by: Any, law: Tensor
) -> None:
    """Drafts that the grammar forbids are cut for what they are; the text must not show it.

    The second and third tokens, which are drafted; half of the requests have no grammar.
    """
    import torch

    config, count = SAMPLED[name]
    with serve_letters(
        config, max_num_seqs=96, max_num_batched_tokens=4096, num_gpu_blocks_override=512
    ) as llm:
        cut = drafts_cut(adapter_of(llm))
        texts = generate(
            llm,
            [PROMPT] * count,
            max_tokens=4,
            temperature=1.0,
            each=[under(FOUR) if i % 2 else {} for i in range(count)],
        )
        [tally] = drafted_by(llm).values()
    bound = torch.tensor(texts[1::2])
    assert all(re.fullmatch(FOUR, letters_of(text)) for text in bound.tolist())
    found = [
        compare(
            f"tokens {i + 1} and {i + 2}",
            torch.bincount(bound[:, i] * VOCABULARY + bound[:, i + 1], minlength=VOCABULARY**2),
            law.sum(dim=2 if i == 0 else 0).flatten(),
        )
        for i in range(2)
    ]
    assert not failures(found, FALSE_ALARM), "\n".join(map(str, found))
    assert sum(cut) > 0.1 * count
    assert tally["accepted"] > 0.1 * count


@pytest.fixture(scope="module")
def law(folder: Path) -> Tensor:
    """`[V, V, V]` joint law of the first three tokens under `FOUR` at temperature 1.

    Each token is drawn from what the grammar leaves of its law.
    """
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    classes = torch.zeros(3, VOCABULARY, dtype=torch.bool)
    for row, letters in zip(classes, ("abcdefgh", "defghijk", "abcdefgh"), strict=True):
        row[[LETTERS.index(letter) + 3 for letter in letters]] = True

    def next_laws(contexts: list[list[int]], allowed: Tensor) -> Tensor:
        with torch.inference_mode():
            logits = model(torch.tensor(contexts)).logits[:, -1].double()
        return torch.softmax(logits.masked_fill(~allowed, -torch.inf), dim=-1)

    every, prompt = range(VOCABULARY), PROMPT["prompt_token_ids"]
    first = next_laws([prompt], classes[0])[0]
    second = next_laws([[*prompt, x] for x in every], classes[1])
    third = next_laws([[*prompt, x, y] for x in every for y in every], classes[2])
    third = third.view(VOCABULARY, VOCABULARY, VOCABULARY)
    return first[:, None, None] * second[:, :, None] * third
