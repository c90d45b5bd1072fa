"""Sampling options of vLLM stay in force under our verifier.

Every option is decoded greedily with and without drafts: text, logprobs and reasons to stop
must be equal. Seeded sampling must depend on the seed, not on the batch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

pytestmark = pytest.mark.engine

NGRAM_ADAPTIVE = {
    "method": "ngram_adaptive",
    "num_speculative_tokens": 4,
    "min_acceptance": 0.05,
    "verifier": "lossless",
}
#: The target drafts for itself: long drafts, all accepted until an option forbids one.
DRAFT_MODEL = {"method": "draft_model", "num_speculative_tokens": 4, "verifier": "lossless"}

MAX_TOKENS = 24
TEXTS = [
    "the cat sat on the mat, the cat sat on the",
    "one two three one two three one two",
    "in the beginning was the word and the word was",
    "a b c d e f g a b c d e f g a b c",
    "hello",
]

SCHEMA = {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 4, "maxItems": 5}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with as many tokens as `random_model` has: bytes and pairs of letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "etaoinshrdlucmfwypvbgk"
    single = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pairs = list(product(letters, letters))[: 512 - len(single)]
    vocabulary = {token: i for i, token in enumerate([*single, *(a + b for a, b in pairs)])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def model_with_tokenizer(
    random_model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: Any
) -> Path:
    folder = tmp_path_factory.mktemp("model_with_tokenizer")
    shutil.copytree(random_model, folder, dirs_exist_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def serve(serve_offline: Callable[..., Any], model_with_tokenizer: Path) -> Callable[..., Any]:
    """`serve_offline` for the model with a tokenizer."""

    def serve(speculative_config: Any = None, **engine_args: Any) -> Any:
        model = str(model_with_tokenizer)
        if speculative_config is not None and speculative_config["method"] == "draft_model":
            speculative_config = {**speculative_config, "model": model}
        # Random weights would indent for ever.
        grammars = {"backend": "xgrammar", "disable_any_whitespace": True}
        engine_args["structured_outputs_config"] = grammars
        return serve_offline(speculative_config, model=model, **engine_args)

    return serve


@dataclass(frozen=True)
class Completion:
    """What a client sees of one completion, and its prompt.

    Attributes:
        logprobs: Of each token: by token id, logprob and rank.
        prompt_logprobs: The same of each prompt token after the first.
    """

    token_ids: list[int]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: list[dict[int, tuple[float, int]]]
    prompt_logprobs: list[dict[int, tuple[float, int]]]


def complete(llm: Any, prompts: Sequence[Any], **sampling: Any) -> list[list[Completion]]:
    """`n` completions of each prompt, greedy unless `sampling` says otherwise."""
    from vllm import SamplingParams

    params = SamplingParams(**{"temperature": 0.0, "max_tokens": MAX_TOKENS, **sampling})

    def plain_values(logprobs: Any) -> list[dict[int, tuple[float, int]]]:
        entries = [position or {} for position in logprobs or []]
        return [{t: (e.logprob, e.rank) for t, e in entry.items()} for entry in entries]

    return [
        [
            Completion(
                list(output.token_ids),
                output.text,
                output.finish_reason,
                output.stop_reason,
                plain_values(output.logprobs),
                plain_values(request.prompt_logprobs),
            )
            for output in request.outputs
        ]
        for request in llm.generate(list(prompts), params, use_tqdm=False)
    ]


def options(example: Completion, tokenizer: PreTrainedTokenizerFast) -> dict[str, dict[str, Any]]:
    """Every option, set so that it changes the text of which `example` is the greedy one."""
    from vllm.sampling_params import StructuredOutputsParams

    def read_back(token_ids: list[int]) -> bool:
        text = tokenizer.decode(token_ids)
        return text.strip() == text != "" and tokenizer.encode(text) == token_ids

    ids = example.token_ids
    word = next(tokenizer.decode([a]) for a in ids if read_back([a]))
    phrase = next(tokenizer.decode([a, b]) for a, b in pairwise(ids) if read_back([a, b]))
    endless = {"ignore_eos": True}
    return {
        "repetition_penalty": {"repetition_penalty": 1.3, **endless},
        "presence_penalty": {"presence_penalty": 1.5, **endless},
        "frequency_penalty": {"frequency_penalty": 1.5, **endless},
        "all penalties": {
            "repetition_penalty": 1.2,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.5,
            **endless,
        },
        "bad_words": {"bad_words": [word, phrase], **endless},
        "bad_words of two tokens": {"bad_words": [phrase], **endless},
        "stop token": {"stop_token_ids": [ids[5]]},
        "min_tokens": {"stop_token_ids": ids[4:6], "min_tokens": 12},
        "allowed_token_ids": {"allowed_token_ids": list(range(40, 120)), **endless},
        "stop string": {"stop": [example.text[8:10]]},
        "stop string, kept": {"stop": [example.text[8:10]], "include_stop_str_in_output": True},
        "regex": {
            "structured_outputs": StructuredOutputsParams(regex="([a-z]{3} [0-9]{2}, ){3}end")
        },
        "JSON": {"structured_outputs": StructuredOutputsParams(json=SCHEMA)},
        "max_tokens": {"max_tokens": 11, **endless},
    }


OPTIONS = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "all penalties",
    "bad_words",
    "bad_words of two tokens",
    "stop token",
    "min_tokens",
    "allowed_token_ids",
    "stop string",
    "stop string, kept",
    "regex",
    "JSON",
    "max_tokens",
)
GRAMMARS = ("regex", "JSON")
PROPOSERS = {"ngram_adaptive": NGRAM_ADAPTIVE, "draft_model": DRAFT_MODEL}


@dataclass(frozen=True)
class Decoded:
    """Completions of every text under every option; drafts verified meanwhile, by option."""

    proposer: str | None
    greedy: list[list[Completion]]
    by_option: dict[str, list[list[Completion]]]
    drafted: dict[str, int]


@pytest.fixture(scope="module")
def plain(serve: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> Decoded:
    with serve() as llm:
        greedy = complete(llm, TEXTS, ignore_eos=True)
        every = options(greedy[0][0], tokenizer)
        assert list(every) == list(OPTIONS)
        by_option = {name: complete(llm, TEXTS, **sampling) for name, sampling in every.items()}
    return Decoded(None, greedy, by_option, {})


@pytest.fixture(scope="module", params=PROPOSERS)
def drafted(
    request: pytest.FixtureRequest,
    serve: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
    drafted_by: Callable[..., Any],
    plain: Decoded,
) -> Decoded:
    """The same with drafts."""
    by_option, drafted, so_far = {}, {}, 0
    with serve(PROPOSERS[request.param]) as llm:
        greedy = complete(llm, TEXTS, ignore_eos=True)
        for name, sampling in options(plain.greedy[0][0], tokenizer).items():
            by_option[name] = complete(llm, TEXTS, **sampling)
            [tally] = drafted_by(llm).values()
            drafted[name], so_far = tally["drafted"] - so_far, tally["drafted"]
    return Decoded(request.param, greedy, by_option, drafted)


@pytest.mark.parametrize("option", OPTIONS)
def test_greedy_text_is_plain_decodings(option: str, plain: Decoded, drafted: Decoded) -> None:
    # A draft model knows no grammar: what it drafts there is cut before it is verified.
    if not (drafted.proposer == "draft_model" and option in GRAMMARS):
        assert drafted.drafted[option] > 0
    assert plain.by_option[option] != plain.greedy, "the option changes nothing here"
    assert drafted.by_option[option] == plain.by_option[option]


def test_structured_outputs_hold(drafted: Decoded) -> None:
    for [completion] in drafted.by_option["JSON"]:
        if completion.finish_reason == "stop":
            assert set(json.loads(completion.text)) <= {"x", "y"}
    assert any(c.finish_reason == "stop" for [c] in drafted.by_option["JSON"])


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("raw_logprobs", marks=pytest.mark.slow),
        "processed_logprobs",
        pytest.param("raw_logits", marks=pytest.mark.slow),
        pytest.param("processed_logits", marks=pytest.mark.slow),
    ],
)
def test_logprobs_are_plain_decodings(mode: str, serve: Callable[..., Any]) -> None:
    """Of chosen tokens, of the likeliest, and of the prompt; also where penalties apply."""
    requests: list[dict[str, Any]] = [
        {"logprobs": 3},
        {"logprobs": 0},
        {"logprobs": 2, "prompt_logprobs": 2},
        {"logprobs": 3, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    ]

    def all_of(llm: Any) -> list[Completion]:
        found = [complete(llm, TEXTS, ignore_eos=True, **sampling) for sampling in requests]
        return [completion for batch in found for [completion] in batch]

    with serve(logprobs_mode=mode) as llm:
        wanted = all_of(llm)
    with serve(DRAFT_MODEL, logprobs_mode=mode) as llm:
        found = all_of(llm)
    for one, other in zip(found, wanted, strict=True):
        assert one.token_ids == other.token_ids
        assert_close(one.logprobs, other.logprobs)
        assert_close(one.prompt_logprobs, other.prompt_logprobs)
    assert any(completion.prompt_logprobs for completion in found)


def assert_close(found: list[dict[int, Any]], wanted: list[dict[int, Any]]) -> None:
    """The same tokens with the same ranks; logprobs up to the order of float32 sums."""
    assert [entry.keys() for entry in found] == [entry.keys() for entry in wanted]
    for one, other in zip(found, wanted, strict=True):
        for token_id, (logprob, rank) in one.items():
            assert rank == other[token_id][1]
            assert logprob == pytest.approx(other[token_id][0], abs=1e-4)


@pytest.mark.parametrize(
    "mode", [pytest.param("raw_logprobs", marks=pytest.mark.slow), "processed_logprobs"]
)
def test_logprobs_of_sampled_text_are_plain_decodings(mode: str, serve: Callable[..., Any]) -> None:
    """A sampled text, token by token, against what plain decoding says of the same contexts."""
    sampling = {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "logprobs": 2, "ignore_eos": True}
    with serve({**DRAFT_MODEL, "draft_sample_method": "probabilistic"}, logprobs_mode=mode) as llm:
        texts = [c for [c] in complete(llm, TEXTS, seed=5, **sampling)]
        prompts = [llm.get_tokenizer().encode(text) for text in TEXTS]
    contexts = [
        {"prompt_token_ids": prompt + text.token_ids[:i]}
        for prompt, text in zip(prompts, texts, strict=True)
        for i in range(MAX_TOKENS)
    ]
    with serve(logprobs_mode=mode, max_logprobs=-1) as llm:
        everything = {**sampling, "max_tokens": 1, "logprobs": -1}
        wanted = [c.logprobs[0] for [c] in complete(llm, contexts, **everything)]
    found = [entry for text in texts for entry in text.logprobs]
    for one, other in zip(found, wanted, strict=True):
        assert_close([one], [{token_id: other[token_id] for token_id in one}])


@pytest.mark.parametrize("sampling", [{"min_p": 0.1}, {"logit_bias": {7: 2.0}}], ids=str)
def test_options_vllm_refuses_under_speculation_are_refused(
    sampling: dict[str, Any], serving: Any
) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="min_p and logit_bias"):
        complete(serving, TEXTS[:1], temperature=1.0, **sampling)
    assert complete(serving, TEXTS[:1], max_tokens=2)


def test_custom_logits_processors_are_refused(serve: Callable[..., Any]) -> None:
    from vllm.v1.sample.logits_processor import MinPLogitsProcessor

    with (
        pytest.raises(ValueError, match="logits processors"),
        serve(NGRAM_ADAPTIVE, logits_processors=[MinPLogitsProcessor]),
    ):
        pass


@pytest.fixture(scope="module")
def serving(serve: Callable[..., Any]) -> Any:
    """One engine with `ngram_adaptive`, for the tests below."""
    with serve(NGRAM_ADAPTIVE) as llm:
        yield llm


#: Cool enough for the text to repeat itself, so that there are drafts.
SAMPLED = {"temperature": 0.6, "top_p": 0.95, "ignore_eos": True}


def token_ids(completions: list[list[Completion]]) -> list[list[int]]:
    return [c.token_ids for request in completions for c in request]


def test_several_completions_of_a_prompt(serving: Any) -> None:
    """`n` completions with a seed are those of the seeds that follow it."""
    [first, second] = token_ids(complete(serving, TEXTS[:1], seed=7, n=2, **SAMPLED))
    assert [first] == token_ids(complete(serving, TEXTS[:1], seed=7, **SAMPLED))
    assert [second] == token_ids(complete(serving, TEXTS[:1], seed=8, **SAMPLED))
    assert first != second
    unseeded = token_ids(complete(serving, TEXTS[:1], n=4, **SAMPLED))
    assert len({tuple(text) for text in unseeded}) == 4


def test_a_seeded_request_does_not_depend_on_its_batch(
    serving: Any, drafted_by: Callable[..., Any]
) -> None:
    from vllm import SamplingParams

    alone = [token_ids(complete(serving, [text], seed=3, **SAMPLED))[0] for text in TEXTS]
    [tally] = drafted_by(serving).values()
    assert tally["drafted"] > 20
    others = [SamplingParams(**SAMPLED, max_tokens=9 + 3 * i) for i in range(8)]
    seeded = SamplingParams(**SAMPLED, seed=3, max_tokens=MAX_TOKENS)
    for i, text in enumerate(TEXTS):
        prompts = [f"{other} {i}" for other in range(8)]
        prompts.insert(i, text)
        params = [*others[:i], seeded, *others[i:]]
        outputs = serving.generate(prompts, params, use_tqdm=False)
        assert list(outputs[i].outputs[0].token_ids) == alone[i]


def test_different_seeds_give_different_texts(serving: Any) -> None:
    texts = [token_ids(complete(serving, TEXTS[:1], seed=s, **SAMPLED))[0] for s in range(6)]
    assert len({tuple(text) for text in texts}) == 6


def test_an_engine_seed_reproduces_requests_without_one(serve: Callable[..., Any]) -> None:
    found = []
    for seed in (1, 1, 2):
        with serve(NGRAM_ADAPTIVE, seed=seed) as llm:
            found.append(token_ids(complete(llm, TEXTS, **SAMPLED)))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_a_seeded_request_without_drafts_survives_preemption(
    serve: Callable[..., Any], watch: Callable[..., Any]
) -> None:
    """Its random numbers are those of its positions, wherever the steps begin.

    With drafts the law is the same but the text may differ: a request that is resumed has lost
    its draft, so the token is drawn where otherwise a drafted one would have been judged.
    """
    sampling = {
        **SAMPLED,
        "seed": 3,
        "max_tokens": 60,
        "extra_args": {"spec_decode": {"enabled": False}},
    }
    prompts = [{"prompt_token_ids": list(range(5 + i, 40 + i))} for i in range(12)]
    with serve(NGRAM_ADAPTIVE) as llm:
        wanted = token_ids(complete(llm, prompts, **sampling))
    with serve(NGRAM_ADAPTIVE, num_gpu_blocks_override=16, block_size=32) as llm:
        watched = watch(llm)
        preempted = token_ids(complete(llm, prompts, **sampling))
    assert watched.preemptions > 0
    assert preempted == wanted
