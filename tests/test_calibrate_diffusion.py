"""Training a diffusion drafter on the zoo's smallest model, and what training is made of."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from vllm_spec_plugins import zoo
from vllm_spec_plugins.calibration import diffusion_evaluation, diffusion_training, law_loss
from vllm_spec_plugins.calibration.adapter import padded
from vllm_spec_plugins.calibration.diffusion_evaluation import (
    Written,
    evaluate,
    evaluate_causal,
    write_texts,
)
from vllm_spec_plugins.calibration.diffusion_start import (
    Sizes,
    anew,
    conditioned,
    from_model,
    mask_token_of,
)
from vllm_spec_plugins.calibration.diffusion_training import (
    DiffusionRecipe,
    TrainedDrafter,
    block_weights,
    job_of,
    train,
)
from vllm_spec_plugins.calibration.hugging_face import LocalModel
from vllm_spec_plugins.calibration.masked_blocks import Blocks, draw_blocks, masked_pass
from vllm_spec_plugins.calibration.texts import Corpus, TextTokenizer, windows
from vllm_spec_plugins.cli.main import app
from vllm_spec_plugins.context import ModelFacts
from vllm_spec_plugins.diffusion.cache import NewText
from vllm_spec_plugins.diffusion.conditioning import TargetStates
from vllm_spec_plugins.diffusion.drafter import DiffusionDrafter
from vllm_spec_plugins.diffusion.folder import check_folder
from vllm_spec_plugins.errors import SpecPluginsError

BLOCK = 4
RECIPE = DiffusionRecipe(
    block=BLOCK, steps=24, batch_size=4, window=32, num_masks=24, checkpoint_every=5
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return zoo.ensure("tiny")


@pytest.fixture(scope="module")
def target(folder: Path) -> LocalModel:
    return LocalModel.load(folder)


@pytest.fixture(scope="module")
def text(folder: Path) -> NDArray[np.int64]:
    """`[240, 32]`, the first 200 to learn from."""
    every = windows(TextTokenizer(folder), (text.text for text in Corpus(["zoo"])), 32)
    return padded(list(itertools.islice(every, 240)))


@pytest.fixture(scope="module")
def trained(
    target: LocalModel, text: NDArray[np.int64], tmp_path_factory: pytest.TempPathFactory
) -> TrainedDrafter:
    checkpoint = tmp_path_factory.mktemp("drafter") / "checkpoint"
    return train(start(target), target, RECIPE, text[:200], checkpoint, "job")


@pytest.fixture(scope="module")
def written(target: LocalModel, text: NDArray[np.int64]) -> Written:
    return write_texts(target, text[200:208, :16], 12, greedy=False)


def start(target: LocalModel) -> DiffusionDrafter:
    return from_model(target, 1, mask_token_id=3)


def draft_anew(drafter: DiffusionDrafter, text: Any, size: int) -> Tensor:
    """`[size, V]` laws of a block behind a text, `[T]`, with an empty cache."""
    text = torch.as_tensor(text)
    new = NewText(torch.tensor([0]), text[None], torch.tensor([len(text)]), 0)
    return drafter.draft(drafter.new_cache(1, 64), new, size)[0]


def reader(target: LocalModel) -> DiffusionDrafter:
    """Conditioned on both layers of the target."""
    states = TargetStates("tiny", None, target.num_layers, target.hidden_size, (1, 2))
    return conditioned(start(target), states)


class TestStart:
    def test_the_first_draft_token_is_the_early_exits(self, target: LocalModel) -> None:
        """Untrained, and whatever the block: text does not see it."""
        drafter = start(target)
        tokens = torch.tensor([[5, 9, 60, 7]])
        logits = draft_anew(drafter, tokens[0], 3)
        state = target.layer_states(tokens, [1])[1]
        expected = target.logits(target.final_norm(state))[0, -1]
        expected[3] = -torch.inf
        torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)

    def test_the_mask(self, folder: Path, target: LocalModel, tmp_path: Path) -> None:
        assert mask_token_of(TextTokenizer(folder), target.vocab_size) == 3
        raw = json.loads((folder / "tokenizer.json").read_text())
        raw["added_tokens"] = []
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        assert mask_token_of(TextTokenizer(tmp_path), 512) == 512
        beyond = from_model(target, 2, mask_token_id=512)
        assert beyond.embedding.shape == (513, 64)
        assert beyond.head.shape == (512, 64)
        embedding = target.embed(torch.arange(512))
        torch.testing.assert_close(beyond.embedding[:512], embedding)
        torch.testing.assert_close(beyond.embedding[512], embedding.mean(0))

    def test_too_many_layers(self, target: LocalModel) -> None:
        with pytest.raises(SpecPluginsError, match="layers must be 1 to 2"):
            from_model(target, 3, mask_token_id=3)

    def test_layers_of_another_kind(self) -> None:
        import transformers

        config = transformers.GemmaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
        model = LocalModel(transformers.GemmaForCausalLM(config))
        with pytest.raises(SpecPluginsError, match='of type "gemma": its layers differ'):
            from_model(model, 1, mask_token_id=3)

    def test_anew(self, target: LocalModel, text: NDArray[np.int64]) -> None:
        sizes = Sizes(2, 48, 4, 2, 96)
        drafter = anew(sizes, target, 512, text.ravel(), seed=0)
        assert (drafter.config.num_layers, drafter.config.head_dim) == (2, 12)
        assert drafter.embedding.shape == (513, 48)
        again = anew(sizes, target, 512, text.ravel(), seed=0)
        other = anew(sizes, target, 512, text.ravel(), seed=1)
        assert torch.equal(drafter.embedding, again.embedding)
        assert not torch.equal(drafter.embedding, other.embedding)

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            (Sizes(1, 50, 4, 2, 64), "4 heads must divide hidden_size 50"),
            (Sizes(1, 48, 4, 3, 64), "3 key/value heads must divide 4"),
            (Sizes(1, 12, 4, 4, 64), "heads of 3 columns cannot be rotated"),
        ],
    )
    def test_sizes_that_do_not_fit(self, sizes: Sizes, message: str) -> None:
        with pytest.raises(SpecPluginsError, match=message):
            sizes.check()


class TestMaskedBlocks:
    def test_what_sees_what(self) -> None:
        blocks = Blocks(np.array([[1, 3], [2, 0]]), np.array([[3, 2], [1, 0]]))
        layout = masked_pass(np.array([[4, 5, 6, 7, 8], [4, 5, 6, 7, -1]]), blocks, 99)
        assert layout.token_ids[0].tolist() == [4, 5, 6, 7, 8, 99, 99, 99]
        assert layout.positions[0].tolist() == [0, 1, 2, 3, 4, 2, 3, 4]
        seen = [row.nonzero()[:, 0].tolist() for row in layout.visible[0]]
        assert seen[:5] == [list(range(i + 1)) for i in range(5)]
        # Two masks after position 1, one after position 3.
        assert seen[5:] == [[0, 1, 5, 6], [0, 1, 5, 6], [0, 1, 2, 3, 7]]
        rows = zip(
            layout.window, layout.place, layout.before, layout.number, layout.length, strict=True
        )
        assert sorted(tuple(map(int, row)) for row in rows) == [
            (0, 1, 1, 1, 3),
            (0, 3, 3, 1, 2),
            (0, 5, 2, 2, 3),
            (0, 6, 3, 3, 3),
            (0, 7, 4, 2, 2),
            (1, 2, 2, 1, 1),
        ]

    def test_trains_what_is_served(self, target: LocalModel, text: NDArray[np.int64]) -> None:
        """Every block of a pass, against a draft of its own from the cache."""
        drafter = from_model(target, 2, mask_token_id=3)
        lengths = np.full(2, 32)
        blocks = draw_blocks(lengths, 20, BLOCK, np.random.default_rng(0), vary=True)
        layout = masked_pass(text[:2], blocks, 3)
        with torch.no_grad():
            states = drafter(layout.token_ids, layout.positions, layout.visible)
        for window, place, before, number, length in zip(
            layout.window, layout.place, layout.before, layout.number, layout.length, strict=True
        ):
            row = draft_anew(drafter, text[window][: before - number + 2], int(length))
            got = drafter.logits(states[window, place])
            torch.testing.assert_close(got, row[number - 1], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("vary", [True, False])
    def test_blocks_stay_within_their_text(self, vary: bool) -> None:
        generator = np.random.default_rng(0)
        texts = np.tile([2, 3, 20, 64], 50)
        for longest, masks in ((1, 5), (4, 24), (16, 50)):
            blocks = draw_blocks(texts, masks, longest, generator, vary=vary)
            there = blocks.lengths > 0
            assert there[:, 0].all()
            assert (blocks.anchors >= 0).all()
            assert (blocks.anchors + blocks.lengths <= texts[:, None] - 1)[there].all()
            assert (np.maximum(blocks.lengths - 1, 0).sum(axis=1) <= masks).all()
            assert blocks.lengths.max() == longest
            long = texts == 64
            if longest > 1 and not vary:
                assert np.maximum(blocks.lengths[long] - 1, 0).sum(axis=1).min() == masks

    def test_lengths_are_uniform_in_stage_two(self) -> None:
        generator = np.random.default_rng(0)
        lengths = draw_blocks(np.full(4000, 64), 6, 4, generator, vary=True).lengths[:, 0]
        counts = np.bincount(lengths, minlength=5)[1:]
        assert abs(counts - 1000).max() < 5 * np.sqrt(750)

    def test_weights(self) -> None:
        number, length = np.array([1, 2, 3, 1]), np.array([3, 3, 3, 1])
        weights = block_weights(number, length, 2.0)
        assert weights == pytest.approx([4 / 7, 2 / 7, 1 / 7, 1])
        assert block_weights(number, length, 1.0) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])


class TestLoss:
    def test_value_and_gradients(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In chunks of a few rows, against autograd over everything at once."""
        monkeypatch.setattr(law_loss, "_CHUNK_ELEMENTS", 3 * 11)
        generator = torch.Generator().manual_seed(0)
        hidden, head = (
            torch.randn(rows, 5, generator=generator).requires_grad_() for rows in (10, 11)
        )
        tokens = torch.tensor([3, 0, 3, 1, 2, 2, 0, 3, 1, 1])
        weights = torch.rand(10, generator=generator)
        laws = torch.randn(4, 11, generator=generator).mul(3).softmax(-1)
        loss, divergences = law_loss.law_loss(hidden, head, tokens, weights, laws.__getitem__)
        loss.backward()
        got = hidden.grad, head.grad

        hidden.grad = head.grad = None
        log_q = (hidden @ head.T).log_softmax(-1)
        expected = F.kl_div(log_q, laws[tokens], reduction="none").sum(-1)
        (expected @ weights).backward()
        torch.testing.assert_close(divergences, expected.detach())
        torch.testing.assert_close(got, (hidden.grad, head.grad))

    def test_labels_from_the_text(self, target: LocalModel, text: NDArray[np.int64]) -> None:
        law = diffusion_training._text_law(target, text[:2])
        rows = law(torch.tensor([0, 30, 32]))
        assert rows.argmax(-1).tolist() == [text[0, 1], text[0, 31], text[1, 1]]
        assert torch.equal(rows.sum(-1), torch.ones(3))

    def test_labels_from_the_target(self, target: LocalModel, text: NDArray[np.int64]) -> None:
        tokens = torch.from_numpy(text[:2])
        last = target.layer_states(tokens, [target.num_layers])[target.num_layers]
        law = diffusion_training._target_law(target, last)
        logits = target.module(input_ids=tokens).logits
        torch.testing.assert_close(law(torch.tensor([33])), logits[1, 1:2].softmax(-1))

    def test_a_conditioned_drafter_learns_to_read_states(
        self, target: LocalModel, text: NDArray[np.int64]
    ) -> None:
        """At first as good as one without; every weight has a gradient, also for labels of text."""
        blocks = draw_blocks(np.full(2, 32), 20, BLOCK, np.random.default_rng(0), vary=True)
        known = np.arange(32) >= np.array([[0], [9]])
        for recipe in (RECIPE, dataclasses.replace(RECIPE, distil=False)):
            found = []
            for drafter in (start(target), reader(target)):
                arguments = drafter, target, text[:2], blocks, 1.5, 0, recipe, known
                loss, _ = diffusion_training._loss(*arguments)
                loss.backward()
                found.append(loss.item())
            assert found[0] == pytest.approx(found[1])
            assert drafter.conditioning is not None
            for weight in drafter.conditioning.parameters():
                assert weight.grad is not None
                assert weight.grad.abs().max() > 0

    def test_padding_teaches_nothing(self, target: LocalModel, text: NDArray[np.int64]) -> None:
        """The same blocks of a short text, alone and in the company of padding."""
        short = text[:1, :12]
        longer = np.pad(short, ((0, 0), (0, 9)), constant_values=-1)
        blocks = Blocks(np.array([[2, 7]]), np.array([[4, 3]]))
        gradients: list[list[Tensor]] = []
        for tokens in (short, longer):
            drafter = start(target)
            loss, _ = diffusion_training._loss(drafter, target, tokens, blocks, 1.5, 0, RECIPE)
            loss.backward()
            gradients.append([w.grad for w in drafter.parameters() if w.grad is not None])
        assert len(gradients[0]) == len(list(start(target).parameters()))
        for here, there in zip(*gradients, strict=True):
            torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-6)


class TestTraining:
    def test_masks_learn_to_read_the_text(self, target: LocalModel, tmp_path: Path) -> None:
        """Texts that repeat one of eight tokens: without reading them, none is below log 8."""
        texts = np.repeat(np.arange(40) % 8 + 100, 32).reshape(40, 32)
        recipe = dataclasses.replace(RECIPE, distil=False, steps=60, matrix_lr=0.05, lr=0.01)
        trained = train(start(target), target, recipe, texts, tmp_path / "checkpoint", "job")
        quality = evaluate(target, trained.drafter, Written(list(texts[:8]), 16, False), BLOCK)
        assert max(quality.cross_entropy) < np.log(8) - 0.8

    @pytest.mark.parametrize("killed_after", [3, 13])
    def test_resumed_equals_uninterrupted(
        self,
        target: LocalModel,
        text: NDArray[np.int64],
        trained: TrainedDrafter,
        tmp_path: Path,
        killed_after: int,
    ) -> None:
        def stop(done: int, _loss: float) -> None:
            if done == killed_after:
                raise KeyboardInterrupt

        checkpoint = tmp_path / "checkpoint"
        with pytest.raises(KeyboardInterrupt):
            train(start(target), target, RECIPE, text[:200], checkpoint, "job", stop)
        resumed = train(start(target), target, RECIPE, text[:200], checkpoint, "job")
        assert resumed.resumed_at == (killed_after - 1) // 5 * 5
        assert resumed.losses == trained.losses
        for name, weight in resumed.drafter.state_dict().items():
            assert torch.equal(weight, trained.drafter.state_dict()[name]), name

    def test_the_projection_of_states_learns_slowly(self, target: LocalModel) -> None:
        """It begins at zero, beside an embedding whose rows are small."""
        drafter = reader(target)
        muon, _ = diffusion_training._optimizers(drafter, RECIPE)
        peaks = [group["peak"] for group in muon.param_groups]
        spread = drafter.embedding.std().item()
        assert peaks[0] == pytest.approx(0.5 * spread * RECIPE.matrix_lr)
        assert peaks[1:] == [RECIPE.matrix_lr] * 4
        assert spread < 0.5

    def test_another_jobs_checkpoint_is_refused(
        self, target: LocalModel, text: NDArray[np.int64], tmp_path: Path
    ) -> None:
        recipe = dataclasses.replace(RECIPE, steps=1)
        drafter, path = start(target), tmp_path / "checkpoint"
        train(drafter, target, recipe, text[:200], path, "job")
        with pytest.raises(SpecPluginsError, match="another model, text or settings"):
            train(drafter, target, recipe, text[:200], path, "another job")

    def test_a_job_is_named_by_all_that_decides_it(self, target: LocalModel) -> None:
        drafter = start(target)
        job = job_of(RECIPE, drafter, target, "data")
        same = dataclasses.replace(RECIPE, checkpoint_every=9)
        assert job == job_of(same, drafter, target, "data")
        others = {
            job_of(dataclasses.replace(RECIPE, distil=False), drafter, target, "data"),
            job_of(RECIPE, drafter, target, "other data"),
            job_of(RECIPE, from_model(target, 2, 3), target, "data"),
        }
        assert len(others - {job}) == 3


class TestEvaluation:
    def test_texts_are_the_targets(self, target: LocalModel, text: NDArray[np.int64]) -> None:
        greedy = write_texts(target, text[200:202, :16], 5, greedy=True)
        for whole in greedy.texts:
            logits = target.module(input_ids=torch.from_numpy(whole[None])).logits[0]
            assert logits.argmax(-1)[15 : len(whole) - 1].tolist() == whole[16:].tolist()
        drawn = [write_texts(target, text[200:202, :16], 5, greedy=False, seed=s) for s in (0, 1)]
        assert not np.array_equal(drawn[0].texts[0], drawn[1].texts[0])

    def test_texts_end_where_the_target_ends_them(self) -> None:
        text = np.array([7, 2, 5, 2, 9])
        cut = diffusion_evaluation._cut
        assert cut(text, 2, np.array([2])).tolist() == [7, 2, 5, 2]
        assert cut(text, 2, np.array([-1])).tolist() == text.tolist()

    @pytest.mark.parametrize("greedy", [True, False])
    def test_against_drafts_one_by_one(
        self,
        target: LocalModel,
        trained: TrainedDrafter,
        written: Written,
        greedy: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """From the cache, at every place; the length from the walk's definition for one token."""
        monkeypatch.setattr(diffusion_evaluation, "_PLACES", 4)
        some = dataclasses.replace(written, texts=written.texts[:2], greedy=greedy)
        quality = evaluate(target, trained.drafter, some, BLOCK)
        rows: list[Tensor] = []
        for whole in some.texts:
            logits = target.module(input_ids=torch.from_numpy(whole[None])).logits[0]
            for end in range(16, len(whole) - BLOCK + 1):
                draft = draft_anew(trained.drafter, whole[:end], BLOCK)
                p, q = logits[end - 1 : end - 1 + BLOCK].softmax(-1), draft.softmax(-1)
                own = torch.from_numpy(whole[end : end + BLOCK, None])
                columns = [
                    -q.gather(1, own)[:, 0].log(),
                    torch.minimum(p, q).sum(-1),
                    p.argmax(-1) == q.argmax(-1),
                ]
                rows.append(torch.stack([column.double() for column in columns]))
        cross_entropy, overlap, agreement = torch.stack(rows).mean(0).tolist()
        assert quality.cross_entropy == pytest.approx(cross_entropy, rel=1e-4)
        assert quality.overlap == pytest.approx(overlap, rel=1e-4)
        assert quality.agreement == pytest.approx(agreement)
        assert 1 <= quality.acceptance_length[0] <= 2
        assert quality.acceptance_length == sorted(quality.acceptance_length)

    def test_states_that_are_withheld(self, target: LocalModel, written: Written) -> None:
        """A projection that matters changes what is measured, unless it is given nothing."""
        some = dataclasses.replace(written, texts=written.texts[:2])
        drafter = reader(target)
        unread = evaluate(target, drafter, some, BLOCK)
        assert drafter.conditioning is not None
        torch.nn.init.normal_(drafter.conditioning.projection)
        assert evaluate(target, drafter, some, BLOCK) != unread
        assert evaluate(target, drafter, some, BLOCK, withheld=True) == unread

    def test_the_target_itself_drafts_everything(
        self, target: LocalModel, written: Written
    ) -> None:
        quality = evaluate_causal(target, target, written, BLOCK)
        assert quality.acceptance_length == pytest.approx([2, 3, 4, 5])
        assert quality.overlap == pytest.approx([1] * BLOCK)

    def test_no_text_is_long_enough(self, target: LocalModel, written: Written) -> None:
        with pytest.raises(ValueError, match="no text has 13 new tokens"):
            evaluate(target, start(target), written, 13)


def _invoke(*options: str) -> Any:
    command = ["calibrate", "diffusion-drafter", "tiny", *options]
    return CliRunner().invoke(app, command)


class TestCommand:
    def test_trains_reports_and_knows_its_own_work(self, tmp_path: Path, folder: Path) -> None:
        output = tmp_path / "drafter"
        lines = [text.text[:600] for text in itertools.islice(Corpus(["zoo"]), 200)]
        texts = tmp_path / "texts.jsonl"
        texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        options = ["--texts", str(texts), "--output", str(output), "--layers", "1", "--block", "4"]
        options += ["--steps", "3", "--window", "32", "--masks", "12"]
        options += ["--num-prompts", "2", "--new-tokens", "8"]
        first = _invoke(*options)
        assert first.exit_code == 0, first.output
        assert "tokens per step so far" in first.output
        facts = ModelFacts(str(folder), 512, 64, 2, 256, 4)
        config = check_folder(output, facts, context_window=128)
        assert (config.num_layers, config.mask_token_id) == (1, 3)
        card = json.loads((output / "card.json").read_text())
        assert len(card["losses"]) == 3
        measured = card["held_out"]["measured"]
        assert [part["temperature"] for part in measured] == [0, 1]
        assert all(len(part["acceptance_length"]) == 4 for part in measured)
        assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert {path.name for path in tmp_path.iterdir()} == {"drafter", "texts.jsonl"}
        assert "already trained" in _invoke(*options).output
        other = _invoke(*options, "--seed", "1")
        assert other.exit_code == 1
        assert "another model, text or settings" in " ".join(other.output.split())

    def test_a_conditioned_drafter(self, tmp_path: Path, folder: Path) -> None:
        """Its folder serves its target, and says which that is."""
        output, texts = tmp_path / "drafter", tmp_path / "texts.jsonl"
        lines = [text.text[:600] for text in itertools.islice(Corpus(["zoo"]), 60)]
        texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        options = ["--texts", str(texts), "--output", str(output), "--layers", "1", "--block", "2"]
        options += ["--steps", "2", "--window", "32", "--masks", "8", "--num-prompts", "2"]
        options += ["--new-tokens", "8", "--condition-on-layers", "spread"]
        done = _invoke(*options)
        assert done.exit_code == 0, done.output
        assert "With none of the target's states" in done.output
        facts = ModelFacts(str(folder), 512, 64, 2, 256, 2)
        states = check_folder(output, facts).conditioned_on
        assert states is not None
        revision = folder.name.removeprefix("tiny-")
        assert states == TargetStates("tiny", revision, 2, 64, (1, 2))
        weights = load_file(output / "model.safetensors")
        assert weights["target_states.projection.weight"].abs().max() > 0
        card = json.loads((output / "card.json").read_text())
        assert (card["target"], card["target_revision"]) == ("tiny", revision)
        assert card["condition_on_layers"] == [1, 2]
        assert [part["temperature"] for part in card["held_out"]["without_states"]] == [0, 1]
        # A fine-tuned copy of the target is another one.
        other = tmp_path / "other"
        shutil.copytree(folder, other)
        tuned = load_file(folder / "model.safetensors")
        save_file({name: w + 0.01 for name, w in tuned.items()}, other / "model.safetensors")
        with pytest.raises(SpecPluginsError, match="reads hidden states of another model"):
            check_folder(output, dataclasses.replace(facts, model=str(other)))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--layers", "3"], "layers must be 1 to 2"),
            (["--condition-on-layers", "1,3"], "numbers of layers from 1 to 2"),
            (["--block", "256", "--new-tokens", "300"], "block must be 1 to 255"),
            (["--new-tokens", "8"], "less than a block of 16"),
            (["--new-tokens", "1985"], "positions: at most 1984"),
            (["--window", "4096"], "window must be 2 to 2048"),
            (["--texts", "no/such/file"], "no texts at"),
            (["--output", "no/such/folder/drafter"], "there is no folder"),
            (["--dtype", "float8"], "no dtype"),
            (["--labels", "other"], "--labels must be target or text"),
            (["--start", "sums-draft"], "logits for 64 tokens, the target for 512"),
            (["--hidden-size", "64"], "--hidden-size can only be chosen for new weights"),
            (["--start", "none", "--hidden-size", "50", "--heads", "4"], "must divide"),
        ],
    )
    def test_mistakes_are_one_message(self, options: list[str], message: str) -> None:
        texts = [] if "--texts" in options else ["--texts", "zoo"]
        done = _invoke(*texts, *options)
        assert done.exit_code == 1, done.output
        assert message in " ".join(done.output.split())
