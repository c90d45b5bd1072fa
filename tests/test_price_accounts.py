"""Price accounts against a dictionary of sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_spec_plugins.price_accounts import PriceAccounts

CPU = torch.device("cpu")
IDS = st.lists(st.integers(0, 200).map(str), unique=True, max_size=90)


@given(st.lists(st.tuples(IDS, st.integers(0, 9), st.sampled_from(["add", "forget", "ask"]))))
def test_they_add_up(steps: list[tuple[list[str], int, str]]) -> None:
    accounts, sums = PriceAccounts(CPU), dict[str, tuple[int, int]]()
    for ids, amount, what in steps:
        if what == "forget":
            accounts.forget(ids)
            for name in ids:
                sums.pop(name, None)
            continue
        if what == "add":
            price = torch.arange(len(ids)) + amount
            accounts.add(ids, price, torch.full_like(price, amount))
        for place, name in enumerate(ids):
            paid, count = sums.get(name, (0, 0))
            more = (place + amount, amount) if what == "add" else (0, 0)
            sums[name] = (paid + more[0], count + more[1])
        paid, count = accounts.of(ids)
        assert paid.tolist() == [sums[name][0] for name in ids]
        assert count.tolist() == [sums[name][1] for name in ids]
        assert len(accounts) == len(sums)


def test_a_place_is_not_inherited() -> None:
    accounts = PriceAccounts(CPU)
    accounts.add(["a"], torch.tensor([0.5]), torch.tensor([3]))
    accounts.forget(["a", "nobody"])
    assert [x.tolist() for x in accounts.of(["b"])] == [[0], [0]]
    assert [x.tolist() for x in accounts.of(["a"])] == [[0], [0]]


def test_small_prices_keep_their_digits() -> None:
    accounts = PriceAccounts(CPU)
    for _ in range(1000):
        accounts.add(["a"], torch.tensor([1e-6]), torch.tensor([1]))
    paid, count = accounts.of(["a"])
    assert paid.item() == pytest.approx(1e-3, rel=1e-6)
    assert count.item() == 1000
