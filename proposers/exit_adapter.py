"""A trained block after an early exit: one attention layer that makes its logits more the target's.

Kangaroo (Liu et al. 2404.18911): draft with the target's first layers, then this block, then
the target's own head. The block is RMSNorm, attention, residual sum, RMSNorm; a feed-forward
part is left out unless the file has one. It keeps keys and values of its own beside the
target's. `vllm-spec calibrate adapter` trains it; whatever it drafts, verification is exact.

Shapes: T tokens of a pass, H hidden size, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_spec_plugins.adapter_file import AdapterCard, Probes, TargetShape
from vllm_spec_plugins.errors import SpecPluginsError

if TYPE_CHECKING:
    from vllm_spec_plugins.target_model import PagedAttention, TargetModel

__all__ = ["AdapterCard", "ExitAdapter"]


class ExitAdapter:
    """The block, over its own pages. Make it in `Proposer.load`; call it inside a step.

    Under tensor parallelism each rank holds some heads, and all ranks must call it together.
    """

    def __init__(self, path: str | Path, target: TargetModel) -> None:
        """Load the weights onto the target's device, in its dtype, and ask it for pages.

        Args:
            path: The file.
            target: The model it was trained for.

        Raises:
            SpecPluginsError: See `AdapterCard.read`; it was trained for another model; it
                cannot be split among the ranks; or the target takes no further layer.
        """
        from safetensors.torch import load_file

        self.card = card = AdapterCard.read(path)
        tensors = load_file(path)
        shapes = {name: tuple(tensors[name].shape) for name in tensors if "probe" not in name}
        if shapes != card.tensor_shapes():
            raise SpecPluginsError(f"{path} is damaged: its tensors are not those of its card.")
        self._attention = target.attention("exit_adapter")
        self._all_reduce = target.all_reduce
        trained_for = Probes(tensors["probe.embedding"], tensors["probe.rotation"])
        self._recognise(path, target, trained_for)
        self._take_shard(tensors, target)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Write keys and values of T tokens, attend, and norm for the head.

        Args:
            hidden: `[T, H]` the residual stream after `card.exit_layer` layers.
            positions: `[T]` int64; the target's, token by token.

        Returns:
            `[T, H]` what the target's head reads instead of its final norm's output.
        """
        mixed = F.linear(self._norm(hidden, self._attention_norm), self._query_key_value)
        query, key, value = mixed.split(self._widths, dim=-1)
        query, key = self._attention.rotate(positions, query, key)
        attended = self._attention(query, key, value)
        x = hidden + self._all_reduce(F.linear(attended, self._output))
        if self.card.ffn_size:
            gate, up = F.linear(self._norm(x, self._ffn_norm), self._gate_up).chunk(2, dim=-1)
            x = x + self._all_reduce(F.linear(F.silu(gate) * up, self._down))
        return self._norm(x, self._final_norm)

    def write(self, hidden: Tensor, positions: Tensor) -> None:
        """Only write keys and values of T tokens, those of verified tokens; see `forward`."""
        queries, *_ = self._widths
        mixed = F.linear(self._norm(hidden, self._attention_norm), self._query_key_value[queries:])
        key, value = mixed.split(self._widths[1:], dim=-1)
        # The target's rotation takes both; nobody reads this query.
        _, key = self._attention.rotate(positions, torch.zeros_like(key), key)
        self._attention.write(key, value)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.card.norm_epsilon)

    def _recognise(self, path: str | Path, target: TargetModel, trained_for: Probes) -> None:
        """Refuse a target the adapter was not trained for."""
        card, attention = self.card, self._attention
        differs = None
        if target.num_layers != card.target.num_layers:
            differs = f"it has {target.num_layers} layers"
        elif target.head.hidden_size != card.target.hidden_size:
            differs = f"its hidden size is {target.head.hidden_size}"
        elif not _same_heads(attention, card.target):
            differs = (
                f"its attention has {attention.num_heads} heads of {attention.head_dim} columns "
                f"over {attention.num_kv_heads} key/value heads on each rank"
            )
        else:
            differs = trained_for.compare(_probes_of(target, attention, card.target.vocab_size))
        if differs is not None:
            raise SpecPluginsError(
                f'{path} was trained for another model ("{card.model}") than this one: {differs}. '
                "`vllm-spec calibrate adapter` trains one for this model."
            )

    def _take_shard(self, tensors: Mapping[str, Tensor], target: TargetModel) -> None:
        """Keep this rank's heads and columns, on the target's device and in its dtype."""
        card, rank = self.card, target.tensor_parallel_rank
        heads, kv_heads, columns = card.shards(card.target.num_heads // self._attention.num_heads)
        device = next(target.module.parameters()).device
        width = card.target.head_dim

        def ready(tensor: Tensor) -> Tensor:
            return tensor.to(device, target.dtype).contiguous()

        def rows(name: str, count: int) -> Tensor:
            return tensors[name][rank * count :][:count]

        query = rows("query", heads * width)
        key, value = (rows(name, kv_heads * width) for name in ("key", "value"))
        self._widths = (len(query), len(key), len(value))
        self._query_key_value = ready(torch.cat([query, key, value]))
        self._output = ready(tensors["output"][:, rank * heads * width :][:, : heads * width])
        self._attention_norm = ready(tensors["attention_norm"])
        self._final_norm = ready(tensors["final_norm"])
        if card.ffn_size:
            self._ffn_norm = ready(tensors["ffn_norm"])
            self._gate_up = ready(torch.cat([rows("gate", columns), rows("up", columns)]))
            self._down = ready(tensors["down"][:, rank * columns :][:, :columns])


def _same_heads(attention: PagedAttention, target: TargetShape) -> bool:
    """Whether the attention has the target's heads, or an equal share of both kinds."""
    ranks = target.num_heads // max(attention.num_heads, 1)
    return (
        attention.head_dim == target.head_dim
        and attention.num_heads * ranks == target.num_heads
        and attention.num_kv_heads * ranks == target.num_kv_heads
    )


def _probes_of(target: TargetModel, attention: PagedAttention, vocab_size: int) -> Probes:
    """Ask a loaded target. Every rank must."""
    device = next(target.module.parameters()).device
    head = Probes.rotation_input(attention.head_dim).to(device, target.dtype)
    with torch.no_grad():
        embedding = target.embed(Probes.tokens(vocab_size).to(device)).merged
        query, _ = attention.rotate(
            Probes.positions().to(device),
            head.repeat(1, attention.num_heads),
            head.repeat(1, attention.num_kv_heads),
        )
    return Probes(embedding.float().cpu(), query[:, : attention.head_dim].float().cpu())
