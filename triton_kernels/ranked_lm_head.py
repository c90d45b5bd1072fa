"""An output head over ranked rows that keeps only what a draft needs of its logits.

A draft step over M ranked rows reads M x H weights once and, of the T x M logits, needs a token
and a normaliser. The first launch computes a block of columns for all T rows and reduces it
where it stands: maximum, sum of exponentials, and the best few columns; the second reduces over
blocks. Logits are written only on request, for the verification of drawn tokens.

Drawn tokens come from the Gumbel-max trick: the largest of logit / temperature - log(e) with an
exponential number e for each column, keyed like every random number of a request
(`random_numbers.uniforms`), so the choice does not depend on the batch. With several columns
asked for this draws without replacement.

Shapes: T rows, 1 to 64; M ranked rows; H hidden size; k columns asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_spec_plugins.random_numbers import Purpose, uniforms

from .dispatch import INTERPRETED, constant, tl, triton, use_triton

#: Most rows of one call.
MAX_ROWS = 64
#: Most columns of each row.
MAX_COLUMNS = 16

#: Types the kernel multiplies.
_TYPES = (torch.bfloat16, torch.float16, torch.float32)

#: Random numbers of a position up to here are the verifiers' and proposers' own.
_FIRST_INDEX = 1 << 32


@dataclass(frozen=True, slots=True)
class Noise:
    """Which random numbers the rows draw with.

    Attributes:
        temperatures: `[T]` float32, 0 = the most likely column.
        streams: `[T]` int64.
        positions: `[T]` int64, sequence position of the first draft token of the round.
        index: Which token of the round, 0 for the first.
    """

    temperatures: Tensor
    streams: Tensor
    positions: Tensor
    index: int


@dataclass(frozen=True, slots=True)
class HeadChoice:
    """What a draft step takes from the head.

    Attributes:
        columns: `[T, k]` int64, best first; of equals the lower column. -1 where a row has fewer
            columns that are not -inf.
        logits: `[T, k]` float32 theirs, divided by the temperature of rows that draw.
        log_normaliser: `[T]` float32 log sum exp of all the row's logits, divided likewise:
            `exp(logits - log_normaliser)` is the draft's own probability.
        all_logits: `[T, M]` float32, divided likewise; None unless asked for.
    """

    columns: Tensor
    logits: Tensor
    log_normaliser: Tensor
    all_logits: Tensor | None


@dataclass(frozen=True, slots=True)
class HeadShape:
    """How the work is cut.

    Attributes:
        columns: Weight rows of one program.
        depth: Hidden features read at once.
        warps: Warps of a program.
        stages: Reads under way at once.
    """

    columns: int = 64
    depth: int = 128
    warps: int = 4
    stages: int = 4


def has_fused_head(hidden: Tensor, weight: Tensor) -> bool:
    """Whether `ranked_lm_head` takes these, and to its kernel rather than the reference."""
    return (
        use_triton(hidden)
        and hidden.dtype in _TYPES
        and weight.ndim == 2
        and 0 < len(hidden) <= MAX_ROWS
    )


def ranked_lm_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    noise: Noise | None = None,
    num_columns: int = 1,
    scale: float = 1.0,
    soft_cap: float | None = None,
    rounded: bool = False,
    keep_logits: bool = False,
    shape: HeadShape | None = None,
) -> HeadChoice:
    """The best, or drawn, columns of each row, in the kernel where the tensors are on a GPU.

    Args:
        hidden: `[T, H]` bfloat16, float16 or float32, after the final norm.
        weight: `[M, H]` of the same type, contiguous.
        bias: `[M]`, or None.
        noise: How rows draw; None: the most likely columns everywhere.
        num_columns: k, at most 16.
        scale: Factor on every logit.
        soft_cap: c: every scaled logit becomes c tanh(logit / c); None: as it is.
        rounded: Whether logits, before scale and cap, are rounded to the type of `hidden`, as a
            matrix product writes them: the same ties, and so the same choices.
        keep_logits: Whether `HeadChoice.all_logits` is written.
        shape: How the work is cut; None chooses.

    Raises:
        ValueError: More than 64 rows, more than 16 columns, or tensors that do not fit.
    """
    _check(hidden, weight, bias, num_columns)
    if not use_triton(hidden):
        return ranked_lm_head_reference(
            hidden, weight, bias, noise=noise, num_columns=num_columns, scale=scale,
            soft_cap=soft_cap, rounded=rounded, keep_logits=keep_logits,
        )  # fmt: skip
    return _launch(
        hidden, weight, bias, noise, num_columns, scale, soft_cap, rounded, keep_logits,
        shape or _shape(hidden),
    )  # fmt: skip


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, num_columns: int) -> None:
    rows, size = hidden.shape
    if rows > MAX_ROWS:
        raise ValueError(f"hidden has {rows} rows: at most {MAX_ROWS} go through one call")
    if not 1 <= num_columns <= min(MAX_COLUMNS, len(weight)):
        limit = min(MAX_COLUMNS, len(weight))
        raise ValueError(f"num_columns is {num_columns}: 1 to {limit} can be asked for")
    if weight.shape[1] != size or weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden is {list(hidden.shape)} {hidden.dtype}, weight {list(weight.shape)} "
            f"{weight.dtype}: they must share the hidden size and the type"
        )
    if bias is not None and bias.shape != (len(weight),):
        raise ValueError(f"bias is {list(bias.shape)}, weight has {len(weight)} rows")


# The reference ------------------------------------------------------------------------------


def ranked_lm_head_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    noise: Noise | None = None,
    num_columns: int = 1,
    scale: float = 1.0,
    soft_cap: float | None = None,
    rounded: bool = False,
    keep_logits: bool = False,
) -> HeadChoice:
    """The same in PyTorch, on any device; in float64 where `hidden` is. See `ranked_lm_head`."""
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(compute) @ weight.to(compute).T  # [T, M]
    if bias is not None:
        logits += bias.to(compute)
    if rounded:
        logits = logits.to(hidden.dtype).to(compute)
    logits *= scale
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    score = logits
    if noise is not None:
        drawn = (noise.temperatures > 0).unsqueeze(1)
        temperatures = torch.where(drawn, noise.temperatures.unsqueeze(1), 1).to(compute)
        logits = logits / temperatures
        score = torch.where(drawn, logits - _log_exponentials(noise, len(weight)), logits)
    # A stable sort: of equals the lower column first.
    best, columns = score.to(compute).sort(dim=1, descending=True, stable=True)
    columns = columns[:, :num_columns]
    chosen = logits.gather(1, columns)
    columns = torch.where(best[:, :num_columns] > -torch.inf, columns, -1)
    normaliser = torch.logsumexp(logits, dim=1)
    return HeadChoice(columns, chosen, normaliser, logits if keep_logits else None)


def _log_exponentials(noise: Noise, width: int) -> Tensor:
    """`[T, M]` float64 logarithms of exponential numbers, one for each column."""
    column = torch.arange(width, device=noise.streams.device)
    index = (noise.index + 1) * _FIRST_INDEX + column
    u = uniforms(noise.streams.unsqueeze(1), noise.positions.unsqueeze(1), index, Purpose.DRAFT)
    return torch.log(-torch.log1p(-u))


# The kernel ---------------------------------------------------------------------------------

_INFINITY = constant(float("inf"))
_GOLDEN = constant(0x9E3779B97F4A7C15)
_MIX_1 = constant(0xBF58476D1CE4E5B9)
_MIX_2 = constant(0x94D049BB133111EB)
_DRAFT = constant(int(Purpose.DRAFT))


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


@triton.jit
def _log_exponential(key, index):
    """log(-log(1 - u)) with u of `random_numbers.uniforms`; small u, which win, keep precision."""
    x = _mix(key + index.to(tl.uint64) * _MIX_2)
    u = (((x >> 12).to(tl.int64).to(tl.float64) + 0.5) * 2.220446049250313e-16).to(tl.float32)
    near = u * (1.0 + u * (0.5 + u * (0.3333333333 + u * (0.25 + u * (0.2 + u * 0.1666666667)))))
    far = -tl.log(tl.maximum(1.0 - u, 2.9802322e-08))
    return tl.log(tl.where(u < 0.03125, near, far))


@triton.jit
def _tanh(x):
    """Through exp(-2|x|), which cannot overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _block_kernel(
    maxima_ptr,
    sums_ptr,
    scores_ptr,
    columns_ptr,
    chosen_ptr,
    all_logits_ptr,
    hidden_ptr,
    hidden_stride,
    weight_ptr,
    weight_stride,
    bias_ptr,
    temperatures_ptr,
    streams_ptr,
    positions_ptr,
    first_index,
    scale,
    soft_cap,
    num_rows,
    width,
    hidden_size,
    NUM_COLUMNS: tl.constexpr,
    CAPPED: tl.constexpr,
    ROUNDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Logits of one block of columns for all rows, reduced: partials are `[T, blocks]`."""
    block = tl.program_id(0)
    num_blocks = tl.num_programs(0)
    row = tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    is_row, is_column = row < num_rows, column < width
    hidden = hidden_ptr + row.to(tl.int64)[:, None] * hidden_stride + depth[None, :]
    # Past the last row the last one is read again: loads without a mask are wide.
    weight_row = tl.minimum(column, width - 1).to(tl.int64)
    weight = weight_ptr + weight_row[:, None] * weight_stride + depth[None, :]
    logits = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, hidden_size, DEPTH, num_stages=STAGES):
        if EVEN:
            w = tl.load(weight + start)
            h = tl.load(hidden + start, mask=is_row[:, None], other=0.0)
        else:
            inside = (start + depth < hidden_size)[None, :]
            w = tl.load(weight + start, mask=inside, other=0.0)
            h = tl.load(hidden + start, mask=is_row[:, None] & inside, other=0.0)
        if UPCAST:  # the interpreter multiplies bfloat16 wrongly
            w = w.to(tl.float32)
            h = h.to(tl.float32)
        logits = tl.dot(h, tl.trans(w), logits, input_precision="ieee")
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if ROUNDED:
        if UPCAST and hidden_ptr.dtype.element_ty == tl.bfloat16:  # there it cuts off
            bits = logits.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            logits = bits.to(tl.float32, bitcast=True)
        else:
            logits = logits.to(hidden_ptr.dtype.element_ty).to(tl.float32)
    logits = logits * scale
    if CAPPED:
        logits = soft_cap * _tanh(logits / soft_cap)
    score = logits
    if temperatures_ptr is not None:
        temperature = tl.load(temperatures_ptr + row, mask=is_row, other=0.0)
        drawn = temperature > 0
        logits = logits / tl.where(drawn, temperature, 1.0)[:, None]
        stream = tl.load(streams_ptr + row, mask=is_row, other=0).to(tl.uint64)
        position = tl.load(positions_ptr + row, mask=is_row, other=0).to(tl.uint64)
        key = _mix(_mix(stream + _GOLDEN) ^ (position * _GOLDEN + _DRAFT))
        noise = _log_exponential(key[:, None], (first_index + column)[None, :])
        score = tl.where(drawn[:, None], logits - noise, logits)
    if all_logits_ptr is not None:
        tl.store(
            all_logits_ptr + row.to(tl.int64)[:, None] * width + column[None, :],
            logits,
            mask=is_row[:, None] & is_column[None, :],
        )

    logits = tl.where(is_column[None, :], logits, -_INFINITY)
    score = tl.where(is_column[None, :], score, -_INFINITY)
    maximum = tl.max(logits, axis=1)
    shift = tl.where(maximum == -_INFINITY, 0.0, maximum)
    out = row * num_blocks + block
    tl.store(maxima_ptr + out, maximum, mask=is_row)
    tl.store(sums_ptr + out, tl.sum(tl.exp(logits - shift[:, None]), axis=1), mask=is_row)
    place = tl.arange(0, COLUMNS)[None, :]
    for rank in tl.static_range(NUM_COLUMNS):
        best, where = tl.max(score, axis=1, return_indices=True)
        is_best = place == where[:, None]
        tl.store(scores_ptr + out * NUM_COLUMNS + rank, best, mask=is_row)
        tl.store(columns_ptr + out * NUM_COLUMNS + rank, block * COLUMNS + where, mask=is_row)
        own = tl.sum(tl.where(is_best, logits, 0.0), axis=1)
        tl.store(chosen_ptr + out * NUM_COLUMNS + rank, own, mask=is_row)
        score = tl.where(is_best, -_INFINITY, score)


@triton.jit
def _reduce_kernel(
    out_columns_ptr,
    out_logits_ptr,
    normaliser_ptr,
    maxima_ptr,
    sums_ptr,
    scores_ptr,
    columns_ptr,
    chosen_ptr,
    num_blocks,
    NUM_COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """One row over all blocks. Candidates stand in the order of their columns where equal."""
    row = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    there = block < num_blocks
    maxima = tl.load(maxima_ptr + row * num_blocks + block, mask=there, other=-_INFINITY)
    sums = tl.load(sums_ptr + row * num_blocks + block, mask=there, other=0.0)
    maximum = tl.max(maxima, axis=0)
    shift = tl.where(maximum == -_INFINITY, 0.0, maximum)
    tl.store(normaliser_ptr + row, shift + tl.log(tl.sum(sums * tl.exp(maxima - shift), axis=0)))
    candidate = tl.arange(0, CANDIDATES)
    first = row * num_blocks * NUM_COLUMNS
    there = candidate < num_blocks * NUM_COLUMNS
    score = tl.load(scores_ptr + first + candidate, mask=there, other=-_INFINITY)
    for rank in tl.static_range(NUM_COLUMNS):
        best, where = tl.max(score, axis=0, return_indices=True)
        column = tl.load(columns_ptr + first + where).to(tl.int64)
        tl.store(
            out_columns_ptr + row * NUM_COLUMNS + rank, tl.where(best > -_INFINITY, column, -1)
        )
        chosen = tl.load(chosen_ptr + first + where)
        chosen = tl.where(best > -_INFINITY, chosen, -_INFINITY)
        tl.store(out_logits_ptr + row * NUM_COLUMNS + rank, chosen)
        score = tl.where(candidate == where, -_INFINITY, score)


# The launch ---------------------------------------------------------------------------------


def _shape(hidden: Tensor) -> HeadShape:
    """Reads in flight bound a program's shared memory: 64 kB on the smallest architecture."""
    stages = 4 if len(hidden) <= 16 else 3
    return HeadShape(stages=stages if hidden.element_size() <= 2 else 2)


def _launch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    noise: Noise | None,
    num_columns: int,
    scale: float,
    soft_cap: float | None,
    rounded: bool,
    keep_logits: bool,
    shape: HeadShape,
) -> HeadChoice:
    rows, size = hidden.shape
    width, device = len(weight), hidden.device
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    num_blocks = triton.cdiv(width, shape.columns)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    columns = empty(rows, num_columns, dtype=torch.int64)
    logits, normaliser = empty(rows, num_columns), empty(rows)
    all_logits = empty(rows, width) if keep_logits else None
    if rows == 0:
        return HeadChoice(columns, logits, normaliser, all_logits)
    maxima, sums = empty(rows, num_blocks), empty(rows, num_blocks)
    scores, chosen = (empty(rows, num_blocks, num_columns) for _ in range(2))
    block_columns = empty(rows, num_blocks, num_columns, dtype=torch.int32)
    _block_kernel[(num_blocks,)](
        maxima,
        sums,
        scores,
        block_columns,
        chosen,
        all_logits,
        hidden,
        hidden.stride(0),
        weight,
        weight.stride(0),
        bias,
        None if noise is None else noise.temperatures,
        None if noise is None else noise.streams,
        None if noise is None else noise.positions,
        0 if noise is None else (noise.index + 1) * _FIRST_INDEX,
        float(scale),
        float(soft_cap or 0.0),
        rows,
        width,
        size,
        NUM_COLUMNS=num_columns,
        CAPPED=soft_cap is not None,
        ROUNDED=rounded,
        ROWS=max(16, triton.next_power_of_2(rows)),
        COLUMNS=shape.columns,
        DEPTH=shape.depth,
        EVEN=size % shape.depth == 0,
        UPCAST=INTERPRETED,
        STAGES=shape.stages,
        num_warps=shape.warps,
    )
    _reduce_kernel[(rows,)](
        columns,
        logits,
        normaliser,
        maxima,
        sums,
        scores,
        block_columns,
        chosen,
        num_blocks,
        NUM_COLUMNS=num_columns,
        BLOCKS=max(2, triton.next_power_of_2(num_blocks)),
        CANDIDATES=max(2, triton.next_power_of_2(num_blocks * num_columns)),
        num_warps=4,
    )
    return HeadChoice(columns, logits, normaliser, all_logits)
