"""Handwritten digits to learn images from: scikit-learn's 1,797, turned and shifted at random.

They come with scikit-learn, so that nothing has to be fetched: 8 x 8 grey images of the UCI
"Optical Recognition of Handwritten Digits" set (Alpaydin and Kaynak 1998), here 16 x 16.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_spec_plugins.errors import SpecPluginsError

#: Height and width of an image, in pixels.
IMAGE_SIZE = 16
CLASSES = 10

#: Images of the set that nothing is trained on.
_HELD_OUT = 300


@dataclass(frozen=True, slots=True)
class Digits:
    """One part of the set.

    Attributes:
        images: `[N, 1, 16, 16]` float32 in [0, 1], ink is 1.
        labels: `[N]` int64, 0 to 9.
    """

    images: Tensor
    labels: Tensor

    def augmented(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """`[M, 1, 16, 16]`: images `indices` `[M]`, each turned, scaled and shifted at random."""
        count = len(indices)
        draws = torch.rand(count, 4, generator=generator) - 0.5
        angle, scale, shift = draws[:, 0] * 0.5, 1 + draws[:, 1] * 0.3, draws[:, 2:] * 0.25
        placement = torch.zeros(count, 2, 3)
        placement[:, 0, 0] = placement[:, 1, 1] = torch.cos(angle) * scale
        placement[:, 0, 1], placement[:, 1, 0] = -torch.sin(angle), torch.sin(angle)
        placement[:, :, 2] = shift
        shape = [count, 1, IMAGE_SIZE, IMAGE_SIZE]
        grid = F.affine_grid(placement, shape, align_corners=False)
        return F.grid_sample(self.images[indices], grid, align_corners=False).clamp(0, 1)


@lru_cache(maxsize=1)
def load_digits() -> tuple[Digits, Digits]:
    """The training part and the held-out part; always the same split.

    Raises:
        SpecPluginsError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise SpecPluginsError(
            "the image models of the zoo learn from the digits that come with scikit-learn, which "
            "is not installed: pip install 'vllm-spec-plugins[demo]'."
        ) from None
    pixels, labels = datasets.load_digits(return_X_y=True)
    small = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    images = F.interpolate(small, size=IMAGE_SIZE, mode="bicubic", align_corners=False).clamp(0, 1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, training = order[:_HELD_OUT], order[_HELD_OUT:]
    labels = torch.tensor(labels, dtype=torch.int64)
    return Digits(images[training], labels[training]), Digits(images[held_out], labels[held_out])


@lru_cache(maxsize=1)
def digest() -> str:
    """SHA-256 of images and labels."""
    content = hashlib.sha256()
    for part in load_digits():
        content.update(part.images.numpy().tobytes())
        content.update(part.labels.numpy().tobytes())
    return content.hexdigest()
