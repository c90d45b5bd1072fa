"""Find where each request's last tokens occurred before, for a whole batch, on the device.

For a text of `n` tokens, a *match* of length `m` is a place `e < n` with
`text[e - m : e] == text[n - m : n]`; `e` is where the match ends and a continuation begins. The
longest match between `min_match` and `max_match` tokens wins, among equally long ones the latest;
the choice is the same on every device. Matches may overlap the suffix itself, as in `a a a`.

vLLM's own n-gram proposers find the longest match too: the earliest of them on the CPU and in
`ngram_gpu`, the latest in model runner V2, which fills requests that match nothing with copies of
their last token, verified for nothing. Here those get none (-1). How far to trust a match shows in
`counts`, how often it occurred, and in `earlier_positions`, the occurrence before the latest: did
the same tokens follow there?

One pass: every place is compared with the suffix token by token, backwards, and drops out at the
first difference, so nearly all places cost one token. Places beyond a request's own text cost
nothing. Bytes read: 4 per token of history.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import tl, triton, use_triton

#: Stands where nothing is drafted.
NO_TOKEN = -1


class SuffixMatch(NamedTuple):
    """The longest match of each request.

    Attributes:
        lengths: `[num_reqs]` int32, tokens that match; 0 with no match.
        counts: `[num_reqs]` int32, how many places match at that length; 0 with no match.
        positions: `[num_reqs]` int32, where the latest of them ends; -1 with no match.
        earlier_positions: `[num_reqs]` int32, where the latest but one of them ends; -1 where
            there is only one, or none.
        token_ids: `[num_reqs, num_draft]`, in the type of the history: what followed there; -1
            after the end of the text, and everywhere with no match.
    """

    lengths: Tensor
    counts: Tensor
    positions: Tensor
    earlier_positions: Tensor
    token_ids: Tensor


def suffix_match(
    token_history: Tensor,
    num_tokens: Tensor,
    *,
    min_match: int,
    max_match: int,
    num_draft: int,
    rows: Tensor | None = None,
    max_num_tokens: int | None = None,
    repeat: bool = False,
) -> SuffixMatch:
    """The longest suffix of each request's text that occurs earlier in it, and what followed.

    Deterministic, and the same on every device. No sync: lengths stay on the device.

    Args:
        token_history: `[num_rows, max_model_len]` int32 or int64; rows may be strided.
        num_tokens: `[num_reqs]` int32 or int64: tokens of each request's row that count.
        min_match: Shortest match to draft from, at least 1.
        max_match: Longest match to look for.
        num_draft: Tokens to draft.
        rows: `[num_reqs]` int64, row of each request. Default: request i has row i.
        max_num_tokens: A bound on `num_tokens` known on the host; it bounds the work. Default:
            all columns.
        repeat: Read past the end of the text what was drafted itself, so that a text in a loop
            of `p` tokens drafts `num_draft` of them and not `p`.

    Raises:
        ValueError: An argument is out of range or a tensor has another shape, type or device.
    """
    limit = token_history.shape[-1] if max_num_tokens is None else max_num_tokens
    _check(token_history, num_tokens, rows, min_match, max_match, num_draft, limit)
    if not use_triton(token_history):
        return suffix_match_reference(
            token_history,
            num_tokens,
            min_match=min_match,
            max_match=max_match,
            num_draft=num_draft,
            rows=rows,
            max_num_tokens=max_num_tokens,
            repeat=repeat,
        )
    num_reqs, device = num_tokens.shape[0], token_history.device
    # Each on its own: parts of one tensor would be aligned by the number of requests, and the
    # kernel compiled for each alignment.
    match = SuffixMatch(
        *(torch.empty(num_reqs, dtype=torch.int32, device=device) for _ in range(4)),
        token_ids=torch.empty(num_reqs, num_draft, dtype=token_history.dtype, device=device),
    )
    if num_reqs == 0:
        return match
    num_parts = max(1, triton.cdiv(limit, PART))
    # [num_parts, num_reqs]; with one part the first launch answers.
    part_keys = torch.empty(num_parts, num_reqs, dtype=torch.int64, device=device)
    part_counts = torch.empty(num_parts, num_reqs, dtype=torch.int32, device=device)
    part_earlier = torch.empty(num_parts, num_reqs, dtype=torch.int32, device=device)
    drafted = {"NUM_DRAFT": num_draft, "DRAFT": triton.next_power_of_2(num_draft)}
    _match_kernel[(num_reqs, num_parts)](
        token_history,
        token_history.stride(0),
        token_history.shape[1],
        rows,
        num_tokens,
        limit,
        part_keys,
        part_counts,
        part_earlier,
        *match,
        MIN_MATCH=min_match,
        MAX_MATCH=max_match,
        **drafted,
        REPEAT=repeat,
        ONE_PART=num_parts == 1,
        PART=PART,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    if num_parts > 1:
        _combine_kernel[(num_reqs,)](
            token_history,
            token_history.stride(0),
            rows,
            num_tokens,
            limit,
            part_keys,
            part_counts,
            part_earlier,
            *match,
            num_parts,
            **drafted,
            REPEAT=repeat,
            PARTS=triton.next_power_of_2(num_parts),
            num_warps=1,
        )
    return match


def suffix_match_reference(
    token_history: Tensor,
    num_tokens: Tensor,
    *,
    min_match: int,
    max_match: int,
    num_draft: int,
    rows: Tensor | None = None,
    max_num_tokens: int | None = None,
    repeat: bool = False,
) -> SuffixMatch:
    """`suffix_match` in PyTorch: the match length of every place, one more token per pass."""
    tokens = token_history[
        :, : token_history.shape[1] if max_num_tokens is None else max_num_tokens
    ]
    if rows is not None:
        tokens = tokens[rows]
    num_reqs, width = tokens.shape
    device = tokens.device
    size = num_tokens.long().clamp(max=width).unsqueeze(1)  # [num_reqs, 1]
    places = torch.arange(width, device=device).expand(num_reqs, -1)
    alive = places < size
    lengths = torch.zeros_like(places)  # [num_reqs, width], of the match that ends at each place
    for back in range(1, min(max_match, width) + 1):
        before = tokens.gather(1, (places - back).clamp(min=0))
        suffix = tokens.gather(1, (size - back).clamp(min=0))
        alive = alive & (places >= back) & (before == suffix)
        lengths += alive
    length = (
        lengths.amax(dim=1) if width else torch.zeros(num_reqs, dtype=torch.long, device=device)
    )
    length = torch.where(length >= min_match, length, 0)
    winners = (lengths == length.unsqueeze(1)) & (length > 0).unsqueeze(1)
    last = torch.where(winners, places, -1)
    position = last.amax(dim=1) if width else torch.full_like(length, -1)
    last = torch.where(last < position.unsqueeze(1), last, -1)
    earlier = last.amax(dim=1) if width else torch.full_like(length, -1)

    steps = torch.arange(num_draft, device=device)
    if repeat:  # what lies past the end is the draft itself, `size - position` tokens before
        steps = steps % (size - position.unsqueeze(1)).clamp(min=1)
    source = position.unsqueeze(1) + steps  # [num_reqs, num_draft]
    known = (position.unsqueeze(1) >= 0) & (source < size)
    drafted = tokens.gather(1, source.clamp(0, max(width - 1, 0))) if width else source
    return SuffixMatch(
        lengths=length.to(torch.int32),
        counts=winners.sum(dim=1).to(torch.int32),
        positions=position.to(torch.int32),
        earlier_positions=earlier.to(torch.int32),
        token_ids=torch.where(known, drafted, NO_TOKEN).to(tokens.dtype),
    )


#: Places of one request searched by one program, whole blocks of them. At 16 k tokens and fewer one
#: launch does it all.
PART = 16384
#: Places searched at a time.
BLOCK = 4096
NUM_WARPS = 16


@triton.jit
def _text(history_ptr, history_stride, rows_ptr, request):
    row = request
    if rows_ptr is not None:
        row = tl.load(rows_ptr + request)
    return history_ptr + row * history_stride


@triton.jit
def _write_match(
    text_ptr,
    size,
    request,
    length,
    position,
    count,
    earlier,
    lengths_ptr,
    counts_ptr,
    positions_ptr,
    earlier_positions_ptr,
    token_ids_ptr,
    NUM_DRAFT: tl.constexpr,
    DRAFT: tl.constexpr,
    REPEAT: tl.constexpr,
):
    found = length > 0
    tl.store(lengths_ptr + request, length.to(tl.int32))
    tl.store(counts_ptr + request, tl.where(found, count, 0))
    tl.store(positions_ptr + request, tl.where(found, position, -1).to(tl.int32))
    tl.store(earlier_positions_ptr + request, tl.where(found, earlier, -1))
    steps = tl.arange(0, DRAFT)
    offsets = steps
    if REPEAT:
        offsets = steps % tl.maximum(size - position, 1)
    known = (steps < tl.where(found, NUM_DRAFT, 0)) & (position + offsets < size)
    drafted = tl.load(text_ptr + position + offsets, mask=known, other=-1)
    tl.store(token_ids_ptr + request * NUM_DRAFT + steps, drafted, mask=steps < NUM_DRAFT)


@triton.jit
def _match_kernel(
    history_ptr,
    history_stride,
    num_columns,
    rows_ptr,
    num_tokens_ptr,
    limit,
    part_keys_ptr,
    part_counts_ptr,
    part_earlier_ptr,
    lengths_ptr,
    counts_ptr,
    positions_ptr,
    earlier_positions_ptr,
    token_ids_ptr,
    MIN_MATCH: tl.constexpr,
    MAX_MATCH: tl.constexpr,
    NUM_DRAFT: tl.constexpr,
    DRAFT: tl.constexpr,
    REPEAT: tl.constexpr,
    ONE_PART: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The longest, latest match among the places of one part of one request's text.

    Parts hand on a match as one number, `length << 32 | place`: the largest is the longest and
    latest.
    """
    request, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    text_ptr = _text(history_ptr, history_stride, rows_ptr, request)
    size = tl.minimum(tl.load(num_tokens_ptr + request).to(tl.int32), limit)
    last = tl.load(text_ptr + size - 1, mask=size > 0, other=0)
    # Counted here is where a match has its last token, one before the place where it ends.
    begin = part * PART
    end = tl.minimum(begin + PART, size - 1)
    best_length = tl.zeros((), dtype=tl.int32)
    position = tl.zeros((), dtype=tl.int32)
    earlier = tl.zeros((), dtype=tl.int32)
    count = tl.zeros((), dtype=tl.int32)
    for block in range(begin, end, BLOCK):
        ends = block + tl.arange(0, BLOCK)
        # Masked by the row, not by the text: a bound that is a multiple of 16 keeps loads wide.
        tokens = tl.load(text_ptr + ends, mask=ends < num_columns, other=0)
        longest = (tokens == last) & (ends < size - 1)
        length = tl.max(longest.to(tl.int32), axis=0)
        more = length
        while (more > 0) & (length < MAX_MATCH):
            alive = longest & (ends >= length)
            expected = tl.load(text_ptr + size - 1 - length, mask=length < size, other=0)
            tokens = tl.load(text_ptr + ends - length, mask=alive, other=0)
            alive = alive & (tokens == expected)
            more = tl.max(alive.to(tl.int32), axis=0)
            none = ends + more == ends  # a tensor: the interpreter would widen a scalar
            longest = alive | (longest & none)
            length += more
        if length >= tl.maximum(best_length, MIN_MATCH):
            last_end = tl.max(tl.where(longest, ends, -1), axis=0)
            end_before = tl.max(tl.where(longest & (ends != last_end), ends, -2), axis=0)
            # Places found before this block lie before those in it.
            as_long = length == best_length
            earlier = tl.maximum(end_before + 1, tl.where(as_long, position, -1))
            count = tl.sum(longest.to(tl.int32), axis=0) + tl.where(as_long, count, 0)
            position = last_end + 1
            best_length = length
    if ONE_PART:
        _write_match(
            text_ptr, size, request, best_length, position, count, earlier,
            lengths_ptr, counts_ptr, positions_ptr, earlier_positions_ptr, token_ids_ptr,
            NUM_DRAFT, DRAFT, REPEAT,
        )  # fmt: skip
    else:
        slot = part * tl.num_programs(0) + request
        key = (best_length.to(tl.int64) << 32) | position.to(tl.int64)
        tl.store(part_keys_ptr + slot, key)
        tl.store(part_counts_ptr + slot, count)
        tl.store(part_earlier_ptr + slot, earlier)


@triton.jit
def _combine_kernel(
    history_ptr,
    history_stride,
    rows_ptr,
    num_tokens_ptr,
    limit,
    part_keys_ptr,
    part_counts_ptr,
    part_earlier_ptr,
    lengths_ptr,
    counts_ptr,
    positions_ptr,
    earlier_positions_ptr,
    token_ids_ptr,
    num_parts,
    NUM_DRAFT: tl.constexpr,
    DRAFT: tl.constexpr,
    REPEAT: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The best of a request's parts, and how often its length occurred in all of them."""
    request = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS)
    slots = parts * tl.num_programs(0) + request
    keys = tl.load(part_keys_ptr + slots, mask=parts < num_parts, other=0)
    counts = tl.load(part_counts_ptr + slots, mask=parts < num_parts, other=0)
    earlier = tl.load(part_earlier_ptr + slots, mask=parts < num_parts, other=-1)
    best = tl.max(keys, axis=0)
    as_long = (keys >> 32) == (best >> 32)
    count = tl.sum(tl.where(as_long, counts, 0), axis=0)
    # Of the winning part the place before its latest, of the others their latest.
    places = tl.where(keys == best, earlier, (keys & 0xFFFFFFFF).to(tl.int32))
    place_before = tl.max(tl.where(as_long, places, -1), axis=0)
    size = tl.minimum(tl.load(num_tokens_ptr + request).to(tl.int32), limit)
    _write_match(
        _text(history_ptr, history_stride, rows_ptr, request), size, request, best >> 32,
        (best & 0xFFFFFFFF).to(tl.int32), count, place_before,
        lengths_ptr, counts_ptr, positions_ptr, earlier_positions_ptr, token_ids_ptr,
        NUM_DRAFT, DRAFT, REPEAT,
    )  # fmt: skip


def _check(
    token_history: Tensor,
    num_tokens: Tensor,
    rows: Tensor | None,
    min_match: int,
    max_match: int,
    num_draft: int,
    limit: int,
) -> None:
    if not 1 <= min_match <= max_match or num_draft < 1:
        raise ValueError(
            f"suffix_match: min_match {min_match}, max_match {max_match}, num_draft {num_draft}; "
            "allowed: 1 <= min_match <= max_match and num_draft >= 1"
        )
    types = (torch.int32, torch.int64)
    if (
        token_history.ndim != 2
        or token_history.dtype not in types
        or (token_history.shape[1] > 1 and token_history.stride(1) != 1)
    ):
        raise ValueError(
            f"suffix_match: token_history is {list(token_history.shape)} {token_history.dtype} "
            f"with strides {token_history.stride()}; needed: [num_rows, max_model_len] int32 or "
            "int64 with contiguous rows"
        )
    if rows is not None and (
        rows.ndim != 1
        or rows.dtype != torch.int64
        or not rows.is_contiguous()
        or rows.device != token_history.device
    ):
        raise ValueError(
            f"suffix_match: rows is {list(rows.shape)} {rows.dtype} on {rows.device}; needed: "
            f"[num_reqs] int64, contiguous, on {token_history.device}"
        )
    num_reqs = len(token_history if rows is None else rows)
    if (
        num_tokens.shape != (num_reqs,)
        or num_tokens.dtype not in types
        or not num_tokens.is_contiguous()
        or num_tokens.device != token_history.device
    ):
        raise ValueError(
            f"suffix_match: num_tokens is {list(num_tokens.shape)} {num_tokens.dtype} on "
            f"{num_tokens.device}; needed: [{num_reqs}] int32 or int64, contiguous, "
            f"on {token_history.device}"
        )
    if not 0 <= limit <= token_history.shape[1]:
        raise ValueError(
            f"suffix_match: max_num_tokens is {limit}; allowed: 0 to the "
            f"{token_history.shape[1]} columns of token_history"
        )
