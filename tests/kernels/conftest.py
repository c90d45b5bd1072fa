"""`exactness/` runs on a GPU, or in Triton's interpreter: see `test_in_interpreter.py`."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore = [] if INTERPRETED or torch.cuda.is_available() else ["exactness"]
if INTERPRETED:  # the interpreter and the compiler need a process each
    collect_ignore += [
        "test_in_interpreter.py",
        "test_offline_compile.py",
        "test_fused_launches.py",
    ]


@pytest.fixture
def device() -> torch.device:
    """Where kernels run here."""
    return torch.device("cpu" if INTERPRETED else "cuda")
