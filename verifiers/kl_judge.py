"""`kl_judge`: a judge without training. Where the draft's law is near the target's, trust it.

A draft token stands when the exact rule accepts it, or when, at its position,

    KL(p || q) <= max_divergence.

A threshold on this divergence was found to judge as well as trained heads (2601.04766). The
rule looks at laws, not at tokens, which bounds its price: where it trusts, the text follows q,
and by Pinsker's inequality TV(p, q) <= sqrt(max_divergence / 2).

It needs the law the draft was drawn from. A draft that was chosen (n-grams, greedy drafts)
has a law that is infinitely far from p unless p is certain: nothing is relaxed there, and
the log says so once. A draft law over part of the vocabulary, or cut by top-p, gives some of
the target's tokens no probability: again infinitely far, unless p gives them none either.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from vllm_spec_plugins.acceptance_rule import token_acceptance
from vllm_spec_plugins.context import EngineContext
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.hookspecs import logger
from vllm_spec_plugins.relaxed_rule import RelaxedOptions, RelaxedRule
from vllm_spec_plugins.row_choice import replace_rows
from vllm_spec_plugins.verifier import Guarantee, VerifierOptions, VerifyInput
from vllm_spec_plugins.vocabulary_passes import divergence_of_rows, is_compiled, near_laws


class KLJudgeOptions(RelaxedOptions):
    max_divergence: float = Field(
        0.1,
        gt=0,
        allow_inf_nan=False,
        description="Largest KL(p || q), in nats, at which the draft is trusted. The price per "
        "draft token is at most sqrt(max_divergence / 2).",
    )


class KLJudge(RelaxedRule):
    """Trusts the draft where its law is near the target's."""

    Options = KLJudgeOptions
    guarantee = Guarantee.BOUNDED
    options: KLJudgeOptions

    def __init__(self, options: KLJudgeOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        self._told = False

    @classmethod
    def verifies_on_device(cls, options: VerifierOptions) -> bool:
        del options
        return True

    @classmethod
    def total_variation_bound(cls, options: VerifierOptions) -> float:
        """Pinsker's."""
        assert isinstance(options, KLJudgeOptions)
        return min(1.0, math.sqrt(options.max_divergence / 2))

    def relaxed_acceptance(self, batch: VerifyInput) -> Tensor:
        if batch.draft_probabilities is None:
            self._tell(batch)
            return token_acceptance(batch)
        near = near_draft_tokens(batch, self.options.max_divergence)
        return token_acceptance(batch).masked_fill_(near, 1.0)

    def _tell(self, batch: VerifyInput) -> None:
        if not self._told and not batch.all_greedy and len(batch.draft_token_ids):
            self._told = True
            logger.warning(
                "kl_judge: this proposer chooses its tokens and draws none, so there is no law "
                "to compare: its drafts are verified exactly."
            )


def near_draft_tokens(batch: VerifyInput, max_divergence: float) -> Tensor:
    """`[N]` bool, draft tokens the exact rule may reject where KL(p || q) <= `max_divergence`.

    Only tokens with p(x) < q(x) are looked at, and of these none whose binary divergence alone
    is too large: the whole laws are compared where that may matter.

    Args:
        batch: With draft probabilities.
        max_divergence: In nats.
    """
    law = batch.draft_probabilities
    assert law is not None
    p, q, logits = batch.draft_token_probability, batch.draft_law_of_token, batch.target_logits
    if is_compiled(logits) and is_compiled(law.values) and covers(law, logits):
        return near_laws(logits, law.values, batch.draft_token_ids, p, q, max_divergence)
    p, q = p.double(), q.double()
    undecided = (p < q) & batch.allowed
    if law.sampled is not None:
        undecided &= law.sampled
    # KL between "it is x" under p and under q: at most that of the laws.
    binary = torch.special.xlogy(p, p / q) + torch.special.xlogy(1 - p, (1 - p) / (1 - q))
    return replace_rows(
        torch.zeros_like(undecided),
        undecided & (binary <= max_divergence),
        lambda rows: divergence(batch, rows) <= max_divergence,
    )


def covers(law: DraftProbabilities, logits: Tensor) -> bool:
    """Whether the draft's law is a table like the target's."""
    return law.vocabulary is None and law.values.shape == logits.shape


def divergence(batch: VerifyInput, rows: Tensor) -> Tensor:
    """`[M]` KL(p || q) at some of the N rows; infinite where q misses a token p has.

    Args:
        batch: With draft probabilities.
        rows: `[M]` int64, at least one; rows whose token was drawn.
    """
    law = batch.draft_probabilities
    assert law is not None
    logits, shift = batch.target_logits, batch.target_log_normaliser_at(rows)
    if covers(law, logits):
        return divergence_of_rows(logits, law.values, rows, shift)
    q = law.dense(rows, batch.draft_token_ids[rows], logits.shape[1])
    every = torch.arange(len(rows), device=rows.device)
    return divergence_of_rows(logits.index_select(0, rows), q, every, shift)
