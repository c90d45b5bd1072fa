"""The ranked vocabulary's file, its options, and what is refused before anything loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from vllm_spec_plugins.config import read_options
from vllm_spec_plugins.context import ModelFacts
from vllm_spec_plugins.draft_vocabulary import (
    DraftVocabularyOptions,
    RankedList,
    RankedVocabulary,
    check,
    rank,
    tokenizer_fingerprint,
)
from vllm_spec_plugins.errors import ConfigError, SpecPluginsError
from vllm_spec_plugins.proposer import ProposerOptions
from vllm_spec_plugins.registry import Kind

ALWAYS = np.array([0, 2, 7])


def counted(**counts: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`[20]` counts: `t5=3` is three of token 5."""
    result = np.zeros(20, np.int64)
    for name, count in counts.items():
        result[int(name[1:])] = count
    return result


@pytest.fixture
def vocabulary() -> RankedVocabulary:
    counts = counted(t0=5, t5=50, t6=10, t9=30, t3=10, t19=1)
    return RankedVocabulary(20, ALWAYS, (rank("en", counts, ALWAYS, 5),), "print", "a test")


@pytest.fixture
def file(vocabulary: RankedVocabulary, tmp_path: Path) -> Path:
    path = tmp_path / "vocab.safetensors"
    vocabulary.write(path)
    return path


def facts(model: str = "nowhere", vocab_size: int = 20) -> ModelFacts:
    return ModelFacts(model, vocab_size, 8, 2, 128, 4)


def options(file: Path, **given: Any) -> DraftVocabularyOptions:
    return DraftVocabularyOptions(file=str(file), **given)


# --- ranking ---------------------------------------------------------------------------------


def test_ranked_by_falling_count_then_id(vocabulary: RankedVocabulary) -> None:
    (ranked,) = vocabulary.lists
    assert ranked.token_ids.tolist() == [5, 9, 3, 6, 19]
    assert ranked.counts.tolist() == [50, 30, 10, 10, 1]
    assert ranked.num_tokens == 106, "those always in are counted, not ranked"


def test_tokens_always_in_are_part_of_every_size(vocabulary: RankedVocabulary) -> None:
    (ranked,) = vocabulary.lists
    assert vocabulary.token_ids(ranked).tolist() == [0, 2, 5, 7, 9]
    assert vocabulary.token_ids(ranked, 4).tolist() == [0, 2, 5, 7]
    assert vocabulary.token_ids(ranked, 100).tolist() == [0, 2, 3, 5, 6, 7, 9, 19]
    assert [vocabulary.size_of(ranked, size) for size in (None, 4, 100)] == [5, 4, 8]
    assert vocabulary.coverage(ranked, 4) == pytest.approx(55 / 106)
    assert vocabulary.coverage(ranked, 8) == 1


# --- the file --------------------------------------------------------------------------------


def test_reads_what_it_wrote(vocabulary: RankedVocabulary, file: Path) -> None:
    found = RankedVocabulary.read(file)
    assert found.always.tolist() == ALWAYS.tolist()
    assert (found.vocab_size, found.tokenizer, found.description) == (20, "print", "a test")
    (before,), (after,) = vocabulary.lists, found.lists
    assert after.token_ids.tolist() == before.token_ids.tolist()
    assert after.counts.tolist() == before.counts.tolist()
    assert (after.name, after.num_tokens, after.recommended_size) == ("en", 106, 5)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecPluginsError, match=r"there is no file .*vllm-spec calibrate vocab"):
        RankedVocabulary.read(tmp_path / "none")
    text = tmp_path / "text"
    text.write_text("no safetensors")
    with pytest.raises(SpecPluginsError, match="cannot be read as safetensors"):
        RankedVocabulary.read(text)
    weights = tmp_path / "weights"
    save_file({"weight": np.zeros(2)}, weights)
    with pytest.raises(SpecPluginsError, match="holds something else"):
        RankedVocabulary.read(weights)


@pytest.mark.parametrize(
    ("token_ids", "counts", "problem"),
    [
        ([5, 5], [2, 1], "names a token twice"),
        ([5, 7], [2, 1], "names a token twice"),  # always in already
        ([5, 20], [2, 1], "outside the vocabulary"),
        ([5, -1], [2, 1], "outside the vocabulary"),
        ([5, 6], [1, 2], "do not fall"),
        ([5, 6], [1], "do not fall"),
    ],
)
def test_damaged_lists_are_refused(
    token_ids: list[int], counts: list[int], problem: str, tmp_path: Path
) -> None:
    ranked = RankedList("en", np.array(token_ids), np.array(counts), 3, 5)
    RankedVocabulary(20, ALWAYS, (ranked,), "", "").write(tmp_path / "v")
    with pytest.raises(SpecPluginsError, match=rf"is damaged: .*{problem}"):
        RankedVocabulary.read(tmp_path / "v")


def test_an_incomplete_file_is_refused(file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    save_file({"always": ALWAYS}, file, metadata)
    with pytest.raises(SpecPluginsError, match="is incomplete"):
        RankedVocabulary.read(file)
    RankedVocabulary(20, ALWAYS, (), "", "").write(file)
    with pytest.raises(SpecPluginsError, match="holds no list"):
        RankedVocabulary.read(file)


# --- options ---------------------------------------------------------------------------------


class DraftingOptions(ProposerOptions):
    draft_vocabulary: DraftVocabularyOptions | None = None


def read(**given: Any) -> DraftingOptions:
    return read_options(Kind.PROPOSER, "drafting", DraftingOptions, given)


def test_a_string_is_a_file() -> None:
    assert read().draft_vocabulary is None
    assert read(draft_vocabulary="v") == read(draft_vocabulary={"file": "v"})
    given = read(draft_vocabulary={"file": "v", "size": 9, "dynamic_tokens": 3}).draft_vocabulary
    assert given is not None
    assert (given.file, given.size, given.dynamic_tokens) == ("v", 9, 3)


@pytest.mark.parametrize("value", ["v", {"file": "v", "size": 9}])
def test_options_survive_the_way_to_the_workers(value: Any) -> None:
    first = read(draft_vocabulary=value)
    assert read(**first.model_dump(mode="json", exclude_unset=True)) == first


@pytest.mark.parametrize(
    "value",
    [3, "", {}, {"file": "v", "size": "9"}, {"file": "v", "size": 0}, {"file": "v", "sise": 9},
     {"file": "v", "dynamic_tokens": -1}, {"file": "v", "dynamic_tokens": 1.5}],
)  # fmt: skip
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="draft_vocabulary"):
        read(draft_vocabulary=value)


# --- checks before anything loads ------------------------------------------------------------


def test_a_file_that_fits_passes(file: Path) -> None:
    check(options(file), facts())
    check(options(file, size=8, dynamic_tokens=11), facts())


def test_another_vocabulary_size_is_refused(file: Path) -> None:
    with pytest.raises(SpecPluginsError, match=r"a model of 20 tokens, nowhere has 32000\."):
        check(options(file), facts(vocab_size=32000))


def test_sizes_that_cannot_work_are_refused(file: Path) -> None:
    with pytest.raises(SpecPluginsError, match='"size" is 9, but only 8 tokens occurred'):
        check(options(file, size=9), facts())
    for size in (1, 3):  # no more than the control tokens
        with pytest.raises(SpecPluginsError, match="are too few"):
            check(options(file, size=size), facts())
    with pytest.raises(SpecPluginsError, match="no fewer than the whole vocabulary"):
        check(options(file, size=8, dynamic_tokens=12), facts())


def test_a_list_that_covers_less_than_half_is_refused(tmp_path: Path) -> None:
    counts = counted(t5=4, t6=3, t9=3)
    ranked = rank("en", counts, ALWAYS, 5)
    RankedVocabulary(20, ALWAYS, (ranked,), "", "").write(tmp_path / "v")
    check(options(tmp_path / "v", size=5), facts())
    with pytest.raises(SpecPluginsError, match=r'4 tokens of list "en" .* cover 40% .*ed: 5\.'):
        check(options(tmp_path / "v", size=4), facts())


def test_each_list_is_checked_at_its_own_size(tmp_path: Path) -> None:
    long = rank("en", counted(t5=9, t6=3, t9=3, t10=1), ALWAYS, 6)
    short = rank("zh", counted(t15=9), ALWAYS, 4)
    both = RankedVocabulary(20, ALWAYS, (long, short), "", "")
    both.write(tmp_path / "v")
    check(options(tmp_path / "v", size=7), facts())  # more than the short one has
    assert both.token_ids(short, 7).tolist() == [0, 2, 7, 15]
    with pytest.raises(SpecPluginsError, match="only 7 tokens occurred"):
        check(options(tmp_path / "v", size=8), facts())


# --- whose tokens they are -------------------------------------------------------------------


def write_tokenizer(folder: Path, vocab: Any, added: list[dict[str, Any]], **more: Any) -> str:
    folder.mkdir(exist_ok=True)
    content = {"model": {"vocab": vocab, **more}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    fingerprint = tokenizer_fingerprint(folder)
    assert fingerprint is not None
    return fingerprint


def test_fingerprint_is_of_ids_and_text(tmp_path: Path) -> None:
    end = {"id": 2, "content": "</s>"}
    first = write_tokenizer(tmp_path, {"a": 0, "b": 1}, [end], merges=["a b"])
    assert first == write_tokenizer(tmp_path, {"b": 1, "a": 0}, [{**end, "special": True}])
    assert first == write_tokenizer(tmp_path, [["a", -1.0], ["b", -2.0]], [end])  # Unigram
    assert first != write_tokenizer(tmp_path, {"a": 1, "b": 0}, [end])
    assert first != write_tokenizer(tmp_path, {"a": 0, "b": 1}, [{**end, "content": "<eos>"}])


def test_no_fingerprint_without_a_tokenizer_file(tmp_path: Path) -> None:
    assert tokenizer_fingerprint(tmp_path) is None
    assert tokenizer_fingerprint("someone/on-a-hub") is None
    (tmp_path / "tokenizer.json").write_text("{")
    assert tokenizer_fingerprint(tmp_path) is None


def test_another_tokenizer_is_refused(vocabulary: RankedVocabulary, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    fingerprint = write_tokenizer(folder, {"a": 0}, [])
    for tokenizer in (fingerprint, ""):  # "": made for a model without a tokenizer.json
        made = RankedVocabulary(20, ALWAYS, vocabulary.lists, tokenizer, "made for it")
        made.write(tmp_path / "v")
        check(options(tmp_path / "v"), facts(str(folder)))
    vocabulary.write(tmp_path / "v")
    with pytest.raises(SpecPluginsError, match=r"another tokenizer than that of .*\(a test\)"):
        check(options(tmp_path / "v"), facts(str(folder)))
    check(options(tmp_path / "v"), facts("someone/on-a-hub"))
