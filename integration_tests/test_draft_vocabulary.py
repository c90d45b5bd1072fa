"""A ranked draft vocabulary beside vLLM's own model drafters, on the real engine.

Draft tokens come from some of the tokens only; the text must not show it. Models of 16 tokens,
of which 9 are drafted from, are held to the target's exact law, token by token outside included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vllm_spec_plugins.errors import ConfigError, SpecPluginsError
from vllm_spec_plugins.testing.chi_square import GoodnessOfFit, compare, failures

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.engine

FALSE_ALARM = 1e-6
#: Token ids of `random_model`.
WIDE = 512
#: Token ids of the models held to their exact law, and those drafted from.
NARROW = 16
DRAFTED = [0, 1, 2, 3, 4, 6, 8, 9, 11]
OFF_VOCABULARY = sorted(set(range(NARROW)) - set(DRAFTED))
#: One token of plain decoding, then a full draft and its bonus token.
NUM_SPECULATIVE_TOKENS = 3
LENGTH = 5
PROMPT = [1, 3, 3, 11, 9, 12, 8, 6, 15, 8, 6, 11, 0, 5, 6, 15, 7, 8, 11, 1, 2, 13, 4, 15, 9, 9]


@pytest.fixture(scope="module")
def nearly_all(write_ranked: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """All tokens of `random_model` but the last."""
    path = tmp_path_factory.mktemp("ranked") / "nearly_all.safetensors"
    return write_ranked(path, WIDE, {"all": range(WIDE - 1)})


@pytest.fixture(scope="module")
def some(write_ranked: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A third of the tokens of `random_model`."""
    path = tmp_path_factory.mktemp("ranked") / "some.safetensors"
    return write_ranked(path, WIDE, {"some": range(2, WIDE, 3)})


@pytest.fixture(scope="module")
def own_draft(random_model: Path) -> dict[str, Any]:
    """`random_model` drafts for itself."""
    return {
        "method": "draft_model",
        "model": str(random_model),
        "num_speculative_tokens": 4,
        "draft_sample_method": "probabilistic",
    }


# Greedy text, acceptance, requests' own choices.


@pytest.fixture(scope="module")
def plain_text(serve_offline: Any, generate: Any, prompts: Any) -> list[list[int]]:
    with serve_offline() as llm:
        return generate(llm, prompts)


def accepted_share(tally: dict[str, Any]) -> float:
    return tally["accepted"] / tally["drafted"]


@pytest.mark.parametrize(
    "method", [pytest.param("draft_model", marks=pytest.mark.slow), "frequency_vocab"]
)
def test_greedy_text_and_acceptance(
    method: str,
    own_draft: dict[str, Any],
    nearly_all: str,
    some: str,
    plain_text: list[list[int]],
    serve_offline: Any,
    generate: Any,
    prompts: Any,
    drafted_by: Any,
) -> None:
    accepted = {}
    vocabularies: dict[str, Any] = {
        "nearly all": nearly_all,
        "some": some,
        "some and dynamic": {"file": some, "dynamic_tokens": 32},
    }
    for name, vocabulary in vocabularies.items():
        config = {**own_draft, "method": method, "draft_vocabulary": vocabulary}
        with serve_offline(config) as llm:
            assert generate(llm, prompts) == plain_text
            [((proposer, verifier), tally)] = drafted_by(llm).items()
        assert (proposer, verifier) == (method, "lossless")
        accepted[name] = accepted_share(tally)
    assert not any(WIDE - 1 in text for text in plain_text)
    # Its own draft: only what is not in the vocabulary is ever rejected.
    assert accepted["nearly all"] == 1
    assert accepted["some"] < 0.7
    assert accepted["some"] < accepted["some and dynamic"] < 1


def test_drawn_drafts_are_accepted_as_their_law_says(
    own_draft: dict[str, Any],
    nearly_all: str,
    serve_offline: Any,
    generate: Any,
    prompts: Any,
    drafted_by: Any,
) -> None:
    """Drawn from nearly the target's law, nearly all are accepted; chosen ones are not."""
    accepted = {}
    for sample_method in ("probabilistic", "greedy"):
        config = {
            **own_draft,
            "draft_sample_method": sample_method,
            "draft_vocabulary": nearly_all,
        }
        with serve_offline(config) as llm:
            generate(llm, prompts, temperature=1.0)
            [tally] = drafted_by(llm).values()
        accepted[sample_method] = accepted_share(tally)
    assert accepted["probabilistic"] > 0.95
    assert accepted["greedy"] < 0.9


def test_only_compact_logits_are_computed(
    own_draft: dict[str, Any],
    some: str,
    serve_offline: Any,
    generate: Any,
    prompts: Any,
    adapter_of: Any,
) -> None:
    """The drafter's own head is never run, and the law kept is as wide as the vocabulary."""
    with serve_offline({**own_draft, "draft_vocabulary": some}) as llm:
        runner = adapter_of(llm).runner

        def not_whole(hidden: Any) -> Any:
            del hidden
            raise AssertionError("the whole head was run")

        runner.drafter.model.compute_logits = not_whole
        widths = set()
        law = adapter_of(llm)._ranked.law

        def watched(by_vllm: Any, *args: Any) -> Any:
            if by_vllm is not None:
                widths.add(by_vllm.shape[1])
            return law(by_vllm, *args)

        adapter_of(llm)._ranked.law = watched
        generate(llm, prompts, temperature=1.0)
    assert widths == {len(range(2, WIDE, 3))}


def test_seeds_are_reproducible_alone_and_among_others(
    own_draft: dict[str, Any], some: str, serve_offline: Any, generate: Any, prompts: Any
) -> None:
    config = {**own_draft, "draft_vocabulary": {"file": some, "dynamic_tokens": 8}}
    seeds = [{"seed": 100 + i, "temperature": 0.3 + 0.1 * i} for i in range(len(prompts))]
    with serve_offline(config) as llm:
        together = generate(llm, prompts, each=seeds)
        backwards = generate(llm, prompts[::-1], each=seeds[::-1])[::-1]
        alone = [
            generate(llm, [prompt], each=[seed])[0]
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    assert together == backwards == alone
    assert len({tuple(text) for text in together}) == len(prompts)


def test_options_of_one_request(
    own_draft: dict[str, Any],
    some: str,
    plain_text: list[list[int]],
    serve_offline: Any,
    generate: Any,
    prompts: Any,
    adapter_of: Any,
) -> None:
    options = [
        {"enabled": False},
        {"num_speculative_tokens": 1},
        {"num_speculative_tokens": 0},
        {"verifier": "lossless"},
    ] * 2
    with serve_offline({**own_draft, "draft_vocabulary": some}) as llm:
        adapter, lengths = adapter_of(llm), {}
        propose = adapter._limit_vllm_drafts

        def watched(drafts: Any) -> Any:
            limited = propose(drafts)
            for name, draft in zip(adapter.runner.input_batch.req_ids, limited, strict=True):
                lengths.setdefault(adapter.requests[name].draft_limit, set()).add(len(draft))
            return limited

        adapter._limit_vllm_drafts = watched
        each = [{"extra_args": {"spec_decode": chosen}} for chosen in options]
        assert generate(llm, prompts, each=each) == plain_text
        # Drawn drafts of requests with limits of their own, near the model's length.
        long = generate(
            llm, prompts, max_tokens=250, temperature=1.0, each=[{**e, "seed": 1} for e in each]
        )
    assert lengths == {0: {0}, 1: {1}, 4: {4}}
    assert {len(text) for text in long} <= set(range(230, 251))


# The law of the text.


@dataclass(frozen=True)
class Narrow:
    """Folders of a target of 16 tokens, a draft model, and drafting vocabularies."""

    target: Path
    draft: Path
    ranked: str
    two_lists: str


@pytest.fixture(scope="module")
def narrow(
    narrow_models: tuple[Path, Path],
    write_ranked: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Narrow:
    folder = tmp_path_factory.mktemp("narrow")
    ranked = write_ranked(folder / "one.safetensors", NARROW, {"all": DRAFTED})
    lists = {"even": range(0, NARROW, 2), "odd": [2, *range(1, NARROW, 2)]}
    two = write_ranked(folder / "two.safetensors", NARROW, lists)
    return Narrow(*narrow_models, ranked, two)


@pytest.fixture(scope="module")
def serve_narrow(serve_offline: Callable[..., Any], narrow: Narrow) -> Callable[..., Any]:
    @contextmanager
    def serve(speculative_config: Any = None, **engine_args: Any) -> Iterator[Any]:
        if speculative_config is not None:
            speculative_config = {
                "model": str(narrow.draft),
                "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
                **speculative_config,
            }
            if vocabulary := speculative_config.get("draft_vocabulary"):
                files = {"RANKED": narrow.ranked, "TWO LISTS": narrow.two_lists}
                named = {**vocabulary, "file": files[vocabulary["file"]]}
                speculative_config["draft_vocabulary"] = named
        with serve_offline(
            speculative_config,
            model=str(narrow.target),
            skip_tokenizer_init=True,
            max_num_seqs=256,
            max_num_batched_tokens=4096,
            num_gpu_blocks_override=1024,
            **engine_args,
        ) as llm:
            yield llm

    return serve


@pytest.fixture(scope="module")
def plain_narrow(serve_narrow: Any) -> Iterator[Any]:
    """An engine that serves the target of 16 tokens without drafts."""
    with serve_narrow(logprobs_mode="processed_logprobs", max_logprobs=NARROW) as llm:
        yield llm


@pytest.fixture(scope="module")
def law(plain_narrow: Any, exact_law: Any) -> Tensor:
    """`[V, V, V]` exact joint law of the first three tokens after `PROMPT`, at temperature 1."""
    joint = exact_law(plain_narrow, PROMPT, {"temperature": 1.0})
    # The test is about tokens that the draft cannot name: they must matter.
    assert 0.1 < float(joint.sum((0, 2))[OFF_VOCABULARY].sum()) < 0.9
    return joint


def fits(texts: list[list[int]], law: Tensor) -> list[GoodnessOfFit]:
    """Tokens 1 and 2, tokens 2 and 3, and each token outside the vocabulary alone."""
    import torch

    tokens = torch.tensor(texts)
    found = []
    for i in range(2):
        joint = law.sum(dim=2 if i == 0 else 0)
        counts = torch.bincount(tokens[:, i] * NARROW + tokens[:, i + 1], minlength=NARROW**2)
        found.append(compare(f"tokens {i + 1} and {i + 2}", counts, joint.flatten()))
        # Among the drafted positions, bins for the tokens no draft can name.
        counts = torch.bincount(tokens[:, i + 1], minlength=NARROW)
        alone = torch.cat([counts[OFF_VOCABULARY], counts[DRAFTED].sum().view(1)])
        wanted = joint.sum(dim=0)
        wanted = torch.cat([wanted[OFF_VOCABULARY], wanted[DRAFTED].sum().view(1)])
        found.append(compare(f"token {i + 2} outside the vocabulary", alone, wanted))
    return found


def sample(llm: Any, generate: Any, count: int = 4000) -> list[list[int]]:
    prompts = [{"prompt_token_ids": PROMPT}] * count
    return generate(llm, prompts, max_tokens=LENGTH, temperature=1.0)


RANKED = {"file": "RANKED"}
BLOCK = {"name": "lossless", "rule": "block"}
DRAWN = {"method": "draft_model", "draft_sample_method": "probabilistic"}
CONFIGURATIONS = {
    "drawn, token": {**DRAWN, "draft_vocabulary": RANKED},
    "chosen": {"method": "draft_model", "draft_vocabulary": RANKED},
    "frequency_vocab, dynamic, block": {
        "method": "frequency_vocab",
        "draft_sample_method": "probabilistic",
        "draft_vocabulary": {**RANKED, "dynamic_tokens": 2},
        "verifier": BLOCK,
    },
    "two lists, dynamic": {
        **DRAWN,
        "draft_vocabulary": {"file": "TWO LISTS", "dynamic_tokens": 2},
    },
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("drawn, token", marks=pytest.mark.slow),
        pytest.param("chosen", marks=pytest.mark.slow),
        "frequency_vocab, dynamic, block",
        "two lists, dynamic",
    ],
)
def test_the_law_is_the_targets(
    name: str, serve_narrow: Any, law: Tensor, generate: Any, drafted_by: Any
) -> None:
    with serve_narrow(CONFIGURATIONS[name]) as llm:
        texts = sample(llm, generate)
        [tally] = drafted_by(llm).values()
    found = fits(texts, law)
    assert not failures(found, FALSE_ALARM), "\n".join(map(str, found))
    # The test would pass if nothing was drafted, or all of it accepted.
    assert tally["accepted"] > 0.1 * len(texts)
    assert tally["drafted"] - tally["accepted"] > 0.1 * len(texts)


def test_requests_of_every_kind_in_one_batch(
    serve_narrow: Any, plain_narrow: Any, law: Tensor, generate: Any
) -> None:
    """Greedy requests beside drawn ones, each as if alone."""
    count = 2000
    prompts = [{"prompt_token_ids": PROMPT}] * (2 * count)
    kinds = [{"temperature": 1.0}, {"temperature": 0.0}] * count
    [greedy] = generate(plain_narrow, prompts[:1], max_tokens=LENGTH)
    with serve_narrow(CONFIGURATIONS["two lists, dynamic"]) as llm:
        texts = generate(llm, prompts, max_tokens=LENGTH, each=kinds)
    assert all(text == greedy for text in texts[1::2])
    found = fits(texts[::2], law)
    assert not failures(found, FALSE_ALARM), "\n".join(map(str, found))


def report_wrongly(drafter: Any, wrong: str) -> None:
    """The law of its drafts is reported "flattened", or "of other tokens"."""
    import torch

    from vllm_spec_plugins.draft_probabilities import DraftProbabilities

    reported = drafter.law

    def wrongly(*args: Any) -> Any:
        right = reported(*args)
        if right is None:
            return None
        if wrong == "flattened":
            values = torch.softmax(right.values.sqrt(), dim=-1)
            return DraftProbabilities(values, right.vocabulary, right.sampled)
        shifted = (right.vocabulary + 1).clamp(max=NARROW - 1)
        return DraftProbabilities(right.values, shifted, right.sampled)

    drafter.law = wrongly


@pytest.mark.parametrize(
    "wrong", ["flattened", pytest.param("of other tokens", marks=pytest.mark.slow)]
)
def test_a_wrong_law_is_noticed(
    wrong: str, serve_narrow: Any, law: Tensor, generate: Any, adapter_of: Any
) -> None:
    """Negative control: the law reported is not the one the drafts were drawn from."""
    with serve_narrow(CONFIGURATIONS["drawn, token"]) as llm:
        report_wrongly(adapter_of(llm)._ranked, wrong)
        found = fits(sample(llm, generate), law)
    assert failures(found, FALSE_ALARM), "\n".join(map(str, found))


@pytest.mark.slow
def test_the_law_under_a_grammar(
    pico_model: Path, tmp_path: Path, serve_offline: Any, write_ranked: Any
) -> None:
    """Drafts that a grammar forbids are dropped for what they are; the text must not show it."""
    from scipy.stats import chi2_contingency
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    vocab_size = json.loads((pico_model / "config.json").read_text())["vocab_size"]
    config = {
        "method": "frequency_vocab",
        "model": str(pico_model),
        "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic",
        "draft_vocabulary": write_ranked(
            tmp_path / "half.safetensors", vocab_size, {"half": range(0, vocab_size, 2)}
        ),
    }
    # About half of what the model would write next is forbidden.
    params = SamplingParams(
        temperature=1.0,
        max_tokens=5,
        structured_outputs=StructuredOutputsParams(regex="[a-p ]{400}"),
    )

    def drafted_or_not(speculative_config: Any, draws: bool = False) -> list[int]:
        """How many of the later tokens are among those drafted from, at each position."""
        with serve_offline(speculative_config, model=str(pico_model)) as llm:
            if draws:  # as if nothing was known of grammars
                executor = llm.llm_engine.engine_core.engine_core.model_executor
                runner = executor.driver_worker.worker.model_runner
                add = runner.spec_plugins.requests.add

                def add_as_free(name: str, params: Any, has_history: bool) -> None:
                    free = params.clone()
                    free.structured_outputs = None
                    add(name, free, has_history)

                runner.spec_plugins.requests.add = add_as_free
            outputs = llm.generate(["Once upon a time"] * 1500, params, use_tqdm=False)
        texts = [output.outputs[0].token_ids for output in outputs]
        return [
            sum(text[position] % 2 == parity for text in texts)
            for position in (1, 2, 3)
            for parity in (0, 1)
        ]

    plain, ranked, drawn = (
        drafted_or_not(None),
        drafted_or_not(config),
        drafted_or_not(config, draws=True),
    )

    def p_value(counts: list[int]) -> float:
        table = [(a, b) for a, b in zip(plain, counts, strict=True) if a + b >= 10]
        return float(chi2_contingency(list(zip(*table, strict=True))).pvalue)

    assert p_value(ranked) > FALSE_ALARM
    # Negative control: drawn drafts, of which the grammar drops some.
    assert p_value(drawn) < FALSE_ALARM


# EAGLE heads.


@pytest.fixture(scope="module")
def eagle_heads(narrow: Narrow, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of random heads for the target of 16 tokens.

    "eagle" reads the target's last hidden states and has no output head: vLLM lends it the
    target's. "eagle3" reads three layers and has an output head over the target's tokens;
    "own vocabulary" is the same with an output head over the tokens `DRAFTED` alone.
    """
    import torch
    from safetensors.torch import save_file

    config = json.loads((narrow.target / "config.json").read_text())
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    key_size = config["num_key_value_heads"] * config["head_dim"]
    generator = torch.Generator().manual_seed(0)

    def weights(rows: int, columns: int, std: float = 0.12) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * std

    def layer(input_size: int) -> dict[str, Tensor]:
        return {
            "self_attn.q_proj": weights(hidden, input_size),
            "self_attn.k_proj": weights(key_size, input_size),
            "self_attn.v_proj": weights(key_size, input_size),
            "self_attn.o_proj": weights(hidden, hidden),
            "mlp.gate_proj": weights(ffn, hidden),
            "mlp.up_proj": weights(ffn, hidden),
            "mlp.down_proj": weights(hidden, ffn),
            "post_attention_layernorm": torch.ones(hidden),
        }

    eagle = {"fc": weights(hidden, 2 * hidden)}
    eagle |= {f"layers.0.{name}": part for name, part in layer(hidden).items()}
    eagle3 = {
        "fc": weights(hidden, 3 * hidden),
        "lm_head": weights(NARROW, hidden, std=0.24),
        "norm": torch.ones(hidden),
        "midlayer.hidden_norm": torch.ones(hidden),
        "midlayer.input_layernorm": torch.ones(hidden),
        **{f"midlayer.{name}": part for name, part in layer(2 * hidden).items()},
    }
    some = torch.tensor(DRAFTED)
    some_rows = {**eagle3, "lm_head": eagle3["lm_head"][some]}
    three_layers = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
    folders = {}
    for name, parts, own in [
        ("eagle", eagle, {}),
        ("eagle3", eagle3, three_layers),
        ("own vocabulary", some_rows, {**three_layers, "draft_vocab_size": len(DRAFTED)}),
    ]:
        folder = tmp_path_factory.mktemp("head")
        tensors = {f"{part}.weight": values for part, values in parts.items()}
        if "draft_vocab_size" in own:
            tensors["d2t"] = some - torch.arange(len(some))
        save_file(tensors, folder / "model.safetensors")
        changed = {**config, "num_hidden_layers": 1, **own}
        (folder / "config.json").write_text(json.dumps(changed))
        folders[name] = str(folder)
    return folders


def watch_drafted(adapter: Any) -> set[int]:
    """The tokens it drafts from now on."""
    drafted: set[int] = set()
    passed_on = adapter._limit_vllm_drafts

    def watched(drafts: Any) -> Any:
        drafted.update(drafts.flatten().tolist())
        return passed_on(drafts)

    adapter._limit_vllm_drafts = watched
    return drafted


@pytest.mark.slow
@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_heads_on_the_targets_hidden_states(
    method: str,
    eagle_heads: dict[str, str],
    serve_narrow: Any,
    plain_narrow: Any,
    law: Tensor,
    generate: Any,
    adapter_of: Any,
    drafted_by: Any,
) -> None:
    """Greedy text, what is drafted, the law; and a negative control on the same engine."""
    config = {**DRAWN, "method": method, "model": eagle_heads[method], "draft_vocabulary": RANKED}
    prompts = [{"prompt_token_ids": PROMPT[:length]} for length in range(3, len(PROMPT))]
    with serve_narrow(config) as llm:
        drafted = watch_drafted(adapter_of(llm))
        assert generate(llm, prompts) == generate(plain_narrow, prompts)
        texts = sample(llm, generate)
        [((proposer, verifier), tally)] = drafted_by(llm).items()
        report_wrongly(adapter_of(llm)._ranked, "flattened")
        wrong = fits(sample(llm, generate), law)
    assert (proposer, verifier) == (method, "lossless")
    assert drafted == set(DRAFTED)
    found = fits(texts, law)
    assert not failures(found, FALSE_ALARM), "\n".join(map(str, found))
    assert failures(wrong, FALSE_ALARM), "\n".join(map(str, wrong))
    # The test would pass if nothing was drafted, or all of it accepted.
    assert tally["accepted"] > 0.1 * len(texts)
    assert tally["drafted"] - tally["accepted"] > 0.1 * len(texts)


@pytest.mark.slow
def test_a_head_with_a_vocabulary_of_its_own(
    eagle_heads: dict[str, str],
    serve_narrow: Any,
    law: Tensor,
    generate: Any,
    adapter_of: Any,
    drafted_by: Any,
) -> None:
    """It is not ranked a second time, and is verified exactly without that."""
    own = {**DRAWN, "method": "eagle3", "model": eagle_heads["own vocabulary"]}
    refused = "a draft vocabulary of its own, 9 of the target's 16 tokens"
    with (
        pytest.raises(ConfigError, match=refused),
        serve_narrow({**own, "draft_vocabulary": RANKED}),
    ):
        pass
    with serve_narrow({**own, "verifier": "lossless"}) as llm:
        drafted = watch_drafted(adapter_of(llm))
        texts = sample(llm, generate)
        [tally] = drafted_by(llm).values()
    assert drafted == set(DRAFTED)
    found = fits(texts, law)
    assert not failures(found, FALSE_ALARM), "\n".join(map(str, found))
    assert tally["accepted"] > 0.1 * len(texts)
    assert tally["drafted"] - tally["accepted"] > 0.1 * len(texts)


# Refusals.


def front_door(model: Path, config: dict[str, Any], **engine_args: Any) -> None:
    from vllm import LLM

    LLM(
        model=str(model),
        speculative_config=config,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=256,
        **engine_args,
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(
            {"method": "ngram", "prompt_lookup_max": 3},
            '"draft_vocabulary" cuts down the output head a draft token is chosen from, and '
            'vLLM\'s "ngram" has none that can be cut.',
            id="no head",
        ),
        pytest.param(
            {"method": "suffix"}, 'vLLM\'s "suffix" has none that can be cut', id="suffix"
        ),
        pytest.param(
            {"method": "medusa", "model": "MODEL"},
            'vLLM\'s "medusa" has none that can be cut. Remove it, or choose a method from: '
            "draft_model, eagle, eagle3, mtp.",
            id="medusa",
        ),
        pytest.param({"model": "MODEL"}, '"draft_vocabulary" needs "method" beside it', id="none"),
        pytest.param(
            {"method": "draft_model", "model": "MODEL", "use_local_argmax_reduction": True},
            '"use_local_argmax_reduction" chooses draft tokens without computing their logits: it '
            'cannot stand beside "draft_vocabulary".',
            id="local argmax",
        ),
        pytest.param(
            {"method": "draft_model", "model": "MODEL", "use_heterogeneous_vocab": True},
            '"use_heterogeneous_vocab" drafts tokens of another tokenizer, and a draft vocabulary '
            'ranks the target\'s: it cannot stand beside "draft_vocabulary".',
            id="another tokenizer",
        ),
        pytest.param(
            {"method": "draft_model", "model": "MODEL", "parallel_drafting": True},
            '"parallel_drafting" drafts all tokens in one pass, one row per token instead of one '
            'per request: it cannot stand beside "draft_vocabulary".',
            id="parallel drafting",
        ),
        pytest.param(
            {"method": "frequency_vocab", "model": "MODEL", "parallel_drafting": True},
            '"parallel_drafting" drafts all tokens in one pass',
            id="parallel drafting under our name",
        ),
        pytest.param(
            {"method": "eagle3", "model": "EAGLE"},
            "was trained with a draft vocabulary of its own, 64 of the target's 512 tokens. "
            'Remove "draft_vocabulary".',
            id="a draft vocabulary of its own",
        ),
        pytest.param(
            {"method": "draft_model", "model": "MODEL", "draft_vocabulary": "NARROW"},
            "was made for a model of 16 tokens",
            id="for another model",
        ),
    ],
)
def test_refused_before_any_weight_is_loaded(
    config: dict[str, Any],
    message: str,
    model_without_weights: Path,
    some: str,
    narrow: Narrow,
    tmp_path: Path,
) -> None:
    eagle = json.loads((model_without_weights / "config.json").read_text())
    eagle |= {"draft_vocab_size": 64, "num_hidden_layers": 1}
    (tmp_path / "eagle3").mkdir()
    (tmp_path / "eagle3" / "config.json").write_text(json.dumps(eagle))
    named = {"MODEL": str(model_without_weights), "EAGLE": str(tmp_path / "eagle3")}
    given = {"num_speculative_tokens": 3, "draft_vocabulary": some, **config}
    if "model" in given:
        given["model"] = named[given["model"]]
    if given["draft_vocabulary"] == "NARROW":
        given["draft_vocabulary"] = narrow.ranked
    with pytest.raises(SpecPluginsError) as caught:
        front_door(model_without_weights, given)
    assert message in str(caught.value)


def test_heads_whose_rows_cannot_be_used(serve_offline: Any) -> None:
    """Whatever stands between the weights and the logits is found by looking, not by name."""
    import torch
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    from vllm_spec_plugins.engine.language_model_head import EngineHead

    class Quantised(QuantizeMethodBase):
        def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
            raise NotImplementedError

        def apply(self, layer: Any, x: Any, bias: Any = None) -> Any:
            return torch.nn.functional.linear(x, layer.weight, bias)

    with serve_offline() as llm:
        model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        model = model.model_runner.get_model()
        device = torch.device("cpu")
        token_ids = torch.tensor([3, 1, 500])
        hidden = torch.randn(5, 128)

        def head() -> EngineHead:
            return EngineHead(model, 128, torch.float32, device)

        def refusal() -> str:
            with pytest.raises(ConfigError) as caught:
                head().rows(token_ids)
            return str(caught.value)

        def changed(compute: Any) -> str:
            model.compute_logits = compute
            try:
                return refusal()
            finally:
                del model.compute_logits

        whole = head()
        assert (whole.vocab_size, whole.hidden_size) == (WIDE, 128)
        logits = whole.logits(hidden)
        torch.testing.assert_close(logits, model.compute_logits(hidden))
        for scale, soft_cap in [(1.0, None), (0.25, 3.0)]:
            model.logits_processor.scale, model.logits_processor.soft_cap = scale, soft_cap
            weight, bias = head().rows(token_ids)
            expected = model.compute_logits(hidden)[:, token_ids]
            torch.testing.assert_close(head().row_logits(hidden, weight, bias), expected)
            each = weight.expand(5, -1, -1)
            torch.testing.assert_close(head().row_logits(hidden, each, bias), expected)
        model.logits_processor.scale, model.logits_processor.soft_cap = 1.0, None

        with pytest.raises(ConfigError, match="has the tokens 0 to 511, and token 512"):
            whole.rows(torch.tensor([512]))
        compute = model.compute_logits
        prefix = "Rows of the output head of LlamaForCausalLM cannot be used on their own: "
        assert changed(lambda x: compute(x * 2)) == (
            f"{prefix}the model changes its hidden states before the head. "
            'Remove "draft_vocabulary".'
        )
        assert "the model maps its logits to other tokens" in changed(lambda x: compute(x) + 1)
        assert "its logits come out of 0 projections" in changed(
            lambda x: x @ model.lm_head.weight.T
        )
        unquantised = model.lm_head.quant_method
        model.lm_head.quant_method = Quantised()
        assert "it is quantised (Quantised)" in refusal()
        # The logits themselves do not need its rows.
        torch.testing.assert_close(head().logits(hidden), logits)
        model.lm_head.quant_method = unquantised
