"""Environment of the unit tests: one thread each, set before anything imports torch."""

from __future__ import annotations

import os

os.environ.update(
    OMP_NUM_THREADS="1",
    NUMBA_NUM_THREADS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
