"""The loaded target under model runner V2, whose rows are request slots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .target import Target

if TYPE_CHECKING:
    from .host_history import HostHistory


class V2Target(Target):
    """`Target`, with the places where runner V2 keeps things.

    Args:
        module: The target, weights loaded.
        runner: The model runner that serves it.
        num_speculative_tokens: Most positions drafted past the verified ones.
        history: Knows how long each request is; None = only the device does.
    """

    def __init__(
        self,
        module: nn.Module,
        runner: Any,
        num_speculative_tokens: int,
        history: HostHistory | None,
    ) -> None:
        super().__init__(module, runner, num_speculative_tokens)
        self._history = history

    @property
    def _input_dtype(self) -> torch.dtype:
        return self._runner.input_buffers.input_ids.dtype

    def _longest(self, rows: NDArray[np.int64]) -> int:
        if self._history is None:
            return self._runner.model_config.max_model_len
        return int(self._history.num_tokens[rows].max())

    def _tables(self) -> list[tuple[Any, int, Tensor]]:
        tables = self._runner.block_tables
        return [
            (group, tables.block_sizes[index], tables.block_tables[index].gpu)
            for index, groups in enumerate(self._runner.attn_groups)
            for group in groups
        ]
