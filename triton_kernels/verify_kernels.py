"""The two kernels of `verify_fused`, see there what each does, and the parts they are made of."""

from __future__ import annotations

from .dispatch import constant, tl, triton

_NO_DRAFT = constant(0)
_PROBABILITIES = constant(1)
_LOGITS = constant(2)

_EXACT = constant(0)
_NEIGHBOURS = constant(1)
_GROUPS = constant(2)
_GIVEN = constant(3)

#: Neighbours looked at together.
_NEIGHBOUR_CHUNK = constant(64)

_INFINITY = constant(float("inf"))
_GOLDEN = constant(0x9E3779B97F4A7C15)
_MIX_1 = constant(0xBF58476D1CE4E5B9)
_MIX_2 = constant(0x94D049BB133111EB)
_ACCEPT = constant(0)  # of `Purpose`
_RESAMPLE = constant(1)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


@triton.jit
def uniform(stream, position, index, purpose: tl.constexpr):
    """`random_numbers.uniforms`, bit for bit: float64 in (0, 1). Arguments are int64."""
    x = _mix(stream.to(tl.uint64) + _GOLDEN)
    x = _mix(x ^ (position.to(tl.uint64) * _GOLDEN + purpose))
    x = _mix(x + index.to(tl.uint64) * _MIX_2)
    return ((x >> 12).to(tl.int64).to(tl.float64) + 0.5) * 2.220446049250313e-16


@triton.jit
def _first_row(num_draft_ptr, request):
    """Draft tokens of the requests before this one."""
    first = tl.full([], 0, tl.int64)
    for start in range(0, request, 256):
        i = start + tl.arange(0, 256)
        first += tl.sum(tl.load(num_draft_ptr + i, mask=i < request, other=0).to(tl.int64), 0)
    return first


@triton.jit
def _load_columns(row_ptr, start, end, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    """Columns of a row, -inf past the end. Whole blocks without a mask: those loads are wide."""
    column = start + tl.arange(0, BLOCK)
    if start + BLOCK <= end:
        x = tl.load(row_ptr + column)
    else:
        x = tl.load(row_ptr + column, mask=column < end, other=-_INFINITY)
    return x.to(COMPUTE)


@triton.jit
def _numbers_last(x):
    """For greedy choice: what is no number counts as infinite, as in PyTorch's argmax."""
    return tl.where(x != x, _INFINITY, x)


@triton.jit
def _maximum_and_shares(x):
    """Maximum of a block and exp(x - maximum); -inf and zeros where all is -inf."""
    maximum = tl.max(x, axis=0)
    shift = tl.where(maximum == -_INFINITY, 0.0, maximum)
    return maximum, tl.exp(x - shift)


@triton.jit
def _log_normaliser(maxima, sums):
    """`[K]` log sum exp from `[K, blocks]` maxima and sums; NaN for rows without a law."""
    maximum = tl.max(maxima, axis=1)
    shift = tl.where(maximum == -_INFINITY, 0.0, maximum)
    return shift + tl.log(tl.sum(sums * tl.exp(maxima - shift[:, None]), axis=1)), shift


@triton.jit
def _statistics_kernel(
    statistics_ptr,
    plane_stride,
    done_ptr,
    target_ptr,
    target_stride,
    draft_ptr,
    draft_stride,
    draft_ids_ptr,
    num_draft_ptr,
    temperatures_ptr,
    vocabulary_ptr,
    group_of_ptr,
    rows_per_request,
    num_blocks,
    vocab_size,
    draft_size,
    RAW: tl.constexpr,
    DRAFT: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One block of columns of one draft token's row.

    Planes of `statistics`, each `[N, blocks]`: maximum; sum of exponentials, or the column of
    the maximum for greedy requests; the same two of the draft's logits; sums of exponentials
    over the draft token's group, of the target and of the draft.
    """
    request = tl.program_id(0) // rows_per_request
    index = tl.program_id(0) % rows_per_request
    block = tl.program_id(1)
    if (index == 0) & (block == 0):
        tl.store(done_ptr + request, 0)
    if index >= tl.load(num_draft_ptr + request):
        return
    row = _first_row(num_draft_ptr, request) + index
    temperature = tl.load(temperatures_ptr + request).to(COMPUTE)
    out = statistics_ptr + row * num_blocks + block
    start = block * BLOCK
    column = start + tl.arange(0, BLOCK)
    draft_share = tl.zeros([BLOCK], COMPUTE)

    if start < vocab_size:
        x = _load_columns(target_ptr + row * target_stride, start, vocab_size, BLOCK, COMPUTE)
        if temperature == 0:
            maximum, best = tl.max(_numbers_last(x), axis=0, return_indices=True)
            tl.store(out, maximum)
            tl.store(out + plane_stride, (start + best).to(COMPUTE))
        else:
            if RAW:
                x = x * (1.0 / temperature)
            maximum, share = _maximum_and_shares(x)
            tl.store(out, maximum)
            tl.store(out + plane_stride, tl.sum(share, axis=0))
            if GROUPED:
                token = tl.maximum(tl.load(draft_ids_ptr + row), 0)
                group = tl.load(group_of_ptr + token)
                inside = column < vocab_size
                other = tl.load(group_of_ptr + column, mask=inside, other=-1)
                member = ((other == group) & (group >= 0)) | (column == token)
                tl.store(out + 4 * plane_stride, tl.sum(tl.where(member, share, 0.0), axis=0))
    if (start < draft_size) & (temperature != 0):
        if DRAFT == _LOGITS:
            y = _load_columns(draft_ptr + row * draft_stride, start, draft_size, BLOCK, COMPUTE)
            if RAW:
                y = y * (1.0 / temperature)
            draft_maximum, draft_share = _maximum_and_shares(y)
            tl.store(out + 2 * plane_stride, draft_maximum)
            tl.store(out + 3 * plane_stride, tl.sum(draft_share, axis=0))
        if GROUPED and DRAFT != _NO_DRAFT:
            inside = column < draft_size
            if DRAFT == _LOGITS:
                part = draft_share
            else:
                part = tl.load(draft_ptr + row * draft_stride + column, mask=inside, other=0.0)
                part = part.to(COMPUTE)
            ids = column
            if vocabulary_ptr is not None:
                ids = tl.load(vocabulary_ptr + column, mask=inside, other=0).to(tl.int32)
            token = tl.maximum(tl.load(draft_ids_ptr + row), 0)
            group = tl.load(group_of_ptr + token)
            other = tl.load(group_of_ptr + ids, mask=inside, other=-1)
            member = inside & (((other == group) & (group >= 0)) | (ids == token))
            tl.store(out + 5 * plane_stride, tl.sum(tl.where(member, part, 0.0), axis=0))


@triton.jit
def _next_token_weights(
    target_row_ptr,
    draft_row_ptr,
    column_of_ptr,
    start,
    vocab_size,
    draft_size,
    inverse_temperature,
    log_normaliser,
    draft_log_normaliser,
    scale,
    token,
    is_bonus,
    is_drawn,
    DRAFT: tl.constexpr,
    TILE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Weights of the token after the accepted ones, for a tile of columns, and their shift.

    The bonus token's are exp(x - shift) with the tile's own maximum. After a rejection they are
    [scale p - q]+ with shift 0; q is one-hot at `token` where the draft was not drawn from a
    law, and nothing for a placeholder.
    """
    column = start + tl.arange(0, TILE)
    x = _load_columns(target_row_ptr, start, vocab_size, TILE, COMPUTE) * inverse_temperature
    if is_bonus:
        # What is no number shows in the weights, and wins where the choice is greedy.
        shift = tl.max(_numbers_last(x), axis=0)
        weight = tl.exp(x - tl.where(shift == -_INFINITY, 0.0, shift))
    else:
        shift = tl.full([], 0.0, COMPUTE)
        weight = tl.exp(x - log_normaliser) * scale
        if DRAFT != _NO_DRAFT:
            if is_drawn:
                inside = column < draft_size
                where = column
                if column_of_ptr is not None:
                    where = tl.load(column_of_ptr + column, mask=column < vocab_size, other=-1)
                    inside = where >= 0
                if DRAFT == _LOGITS:
                    y = tl.load(draft_row_ptr + where, mask=inside, other=-_INFINITY).to(COMPUTE)
                    q = tl.exp(y * inverse_temperature - draft_log_normaliser)
                else:
                    q = tl.load(draft_row_ptr + where, mask=inside, other=0.0).to(COMPUTE)
                weight -= q
        # Comparisons that keep what is no number.
        weight = tl.where((weight < 0) | ((is_drawn == 0) & (column == token)), 0.0, weight)
    return tl.where(column < vocab_size, weight, 0.0), shift


@triton.jit
def _first_above(weights, value):
    """Index of the first weight where the running sum passes `value`; what is before it.

    Where rounding leaves none, the last that is not zero.
    """
    index = tl.arange(0, weights.shape[0])
    size: tl.constexpr = weights.shape[0]
    running = tl.cumsum(weights, axis=0)
    positive = weights > 0
    found = tl.min(tl.where(positive & (running > value), index, size), axis=0)
    last = tl.max(tl.where(positive, index, 0), axis=0)
    found = tl.where(found == size, last, found)
    before = tl.sum(tl.where(index < found, weights, 0.0), axis=0)
    return found, before


@triton.jit
def _with_neighbours(
    mass,
    code,
    most,
    neighbours_ptr,
    neighbours_stride,
    num_codes,
    row_ptrs,
    inverse_temperature,
    log_normaliser,
    NEIGHBOURS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """`[TOKENS]` masses, and those of each token's nearest codes that sum up to `most` or less.

    A token whose `code` is outside 0 to `num_codes` has no neighbours. `row_ptrs`: where the
    target's logits of each token begin.
    """
    is_code = (code >= 0) & (code < num_codes)
    passed = tl.zeros_like(mass)
    for begin in range(0, NEIGHBOURS, _NEIGHBOUR_CHUNK):
        near = begin + tl.arange(0, _NEIGHBOUR_CHUNK)
        entry = neighbours_ptr + code[:, None] * neighbours_stride + near[None, :]
        is_near = is_code[:, None] & (near < NEIGHBOURS)[None, :]
        ids = tl.load(entry, mask=is_near, other=-1).to(tl.int64)
        is_near = is_near & (ids >= 0)
        z = tl.load(row_ptrs[:, None] + ids, mask=is_near, other=-_INFINITY)
        z = z.to(COMPUTE) * inverse_temperature - log_normaliser[:, None]
        share = tl.where(is_near, tl.exp(z), 0.0)
        running = passed[:, None] + tl.cumsum(share, axis=1)
        mass += tl.sum(tl.where(running <= most[:, None], share, 0.0), axis=1)
        passed += tl.sum(share, axis=1)
    return mass


@triton.jit
def _drawn_column(
    sums,
    highest_shift,
    u,
    target_row_ptr,
    draft_row_ptr,
    column_of_ptr,
    num_tiles,
    vocab_size,
    draft_size,
    inverse_temperature,
    log_normaliser,
    draft_log_normaliser,
    scale,
    token,
    is_bonus,
    is_drawn,
    DRAFT: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The token after the accepted ones, drawn by the uniform u: first the tile, then its column.

    `sums` are the `[TILES]` float64 weights of whole tiles, with the shift `highest_shift`; what
    follows is as in `_next_token_weights`.
    """
    tile_index = tl.arange(0, TILES)
    total = tl.sum(sums, axis=0)
    if (is_bonus == 0) & (total <= 0):
        # p and q are equal up to rounding: the token comes from p.
        token = token * 0 - 1
        is_drawn = token >= 0
        scale = scale * 0 + 1
        for tile in range(num_tiles):
            weight, _ = _next_token_weights(
                target_row_ptr, draft_row_ptr, column_of_ptr,
                tile * TILE, vocab_size, draft_size, inverse_temperature,
                log_normaliser, draft_log_normaliser, scale, token, is_bonus, is_drawn,
                DRAFT, TILE, COMPUTE,
            )  # fmt: skip
            here = tl.sum(weight, axis=0).to(tl.float64)
            sums = tl.where(tile_index == tile, here, sums)
        total = tl.sum(sums, axis=0)
    value = u * total
    tile, before = _first_above(sums, value)
    weight, tile_shift = _next_token_weights(
        target_row_ptr, draft_row_ptr, column_of_ptr,
        tile * TILE, vocab_size, draft_size, inverse_temperature,
        log_normaliser, draft_log_normaliser, scale, token, is_bonus, is_drawn,
        DRAFT, TILE, COMPUTE,
    )  # fmt: skip
    weight = weight.to(tl.float64)
    value = value - before
    if is_bonus:
        value = value * tl.exp((highest_shift - tile_shift).to(tl.float64))
    offset, before = _first_above(weight, value)
    column = (tile * TILE + offset).to(tl.int32)
    return tl.where(total > 0, column, vocab_size - 1)


@triton.jit
def _at(values, indices, index):
    """One element of a vector that lives in registers."""
    return tl.sum(tl.where(indices == index, values, 0), axis=0)


@triton.jit
def _decide_kernel(
    token_ids_ptr,
    accepted_ptr,
    extra_ptr,
    done_ptr,
    tiles_ptr,
    shifts_ptr,
    statistics_ptr,
    plane_stride,
    target_ptr,
    target_stride,
    bonus_ptr,
    bonus_stride,
    draft_ptr,
    draft_stride,
    draft_ids_ptr,
    sampled_ptr,
    num_draft_ptr,
    temperatures_ptr,
    streams_ptr,
    positions_ptr,
    column_of_ptr,
    neighbours_ptr,
    neighbours_stride,
    num_codes,
    first_code,
    budget,
    given_ptr,
    scores_ptr,
    threshold,
    max_num_draft,
    num_blocks,
    num_draft_blocks,
    num_tiles,
    tiles_per_program,
    num_programs,
    vocab_size,
    draft_size,
    RAW: tl.constexpr,
    DRAFT: tl.constexpr,
    BLOCK_RULE: tl.constexpr,
    RELAXATION: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    MULTIPLICATIVE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Some tiles of one request; the last program of a request to get here finishes it."""
    request = tl.program_id(0)
    program = tl.program_id(1)
    first = _first_row(num_draft_ptr, request)
    num_draft = tl.load(num_draft_ptr + request).to(tl.int32)
    temperature = tl.load(temperatures_ptr + request).to(COMPUTE)
    stream = tl.load(streams_ptr + request)
    position = tl.load(positions_ptr + request)
    greedy = temperature == 0
    inverse_temperature = tl.full([], 1.0, COMPUTE)
    if RAW:
        inverse_temperature = 1.0 / tl.where(greedy, 1.0, temperature)

    # Every draft token's p, q and verdict. ---------------------------------------------------
    index = tl.arange(0, TOKENS)
    drafted = index < num_draft
    rows = first + index
    token = tl.load(draft_ids_ptr + rows, mask=drafted, other=-1).to(tl.int32)
    real = drafted & (token >= 0) & (token < vocab_size)
    known = tl.where(real, token, 0)
    blocks = tl.arange(0, BLOCKS)
    at = statistics_ptr + rows[:, None] * num_blocks + blocks[None, :]
    there = drafted[:, None] & (blocks < num_blocks)[None, :]
    draft_there = drafted[:, None] & (blocks < num_draft_blocks)[None, :]
    maxima = tl.load(at, mask=there, other=-_INFINITY)
    second = tl.load(at + plane_stride, mask=there, other=0.0)

    x = tl.load(target_ptr + rows * target_stride + known, mask=real, other=-_INFINITY)
    x = x.to(COMPUTE)
    allowed = real & (x > -_INFINITY)
    drawn = tl.zeros([TOKENS], tl.int1)
    if DRAFT != _NO_DRAFT:
        drawn = drafted
        if sampled_ptr is not None:
            drawn = drafted & (tl.load(sampled_ptr + rows, mask=drafted, other=0) != 0)
    own = tl.zeros([TOKENS], tl.int32)  # the target's most likely tokens, if greedy
    log_normaliser = tl.zeros([TOKENS], COMPUTE)
    draft_log_normaliser = tl.zeros([TOKENS], COMPUTE)
    p = tl.zeros([TOKENS], COMPUTE)
    q = tl.full([TOKENS], 1.0, COMPUTE)
    accept = tl.zeros([TOKENS], COMPUTE)
    exact = tl.zeros([TOKENS], COMPUTE)
    u = uniform(stream + index * 0, position + index * 0, index, _ACCEPT)
    if greedy:
        best = tl.argmax(maxima, axis=1)
        own = tl.sum(tl.where(blocks[None, :] == best[:, None], second, 0.0), axis=1).to(tl.int32)
        stands = real & (own == token)
        exact = stands.to(COMPUTE)
        accept = exact
    else:
        log_normaliser, shift = _log_normaliser(maxima, second)
        p = tl.where(real, tl.exp(x * inverse_temperature - log_normaliser), 0.0)
        draft_shift = tl.zeros([TOKENS], COMPUTE)
        draft_maxima = maxima
        if DRAFT != _NO_DRAFT:
            where = known
            inside = real & (known < draft_size)
            if column_of_ptr is not None:
                where = tl.load(column_of_ptr + known, mask=real, other=-1)
                inside = real & (where >= 0)
            y = tl.load(draft_ptr + rows * draft_stride + where, mask=inside, other=0.0)
            q = y.to(COMPUTE)
            if DRAFT == _LOGITS:
                draft_maxima = tl.load(at + 2 * plane_stride, mask=draft_there, other=-_INFINITY)
                draft_sums = tl.load(at + 3 * plane_stride, mask=draft_there, other=0.0)
                draft_log_normaliser, draft_shift = _log_normaliser(draft_maxima, draft_sums)
                q = tl.exp(q * inverse_temperature - draft_log_normaliser)
            q = tl.where(drawn, tl.where(inside, q, 0.0), 1.0)
        exact = tl.where(p < q, p / q, (p > 0).to(COMPUTE))
        mass = p
        claim = q
        if RELAXATION == _NEIGHBOURS:
            code = tl.where(allowed, token - first_code, -1)
            most = tl.full([TOKENS], 0.0, COMPUTE) + budget
            if MULTIPLICATIVE:
                most = p * budget
            mass = _with_neighbours(
                p, code, most, neighbours_ptr, neighbours_stride, num_codes,
                target_ptr + rows * target_stride, inverse_temperature, log_normaliser,
                NEIGHBOURS, COMPUTE,
            )  # fmt: skip
        if RELAXATION == _GROUPS:
            sums = tl.load(at + 4 * plane_stride, mask=there, other=0.0)
            sums = tl.sum(sums * tl.exp(maxima - shift[:, None]), axis=1)
            mass = tl.where(allowed, sums * tl.exp(shift - log_normaliser), 0.0)
            if DRAFT != _NO_DRAFT:
                sums = tl.load(at + 5 * plane_stride, mask=draft_there, other=0.0)
                if DRAFT == _LOGITS:
                    sums = sums * tl.exp(draft_maxima - draft_shift[:, None])
                    group_q = tl.sum(sums, axis=1) * tl.exp(draft_shift - draft_log_normaliser)
                else:
                    group_q = tl.sum(sums, axis=1)
                claim = tl.where(drawn, group_q, 1.0)
        accept = tl.where(mass < claim, mass / claim, (mass > 0).to(COMPUTE))
        # Compared as wide as the uniforms are.
        stands = u * claim.to(tl.float64) < mass.to(tl.float64)
        if RELAXATION == _GROUPS:
            accept = tl.maximum(accept, exact)
            stands = stands | (u * q.to(tl.float64) < p.to(tl.float64))
        if RELAXATION == _GIVEN:
            accept = tl.load(given_ptr + rows, mask=drafted, other=0.0).to(COMPUTE)
            stands = u < accept.to(tl.float64)
        if RELAXATION == _NEIGHBOURS or RELAXATION == _GROUPS:
            accept = tl.where(allowed, accept, 0.0)
            stands = stands & allowed
        stands = stands & real
    if scores_ptr is not None:
        score = tl.load(scores_ptr + rows, mask=allowed, other=-_INFINITY)
        passes = allowed & (score >= threshold)
        accept = tl.where(passes, 1.0, accept)
        stands = stands | passes

    # How many stand, and which row the next token comes from. -------------------------------
    accepted = tl.min(tl.where(drafted & (stands == 0), index, num_draft), axis=0)
    ratio = tl.full([TOKENS], 1.0, COMPUTE)  # P after each row
    residual_before = tl.full([TOKENS], 1.0, COMPUTE)  # P before each row
    u_draw = uniform(stream, position, position * 0, _RESAMPLE)
    if BLOCK_RULE:
        if greedy == 0:
            single = tl.where(q > 0, p / q, tl.where(p > 0, _INFINITY, 0.0))
            running = tl.full([], 1.0, COMPUTE)
            for i in range(num_draft):
                residual_before = tl.where(index == i, running, residual_before)
                step = running * _at(single, index, i)
                step = tl.where(step > 1, 1.0, step)
                running = tl.where(running > 0, step, running)
                ratio = tl.where(index == i, running, ratio)
            if DRAFT == _NO_DRAFT:
                # All but the draft token's own share is left: the sum needs no pass.
                left = tl.where(p > 1, 0.0, 1.0 - p) * residual_before
                accepted = _longest_acceptable(index, num_draft, token, ratio, left, u)

    all_rows: tl.constexpr = BLOCK_RULE and DRAFT != _NO_DRAFT
    lowest = accepted
    highest = accepted
    if all_rows:
        if greedy == 0:
            lowest = accepted * 0
            highest = num_draft
    tiles = tiles_ptr + request.to(tl.int64) * num_tiles
    row_tiles = tl.num_programs(0).to(tl.int64) * num_tiles
    shifts = shifts_ptr + request.to(tl.int64) * num_tiles
    for i in range(lowest, highest + 1):
        is_bonus = i == num_draft
        row = first + i
        target_row = target_ptr + row * target_stride
        draft_row = target_ptr  # not read
        if DRAFT != _NO_DRAFT:
            draft_row = draft_ptr + row * draft_stride
        if is_bonus:
            target_row = bonus_ptr + request.to(tl.int64) * bonus_stride
        if is_bonus | (greedy == 0):
            plane = tiles
            if all_rows:
                plane = tiles + i * row_tiles
            normaliser = _at(log_normaliser, index, i)
            draft_normaliser = _at(draft_log_normaliser, index, i)
            scale = _at(residual_before, index, i)
            this_token = _at(token, index, i)
            is_drawn = (_at(drawn.to(tl.int32), index, i) != 0) & (this_token >= 0)
            for step in range(tiles_per_program):
                tile = program * tiles_per_program + step
                if tile < num_tiles:
                    weight, tile_shift = _next_token_weights(
                        target_row, draft_row, column_of_ptr,
                        tile * TILE, vocab_size, draft_size, inverse_temperature,
                        normaliser, draft_normaliser, scale, this_token, is_bonus, is_drawn,
                        DRAFT, TILE, COMPUTE,
                    )  # fmt: skip
                    tl.store(plane + tile, tl.sum(weight, axis=0))
                    if is_bonus:
                        tl.store(shifts + tile, tile_shift)

    # Only the last program of the request goes on. -------------------------------------------
    tl.debug_barrier()
    if tl.atomic_add(done_ptr + request, 1, sem="acq_rel", scope="gpu") != num_programs - 1:
        return
    tile_index = tl.arange(0, TILES)
    is_tile = tile_index < num_tiles
    if all_rows:
        if greedy == 0:
            left = tl.zeros([TOKENS], COMPUTE)
            for i in range(num_draft):
                sums = tl.load(
                    tiles + i * row_tiles + tile_index, mask=is_tile, other=0.0, volatile=True
                )
                left = tl.where(index == i, tl.sum(sums.to(tl.float64), 0).to(COMPUTE), left)
            accepted = _longest_acceptable(index, num_draft, token, ratio, left, u)
    is_bonus = accepted == num_draft
    next_token = _at(own, index, accepted)
    if is_bonus | (greedy == 0):
        row = first + accepted
        target_row = target_ptr + row * target_stride
        if is_bonus:
            target_row = bonus_ptr + request.to(tl.int64) * bonus_stride
        draft_row = target_ptr  # not read
        if DRAFT != _NO_DRAFT:
            draft_row = draft_ptr + row * draft_stride
        plane = tiles
        if all_rows:
            plane = tiles + accepted * row_tiles
        sums = tl.load(plane + tile_index, mask=is_tile, other=0.0, volatile=True).to(tl.float64)
        if is_bonus & greedy:
            top = tl.load(shifts + tile_index, mask=is_tile, other=-_INFINITY, volatile=True)
            tile = tl.argmax(top, axis=0)
            logits = _load_columns(target_row, tile * TILE, vocab_size, TILE, COMPUTE)
            next_token = (tile * TILE + tl.argmax(_numbers_last(logits), axis=0)).to(tl.int32)
        else:
            highest_shift = tl.full([], 0.0, COMPUTE)
            if is_bonus:
                top = tl.load(shifts + tile_index, mask=is_tile, other=-_INFINITY, volatile=True)
                highest_shift = tl.max(top, axis=0)
                sums = sums * tl.exp((top - highest_shift).to(tl.float64))
                sums = tl.where(is_tile, sums, 0.0)
            normaliser = _at(log_normaliser, index, accepted)
            draft_normaliser = _at(draft_log_normaliser, index, accepted)
            scale = _at(residual_before, index, accepted)
            this_token = _at(token, index, accepted)
            is_drawn = (_at(drawn.to(tl.int32), index, accepted) != 0) & (this_token >= 0)
            next_token = _drawn_column(
                sums, highest_shift, u_draw, target_row, draft_row, column_of_ptr,
                num_tiles, vocab_size, draft_size, inverse_temperature,
                normaliser, draft_normaliser, scale, this_token, is_bonus, is_drawn,
                DRAFT, TILES, TILE, COMPUTE,
            )  # fmt: skip

    text = tl.where(index < accepted, token, -1)
    text = tl.where(index == accepted, next_token, text)
    out = token_ids_ptr + request.to(tl.int64) * (max_num_draft + 1)
    tl.store(out + index, text.to(tl.int64), mask=index <= max_num_draft)
    tl.store(accepted_ptr + request, accepted.to(tl.int64))
    if extra_ptr is not None:
        extra = accept - exact
        extra = tl.where((extra > 0) & (index <= accepted) & real, extra, 0.0)
        tl.store(extra_ptr + rows, extra, mask=drafted)


@triton.jit
def _longest_acceptable(index, num_draft, token, ratio, left, u):
    """Length of the longest prefix whose uniform is below h, see `block_verification`.

    Args:
        index: `[TOKENS]`.
        num_draft: Draft tokens of the request.
        token: `[TOKENS]`, -1 for placeholders and past the last.
        ratio: `[TOKENS]` P after each row.
        left: `[TOKENS]` mass of [P p - q]+ at each row, with P before it.
        u: `[TOKENS]` uniforms.
    """
    longest = num_draft * 0
    for i in range(num_draft):
        capped = _at(ratio, index, i)
        h = capped
        follows = (i + 1 < num_draft) & (_at(token, index, i + 1) >= 0)
        if follows & (capped > 0) & (capped < 1):
            mass = _at(left, index, i + 1)
            h = mass / (mass + (1.0 - capped))
        if _at(u, index, i) < h.to(tl.float64):
            longest = i + 1
    return longest
