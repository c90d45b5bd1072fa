"""How good generated digits are: a small classifier, and the Frechet distance in its features.

The distance is that of "FID" (Heusel et al. 1706.08500) with 48 features of this classifier
in the place of Inception's 2,048: it compares rows of one table, not with published numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .digits import CLASSES, Digits
from .image_tokens import ImageTokens

NUM_FEATURES = 48
_BATCH = 128


class DigitClassifier(nn.Module):
    """Two convolutions, one hidden layer: its activations are the features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(48 * 16, NUM_FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(NUM_FEATURES, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """`[N, 10]` logits of `[N, 1, 16, 16]` images."""
        return self.head(self.body(images))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """`[N, 48]`."""
        return torch.cat([self.body(block) for block in images.split(1024)])

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images taken for the digit they are meant to be."""
        logits = torch.cat([self(block) for block in images.split(1024)])
        return float((logits.argmax(dim=1) == labels).double().mean())


def train_classifier(
    digits: Digits,
    tokens: ImageTokens,
    steps: int,
    generator: torch.Generator,
    on_step: Callable[[int, float], None] = lambda _done, _loss: None,
) -> DigitClassifier:
    """Train on augmented digits, every other batch as its codes show them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(1 << 31, (), generator=generator)))
        classifier = DigitClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), 2e-3)
    for step in range(steps):
        chosen = torch.randint(len(digits.images), (_BATCH,), generator=generator)
        images = digits.augmented(chosen, generator)
        if step % 2:
            images = tokens.decode(tokens.encode(images))
        loss = F.cross_entropy(classifier(images), digits.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        on_step(step + 1, loss.item())
    return classifier.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class FeatureStatistics:
    """Mean and covariance of features of a set of images.

    Attributes:
        mean: `[48]` float64.
        covariance: `[48, 48]` float64.
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Of `[N, 48]` features, N at least 2."""
        features = features.double()
        return cls(features.mean(dim=0), torch.cov(features.T))

    def frechet_distance(self, other: FeatureStatistics) -> float:
        """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2). Its bias falls with 1/N."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        cross = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp(min=0).sqrt().sum()
        traces = self.covariance.trace() + other.covariance.trace()
        return float((self.mean - other.mean).square().sum() + traces - 2 * cross)
