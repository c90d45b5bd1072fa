"""The parts of a causal language model as vLLM builds it, found by what they can do.

Two shapes are known. In vLLM's own models, shaped like Llama, layers are called one by one with
positions and hidden states, and with the residual kept apart (Llama, Mistral, Qwen2, Qwen3,
Gemma, OLMoE) or not. Models that vLLM serves through its Transformers backend (OLMo, OLMo 2 and
3) have the calling convention of Hugging Face: `transformers_layers`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vllm_spec_plugins.target_model import LayerState

from .layer_parts import LayerParts, LayersNotFoundError, Nothing
from .transformers_layers import TransformersLayers

_OTHERS = "Use another proposer (`vllm-spec list`)."
#: What a layer's `forward` may want, beside arguments with defaults.
_RESIDUAL_APART = ("positions", "hidden_states", "residual")
_RESIDUAL_WITHIN = ("positions", "hidden_states")


def find_layers(module: nn.Module) -> LayerParts:
    """Embedding, layers and final norm of a model.

    Raises:
        LayersNotFoundError: One of them is not there, or is called in an unknown way.
    """
    language = getattr(module, "language_model", module)
    inner: Any = getattr(language, "model", None)
    name = type(module).__name__
    for part in ("layers", "norm"):
        if not isinstance(getattr(inner, part, None), nn.Module):
            raise LayersNotFoundError(
                f"{name} has no `model.{part}`: its layers cannot be run one by one, which "
                f"drafting with the target's own layers needs. {_OTHERS}"
            )
    if TransformersLayers.fits(inner):
        return TransformersLayers(inner)
    if not callable(getattr(inner, "embed_input_ids", None)):
        raise LayersNotFoundError(
            f"{name} has no `model.embed_input_ids`: its embedding cannot be found. {_OTHERS}"
        )
    return LlamaLayers(inner, _keeps_residual_apart(inner.layers[0], name))


class LlamaLayers(LayerParts):
    """Layers of a model written for vLLM.

    Args:
        inner: The model without its head.
        residual_apart: Layers take and return the residual beside the hidden states.
    """

    def __init__(self, inner: Any, residual_apart: bool) -> None:
        super().__init__(inner)
        self._residual_apart = residual_apart

    def embed(self, token_ids: Tensor) -> LayerState:
        return LayerState(self._inner.embed_input_ids(token_ids))

    def final_norm(self, state: LayerState) -> Tensor:
        if state.residual is None:
            return self._inner.norm(state.hidden)
        return self._inner.norm(state.hidden, state.residual)[0]

    def _stack(self, start: int, layers: Sequence[nn.Module | None]) -> LlamaStack:
        del start
        kept = [layer for layer in layers if layer is not None]
        return LlamaStack(kept, self._residual_apart)

    def _nothing_for(self, sublayer: str) -> nn.Module:
        del sublayer
        return Nothing()


class LlamaStack:
    """Implements `target_model.LayerStack`."""

    def __init__(self, layers: Sequence[nn.Module], residual_apart: bool) -> None:
        self._layers = layers
        self._residual_apart = residual_apart

    def __call__(self, state: LayerState, positions: Tensor) -> LayerState:
        hidden, residual = state.hidden, state.residual
        if self._residual_apart:
            for layer in self._layers:
                hidden, residual = layer(positions, hidden, residual)
        else:
            for layer in self._layers:
                hidden = layer(positions, hidden)
        return LayerState(hidden, residual)


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
        f"{_OTHERS}"
    )
