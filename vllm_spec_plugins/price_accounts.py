"""What requests have paid for relaxed acceptance, kept where they are verified."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from .transfers import to_device

#: Requests there is room for at first.
_ROOM = 64


class PriceAccounts:
    """Of each request its price so far, and how many draft tokens were looked at.

    The sums stay on the device: the step after the next one can be planned before the host knows
    them.

    Args:
        device: Of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._place: dict[str, int] = {}
        self._free: list[int] = []
        #: `[room, 2]` float64: price, draft tokens.
        self._sums = torch.zeros(0, 2, dtype=torch.float64, device=device)
        #: Those asked about last, and where they are.
        self._last: tuple[list[str], Tensor] | None = None

    def __len__(self) -> int:
        """Requests that are remembered."""
        return len(self._place)

    def of(self, request_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`[R]` float64 price in total, `[R]` float64 draft tokens; 0 for who is not known."""
        places = self._places(request_ids)
        paid, count = self._sums[places].unbind(dim=1)
        return paid, count

    def add(self, request_ids: Sequence[str], price: Tensor, examined: Tensor) -> None:
        """Of one step.

        Args:
            request_ids: `[R]`, each once.
            price: `[R]` in total variation.
            examined: `[R]` draft tokens looked at.
        """
        places = self._places(request_ids)
        self._sums.index_add_(0, places, torch.stack([price.double(), examined.double()], dim=1))

    def forget(self, request_ids: Iterable[str]) -> None:
        """Their places are free."""
        for request_id in request_ids:
            place = self._place.pop(request_id, None)
            if place is not None:
                self._free.append(place)
                self._last = None

    def _places(self, request_ids: Sequence[str]) -> Tensor:
        """`[R]` int64 rows of the sums; who is new has one, of zeros, from now on."""
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
