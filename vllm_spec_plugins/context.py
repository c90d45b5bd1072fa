"""What a plugin is told about the engine it runs in. Plain values, no vLLM objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Known before any weight is loaded; options are checked against it.

    Attributes:
        model: Name or path of the target model, as the user gave it.
        vocab_size: Number of token ids the target's logits cover.
        hidden_size: Width of the target's hidden states.
        num_layers: Number of transformer layers of the target.
        max_model_len: Longest sequence served, in tokens.
        num_speculative_tokens: Most tokens drafted for one request in one step; 0 while options
            are checked and it is left to the draft model's config, which is read later.
        tensor_parallel_size: Ranks that share each layer.
        image_token_range: `[first, last + 1)` ids that are image codes, where the model's
            config says so (`image_token_range.py`).
        end_token_ids: Tokens that end a text, where the model's config names them.
        revision: Of a model on the Hub, branch, tag or commit; None: its default.
    """

    model: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_model_len: int
    num_speculative_tokens: int
    tensor_parallel_size: int = 1
    image_token_range: tuple[int, int] | None = None
    end_token_ids: tuple[int, ...] = ()
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class EngineContext:
    """Given to the constructor of every proposer, verifier and length controller.

    Attributes:
        facts: The same facts the options were checked against.
        device: Where the target runs; tensors handed to plugins live there.
        max_num_requests: Most requests in one step.
        seed: The engine's seed; equal on all ranks.
        chooses_exits: Whether the length controller chooses among a proposer's exits
            (`length_control.Signals.EXITS`).
    """

    facts: ModelFacts
    device: torch.device
    max_num_requests: int
    seed: int
    chooses_exits: bool = False
