"""Proposers that draft a whole block at once: a law for each position, none knowing the others.

Subclass `ParallelProposer` and say what the laws are; drawing from them, searching a path through
them, ending drafts and the bookkeeping of q are here.

**Why the text keeps the target's law.** Drawn tokens: given the text, the tokens of a draft are
independent, so the law of each, given those before it in the draft, is the law it was drawn from;
that is q. Verification stops at the first rejection (rows behind it were conditioned on a token
that is not in the text; DEER's printed loop goes on). A draft is cut after a token for what the
tokens up to it are, or for what was known before any was drawn, never at a token for what it is
itself: then what is sent still has its law. Chosen tokens (greedy requests, paths) may be cut for
any reason.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field

from vllm_spec_plugins.device_drafting import DeviceDraft
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.errors import ConfigError
from vllm_spec_plugins.length_control import Signals
from vllm_spec_plugins.proposer import Draft, DraftInput, Proposer, ProposerOptions
from vllm_spec_plugins.transfers import to_device

from .block_draws import BlockDraws, draft_lengths, end_on_device, stop_at_confidences
from .path_search import PathSearch, PathSearchOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from vllm_spec_plugins.context import EngineContext, ModelFacts
    from vllm_spec_plugins.device_drafting import DeviceDraftInput


class ParallelOptions(ProposerOptions):
    drafts: Literal["sampled", "path"] = Field(
        "sampled",
        description="sampled: draw each token from its law, for requests with a temperature; "
        "greedy ones take the most likely. path: the path that fits the text best, for all.",
    )
    path: PathSearchOptions | None = Field(
        None,
        description="With drafts path, how it is searched. Default: "
        '{"mass": 0.8, "max_candidates": 15, "beam": 3, "draft_weight": 0.5, '
        '"length_normalised": true}.',
    )
    draft_top_k: int | None = Field(
        None,
        ge=1,
        description="Draw from so many of the most likely tokens: bounds the memory for their "
        "laws, 12 bytes each per draft token. Default: from all, 4 bytes each.",
    )


@dataclass(frozen=True, slots=True)
class Block:
    """What n requests might draft, B tokens each.

    Attributes:
        token_ids: `[n, B]` int64.
        logits: `[n, B, V]` float32, of the law of each token.
        law: `[n, B, M]` what they were drawn from; None when all were chosen.
    """

    token_ids: Tensor
    logits: Tensor
    law: DraftProbabilities | None

    @classmethod
    def at_once(cls, logits: Tensor, draws: BlockDraws) -> Block:
        """Each token from its law, `[n, B, V]`, as it is."""
        columns = torch.arange(logits.shape[1], device=logits.device).unsqueeze(0)
        token_ids, law = draws(logits, columns)
        return cls(token_ids, logits, law)


class ParallelProposer(Proposer):
    """Drafts from one law for each position."""

    Options = ParallelOptions
    signals = Signals.CONFIDENCES

    def __init__(self, options: ParallelOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        facts = context.facts
        # A config may name a token that the model has no logits for.
        ends = [token for token in facts.end_token_ids if token < facts.vocab_size]
        self._ends = np.array(ends, dtype=np.int64)
        self._ends_on_device = torch.tensor(ends, dtype=torch.int64, device=context.device)
        self._top_k = options.draft_top_k
        self._path_search: PathSearch | None = None
        if options.drafts == "path":
            self._path_search = PathSearch(
                options.path or PathSearchOptions.model_validate({}),
                context.max_num_requests,
                ends,
            )

    @classmethod
    def check(cls, options: ProposerOptions, facts: ModelFacts) -> None:
        del facts
        assert isinstance(options, ParallelOptions)
        if options.path is not None and options.drafts != "path":
            raise ConfigError(
                '"path" says how a path is searched, and nothing is searched with "drafts": '
                f'"{options.drafts}". Remove it, or set "drafts" to "path".'
            )
        if options.draft_top_k is not None and options.drafts != "sampled":
            raise ConfigError(
                '"draft_top_k" bounds the laws tokens are drawn from, and nothing is drawn with '
                f'"drafts": "{options.drafts}". Remove it, or set "drafts" to "sampled".'
            )

    @abstractmethod
    def logits(self, batch: DraftInput, requests: NDArray[np.int64]) -> Tensor:
        """The laws of the tokens to be drafted, before temperature.

        They may depend on the request's own text and drafts only, not on who else drafts.

        Args:
            batch: The step.
            requests: `[n]` which of its requests draft.

        Returns:
            `[n, B, V]` float32, B at least the most any of them may draft; -inf = cannot be
            drafted.
        """

    def block(self, batch: DraftInput, requests: NDArray[np.int64], draws: BlockDraws) -> Block:
        """Tokens and laws. Proposers that look more than once override this.

        Args:
            batch: The step.
            requests: `[n]` which of its requests draft.
            draws: How tokens are drawn.
        """
        width = int(batch.max_draft[requests].max())
        return Block.at_once(self.logits(batch, requests)[:, :width], draws)

    def block_on_device(self, batch: DeviceDraftInput, draws: BlockDraws) -> Block:
        """The same of all requests of a step, without looking at a tensor's values.

        For proposers whose `drafts_on_device` says so. What requests that may not draft are given
        is not looked at.
        """
        raise NotImplementedError(f"{type(self).__name__} does not draft on the device.")

    @torch.inference_mode()
    def propose(self, batch: DraftInput) -> Draft:
        requests = np.flatnonzero(batch.max_draft)
        most = batch.max_draft[requests]
        width = int(most.max())
        draws = BlockDraws.of(
            batch,
            requests,
            self.context.device,
            top_k=self._top_k,
            chooses=self._path_search is not None,
        )
        block = self.block(batch, requests, draws)
        token_ids = block.token_ids[:, :width].cpu().numpy()
        if self._path_search is not None:
            paths = self._path_search.choose(batch, requests, block.logits[:, :width])
            token_ids = paths.astype(np.int64)
        lengths = draft_lengths(token_ids, most, self._ends)
        if Signals.CONFIDENCES in batch.length_control.needs:
            confidences = _confidences(block, torch.from_numpy(token_ids), width)
            lengths = stop_at_confidences(batch, requests, lengths, confidences)
        table = np.full((len(batch.request_ids), width), -1, dtype=np.int64)
        table[requests] = np.where(np.arange(width) < lengths[:, None], token_ids, -1)
        return Draft(table, _of_all_requests(block.law, requests, len(table), width))

    @torch.inference_mode()
    def propose_on_device(self, batch: DeviceDraftInput) -> DeviceDraft:
        """The same drafts, for requests that take the most likely tokens or draw them."""
        block = self.block_on_device(batch, BlockDraws.on_device(batch, top_k=self._top_k))
        width = batch.num_speculative_tokens
        token_ids = end_on_device(block.token_ids[:, :width], batch.max_draft, self._ends_on_device)
        law = None if block.law is None else _first_positions(block.law, width)
        return DeviceDraft(token_ids, law)

    def finish(self, request_ids: Sequence[str]) -> None:
        if self._path_search is not None:
            self._path_search.finish(request_ids)


def _confidences(block: Block, token_ids: Tensor, width: int) -> NDArray[np.float32]:
    """`[n, width]` probability of each token under the law it was drawn or chosen from."""
    logits, ids = block.logits[:, :width], token_ids.to(block.logits.device).long()
    own = logits.gather(-1, ids.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    chosen = (own - logits.logsumexp(dim=-1)).exp()
    if block.law is not None:
        law = _first_positions(block.law, width)
        assert law.sampled is not None
        drawn = DraftProbabilities(law.values, law.vocabulary).of(ids)
        chosen = torch.where(law.sampled, drawn, chosen)
    return chosen.float().cpu().numpy()


def _first_positions(law: DraftProbabilities, width: int) -> DraftProbabilities:
    """`[n, width, M]` of `[n, B, M]`."""
    vocabulary, sampled = law.vocabulary, law.sampled
    return DraftProbabilities(
        law.values[:, :width],
        None if vocabulary is None else vocabulary[:, :width],
        None if sampled is None else sampled[:, :width],
    )


def _of_all_requests(
    law: DraftProbabilities | None, requests: NDArray[np.int64], count: int, width: int
) -> DraftProbabilities | None:
    """`[count, width, M]` of the laws of those requests that draft, `[n, B, M]`."""
    if law is None:
        return None
    law = _first_positions(law, width)
    if len(requests) == count:
        return law
    rows = to_device(requests, law.values.device)

    def spread(part: Tensor) -> Tensor:
        return part.new_zeros(count, *part.shape[1:]).index_copy(0, rows, part)

    vocabulary, sampled = law.vocabulary, law.sampled
    return DraftProbabilities(
        spread(law.values),
        None if vocabulary is None else spread(vocabulary),
        None if sampled is None else spread(sampled),
    )
