"""The probe, a coarse stage of two heads a token: see :mod:`..coarse`, and ``..reference.probe_block_scores``.

    two heads of each row -> scores of the sample -> threshold and cap of each row -> scores of blocks

Queries are the rows of the product and tokens its columns, so that a block is added up by threads that are neighbours.
Floor: 4 * S * T * D operations, 34 GFLOP for 1024 queries at 64K tokens, 26 microseconds at the 1326 TFLOP/s of a large
float8 product, and beside it seven instructions for each of 67M scores, 18 microseconds.  Of the two heads it is q,
read once, 3 microseconds in float8, 6 in bfloat16, of the sample and its threshold next to nothing.  It takes 62 for
the scores (:mod:`.probe_hopper`), 7, 6 and 6 (an H100, docs/kernels.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .group import clear_counts
from .keys import HIDDEN_BITS, HIDDEN_KEY, key_score, score_bits, stored_key
from .kth import how_many, one_of, tile_columns
from .operands import FP8_NONE, dot, load_factor, load_operand
from .overlap import wait_for_kernel_before
from .score import load_vectors
from .visible import row_coordinates, row_segment, row_window

_INF = tl.constexpr(float("inf"))


@triton.jit
def _as_float8(x):
    """float32 rounded to what float8_e4m3fn holds, halves to even; NaN where that is nothing finite."""
    exponent = ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    # The spacing of numbers that large is 2^step; a sum with 1.5 * 2^(23 + step) is rounded to it.
    step = tl.maximum(exponent - 3, -9)
    anchor = (((step + 150) << 23) | 0x400000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) <= 448.0, (x + anchor) - anchor, float("nan"))


@triton.jit(do_not_specialize=["first_row", "S"])
def two_heads_kernel(
    q_ptr, q_sb, q_ss, q_sh, q_sd, w_ptr, w_sr, heads_ptr, first_row, S,
    H: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, STEP: tl.constexpr,
    FP8: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """heads_ptr [rows, 2, D] gets the two heads of a chunk's rows, grid (rows): ``reference.probe_queries``."""
    wait_for_kernel_before(OVERLAP)
    row = tl.program_id(0)
    _, batch, query_index = row_coordinates(first_row, row, S)
    d = tl.arange(0, PADDED_D)
    at = q_ptr + batch * q_sb + query_index * q_ss + d.to(tl.int64) * q_sd
    w_ptr += row.to(tl.int64) * w_sr
    plus = tl.zeros([PADDED_D], tl.float32)
    minus = tl.zeros([PADDED_D], tl.float32)
    # Head by head, so that how q is aligned does not decide in which order they are added up.
    for first in range(0, H, STEP):
        for i in tl.static_range(STEP):
            h = first + i
            query = load_operand(at + h.to(tl.int64) * q_sh, (d < D) & (h < H), FP8).to(tl.float32)
            weight = tl.load(w_ptr + h, mask=h < H, other=0.0)
            plus += query * tl.maximum(weight, 0.0, propagate_nan=tl.PropagateNan.ALL)
            minus += query * tl.maximum(-weight, 0.0, propagate_nan=tl.PropagateNan.ALL)
    greatest = tl.maximum(tl.max(tl.abs(plus), axis=0), tl.max(tl.abs(minus), axis=0))
    exponent = (greatest.to(tl.int32, bitcast=True) >> 23) & 255
    shift = tl.where(greatest < _INF, tl.minimum(134 - exponent, 100), 0)
    unit = ((shift + 127) << 23).to(tl.float32, bitcast=True)
    plus = plus * unit
    minus = minus * unit
    if FP8 != FP8_NONE:
        plus = _as_float8(plus)
        minus = _as_float8(minus)
    out = heads_ptr + row.to(tl.int64) * 2 * D + d
    tl.store(out, plus.to(heads_ptr.dtype.element_ty), mask=d < D)
    tl.store(out + D, minus.to(heads_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _load_heads(heads_ptr, row, wanted, first, D: tl.constexpr, TILE_D: tl.constexpr):
    """Dims [first, first + TILE_D) of the two heads of ``row`` [ROWS], 0 where not ``wanted``."""
    d = first + tl.arange(0, TILE_D)
    at = heads_ptr + row.to(tl.int64)[:, None] * (2 * D) + d[None, :]
    wanted = wanted[:, None] & (d < D)[None, :]
    return tl.load(at, mask=wanted, other=0.0), tl.load(at + D, mask=wanted, other=0.0)


@triton.jit
def _probed(
    plus, minus, heads_ptr, row, wanted, k_ptr, k_st, k_sd, scale_ptr, scale_st, k_weight_ptr, k_weight_st,
    token, exists,
    D: tl.constexpr, TILE_D: tl.constexpr, FP8: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """p float32 [ROWS, TILE] of ``token`` int64 [TILE] where it ``exists``; pointers are the batch's.

    ``plus`` and ``minus`` are the whole heads where D fits one TILE_D, else their first part.
    """
    ROWS: tl.constexpr = plus.shape[0]
    TILE: tl.constexpr = token.shape[0]
    positive = tl.zeros([ROWS, TILE], tl.float32)
    negative = tl.zeros([ROWS, TILE], tl.float32)
    keys = tl.trans(load_vectors(k_ptr + token * k_st, k_sd, exists, 0, D, TILE_D, FP8))
    positive = dot(plus, keys, positive, WIDEN)
    negative = dot(minus, keys, negative, WIDEN)
    if D > TILE_D:
        for first in range(TILE_D, D, TILE_D):
            keys = tl.trans(load_vectors(k_ptr + token * k_st, k_sd, exists, first, D, TILE_D, FP8))
            plus, minus = _load_heads(heads_ptr, row, wanted, first, D, TILE_D)
            positive = dot(plus, keys, positive, WIDEN)
            negative = dot(minus, keys, negative, WIDEN)
    scale = load_factor(scale_ptr, 0, scale_st, 0, token, exists)
    factor = load_factor(k_weight_ptr, 0, k_weight_st, 0, token, exists)
    if scale is not None:
        scale = scale[None, :]
    if factor is not None:
        factor = factor[None, :]
    return difference_of_relus(positive, negative, scale, factor)


@triton.jit
def difference_of_relus(x, y, scale, factor):
    """``factor`` * (ReLU(scale x) - ReLU(scale y)); a maximum runs at half the rate of what stands here instead.

    Where neither is above 0 it is exactly 0, also where a product and a sum become one operation.
    """
    along = x - y
    across = tl.abs(x) - tl.abs(y)
    if scale is not None:
        probed = (along + across * tl.where(scale < 0.0, -1.0, 1.0)) * (scale * 0.5)
    else:
        probed = (along + across) * 0.5
    if factor is not None:
        probed = probed * factor
    return probed


@triton.jit
def share_of_cap(probed, threshold, inverse_cap, ONE_INSTRUCTION: tl.constexpr):
    """(probed - threshold) / cap between 0 and 1, 0 for a NaN; the cap is a power of two, so this is exact."""
    offset = -threshold * inverse_cap
    if ONE_INSTRUCTION:
        share = tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;",
            "=f,f,f,f",
            [probed, inverse_cap, offset],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        share = probed * inverse_cap + offset
        share = tl.minimum(tl.where(share > 0.0, share, 0.0), 1.0)
    return share


@triton.jit
def inverse_of(cap):
    """1 / cap for a power of two, 0 for 0."""
    exponent = cap.to(tl.int32, bitcast=True) >> 23
    return tl.where(exponent > 0, (254 - exponent) << 23, 0).to(tl.float32, bitcast=True)


@triton.jit
def rows_of_group(
    number, start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, first_row, rows_per_batch, S, T, ROWS: tl.constexpr
):
    """(batch, query, row, which are some, start, end) of the ``number``-th group of ROWS rows of a chunk.

    Rows past the batch's last are its last again.
    """
    groups = tl.cdiv(rows_per_batch, ROWS)
    batch_here = number // groups
    batch = (first_row // S + batch_here).to(tl.int64)
    each = number % groups * ROWS + tl.arange(0, ROWS)
    wanted = each < rows_per_batch
    each = tl.minimum(each, rows_per_batch - 1)
    query = (first_row % S).to(tl.int64) + each
    row = batch_here * rows_per_batch + each
    start, end = row_window(start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, query * 0 + batch, query, T)
    return batch, query, row, wanted, start, end


@triton.jit
def _visible(
    token, exists, query, start, end, valid_ptr, valid_st, mask_ptr, mask_ss, mask_st, k_segment_ptr, k_segment_st,
    segment,
):  # fmt: skip
    """Whether each row sees each ``token`` [TILE], as [ROWS, TILE]; pointers are the batch's.

    What is a token's alone is read once for all rows, :func:`.visible.visible_tokens` would read it for each.
    """
    visible = exists[None, :] & (token[None, :] >= start[:, None]) & (token[None, :] < end[:, None])
    if valid_ptr is not None:
        visible = visible & (tl.load(valid_ptr + token * valid_st, mask=exists, other=0) != 0)[None, :]
    if k_segment_ptr is not None:
        other = tl.load(k_segment_ptr + token * k_segment_st, mask=exists, other=0)
        visible = visible & (other.to(tl.int64)[None, :] == segment[:, None])
    if mask_ptr is not None:
        at = mask_ptr + (query * mask_ss)[:, None] + (token * mask_st)[None, :]
        visible = visible & (tl.load(at, mask=visible, other=0) != 0)
    return visible


@triton.jit(
    do_not_specialize=["first_row", "rows_per_batch", "S", "T", "size", "stride"],
    do_not_specialize_on_alignment=["scale_ptr", "k_weight_ptr", "mask_ptr"],
)
def probe_sample_kernel(
    heads_ptr,
    k_ptr, k_sb, k_st, k_sd,
    scale_ptr, scale_sb, scale_st,
    k_weight_ptr, k_weight_sb, k_weight_st,
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    valid_ptr, valid_sb, valid_st,
    mask_ptr, mask_sb, mask_ss, mask_st,
    q_segment_ptr, q_segment_sb, q_segment_ss,
    k_segment_ptr, k_segment_sb, k_segment_st,
    scores_ptr, first_row, rows_per_batch, S, T, pitch, size, stride,
    JITTER: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE_D: tl.constexpr, TILE: tl.constexpr,
    FP8: tl.constexpr, WIDEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """scores_ptr int32 [rows, pitch] gets p of the sample's ``size`` tokens, grid (batches * row groups * tiles)."""
    wait_for_kernel_before(OVERLAP)
    tiles = tl.cdiv(size, TILE)
    batch, query, row, wanted, start, end = rows_of_group(
        tl.program_id(0) // tiles, start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss,
        first_row, rows_per_batch, S, T, ROWS,
    )  # fmt: skip
    segment = row_segment(q_segment_ptr, q_segment_sb, q_segment_ss, batch, query)
    valid_ptr = of_batch(valid_ptr, valid_sb, batch)
    mask_ptr = of_batch(mask_ptr, mask_sb, batch)
    k_segment_ptr = of_batch(k_segment_ptr, k_segment_sb, batch)
    scale_ptr = of_batch(scale_ptr, scale_sb, batch)
    k_weight_ptr = of_batch(k_weight_ptr, k_weight_sb, batch)
    number = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    token = number.to(tl.int64) * stride + number * JITTER % stride
    exists = (number < size) & (token < T)
    plus, minus = _load_heads(heads_ptr, row, wanted, 0, D, TILE_D)
    probed = _probed(
        plus, minus, heads_ptr, row, wanted, k_ptr + batch * k_sb, k_st, k_sd, scale_ptr, scale_st,
        k_weight_ptr, k_weight_st, token, exists, D, TILE_D, FP8, WIDEN,
    )  # fmt: skip
    visible = _visible(
        token, exists, query, start, end, valid_ptr, valid_st, mask_ptr, mask_ss, mask_st,
        k_segment_ptr, k_segment_st, segment,
    )  # fmt: skip
    # A NaN tells nothing of the others.
    visible = visible & (probed == probed)
    at = scores_ptr + row.to(tl.int64)[:, None] * pitch + number[None, :]
    tl.store(at, score_bits(probed, visible), mask=wanted[:, None] & (number < size)[None, :])


@triton.jit(do_not_specialize=["size", "rank"])
def threshold_kernel(
    scores_ptr, thresholds_ptr, pitch, size, rank,
    TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """thresholds_ptr float32 [rows, 2] gets the threshold and the cap of each row, grid (rows).

    The rank is small, below 48, so the best keys are taken one after another.
    """
    wait_for_kernel_before(OVERLAP)
    row = tl.program_id(0)
    column = tile_columns(0, TILE)
    bits = tl.load(scores_ptr + row.to(tl.int64) * pitch + column, mask=column < size, other=HIDDEN_BITS)
    keys = stored_key(bits)
    best = tl.max(keys, axis=None)
    half = best
    low = best
    # Both ranks where fewer are visible: those of as many as there are.
    one = one_of(size)
    rank = tl.minimum(rank, how_many(keys != HIDDEN_KEY, one))
    taken = rank * 0
    # Equal ones go together, so there may be less to do; a loop that ends then is optimised away by Triton 3.6 and 3.7.
    for _ in range(rank):
        low = tl.where(taken < rank, best, low)
        half = tl.where(taken < (rank + 1) // 2, best, half)
        taken += how_many(keys == best, one)
        keys = tl.where(keys == best, HIDDEN_KEY, keys)
        best = tl.max(keys, axis=None)
    threshold = 0.0
    cap = 0.0
    if rank > 0:
        # A number without its mantissa is the power of two below it; no inf or NaN, nothing below 2^-126 or from 2^127.
        threshold = key_score(low)
        exponent = (key_score(half) - threshold).to(tl.int32, bitcast=True) >> 23
        cap = tl.where((exponent > 0) & (exponent < 254), exponent << 23, 0).to(tl.float32, bitcast=True)
    tl.store(thresholds_ptr + 2 * row, threshold)
    tl.store(thresholds_ptr + 2 * row + 1, cap)


@triton.jit
def with_parts_before(begins, total, best, eligible, total_here, best_here, some_here):
    """(total, best, eligible) of a block so far, of which a tile is a part, the first if it ``begins`` the block."""
    total = tl.where(begins, 0.0, total) + total_here
    best = greater(tl.where(begins, float("-inf"), best), best_here)
    return total, best, tl.maximum(tl.where(begins, 0, eligible), some_here)


@triton.jit
def sees_blocks(block, start, end, SIZE: tl.constexpr):
    """Whether windows touch a block of SIZE tokens, all int64: an outer one's flags say nothing elsewhere."""
    low = block * SIZE
    return (start < end) & (low + SIZE > start) & (low < end)


@triton.jit
def worth(total, best, threshold, cap):
    """What blocks are worth: ``total`` shares of the cap, and half of what the best has above the threshold."""
    above = best - threshold
    return tl.where(above > 0.0, total * cap + above * 0.5, above)


@triton.jit
def of_batch(pointer, stride, batch):
    """``pointer`` at a batch's values; None where there are none."""
    # Triton 3.6 returns a None of its own, not one that was an argument.
    moved = None
    if pointer is not None:
        moved = pointer + batch * stride
    return moved


@triton.jit
def greater(a, b):
    """The greater of two, NaN where one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


# How a mask is read would otherwise decide which threads add up a block, and a mask that is expanded has other strides
# than one that is not.
@triton.jit(
    do_not_specialize=[
        "mask_sb", "mask_ss", "mask_st", "first_row", "rows_per_batch", "splits", "S", "T", "M", "outer_blocks",
        "counts",
    ],
    do_not_specialize_on_alignment=["scale_ptr", "k_weight_ptr", "mask_ptr"],
)  # fmt: skip
def probe_blocks_kernel(
    heads_ptr, thresholds_ptr,
    k_ptr, k_sb, k_st, k_sd,
    scale_ptr, scale_sb, scale_st,
    k_weight_ptr, k_weight_sb, k_weight_st,
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    valid_ptr, valid_sb, valid_st,
    mask_ptr, mask_sb, mask_ss, mask_st,
    q_segment_ptr, q_segment_sb, q_segment_ss,
    k_segment_ptr, k_segment_sb, k_segment_st,
    outer_flag_ptr, listed_ptr, listed_count_ptr,
    block_scores_ptr, counts_ptr, first_row, rows_per_batch, splits, S, T, M, outer_blocks, pitch, counts,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, PADDED_BLOCK: tl.constexpr, OUTER_SIZE: tl.constexpr,
    ROWS: tl.constexpr, TILE_D: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, FP8: tl.constexpr,
    WIDEN: tl.constexpr, ONE_INSTRUCTION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Scores of blocks, grid (batches * groups of ROWS rows * splits).

    block_scores_ptr int32 [rows, pitch] as :func:`.coarse.coarse_kernel` has it; counts_ptr likewise.  A program goes
    over its share of the blocks that its rows' windows touch, a tile of tokens at a time: several whole blocks, each
    padded to PADDED_BLOCK, a power of two, or a part of one.

    With the lists of :func:`.levels.list_outer_kernel` it is a share of its group's outer blocks of OUTER_SIZE tokens,
    and blocks in those that a row does not keep are HIDDEN_BITS for it.
    """
    wait_for_kernel_before(OVERLAP)
    if counts_ptr is not None:
        clear_counts(counts_ptr, counts, tl.arange(0, 128))
    batch, query, row, wanted, start, end = rows_of_group(
        tl.program_id(0) // splits, start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss,
        first_row, rows_per_batch, S, T, ROWS,
    )  # fmt: skip
    segment = row_segment(q_segment_ptr, q_segment_sb, q_segment_ss, batch, query)
    valid_ptr = of_batch(valid_ptr, valid_sb, batch)
    mask_ptr = of_batch(mask_ptr, mask_sb, batch)
    k_segment_ptr = of_batch(k_segment_ptr, k_segment_sb, batch)
    scale_ptr = of_batch(scale_ptr, scale_sb, batch)
    k_weight_ptr = of_batch(k_weight_ptr, k_weight_sb, batch)
    k_ptr += batch * k_sb
    BLOCKS: tl.constexpr = TILE // PADDED_BLOCK if PADDED_BLOCK < TILE else 1
    PARTS: tl.constexpr = PADDED_BLOCK // TILE if PADDED_BLOCK > TILE else 1
    UNIT: tl.constexpr = BLOCKS * BLOCK_SIZE
    look: tl.constexpr = (
        valid_ptr is not None or mask_ptr is not None or k_segment_ptr is not None or PADDED_BLOCK != BLOCK_SIZE
    )
    # What any row sees is in units [first, past), and every row sees whole what is in [all_start, all_end).
    seen = start < end
    all_start = tl.max(start, axis=0)
    all_end = tl.min(end, axis=0)
    first = tl.min(tl.where(seen, start, T), axis=0) // UNIT
    past = (tl.max(tl.where(seen, end, 0), axis=0) + UNIT - 1) // UNIT
    # Units of an outer block, which begins with a unit; the last one may reach past it.
    UNITS: tl.constexpr = (OUTER_SIZE // BLOCK_SIZE + BLOCKS - 1) // BLOCKS
    if listed_ptr is not None:
        group = tl.program_id(0) // splits
        listed_ptr += group.to(tl.int64) * outer_blocks
        first = first * 0
        past = first + tl.load(listed_count_ptr + group)
    share = (tl.maximum(past - first, 0) + splits - 1) // splits
    first += tl.program_id(0) % splits * share
    past = tl.minimum(first + share, past)
    if listed_ptr is not None:
        first *= UNITS
        past *= UNITS

    plus, minus = _load_heads(heads_ptr, row, wanted, 0, D, TILE_D)
    threshold = tl.load(thresholds_ptr + 2 * row)[:, None]
    cap = tl.load(thresholds_ptr + 2 * row + 1)[:, None]
    inverse_cap = inverse_of(cap)
    column = tl.arange(0, TILE)
    # A loop over parts of blocks, so that one tile is worked on while others are on their way.
    total = tl.zeros([ROWS, BLOCKS], tl.float32)
    best = tl.zeros([ROWS, BLOCKS], tl.float32) - _INF
    eligible = tl.zeros([ROWS, BLOCKS], tl.int32)
    for i in tl.range(first * PARTS, past * PARTS, num_stages=STAGES):
        first_block = i // PARTS * BLOCKS
        past_block = M
        if listed_ptr is not None:
            outer = tl.load(listed_ptr + i // PARTS // UNITS).to(tl.int64)
            first_block = outer * (OUTER_SIZE // BLOCK_SIZE) + i // PARTS % UNITS * BLOCKS
            past_block = tl.minimum((outer + 1) * (OUTER_SIZE // BLOCK_SIZE), M)
        block = first_block + column // PADDED_BLOCK
        inside = i % PARTS * TILE + column % PADDED_BLOCK
        token = block * BLOCK_SIZE + inside
        exists = (inside < BLOCK_SIZE) & (token < T)
        if listed_ptr is not None:
            exists = exists & (block < past_block)
        probed = _probed(
            plus, minus, heads_ptr, row, wanted, k_ptr, k_st, k_sd, scale_ptr, scale_st, k_weight_ptr, k_weight_st,
            token, exists, D, TILE_D, FP8, WIDEN,
        )  # fmt: skip
        some = tl.full([ROWS, BLOCKS], 1, tl.int32)
        unit = first_block * BLOCK_SIZE
        if look or (unit < all_start) | (unit + UNIT > all_end):
            visible = _visible(
                token, exists, query, start, end, valid_ptr, valid_st, mask_ptr, mask_ss, mask_st,
                k_segment_ptr, k_segment_st, segment,
            )  # fmt: skip
            probed = tl.where(visible, probed, -_INF)
            some = tl.max(tl.reshape(visible.to(tl.int32), [ROWS, BLOCKS, TILE // BLOCKS]), axis=2)
        shares = share_of_cap(probed, threshold, inverse_cap, ONE_INSTRUCTION)
        shares = tl.sum(tl.reshape(shares, [ROWS, BLOCKS, TILE // BLOCKS]), axis=2)
        greatest = tl.reduce(tl.reshape(probed, [ROWS, BLOCKS, TILE // BLOCKS]), 2, greater)
        if PARTS == 1:
            total = shares
            best = greatest
            eligible = some
        else:
            total, best, eligible = with_parts_before(i % PARTS == 0, total, best, eligible, shares, greatest, some)
        if PARTS == 1 or i % PARTS == PARTS - 1:
            scores = worth(total, best, threshold, cap)
            shown = eligible != 0
            if listed_ptr is not None:
                touched = sees_blocks(outer, start, end, OUTER_SIZE)
                flag = tl.load(outer_flag_ptr + row.to(tl.int64) * outer_blocks + outer, mask=touched, other=0)
                shown = shown & (flag != 0)[:, None]
            number = first_block + tl.arange(0, BLOCKS)
            at = block_scores_ptr + row.to(tl.int64)[:, None] * pitch + number[None, :]
            tl.store(at, score_bits(scores, shown), mask=wanted[:, None] & (number < past_block)[None, :])
