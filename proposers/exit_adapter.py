"""A trained block after an early exit: one attention layer that makes its logits more the target's.

Kangaroo (Liu et al. 2404.18911): draft with the target's first layers, then this block, then
the target's own head. The block is RMSNorm, attention, residual sum, RMSNorm; a feed-forward
part is left out unless the file has one. It keeps keys and values of its own beside the
target's. `vllm-spec calibrate adapter` trains it; whatever it drafts, verification is exact.

The file is safetensors. Its metadata is one JSON text, the card, which can be read and checked
without reading a tensor. Matrices are `[out, in]`, float32:

    attention_norm [H], query [heads * D, H], key, value [kv_heads * D, H],
    output [H, heads * D], final_norm [H]; with a feed-forward part of width F also
    ffn_norm [H], gate, up [F, H], down [H, F]; and two probes of the target, see `Probes`.

Shapes: T tokens of a pass, H hidden size, D head width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_spec_plugins.errors import SpecPluginsError

if TYPE_CHECKING:
    from vllm_spec_plugins.context import ModelFacts
    from vllm_spec_plugins.target_model import PagedAttention, TargetModel

FORMAT_VERSION = 1

_METADATA = "exit_adapter"

#: Cosine between the embedding rows of one model in float32 and in a quantised form is above
#: this; those of two models are near 0.
_SAME_EMBEDDING = 0.99

#: Tables of cosines and sines in bfloat16 are this precise.
_SAME_ROTATION = 0.02


@dataclass(frozen=True, slots=True)
class TargetShape:
    """What an adapter and its target must have in common.

    Attributes:
        hidden_size: H.
        num_layers: Of the target.
        vocab_size: Tokens its head has logits for.
        num_heads: Query heads of the target's attention, and the adapter's.
        num_kv_heads: Key/value heads.
        head_dim: D.
        rope: Parameters of the rotary embedding, for people; `Probes` compares what it does.
    """

    hidden_size: int
    num_layers: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AdapterCard:
    """What a file says about its adapter.

    Attributes:
        model: Name of the model it was trained for.
        target: Its shape.
        exit_layer: Number of the target's layers that run before the adapter.
        ffn_size: Width of the feed-forward part; 0: there is none.
        norm_epsilon: Added to the mean square in both norms.
        training: How it was trained and how good it is on held-out text, for people.
    """

    model: str
    target: TargetShape
    exit_layer: int
    ffn_size: int
    norm_epsilon: float
    training: Mapping[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> AdapterCard:
        """Read the card of a file, not its tensors.

        Raises:
            SpecPluginsError: No such file, not an adapter, or one of another format version.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise SpecPluginsError(
                f"no adapter file {path}: `vllm-spec calibrate adapter` trains one"
            )
        try:
            with safe_open(str(path), framework="pt") as file:
                text = (file.metadata() or {}).get(_METADATA)
        except (SafetensorError, OSError) as error:
            raise SpecPluginsError(f"{path} is not an exit adapter: {error}") from error
        if text is None:
            raise SpecPluginsError(
                f"{path} is not an exit adapter: it has no card. Files that "
                "`vllm-spec calibrate adapter` writes have one"
            )
        try:
            values: dict[str, Any] = json.loads(text)
            version = values.pop("format_version")
            if version == FORMAT_VERSION:
                return cls(target=TargetShape(**values.pop("target")), **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SpecPluginsError(
                f"{path} is not an exit adapter: bad card ({error!r})"
            ) from error
        raise SpecPluginsError(
            f"{path} is an exit adapter of format version {version}; this release reads version "
            f"{FORMAT_VERSION}: train it again, or use the release that wrote it"
        )

    def check(self, facts: ModelFacts, exit_layer: int) -> None:
        """Whether the adapter belongs to the model about to be served.

        Args:
            facts: Of that model.
            exit_layer: After which the adapter is to run.

        Raises:
            SpecPluginsError: It was trained for another model or exit layer, or cannot be
                split among so many ranks.
        """
        for name in ("hidden_size", "num_layers", "vocab_size"):
            there, here = getattr(self.target, name), getattr(facts, name)
            if there != here:
                raise SpecPluginsError(
                    f'the adapter was trained for another model ("{self.model}"): '
                    f"its {name} is {there}, that of {facts.model} is {here}"
                )
        if exit_layer != self.exit_layer:
            raise SpecPluginsError(
                f"the adapter was trained for exit_layer {self.exit_layer}, not {exit_layer}: "
                f"set exit_layer to {self.exit_layer} or train one for {exit_layer}"
            )
        self.shards(facts.tensor_parallel_size)

    def shards(self, ranks: int) -> tuple[int, int, int]:
        """Query heads, key/value heads and feed-forward columns of each rank.

        Raises:
            SpecPluginsError: They do not divide.
        """
        whole = (self.target.num_heads, self.target.num_kv_heads, self.ffn_size)
        if any(count % ranks for count in whole):
            raise SpecPluginsError(
                f"the adapter cannot be split among {ranks} ranks: it has {whole[0]} query heads, "
                f"{whole[1]} key/value heads and {whole[2]} feed-forward columns"
            )
        return whole[0] // ranks, whole[1] // ranks, whole[2] // ranks

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor in the file, the probes aside."""
        target, ffn = self.target, self.ffn_size
        hidden, width = target.hidden_size, target.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "attention_norm": (hidden,),
            "query": (target.num_heads * width, hidden),
            "key": (target.num_kv_heads * width, hidden),
            "value": (target.num_kv_heads * width, hidden),
            "output": (hidden, target.num_heads * width),
            "final_norm": (hidden,),
        }
        if ffn:
            shapes |= {"ffn_norm": (hidden,), "down": (hidden, ffn)}
            shapes |= {"gate": (ffn, hidden), "up": (ffn, hidden)}
        return shapes


@dataclass(frozen=True, slots=True)
class Probes:
    """Samples of what the target does, by which an adapter knows it again.

    Shapes alone would not tell two models of one family apart, and a rotation by pairs instead
    of halves would only show as poor drafts.

    Attributes:
        embedding: `[8, H]` embeddings of `tokens`, up to a factor.
        rotation: `[3, D]` a head of `rotation_input`, rotated at `positions`.
    """

    embedding: Tensor
    rotation: Tensor

    @staticmethod
    def tokens(vocab_size: int) -> Tensor:
        """`[8]` int64, spread evenly over the vocabulary."""
        return (torch.arange(8) * 2 + 1) * vocab_size // 16

    @staticmethod
    def positions() -> Tensor:
        """`[3]` int64."""
        return torch.tensor([1, 7, 63])

    @staticmethod
    def rotation_input(head_dim: int) -> Tensor:
        """`[3, D]`: ones, then zeros; rotating halves gives the cosines, then the sines."""
        return torch.cat([torch.ones(head_dim // 2), torch.zeros(head_dim // 2)]).repeat(3, 1)

    def compare(self, other: Probes) -> str | None:
        """What differs between two models, in words; None if they are one."""
        cosine = F.cosine_similarity(
            self.embedding.flatten().double(), other.embedding.flatten().double(), dim=0
        )
        if not cosine > _SAME_EMBEDDING:
            return f"its embedding differs (cosine {cosine:.2f})"
        difference = (self.rotation - other.rotation).abs().max()
        if not difference < _SAME_ROTATION:
            return f"its rotary position embedding differs (by up to {difference:.2f})"
        return None


def write_adapter(
    path: str | Path, card: AdapterCard, weights: Mapping[str, Tensor], probes: Probes
) -> None:
    """Write an adapter file.

    Args:
        path: Overwritten if it exists.
        card: Its metadata.
        weights: As `card.tensor_shapes()` has them.
        probes: Of the target it was trained for.

    Raises:
        ValueError: A weight is missing, left over, or of another shape.
    """
    from safetensors.torch import save_file

    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if shapes != card.tensor_shapes():
        raise ValueError(f"weights {shapes} are not those of the card: {card.tensor_shapes()}")
    tensors = {**weights, "probe.embedding": probes.embedding, "probe.rotation": probes.rotation}
    values = {"format_version": FORMAT_VERSION, **dataclasses.asdict(card)}
    save_file(
        {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in tensors.items()},
        str(path),
        metadata={_METADATA: json.dumps(values)},
    )


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
            raise SpecPluginsError(f"{path} is damaged: its tensors are not those of its card")
        self._attention = target.attention(f"exit_adapter.{card.exit_layer}")
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
        x = hidden + self._all_reduce(F.linear(self._attend(hidden, positions), self._output))
        if self.card.ffn_size:
            gate, up = F.linear(self._norm(x, self._ffn_norm), self._gate_up).chunk(2, dim=-1)
            x = x + self._all_reduce(F.linear(F.silu(gate) * up, self._down))
        return self._norm(x, self._final_norm)

    def write(self, hidden: Tensor, positions: Tensor) -> None:
        """Only write keys and values of T tokens, those of verified tokens; see `forward`."""
        self._attend(hidden, positions)

    def _attend(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """`[T, heads * D]`, of this rank's heads."""
        mixed = F.linear(self._norm(hidden, self._attention_norm), self._query_key_value)
        query, key, value = mixed.split(self._widths, dim=-1)
        query, key = self._attention.rotate(positions, query, key)
        return self._attention(query, key, value)

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
                "`vllm-spec calibrate adapter` trains one for this model"
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
