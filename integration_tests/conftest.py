"""Engines, models and look-ups shared by the tests against the real vLLM.

Engines run inside the test process, on one thread. vLLM reads its environment when it is
imported, so it is set here, before any test module can import vLLM or torch.
"""

from __future__ import annotations

import os

_ENGINE_ENVIRONMENT = {
    # The engine in this process: tests look inside it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Pinned threads of several processes on the same cores starve each other.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    # Nothing here needs a network.
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ.update(_ENGINE_ENVIRONMENT)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import gc  # noqa: E402
from collections.abc import Callable, Iterator, Mapping, Sequence  # noqa: E402
from contextlib import AbstractContextManager, contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

import pytest  # noqa: E402

if TYPE_CHECKING:
    from vllm import LLM

    from vllm_spec_plugins.engine.v1_runner import V1Adapter

#: Vocabulary of `random_model`.
VOCABULARY = 512

Serve = Callable[..., AbstractContextManager["LLM"]]


@pytest.fixture(scope="session")
def engine_environment() -> dict[str, str]:
    """What an engine of this suite runs under; for tests that start a subprocess."""
    return {**_ENGINE_ENVIRONMENT, "VLLM_LOGGING_LEVEL": os.environ["VLLM_LOGGING_LEVEL"]}


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama with random weights and 512 token ids, without a tokenizer.

    Random weights give a nearly uniform law, under which nothing is ever accepted and the
    most likely token is decided by rounding. Larger matrices make the law peaked.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("random_model")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for weights in model.parameters():
                if weights.ndim == 2:
                    weights.mul_(4)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_without_weights(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of `random_model` alone: any attempt to load weights fails."""
    folder = tmp_path_factory.mktemp("model_without_weights")
    (folder / "config.json").write_bytes((random_model / "config.json").read_bytes())
    return folder


@pytest.fixture(scope="session")
def nano_model() -> Path:
    """Folder of the zoo's smallest trained model, trained at the first use."""
    from vllm_spec_plugins import zoo

    return Path(zoo.ensure("nano"))


@pytest.fixture(scope="session")
def serve_offline(random_model: Path) -> Serve:
    """`with serve_offline(speculative_config, **engine_args) as llm`: an engine in this process.

    Serves `random_model` unless `model` says otherwise. Several may be alive at once.
    """
    from vllm import LLM

    alive = 0

    @contextmanager
    def serve(
        speculative_config: Mapping[str, Any] | None = None, **engine_args: Any
    ) -> Iterator[LLM]:
        defaults: dict[str, Any] = {
            "model": str(random_model),
            "skip_tokenizer_init": "model" not in engine_args,
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 256,
            "max_num_seqs": 16,
            # Prompts of a full batch come in several steps.
            "max_num_batched_tokens": 128,
            "num_gpu_blocks_override": 256,
            "disable_log_stats": True,
            "seed": 0,
        }
        nonlocal alive
        spec = None if speculative_config is None else dict(speculative_config)
        llm = LLM(**{**defaults, **engine_args}, speculative_config=spec)
        alive += 1
        try:
            yield llm
        finally:
            alive -= 1
            client: Any = llm.llm_engine.engine_core
            if alive:  # vLLM's own shutdown would tear down what the others run on
                client._finalizer.detach()
                executor = client.engine_core.model_executor
                executor.driver_worker.worker.model_runner.shutdown()
                gc.unfreeze()
                del executor
            else:
                client.shutdown()
            del client, llm
            gc.collect()

    return serve


@pytest.fixture(scope="session")
def adapter_of() -> Callable[[LLM], V1Adapter]:
    """`adapter_of(llm)`: the adapter on the runner of an engine from `serve_offline`."""

    def adapter_of(llm: Any) -> V1Adapter:
        executor = llm.llm_engine.engine_core.engine_core.model_executor
        return executor.driver_worker.worker.model_runner.spec_plugins

    return adapter_of


@pytest.fixture(scope="session")
def drafted_by() -> Callable[[LLM], dict[tuple[str, str], dict[str, Any]]]:
    """`drafted_by(llm)`: the metrics so far, by (proposer, verifier)."""

    def drafted_by(llm: LLM) -> dict[tuple[str, str], dict[str, Any]]:
        [metrics] = llm.collective_rpc("spec_plugins_metrics")
        return {(row["proposer"], row["verifier"]): row for row in metrics["by_method"]}

    return drafted_by


@pytest.fixture(scope="session")
def prompts() -> list[dict[str, list[int]]]:
    """Eight token prompts for `random_model`, of ragged lengths and with repeated n-grams."""
    return [{"prompt_token_ids": [1, 5, 6, 7, 8, 5, 6, 7] + [9 + i] * (i % 3)} for i in range(8)]


@pytest.fixture(scope="session")
def generate() -> Callable[..., list[list[int]]]:
    """`generate(llm, prompts, max_tokens=40, **sampling)`: token ids of each output.

    `sampling` may be one dictionary for all, or `each=[...]` with one for every prompt.
    """

    def generate(
        llm: LLM,
        prompts: Sequence[Any],
        *,
        max_tokens: int = 40,
        each: Sequence[Mapping[str, Any]] | None = None,
        **sampling: Any,
    ) -> list[list[int]]:
        from vllm import SamplingParams

        shared = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True}
        params = [
            SamplingParams(detokenize=False, **{**shared, **sampling, **own})
            for own in (each or [{}] * len(prompts))
        ]
        outputs = llm.generate(list(prompts), params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate
