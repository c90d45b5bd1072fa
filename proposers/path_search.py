"""Causal-consistency path search: one draft from the laws of several positions.

A drafter that looks at all positions at once says what is likely at each of them, not what is
likely together. DiffuSpec (Li et al. 2510.02358) keeps the likely tokens of every position and
searches the path among them that the draft and an n-gram model like best:

    score(y) = sum_i  w log q_i(y_i) + (1 - w) log p(y_i | y_{i-2}, y_{i-1})

Refinement of blockwise-parallel drafts (Kim et al. 2404.09221) is the same with another weight.
Theirs are n-gram models fitted on text of the benchmark. Here p comes from the request's own text,
read as it is written (`trigram_weights`), with the draft's law standing in for what that text has
not shown: without repetition the path is the most likely token of each position.

A path is a choice, so it is verified as one, which is exact at every temperature. Anything that has
a law for each position can be given one: `PathSearch.choose` takes logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field

from vllm_spec_plugins.options import PluginOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from vllm_spec_plugins.proposer import DraftInput


class PathSearchOptions(PluginOptions):
    mass: float = Field(
        0.8, gt=0, le=1, description="candidates of a position: the likeliest that sum to this"
    )
    max_candidates: int = Field(15, ge=1, le=64, description="candidates of a position, at most")
    beam: int = Field(3, ge=1, le=64, description="paths kept while searching")
    draft_weight: float = Field(
        0.5, ge=0, le=1, description="share of the draft's own law in the score (lambda)"
    )
    length_normalised: bool = Field(
        True,
        description="compare a path that ends the text with longer ones by score per token; a "
        "plain sum favours ending",
    )


@dataclass(frozen=True, slots=True)
class Lattice:
    """Candidates of n drafts. On the host.

    Attributes:
        token_ids: `[n, K, C]` int32, likeliest first, then tokens that end the text; -1 = none.
        log_probabilities: `[n, K, C]` float32, each under the draft.
        lengths: `[n]` int64, positions up to and with the first at which a token that ends the
            text is among the likeliest.
    """

    token_ids: NDArray[np.int32]
    log_probabilities: NDArray[np.float32]
    lengths: NDArray[np.int64]


def lattice_of(
    logits: Tensor, end_token_ids: Tensor, mass: float = 0.8, max_candidates: int = 15
) -> Lattice:
    """The likeliest tokens of each position, and those that end the text always.

    Args:
        logits: `[n, K, V]` float; -inf = cannot be drafted.
        end_token_ids: `[E]` int64.
        mass: Candidates are the likeliest whose probabilities sum to it.
        max_candidates: But at most so many.
    """
    top, ids = logits.topk(min(max_candidates, logits.shape[-1]), dim=-1)
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    log_q = top - normaliser
    before = log_q.exp().cumsum(dim=-1) - log_q.exp()
    ids = torch.where((before < mass) & (log_q > -torch.inf), ids, -1)
    stops = ids.new_zeros(ids.shape[:2], dtype=torch.bool)
    if len(end_token_ids):
        among = (ids.unsqueeze(-1) == end_token_ids).any(dim=2)  # [n, K, E]
        stops = among.any(dim=-1)
        ends = logits.index_select(-1, end_token_ids) - normaliser
        possible = ~among & (ends > -torch.inf)
        ids = torch.cat([ids, torch.where(possible, end_token_ids, -1)], dim=-1)
        log_q = torch.cat([log_q, ends], dim=-1)
    stopped = stops.cpu().numpy()
    lengths = np.where(stopped.any(axis=1), stopped.argmax(axis=1) + 1, stopped.shape[1])
    return Lattice(
        ids.to(torch.int32).cpu().numpy(),
        log_q.float().cpu().numpy(),
        lengths.astype(np.int64),
    )


class PathSearch:
    """Chooses the drafts of requests, whose texts it reads.

    Args:
        options: Of the search.
        capacity: Requests to begin with.
        end_token_ids: Tokens that end a text: nothing is drafted behind one.
    """

    def __init__(
        self, options: PathSearchOptions, capacity: int, end_token_ids: Sequence[int] = ()
    ) -> None:
        # Here, not above: numba and the kernels take a second to import.
        from .path_beam import best_paths
        from .trigram_texts import TrigramTexts

        self.options = options
        self._best_paths = best_paths
        self._texts = TrigramTexts(capacity)
        self._end_token_ids = torch.tensor(list(end_token_ids), dtype=torch.int64)

    def choose(
        self, batch: DraftInput, requests: NDArray[np.int64], logits: Tensor
    ) -> NDArray[np.int32]:
        """The best path of some requests of a step.

        Args:
            batch: The step.
            requests: `[n]` which of its requests.
            logits: `[n, K, V]` what the draft says of each position, from the first to be
                drafted; K at least what any of them may draft.

        Returns:
            `[n, K]`, at most `max_draft` tokens of each and -1 behind them.
        """
        rows, num_tokens = batch.rows[requests], batch.num_tokens[requests]
        names = batch.keys.select(requests).request_ids
        slots = self._texts.read(names, batch.token_history, rows, num_tokens)
        lattice = lattice_of(
            logits,
            self._end_token_ids.to(logits.device),
            self.options.mass,
            self.options.max_candidates,
        )
        # A text of one token has none before it: the table's first column, then, says nothing.
        contexts = np.stack(
            [
                batch.token_history[rows, np.maximum(num_tokens - 2, 0)],
                batch.token_history[rows, num_tokens - 1],
            ],
            axis=1,
        )
        paths = np.empty(logits.shape[:2], dtype=np.int32)
        self._best_paths(
            slots,
            self._texts.memory.addresses,
            self._texts.memory.capacities,
            lattice.token_ids,
            lattice.log_probabilities,
            np.minimum(lattice.lengths, batch.max_draft[requests]),
            contexts.astype(np.int32),
            self._end_token_ids.to(torch.int32).numpy(),
            self.options.beam,
            np.float32(self.options.draft_weight),
            self.options.length_normalised,
            paths,
        )
        return paths

    def finish(self, request_ids: Sequence[str]) -> None:
        """Forget requests that are gone."""
        self._texts.finish(request_ids)
