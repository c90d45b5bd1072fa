"""Draft laws of passes that leave out sublayers, as serving computes them.

Unlike an exit, a pass that skips writes other keys and values than the full model does, and
reads them until the round is verified. So a draft token's law depends on where its round
began: before that, the full model's keys and values; from there on, the draft's own. Both are
computed in two passes over the text: the full model's keys and values are kept, then all
rounds run at once, each query reading the kept ones before its round and the new ones in it.

transformers lets a program name its own attention function; ours does that, and sees whatever
queries and keys the model makes of its states (rotated, normed, scaled).

Shapes: S rounds, K draft tokens of a round, L tokens of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_spec_plugins.errors import SpecPluginsError

from .draft_pass import DraftPass
from .hugging_face import LocalModel

_NAME = "vllm_spec_plugins_draft_rounds"


@dataclass(frozen=True, slots=True)
class KeptText:
    """What the full model made of a text.

    Attributes:
        text: `[L]` int64.
        keys_values: `[1, heads, L, D]` each, by layer.
        state: `[L, H]` after all layers, before the final norm.
    """

    text: Tensor
    keys_values: Mapping[int, tuple[Tensor, Tensor]]
    state: Tensor


@dataclass(slots=True)
class _Pass:
    """What the attention function is to do.

    Attributes:
        keeping: Where the full model's keys and values go; None in a draft pass.
        kept: What a draft pass reads.
        positions: `[1, N]` of a draft pass's queries.
        starts: `[1, N]` position at which each one's round began.
    """

    keeping: dict[int, tuple[Tensor, Tensor]] | None = None
    kept: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    positions: Tensor = field(default_factory=lambda: torch.empty(0))
    starts: Tensor = field(default_factory=lambda: torch.empty(0))


class DraftRounds:
    """Draft passes over kept texts. Made by `draft_rounds`, to be used inside it."""

    def __init__(self, model: LocalModel, current: _Pass) -> None:
        self._model, self._pass = model, current

    @torch.no_grad()
    def keep(self, text: Tensor) -> KeptText:
        """Run the full model over `[L]` int64 tokens.

        Raises:
            SpecPluginsError: The model's attention cannot be exchanged.
        """
        text = text.to(self._model.device)
        keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        self._pass.keeping = keys_values
        last = self._model.num_layers
        state = self._model.layer_states(text[None], [last])[last][0]
        self._pass.keeping = None
        if len(keys_values) != last:
            raise SpecPluginsError(
                f"{type(self._model.module).__name__} does not call its attention through "
                "transformers' AttentionInterface: skip sets cannot be measured on it."
            )
        return KeptText(text, keys_values, state)

    @torch.no_grad()
    def states(self, kept: KeptText, draft_pass: DraftPass, starts: Tensor, length: int) -> Tensor:
        """Hidden states from which the draft tokens of some rounds are read.

        Args:
            kept: The text.
            draft_pass: What runs.
            starts: `[S]` int64 positions of the tokens that drafts continue from; at most
                `L - length`.
            length: K, tokens drafted.

        Returns:
            `[S, K, H]` after the pass's last layer, before any norm.
        """
        positions = starts[:, None] + torch.arange(length, device=starts.device)
        # One row of queries: rounds are told apart by the mask.
        row = positions.reshape(1, -1)
        self._pass.kept = kept.keys_values
        self._pass.positions = row
        self._pass.starts = starts[:, None].expand_as(positions).reshape(1, -1)
        with left_out(self._model, draft_pass):
            state = _state_after(self._model, kept.text[row], row, draft_pass.exit_layer)
        return state.reshape(len(starts), length, -1)


@contextmanager
def draft_rounds(model: LocalModel) -> Iterator[DraftRounds]:
    """Inside, the model attends as draft rounds do; nothing else can run on it."""
    from transformers import AttentionInterface

    current = _Pass()
    module: Any = model.module
    before = module.config._attn_implementation
    AttentionInterface.register(_NAME, _attention_of(current))
    module.set_attn_implementation(_NAME)
    try:
        yield DraftRounds(model, current)
    finally:
        module.set_attn_implementation(before)


def _attention_of(current: _Pass) -> Callable[..., tuple[Tensor, None]]:
    """The function transformers is to call."""

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """`[B, heads, N, D]` queries to `[B, N, heads, D]`; masks are ours, not the model's."""
        del attention_mask, unused
        if current.keeping is not None:
            current.keeping[module.layer_idx] = (key, value)
            positions = torch.arange(query.shape[2], device=query.device)[None]
            seen = positions[:, :, None] >= positions[:, None, :]
            key_positions = positions
        else:
            old_key, old_value = current.kept[module.layer_idx]
            positions, starts = current.positions, current.starts
            old = torch.arange(old_key.shape[2], device=query.device)[None]
            before = old[:, None, :] < starts[:, :, None]
            same_round = starts[:, :, None] == starts[:, None, :]
            drafted = same_round & (positions[:, :, None] >= positions[:, None, :])
            seen = torch.cat([before, drafted], dim=-1)
            key, value = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
            key_positions = torch.cat([old, positions], dim=1)
        if sliding_window is not None:
            seen &= positions[:, :, None] - key_positions[:, None, :] < sliding_window
        grouped = key.shape[1] != query.shape[1]
        if softcap is None:
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=seen[:, None], scale=scaling, enable_gqa=grouped
            )
        else:
            out = _capped(query, key, value, seen[:, None], scaling, softcap)
        return out.transpose(1, 2), None

    return attention


def _capped(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float | None, softcap: float
) -> Tensor:
    """Attention whose scores are capped before the mask (Gemma 2)."""
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value


@contextmanager
def left_out(model: LocalModel, draft_pass: DraftPass) -> Iterator[None]:
    """Inside, the pass's skipped sublayers add nothing to the residual stream.

    Raises:
        SpecPluginsError: A layer's feed-forward network is not called `mlp`.
    """
    layers: Any = model.module.get_decoder().layers  # pyright: ignore[reportCallIssue]
    with ExitStack() as stack:
        for number in draft_pass.skip_attention:
            stack.enter_context(_silent(layers[number].self_attn, pair=True))
        for number in draft_pass.skip_ffn:
            network = getattr(layers[number], "mlp", None)
            if network is None:
                raise SpecPluginsError(
                    f"layer {number} has no feed-forward network called mlp: it cannot be skipped."
                )
            stack.enter_context(_silent(network, pair=False))
        yield


@contextmanager
def _silent(module: nn.Module, pair: bool) -> Iterator[None]:
    """A sublayer that gives zeros; norms behind it keep them zero."""

    def forward(*arguments: Any, hidden_states: Tensor | None = None, **unused: Any) -> Any:
        del unused
        state = hidden_states if hidden_states is not None else arguments[0]
        nothing = torch.zeros_like(state)
        return (nothing, None) if pair else nothing

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


class _Left(Exception):  # noqa: N818 - no error: the layers after the exit are not needed
    pass


def _state_after(model: LocalModel, token_ids: Tensor, positions: Tensor, layers: int) -> Tensor:
    """`[B, N, H]` after so many layers; those behind are not run."""
    decoder: Any = model.module.get_decoder()  # pyright: ignore[reportCallIssue]
    kept: list[Tensor] = []

    def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)
        raise _Left

    hook = decoder.layers[layers - 1].register_forward_hook(leave)
    try:
        decoder(input_ids=token_ids, position_ids=positions, use_cache=False)
    except _Left:
        pass
    finally:
        hook.remove()
    return kept[0]
