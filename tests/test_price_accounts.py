"""The two keepers of price accounts say the same of any steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_spec_plugins.price_accounts import (
    PriceAccounts,
    PricesOnDevice,
    PricesOnHost,
    price_accounts,
)
from vllm_spec_plugins.verifier import Verification, VerifyInput

CPU = torch.device("cpu")
KEEPERS = pytest.mark.parametrize("make", [PricesOnHost, lambda: PricesOnDevice(CPU)])
#: Of each request of a step: draft tokens, how many stand, whether the rest is placeholders.
STEPS = st.dictionaries(
    st.integers(0, 200).map(str),
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()),
    max_size=90,
)
PRICE = 0.25


def step_of(requests: dict[str, tuple[int, int, bool]]) -> tuple[VerifyInput, Verification]:
    """Every draft token that was looked at has the same price."""
    lengths = [length for length, _, _ in requests.values()]
    accepted = [min(length, stand) for length, stand, _ in requests.values()]
    ids, extra = [], []
    for (length, _, placeholders), stand in zip(requests.values(), accepted, strict=True):
        ids += [0] * stand + [-1 if placeholders else 0] * (length - stand)
        examined = stand + (stand < length and not placeholders)
        extra += [PRICE] * examined + [0.0] * (length - examined)
    count = len(lengths)
    batch = VerifyInput(
        list(requests),
        torch.zeros(len(ids), 2),
        torch.zeros(count, 2),
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(lengths, dtype=torch.int64),
        None,
        torch.ones(count),
        torch.zeros(count, dtype=torch.int64),
        torch.zeros(count, dtype=torch.int64),
        max_num_draft=max(lengths, default=0),
        all_greedy=False,
        any_greedy=False,
    )
    tokens = torch.zeros(count, batch.max_num_draft + 1, dtype=torch.int64)
    stands = torch.tensor(accepted, dtype=torch.int64)
    return batch, Verification(tokens, stands, torch.tensor(extra))


def at_limit(accounts: PriceAccounts, batch: VerifyInput, limit: float) -> list[bool]:
    found = accounts.at_limit(batch, limit)
    return [False] * len(batch.request_ids) if found is None else found.tolist()


@settings(deadline=None)
@given(st.lists(st.tuples(STEPS, st.booleans())))
def test_both_keep_the_same_accounts(
    steps: list[tuple[dict[str, tuple[int, int, bool]], bool]],
) -> None:
    """Of steps, after each of which its requests may be over."""
    on_host, on_device = PricesOnHost(), PricesOnDevice(CPU)
    for requests, over in steps:
        batch, verification = step_of(requests)
        for limit in (0.0, PRICE, PRICE * 1.01):
            assert at_limit(on_host, batch, limit) == at_limit(on_device, batch, limit)
        for accounts in (on_host, on_device):
            accounts.pay(batch, verification)
            if over:
                accounts.forget(batch.request_ids)
        assert len(on_host) == len(on_device)


@KEEPERS
def test_the_mean_of_what_was_looked_at_counts(make: Callable[[], PriceAccounts]) -> None:
    accounts = make()
    requests = {
        "all": (3, 3, False),
        "one": (3, 0, False),
        "none": (3, 0, True),
        "short": (0, 0, False),
    }
    batch, verification = step_of(requests)
    assert at_limit(accounts, batch, PRICE) == [False] * 4
    assert at_limit(accounts, batch, 0.0) == [True] * 4
    accounts.pay(batch, verification)
    assert at_limit(accounts, batch, PRICE) == [True, True, False, False]
    assert at_limit(accounts, batch, PRICE * 1.01) == [False] * 4


@KEEPERS
def test_nobody_inherits(make: Callable[[], PriceAccounts]) -> None:
    accounts = make()
    accounts.pay(*step_of({"a": (1, 1, False)}))
    accounts.forget(["a", "nobody"])
    assert len(accounts) == 0
    for name in ("a", "b"):
        assert at_limit(accounts, step_of({name: (1, 1, False)})[0], PRICE) == [False]


def test_steps_on_the_host_are_kept_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(price_accounts(CPU), PricesOnHost)
    monkeypatch.setattr("vllm_spec_plugins.row_choice.use_triton", lambda _tensor: True)
    assert isinstance(price_accounts(CPU), PricesOnDevice)
