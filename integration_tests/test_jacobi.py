"""`jacobi` on the real engine: what is refused at start; its law while requests are preempted.

Its law at leisure is in `test_law.py`, its greedy texts in `test_greedy_identity.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vllm_spec_plugins.errors import ConfigError
from vllm_spec_plugins.testing.chi_square import compare, failures

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.engine

FALSE_ALARM = 1e-6
VOCABULARY = 16
JACOBI = {"method": "jacobi", "num_speculative_tokens": 4}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"coupling": "maximum"}, '"coupling"'),
        ({"filler": "above"}, '"image_row_length"'),
        ({"filler": "above", "image_row_length": 8}, 'Give "image_token_range"'),
        ({"filler": "random", "image_token_range": [500, 600]}, "from 0 to 511"),
        ({"draft_top_k": 0}, '"draft_top_k"'),
        (
            {"verifier": {"name": "lossless", "rule": "block"}},
            'the verifier "lossless" with {"rule": "block"} looks at them before it rejects',
        ),
        (
            {
                "coupling": "gumbel",
                "num_speculative_tokens": 8,
                "verifiers_allowed": ["lossless", "fly"],
            },
            'the verifier "fly" looks at them',
        ),
    ],
)
def test_bad_input_fails_before_the_model_loads(
    options: dict[str, Any], said: str, model_without_weights: Path
) -> None:
    from vllm import LLM

    with pytest.raises(ConfigError) as raised:
        LLM(
            model=str(model_without_weights),
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="float32",
            max_model_len=256,
            speculative_config={**JACOBI, **options},
        )
    assert said in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("coupling", ["none", "maximal", "gumbel"])
def test_the_law_while_requests_are_preempted(
    coupling: str,
    serve_offline: Callable[..., Any],
    serve_crowd: Callable[..., Any],
    narrow_models: tuple[Path, Path],
    exact_law: Callable[..., Tensor],
    generate: Callable[..., list[list[int]]],
    watch: Callable[..., Any],
) -> None:
    """Few key/value blocks, prompts in parts: the first tokens' law, and each request's state."""
    import torch

    dice = random.Random(0)
    prompt = [dice.randrange(3, VOCABULARY) for _ in range(93)]  # a block is full after three more
    model = {"model": str(narrow_models[0]), "skip_tokenizer_init": True}
    with serve_crowd(
        None,
        narrow_models[0],
        logprobs_mode="processed_logprobs",
        max_logprobs=VOCABULARY,
    ) as llm:
        law = exact_law(llm, prompt, {"temperature": 1.0})
    config = {**JACOBI, "coupling": coupling, "filler": "random"}
    with serve_offline(
        config,
        **model,
        num_gpu_blocks_override=32,
        block_size=32,
        max_num_batched_tokens=512,
        max_num_seqs=16,
        enable_prefix_caching=False,
    ) as llm:
        watched = watch(llm)
        texts = generate(llm, [{"prompt_token_ids": prompt}] * 1500, max_tokens=8, temperature=1.0)
    assert watched.preemptions > 100
    assert watched.chunked_prompts > 5
    tokens = torch.tensor(texts)
    found = []
    for first, of_pair in ((0, law.sum(dim=2)), (1, law.sum(dim=0))):
        pairs = tokens[:, first] * VOCABULARY + tokens[:, first + 1]
        counts = torch.bincount(pairs, minlength=VOCABULARY**2)
        found.append(compare(f"tokens {first + 1} and {first + 2}", counts, of_pair.flatten()))
    assert not failures(found, FALSE_ALARM), "\n".join(map(str, found))
