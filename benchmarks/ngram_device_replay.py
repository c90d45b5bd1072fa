"""Trace replay and prior of `ngram_adaptive` with `matching: device`; see `ngram_traces.py`.

All texts of a trace are drafted for in one batch, each in a slot of its own. On a CPU the search
would take most of a day, and what it finds at a place of a text never changes: so it is done here
by compiled code, once for each place, and compared with `suffix_match` now and then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numba
import numpy as np
import torch
from ngram_prior import fitted, log_loss
from numpy.typing import NDArray
from torch import Tensor
from vllm_spec_plugins.proposers import ngram_device
from vllm_spec_plugins.triton_kernels.suffix_match import SuffixMatch, suffix_match

from vllm_spec_plugins.device_drafting import DeviceDraftInput

MAX_MATCH = 32
#: Columns of a draft that the prior is fitted on.
FITTED_COLUMNS = 8
#: Fitted positions of one trace, drawn at random where there are more.
FITTED_POSITIONS = 60_000
#: One search of so many is compared with `suffix_match`, in texts no longer than this.
COMPARED, COMPARED_TOKENS = 499, 30_000


@numba.njit
def same_before(tokens: Any, size: int) -> Any:
    """`[size]` where each token stood the time before; -1 = nowhere."""
    last, before = {np.int32(-1): -1}, np.empty(size, dtype=np.int32)
    for place in range(size):
        before[place] = last.get(tokens[place], -1)
        last[tokens[place]] = place
    return before


@numba.njit
def search(tokens: Any, before: Any, size: int, longest: int, found: Any) -> None:
    """Length, count, position, earlier position of `suffix_match`, by its definition."""
    length = count = 0
    position = earlier = -1
    place = before[size - 1]
    while place >= 0:
        matched = 1
        while (
            matched < longest
            and matched <= place
            and tokens[place - matched] == tokens[size - 1 - matched]
        ):
            matched += 1
        if matched > length:
            length, count, position, earlier = matched, 1, place + 1, -1
        elif matched == length:
            count += 1
            earlier = max(earlier, place + 1)
        place = before[place]
    found[0], found[1], found[2], found[3] = length, count, position, earlier


@numba.njit
def search_all(table: Any, before: Any, slots: Any, sizes: Any, starts: Any, memory: Any) -> None:
    """Fill `memory` at every place asked for that is not known yet."""
    for request in range(len(slots)):
        text = slots[request] % len(starts)
        place = starts[text] + sizes[request]
        if memory[place, 0] < 0:
            search(table[text], before[text], sizes[request], MAX_MATCH, memory[place])


class Trace:
    """The texts of a trace, and what was found in them.

    Args:
        items: Prompt and output of each text, int32.
    """

    def __init__(self, items: list[Any]) -> None:
        texts = [np.concatenate(item) for item in items]
        self.sizes = np.array([len(text) for text in texts])
        self.prompts = np.array([len(prompt) for prompt, _ in items])
        self.table = np.full((len(texts), self.sizes.max()), -2, dtype=np.int32)
        for row, text in zip(self.table, texts, strict=True):
            row[: len(text)] = text
        self._before = np.full_like(self.table, -1)
        for before, text in zip(self._before, texts, strict=True):
            before[: len(text)] = same_before(text, len(text))
        outputs = self.sizes - self.prompts + 1
        self._starts = np.cumsum(outputs) - outputs - self.prompts
        self._memory = np.full((outputs.sum(), 4), -1, dtype=np.int32)
        self._calls = 0

    def lookup(
        self,
        token_history: Tensor,
        num_tokens: Tensor,
        *,
        rows: Tensor,
        num_draft: int,
        **more: Any,
    ) -> SuffixMatch:
        """In the place of `suffix_match`."""
        slots, sizes = rows.numpy(), num_tokens.numpy()
        search_all(self.table, self._before, slots, sizes, self._starts, self._memory)
        places = self._starts[slots % len(self._starts)] + sizes
        found = torch.from_numpy(self._memory[places])  # [R, 4]
        length, count, position, earlier = found.unbind(1)
        steps = torch.arange(num_draft) % (num_tokens - position).clamp(min=1).unsqueeze(1)
        source = (position.unsqueeze(1) + steps).clamp(min=0)
        drafted = token_history[rows.unsqueeze(1), source]
        drafted = torch.where(length.unsqueeze(1) > 0, drafted, -1)
        match = SuffixMatch(length, count, position, earlier, drafted)
        if self._calls % COMPARED == 0 and sizes[0] <= COMPARED_TOKENS:
            one = suffix_match(
                token_history, num_tokens[:1], rows=rows[:1], num_draft=num_draft,
                **{**more, "max_num_tokens": int(sizes[0])},
            )  # fmt: skip
            assert all(torch.equal(a, b[:1]) for a, b in zip(one, match, strict=True))
        self._calls += 1
        return match

    @contextmanager
    def searched_here(self) -> Iterator[None]:
        """Where drafters search this trace with `lookup`."""
        with patch.object(ngram_device, "suffix_match", self.lookup):
            yield


def replay(trace: Trace, k: int, thresholds: Sequence[float]) -> NDArray[np.int64]:
    """`[T, 3]` steps, drafted and accepted tokens at each threshold.

    All thresholds in one batch, where threshold t has a slot t N + i for each text i of N.
    """
    num_texts, num_slots = len(trace.sizes), len(trace.sizes) * len(thresholds)
    drafter = ngram_device.NgramDevice(
        num_slots, k, min_match=1, max_match=MAX_MATCH, min_acceptance=0.0,
        device=torch.device("cpu"),
    )  # fmt: skip
    weights = torch.tensor(ngram_device.PRIOR)
    threshold = torch.tensor(thresholds).repeat_interleave(num_texts).unsqueeze(1)
    table = torch.from_numpy(trace.table).repeat(len(thresholds), 1)
    known = torch.from_numpy(trace.prompts + 1).repeat(len(thresholds))
    sizes = torch.from_numpy(trace.sizes).repeat(len(thresholds))
    total = torch.zeros(num_slots, 3, dtype=torch.int64)
    slots, columns = torch.arange(num_slots), torch.arange(k)
    fresh = slots >= 0
    with trace.searched_here():
        while len(slots := slots[known[slots] < sizes[slots]]):
            now = known[slots]
            most = (sizes[slots] - now - 1).clamp(max=k)
            prediction, features = drafter.look(
                DeviceDraftInput(
                    token_ids=table, slots=slots, fresh=fresh[slots], num_tokens=now,
                    num_prompt_tokens=now, max_draft=most, temperatures=torch.zeros(len(slots)),
                    streams=slots, num_speculative_tokens=k, rows=slots.numpy(),
                    is_fresh=fresh[slots].numpy(), most_tokens=now.numpy(),
                    temperatures_on_host=np.zeros(len(slots), dtype=np.float32),
                )
            )  # fmt: skip
            acceptance = torch.sigmoid(features @ weights)
            draft = ngram_device.cut(prediction, acceptance, threshold[slots], most)
            fresh[slots] = False
            place = (now.unsqueeze(1) + columns).clamp(max=table.shape[1] - 1)
            came = table[slots.unsqueeze(1), place]
            accepted = ((draft == came) & (draft >= 0)).cumprod(dim=1).sum(dim=1)
            drafted = (draft >= 0).sum(dim=1)
            total[slots] += torch.stack([torch.ones_like(now), drafted, accepted], dim=1)
            known[slots] = now + accepted + 1
    return total.view(len(thresholds), num_texts, 3).sum(dim=1).numpy()


def recent_shares(right: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Share of predicted tokens before each position, when the first is a fresh request's."""
    shares, recent = np.empty(len(right), dtype=np.float32), ngram_device.RECENT_AT_FIRST
    for position, is_right in enumerate(right.tolist()):
        shares[position] = recent
        recent += ngram_device.FORGETTING * (is_right - recent)
    return shares


#: Features and outcomes.
Positions = tuple[NDArray[np.float64], NDArray[np.float64]]


def positions_of(items: list[Any]) -> list[Positions]:
    """Of each text: drafts from its output positions, up to each draft's first wrong token."""
    trace, generator, found = Trace(items), np.random.default_rng(0), []
    share = min(1.0, FITTED_POSITIONS / (trace.sizes - trace.prompts).sum())
    table, columns = torch.from_numpy(trace.table), torch.arange(FITTED_COLUMNS)
    for slot, (begin, size) in enumerate(zip(trace.prompts + 1, trace.sizes, strict=True)):
        now = torch.arange(begin, size)

        def predict(now: Tensor, slot: int = slot) -> ngram_device.Prediction:
            return ngram_device.predict(
                table, torch.full_like(now, slot), now, min_match=1, max_match=MAX_MATCH,
                num_predicted=FITTED_COLUMNS,
            )  # fmt: skip

        with trace.searched_here():
            first = predict(now).token_ids[:, 0]
            recent = torch.from_numpy(recent_shares((first == table[slot, now]).numpy()))
            kept = torch.from_numpy(generator.random(len(now)) < share)
            now, recent = now[kept], recent[kept]
            prediction = predict(now)
        features = ngram_device.describe(prediction, recent)  # [N, C, 6]
        place = now.unsqueeze(1) + columns
        came = table[slot, place.clamp(max=size - 1)]
        right = (prediction.token_ids == came) & (place < size)
        before = torch.cat([torch.ones_like(right[:, :1]), right[:, :-1]], dim=1).cumprod(dim=1)
        used = (before > 0) & (place < size) & (prediction.token_ids >= 0)
        found.append((features[used].double().numpy(), right[used].double().numpy()))
    return found


def together(texts: list[Positions]) -> Positions:
    """Of all texts of a trace."""
    features, right = (np.concatenate(each) for each in zip(*texts, strict=True))
    return features, right


def fit_prior(traces: dict[str, list[Any]]) -> None:
    """Fit on even texts of each trace, test on odd ones; then fit on all. Prints."""
    prior = np.array(ngram_device.PRIOR)
    found = {name: positions_of(items) for name, items in traces.items()}
    even = fitted([together(texts[::2]) for texts in found.values()])
    for name, texts in found.items():
        positions = together(texts[1::2])
        print(
            f"{name}, on the device: log loss on odd texts {log_loss(even, *positions):.4f} fitted "
            f"on even texts, {log_loss(prior, *positions):.4f} with PRIOR"
        )
    everything = fitted([together(texts) for texts in found.values()])
    print("all texts:", np.round(everything, 2).tolist())
    print("PRIOR:    ", prior.tolist())
