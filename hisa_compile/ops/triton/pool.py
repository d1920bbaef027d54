"""Block representatives: the mean of each block's valid keys, their spread, where they lie, their segments' bounds.

Floor: the keys are read once, 8 MiB of float8 at 64K tokens, 3 microseconds at the memory's 3 TB/s; it takes 7 there
and 55 at 1M tokens, where the floor is 45 (an H100; docs/kernels.md has the sizes and the run).  Spreads need the means
first, so a second look at the keys, from the L2 cache: 13 microseconds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .operands import load_factor, load_operand
from .overlap import wait_for_kernel_before


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _sum_rows(x):
    """Sum of [n, m] over its rows, n a power of two, neighbours first.

    ``tl.sum`` adds in an order that follows the layout of the load, hence the alignment of the keys; here a key tensor
    and a slice of a larger one give the same bits.
    """
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    if ROWS == 1:
        total = tl.reshape(x, [COLUMNS])
    else:
        even, odd = tl.split(tl.permute(tl.reshape(x, [ROWS // 2, 2, COLUMNS]), (0, 2, 1)))
        total = _sum_rows(even + odd)
    return total


@triton.jit
def _are_valid(valid_ptr, valid_sb, valid_st, batch, token, exists):
    """Which of the tokens that there are count."""
    valid = exists
    if valid_ptr is not None:
        valid = exists & (tl.load(valid_ptr + batch * valid_sb + token * valid_st, mask=exists, other=0) != 0)
    return valid


@triton.jit
def _load_keys(
    k_ptr, k_sb, k_st, k_sd,
    scale_ptr, scale_sb, scale_st,
    k_weight_ptr, k_weight_sb, k_weight_st,
    batch, token, valid, d, D: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """|k_weight| * k_scale * k of some tokens, float32; a key that is not valid is never read, and counts as 0."""
    wanted = valid[:, None] & (d < D)[None, :]
    keys = load_operand(k_ptr + batch * k_sb + token[:, None] * k_st + d[None, :] * k_sd, wanted, FP8)
    keys = keys.to(tl.float32)
    scale = load_factor(scale_ptr, scale_sb, scale_st, batch, token, valid)
    if k_weight_ptr is not None:
        magnitude = tl.abs(load_factor(k_weight_ptr, k_weight_sb, k_weight_st, batch, token, valid))
        if scale_ptr is not None:
            keys = keys * (scale * magnitude)[:, None]
        else:
            keys = keys * magnitude[:, None]
    elif scale_ptr is not None:
        keys = keys * scale[:, None]
    return keys


@triton.jit
def _power_of_two_root(x, MOST: tl.constexpr):
    """``reference.power_of_two_root`` of float32."""
    # A NaN may have a sign.
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 255
    power = ((((exponent - 127) >> 1) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(exponent == 255, x, tl.where(exponent > 0, tl.minimum(power, MOST), 0.0))


@triton.jit(do_not_specialize=["T", "M"])
def pool_kernel(
    k_ptr, k_sb, k_st, k_sd,
    scale_ptr, scale_sb, scale_st,
    k_weight_ptr, k_weight_sb, k_weight_st,
    valid_ptr, valid_sb, valid_st,
    k_segment_ptr, k_segment_sb, k_segment_st,
    means_ptr, last_valid_ptr, low_ptr, high_ptr,
    T, M,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, PADDED_D: tl.constexpr, TILE: tl.constexpr, FP8: tl.constexpr,
    SPREAD_FACTOR: tl.constexpr, MOST_SPREAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program a block, grid (B * M).

    means_ptr [B, M, D] gets the mean over the valid keys times |k_weight| * k_scale, accumulated in float32, rounded
    once to the buffer's dtype; 0 for a block with no valid key.  Where it is None no key is read.  With
    SPREAD_FACTOR, which is SPREAD_SCALE / D, or 0 for none, it is [B, M, 2 D]: behind each mean the block's spread, see
    ``reference.block_representatives``, whose finite values are at most MOST_SPREAD.  last_valid_ptr int32
    [B, T] gets, where key_valid is given, the last valid position of the token's block that is not after the token, or
    -1.  low_ptr and high_ptr int64 [B, M] get, where segments are given, the least and the greatest segment of the
    block's valid keys; the least is above the greatest where it has none.
    """
    wait_for_kernel_before(OVERLAP)
    block = tl.program_id(0).to(tl.int64)
    batch = block // M
    first = (block % M) * BLOCK_SIZE
    d = tl.arange(0, PADDED_D).to(tl.int64)
    totals = tl.zeros([TILE, PADDED_D], tl.float32)
    count = 0.0
    last = -1
    low = first * 0 + 9223372036854775807
    high = -1 - low
    # Unrolled, so that the loads of several steps are under way at once.
    for offset in tl.range(0, BLOCK_SIZE, TILE, loop_unroll_factor=4):
        inside = offset + tl.arange(0, TILE)
        token = first + inside
        exists = (inside < BLOCK_SIZE) & (token < T)
        valid = _are_valid(valid_ptr, valid_sb, valid_st, batch, token, exists)
        if last_valid_ptr is not None:
            seen = tl.associative_scan(tl.where(valid, token, -1).to(tl.int32), 0, _larger)
            seen = tl.maximum(seen, last)
            tl.store(last_valid_ptr + batch * T + token, seen, mask=exists)
            last = tl.max(seen, axis=0)
        if k_segment_ptr is not None:
            segment = tl.load(k_segment_ptr + batch * k_segment_sb + token * k_segment_st, mask=valid, other=0)
            segment = segment.to(tl.int64)
            low = tl.minimum(low, tl.min(tl.where(valid, segment, 9223372036854775807), axis=0))
            high = tl.maximum(high, tl.max(tl.where(valid, segment, -9223372036854775807 - 1), axis=0))
        if means_ptr is not None:
            totals += _load_keys(
                k_ptr, k_sb, k_st, k_sd, scale_ptr, scale_sb, scale_st, k_weight_ptr, k_weight_sb, k_weight_st,
                batch, token, valid, d, D, FP8,
            )  # fmt: skip
            count += tl.sum(valid.to(tl.float32), axis=0)
    if k_segment_ptr is not None:
        tl.store(low_ptr + block, low)
        tl.store(high_ptr + block, high)
    if means_ptr is not None:
        WIDTH: tl.constexpr = 2 * D if SPREAD_FACTOR > 0 else D
        counts = tl.zeros([PADDED_D], tl.float32) + tl.maximum(count, 1.0)
        mean = tl.div_rn(_sum_rows(totals), counts)
        tl.store(means_ptr + block * WIDTH + d, mean.to(means_ptr.dtype.element_ty), mask=d < D)
        if SPREAD_FACTOR > 0:
            squares = tl.zeros([TILE, PADDED_D], tl.float32)
            # Not four times: two steps of float8 keys then take thousands of bytes of stack.
            for offset in tl.range(0, BLOCK_SIZE, TILE, loop_unroll_factor=2):
                inside = offset + tl.arange(0, TILE)
                token = first + inside
                exists = (inside < BLOCK_SIZE) & (token < T)
                valid = _are_valid(valid_ptr, valid_sb, valid_st, batch, token, exists)
                keys = _load_keys(
                    k_ptr, k_sb, k_st, k_sd, scale_ptr, scale_sb, scale_st, k_weight_ptr, k_weight_sb, k_weight_st,
                    batch, token, valid, d, D, FP8,
                )  # fmt: skip
                distance = tl.where(valid[:, None], keys - mean[None, :], 0.0)
                squares += distance * distance
            spread = _power_of_two_root(tl.div_rn(_sum_rows(squares), counts) * SPREAD_FACTOR, MOST_SPREAD)
            tl.store(means_ptr + block * WIDTH + D + d, spread.to(means_ptr.dtype.element_ty), mask=d < D)
