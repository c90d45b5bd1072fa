"""Offline engines that calibration starts, and must see end."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM


def shut_down(llm: LLM) -> None:
    """End an engine now, with the process it runs in."""
    llm.llm_engine.engine_core.shutdown()
