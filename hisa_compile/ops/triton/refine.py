"""The refinement stage: scores of candidate tokens, by block or by row.

By block (many rows, blocks of a multiple of 64 tokens): the keys of a block stay where they are and the queries that
kept it go past them.  By row (few rows, as in decoding, small blocks, float32): a row's candidates are gathered past
its query.  Both give the same bits.  Floor by row: the bytes of the candidates' keys, 67 MB for 32 rows in bfloat16,
22 microseconds at 3 TB/s; it takes 29 (an H100, a note).  By block: :mod:`.hopper`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .group import IS_CUT, NOT_SPECIALIZED, pair_row, pair_slot, rows_of_run, runs_of_program
from .keys import HIDDEN_BITS, score_bits
from .operands import load_factor
from .overlap import wait_for_kernel_before
from .score import head_sum, is_any_negative, load_query, load_vectors, load_weights, multiply, real_heads, score_tokens
from .visible import group_window, row_coordinates, row_segment, row_window, visible_tokens


@triton.jit(
    do_not_specialize=NOT_SPECIALIZED,
    do_not_specialize_on_alignment=["scale_ptr", "k_weight_ptr"],
)
def refine_by_block_kernel(
    q_ptr, q_sb, q_ss, q_sh, q_sd,
    k_ptr, k_sb, k_st, k_sd,
    w_ptr, w_sr,
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
    H: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PADDED_H: tl.constexpr, TILE_D: tl.constexpr, TILE: tl.constexpr, MOST_ROWS: tl.constexpr,
    STAGES: tl.constexpr, FP8: tl.constexpr, WIDEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Scores of candidates for rows of one chunk; D <= TILE_D, and TILE divides BLOCK_SIZE.

    With lists of pairs (see :mod:`.group`), grid (shares * BLOCK_SIZE / TILE): a program's queries are those of its
    share of the pairs, list after list.  token_scores_ptr int32 [rows, pitch]: column j is token j % BLOCK_SIZE of the
    row's kept block j // BLOCK_SIZE.

    Without (lists_ptr is None, every block kept), grid (batches * tiles of TILE tokens * groups of ``group_rows``
    rows): column j is token j, and tiles that no window of a group touches may not be written.

    Everywhere HIDDEN_BITS where the token is not visible.
    """
    wait_for_kernel_before(OVERLAP)
    low, high, inside, first_run, past_run = runs_of_program(
        lists_ptr, first_list_ptr, totals_ptr, shares, least, rows_per_batch, group_rows, T, BLOCK_SIZE, TILE
    )
    first_query = (first_row % S).to(tl.int64)
    look: tl.constexpr = valid_ptr is not None or mask_ptr is not None or k_segment_ptr is not None
    position = tl.arange(0, TILE)
    for run in range(first_run, past_run):
        batch_here, first_token, first, last = rows_of_run(
            lists_ptr, run, low, high, inside, T, M, room, run_cost, BLOCK_SIZE, TILE
        )
        batch = (first_row // S + batch_here).to(tl.int64)
        cut = False
        if lists_ptr is None:
            touched, cut = group_window(
                tl.arange(0, MOST_ROWS), first_token, first_token + TILE, start_ptr, start_sb, start_ss,
                end_ptr, end_sb, end_ss, batch, first_query + first, last - first, T,
            )  # fmt: skip
            if touched == 0:
                last = first

        if first < last:
            q_of_batch = q_ptr + batch * q_sb
            valid_of_batch = valid_ptr
            if valid_ptr is not None:
                valid_of_batch = valid_ptr + batch * valid_sb
            k_segment_of_batch = k_segment_ptr
            if k_segment_ptr is not None:
                k_segment_of_batch = k_segment_ptr + batch * k_segment_sb
            token = first_token + position
            exists = token < T
            scale = load_factor(scale_ptr, scale_sb, scale_st, batch, token, exists)
            factor = load_factor(k_weight_ptr, k_weight_sb, k_weight_st, batch, token, exists)
            any_negative = is_any_negative(scale)
            keys = load_vectors(k_ptr + batch * k_sb + token * k_st, k_sd, exists, 0, D, TILE_D, FP8)

            # A pair is loaded an iteration early, so that the address of its query is known when the query is fetched.
            pair = first
            if lists_ptr is not None:
                pair = tl.load(pairs_ptr + first)
            for i in tl.range(first, last, num_stages=STAGES):
                if lists_ptr is not None:
                    row = pair_row(pair)
                    column = pair_slot(pair) * BLOCK_SIZE + inside
                    cut = (pair & IS_CUT) != 0
                    pair = tl.load(pairs_ptr + i + 1, mask=i + 1 < last, other=0)
                    query_index = first_query + (row - batch_here * rows_per_batch)
                else:
                    row = batch_here * rows_per_batch + i
                    column = first_token
                    query_index = first_query + i
                query = load_query(q_of_batch + query_index * q_ss, q_sh, q_sd, 0, H, D, PADDED_H, TILE_D, FP8)
                weights = load_weights(w_ptr + row.to(tl.int64) * w_sr, H, PADDED_H)
                products = multiply(keys, query, tl.zeros([TILE, PADDED_H], tl.float32), WIDEN)
                scores = head_sum(products, weights, real_heads(H, PADDED_H), scale, any_negative, factor)
                bits = score_bits(scores, None)
                if look or cut:
                    start, end = row_window(
                        start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, batch, query_index, T
                    )
                    segment = row_segment(q_segment_ptr, q_segment_sb, q_segment_ss, batch, query_index)
                    row_mask_ptr = mask_ptr
                    if mask_ptr is not None:
                        row_mask_ptr = mask_ptr + (batch * mask_sb + query_index * mask_ss)
                    visible = visible_tokens(
                        token, start, end, valid_of_batch, valid_st, row_mask_ptr, mask_st,
                        k_segment_of_batch, k_segment_st, segment,
                    )  # fmt: skip
                    bits = tl.where(visible, bits, HIDDEN_BITS)
                # Whole tiles, also past the last token, as far as the row of scores goes: selection reads more than it
                # needs.
                inside_row = column + position < pitch
                tl.store(token_scores_ptr + row.to(tl.int64) * pitch + column + position, bits, mask=inside_row)


# Kept blocks that a warp has in a register, one a lane.
_LISTED = tl.constexpr(32)


@triton.jit
def _listed_blocks(kept_ptr, slot, block_topk):
    """The kept blocks of a row in these slots, 0 past the last one that there may be."""
    return tl.load(kept_ptr + slot, mask=slot < block_topk, other=0)


@triton.jit(
    do_not_specialize=["first_row", "groups", "group_columns", "S", "T", "block_topk"],
    do_not_specialize_on_alignment=["scale_ptr", "k_weight_ptr"],
)
def refine_by_row_kernel(
    q_ptr, q_sb, q_ss, q_sh, q_sd,
    k_ptr, k_sb, k_st, k_sd,
    w_ptr, w_sr,
    scale_ptr, scale_sb, scale_st,
    k_weight_ptr, k_weight_sb, k_weight_st,
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    valid_ptr, valid_sb, valid_st,
    mask_ptr, mask_sb, mask_ss, mask_st,
    q_segment_ptr, q_segment_sb, q_segment_ss,
    k_segment_ptr, k_segment_sb, k_segment_st,
    kept_ptr, kept_count_ptr, token_scores_ptr,
    first_row, groups, group_columns, S, T, pitch, block_topk,
    H: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PADDED_H: tl.constexpr, TILE_D: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    FP8: tl.constexpr, WIDEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Scores of a row's candidates, grid (rows * groups), one program for ``group_columns`` columns.

    Columns are those of :func:`refine_by_block_kernel`: kept_ptr int32 [rows, block_topk] lists the kept blocks, and
    where it is None every block is kept.  Tiles past the row's last candidate, and outside its window, may not be
    written.
    """
    wait_for_kernel_before(OVERLAP)
    row = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    _, batch, query_index = row_coordinates(first_row, row, S)
    start, end = row_window(start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, batch, query_index, T)
    # A tile of one block has its number from a register: keys whose place is read from memory a moment before are
    # copied one tile ahead at best, however many stages there are.
    ONE_BLOCK: tl.constexpr = kept_ptr is not None and BLOCK_SIZE % TILE == 0
    # Else as many as leave an int32 room: T is at most 2^31 - 2^21.
    STEP: tl.constexpr = _LISTED * TILE if ONE_BLOCK else 2**20
    near = tl.arange(0, _LISTED)
    if kept_ptr is not None:
        low = group * group_columns
        high = tl.load(kept_count_ptr + row) * BLOCK_SIZE
        kept_ptr += row.to(tl.int64) * block_topk
    else:
        low = tl.maximum(group * group_columns, start.to(tl.int32) // TILE * TILE)
        high = end.to(tl.int32)
    if ONE_BLOCK:
        # Not after their number: both loads are under way at once.
        blocks = _listed_blocks(kept_ptr, low // BLOCK_SIZE + near, block_topk)
    high = tl.minimum(high, (group + 1) * group_columns)
    if low < high:
        q_ptr += batch * q_sb + query_index * q_ss
        k_ptr += batch * k_sb
        if valid_ptr is not None:
            valid_ptr += batch * valid_sb
        if mask_ptr is not None:
            mask_ptr += batch * mask_sb + query_index * mask_ss
        segment = row_segment(q_segment_ptr, q_segment_sb, q_segment_ss, batch, query_index)
        if k_segment_ptr is not None:
            k_segment_ptr += batch * k_segment_sb
        query = load_query(q_ptr, q_sh, q_sd, 0, H, D, PADDED_H, TILE_D, FP8)
        weights = load_weights(w_ptr + row.to(tl.int64) * w_sr, H, PADDED_H)
        for first in range(low, high, STEP):
            for base in tl.range(first, first + tl.minimum(high - first, STEP), TILE, num_stages=STAGES):
                column = base + tl.arange(0, TILE)
                token = column.to(tl.int64)
                if ONE_BLOCK:
                    here = near == base // BLOCK_SIZE - first // BLOCK_SIZE
                    block = tl.sum(tl.where(here, blocks, 0), axis=0)
                    token = block.to(tl.int64) * BLOCK_SIZE + column % BLOCK_SIZE
                elif kept_ptr is not None:
                    block = tl.load(kept_ptr + column // BLOCK_SIZE, mask=column < high, other=0)
                    token = block.to(tl.int64) * BLOCK_SIZE + column % BLOCK_SIZE
                visible = visible_tokens(
                    token, start, end, valid_ptr, valid_st, mask_ptr, mask_st, k_segment_ptr, k_segment_st, segment
                )
                visible = visible & (column < high)
                scores = score_tokens(
                    query, weights, q_ptr, q_sh, q_sd, k_ptr, k_st, k_sd, scale_ptr, scale_sb, scale_st,
                    k_weight_ptr, k_weight_sb, k_weight_st, batch, token, visible,
                    H, D, PADDED_H, TILE_D, FP8, WIDEN,
                )  # fmt: skip
                bits = score_bits(scores, visible)
                tl.store(token_scores_ptr + row.to(tl.int64) * pitch + column, bits, mask=column < pitch)
            if ONE_BLOCK:
                blocks = _listed_blocks(kept_ptr, (first + STEP) // BLOCK_SIZE + near, block_topk)
