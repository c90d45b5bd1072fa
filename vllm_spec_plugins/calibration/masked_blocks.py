"""Many masked blocks beside one text in a single pass: what makes a drafter learn in minutes.

A window of text is followed by the masks of several blocks. The text sees what a causal model
sees; the masks of a block see the text up to their anchor, the last token known, and each other
(block diffusion's attention, Arriola et al. 2503.09573). So the text is read once for all blocks,
and each pass teaches hundreds of drafts instead of one.

Shapes: W windows; T tokens of each, padded with -1; M masks beside each; S = T + M.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of some windows. Draft token i of a block is the one i places after its anchor.

    Attributes:
        anchors: `[W, B]` position of the last token known.
        lengths: `[W, B]` draft tokens, 0 for no block.
    """

    anchors: NDArray[np.int64]
    lengths: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MaskedPass:
    """What the drafter is given, and where its draft tokens are read.

    Attributes:
        token_ids: `[W, S]` int64.
        positions: `[W, S]` int64.
        visible: `[W, S, S]` bool.
        window: `[N]` window of each draft token, of all blocks in order.
        place: `[N]` which of the S tokens predicts it.
        before: `[N]` position of the text token before it: where the target has its law.
        number: `[N]` its place in its block, from 1.
        length: `[N]` draft tokens of its block.
    """

    token_ids: Tensor
    positions: Tensor
    visible: Tensor
    window: NDArray[np.int64]
    place: NDArray[np.int64]
    before: NDArray[np.int64]
    number: NDArray[np.int64]
    length: NDArray[np.int64]


def draw_blocks(
    text_lengths: NDArray[np.int64],
    num_masks: int,
    longest: int,
    generator: np.random.Generator,
    *,
    vary: bool,
) -> Blocks:
    """Random blocks with about `num_masks` masks in all for each window.

    Args:
        text_lengths: `[W]` tokens of each window, at least 2.
        num_masks: Masks for the blocks of one window; the last block may be cut.
        longest: Draft tokens of a block, at most.
        generator: Of lengths and anchors.
        vary: Lengths are uniform on 1..longest; otherwise all are the longest.

    Returns:
        Blocks that end within their text.
    """
    # The first draft token needs no mask. Of blocks that need none, as many as there are masks.
    masks_of_each = (longest - 1) / 2 if vary else longest - 1
    count = -int(-num_masks // (masks_of_each or 1))
    shape = (len(text_lengths), count)
    lengths = generator.integers(1, longest + 1, shape) if vary else np.full(shape, longest)
    lengths = np.minimum(lengths, text_lengths[:, None] - 1)
    # What the masks of earlier blocks leave for each.
    room = num_masks - (np.cumsum(lengths - 1, axis=1) - (lengths - 1))
    lengths = np.where(room >= 0, np.minimum(lengths, room + 1), 0)
    anchors = generator.random(shape) * (text_lengths[:, None] - lengths)
    return Blocks(anchors.astype(np.int64), lengths)


def masked_pass(token_ids: NDArray[np.int64], blocks: Blocks, mask_token_id: int) -> MaskedPass:
    """Lay the masks of the blocks beside their windows, for drafters that predict next tokens.

    A block's first draft token is predicted by its anchor, the others by a mask each.

    Args:
        token_ids: `[W, T]`, -1 after the end of a text.
        blocks: Of these windows; draft tokens may reach one past the end of the text.
        mask_token_id: The drafter's.
    """
    windows, length = token_ids.shape
    count = np.maximum(blocks.lengths - 1, 0)
    most = int(count.sum(axis=1).max(initial=0))
    # Masks of a window, block after block; -1 where it has fewer than others.
    block_of = np.full((windows, most), -1, dtype=np.int64)
    mask_position = np.full((windows, most), -1, dtype=np.int64)
    anchor_of = np.full((windows, most), -1, dtype=np.int64)
    flat = count.ravel()
    window = np.repeat(np.arange(windows), count.sum(axis=1))
    block = np.repeat(np.tile(np.arange(count.shape[1]), windows), flat)
    within = np.arange(flat.sum()) - np.repeat(np.cumsum(flat) - flat, flat)
    column = np.arange(len(window)) - np.repeat(
        np.cumsum(count.sum(axis=1)) - count.sum(axis=1), count.sum(axis=1)
    )
    anchor = blocks.anchors[window, block]
    block_of[window, column] = block
    anchor_of[window, column] = anchor
    mask_position[window, column] = anchor + 1 + within
    first = np.nonzero(blocks.lengths > 0)
    text = np.maximum(token_ids, 0)
    masks = np.full((windows, most), mask_token_id, dtype=np.int64)
    positions = np.broadcast_to(np.arange(length), (windows, length))
    return MaskedPass(
        token_ids=torch.from_numpy(np.concatenate([text, masks], axis=1)),
        positions=torch.from_numpy(np.concatenate([positions, mask_position.clip(min=0)], axis=1)),
        visible=_visible(length, torch.from_numpy(block_of), torch.from_numpy(anchor_of)),
        window=np.concatenate([first[0], window]),
        place=np.concatenate([blocks.anchors[first], length + column]),
        before=np.concatenate([blocks.anchors[first], anchor + 1 + within]),
        number=np.concatenate([np.ones(len(first[0]), dtype=np.int64), within + 2]),
        length=np.concatenate([blocks.lengths[first], blocks.lengths[window, block]]),
    )


def _visible(length: int, block_of: Tensor, anchor_of: Tensor) -> Tensor:
    """`[W, S, S]`: text sees text before it, masks see text up to the anchor and their block."""
    windows, masks = block_of.shape
    visible = torch.zeros(windows, length + masks, length + masks, dtype=torch.bool)
    visible[:, :length, :length] = torch.ones(length, length, dtype=torch.bool).tril()
    visible[:, length:, :length] = torch.arange(length) <= anchor_of[..., None]
    visible[:, length:, length:] = block_of[:, :, None] == block_of[:, None]
    return visible
