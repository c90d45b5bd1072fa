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
from dataclasses import dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

import pytest  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor
    from vllm import LLM
    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_spec_plugins.engine.v1_runner import V1Adapter

#: Vocabulary of `random_model`.
VOCABULARY = 512
#: Token ids of `narrow_models`: every pair of tokens has a bin of its own.
NARROW_VOCABULARY = 16

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
def exiting_model(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`random_model` whose later layers say less: leaving it early is often right, not always."""
    import torch
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("exiting_model")
    model = LlamaForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for weights in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weights.mul_(0.4**index)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exit_adapter(exiting_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter after layer 1 of `exiting_model`, untrained: what it attends to matters."""
    import torch

    from vllm_spec_plugins.adapter_file import AdapterCard, write_adapter
    from vllm_spec_plugins.calibration.adapter_block import AdapterBlock, probes_of, target_shape
    from vllm_spec_plugins.calibration.hugging_face import LocalModel

    target = LocalModel.load(exiting_model)
    block = AdapterBlock(target)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        block.output.copy_(torch.randn(block.output.shape, generator=generator) * 0.02)
    card = AdapterCard(
        model="exiting_model",
        target=target_shape(target),
        exit_layer=1,
        ffn_size=0,
        norm_epsilon=target.norm_epsilon,
        training={},
    )
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    write_adapter(path, card, block.state_dict(), probes_of(target))
    return str(path)


@pytest.fixture(scope="session")
def narrow_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a target, and of a draft model whose law overlaps the target's by two thirds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=NARROW_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    target, draft = (tmp_path_factory.mktemp(name) for name in ("target", "draft"))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        matrices = [weights for weights in model.parameters() if weights.ndim == 2]
        for weights in matrices:
            weights.mul_(6)
        model.lm_head.weight.mul_(2)
        model.save_pretrained(target)
        for weights in matrices:
            weights.add_(torch.randn_like(weights) * weights.std() * 0.15)
        model.save_pretrained(draft)
    return target, draft


@pytest.fixture(scope="session")
def begun_as(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`begun_as(llama_folder, pattern)`: folder of a drafter with a causal model's weights.

    With a `target` it makes a little of that model's hidden states, after all layers but the last.
    """
    import json

    from safetensors.torch import load_file, save_file

    def begun_as(source: Path, pattern: str = "block", target: Path | None = None) -> str:
        import torch

        from vllm_spec_plugins.diffusion.conditioning import TargetStates
        from vllm_spec_plugins.diffusion.folder import PROBE
        from vllm_spec_plugins.weight_probes import read_probes

        config = json.loads((source / "config.json").read_text())
        config |= {
            "architectures": ["DiffusionDrafter"],
            "rope_theta": 10000.0,
            "mask_token_id": config["vocab_size"],
            "attention_pattern": pattern,
            "predicts": "next_token",
        }
        config.pop("rope_parameters", None)
        weights = load_file(source / "model.safetensors")
        embedding = weights["model.embed_tokens.weight"]
        mask = embedding.mean(dim=0, keepdim=True)
        weights["model.embed_tokens.weight"] = torch.cat([embedding, mask])
        if target is not None:
            sizes = json.loads((target / "config.json").read_text())
            layers, width = sizes["num_hidden_layers"], sizes["hidden_size"]
            states = TargetStates(target.name, None, layers, width, tuple(range(1, layers)))
            config["conditioned_on"] = states.as_json()
            hidden = config["hidden_size"]
            spread = 0.1 * embedding.std() / (len(states.layers) * width) ** 0.5
            generator = torch.Generator().manual_seed(1)
            added = torch.randn(hidden, len(states.layers) * width, generator=generator) * spread
            weights["target_states.projection.weight"] = added
            weights["target_states.unknown"] = torch.randn(hidden, generator=generator) * spread
            probes = read_probes(target, layers)
            weights |= {PROBE + name: probe for name, probe in probes.items()}
        folder = tmp_path_factory.mktemp("drafter")
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        tokenizer = source / "tokenizer.json"
        text = tokenizer.read_text() if tokenizer.exists() else "{}"
        (folder / "tokenizer.json").write_text(text)
        return str(folder)

    return begun_as


@pytest.fixture(scope="session")
def exact_law() -> Callable[[LLM, list[int], Mapping[str, Any]], Tensor]:
    """`exact_law(llm, prompt, sampling)` of an engine that serves the narrow target plainly."""

    def exact_law(llm: Any, prompt: list[int], sampling: Mapping[str, Any]) -> Tensor:
        """`[V, V, V]` joint law of the first three tokens, from logprobs of every continuation."""
        import torch
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, logprobs=NARROW_VOCABULARY, detokenize=False, ignore_eos=True, **sampling
        )

        def next_laws(contexts: list[list[int]]) -> Tensor:
            prompts = [{"prompt_token_ids": context} for context in contexts]
            rows = torch.full((len(contexts), NARROW_VOCABULARY), -torch.inf, dtype=torch.float64)
            for row, output in zip(
                rows, llm.generate(prompts, params, use_tqdm=False), strict=True
            ):
                for token_id, entry in output.outputs[0].logprobs[0].items():
                    row[token_id] = entry.logprob
            return rows.exp()

        every = range(NARROW_VOCABULARY)
        first = next_laws([prompt])[0]
        second = next_laws([[*prompt, x] for x in every])
        third = next_laws([[*prompt, x, y] for x in every for y in every])
        third = third.view(NARROW_VOCABULARY, NARROW_VOCABULARY, NARROW_VOCABULARY)
        return first[:, None, None] * second[:, :, None] * third

    return exact_law


@pytest.fixture(scope="session")
def write_ranked() -> Callable[[Path, int, Mapping[str, Sequence[int]]], str]:
    """`write_ranked(path, vocab_size, lists)`: a draft vocabulary's file, and its name.

    Each token of a list was counted; token 2 is always in.
    """
    import numpy as np

    from vllm_spec_plugins.draft_vocabulary import RankedVocabulary, rank

    def write_ranked(path: Path, vocab_size: int, lists: Mapping[str, Sequence[int]]) -> str:
        always = np.array([2])
        ranked = []
        for name, token_ids in lists.items():
            counts = np.bincount(np.asarray(token_ids), minlength=vocab_size) * 10
            ranked.append(rank(name, counts, always, len(token_ids)))
        RankedVocabulary(vocab_size, always, tuple(ranked), "", "a test").write(path)
        return str(path)

    return write_ranked


@pytest.fixture(scope="session")
def model_without_weights(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of `random_model` alone: any attempt to load weights fails."""
    folder = tmp_path_factory.mktemp("model_without_weights")
    (folder / "config.json").write_bytes((random_model / "config.json").read_bytes())
    return folder


@pytest.fixture(scope="session")
def pico_model() -> Path:
    """Folder of a model of text, the zoo's `pico`: trained in half a minute at the first use."""
    from vllm_spec_plugins import zoo

    return zoo.ensure("pico", threads=1)


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
        gc.freeze()  # vLLM collects garbage seven times at a start: half a second each
        llm = LLM(**{**defaults, **engine_args}, speculative_config=spec)
        alive += 1
        try:
            yield llm
        finally:
            alive -= 1
            client: Any = llm.llm_engine.engine_core
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(gc, "collect", lambda generation=2: generation)  # once is enough
                if alive:  # vLLM's own shutdown would tear down what the others run on
                    client._finalizer.detach()
                    executor = client.engine_core.model_executor
                    executor.driver_worker.worker.model_runner.shutdown()
                    del executor
                else:
                    client.shutdown()
            del client, llm
            gc.unfreeze()
            gc.collect()

    return serve


@pytest.fixture(scope="session")
def serve_crowd(serve_offline: Serve) -> Serve:
    """`with serve_crowd(speculative_config, folder, **engine_args) as llm`: thousands of texts.

    An engine whose steps are few and large, of a model without a tokenizer.
    """

    def serve(
        speculative_config: Mapping[str, Any] | None, folder: Path, **engine_args: Any
    ) -> AbstractContextManager[LLM]:
        return serve_offline(
            speculative_config,
            model=str(folder),
            skip_tokenizer_init=True,
            max_num_seqs=256,
            max_num_batched_tokens=8192,
            num_gpu_blocks_override=1024,
            **engine_args,
        )

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


@dataclass
class Watched:
    """What the scheduler of one engine decided, step by step, since it is watched."""

    steps: list[SchedulerOutput] = field(default_factory=list)

    @property
    def preemptions(self) -> int:
        return sum(len(step.preempted_req_ids or ()) for step in self.steps)

    @property
    def resumptions(self) -> int:
        return sum(len(step.scheduled_cached_reqs.resumed_req_ids) for step in self.steps)

    @property
    def cached_prompt_tokens(self) -> int:
        """Prompt tokens found in the prefix cache."""
        return sum(
            new.num_computed_tokens for step in self.steps for new in step.scheduled_new_reqs
        )

    @property
    def chunked_prompts(self) -> int:
        """Prompts of which the first step read a part only."""
        return sum(
            new.num_computed_tokens + step.num_scheduled_tokens[new.req_id]
            < len(new.prompt_token_ids or ())
            for step in self.steps
            for new in step.scheduled_new_reqs
        )


@pytest.fixture(scope="session")
def watch() -> Callable[[LLM], Watched]:
    """`watch(llm)`: keeps every scheduler output of an engine from `serve_offline` from now on."""

    def watch(llm: Any) -> Watched:
        scheduler, watched = llm.llm_engine.engine_core.engine_core.scheduler, Watched()
        schedule = scheduler.schedule

        def watched_schedule(*args: Any, **kwargs: Any) -> SchedulerOutput:
            watched.steps.append(schedule(*args, **kwargs))
            return watched.steps[-1]

        scheduler.schedule = watched_schedule
        return watched

    return watch


@pytest.fixture(scope="module")
def acme_methods() -> Iterator[None]:
    """`packages/acme_spec_methods` as if it were installed in this process."""
    from importlib.metadata import EntryPoint, entry_points

    from vllm_spec_plugins.engine.carrier import registry
    from vllm_spec_plugins.registry import Kind, installed

    group = Kind.PROPOSER.value
    ours = [
        EntryPoint("acme_sampled", "acme_spec_methods.sampled:Sampled", group),
        EntryPoint("acme_wrong_law", "acme_spec_methods.sampled:WrongLaw", group),
        EntryPoint("acme_on_device", "acme_spec_methods.on_device:OnDevice", group),
    ]

    def with_acme(**select: str) -> list[EntryPoint]:
        return [*entry_points(**select), *(ours if select == {"group": group} else [])]

    def forget() -> None:
        installed.cache_clear()
        registry.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent / "packages" / "acme_spec_methods")
        patch.setattr("vllm_spec_plugins.registry.entry_points", with_acme)
        forget()
        yield
    forget()


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
