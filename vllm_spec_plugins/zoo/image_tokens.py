"""Images as tokens: patches, a codebook found by k-means, and the ids a model knows them by.

Vector quantisation in its plainest form (van den Oord et al. 1711.00937, without the network):
a code is the 2 x 2 patch nearest to the image's, an image is 64 codes in raster order.

    id 0 padding, 1 begin, 2 end, 3-12 the ten digits, 16 + c the image code c

A text is `begin digit code*64 end`. Ids 13 to 15 are unused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .digits import CLASSES, IMAGE_SIZE, Digits

PADDING_ID, BEGIN_ID, END_ID = 0, 1, 2
FIRST_DIGIT_ID = 3
#: Id of code 0.
FIRST_CODE_ID = 16
NUM_CODES = 512
#: `[first, last + 1)` ids that are image codes; also in each model's config.json.
IMAGE_TOKEN_RANGE = (FIRST_CODE_ID, FIRST_CODE_ID + NUM_CODES)

_PATCH = 2
#: Codes of an image.
TOKENS_PER_IMAGE = (IMAGE_SIZE // _PATCH) ** 2

_SAMPLE = 120_000
_ROUNDS = 30


def prompts_of(labels: Tensor) -> Tensor:
    """`[N, 2]` int64 prompts that ask for images of these digits, `[N]` int64."""
    return torch.stack([torch.full_like(labels, BEGIN_ID), FIRST_DIGIT_ID + labels], dim=1)


def token_names() -> list[str]:
    """What each id is called in the tokenizer, by id."""
    special = ["<pad>", "<s>", "</s>", *(f"<digit-{digit}>" for digit in range(CLASSES))]
    unused = [f"<unused-{id_}>" for id_ in range(len(special), FIRST_CODE_ID)]
    return [*special, *unused, *(f"<code-{code}>" for code in range(NUM_CODES))]


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """The way from images to token ids and back.

    Attributes:
        codebook: `[512, 4]` float32, the patch each code stands for, row by row.
    """

    codebook: Tensor

    def encode(self, images: Tensor) -> Tensor:
        """`[N, 64]` int64 token ids of `[N, 1, 16, 16]` images."""
        codes = _nearest(patches(images), self.codebook)
        return codes.view(len(images), -1) + FIRST_CODE_ID

    def decode(self, token_ids: Tensor) -> Tensor:
        """`[N, 1, 16, 16]` images of `[N, 64]` token ids. An id that is no code is left blank."""
        codes = token_ids - FIRST_CODE_ID
        known = (codes >= 0) & (codes < NUM_CODES)
        rows = self.codebook[codes.clamp(0, NUM_CODES - 1)] * known.unsqueeze(-1)
        size = (IMAGE_SIZE, IMAGE_SIZE)
        return F.fold(rows.transpose(1, 2), size, _PATCH, stride=_PATCH).clamp(0, 1)

    def texts(self, images: Tensor, labels: Tensor) -> Tensor:
        """`[N, 67]` int64: what a model learns from images of these digits."""
        end = torch.full((len(images), 1), END_ID)
        return torch.cat([prompts_of(labels), self.encode(images), end], dim=1)


def patches(images: Tensor) -> Tensor:
    """`[N * 64, 4]` patches of `[N, 1, 16, 16]` images, in raster order."""
    columns = F.unfold(images, _PATCH, stride=_PATCH)  # [N, 4, 64]
    return columns.transpose(1, 2).reshape(-1, _PATCH * _PATCH)


def fit(
    digits: Digits,
    generator: torch.Generator,
    on_round: Callable[[int, float], None] = lambda _done, _error: None,
) -> ImageTokens:
    """Find a codebook by Lloyd's k-means.

    Args:
        digits: To learn from.
        generator: Of augmentations and starting points.
        on_round: Told rounds done and the mean squared error of a pixel.
    """
    indices = torch.arange(len(digits.images)).repeat(8)
    points = patches(digits.augmented(indices, generator))
    points = points[torch.randperm(len(points), generator=generator)[:_SAMPLE]]
    # Most patches are empty: only different ones are places to start from.
    distinct = (points * 64).round().unique(dim=0) / 64
    start = torch.randperm(len(distinct), generator=generator)[:NUM_CODES]
    codebook = distinct[start]
    for done in range(1, _ROUNDS + 1):
        codes = _nearest(points, codebook)
        counts = torch.bincount(codes, minlength=NUM_CODES).unsqueeze(1)
        sums = torch.zeros_like(codebook).index_add_(0, codes, points)
        codebook = torch.where(counts > 0, sums / counts.clamp(min=1), codebook)
        on_round(done, float((points - codebook[codes]).square().mean()))
    return ImageTokens(codebook.contiguous())


def _nearest(points: Tensor, codebook: Tensor) -> Tensor:
    """`[N]` int64, the row of `codebook` nearest to each of `points`, the first of equals."""
    lengths = codebook.square().sum(dim=1)
    blocks = [(lengths - 2 * block @ codebook.T).argmin(dim=1) for block in points.split(1 << 14)]
    return torch.cat(blocks)
