"""The judge: what it lets stand, what it never touches, what it costs, which heads it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from vllm_spec_plugins.verifiers.judge import Judge, JudgeOptions, _folder_of

from vllm_spec_plugins.context import EngineContext, ModelFacts
from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.judge_head import NORM_STATE, JudgeCard, JudgeHead
from vllm_spec_plugins.testing.enumeration import (
    enumerated_input,
    enumeration_error,
    first_token_prices,
    total_variation,
)
from vllm_spec_plugins.testing.guarantees import (
    TOLERANCE,
    assert_price_is_measured,
    assert_relaxes,
    enumeration_cases,
)
from vllm_spec_plugins.testing.toy_problems import ToyProblem, one_hot, random_problem
from vllm_spec_plugins.token_spans import TokenSpans
from vllm_spec_plugins.verifier import TokenHistory, VerifyInput
from vllm_spec_plugins.weight_probes import read_probes

#: Tokens of the toy target, whose "hidden state at a token" is the token's one-hot vector: the
#: weights of a head are then its log odds for each token.
V = 4
#: Token 2 is harmless by far, token 1 just so, the others are not.
LOG_ODDS = (-3.0, 1.0, 5.0, -1.0)


def facts_of(model: Path, **changes: Any) -> ModelFacts:
    known: dict[str, Any] = {
        "model": str(model),
        "vocab_size": V,
        "hidden_size": V,
        "num_layers": 2,
        "max_model_len": 64,
        "num_speculative_tokens": 3,
    }
    return ModelFacts(**{**known, **changes})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with the weights that heads are recognised by, and a tokenizer."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_weights(folder, seed=0)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "<end>": 3}, "a"))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_weights(folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> None:
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (32, V),
        "model.norm.weight": (V,),
        "model.layers.1.self_attn.o_proj.weight": (V, 32),
        "model.layers.1.mlp.down_proj.weight": (V, 64),
        "lm_head.weight": (32, V),
    }
    weights = {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()}
    save_file(
        {key: weight.to(dtype) for key, weight in weights.items()}, folder / "model.safetensors"
    )


@pytest.fixture
def write_head(model: Path, tmp_path: Path) -> Callable[..., str]:
    """`write_head(**card)`: a head for `model`, with parts of its card changed."""

    def write(
        weight: tuple[float, ...] = LOG_ODDS, never: tuple[int, ...] = (), **changes: Any
    ) -> str:
        card: dict[str, Any] = {
            "model": "toy",
            "hidden_size": V,
            "num_layers": 2,
            "vocab_size": V,
            "layer": 2,
            "norm_state": NORM_STATE,
            "dtype": "float32",
            "threshold": 0.5,
            "tool_calls": [],
            "data_sha256": "",
            "training": {},
        }
        head = JudgeHead(
            JudgeCard(**{**card, **changes}),
            torch.tensor(weight),
            torch.zeros(1),
            torch.tensor(never, dtype=torch.int64),
            read_probes(model, 2),
        )
        path = tmp_path / "head.safetensors"
        head.write(path)
        return str(path)

    return write


class SeesTokens(Judge):
    """The judge of a target whose hidden state at a token is its one-hot vector."""

    def judged(self, batch: VerifyInput, rows: Tensor | None = None) -> Tensor:
        ids = batch.draft_token_ids.clamp(min=0)
        states = torch.nn.functional.one_hot(ids, V).float()
        return super().judged(replace(batch, hidden_states=states), rows)


@pytest.fixture
def build(model: Path, write_head: Callable[..., str]) -> Callable[..., Judge]:
    """`build(card={...}, **options)`: a judge that sees tokens."""

    def build(card: dict[str, Any] | None = None, **options: Any) -> Judge:
        facts = facts_of(model)
        parsed = JudgeOptions(head=write_head(**(card or {})), **options)
        Judge.check(parsed, facts)
        return SeesTokens(parsed, EngineContext(facts, torch.device("cpu"), 64, seed=0))

    return build


# --- the price -----------------------------------------------------------------------------------


def test_the_distance_is_the_price(build: Callable[..., Judge]) -> None:
    """The extra acceptance is the total variation, whatever is drafted, whatever is excluded."""
    judge = build()
    assert_price_is_measured(judge)
    off: list[float] = []
    for seed in range(12):
        plain = random_problem(seed, num_draft=1, order=1)
        excluded = plain.target_logits.clone()
        excluded[:, seed % V] = -torch.inf
        for problem in (plain, one_hot(plain), replace(plain, target_logits=excluded)):
            distance, price = first_token_prices(judge, problem)
            off.append(float((distance - price).abs().max()))
    assert max(off) <= TOLERANCE
    assert total_variation(judge, random_problem(0, num_draft=1, order=1)) > 0.05


def test_it_is_not_lossless(build: Callable[..., Judge]) -> None:
    assert_relaxes(build())


@pytest.mark.parametrize("options", [{"threshold": 1.0}, {"never_judge": [0, 1, 2, 3]}])
def test_a_judge_without_a_say_is_lossless(
    options: dict[str, Any], build: Callable[..., Judge]
) -> None:
    """Even a head whose scores round to 1."""
    judge = build({"weight": (99.0,) * V}, **options)
    for case in enumeration_cases():
        assert enumeration_error(judge, case.problems, case.vocabulary) <= TOLERANCE


# --- what stands ---------------------------------------------------------------------------------


def decided(judge: Judge, problem: ToyProblem, **changes: Any) -> tuple[Tensor, Tensor]:
    """Every possible draft token and its acceptance."""
    batch, _, _ = enumerated_input([problem])
    batch = replace(batch, **changes)
    return batch.draft_token_ids, judge._decided_acceptance(batch)


@pytest.mark.parametrize(("threshold", "stand"), [(None, {1, 2}), (0.9, {2}), (0.0, {0, 1, 2, 3})])
def test_scores_at_or_above_the_threshold_stand(
    threshold: float | None, stand: set[int], build: Callable[..., Judge]
) -> None:
    judge = build(threshold=threshold)
    for problem in (
        random_problem(0, num_draft=1, order=1),
        one_hot(random_problem(0, num_draft=1, order=1)),
    ):
        ids, accept = decided(judge, problem)
        exact = decided(build(threshold=1.0), problem)[1]
        judged = torch.tensor([token in stand for token in ids.tolist()])
        assert (accept[judged] == 1).all()
        assert torch.equal(accept[~judged], exact[~judged])


def test_a_score_equal_to_the_threshold_stands(build: Callable[..., Judge]) -> None:
    judge = build({"weight": (0.0, 0.0, -1e-6, 1e-6)}, threshold=0.5)
    ids, accept = decided(judge, random_problem(0, num_draft=1, order=1).with_temperature(0))
    best = int(random_problem(0, num_draft=1, order=1).target_logits[-1].argmax())
    assert {i for i, a in zip(ids.tolist(), accept.tolist(), strict=True) if a} == {0, 1, 3, best}


def test_greedy_requests_accept_the_best_token_and_the_judged(build: Callable[..., Judge]) -> None:
    problem = random_problem(3, num_draft=1, order=1).with_temperature(0)
    best = int(problem.target_logits[problem.start].argmax())
    ids, accept = decided(build(), problem)
    stands = {i for i, a in zip(ids.tolist(), accept.tolist(), strict=True) if a == 1}
    assert stands == {best, 1, 2}


def test_tokens_it_never_judges_stay_exact(build: Callable[..., Judge]) -> None:
    """Those of the head's file, of the options by id, and of the options by text."""
    problem = random_problem(0, num_draft=1, order=1)
    exact = decided(build(threshold=1.0), problem)[1]
    for card, options in (
        ({"never": (2,)}, {"never_judge": [1]}),
        ({}, {"never_judge": ["b", "c"]}),
        ({"never": (1, 2)}, {}),
    ):
        assert torch.equal(decided(build(card, **options), problem)[1], exact)


def test_requests_with_a_grammar_stay_exact(build: Callable[..., Judge]) -> None:
    """And the others of the batch are judged."""
    problem = one_hot(random_problem(0, num_draft=1, order=1))
    exact = decided(build(threshold=1.0), problem)[1]
    free = decided(build(), problem)[1]
    constrained = torch.arange(len(exact)) % 2 == 0
    accept = decided(build(), problem, constrained=constrained)[1]
    assert torch.equal(accept, torch.where(constrained, exact, free))
    assert not torch.equal(free[constrained], exact[constrained])


def test_excluded_tokens_never_stand(build: Callable[..., Judge]) -> None:
    problem = random_problem(0, num_draft=1, order=1)
    logits = problem.target_logits.clone()
    logits[:, 2] = -torch.inf
    for excluded in (replace(problem, target_logits=logits), one_hot(problem)):
        excluded = replace(excluded, target_logits=logits)
        for temperature in (1, 0):
            ids, accept = decided(build(), excluded.with_temperature(temperature))
            assert (accept[ids == 2] == 0).all()


def test_hidden_states_that_are_no_numbers_leave_it_exact(build: Callable[..., Judge]) -> None:
    problem = random_problem(0, num_draft=1, order=1)
    batch, _, _ = enumerated_input([problem])
    judge = build()
    batch = replace(batch, hidden_states=torch.full((len(batch.draft_token_ids), V), torch.nan))
    assert not Judge.judged(judge, batch).any()
    assert not Judge.judged(judge, replace(batch, hidden_states=None)).any()


def test_weights_are_those_of_the_revision_served(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, Any]] = []

    def snapshot(model: str, *, revision: str | None, local_files_only: bool) -> str:
        assert local_files_only
        asked.append((model, revision))
        return str(tmp_path)

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    facts = facts_of(Path("owner/model"), revision="v2")
    assert _folder_of(facts) == tmp_path
    assert asked == [("owner/model", "v2")]


# --- tool calls ----------------------------------------------------------------------------------

OPEN, CLOSE, ENDLESS = 7, 8, 9


def drafted(history: list[list[int]], drafts: list[list[int]]) -> VerifyInput:
    """Requests with these texts and drafts."""
    table = np.zeros((len(history), 600), dtype=np.int32)
    for row, tokens in zip(table, history, strict=True):
        row[: len(tokens)] = tokens
    counts = torch.tensor([len(draft) for draft in drafts])
    total, requests = int(counts.sum()), len(drafts)
    ids = torch.tensor([token for draft in drafts for token in draft], dtype=torch.int64)
    lengths = np.array([len(tokens) for tokens in history])
    return VerifyInput(
        [str(i) for i in range(requests)],
        torch.zeros(total, 12),
        torch.zeros(requests, 12),
        ids,
        counts,
        None,
        torch.ones(requests),
        torch.arange(requests),
        torch.from_numpy(lengths),
        max_num_draft=int(counts.max()),
        all_greedy=False,
        any_greedy=False,
        history=TokenHistory(table, np.arange(requests), lengths, lengths),
    )


def test_spans_open_and_close_in_text_and_draft() -> None:
    spans = TokenSpans(12, [[OPEN, CLOSE], [ENDLESS]], unreadable_is_inside=True)
    texts = [[1, 2], [1, OPEN, 2], [OPEN, 1, CLOSE], [], [ENDLESS, CLOSE, ENDLESS]]
    drafts = [[OPEN, 3, CLOSE, 4], [3, CLOSE, 4], [3, -1], [], [3, 3]]
    inside = spans.inside(drafted(texts, drafts)).tolist()
    expected = [
        *(False, True, True, False),
        *(True, True, False),
        *(False, False),
        *(True, True),
    ]
    assert inside == expected


def test_spans_follow_a_text_and_forget_it() -> None:
    spans = TokenSpans(12, [[OPEN, CLOSE]], unreadable_is_inside=True)
    text = [1, OPEN]
    assert spans.inside(drafted([text], [[3]])).all()
    assert spans.inside(drafted([[*text, 3]], [[3]])).all()
    assert not spans.inside(drafted([[*text, 3, CLOSE]], [[3]])).any()
    spans.finish(["0"])
    assert spans.inside(drafted([text], [[3]])).all()
    assert not TokenSpans(12, [], unreadable_is_inside=True)


def test_a_text_that_cannot_be_read_is_what_the_caller_says() -> None:
    """A prompt of embeddings: its span counts as open, or as closed, until the draft says."""
    batch = drafted([[], [1]], [[3, CLOSE, 3, OPEN, 3], [3]])
    for counts in (True, False):
        spans = TokenSpans(12, [[OPEN, CLOSE]], unreadable_is_inside=counts)
        assert spans.inside(batch).tolist() == [*(counts, counts, False, False, True), False]


def test_another_text_under_a_name_is_read_anew() -> None:
    spans = TokenSpans(12, [[OPEN, CLOSE]], unreadable_is_inside=False)
    assert spans.inside(drafted([[1, OPEN, 2], [1] * 500 + [OPEN]], [[3], [3]])).all()
    assert not spans.inside(drafted([[1, 2], [1] * 400], [[3], [3]])).any()


def test_spans_of_a_step_without_drafts() -> None:
    """Such as the one that reads a prompt."""
    spans = TokenSpans(12, [[OPEN, CLOSE]], unreadable_is_inside=True)
    assert spans.inside(drafted([[1, OPEN]], [[]])).shape == (0,)
    assert spans.inside(drafted([[1, OPEN]], [[3]])).all()


def test_tool_calls_stay_exact(build: Callable[..., Judge]) -> None:
    judge = build({"tool_calls": [[0, 3]], "weight": (9.0,) * V})
    batch = drafted([[0, 1], [0, 3]], [[1, 2], [1, 2]])
    batch = replace(batch, target_logits=batch.target_logits[:, :V])
    assert judge.judged(batch).tolist() == [False, False, True, True]


# --- heads it refuses, before the model loads ----------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 8}, "another model .*hidden_size is 4, that of .* is 8"),
        ({"num_layers": 3}, "num_layers is 2, that of .* is 3"),
        ({"vocab_size": 9}, "vocab_size is 4, that of .* is 9"),
    ],
)
def test_a_head_of_another_size_is_refused(
    change: dict[str, int], message: str, model: Path, write_head: Callable[..., str]
) -> None:
    with pytest.raises(SpecPluginsError, match=message):
        Judge.check(JudgeOptions(head=write_head()), facts_of(model, **change))


def test_a_head_of_another_model_of_that_size_is_refused(
    model: Path, write_head: Callable[..., str]
) -> None:
    options = JudgeOptions(head=write_head())
    for dtype in (torch.float16, torch.bfloat16):
        write_weights(model, seed=0, dtype=dtype)
        Judge.check(options, facts_of(model))  # a copy in another dtype is the same model
    write_weights(model, seed=1)
    with pytest.raises(SpecPluginsError, match=r"another model \(\"toy\"\).*sampled numbers"):
        Judge.check(options, facts_of(model))


def test_a_fine_tuned_last_layer_is_another_model(
    model: Path, write_head: Callable[..., str]
) -> None:
    options = JudgeOptions(head=write_head())
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.01
    save_file(weights, model / "model.safetensors")
    with pytest.raises(SpecPluginsError, match="last feed-forward layer differ"):
        Judge.check(options, facts_of(model))


def test_a_model_yet_to_be_downloaded_is_compared_when_it_is_there(
    model: Path, write_head: Callable[..., str], monkeypatch: Any, caplog: Any
) -> None:
    """Before the first step; where its weights cannot be read even then, the log says so."""
    options = JudgeOptions(head=write_head())
    facts = facts_of(Path("nobody/has-this-model"))
    Judge.check(options, facts)
    judge = Judge(options, EngineContext(facts, torch.device("cpu"), 4, seed=0))
    batch, _, _ = enumerated_input([random_problem(0, num_draft=1, order=1)])
    with caplog.at_level("WARNING"):
        judge.judged(batch)
        judge.judged(batch)
    [record] = caplog.records
    assert "cannot be told" in record.message
    late = Judge(options, EngineContext(facts, torch.device("cpu"), 4, seed=0))
    write_weights(model, seed=1)
    monkeypatch.setattr("vllm_spec_plugins.verifiers.judge._folder_of", lambda _: model)
    with pytest.raises(SpecPluginsError, match="another model"):
        late.judged(batch)


def test_sharded_models_are_recognised(model: Path, write_head: Callable[..., str]) -> None:
    import json

    options = JudgeOptions(head=write_head())
    weights = load_file(model / "model.safetensors")
    names = sorted(weights)
    places = {}
    for number, part in enumerate((names[:2], names[2:])):
        file = f"model-{number}.safetensors"
        save_file({name: weights[name] for name in part}, model / file)
        places |= dict.fromkeys(part, file)
    (model / "model.safetensors").unlink()
    index = {"weight_map": places}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(read_probes(model, 2)) == {
        "embedding", "final norm", "last attention", "last feed-forward layer",
    }  # fmt: skip
    Judge.check(options, facts_of(model))


def test_files_that_are_no_heads(
    model: Path, tmp_path: Path, write_head: Callable[..., str]
) -> None:
    def refuse(path: Path | str, message: str) -> None:
        with pytest.raises(SpecPluginsError, match=message):
            Judge.check(JudgeOptions(head=str(path)), facts_of(model))

    refuse(tmp_path / "missing", r"no head file .*calibrate judge")
    (tmp_path / "text").write_text("not safetensors")
    refuse(tmp_path / "text", "is not a judge head")
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    refuse(other, "it has no card")
    for card, message in (
        ('{"format_version": 1}', "bad card"),
        ('{"format_version": 9}', "version 9"),
    ):
        save_file({"weight": torch.zeros(2)}, other, metadata={"judge_head": card})
        refuse(other, message)
    refuse(write_head(layer=1), "of layer 1 of 2")
    refuse(write_head(norm_state="before the final norm"), "before the final norm")
    refuse(write_head(weight=(1.0, 2.0)), "damaged.*width 4")
    refuse(write_head(weight=(1.0, 2.0, float("nan"), 0.0)), "damaged.*finite")


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), "half"])
def test_thresholds_out_of_range_are_refused(threshold: object) -> None:
    with pytest.raises(ValidationError, match="threshold"):
        JudgeOptions(head="head", threshold=threshold)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("never", "message"),
    [
        ([4], "never_judge names token 4, .* 0 to 3"),
        ([-1], "never_judge names token -1"),
        (["a b"], "'a b', which is .* not one"),
    ],
)
def test_bad_tokens_to_never_judge(
    never: list[Any], message: str, model: Path, write_head: Callable[..., str]
) -> None:
    from tokenizers import pre_tokenizers

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(model / "tokenizer.json"))
    with pytest.raises(SpecPluginsError, match=message):
        Judge.check(JudgeOptions(head=write_head(), never_judge=never), facts_of(model))


def test_texts_of_a_model_that_is_not_here_need_ids(write_head: Callable[..., str]) -> None:
    options = JudgeOptions(head=write_head(), never_judge=["a"])
    with pytest.raises(SpecPluginsError, match="not on this machine yet"):
        Judge.check(options, facts_of(Path("nobody/has-this-model")))
