"""relaxed_visual on the real engine: its law is off by its price, on image tokens alone.

As in `test_relaxed_law.py`, a target of 16 tokens; here ids 4 to 11 are image codes, and its
config says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vllm_spec_plugins.errors import ConfigError, SpecPluginsError

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.engine

VOCABULARY = 16
FIRST, END = 4, 12
PROMPT = [1, 3, 3, 11, 9, 12, 8, 6, 15, 8, 6, 11, 0, 5, 6, 15, 7, 8, 11, 1, 2, 13, 4, 15]
TEXTS = 1500
SIGMAS = 4.5
SAYS_ITS_RANGE = {"hf_overrides": {"image_token_range": [FIRST, END]}}

RULES: dict[str, dict[str, Any]] = {
    "lantern": {"budget": 0.5},
    "lantern++": {"factor": 4.0},
    "gsd": {"group_size": 4, "max_probability_difference": 1.0},
    "annealed": {"factor": 3.0},
    "clusters": {"cluster_size": 4},
}


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A table of eight codes; the next ones in a ring are the nearest."""
    import torch

    from vllm_spec_plugins.codebook_neighbours import NeighbourCard, write_neighbours

    path = tmp_path_factory.mktemp("table") / "neighbours.safetensors"
    codes = torch.arange(END - FIRST)
    table = (codes.unsqueeze(1) + torch.arange(1, 6)) % len(codes)
    card = NeighbourCard(len(codes), 5, 2, None, 0, "", "toy", "narrow", VOCABULARY, FIRST)
    write_neighbours(path, card, table)
    return str(path)


@pytest.fixture(scope="module")
def laws(
    serve_crowd: Callable[..., Any],
    narrow_models: tuple[Path, Path],
    exact_law: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    """`[V, V]` joint law of the first two tokens, and `[V, V]` the draft model's of the second."""
    found = []
    for model in narrow_models:
        with serve_crowd(
            None, model, logprobs_mode="processed_logprobs", max_logprobs=VOCABULARY
        ) as llm:
            found.append(exact_law(llm, PROMPT, {"temperature": 1.0}).sum(dim=2))
    target, draft = found
    return target, draft / draft.sum(dim=1, keepdim=True)


def config_of(rule: str, draft: Path, neighbours: str) -> dict[str, Any]:
    verifier = {"name": "relaxed_visual", "rule": rule, **RULES[rule]}
    if rule == "clusters" or rule.startswith("lantern"):
        verifier["neighbours"] = neighbours
    return {
        "method": "draft_model",
        "model": str(draft),
        "num_speculative_tokens": 1,
        "draft_sample_method": "probabilistic",
        "verifier": verifier,
    }


@pytest.mark.parametrize(
    "rule",
    [
        "lantern",
        pytest.param("lantern++", marks=pytest.mark.slow),
        pytest.param("gsd", marks=pytest.mark.slow),
        pytest.param("annealed", marks=pytest.mark.slow),
        pytest.param("clusters", marks=pytest.mark.slow),
    ],
)
def test_the_distance_of_the_texts_is_the_price_in_the_metrics(
    rule: str,
    serve_crowd: Callable[..., Any],
    narrow_models: tuple[Path, Path],
    laws: tuple[Tensor, Tensor],
    neighbours: str,
    drafted_by: Callable[..., Any],
) -> None:
    import torch
    from vllm import SamplingParams

    target, q = laws
    p = target / target.sum(dim=1, keepdim=True)
    config = config_of(rule, narrow_models[1], neighbours)
    with serve_crowd(config, narrow_models[0], **SAYS_ITS_RANGE) as llm:
        params = SamplingParams(max_tokens=2, temperature=1.0, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": PROMPT}] * TEXTS
        outputs = llm.generate(prompts, params, use_tqdm=False)
        [tally] = drafted_by(llm).values()
    tokens = torch.tensor([list(output.outputs[0].token_ids) for output in outputs])
    image = (torch.arange(VOCABULARY) >= FIRST) & (torch.arange(VOCABULARY) < END)
    assert tally["drafted"] == TEXTS
    price = tally["total_variation_price"]
    # What is emitted too often are image codes the draft likes more than the target does.
    more = (q > p) & image
    found = more[tokens[:, 0], tokens[:, 1]].double()
    distance = float(found.mean() - target[more].sum())
    # Of the proportion; prices lie in [0, 1] and vary less around their mean than that.
    error = math.sqrt((float(found.var()) + price * (1 - price)) / TEXTS)
    assert abs(distance - price) < SIGMAS * error, f"{distance:.4f} != {price:.4f}"
    # The test would pass if nothing was relaxed.
    assert price > 0.03
    # Text that the draft likes too much is emitted as often as the target would.
    text = (q > p) & ~image
    found = text[tokens[:, 0], tokens[:, 1]].double()
    error = math.sqrt(float(found.var()) / TEXTS)
    assert abs(float(found.mean() - target[text].sum())) < SIGMAS * error


@pytest.mark.parametrize(
    ("options", "overrides", "error", "said"),
    [
        ({"rule": "gsd"}, {}, ConfigError, 'Give "image_token_range"'),
        ({"rule": "gsd", "image_token_range": [500, 513]}, {}, ConfigError, "from 0 to 511"),
        ({"rule": "gsd"}, {"image_token_range": [500, 513]}, ConfigError, "in its config.json"),
        ({"rule": "lantern", "image_token_range": [4, 12]}, {}, ConfigError, 'needs "neighbours"'),
        (
            {"rule": "lantern", "image_token_range": [4, 12], "neighbours": "absent"},
            {},
            SpecPluginsError,
            "no neighbour table absent",
        ),
        (
            {"rule": "lantern", "image_token_range": [4, 12], "neighbours": "NEIGHBOURS"},
            {},
            SpecPluginsError,
            'made for another model ("narrow"): its vocabulary has 16 ids',
        ),
        ({"rule": "annealed", "factor": 0.5}, {}, ConfigError, '"factor"'),
    ],
)
def test_bad_input_fails_before_the_model_loads(
    options: dict[str, Any],
    overrides: dict[str, Any],
    error: type[Exception],
    said: str,
    neighbours: str,
    model_without_weights: Path,
) -> None:
    from vllm import LLM

    chosen = {key: neighbours if value == "NEIGHBOURS" else value for key, value in options.items()}
    with pytest.raises(error) as raised:
        LLM(
            model=str(model_without_weights),
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="float32",
            max_model_len=256,
            hf_overrides=overrides,
            speculative_config={
                "method": "ngram",
                "num_speculative_tokens": 3,
                "prompt_lookup_max": 3,
                "verifier": {"name": "relaxed_visual", **chosen},
            },
        )
    assert said in str(raised.value)
