"""Asynchronous scheduling on model runner V2 beside other processes: ranks, an engine core."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.v2, pytest.mark.slow]

JOBS = Path(__file__).parents[1] / "packages" / "serve_jobs.py"
PROMPTS = [
    [(i * k * k + 5 * k) % 13 + 3 for k in range(length)] for i, length in enumerate((8, 33))
]
DRAFTS = {"num_speculative_tokens": 3}
METHODS: dict[str, dict[str, Any]] = {
    "ngram_adaptive": {"matching": "device", "min_acceptance": 0.05},
    "early_exit": {"exit_layer": 2},
    "jacobi": {},
}
WAYS = {
    "two ranks": ({"tensor_parallel_size": 2}, {}),
    "engine core": ({}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_greedy_texts_are_those_of_plain_decoding(
    way: str,
    engine_environment: dict[str, str],
    narrow_models: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    arguments, environment = WAYS[way]
    engine = {
        "model": str(narrow_models[0]), "skip_tokenizer_init": True, "enforce_eager": True,
        "dtype": "float32", "max_model_len": 128, "max_num_seqs": 4,
        "num_gpu_blocks_override": 64, "disable_log_stats": True, **arguments,
    }  # fmt: skip
    batches = [{"prompts": PROMPTS, "sampling": {"temperature": 0, "max_tokens": 12}}]
    configs = [None, *({"method": name, **METHODS[name], **DRAFTS} for name in METHODS)]
    jobs = [
        {"engine": {**engine, "speculative_config": config}, "batches": batches}
        for config in configs
    ]
    asked, answered = tmp_path / "jobs.json", tmp_path / "results.json"
    asked.write_text(json.dumps(jobs))
    # Where vLLM compiles parts of sharded models, inductor fails beside the interpreter's shims.
    shims = {"TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, str(JOBS), str(asked), str(answered), "v2"],
        env={**os.environ, **engine_environment, **shims, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    plain, *drafted = json.loads(answered.read_text())
    assert plain["error"] is None
    for name, found in zip(METHODS, drafted, strict=True):
        assert found["error"] is None, name
        assert found["asynchronous"], name
        assert found["texts"] == plain["texts"], name
        counted = found["metrics"]["by_method"][0]
        assert counted["drafted"] > counted["accepted"] > 0, name
