"""Layers of a model that vLLM serves through its Transformers backend.

Such a model has vLLM's attention, linear layers and norms inside, and the `forward` of Hugging
Face around them, with a batch dimension of 1. What each layer is called with (rotary embeddings,
one kind per attention window; masks) only that `forward` knows. So a stack is a view of the
model with other layers and no final norm, and is run by the model's own `forward`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vllm_spec_plugins.target_model import LayerState

from .layer_parts import LayerParts, Nothing


class TransformersLayers(LayerParts):
    """Embedding, layers and final norm of a Hugging Face model."""

    @staticmethod
    def fits(inner: nn.Module) -> bool:
        """Whether a model without its head is called as Hugging Face's are."""
        wanted = {"inputs_embeds", "position_ids", "use_cache"}
        has_embeddings = callable(getattr(inner, "get_input_embeddings", None))
        return has_embeddings and wanted <= inspect.signature(inner.forward).parameters.keys()

    def embed(self, token_ids: Tensor) -> LayerState:
        return LayerState(self._inner.get_input_embeddings()(token_ids))

    def final_norm(self, state: LayerState) -> Tensor:
        return self._inner.norm(state.merged)

    def _stack(self, start: int, layers: Sequence[nn.Module | None]) -> TransformersStack:
        # The model looks up by its number what a layer is called with: each keeps its place.
        before: list[nn.Module | None] = [None] * start
        placed = [_PassOn() if layer is None else layer for layer in [*before, *layers]]
        return TransformersStack(self._inner, placed)

    def _nothing_for(self, sublayer: str) -> nn.Module:
        return _NoAttention() if sublayer == "self_attn" else Nothing()


class TransformersStack:
    """Implements `target_model.LayerStack`.

    Args:
        inner: The model without its head.
        layers: What to run in place of its layers.
    """

    def __init__(self, inner: nn.Module, layers: Sequence[nn.Module]) -> None:
        self._view = copy.copy(inner)
        replaced = {"layers": nn.ModuleList(layers), "norm": nn.Identity()}
        self._view._modules = {**inner._modules, **replaced}
        # Not `__call__`, which runs the compiled whole where the target is compiled.
        self._forward = self._view.forward

    def __call__(self, state: LayerState, positions: Tensor) -> LayerState:
        outputs = self._forward(
            inputs_embeds=state.merged.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            return_dict=False,
        )
        return LayerState(outputs[0].squeeze(0))


class _PassOn(nn.Module):
    """In the place of a layer that is left out."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        del args, kwargs
        return hidden_states


class _NoAttention(Nothing):
    """Attention in Hugging Face's layers returns its weights too, or None for them."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(*args, **kwargs), None
