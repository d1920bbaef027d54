"""The coarse stage: scores of block representatives for every query.

Floor: 2 * S * M * H * D operations in the means' dtype, 8.6 GFLOP for 1024 queries at 64K tokens, 12 microseconds at
the 690 TFLOP/s of a large bfloat16 product; it took 29 there (a note), :mod:`.coarse_hopper` takes 19 (an H100,
docs/kernels.md).  Wide queries: 8 MiB read and 16 written, 8 microseconds at 3 TB/s, which they take.
With spreads behind the means the floor is 25, and it takes 65 (float8 78).

A tile of means stays where it is and queries go past it, since means are read once then and queries come from the L2
cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .group import clear_counts
from .keys import score_bits
from .operands import FP8_NONE
from .overlap import wait_at_the_end, wait_for_kernel_before
from .score import head_sum, load_query, load_vectors, load_weights, multiply, real_heads
from .visible import eligible_blocks, group_window, row_coordinates, row_segment, row_window


@triton.jit
def _towards(query, weights):
    """|q| with the sign of its head's weight: query [TILE_D, PADDED_H], weights [PADDED_H]."""
    size = tl.abs(query)
    return tl.where((weights < 0.0)[None, :], -size, size)


@triton.jit(
    do_not_specialize=["first_row", "rows_per_batch", "group_rows", "S", "T", "M", "counts"],
)
def coarse_kernel(
    q_ptr, q_sb, q_ss, q_sh, q_sd,
    w_ptr, w_sr,
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    valid_ptr, valid_sb, valid_st,
    mask_ptr, mask_sb, mask_ss, mask_st,
    q_segment_ptr, q_segment_sb, q_segment_ss,
    k_segment_ptr, k_segment_sb, k_segment_st,
    means_ptr, means_sb, means_sm, means_sd, last_valid_ptr, low_ptr, high_ptr, block_scores_ptr, counts_ptr,
    first_row, rows_per_batch, group_rows, S, T, M, pitch, counts,
    H: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PADDED_H: tl.constexpr, TILE_D: tl.constexpr, TILE: tl.constexpr, MOST_ROWS: tl.constexpr,
    STAGES: tl.constexpr, FP8: tl.constexpr, WIDEN: tl.constexpr, SPREAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Scores of blocks, grid (batches * groups of rows * tiles of TILE blocks).

    block_scores_ptr int32 [rows, pitch]: HIDDEN_BITS where the block is not eligible.  Tiles that no window of a group
    touches may not be written.  The tile of means stays where it is while a group of ``group_rows`` <= MOST_ROWS rows
    of one batch goes past it, so a mean is read once a group and a query once a tile.
    With SPREAD there are D spreads behind each mean, and a second product, see ``reference.spread_queries``.
    counts_ptr int32 [counts], where given, gets zeros, to be counted in by :func:`.select.select_blocks_kernel`.
    """
    wait_for_kernel_before(OVERLAP)
    if counts_ptr is not None:
        clear_counts(counts_ptr, counts, tl.arange(0, 128))
    tiles = tl.cdiv(M, TILE)
    groups = tl.cdiv(rows_per_batch, group_rows)
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles % groups
    batch_here = tl.program_id(0) // tiles // groups
    batch = (first_row // S + batch_here).to(tl.int64)
    first_query = (first_row % S).to(tl.int64)
    first = group * group_rows
    last = tl.minimum(first + group_rows, rows_per_batch)
    column = tile * TILE + tl.arange(0, TILE)
    exists = column < M
    block = column.to(tl.int64)
    mean_ptr = means_ptr + batch * means_sb + block * means_sm
    # Before it is known whether they are needed: while decoding each load that waits for another one counts.
    means = load_vectors(mean_ptr, means_sd, exists, 0, D, TILE_D, FP8_NONE)
    low = tile.to(tl.int64) * TILE * BLOCK_SIZE
    touched, _ = group_window(
        tl.arange(0, MOST_ROWS), low, low + TILE * BLOCK_SIZE, start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss,
        batch, first_query + first, last - first, T,
    )  # fmt: skip
    if touched:
        q_ptr += batch * q_sb
        if valid_ptr is not None:
            valid_ptr += batch * valid_sb
            last_valid_ptr += batch * T
        if mask_ptr is not None:
            mask_ptr += batch * mask_sb
        if k_segment_ptr is not None:
            k_segment_ptr += batch * k_segment_sb
            low_ptr += batch * M
            high_ptr += batch * M
        if SPREAD:
            spread_ptr = mean_ptr + tl.full([], D, tl.int64) * means_sd
            spreads = load_vectors(spread_ptr, means_sd, exists, 0, D, TILE_D, FP8_NONE)
        for i in tl.range(first, last, num_stages=STAGES):
            query_index = first_query + i
            row = batch_here * rows_per_batch + i
            row_q_ptr = q_ptr + query_index * q_ss
            query = load_query(row_q_ptr, q_sh, q_sd, 0, H, D, PADDED_H, TILE_D, FP8)
            weights = load_weights(w_ptr + row.to(tl.int64) * w_sr, H, PADDED_H)
            start, end = row_window(start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, batch, query_index, T)
            segment = row_segment(q_segment_ptr, q_segment_sb, q_segment_ss, batch, query_index)
            row_mask_ptr = mask_ptr
            if mask_ptr is not None:
                row_mask_ptr += query_index * mask_ss
            eligible = eligible_blocks(
                block, start, end, T, valid_ptr, valid_st, last_valid_ptr, row_mask_ptr, mask_st,
                k_segment_ptr, k_segment_st, low_ptr, high_ptr, segment, BLOCK_SIZE,
            )  # fmt: skip
            products = multiply(means, query, tl.zeros([TILE, PADDED_H], tl.float32), WIDEN)
            if SPREAD:
                products = multiply(spreads, _towards(query.to(spreads.dtype), weights), products, WIDEN)
            if D > TILE_D:
                for d in range(TILE_D, D, TILE_D):
                    x = load_vectors(mean_ptr, means_sd, exists, d, D, TILE_D, FP8_NONE)
                    part = load_query(row_q_ptr, q_sh, q_sd, d, H, D, PADDED_H, TILE_D, FP8)
                    products = multiply(x, part, products, WIDEN)
                    if SPREAD:
                        x = load_vectors(spread_ptr, means_sd, exists, d, D, TILE_D, FP8_NONE)
                        products = multiply(x, _towards(part.to(x.dtype), weights), products, WIDEN)
            scores = head_sum(products, weights, real_heads(H, PADDED_H), None, None, None)
            tl.store(
                block_scores_ptr + row.to(tl.int64) * pitch + column, score_bits(scores, eligible), mask=column < pitch
            )


@triton.jit(do_not_specialize=["first_row", "S"])
def widen_queries_kernel(
    q_ptr, q_sb, q_ss, q_sh, q_sd, wide_ptr, first_row, S,
    H: tl.constexpr, D: tl.constexpr, PADDED_H: tl.constexpr, TILE_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """wide_ptr [rows, H, D] gets the q of a chunk's rows in its own dtype, grid (rows): float8 that meets means.

    Needs nothing of the kernel before it, where that is one of the same call: AHEAD, it runs beside pooling, and reads
    past the L1 cache, see :func:`.overlap.wait_at_the_end`.
    """
    wait_for_kernel_before(OVERLAP)
    row = tl.program_id(0)
    _, batch, query_index = row_coordinates(first_row, row, S)
    h = tl.arange(0, PADDED_H)
    d = tl.arange(0, TILE_D)
    wanted = (h < H)[:, None] & (d < D)[None, :]
    at = q_ptr + batch * q_sb + query_index * q_ss + h.to(tl.int64)[:, None] * q_sh + d.to(tl.int64)[None, :] * q_sd
    query = tl.load(at, mask=wanted, other=0.0, cache_modifier=".cg")
    out = wide_ptr + row.to(tl.int64) * (H * D) + h[:, None] * D + d[None, :]
    tl.store(out, query.to(wide_ptr.dtype.element_ty), mask=wanted)
    wait_at_the_end(OVERLAP)
