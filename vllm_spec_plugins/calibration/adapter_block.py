"""The exit adapter's block as it is trained: whole windows at once, weights in float32.

`proposers/exit_adapter.py` serves the same block token by token; `tests/test_calibrate_adapter.py`
compares the two. Shapes: B windows, T tokens each, H hidden size, D head width.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_spec_plugins.adapter_file import AdapterCard, Probes, TargetShape
from vllm_spec_plugins.errors import SpecPluginsError

from .hugging_face import LocalModel


class AdapterBlock(nn.Module):
    """RMSNorm, attention, residual sum, perhaps a feed-forward part, RMSNorm.

    Begins as the bare exit: what writes to the residual stream is zero, and the last norm has
    the target's weight. So training starts from the exit's own drafts and has only to improve
    them. (Where the target's norm takes the mean off, as OLMo's does, it starts near them.)

    Args:
        model: The target.
        ffn_size: Width of the feed-forward part, 0 for none.
        seed: Of the weights that do not begin at zero.

    Raises:
        SpecPluginsError: The target's attention is of a kind that a block cannot share.
    """

    def __init__(self, model: LocalModel, ffn_size: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.ffn_size = ffn_size
        self.epsilon = model.norm_epsilon
        self.attention = model.attention
        self._low_precision = model.dtype
        self._rotation = model.rotation
        hidden, width = model.hidden_size, self.attention.head_dim
        queries, keys = (n * width for n in (self.attention.num_heads, self.attention.num_kv_heads))
        generator = torch.Generator().manual_seed(seed)

        def reading(rows: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, hidden, generator=generator) * hidden**-0.5)

        self.attention_norm = nn.Parameter(torch.ones(hidden))
        self.query, self.key, self.value = reading(queries), reading(keys), reading(keys)
        self.output = nn.Parameter(torch.zeros(hidden, queries))
        self.final_norm = nn.Parameter(_norm_weight(model).cpu())
        if ffn_size:
            self.ffn_norm = nn.Parameter(torch.ones(hidden))
            self.gate, self.up = reading(ffn_size), reading(ffn_size)
            self.down = nn.Parameter(torch.zeros(hidden, ffn_size))
        self.to(model.device)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, T, H]` residual streams after the exit to `[B, T, H]` what the head reads."""
        low = self._low_precision
        with torch.autocast(hidden.device.type, low, enabled=low != torch.float32):
            x = hidden.float()
            x = x + F.linear(self._attend(self._norm(x, self.attention_norm)), self.output)
            if self.ffn_size:
                h = self._norm(x, self.ffn_norm)
                x = x + F.linear(F.silu(F.linear(h, self.gate)) * F.linear(h, self.up), self.down)
            return self._norm(x, self.final_norm).to(low)

    def matrices(self) -> list[tuple[Tensor, list[int]]]:
        """Every matrix with its number of rows, as `Muon` takes them."""
        return [(weight, [len(weight)]) for weight in self.parameters() if weight.ndim == 2]

    def vectors(self) -> list[Tensor]:
        """The weights of the norms."""
        return [weight for weight in self.parameters() if weight.ndim == 1]

    def _attend(self, h: Tensor) -> Tensor:
        width, heads = self.attention.head_dim, self.attention.num_heads
        rotation = self._rotation(torch.arange(h.shape[1]))
        query, key, value = (
            F.linear(h, weight).unflatten(-1, (-1, width)).transpose(1, 2)
            for weight in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(
            _rotate(query, *rotation).to(value.dtype),
            _rotate(key, *rotation).to(value.dtype),
            value,
            is_causal=True,
            scale=self.attention.scale,
            enable_gqa=heads != self.attention.num_kv_heads,
        )
        return mixed.transpose(1, 2).flatten(2)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.epsilon)


def load_block(path: str | Path, model: LocalModel) -> AdapterBlock:
    """A trained block from its file, to be measured on whole windows.

    Raises:
        SpecPluginsError: Not an adapter, or not one for this model.
    """
    from safetensors.torch import load_file

    card = AdapterCard.read(path)
    block = AdapterBlock(model, card.ffn_size)
    tensors = load_file(path)
    differs = "its shape differs"
    if target_shape(model) == card.target:
        trained_for = Probes(tensors.pop("probe.embedding"), tensors.pop("probe.rotation"))
        differs = trained_for.compare(probes_of(model))
    if differs is not None:
        raise SpecPluginsError(f'{path} was trained for another model ("{card.model}"): {differs}.')
    block.load_state_dict(tensors)
    return block.requires_grad_(False)


def target_shape(model: LocalModel) -> TargetShape:
    """What the card says about the target."""
    attention = model.attention
    return TargetShape(
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        vocab_size=model.vocab_size,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        rope=attention.rope,
    )


@torch.no_grad()
def probes_of(model: LocalModel) -> Probes:
    """By what the target is known again when it is served."""
    positions = Probes.positions().to(model.device)
    head = Probes.rotation_input(model.attention.head_dim).to(model.device)
    return Probes(
        model.embed(Probes.tokens(model.vocab_size)).float().cpu(),
        _rotate(head, *model.rotation(positions)).cpu(),
    )


@torch.no_grad()
def _norm_weight(model: LocalModel) -> Tensor:
    """`[H]` float32 weight of the target's final norm, however the model stores it.

    Of a vector of mean 0 and mean square 1, an RMSNorm or LayerNorm gives its weight times it.
    """
    signs = 1.0 - 2.0 * (torch.arange(model.hidden_size, device=model.device) % 2)
    return model.final_norm(signs.to(model.dtype)).float() * signs


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate the two halves of each head against each other; `[..., T, D]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines
