"""A masked diffusion language model that drafts: one pass gives the laws of a block of tokens.

The block follows the text verified so far. Its tokens are masks, or tokens that an earlier
denoising step settled on; every token of it sees the whole block and the last W tokens of the
text (`PrefixCache`). Precisely, for a block that begins at position n:

    a token of the block sees positions n - W to n - 1, and the block;
    a token of the text at position p sees positions p - W to p   (pattern "block"),
    or all that a token of the block sees                          (pattern "full").

A conditioned drafter (`conditioning.py`) is also told what to add to the embeddings of the text;
nothing is added to the block's.

One token of the text is needed before a block, since a drafter that predicts next tokens
predicts the block's first from it.

No pass asks the device for a number: lengths of texts are tensors, their bounds are on the host.

Shapes: R rows of the cache; T tokens of text new to it; B tokens of a block; S tokens of a pass;
C slots of the cache; H hidden size; D head width; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import NewText, PrefixCache
from .conditioning import Conditioning
from .folder import DrafterConfig, read_config, weight_files
from .state_windows import StateWindows


class Rotation(NamedTuple):
    """Cosines and sines of a pass's positions, `[R, S, 1, D]` each."""

    cosines: Tensor
    sines: Tensor


class Layer(nn.Module):
    """One Llama layer in three parts: what comes before attention, attention, what comes after."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        hidden, inner = config.hidden_size, config.intermediate_size
        queries = config.num_heads * config.head_dim
        rows = queries + 2 * config.num_key_value_heads * config.head_dim
        self.attention_norm = nn.Parameter(torch.ones(hidden))
        self.mlp_norm = nn.Parameter(torch.ones(hidden))
        self.qkv = nn.Parameter(torch.empty(rows, hidden))
        self.qkv_bias = nn.Parameter(torch.zeros(rows)) if config.attention_bias else None
        self.attention_out = nn.Parameter(torch.empty(hidden, queries))
        self.gate_up = nn.Parameter(torch.empty(2 * inner, hidden))
        self.down = nn.Parameter(torch.empty(hidden, inner))

    def project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Query `[R, S, heads, D]`, key and value `[R, S, kv_heads, D]` of `[R, S, H]`."""
        config = self.config
        heads, keys = config.num_heads, config.num_key_value_heads
        h = F.rms_norm(x, (config.hidden_size,), self.attention_norm, config.rms_norm_eps)
        qkv = F.linear(h, self.qkv, self.qkv_bias).unflatten(-1, (heads + 2 * keys, -1))
        query_key, value = qkv.split((heads + keys, keys), dim=2)
        first, second = query_key.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        query_key = (query_key * rotation.cosines + turned * rotation.sines).to(value.dtype)
        query, key = query_key.split((heads, keys), dim=2)
        return query, key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        """`[R, S, heads * D]` from keys and values `[R, C + S, kv_heads, D]`.

        Args:
            query: `[R, S, heads, D]`.
            key: Of the cache, then of the pass.
            value: Likewise.
            visible: `[R, 1, S, C + S]` bool.
        """
        config = self.config
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=visible,
            enable_gqa=config.num_heads != config.num_key_value_heads,
        )
        return mixed.transpose(1, 2).flatten(2)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The residual stream after this layer, `[R, S, H]`."""
        config = self.config
        x = x + F.linear(mixed, self.attention_out)
        h = F.rms_norm(x, (config.hidden_size,), self.mlp_norm, config.rms_norm_eps)
        gate, up = F.linear(h, self.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down)


class DiffusionDrafter(nn.Module):
    """The drafter. `draft` is the pass of a decoding step; `forward` is one to train with."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.num_embeddings, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.own_head = (
            None
            if config.tie_word_embeddings
            else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        )
        states = config.conditioned_on
        self.conditioning = None if states is None else Conditioning(states, config.hidden_size)
        #: `[D / 2]` radians a token of the rotary embedding, once known.
        self._speeds: Tensor | None = None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> DiffusionDrafter:
        """Read a folder that `check_folder` has accepted; frozen.

        Raises:
            SpecPluginsError: It is no drafter's folder.
        """
        from safetensors.torch import load_file

        with torch.device("meta"):
            drafter = cls(read_config(folder))
        drafter.to_empty(device=device)
        weights: dict[str, Tensor] = {}
        for file in weight_files(folder):
            weights |= load_file(file)
        drafter.assign(weights)
        return drafter.to(dtype).requires_grad_(False).eval()

    @property
    def head(self) -> Tensor:
        """`[V, H]`."""
        if self.own_head is not None:
            return self.own_head
        return self.embedding[: self.config.vocab_size]

    def new_cache(self, num_rows: int, window: int) -> PrefixCache:
        """An empty cache beside these weights, for so many requests."""
        weight = self.embedding
        return PrefixCache(self.config, num_rows, window, weight.device, weight.dtype)

    def new_state_windows(self, num_rows: int, window: int) -> StateWindows | None:
        """The same for the target's states; None if it reads none."""
        if self.conditioning is None:
            return None
        return StateWindows(self.conditioning, num_rows, window)

    def draft(
        self, cache: PrefixCache, text: NewText, num_draft: int, added: Tensor | None = None
    ) -> Tensor:
        """Take in the text verified since, and give the laws of the tokens after it: one pass.

        The same as `extend`, then `denoise` of masks alone; the pattern "full" does it so.

        Args:
            cache: Of this drafter; the new text is appended to it.
            text: What is new. Laws of a row that then holds no token mean nothing.
            num_draft: K, at least 1.
            added: `[R, T, H]` what conditioning adds to the new tokens; None: nothing is known
                of them, or it has no conditioning.

        Returns:
            `[R, K, V]` float32 logits; -inf for the mask.
        """
        config = self.config
        masks = text.token_ids.new_full((len(text.rows), num_draft), config.mask_token_id)
        if config.attention_pattern == "full":
            self._remember(cache, text)
            return self.denoise(cache, text.rows, masks, text.longest + text.token_ids.shape[1])
        states = self._pass(cache, text, masks[:, : self._block_tokens(num_draft)], added)
        predicting = states[:, text.token_ids.shape[1] :]
        if config.predicts == "next_token":
            predicting = torch.cat([cache.last[text.rows].unsqueeze(1), predicting], dim=1)
        return self.logits(predicting)

    def extend(self, cache: PrefixCache, text: NewText, added: Tensor | None = None) -> None:
        """Append verified text to some rows.

        Args:
            cache: Of this drafter.
            text: What is new.
            added: As for `draft`.
        """
        if self.config.attention_pattern == "full":
            self._remember(cache, text)
        else:
            self._pass(cache, text, text.token_ids[:, :0], added)

    def denoise(
        self, cache: PrefixCache, rows: Tensor, block_token_ids: Tensor, longest: int
    ) -> Tensor:
        """The laws of a block's tokens after the text in the cache, which stays as it is.

        A drafter of pattern "block" that predicts next tokens does not read the block's last
        token: nothing comes after it. What it gives for the first depends on the text alone.

        Args:
            cache: Of this drafter.
            rows: `[R]` int64, each once. Laws of a row that holds no token mean nothing.
            block_token_ids: `[R, B]` int64 masks, and tokens that are settled already.
            longest: As in `NewText`.

        Returns:
            `[R, B, V]` float32 logits, one row for each token of the block; -inf for the mask.
        """
        config, length = self.config, block_token_ids.shape[1]
        if config.attention_pattern == "full":
            states = self._whole_window(cache, rows, block_token_ids, longest)
            before = config.predicts == "next_token"
            return self.logits(states[:, -length - 1 : -1] if before else states[:, -length:])
        nothing = NewText(rows, block_token_ids[:, :0], torch.zeros_like(rows), longest)
        states = self._pass(cache, nothing, block_token_ids[:, : self._block_tokens(length)])
        if config.predicts == "next_token":
            states = torch.cat([cache.last[rows].unsqueeze(1), states], dim=1)
        return self.logits(states)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., V]` float32 from normed hidden states; -inf for the mask, which is never drafted.

        Differentiable.
        """
        logits = F.linear(hidden, self.head).float()
        mask = self.config.mask_token_id
        if mask < self.config.vocab_size:
            logits[..., mask] = -torch.inf
        return logits

    def forward(
        self, token_ids: Tensor, positions: Tensor, visible: Tensor, added: Tensor | None = None
    ) -> Tensor:
        """A pass without a cache.

        Args:
            token_ids: `[R, S]` int64.
            positions: `[R, S]` int64.
            visible: `[R or 1, S, S]` bool, [., i, j]: token i sees token j.
            added: `[R, S', H]` what conditioning adds to the first S' tokens, those of the text.

        Returns:
            `[R, S, H]` normed hidden states.
        """
        rotation = self._rotation(positions)
        x = self._embed(token_ids, added)
        for layer in self._stack:
            query, key, value = layer.project(x, rotation)
            x = layer.finish(x, layer.attend(query, key, value, visible[:, None]))
        return self._normed(x)

    def matrices(self) -> list[tuple[Tensor, list[int]]]:
        """Every matrix inside the layers, and before them that of the target's states.

        Each with the row counts of those fused in it (`Muon`).
        """
        config = self.config
        queries, keys = (
            n * config.head_dim for n in (config.num_heads, config.num_key_value_heads)
        )
        inner, hidden = config.intermediate_size, config.hidden_size
        before: list[tuple[Tensor, list[int]]] = []
        if self.conditioning is not None:
            before = [(self.conditioning.projection, [hidden])]
        return before + [
            pair
            for layer in self._stack
            for pair in (
                (layer.qkv, [queries, keys, keys]),
                (layer.attention_out, [hidden]),
                (layer.gate_up, [inner, inner]),
                (layer.down, [hidden]),
            )
        ]

    def assign(self, weights: Mapping[str, Tensor]) -> None:
        """Set all weights from tensors under Llama's names (`DrafterConfig.weight_shapes`).

        Raises:
            KeyError: A weight is missing.
        """
        with torch.no_grad():
            for parameter, names in self._names().items():
                parameter.copy_(torch.cat([weights[name] for name in names]))

    def export(self) -> dict[str, Tensor]:
        """Copies of all weights under Llama's names."""
        shapes = self.config.weight_shapes()
        return {
            name: part.detach().clone().contiguous()
            for parameter, names in self._names().items()
            for name, part in zip(
                names, parameter.split([shapes[name][0] for name in names]), strict=True
            )
        }

    def _names(self) -> dict[nn.Parameter, tuple[str, ...]]:
        """Each parameter, and the tensors on disk that are stacked in it."""
        names: dict[nn.Parameter, tuple[str, ...]] = {
            self.embedding: ("model.embed_tokens.weight",),
            self.norm: ("model.norm.weight",),
        }
        if self.own_head is not None:
            names[self.own_head] = ("lm_head.weight",)
        if self.conditioning is not None:
            names[self.conditioning.projection] = ("target_states.projection.weight",)
            names[self.conditioning.unknown] = ("target_states.unknown",)
        for index, layer in enumerate(self._stack):
            for ours, theirs in _FUSED.items():
                parameter = getattr(layer, ours)
                if parameter is not None:
                    names[parameter] = tuple(f"model.layers.{index}.{name}" for name in theirs)
        return names

    @property
    def _stack(self) -> list[Layer]:
        """The layers, as what they are."""
        return list(self.layers)  # pyright: ignore[reportReturnType]

    def _block_tokens(self, length: int) -> int:
        """Tokens of a block that a pass of the pattern "block" reads."""
        return length - (self.config.predicts == "next_token")

    def _embed(self, token_ids: Tensor, added: Tensor | None) -> Tensor:
        """`[R, S, H]`, with what is added to the first tokens."""
        x = F.embedding(token_ids, self.embedding)
        if added is None:
            return x
        length = added.shape[1]
        return torch.cat([x[:, :length] + added, x[:, length:]], dim=1)

    def _normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.config.hidden_size,), self.norm, self.config.rms_norm_eps)

    def _rotation(self, positions: Tensor) -> Rotation:
        """Rotary embedding (Su et al. 2104.09864) of `[R, S]` positions."""
        width = self.config.head_dim
        if self._speeds is None or self._speeds.device != positions.device:
            # In float64: far into a long text, float32 angles are off by per cents of a turn.
            half = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
            self._speeds = self.config.rope_theta**-half
        angles = positions[..., None, None] * self._speeds
        angles = torch.cat([angles, angles], dim=-1)
        dtype = self.embedding.dtype
        return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))

    @torch.no_grad()
    def _pass(
        self,
        cache: PrefixCache,
        text: NewText,
        block_token_ids: Tensor,
        added: Tensor | None = None,
    ) -> Tensor:
        """New text and a block after it, pattern "block"; the text's keys go into the cache.

        Returns:
            `[R, T + B, H]` normed hidden states, of padding too.
        """
        rows, num_new, num_block = text.rows, text.token_ids.shape[1], block_token_ids.shape[1]
        first, start = cache.span(rows)
        after = start + text.counts.unsqueeze(1)
        ahead = torch.arange(max(num_new, num_block), device=rows.device)
        new = start + ahead[:num_new]
        new = torch.where(new < after, new, -1)  # [R, T], -1 for padding
        slots = cache.slots_in_use(text.longest)
        # Each token sees an interval of positions; padding is at position -1 and sees that. A
        # token of the text does not see the block: its interval ends at itself.
        position = torch.cat([new, after + ahead[:num_block]], dim=1)  # [R, S]
        highest = torch.where(position < after, position, after + (num_block - 1))
        lowest = torch.maximum(torch.minimum(position, after) - cache.window, first)
        lowest = torch.minimum(lowest, highest)
        keys = torch.cat([cache.positions(first, start, slots), position], dim=1).unsqueeze(1)
        visible = (keys >= lowest.unsqueeze(2)) & (keys <= highest.unsqueeze(2))
        visible = visible.unsqueeze(1)  # [R, 1, S, C + S]
        rotation = self._rotation(position)
        if added is None and self.conditioning is not None:
            added = self.conditioning.unknown.expand(len(rows), num_new, -1)
        x = self._embed(torch.cat([text.token_ids, block_token_ids], dim=1), added)
        place, row = cache.places(new, after), rows.unsqueeze(1)
        for index, layer in enumerate(self._stack):
            query, key, value = layer.project(x, rotation)
            kept_keys = cache.keys[index, rows, :slots]
            kept_values = cache.values[index, rows, :slots]
            if num_new:
                cache.keys[index, row, place] = key[:, :num_new]
                cache.values[index, row, place] = value[:, :num_new]
            key, value = torch.cat([kept_keys, key], 1), torch.cat([kept_values, value], 1)
            x = layer.finish(x, layer.attend(query, key, value, visible))
        states = self._normed(x)
        if num_new:
            cache.append(rows, first, after)
        if num_new and self.config.predicts == "next_token":
            newest = (text.counts - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, states.shape[2])
            grown = (text.counts > 0).unsqueeze(1)
            last = states.gather(1, newest).squeeze(1)
            cache.last[rows] = torch.where(grown, last, cache.last[rows])
        return states

    def _remember(self, cache: PrefixCache, text: NewText) -> None:
        """Keep new text for `_whole_window`."""
        rows = text.rows
        first, start = cache.span(rows)
        after = start + text.counts.unsqueeze(1)
        new = start + torch.arange(text.token_ids.shape[1], device=rows.device)
        new = torch.where(new < after, new, -1)
        cache.token_ids[rows.unsqueeze(1), cache.places(new, after)] = text.token_ids
        cache.append(rows, first, after)

    @torch.no_grad()
    def _whole_window(
        self, cache: PrefixCache, rows: Tensor, block_token_ids: Tensor, longest: int
    ) -> Tensor:
        """`[R, C + B, H]` normed states of each row's window and the block, all seeing all.

        Windows are laid in order and end at the block; shorter ones are padded before.
        """
        context, (first, after) = cache.slots_in_use(longest), cache.span(rows)
        steps = torch.arange(-context, block_token_ids.shape[1], device=rows.device)
        positions = after + steps
        there = positions >= first
        slots = positions[:, :context] % cache.window
        tokens = torch.cat([cache.token_ids[rows.unsqueeze(1), slots], block_token_ids], dim=1)
        visible = there.unsqueeze(1).expand(-1, tokens.shape[1], -1)
        return self(tokens, torch.where(there, positions, 0), visible)


#: Our fused parameters and the tensors they are made of, stacked by rows.
_FUSED = {
    "attention_norm": ("input_layernorm.weight",),
    "mlp_norm": ("post_attention_layernorm.weight",),
    "qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "qkv_bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "attention_out": ("self_attn.o_proj.weight",),
    "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down": ("mlp.down_proj.weight",),
}
