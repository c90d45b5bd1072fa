"""The output head of a model loaded by vLLM, whole or some rows of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
from vllm.lora.layers import LogitsProcessorWithLoRA
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_spec_plugins.draft_sampling import MostLikely, most_likely_column
from vllm_spec_plugins.errors import ConfigError

#: Fewer hidden states than this are multiplied faster without preparation.
_FEW_ROWS = 3
#: How many rows of the head are compared with the model's own logits at load.
_CHECKED_ROWS = 32
#: Largest difference allowed between the two, as a share of the largest logit.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True)
class _Projection:
    """One call of vLLM's `LogitsProcessor`: `[T, H]` in, `[T, V]` out (None on other ranks)."""

    processor: Any
    weights: Any
    hidden: Tensor
    bias: Tensor | None
    logits: Tensor | None


class EngineHead:
    """Implements `target_model.LanguageModelHead`.

    The head is found by watching one call of the model's own `compute_logits`: whatever the
    model calls its parts (`lm_head`, tied embeddings, parts of a `language_model`), its logits
    come out of one of vLLM's `LogitsProcessor`s, which is told the weights to use. The rows are
    then held to the model's own logits.

    Args:
        module: A causal language model, its weights loaded. On every rank at the same time.
        hidden_size: H.
        dtype: Of the hidden states.
        device: Where the model is.

    Raises:
        ConfigError: The engine serves LoRA adapters, and they reach into the head.
    """

    def __init__(
        self, module: nn.Module, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model_name = type(module).__name__
        #: What vLLM makes of weights that `rows` gave out, while these are in use.
        self._prepared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        if any(isinstance(part, LogitsProcessorWithLoRA) for part in module.modules()):
            raise ConfigError(
                f"The engine serves LoRA adapters (enable_lora), which wrap the output head of "
                f"{self._model_name} and expect one row per request in it: drafts through that "
                "head would be computed with the wrong adapter. Remove --enable-lora, or the "
                "speculative method."
            )
        self._compute_logits: Callable[[Tensor], Tensor | None] = module.compute_logits  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
        self.hidden_size = hidden_size
        generator = torch.Generator().manual_seed(0)
        # Of the size of normed states, and equal on every rank.
        probe = torch.randn(2, hidden_size, generator=generator).to(device, dtype)
        with torch.inference_mode():
            found, logits = _watch(module, probe)
            self._projection = found[0] if found else None
            self.vocab_size = self._on_every_rank(logits, len(probe)).shape[-1]
            self._problem = self._shape_problem(found, probe, logits)
            if self._problem is None:
                self._problem = self._value_problem(probe)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[T, V]` float32 from `[T, H]` normed hidden states; on every rank whole."""
        return self._on_every_rank(self._compute_logits(hidden), len(hidden)).float()

    def rows(self, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights `[M, H]` and bias `[M]` (or None) of some tokens, copied, on every rank whole.

        Args:
            token_ids: `[M]` int64. Every rank must ask for the same.

        Raises:
            ConfigError: The head is quantised, or of a kind unknown to us, or has no such token.
        """
        if self._problem is not None:
            raise ConfigError(
                f"Rows of the output head of {self._model_name} cannot be used on their own: "
                f'{self._problem}. Remove "draft_vocabulary".'
            )
        if len(token_ids) and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < (
            self.vocab_size
        ):
            raise ConfigError(
                f"The output head of {self._model_name} has the tokens 0 to "
                f"{self.vocab_size - 1}, and token {int(token_ids.max())} was asked for."
            )
        return self._copy(token_ids)

    def row_logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Logits of such rows, capped and scaled like the head's own, float32.

        Args:
            hidden: `[T, H]`.
            weight: `[M, H]`, or `[T, M, H]` for rows of its own for each token.
            bias: `[M]` or `[T, M]`, or None.

        Returns:
            `[T, M]`.
        """
        assert self._projection is not None
        processor = self._projection.processor
        hidden = hidden.to(weight.dtype)
        if weight.ndim == 2:
            logits = self._linear(hidden, weight, bias)
        else:
            # The vector on the left: the other way round takes ten times as long on the CPU.
            logits = torch.bmm(hidden.unsqueeze(1), weight.transpose(1, 2)).squeeze(1)
            if bias is not None:
                logits = logits + bias
        logits = logits.float()
        if processor.soft_cap is not None:
            logits = torch.tanh(logits / processor.soft_cap) * processor.soft_cap
        return logits if processor.scale == 1.0 else logits * processor.scale

    def most_likely_row(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> MostLikely | None:
        """The first of the largest `row_logits`, `[T]`; None where no kernel finds it alone.

        Args:
            hidden: `[T, H]`.
            weight: `[M, H]`.
            bias: `[M]` or None.
        """
        assert self._projection is not None
        processor = self._projection.processor
        return most_likely_column(
            hidden.to(weight.dtype), weight, bias, processor.scale, processor.soft_cap
        )

    def _linear(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`[T, M]`; on the CPU several rows go through vLLM's own product of prepared weights."""
        if weight.device.type != "cpu" or len(hidden) < _FEW_ROWS:
            return F.linear(hidden, weight, bias)
        prepared: Any = self._prepared.get(weight)
        if prepared is None:
            prepared = nn.Module()
            prepared.weight = nn.Parameter(weight, requires_grad=False)
            dispatch_cpu_unquantized_gemm(prepared, remove_weight=False)
            self._prepared[weight] = prepared
        return prepared.cpu_linear(hidden, prepared.weight, bias)

    def _on_every_rank(self, logits: Tensor | None, count: int) -> Tensor:
        """`[count, V]`. Some platforms gather logits to the first rank only."""
        found = self._projection
        if found is None or found.weights.tp_size == 1 or found.processor.use_all_gather:
            assert logits is not None
            return logits
        if logits is None:
            logits = found.weights.weight.new_empty(count, found.processor.org_vocab_size)
        assert logits is not None
        return get_tp_group().broadcast(logits.contiguous(), src=0)

    def _copy(self, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """`rows` of tokens that are there. Each rank gives the rows of its own shard."""
        assert self._projection is not None
        source, bias = self._projection.weights, self._projection.bias
        if source.tp_size == 1:
            copied = source.weight.detach().index_select(0, token_ids)
            return copied, None if bias is None else bias.detach().index_select(0, token_ids)
        shard = source.shard_indices
        start, end = shard.org_vocab_start_index, shard.org_vocab_end_index
        is_ours = (token_ids >= start) & (token_ids < end)
        inside = (token_ids - start).clamp(0, max(end - start - 1, 0))

        def whole(shard_rows: Tensor) -> Tensor:
            copied = shard_rows.detach().index_select(0, inside)
            copied[~is_ours] = 0
            return tensor_model_parallel_all_reduce(copied)

        return whole(source.weight), None if bias is None else whole(bias)

    def _shape_problem(
        self, found: list[_Projection], probe: Tensor, logits: Tensor | None
    ) -> str | None:
        """Why rows of this head cannot stand for it, as far as its parts tell."""
        if len(found) != 1:
            return f"its logits come out of {len(found)} projections, not one"
        [projection] = found
        method = getattr(projection.weights, "quant_method", None)
        if not isinstance(method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod):
            return f"it is quantised ({type(method).__name__})"
        if projection.hidden is not probe:
            return "the model changes its hidden states before the head"
        if logits is not projection.logits:
            return "the model maps its logits to other tokens, from a vocabulary of its own"
        if projection.processor.logits_as_input:
            return "its projection happens elsewhere"
        weight = projection.weights.weight
        if (
            weight.ndim != 2
            or weight.shape[1] != self.hidden_size
            or weight.dtype not in (_TOLERANCE)
        ):
            return f"its weights are {tuple(weight.shape)} of {weight.dtype}"
        if self.vocab_size > projection.weights.org_vocab_size:
            return "tokens were added behind its vocabulary"
        return None

    def _value_problem(self, probe: Tensor) -> str | None:
        """Whether some rows give the model's own logits."""
        step = max(self.vocab_size // _CHECKED_ROWS, 1)
        token_ids = torch.arange(0, self.vocab_size, step, device=probe.device)
        expected = self.logits(probe)
        found = self.row_logits(probe, *self._copy(token_ids))
        error = (found - expected[:, token_ids]).abs().max()
        allowed = _TOLERANCE[probe.dtype] * expected.abs().max().clamp(min=1e-6)
        if error > allowed:
            return f"they give other logits than the model itself (by {error:.2g})"
        return None


def _watch(module: nn.Module, hidden: Tensor) -> tuple[list[_Projection], Tensor | None]:
    """One call of `compute_logits`: what went through logits processors, and what came out."""
    found: list[_Projection] = []

    def record(
        processor: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], logits: Any
    ) -> None:
        names = ("lm_head", "hidden_states", "embedding_bias")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        found.append(
            _Projection(
                processor,
                given["lm_head"],
                given["hidden_states"],
                given.get("embedding_bias"),
                logits,
            )
        )

    hooks = [
        part.register_forward_hook(record, with_kwargs=True)
        for part in module.modules()
        if isinstance(part, LogitsProcessor)
    ]
    try:
        logits = module.compute_logits(hidden)  # pyright: ignore[reportCallIssue]
    finally:
        for hook in hooks:
            hook.remove()
    return found, logits
