"""What drafting and verifying cost here, timed on the engine's own pages before it serves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_spec_plugins.exit_selection import ExitCosts
from vllm_spec_plugins.stopwatch import fastest

from .exit_passes import DraftStep, ExitPass

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_spec_plugins.target_model import LayerStack, PagedSequences, TargetModel

#: Batch sizes that are timed; those above the largest are taken to cost like it.
_BATCHES, _LARGEST_BATCH = (1, 4), 16


def measure_costs(
    target: TargetModel,
    passes: Sequence[ExitPass],
    most: int,
    max_num_requests: int,
    device: torch.device,
) -> ExitCosts:
    """Time one draft step after each exit, and verifications of 0 and of `most` draft tokens.

    Args:
        target: The target, its pages not yet in use.
        passes: `[E]` one for each exit.
        most: K.
        max_num_requests: Batch sizes 1 and 4 are timed, and this one or 16.
        device: Where the target runs.
    """
    largest = min(max_num_requests, _LARGEST_BATCH)
    sizes = sorted({*(size for size in _BATCHES if size < largest), largest})
    draft = np.empty((len(sizes), len(passes)))
    verify, plain = np.empty((len(sizes), most + 1)), np.empty(len(sizes))
    layers = target.layers(0, target.num_layers)
    for row, size in enumerate(sizes):
        sequences = target.warm_up_sequences(size)
        token_ids = torch.zeros(size, dtype=torch.int64, device=device)
        step = DraftStep(token_ids, token_ids, sequences, np.arange(size))
        for run in passes:
            run.begin(size)
        verifying = [
            partial(_verify, target, layers, sequences, size, count, device) for count in (0, most)
        ]
        seconds = fastest([*verifying, *(partial(run, step) for run in passes)])
        plain[row] = seconds[0]
        # In between, costs grow with the number of tokens.
        slope = max(seconds[1] / seconds[0] - 1, 0.0) / most
        verify[row] = 1 + slope * np.arange(most + 1)
        draft[row] = seconds[2:] / seconds[0]
    return ExitCosts(np.array(sizes, dtype=np.int64), draft, verify, plain)


def _verify(
    target: TargetModel,
    layers: LayerStack,
    sequences: PagedSequences,
    num_requests: int,
    num_draft: int,
    device: torch.device,
) -> Tensor:
    """All layers and the head on one token and its drafts, of every request."""
    positions = torch.arange(1 + num_draft, device=device).repeat(num_requests)
    with sequences.step(positions, [1 + num_draft] * num_requests):
        state = layers(target.embed(torch.zeros_like(positions)), positions)
    return target.head.logits(target.final_norm(state))
