"""Labels by people and by mining, the head's training, and what the command says about it."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from typer.testing import CliRunner

from vllm_spec_plugins import zoo
from vllm_spec_plugins.calibration.hugging_face import LocalModel
from vllm_spec_plugins.calibration.judge_labels import (
    ERROR,
    HARMLESS,
    UNKNOWN,
    LabelledText,
    digest,
    read_labels,
    without,
)
from vllm_spec_plugins.calibration.judge_mining import Miner, Target
from vllm_spec_plugins.calibration.judge_training import (
    Tokens,
    fit,
    quality,
    read_tokens,
    roc,
    split,
    threshold_for,
    train,
)
from vllm_spec_plugins.calibration.memo import Memo, memo_key
from vllm_spec_plugins.calibration.outcome_checker import Checker
from vllm_spec_plugins.calibration.texts import TextTokenizer
from vllm_spec_plugins.cli.calibrate_judge import tool_calls
from vllm_spec_plugins.cli.main import app
from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.judge_head import JudgeHead
from vllm_spec_plugins.zoo.sums import digest as digest_of_task
from vllm_spec_plugins.zoo.sums import final_answer, solve, sums, train_word_tokenizer

# --- the task ------------------------------------------------------------------------------------


def test_solutions_of_the_task_are_right() -> None:
    tasks = list(sums(seed=5, count=50))
    assert tasks == list(sums(seed=5, count=50))
    assert {task.answer for task in tasks} > {"1", "2"}
    for task in tasks:
        assert final_answer(task.prompt, task.solution) == task.answer == solve(task.prompt)
    assert solve("start 5 8 code 7 =") == "15"
    assert final_answer("", "no answer") == final_answer("", "nothing") == ""


def test_a_model_of_the_task_is_built(tmp_path: Path, monkeypatch: Any) -> None:
    """In a cache of its own, with the task's words as tokens; a prompt begins as in training."""
    import dataclasses

    from vllm_spec_plugins.zoo import build, cache

    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path))
    draft = zoo.recipe("sums-draft")
    assert isinstance(draft, zoo.SumsRecipe)
    small = dataclasses.replace(draft, steps=2, num_tasks=200)
    assert build.folder_name(small) != build.folder_name(draft)
    folder = build.build(small, threads=1)
    tokenizer = TextTokenizer(folder)
    task = next(sums(seed=0, count=1))
    [ids] = tokenizer.encode([task.prompt], special_tokens=True)
    assert ids[0] == 1
    assert tokenizer.decode(ids.tolist()) == task.prompt
    assert json.loads((folder / "card.json").read_text())["corpus_sha256"] == digest_of_task()
    assert LocalModel.load(folder).vocab_size == 64


# --- labels by people ----------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    train_word_tokenizer(64).save(str(tmp_path / "tokenizer.json"))
    return TextTokenizer(tmp_path)


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_marked_answers(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    right = {"prompt": "start 1 2", "answer": "1 plus 2 is 3", "correct": True}
    wrong = {"prompt": "start 1 2", "answer": "1 plus 2 is 4 ; 5", "correct": False}
    path = write_lines(
        tmp_path / "labels.jsonl",
        right,
        {**wrong, "error_position": 12},
        {**wrong, "prompt": "start 1 3", "error_position": [2, 6]},
    )
    good, bad, spanned = read_labels(path, tokenizer)
    prompt = [UNKNOWN] * 4  # begin, start, two numbers
    assert list(good.labels) == [*prompt, *[HARMLESS] * 5]
    assert list(bad.labels) == [*prompt, *[HARMLESS] * 4, ERROR, UNKNOWN, UNKNOWN]
    assert list(spanned.labels) == [*prompt, HARMLESS, ERROR, *[UNKNOWN] * 5]
    assert [text.prompt for text in (good, bad, spanned)] == [0, 0, 1]
    assert tokenizer.decode(good.token_ids) == "start 1 2 1 plus 2 is 3"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ('{"prompt": "a"}', "line 1: each line must be an object"),
        ('{"prompt": "a", "answer": "b", "correct": 1}', "line 1: each line must be an object"),
        ('{"prompt": "a", "answer": "b", "correct": false}', 'wrong answer needs "error_position"'),
        (
            '{"prompt": "a", "answer": "b", "correct": false, "error_position": 1}',
            "within its 1 characters",
        ),
    ],
)
def test_bad_labels(line: str, message: str, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (tmp_path / "labels.jsonl").write_text(line + "\n")
    with pytest.raises(SpecPluginsError, match=message):
        read_labels(tmp_path / "labels.jsonl", tokenizer)
    with pytest.raises(SpecPluginsError, match="there are no labels at"):
        read_labels(tmp_path / "nowhere", tokenizer)


def test_labels_are_taken_off_tokens_never_judged() -> None:
    text = LabelledText((1, 2, 3), (UNKNOWN, HARMLESS, ERROR), 0)
    [kept] = without([text], [2])
    assert kept.labels == (UNKNOWN, UNKNOWN, ERROR)
    assert without([text], [2, 3]) == []
    assert digest([text]) != digest([kept])


# --- mining --------------------------------------------------------------------------------------


class Scripted:
    """A draft model that says the same after each token, as `Miner` sees one."""

    num_layers = 1

    def __init__(self, says: dict[int, int]) -> None:
        self._says = says

    def layer_states(self, rows: torch.Tensor, _after: Any) -> dict[int, torch.Tensor]:
        return {1: rows[..., None].float()}

    def final_norm(self, states: torch.Tensor) -> torch.Tensor:
        return states

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        said = [self._says.get(int(token), 0) for token in states[..., 0]]
        return torch.nn.functional.one_hot(torch.tensor(said), 64).float()


#: Begin, a prompt of one token, and "5 plus 6 is 11 </s>" in words of the tokenizer.
ANSWER = "5 plus 6 is 11"


def mined_from(
    tokenizer: TextTokenizer, tmp_path: Path, says: dict[str, str], outcome: Callable[..., Any]
) -> tuple[list[tuple[str, int]], list[list[str]], Any]:
    """What mining finds where the target always writes on as in `ANSWER`.

    Returns:
        Text and label of each mismatch, contexts the target was asked to continue, and all.
    """

    def ids(text: str) -> list[int]:
        return tokenizer.encode([text])[0].tolist()

    asked: list[list[str]] = []

    def write(contexts: Sequence[tuple[int, ...]], _ends: Sequence[int]) -> list[list[int]]:
        asked.append([tokenizer.decode(context) for context in contexts])
        return [[*ids(ANSWER), 2][len(context) - 2 :] for context in contexts]

    draft = {ids(before)[0]: ids(after)[0] for before, after in says.items()}
    for token in ids(ANSWER)[:-1]:
        following = ids(ANSWER)[ids(ANSWER).index(token) + 1]
        draft.setdefault(token, following)
    draft.setdefault(ids("start")[0], ids("5")[0])
    miner = Miner(
        write,
        Scripted(draft),  # pyright: ignore[reportArgumentType]
        tokenizer,
        Checker("test", outcome),
        Memo(tmp_path / "outcomes.jsonl"),
        never=[0, 1, 2, 3],
        max_tokens=8,
    )
    mined = miner.mine(["start"])
    found = [(tokenizer.decode(text.token_ids), text.labels[-1]) for text in mined.texts]
    for text in mined.texts:
        assert set(text.labels[:-1]) <= {UNKNOWN}
    return found, asked, mined


def test_harmless_tokens_stay_and_errors_do_not(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """ "code" for "plus" spoils the outcome; "makes" for "is" does not and is kept."""
    found, asked, mined = mined_from(
        tokenizer,
        tmp_path,
        {"5": "code", "6": "makes", "makes": "12", "is": "12"},
        lambda _, text: "code" not in text and text.endswith("11"),
    )
    assert found == [
        ("start 5 code", ERROR),
        ("start 5 plus 6 makes", HARMLESS),
        ("start 5 plus 6 makes 12", ERROR),
    ]
    assert asked == [["start"], *([text] for text, _ in found)]
    assert (mined.prompts, mined.passed_over) == (1, 0)


def test_prompts_that_come_to_nothing_are_passed_over(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    found, _, mined = mined_from(tokenizer, tmp_path, {"5": "code"}, lambda *_: "")
    assert (found, mined.prompts, mined.passed_over) == ([], 0, 1)


def test_an_outcome_must_be_plain(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(SpecPluginsError, match="an outcome must be"):
        mined_from(tokenizer, tmp_path, {}, lambda *_: {1, 2})


def test_a_killed_walk_asks_nothing_twice(tmp_path: Path, monkeypatch: Any) -> None:
    contexts, ends = [(1, 2), (1, 3)], [4, 4]
    path = tmp_path / "written.jsonl"
    with Target(tmp_path, 8, SimpleNamespace(), Memo(path)) as target:  # pyright: ignore[reportArgumentType]
        monkeypatch.setattr(target, "_write", lambda texts, _ends: [[9] for _ in texts])
        assert target(contexts, ends) == [[9], [9]]
    with path.open("ab") as file:
        file.write(b'{"cut sh')
    asked: list[Any] = []
    with Target(tmp_path, 8, SimpleNamespace(), Memo(path)) as target:  # pyright: ignore[reportArgumentType]

        def write(texts: list[Any], _ends: Any) -> list[list[int]]:
            asked.extend(texts)
            return [[8] for _ in texts]

        monkeypatch.setattr(target, "_write", write)
        assert target([*contexts, (1, 4)], [4, 4, 4]) == [[9], [9], [8]]
        assert target([(1, 2)], [5]) == [[8]]  # another length is another text
    assert asked == [(1, 4), (1, 2)]
    assert len(Memo(path)) == 4
    assert memo_key((1, 4), 4) in Memo(path)


def test_checkers(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "own_checker.py").write_text("def last(prompt, text): return text.split()[-1]\n")
    monkeypatch.chdir(tmp_path)
    assert Checker.of("own_checker:last").outcome("a", "b c") == "c"
    script = "import json, sys; print(json.load(sys.stdin)['completion'].upper())"
    assert Checker.of(f'{sys.executable} -c "{script}"').outcome("a", "b c") == "B C"
    failing = Checker.of(f'{sys.executable} -c "raise SystemExit(3)"')
    with pytest.raises(SpecPluginsError, match="ended with 3"):
        failing.outcome("a", "b")
    for name in ("own_checker:nothing", "no_such_module:last", "no-such-command here", ""):
        with pytest.raises(SpecPluginsError, match="checker"):
            Checker.of(name)


def test_tool_calls_are_found_by_name(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(train_word_tokenizer(64).to_str())
    names = ["<tool_call>", "</tool_call>", "<|tool_call_begin|>", "<|tool_call_end|>"]
    tokenizer.add_special_tokens([*names, "[TOOL_CALLS]", "<|python_tag|>", "<think>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    first = tokenizer.token_to_id("<tool_call>")
    found = tool_calls(TextTokenizer(tmp_path))
    assert found == [[first, first + 1], [first + 2, first + 3], [first + 4], [first + 5]]


# --- training ------------------------------------------------------------------------------------


def tokens_of(num_prompts: int, signal: float, seed: int = 0) -> Tokens:
    """Ten tokens a prompt; column 0 of their features tells harmless ones, by so much."""
    draw = torch.Generator().manual_seed(seed)
    count = 10 * num_prompts
    harmless = torch.rand(count, generator=draw) < 0.7
    features = torch.randn(count, 8, generator=draw) * 3 + 1
    features[:, 0] += signal * harmless
    probabilities = torch.rand(count, generator=draw).log()
    return Tokens(features, probabilities, harmless, torch.arange(count) // 10)


def test_curve_of_scores_by_hand() -> None:
    scores = torch.tensor([3.0, 2.0, 2.0, 1.0])
    harmless = torch.tensor([True, True, False, False])
    curve = roc(scores, harmless)
    assert (curve.errors, curve.harmless) == ([0, 0, 0.5, 1], [0, 0.5, 1, 1])
    # Of four pairs three are in order and one is a tie.
    assert curve.area == pytest.approx(3.5 / 4)


def test_area_counts_pairs_in_order() -> None:
    tokens = tokens_of(20, signal=1.0)
    scores = tokens.features[:, 0]
    good, bad = scores[tokens.harmless], scores[~tokens.harmless]
    expected = (good[:, None] > bad).double().mean()
    assert roc(scores, tokens.harmless).area == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize("recall", [0.3, 0.9, 1.0])
def test_threshold_catches_what_was_wanted(recall: float) -> None:
    tokens = tokens_of(20, signal=1.0)
    scores = tokens.features[:, 0]
    threshold = threshold_for(scores, tokens.harmless, recall)
    errors = scores[~tokens.harmless]
    caught = float((errors < threshold).double().mean())
    assert recall <= caught < recall + 1 / len(errors) + 1e-9
    measured = quality(scores, tokens.harmless, threshold)
    assert measured.recall == pytest.approx(caught)
    assert measured.passed == pytest.approx(
        float((scores[tokens.harmless] >= threshold).double().mean())
    )


def test_head_is_the_weighted_logistic_regression() -> None:
    """At its optimum the gradient of the stated loss is zero."""
    tokens = tokens_of(30, signal=2.0)
    head = fit(tokens, penalty=1e-3)
    deviation = tokens.features.std(0) + 1e-6
    x = ((tokens.features - tokens.features.mean(0)) / deviation).double()
    weight = (head.weight * deviation).double()
    residual = torch.sigmoid(head.log_odds(tokens.features).double()) - tokens.harmless.double()
    share = tokens.harmless.double().mean()
    residual *= torch.where(tokens.harmless, 0.5 / share, 0.5 / (1 - share))
    gradient = (residual[:, None] * x).mean(0) + 2e-3 * weight
    assert gradient.abs().max() < 1e-4
    assert abs(float(residual.mean())) < 1e-4


def test_split_is_by_prompt() -> None:
    learnt, held_out = split(tokens_of(40, signal=0.0), seed=3)
    assert not set(learnt.prompts.tolist()) & set(held_out.prompts.tolist())
    assert len(held_out.prompts.unique()) == 10
    again = split(tokens_of(40, signal=0.0), seed=3)[1]
    assert torch.equal(held_out.prompts, again.prompts)


def test_a_head_with_a_signal_is_worth_its_keep() -> None:
    result = train(tokens_of(120, signal=6.0), recall=0.9, seed=0)
    assert result.worth_its_keep
    assert result.judged.curve.area > 0.85
    assert result.judged.recall == pytest.approx(0.9, abs=0.08)
    assert result.baseline.curve.area == pytest.approx(0.5, abs=0.1)
    log_odds = math.log(result.threshold / (1 - result.threshold))
    assert log_odds == pytest.approx(result.judged.threshold, abs=1e-6)


def test_a_head_without_a_signal_is_not() -> None:
    result = train(tokens_of(60, signal=0.0), recall=0.9, seed=0)
    assert not result.worth_its_keep


def test_too_few_labels_are_refused() -> None:
    with pytest.raises(SpecPluginsError, match=r"too little to learn from: .* errors"):
        train(tokens_of(4, signal=1.0), recall=0.9, seed=0)


# --- hidden states -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Path:
    return zoo.ensure("tiny", threads=1)


def test_features_are_what_the_head_reads_at_the_token(tiny: Path) -> None:
    """Of texts padded together: the normed state at the token, log p from the row before."""
    model = LocalModel.load(tiny)
    texts = [
        LabelledText((1, 5, 6, 7, 8), (UNKNOWN, UNKNOWN, HARMLESS, UNKNOWN, ERROR), 0),
        LabelledText((1, 9, 4), (HARMLESS, UNKNOWN, ERROR), 1),
    ]
    tokens = read_tokens(model, texts)
    order = np.lexsort((tokens.harmless.numpy(), tokens.prompts.numpy()))
    tokens = tokens.take(torch.from_numpy(order))
    assert tokens.prompts.tolist() == [0, 0, 1]  # the first token of a text has no probability
    assert tokens.harmless.tolist() == [False, True, False]
    for row, (text, place) in enumerate(((0, 4), (0, 2), (1, 2))):
        ids = torch.tensor(texts[text].token_ids)[None]
        output = model.module(input_ids=ids, output_hidden_states=True)
        expected = output.hidden_states[-1][0, place]  # transformers norms the last
        torch.testing.assert_close(tokens.features[row], expected, atol=1e-4, rtol=1e-4)
        log_p = torch.log_softmax(output.logits[0, place - 1], dim=-1)[ids[0, place]]
        assert float(tokens.log_probabilities[row]) == pytest.approx(float(log_p), abs=1e-4)


# --- the command ---------------------------------------------------------------------------------


def calibrate(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["calibrate", "judge", *arguments])
    return result.exit_code, " ".join(result.output.split())


def marked(path: Path, count: int = 60) -> Path:
    """Answers whose errors are the word "wrong": a head can tell, the target's law cannot."""
    draw = np.random.default_rng(0)
    records = []
    for number in range(count):
        words = " ".join(draw.choice(["import", "return", "class"], 6))
        prompt = f"def f{number}():"
        records.append({"prompt": prompt, "answer": f" {words}", "correct": True})
        answer = f" {words} raise"
        position = {"error_position": [len(answer) - 5, len(answer)]}
        records.append({"prompt": prompt, "answer": answer, "correct": False, **position})
    return write_lines(path, *records)


def test_command_trains_from_marked_answers(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "judge.safetensors"
    labels = marked(tmp_path / "labels.jsonl")
    code, said = calibrate(str(tiny), "--labels", str(labels), "--output", str(output))
    assert code == 0, said
    assert "the target's own probability" in said
    assert "area under the head's curve" in said
    head = JudgeHead.read(output)
    assert (head.card.layer, head.card.num_layers, head.card.hidden_size) == (2, 2, 64)
    assert head.card.training["labels"] == {"from": "marked answers", "file": "labels.jsonl"}
    held_out = head.card.training["held_out"]
    assert held_out["prompts"] == 15
    assert held_out["head"]["area"] > 0.9
    assert {0, 1, 2, 3} <= set(head.never_judge.tolist())
    assert head.recognise(tiny, output)
    report = json.loads(output.with_suffix(".json").read_text())
    assert report["data_sha256"] == head.card.data_sha256
    assert report["curves"]["probability"]["errors"][-1] == 1
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_command_says_what_is_wrong(tiny: Path, tmp_path: Path) -> None:
    labels = marked(tmp_path / "labels.jsonl", count=3)
    output = ("--output", str(tmp_path / "judge.safetensors"))
    for arguments, message in (
        ((), "give either --labels"),
        (("--prompts", str(labels)), "give --draft and --checker as well"),
        (("--labels", str(labels), "--draft", "tiny"), "give --prompts and --checker as well"),
        (("--labels", str(labels)), "too little"),
        (("--labels", str(tmp_path / "no")), "there are no labels at"),
        (
            ("--prompts", str(labels), "--draft", str(tiny), "--checker", "no:where"),
            'no checker "no:where"',
        ),
    ):
        code, said = calibrate(str(tiny), *arguments, *output)
        assert code == 1, said
        assert message in said
    assert not (tmp_path / "judge.safetensors").exists()
    missing = str(tmp_path / "no folder" / "head")
    assert "there is no folder" in calibrate(str(tiny), "--labels", "x", "--output", missing)[1]


def test_every_prompt_shows_whether_the_draft_model_has_another_tokenizer(
    tiny: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    draft = tmp_path / "draft"
    shutil.copytree(tiny, draft)
    tokenizer = Tokenizer.from_file(str(draft / "tokenizer.json"))
    tokenizer.add_tokens(["zebra"])
    tokenizer.save(str(draft / "tokenizer.json"))
    prompts = write_lines(tmp_path / "prompts.jsonl", {"prompt": "import"}, {"prompt": "a zebra"})
    nothing = write_lines(tmp_path / "nothing.jsonl")
    output = ("--output", str(tmp_path / "judge.safetensors"))
    monkeypatch.setattr(LocalModel, "load", None)  # said before a model loads
    for given, message in (
        (prompts, "has another tokenizer than the target"),
        (nothing, "there are no prompts in"),
    ):
        code, said = calibrate(
            str(tiny), "--prompts", str(given), "--draft", str(draft), "--checker", "cat", *output
        )
        assert code == 1, said
        assert message in said
    assert "there are no labels at" in calibrate(str(tiny), "--labels", "no", *output)[1]
