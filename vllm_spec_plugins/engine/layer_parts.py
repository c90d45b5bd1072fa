"""What every kind of model has in common whose layers can be run apart."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.target_model import LayerStack, LayerState


class LayersNotFoundError(SpecPluginsError):
    """The model is not shaped in a way whose layers we can run one by one."""


class LayerParts(ABC):
    """Embedding, layers and final norm of a model.

    Attributes:
        layers: All of them, in order.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.layers: list[nn.Module] = list(inner.layers)

    @abstractmethod
    def embed(self, token_ids: Tensor) -> LayerState:
        """What the first layer reads."""

    @abstractmethod
    def final_norm(self, state: LayerState) -> Tensor:
        """`[T, H]` what the head reads."""

    @abstractmethod
    def _stack(self, start: int, layers: Sequence[nn.Module | None]) -> LayerStack:
        """Some layers on end, the first of them number `start`; None = left out."""

    @abstractmethod
    def _nothing_for(self, sublayer: str) -> nn.Module:
        """What stands in for a sublayer that is left out."""

    def stack(
        self,
        start: int,
        stop: int,
        skip_layers: Sequence[int],
        skip_attention: Sequence[int],
        skip_ffn: Sequence[int],
    ) -> LayerStack:
        """Layers start to stop-1 without what is to be left out.

        Raises:
            SpecPluginsError: There is no such layer, or a sublayer has an unknown name.
        """
        count = len(self.layers)
        if not 0 <= start <= stop <= count:
            raise SpecPluginsError(f"layers {start} to {stop} were asked of a model with {count}.")
        kept: list[nn.Module | None] = []
        for index in range(start, stop):
            layer = self.layers[index]
            if index in skip_attention:
                layer = self._without(layer, "self_attn", index)
            if index in skip_ffn:
                layer = self._without(layer, "mlp", index)
            kept.append(None if index in skip_layers else layer)
        return self._stack(start, kept)

    def _without(self, layer: nn.Module, sublayer: str, index: int) -> nn.Module:
        """A view of a layer that shares its weights and leaves one sublayer out."""
        if not isinstance(getattr(layer, sublayer, None), nn.Module):
            raise LayersNotFoundError(
                f"layer {index} ({type(layer).__name__}) has no `{sublayer}`, so that part of it "
                "cannot be skipped. Skip whole layers instead (skip_layers)."
            )
        view = copy.copy(layer)
        view._modules = {**layer._modules, sublayer: self._nothing_for(sublayer)}
        return view


class Nothing(nn.Module):
    """A sublayer that adds nothing to the residual stream."""

    def forward(self, *args: Any, hidden_states: Tensor | None = None, **kwargs: Any) -> Tensor:
        del kwargs
        return torch.zeros_like(args[0] if hidden_states is None else hidden_states)
