"""Start training from the text's own bigram statistics instead of from noise.

The first hundred steps of a language model go into learning how frequent each token is and
what follows what. Counting gives that in seconds: embedding and head are set to a low-rank
factorisation of the smoothed log bigram table, so that the untrained model already predicts
log p(next | last token), and training begins with what counting cannot give.

The law is interpolated Kneser-Ney with discount d: with counts c, n(x) distinct followers of
x, and base law b(y), the share of distinct pairs that end in y,
    log p(y | x) = log b(y) + log(1 + (c(x, y) - d) / (d n(x) b(y))) + a constant of x,
whose middle term is zero where c(x, y) is. Its randomised SVD (Halko et al. 0909.4061),
weighted by token frequency, gives H - 2 columns. One more carries log b(y). The last makes all
embedding rows equally long, without which the norm before the head would undo their lengths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .model import Llama

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Kneser-Ney's d.
_DISCOUNT = 0.75

#: Errors of the factorisation weigh by (frequency of x * frequency of y) ** this.
_FREQUENCY_POWER = 0.3

#: Root mean square of an embedding row.
_EMBEDDING_SCALE = 0.3


@torch.no_grad()
def start_from_bigrams(model: Llama, tokens: NDArray[np.int64], generator: torch.Generator) -> None:
    """Set embedding and head of `model` so that it predicts as a bigram model of `tokens`.

    The layers must not yet contribute much: initialise them first. Holds tables of `[V, V]`
    while it runs, about 1 GiB at V = 8,192.

    Args:
        model: With untied head.
        tokens: `[N]` training text.
        generator: Of the random projections.
    """
    vocabulary, hidden = model.head.shape
    followers, contexts, base = _factors(tokens, vocabulary, hidden - 2, generator)
    # Rows x of `contexts` and y of `followers`: contexts @ followers.T is the middle term.
    lengths = contexts.norm(dim=1)
    longest = lengths.quantile(0.98)
    contexts *= (longest / lengths.clamp(min=1e-6)).clamp(max=1)[:, None]
    constant = 0.7 * longest
    total = (longest.square() + constant.square()).sqrt()
    slack = (total.square() - constant.square() - contexts.square().sum(1)).clamp(min=0).sqrt()
    embedding = torch.cat([constant.expand(vocabulary, 1), slack[:, None], contexts], dim=1)
    log_base = base.log()
    prior = (log_base - log_base.mean())[:, None] / constant
    head = torch.cat([prior, torch.zeros(vocabulary, 1), followers], dim=1)
    # The same rotation on both sides changes no logit and spreads every column over all units.
    rotation, _ = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator))
    model.embedding.copy_(embedding @ rotation * (_EMBEDDING_SCALE * hidden**0.5 / total))
    model.head.copy_(head @ rotation * (total / hidden**0.5))


def _factors(
    tokens: NDArray[np.int64], vocabulary: int, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """`[V, rank]` of the next token, `[V, rank]` of the last one, `[V]` the base law."""
    pairs = torch.from_numpy(tokens[:-1] * vocabulary + tokens[1:])
    counts = torch.bincount(pairs, minlength=vocabulary**2).view(vocabulary, vocabulary)
    seen = counts > 0
    base = seen.sum(0) + 1.0
    base /= base.sum()
    discounted = (_DISCOUNT * seen.sum(1)).clamp(min=1.0)
    rows = ((counts.sum(1) + 1.0) * vocabulary / len(tokens)) ** _FREQUENCY_POWER
    columns = ((counts.sum(0) + 1.0) * vocabulary / len(tokens)) ** _FREQUENCY_POWER
    table = counts.float().sub_(_DISCOUNT).clamp_(min=0)
    del counts, seen
    table.div_(discounted[:, None] * base).log1p_().mul_(rows[:, None]).mul_(columns)
    basis = torch.randn(vocabulary, rank + 16, generator=generator)
    basis, _ = torch.linalg.qr(table @ basis)
    basis, _ = torch.linalg.qr(table @ (table.T @ basis))
    left, values, right = torch.linalg.svd(basis.T @ table, full_matrices=False)
    roots = values[:rank].sqrt()
    contexts = (basis @ left)[:, :rank] * roots / rows[:, None]
    followers = right[:rank].T * roots / columns[:, None]
    return followers, contexts, base
