"""The refinement stage by block for NVIDIA's sm_90, in Gluon, Triton's lower level.

What binds there is shared memory: a product of 64 tokens with 64 heads reads both operands from it at just the rate at
which it can be read, so that nothing else fits beside it.  Here the keys, which stay for many queries, are in
registers, which halves that; Triton itself keeps what it has loaded in shared memory.  The rest is as in
:mod:`.refine`, with the same bits: what works on layouts that are given already is called from the same modules, what
makes layouts has to say which, and so is written here.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .keys import HIDDEN_BITS, score_bits
from .operands import load_factor
from .score import head_sum, is_any_negative
from .visible import row_segment, row_window, visible_tokens


@gluon.jit
def _fetch(q_tile, w_tile, q_ptr, q_ss, q_sh, w_ptr, w_sr, query, row, h, d, hw, H: gl.constexpr, D: gl.constexpr):
    """Start copying a row's q and weights; what lies past H and D becomes 0."""
    q_ptr += query.to(gl.int64) * q_ss + h.to(gl.int64)[:, None] * q_sh + d[None, :]
    w_ptr += row.to(gl.int64) * w_sr + hw
    if q_tile.shape[0] == H and q_tile.shape[1] == D:
        async_copy.async_copy_global_to_shared(q_tile, q_ptr)
        async_copy.async_copy_global_to_shared(w_tile, w_ptr)
    else:
        async_copy.async_copy_global_to_shared(q_tile, q_ptr, mask=(h < H)[:, None] & (d < D)[None, :])
        async_copy.async_copy_global_to_shared(w_tile, w_ptr, mask=hw < H)
    async_copy.commit_group()


@gluon.jit(
    do_not_specialize=["first_row", "rows_per_batch", "group_rows", "S", "T", "M"],
    do_not_specialize_on_alignment=["scale_ptr", "k_weight_ptr"],
)
def refine_by_block_hopper_kernel(
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
    items_ptr, item_count_ptr, offsets_ptr, pairs_ptr, token_scores_ptr,
    first_row, rows_per_batch, group_rows, S, T, pitch, M,
    H: gl.constexpr, D: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    PADDED_H: gl.constexpr, TILE_D: gl.constexpr, TILE: gl.constexpr, MOST_ROWS: gl.constexpr,
    STAGES: gl.constexpr, FP8: gl.constexpr, WIDEN: gl.constexpr,
):  # fmt: skip
    """:func:`.refine.refine_by_block_kernel`, grid and arguments alike.

    q_sd is 1, and q_ptr and the strides of q are multiples of 16 bytes.
    """
    WARPS: gl.constexpr = gl.num_warps()
    BITS: gl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth
    VECTOR: gl.constexpr = 128 // BITS
    LANES: gl.constexpr = TILE_D // VECTOR
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, PADDED_H, 256 // BITS])
    of_keys: gl.constexpr = gl.DotOperandLayout(0, product, 32 // BITS)
    tokens: gl.constexpr = gl.SliceLayout(1, product)
    heads: gl.constexpr = gl.SliceLayout(0, product)
    q_copy: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    w_copy: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    q_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PADDED_H, TILE_D], q_ptr.dtype.element_ty)
    w_shared: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 1, [0])

    program = gl.program_id(0)
    inside = 0
    if items_ptr is not None:
        PARTS: gl.constexpr = BLOCK_SIZE // TILE
        item = program // PARTS
        inside = program % PARTS * TILE
        first = 0
        last = 0
        number = 0
        if item < gl.load(item_count_ptr):
            number = gl.load(items_ptr + 2 * item)
            first = gl.load(items_ptr + 2 * item + 1)
            last = gl.minimum(first + group_rows, gl.load(offsets_ptr + number + 1))
        batch_here = number // M
        first_token = (number % M).to(gl.int64) * BLOCK_SIZE + inside
    else:
        groups = (rows_per_batch + group_rows - 1) // group_rows
        tiles = (T + TILE - 1) // TILE
        batch_here = program // groups // tiles
        first_token = (program // groups % tiles).to(gl.int64) * TILE
        first = program % groups * group_rows
        last = gl.minimum(first + group_rows, rows_per_batch)
    batch = (first_row // S + batch_here).to(gl.int64)
    first_query = (first_row % S).to(gl.int64)
    # Added to a row of the chunk it is the query.
    query_of_row = first_query - batch_here * rows_per_batch

    if items_ptr is None and (start_ptr is not None or end_ptr is not None):
        near = gl.arange(0, MOST_ROWS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
        queries = first_query + first + near
        touches = first + near < last
        if start_ptr is not None:
            starts = gl.load(start_ptr + batch * start_sb + queries * start_ss, mask=touches, other=0)
            touches = touches & (starts < first_token + TILE)
        if end_ptr is not None:
            ends = gl.load(end_ptr + batch * end_sb + queries * end_ss, mask=touches, other=0)
            touches = touches & (ends > first_token)
        if gl.max(touches.to(gl.int32), axis=0) == 0:
            last = first

    if first < last:
        q_ptr += batch * q_sb
        q_tiles = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [STAGES, PADDED_H, TILE_D], q_shared)
        w_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, PADDED_H], w_shared)
        h = gl.arange(0, PADDED_H, layout=gl.SliceLayout(1, q_copy))
        d = gl.arange(0, TILE_D, layout=gl.SliceLayout(0, q_copy))
        hw = gl.arange(0, PADDED_H, layout=w_copy)
        for stage in gl.static_range(STAGES - 1):
            row = batch_here * rows_per_batch + gl.minimum(first + stage, last - 1)
            if items_ptr is not None:
                row = gl.load(pairs_ptr + gl.minimum(first + stage, last - 1)) >> 16
            _fetch(q_tiles.index(stage), w_tiles.index(stage), q_ptr, q_ss, q_sh, w_ptr, w_sr, query_of_row + row, row,
                   h, d, hw, H, D)  # fmt: skip

        position = gl.arange(0, TILE, layout=tokens)
        token = first_token + position
        exists = token < T
        scale = load_factor(scale_ptr, scale_sb, scale_st, batch, token, exists)
        factor = load_factor(k_weight_ptr, k_weight_sb, k_weight_st, batch, token, exists)
        any_negative = is_any_negative(scale)
        look: gl.constexpr = valid_ptr is not None or mask_ptr is not None or k_segment_ptr is not None
        if valid_ptr is not None:
            valid_ptr += batch * valid_sb
        if mask_ptr is not None:
            mask_ptr += batch * mask_sb
        if k_segment_ptr is not None:
            k_segment_ptr += batch * k_segment_sb
        key_token = first_token + gl.arange(0, TILE, layout=gl.SliceLayout(1, of_keys))
        key_dim = gl.arange(0, TILE_D, layout=gl.SliceLayout(0, of_keys))
        keys = gl.load(
            k_ptr + batch * k_sb + key_token[:, None] * k_st + key_dim.to(gl.int64)[None, :] * k_sd,
            mask=(key_token < T)[:, None] & (key_dim < D)[None, :],
            other=0.0,
        )
        real = None
        if PADDED_H != H:
            real = gl.arange(0, PADDED_H, layout=heads) < H
        zeros = gl.zeros([TILE, PADDED_H], gl.float32, layout=product)

        # Pairs are loaded an iteration early: what is fetched now, and what is scored next.
        fetched = batch_here * rows_per_batch + gl.minimum(first + STAGES - 1, last - 1)
        pair = first
        if items_ptr is not None:
            fetched = gl.load(pairs_ptr + gl.minimum(first + STAGES - 1, last - 1)) >> 16
            pair = gl.load(pairs_ptr + first)
        stage = 0
        for i in range(first, last):
            async_copy.wait_group(STAGES - 2)
            fence_async_shared()
            products = warpgroup_mma(keys, q_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
            # The stage of the row before: everyone is past it, at the barrier that the compiler puts behind a wait.
            free = gl.where(stage == 0, STAGES - 1, stage - 1)
            _fetch(q_tiles.index(free), w_tiles.index(free), q_ptr, q_ss, q_sh, w_ptr, w_sr, query_of_row + fetched,
                   fetched, h, d, hw, H, D)  # fmt: skip
            if items_ptr is not None:
                row = pair >> 16
                column = (pair & 65535) * BLOCK_SIZE + inside
                fetched = gl.load(pairs_ptr + gl.minimum(i + STAGES, last - 1)) >> 16
                pair = gl.load(pairs_ptr + gl.minimum(i + 1, last - 1))
            else:
                row = batch_here * rows_per_batch + i
                column = first_token
                fetched = batch_here * rows_per_batch + gl.minimum(i + STAGES, last - 1)
            query = query_of_row + row
            start, end = row_window(start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, batch, query, T)
            segment = row_segment(q_segment_ptr, q_segment_sb, q_segment_ss, batch, query)
            row_mask_ptr = mask_ptr
            if mask_ptr is not None:
                row_mask_ptr += query * mask_ss
            weights = w_tiles.index(stage).load(heads)

            products = warpgroup_mma_wait(0, deps=[products])
            scores = head_sum(products, weights, real, scale, any_negative, factor)
            bits = score_bits(scores, None)
            # Nearly every tile is seen whole where only windows say what is seen.
            if look or (start > first_token) | (end < first_token + TILE):
                visible = visible_tokens(
                    first_token + position, start, end, valid_ptr, valid_st, row_mask_ptr, mask_st,
                    k_segment_ptr, k_segment_st, segment,
                )  # fmt: skip
                bits = gl.where(visible, bits, HIDDEN_BITS)
            out = token_scores_ptr + row.to(gl.int64) * pitch + column + position
            if items_ptr is None:
                gl.store(out, bits, mask=exists)
            else:
                # Every column of a kept block is read later, also those past the last token.
                gl.store(out, bits)
            stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        async_copy.wait_group(0)
