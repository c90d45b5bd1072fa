"""Where the last tokens occurred before: longest, latest, the one before, how often, then what."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm_spec_plugins.triton_kernels import suffix_match as module
from vllm_spec_plugins.triton_kernels.suffix_match import (
    SuffixMatch,
    suffix_match,
    suffix_match_reference,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def small_blocks():
    """Blocks and parts small enough for short texts to need several."""
    with patch.multiple(module, BLOCK=16, PART=64, NUM_WARPS=1):
        yield


#: Length, count, position, earlier position, draft.
Row = tuple[int, int, int, int, list[int]]


def by_definition(
    text: list[int], min_match: int, max_match: int, num_draft: int, repeat: bool
) -> Row:
    for length in range(min(max_match, len(text) - 1), min_match - 1, -1):
        suffix = text[len(text) - length :]
        ends = [end for end in range(length, len(text)) if text[end - length : end] == suffix]
        if ends:
            draft = list(text)
            for step in range(num_draft):
                draft.append(
                    draft[ends[-1] + step] if repeat or ends[-1] + step < len(text) else -1
                )
            return length, len(ends), ends[-1], [-1, *ends][-2], draft[len(text) :]
    return 0, 0, -1, -1, [-1] * num_draft


def padded(texts: list[list[int]], width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of a wider buffer; what lies past a text would match if it were looked at."""
    rows = [((text or [0]) * (width // max(len(text), 1) + 1))[:width] for text in texts]
    buffer = torch.tensor(rows, dtype=dtype).reshape(len(texts), width)
    wide = torch.full((len(texts), width + 3), 7, dtype=dtype)
    wide[:, :width] = buffer
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int32)
    return wide.to(DEVICE)[:, :width], lengths.to(DEVICE)


def rows_of(match: SuffixMatch) -> list[Row]:
    return list(zip(*(field.tolist() for field in match), strict=True))


def check(
    texts: list[list[int]],
    *,
    min_match: int = 1,
    max_match: int = 4,
    num_draft: int = 3,
    repeat: bool = False,
    width: int | None = None,
    dtype: torch.dtype = torch.int32,
) -> None:
    width = max(map(len, texts)) if width is None else width
    history, lengths = padded(texts, width, dtype)
    options = {
        "min_match": min_match, "max_match": max_match, "num_draft": num_draft, "repeat": repeat,
        "max_num_tokens": max(map(len, texts)),
    }  # fmt: skip
    expected = [by_definition(text, min_match, max_match, num_draft, repeat) for text in texts]
    for operation in (suffix_match_reference, suffix_match):
        match = operation(history, lengths, **options)
        assert rows_of(match) == expected, operation.__name__
        assert match.token_ids.dtype == dtype
        assert {field.dtype for field in match[:4]} == {torch.int32}
    backwards = torch.arange(len(texts), device=DEVICE).flip(0)
    for operation in (suffix_match_reference, suffix_match):
        match = operation(history, lengths.flip(0), rows=backwards, **options)
        assert rows_of(match) == expected[::-1], operation.__name__


@pytest.mark.parametrize("repeat", [False, True])
def test_edges(repeat: bool) -> None:
    check(
        [
            [],
            [5],
            [5, 5],
            [1, 2],
            [1, 2, 3, 1, 2],
            [9, 1, 2, 8, 1, 2, 7, 1, 2],  # latest of two
            [4, 4, 4, 4, 4, 4],  # overlaps itself; longest that fits
            [1, 2, 3, 4, 5, 9, 2, 3, 4, 5, 8, 1, 2, 3, 4, 5],  # longer than max_match
            [3, 1, 0, 3],  # the very first token
        ],
        repeat=repeat,
    )


def test_short_matches_are_not_drafted_from() -> None:
    check([[1, 2, 9, 2], [1, 2, 9, 1, 2]], min_match=2)


def test_latest_of_the_longest() -> None:
    history, lengths = padded([[1, 2, 5, 1, 2, 6, 2, 7, 1, 2]], 10, torch.int32)
    match = suffix_match(history, lengths, min_match=1, max_match=4, num_draft=2)
    assert rows_of(match) == [(2, 2, 5, 2, [6, 2])]


def test_repeat_drafts_on_in_a_loop() -> None:
    history, lengths = padded([[1, 2, 3, 1, 2, 3]], 6, torch.int32)
    options = {"min_match": 1, "max_match": 3, "num_draft": 5}
    assert rows_of(suffix_match(history, lengths, **options))[0][4] == [1, 2, 3, -1, -1]
    assert rows_of(suffix_match(history, lengths, **options, repeat=True))[0][4] == [1, 2, 3, 1, 2]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_several_parts(dtype: torch.dtype) -> None:
    """Ties and better matches in other parts than the first; requests that end before them."""
    generator = torch.Generator().manual_seed(0)
    texts = [
        torch.randint(0, 3, (size,), generator=generator).tolist() for size in (200, 64, 65, 128, 3)
    ]
    check(texts, max_match=6, dtype=dtype, num_draft=5)


def test_matches_on_both_sides_of_a_part() -> None:
    marker = [50, 51, 52]
    for place in (60, 61, 62, 63, 64, 65):
        text = list(range(100, 230))
        text[place : place + 3] = marker
        text[10:12] = marker[1:]
        check([text + marker], max_match=3)


def test_some_rows_of_a_table() -> None:
    """Rows in any order, one twice, others not looked at."""
    history, lengths = padded([[1, 2, 1], [3], [5, 6, 5]], 12, torch.int32)
    rows = torch.tensor([2, 0, 2], device=DEVICE)
    match = suffix_match(history, lengths[rows], rows=rows, min_match=1, max_match=4, num_draft=1)
    assert match.token_ids.tolist() == [[6], [2], [6]]


def test_what_lies_past_a_text_is_not_seen() -> None:
    """Control: with one token more the answer is another."""
    history, lengths = padded([[1, 2, 3, 4]], 9, torch.int32)
    options = {"min_match": 1, "max_match": 4, "num_draft": 2}
    assert rows_of(suffix_match(history, lengths, **options)) == [(0, 0, -1, -1, [-1, -1])]
    assert rows_of(suffix_match(history, lengths + 1, **options)) == [(1, 1, 1, -1, [2, 3])]


def test_the_bound_on_the_host_only_bounds() -> None:
    history, lengths = padded([[1, 2, 3, 1, 2]], 100, torch.int32)
    options = {"min_match": 1, "max_match": 4, "num_draft": 2}
    bounded = suffix_match(history, lengths, **options, max_num_tokens=5)
    assert rows_of(bounded) == rows_of(suffix_match(history, lengths, **options))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    texts=st.lists(st.lists(st.integers(0, 2), max_size=90), min_size=1, max_size=3),
    min_match=st.integers(1, 4),
    longer=st.integers(0, 6),
    num_draft=st.integers(1, 6),
    repeat=st.booleans(),
    spare=st.integers(0, 20),
)
def test_any_text(
    texts: list[list[int]], min_match: int, longer: int, num_draft: int, repeat: bool, spare: int
) -> None:
    check(
        texts,
        min_match=min_match,
        max_match=min_match + longer,
        num_draft=num_draft,
        repeat=repeat,
        width=max(map(len, texts)) + spare,
    )


def test_no_requests() -> None:
    empty = torch.zeros(0, 8, dtype=torch.int32, device=DEVICE)
    match = suffix_match(empty, empty[:, 0], min_match=1, max_match=2, num_draft=3)
    assert match.lengths.shape == (0,)
    assert match.token_ids.shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"min_match": 0}, "min_match 0"),
        ({"max_match": 1}, "max_match 1"),
        ({"num_draft": 0}, "num_draft 0"),
        ({"max_num_tokens": 9}, "max_num_tokens is 9"),
        ({"token_history": torch.zeros(2, 8)}, "token_history"),
        ({"token_history": torch.zeros(8, 2, dtype=torch.int32).T}, "strides"),
        ({"num_tokens": torch.zeros(3, dtype=torch.int32)}, "num_tokens"),
        ({"rows": torch.zeros(1, dtype=torch.int64)}, r"num_tokens .* needed: \[1\]"),
        ({"rows": torch.zeros(2, dtype=torch.int32)}, "rows is"),
    ],
)
def test_wrong_arguments(change: dict, words: str) -> None:
    arguments = {
        "token_history": torch.zeros(2, 8, dtype=torch.int32),
        "num_tokens": torch.full((2,), 8, dtype=torch.int32),
        "min_match": 2, "max_match": 3, "num_draft": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        suffix_match(**(arguments | change))
