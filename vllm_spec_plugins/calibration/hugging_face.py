"""A local model in Hugging Face's format, opened up for calibration: layers, norm, head, rotation.

Calibration needs what serving hides: hidden states after some layers, and the head applied
to them. Any model built like Llama gives them (Llama, Mistral, Qwen 2 and 3, Gemma, OLMo);
its parts are found by what they are called and do, and checked once against the model's own
logits, so that a model that scales or caps in a way unknown to us is refused, not mismeasured.

Shapes: B windows, T tokens each, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_spec_plugins.errors import SpecPluginsError, listed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

#: What two ways of computing the same logits may differ by, as a share of their spread.
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.05}


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The model's attention, as far as one more layer of the same shape must know it.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        head_dim: Width of a head.
        scale: Scores are multiplied by it before the softmax.
        rope: Parameters of the rotary embedding, as its configuration has them.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: dict[str, Any]


class LocalModel:
    """A frozen causal language model and its parts."""

    def __init__(self, module: nn.Module) -> None:
        """Find the parts of a loaded transformers model.

        Args:
            module: A `...ForCausalLM`; put into evaluation and frozen.

        Raises:
            SpecPluginsError: It is not built like Llama, or its logits are not what its parts give.
        """
        self.module = module.eval().requires_grad_(False)
        self._decoder, self._head = _parts(module)
        self.config: Any = self._decoder.config
        self._cap: float | None = getattr(self.config, "final_logit_softcapping", None)
        # Granite divides its logits, Cohere multiplies them.
        divisor: float = getattr(self.config, "logits_scaling", None) or 1.0
        factor: float = getattr(self.config, "logit_scale", None) or 1.0
        self._logit_scale = factor / divisor
        self._verify()

    @classmethod
    def load(
        cls, folder: str | Path, dtype: str = "float32", device: str | torch.device = "cpu"
    ) -> LocalModel:
        """Read a model folder. Nothing is downloaded, no code of the model's own is run.

        Args:
            folder: With `config.json` and weights.
            dtype: One of `DTYPES`: of weights and computation.
            device: Where it computes.

        Raises:
            SpecPluginsError: No such folder, transformers cannot load it, or see `__init__`.
        """
        if not (Path(folder) / "config.json").is_file():
            raise SpecPluginsError(
                f"{folder} is not a model folder: it has no config.json. Calibration reads local "
                "folders in Hugging Face's format."
            )
        if dtype not in DTYPES:
            raise SpecPluginsError(f'no dtype "{dtype}" for calibration. Known: {listed(DTYPES)}.')
        auto_model = _auto_model()
        try:
            module = auto_model.from_pretrained(
                folder, dtype=DTYPES[dtype], local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            why = str(error).rstrip(".")
            raise SpecPluginsError(f"transformers cannot load {folder}: {why}.") from error
        return cls(module.to(device))

    @property
    def num_layers(self) -> int:
        return len(self._decoder.layers)

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        """How many tokens have logits."""
        return self._head.weight.shape[0]

    @property
    def max_positions(self) -> int:
        """Longest window the model was made for."""
        return self.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return self._head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._head.weight.dtype

    @property
    def layer_parameters(self) -> int:
        """Weights of the first layer."""
        return sum(weight.numel() for weight in self._decoder.layers[0].parameters())

    @property
    def norm_epsilon(self) -> float:
        """Added to the mean square by the model's norms; 1e-6 where it does not say."""
        return getattr(self.config, "rms_norm_eps", 1e-6)

    @torch.no_grad()
    def layer_states(self, token_ids: Tensor, after: Sequence[int]) -> dict[int, Tensor]:
        """The residual stream after some layers, before any norm.

        Args:
            token_ids: `[B, T]` int64; each window begins at position 0.
            after: Numbers of layers run, 1 to `num_layers`.

        Returns:
            For each number `[B, T, H]`, of the model's dtype; `final_norm` reads the last layer's.

        Raises:
            SpecPluginsError: The model has no such layer.
        """
        wrong = [number for number in after if not 1 <= number <= self.num_layers]
        if wrong:
            raise SpecPluginsError(
                f"no state after {wrong[0]} layers: the model has {self.num_layers}."
            )
        states: dict[int, Tensor] = {}

        def keep(number: int) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                states[number] = output[0] if isinstance(output, tuple) else output

            return hook

        with ExitStack() as hooks:
            for number in set(after):
                hooks.enter_context(
                    self._decoder.layers[number - 1].register_forward_hook(keep(number))
                )
            self._decoder(input_ids=token_ids.to(self.device), use_cache=False)
        return states

    def final_norm(self, hidden: Tensor) -> Tensor:
        """`[..., H]` what the head reads, from the residual stream."""
        return self._decoder.norm(hidden)

    def logits(self, normed: Tensor) -> Tensor:
        """`[..., V]` float32 from `[..., H]` normed hidden states; differentiable in them."""
        logits = self._head(normed).float() * self._logit_scale
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Rows of the embedding, `[T, H]` for `[T]` tokens; some models scale them afterwards."""
        return self._decoder.embed_tokens(token_ids.to(self.device))

    @property
    def attention(self) -> AttentionShape:
        """The shape of the model's attention.

        Raises:
            SpecPluginsError: Its layers differ in it, or cap their scores.
        """
        config = self.config
        if getattr(config, "attn_logit_softcapping", None):
            raise SpecPluginsError(
                f"{config.model_type} caps its attention scores: "
                "a layer beside it cannot be trained."
            )
        rope = getattr(config, "rope_parameters", None)
        if not isinstance(rope, dict) or "rope_theta" not in rope:
            raise SpecPluginsError(
                f"{config.model_type} has no rotary embedding that all layers share: "
                "a layer beside it cannot be trained."
            )
        heads: int = config.num_attention_heads
        width: int = getattr(config, "head_dim", None) or config.hidden_size // heads
        first = getattr(self._decoder.layers[0], "self_attn", None)
        return AttentionShape(
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=width,
            scale=float(getattr(first, "scaling", width**-0.5)),
            rope=dict(rope),
        )

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary embedding, `[T, head_dim]` float32 each.

        For heads whose two halves turn against each other (`rotate_half`); every model that
        transformers builds like Llama stores its weights for that.

        Args:
            positions: `[T]` int64.

        Raises:
            SpecPluginsError: See `attention`; or the model rotates otherwise.
        """
        width = self.attention.head_dim
        rotary = self._decoder.rotary_emb
        like = torch.empty(0, dtype=torch.float32, device=self.device)
        cosines, sines = rotary(like, positions.to(self.device)[None])
        halves = cosines.chunk(2, dim=-1)
        if cosines.shape[-1] != width or not torch.equal(*halves):
            raise SpecPluginsError(
                f"{self.config.model_type} rotates part of each head, or neighbouring columns "
                "instead of halves: a layer beside it cannot be trained."
            )
        return cosines[0], sines[0]

    @torch.no_grad()
    def _verify(self) -> None:
        """The parts must give the model's own logits."""
        token_ids = torch.arange(16, device=self.device)[None] * 7 % self.vocab_size
        expected = self.module(input_ids=token_ids, use_cache=False).logits.float()
        last = self.layer_states(token_ids, [self.num_layers])[self.num_layers]
        difference = (self.logits(self.final_norm(last)) - expected).abs().max()
        allowed = _TOLERANCES.get(self.dtype, 0.05) * expected.std()
        if not difference <= allowed:
            raise SpecPluginsError(
                f"{type(self.module).__name__} does more between its layers and its logits than "
                f"we know of (they differ by {difference:.3g}): calibration would mislead."
            )


def _parts(module: nn.Module) -> tuple[Any, nn.Linear]:
    """The decoder (embedding, layers, norm) and the head.

    Raises:
        SpecPluginsError: Something is missing, or is not what we know.
    """
    decoder: Any = module.get_decoder() if hasattr(module, "get_decoder") else module  # pyright: ignore[reportCallIssue]
    head: Any = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None  # pyright: ignore[reportCallIssue]
    parts = {
        "embed_tokens": isinstance(getattr(decoder, "embed_tokens", None), nn.Embedding),
        "layers": isinstance(getattr(decoder, "layers", None), nn.ModuleList),
        "norm": isinstance(getattr(decoder, "norm", None), nn.Module),
        "a plain linear head": type(head) is nn.Linear and head.bias is None,
        "attention in every layer": all(
            hasattr(layer, "self_attn") for layer in getattr(decoder, "layers", ())
        ),
    }
    missing = [name for name, there in parts.items() if not there]
    if missing:
        raise SpecPluginsError(
            f"{type(module).__name__} is not built like Llama: it lacks {listed(missing)}. "
            "Calibration works on Llama, Mistral, Qwen 2 and 3, Gemma, OLMo and their like."
        )
    return decoder, head


def _auto_model() -> Any:
    """transformers' loader of causal language models, which draws no bar of its own.

    Raises:
        SpecPluginsError: The package is missing, or fails on import.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except (ImportError, OSError, RuntimeError) as error:
        raise SpecPluginsError(
            f"transformers cannot be imported: {error}. If this names torchvision or torchaudio, "
            "those were built for another torch: uninstall them."
        ) from error
    logging.disable_progress_bar()
    return AutoModelForCausalLM
