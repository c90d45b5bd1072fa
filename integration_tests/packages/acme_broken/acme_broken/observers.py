"""Observers that fail: when built, when registered, when called."""

from __future__ import annotations

from vllm_spec_plugins import hookimpl


class RaisesWhenBuilt:
    def __init__(self) -> None:
        raise RuntimeError("acme cannot observe")


class RaisesInEveryStep:
    @hookimpl
    def spec_step_finished(self, step) -> None:
        raise RuntimeError("acme fell asleep")


class WithUnknownArgument:
    @hookimpl
    def spec_step_finished(self, step, colour) -> None:
        raise AssertionError("never called")


class NamedMetrics:
    pass
