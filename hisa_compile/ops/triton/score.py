"""The two scoring stages: block representatives (coarse) and the tokens of kept blocks (refine).

Both compute I = factor * sum_h w[h] * ReLU(scale * (q[h] . x)) for a tile of vectors x at a time, with the vectors as
rows of the product so that a row's result depends on nothing but its own vector.  Tile shapes depend on H, D and the
dtype only: the bits of a score are the same for every batch position and every slicing of the queries.  Loads whose
layout could reach the sum over heads (weights, k_scale, k_weight) are not specialised on alignment for the same reason.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import HIDDEN_KEY, rank_key
from .operands import dot, load_factor, load_operand
from .visible import eligible_blocks, row_coordinates, row_segment, row_window, visible_tokens


@triton.jit
def load_query(q_ptr, q_sh, q_sd, first, H: tl.constexpr, D: tl.constexpr,
               PADDED_H: tl.constexpr, TILE_D: tl.constexpr, FP8: tl.constexpr):  # fmt: skip
    """The row's q, dims [first, first + TILE_D), as [TILE_D, PADDED_H], 0 in the padding."""
    h = tl.arange(0, PADDED_H).to(tl.int64)
    d = first + tl.arange(0, TILE_D).to(tl.int64)
    wanted = (d < D)[:, None] & (h < H)[None, :]
    return load_operand(q_ptr + d[:, None] * q_sd + h[None, :] * q_sh, wanted, FP8)


@triton.jit
def load_weights(w_ptr, w_sh, H: tl.constexpr, PADDED_H: tl.constexpr):
    """The row's head weights, float32 [PADDED_H], 0 in the padding."""
    h = tl.arange(0, PADDED_H).to(tl.int64)
    return tl.load(w_ptr + h * w_sh, mask=h < H, other=0.0).to(tl.float32)


@triton.jit
def tile_scores(
    query, weights, q_ptr, q_sh, q_sd, x_ptr, x_sd, scale, factor, wanted,
    H: tl.constexpr, D: tl.constexpr, PADDED_H: tl.constexpr, TILE_D: tl.constexpr,
    Q_FP8: tl.constexpr, X_FP8: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Scores float32 [TILE] of the vectors at ``x_ptr`` ([TILE] pointers), those not ``wanted`` unread.

    ``query`` is the whole q where D fits one TILE_D, else its first part, and the others are loaded here.
    ``scale``, which multiplies the vector, and ``factor``, which multiplies its score: float32 [TILE] or None.
    """
    TILE: tl.constexpr = x_ptr.shape[0]
    products = tl.zeros([TILE, PADDED_H], tl.float32)
    if D <= TILE_D:
        d = tl.arange(0, TILE_D).to(tl.int64)
        x = load_operand(x_ptr[:, None] + d[None, :] * x_sd, wanted[:, None] & (d < D)[None, :], X_FP8)
        products = dot(x, query.to(x.dtype), products, WIDEN)
    else:
        for first in range(0, D, TILE_D):
            d = first + tl.arange(0, TILE_D).to(tl.int64)
            x = load_operand(x_ptr[:, None] + d[None, :] * x_sd, wanted[:, None] & (d < D)[None, :], X_FP8)
            part = load_query(q_ptr, q_sh, q_sd, first, H, D, PADDED_H, TILE_D, Q_FP8)
            products = dot(x, part.to(x.dtype), products, WIDEN)
    if scale is not None:
        products = products * scale[:, None]
    # A comparison, not a maximum: NaN must stay NaN.
    products = tl.where(products < 0.0, 0.0, products) * weights[None, :]
    # Padded heads would turn an infinite key into 0 * inf.
    if PADDED_H != H:
        products = tl.where((tl.arange(0, PADDED_H) < H)[None, :], products, 0.0)
    scores = tl.sum(products, axis=1)
    if factor is not None:
        scores = scores * factor
    return scores


@triton.jit(do_not_specialize=["first_row", "groups", "S", "T", "M"], do_not_specialize_on_alignment=["w_ptr"])
def coarse_kernel(
    q_ptr, q_sb, q_ss, q_sh, q_sd,
    w_ptr, w_sb, w_ss, w_sh,
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    valid_ptr, valid_sb, valid_st,
    mask_ptr, mask_sb, mask_ss, mask_st,
    q_segment_ptr, q_segment_sb, q_segment_ss,
    k_segment_ptr, k_segment_sb, k_segment_st,
    means_ptr, last_valid_ptr, low_ptr, high_ptr, block_keys_ptr,
    first_row, groups, S, T, M,
    H: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PADDED_H: tl.constexpr, TILE_D: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    FP8: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Rank keys of a row's blocks, grid (rows * groups), one program for TILES tiles of TILE blocks.

    block_keys_ptr int32 [rows, M]: column j is the j-th block that the row's window touches, HIDDEN_KEY where the
    block is not eligible.  Columns past the window's last block are not written.
    """
    row = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    _, batch, query_index = row_coordinates(first_row, row, S)
    start, end = row_window(start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, batch, query_index, T)
    first_block = start // BLOCK_SIZE
    count = (tl.where(start < end, (end + BLOCK_SIZE - 1) // BLOCK_SIZE - first_block, 0)).to(tl.int32)
    first_column = group * (TILE * TILES)
    if first_column < count:
        q_ptr += batch * q_sb + query_index * q_ss
        if valid_ptr is not None:
            valid_ptr += batch * valid_sb
            last_valid_ptr += batch * T
        if mask_ptr is not None:
            mask_ptr += batch * mask_sb + query_index * mask_ss
        segment = row_segment(q_segment_ptr, q_segment_sb, q_segment_ss, batch, query_index)
        if k_segment_ptr is not None:
            k_segment_ptr += batch * k_segment_sb
            low_ptr += batch * M
            high_ptr += batch * M
        query = load_query(q_ptr, q_sh, q_sd, 0, H, D, PADDED_H, TILE_D, FP8)
        weights = load_weights(w_ptr + batch * w_sb + query_index * w_ss, w_sh, H, PADDED_H)
        for base in range(first_column, tl.minimum(count, first_column + TILE * TILES), TILE):
            column = base + tl.arange(0, TILE)
            block = first_block + column
            eligible = eligible_blocks(
                block, start, end, T, valid_ptr, valid_st, last_valid_ptr, mask_ptr, mask_st,
                k_segment_ptr, k_segment_st, low_ptr, high_ptr, segment, BLOCK_SIZE,
            )  # fmt: skip
            scores = tile_scores(
                query, weights, q_ptr, q_sh, q_sd, means_ptr + (batch * M + block) * D, 1, None, None, eligible,
                H, D, PADDED_H, TILE_D, FP8, 0, WIDEN,
            )  # fmt: skip
            key = tl.where(eligible, rank_key(scores), HIDDEN_KEY)
            tl.store(block_keys_ptr + row.to(tl.int64) * M + column, key, mask=column < count)


@triton.jit(
    do_not_specialize=["first_row", "groups", "S", "T", "columns", "block_topk"],
    do_not_specialize_on_alignment=["w_ptr", "scale_ptr", "k_weight_ptr"],
)
def refine_kernel(
    q_ptr, q_sb, q_ss, q_sh, q_sd,
    k_ptr, k_sb, k_st, k_sd,
    w_ptr, w_sb, w_ss, w_sh,
    scale_ptr, scale_sb, scale_st,
    k_weight_ptr, k_weight_sb, k_weight_st,
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    valid_ptr, valid_sb, valid_st,
    mask_ptr, mask_sb, mask_ss, mask_st,
    q_segment_ptr, q_segment_sb, q_segment_ss,
    k_segment_ptr, k_segment_sb, k_segment_st,
    kept_ptr, kept_count_ptr, token_keys_ptr,
    first_row, groups, S, T, columns, block_topk,
    H: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PADDED_H: tl.constexpr, TILE_D: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    FP8: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Rank keys of a row's candidate tokens, grid (rows * groups), one program for TILES tiles of TILE tokens.

    token_keys_ptr int32 [rows, columns]: HIDDEN_KEY where the token is not visible.  kept_ptr int32
    [rows, block_topk] lists the kept blocks and column j is token j % BLOCK_SIZE of kept block j // BLOCK_SIZE.
    Where every block is kept kept_ptr is None and column j is the j-th token of the window.  Columns past the row's
    last candidate are not written.
    """
    row = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    _, batch, query_index = row_coordinates(first_row, row, S)
    start, end = row_window(start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, batch, query_index, T)
    if kept_ptr is not None:
        count = tl.load(kept_count_ptr + row) * BLOCK_SIZE
    else:
        count = (end - start).to(tl.int32)
    first_column = group * (TILE * TILES)
    if first_column < count:
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
        weights = load_weights(w_ptr + batch * w_sb + query_index * w_ss, w_sh, H, PADDED_H)
        for base in range(first_column, tl.minimum(count, first_column + TILE * TILES), TILE):
            column = base + tl.arange(0, TILE)
            if kept_ptr is not None:
                slot = row.to(tl.int64) * block_topk + column // BLOCK_SIZE
                block = tl.load(kept_ptr + slot, mask=column < count, other=0)
                token = block.to(tl.int64) * BLOCK_SIZE + column % BLOCK_SIZE
            else:
                token = start + column
            visible = visible_tokens(
                token, start, end, valid_ptr, valid_st, mask_ptr, mask_st, k_segment_ptr, k_segment_st, segment
            )
            visible = visible & (column < count)
            scale = load_factor(scale_ptr, scale_sb, scale_st, batch, token, visible)
            factor = load_factor(k_weight_ptr, k_weight_sb, k_weight_st, batch, token, visible)
            scores = tile_scores(
                query, weights, q_ptr, q_sh, q_sd, k_ptr + token * k_st, k_sd, scale, factor, visible,
                H, D, PADDED_H, TILE_D, FP8, FP8, WIDEN,
            )  # fmt: skip
            key = tl.where(visible, rank_key(scores), HIDDEN_KEY)
            tl.store(token_keys_ptr + row.to(tl.int64) * columns + column, key, mask=column < count)
