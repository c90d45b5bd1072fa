"""Dynamic tokens of a draft vocabulary: those a request used last that are not ranked.

Shapes: T rows of a draft step; R requests of a round; H hidden size; D dynamic tokens;
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from .compiled_arithmetic import compiled

if TYPE_CHECKING:
    from torch import Tensor

    from .target_model import LanguageModelHead


@dataclass(frozen=True, slots=True)
class _Rows:
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


class DynamicTokens:
    """The D tokens each request used last that are not in its list, and their rows of the head.

    Requests have places. A token keeps its column of its request's place as long as it stays, so
    weights move only for tokens that come. Which column that is follows from the text alone,
    whatever parts it came in.

    Args:
        head: Whose rows are copied. Every tensor-parallel rank must do that together.
        member: `[lists, V]` bool, which tokens each list has.
        size: D.
        device: Of the rows.
        max_num_requests: Most requests alive at once.
    """

    def __init__(
        self,
        head: LanguageModelHead,
        member: NDArray[np.bool_],
        size: int,
        device: torch.device,
        max_num_requests: int,
    ) -> None:
        self.size = size
        self._head = head
        self._device = device
        self._member = member
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
            #: `[places, D, H]`, `[places, D]`, and `[places, D]` the tokens again.
            self._weight = torch.zeros(*shape, weight.shape[1], dtype=weight.dtype, device=device)
            self._bias = (
                None if bias is None else torch.zeros(shape, dtype=bias.dtype, device=device)
            )
            self._ids = torch.full(shape, -1, dtype=torch.int64, device=device)
        #: `[R]` places of the round's requests, and their rows of the head once gathered.
        self._round = np.zeros(0, np.int64)
        self._gathered: _Rows | None = None
        # Compiles what the first request would otherwise wait for.
        self.begin([], self._round, np.zeros((0, 0), np.int32), self._round, self._round)

    def begin(
        self,
        request_ids: Sequence[str],
        chosen: NDArray[np.int64],
        token_history: NDArray[np.int32],
        rows: NDArray[np.int64],
        num_tokens: NDArray[np.int64],
    ) -> None:
        """Read what requests have written since their last round.

        Args:
            request_ids: `[R]`.
            chosen: `[R]` the list of each.
            token_history: `[rows, max_model_len]`, see `DraftInput`.
            rows: `[R]`.
            num_tokens: `[R]`.
        """
        places = np.fromiter(map(self._place, request_ids), np.int64, len(request_ids))
        if not np.array_equal(places, self._round):
            self._round, self._gathered = places, None
        changed = np.zeros((len(places), self.size), np.bool_)
        _read(
            token_history, rows, self._num_read[places], num_tokens, self._member, chosen, places,
            self._token_ids, self._last_used, changed,
        )  # fmt: skip
        self._num_read[places] = num_tokens
        if changed.any():
            self._fetch(places, changed)
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

    def last(self, request_ids: Sequence[str]) -> Tensor:
        """`[R, D]` int64 tokens of each request's last round, -1 where there are fewer."""
        places = [self._places.get(request_id) for request_id in request_ids]
        known = np.array([place is not None for place in places], dtype=np.bool_)
        where = np.array([place or 0 for place in places], dtype=np.int64)
        ids = self._ids[torch.from_numpy(where).to(self._device)]
        return ids.masked_fill(torch.from_numpy(~known).to(self._device).unsqueeze(1), -1)

    def finish(self, request_ids: Sequence[str]) -> None:
        """Forget requests; what is not known is no error."""
        gone = [self._places.pop(r) for r in request_ids if r in self._places]
        if gone:
            self._free += gone
            self._num_read[gone] = 0
            self._token_ids[gone] = -1
            self._last_used[gone] = -1
            self._ids[torch.tensor(gone, device=self._device)] = -1
            self._gathered = None

    def _gather(self, places: NDArray[np.int64] | Tensor) -> _Rows:
        where: Tensor | slice
        if isinstance(places, torch.Tensor):
            where = places
        elif len(places) and (np.diff(places) == 1).all():  # as they lie: nothing to copy
            where = slice(int(places[0]), int(places[0]) + len(places))
        else:
            where = torch.from_numpy(places).to(self._device)
        token_ids = self._ids[where]
        bias = None if self._bias is None else self._bias[where]
        return _Rows(self._weight[where], bias, token_ids, token_ids < 0)

    def _place(self, request_id: str) -> int:
        place = self._places.get(request_id)
        if place is None:
            place = self._places[request_id] = self._free.pop()
        return place

    def _fetch(self, places: NDArray[np.int64], changed: NDArray[np.bool_]) -> None:
        """Copy the head's rows for the tokens that have come to these `[R, D]` columns."""
        request, column = np.nonzero(changed)
        place = places[request]
        token_ids = torch.from_numpy(self._token_ids[place, column]).to(self._device)
        where = torch.from_numpy(place * self.size + column).to(self._device)
        weight, bias = self._head.rows(token_ids)
        self._weight.view(-1, self._weight.shape[2])[where] = weight
        self._ids.view(-1)[where] = token_ids
        if self._bias is not None and bias is not None:
            self._bias.view(-1)[where] = bias


@compiled
def _read(
    token_history, rows, first, num_tokens, member, chosen, places, token_ids, last_used, changed
):
    """Note the tokens of some texts, one by one: a new one replaces the one used longest ago.

    Args:
        token_history: `[rows, max_model_len]` int32.
        rows: `[R]`.
        first: `[R]` position of the first token to read.
        num_tokens: `[R]` position after the last one.
        member: `[lists, V]` bool: tokens that are passed over, for each list.
        chosen: `[R]` list of each request.
        places: `[R]`, rows of the next two.
        token_ids: `[places, D]`, written.
        last_used: `[places, D]`, written.
        changed: `[R, D]` bool, set where another token has come.
    """
    for i in range(len(rows)):
        own, used = token_ids[places[i]], last_used[places[i]]
        for position in range(first[i], num_tokens[i]):
            token = token_history[rows[i], position]
            # What stands for embeddings or images may be outside.
            if token < 0 or token >= member.shape[1] or member[chosen[i], token]:
                continue
            column = 0
            for other in range(len(own)):
                if own[other] == token:
                    column = other
                    break
                if used[other] < used[column]:
                    column = other
            used[column] = position
            if own[column] != token:
                own[column] = token
                changed[i, column] = True
