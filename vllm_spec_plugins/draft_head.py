"""The output head over a draft vocabulary: only the rows a draft may choose from.

The rows of the ranked tokens are copied once. With dynamic tokens each request also has rows of
its own: the tokens it used last that are not ranked. What a request is drafted from is decided
by its text alone, on the host, so it is the same in any batch and on every tensor-parallel rank.

Shapes: T rows of a draft step; R requests of a round; H hidden size; D dynamic tokens;
M = ranked tokens + D; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from .draft_vocabulary import DraftVocabularyOptions, RankedVocabulary
from .dynamic_tokens import DynamicTokens

if TYPE_CHECKING:
    from torch import Tensor

    from .draft_sampling import MostLikely
    from .target_model import LanguageModelHead


class DraftHead:
    """Logits over a ranked vocabulary, and over each request's dynamic tokens.

    Its life: `begin` once per drafting round, `read` (or `logits`) once per draft step, `finish`
    when requests go.
    """

    @torch.no_grad()
    def __init__(
        self,
        head: LanguageModelHead,
        options: DraftVocabularyOptions,
        device: torch.device,
        max_num_requests: int,
    ) -> None:
        """Copy the ranked rows; `max_num_requests` is the most requests alive at once.

        Every tensor-parallel rank must do this together.

        Raises:
            SpecPluginsError: The file cannot be read, or rows of the head cannot be copied.
        """
        self._head = head
        vocabulary = RankedVocabulary.read(options.file)
        lists = [vocabulary.token_ids(ranked, options.size) for ranked in vocabulary.lists]
        self._token_ids = [torch.from_numpy(token_ids).to(device) for token_ids in lists]
        self._rows = [head.rows(token_ids) for token_ids in self._token_ids]
        self._padded = torch.nn.utils.rnn.pad_sequence(
            self._token_ids, batch_first=True, padding_value=-1
        )
        member = _membership(lists, head.vocab_size)
        self._member = torch.from_numpy(member).to(device)
        self._choice = _ListChoice(member) if len(lists) > 1 else None
        self._dynamic = (
            DynamicTokens(
                head,
                member,
                options.dynamic_tokens,
                device,
                max_num_requests,
            )
            if options.dynamic_tokens
            else None
        )

    @property
    def width(self) -> int:
        """M, columns of the logits."""
        dynamic = self._dynamic.size if self._dynamic else 0
        return self._padded.shape[1] + dynamic

    @torch.no_grad()
    def begin(
        self,
        request_ids: Sequence[str],
        token_history: NDArray[np.int32],
        rows: NDArray[np.int64],
        num_tokens: NDArray[np.int64],
        num_prompt_tokens: NDArray[np.int64] | None = None,
    ) -> None:
        """Before the first draft step of a round: the requests, and what they have written.

        Every tensor-parallel rank must do this together.

        Args:
            request_ids: `[R]`.
            token_history: `[rows, max_model_len]`, see `DraftInput`.
            rows: `[R]`.
            num_tokens: `[R]`.
            num_prompt_tokens: `[R]` what a request's list is chosen by; None: all its tokens
                so far, which may choose otherwise when a preempted request returns.
        """
        if self._choice is not None:
            lengths = num_tokens if num_prompt_tokens is None else num_prompt_tokens
            self._choice.begin(request_ids, token_history, rows, lengths)
        if self._dynamic is not None:
            chosen = np.zeros(len(rows), np.int64) if self._choice is None else self._choice.round
            self._dynamic.begin(request_ids, chosen, token_history, rows, num_tokens)

    @torch.no_grad()
    def logits(self, hidden: Tensor, requests: Tensor | NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Logits of one draft step.

        Args:
            hidden: `[T, H]` what the head reads: after the final norm.
            requests: `[T]` int64, index into `begin`'s requests of each row. Best on the host:
                several lists wait for a device otherwise, and rows of dynamic tokens, gathered
                once a round where all requests draft in order, are gathered in every step.

        Returns:
            `[T, M]` float32 logits, and the token ids of their columns as
            `DraftProbabilities.vocabulary` takes them: `[M]` sorted with one list and no dynamic
            tokens, else `[T, M]`, where columns that stand for no token have id -1 and logit
            -inf.
        """
        if self._choice is None:
            logits = self._head.row_logits(hidden, *self._rows[0])
            vocabulary = self._padded[0]
        else:
            chosen = self._choice.round[np.asarray(torch.as_tensor(requests).cpu())]
            logits = self._logits_by_list(hidden, chosen)
            vocabulary = self._padded[torch.from_numpy(chosen).to(hidden.device)]
        if self._dynamic is None:
            return logits, vocabulary
        dynamic_logits, dynamic_ids = self._dynamic.logits(hidden, requests)
        if vocabulary.ndim == 1:
            vocabulary = vocabulary.expand(len(hidden), -1)
        return (
            torch.cat([logits, dynamic_logits], dim=1),
            torch.cat([vocabulary, dynamic_ids], dim=1),
        )

    @torch.no_grad()
    def read(
        self, hidden: Tensor, requests: Tensor | NDArray[np.int64], *, all_chosen: bool
    ) -> tuple[Tensor | MostLikely, Tensor]:
        """What one draft step needs of its logits.

        Args:
            hidden: See `logits`.
            requests: See `logits`.
            all_chosen: Whether every token is the most likely one: over one list, and on a GPU,
                the head is then read without writing logits.

        Returns:
            Logits, or of each row the most likely column; and token ids of columns, see `logits`.
        """
        if all_chosen and self._choice is None and self._dynamic is None:
            best = self._head.most_likely_row(hidden, *self._rows[0])
            if best is not None:
                return best, self._padded[0]
        return self.logits(hidden, requests)

    def _logits_by_list(self, hidden: Tensor, chosen: NDArray[np.int64]) -> Tensor:
        """`[T, M]` where row t is over list `chosen[t]`, -inf past its end."""
        logits = hidden.new_full(
            (len(hidden), self._padded.shape[1]), -torch.inf, dtype=torch.float32
        )
        for number in np.unique(chosen).tolist():
            members = torch.from_numpy(np.flatnonzero(chosen == number)).to(hidden.device)
            weight, bias = self._rows[number]
            part = self._head.row_logits(hidden[members], weight, bias)
            logits[members, : part.shape[1]] = part
        return logits

    def can_draft(self, request_ids: Sequence[str]) -> Tensor:
        """`[R, V]` bool: the tokens each request's last round was drafted from.

        Of a request that had none yet: the tokens of all lists.
        """
        allowed = self._member.any(dim=0).repeat(len(request_ids), 1)
        if self._choice is not None:
            for row, number in enumerate(self._choice.last(request_ids)):
                if number is not None:
                    allowed[row] = self._member[number]
        if self._dynamic is not None:
            ids = self._dynamic.last(request_ids)
            # Where there is none, a token that is in anyway.
            spare = allowed.int().argmax(dim=1, keepdim=True)
            allowed.scatter_(1, torch.where(ids >= 0, ids, spare), value=True)
        return allowed

    def finish(self, request_ids: Sequence[str]) -> None:
        """Forget requests; what is not known is no error."""
        if self._choice is not None:
            self._choice.finish(request_ids)
        if self._dynamic is not None:
            self._dynamic.finish(request_ids)


class _ListChoice:
    """Which list each request is drafted for from: the one that has most of its prompt's tokens."""

    def __init__(self, member: NDArray[np.bool_]) -> None:
        self._member = member
        self._chosen: dict[str, int] = {}
        #: `[R]` list of each of the round's requests.
        self.round = np.zeros(0, np.int64)

    def begin(
        self,
        request_ids: Sequence[str],
        token_history: NDArray[np.int32],
        rows: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> None:
        for i, request_id in enumerate(request_ids):
            if request_id not in self._chosen:
                distinct = np.unique(token_history[rows[i], : lengths[i]])
                distinct = distinct[_known(distinct, self._member.shape[1])]
                # Of equals the first in the file.
                self._chosen[request_id] = int(self._member[:, distinct].sum(axis=1).argmax())
        self.round = np.fromiter(
            (self._chosen[request_id] for request_id in request_ids), np.int64, len(request_ids)
        )

    def last(self, request_ids: Sequence[str]) -> list[int | None]:
        """`[R]` list of each request; None for one not seen yet."""
        return [self._chosen.get(request_id) for request_id in request_ids]

    def finish(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._chosen.pop(request_id, None)


def _membership(lists: Sequence[NDArray[np.int64]], vocab_size: int) -> NDArray[np.bool_]:
    """`[lists, V]` which tokens each list has."""
    member = np.zeros((len(lists), vocab_size), np.bool_)
    for row, token_ids in zip(member, lists, strict=True):
        row[token_ids] = True
    return member


def _known(token_ids: NDArray[np.integer], vocab_size: int) -> NDArray[np.bool_]:
    """Which of them the head has: what stands for embeddings or images may be outside."""
    return (token_ids >= 0) & (token_ids < vocab_size)
