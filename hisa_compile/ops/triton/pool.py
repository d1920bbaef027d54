"""Block representatives: the mean of each block's valid keys, and where its valid keys lie."""

from __future__ import annotations

import triton
import triton.language as tl

from .operands import load_operand


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


@triton.jit(do_not_specialize=["T", "M"])
def pool_kernel(
    k_ptr, k_sb, k_st, k_sd,
    scale_ptr, scale_sb, scale_st,
    valid_ptr, valid_sb, valid_st,
    means_ptr, last_valid_ptr,
    T, M,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, PADDED_D: tl.constexpr, TILE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One program a block, grid (B * M).

    means_ptr [B, M, D] gets the mean over the valid keys times k_scale, accumulated in float32, rounded once to
    the buffer's dtype; 0 for a block with no valid key.  last_valid_ptr int32 [B, T] gets, where key_valid is
    given, the last valid position of the token's block that is not after the token, or -1.
    """
    block = tl.program_id(0).to(tl.int64)
    batch = block // M
    first = (block % M) * BLOCK_SIZE
    d = tl.arange(0, PADDED_D).to(tl.int64)
    totals = tl.zeros([TILE, PADDED_D], tl.float32)
    count = 0.0
    last = -1
    for offset in range(0, BLOCK_SIZE, TILE):
        inside = offset + tl.arange(0, TILE)
        token = first + inside
        exists = (inside < BLOCK_SIZE) & (token < T)
        valid = exists
        if valid_ptr is not None:
            valid = exists & (tl.load(valid_ptr + batch * valid_sb + token * valid_st, mask=exists, other=0) != 0)
            seen = tl.associative_scan(tl.where(valid, token, -1).to(tl.int32), 0, _larger)
            seen = tl.maximum(seen, last)
            tl.store(last_valid_ptr + batch * T + token, seen, mask=exists)
            last = tl.max(seen, axis=0)
        # A key that is not valid is never read: a NaN in it cannot reach the mean.
        wanted = valid[:, None] & (d < D)[None, :]
        keys = load_operand(k_ptr + batch * k_sb + token[:, None] * k_st + d[None, :] * k_sd, wanted, FP8)
        keys = keys.to(tl.float32)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + batch * scale_sb + token * scale_st, mask=valid, other=0.0)
            keys = keys * scale[:, None]
        totals += keys
        count += tl.sum(valid.to(tl.float32), axis=0)
    mean = tl.div_rn(_sum_rows(totals), tl.zeros([PADDED_D], tl.float32) + tl.maximum(count, 1.0))
    tl.store(means_ptr + block * D + d, mean.to(means_ptr.dtype.element_ty), mask=d < D)
