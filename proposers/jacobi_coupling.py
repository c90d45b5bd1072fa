"""Draw tokens from new laws so that they often equal the tokens drawn from older ones.

Each of n places has an old token x, drawn from its old law q and not looked at since, and a new
law p. Every coupling returns a token whose law is exactly p; they differ in how often it is x:

    none      never on purpose: a fresh draw
    maximal   1 - TV(p, q), the most there can be: x is kept with probability min(1, p(x)/q(x)),
              else the token is drawn from norm([p - q]+)
    gumbel    at least (1 - TV) / (1 + TV): both tokens are the first to arrive in one race,
              argmax_y p(y) / e_y with exponential e_y that belong to the place. Needs to
              remember neither x nor q

Maximal coupling leaves p as it is by the argument of speculative sampling, with p in the
target's place. Source: So et al. 2510.24211 (MC-SJD).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.draw_next import sample_weights


@dataclass(frozen=True, slots=True)
class Past:
    """What stood at n places before.

    Attributes:
        known: `[n]` bool, whether anything did; elsewhere the rest is ignored.
        token_ids: `[n]` int64.
        law: `[n, M]`, what each token was drawn from; one-hot where it was a choice.
    """

    known: Tensor
    token_ids: Tensor
    law: DraftProbabilities


def law_of(logits: Tensor, width: int) -> DraftProbabilities:
    """The law to draft from: softmax, or of the `width` most likely tokens, made to sum to 1.

    Args:
        logits: `[n, V]` float32.
        width: Most columns.

    Returns:
        `[n, M]`, M the smaller of `width` and V. Ids of a row ascend.
    """
    if width >= logits.shape[1]:
        return DraftProbabilities(torch.softmax(logits, dim=1))
    top, ids = logits.topk(width, dim=1, sorted=False)
    ids, order = ids.sort(dim=1)
    return DraftProbabilities(torch.softmax(top.gather(1, order), dim=1), ids)


def token_ids_of(law: DraftProbabilities, columns: Tensor) -> Tensor:
    """`[n]` int64 ids of `[n]` columns."""
    if law.vocabulary is None:
        return columns
    return law.vocabulary.gather(1, columns.unsqueeze(1)).squeeze(1)


def keep_probability(law: DraftProbabilities, past: Past) -> Tensor:
    """`[n]` min(1, p(x)/q(x)) of maximal coupling; 0 where nothing is known of the past."""
    p, q = law.of(past.token_ids), past.law.of(past.token_ids)
    ratio = torch.where(p < q, p / q, torch.ones_like(p))
    return torch.where(past.known, ratio, torch.zeros_like(ratio))


def weights_of_others(law: DraftProbabilities, past: Past) -> Tensor:
    """`[n, M]` law, not normalised, of the token that is drawn where the old one is not kept.

    [p - q]+ where an old token was given up, p where there was none.
    """
    left = (law.values - old_probabilities(law, past)).clamp_(min=0)
    # Equal up to rounding, nothing is left; giving the token up was then itself rounding.
    whole = ~past.known | (left.sum(dim=1) <= 0)
    return torch.where(whole.unsqueeze(1), law.values, left)


def old_probabilities(law: DraftProbabilities, past: Past) -> Tensor:
    """`[n, M]` the old law at the tokens of the new law's columns."""
    old = past.law
    if old.vocabulary is None:
        values = old.values
        ids = torch.arange(values.shape[1], device=values.device).expand_as(values)
    else:
        assert law.vocabulary is not None
        ids = law.vocabulary
        column = torch.searchsorted(old.vocabulary, ids).clamp_(max=ids.shape[1] - 1)
        there = old.vocabulary.gather(1, column) == ids
        values = old.values.gather(1, column) * there
    if old.sampled is not None:
        one_hot = (ids == past.token_ids.unsqueeze(1)).to(values.dtype)
        values = torch.where(old.sampled.unsqueeze(1), values, one_hot)
    return values


def draw_maximal(law: DraftProbabilities, past: Past, keep: Tensor, others: Tensor) -> Tensor:
    """`[n]` int64 tokens by maximal coupling.

    Args:
        law: `[n, M]` new.
        past: Of the same n places.
        keep: `[n]` float64 uniforms that decide whether the old token stays.
        others: `[n]` float64 uniforms of the tokens drawn instead.
    """
    kept = keep < keep_probability(law, past)
    drawn = token_ids_of(law, sample_weights(weights_of_others(law, past), others))
    return torch.where(kept, past.token_ids, drawn)


def draw_fresh(law: DraftProbabilities, u: Tensor) -> Tensor:
    """`[n]` int64 tokens from `[n]` float64 uniforms."""
    return token_ids_of(law, sample_weights(law.values, u))


def draw_race(law: DraftProbabilities, noise: Tensor) -> Tensor:
    """`[n]` int64 tokens from `[n, M]` float64 uniforms, of each place and token id (Gumbel-max).

    -log u is exponential, and a token arrives at that over its probability.
    """
    return token_ids_of(law, (law.values / -noise.log()).argmax(dim=1))
