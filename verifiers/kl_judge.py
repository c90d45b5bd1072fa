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

    p(x) comes from the same pass, and is left in the batch. Only tokens with p(x) < q(x) are
    looked at, and of these none whose binary divergence alone is too large.

    Args:
        batch: With draft probabilities.
        max_divergence: In nats.
    """
    law = batch.draft_probabilities
    assert law is not None
    logits, ids = batch.target_logits, batch.draft_token_ids.clamp(min=0)
    q_of_token = batch.draft_law_of_token.to(logits.dtype)
    column, own = ids.unsqueeze(1), logits.gather(1, ids.unsqueeze(1)).squeeze(1)
    open_ = batch.allowed if law.sampled is None else batch.allowed & law.sampled
    probability, near = torch.empty_like(own), torch.zeros_like(open_)
    scratch, log_q = logits.new_empty(0), logits.new_empty(0)
    for block in row_blocks(len(logits), logits):
        p = torch.softmax(logits[block], dim=-1, out=scratch.resize_(0))
        p_of_token = p.gather(1, column[block]).squeeze(1)
        probability[block] = p_of_token
        here = (open_[block] & (p_of_token < q_of_token[block])).nonzero().squeeze(1)
        rows = here + block.start
        bound = _binary_divergence(p_of_token[here].double(), q_of_token[rows].double())
        few = bound <= max_divergence
        here, rows = here[few], rows[few]
        if not len(rows):
            continue
        mean = _mean_log_ratios(batch, p, here, rows, log_q)
        # sum p log p - sum p log q, with log p = l - log Z.
        divergence = mean - (own[rows] - p_of_token[here].log())
        # 0 times infinity, where p or q is 0 somewhere; or p(x) too small to tell log Z.
        unsure = (divergence.isnan() | (p_of_token[here] < 1e-30)).nonzero().squeeze(1)
        if len(unsure):
            q = _rows_of_draft_law(batch, rows[unsure]).to(p.dtype)
            divergence[unsure] = _divergence_of_laws(p[here[unsure]], q)
        near[rows] = divergence <= max_divergence
    probability = torch.where(batch.draft_token_ids >= 0, probability, 0)
    batch.__dict__.setdefault("draft_token_probability", probability)
    return near


def _mean_log_ratios(
    batch: VerifyInput, p: Tensor, here: Tensor, rows: Tensor, scratch: Tensor
) -> Tensor:
    """`[M]` mean of l - log q over p, row by row: none is copied where q is over all of V.

    Args:
        batch: With draft probabilities.
        p: `[B, V]` the target's law in a block of rows.
        here: `[M]` int64, some of the block's rows.
        rows: `[M]` int64, the same among the N.
        scratch: Empty, of the type of p; reused.
    """
    law = batch.draft_probabilities
    assert law is not None
    whole = law.vocabulary is None and law.values.shape[1] == p.shape[1]
    whole &= law.values.dtype == p.dtype
    means = []
    for i, row in zip(here.tolist(), rows.tolist(), strict=True):
        at = slice(row, row + 1)
        q = law.values[at] if whole else _rows_of_draft_law(batch, rows[rows == row]).to(p.dtype)
        log_q = torch.log(q, out=scratch.resize_(0))
        one = p[i : i + 1]
        means.append(row_products(one, batch.target_logits[at]) - row_products(one, log_q))
    return torch.cat(means)


def _rows_of_draft_law(batch: VerifyInput, rows: Tensor) -> Tensor:
    """`[M, V]` q at some of the N rows."""
    assert batch.draft_probabilities is not None
    width = batch.target_logits.shape[1]
    return batch.draft_probabilities.dense(rows, batch.draft_token_ids[rows], width)


def _binary_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL between "it is x" under p and under q: at most that of the laws."""
    return torch.special.xlogy(p, p / q) + torch.special.xlogy(1 - p, (1 - p) / (1 - q))


def _divergence_of_laws(p: Tensor, q: Tensor) -> Tensor:
    """`[M]` KL(p || q) of each row of `[M, V]`; infinite where q misses a token p has."""
    return torch.special.xlogy(p, p).sum(dim=-1) - torch.special.xlogy(p, q).sum(dim=-1)
