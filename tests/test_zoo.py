"""The zoo: corpus, tokenizer, training, cache and expansion, on a recipe that trains in seconds."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.text import Text

from vllm_spec_plugins import zoo
from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.zoo import build, cache, corpus, progress
from vllm_spec_plugins.zoo.bigram import start_from_bigrams
from vllm_spec_plugins.zoo.evaluation import evaluate
from vllm_spec_plugins.zoo.expansion import ExpansionError, expand, verify_identical
from vllm_spec_plugins.zoo.hugging_face import load_model
from vllm_spec_plugins.zoo.loss import head_cross_entropy
from vllm_spec_plugins.zoo.model import Llama, hidden_matrices
from vllm_spec_plugins.zoo.muon import Muon, orthogonalise
from vllm_spec_plugins.zoo.progress import training_progress
from vllm_spec_plugins.zoo.recipes import RECIPES, TextRecipe
from vllm_spec_plugins.zoo.tokenizer import encode_files, train_tokenizer
from vllm_spec_plugins.zoo.training import batch_of_step, schedule, train


def _tiny() -> TextRecipe:
    recipe = RECIPES["tiny"]
    assert isinstance(recipe, TextRecipe)
    return recipe


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def cache_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this file's own; `tiny` and `expanded-tiny` are built in it once."""
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.CACHE_VARIABLE, str(root))
        yield root


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for one test."""
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def tiny_folder(cache_root: Path) -> Path:
    """`tiny`, built."""
    folder = zoo.ensure("tiny", threads=1)
    assert folder.is_relative_to(cache_root)
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Llama:
    """The weights of `tiny`."""
    return load_model(_tiny().architecture, tiny_folder)


def _tokens(count: int, vocabulary: int = 512, seed: int = 0) -> np.ndarray[Any, Any]:
    """Tokens of which each says much about the next."""
    generator = np.random.default_rng(seed)
    steps = generator.integers(0, 4, count)
    return np.cumsum(steps * 7 + 1) % vocabulary


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


class TestCorpus:
    def test_held_out_files_are_apart_sorted_and_about_one_in_twenty(self) -> None:
        held_out, training = corpus.held_out_files(), corpus.training_files()
        paths = [file.path for file in held_out]
        assert paths == sorted(paths)
        assert not {file.path for file in training} & set(paths)
        assert 0.02 < len(held_out) / (len(held_out) + len(training)) < 0.08

    def test_the_split_is_by_path_alone(self) -> None:
        # sha1("base64.py") % 20 == 0 and sha1("ast.py") % 20 != 0, whatever they contain.
        assert corpus.SourceFile("base64.py", "anything").held_out
        assert not corpus.SourceFile("ast.py", "anything").held_out

    def test_only_readable_source_of_some_length(self, tmp_path: Path) -> None:
        for path, content in {
            "good.py": b"x = 1\n" * 100,
            "deep/good.py": b"y = 2\n" * 100,
            "short.py": b"x = 1\n",
            "notes.txt": b"x = 1\n" * 100,
            "latin.py": b"\xe9" * 1000,
            "test/test_x.py": b"x = 1\n" * 100,
            "site-packages/foreign.py": b"x = 1\n" * 100,
        }.items():
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_bytes(content)
        assert [f.path for f in corpus.source_files(tmp_path)] == ["deep/good.py", "good.py"]

    def test_a_python_without_its_source_is_said_to_be_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _: str(tmp_path))
        with pytest.raises(corpus.CorpusError, match="standard library"):
            corpus.source_files.__wrapped__()


class TestTokenizer:
    texts = [file.text for file in corpus.held_out_files()[:12]]

    def test_round_trip_of_anything(self) -> None:
        tokenizer = train_tokenizer(self.texts, 512)
        for text in (*self.texts[:3], "naïve \x00 字\t\n\n   x", "def  f( ):  # x ."):
            assert tokenizer.decode(tokenizer.encode(text).ids) == text

    def test_same_texts_same_tokenizer(self) -> None:
        first, second = (train_tokenizer(self.texts, 1024).to_str() for _ in range(2))
        assert first == second
        assert train_tokenizer(self.texts[1:], 1024).to_str() != first

    def test_too_little_text_is_refused(self) -> None:
        with pytest.raises(ValueError, match="not 8192"):
            train_tokenizer(["x = 1"], 8192)

    def test_files_stand_between_begin_and_end(self) -> None:
        tokenizer = train_tokenizer(self.texts, 512)
        ids = encode_files(tokenizer, ["a", "b"]).tolist()
        assert (ids[0], ids[2], ids[3], ids[5]) == (1, 2, 1, 2)
        assert len(ids) == 6


class TestLoss:
    @pytest.mark.parametrize("rows", [1, 512, 700])
    def test_value_and_gradients_are_cross_entropys(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(rows)
        hidden = torch.randn(rows, 16, generator=generator, requires_grad=True)
        head = torch.randn(97, 16, generator=generator, requires_grad=True)
        targets = torch.randint(97, (rows,), generator=generator)
        weights = torch.rand(rows, generator=generator)
        loss, losses = head_cross_entropy(hidden, head, targets, weights, torch.float32)
        (3 * loss).backward()
        ours = hidden.grad, head.grad
        hidden.grad = head.grad = None
        expected = F.cross_entropy(hidden @ head.T, targets, reduction="none")
        (3 * (expected * weights).sum()).backward()
        torch.testing.assert_close(losses, expected.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(loss.detach(), (expected * weights).sum().detach())
        for mine, theirs in zip(ours, (hidden.grad, head.grad), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)

    def test_in_bfloat16_it_is_near(self) -> None:
        hidden, head = torch.randn(64, 16), torch.randn(97, 16)
        targets, weights = torch.randint(97, (64,)), torch.full((64,), 1 / 64)
        low, _ = head_cross_entropy(hidden, head, targets, weights, torch.bfloat16)
        high, _ = head_cross_entropy(hidden, head, targets, weights, torch.float32)
        assert low.item() == pytest.approx(high.item(), rel=0.02)


class TestMuon:
    def test_orthogonalise_keeps_the_directions_and_evens_the_strengths(self) -> None:
        x = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
        left, values, right = torch.linalg.svd(x, full_matrices=False)
        after = left.mT @ orthogonalise(x) @ right.mT
        strengths = after.diagonal(dim1=1, dim2=2)
        assert (values.amax(1) / values.amin(1)).min() > 2
        assert ((strengths > 0.5) & (strengths < 1.3)).all()
        torch.testing.assert_close(after, torch.diag_embed(strengths), atol=1e-4, rtol=0)

    def test_it_is_torchs_muon(self) -> None:
        generator = torch.Generator().manual_seed(1)
        for shape in ((32, 32), (48, 24), (24, 48)):
            start = torch.randn(shape, generator=generator)
            ours, theirs = (start.clone().requires_grad_() for _ in range(2))
            mine = Muon([(ours, [shape[0]])], lr=0.02)
            reference = torch.optim.Muon([theirs], lr=0.02, adjust_lr_fn="original")
            for _ in range(3):
                ours.grad = torch.randn(shape, generator=generator)
                theirs.grad = ours.grad.clone()
                mine.step()
                reference.step()
            # theirs computes in bfloat16: three significant digits of an update of 0.02
            torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)

    def test_stacked_matrices_are_updated_one_by_one(self) -> None:
        generator = torch.Generator().manual_seed(2)
        parts = [torch.randn(rows, 8, generator=generator) for rows in (8, 4, 4)]
        stacked = torch.cat(parts).requires_grad_()
        stacked.grad = torch.randn(stacked.shape, generator=generator)
        alone = [part.clone().requires_grad_() for part in parts]
        for part, gradient in zip(alone, stacked.grad.split([8, 4, 4]), strict=True):
            part.grad = gradient.clone()
        Muon([(stacked, [8, 4, 4])], lr=0.1).step()
        Muon([(part, [len(part)]) for part in alone], lr=0.1).step()
        torch.testing.assert_close(stacked, torch.cat(alone))


class TestTraining:
    def test_every_batch_is_a_function_of_its_step(self) -> None:
        tokens = np.arange(10_000)
        first, again = (batch_of_step(tokens, 3, _tiny()) for _ in range(2))
        assert first.shape == (4, 65)
        assert (first == again).all()
        assert (np.diff(first, axis=1) == 1).all()

    def test_one_pass_shows_each_window_once(self) -> None:
        tokens = np.arange(64 * 41 + 1)  # 40 windows: ten steps
        starts = [batch_of_step(tokens, step, _tiny())[:, 0] for step in range(20)]
        first, second = np.concatenate(starts[:10]), np.concatenate(starts[10:])
        assert (np.diff(np.sort(first)) == 64).all()
        assert (np.diff(np.sort(second)) == 64).all()
        assert not (first == second).all()

    def test_the_learning_rate_rises_stays_and_falls(self) -> None:
        recipe = dataclasses.replace(_tiny(), steps=100)
        rates = [schedule(step, recipe.steps) for step in range(100)]
        assert rates[0] < rates[3] < rates[4] == rates[30] == 1
        assert all(a > b for a, b in itertools.pairwise(rates[30:]))
        assert 0.02 < rates[-1] < 0.05

    def test_it_learns(self, tmp_path: Path) -> None:
        recipe = dataclasses.replace(_tiny(), steps=60)
        trained = train(recipe, _tokens(20_000), torch.float32, tmp_path / "checkpoint.pt")
        assert len(trained.losses) == 60
        # 512 tokens are too many for a table of rank 62, so the layers must do the rest.
        assert trained.losses[-1] < trained.losses[0] - 1
        assert trained.losses[-1] > np.log(4)  # four equally likely followers: the best possible

    def test_a_killed_training_goes_on_and_gives_the_same_weights(self, tmp_path: Path) -> None:
        recipe, tokens = _tiny(), _tokens(20_000)
        whole = train(recipe, tokens, torch.float32, tmp_path / "whole.pt")

        def kill_at_12(done: int, loss: float) -> None:
            del loss
            if done == 12:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(recipe, tokens, torch.float32, tmp_path / "killed.pt", kill_at_12)
        resumed = train(recipe, tokens, torch.float32, tmp_path / "killed.pt")
        assert (whole.resumed_at, resumed.resumed_at) == (0, 10)
        assert resumed.losses == whole.losses
        for name, weight in whole.model.export().items():
            assert torch.equal(weight, resumed.model.export()[name]), name

    def test_bfloat16_is_near_float32(self, tmp_path: Path) -> None:
        losses = [
            train(_tiny(), _tokens(20_000), dtype, tmp_path / f"{dtype}.pt").losses
            for dtype in (torch.bfloat16, torch.float32)
        ]
        assert losses[0] != losses[1]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)

    def test_another_seed_gives_other_weights(self, tmp_path: Path) -> None:
        one, other = (
            train(
                dataclasses.replace(_tiny(), steps=2, seed=seed),
                _tokens(20_000),
                torch.float32,
                tmp_path / f"{seed}.pt",
            )
            for seed in (0, 1)
        )
        assert not torch.equal(one.model.head, other.model.head)

    def test_the_bigram_start_predicts_bigrams(self) -> None:
        generator = torch.Generator().manual_seed(0)
        model = Llama(_tiny().architecture)
        model.initialise(generator)
        others = _tokens(257, vocabulary=64, seed=5)
        before = evaluate(model, others, ())[-1].cross_entropy
        start_from_bigrams(model, _tokens(20_000, vocabulary=64), generator)
        after = evaluate(model, others, ())[-1].cross_entropy
        assert before == pytest.approx(np.log(512), abs=0.5)
        assert after == pytest.approx(np.log(4), abs=0.1)  # four equally likely followers


class TestEvaluation:
    def test_against_a_direct_computation(self) -> None:
        model = Llama(_tiny().architecture)
        model.initialise(torch.Generator().manual_seed(0))
        tokens = _tokens(65)
        first, last = evaluate(model, tokens, (1,), length=64)
        assert (first.layers, last.layers) == (1, 2)
        assert last.agreement == 1
        with torch.no_grad():
            early, final = model(torch.from_numpy(tokens[None, :-1]), (1,))
            logits = [states[0] @ model.head.T for states in (early, final)]
        targets = torch.from_numpy(tokens[1:])
        expected = [F.cross_entropy(at, targets).item() for at in logits]
        assert [first.cross_entropy, last.cross_entropy] == pytest.approx(expected)
        agreement = (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean().item()
        assert first.agreement == pytest.approx(agreement)


class TestEnsure:
    def test_the_folder_is_complete(self, tiny_folder: Path) -> None:
        assert {path.name for path in tiny_folder.iterdir()} == {
            "card.json",
            "config.json",
            "manifest.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert tiny_folder.name.startswith("tiny-")
        left = {path.name for path in tiny_folder.parent.glob(".tiny*")}
        assert left == {f".{tiny_folder.name}.lock"}

    def test_the_card_says_what_was_measured(self, tiny_folder: Path) -> None:
        card = zoo.card("tiny")
        assert card == json.loads((tiny_folder / "card.json").read_text())
        assert [exit_["layers"] for exit_ in card["held_out"]] == [1, 2]
        assert len(card["training_loss"]) == _tiny().steps
        assert card["parameters"] == _tiny().architecture.num_parameters
        assert card["seconds"] > 0
        assert card["versions"]["torch"] == torch.__version__

    def test_the_second_time_nothing_is_trained(
        self, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(build, "_train", None)
        assert zoo.ensure("tiny") == tiny_folder

    def test_the_number_of_parameters(self, tiny: Llama) -> None:
        assert sum(p.numel() for p in tiny.parameters()) == _tiny().architecture.num_parameters

    def test_killed_anywhere_it_goes_on_to_the_same_file(
        self, tiny_folder: Path, empty_cache: Path
    ) -> None:
        code = (
            "import os, signal\n"
            "from vllm_spec_plugins import zoo\n"
            "from vllm_spec_plugins.zoo import training\n"
            "write, left = training.write_atomically, [2]\n"
            "def die_after_two(path, fill):\n"
            "    write(path, fill)\n"
            "    left[0] -= 1\n"
            "    if not left[0]:\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "training.write_atomically = die_after_two\n"
            "zoo.ensure('tiny', threads=1)\n"
        )
        assert _python(code).returncode == -signal.SIGKILL
        folder = empty_cache / "zoo" / tiny_folder.name
        assert not folder.exists()
        assert zoo.ensure("tiny", threads=1) == folder
        assert json.loads((folder / "card.json").read_text())["resumed_at"] == 10
        assert _sha256(folder / "model.safetensors") == _sha256(tiny_folder / "model.safetensors")

    def test_the_name_changes_with_all_that_decides_the_weights(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = _tiny()
        names, bfloat16 = {build.folder_name(recipe)}, build.has_bfloat16_units()
        names.add(build.folder_name(dataclasses.replace(recipe, seed=1)))
        names.add(build.folder_name(dataclasses.replace(recipe, steps=21)))
        names.add(build.folder_name(dataclasses.replace(recipe, minutes=9, summary="reworded")))
        expanded = {build.folder_name(RECIPES["expanded-tiny"])}
        for module, name, value in (
            (corpus, "digest", lambda: "other"),
            (build, "_minor_version", lambda _: "0.0"),
            (build, "has_bfloat16_units", lambda: not bfloat16),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, value)
                names.add(build.folder_name(recipe))
                expanded.add(build.folder_name(RECIPES["expanded-tiny"]))
        assert len(names) == 6
        assert len(expanded) == 4

    def test_an_unknown_model_is_named_with_its_neighbour(self) -> None:
        with pytest.raises(SpecPluginsError, match=r'no model "nanno".*Did you mean "nano"'):
            zoo.ensure("nanno")
        with pytest.raises(SpecPluginsError, match=r"Known: .*expanded, "):
            zoo.describe("xyz")

    @pytest.mark.parametrize("name", sorted(RECIPES))
    def test_each_is_described(self, name: str) -> None:
        text = zoo.describe(name)
        assert text.startswith(f"{name}: ")
        assert text.endswith(" MB")
        assert f"about {RECIPES[name].minutes:g} minutes" in text
        assert ("cost device" in text or name == "expanded-tiny") == name.startswith("expanded")

    def test_importing_it_loads_no_heavy_module(self) -> None:
        code = (
            "import sys, vllm_spec_plugins.zoo\n"
            "heavy = {'torch', 'transformers', 'tokenizers', 'vllm', 'numpy', 'rich'}\n"
            "print(sorted(heavy & set(sys.modules)))"
        )
        result = _python(code)
        assert result.stdout.strip() == "[]", result.stderr

    def test_the_command_prints_folders_and_nothing_else(self, tiny_folder: Path) -> None:
        command = [sys.executable, "-m", "vllm_spec_plugins.zoo"]
        result = subprocess.run(
            [*command, "tiny"], capture_output=True, text=True, check=True, env=os.environ
        )
        assert result.stdout == f"{tiny_folder}\n"
        wrong = subprocess.run([*command, "tinny"], capture_output=True, text=True, check=False)
        assert wrong.returncode == 2
        assert 'Did you mean "tiny"' in wrong.stderr
        assert not wrong.stdout


class TestProgress:
    def test_a_bar_with_the_time_left_on_a_terminal(self) -> None:
        console = Console(file=io.StringIO(), force_terminal=True, width=120)
        with training_progress("nano", 40, console) as on_step:
            on_step(10, 4.567)
        assert isinstance(console.file, io.StringIO)
        shown = Text.from_ansi(console.file.getvalue()).plain
        assert "training nano" in shown
        assert "10/40" in shown
        assert "loss 4.57" in shown
        assert "left" in shown

    def test_a_line_now_and_then_elsewhere(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        console = Console(file=io.StringIO(), force_terminal=False)
        seconds = iter([0, 10, 35, 65])
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
        with caplog.at_level("INFO"), training_progress("nano", 40, console) as on_step:
            on_step(1, 5.0)  # after 10 seconds: too early
            on_step(2, 4.0)  # after 35
            on_step(3, 3.0)  # 30 seconds later
        lines = [record.getMessage() for record in caplog.records]
        assert [line.split(": ")[1] for line in lines] == [
            "step 2 of 40, loss 4.00",
            "step 3 of 40, loss 3.00",
        ]
        assert console.file.getvalue() == ""  # pyright: ignore[reportAttributeAccessIssue]


class TestCache:
    @staticmethod
    def _write(folder: Path, unfinished: Path) -> None:
        del unfinished
        (folder / "weights").write_text("the weights")

    def test_where_it_is(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "own"))
        assert cache.cache_folder() == tmp_path / "own" / "zoo"
        monkeypatch.delenv(cache.CACHE_VARIABLE)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache.cache_folder() == tmp_path / "xdg" / "vllm-spec-plugins" / "zoo"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache.cache_folder() == tmp_path / ".cache" / "vllm-spec-plugins" / "zoo"

    @pytest.mark.usefixtures("empty_cache")
    @pytest.mark.parametrize("harm", ["change", "remove", "manifest"])
    def test_a_damaged_folder_is_built_again(
        self, harm: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = cache.obtain("model", self._write)
        assert cache.intact(folder)
        if harm == "change":
            (folder / "weights").write_text("the weighty")
        else:
            (folder / {"remove": "weights", "manifest": "manifest.json"}[harm]).unlink()
        assert not cache.intact(folder)
        assert cache.obtain("model", self._write) == folder
        assert cache.intact(folder)
        assert (folder / "weights").read_text() == "the weights"
        assert "building it again" in caplog.text

    def test_a_failed_build_leaves_no_folder_but_its_unfinished_work(
        self, empty_cache: Path
    ) -> None:
        def fail(folder: Path, unfinished: Path) -> None:
            (folder / "weights").write_text("half")
            (unfinished / "checkpoint").write_text("step 7")
            raise RuntimeError("killed")

        def go_on(folder: Path, unfinished: Path) -> None:
            assert not list(folder.iterdir())
            (folder / "weights").write_text((unfinished / "checkpoint").read_text())

        with pytest.raises(RuntimeError, match="killed"):
            cache.obtain("model", fail)
        assert not (empty_cache / "zoo" / "model").exists()
        assert (cache.obtain("model", go_on) / "weights").read_text() == "step 7"

    @pytest.mark.usefixtures("empty_cache")
    def test_of_two_at_once_one_builds_and_the_other_waits(self) -> None:
        building, waiting = threading.Event(), threading.Event()
        builds: list[str] = []

        def slow(folder: Path, unfinished: Path) -> None:
            builds.append("first")
            building.set()
            assert waiting.wait(20)
            self._write(folder, unfinished)

        def never(folder: Path, unfinished: Path) -> None:
            del folder, unfinished
            builds.append("second")

        first = threading.Thread(target=cache.obtain, args=("model", slow))
        first.start()
        assert building.wait(20)
        folder = cache.obtain("model", never, on_wait=waiting.set)
        first.join()
        assert builds == ["first"]
        assert waiting.is_set()
        assert cache.intact(folder)


class TestExpansion:
    def test_the_built_one_computes_what_its_source_computes(self, tiny: Llama) -> None:
        folder = zoo.ensure("expanded-tiny", threads=1)
        card = zoo.card("expanded-tiny")
        config = json.loads((folder / "config.json").read_text())
        shape = dataclasses.replace(
            RECIPES["expanded-tiny"].architecture, rms_norm_eps=config["rms_norm_eps"]
        )
        wide = load_model(shape, folder)
        assert card["parameters"] == sum(p.numel() for p in wide.parameters())
        assert card["parameters"] > 10 * tiny.shape.num_parameters
        assert "cost device" in zoo.describe("expanded-tiny") or card["cost_device"]
        tokens = torch.randint(4, 512, (2, 100), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            narrow_exits = [h @ tiny.head.T for h in tiny(tokens, (1,))]
            wide_exits = [h @ wide.head.T for h in wide(tokens, (2,))]
        for narrow, expanded in zip(narrow_exits, wide_exits, strict=True):
            torch.testing.assert_close(narrow, expanded, atol=1e-4, rtol=0)
            assert torch.equal(narrow.argmax(-1), expanded.argmax(-1))
        assert card["largest_logit_difference"] < 1e-4

    @pytest.mark.parametrize("part", ["layers.1.down", "layers.0.mlp_norm", "head"])
    def test_a_difference_is_refused(self, tiny: Llama, part: str) -> None:
        wide = expand(tiny, RECIPES["expanded-tiny"].architecture, seed=0)
        tokens = torch.randint(4, 512, (2, 100), generator=torch.Generator().manual_seed(3))
        assert verify_identical(tiny, wide, tokens) < 1e-4
        with torch.no_grad():
            wide.get_parameter(part)[:64].add_(0.01)
        with pytest.raises(ExpansionError, match="not identical"):
            verify_identical(tiny, wide, tokens)

    @pytest.mark.parametrize(
        "change",
        [
            {"hidden_size": 128},  # square root of 2 is no power of two
            {"hidden_size": 96},
            {"num_layers": 3},
            {"num_heads": 2, "num_key_value_heads": 2},
            {"vocabulary": 1024},
            {"head_dim": 64},
            {"intermediate_size": 64},
        ],
    )
    def test_a_shape_that_cannot_hold_it_is_refused(
        self, tiny: Llama, change: dict[str, int]
    ) -> None:
        wide = dataclasses.replace(RECIPES["expanded-tiny"].architecture, **change)
        with pytest.raises(ExpansionError, match="cannot hold"):
            expand(tiny, wide, seed=0)


def test_transformers_reads_the_same_model(tiny: Llama, tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = corpus.held_out_files()[0].text[:600]
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.mask_token_id == 3
    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        *_, hidden = tiny(ids)
        torch.testing.assert_close(
            hidden @ tiny.head.T, theirs(input_ids=ids).logits, atol=2e-4, rtol=1e-4
        )


def test_the_fused_matrices_are_all_the_hidden_ones() -> None:
    model = Llama(_tiny().architecture)
    for parameter, blocks in hidden_matrices(model):
        assert sum(blocks) == len(parameter)
    inside = {id(parameter) for parameter, _ in hidden_matrices(model)}
    others = {name for name, p in model.named_parameters() if id(p) not in inside and p.ndim == 2}
    assert others == {"embedding", "head"}


@pytest.mark.slow
@pytest.mark.engine
def test_vllm_serves_it_and_its_expansion(tiny: Llama, tiny_folder: Path) -> None:
    expanded = zoo.ensure("expanded-tiny", threads=1)
    code = f"""
from vllm import LLM, SamplingParams
for folder in ({str(tiny_folder)!r}, {str(expanded)!r}):
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256)
    prompt = {{"prompt_token_ids": list(range(10, 40))}}
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    (result,) = llm.generate([prompt], greedy)
    print("TOKENS", list(result.outputs[0].token_ids))
    del llm
"""
    result = _python(
        code,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
    )
    served = [line for line in result.stdout.splitlines() if line.startswith("TOKENS")]
    ids = list(range(10, 40))
    with torch.no_grad():
        for _ in range(24):
            *_, hidden = tiny(torch.tensor([ids]))
            ids.append(int((hidden[0, -1] @ tiny.head.T).argmax()))
    assert served == [f"TOKENS {ids[30:]}"] * 2, result.stderr[-2000:]
