"""The loaded target, as proposers see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.target_model import LayerStack, LayerState
from vllm_spec_plugins.transfers import to_device

from .language_model_head import EngineHead
from .layer_parts import LayerParts
from .paged_sequences import Pages, Sequences
from .target_layers import find_layers

#: Positions of each request in `warm_up_sequences`.
_WARM_UP_POSITIONS = 64
#: Tokens of the self-check: some in one pass, some one by one.
_CHECK_AT_ONCE, _CHECK_ONE_BY_ONE = 5, 3
#: Largest difference to the target's own logits, relative to the largest logit.
_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


class Target:
    """Implements `target_model.TargetModel`.

    Args:
        module: The target, weights loaded.
        runner: The model runner that serves it.
        num_speculative_tokens: Most positions drafted past the verified ones.
    """

    def __init__(self, module: nn.Module, runner: Any, num_speculative_tokens: int) -> None:
        self._module = module
        self._runner = runner
        self._lookahead = num_speculative_tokens
        self._found: LayerParts | None = None
        self._head: EngineHead | None = None

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def _parts(self) -> LayerParts:
        if self._found is None:
            _refuse_caches_unknown(self._module)
            self._found = find_layers(self._module)
        return self._found

    @property
    def num_layers(self) -> int:
        return len(self._parts.layers)

    @property
    def dtype(self) -> torch.dtype:
        return self._runner.dtype

    @property
    def head(self) -> EngineHead:
        if self._head is None:
            hidden_size = self._runner.model_config.get_hidden_size()
            self._head = EngineHead(self._module, hidden_size, self.dtype, self._runner.device)
        return self._head

    @property
    def head_in_layers(self) -> float:
        layer = _num_weights(self._parts.layers[0])
        ranks = self._runner.parallel_config.tensor_parallel_size
        return self.head.vocab_size * self.head.hidden_size / (layer * ranks)

    @property
    def tensor_parallel_rank(self) -> int:
        return get_tensor_model_parallel_rank()

    def all_reduce(self, partial: Tensor) -> Tensor:
        return tensor_model_parallel_all_reduce(partial)

    def attention(self, name: str) -> TargetLikeAttention:
        return TargetLikeAttention(name, self._parts.layers, self._runner.vllm_config)

    def layers(
        self,
        start: int,
        stop: int,
        *,
        skip_layers: Sequence[int] = (),
        skip_attention: Sequence[int] = (),
        skip_ffn: Sequence[int] = (),
    ) -> LayerStack:
        return self._parts.stack(start, stop, skip_layers, skip_attention, skip_ffn)

    def embed(self, token_ids: Tensor) -> LayerState:
        return self._parts.embed(token_ids)

    def final_norm(self, state: LayerState) -> Tensor:
        return self._parts.final_norm(state)

    def sequences(
        self,
        rows: NDArray[np.int64],
        most_tokens: NDArray[np.int64] | None = None,
        ends: Tensor | None = None,
    ) -> Sequences:
        index = to_device(rows, self._runner.device)
        longest = self._longest(rows) if most_tokens is None else int(most_tokens.max())
        longest = min(longest + self._lookahead, self._runner.model_config.max_model_len)
        pages = [Pages(group, size, table[index]) for group, size, table in self._tables()]
        return Sequences(pages, self._runner.vllm_config, longest, ends)

    def warm_up_sequences(self, num_requests: int) -> Sequences:
        num_blocks = self._runner.kv_cache_config.num_blocks
        pages, used = [], 0
        for group, block_size, _ in self._tables():
            width = -(-_WARM_UP_POSITIONS // block_size)
            # Each group its own: a block of one group is the same memory as that of another.
            # Block 0 is vLLM's own, for padding.
            ids = (used + torch.arange(num_requests * width)) % (num_blocks - 1) + 1
            used += len(ids)
            block_table = ids.view(num_requests, width).to(self._runner.device, torch.int32)
            pages.append(Pages(group, block_size, block_table))
        return Sequences(pages, self._runner.vllm_config, _WARM_UP_POSITIONS)

    def check(self) -> None:
        """All layers, run through this view, must give the target's own logits.

        Raises:
            SpecPluginsError: They do not; the model has a part we do not run.
        """
        count, device = _CHECK_AT_ONCE + _CHECK_ONE_BY_ONE, self._runner.device
        token_ids = torch.arange(1, count + 1, device=device) % self.head.vocab_size
        positions = torch.arange(count, device=device)
        half = self.num_layers // 2
        sequences = self.warm_up_sequences(1)
        stacks = [self.layers(0, half), self.layers(half, self.num_layers)]
        with torch.inference_mode():
            with sequences.step(positions, [count]):
                out = self._module(
                    # As it was compiled for: nothing checks that, and other widths are misread.
                    input_ids=token_ids.to(self._input_dtype),
                    positions=positions,
                    intermediate_tensors=None,
                    inputs_embeds=None,
                )
            hidden = out[0] if isinstance(out, tuple) else out
            expected = self.head.logits(hidden)
            passes = [range(_CHECK_AT_ONCE), *([i] for i in range(_CHECK_AT_ONCE, count))]
            ours = []
            for indices in passes:
                span = slice(indices[0], indices[-1] + 1)
                with sequences.step(positions[span], [len(indices)]):
                    state = self.embed(token_ids[span])
                    for stack in stacks:
                        state = stack(state, positions[span])
                ours.append(self.head.logits(self.final_norm(state)))
        off = (torch.cat(ours) - expected).abs().max() / expected.abs().max()
        tolerance = _CHECK_TOLERANCE.get(self.dtype, _CHECK_TOLERANCE[torch.bfloat16])
        if not off <= tolerance:  # NaN fails
            raise SpecPluginsError(
                f"{type(self._module).__name__}: its layers run one by one give other logits than "
                f"the model itself (off by {float(off):.2g} of the largest, {tolerance:.2g} "
                "allowed), so this model does something between its layers that drafting with "
                "them would miss. Use another proposer (`vllm-spec list`)."
            )

    # Where runner V1 keeps things; `v2_target` says where V2 does.

    @property
    def _input_dtype(self) -> torch.dtype:
        """Of token ids, as the target was compiled for."""
        return self._runner.input_ids.gpu.dtype

    def _longest(self, rows: NDArray[np.int64]) -> int:
        """Tokens of the longest of some requests."""
        return int(self._runner.input_batch.num_tokens_no_spec[rows].max())

    def _tables(self) -> list[tuple[Any, int, Tensor]]:
        """Every attention group of the engine, its block size, and its table, a row each."""
        batch = self._runner.input_batch
        return [
            (group, table.block_size, table.get_device_tensor(batch.num_reqs))
            for index, groups in enumerate(self._runner.attn_groups)
            for table in (batch.block_table[index],)
            for group in groups
        ]


class TargetLikeAttention:
    """Implements `target_model.PagedAttention`: a layer of our own in vLLM's cache.

    Built before vLLM plans its cache, it gets pages as if it were a layer of the target.
    """

    def __init__(self, name: str, layers: Sequence[nn.Module], vllm_config: Any) -> None:
        found = [_attention_of(layer) for layer in layers]
        like = found[0]
        if any((a.num_kv_heads, a.head_size, a.sliding_window) != _shape(like) for a in found):
            raise SpecPluginsError(
                "the target's layers differ in heads or attention window; a trained layer of its "
                "own (adapter) needs a target whose layers are alike."
            )
        self._rotary = _rotary_of(layers[0])
        with set_current_vllm_config(vllm_config):
            self._attention = Attention(
                like.num_heads,
                like.head_size,
                like.impl.scale,
                num_kv_heads=like.num_kv_heads,
                cache_config=vllm_config.cache_config,
                per_layer_sliding_window=like.sliding_window,
                # vLLM reads the layer's number from its name.
                prefix=f"{name}.layers.{len(layers)}.attn",
            )
            self._attention.process_weights_after_loading(vllm_config.model_config.dtype)
        self.num_heads: int = like.num_heads
        self.num_kv_heads: int = like.num_kv_heads
        self.head_dim: int = like.head_size

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._attention(query, key, value)

    def write(self, key: Tensor, value: Tensor) -> None:
        layer = self._attention
        if layer.attn_backend.forward_includes_kv_cache_update:
            query = key.new_zeros(len(key), self.num_heads * self.head_dim)
            layer(query, key, value)
            return
        shape = (-1, self.num_kv_heads, self.head_dim)
        unified_kv_cache_update(key.view(shape), value.view(shape), layer.layer_name)

    def rotate(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self._rotary(positions, query, key)


def _shape(attention: Attention) -> tuple[int, int, int | None]:
    return attention.num_kv_heads, attention.head_size, attention.sliding_window


def _attention_of(layer: nn.Module) -> Attention:
    """The paged attention inside a layer."""
    return next(module for module in layer.modules() if isinstance(module, Attention))


def _rotary_of(layer: nn.Module) -> nn.Module:
    for module in layer.modules():
        rotary = getattr(module, "rotary_emb", None)
        if isinstance(rotary, nn.Module):
            return rotary
    raise SpecPluginsError(
        f"{type(layer).__name__} has no rotary position embedding; the adapter needs one."
    )


def _refuse_caches_unknown(module: nn.Module) -> None:
    """Layers whose state is not plain paged keys and values cannot be drafted with."""
    for name, part in module.named_modules():
        if isinstance(part, AttentionLayerBase) and not isinstance(part, Attention):
            raise SpecPluginsError(
                f"{type(module).__name__} keeps a state of its own in {name} "
                f"({type(part).__name__}); drafting with the target's own layers works with paged "
                "keys and values only. Use another proposer (`vllm-spec list`)."
            )
        if isinstance(part, Attention) and part.kv_sharing_target_layer_name is not None:
            raise SpecPluginsError(
                f"{type(module).__name__}: {name} reads the keys and values of "
                f"{part.kv_sharing_target_layer_name}; drafting with the target's own layers works "
                "when each layer has its own. Use another proposer (`vllm-spec list`)."
            )


def _num_weights(layer: nn.Module) -> int:
    """Weights of this rank's part of a layer."""
    count = 0
    for module in layer.modules():
        held = sum(weights.numel() for weights in module.parameters(recurse=False))
        # On a CPU linear layers have given theirs away, packed: their shapes are left.
        inputs = getattr(module, "input_size_per_partition", 0)
        count += max(held, inputs * getattr(module, "output_size_per_partition", 0))
    return count
