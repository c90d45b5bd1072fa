"""The target's layers, run apart: which models have them, what they give, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm_spec_plugins.proposers.exit_passes import DraftStep, SingleExit

from vllm_spec_plugins.engine.offline import hugging_face_classes_kept
from vllm_spec_plugins.errors import SpecPluginsError

pytestmark = pytest.mark.engine

LAYERS = 4
CONFIG = {"method": "early_exit", "num_speculative_tokens": 4}

#: Attention over 16 tokens in three layers, over all in one: two groups of pages.
LOCAL_AND_GLOBAL = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
#: Configuration class and what it needs beside `SHAPE`.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {}),
    "Llama, tied embeddings": ("LlamaConfig", {"tie_word_embeddings": True}),
    "Mistral": ("MistralConfig", {"sliding_window": None}),
    "Mistral, sliding window": ("MistralConfig", {"sliding_window": 16}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", {}),
    "Gemma": ("GemmaConfig", {}),
    "Gemma2": ("Gemma2Config", {"sliding_window": 16, "query_pre_attn_scalar": 32}),
    "Gemma3": ("Gemma3TextConfig", {**LOCAL_AND_GLOBAL, "query_pre_attn_scalar": 32}),
    "OLMo": ("OlmoConfig", {}),
    "OLMo2": ("Olmo2Config", {}),
    "OLMo3": ("Olmo3Config", LOCAL_AND_GLOBAL),
    "OLMoE": ("OlmoeConfig", {**EXPERTS, "num_key_value_heads": 4}),
    "Qwen2Moe": ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 64}),
    "Qwen3Moe": ("Qwen3MoeConfig", EXPERTS),
}
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: Run by default, beside what other tests of this file start: two windows in one model.
CHOSEN = {"Gemma3"}
#: One without and one with norms behind its sublayers, and one of Hugging Face's convention.
KINDS = ["Llama", "Gemma2", "OLMo2"]


def mostly_slow(names: Iterable[str], chosen: Container[str]) -> list[Any]:
    """All of them for `parametrize`; only the chosen ones run by default."""
    slow = pytest.mark.slow
    return [name if name in chosen else pytest.param(name, marks=slow) for name in names]


Model = Callable[[str], Path]
Serve = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def hugging_face_classes() -> Iterator[None]:
    """As they were, for the tests of other files: vLLM serves OLMo2 with Hugging Face's class."""
    with hugging_face_classes_kept():
        yield


def test_hugging_face_classes_are_kept(serve: Serve) -> None:
    """What vLLM makes of a class, and that it is taken back."""
    from transformers import Olmo2Model

    def seen() -> tuple[Any, ...]:
        return Olmo2Model.__init__, Olmo2Model.__call__, Olmo2Model.__bases__

    before = seen()
    with hugging_face_classes_kept():
        with serve("OLMo2"):
            pass
        assert all(now is not then for now, then in zip(seen(), before, strict=True))
    assert seen() == before


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """`tiny_model(architecture)`: folder of a model of it with random weights."""
    made: dict[str, Path] = {}

    def tiny_model(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp("tiny_model")
            save_tiny_model(*ARCHITECTURES[architecture], made[architecture])
        return made[architecture]

    return tiny_model


def save_tiny_model(config: str, own: dict[str, Any], folder: Path) -> None:
    """Layers outweigh the embedding: otherwise every token would be followed by itself."""
    import torch
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, config)(**{**SHAPE, **own})
        )
        with torch.no_grad():
            for name, weights in model.named_parameters():
                if weights.ndim >= 2 and "embed" not in name:
                    weights.mul_(10)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def serve(serve_offline: Serve, tiny_model: Model) -> Serve:
    """`serve_offline` for one of the tiny models."""

    def serve(architecture: str, config: Any = None, **engine_args: Any) -> Any:
        model = str(tiny_model(architecture))
        return serve_offline(config, model=model, skip_tokenizer_init=True, **engine_args)

    return serve


@pytest.fixture(scope="module")
def plain_texts(serve: Serve, generate: Any, prompts: Any) -> Callable[..., list[list[int]]]:
    """`plain_texts(architecture)`: what plain decoding writes."""
    known: dict[str, list[list[int]]] = {}

    def plain_texts(architecture: str, **engine_args: Any) -> list[list[int]]:
        key = f"{architecture} {engine_args}"
        if key not in known:
            with serve(architecture, **engine_args) as llm:
                known[key] = generate(llm, prompts)
        return known[key]

    return plain_texts


@pytest.fixture
def check_exits(
    serve: Serve, plain_texts: Any, generate: Any, drafted_by: Any, prompts: Any
) -> Callable[..., None]:
    """All layers are always right; a part of them never changes the text."""

    def check_exits(architecture: str, **engine_args: Any) -> None:
        plain = plain_texts(architecture, **engine_args)
        assert len({token for text in plain for token in text}) > 20
        for exit_layer in (LAYERS, LAYERS // 2):
            with serve(architecture, {**CONFIG, "exit_layer": exit_layer}, **engine_args) as llm:
                assert generate(llm, prompts) == plain
                [tally] = drafted_by(llm).values()
            assert tally["drafted"] > 200
            assert (tally["accepted"] == tally["drafted"]) == (exit_layer == LAYERS)

    return check_exits


@pytest.mark.parametrize("architecture", mostly_slow(ARCHITECTURES, CHOSEN))
def test_exits(architecture: str, check_exits: Callable[..., None]) -> None:
    check_exits(architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["Llama", "Gemma3", "OLMo2"])
def test_exits_of_a_compiled_target(architecture: str, check_exits: Callable[..., None]) -> None:
    check_exits(architecture, enforce_eager=False)


@pytest.mark.parametrize("architecture", mostly_slow(["Llama", "OLMo2"], {"OLMo2"}))
def test_states_between_layers_are_those_of_the_layers(
    architecture: str, serve: Serve, plain_texts: Any, generate: Any, adapter_of: Any, prompts: Any
) -> None:
    """What the target hands out after so many layers is what those layers give, run apart."""
    import torch

    with serve(architecture, {**CONFIG, "exit_layer": "auto", "exit_candidates": [1, 3]}) as llm:
        adapter = adapter_of(llm)
        proposer, target = adapter.proposer, adapter.target
        seen, follow = [], proposer.follow

        def watched(states: Any) -> None:
            first = slice(0, int(states.num_scheduled[0]))
            handed_out = {n: state[first].clone() for n, state in states.layer_states.items()}
            seen.append((states.token_ids[first].clone(), states.positions[first].clone()))
            seen.append(handed_out)
            follow(states)

        proposer.follow = watched
        assert generate(llm, prompts) == plain_texts(architecture)
        (token_ids, positions), handed_out = seen[:2]
        assert positions.tolist() == list(range(len(prompts[0]["prompt_token_ids"])))
        assert sorted(handed_out) == [1, 3, LAYERS]
        for layer, state in handed_out.items():
            sequences = target.warm_up_sequences(1)
            with torch.inference_mode(), sequences.step(positions, [len(positions)]):
                ours = target.layers(0, layer)(target.embed(token_ids), positions).merged
            torch.testing.assert_close(ours, state, rtol=1e-4, atol=1e-4)


# What a draft pass leaves out.

SKIPS: dict[str, dict[str, list[int]]] = {
    "layer": {"skip_layers": [1]},
    "attention": {"skip_attention": [0, 2]},
    "feed-forward": {"skip_ffn": [1]},
    "all": {"skip_layers": [0], "skip_attention": [1], "skip_ffn": [2]},
}
EXIT_OF_SKIPS = 3


def logits_without(
    folder: Path, vllm_config: Any, token_ids: Sequence[int], **skips: Sequence[int]
) -> Any:
    """`[T, V]` of a model made by hand: the first layers, what is left out writes zeros."""
    import torch
    from transformers import AutoModelForCausalLM
    from vllm.config import set_current_vllm_config

    # Where vLLM serves a class of Hugging Face, every instance of it asks for the configuration.
    with set_current_vllm_config(vllm_config):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole = skips.get("skip_layers", [])
    after = range(EXIT_OF_SKIPS, LAYERS)
    with torch.inference_mode():
        for index in (*skips.get("skip_attention", []), *whole, *after):
            model.model.layers[index].self_attn.o_proj.weight.zero_()
        for index in (*skips.get("skip_ffn", []), *whole, *after):
            model.model.layers[index].mlp.down_proj.weight.zero_()
        return model(torch.tensor([token_ids])).logits[0]


@pytest.mark.parametrize("architecture", mostly_slow(KINDS, {"Llama"}))
def test_skips(
    architecture: str,
    serve: Serve,
    plain_texts: Any,
    generate: Any,
    adapter_of: Any,
    tiny_model: Model,
    prompts: Any,
) -> None:
    """Text is unchanged, and the pass that drafts is the model without those sublayers."""
    import torch

    token_ids = [3, 141, 59, 26, 53, 58, 97, 93]
    with serve(architecture, {**CONFIG, "exit_layer": EXIT_OF_SKIPS, **SKIPS["all"]}) as llm:
        assert generate(llm, prompts) == plain_texts(architecture)
        adapter = adapter_of(llm)
        proposer, target = adapter.proposer, adapter.target
        made = [tiny_model(architecture), adapter.runner.vllm_config, token_ids]
        whole = logits_without(*made)
        for name, skips in SKIPS.items():
            [draft] = proposer._passes.values()
            if name != "all":
                stack = target.layers(0, EXIT_OF_SKIPS, **skips)
                draft = SingleExit(target, stack, proposer._read)
            sequences, one = target.warm_up_sequences(1), np.arange(1)
            with torch.inference_mode():
                steps = [
                    DraftStep(torch.tensor([token]), torch.tensor([position]), sequences, one)
                    for position, token in enumerate(token_ids)
                ]
                ours = torch.cat([draft(step)[0] for step in steps])
            expected = logits_without(*made, **skips)
            scale = expected.abs().max()
            # Other kernels: up to a fiftieth apart after post-norms, where a skip makes half.
            assert ((ours - expected) / scale).abs().max() < 0.03, name
            assert ((ours - whole) / scale).abs().max() > 0.3, name


# Slots of drafted positions.


@pytest.fixture
def stray_slots(
    serve: Serve, generate: Any, adapter_of: Any, prompts: Any
) -> Callable[[], tuple[int, int]]:
    """`stray_slots()`: drafted positions, and those outside the blocks of their own request."""
    from vllm_spec_plugins.engine.paged_sequences import _slots

    def stray_slots() -> tuple[int, int]:
        with serve("Gemma3", {**CONFIG, "exit_layer": 2}, block_size=16) as llm:
            manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
            proposer = adapter_of(llm).proposer
            [(layer, draft)] = proposer._passes.items()
            propose, drafting, counts = proposer.propose, [], [0, 0]

            def watched_propose(batch: Any) -> Any:
                drafting[:] = [batch.request_ids[i] for i in np.flatnonzero(batch.max_draft)]
                return propose(batch)

            class Watched:
                begin = draft.begin

                def __call__(self, step: DraftStep) -> Any:
                    for group, pages in enumerate(step.sequences._pages):  # pyright: ignore[reportAttributeAccessIssue]
                        blocks = _slots(pages, step.positions, None) // pages.block_size
                        for block, request in zip(blocks.tolist(), step.requests, strict=True):
                            counts[0] += 1
                            own = manager.get_block_ids(drafting[request])
                            counts[1] += block not in own[group]
                    return draft(step)

            proposer.propose, proposer._passes[layer] = watched_propose, Watched()
            generate(llm, prompts, max_tokens=60)
        return counts[0], counts[1]

    return stray_slots


def test_drafts_are_written_to_their_own_requests_blocks(
    stray_slots: Callable[[], tuple[int, int]],
) -> None:
    drafted, stray = stray_slots()
    assert drafted > 1000
    assert stray == 0


def test_without_the_reservation_they_would_not_be(
    stray_slots: Callable[[], tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config.vllm import VllmConfig

    from vllm_spec_plugins.engine.install import install_engine_seams

    install_engine_seams()  # what was wrapped is not wrapped again
    monkeypatch.setattr(VllmConfig, "num_lookahead_tokens", 0)
    _, stray = stray_slots()
    assert stray > 0


@pytest.mark.parametrize("look_up", ["_slots_on_host", "_slots_on_device"])
def test_slots(look_up: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the GPU looks them up and as the CPU does, of one step, several, and whole passes."""
    import torch

    from vllm_spec_plugins.engine import paged_sequences

    monkeypatch.setattr(paged_sequences, "_slots_on_host", getattr(paged_sequences, look_up))
    table = torch.tensor([[7, 2, 9], [4, 5, 0]], dtype=torch.int32)
    pages = paged_sequences.Pages(None, 16, table)
    at, ends = torch.tensor([20, 15]), torch.tensor([22, 15])
    steps = at + torch.arange(3).unsqueeze(1)
    slots = paged_sequences._slots
    assert slots(pages, at, None).tolist() == [36, 79]
    assert slots(pages, at, None, ends).tolist() == [36, -1]
    assert slots(pages, steps, None, ends).tolist() == [[36, -1], [37, -1], [-1, -1]]
    owner, positions = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([20, 21, 22, 14, 15])
    assert slots(pages, positions, owner).tolist() == [36, 37, 38, 78, 79]
    assert slots(pages, positions, owner, ends).tolist() == [36, 37, -1, 78, -1]


# Refusals.


@pytest.fixture
def refused(serve_offline: Serve) -> Callable[..., str]:
    """`refused(model, config, **engine_args)`: what an engine says that does not start."""

    def refused(model: Path, config: dict[str, Any], **engine_args: Any) -> str:
        with (
            pytest.raises(SpecPluginsError) as caught,
            serve_offline(config, model=str(model), skip_tokenizer_init=True, **engine_args),
        ):
            pass
        return str(caught.value)

    return refused


#: `config.json` of models that cannot be drafted with, and why. None of them has weights.
REFUSED_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "Mamba": (
        {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "state_size": 16},
        "keeps a recurrent state",
    ),
    "attention and Mamba": (
        {
            "architectures": ["FalconH1ForCausalLM"],
            "model_type": "falcon_h1",
            "mamba_d_ssm": 128,
            "mamba_d_head": 32,
            "mamba_n_heads": 4,
        },
        "keeps a recurrent state",
    ),
    "M-RoPE": (
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 6, 6],
            },
        },
        "gives tokens positions in several dimensions",
    ),
    "encoder-decoder": (
        {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            "is_encoder_decoder": True,
            "d_model": 128,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_target_positions": 512,
        },
        "is an encoder-decoder",
    ),
    "shared keys and values": (
        {
            "architectures": ["Gemma3nForCausalLM"],
            "model_type": "gemma3n_text",
            "num_kv_shared_layers": 2,
            "intermediate_size": [128] * LAYERS,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "shares keys and values between layers",
    ),
    "latent attention": (
        {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "kv_lora_rank": 32,
            "q_lora_rank": None,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 32,
            "first_k_dense_replace": LAYERS,
        },
        "compresses keys and values",
    ),
}


@pytest.mark.parametrize("name", mostly_slow(REFUSED_MODELS, {"Mamba", "M-RoPE"}))
def test_models_refused_before_anything_loads(
    name: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    own, reason = REFUSED_MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, **own}))
    said = refused(tmp_path, {**CONFIG, "exit_layer": 2})
    assert f'"early_exit" drafts with the layers of the target, and {tmp_path} {reason}' in said
    assert "vllm-spec list" in said


@pytest.mark.parametrize(
    ("engine_args", "reason"),
    [
        ({"enable_lora": True}, "Remove --enable-lora"),
        ({"enable_dbo": True}, "Remove --enable-dbo"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
    ],
)
def test_engines_refused_before_anything_loads(
    engine_args: dict[str, Any],
    reason: str,
    refused: Callable[..., str],
    model_without_weights: Path,
) -> None:
    assert reason in refused(model_without_weights, {**CONFIG, "exit_layer": 2}, **engine_args)


def test_a_model_that_does_something_between_its_layers_is_refused(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    """Granite scales its embedding in the model's `forward`, which layers alone do not see."""
    save_tiny_model("GraniteConfig", {"embedding_multiplier": 12.0}, tmp_path)
    said = refused(tmp_path, {**CONFIG, "exit_layer": 2})
    assert "GraniteForCausalLM: its layers run one by one give other logits" in said


@pytest.mark.parametrize("architecture", mostly_slow(["Llama", "OLMo2"], {"Llama"}))
def test_the_self_check_notices_layers_in_another_order(
    architecture: str,
    refused: Callable[..., str],
    tiny_model: Model,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_spec_plugins.engine.layer_parts import LayerParts

    initialise = LayerParts.__init__

    def swapped(self: Any, inner: Any) -> None:
        initialise(self, inner)
        self.layers[2:] = self.layers[:1:-1]

    monkeypatch.setattr(LayerParts, "__init__", swapped)
    said = refused(tiny_model(architecture), {**CONFIG, "exit_layer": 2})
    assert "its layers run one by one give other logits" in said


def test_layers_with_a_state_of_another_kind_are_refused(serve: Serve, adapter_of: Any) -> None:
    """What no configuration tells is found in the loaded model."""
    from torch import nn
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    from vllm_spec_plugins.engine.target import Target

    class Recurrent(nn.Module, AttentionLayerBase):
        def get_attn_backend(self) -> Any: ...
        def get_kv_cache_spec(self, vllm_config: Any) -> Any: ...

    with serve("Llama", {**CONFIG, "exit_layer": 2}) as llm:
        adapter = adapter_of(llm)
        module = adapter.target.module
        layers = module.model.layers
        layers[3].self_attn.attn.kv_sharing_target_layer_name = "model.layers.1.self_attn.attn"
        with pytest.raises(SpecPluginsError, match=r"layers\.3.* reads the keys and values of .*1"):
            Target(module, adapter.runner, 4).layers(0, 2)
        layers[3].self_attn.attn = Recurrent()
        with pytest.raises(SpecPluginsError, match=r"a state of its own in .*layers\.3.*Recurrent"):
            Target(module, adapter.runner, 4).layers(0, 2)


@pytest.mark.parametrize(
    "options", [{"exit_layer": "auto"}, {"exit_layer": 2, "length_control": "del"}]
)
def test_a_model_without_states_between_layers_is_refused_what_needs_them(
    options: dict[str, Any], refused: Callable[..., str], tiny_model: Model
) -> None:
    said = refused(tiny_model("Gemma2"), {**CONFIG, **options})
    assert "Gemma2ForCausalLM does not hand out hidden states between its layers" in said
    assert "Choose a fixed exit_layer" in said


def test_a_model_whose_parts_have_other_names_is_refused(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    save_tiny_model("GPT2Config", {"n_embd": 128, "n_layer": 2, "n_head": 4}, tmp_path)
    said = refused(tmp_path, {**CONFIG, "exit_layer": 1})
    assert "GPT2LMHeadModel has no `model.layers`" in said
