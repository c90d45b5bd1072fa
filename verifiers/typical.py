"""`typical`: Medusa's typical acceptance (Cai et al. 2401.10774).

A draft token x stands when the target finds it likely enough for how undecided it is:

    p(x) > min(epsilon, delta exp(-H(p)))

with H the entropy of p. The draft's law plays no part, so the rule accepts some tokens more
often than min(1, p/q) and others less. After a rejection the paper draws from p; this draws
from norm([p - q f]+), which is the nearest to the target's law that this acceptance allows.
Greedy requests use exact matching, as in the paper.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from vllm_spec_plugins.relaxed_rule import RelaxedOptions, RelaxedRule
from vllm_spec_plugins.verifier import VerifyInput


class TypicalOptions(RelaxedOptions):
    epsilon: float = Field(
        0.09, gt=0, le=1, description="A token at least this likely under the target stands."
    )
    delta: float = Field(
        0.3,
        gt=0,
        le=1,
        description="Less likely tokens stand above this times exp(-entropy) of the target's law.",
    )


class Typical(RelaxedRule):
    """Accepts what is typical of the target, whatever the draft's law."""

    Options = TypicalOptions
    options: TypicalOptions

    def relaxed_acceptance(self, batch: VerifyInput) -> Tensor:
        bar = self._bar(batch.target_entropy)
        p = batch.draft_token_probability
        return (p > bar).to(p.dtype)

    def relaxed_acceptance_over_vocabulary(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        logits = batch.target_logits.index_select(0, rows)
        # p > bar, in logits.
        bar = self._bar(batch.target_entropy[rows]).log() + batch.target_log_normaliser_at(rows)
        return logits.gt_(bar.unsqueeze(1))  # in place: 0 or 1, and a copy anyway

    def _bar(self, entropy: Tensor) -> Tensor:
        """Probability above which a token stands."""
        return (self.options.delta * (-entropy).exp()).clamp(max=self.options.epsilon)
