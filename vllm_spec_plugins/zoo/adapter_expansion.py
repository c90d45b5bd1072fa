"""An exit adapter of a small model as one of its expanded model: same drafts, the large cost.

Training an adapter for a cost device would spend hours on weights that contribute nothing
(`expansion.py`). The adapter of its source is put inside a wide one instead, by the same rules:
unused columns and heads write zero, norms are rescaled. So acceptance is that of the source,
measured once, and only the time of a draft step is the large model's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from vllm_spec_plugins.adapter_file import AdapterCard, Probes, TargetShape, write_adapter

from .expansion import ExpansionError, expanded_shape, query_rows
from .recipes import Architecture


def expand_adapter(
    path: str | Path, source: Architecture, wide: Architecture, output: str | Path
) -> AdapterCard:
    """Write the adapter in `path`, of a model of shape `source`, as one for its expansion.

    A feed-forward part grows as the models' own do. The exit is the first point at which the
    wide model has computed what the adapter reads: right after the source's layer `e`, before
    the layers behind it that add nothing.

    Args:
        path: The source's adapter.
        source: Shape of the model it was trained for.
        wide: Shape of the expanded model, as its recipe has it.
        output: File to write.

    Raises:
        SpecPluginsError: `path` is no adapter.
        ExpansionError: It is not one of a model of that shape, or `wide` cannot hold `source`.
    """
    from safetensors.torch import load_file

    card = AdapterCard.read(path)
    wide = expanded_shape(source, wide)
    if card.target != dataclasses.replace(_target(source), rope=card.target.rope):
        raise ExpansionError(f"the adapter {path} was not trained for {source}.")
    tensors = load_file(path)
    grown = dataclasses.replace(
        card,
        model=f"{card.model}, expanded",
        target=dataclasses.replace(_target(wide), rope=card.target.rope),
        exit_layer=(card.exit_layer - 1) * (wide.num_layers // source.num_layers) + 1,
        ffn_size=card.ffn_size * wide.intermediate_size // source.intermediate_size,
        norm_epsilon=wide.rms_norm_eps,
        training={**card.training, "expanded_from": card.model},
    )
    weights = {
        name: _placed(name, tensors[name], shape, source, wide)
        for name, shape in grown.tensor_shapes().items()
    }
    embedding = torch.zeros(len(tensors["probe.embedding"]), wide.hidden_size)
    embedding[:, : source.hidden_size] = tensors["probe.embedding"]
    write_adapter(output, grown, weights, Probes(embedding, tensors["probe.rotation"]))
    return grown


def _placed(
    name: str, weight: Tensor, shape: tuple[int, ...], source: Architecture, wide: Architecture
) -> Tensor:
    """A weight of the source in one of the wide model, zero elsewhere."""
    result = torch.zeros(shape)
    if weight.ndim == 1:
        result.fill_(1.0)
        ratio = source.hidden_size / wide.hidden_size
        result[: len(weight)] = weight * ratio**0.5
    elif name == "query":
        result[query_rows(source, wide), : weight.shape[1]] = weight
    elif name == "output":
        result[: weight.shape[0], query_rows(source, wide)] = weight
    else:
        result[: weight.shape[0], : weight.shape[1]] = weight
    return result


def _target(shape: Architecture) -> TargetShape:
    return TargetShape(
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        vocab_size=shape.vocabulary,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        rope={},
    )
