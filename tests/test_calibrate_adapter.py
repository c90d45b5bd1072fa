"""Training an exit adapter on the zoo's smallest model, and what training is made of."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from typer.testing import CliRunner
from vllm_spec_plugins.proposers.exit_adapter import ExitAdapter

from vllm_spec_plugins import zoo
from vllm_spec_plugins.adapter_file import AdapterCard, write_adapter
from vllm_spec_plugins.calibration import adapter as adapter_training
from vllm_spec_plugins.calibration.adapter import (
    AdapterRecipe,
    HeldOut,
    TrainedBlock,
    evaluate,
    job_of,
    padded,
    sample_windows,
    schedule,
    train,
    windows_of_step,
)
from vllm_spec_plugins.calibration.adapter_block import (
    AdapterBlock,
    load_block,
    probes_of,
    target_shape,
)
from vllm_spec_plugins.calibration.hugging_face import LocalModel
from vllm_spec_plugins.calibration.texts import Corpus, TextTokenizer, windows
from vllm_spec_plugins.cli.calibrate_adapter import _rounded, verdict
from vllm_spec_plugins.cli.main import app
from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.target_model import LayerState
from vllm_spec_plugins.zoo.adapter_expansion import expand_adapter
from vllm_spec_plugins.zoo.expansion import ExpansionError
from vllm_spec_plugins.zoo.recipes import RECIPES

RECIPE = AdapterRecipe(exit_layer=1, steps=24, batch_size=4, window=32, checkpoint_every=5)


@pytest.fixture(scope="module")
def folder() -> Path:
    return zoo.ensure("tiny")


@pytest.fixture(scope="module")
def target(folder: Path) -> LocalModel:
    return LocalModel.load(folder)


@pytest.fixture(scope="module")
def text(folder: Path) -> NDArray[np.int64]:
    """`[600, 32]`, the first 500 to learn from."""
    tokenizer = TextTokenizer(folder)
    every = windows(tokenizer, (text.text for text in Corpus(["zoo"])), RECIPE.window)
    return padded([next(every) for _ in range(600)])


@pytest.fixture(scope="module")
def trained(
    target: LocalModel, text: NDArray[np.int64], tmp_path_factory: pytest.TempPathFactory
) -> TrainedBlock:
    checkpoint = tmp_path_factory.mktemp("adapter") / "checkpoint"
    return train(target, RECIPE, text[:500], checkpoint, "job")


def _save(path: Path, target: LocalModel, block: AdapterBlock) -> Path:
    card = AdapterCard(
        model="tiny",
        target=target_shape(target),
        exit_layer=1,
        ffn_size=block.ffn_size,
        norm_epsilon=target.norm_epsilon,
        training={},
    )
    write_adapter(path, card, block.state_dict(), probes_of(target))
    return path


def _randomised(target: LocalModel, ffn_size: int = 0) -> AdapterBlock:
    """A block whose every weight matters."""
    block = AdapterBlock(target, ffn_size)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in block.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return block.requires_grad_(False)


class TestLocalModel:
    def test_parts_give_the_models_own_logits(self, target: LocalModel) -> None:
        tokens = torch.randint(0, target.vocab_size, (2, 9))
        states = target.layer_states(tokens, [1, 2])
        logits = target.logits(target.final_norm(states[2]))
        torch.testing.assert_close(logits, target.module(input_ids=tokens).logits)
        assert not torch.allclose(states[1], states[2])

    def test_states_of_a_layer_are_before_any_norm(self, target: LocalModel) -> None:
        """transformers' own record of hidden states agrees, but for the last, which it norms."""
        tokens = torch.randint(0, target.vocab_size, (1, 9))
        recorded = target.module(input_ids=tokens, output_hidden_states=True).hidden_states
        torch.testing.assert_close(target.layer_states(tokens, [1])[1], recorded[1])

    def test_no_such_layer(self, target: LocalModel) -> None:
        for number in (0, 3):
            with pytest.raises(SpecPluginsError, match=f"after {number} layers: the model has 2"):
                target.layer_states(torch.zeros(1, 1, dtype=torch.int64), [number])

    @pytest.mark.parametrize(
        ("name", "options", "shared"),
        [
            ("Mistral", {}, True),
            ("Qwen2", {}, True),
            ("Qwen3", {"head_dim": 16}, True),
            ("Gemma", {"head_dim": 16}, True),
            ("Gemma2", {"head_dim": 16, "final_logit_softcapping": 2.0}, False),
            ("Olmo", {"eos_token_id": 0}, True),
            ("Olmo2", {"eos_token_id": 0}, True),
            ("Granite", {"logits_scaling": 3.0}, True),
            ("Cohere", {"eos_token_id": 0, "bos_token_id": 0, "logit_scale": 0.5}, False),
        ],
    )
    def test_families(self, name: str, options: dict[str, Any], shared: bool) -> None:
        """The constructor compares logits: that it returns is the test."""
        model = LocalModel(_random_model(name, **options))
        assert model.num_layers == 3
        if shared:
            block = AdapterBlock(model)
            hidden = torch.randn(1, 5, 64)
            # OLMo's norm takes the mean off; a block begins near such an exit, not as it.
            hidden -= hidden.mean(-1, keepdim=True)
            expected = model.final_norm(hidden)
            torch.testing.assert_close(block(hidden), expected, rtol=1e-4, atol=1e-4)
        else:
            with pytest.raises(SpecPluginsError, match="cannot be trained"):
                AdapterBlock(model)(torch.randn(1, 5, 64))

    def test_models_of_another_build_are_refused(self) -> None:
        import transformers

        config = transformers.GPTNeoXConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            eos_token_id=0,
        )
        with pytest.raises(SpecPluginsError, match=r"not built like Llama: it lacks .*norm"):
            LocalModel(transformers.GPTNeoXForCausalLM(config))

    def test_unknown_arithmetic_before_the_logits_is_refused(self) -> None:
        module = _random_model("Granite", logits_scaling=3.0)
        module.config.logits_scaling = 1.0  # our side; the model itself reads it when called
        model_forward = module.forward

        def scaled(*args: Any, **kwargs: Any) -> Any:
            result = model_forward(*args, **kwargs)
            result.logits = result.logits * 1.5
            return result

        module.forward = scaled
        with pytest.raises(SpecPluginsError, match="more between its layers and its logits"):
            LocalModel(module)

    def test_not_a_model(self, tmp_path: Path, folder: Path) -> None:
        with pytest.raises(SpecPluginsError, match=r"no config\.json"):
            LocalModel.load(tmp_path)
        with pytest.raises(SpecPluginsError, match='no dtype "int3"'):
            LocalModel.load(folder, "int3")
        (tmp_path / "config.json").write_text('{"model_type": "no such type"}')
        with pytest.raises(SpecPluginsError, match="transformers cannot load"):
            LocalModel.load(tmp_path)


def _random_model(name: str, **options: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **{"pad_token_id": 0, **options},
    )
    torch.manual_seed(0)
    module = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for weight in module.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return module


class TestBlock:
    def test_begins_as_the_bare_exit(self, target: LocalModel) -> None:
        hidden = torch.randn(2, 7, target.hidden_size)
        for ffn_size in (0, 24):
            block = AdapterBlock(target, ffn_size)
            torch.testing.assert_close(block(hidden), target.final_norm(hidden))

    @pytest.mark.parametrize("ffn_size", [0, 24])
    def test_is_served_as_it_was_trained(
        self, target: LocalModel, tmp_path: Path, ffn_size: int
    ) -> None:
        block = _randomised(target, ffn_size)
        path = _save(tmp_path / "adapter.safetensors", target, block)
        hidden = torch.randn(9, target.hidden_size)
        served = ExitAdapter(path, Served(target))  # pyright: ignore[reportArgumentType]
        expected = block(hidden[None])[0]
        torch.testing.assert_close(served.forward(hidden, torch.arange(9)), expected)
        torch.testing.assert_close(load_block(path, target)(hidden[None])[0], expected)

    def test_is_not_loaded_for_another_model(self, target: LocalModel, tmp_path: Path) -> None:
        path = _save(tmp_path / "adapter.safetensors", target, AdapterBlock(target))
        with pytest.raises(SpecPluginsError, match="another model"):
            load_block(path, LocalModel(_random_model("Mistral")))

    @pytest.mark.parametrize("ffn_size", [0, 24])
    def test_expanded_with_its_model_drafts_the_same(
        self, target: LocalModel, tmp_path: Path, ffn_size: int
    ) -> None:
        narrow = _save(tmp_path / "narrow", target, _randomised(target, ffn_size))
        wide_target = LocalModel.load(zoo.ensure("expanded-tiny"))
        shapes = [RECIPES[name].architecture for name in ("tiny", "expanded-tiny")]
        card = expand_adapter(narrow, *shapes, tmp_path / "wide")
        assert card.exit_layer == 1
        assert card.ffn_size == 2 * ffn_size
        tokens = torch.randint(0, target.vocab_size, (2, 20))
        logits = [
            model.logits(load_block(path, model)(model.layer_states(tokens, [exit_])[exit_]))
            for model, path, exit_ in (
                (target, narrow, 1),
                (wide_target, tmp_path / "wide", card.exit_layer),
            )
        ]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
        with pytest.raises(ExpansionError, match="not trained for"):
            expand_adapter(narrow, shapes[1], shapes[1], tmp_path / "wider")


class Served:
    """A `TargetModel` that computes with the training side's target, one window at a time."""

    def __init__(self, model: LocalModel) -> None:
        shape = model.attention
        self.num_heads, self.num_kv_heads = shape.num_heads, shape.num_kv_heads
        self.head_dim = shape.head_dim
        self.num_layers, self.dtype, self.tensor_parallel_rank = 2, torch.float32, 0
        self.module, self.head, self.model = model.module, model, model

    def attention(self, name: str) -> Served:
        assert name == "exit_adapter"
        return self

    def all_reduce(self, partial: Tensor) -> Tensor:
        return partial

    def embed(self, token_ids: Tensor) -> LayerState:
        return LayerState(self.model.embed(token_ids))

    def rotate(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        cosines, sines = self.model.rotation(positions)
        heads = (x.unflatten(-1, (-1, self.head_dim)).transpose(0, 1) for x in (query, key))
        rotated = apply_rotary_pos_emb(*heads, cosines, sines, unsqueeze_dim=0)
        return rotated[0].transpose(0, 1).flatten(1), rotated[1].transpose(0, 1).flatten(1)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (
            x.unflatten(-1, (-1, self.head_dim)).transpose(0, 1) for x in (query, key, value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.transpose(0, 1).flatten(1)


class TestTraining:
    def test_beats_the_bare_exit_on_held_out_text(
        self, target: LocalModel, text: NDArray[np.int64], trained: TrainedBlock
    ) -> None:
        result = evaluate(target, trained.block, 1, text[500:])
        bare, adapter = result.drafts
        assert (bare.name, adapter.name) == ("exit", "adapter")
        assert adapter.divergence < 0.7 * bare.divergence
        assert result.gain == pytest.approx(adapter.acceptance - bare.acceptance)
        assert result.gain > 2 * result.gain_error > 0

    def test_an_untrained_adapter_gains_nothing(
        self, target: LocalModel, text: NDArray[np.int64]
    ) -> None:
        """Negative control of the test above, and of the verdict."""
        result = evaluate(target, AdapterBlock(target), 1, text[500:])
        assert result.gain == pytest.approx(0, abs=1e-6)
        assert "not worth serving" in verdict(_rounded(result), 0.3)[-1]

    @pytest.mark.parametrize("killed_after", [3, 5, 13])
    def test_resumed_equals_uninterrupted(
        self,
        target: LocalModel,
        text: NDArray[np.int64],
        trained: TrainedBlock,
        tmp_path: Path,
        killed_after: int,
    ) -> None:
        def stop(done: int, _loss: float) -> None:
            if done == killed_after:
                raise KeyboardInterrupt

        checkpoint = tmp_path / "checkpoint"
        with pytest.raises(KeyboardInterrupt):
            train(target, RECIPE, text[:500], checkpoint, "job", stop)
        resumed = train(target, RECIPE, text[:500], checkpoint, "job")
        # The step that was cut off is not in the checkpoint: it is told before it is saved.
        assert resumed.resumed_at == (killed_after - 1) // 5 * 5
        assert resumed.losses == trained.losses
        for name, weight in resumed.block.state_dict().items():
            assert torch.equal(weight, trained.block.state_dict()[name]), name

    def test_a_finished_checkpoint_is_not_trained_again(
        self, target: LocalModel, text: NDArray[np.int64], tmp_path: Path
    ) -> None:
        recipe = dataclasses.replace(RECIPE, steps=3)
        train(target, recipe, text[:500], tmp_path / "checkpoint", "job")
        again = train(target, recipe, text[:500], tmp_path / "checkpoint", "job")
        assert again.resumed_at == 3

    def test_another_jobs_checkpoint_is_refused(
        self, target: LocalModel, text: NDArray[np.int64], tmp_path: Path
    ) -> None:
        recipe = dataclasses.replace(RECIPE, steps=1)
        train(target, recipe, text[:500], tmp_path / "checkpoint", "job")
        with pytest.raises(SpecPluginsError, match="another model, text or settings"):
            train(target, recipe, text[:500], tmp_path / "checkpoint", "another job")

    def test_a_job_is_named_by_all_that_decides_it(self, target: LocalModel) -> None:
        job = job_of(target, RECIPE, "data")
        assert job == job_of(target, dataclasses.replace(RECIPE, checkpoint_every=9), "data")
        others = {
            job_of(target, dataclasses.replace(RECIPE, seed=1), "data"),
            job_of(target, dataclasses.replace(RECIPE, matrix_lr=0.1), "data"),
            job_of(target, RECIPE, "other data"),
            job_of(LocalModel(_random_model("Mistral")), RECIPE, "data"),
        }
        assert len(others - {job}) == 4

    def test_gradient_is_that_of_the_soft_cross_entropy(
        self, target: LocalModel, text: NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In chunks of a few rows, against autograd over everything at once."""
        monkeypatch.setattr(adapter_training, "_CHUNK_ELEMENTS", 7 * target.vocab_size)
        tokens = torch.from_numpy(text[:2])
        states = target.layer_states(tokens, [1, 2])
        last = states[2].flatten(0, 1)
        normed = target.final_norm(states[1]).flatten(0, 1)
        loss, gradient = adapter_training._distillation(target, normed, last)

        leaf = normed.clone().requires_grad_()
        p = target.logits(target.final_norm(last)).softmax(-1)
        cross_entropy = F.cross_entropy(target.logits(leaf), p)
        cross_entropy.backward()
        assert leaf.grad is not None
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-8)
        entropy = -(p * p.log()).sum(-1).mean()
        assert loss == pytest.approx((cross_entropy - entropy).item(), abs=1e-5)

    def test_padding_teaches_nothing(self, target: LocalModel, text: NDArray[np.int64]) -> None:
        """One long and one short window: the same update as the mean over their positions."""
        block = _randomised(target).requires_grad_()
        both = padded([text[0], text[1][:10]])
        assert (both[1, 10:] == -1).all()
        loss = adapter_training._step(target, block, [], torch.from_numpy(both), 1)
        got = {name: w.grad.clone() for name, w in block.named_parameters() if w.grad is not None}

        expected_loss, expected = 0.0, {name: torch.zeros_like(w) for name, w in got.items()}
        for window in (text[0], text[1][:10]):
            block = _randomised(target).requires_grad_()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
                part = adapter_training._step(target, block, [], torch.from_numpy(window[None]), 1)
            share = len(window) / 42
            expected_loss += share * part
            for name, weight in block.named_parameters():
                assert weight.grad is not None
                expected[name] += share * weight.grad
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        # The first gradient went through clipping, which only scales it.
        flat = [torch.cat([g.flatten() for g in grads.values()]) for grads in (got, expected)]
        scale = min(1.0, 1.0 / flat[1].norm().item())
        torch.testing.assert_close(flat[0], flat[1] * scale, rtol=1e-4, atol=1e-6)

    def test_quality_is_measured_where_text_is(
        self, target: LocalModel, text: NDArray[np.int64], trained: TrainedBlock
    ) -> None:
        whole = evaluate(target, trained.block, 1, text[500:504])
        longer = np.pad(text[500:504], ((0, 0), (0, 5)), constant_values=-1)
        assert evaluate(target, trained.block, 1, longer) == whole

    def test_quality_against_plain_arithmetic(
        self, target: LocalModel, text: NDArray[np.int64], trained: TrainedBlock
    ) -> None:
        tokens = torch.from_numpy(text[500:503])
        result = evaluate(target, trained.block, 1, text[500:503])
        states = target.layer_states(tokens, [1, 2])
        p = target.logits(target.final_norm(states[2])).double().softmax(-1)
        with torch.no_grad():
            q = target.logits(trained.block(states[1])).double().softmax(-1)
        adapter = result.drafts[1]
        assert adapter.acceptance == pytest.approx(torch.minimum(p, q).sum(-1).mean().item())
        assert adapter.divergence == pytest.approx(
            (p * (p / q).log()).sum(-1).mean().item(), abs=1e-5
        )
        agreement = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
        assert adapter.agreement == pytest.approx(agreement)


class TestOrderOfText:
    def test_each_pass_sees_every_window_once(self) -> None:
        recipe = dataclasses.replace(RECIPE, batch_size=4)
        seen = np.concatenate([windows_of_step(step, 10, recipe) for step in range(10)])
        assert set(Counter(seen.tolist()).values()) == {4}
        assert set(seen[:10].tolist()) == set(range(10))
        assert seen[:10].tolist() != seen[10:20].tolist()

    def test_samples_are_spread_over_the_text(self) -> None:
        every = [np.array([number]) for number in range(1000)]
        kept = np.concatenate(sample_windows(iter(every), 200, seed=0))
        assert len(set(kept.tolist())) == 200
        assert 350 < kept.mean() < 650
        assert sample_windows(iter(every[:5]), 200, seed=0) == every[:5]
        assert np.array_equal(kept, np.concatenate(sample_windows(iter(every), 200, seed=0)))

    def test_schedule(self) -> None:
        rates = [schedule(step, 100) for step in range(100)]
        assert rates[0] == pytest.approx(0.2)
        assert max(rates) == 1.0
        assert 0.02 <= rates[-1] < 0.05


class TestCommand:
    def test_trains_reports_and_knows_its_own_work(self, tmp_path: Path) -> None:
        lines = [text.text[:600] for text in islice(Corpus(["zoo"]), 200)]
        texts = tmp_path / "texts.jsonl"
        texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        folder = tmp_path / "out"
        folder.mkdir()
        output = folder / "adapter.safetensors"
        command = ["calibrate", "adapter", "tiny", "--exit-layer", "1", "--texts", str(texts)]
        command += ["--steps", "6", "--window", "32", "--output", str(output)]
        first = CliRunner().invoke(app, command)
        assert first.exit_code == 0, first.output
        assert "acceptance at temperature 1" in first.output
        card = AdapterCard.read(output)
        assert (card.exit_layer, card.model) == (1, "tiny")
        report = json.loads((folder / "adapter.json").read_text())
        assert len(report["losses"]) == 6
        assert card.training["held_out"] == report["held_out"]
        assert (folder / "adapter.png").read_bytes().startswith(b"\x89PNG")
        assert {path.name for path in folder.iterdir()} == {
            "adapter.safetensors",
            "adapter.json",
            "adapter.png",
        }
        written = output.stat().st_mtime_ns
        assert "already trained" in CliRunner().invoke(app, command).output
        other = CliRunner().invoke(app, [*command, "--seed", "1"])
        assert other.exit_code == 1
        assert "another model, text or settings" in " ".join(other.output.split())
        assert output.stat().st_mtime_ns == written

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (["--exit-layer", "2"], "exit_layer must be 1 to 1"),
            (["--window", "4096"], "window must be 2 to 2048"),
            (["--texts", "no/such/file"], "no texts at"),
            (["--texts", "zoo:held-out"], "too little text"),
            (["--output", "no/such/folder/adapter"], "there is no folder"),
            (["--dtype", "float8"], "no dtype"),
        ],
    )
    def test_mistakes_are_one_message(self, change: list[str], message: str) -> None:
        options = {"--exit-layer": "1", "--texts": "zoo"} | {change[0]: change[1]}
        command = ["calibrate", "adapter", "tiny", *(x for pair in options.items() for x in pair)]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 1, done.output
        assert message in " ".join(done.output.split())


def test_verdicts() -> None:
    def held_out(adapter: float, later: float, error: float) -> dict[str, Any]:
        rows = [("exit", 2, 0.7), ("adapter", 2, adapter), ("next exit", 3, later)]
        drafts = [
            {"name": n, "layers": k, "divergence": 1.0, "acceptance": a, "agreement": a}
            for n, k, a in rows
        ]
        values = {"drafts": drafts, "windows": 9, "gain": adapter - 0.7, "gain_error": error}
        assert set(values) == {field.name for field in dataclasses.fields(HeldOut)}
        return values

    assert len(verdict(held_out(0.8, 0.75, 0.01), 0.25)) == 1
    assert "after 3 layers" in verdict(held_out(0.8, 0.81, 0.01), 0.25)[-1]
    assert "not worth" in verdict(held_out(0.71, 0.75, 0.01), 0.25)[-1]
    assert "not worth" in verdict(held_out(0.71, 0.75, float("nan")), 0.25)[-1]
