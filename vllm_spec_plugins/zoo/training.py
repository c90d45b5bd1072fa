"""The training loop: rotating early-exit loss, Muon and AdamW, checkpoints that resume exactly.

Every step trains the last layer and one of the exits in turn through the same norm and head
(LayerSkip, Elhoushi et al. 2404.16710, without its layer dropout), so that stopping after
that many layers gives a usable draft.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .bigram import start_from_bigrams
from .cache import write_atomically
from .loss import head_cross_entropy
from .model import Llama, hidden_matrices
from .muon import Muon
from .recipes import TextRecipe, VisualRecipe

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Told after every step: steps done, mean cross entropy of the final layer in nats per token.
OnStep = Callable[[int, float], None]


@dataclass(frozen=True, slots=True)
class Trained:
    """What training gives.

    Attributes:
        model: The model, in evaluation use from here on.
        losses: Training cross entropy of the last layer at each step, nats per token.
        seconds: Wall time of all steps, those before a resumption included.
        resumed_at: Steps that were already done when this process took over.
    """

    model: Llama
    losses: list[float]
    seconds: float
    resumed_at: int


def train(
    recipe: TextRecipe,
    tokens: NDArray[np.int64],
    dtype: torch.dtype,
    checkpoint: Path,
    on_step: OnStep | None = None,
) -> Trained:
    """Train `recipe`, continuing from `checkpoint` where one is left.

    The same recipe, tokens, dtype, machine and thread count give the same weights, bit for
    bit, whether or not training was interrupted.

    Args:
        recipe: What to train.
        tokens: `[N]` training text.
        dtype: What matrix products are done in; weights and sums stay float32.
        checkpoint: File rewritten every `recipe.checkpoint_every` steps.
        on_step: Told after each step, before its checkpoint.
    """

    def initialise(model: Llama) -> None:
        generator = torch.Generator().manual_seed(recipe.seed)
        model.initialise(generator)
        if recipe.architecture.vocabulary > recipe.architecture.hidden_size:
            start_from_bigrams(model, tokens, generator)  # else there is nothing to factorise

    def learn(model: Llama, step: int) -> float:
        windows = torch.from_numpy(batch_of_step(tokens, step, recipe))
        return _learn(model, windows, step, recipe, dtype)

    return run_training(recipe, initialise, learn, checkpoint, on_step)


def run_training(
    recipe: TextRecipe | VisualRecipe,
    initialise: Callable[[Llama], None],
    learn: Callable[[Llama, int], float],
    checkpoint: Path,
    on_step: OnStep | None,
) -> Trained:
    """Every recipe's steps, from the last checkpoint on: schedule, clipping, updates, checkpoints.

    Args:
        recipe: What to train.
        initialise: Gives a new model its first weights.
        learn: Told the model and the step; leaves the step's gradient behind and returns its
            loss.
        checkpoint: File rewritten every `recipe.checkpoint_every` steps.
        on_step: Told after each step, before its checkpoint.
    """
    model = Llama(recipe.architecture)
    optimizers = make_optimizers(model, recipe)
    losses: list[float] = []
    seconds = 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        losses, seconds = state["losses"], state["seconds"]
    else:
        initialise(model)
    resumed_at = len(losses)
    start = time.perf_counter() - seconds
    for step in range(resumed_at, recipe.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, recipe.steps)
        losses.append(learn(model, step))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if on_step is not None:
            on_step(step + 1, losses[-1])
        if (step + 1) % recipe.checkpoint_every == 0 and step + 1 < recipe.steps:
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "losses": losses,
                "seconds": time.perf_counter() - start,
            }
            write_atomically(checkpoint, lambda path, state=state: torch.save(state, path))
    return Trained(model, losses, time.perf_counter() - start, resumed_at)


def schedule(step: int, steps: int) -> float:
    """Learning rate at `step` as a share of its peak: up, level, then down along a line to 2 %."""
    warm_up = max(1, round(0.05 * steps))
    level_until = 0.3 * steps
    falling = max(0.0, (step - level_until) / (steps - level_until))
    return min(1.0, (step + 1) / warm_up) * (1 - 0.98 * falling)


def batch_of_step(tokens: NDArray[np.int64], step: int, recipe: TextRecipe) -> NDArray[np.int64]:
    """The windows of one step, `[B, T + 1]`: a function of the step, so nothing to checkpoint.

    Each pass over the text cuts it at another offset and shuffles the windows anew.
    """
    length = recipe.sequence_length
    per_pass = (len(tokens) - 1) // length - 1
    starts: list[int] = []
    for number in range(step * recipe.batch_size, (step + 1) * recipe.batch_size):
        turn, place = divmod(number, per_pass)
        starts.append(_starts_of_pass(recipe.seed, turn, per_pass, length)[place])
    return np.stack([tokens[start : start + length + 1] for start in starts])


@lru_cache(maxsize=2)
def _starts_of_pass(seed: int, turn: int, windows: int, length: int) -> list[int]:
    generator = np.random.default_rng((seed, turn))
    offset = int(generator.integers(length))
    return (generator.permutation(windows) * length + offset).tolist()


def _learn(
    model: Llama,
    windows: Tensor,
    step: int,
    recipe: TextRecipe,
    dtype: torch.dtype,
) -> float:
    """The gradient of one step. Returns the last layer's mean cross entropy."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    exits = recipe.exits[step % max(1, len(recipe.exits)) :][:1]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        *early, last = model(inputs, exits)
    count = targets.numel()
    hidden, labels = [last.flatten(0, 1)], [targets.reshape(-1)]
    weights = [torch.full((count,), 1 / count)]
    for states in early:
        # Every few positions are enough to teach an exit, and the head is the dear part.
        some = slice(step % recipe.exit_stride, None, recipe.exit_stride)
        hidden.append(states[:, some].flatten(0, 1))
        labels.append(targets[:, some].reshape(-1))
        weights.append(torch.full((len(labels[-1]),), recipe.exit_weight / len(labels[-1])))
    loss, losses = head_cross_entropy(
        torch.cat(hidden), model.head, torch.cat(labels), torch.cat(weights), dtype
    )
    loss.backward()
    return losses[:count].mean().item()


def make_optimizers(model: Llama, recipe: TextRecipe | VisualRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding, head and norms."""
    matrices = hidden_matrices(model)
    inside = {id(parameter) for parameter, _ in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
