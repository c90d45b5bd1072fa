"""The parts of a causal language model as vLLM builds them, found by what they can do.

Shaped like Llama: a module `model` with an embedding, `layers` and a `norm`, whose layers are
called with positions and hidden states, and with the residual kept apart (Llama, Mistral,
Qwen2, Qwen3, Gemma) or not.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.target_model import LayerState

#: What a layer's `forward` may want, beside arguments with defaults.
_RESIDUAL_APART = ("positions", "hidden_states", "residual")
_RESIDUAL_WITHIN = ("positions", "hidden_states")


class LayersNotFoundError(SpecPluginsError):
    """The model is not shaped in a way whose layers we can run one by one."""


class LayerParts:
    """Embedding, layers and final norm of a model.

    Raises:
        LayersNotFoundError: One of them is not there, or is called in an unknown way.
    """

    def __init__(self, module: nn.Module) -> None:
        language = getattr(module, "language_model", module)
        inner: Any = getattr(language, "model", None)
        name = type(module).__name__
        for part in ("layers", "norm"):
            if not isinstance(getattr(inner, part, None), nn.Module):
                raise LayersNotFoundError(
                    f"{name} has no `model.{part}`: its layers cannot be run one by one, which "
                    "drafting with the target's own layers needs. Use another proposer "
                    "(`vllm-spec list`)."
                )
        if not callable(getattr(inner, "embed_input_ids", None)):
            raise LayersNotFoundError(
                f"{name} has no `model.embed_input_ids`: its embedding cannot be found. "
                "Use another proposer (`vllm-spec list`)."
            )
        self.layers: list[nn.Module] = list(inner.layers)
        self._inner = inner
        self._residual_apart = _keeps_residual_apart(self.layers[0], name)

    def embed(self, token_ids: Tensor) -> LayerState:
        """What the first layer reads."""
        return LayerState(self._inner.embed_input_ids(token_ids))

    def final_norm(self, state: LayerState) -> Tensor:
        """`[T, H]` what the head reads."""
        if state.residual is None:
            return self._inner.norm(state.hidden)
        return self._inner.norm(state.hidden, state.residual)[0]

    def run(self, layers: Sequence[nn.Module], state: LayerState, positions: Tensor) -> LayerState:
        """Some layers, one after the other, inside a forward context."""
        hidden, residual = state.hidden, state.residual
        if self._residual_apart:
            for layer in layers:
                hidden, residual = layer(positions, hidden, residual)
        else:
            for layer in layers:
                hidden = layer(positions, hidden)
        return LayerState(hidden, residual)

    def stack(
        self,
        start: int,
        stop: int,
        skip_layers: Sequence[int],
        skip_attention: Sequence[int],
        skip_ffn: Sequence[int],
    ) -> Stack:
        """Layers start to stop-1 without what is to be left out."""
        count = len(self.layers)
        if not 0 <= start <= stop <= count:
            raise SpecPluginsError(f"layers {start} to {stop} were asked of a model with {count}")
        kept = []
        for index in range(start, stop):
            layer = self.layers[index]
            if index in skip_layers:
                continue
            if index in skip_attention:
                layer = _without(layer, "self_attn", index)
            if index in skip_ffn:
                layer = _without(layer, "mlp", index)
            kept.append(layer)
        return Stack(self, kept)


class Stack:
    """Implements `target_model.LayerStack`."""

    def __init__(self, parts: LayerParts, layers: Sequence[nn.Module]) -> None:
        self._parts = parts
        self._layers = layers

    def __call__(self, state: LayerState, positions: Tensor) -> LayerState:
        return self._parts.run(self._layers, state, positions)


class _Nothing(nn.Module):
    """A sublayer that adds nothing to the residual stream."""

    def forward(self, *args: Any, hidden_states: Tensor | None = None, **kwargs: Any) -> Tensor:
        del kwargs
        given = hidden_states if hidden_states is not None else args[0]
        return torch.zeros_like(given)


def _without(layer: nn.Module, sublayer: str, index: int) -> nn.Module:
    """A view of a layer that shares its weights and leaves one sublayer out."""
    if not isinstance(getattr(layer, sublayer, None), nn.Module):
        raise LayersNotFoundError(
            f"layer {index} ({type(layer).__name__}) has no `{sublayer}`, so that part of it "
            "cannot be skipped. Skip whole layers instead (skip_layers)."
        )
    view = copy.copy(layer)
    view._modules = {**layer._modules, sublayer: _Nothing()}
    return view


def _keeps_residual_apart(layer: nn.Module, model: str) -> bool:
    """How the layers of a model are called."""
    parameters = inspect.signature(layer.forward).parameters.values()
    wanted = tuple(
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    )
    if wanted == _RESIDUAL_APART:
        return True
    if wanted == _RESIDUAL_WITHIN:
        return False
    raise LayersNotFoundError(
        f"the layers of {model} are called with ({', '.join(wanted)}); drafting with the target's "
        f"own layers knows ({', '.join(_RESIDUAL_APART)}) and ({', '.join(_RESIDUAL_WITHIN)}). "
        "Use another proposer (`vllm-spec list`)."
    )
