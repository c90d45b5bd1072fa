"""Train a diffusion drafter: draft the next tokens of a text in one pass, as the target would.

DEER's two stages (Cheng et al. 2512.15176), on text or on what the target wrote:

    I   the text is cut at random and the whole block after the cut is masked; every masked token
        counts the same: negative log-likelihood over the share masked.
    II  only R tokens are masked, R uniform on 1..block; token i of them weighs a^(R - i), so the
        one next to the prefix most: it is accepted or rejected first.

In both the loss of a block is the weighted mean over its masked tokens. Here hundreds of blocks
share a pass (`masked_blocks.py`), labels are the target's own laws unless told otherwise, and
every token of the text learns to predict the next one besides (TiDAR, Liu et al. 2511.08923):
the first draft token comes from it.

A conditioned drafter (`diffusion/conditioning.py`) reads the states of the frozen target that the
labels come from anyway. In some windows those of the first tokens are withheld, as they are where
vLLM takes a prefix from its cache: what is learned then holds with and without them.

The drafter starts from the first layers of a causal model with the same tokenizer, by default the
target, with its embedding and head. Muon for the matrices, AdamW for the rest, as in the zoo.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vllm_spec_plugins.diffusion.drafter import DiffusionDrafter
from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.zoo.cache import key_of, write_atomically
from vllm_spec_plugins.zoo.muon import Muon
from vllm_spec_plugins.zoo.training import schedule

from .adapter import windows_of_step
from .hugging_face import LocalModel
from .law_loss import law_loss
from .masked_blocks import Blocks, draw_blocks, masked_pass

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Share of windows in which the states of a first part, of random length, are withheld.
_WITHHELD = 0.25

#: Learning rate of the projection of states over that of the layers' matrices, for an embedding of
#: spread 1. What Muon adds does not depend on the gradient's size, and this matrix begins at zero
#: beside the embedding: at the full rate, what it adds soon drowned the tokens.
_STATES_RATE = 0.5

#: Told after every step: steps done, mean divergence of the blocks' tokens in nats.
OnStep = Callable[[int, float], None]

#: Told at every checkpoint: steps done, the drafter as it is then.
OnCheckpoint = Callable[[int, DiffusionDrafter], None]


@dataclass(frozen=True, slots=True)
class DiffusionRecipe:
    """How a drafter is trained.

    Attributes:
        block: Draft tokens of a block, at most.
        steps: Updates.
        batch_size: Windows per step.
        window: Tokens of a window.
        num_masks: Masks beside each window.
        stage_two: Share of the steps in stage II.
        decay: a of stage II.
        text_weight: Of the loss of the text's own tokens beside that of the blocks.
        distil: Learn the target's laws; otherwise the text's tokens.
        matrix_lr: Peak learning rate of Muon, for the matrices inside the layers.
        lr: Peak of AdamW's, for embedding, head and norms.
        weight_decay: Of Muon.
        checkpoint_every: Steps between checkpoints.
        seed: Of new weights, blocks and the order of text.
    """

    block: int = 16
    steps: int = 600
    batch_size: int = 4
    window: int = 256
    num_masks: int = 192
    stage_two: float = 0.75
    decay: float = 1.5
    text_weight: float = 0.5
    distil: bool = True
    matrix_lr: float = 0.01
    lr: float = 1e-3
    weight_decay: float = 0.1
    checkpoint_every: int = 25
    seed: int = 0

    def check(self, target: LocalModel) -> None:
        """Whether the target can be read so.

        Raises:
            SpecPluginsError: It takes no such window, or the block does not fit.
        """
        if not 2 <= self.window <= target.max_positions:
            raise SpecPluginsError(
                f"window must be 2 to {target.max_positions} tokens, not {self.window}."
            )
        if not 1 <= self.block < self.window:
            raise SpecPluginsError(
                f"block must be 1 to {self.window - 1} tokens, less than the window, not "
                f"{self.block}."
            )


@dataclass(frozen=True, slots=True)
class TrainedDrafter:
    """What training gives.

    Attributes:
        drafter: The drafter.
        losses: Mean divergence of the blocks' tokens at each step, nats; unweighted.
        seconds: Wall time of all steps, those before a resumption included.
        resumed_at: Steps that were already done when this process took over.
    """

    drafter: DiffusionDrafter
    losses: list[float]
    seconds: float
    resumed_at: int


def job_of(recipe: DiffusionRecipe, start: DiffusionDrafter, target: LocalModel, data: str) -> str:
    """A name for what decides the result, in 12 hexadecimal digits.

    Args:
        recipe: How to train.
        start: The drafter before it.
        target: Whose laws are learnt.
        data: Fingerprint of the training windows.
    """
    how = asdict(recipe)
    del how["checkpoint_every"]
    probes = [round(weight.double().norm().item(), 4) for weight in start.parameters()]
    probe = target.logits(target.embed(torch.arange(4))).double().norm().item()
    facts = {"recipe": how, "drafter": start.config.as_json(), "start": probes, "data": data}
    return key_of({**facts, "target": round(probe, 3), "layers": target.num_layers})


def train(
    drafter: DiffusionDrafter,
    target: LocalModel,
    recipe: DiffusionRecipe,
    windows: NDArray[np.int64],
    checkpoint: Path,
    job: str,
    on_step: OnStep | None = None,
    on_checkpoint: OnCheckpoint | None = None,
) -> TrainedDrafter:
    """Train a drafter in place, continuing from `checkpoint` where one is left.

    The same job, machine and thread count give the same weights, bit for bit, whether or not
    training was interrupted.

    Args:
        drafter: Where it starts; on the target's device, float32.
        target: Whose drafts it shall make.
        recipe: How.
        windows: `[W, T]` from `adapter.padded`.
        checkpoint: File rewritten every `recipe.checkpoint_every` steps.
        job: From `job_of`.
        on_step: Told after each step, before its checkpoint.
        on_checkpoint: Told when a checkpoint is written.

    Raises:
        SpecPluginsError: The checkpoint is that of another job.
    """
    drafter.requires_grad_(True).train()
    optimizers = _optimizers(drafter, recipe)
    losses: list[float] = []
    seconds = 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=target.device)
        if state["job"] != job:
            raise SpecPluginsError(
                f"{checkpoint} is left of a training with another model, text or settings: finish "
                "that with its own command, delete the file, or choose another output."
            )
        drafter.load_state_dict(state["drafter"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        losses, seconds = state["losses"], state["seconds"]
    resumed_at = len(losses)
    start = time.perf_counter() - seconds
    for step in range(resumed_at, recipe.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, recipe.steps)
        batch = windows[windows_of_step(step, len(windows), recipe)]
        losses.append(_step(drafter, target, optimizers, batch, step, recipe))
        if on_step is not None:
            on_step(step + 1, losses[-1])
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
            state = {
                "job": job,
                "drafter": drafter.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "losses": losses,
                "seconds": time.perf_counter() - start,
            }
            write_atomically(checkpoint, lambda path, state=state: torch.save(state, path))
            if on_checkpoint is not None:
                on_checkpoint(step + 1, drafter)
    seconds = time.perf_counter() - start
    return TrainedDrafter(drafter.requires_grad_(False).eval(), losses, seconds, resumed_at)


def block_weights(
    number: NDArray[np.int64], length: NDArray[np.int64], decay: float
) -> NDArray[np.float32]:
    """`[N]` weight of each draft token: those of a block are as a^(R - i) and sum to 1.

    Args:
        number: `[N]` i, from 1.
        length: `[N]` R.
        decay: a; 1 weighs all the same.
    """
    ratio = 1 / decay
    total = length if decay == 1 else (1 - ratio**length) / (1 - ratio)
    return (ratio ** (number - 1) / total).astype(np.float32)


def known_states(shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[np.bool_]:
    """`[W, T]`, which states of some windows a drafter learns with: all but first parts of some."""
    windows, length = shape
    withheld = generator.integers(1, length + 1, windows)
    withheld[generator.random(windows) >= _WITHHELD] = 0
    return np.arange(length) >= withheld[:, None]


def _step(
    drafter: DiffusionDrafter,
    target: LocalModel,
    optimizers: Sequence[torch.optim.Optimizer],
    token_ids: NDArray[np.int64],
    step: int,
    recipe: DiffusionRecipe,
) -> float:
    """One update. Returns the mean divergence of the blocks' tokens before it."""
    second = step >= recipe.steps * (1 - recipe.stage_two)
    generator = np.random.default_rng((recipe.seed, 1, step))
    blocks = draw_blocks(
        (token_ids >= 0).sum(axis=1), recipe.num_masks, recipe.block, generator, vary=second
    )
    decay = recipe.decay if second else 1.0
    known = known_states(token_ids.shape, np.random.default_rng((recipe.seed, 2, step)))
    loss, mean = _loss(drafter, target, token_ids, blocks, decay, step % 2, recipe, known)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return mean


def _loss(
    drafter: DiffusionDrafter,
    target: LocalModel,
    token_ids: NDArray[np.int64],
    blocks: Blocks,
    decay: float,
    parity: int,
    recipe: DiffusionRecipe,
    known: NDArray[np.bool_] | None = None,
) -> tuple[Tensor, float]:
    """The loss, and the blocks' mean divergence for people.

    Every other token of the text, those at places of this parity, learns its next one: that is
    enough, and the head is the dear part. Of the target's states a conditioned drafter reads
    those that are `[W, T]` known; None: all.
    """
    device, length = target.device, token_ids.shape[1]
    layout = masked_pass(token_ids, blocks, drafter.config.mask_token_id)
    after = layers_read(drafter)
    if recipe.distil:
        after = [*after, target.num_layers]
    text = torch.from_numpy(np.maximum(token_ids, 0))
    of_target = target.layer_states(text, after) if after else {}
    low = target.dtype
    with torch.autocast(device.type, low, enabled=low != torch.float32):
        states = drafter(
            layout.token_ids.to(device),
            layout.positions.to(device),
            layout.visible.to(device),
            added_to_texts(drafter, of_target, known),
        )
    text_window, text_place = np.nonzero(token_ids[:, 1:] >= 0)
    some = text_place % 2 == parity
    text_window, text_place = text_window[some], text_place[some]
    drafted = len(layout.window)
    weights = block_weights(layout.number, layout.length, decay)
    weights = np.concatenate(
        [
            weights / weights.sum(),
            np.full(len(text_place), recipe.text_weight / max(1, len(text_place)), np.float32),
        ]
    )
    rows = np.stack(
        [
            np.concatenate([layout.window, text_window]),
            np.concatenate([layout.place, text_place]),
            np.concatenate([layout.before, text_place]),
        ]
    )
    window, place, before = torch.from_numpy(rows).to(device)
    if recipe.distil:
        law = _target_law(target, of_target[target.num_layers])
    else:
        law = _text_law(target, token_ids)
    loss, divergences = law_loss(
        states[window, place].float(),
        drafter.head,
        window * length + before,
        torch.from_numpy(weights).to(device),
        law,
    )
    return loss, divergences[:drafted].mean().item()


def layers_read(drafter: DiffusionDrafter) -> list[int]:
    """After which layers of the target a drafter reads states."""
    states = drafter.config.conditioned_on
    return [] if states is None else list(states.layers)


def added_to_texts(
    drafter: DiffusionDrafter,
    layer_states: Mapping[int, Tensor],
    known: NDArray[np.bool_] | None = None,
) -> Tensor | None:
    """What conditioning adds to the tokens of texts, `[W, T, H]`; None for a drafter without.

    Args:
        drafter: The drafter.
        layer_states: By layers run, `[W, T, G]`; of those it reads.
        known: `[W, T]`, states it is given; None: all.
    """
    if drafter.conditioning is None:
        return None
    states = [layer_states[layer] for layer in layers_read(drafter)]
    given = None if known is None else torch.from_numpy(known).to(states[0].device)
    return drafter.conditioning.of_texts(states, given)


def _target_law(target: LocalModel, last: Tensor) -> Callable[[Tensor], Tensor]:
    """What the target says comes after each token of the windows.

    Args:
        target: The target.
        last: `[W, T, G]` its states after the last layer.
    """
    states = last.flatten(0, 1)

    def law(tokens: Tensor) -> Tensor:
        return target.logits(target.final_norm(states[tokens])).softmax(-1)

    return law


def _text_law(target: LocalModel, token_ids: NDArray[np.int64]) -> Callable[[Tensor], Tensor]:
    """All to the token that does come after each token of the windows."""
    following = np.zeros_like(token_ids)
    following[:, :-1] = np.maximum(token_ids[:, 1:], 0)
    labels = torch.from_numpy(following.ravel()).to(target.device)

    def law(tokens: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(labels[tokens], target.vocab_size).float()

    return law


def _optimizers(drafter: DiffusionDrafter, recipe: DiffusionRecipe) -> list[torch.optim.Optimizer]:
    """Muon for matrices but embedding and head, AdamW for these, for norms and biases."""
    matrices = drafter.matrices()
    inside = {id(parameter) for parameter, _ in matrices}
    others = [parameter for parameter in drafter.parameters() if id(parameter) not in inside]
    muon = Muon(matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay)
    if drafter.conditioning is not None:
        spread = drafter.embedding.detach().std().item()
        for group in muon.param_groups:
            if group["params"][0] is drafter.conditioning.projection:
                group["lr"] *= _STATES_RATE * spread
    optimizers: list[torch.optim.Optimizer] = [
        muon,
        torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
