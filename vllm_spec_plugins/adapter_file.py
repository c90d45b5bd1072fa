"""The file of an exit adapter: who it was trained for, how well, and its weights.

safetensors. The metadata is one JSON text, the card, which can be read and checked without
reading a tensor. Matrices are `[out, in]`, everything float32:

    attention_norm [H], query [heads * D, H], key, value [kv_heads * D, H],
    output [H, heads * D], final_norm [H]; with a feed-forward part of width F also
    ffn_norm [H], gate, up [F, H], down [H, F]; and two probes of the target, see `Probes`.

H hidden size, D head width. `proposers/exit_adapter.py` computes with it,
`calibration/adapter.py` trains it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .card_file import CardFormat, check_sizes
from .errors import SpecPluginsError

if TYPE_CHECKING:
    from .context import ModelFacts

FORMAT_VERSION = 1

_FORMAT = CardFormat("exit adapter", "exit_adapter", FORMAT_VERSION, "vllm-spec calibrate adapter")

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
        values = _FORMAT.read(path)
        try:
            return cls(target=TargetShape(**values.pop("target")), **values)
        except (KeyError, TypeError, AttributeError) as error:
            raise _FORMAT.bad_card(path, error) from error

    def check(self, facts: ModelFacts, exit_layer: int) -> None:
        """Whether the adapter belongs to the model about to be served.

        Args:
            facts: Of that model.
            exit_layer: After which the adapter is to run.

        Raises:
            SpecPluginsError: It was trained for another model or exit layer, or cannot be
                split among so many ranks.
        """
        names = ("hidden_size", "num_layers", "vocab_size")
        sizes = {name: getattr(self.target, name) for name in names}
        check_sizes("adapter", self.model, sizes, facts)
        if exit_layer != self.exit_layer:
            raise SpecPluginsError(
                f"the adapter was trained for exit_layer {self.exit_layer}, not {exit_layer}: "
                f"set exit_layer to {self.exit_layer} or train one for {exit_layer}."
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
                f"{whole[1]} key/value heads and {whole[2]} feed-forward columns."
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
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if shapes != card.tensor_shapes():
        raise ValueError(f"weights {shapes} are not those of the card: {card.tensor_shapes()}")
    tensors = {**weights, "probe.embedding": probes.embedding, "probe.rotation": probes.rotation}
    tensors = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    _FORMAT.write(path, dataclasses.asdict(card), tensors)
