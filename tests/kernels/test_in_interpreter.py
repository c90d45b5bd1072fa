"""Runs every file of `exactness/` in a process of its own, in Triton's interpreter.

By hand: `TRITON_INTERPRET=1 pytest tests/kernels/exactness`; on a machine with a GPU without
the variable, and the same tests run on it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "exactness"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("test_*.py")), ids=lambda file: file.stem)
def test_decides_as_the_reference(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider",
         str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=FOLDER.parents[2],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
