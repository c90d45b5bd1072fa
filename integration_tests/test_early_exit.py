"""`early_exit` on the real engine: what it drafts, and what requests may ask of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_spec_plugins.errors import SpecPluginsError

pytestmark = pytest.mark.engine

CONFIG = {"method": "early_exit", "num_speculative_tokens": 4, "exit_layer": 1}
#: Layers of the models of this suite.
LAYERS = 4
SEEDED = {"temperature": 1.0, "seed": 5}


@pytest.fixture
def serve(serve_offline: Callable[..., Any], exiting_model: Path) -> Callable[..., Any]:
    """`serve_offline` for the model whose exits are often right."""

    def serve(config: Any = None, **engine_args: Any) -> Any:
        return serve_offline(
            config, model=str(exiting_model), skip_tokenizer_init=True, **engine_args
        )

    return serve


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_layers_draft_what_the_target_says(
    temperature: float, serve: Any, generate: Any, drafted_by: Any, prompts: Any
) -> None:
    """The draft is then the target: everything is accepted, and greedy text is plain decoding's."""
    with serve({**CONFIG, "exit_layer": LAYERS}) as llm:
        texts = generate(llm, prompts, temperature=temperature)
        [tally] = drafted_by(llm).values()
    assert tally["drafted"] > 100
    assert tally["accepted"] == tally["drafted"]
    if temperature == 0:
        with serve() as llm:
            assert texts == generate(llm, prompts)


def test_deeper_exits_are_accepted_more(
    serve: Any, generate: Any, drafted_by: Any, prompts: Any
) -> None:
    rates = []
    for exit_layer in (1, 0.5, 3):
        with serve({**CONFIG, "exit_layer": exit_layer}) as llm:
            generate(llm, prompts, temperature=1.0, max_tokens=60)
            rates.append(next(iter(drafted_by(llm).values()))["acceptance_rate"])
    assert rates == sorted(rates)
    assert rates[-1] > rates[0] + 0.1


def test_an_adapter_reads_the_keys_of_cached_prefixes(
    serve: Any, generate: Any, drafted_by: Any, watch: Any, exit_adapter: str
) -> None:
    """Its pages are filled when a prompt is read, and found again when it is not."""
    prompts = [{"prompt_token_ids": [(7 * i + j) % 500 + 3 for i in range(80)]} for j in range(4)]
    config = {"method": "early_exit", "num_speculative_tokens": 4, "adapter": exit_adapter}
    tallies: list[tuple[int, int]] = []
    with serve(config, enable_prefix_caching=True, block_size=32) as llm:
        watched = watch(llm)
        for _ in range(2):
            generate(llm, prompts, max_tokens=60)
            [tally] = drafted_by(llm).values()
            tallies.append((tally["drafted"], tally["accepted"]))
    assert watched.cached_prompt_tokens >= 4 * 64
    (drafted, accepted), (twice_drafted, twice_accepted) = tallies
    assert accepted > 20
    assert twice_drafted - drafted == drafted
    assert twice_accepted - accepted == accepted


def test_nobody_drafted_for_a_prompt_that_is_cached_but_for_one_token(
    serve: Any, generate: Any, drafted_by: Any
) -> None:
    """vLLM has its first step verify placeholders, as many as a draft may have at most."""
    prompt = {"prompt_token_ids": [(7 * i) % 500 + 3 for i in range(65)]}
    with serve({**CONFIG, "exit_layer": LAYERS}, enable_prefix_caching=True, block_size=32) as llm:
        generate(llm, [prompt], temperature=1.0, max_tokens=3)  # a draft of one token
        generate(llm, [prompt], temperature=1.0, max_tokens=24)
        [tally] = drafted_by(llm).values()
    assert tally["accepted"] == tally["drafted"] > 10


def test_drawn_drafts_are_accepted_more_than_chosen_ones(
    serve: Any, generate: Any, drafted_by: Any, prompts: Any
) -> None:
    """min(p, q) summed over tokens, against p of the one token that was chosen."""
    rates = {}
    for method in ("probabilistic", "greedy"):
        with serve({**CONFIG, "draft_sample_method": method}) as llm:
            generate(llm, prompts, temperature=1.5, max_tokens=60)
            rates[method] = next(iter(drafted_by(llm).values()))["acceptance_rate"]
    assert rates["probabilistic"] > rates["greedy"] + 0.05


@pytest.mark.parametrize("length_control", ["fixed", {"name": "confidence", "threshold": 0.3}])
def test_a_seeded_request_writes_the_same_alone_and_in_company(
    length_control: Any, serve: Any, generate: Any, prompts: Any
) -> None:
    """Its drafts too: what it draws depends on itself only."""
    with serve({**CONFIG, "length_control": length_control}) as llm:
        together = generate(llm, prompts, **SEEDED)
        alone = [generate(llm, [prompt], **SEEDED)[0] for prompt in prompts[:3]]
    assert alone == together[:3]


def test_several_texts_of_one_prompt(serve: Any, prompts: Any, drafted_by: Any) -> None:
    """`n > 1`: every text has random numbers of its own, and the seed settles them all."""
    from vllm import SamplingParams

    params = SamplingParams(
        n=3, temperature=1.0, seed=2, max_tokens=24, ignore_eos=True, detokenize=False
    )
    with serve(CONFIG) as llm:
        runs = [
            [tuple(text.token_ids) for text in llm.generate(prompts[0], params)[0].outputs]
            for _ in range(2)
        ]
        [tally] = drafted_by(llm).values()
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 3
    assert tally["drafted"] > 20


def test_requests_choose_for_themselves(
    serve: Any, generate: Any, adapter_of: Any, prompts: Any
) -> None:
    """One without drafts, one with short ones, one as the server says, in one batch."""
    wishes = [{"enabled": False}, {"num_speculative_tokens": 1}, {}]
    each = [{"extra_args": {"spec_decode": wish}} for wish in wishes]
    longest: dict[str, int] = {}
    with serve(CONFIG) as llm:
        proposer = adapter_of(llm).proposer
        propose = proposer.propose

        def watched(batch: Any) -> Any:
            draft = propose(batch)
            for name, row in zip(batch.request_ids, draft.token_ids.tolist(), strict=True):
                drafted = sum(token >= 0 for token in row)
                longest[name] = max(longest.get(name, 0), drafted)
            return draft

        proposer.propose = watched
        texts = generate(llm, prompts[:3], each=each)
    # The request without drafts is in the batch of the others, with nothing drafted.
    assert sorted(longest.values()) == [0, 1, 4]
    with serve() as llm:
        assert texts == generate(llm, prompts[:3])


def test_a_ranked_vocabulary_with_recent_tokens_drafts_them(
    serve: Any,
    generate: Any,
    adapter_of: Any,
    drafted_by: Any,
    prompts: Any,
    write_ranked: Any,
    tmp_path: Path,
) -> None:
    """Only listed tokens are drafted, or a request's own; greedy text stays plain decoding's."""
    listed = range(0, 512, 2)
    path = write_ranked(tmp_path / "even.safetensors", 512, {"even": listed})
    drafted: dict[str, set[int]] = {"ranked": set(), "with recent tokens": set()}
    texts = {}
    for name, options in (
        ("ranked", {"file": path}),
        ("with recent tokens", {"file": path, "dynamic_tokens": 32}),
    ):
        with serve({**CONFIG, "draft_vocabulary": options}) as llm:
            proposer = adapter_of(llm).proposer
            propose = proposer.propose

            def watched(batch: Any, name: str = name, propose: Any = propose) -> Any:
                draft = propose(batch)
                drafted[name].update(draft.token_ids[draft.token_ids >= 0].tolist())
                return draft

            proposer.propose = watched
            texts[name] = generate(llm, prompts)
            assert next(iter(drafted_by(llm).values()))["accepted"] > 5
    assert drafted["ranked"] <= set(listed)
    assert drafted["with recent tokens"] - set(listed)
    with serve() as llm:
        plain = generate(llm, prompts)
    assert texts == {"ranked": plain, "with recent tokens": plain}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"exit_layer": 5}, "between 1 and 4"),
        ({"exit_layer": 0}, "between 1 and 4"),
        ({"exit_layer": 1.5}, "between 0 and 1"),
        ({"exit_layers": [2]}, "two or more"),
        ({"exit_layers": [3, 2]}, "rising"),
        ({"exit_layer": 2, "exit_layers": [1, 2]}, "exclude each other"),
        ({"exit_layer": 2, "exit_confidence": 0.5}, "ignored without exit_layers"),
        ({"exit_layer": 2, "skip_ffn": [2]}, "layers 0 to 1"),
        ({"exit_layer": 2, "skip_layers": [0, 1]}, "leaves no layer"),
        ({"exit_layer": 2, "adapter": "missing.safetensors"}, "missing.safetensors"),
        ({"exit_layer": 2, "draft_vocabulary": "missing.safetensors"}, "missing.safetensors"),
        ({"exit_layers": [1, 2], "length_control": "del"}, "leave the target after one of"),
        ({"exit_layr": 2}, "exit_layer"),
    ],
)
def test_bad_options_are_refused_before_anything_loads(
    options: dict[str, Any],
    said: str,
    serve_offline: Callable[..., Any],
    model_without_weights: Path,
) -> None:
    config = {"method": "early_exit", "num_speculative_tokens": 4, **options}
    with (
        pytest.raises(SpecPluginsError, match=said),
        serve_offline(config, model=str(model_without_weights), skip_tokenizer_init=True),
    ):
        pass
