"""Where a diffusion drafter's training starts: from a causal model's first layers, or anew."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_spec_plugins.diffusion.conditioning import TargetStates
from vllm_spec_plugins.diffusion.drafter import DiffusionDrafter
from vllm_spec_plugins.diffusion.folder import DrafterConfig
from vllm_spec_plugins.errors import SpecPluginsError, listed
from vllm_spec_plugins.zoo.recipes import Architecture

from .hugging_face import LocalModel
from .texts import TextTokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Model types whose layers are those of `diffusion/drafter.py`, and whether they have biases.
_LAYERS_LIKE_OURS = {"llama": False, "mistral": False, "qwen2": True}

#: Names that tokenizers have for a mask.
_MASKS = ("<mask>", "[MASK]", "<|mask|>", "<|mask_token|>")

#: Larger tables of bigrams do not fit into memory.
_MOST_BIGRAMS = 1 << 14


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a drafter that starts anew.

    Attributes:
        num_layers: Layers.
        hidden_size: H.
        num_heads: Query heads; they divide H.
        num_key_value_heads: Key/value heads; they divide the query heads.
        intermediate_size: Width of the feed-forward parts.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int

    def check(self) -> None:
        """Whether such a model can be.

        Raises:
            SpecPluginsError: Its heads do not divide, or cannot be rotated.
        """
        if self.hidden_size % self.num_heads or self.num_heads % self.num_key_value_heads:
            raise SpecPluginsError(
                f"{self.num_heads} heads must divide hidden_size {self.hidden_size}, and "
                f"{self.num_key_value_heads} key/value heads must divide {self.num_heads}."
            )
        if self.hidden_size // self.num_heads % 2:
            raise SpecPluginsError(
                f"heads of {self.hidden_size // self.num_heads} columns cannot be rotated: "
                "their width must be even."
            )


def mask_token_of(tokenizer: TextTokenizer, vocab_size: int) -> int:
    """The tokenizer's mask, where it has one; else the id after the vocabulary."""
    for token_id, content in tokenizer.added_tokens().items():
        if content in _MASKS and token_id < vocab_size:
            return token_id
    return vocab_size


def from_model(source: LocalModel, num_layers: int, mask_token_id: int) -> DiffusionDrafter:
    """Embedding, first layers, last norm and head of a causal model.

    Args:
        source: With the target's tokenizer; often the target itself.
        num_layers: Layers to take.
        mask_token_id: From `mask_token_of`; begins as the mean of all tokens.

    Raises:
        SpecPluginsError: It has fewer layers, or is built otherwise.
    """
    kind = source.config.model_type
    if kind not in _LAYERS_LIKE_OURS:
        raise SpecPluginsError(
            f'a diffusion drafter cannot start from a model of type "{kind}": its layers differ. '
            f"Known: {listed(_LAYERS_LIKE_OURS)}. Start from another model with this tokenizer, or "
            "anew (--start none)."
        )
    if not 1 <= num_layers <= source.num_layers:
        raise SpecPluginsError(
            f"layers must be 1 to {source.num_layers}, those of the model to start from, not "
            f"{num_layers}."
        )
    values: dict[str, Any] = {
        **source.config.to_dict(),
        "vocab_size": source.vocab_size,
        "num_hidden_layers": num_layers,
        "attention_bias": _LAYERS_LIKE_OURS[kind],
        "mask_token_id": mask_token_id,
        "attention_pattern": "block",
        "predicts": "next_token",
    }
    try:
        drafter = DiffusionDrafter(DrafterConfig.from_json(values))
    except (KeyError, ValueError) as error:
        raise SpecPluginsError(
            f"a diffusion drafter cannot start from this model: {error}."
        ) from error
    return _with_weights(drafter, source.module.state_dict()).to(source.device)


def anew(
    sizes: Sizes, target: LocalModel, mask_token_id: int, tokens: NDArray[np.int64], seed: int
) -> DiffusionDrafter:
    """New layers; embedding and head from the text's bigrams (`zoo/bigram.py`) where they fit.

    Args:
        sizes: Of the drafter.
        target: Whose vocabulary it has.
        mask_token_id: From `mask_token_of`.
        tokens: `[N]` training text.
        seed: Of the weights.

    Raises:
        SpecPluginsError: The sizes do not go together.
    """
    from vllm_spec_plugins.zoo.bigram import start_from_bigrams
    from vllm_spec_plugins.zoo.model import Llama

    sizes.check()
    vocabulary = target.vocab_size
    shape = Architecture(
        vocabulary=vocabulary,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        head_dim=sizes.hidden_size // sizes.num_heads,
        max_positions=target.max_positions,
    )
    generator = torch.Generator().manual_seed(seed)
    model = Llama(shape)
    model.initialise(generator)
    if sizes.hidden_size < vocabulary <= _MOST_BIGRAMS:
        start_from_bigrams(model, tokens, generator)
    config = DrafterConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_positions=shape.max_positions,
        rope_theta=shape.rope_theta,
        rms_norm_eps=shape.rms_norm_eps,
        tie_word_embeddings=False,
        attention_bias=False,
        mask_token_id=mask_token_id,
        attention_pattern="block",
        predicts="next_token",
    )
    return _with_weights(DiffusionDrafter(config), model.export()).to(target.device)


def conditioned(drafter: DiffusionDrafter, states: TargetStates) -> DiffusionDrafter:
    """The same drafter, which also reads a target's states; untrained, it makes nothing of them."""
    started = DiffusionDrafter(replace(drafter.config, conditioned_on=states))
    started.load_state_dict(drafter.state_dict(), strict=False)
    return started.to(drafter.embedding.device)


def _with_weights(drafter: DiffusionDrafter, weights: dict[str, Tensor]) -> DiffusionDrafter:
    """Set the weights of a causal model, and the mask's row of the embedding."""
    config, name = drafter.config, "model.embed_tokens.weight"
    embedding = weights[name][: config.vocab_size].float()
    mask = embedding.mean(0, keepdim=True)
    rows = [embedding[: config.mask_token_id], mask, embedding[config.mask_token_id + 1 :]]
    drafter.assign({**weights, name: torch.cat(rows)})
    return drafter
