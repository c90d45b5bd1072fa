"""`diffusion` on the real engine: what it refuses, greedy texts, its law, two ranks.

Its drafters begin as the target, or as a model near it, and have not learned what a mask is: of a
block the first token is often right, the others by luck. That is what tests of exactness want.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.testing.chi_square import compare, failures

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.engine

FALSE_ALARM = 1e-6
#: Token ids of the narrow target.
NARROW = 16
MAX_TOKENS = 40
#: Few key/value blocks, prompts in parts, prefixes found again.
TIGHT: dict[str, Any] = {
    "num_gpu_blocks_override": 24,
    "block_size": 32,
    "max_num_batched_tokens": 96,
    "enable_prefix_caching": True,
}
BLOCK = {"name": "lossless", "rule": "block"}
ADAPTIVE = {"name": "adaptive_draft_length", "k_min": 1, "delta": 1}

Begun = Callable[..., str]


def config_of(model: str, **options: Any) -> dict[str, Any]:
    return {"method": "diffusion", "model": model, "num_speculative_tokens": 4, **options}


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "no/such/folder"}, "calibrate diffusion-drafter"),
        ({"context_window": 1021}, "set context_window to 1020 or less"),
        ({"block_size": 3}, "Raise block_size"),
        ({"denoising_steps": 5}, "Lower denoising_steps"),
        ({"drafts": "best"}, '"drafts"'),
        ({"path": {"beam": 2}}, 'set "drafts" to "path"'),
        ({"drafts": "path", "path": {"lam": 0.5}}, "lam"),
        ({"length_control": {"name": "adaptive_draft_length", "k_max": 9}}, "lower k_max"),
        ({"contxt_window": 100}, 'Did you mean "context_window"?'),
    ],
)
def test_bad_input_fails_before_the_model_loads(
    options: dict[str, Any],
    said: str,
    begun_as: Begun,
    random_model: Path,
    model_without_weights: Path,
    serve_offline: Callable[..., Any],
) -> None:
    config = {**config_of(begun_as(random_model)), **options}
    with (
        pytest.raises(SpecPluginsError) as raised,
        serve_offline(config, model=str(model_without_weights), skip_tokenizer_init=True),
    ):
        pass
    assert said in str(raised.value)


def test_a_drafter_of_another_model_is_refused(
    begun_as: Begun,
    narrow_models: tuple[Path, Path],
    model_without_weights: Path,
    serve_offline: Callable[..., Any],
) -> None:
    config = config_of(begun_as(narrow_models[1]))
    with (
        pytest.raises(SpecPluginsError, match="must share a tokenizer"),
        serve_offline(config, model=str(model_without_weights), skip_tokenizer_init=True),
    ):
        pass


def test_a_conditioned_drafter_is_refused_beside_another_target(
    begun_as: Begun, random_model: Path, exiting_model: Path, serve_offline: Callable[..., Any]
) -> None:
    """Of the same sizes; before a weight is loaded."""
    config = config_of(begun_as(random_model, target=random_model))
    with (
        pytest.raises(SpecPluginsError, match="reads hidden states of another model"),
        serve_offline(config, model=str(exiting_model), skip_tokenizer_init=True),
    ):
        pass


def test_positions_in_several_dimensions_are_refused(
    begun_as: Begun, random_model: Path, tmp_path: Path, serve_offline: Callable[..., Any]
) -> None:
    """States could not be told apart by them."""
    config = json.loads((random_model / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    drafter = begun_as(random_model, target=random_model)
    with (
        pytest.raises(SpecPluginsError, match=r"positions in several dimensions \(M-RoPE\)"),
        serve_offline(config_of(drafter), model=str(target), skip_tokenizer_init=True),
    ):
        pass


@pytest.mark.slow
def test_a_target_that_hands_out_no_states_is_refused(
    begun_as: Begun, random_model: Path, tmp_path: Path, serve_offline: Callable[..., Any]
) -> None:
    import transformers

    target = tmp_path / "target"
    transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
        )
    ).save_pretrained(target)
    config = config_of(begun_as(random_model, target=target))
    with (
        pytest.raises(SpecPluginsError, match="trained without --condition-on-layers"),
        serve_offline(config, model=str(target), skip_tokenizer_init=True),
    ):
        pass


# --- the target's states --------------------------------------------------------------------------


def test_states_of_the_text_reach_a_conditioned_drafter(
    begun_as: Begun,
    pico_model: Path,
    serve_offline: Callable[..., Any],
    generate: Callable[..., list[list[int]]],
    prompts: list[dict[str, list[int]]],
    drafted_by: Callable[..., Any],
    adapter_of: Callable[..., Any],
) -> None:
    """They are what transformers computes for it; greedy texts are those written without drafts."""
    import torch

    from vllm_spec_plugins.calibration.hugging_face import LocalModel

    config = config_of(begun_as(pico_model, target=pico_model))
    plain: dict[str, Any] = {"extra_args": {"spec_decode": {"enabled": False}}}
    some = prompts[:4]
    with serve_offline(
        config, model=str(pico_model), skip_tokenizer_init=True, enable_prefix_caching=False,
        max_num_batched_tokens=96,
    ) as llm:  # fmt: skip
        wanted = generate(llm, some, max_tokens=24, each=[plain] * len(some))
        assert generate(llm, some, max_tokens=24) == wanted
        [tally] = drafted_by(llm).values()
        [text] = generate(llm, some[-1:], max_tokens=24)
        proposer = adapter_of(llm).proposer
        [row] = proposer._row_of.values()
        kept, held = proposer._states.kept[row].clone(), proposer._states.held[row].clone()
        read, conditioning = proposer._drafter.config.conditioned_on, proposer._drafter.conditioning
    assert tally["accepted"] > 10
    assert tally["drafted"] - tally["accepted"] > 10
    whole = torch.tensor([[*some[-1]["prompt_token_ids"], *text]])
    states = LocalModel.load(pico_model).layer_states(whole, read.layers)
    expected = conditioning.project([states[layer][0] for layer in read.layers])
    position = held[held >= 0]
    # The last token, and drafts behind it, were never computed, or not accepted in time to count.
    assert sorted(position.tolist())[: whole.shape[1] - 5] == list(range(whole.shape[1] - 5))
    there = position < whole.shape[1]
    torch.testing.assert_close(
        kept[held >= 0][there], expected[position[there]], rtol=1e-3, atol=1e-3 * expected.std()
    )


# --- greedy texts -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, list[int]]]:
    """24 prompts of 5 to 130 tokens; half of them begin alike, all of them repeat themselves."""
    dice = random.Random(1)
    shared = [dice.randrange(3, 512) for _ in range(70)]
    found = []
    for i in range(24):
        own = [dice.randrange(3, 512) for _ in range(dice.randrange(5, 30))]
        found.append({"prompt_token_ids": (shared if i % 2 else []) + own + own[: len(own) // 2]})
    return found


@pytest.fixture(scope="module")
def plain_texts(
    serve_offline: Callable[..., Any],
    generate: Callable[..., list[list[int]]],
    prompts: list[dict[str, list[int]]],
) -> list[list[int]]:
    with serve_offline(max_num_batched_tokens=4096, enable_prefix_caching=False) as llm:
        return generate(llm, prompts, max_tokens=MAX_TOKENS)


#: Wishes of requests, by turns: without drafts, with short ones, as the server says.
WISHES: list[dict[str, Any]] = [{"enabled": False}, {"num_speculative_tokens": 1}, {}, {}]

GREEDY: dict[str, dict[str, Any]] = {
    "sampled": {"context_window": 50},
    "path, adaptive": {"drafts": "path", "length_control": ADAPTIVE},
    "two steps": {"denoising_steps": 2, "block_size": 6},
    "full": {"pattern": "full", "context_window": 30},
    "conditioned": {"conditioned": True, "context_window": 50},
    "conditioned, two steps, path": {"conditioned": True, "denoising_steps": 2, "drafts": "path"},
    "confidence": {"length_control": {"name": "confidence", "threshold": 0.01}, "verifier": BLOCK},
}


@pytest.mark.parametrize(
    "name",
    [n if n == "sampled" else pytest.param(n, marks=pytest.mark.slow) for n in GREEDY],
)
def test_greedy_text_is_plain_decodings(
    name: str,
    serve_offline: Callable[..., Any],
    generate: Callable[..., list[list[int]]],
    begun_as: Begun,
    random_model: Path,
    prompts: list[dict[str, list[int]]],
    plain_texts: list[list[int]],
    watch: Callable[..., Any],
    drafted_by: Callable[..., Any],
    adapter_of: Callable[..., Any],
) -> None:
    """With preemption, chunked prompts, prefix hits, and requests that do not draft."""
    options = dict(GREEDY[name])
    target = random_model if options.pop("conditioned", False) else None
    model = begun_as(random_model, options.pop("pattern", "block"), target)
    each = [{"extra_args": {"spec_decode": WISHES[i % 4]}} for i in range(len(prompts))]
    with serve_offline(config_of(model, **options), **TIGHT) as llm:
        watched = watch(llm)
        texts = generate(llm, prompts, max_tokens=MAX_TOKENS, each=each)
        again = generate(llm, prompts, max_tokens=MAX_TOKENS, each=each[::-1])
        [tally] = drafted_by(llm).values()
        assert adapter_of(llm).context.facts.end_token_ids == (2,)
    assert texts == plain_texts
    assert again == plain_texts
    assert watched.preemptions > 3
    assert watched.chunked_prompts > 3
    assert watched.cached_prompt_tokens > 100
    assert tally["accepted"] > 20
    assert tally["drafted"] - tally["accepted"] > 20


@pytest.mark.slow
def test_a_seeded_request_writes_the_same_alone_and_in_company(
    serve_offline: Callable[..., Any],
    generate: Callable[..., list[list[int]]],
    begun_as: Begun,
    random_model: Path,
    prompts: list[dict[str, list[int]]],
) -> None:
    """Its drafts depend on its own text and noise only."""
    with serve_offline(config_of(begun_as(random_model))) as llm:
        together = generate(llm, prompts[:8], temperature=1.0, seed=5)
        alone = [generate(llm, [prompt], temperature=1.0, seed=5)[0] for prompt in prompts[:3]]
    assert alone == together[:3]


@pytest.mark.slow
def test_aborted_requests_leave_nothing_behind(
    serve_offline: Callable[..., Any],
    generate: Callable[..., list[list[int]]],
    begun_as: Begun,
    random_model: Path,
    prompts: list[dict[str, list[int]]],
    plain_texts: list[list[int]],
    adapter_of: Callable[..., Any],
) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, detokenize=False)
    with serve_offline(config_of(begun_as(random_model), drafts="path")) as llm:
        engine = llm.llm_engine
        for turn in range(3):
            names = [engine.add_request(f"{turn}-{i}", p, params) for i, p in enumerate(prompts)]
            for _ in range(6):
                engine.step()
            engine.abort_request(names, internal=True)
        assert generate(llm, prompts, max_tokens=MAX_TOKENS) == plain_texts
        engine.engine_core.engine_core.step()  # tells the proposer who is gone
        proposer = adapter_of(llm).proposer
        assert len(proposer._row_of) <= 16
        assert len(proposer._row_of) + len(proposer._free) == 16


# --- the law ------------------------------------------------------------------------------------

LAW: dict[str, dict[str, Any]] = {
    "sampled": {},
    "sampled, adaptive, block": {"length_control": ADAPTIVE, "verifier": BLOCK},
    "sampled, confidence": {"length_control": {"name": "confidence", "threshold": 0.4}},
    "sampled, two steps, compact": {"denoising_steps": 2, "draft_top_k": 5},
    "path": {"drafts": "path"},
    "path, adaptive": {"drafts": "path", "length_control": ADAPTIVE},
    "conditioned": {"conditioned": True},
    "conditioned, two steps": {"conditioned": True, "denoising_steps": 2},
}


@pytest.fixture(scope="module")
def narrow_prompt() -> list[int]:
    dice = random.Random(0)
    return [dice.randrange(3, NARROW) for _ in range(93)]  # a block is full after three more


@pytest.fixture(scope="module")
def law(
    serve_crowd: Callable[..., Any],
    narrow_models: tuple[Path, Path],
    exact_law: Callable[..., Tensor],
    narrow_prompt: list[int],
) -> Tensor:
    """`[V, V, V]` of the first three tokens."""
    with serve_crowd(
        None, narrow_models[0], logprobs_mode="processed_logprobs", max_logprobs=NARROW
    ) as llm:
        return exact_law(llm, narrow_prompt, {"temperature": 1.0})


@pytest.mark.slow
@pytest.mark.parametrize("tight", [False, True], ids=["at leisure", "preempted"])
@pytest.mark.parametrize("name", LAW)
def test_the_law_is_plain_decodings(
    name: str,
    tight: bool,
    serve_offline: Callable[..., Any],
    serve_crowd: Callable[..., Any],
    begun_as: Begun,
    narrow_models: tuple[Path, Path],
    narrow_prompt: list[int],
    law: Tensor,
    generate: Callable[..., list[list[int]]],
    watch: Callable[..., Any],
    drafted_by: Callable[..., Any],
) -> None:
    """Chi-square of the first tokens' joint laws, some requests not drafting beside them."""
    options = dict(LAW[name])
    target = narrow_models[0] if options.pop("conditioned", False) else None
    config = config_of(begun_as(narrow_models[1], target=target), **options)
    if tight:
        engine = serve_offline(
            config,
            model=str(narrow_models[0]),
            skip_tokenizer_init=True,
            num_gpu_blocks_override=32,
            block_size=32,
            max_num_batched_tokens=512,
            enable_prefix_caching=False,
        )
    else:
        engine = serve_crowd(config, narrow_models[0])
    count = 1500 if tight else 6000
    wishes = [{"spec_decode": {"enabled": i % 5 > 0}} for i in range(count)]
    with engine as llm:
        watched = watch(llm)
        texts = generate(
            llm,
            [{"prompt_token_ids": narrow_prompt}] * count,
            max_tokens=8 if tight else 5,
            temperature=1.0,
            each=[{"extra_args": wish} for wish in wishes],
        )
        [tally] = drafted_by(llm).values()
    assert_follows(law, texts)
    assert watched.preemptions > 40 or not tight
    assert watched.chunked_prompts > 1 or not tight
    assert tally["accepted"] > 0.1 * tally["steps"]
    assert tally["drafted"] - tally["accepted"] > 0.1 * tally["steps"]


def assert_follows(law: Tensor, texts: list[list[int]]) -> None:
    """Tokens 1 and 2, and tokens 2 and 3."""
    found = fits(law, texts)
    assert not failures(found, FALSE_ALARM), "\n".join(map(str, found))


def fits(law: Tensor, texts: list[list[int]]) -> list[Any]:
    import torch

    tokens, found = torch.tensor(texts), []
    for first, of_pair in ((0, law.sum(dim=2)), (1, law.sum(dim=0))):
        pairs = tokens[:, first] * NARROW + tokens[:, first + 1]
        counts = torch.bincount(pairs, minlength=NARROW**2)
        found.append(compare(f"tokens {first + 1} and {first + 2}", counts, of_pair.flatten()))
    return found


@pytest.mark.slow
def test_a_law_of_another_token_is_noticed(
    serve_crowd: Callable[..., Any],
    begun_as: Begun,
    narrow_models: tuple[Path, Path],
    narrow_prompt: list[int],
    law: Tensor,
    generate: Callable[..., list[list[int]]],
    adapter_of: Callable[..., Any],
) -> None:
    """Negative control: each token of a draft with the law of the one before it."""
    from vllm_spec_plugins.draft_probabilities import DraftProbabilities
    from vllm_spec_plugins.proposer import Draft

    with serve_crowd(config_of(begun_as(narrow_models[1])), narrow_models[0]) as llm:
        proposer = adapter_of(llm).proposer
        propose = proposer.propose

        def shifted(batch: Any) -> Draft:
            draft = propose(batch)
            law = draft.probabilities
            return Draft(
                draft.token_ids,
                DraftProbabilities(law.values.roll(1, dims=1), None, law.sampled),
            )

        proposer.propose = shifted
        prompts = [{"prompt_token_ids": narrow_prompt}] * 6000
        texts = generate(llm, prompts, max_tokens=5, temperature=1.0)
    assert failures(fits(law, texts), FALSE_ALARM)


# --- two ranks ----------------------------------------------------------------------------------


def known_output(worker: Any) -> dict[str, list[int]]:
    """Runs on a rank: the output of the requests it has not yet been told are finished."""
    states = worker.model_runner.requests.items()
    return {request_id: list(state.output_token_ids) for request_id, state in states}


# Ranks cannot import this file: the function itself must travel, not its name.
known_output.__module__ = "__main__"


@pytest.mark.slow
@pytest.mark.parametrize("drafts", ["sampled", "path", "conditioned"])
def test_two_ranks_decode_what_one_decodes(
    drafts: str,
    serve_offline: Callable[..., Any],
    generate: Callable[..., list[list[int]]],
    begun_as: Begun,
    exiting_model: Path,
    prompts: list[dict[str, list[int]]],
) -> None:
    """Each has the drafter whole; they draw the same tokens and never ask each other."""
    conditioned = drafts == "conditioned"
    model = begun_as(exiting_model, target=exiting_model if conditioned else None)
    options = {} if conditioned else {"drafts": drafts}
    config = config_of(model, **options, length_control=ADAPTIVE)
    samplings: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 3},
        {"temperature": 0.7},
    ]
    found = []
    for ranks in (1, 2):
        with serve_offline(
            config,
            model=str(exiting_model),
            skip_tokenizer_init=True,
            tensor_parallel_size=ranks,
        ) as llm:
            texts = [generate(llm, prompts[:8], **sampling) for sampling in samplings]
            known = llm.collective_rpc(known_output)
            metrics = llm.collective_rpc("spec_plugins_metrics")
        found.append((texts, metrics[0]))
    assert found[0] == found[1]
    assert metrics[0]["by_method"][0]["accepted"] > 10
    first, second = known
    assert any(first.values())
    assert first == second


# --- the benchmark ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)  # four engines start, each in a process of its own
def test_the_benchmark_runs(
    begun_as: Begun, engine_environment: dict[str, str], tmp_path: Path
) -> None:
    """Its quick mode, with a drafter that begins as the target."""
    from vllm_spec_plugins import zoo

    folder, rows_file = begun_as(zoo.ensure("nano")), tmp_path / "rows.jsonl"
    script = Path(__file__).parents[1] / "benchmarks" / "diffusion.py"
    options = ["--quick", "--model", "nano", "--batches", "1", "--output", str(rows_file)]
    finished = subprocess.run(
        [sys.executable, str(script), folder, *options],
        capture_output=True,
        text=True,
        env={**os.environ, **engine_environment},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    assert {row["method"] for row in rows} == {
        "draft_model K=4",
        "diffusion K=4",
        "diffusion K=4 adaptive_draft_length",
        "diffusion K=4 path",
        "diffusion K=4 path adaptive_draft_length",
    }
    for row in rows:
        assert folder not in json.dumps(row)
        assert row["drafting_ms_per_step"] > 0
        assert row["drafter_parameters"] > row["draft_model_parameters"]
        if row["method"] == "draft_model K=4":  # it drafts for itself: all is accepted
            assert row["drafter_passes_per_accepted"] == pytest.approx(1, abs=0.2)
        elif row["temperature"] == 0:
            count, compared = row["same_text_as_plain"]
            assert count == compared > 0
