"""`threshold`: a draft token stands when the target finds it likely enough, absolutely.

    log p(x) >= min_log_probability

The rollback rule of Big Little Decoder (Kim et al. 2302.07863), which is greedy, and the
acceptance of relaxed multi-head decoders such as XSpecMesh (2507.23777). Under sampling the
draft's law plays no part: likely tokens are accepted more often than min(1, p/q), unlikely
ones never, and after a rejection the token comes from norm([p - q f]+). Greedy requests keep
their most likely token whatever its probability.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from vllm_spec_plugins.relaxed_rule import RelaxedOptions, RelaxedRule
from vllm_spec_plugins.verifier import VerifyInput


class ThresholdOptions(RelaxedOptions):
    min_log_probability: float = Field(
        -5.0,
        lt=0,
        allow_inf_nan=False,
        description="Least log-probability (nats) under the target of a token that stands. "
        "Big Little Decoder uses -5 to -2.",
    )


class Threshold(RelaxedRule):
    """Accepts what the target gives at least a fixed probability."""

    Options = ThresholdOptions
    options: ThresholdOptions

    @property
    def _least(self) -> float:
        return math.exp(self.options.min_log_probability)

    def relaxed_acceptance(self, batch: VerifyInput) -> Tensor:
        p = batch.draft_token_probability
        return (p >= self._least).to(p.dtype)

    def relaxed_acceptance_over_vocabulary(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        p = torch.softmax(batch.target_logits.index_select(0, rows), dim=-1)
        return (p >= self._least).to(p.dtype)

    def relaxed_greedy_acceptance(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        return batch.draft_token_probability[rows] >= self._least
