"""What a forward pass of the target takes, by its number of tokens. Timed before serving."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_spec_plugins.stopwatch import fastest

#: Passes of more tokens are taken to continue the line.
LARGEST_PASS = 512


@torch.inference_mode()
def pass_times(runner: Any, most: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Time passes of 1, 2, 4 ... tokens through all layers, attention aside, and the head.

    Args:
        runner: vLLM's, its model warmed up.
        most: Tokens of the largest step without prompts.

    Returns:
        `[P]` numbers of tokens, two or more, rising; `[P]` seconds.
    """
    largest = min(most, LARGEST_PASS, runner.scheduler_config.max_num_batched_tokens)
    sizes = [1, 2]
    while sizes[-1] * 2 <= largest:
        sizes.append(sizes[-1] * 2)
    seconds = fastest([partial(_run, runner, size) for size in sizes])
    return np.array(sizes, dtype=np.int64), seconds


def _run(runner: Any, num_tokens: int) -> None:
    hidden, _ = runner._dummy_run(num_tokens, skip_eplb=True)
    runner.model.compute_logits(hidden[:num_tokens])
