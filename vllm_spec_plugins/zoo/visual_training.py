"""Train a Llama on image tokens: fresh augmentations at every step, checkpoints that resume."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .digits import Digits
from .image_tokens import BEGIN_ID, ImageTokens
from .loss import head_cross_entropy
from .model import Llama
from .recipes import VisualRecipe
from .training import OnStep, Trained, run_training


def train_visual(
    recipe: VisualRecipe,
    digits: Digits,
    tokens: ImageTokens,
    dtype: torch.dtype,
    checkpoint: Path,
    on_step: OnStep | None = None,
    teacher: Llama | None = None,
) -> Trained:
    """Train `recipe`, continuing from `checkpoint` where one is left.

    The same recipe, dtype, machine and thread count give the same weights, bit for bit,
    whether or not training was interrupted.

    Args:
        recipe: What to train.
        digits: To learn from.
        tokens: How images become token ids.
        dtype: What matrix products are done in; weights and sums stay float32.
        checkpoint: File rewritten every `recipe.checkpoint_every` steps.
        on_step: Told after each step, before its checkpoint.
        teacher: Learn what this model says, at every code of the images; None: the codes.
    """

    def initialise(model: Llama) -> None:
        model.initialise(torch.Generator().manual_seed(recipe.seed))

    def learn(model: Llama, step: int) -> float:
        texts = texts_of_step(digits, tokens, step, recipe)
        if teacher is not None:
            return divergence(model, teacher, texts, dtype)
        return cross_entropy(model, texts, dtype, learn=True)

    return run_training(recipe, initialise, learn, checkpoint, on_step)


def texts_of_step(digits: Digits, tokens: ImageTokens, step: int, recipe: VisualRecipe) -> Tensor:
    """`[B, 67]` token ids of one step: a function of the step, so nothing to checkpoint."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    chosen = torch.randint(len(digits.images), (recipe.batch_size,), generator=generator)
    return tokens.texts(digits.augmented(chosen, generator), digits.labels[chosen])


def cross_entropy(model: Llama, texts: Tensor, dtype: torch.dtype, *, learn: bool = False) -> float:
    """Mean cross entropy of codes and end, nats per token; `learn`: leave its gradient behind.

    Which digit follows `begin` is the user's choice, not learned.
    """
    assert int(texts[0, 0]) == BEGIN_ID
    with (
        torch.set_grad_enabled(learn),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        hidden = model(texts[:, :-1])[-1][:, 1:]
    labels = texts[:, 2:].reshape(-1)
    weights = torch.full((len(labels),), 1 / len(labels))
    with torch.set_grad_enabled(learn):
        loss, losses = head_cross_entropy(hidden.flatten(0, 1), model.head, labels, weights, dtype)
    if learn:
        loss.backward()
    return losses.mean().item()


def divergence(model: Llama, teacher: Llama, texts: Tensor, dtype: torch.dtype) -> float:
    """Mean Kullback-Leibler divergence of the teacher's laws, nats per token; leaves its gradient.

    At the same places as `cross_entropy`. A draft model is accepted as far as its laws are the
    target's; what the images say beyond that it need not know.
    """
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            told = _log_laws(teacher, texts)
        loss = F.kl_div(_log_laws(model, texts), told, reduction="batchmean", log_target=True)
    loss.backward()
    return loss.item()


def _log_laws(model: Llama, texts: Tensor) -> Tensor:
    """`[N, V]` float32 log-probabilities at codes and end."""
    hidden = model(texts[:, :-1])[-1][:, 1:].flatten(0, 1)
    return torch.log_softmax((hidden @ model.head.T).float(), dim=-1)
