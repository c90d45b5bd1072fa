"""Block verification (Sun et al. 2403.10444): the whole draft is judged at once.

With x_1..x_k the draft, p_i and q_i the target's and the draft's law of token i given those
before it, the capped joint ratio is

    P_0 = 1,    P_i = min(1, P_{i-1} p_i(x_i) / q_i(x_i)),

and prefix i is acceptable with probability

    h_i = S_i / (S_i + 1 - P_i),    S_i = sum_y [P_i p_{i+1}(y) - q_{i+1}(y)]+,    h_k = P_k.

The longest acceptable prefix stands. What follows it is a bonus token when it is the whole
draft, else a token from norm([P_i p_{i+1} - q_{i+1}]+). The law of the text is the target's,
and no rule that sees one draft accepts more tokens in expectation.

A placeholder ends the block. Greedy requests use exact matching. Indices below count from 0:
row j holds p_{j+1}, so what the formulas call i is "after row j = i - 1".
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from vllm_spec_plugins.acceptance_rule import greedy_matches
from vllm_spec_plugins.draw_next import draw_next
from vllm_spec_plugins.random_numbers import Purpose
from vllm_spec_plugins.residual import residual_weights, unclaimed
from vllm_spec_plugins.token_tables import assemble, leading_run
from vllm_spec_plugins.verifier import Verification, VerifyInput
from vllm_spec_plugins.vocabulary_passes import row_blocks

from ..triton_kernels.verify_fused import can_verify_fused, verify_fused  # noqa: TID252


def capped_ratio(batch: VerifyInput) -> Tensor:
    """`[N]` P after each row; 0 from the first placeholder on."""
    p, q = batch.draft_token_probability, batch.draft_law_of_token.to(batch.target_logits.dtype)
    # Placeholders have p = 0. A token the draft cannot draw (q = 0) leaves no cap to reach.
    ratio = torch.where(q > 0, p / q, torch.where(p > 0, torch.inf, 0.0))
    table = ratio.new_zeros(len(batch.num_draft), batch.max_num_draft)
    table[batch.request_of, batch.index_in_draft] = ratio
    running = ratio.new_ones(len(batch.num_draft))
    for column in table.unbind(dim=1):
        running = torch.where(running > 0, running * column, running).clamp_(max=1)
        column.copy_(running)
    return table[batch.request_of, batch.index_in_draft]


def block_acceptance(batch: VerifyInput, ratio: Tensor, rows: Tensor) -> Tensor:
    """`[M]` h at some of the N rows: the probability that the draft up to there is acceptable.

    Never more than P.

    Args:
        batch: The step.
        ratio: `[N]` from `capped_ratio`.
        rows: `[M]` int64.
    """
    ids, scale = batch.draft_token_ids, ratio[rows]
    after = (rows + 1).clamp(max=max(len(ids) - 1, 0))
    inner = (batch.index_in_draft[after] == batch.index_in_draft[rows] + 1) & (ids[after] >= 0)
    # Elsewhere h is P: at the last token, past a placeholder, and where nothing was capped away.
    inner &= (scale > 0) & (scale < 1)
    which = inner.nonzero().squeeze(1)
    after, scale = after[which], scale[which]
    if batch.draft_probabilities is None:
        left = scale * (1 - batch.draft_token_probability[after]).clamp(min=0)
    else:
        left = torch.empty_like(scale)
        for block in row_blocks(len(after), batch.target_logits):
            left[block] = unclaimed(batch, after[block], scale[block]).sum(dim=-1)
    return ratio[rows].index_copy(0, which, left / (left + (1 - scale)))


def longest_acceptable(batch: VerifyInput, ratio: Tensor, u: Tensor) -> Tensor:
    """`[R]` length of the longest prefix with u < h, from the last token backwards; 0 if greedy.

    h costs a pass over the vocabulary, and P bounds it: only rows with u < P are looked at,
    and in each request none before the one that stands.

    Args:
        batch: The step.
        ratio: `[N]` from `capped_ratio`.
        u: `[N]` uniforms.
    """
    accepted = torch.zeros_like(batch.num_draft)
    candidates = u < ratio
    if batch.any_greedy:
        candidates &= ~batch.greedy[batch.request_of]
    candidates = candidates.nonzero().squeeze(1)
    while len(candidates):
        requests = batch.request_of[candidates]
        # The last candidate of each request; candidates are in order.
        last = torch.ones_like(candidates, dtype=torch.bool)
        last[:-1] = requests[1:] != requests[:-1]
        rows = candidates[last]
        stands = u[rows] < block_acceptance(batch, ratio, rows)
        standing = rows[stands]
        accepted[batch.request_of[standing]] = batch.index_in_draft[standing] + 1
        candidates = candidates[~last & (accepted[requests] == 0)]
    return accepted


def block_residual(batch: VerifyInput, rows: Tensor, ratio: Tensor) -> Tensor:
    """`[M, V]` weights of the token drawn where the draft was cut, at some of the N rows."""
    before = torch.where(batch.index_in_draft[rows] > 0, ratio[rows - 1], 1)
    return residual_weights(batch, rows, scale=before)


def block_accepted_law(batch: VerifyInput) -> Tensor:
    """`[R, K+1]` probability that exactly that many draft tokens are accepted."""
    ratio = capped_ratio(batch)
    h = block_acceptance(batch, ratio, torch.arange(len(ratio), device=ratio.device))
    fails = h.new_ones(len(batch.num_draft), batch.max_num_draft + 1)
    fails[batch.request_of, batch.index_in_draft + 1] = 1 - h
    fails[:, 0] = 0  # the empty prefix is always acceptable
    later_fail = fails.flip(1).cumprod(dim=1).flip(1)
    later_fail = torch.cat([later_fail[:, 1:], torch.ones_like(fails[:, :1])], dim=1)
    law = (1 - fails) * later_fail
    if batch.any_greedy:
        count = leading_run(batch, greedy_matches(batch)).unsqueeze(1)
        exact = torch.zeros_like(law).scatter_(1, count, 1)
        law = torch.where(batch.greedy.unsqueeze(1), exact, law)
    return law


def verify_block(batch: VerifyInput) -> Verification:
    """Verify one step by the block rule, in a kernel on a GPU."""
    if can_verify_fused(batch):
        return verify_fused(batch, "block")
    return verify_block_reference(batch)


def verify_block_reference(batch: VerifyInput) -> Verification:
    """The same in PyTorch, on any device."""
    if batch.all_greedy:
        accepted = leading_run(batch, greedy_matches(batch))
        return assemble(batch, accepted, draw_next(batch, accepted, residual_weights))
    ratio = capped_ratio(batch)
    u = batch.uniforms(Purpose.ACCEPT)
    accepted = longest_acceptable(batch, ratio, u)
    if batch.any_greedy:
        accepted = torch.where(batch.greedy, leading_run(batch, greedy_matches(batch)), accepted)
    drawn = draw_next(batch, accepted, partial(block_residual, ratio=ratio))
    return assemble(batch, accepted, drawn)
