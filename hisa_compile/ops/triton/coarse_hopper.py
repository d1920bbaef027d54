"""The coarse stage for NVIDIA's sm_90 where windows alone say what is visible, see :mod:`.hopper`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .group import clear_counts
from .hopper import score_tile_of_rows
from .overlap import wait_for_kernel_before
from .visible import group_window


@gluon.jit(
    do_not_specialize=[
        "q_query_rows",
        "q_batch_rows",
        "first_row",
        "rows_per_batch",
        "group_rows",
        "S",
        "T",
        "M",
        "counts",
    ],
)
def coarse_hopper_kernel(
    q_desc, q_query_rows, q_batch_rows, w_desc,
    means_ptr, means_sb, means_sm, means_sd,
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    block_scores_ptr, counts_ptr,
    first_row, rows_per_batch, group_rows, S, T, M, pitch, counts,
    H: gl.constexpr, D: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    PADDED_H: gl.constexpr, TILE_D: gl.constexpr, TILE: gl.constexpr, MOST_ROWS: gl.constexpr,
    STAGES: gl.constexpr, OF_CHUNK: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """:func:`.coarse.coarse_kernel` with the same grid, and, as far as it has them, the same arguments.

    q_desc and w_desc as in :func:`.refine_hopper.refine_by_block_hopper_kernel`, q in the means' dtype; OF_CHUNK:
    q_desc holds the chunk's rows alone, by their number.
    """
    wait_for_kernel_before(OVERLAP)
    if counts_ptr is not None:
        clear_counts(counts_ptr, counts, gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0])))
    tiles = (M + TILE - 1) // TILE
    groups = (rows_per_batch + group_rows - 1) // group_rows
    tile = gl.program_id(0) % tiles
    group = gl.program_id(0) // tiles % groups
    batch_here = gl.program_id(0) // tiles // groups
    batch = (first_row // S + batch_here).to(gl.int64)
    first_query = (first_row % S).to(gl.int64)
    of_batch = batch_here * rows_per_batch
    query_of_row = first_query - of_batch
    first = group * group_rows
    last = gl.minimum(first + group_rows, rows_per_batch)
    low = tile.to(gl.int64) * TILE * BLOCK_SIZE
    near = gl.arange(0, MOST_ROWS, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    touched, cut = group_window(
        near, low, low + TILE * BLOCK_SIZE, start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss,
        batch, first_query + first, last - first, T,
    )  # fmt: skip
    if touched:
        if OF_CHUNK:
            q_at = of_batch * 0
        else:
            q_at = (batch * q_batch_rows + query_of_row * q_query_rows).to(gl.int32)
        score_tile_of_rows(
            q_desc, q_at, q_query_rows, w_desc,
            means_ptr + batch * means_sb, means_sm, means_sd, M, tile.to(gl.int64) * TILE, 0,
            None, 0, 0,
            None, 0, 0,
            start_ptr, start_sb, start_ss,
            end_ptr, end_sb, end_ss,
            None, 0, 0,
            None, 0, 0, 0,
            None, 0, 0,
            None, 0, 0,
            None, block_scores_ptr,
            batch, of_batch, query_of_row, first, last, cut, pitch, T,
            H, D, BLOCK_SIZE, BLOCK_SIZE, PADDED_H, TILE_D, TILE, STAGES,
        )  # fmt: skip
