"""Distil an exit adapter: teach its block to give the frozen target's own law over the next token.

At every position of every window the block's logits, through the target's head, are drawn
towards the target's (soft cross entropy at the same position, as Kangaroo does, Liu et al.
2404.18911). What both need of the target, the states after the exit and after the last layer,
is computed for each batch and forgotten. Muon for the matrices and AdamW for the norms, as in
the zoo; Kangaroo used AdamW for all.

Shapes: W windows of text, B in a step, T tokens each; N positions of a step; H hidden size; V
vocabulary. Windows shorter than T end in -1; nothing is learnt or measured there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.zoo.cache import key_of, write_atomically
from vllm_spec_plugins.zoo.muon import Muon
from vllm_spec_plugins.zoo.training import schedule

from .acceptance_walk import ratio_with_error
from .adapter_block import AdapterBlock, probes_of, target_shape
from .hugging_face import LocalModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Logits held at once: 16 MB of float32, several times in a step.
_CHUNK_ELEMENTS = 1 << 22

#: Told after every step: steps done, mean KL divergence in nats per token.
OnStep = Callable[[int, float], None]


@dataclass(frozen=True, slots=True)
class AdapterRecipe:
    """All that decides an adapter beside its target and the text.

    Attributes:
        exit_layer: Number of the target's layers that run before it.
        steps: Updates.
        batch_size: Windows per step.
        window: Tokens of a window.
        matrix_lr: Peak learning rate of Muon, for the matrices.
        lr: Peak learning rate of AdamW, for the norms.
        weight_decay: Of Muon.
        ffn_size: Width of a feed-forward part, 0 for none.
        checkpoint_every: Steps between checkpoints.
        seed: Of weights and order of text.
    """

    exit_layer: int
    steps: int = 600
    batch_size: int = 8
    window: int = 256
    matrix_lr: float = 0.03
    lr: float = 1e-3
    weight_decay: float = 0.1
    ffn_size: int = 0
    checkpoint_every: int = 20
    seed: int = 0

    def check(self, model: LocalModel) -> None:
        """Whether the model can be asked for that.

        Raises:
            SpecPluginsError: It has no such exit, or takes no such window.
        """
        if not 1 <= self.exit_layer < model.num_layers:
            raise SpecPluginsError(
                f"exit_layer must be 1 to {model.num_layers - 1} for this model of "
                f"{model.num_layers} layers, not {self.exit_layer}."
            )
        if not 2 <= self.window <= model.max_positions:
            raise SpecPluginsError(
                f"window must be 2 to {model.max_positions} tokens, not {self.window}."
            )


class Batches(Protocol):
    """A recipe, as far as it decides which windows come when."""

    @property
    def batch_size(self) -> int: ...

    @property
    def seed(self) -> int: ...


@dataclass(frozen=True, slots=True)
class TrainedBlock:
    """What training gives.

    Attributes:
        block: The block.
        losses: KL divergence at each step, nats per token.
        seconds: Wall time of all steps, those before a resumption included.
        resumed_at: Steps that were already done when this process took over.
    """

    block: AdapterBlock
    losses: list[float]
    seconds: float
    resumed_at: int


@dataclass(frozen=True, slots=True)
class DraftQuality:
    """One way of drafting, on held-out text.

    Attributes:
        name: `exit`, `adapter` or `next exit`: the bare exit after one layer more.
        layers: Layers that run.
        divergence: KL divergence of its law q from the target's law p, nats per token.
        acceptance: Mean over positions of the sum over tokens of min(p, q), the chance that a
            token drawn from q is accepted at temperature 1.
        agreement: Share of positions where both have the same most likely token: that chance
            at temperature 0.
    """

    name: str
    layers: int
    divergence: float
    acceptance: float
    agreement: float


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The adapter beside the bare exit, on windows it has not seen.

    Attributes:
        drafts: `exit`, `adapter`, and `next exit` where it is not the last layer.
        windows: How many.
        gain: Acceptance of the adapter less that of the bare exit.
        gain_error: Standard error of that, over windows; NaN with one.
    """

    drafts: tuple[DraftQuality, ...]
    windows: int
    gain: float
    gain_error: float


def job_of(model: LocalModel, recipe: AdapterRecipe, data: str) -> str:
    """A name for what decides the result, in 12 hexadecimal digits.

    Args:
        model: The target.
        recipe: How to train.
        data: Fingerprint of the training windows.
    """
    probes = [round(x, 4) for x in probes_of(model).embedding.flatten().tolist()]
    shape, how = asdict(target_shape(model)), asdict(recipe)
    del how["checkpoint_every"]
    return key_of(
        {"target": shape, "probes": probes, "dtype": str(model.dtype), "recipe": how, "data": data}
    )


def train(
    model: LocalModel,
    recipe: AdapterRecipe,
    windows: NDArray[np.int64],
    checkpoint: Path,
    job: str,
    on_step: OnStep | None = None,
) -> TrainedBlock:
    """Train a block, continuing from `checkpoint` where one is left.

    The same job, machine and thread count give the same weights, bit for bit, whether or not
    training was interrupted.

    Args:
        model: The target.
        recipe: How.
        windows: `[W, T]` from `padded`.
        checkpoint: File rewritten every `recipe.checkpoint_every` steps.
        job: From `job_of`.
        on_step: Told after each step, before its checkpoint.

    Raises:
        SpecPluginsError: The checkpoint is that of another job.
    """
    block = AdapterBlock(model, recipe.ffn_size, recipe.seed)
    optimizers = _optimizers(block, recipe)
    losses: list[float] = []
    seconds = 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=model.device)
        if state["job"] != job:
            raise SpecPluginsError(
                f"{checkpoint} is left of a training with another model, text or settings: finish "
                "that with its own command, delete the file, or choose another output."
            )
        block.load_state_dict(state["block"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        losses, seconds = state["losses"], state["seconds"]
    resumed_at = len(losses)
    start = time.perf_counter() - seconds
    for step in range(resumed_at, recipe.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, recipe.steps)
        batch = torch.from_numpy(windows[windows_of_step(step, len(windows), recipe)])
        losses.append(_step(model, block, optimizers, batch, recipe.exit_layer))
        if on_step is not None:
            on_step(step + 1, losses[-1])
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
            state = {
                "job": job,
                "block": block.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "losses": losses,
                "seconds": time.perf_counter() - start,
            }
            write_atomically(checkpoint, lambda path, state=state: torch.save(state, path))
    return TrainedBlock(block, losses, time.perf_counter() - start, resumed_at)


def windows_of_step(step: int, windows: int, recipe: Batches) -> NDArray[np.int64]:
    """Indices of a step's windows, `[B]`: a function of the step, so nothing to checkpoint.

    Each pass over the text has an order of its own.
    """
    numbers = np.arange(step * recipe.batch_size, (step + 1) * recipe.batch_size)
    turns = numbers // windows
    orders = {
        turn: np.random.default_rng((recipe.seed, turn)).permutation(windows)
        for turn in set(turns.tolist())
    }
    return np.array([orders[n // windows][n % windows] for n in numbers.tolist()], dtype=np.int64)


def sample_windows(
    windows: Iterable[NDArray[np.int64]], most: int, seed: int
) -> list[NDArray[np.int64]]:
    """All windows, or `most` of them, each as likely as any (reservoir sampling)."""
    generator = np.random.default_rng(seed)
    kept: list[NDArray[np.int64]] = []
    for number, window in enumerate(windows):
        if number < most:
            kept.append(window)
        elif (place := int(generator.integers(number + 1))) < most:
            kept[place] = window
    return kept


def padded(windows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """`[W, T]` with -1 after the end of shorter windows; T is the longest's length."""
    rows = np.full((len(windows), max(map(len, windows), default=0)), -1, dtype=np.int64)
    for row, window in zip(rows, windows, strict=True):
        row[: len(window)] = window
    return rows


@torch.no_grad()
def evaluate(
    model: LocalModel, block: AdapterBlock, exit_layer: int, windows: NDArray[np.int64]
) -> HeldOut:
    """Compare the adapter with the bare exit, and with the bare exit one layer later.

    Args:
        model: The target.
        block: Trained.
        exit_layer: Layers before it.
        windows: `[W, T]` from `padded`, at least one.
    """
    drafts: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
        "exit": (exit_layer, model.final_norm),
        "adapter": (exit_layer, block),
    }
    if exit_layer + 1 < model.num_layers:
        drafts["next exit"] = (exit_layer + 1, model.final_norm)
    layers = sorted({number for number, _ in drafts.values()} | {model.num_layers})
    sums, counts = [], []
    for window in windows:
        token_ids = window[window >= 0]
        states = model.layer_states(torch.from_numpy(token_ids)[None], layers)
        last = states[model.num_layers][0]
        rows = [_compare(model, through(states[n])[0], last) for n, through in drafts.values()]
        # Beside the drafts: what the adapter gains, for a standard error of its own.
        sums.append([*rows, [a - e for a, e in zip(rows[1], rows[0], strict=True)]])
        counts.append(len(token_ids))
    positions = np.broadcast_to(np.array(counts, dtype=np.float64)[:, None, None], np.shape(sums))
    means, errors = ratio_with_error(np.array(sums), positions)
    *qualities, gains = means.tolist()
    return HeldOut(
        drafts=tuple(
            DraftQuality(name, layer, *row)
            for (name, (layer, _)), row in zip(drafts.items(), qualities, strict=True)
        ),
        windows=len(counts),
        gain=gains[1],
        gain_error=float(errors[-1, 1]),
    )


def _step(
    model: LocalModel,
    block: AdapterBlock,
    optimizers: Sequence[torch.optim.Optimizer],
    token_ids: Tensor,
    exit_layer: int,
) -> float:
    """One update. Returns the mean KL divergence before it."""
    # Padding comes last, so no position before it sees it.
    states = model.layer_states(token_ids.clamp(min=0), (exit_layer, model.num_layers))
    there = (token_ids >= 0).to(model.device)
    normed = block(states[exit_layer])[there]
    loss, gradient = _distillation(model, normed.detach(), states[model.num_layers][there])
    normed.backward(gradient)
    torch.nn.utils.clip_grad_norm_(block.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss


def _distillation(model: LocalModel, normed: Tensor, last: Tensor) -> tuple[float, Tensor]:
    """Mean KL divergence and its gradient, without ever holding all logits.

    Its gradient is that of the cross entropy: the target's entropy does not depend on the block.

    Args:
        model: The target.
        normed: `[N, H]` what the head reads of the block.
        last: `[N, H]` the target's states after the last layer.

    Returns:
        The mean over positions, and its gradient with respect to `normed`.
    """
    gradient = torch.empty_like(normed)
    total = 0.0
    for rows in _chunks(len(normed), model.vocab_size):
        with torch.no_grad():
            log_p = model.logits(model.final_norm(last[rows])).log_softmax(-1)
        leaf = normed[rows].requires_grad_()
        logits = model.logits(leaf)
        with torch.no_grad():
            log_q = logits.log_softmax(-1)
            p = log_p.exp()
            total += (log_p.sub_(log_q).mul_(p)).sum().item()
            # d mean KL / d logits = (q - p) / N
            slope = log_q.exp_().sub_(p).div_(len(normed))
        (gradient[rows],) = torch.autograd.grad(logits, leaf, slope)
    return total / len(normed), gradient


def _compare(model: LocalModel, normed: Tensor, last: Tensor) -> list[float]:
    """Sums over N positions of KL divergence, acceptance and agreement; see `DraftQuality`."""
    totals = torch.zeros(3, dtype=torch.float64)
    for rows in _chunks(len(normed), model.vocab_size):
        log_p = model.logits(model.final_norm(last[rows])).log_softmax(-1)
        log_q = model.logits(normed[rows]).log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        same = log_p.argmax(-1) == log_q.argmax(-1)
        for place, part in enumerate((p * (log_p - log_q), torch.minimum(p, q), same)):
            totals[place] += part.sum(dtype=torch.float64).cpu()
    return totals.tolist()


def _chunks(rows: int, vocab_size: int) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // vocab_size)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _optimizers(block: AdapterBlock, recipe: AdapterRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the norms."""
    optimizers: list[torch.optim.Optimizer] = [
        Muon(block.matrices(), lr=recipe.matrix_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(block.vectors(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
