"""A part of the tests of model runner V2, in the process of their own that they need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.engine
def test_model_runner_v2(engine_environment: dict[str, str]) -> None:
    """What `make test-v2` runs, without the slow ones."""
    folder = Path(__file__).parent / "v2"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", str(folder)],
        env={**os.environ, **engine_environment, "VLLM_SPEC_TEST_V2": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
