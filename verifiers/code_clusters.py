"""Clusters: which of a few codes that look alike is relaxed; which few it is stays exact.

The image codes are divided into clusters c of near-identical ones; every other id is a cluster
of its own. With p the target's law at a position, q the draft's, and over each cluster

    up = [p - q]+   dn = [q - p]+   U(c) = sum of up   D(c) = sum of dn

the exact rule accepts x with a(x) = min(1, p/q), which leaves q (1 - a) = dn. Here

    f(x) = a(x) + (1 - a(x)) min(1, U(c)/D(c))      c the cluster of x
    r(x) = up(x) [U(c) - D(c)]+ / U(c)              after a rejection, unnormalised

Clusters are exact. Accepted inside c is sum of min(p, q) + D min(1, U/D), and since P(c) =
sum of min(p, q) + U(c) and Q(c) = sum of min(p, q) + D(c), that is min(P(c), Q(c)): the exact rule
for the law of clusters. What is rejected, sum over c of [D - U]+, is as much as r has,
sum over c of [U - D]+, so norm(r) adds [P(c) - Q(c)]+ to each cluster: P(c) in all.

The price is the distance. The law of the token is min(p, q) + dn min(1, U/D) + r: above p by
dn min(1, U/D) where q > p, below it by up min(U, D)/U elsewhere. Its total variation to p is the
extra acceptance, sum over c of min(U(c), D(c)), all of it between codes of one cluster, and none
where a cluster is one token. No rule that keeps the law of clusters accepts more, and none with
that acceptance is nearer to p.

This holds for each token given the text before it. The target reads codes, not clusters: where
it continues two codes of a cluster differently, the law of whole images moves.

Tokens of probability 0 (excluded by the sampling options, say) are never accepted and count
neither in D nor in Q. After a choice (q one-hot) f(x) is P(c) and r is p outside c.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_spec_plugins.residual import or_target_law
from vllm_spec_plugins.verifier import VerifyInput
from vllm_spec_plugins.vocabulary_passes import is_compiled, kernels

from .law_entries import draft_entries, draft_laws, target_entries


@dataclass(frozen=True, slots=True)
class CodeClusters:
    """A division of the image codes.

    Attributes:
        first: Token id of code 0.
        of_code: `[C]` int64 cluster of each code.
        members: `[clusters, size]` int64 codes of each cluster; -1: none.
    """

    first: int
    of_code: Tensor
    members: Tensor

    @classmethod
    def gather(cls, neighbours: Tensor, size: int, first: int) -> CodeClusters:
        """Clusters of up to `size` codes that are near each other, from a table of neighbours.

        Codes that are among the nearest of most others come first; each that is left takes the
        nearest of its neighbours that are left. Deterministic.

        Args:
            neighbours: `[C, k]` int, codes by rising distance, C: none; on the CPU.
            size: Most codes of a cluster, at least 2.
            first: Token id of code 0.
        """
        count = len(neighbours)
        near = neighbours.long()
        wanted = torch.bincount(near[:, : size - 1].flatten(), minlength=count + 1)[:count]
        of_code = torch.full((count + 1,), -1)
        of_code[count] = count  # "none" is never left
        members = []
        for code in wanted.argsort(descending=True, stable=True).tolist():
            if of_code[code] >= 0:
                continue
            left = near[code][of_code[near[code]] < 0][: size - 1]
            chosen = torch.cat([left.new_tensor([code]), left])
            of_code[chosen] = len(members)
            members.append(chosen)
        table = torch.nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=-1)
        return cls(first, of_code[:count], table)

    def to(self, device: torch.device) -> CodeClusters:
        return CodeClusters(self.first, self.of_code.to(device), self.members.to(device))

    def acceptance(self, batch: VerifyInput, rows: Tensor, exact: Tensor) -> Tensor:
        """`[M]` f of draft tokens in the image range.

        Args:
            batch: The step.
            rows: `[M]` int64, some of the N rows.
            exact: `[M]` a, what the exact rule accepts them with.
        """
        codes = self.members[self._clusters_of(batch, rows)]  # [M, size]
        columns = codes.clamp(min=0) + self.first
        p, q = target_entries(batch, rows, columns), draft_entries(batch, rows, columns)
        gap = torch.where((codes >= 0) & (p > 0), p - q, 0)
        up, down = gap.clamp(min=0).sum(dim=1), gap.clamp(max=0).sum(dim=1).neg()
        share = torch.where(up < down, up / down, torch.ones_like(up))
        own = batch.draft_token_probability[rows]
        return torch.where(own > 0, exact + (1 - exact) * share, 0)

    def greedy_acceptance(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        """`[M]` bool, draft tokens in the image range in the cluster of the most likely token."""
        best = batch.greedy_token_ids[rows] - self.first
        known = (best >= 0) & (best < len(self.of_code))
        own = self._clusters_of(batch, rows)
        return known & (self.of_code[torch.where(known, best, 0)] == own)

    def _clusters_of(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        """`[M]` int64; any cluster where the draft token is no image code (`row_choice`)."""
        codes = batch.draft_token_ids[rows] - self.first
        return self.of_code[codes.clamp(0, len(self.of_code) - 1)]

    def residual(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        """`[M, V]` r at some of the N rows; p where that is nothing: a rejection by rounding."""
        p = torch.softmax(batch.target_logits.index_select(0, rows), dim=-1)
        if batch.draft_probabilities is None:
            weights = self._outside_clusters(p, batch.draft_token_ids[rows])
        else:
            weights = p - draft_laws(batch, rows)
            self._keep_shares(weights, p)
        return or_target_law(batch, rows, weights)

    def _outside_clusters(self, p: Tensor, token_ids: Tensor) -> Tensor:
        """`[M, V]` r after choices: p, overwritten, without the cluster of one token per row."""
        codes = token_ids - self.first
        inside = ((codes >= 0) & (codes < len(self.of_code))).unsqueeze(1)
        cluster = self.members[self.of_code[torch.where(inside.squeeze(1), codes, 0)]]
        own = token_ids.clamp(min=0).unsqueeze(1)
        columns = torch.where(inside & (cluster >= 0), cluster + self.first, own)  # [M, size]
        # A token that is excluded, or none, stands for no cluster.
        counts = (p.gather(1, own) > 0) & (token_ids >= 0).unsqueeze(1)
        return p.scatter_(1, columns, torch.where(counts, 0, p.gather(1, columns)))

    def _keep_shares(self, weights: Tensor, p: Tensor) -> None:
        """Make r of p - q, `[M, V]`, in place."""
        if is_compiled(weights):
            kernels().keep_share_of_clusters(
                weights.numpy(), p.numpy(), self.first, self.of_code.numpy(), len(self.members)
            )
            return
        here = slice(self.first, self.first + len(self.of_code))
        gap = torch.where(p[:, here] > 0, weights[:, here], 0)  # [M, C]
        weights.clamp_(min=0)
        up, left = self._sums(weights[:, here]), self._sums(gap).clamp_(min=0)
        kept = torch.where(up > 0, left / up, 0)  # [M, clusters]
        weights[:, here] *= kept[:, self.of_code]

    def _sums(self, values: Tensor) -> Tensor:
        """`[M, clusters]` sums over each cluster of `[M, C]` values."""
        used = (self.members >= 0).flatten()
        inside = values.index_select(1, self.members.clamp(min=0).flatten()) * used
        return inside.unflatten(1, self.members.shape).sum(dim=2)
