"""Verification straight from logits: acceptance and the token after it, in two launches.

No `[N, V]` probabilities are made. The first launch (`_statistics_kernel`) reads each row of
target logits once and leaves, per block of columns, what normalises it: maximum and sum of
exponentials, or for greedy requests maximum and its column. The second (`_decide_kernel`) tests
all draft tokens of a request at once from those few numbers, then sums the weights of the token
after the accepted ones over tiles of one row, and the last program of a request to finish picks
the tile and the token in it by inverse transform sampling.

The block rule with a sampled draft needs the residual mass of every row before it can decide:
there the second launch sums the tiles of all rows, and the last program decides.

**Same uniforms, same decisions.** The kernel draws the numbers of `random_numbers.uniforms`, the
ones the PyTorch path draws, and looks at them in the same way, so both take the same decisions
where they compute alike: on float64 logits everything is computed in float64 and the two agree
always; on narrower logits in float32, and a decision can differ only where a uniform lies
within rounding (some 1e-6) of a boundary.

Shapes: R requests, N draft tokens laid end to end, K most of any request, V vocabulary,
M columns of the draft's law.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vllm_spec_plugins.verifier import Verification, VerifyInput

from .dispatch import tl, triton, use_triton
from .relaxations import DraftLogits, GivenAcceptance, GroupSum, Judge, NeighbourSum, Relaxation
from .verify_kernels import _decide_kernel, _statistics_kernel
from .verify_reference import verify_fused_reference


@dataclass(frozen=True, slots=True)
class LaunchShape:
    """How the work is cut. Nothing in the result depends on it but rounding.

    Attributes:
        block: Columns of one statistics program.
        block_warps: Its warps.
        tile: Columns summed at once when the next token is drawn.
        tile_warps: Warps of a program that decides.
        programs: Programs wanted in the second launch; requests share them.
        registers: Most registers of a thread that decides, NVIDIA only; None leaves it to the
            assembler, which may spill to fit one more program.
    """

    block: int = 4096
    block_warps: int = 8
    tile: int = 1024
    tile_warps: int = 4
    programs: int = 512
    registers: int | None = None


#: The block rule holds more at a time: with fewer warps it does not fit the registers.
_BLOCK_SHAPE = LaunchShape(tile_warps=8, registers=96)


def can_verify_fused(batch: VerifyInput) -> bool:
    """Whether `verify_fused` takes this batch to a kernel."""
    return use_triton(batch.target_logits)


def verify_fused(
    batch: VerifyInput,
    rule: Literal["token", "block"] = "token",
    *,
    raw: bool = False,
    draft_logits: DraftLogits | None = None,
    relaxation: Relaxation | None = None,
    judge: Judge | None = None,
    shape: LaunchShape | None = None,
) -> Verification:
    """Verify one step, in the kernel where the tensors are on a GPU, else by the reference.

    Args:
        batch: The step. Logits may be bfloat16, float16, float32 or float64, each row
            contiguous. Rows without a law (a NaN, or only -inf) accept nothing and give the
            last token of the vocabulary.
        rule: `token` or `block`, see the `lossless` verifier.
        raw: Logits, of the draft too, are from before the temperature, which is applied where
            they are read. Default: they are processed (`VerifyInput`), as top-k, top-p and
            penalties require.
        draft_logits: The draft's law as logits, in place of `batch.draft_probabilities`.
        relaxation: Accept more than the exact token rule.
        judge: Accept what a judge passes.
        shape: How the work is cut; None chooses.

    Returns:
        The verification; `extra_acceptance` is there with a relaxation or judge.

    Raises:
        ValueError: Both kinds of draft law, the block rule relaxed, or draft logits over a
            vocabulary of each row's own on a GPU.
    """
    if draft_logits is not None and batch.draft_probabilities is not None:
        raise ValueError("draft_logits and batch.draft_probabilities: the draft has one law")
    if rule == "block" and (relaxation is not None or judge is not None):
        raise ValueError("the block rule cannot be relaxed: use rule='token'")
    if not use_triton(batch.target_logits):
        return verify_fused_reference(
            batch, rule, raw=raw, draft_logits=draft_logits, relaxation=relaxation, judge=judge
        )
    law = batch.draft_probabilities
    if law is not None and law.vocabulary is not None and law.vocabulary.ndim > 1:
        # The kernel looks a column up in one table for all rows.
        whole = law.over_vocabulary(batch.target_logits.shape[1])
        batch = replace(batch, draft_probabilities=whole)
    shape = shape or (_BLOCK_SHAPE if rule == "block" else LaunchShape())
    return _launch(batch, rule, raw, draft_logits, relaxation, judge, shape)


_last_columns: tuple[Tensor, int, Tensor] | None = None


def _column_of(vocabulary: Tensor, vocab_size: int) -> Tensor:
    """`[V]` int32 column of each target id in a draft vocabulary, -1 outside; the last is kept.

    A draft vocabulary stays the same for a run and is never written to. Holding on to it keeps
    its memory from being given to another tensor.
    """
    global _last_columns
    if _last_columns is not None:
        last, size, columns = _last_columns
        same = last.device == vocabulary.device and last.shape == vocabulary.shape
        if same and last.data_ptr() == vocabulary.data_ptr() and size == vocab_size:
            return columns
    columns = vocabulary.new_full((vocab_size,), -1, dtype=torch.int32)
    order = torch.arange(len(vocabulary), dtype=torch.int32, device=vocabulary.device)
    columns[vocabulary] = order
    if vocabulary.device.type != "meta":
        _last_columns = vocabulary, vocab_size, columns
    return columns


def _rows(tensor: Tensor) -> Tensor:
    """The same with its rows contiguous; they are in all that the engine hands over."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _launch(
    batch: VerifyInput,
    rule: str,
    raw: bool,
    draft_logits: DraftLogits | None,
    relaxation: Relaxation | None,
    judge: Judge | None,
    shape: LaunchShape,
) -> Verification:
    target, bonus = _rows(batch.target_logits), _rows(batch.bonus_logits)
    device, vocab_size = target.device, bonus.shape[1]
    num_requests, width = len(batch.num_draft), batch.max_num_draft + 1
    num_rows = len(batch.draft_token_ids)
    compute = torch.float64 if target.dtype == torch.float64 else torch.float32

    law = draft_logits or batch.draft_probabilities
    draft = vocabulary = column_of = sampled = None
    kind, draft_size, draft_stride = 0, 0, 0
    if law is not None:
        draft, vocabulary, sampled = _rows(law.values), law.vocabulary, law.sampled
        if vocabulary is not None and vocabulary.ndim > 1:
            raise ValueError(
                "draft logits have a vocabulary of its own in each row, which no kernel takes: "
                "hand over probabilities, or use verify_fused_reference"
            )
        kind = 1 if draft_logits is None else 2
        draft_size, draft_stride = draft.shape[1], draft.stride(0)
        if vocabulary is None:
            draft_size = min(draft_size, vocab_size)
        else:
            column_of = _column_of(vocabulary, vocab_size)
    neighbours = relaxation if isinstance(relaxation, NeighbourSum) else None
    groups = relaxation if isinstance(relaxation, GroupSum) else None
    given = relaxation if isinstance(relaxation, GivenAcceptance) else None
    relaxed = 1 if neighbours else 2 if groups else 3 if given else 0

    num_blocks = triton.cdiv(vocab_size, shape.block)
    num_tiles = triton.cdiv(vocab_size, shape.tile)
    programs = max(1, min(num_tiles, shape.programs // max(num_requests, 1)))
    tiles_per_program = triton.cdiv(num_tiles, programs)
    programs = triton.cdiv(num_tiles, tiles_per_program)
    planes = 6 if groups else 4 if kind == 2 else 2
    tile_rows = width if rule == "block" and law is not None else 1

    def empty(*size: int, dtype: torch.dtype = compute) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    token_ids = empty(num_requests, width, dtype=torch.int64)
    accepted = empty(num_requests, dtype=torch.int64)
    extra = None
    if relaxation is not None or judge is not None:
        extra = empty(num_rows)
    if num_requests == 0:
        return Verification(token_ids, accepted, extra)
    done = empty(num_requests, dtype=torch.int32)
    statistics = empty(planes, max(num_rows, 1), num_blocks)
    tiles, shifts = empty(tile_rows, num_requests, num_tiles), empty(num_requests, num_tiles)
    plane_stride = max(num_rows, 1) * num_blocks
    on_nvidia = device.type != "xpu" and torch.version.hip is None
    language = {torch.float32: tl.float32, torch.float64: tl.float64}[compute]

    _statistics_kernel[(num_requests * max(batch.max_num_draft, 1), num_blocks)](
        statistics,
        plane_stride,
        done,
        target,
        target.stride(0),
        draft,
        draft_stride,
        batch.draft_token_ids,
        batch.num_draft,
        batch.temperatures,
        vocabulary,
        groups.group_of if groups else None,
        max(batch.max_num_draft, 1),
        num_blocks,
        vocab_size,
        draft_size,
        RAW=raw,
        DRAFT=kind,
        GROUPED=groups is not None,
        BLOCK=shape.block,
        COMPUTE=language,
        num_warps=shape.block_warps,
    )
    _decide_kernel[(num_requests, programs)](
        token_ids,
        accepted,
        extra,
        done,
        tiles,
        shifts,
        statistics,
        plane_stride,
        target,
        target.stride(0),
        bonus,
        bonus.stride(0),
        draft,
        draft_stride,
        batch.draft_token_ids,
        sampled,
        batch.num_draft,
        batch.temperatures,
        batch.streams,
        batch.positions,
        column_of,
        neighbours.neighbours if neighbours else None,
        neighbours.neighbours.stride(0) if neighbours else 0,
        len(neighbours.neighbours) if neighbours else 0,
        neighbours.first_code if neighbours else 0,
        float(neighbours.budget) if neighbours else 0.0,
        given.acceptance if given else None,
        judge.scores if judge else None,
        float(judge.threshold) if judge else 0.0,
        batch.max_num_draft,
        num_blocks,
        triton.cdiv(draft_size, shape.block),
        num_tiles,
        tiles_per_program,
        programs,
        vocab_size,
        draft_size,
        RAW=raw,
        DRAFT=kind,
        BLOCK_RULE=rule == "block",
        RELAXATION=relaxed,
        NEIGHBOURS=neighbours.neighbours.shape[1] if neighbours else 1,
        MULTIPLICATIVE=bool(neighbours and neighbours.multiplicative),
        TOKENS=max(2, triton.next_power_of_2(width)),
        BLOCKS=max(2, triton.next_power_of_2(num_blocks)),
        TILES=max(2, triton.next_power_of_2(num_tiles)),
        TILE=shape.tile,
        COMPUTE=language,
        num_warps=shape.tile_warps,
        **({"maxnreg": shape.registers} if shape.registers and on_nvidia else {}),
    )
    return Verification(token_ids, accepted, extra)
