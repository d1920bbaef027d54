"""The refinement stage by block for NVIDIA's sm_90, see :mod:`.hopper`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .group import NOT_SPECIALIZED, rows_of_run, runs_of_program
from .hopper import score_tile_of_rows
from .overlap import wait_for_kernel_before
from .visible import group_window


@gluon.jit(
    do_not_specialize=["q_query_rows", "q_batch_rows", *NOT_SPECIALIZED],
    do_not_specialize_on_alignment=["scale_ptr", "k_weight_ptr"],
)
def refine_by_block_hopper_kernel(
    q_desc, q_query_rows, q_batch_rows, w_desc,
    k_ptr, k_sb, k_st, k_sd,
    scale_ptr, scale_sb, scale_st,
    k_weight_ptr, k_weight_sb, k_weight_st,
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    valid_ptr, valid_sb, valid_st,
    mask_ptr, mask_sb, mask_ss, mask_st,
    q_segment_ptr, q_segment_sb, q_segment_ss,
    k_segment_ptr, k_segment_sb, k_segment_st,
    lists_ptr, first_list_ptr, totals_ptr, pairs_ptr, token_scores_ptr,
    first_row, rows_per_batch, group_rows, shares, least, room, run_cost, S, T, pitch, M,
    H: gl.constexpr, D: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    PADDED_H: gl.constexpr, TILE_D: gl.constexpr, TILE: gl.constexpr, MOST_ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """:func:`.refine.refine_by_block_kernel`, grid and arguments alike but for q.

    q_desc describes q as a matrix of rows of D elements, those of the heads of one query side by side; a query is
    ``q_query_rows`` behind the one before it, a sequence ``q_batch_rows``.  w_desc describes the
    chunk's weights as one vector.
    """
    wait_for_kernel_before(OVERLAP)
    low, high, inside, first_run, past_run = runs_of_program(
        lists_ptr, first_list_ptr, totals_ptr, shares, least, rows_per_batch, group_rows, T, BLOCK_SIZE, TILE
    )
    first_query = (first_row % S).to(gl.int64)
    for run in range(first_run, past_run):
        batch_here, first_token, first, last = rows_of_run(
            lists_ptr, run, low, high, inside, T, M, room, run_cost, BLOCK_SIZE, TILE
        )
        batch = (first_row // S + batch_here).to(gl.int64)
        of_batch = batch_here * rows_per_batch
        # Added to a row of the chunk it is the query.
        query_of_row = first_query - of_batch

        cut = False
        if lists_ptr is None:
            near = gl.arange(0, MOST_ROWS, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
            touched, cut = group_window(
                near, first_token, first_token + TILE, start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss,
                batch, first_query + first, last - first, T,
            )  # fmt: skip
            if touched == 0:
                last = first

        if first < last:
            score_tile_of_rows(
                q_desc, (batch * q_batch_rows + query_of_row * q_query_rows).to(gl.int32), q_query_rows, w_desc,
                k_ptr + batch * k_sb, k_st, k_sd, T, first_token, inside,
                scale_ptr, scale_sb, scale_st,
                k_weight_ptr, k_weight_sb, k_weight_st,
                start_ptr, start_sb, start_ss,
                end_ptr, end_sb, end_ss,
                valid_ptr, valid_sb, valid_st,
                mask_ptr, mask_sb, mask_ss, mask_st,
                q_segment_ptr, q_segment_sb, q_segment_ss,
                k_segment_ptr, k_segment_sb, k_segment_st,
                pairs_ptr, token_scores_ptr,
                batch, of_batch, query_of_row, first, last, cut, pitch, T,
                H, D, BLOCK_SIZE, 1, PADDED_H, TILE_D, TILE, STAGES,
            )  # fmt: skip
