"""`vllm-spec calibrate vocab`: texts, counts, coverage, the file, and going on where it was."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, models
from typer.testing import CliRunner

from vllm_spec_plugins import zoo
from vllm_spec_plugins.calibration import generations, texts, vocabulary
from vllm_spec_plugins.calibration.generations import Engine, Sampling, generate
from vllm_spec_plugins.calibration.texts import Corpus, TextTokenizer, windows
from vllm_spec_plugins.calibration.vocabulary import Counted, Request, Row, SpeedModel
from vllm_spec_plugins.cli.main import app
from vllm_spec_plugins.context import ModelFacts
from vllm_spec_plugins.draft_vocabulary import (
    DraftVocabularyOptions,
    RankedVocabulary,
    check,
    rank,
)
from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.zoo import corpus as zoo_corpus

VOCAB_SIZE = 512


@pytest.fixture(scope="module")
def tiny() -> Path:
    return zoo.ensure("tiny", threads=1)


@pytest.fixture(scope="module")
def folder_of_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a megabyte of source code in small pieces, so that some are held out."""
    folder = tmp_path_factory.mktemp("texts")
    size = 0
    for number, file in enumerate(zoo_corpus.training_files()):
        (folder / f"{number}.txt").write_text(file.text[:4000])
        size += len(file.text[:4000])
        if size > 500_000:
            break
    return folder


def calibrate(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["calibrate", "vocab", *map(str, arguments)])


# --- the command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(folder_of_texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file the command makes of the folder for `tiny`."""
    output = tmp_path_factory.mktemp("made") / "vocab.safetensors"
    result = calibrate(
        "tiny", "--texts", folder_of_texts, "--dynamic-tokens", 8, "--output", output
    )
    assert result.exit_code == 0, result.output
    assert "recommended" in result.output
    return output


def test_file_has_the_counts_of_the_texts(tiny: Path, folder_of_texts: Path, made: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    counter: Counter[int] = Counter()
    for text in Corpus([str(folder_of_texts)]):
        if not text.held_out:
            counter.update(tokenizer.encode(text.text, add_special_tokens=False).ids)
    found = RankedVocabulary.read(made)
    (ranked,) = found.lists
    always = set(found.always.tolist())
    assert always == {0, 1, 2, 3}
    expected = sorted(
        ((token, count) for token, count in counter.items() if token not in always),
        key=lambda pair: (-pair[1], pair[0]),
    )
    assert list(zip(ranked.token_ids.tolist(), ranked.counts.tolist(), strict=True)) == expected
    assert ranked.num_tokens == counter.total()
    assert f"{counter.total():,} tokens of {folder_of_texts}" in found.description


def test_table_is_measured_on_what_was_not_counted(
    tiny: Path, folder_of_texts: Path, made: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    found = RankedVocabulary.read(made)
    (ranked,) = found.lists
    held_out = [
        tokenizer.encode(text.text, add_special_tokens=False).ids
        for text in Corpus([str(folder_of_texts)])
        if text.held_out
    ]
    assert held_out
    table = json.loads(made.with_suffix(".json").read_text())
    assert [row["size"] for row in table["rows"]][:5] == [32, 48, 64, 96, 128]
    for row in table["rows"]:
        inside = set(found.token_ids(ranked, row["size"]).tolist())
        assert len(inside) == row["size"]
        plain, dynamic = naive_coverage(held_out, inside, 8)
        assert row["text"] == pytest.approx(plain)
        assert row["text_dynamic"] == pytest.approx(dynamic)
        assert row["generated"] is None
    assert table["recommended_sizes"] == {"text": ranked.recommended_size}
    assert made.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def naive_coverage(
    parts: Sequence[Sequence[int]], inside: set[int], dynamic_tokens: int
) -> tuple[float, float]:
    plain = dynamic = 0
    for part in parts:
        recent: list[int] = []
        for token in part:
            plain += token in inside
            dynamic += token in inside or token in recent
            if token not in inside:
                recent = [token, *(t for t in recent if t != token)][:dynamic_tokens]
    total = sum(map(len, parts))
    return plain / total, dynamic / total


def test_target_takes_the_file_and_others_do_not(tiny: Path, made: Path) -> None:
    options = DraftVocabularyOptions(file=str(made))
    check(options, ModelFacts(str(tiny), VOCAB_SIZE, 64, 2, 256, 4))
    with pytest.raises(SpecPluginsError, match="made for a model of 512 tokens"):
        check(options, ModelFacts("other", 8192, 64, 2, 256, 4))


def test_nothing_unfinished_is_left(made: Path) -> None:
    suffixes = {path.suffix for path in made.parent.iterdir()}
    assert suffixes == {".safetensors", ".json", ".png"}
    assert len(list(made.parent.iterdir())) == 3


def test_lists_of_their_own_and_a_size(folder_of_texts: Path, tmp_path: Path) -> None:
    prose = tmp_path / "prose.jsonl"
    lines = [{"text": f"the quick brown fox jumps {i} times over the lazy dog"} for i in range(200)]
    prose.write_text("\n".join(map(json.dumps, lines)))
    output = tmp_path / "vocab.safetensors"
    result = calibrate(
        "tiny", "--list", f"code={folder_of_texts}", "--list", f"prose={prose}",
        "--size", 24, "--output", output,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = RankedVocabulary.read(output)
    assert [ranked.name for ranked in found.lists] == ["code", "prose"]
    assert [ranked.recommended_size for ranked in found.lists] == [24, 24]
    code, spoken = (set(ranked.token_ids[:20].tolist()) for ranked in found.lists)
    assert len(code & spoken) < 20
    sizes = {row["size"] for row in json.loads(output.with_suffix(".json").read_text())["rows"]}
    assert 24 in sizes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny",), "nothing to count"),
        (("tiny", "--texts", "zoo:held-out", "--list", "en"), 'NAME=SOURCE, got "en"'),
        (("tiny", "--texts", "nowhere"), 'no texts at "nowhere"'),
        (("tinny", "--texts", "zoo"), 'Did you mean "tiny"'),
        (("tiny", "--texts", "zoo", "--output", "vocab.json"), "must end in .safetensors"),
    ],
)
def test_errors_in_words(arguments: tuple[str, ...], message: str) -> None:
    result = calibrate(*arguments)
    assert result.exit_code == 1
    assert message in result.output


def test_too_little_text_and_sizes_it_cannot_have(folder_of_texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "vocab.safetensors"
    one = next(folder_of_texts.iterdir())
    result = calibrate("tiny", "--texts", one, "--output", output)
    assert result.exit_code == 1
    assert "too few texts" in result.output
    for size in (4, 513):
        result = calibrate("tiny", "--texts", folder_of_texts, "--size", size, "--output", output)
        assert result.exit_code == 1
        assert "can have 5 to" in result.output


# --- going on where it was -------------------------------------------------------------------


def test_a_killed_count_goes_on(
    tiny: Path, folder_of_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "_BATCH", 50_000)
    monkeypatch.setattr(vocabulary, "_SAVE_EVERY", 0.0)
    tokenizer, corpus = TextTokenizer(tiny), Corpus([str(folder_of_texts)])

    def counted(state: Path, key: str = "k") -> Counted:
        return vocabulary.count(tokenizer, corpus, VOCAB_SIZE, state, key)

    whole = counted(tmp_path / "whole")
    read: list[int] = []
    add = Counted.add

    def add_three_times(self: Counted, tokenizer: TextTokenizer, texts: Sequence[Any]) -> None:
        if len(read) == 3:
            raise KeyboardInterrupt
        read.append(len(texts))
        add(self, tokenizer, texts)

    state = tmp_path / "state"
    with monkeypatch.context() as patch:
        patch.setattr(Counted, "add", add_three_times)
        with pytest.raises(KeyboardInterrupt):
            counted(state)

    def add_and_note(self: Counted, tokenizer: TextTokenizer, texts: Sequence[Any]) -> None:
        read.append(len(texts))
        add(self, tokenizer, texts)

    monkeypatch.setattr(Counted, "add", add_and_note)
    resumed = counted(state)
    assert sum(read) == whole.num_texts, "no text is read twice"
    assert resumed.counts.tolist() == whole.counts.tolist()
    assert [part.tolist() for part in resumed.held_out] == [p.tolist() for p in whole.held_out]

    del read[:]
    counted(state, key="another tokenizer")
    assert sum(read) == whole.num_texts, "what another tokenizer counted is not taken"


def test_a_changed_corpus_is_counted_anew(folder_of_texts: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder_of_texts, tmp_path / "copy")
    before = Corpus([str(copy)]).fingerprint
    assert Corpus([str(copy)]).fingerprint == before
    (copy / "0.txt").write_text("something else")
    assert Corpus([str(copy)]).fingerprint != before


@pytest.fixture
def engine_starts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """A stand-in for vLLM: writes the prompt's first token so many times as it is long.

    Returns:
        Numbers of the prompts it was given, by chunk.
    """
    given: list[list[int]] = []

    @contextlib.contextmanager
    def running(
        model: Path,
        prompts: Sequence[NDArray[np.int64]],
        sampling: Sampling,
        engine: Engine,
        seed: int,
    ) -> Iterator[Any]:
        del model, sampling, engine, seed

        def complete(numbers: list[int]) -> list[list[int]]:
            given.append(numbers)
            return [[int(prompts[n][0])] * len(prompts[n]) for n in numbers]

        yield complete

    monkeypatch.setattr(generations, "_running", running)
    return given


def test_killed_generations_go_on(
    tiny: Path, tmp_path: Path, engine_starts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generations, "_CHUNK", 4)
    prompts = [np.full(1 + i % 3, i) for i in range(10)]
    expected = [prompt.tolist() for prompt in prompts]
    done: list[int] = []

    def stop_after_four(count: int) -> None:
        if count == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tiny, prompts, tmp_path, on_progress=stop_after_four)
    (file,) = tmp_path.iterdir()
    with file.open("a") as cut_short:
        cut_short.write('{"prompt": 4, "token_i')
    found = generate(tiny, prompts, tmp_path, on_progress=done.append)
    assert [token_ids.tolist() for token_ids in found] == expected
    assert engine_starts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert done == [4, 8, 10]

    generate(tiny, prompts, tmp_path)
    assert len(engine_starts) == 3, "nothing is left to do"
    generate(tiny, prompts, tmp_path, Sampling(temperature=0.5))
    generate(tiny, prompts[:9], tmp_path)
    assert len(list(tmp_path.iterdir())) == 3, "other sampling, other prompts: other files"


def test_the_models_own_text_ranks_first(
    folder_of_texts: Path, tmp_path: Path, engine_starts: list[list[int]]
) -> None:
    output = tmp_path / "vocab.safetensors"
    result = calibrate("tiny", "--texts", folder_of_texts, "--generations", 40, "--output", output)
    assert result.exit_code == 0, result.output
    assert sum(map(len, engine_starts)) == 40
    assert "model's own" in result.output
    found = RankedVocabulary.read(output)
    assert "written by the model" in found.description
    rows = json.loads(output.with_suffix(".json").read_text())["rows"]
    (file,) = tmp_path.glob("generations-*.jsonl")
    written = generations.read(file)
    often = Counter(int(token) for n in written if n % 10 for token in written[n])  # 4: held out
    (ranked,) = found.lists
    mixed = dict(zip(ranked.token_ids.tolist(), ranked.counts.tolist(), strict=True))
    assert calibrate("tiny", "--texts", folder_of_texts, "--output", output).exit_code == 0
    (ranked,) = RankedVocabulary.read(output).lists
    plain = dict(zip(ranked.token_ids.tolist(), ranked.counts.tolist(), strict=True))
    for token in (often.most_common(1)[0][0], int(ranked.token_ids[-1])):
        more_often = often[token] / often.total() > plain[token] / ranked.num_tokens
        assert (mixed[token] > plain[token]) == more_often
    assert all(0 <= row["generated"] <= row["generated_dynamic"] <= 1 for row in rows)


@pytest.mark.engine
def test_the_model_itself_generates(tiny: Path, folder_of_texts: Path, tmp_path: Path) -> None:
    """With vLLM, from the command line, twice: the second time it is not started."""
    output = tmp_path / "vocab.safetensors"
    command = [
        sys.executable, "-m", "vllm_spec_plugins.cli", "calibrate", "vocab", str(tiny),
        "--texts", str(folder_of_texts), "--generations", "20", "--max-tokens", "8",
        "--threads", "1", "--output", str(output),
    ]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr[-3000:]
    (file,) = tmp_path.glob("generations-*.jsonl")
    written = generations.read(file)
    assert sorted(written) == list(range(20))
    assert all(1 <= len(token_ids) <= 8 for token_ids in written.values())
    before = output.with_suffix(".json").read_bytes()
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 0
    assert "Loading" not in second.stderr
    assert output.with_suffix(".json").read_bytes() == before


# --- parts -----------------------------------------------------------------------------------


def test_control_tokens(tmp_path: Path) -> None:
    """What was added for control, chat and tools, and what ends a text; no reserved places."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "fox": 2}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["</s>", "<|reserved_special_token_7|>", "<unused3>"])
    tokenizer.add_tokens(["<tool_call>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(
        json.dumps({"eos_token_id": 3, "text_config": {"eos_token_id": 40}})
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [41, 9999]}))
    found = vocabulary.control_token_ids(tmp_path, TextTokenizer(tmp_path), VOCAB_SIZE)
    assert found.tolist() == [3, 6, 40, 41]


def test_weights_of_a_model(tiny: Path, tmp_path: Path) -> None:
    recipe = zoo.recipe("tiny")
    head = 4 * recipe.architecture.vocabulary * recipe.architecture.hidden_size
    body = 4 * recipe.architecture.num_parameters - 2 * head
    assert vocabulary.weights_of(tiny, VOCAB_SIZE) == (body, head)
    shutil.copy(tiny / "config.json", tmp_path)
    body, head = vocabulary.weights_of(tmp_path, VOCAB_SIZE)  # nothing but the config
    assert head == 2 * VOCAB_SIZE * 64
    assert body == 2 * 12 * 2 * 64 * 64


def test_predicted_speed_up() -> None:
    model = SpeedModel(body=80, head=20, vocab_size=100, draft_share=0.25, acceptance=0.5)
    emitted = 1 + 0.5 + 0.25 + 0.125 + 0.0625
    assert model.speed_up(100, 1.0) == pytest.approx(emitted / (1 + 4 * 0.4))
    assert model.speed_up(50, 1.0) == pytest.approx(emitted / (1 + 4 * 0.3))
    assert model.speed_up(50, 0.9) < model.speed_up(50, 1.0)


def test_the_largest_of_nearly_equal_sizes_is_recommended() -> None:
    speeds = {512: 1.0, 1024: 1.2, 2048: 1.19, 4096: 1.1}
    rows = [Row("en", size, 0.9, 0.9, None, None, speed) for size, speed in speeds.items()]
    assert vocabulary.recommend(rows) == 2048


def test_generated_text_weighs_as_much_as_there_is_of_it() -> None:
    text = np.array([900, 90, 10, 0, 0])
    little, much = np.array([0, 25, 0, 25, 0]), np.array([0, 500, 0, 500, 0])
    assert vocabulary._TOKENS_OF_TEXT * len(text) == 50
    mixed = vocabulary.merge(text, little)  # half of each law, of 1,050 tokens
    assert mixed.tolist() == [473, 310, 6, 263, 0]
    assert mixed.dtype == np.int64
    mixed = vocabulary.merge(text, much)
    assert mixed[1] > mixed[3] > mixed[0] > mixed[2] > mixed[4] == 0
    assert vocabulary.merge(text, np.zeros(5, np.int64)).tolist() == text.tolist()


def test_generations_are_measured_after_their_prompts() -> None:
    prompts = [np.array([i, i]) for i in range(11)]
    written = [np.array([i, 50]) for i in range(11)]
    counted, held_out = vocabulary.split_generations(prompts, written)
    assert [w[0] for w in counted] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [(r.token_ids.tolist(), r.start) for r in held_out] == [
        ([0, 0, 0, 50], 2),
        ([10, 10, 10, 50], 2),
    ]


@pytest.mark.parametrize("dynamic_tokens", [0, 1, 5])
@pytest.mark.parametrize("size", [8, 20])
def test_coverage(size: int, dynamic_tokens: int) -> None:
    random = np.random.default_rng(size)
    parts = [random.zipf(1.3, 200).clip(max=49) for _ in range(4)]
    always = np.array([0])
    counts = np.bincount(np.concatenate(parts[:2]), minlength=50)
    ranked = rank("en", counts, always, size)
    needed = vocabulary.smallest_size_with(ranked, always, 50)
    inside = {0, *ranked.token_ids[: size - 1].tolist()}
    requests = [Request(part) for part in parts]
    naive = naive_coverage([part.tolist() for part in parts], inside, dynamic_tokens)
    found = vocabulary.coverage(needed, requests, size, dynamic_tokens)
    assert found == pytest.approx(naive[1 if dynamic_tokens else 0])
    assert vocabulary.coverage(needed, [], size, dynamic_tokens) == 0


def test_a_prompts_tokens_are_dynamic_and_not_counted() -> None:
    needed = np.array([1, 9, 9, 9])  # a vocabulary of 1 has token 0
    request = Request(np.array([1, 0, 0, 2, 1, 3, 2, 0]), start=3)
    assert vocabulary.coverage(needed, [request], 1, 0) == pytest.approx(1 / 5)
    assert vocabulary.coverage(needed, [request], 1, 2) == pytest.approx(2 / 5)
    assert vocabulary.coverage(needed, [request], 1, 3) == pytest.approx(3 / 5)


def test_long_files_are_cut_at_ends_of_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_PIECE", 100)
    text = "".join(f"line {i} of a long file\n" for i in range(60)) + "the end"
    (tmp_path / "long.md").write_text(text)
    found = list(Corpus([str(tmp_path / "long.md")]))
    assert "".join(t.text for t in found) == text
    assert all(t.text.endswith("\n") for t in found[:-1])
    assert sum(t.num_bytes for t in found) == Corpus([str(tmp_path)]).num_bytes == len(text)
    assert 0 < sum(t.held_out for t in found) < len(found) / 2


def test_sources(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.jsonl").write_text('{"text": "first"}\n\n{"prompt": "second", "id": 3}\n')
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "d.txt").write_text("unseen")
    assert [t.text for t in Corpus([str(tmp_path)])] == ["plain", "first", "second"]
    with pytest.raises(SpecPluginsError, match="not a UTF-8 text"):
        list(Corpus([str(tmp_path / "c.bin")]))
    for line in ("[1]", '{"txt": 1}', "{"):
        (tmp_path / "b.jsonl").write_text('{"text": "first"}\n' + line)
        with pytest.raises(SpecPluginsError, match="line 2"):
            list(Corpus([str(tmp_path / "b.jsonl")]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpecPluginsError, match="holds no files"):
        Corpus([str(tmp_path / "empty")])


def test_the_zoos_corpus_is_split_as_its_models_were_trained() -> None:
    every, held_out = list(Corpus(["zoo"])), list(Corpus(["zoo:held-out"]))
    assert [t.text for t in held_out] == [f.text for f in zoo_corpus.held_out_files()]
    assert [t.text for t in every if t.held_out] == [t.text for t in held_out]
    assert len(every) == len(zoo_corpus.source_files())


def test_windows(tiny: Path) -> None:
    tokenizer = TextTokenizer(tiny)
    long, short = "def f(x):\n    return x\n" * 40, "x = 1\n"
    (ids,) = tokenizer.encode([long])
    found = list(windows(tokenizer, [long, short], 32))
    assert [len(window) for window in found] == [32] * (len(ids) // 32)
    assert np.concatenate(found).tolist() == ids[: len(found) * 32].tolist()
    kept = list(windows(tokenizer, [long, short], 32, shortest=1))
    assert np.concatenate(kept).tolist() == np.concatenate(tokenizer.encode([long, short])).tolist()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecPluginsError, match=r"has neither a tokenizer\.json nor"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(SpecPluginsError, match="transformers cannot load"):
        TextTokenizer(tmp_path)


def test_transformers_serves_where_there_is_no_tokenizer_json(tmp_path: Path) -> None:
    """A word-piece vocabulary: the older format."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokenizer = TextTokenizer(tmp_path)
    assert [ids.tolist() for ids in tokenizer.encode(["the fox", "fox"])] == [[5, 6], [6]]
    assert tokenizer.encode(["fox"], special_tokens=True)[0].tolist() == [2, 6, 3]
    assert set(tokenizer.added_tokens()) == {0, 1, 2, 3, 4}
