"""The loaded target, as proposers see it."""

from __future__ import annotations

from torch import nn


class Target:
    """Implements `proposer.TargetModel`."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @property
    def module(self) -> nn.Module:
        return self._module
