"""`vllm-spec bench`: configs on real servers, side by side with plain decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_spec_plugins.cli import bench
from vllm_spec_plugins.cli.main import app
from vllm_spec_plugins.errors import ConfigError

runner = CliRunner()

BENCH = ["bench", "nano", "--speculative-config"]
NGRAM_CONFIG = '{"method": "ngram_adaptive", "num_speculative_tokens": 2}'


def test_bench_labels_configs_as_they_differ() -> None:
    config = {
        "method": "early_exit",
        "exit_layer": 2,
        "num_speculative_tokens": 3,
        "draft_vocabulary": {"file": "/somewhere/vocabulary.safetensors", "size": 512},
        "verifier": {"name": "typical", "epsilon": 0.1},
    }
    assert bench.label(config) == (
        "early_exit exit_layer=2 K=3 draft_vocabulary=(file=vocabulary.safetensors, size=512) "
        "verifier=typical(epsilon=0.1)"
    )
    assert bench.label({"model": "drafts/nano", "num_speculative_tokens": 2}) == (
        "draft_model model=nano K=2"
    )


@pytest.mark.parametrize(
    ("config", "guarantee"),
    [
        (None, "-"),
        ({"method": "ngram"}, "-"),
        ({"method": "ngram", "verifier": "lossless"}, "lossless"),
        ({"method": "ngram_adaptive"}, "lossless"),
        ({"method": "early_exit", "verifier": {"name": "typical"}}, "heuristic"),
    ],
)
def test_bench_names_the_guarantee(config: dict[str, Any] | None, guarantee: str) -> None:
    assert bench.guarantee_of(config) == guarantee


def test_bench_compares_repeat_by_repeat() -> None:
    """A machine that is slow for a while is slow for both."""
    counts = {
        "vllm:spec_decode_num_drafts_total": 10.0,
        "vllm:spec_decode_num_draft_tokens_total": 20.0,
        "vllm:spec_decode_num_accepted_tokens_total": 15.0,
        "vllm_spec_plugins:draft_tokens_total": 40.0,
        "vllm_spec_plugins:examined_tokens_total": 20.0,
        "vllm_spec_plugins:total_variation_total": 2.0,
    }
    plain = bench.Measured([100.0, 10.0, 100.0], [{}] * 3, [[1, 2], [3, 4]])
    fast = bench.Measured([150.0, 16.0, 140.0], [counts] * 3, [[1, 2], [3, 5]])
    row = fast.row(plain)
    assert row["speed_over_plain"] == 1.5
    assert (row["slowest"], row["tokens_per_second"], row["fastest"]) == (16.0, 140.0, 150.0)
    assert row["acceptance_length"] == 2.5
    assert row["total_variation_price"] == pytest.approx(0.1)
    assert row["same_text_as_plain"] == 1
    assert plain.row(plain)["acceptance_length"] is None
    assert plain.row(plain)["total_variation_price"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*BENCH, "{"], "is no JSON"),
        ([*BENCH, "[]"], "must be a JSON object"),
        ([*BENCH, NGRAM_CONFIG, "--concurrency", "1,0"], "different numbers from 1 on"),
        ([*BENCH, NGRAM_CONFIG, "--temperature", "1,1"], "different numbers from 0 on"),
        ([*BENCH, NGRAM_CONFIG, "--speculative-config", NGRAM_CONFIG], "is given twice"),
        (["bench", "nanno", "--speculative-config", NGRAM_CONFIG], 'Did you mean "nano"'),
        ([*BENCH, '{"method": "ngram", "verifier": "typicl"}'], 'Did you mean "typical"'),
        ([*BENCH, '{"method": "ngram", "verifier": {"k": 2}}'], '"verifier" takes a name or'),
        ([*BENCH, '{"method": "ngram", "verifier": 3}'], '"verifier" takes a name or'),
    ],
)
def test_bench_refuses_before_a_server_starts(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.replace("\u2502", " ").split())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "cannot be read"),
        ("import os", "one JSON object a line"),
        ('{"text": "import os"}', "one JSON object a line"),
        ('{"prompt": "import os"}', "holds 1 prompts, and 2 are asked for"),
    ],
)
def test_bench_refuses_prompts(tmp_path: Path, lines: str | None, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    if lines is not None:
        path.write_text(lines)
    with pytest.raises(ConfigError, match=message):
        bench.read_prompts(path, 2)


@pytest.mark.engine
@pytest.mark.slow
def test_bench_on_real_servers(tmp_path: Path) -> None:
    """A relaxed verifier beside plain decoding: its price is measured while it serves."""
    prompts, rows = tmp_path / "prompts.jsonl", tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": text}) for text in ("import os\nimport", "def f(x):\n")]
    prompts.write_text("\n".join(lines))
    relaxed = {
        "method": "early_exit",
        "exit_layer": 1,
        "num_speculative_tokens": 3,
        "verifier": "typical",
    }
    arguments = [
        "bench", "tiny", "--speculative-config", json.dumps(relaxed), "--prompts", str(prompts),
        "--num-prompts", "2", "--tokens", "24", "--repeats", "1", "--concurrency", "1,2",
        "--temperature", "1", "--threads", "1", "--output", str(rows),
    ]  # fmt: skip
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["concurrency"] for row in found] == [1, 1, 2, 2]
    assert [row["guarantee"] for row in found] == ["-", "heuristic"] * 2
    for row in found[1::2]:
        assert row["drafted"] > 10
        assert 0 < row["total_variation_price"] < 1
        assert 1 < row["acceptance_length"] <= 4
        assert row["speed_over_plain"] > 0
