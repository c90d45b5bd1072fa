"""A judge: one linear map from the target's final hidden state at a draft token to a score.

Judge Decoding (Bachmann et al. 2501.19309) and AutoJudge (2504.20039): the hidden state after
the target has read the draft token tells whether that token spoils the text, or only says
otherwise what the target would have said. `verifiers/judge.py` serves a head,
`calibration/judge_training.py` trains it.

The file is safetensors with a card (`card_file.py`). Tensors: `weight` `[H]` and `bias` `[1]`
float32, `never_judge` `[M]` int64, and `probe.*`, samples of the target's weights
(`weight_probes.py`). H is the target's hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .card_file import CardFormat, check_sizes
from .errors import SpecPluginsError
from .weight_probes import difference, read_probes

if TYPE_CHECKING:
    from .context import ModelFacts

_FORMAT = CardFormat("judge head", "judge_head", 1, "vllm-spec calibrate judge")

#: The hidden states heads read: after the model's last norm, as its own output head does.
NORM_STATE = "after the final norm"


@dataclass(frozen=True, slots=True)
class JudgeCard:
    """What a file says about its head.

    Attributes:
        model: Name of the target it was trained for.
        hidden_size: H of that target.
        num_layers: Layers of that target.
        vocab_size: Tokens that target has logits for.
        layer: After how many layers the hidden state is taken: all of them.
        norm_state: `NORM_STATE`.
        dtype: In which the target computed the states the head learnt from.
        threshold: Recommended one, in [0, 1].
        tool_calls: Token ids that open a tool call, each with the one that closes it, if any.
        data_sha256: Of the labelled tokens.
        training: How it was trained and how good it is on held-out prompts, for people.
    """

    model: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    layer: int
    norm_state: str
    dtype: str
    threshold: float
    tool_calls: Sequence[Sequence[int]]
    data_sha256: str
    training: Mapping[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> JudgeCard:
        """Read the card of a file, not its tensors.

        Raises:
            SpecPluginsError: No such file, not a judge head, one of another format version, or
                one that reads other hidden states than a verifier gets.
        """
        values = _FORMAT.read(path)
        try:
            card = cls(**values)
        except TypeError as error:
            raise _FORMAT.bad_card(path, error) from error
        if card.layer != card.num_layers or card.norm_state != NORM_STATE:
            raise SpecPluginsError(
                f"{path} reads hidden states {card.norm_state}, of layer {card.layer} of "
                f"{card.num_layers}; verifiers get those {NORM_STATE}, of the last layer."
            )
        return card

    def check(self, facts: ModelFacts) -> None:
        """Whether the head has the sizes of the model about to be served.

        Raises:
            SpecPluginsError: It was trained for another model.
        """
        names = ("hidden_size", "num_layers", "vocab_size")
        sizes = {name: getattr(self, name) for name in names}
        check_sizes("judge head", self.model, sizes, facts)


@dataclass(frozen=True, slots=True)
class JudgeHead:
    """A head and its card.

    Attributes:
        card: Who it is for.
        weight: `[H]` float32.
        bias: `[1]` float32.
        never_judge: `[M]` int64 tokens it has no say in: end of text, control, chat and tool
            tokens of the target's tokenizer.
        probes: Samples of the target's weights.
    """

    card: JudgeCard
    weight: Tensor
    bias: Tensor
    never_judge: Tensor
    probes: Mapping[str, Tensor]

    @classmethod
    def read(cls, path: str | Path, device: torch.device | str = "cpu") -> JudgeHead:
        """Read a file, weight and bias onto a device.

        Raises:
            SpecPluginsError: See `JudgeCard.read`; or the file is damaged.
        """
        from safetensors.torch import load_file

        card = JudgeCard.read(path)
        tensors = load_file(str(path))
        probes = {
            name.removeprefix("probe."): tensors.pop(name)
            for name in sorted(tensors)
            if name.startswith("probe.")
        }
        expected = {
            "weight": (torch.float32, (card.hidden_size,)),
            "bias": (torch.float32, (1,)),
            "never_judge": (torch.int64, (len(tensors.get("never_judge", ())),)),
        }
        if {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} != expected:
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise SpecPluginsError(
                f"{path} is damaged: its tensors ({shapes}) are not those of a head of width "
                f"{card.hidden_size}."
            )
        if not all(bool(tensors[name].isfinite().all()) for name in ("weight", "bias")):
            raise SpecPluginsError(f"{path} is damaged: its weights are not all finite numbers.")
        weight, bias = tensors["weight"].to(device), tensors["bias"].to(device)
        return cls(card, weight, bias, tensors["never_judge"], probes)

    def write(self, path: str | Path) -> None:
        """Write the file; one that exists is overwritten."""
        tensors = {"weight": self.weight, "bias": self.bias, "never_judge": self.never_judge}
        tensors |= {f"probe.{name}": probe for name, probe in self.probes.items()}
        _FORMAT.write(path, dataclasses.asdict(self.card), tensors)

    def log_odds(self, hidden_states: Tensor) -> Tensor:
        """`[N]` float32, log odds that each token does no harm, of `[N, H]` hidden states."""
        return hidden_states.float() @ self.weight + self.bias

    def recognise(self, folder: str | Path, path: str | Path) -> bool:
        """Refuse a target whose weights are not those the head was trained for.

        Args:
            folder: Of that target.
            path: Of the head, for the message.

        Returns:
            Whether there was anything to compare.

        Raises:
            SpecPluginsError: It is another model.
        """
        found = read_probes(folder, self.card.num_layers)
        differs = difference(self.probes, found)
        if differs is not None:
            raise SpecPluginsError(
                f'{path} was trained for another model ("{self.card.model}") than {folder}: '
                f"{differs}. `vllm-spec calibrate judge` trains one for this model."
            )
        return bool(self.probes.keys() & found.keys())
