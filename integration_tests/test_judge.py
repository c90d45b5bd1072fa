"""The judge on the real engine: it sees the states calibration saw, and costs what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vllm_spec_plugins.errors import SpecPluginsError

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.engine

EXIT = {"method": "early_exit", "num_speculative_tokens": 4, "exit_layer": 1}
PROMPT = [1, 3, 3, 11, 9, 12, 8, 6, 15, 8, 6, 11, 0, 5, 6, 15, 7, 8, 11, 1, 2, 13, 4, 15]
#: Texts whose law is held to the metrics, and in how many standard errors.
TEXTS, SIGMAS = 4000, 4.5


@pytest.fixture(scope="module")
def write_head(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`write_head(folder, seed=None, **card)`: a head for a model, of random weights or zeros."""
    import torch

    from vllm_spec_plugins.judge_head import NORM_STATE, JudgeCard, JudgeHead
    from vllm_spec_plugins.weight_probes import read_probes

    def write(folder: Path, seed: int | None = None, **changes: Any) -> str:
        config = json.loads((folder / "config.json").read_text())
        sizes = {
            "hidden_size": config["hidden_size"],
            "num_layers": config["num_hidden_layers"],
            "vocab_size": config["vocab_size"],
        }
        card: dict[str, Any] = {
            "model": "a model of this test",
            "layer": sizes["num_layers"],
            "norm_state": NORM_STATE,
            "dtype": "float32",
            "threshold": 0.5,
            "tool_calls": [],
            "data_sha256": "",
            "training": {},
        }
        weight = torch.zeros(sizes["hidden_size"])
        if seed is not None:
            weight = torch.randn(len(weight), generator=torch.Generator().manual_seed(seed))
        head = JudgeHead(
            JudgeCard(**{**card, **sizes, **changes}),
            weight,
            torch.zeros(1),
            torch.tensor([2]),  # the end of the text
            read_probes(folder, sizes["num_layers"]),
        )
        path = tmp_path_factory.mktemp("head") / "judge.safetensors"
        head.write(path)
        return str(path)

    return write


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_sees_the_states_calibration_computes(
    temperature: float,
    exiting_model: Path,
    write_head: Any,
    serve_offline: Any,
    generate: Any,
    adapter_of: Any,
    prompts: Any,
) -> None:
    """Of every draft token, in batches with prompts read in parts: normed, at the token itself."""
    import torch

    from vllm_spec_plugins.calibration.hugging_face import LocalModel
    from vllm_spec_plugins.calibration.judge_labels import HARMLESS, UNKNOWN, LabelledText
    from vllm_spec_plugins.calibration.judge_training import read_tokens

    seen: list[tuple[tuple[int, ...], Tensor]] = []
    config = {**EXIT, "verifier": {"name": "judge", "head": write_head(exiting_model, 0)}}
    with serve_offline(config, model=str(exiting_model), skip_tokenizer_init=True) as llm:
        judge = adapter_of(llm).verifiers["judge"]
        judged = judge.judged

        def watched(batch: Any, rows: Any = None) -> Any:
            history = batch.history
            for request, (row, known) in enumerate(
                zip(history.rows, history.num_tokens, strict=True)
            ):
                context = history.token_ids[row, :known].tolist()
                for place in (batch.request_of == request).nonzero().flatten().tolist():
                    context.append(int(batch.draft_token_ids[place]))
                    seen.append((tuple(context), batch.hidden_states[place].clone()))
            return judged(batch, rows)

        judge.judged = watched
        generate(llm, prompts, temperature=temperature, seed=3, max_tokens=30)
    assert len(seen) > 100
    texts = [
        LabelledText(context, (*[UNKNOWN] * (len(context) - 1), HARMLESS), number)
        for number, (context, _) in enumerate(seen)
    ]
    expected = read_tokens(LocalModel.load(exiting_model), texts)
    assert len(expected) == len(seen)
    states = torch.stack([seen[number][1] for number in expected.prompts.tolist()])
    torch.testing.assert_close(states, expected.features, atol=2e-3, rtol=1e-3)


def test_thresholds_at_the_ends(
    exiting_model: Path, write_head: Any, serve_offline: Any, generate: Any, drafted_by: Any,
    prompts: Any,
) -> None:  # fmt: skip
    """0 lets every draft token stand but the end of text, 1 none that exactness would not."""
    head = write_head(exiting_model)
    model = {"model": str(exiting_model), "skip_tokenizer_init": True}
    texts = {}
    for threshold in (0.0, 1.0):
        config = {**EXIT, "verifier": {"name": "judge", "head": head, "threshold": threshold}}
        with serve_offline(config, **model) as llm:
            texts[threshold] = generate(llm, prompts)
            [tally] = drafted_by(llm).values()
        if threshold == 0:
            assert tally["acceptance_rate"] > 0.95
            assert tally["total_variation_price"] > 0.05
        else:
            assert tally["total_variation_price"] == 0
            assert tally["acceptance_rate"] < 0.9
    with serve_offline(None, **model) as llm:
        plain = generate(llm, prompts)
    assert texts[1.0] == plain
    assert texts[0.0] != plain


def test_requests_with_a_grammar_are_exact_beside_judged_ones(
    pico_model: Path, write_head: Any, serve_offline: Any, generate: Any
) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    texts = ["def read(path):\n    ", "import os\nimport ", "class Thing:\n    "]
    grammar = {"structured_outputs": StructuredOutputsParams(regex="[a-z_ ]{40}")}
    each = [grammar, {}, grammar]
    config = {
        "method": "early_exit",
        "num_speculative_tokens": 4,
        "exit_layer": 2,
        "verifier": {"name": "judge", "head": write_head(pico_model), "threshold": 0.0},
    }
    found = []
    for speculative_config in (config, None):
        with serve_offline(speculative_config, model=str(pico_model)) as llm:
            found.append(generate(llm, texts, each=each, max_tokens=24, ignore_eos=False))
    judged, plain = found
    assert [judged[0], judged[2]] == [plain[0], plain[2]]
    assert judged[1] != plain[1]


def test_the_distance_of_the_texts_is_the_price_in_the_metrics(
    narrow_models: tuple[Path, Path], write_head: Any, serve_crowd: Any, drafted_by: Any
) -> None:
    """Both are what the models' own laws and the head's scores say they must be."""
    import torch
    from vllm import SamplingParams

    from vllm_spec_plugins.calibration.hugging_face import LocalModel
    from vllm_spec_plugins.judge_head import JudgeHead

    target, draft = narrow_models
    path = write_head(target, seed=1)
    head, vocabulary = JudgeHead.read(path), 16

    def last_of(folder: Path, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Normed state and log law after each text."""
        model = LocalModel.load(folder)
        state = model.layer_states(texts, [model.num_layers])[model.num_layers][:, -1]
        normed = model.final_norm(state)
        return normed, torch.log_softmax(model.logits(normed).double(), dim=-1)

    first = torch.tensor([PROMPT])
    second = torch.cat([first.expand(vocabulary, -1), torch.arange(vocabulary)[:, None]], dim=1)
    p_first = last_of(target, first)[1].exp()[0]
    p = last_of(target, second)[1].exp()
    drafted = last_of(draft, second)[1].argmax(dim=1)
    states = last_of(target, torch.cat([second, drafted[:, None]], dim=1))[0]
    scores = head.log_odds(states)
    middle = scores.unique().double().quantile(0.5, interpolation="midpoint")
    middle += 1e-3  # where it is a score itself, rounding would decide
    judged = (scores >= middle) & (drafted != 2)
    p_drafted = p.gather(1, drafted[:, None]).squeeze(1)
    expected = float((p_first * judged * (1 - p_drafted)).sum())
    assert 0.05 < expected < 0.9
    assert 0 < int(judged.sum()) < vocabulary
    assert float((scores - middle).abs().min()) > 1e-4

    config = {
        "method": "draft_model",
        "model": str(draft),
        "num_speculative_tokens": 1,
        "verifier": {"name": "judge", "head": path, "threshold": float(middle.sigmoid())},
    }
    with serve_crowd(config, target) as llm:
        params = SamplingParams(max_tokens=2, temperature=1.0, ignore_eos=True, detokenize=False)
        texts = [{"prompt_token_ids": PROMPT}] * TEXTS
        outputs = llm.generate(texts, params, use_tqdm=False)
        [tally] = drafted_by(llm).values()
    tokens = torch.tensor([list(output.outputs[0].token_ids) for output in outputs])
    # Only drafted tokens that were judged harmless come more often than the target says.
    more = judged[tokens[:, 0]] & (tokens[:, 1] == drafted[tokens[:, 0]])
    by_target = float((p_first * judged * p_drafted).sum())
    distance = float(more.double().mean()) - by_target
    error = math.sqrt(0.25 / TEXTS)
    assert tally["drafted"] == TEXTS
    assert abs(distance - expected) < SIGMAS * error
    assert abs(tally["total_variation_price"] - expected) < SIGMAS * error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "nowhere.safetensors"}, "no head file nowhere.safetensors"),
        ({"threshold": 1.5}, "threshold"),
        ({"never_judge": [512]}, "never_judge names token 512"),
        ({"never_judge": [[1]]}, "never_judge"),
        ({}, None),
    ],
)
def test_bad_options_fail_before_the_model_loads(
    options: dict[str, Any],
    message: str | None,
    model_without_weights: Path,
    random_model: Path,
    write_head: Any,
    serve_offline: Any,
) -> None:
    """Without weights to load: only where nothing is wrong does vLLM get so far."""
    head = write_head(random_model)
    config = {**EXIT, "verifier": {"name": "judge", "head": head, **options}}
    with (
        pytest.raises((SpecPluginsError, RuntimeError, ValueError)) as caught,
        serve_offline(config, model=str(model_without_weights), skip_tokenizer_init=True),
    ):
        pass
    if message is None:
        assert "judge" not in str(caught.value)
    else:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("card", "message"),
    [({"hidden_size": 64}, "hidden_size is 64"), ({"vocab_size": 99}, "vocab_size is 99")],
)
def test_a_head_of_another_model_is_refused(
    card: dict[str, int], message: str, random_model: Path, exiting_model: Path,
    write_head: Any, serve_offline: Any, tmp_path: Path,
) -> None:  # fmt: skip
    """By its sizes, and by its weights where only they differ."""
    import torch

    from vllm_spec_plugins.judge_head import JudgeHead

    config = {**EXIT, "verifier": {"name": "judge", "head": write_head(exiting_model)}}
    with pytest.raises((SpecPluginsError, ValueError), match="another model"), \
            serve_offline(config):  # fmt: skip
        pass
    known = JudgeHead.read(write_head(random_model))
    import dataclasses

    other = dataclasses.replace(
        known,
        card=dataclasses.replace(known.card, **card),
        weight=torch.zeros(card.get("hidden_size", 128)),
    )
    other.write(tmp_path / "other.safetensors")
    path = str(tmp_path / "other.safetensors")
    with pytest.raises((SpecPluginsError, ValueError), match=message), \
            serve_offline({**EXIT, "verifier": {"name": "judge", "head": path}}):  # fmt: skip
        pass


@pytest.mark.slow
def test_a_mined_head_is_worth_its_keep_on_sums(tmp_path: Path, monkeypatch: Any) -> None:
    """From the command line; the same command again asks the target nothing."""
    from typer.testing import CliRunner

    from vllm_spec_plugins.calibration import judge_mining
    from vllm_spec_plugins.cli.main import app
    from vllm_spec_plugins.judge_head import JudgeCard
    from vllm_spec_plugins.zoo.sums import sums

    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "judge.safetensors"
    prompts.write_text(
        "".join(json.dumps({"prompt": task.prompt}) + "\n" for task in sums(seed=4, count=60))
    )
    command = ["calibrate", "judge", "sums", "--draft", "sums-draft", "--prompts", str(prompts)]
    command += ["--checker", "vllm_spec_plugins.zoo.sums:final_answer", "--max-tokens", "72"]
    command += ["--output", str(output), "--threads", "1"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    card = JudgeCard.read(output)
    assert card.training["worth_its_keep"]
    held_out = card.training["held_out"]
    assert held_out["head"]["area"] > held_out["probability"]["area"] + 0.05

    def no_engine(*_: Any, **__: Any) -> Any:
        raise AssertionError("the target was started again")

    monkeypatch.setattr(judge_mining, "offline_engine", no_engine)
    output.unlink()
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert JudgeCard.read(output).data_sha256 == card.data_sha256
