"""`benchmarks/self_speculation.py`: its quick mode on the zoo's smallest model, and its tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_spec_plugins import zoo

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: str, environment: dict[str, str]) -> str:
    """What a benchmark prints."""
    finished = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(1200)  # six engines start, each in a process of its own
def test_quick_run_measures_every_method_against_plain_decoding(
    engine_environment: dict[str, str], tmp_path: Path
):
    zoo.ensure("nano")  # before anything is timed
    environment = {**os.environ, **engine_environment}
    rows_file = tmp_path / "rows.jsonl"
    arguments = ("--quick", "--turn", "4", "--output", str(rows_file), "--run", "test")
    run("self_speculation.py", *arguments, environment=environment)

    rows: list[dict[str, Any]] = [json.loads(line) for line in rows_file.read_text().splitlines()]
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    assert set(by_method) == {
        "draft_model K=2 probabilistic",
        "early_exit 2 K=2",
        "early_exit 2 K=2 ranked",
        "early_exit 2 expected_speedup",
        "early_exit 2 expected_speedup ranked",
        "early_exit auto del",
    }
    for method_rows in by_method.values():
        settings = sorted((row["temperature"], row["batch"]) for row in method_rows)
        assert settings == [(0, 1), (0, 8), (1, 1), (1, 8)]
    for row in rows:
        assert row["speed_over_plain"] > 0
        assert row["full_steps"] > 0
        if row["temperature"] == 0:
            same, compared = row["same_text_as_plain"]
            assert same == compared > 0
    # A model that drafts for itself is always right; half of its layers are not.
    assert all(row["acceptance_rate"] == 1 for row in by_method["draft_model K=2 probabilistic"])
    for row in by_method["early_exit 2 K=2"]:
        assert 1 < row["acceptance_length"] < 3
        assert row["drafted_per_draft"] <= 2

    again = run("self_speculation.py", *arguments, environment=environment)
    assert " 0 rows to measure" in again
    arguments = ("--model", "nano", "--rows", str(rows_file), "--output", str(tmp_path))
    run("plot_self_speculation.py", *arguments, environment=environment)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "self_speculation_nano_exits.png",
        "self_speculation_nano_methods.png",
    }

    compared = run(
        "compare_self_speculation.py", "--run", "test", "--model", "nano", "--rows", str(rows_file),
        environment=environment,
    )  # fmt: skip
    assert compared.count("| early_exit auto del |") == 4


@pytest.mark.slow
def test_engines_take_turns_side_by_side(
    engine_environment: dict[str, str], tmp_path: Path
) -> None:
    zoo.ensure("nano")
    rows_file = tmp_path / "rows.jsonl"
    said = run(
        "self_speculation.py", "--quick", "--together", "--turn", "4", "--temperatures", "1",
        "--batches", "1", "--methods", "early_exit 2 K=2$|auto del$", "--output", str(rows_file),
        environment={**os.environ, **engine_environment},
    )  # fmt: skip
    assert "2 methods on 2 engines, 2 rows to measure" in said
    first, second = (json.loads(line) for line in rows_file.read_text().splitlines())
    assert [first["method"], second["method"]] == ["early_exit 2 K=2", "early_exit auto del"]
    # Plain decoding between two turns is beside both: theirs alternate.
    beside, after = first["plain_turns"], second["plain_turns"]
    assert len(first["turns"]) == len(second["turns"]) == 2
    assert [after[0], after[2]] == [beside[1], beside[3]]
    assert after[1] == beside[2]


def turn(tokens: int, seconds: float, of_plain: float) -> tuple[list[float], list[list[float]]]:
    """One turn, and the two of plain decoding beside it, which wrote 10 tokens each."""
    return [tokens, seconds], [[10, of_plain], [10, of_plain]]


def comparison(folder: Path, rows: list[dict[str, Any]], *options: str) -> str:
    """What is said of the run `a`."""
    rows_file = folder / "rows.jsonl"
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run(
        "compare_self_speculation.py", "--run", "a", "--model", "nano", "--rows", str(rows_file),
        *options, environment=dict(os.environ),
    )  # fmt: skip


def test_methods_are_compared_by_their_pooled_turns(tmp_path: Path) -> None:
    def row(
        method: str, length: int | str, *turns: tuple[list[float], list[list[float]]]
    ) -> dict[str, Any]:
        return {
            "run": "a", "model": "nano", "method": method, "length": length, "exit_layer": 2,
            "ranked": False, "temperature": 1.0, "batch": 1, "repeat": 0,
            "acceptance_length": 2.0, "drafted_per_draft": 3.0, "distinct_8gram_share": 1.0,
            "turns": [own for own, _ in turns],
            "plain_turns": [beside for _, both in turns for beside in both],
        }  # fmt: skip

    rows = [
        # The machine is half as fast in the second turn, for everybody.
        row("early_exit 2 K=2", 2, turn(40, 1, 1), turn(20, 1, 2)),  # 60 / 2 over 40 / 6
        row("early_exit 2 K=3", 3, turn(60, 1, 1), turn(30, 1, 2)),
        row("early_exit 2 thompson", "thompson", turn(57, 1, 1), turn(30, 1, 2)),
        {**row("of another run", 3, turn(90, 1, 1)), "run": "b"},
    ]
    said = comparison(tmp_path, rows)
    lines = {line.split(" | ")[0]: line for line in said.splitlines()}
    assert "over early_exit 2 K=3" in lines["| method"]
    assert " | 6.75 (" in lines["| early_exit 2 K=3"]
    assert " | 4.50 (" in lines["| early_exit 2 K=2"]
    assert " | 0.67 (0.67-0.67) | " in lines["| early_exit 2 K=2"]
    assert " | 0.97 (0.95-1.00) | " in lines["| early_exit 2 thompson"]
    assert "another run" not in said
    # Side by side, what disturbed plain decoding alone need not count.
    rows[2] = row("early_exit 2 thompson", "thompson", turn(57, 1, 2), turn(30, 1, 4))
    assert " | 1.93 (1.90-2.00) | " in comparison(tmp_path, rows)
    assert " | 0.97 (0.95-1.00) | " in comparison(tmp_path, rows, "--directly")
