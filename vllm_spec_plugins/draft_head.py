"""The output head over a draft vocabulary: only the rows a draft may choose from.

The rows of the ranked tokens are copied once. With dynamic tokens each request also has rows of
its own: the tokens it used last that are not ranked. What a request is drafted from is decided
by its text alone, on the host, so it is the same in any batch and on every tensor-parallel rank.

Shapes: T rows of a draft step; R requests of a round; H hidden size; D dynamic tokens;
M = ranked tokens + D; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from .draft_vocabulary import DraftVocabularyOptions, RankedVocabulary

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
        self._choice = _ListChoice(lists, head.vocab_size) if len(lists) > 1 else None
        self._dynamic = (
            _DynamicTokens(head, lists, options.dynamic_tokens, device, max_num_requests)
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

    def finish(self, request_ids: Sequence[str]) -> None:
        """Forget requests; what is not known is no error."""
        if self._choice is not None:
            self._choice.finish(request_ids)
        if self._dynamic is not None:
            self._dynamic.finish(request_ids)


class _ListChoice:
    """Which list each request is drafted for from: the one that has most of its prompt's tokens."""

    def __init__(self, lists: Sequence[NDArray[np.int64]], vocab_size: int) -> None:
        self._member = _membership(lists, vocab_size)
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

    def finish(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._chosen.pop(request_id, None)


@dataclass(frozen=True, slots=True)
class _DynamicRows:
    """Rows of the head for the dynamic tokens of T draft rows.

    Attributes:
        weight: `[T, D, H]`.
        bias: `[T, D]` or None.
        token_ids: `[T, D]` int64, -1 where a request has fewer.
        unused: `[T, D]` bool, where the token id is -1.
    """

    weight: Tensor
    bias: Tensor | None
    token_ids: Tensor
    unused: Tensor


class _DynamicTokens:
    """The D tokens each request used last that are not in its list, and their rows of the head.

    Requests have places. A token keeps its column of its request's place as long as it stays,
    so weights move only for tokens that come; what is handed out is sorted by token id, which
    makes it a function of the text alone, however the text arrived.
    """

    def __init__(
        self,
        head: LanguageModelHead,
        lists: Sequence[NDArray[np.int64]],
        size: int,
        device: torch.device,
        max_num_requests: int,
    ) -> None:
        self.size = size
        self._head = head
        self._device = device
        self._member = _membership(lists, head.vocab_size)
        self._places: dict[str, int] = {}
        self._free = list(range(max_num_requests))[::-1]
        shape = (max_num_requests, size)
        #: By place: tokens read so far; `[places, D]` tokens (-1: none) and where each was last.
        self._num_read = np.zeros(max_num_requests, np.int64)
        self._token_ids = np.full(shape, -1, np.int64)
        self._last_used = np.full(shape, -1, np.int64)
        # Any row: it shows the type, and whether there is a bias.
        weight, bias = head.rows(torch.zeros(1, dtype=torch.int64, device=device))
        # Written to later, whether or not that is in inference mode as this may be.
        with torch.inference_mode(False):
            rows = max_num_requests * size
            self._weight = torch.zeros(rows, weight.shape[1], dtype=weight.dtype, device=device)
            self._bias = (
                None if bias is None else torch.zeros(rows, dtype=bias.dtype, device=device)
            )
            #: `[places, D]` what is handed out: tokens sorted, -1s last; and which rows are theirs.
            self._sorted_ids = torch.full(shape, -1, dtype=torch.int64, device=device)
            self._sorted_rows = torch.zeros(shape, dtype=torch.int64, device=device)
        #: `[R]` places of the round's requests, and their rows of the head once gathered.
        self._round = np.zeros(0, np.int64)
        self._gathered: _DynamicRows | None = None

    def begin(
        self,
        request_ids: Sequence[str],
        chosen: NDArray[np.int64],
        token_history: NDArray[np.int32],
        rows: NDArray[np.int64],
        num_tokens: NDArray[np.int64],
    ) -> None:
        places = np.fromiter(map(self._place, request_ids), np.int64, len(request_ids))
        if not np.array_equal(places, self._round):
            self._round, self._gathered = places, None

        # What is new, all requests end to end.
        first = self._num_read[places]
        lengths = np.maximum(num_tokens - first, 0)
        request = np.repeat(np.arange(len(rows)), lengths)
        within = np.arange(len(request)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        positions = first[request] + within
        token_ids = token_history[rows[request], positions].astype(np.int64)
        self._num_read[places] = num_tokens

        outside = _known(token_ids, self._member.shape[1])
        outside[outside] = ~self._member[chosen[request[outside]], token_ids[outside]]
        if not outside.any():
            return
        request, positions, token_ids = request[outside], positions[outside], token_ids[outside]
        changed, starts = np.unique(request, return_index=True)
        ends = np.append(starts[1:], len(request))
        columns: list[NDArray[np.int64]] = []
        for number, start, end in zip(changed, starts, ends, strict=True):
            place = int(places[number])
            new = self._use(place, token_ids[start:end], positions[start:end])
            columns.append(place * self.size + new)
        self._fetch(np.concatenate(columns))
        self._publish(places[changed])
        self._gathered = None

    def logits(self, hidden: Tensor, requests: Tensor | NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """`[T, D]` float32 logits and token ids; -inf and -1 where a request has fewer."""
        count = len(self._round)
        if isinstance(requests, np.ndarray) and np.array_equal(requests, np.arange(count)):
            rows = self._gathered = self._gathered or self._gather(self._round)
        elif isinstance(requests, np.ndarray):
            rows = self._gather(self._round[requests])
        else:
            rows = self._gather(torch.from_numpy(self._round).to(self._device)[requests])
        logits = self._head.row_logits(hidden, rows.weight, rows.bias)
        return logits.masked_fill(rows.unused, -torch.inf), rows.token_ids

    def _gather(self, places: NDArray[np.int64] | Tensor) -> _DynamicRows:
        if isinstance(places, np.ndarray):
            places = torch.from_numpy(places).to(self._device)
        rows, token_ids = self._sorted_rows[places], self._sorted_ids[places]
        bias = None if self._bias is None else self._bias[rows]
        return _DynamicRows(self._weight[rows], bias, token_ids, token_ids < 0)

    def finish(self, request_ids: Sequence[str]) -> None:
        gone = [self._places.pop(r) for r in request_ids if r in self._places]
        if gone:
            self._free += gone
            self._num_read[gone] = 0
            self._token_ids[gone] = -1
            self._last_used[gone] = -1
            self._sorted_ids[torch.tensor(gone, device=self._device)] = -1
            self._gathered = None

    def _place(self, request_id: str) -> int:
        place = self._places.get(request_id)
        if place is None:
            place = self._places[request_id] = self._free.pop()
        return place

    def _use(
        self, place: int, token_ids: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Note that a request used these tokens; returns the columns that have become others'.

        The set kept is that of the D last used of all its text, whatever parts it came in.
        """
        current, last_used = self._token_ids[place], self._last_used[place]
        # Latest first, so that `unique` finds each token's last use.
        distinct, latest = np.unique(token_ids[::-1], return_index=True)
        latest = positions[::-1][latest]
        where = np.searchsorted(distinct, current)
        known = (where < len(distinct)) & (
            distinct[np.minimum(where, len(distinct) - 1)] == current
        )
        last_used[known] = latest[where[known]]

        coming = ~np.isin(distinct, current)
        distinct, latest = distinct[coming], latest[coming]
        order = np.argsort(-latest)[: self.size]
        distinct, latest = distinct[order], latest[order]
        # The i-th latest newcomer takes the i-th least recently used column, if it is later.
        columns = np.argsort(last_used, kind="stable")[: len(distinct)]
        taken = latest > last_used[columns]
        columns = columns[taken]
        current[columns], last_used[columns] = distinct[taken], latest[taken]
        return columns

    def _fetch(self, rows: NDArray[np.int64]) -> None:
        """Copy the head's rows for the tokens that have come to these columns of places."""
        if not len(rows):
            return
        token_ids = torch.from_numpy(self._token_ids.reshape(-1)[rows]).to(self._device)
        where = torch.from_numpy(rows).to(self._device)
        weight, bias = self._head.rows(token_ids)
        self._weight[where] = weight
        if self._bias is not None and bias is not None:
            self._bias[where] = bias

    def _publish(self, places: NDArray[np.int64]) -> None:
        """Sort the tokens of some places by id for the device."""
        token_ids = self._token_ids[places]
        order = np.argsort(np.where(token_ids < 0, self._head.vocab_size, token_ids), axis=1)
        where = torch.from_numpy(places).to(self._device)
        rows = places[:, None] * self.size + order
        self._sorted_rows[where] = torch.from_numpy(rows).to(self._device)
        self._sorted_ids[where] = torch.from_numpy(np.take_along_axis(token_ids, order, axis=1)).to(
            self._device
        )


def _membership(lists: Sequence[NDArray[np.int64]], vocab_size: int) -> NDArray[np.bool_]:
    """`[lists, V]` which tokens each list has."""
    member = np.zeros((len(lists), vocab_size), np.bool_)
    for row, token_ids in zip(member, lists, strict=True):
        row[token_ids] = True
    return member


def _known(token_ids: NDArray[np.integer], vocab_size: int) -> NDArray[np.bool_]:
    """Which of them the head has: what stands for embeddings or images may be outside."""
    return (token_ids >= 0) & (token_ids < vocab_size)
