"""What a conditioned drafter knows of its target: hidden states after some of its layers.

The states of a token, one after each of `layers` layers, are normed one by one, laid side by side
and projected by one matrix to the drafter's width. The result is added to the embedding of the
*next* token: what the drafter reads at position p is token p and what the target made of the
text before it. Masks are given nothing.

DFlash (2602.06036) conditions a block drafter on states of evenly spread layers, side by side
through one matrix, as here, and injects the result into keys and values of every layer. EAGLE
(2401.15077) adds what it knows to what a token's embedding says, shifted by one token. We take
the latter way in, for two reasons. The last token of a text has been sampled, not read: the
target has no state of it yet. Shifted, every token has all it will ever have when it comes, so
keys and values are final; unshifted, the last one would have to be read again in the next step.
And a projection of zeros leaves the model that training starts from as it is.

Not every state is known: those of tokens that vLLM found in its prefix cache were computed for
somebody else. There, and before the first token, a learned vector stands.

Shapes: T tokens; n layers asked for; H width of the drafter, G of the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_spec_plugins.errors import SpecPluginsError

#: Layers that `spread_layers` names: early, middle and late, as in EAGLE-3 (2503.01840).
_SPREAD = 3

_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class TargetStates:
    """Whose hidden states a drafter reads. `conditioned_on` in its `config.json`.

    Attributes:
        model: Name of the target.
        revision: Of a target from the Hub, the commit; None where it has none.
        num_layers: Of the target.
        hidden_size: G.
        layers: Numbers of layers run, rising, after which states are read.
    """

    model: str
    revision: str | None
    num_layers: int
    hidden_size: int
    layers: tuple[int, ...]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TargetStates:
        """From a config.

        Raises:
            KeyError: A key is missing.
            ValueError: There are no such layers.
        """
        layers = tuple(int(layer) for layer in values["layers"])
        num_layers = int(values["num_layers"])
        if not layers or layers != tuple(sorted(set(layers) & set(range(1, num_layers + 1)))):
            raise ValueError(
                f"conditioned_on: layers must be rising numbers from 1 to {num_layers}, not "
                f"{list(layers)}"
            )
        return cls(
            model=str(values["model"]),
            revision=values.get("revision"),
            num_layers=num_layers,
            hidden_size=int(values["hidden_size"]),
            layers=layers,
        )

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "layers": list(self.layers)}


def layers_of(text: str, num_layers: int) -> tuple[int, ...]:
    """Layers as a command line names them.

    Args:
        text: Numbers with commas; `spread`: early, middle and late ones, from the second to the
            third last, as DFlash spreads them; `none`.
        num_layers: Of the target.

    Raises:
        SpecPluginsError: It names none of these, or layers that are not there.
    """
    if text == "none":
        return ()
    if text == "spread":
        first, last = min(2, num_layers), max(num_layers - 2, 1)
        steps = torch.linspace(first, last, _SPREAD).round().int().tolist()
        return tuple(sorted(set(steps)))
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        layers = [0]
    if not all(1 <= layer <= num_layers for layer in layers):
        raise SpecPluginsError(
            f"--condition-on-layers takes numbers of layers from 1 to {num_layers}, those of the "
            f'target, with commas between them; "spread"; or "none"; not "{text}".'
        )
    return tuple(sorted(set(layers)))


class Conditioning(nn.Module):
    """Turns the target's hidden states into what is added to the drafter's embeddings."""

    def __init__(self, states: TargetStates, hidden_size: int) -> None:
        """Zeros: an untrained one adds nothing.

        Args:
            states: Which states are read.
            hidden_size: H.
        """
        super().__init__()
        width = len(states.layers) * states.hidden_size
        self.projection = nn.Parameter(torch.zeros(hidden_size, width))
        self.unknown = nn.Parameter(torch.zeros(hidden_size))

    def project(self, layer_states: Sequence[Tensor]) -> Tensor:
        """What tokens say to those after them.

        Args:
            layer_states: `[..., G]` after each of the layers, of any dtype.

        Returns:
            `[..., H]`.
        """
        dtype = self.projection.dtype
        normed = [
            F.rms_norm(state.to(dtype), state.shape[-1:], eps=_EPSILON) for state in layer_states
        ]
        return F.linear(torch.cat(normed, dim=-1), self.projection)

    def where_known(self, projected: Tensor, known: Tensor) -> Tensor:
        """`[..., H]`, with the learned vector where `[...]` known says no."""
        return torch.where(known.unsqueeze(-1), projected, self.unknown)

    def of_texts(self, layer_states: Sequence[Tensor], known: Tensor | None = None) -> Tensor:
        """What is added to the tokens of whole texts.

        Args:
            layer_states: `[R, T, G]` after each of the layers.
            known: `[R, T]` bool, states that are known; None: all.

        Returns:
            `[R, T, H]`: at each token what the one before it says.
        """
        before = F.pad(self.project(layer_states)[:, :-1], (0, 0, 1, 0))
        if known is None:
            known = torch.ones(before.shape[:2], dtype=torch.bool, device=before.device)
        return self.where_known(before, F.pad(known[:, :-1], (1, 0)))
