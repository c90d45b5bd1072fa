"""A Llama to train: plain torch, fused projections, exported in the layout vLLM and HF read.

Written out instead of imported because training must run on a few CPU cores: one matrix
product for q, k and v, one for gate and up, and hidden states of the layers we exit from
handed out without running the head. `tests/test_zoo.py` compares it with transformers' Llama.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recipes import Architecture


class Layer(nn.Module):
    """One Llama decoder layer: attention and SwiGLU, each behind an RMSNorm."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        self.shape = shape
        hidden, heads = shape.hidden_size, shape.num_heads * shape.head_dim
        keys = shape.num_key_value_heads * shape.head_dim
        self.attention_norm = nn.Parameter(torch.ones(hidden))
        self.mlp_norm = nn.Parameter(torch.ones(hidden))
        self.qkv = nn.Parameter(torch.empty(heads + 2 * keys, hidden))
        self.attention_out = nn.Parameter(torch.empty(hidden, heads))
        self.gate_up = nn.Parameter(torch.empty(2 * shape.intermediate_size, hidden))
        self.down = nn.Parameter(torch.empty(hidden, shape.intermediate_size))

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`."""
        shape = self.shape
        batch, length, hidden = x.shape
        heads, keys, width = shape.num_heads, shape.num_key_value_heads, shape.head_dim
        h = F.rms_norm(x, (hidden,), self.attention_norm, shape.rms_norm_eps)
        qkv = F.linear(h, self.qkv).view(batch, length, heads + 2 * keys, width).transpose(1, 2)
        qk = _rotate(qkv[:, : heads + keys], *rotation)
        q, k = qk.split((heads, keys), dim=1)
        v = qkv[:, heads + keys :]
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != keys)
        x = x + F.linear(h.transpose(1, 2).reshape(batch, length, -1), self.attention_out)
        h = F.rms_norm(x, (hidden,), self.mlp_norm, shape.rms_norm_eps)
        gate, up = F.linear(h, self.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down)


class Llama(nn.Module):
    """Decoder and head. `forward` stops at hidden states; `loss.py` has the rest."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.empty(shape.vocabulary, shape.hidden_size))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden_size))
        self.head = nn.Parameter(torch.empty(shape.vocabulary, shape.hidden_size))

    def initialise(self, generator: torch.Generator) -> None:
        """Normal 0.02; what writes to the residual stream smaller, by 1/sqrt(2 layers) (GPT-2)."""
        residual = 0.02 / math.sqrt(2 * self.shape.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                small = name.endswith(("attention_out", "down"))
                nn.init.normal_(parameter, std=residual if small else 0.02, generator=generator)

    def forward(self, token_ids: Tensor, exits: Sequence[int] = ()) -> list[Tensor]:
        """Normalised hidden states after each layer count in `exits`, then after the last.

        Args:
            token_ids: `[B, T]` int64.
            exits: Layer counts in rising order; 2 means after the second layer.

        Returns:
            `len(exits) + 1` tensors `[B, T, H]`: the final norm is shared by all exits.
        """
        rotation = _rotation(token_ids.shape[1], self.shape)
        x = F.embedding(token_ids, self.embedding)
        outputs: list[Tensor] = []
        for depth, layer in enumerate(self.layers, start=1):
            x = layer(x, rotation)
            if depth in exits or depth == len(self.layers):
                outputs.append(self.normalise(x))
        return outputs

    def normalise(self, x: Tensor) -> Tensor:
        """The final norm, `[..., H]`."""
        return F.rms_norm(x, (self.shape.hidden_size,), self.norm, self.shape.rms_norm_eps)

    def export(self) -> dict[str, Tensor]:
        """Weights under the names transformers and vLLM know. Copies, contiguous."""
        weights: dict[str, Tensor] = {name: getattr(self, ours) for ours, name in _OUTER.items()}
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}."
            for ours, theirs in _FUSED.items():
                parts = getattr(layer, ours).split(_rows(ours, self.shape))
                weights |= {
                    f"{prefix}{name}.weight": p for name, p in zip(theirs, parts, strict=True)
                }
        return {name: w.detach().clone().contiguous() for name, w in weights.items()}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """The inverse of `export`.

        Raises:
            KeyError: A weight is missing.
        """
        with torch.no_grad():
            for ours, theirs in _OUTER.items():
                getattr(self, ours).copy_(weights[theirs])
            for index, layer in enumerate(self.layers):
                for ours, theirs in _FUSED.items():
                    names = [f"model.layers.{index}.{name}.weight" for name in theirs]
                    getattr(layer, ours).copy_(torch.cat([weights[name] for name in names]))


_OUTER = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}

#: Our fused parameters and the weights they are made of, stacked by rows.
_FUSED = {
    "attention_norm": ("input_layernorm",),
    "mlp_norm": ("post_attention_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def _rows(name: str, shape: Architecture) -> list[int]:
    """How many rows of a fused parameter belong to each of its parts."""
    keys = shape.num_key_value_heads * shape.head_dim
    return {
        "qkv": [shape.num_heads * shape.head_dim, keys, keys],
        "gate_up": [shape.intermediate_size, shape.intermediate_size],
    }.get(name, [shape.hidden_size])


def hidden_matrices(model: Llama) -> list[tuple[Tensor, list[int]]]:
    """Every matrix inside the layers, with the row counts of the matrices fused in it."""
    return [
        (getattr(layer, name), _rows(name, model.shape))
        for layer in model.layers
        for name in ("qkv", "attention_out", "gate_up", "down")
    ]


def _rotation(length: int, shape: Architecture) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embedding (Su et al. 2104.09864), `[T, head_dim]` each."""
    half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), shape.rope_theta**-half)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate the two halves of each head against each other; `[B, heads, T, head_dim]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines
