"""What requests have paid for relaxed acceptance, kept where they are verified.

Of each request: its price in total variation so far, and how many draft tokens were looked at.
Those are the ones that stand and the one that does not, if it is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .row_choice import may_look
from .token_tables import in_table
from .transfers import to_device
from .verifier import Verification, VerifyInput

#: Requests that `PricesOnDevice` has room for at first.
_ROOM = 64


class PriceAccounts(Protocol):
    """Of the requests of one verifier."""

    def __len__(self) -> int:
        """Requests that are remembered."""
        ...

    def at_limit(self, batch: VerifyInput, limit: float) -> Tensor | None:
        """`[R]` bool, those whose mean price is not below it; of 0 all, else none that just began.

        None where there are none, if that is known.
        """
        ...

    def pay(self, batch: VerifyInput, verification: Verification) -> None:
        """Add a step that was priced: with `extra_acceptance`."""
        ...

    def forget(self, request_ids: Iterable[str]) -> None:
        """They are over."""
        ...


def price_accounts(device: torch.device) -> PriceAccounts:
    """Those for steps on a device."""
    on_host = may_look(torch.empty(0, device=device))
    return PricesOnHost() if on_host else PricesOnDevice(device)


class PricesOnHost:
    """In lists: a few numbers of each request take less than a few calls on tensors."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def __len__(self) -> int:
        return len(self._sums)

    def at_limit(self, batch: VerifyInput, limit: float) -> Tensor | None:
        sums = [self._sums.get(request_id, (0.0, 0)) for request_id in batch.request_ids]
        reached = [paid >= limit * count and (count > 0 or limit == 0) for paid, count in sums]
        return torch.tensor(reached) if any(reached) else None

    def pay(self, batch: VerifyInput, verification: Verification) -> None:
        assert verification.extra_acceptance is not None
        ids, extra = batch.draft_token_ids.tolist(), verification.extra_acceptance.tolist()
        lengths, accepted = batch.num_draft.tolist(), verification.accepted.tolist()
        start = 0
        for request_id, length, stand in zip(batch.request_ids, lengths, accepted, strict=True):
            paid, examined = self._sums.get(request_id, (0.0, 0))
            refused = stand < length and ids[start + stand] >= 0
            paid += sum(extra[start : start + length])
            self._sums[request_id] = (paid, examined + stand + refused)
            start += length

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._sums.pop(request_id, None)


class PricesOnDevice:
    """In a table, so that the step after the next can be planned before the host knows them.

    Args:
        device: Of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._place: dict[str, int] = {}
        self._free: list[int] = []
        #: `[room, 2]` float64: price, draft tokens looked at.
        self._sums = torch.zeros(0, 2, dtype=torch.float64, device=device)
        #: Those asked about last, and where they are.
        self._last: tuple[list[str], Tensor] | None = None

    def __len__(self) -> int:
        return len(self._place)

    def at_limit(self, batch: VerifyInput, limit: float) -> Tensor:
        places = self._places(batch.request_ids)
        paid, count = self._sums[places].unbind(dim=1)
        reached = paid >= limit * count
        return reached & (count > 0) if limit > 0 else reached

    def pay(self, batch: VerifyInput, verification: Verification) -> None:
        assert verification.extra_acceptance is not None
        price = in_table(batch, verification.extra_acceptance).double().sum(dim=1)
        examined = verification.accepted
        if len(batch.draft_token_ids):
            after = (batch.first + examined).clamp(max=len(batch.draft_token_ids) - 1)
            refused = (examined < batch.num_draft) & (batch.draft_token_ids[after] >= 0)
            examined = examined + refused
        places = self._places(batch.request_ids)
        self._sums.index_add_(0, places, torch.stack([price, examined.double()], dim=1))

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            place = self._place.pop(request_id, None)
            if place is not None:
                self._free.append(place)
                self._last = None

    def _places(self, request_ids: Sequence[str]) -> Tensor:
        """`[R]` int64 rows of the table; who is new has one, of zeros, from now on."""
        asked = list(request_ids)
        if self._last is not None and self._last[0] == asked:
            return self._last[1]
        new = [request_id for request_id in asked if request_id not in self._place]
        if new:
            self._admit(new)
        numbers = [self._place[request_id] for request_id in asked]
        places = to_device(np.array(numbers, dtype=np.int64), self._device)
        self._last = asked, places
        return places

    def _admit(self, request_ids: Sequence[str]) -> None:
        if len(self._free) < len(request_ids):
            room = len(self._sums)
            more = self._sums.new_zeros(max(room, len(request_ids), _ROOM), 2)
            self._sums = torch.cat([self._sums, more])
            self._free += range(len(self._sums) - 1, room - 1, -1)
        places = [self._free.pop() for _ in request_ids]
        self._place.update(zip(request_ids, places, strict=True))
        self._sums.index_fill_(0, to_device(np.array(places, dtype=np.int64), self._device), 0)
