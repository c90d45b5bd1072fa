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

from pydantic import Field
from torch import Tensor

from vllm_spec_plugins.greedy_on_host import decide
from vllm_spec_plugins.relaxed_rule import RelaxedOptions, RelaxedRule
from vllm_spec_plugins.row_choice import replace_rows
from vllm_spec_plugins.verifier import VerifierOptions, VerifyInput


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

    @classmethod
    def verifies_on_device(cls, options: VerifierOptions) -> bool:
        del options
        return True

    def relaxed_acceptance(self, batch: VerifyInput) -> Tensor:
        p = batch.draft_token_probability
        return (p >= math.exp(self.options.min_log_probability)).to(p.dtype)

    def relaxed_acceptance_over_vocabulary(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        logits = batch.target_logits.index_select(0, rows)
        bar = batch.target_log_normaliser_at(rows) + self.options.min_log_probability
        return logits.ge_(bar.unsqueeze(1))  # in place: 0 or 1, and a copy anyway

    def relaxed_greedy_acceptance(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        logits, least = batch.target_logits, self.options.min_log_probability
        if batch.span_maxima is not None:
            return decide(batch, rows, "likely_enough", least)
        own = logits[rows, batch.draft_token_ids[rows]]
        # The best token alone is a lower bound of the normaliser.
        stands = own >= logits[rows, batch.greedy_token_ids[rows]] + least
        return replace_rows(
            stands,
            stands,
            lambda which: own[which] >= batch.target_log_normaliser_at(rows[which]) + least,
        )
