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
from vllm_spec_plugins.row_choice import replace_rows
from vllm_spec_plugins.verifier import VerifierOptions, VerifyInput
from vllm_spec_plugins.vocabulary_passes import marks_above


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

    @classmethod
    def verifies_on_device(cls, options: VerifierOptions) -> bool:
        del options
        return True

    def relaxed_acceptance(self, batch: VerifyInput) -> Tensor:
        # Above epsilon a token stands whatever the entropy.
        bar = self._bar(batch.target_entropy_up_to(self.options.epsilon))
        p = batch.draft_token_probability
        return (p > bar).to(p.dtype)

    def relaxed_acceptance_over_vocabulary(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        entropy = batch.target_entropy_up_to(self.options.epsilon)[rows]
        unknown = (
            batch.draft_token_probability[rows] > self.options.epsilon
        )  # not after a rejection
        entropy = replace_rows(entropy, unknown, lambda which: batch.target_entropy[rows[which]])
        # p > bar, in logits.
        bar = self._bar(entropy).log() + batch.target_log_normaliser_at(rows)
        return marks_above(batch.target_logits, rows, bar)

    def _bar(self, entropy: Tensor) -> Tensor:
        """Probability above which a token stands."""
        return (self.options.delta * (-entropy).exp()).clamp(max=self.options.epsilon)
