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

import torch
from pydantic import Field
from torch import Tensor

from vllm_spec_plugins.context import EngineContext
from vllm_spec_plugins.hookspecs import logger
from vllm_spec_plugins.relaxed_rule import RelaxedOptions, RelaxedRule
from vllm_spec_plugins.verifier import Guarantee, VerifyInput, token_acceptance
from vllm_spec_plugins.vocabulary_passes import row_blocks, row_products


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

    def relaxed_acceptance(self, batch: VerifyInput) -> Tensor:
        accept = token_acceptance(batch)
        if batch.draft_probabilities is None:
            self._tell(batch)
            return accept
        undecided = (accept < 1) & batch.allowed
        undecided &= binary_divergence(batch) <= self.options.max_divergence
        if batch.draft_probabilities.sampled is not None:
            undecided &= batch.draft_probabilities.sampled
        rows = undecided.nonzero().squeeze(1)
        near = rows[divergence(batch, rows) <= self.options.max_divergence]
        return accept.index_fill(0, near, 1.0)

    def _tell(self, batch: VerifyInput) -> None:
        if not self._told and not batch.all_greedy and len(batch.draft_token_ids):
            self._told = True
            logger.warning(
                "kl_judge: this proposer chooses its tokens and draws none, so there is no law "
                "to compare: its drafts are verified exactly."
            )


def binary_divergence(batch: VerifyInput) -> Tensor:
    """`[N]` KL between "it is x" under p and under q: at most KL(p || q), and costs nothing."""
    p = batch.draft_token_probability.double()
    q = batch.draft_law_of_token.double()
    return torch.special.xlogy(p, p / q) + torch.special.xlogy(1 - p, (1 - p) / (1 - q))


def divergence(batch: VerifyInput, rows: Tensor) -> Tensor:
    """`[M]` KL(p || q) at some of the N rows; infinite where q misses a token p has.

    Args:
        batch: With draft probabilities.
        rows: `[M]` int64, rows whose token was drawn.
    """
    assert batch.draft_probabilities is not None
    width = batch.target_logits.shape[1]
    result = batch.target_logits.new_empty(len(rows))
    for block in row_blocks(len(rows), batch.target_logits):
        chosen = rows[block]
        logits = batch.target_logits.index_select(0, chosen)
        ids = batch.draft_token_ids[chosen]
        q = batch.draft_probabilities.dense(chosen, ids, width).to(logits.dtype)
        p = torch.softmax(logits, dim=-1)
        # sum p log p - sum p log q, with log p = l - log Z.
        result[block] = row_products(p, logits.sub_(q.log()))
    result -= batch.target_log_normaliser_at(rows)
    # 0 times infinity, in rows where p or q is 0 somewhere.
    rest = rows[result.isnan()]
    if len(rest):
        p = torch.softmax(batch.target_logits.index_select(0, rest), dim=-1)
        ids = batch.draft_token_ids[rest]
        q = batch.draft_probabilities.dense(rest, ids, width).to(p.dtype)
        sums = torch.special.xlogy(p, p).sum(dim=-1) - torch.special.xlogy(p, q).sum(dim=-1)
        result[result.isnan()] = sums
    return result
