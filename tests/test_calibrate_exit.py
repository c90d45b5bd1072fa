"""`vllm-spec calibrate exit`: the walk, the measurement, the table, the search, the command."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from vllm_spec_plugins import zoo
from vllm_spec_plugins.calibration import exit_calibration
from vllm_spec_plugins.calibration.acceptance_walk import ratio_with_error, rounds_of, walk
from vllm_spec_plugins.calibration.adapter_block import AdapterBlock
from vllm_spec_plugins.calibration.draft_pass import DraftPass
from vllm_spec_plugins.calibration.draft_table import Judged, best_of_each, recommend, rows_of
from vllm_spec_plugins.calibration.engine_clock import Timed, _fit
from vllm_spec_plugins.calibration.exits import (
    Agreement,
    Continuation,
    MeasurementStore,
    compare,
    exits_to_measure,
    measure,
)
from vllm_spec_plugins.calibration.hugging_face import LocalModel
from vllm_spec_plugins.calibration.layer_skips import draft_rounds, left_out
from vllm_spec_plugins.calibration.round_costs import RoundCosts
from vllm_spec_plugins.calibration.skip_search import MeasuredText, predicted_speedup, search
from vllm_spec_plugins.cli.main import app
from vllm_spec_plugins.config import EngineVocabulary, split
from vllm_spec_plugins.context import ModelFacts
from vllm_spec_plugins.draft_vocabulary import RankedVocabulary, rank
from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.registry import VLLM_METHODS


@pytest.fixture(scope="module")
def pico() -> LocalModel:
    return LocalModel.load(zoo.ensure("pico", threads=1))


@pytest.fixture(scope="module")
def texts(pico: LocalModel) -> list[Continuation]:
    """What `pico` writes, greedily and at temperature 1; stands for vLLM's generations."""
    return [written(pico, temperature, seed) for temperature in (0.0, 1.0) for seed in range(4)]


def written(model: LocalModel, temperature: float, seed: int, length: int = 40) -> Continuation:
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, model.vocab_size, (12,), generator=generator)
    ids = prompt[None]
    with torch.no_grad():
        for _ in range(length):
            logits = model.module(input_ids=ids, use_cache=False).logits[0, -1]
            if temperature:
                law = torch.softmax(logits / temperature, dim=-1)
                token = torch.multinomial(law, 1, generator=generator)
            else:
                token = logits.argmax()[None]
            ids = torch.cat([ids, token[None]], dim=1)
    return Continuation(tuple(ids[0].tolist()), len(prompt), temperature)


def costs(batch: int = 1, temperature: float = 0.0, layers: int = 4) -> RoundCosts:
    """One millisecond a layer, half of it attention; verification a little per token."""
    return RoundCosts(
        batch=batch,
        temperature=temperature,
        plain=1e-3 * (layers + 1),
        verification={k: 1e-3 * (layers + 1 + 0.1 * k * batch) for k in (1, 4)},
        draft_step={1: 1.2e-3, layers: 1e-3 * (layers + 0.2)},
        attention=0.5e-3,
        ffn=0.5e-3,
    )


# The walk.


def sampled_walk(
    chance: NDArray[np.floating], length: int, starts: int, seed: int
) -> tuple[float, float]:
    """Tokens and rounds of one decoding, drawn."""
    rng = np.random.default_rng(seed)
    at = emitted = rounds = 0
    while at < starts:
        accepted = 0
        while accepted < length and rng.random() < chance[at, accepted]:
            accepted += 1
        emitted, rounds, at = emitted + accepted + 1, rounds + 1, at + accepted + 1
    return emitted, rounds


@pytest.mark.parametrize("length", [1, 3, 5])
def test_walk_equals_sampled_walks(length: int) -> None:
    chance = np.random.default_rng(1).uniform(0.2, 1, size=(17, 5))
    found = walk(chance, length)
    drawn = np.array([sampled_walk(chance, length, 17, seed) for seed in range(20_000)])
    error = drawn.std(axis=0) / len(drawn) ** 0.5
    assert np.all(np.abs(drawn.mean(axis=0) - [found.emitted, found.rounds]) < 5 * error)


def test_walk_of_certain_choices_is_the_greedy_one() -> None:
    accepted = np.array([1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1], dtype=float)
    rows = rounds_of(accepted, 3)
    found = walk(rows, 3)
    emitted, rounds = sampled_walk(rows, 3, len(rows), seed=0)
    assert (found.emitted, found.rounds) == (emitted, rounds)
    assert found.accepted.sum() == found.emitted - found.rounds


def test_rounds_given_the_text_are_those_of_verification() -> None:
    """The identity the walk stands on, by enumeration of drafts, verdicts and residuals.

    Every way in which one round emits a text of two tokens, summed, against p(text) times what
    the walk says about rounds given the text.
    """
    rng = np.random.default_rng(3)
    vocabulary, most = 4, 2
    p1, q1 = rng.dirichlet(np.ones(vocabulary), size=2)
    p2, q2 = rng.dirichlet(np.ones(vocabulary), size=(2, vocabulary))
    p3 = rng.dirichlet(np.ones(vocabulary), size=(vocabulary, vocabulary))
    emits: dict[tuple[int, ...], float] = {}

    def add(text: tuple[int, ...], chance: float) -> None:
        emits[text] = emits.get(text, 0.0) + chance

    def residual(p: NDArray[Any], q: NDArray[Any]) -> NDArray[Any]:
        left = np.maximum(p - q, 0)
        return left / left.sum()

    for d1, d2 in itertools.product(range(vocabulary), repeat=most):
        drafted = q1[d1] * q2[d1][d2]
        first = min(1.0, p1[d1] / q1[d1])
        second = min(1.0, p2[d1][d2] / q2[d1][d2])
        for x in range(vocabulary):
            add((x,), drafted * (1 - first) * residual(p1, q1)[x])
            add((d1, x), drafted * first * (1 - second) * residual(p2[d1], q2[d1])[x])
            add((d1, d2, x), drafted * first * second * p3[d1, d2][x])
    for text, chance in emits.items():
        first, *rest = text
        law = [
            p1[first],
            *(p2[first][x] for x in rest[:1]),
            *(p3[first, rest[0]][x] for x in rest[1:]),
        ]
        drawn = [q1[first], *(q2[first][x] for x in rest[:1])]
        target = np.prod(law)
        a = [min(1.0, q / p) for q, p in zip(drawn, law, strict=False)]
        accepted = len(text) - 1
        given = np.prod(a[:accepted]) * (1 - a[accepted] if accepted < most else 1)
        assert chance == pytest.approx(target * given, abs=1e-12)


def test_error_of_a_ratio() -> None:
    """Against the spread over many samples of texts."""
    rng = np.random.default_rng(0)
    rounds = rng.uniform(10, 20, size=(2000, 30))
    emitted = rounds * rng.normal(2.5, 0.4, size=rounds.shape)
    both = [ratio_with_error(e, r) for e, r in zip(emitted, rounds, strict=True)]
    ratios, errors = np.array(both).T
    assert np.median(errors) == pytest.approx(ratios.std(), rel=0.1)
    assert np.isnan(ratio_with_error(emitted[0, :1], rounds[0, :1])[1])


# The measurement.


def test_all_layers_agree_with_themselves(pico: LocalModel, texts: list[Continuation]) -> None:
    for text in texts:
        found = measure(pico, text, [DraftPass(2), DraftPass(pico.num_layers)])
        assert found.agreement.shape == (2, 39)
        assert found.agreement[1].all()
        np.testing.assert_allclose(found.overlap[1], 1, atol=1e-5)
        np.testing.assert_allclose(found.chance[1], 1, atol=1e-5)
        assert (found.overlap[0] < 0.999).any()
        if text.temperature == 0:
            assert found.first_choice[1].all()


def test_greedy_walk_is_what_greedy_drafting_does(
    pico: LocalModel, texts: list[Continuation]
) -> None:
    """Draft token by token with the exit, verify against the target's text, count."""
    text, length, most = texts[0], 3, 3
    found = measure(pico, text, [DraftPass(1)])
    counted = walk(found.rounds(0.0, "probabilistic", most)[0], length)
    token_ids = list(text.token_ids)
    at, rounds, emitted = text.num_prompt + 1, 0, 0
    while at + most <= len(token_ids):
        drafted = token_ids[:at]
        for _ in range(length):
            state = pico.layer_states(torch.tensor([drafted]), [1])[1][:, -1]
            drafted.append(int(pico.logits(pico.final_norm(state)).argmax()))
        accepted = 0
        while accepted < length and drafted[at + accepted] == token_ids[at + accepted]:
            accepted += 1
        at, rounds, emitted = at + accepted + 1, rounds + 1, emitted + accepted + 1
    assert (counted.emitted, counted.rounds) == (emitted, rounds)


def test_an_adapter_stands_between_exit_and_head(
    pico: LocalModel, texts: list[Continuation]
) -> None:
    passes = [DraftPass(2), DraftPass(2, adapter=True)]
    # Untrained it is the bare exit.
    block = AdapterBlock(pico)
    found = measure(pico, texts[-1], passes, adapter=block)
    np.testing.assert_allclose(found.overlap[1], found.overlap[0], atol=1e-5)
    with torch.no_grad():
        block.final_norm.mul_(0)  # says nothing: every token alike
    found = measure(pico, texts[-1], passes, adapter=block)
    assert found.overlap[1].mean() < 0.5 * found.overlap[0].mean()


def test_draft_vocabulary_is_the_whole_law_restricted() -> None:
    generator = torch.Generator().manual_seed(0)
    target, draft = torch.randn(2, 30, 20, generator=generator)
    text = torch.randint(20, (30,), generator=generator)
    vocabulary = torch.tensor([0, 3, 4, 11, 19])
    found = compare(target, [draft[:, vocabulary]], text, vocabulary)
    masked = torch.full_like(draft, -torch.inf)
    masked[:, vocabulary] = draft[:, vocabulary]
    dense = compare(target, [masked], text, None)
    for name in Agreement.__slots__:
        np.testing.assert_allclose(getattr(found, name), getattr(dense, name), atol=1e-6)
    outside = ~torch.isin(text, vocabulary).numpy()
    assert outside.any()
    assert (found.chance[0][outside] == 0).all()


def test_exits_to_measure() -> None:
    assert exits_to_measure(3, None) == [1, 2, 3]
    assert exits_to_measure(8, [6, 2, 2]) == [2, 6]
    with pytest.raises(SpecPluginsError, match="no exit after 9 layers: the model has 8"):
        exits_to_measure(8, [9])


def test_measurements_are_kept(tmp_path: Path, texts: list[Continuation]) -> None:
    arrays = np.full((1, 5), 0.5, dtype=np.float32)
    made = Agreement(arrays, arrays > 0, arrays, arrays > 1)
    calls: list[str] = []

    def make() -> Agreement:
        calls.append("made")
        return made

    inputs: dict[str, object] = {"files": [["model.safetensors", 1, 2]]}
    MeasurementStore(tmp_path, inputs).get("1, 2", texts[0], make)
    again = MeasurementStore(tmp_path, inputs)
    found = again.get("1, 2", texts[0], make)
    assert (calls, again.reused) == (["made"], 1)
    np.testing.assert_array_equal(found.overlap, made.overlap)
    again.get("1, 3", texts[0], make)
    again.get("1, 2", texts[1], make)
    MeasurementStore(tmp_path, {"files": [["model.safetensors", 1, 3]]}).get("1, 2", texts[0], make)
    assert len(calls) == 4
    # A run that was killed while writing.
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert MeasurementStore(tmp_path, inputs).get("1, 2", texts[0], make) is made


# Skips.


def test_rounds_of_a_pass_that_skips_nothing_are_the_exit(
    pico: LocalModel, texts: list[Continuation]
) -> None:
    text = texts[-1]
    exits = measure(pico, text, [DraftPass(3)])
    with draft_rounds(pico) as rounds:
        found = MeasuredText(pico, rounds, text, None).agreement(DraftPass(3), 4)
    expected = exits.rounds(1.0, "probabilistic", 4)
    np.testing.assert_allclose(found.rounds(1.0, "probabilistic", 4), expected, atol=1e-4)


def test_skipping_rounds_are_those_of_a_cache(pico: LocalModel, texts: list[Continuation]) -> None:
    """The full model up to the round, then the pass token by token over the same cache."""
    from transformers import DynamicCache

    draft_pass = DraftPass(4, skip_attention=(1,), skip_ffn=(2,))
    text = torch.tensor(texts[-1].token_ids)
    starts = torch.tensor([20, 33])
    with draft_rounds(pico) as rounds:
        found = rounds.states(rounds.keep(text), draft_pass, starts, 4)
    decoder: Any = pico.module.get_decoder()  # pyright: ignore[reportCallIssue]
    for row, start in enumerate(starts.tolist()):
        cache = DynamicCache(config=pico.config)
        states: list[torch.Tensor] = []
        hook: Any = None
        with torch.no_grad():
            decoder(input_ids=text[None, :start], past_key_values=cache)
            hook = decoder.layers[3].register_forward_hook(keep_in(states))
            with left_out(pico, draft_pass):
                for at in range(start, start + 4):
                    decoder(
                        input_ids=text[None, at : at + 1],
                        past_key_values=cache,
                        position_ids=torch.tensor([[at]]),
                    )
        hook.remove()
        torch.testing.assert_close(torch.cat(states, dim=1)[0], found[row], atol=1e-4, rtol=1e-4)
    # Nothing of it stays.
    config: Any = pico.module.config
    assert config._attn_implementation != "vllm_spec_plugins_draft_rounds"
    assert measure(pico, texts[-1], [DraftPass(4)]).agreement.all()


def keep_in(states: list[torch.Tensor]) -> Any:
    """A hook that keeps what a layer puts out."""

    def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        states.append(output)

    return hook


def test_search_finds_what_costs_nothing() -> None:
    """Layers 2 and 5 of 8 do nothing for the law: the rest is dear."""
    useless = {("attention", 2), ("ffn", 2), ("attention", 5), ("ffn", 5)}

    def speedup(draft_pass: DraftPass) -> float:
        left = {("attention", n) for n in draft_pass.skip_attention}
        left |= {("ffn", n) for n in draft_pass.skip_ffn}
        return 1 + 0.1 * len(left & useless) - 0.3 * len(left - useless)

    asked: list[int] = []
    path = search(8, speedup, 200, lambda count, _best: asked.append(count))
    best = max(path, key=lambda found: found.speedup)
    assert best.draft_pass == DraftPass(8, (2, 5), (2, 5))
    assert best.draft_pass.options() == {"exit_layer": 8, "skip_layers": [2, 5]}
    assert path[0].draft_pass == DraftPass(8)
    for found in path:
        assert not {0, 7} & {*found.draft_pass.skip_attention, *found.draft_pass.skip_ffn}
    assert max(asked) <= 200
    assert len(search(8, speedup, 5)) == 1
    assert [found.draft_pass for found in search(2, speedup, 50)] == [DraftPass(2)]


def test_search_on_a_model(pico: LocalModel, texts: list[Continuation]) -> None:
    table = [costs(temperature=0.0), costs(temperature=1.0)]
    with draft_rounds(pico) as rounds:
        opened = [MeasuredText(pico, rounds, text, None) for text in texts]

        def speedup(draft_pass: DraftPass) -> float:
            return predicted_speedup(opened, table, draft_pass, 4)

        path = search(4, speedup, 30)
        assert speedup(path[-1].draft_pass) == path[-1].speedup
    # All layers are accepted always: the speed-up is known.
    cost = table[0]
    known = max(
        (1 + k) * cost.plain / cost.round(k, cost.draft(DraftPass(4))) for k in (1, 2, 3, 4)
    )
    assert path[0].speedup == pytest.approx(known, rel=1e-3)


# Costs and the table.


def test_costs_lie_on_measured_lines() -> None:
    table = costs(layers=8)
    assert table.draft(DraftPass(1)) == pytest.approx(1.2e-3)
    assert table.draft(DraftPass(5)) == pytest.approx(1.2e-3 + 4e-3)
    assert table.draft(DraftPass(8, (3,), (3, 4))) == pytest.approx(8.2e-3 - 1.5e-3)
    assert table.draft(DraftPass(1, (3,), (3, 4))) == pytest.approx(0.01 * table.plain)
    assert table.round(2, 1e-3) == pytest.approx(2e-3 + 9.2e-3)
    assert replace(table, adapter=1e-3).draft(DraftPass(1, adapter=True)) == pytest.approx(2.2e-3)
    assert RoundCosts.from_dict(json.loads(json.dumps(table.as_dict()))) == table


def test_fit_of_timed_steps() -> None:
    """Times made of known parts give the parts back."""
    passes = {DraftPass(1): 2.0, DraftPass(4): 5.0, DraftPass(4, (1, 2), ()): 4.0}
    passes |= {DraftPass(4, (), (1, 2)): 3.0, DraftPass(1, adapter=True): 2.5}
    timed: dict[DraftPass | None, list[Timed]] = {None: [Timed(2, 1.0, 0, 10.0, 0.0)]}
    for draft_pass, token in passes.items():
        # The machine was slower while one of them ran.
        slow = 3.0 if draft_pass == DraftPass(4) else 1.0
        timed[draft_pass] = [Timed(2, 1.0, 0, slow * 10.5, 0.0)]
        timed[draft_pass] += [
            Timed(2, 1.0, k, slow * (11.5 + k + k * token), slow * (0.5 + k * token))
            for k in (1, 2, 4)
        ]
    found = _fit(timed, 2, 1.0, 4)
    assert found.plain == 10
    assert found.draft_step == pytest.approx({1: 2.0, 4: 5.0})
    assert found.verification == pytest.approx({1: 12.5, 2: 13.5, 4: 15.5})
    assert (found.attention, found.ffn, found.adapter) == pytest.approx((0.5, 1.0, 0.5))
    busy = {**timed, None: [Timed(2, 1.0, 0, 30.0, 0.0)]}
    assert _fit(busy, 2, 1.0, 4).plain == 10.5


def judged(pico: LocalModel, texts: list[Continuation]) -> list[Judged]:
    passes = [DraftPass(e) for e in (1, 2, 3, 4)]
    return [
        Judged(t, passes, [measure(pico, x, passes) for x in texts if x.temperature == t])
        for t in (0.0, 1.0)
    ]


def test_rows_and_recommendation(pico: LocalModel, texts: list[Continuation]) -> None:
    table = [costs(batch, t) for batch in (1, 8) for t in (0.0, 1.0)]
    rows = [row for part in judged(pico, texts) for row in rows_of(part, table, 4)]
    assert len(rows) == 2 * 4 * 2 * 4 * 2  # temperatures, passes, methods, lengths, batches
    for row in rows:
        assert 1 <= row.acceptance_length <= 1 + row.num_speculative_tokens + 1e-9
        assert row.speedup == pytest.approx(row.acceptance_length * row.plain_ms / row.round_ms)
        assert len(row.acceptance_by_position) == row.num_speculative_tokens
        if row.draft_pass == DraftPass(4) and row.temperature == 0:
            assert row.agreement == 1
            assert row.acceptance_length == 1 + row.num_speculative_tokens
    for batch in (1, 8):
        found = recommend(rows, batch)
        assert {row.temperature for row in found.rows} == {0.0, 1.0}
        assert len({row.setting for row in found.rows}) == 1
        means: dict[Any, float] = {}
        for row in rows:
            if row.batch == batch:
                means[row.setting] = means.get(row.setting, 1.0) * row.speedup
        assert found.speedup == pytest.approx(max(means.values()) ** 0.5)
    best = best_of_each(rows, 1, 1.0)
    assert set(best) == {DraftPass(e) for e in (1, 2, 3, 4)}
    # Where drafting is free of use it is not recommended to anyone.
    dear = [replace(c, draft_step={1: 1.0, 4: 1.0}) for c in table]
    rows = [row for part in judged(pico, texts) for row in rows_of(part, dear, 4)]
    assert not recommend(rows, 1).pays


def test_greedy_drafts_cost_what_they_cost_at_temperature_0(
    pico: LocalModel, texts: list[Continuation]
) -> None:
    drawn = replace(costs(temperature=1.0), draft_step={1: 2e-3, 4: 5e-3})
    rows = rows_of(judged(pico, texts)[1], [costs(), drawn], 4)
    first = [r for r in rows if r.draft_pass == DraftPass(1) and r.num_speculative_tokens == 1]
    assert {r.draft_sample_method: round(r.draft_step_ms, 6) for r in first} == {
        "probabilistic": 2.0,
        "greedy": 1.2,
    }


# The command.


def facts(num_speculative_tokens: int | None) -> ModelFacts:
    return ModelFacts(
        model="pico",
        vocab_size=1024,
        hidden_size=256,
        num_layers=4,
        max_model_len=512,
        num_speculative_tokens=num_speculative_tokens or 0,
    )


@pytest.mark.parametrize(
    "draft_pass", [DraftPass(2), DraftPass(4, (1,), (1, 2)), DraftPass(4, (), (2,))]
)
def test_config_is_what_serving_takes(draft_pass: DraftPass) -> None:
    judgement = Judged(
        0.0, [draft_pass], [Agreement(*(np.ones((1, 9), dtype=kind) for kind in "f?f?"))] * 2
    )
    best = recommend(rows_of(judgement, [costs()], 3), 1)
    config = json.loads(json.dumps(best.config()))
    engine = EngineVocabulary(methods=VLLM_METHODS, fields=("method", "num_speculative_tokens"))
    rest, settings = split(config, engine, facts)
    assert settings.proposer is not None
    assert settings.proposer.name == "early_exit"
    assert settings.proposer.options["exit_layer"] == draft_pass.exit_layer
    assert rest["num_speculative_tokens"] == best.rows[0].num_speculative_tokens


@pytest.fixture
def without_engine(texts: list[Continuation], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The command on `pico`, with texts and costs from here. Counts what is asked for."""
    asked = {"texts": 0, "costs": 0}

    def generate(_model: Any, prompts: Any, _work: Any, sampling: Any, *_rest: Any) -> Any:
        asked["texts"] += 1
        found = [text for text in texts if text.temperature == sampling.temperature]
        return [
            np.array(found[i % len(found)].token_ids[found[i % len(found)].num_prompt :])
            for i in range(len(prompts))
        ]

    def measured(
        _choice: Any, _exits: Any, _layers: int, _most: int, batches: Any, t: Any, *_: Any
    ):
        asked["costs"] += 1
        return [costs(batch, temperature) for batch in batches for temperature in t]

    monkeypatch.setattr(exit_calibration, "generate", generate)
    monkeypatch.setattr(exit_calibration, "measure_costs", measured)
    return asked


def call(*arguments: object) -> str:
    words = ["calibrate", "exit", "pico", "--texts", "zoo:held-out", *map(str, arguments)]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "160"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_command(tmp_path: Path, without_engine: dict[str, int]) -> None:
    output = tmp_path / "exit.json"
    common = ("--output", output, "--num-prompts", 8, "--prompt-tokens", 16, "--max-draft", 4)
    said = call(*common, "--batch", 1, "--batch", 4)
    assert "Recommended" in said
    assert "distinct 8-grams" in said
    config = json.loads(output.read_text())
    rows = json.loads((tmp_path / "exit.rows.json").read_text())
    assert rows["recommended"] == config
    assert (tmp_path / "exit.png").read_bytes()[:4] == b"\x89PNG"
    alone = [row for row in rows["rows"] if row["batch"] == 1]
    by_setting: dict[Any, float] = {}
    for row in alone:
        key = (row["exit_layer"], row["draft_sample_method"], row["num_speculative_tokens"])
        by_setting[key] = by_setting.get(key, 1.0) * row["speedup"]
    chosen = tuple(
        config[key] for key in ("exit_layer", "draft_sample_method", "num_speculative_tokens")
    )
    assert by_setting[chosen] == pytest.approx(max(by_setting.values()))
    assert str(tmp_path) not in json.dumps(rows)

    again = call(*common, "--batch", 1, "--batch", 4)
    assert "16 measurements of an earlier run were used again" in again
    assert without_engine["costs"] == 1
    assert json.loads((tmp_path / "exit.rows.json").read_text())["rows"] == rows["rows"]

    # Another machine's times, taken from that file.
    elsewhere = tmp_path / "elsewhere.json"
    call(*common[2:], "--output", elsewhere, "--costs", tmp_path / "exit.rows.json")
    assert json.loads(elsewhere.read_text()) == config
    assert without_engine["costs"] == 1


def test_command_searches_skips(tmp_path: Path, without_engine: dict[str, int]) -> None:
    del without_engine
    said = call(
        "--output", tmp_path / "exit.json", "--num-prompts", 8, "--prompt-tokens", 16,
        "--max-draft", 3, "--search-skips", "--evaluations", 12,
    )  # fmt: skip
    rows = json.loads((tmp_path / "exit.rows.json").read_text())
    assert [path["exit_layer"] for path in rows["skips"]][-1] == 4
    assert rows["texts"] == {"0": 6, "1": 6}  # of 8, two were searched on
    assert "beat the best plain exit" in said or "better than skipping nothing" in said


def test_command_with_a_draft_vocabulary(tmp_path: Path, without_engine: dict[str, int]) -> None:
    del without_engine
    counts = np.arange(1024, 0, -1)
    always = np.array([0, 1, 2])
    lists = tuple(rank(name, counts, always, 512) for name in ("code", "prose"))
    for number in (1, 2):
        file = tmp_path / f"{number}.safetensors"
        RankedVocabulary(1024, always, lists[:number], "", "for a test").write(file)
    words = ("--num-prompts", 4, "--prompt-tokens", 16, "--max-draft", 3, "--draft-vocabulary")
    output = tmp_path / "exit.json"
    said = call("--output", output, *words, tmp_path / "1.safetensors")
    assert "Drafts from 512 tokens" in said
    assert json.loads(output.read_text())["draft_vocabulary"] == str(tmp_path / "1.safetensors")
    rows = json.loads((tmp_path / "exit.rows.json").read_text())
    assert rows["draft_vocabulary_size"] == 512
    whole = [row for row in rows["rows"] if row["exit_layer"] == 4 and row["temperature"] == 1]
    assert all(0.2 < row["overlap"] < 0.999 for row in whole)
    with pytest.raises(AssertionError, match="holds 2 lists"):
        call("--output", output, *words, tmp_path / "2.safetensors")


def test_command_advises_against(
    tmp_path: Path, without_engine: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    del without_engine
    dear = [replace(costs(1, t), draft_step={1: 1.0, 4: 1.0}) for t in (0.0, 1.0)]
    monkeypatch.setattr(exit_calibration, "measure_costs", lambda *_: dear)
    output = tmp_path / "exit.json"
    output.write_text('{"method": "early_exit", "exit_layer": 1, "num_speculative_tokens": 1}')
    said = call("--output", output, "--num-prompts", 4, "--prompt-tokens", 16, "--max-draft", 3)
    assert "Do not use early_exit here" in said
    assert not output.exists()
    assert json.loads((tmp_path / "exit.rows.json").read_text())["recommended"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "2,9"), "no exit after 9 layers"),
        (("--layers", "two"), "--layers takes numbers"),
        (("--temperature", "0.7"), "choose 0, 1 or both"),
        (("--costs", "nowhere.json"), "holds no costs"),
        (("--max-draft", 60), "give more prompts"),
        (("--adapter", "nowhere.safetensors"), "nowhere.safetensors"),
    ],
)
def test_command_says_what_is_wrong(
    tmp_path: Path, without_engine: dict[str, int], arguments: tuple[Any, ...], message: str
) -> None:
    del without_engine
    words = [
        "calibrate", "exit", "pico", "--texts", "zoo:held-out", "--output",
        str(tmp_path / "exit.json"), "--num-prompts", "4", *map(str, arguments),
    ]  # fmt: skip
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


@pytest.mark.engine
@pytest.mark.slow
def test_command_for_real(tmp_path: Path) -> None:
    """Texts and times from vLLM, on the smallest model."""
    words = [
        "calibrate", "exit", "tiny", "--texts", "zoo:held-out", "--eager", "--output",
        str(tmp_path / "exit.json"), "--num-prompts", "4", "--new-tokens", "24", "--max-draft", "2",
    ]  # fmt: skip
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    costs_found = json.loads((tmp_path / "exit.rows.json").read_text())["costs"]
    assert {cost["temperature"] for cost in costs_found} == {0.0, 1.0}
    for cost in costs_found:
        assert set(cost["draft_step"]) == {"1", "2"}
        assert 0 < cost["draft_step"]["1"] < cost["plain"] * 2
        assert cost["plain"] > 0
