"""The refinement stage by row for NVIDIA's sm_90: few rows, as in decoding, or blocks of 16 or 32 tokens.

By block a query would be copied for 32 tokens, twice as many bytes as their keys have; by row it is keys that are
copied, a block or a tile at a time, by the tensor memory accelerator, and the row's query and weights stay.  Keys are
multiplied from shared memory: in registers each would be used once.  What each thread does is as in :mod:`.hopper`.

Floor while decoding: see :mod:`.refine`.  Of small blocks it is the bytes of the candidates' keys from the L2 cache,
1.07 GB for 1024 rows of 8192 candidates in float8, 138 microseconds at the 7.8 TB/s that bfloat16 keys come with, or
the products, 104, see :mod:`.hopper`.  Blocks of 32 take 197, in bfloat16 276 (an H100, docs/kernels.md).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper import barrier, one_each, quads_of, with_sign
from .keys import HIDDEN_BITS, score_bits
from .operands import load_factor
from .overlap import wait_for_kernel_before
from .score import head_sum, is_any_negative
from .select_hopper import keep_blocks
from .visible import row_coordinates, row_window


@gluon.jit
def _block_of(kept_ptr, column, high, BLOCK_SIZE: gl.constexpr):
    """The kept block of each column; from ``high`` on that of the last one before it."""
    return gl.load(kept_ptr + gl.minimum(column, high - 1) // BLOCK_SIZE)


@gluon.jit
def _places(kept_ptr, first_column, high, PARTS: gl.constexpr, BOX: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    """The first tokens of the PARTS boxes of BOX columns from the first column on.

    Past the last box it is that one again, which is not copied.
    """
    places = ()
    for part in gl.static_range(PARTS):
        column = gl.minimum(first_column + part * BOX, high - BOX)
        places = places + (gl.load(kept_ptr + column // BLOCK_SIZE) * BLOCK_SIZE + column % BLOCK_SIZE,)
    return places


@gluon.jit
def _fetch(
    k_desc, full, k_boxes, stage, k_row, places, wanted,
    PARTS: gl.constexpr, SPANS: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """Start copying boxes of keys, side by side, into a stage's buffer, which everyone is done with, if ``wanted``."""
    mbarrier.expect(full.index(stage), SPANS * PARTS * BYTES, pred=wanted)
    barrier()
    for span in gl.static_range(SPANS):
        for part in gl.static_range(PARTS):
            at = [k_row + places[part], span * k_desc.block_shape[1]]
            into = k_boxes.index((stage * SPANS + span) * PARTS + part)
            tma.async_copy_global_to_shared(k_desc, at, full.index(stage), into, pred=wanted)


@gluon.jit
def _tokens(block, column, high, start, end, BLOCK_SIZE: gl.constexpr):
    """The token of each column, in its kept block, and whether the row sees it."""
    token = block.to(gl.int64) * BLOCK_SIZE + column % BLOCK_SIZE
    return token, (column < high) & (token >= start) & (token < end)


@gluon.jit
def _factors(
    scale_ptr, scale_sb, scale_st, k_weight_ptr, k_weight_sb, k_weight_st, batch, token, visible
):  # fmt: skip
    """k_scale and k_weight of each token, 1 where there are none: a product with it changes no bit."""
    scale = gl.full_like(token, 1.0, dtype=gl.float32)
    factor = scale
    if scale_ptr is not None:
        scale = load_factor(scale_ptr, scale_sb, scale_st, batch, token, visible)
    if k_weight_ptr is not None:
        factor = load_factor(k_weight_ptr, k_weight_sb, k_weight_st, batch, token, visible)
    return scale, factor


@gluon.jit
def _turn(
    k_boxes, first, kept_ptr, first_column, high, start, end, scale_ptr, scale_sb, scale_st, batch,
    PARTS: gl.constexpr, SPANS: gl.constexpr, BLOCK_SIZE: gl.constexpr,
):  # fmt: skip
    """Negate the keys of a tile whose scale is negative: rare, and of products it would be the same, bit for bit.

    The tile is the boxes from the ``first`` on.
    """
    BOX: gl.constexpr = k_boxes.shape[1]
    VECTOR: gl.constexpr = 128 // k_boxes.dtype.primitive_bitwidth
    LANES: gl.constexpr = k_boxes.shape[2] // VECTOR
    copy: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    inside = gl.arange(0, BOX, layout=gl.SliceLayout(1, copy))
    # Not unrolled, for which the compiler must not know how often: registers are for what is done for every tile.
    for number in range(gl.minimum(SPANS * PARTS, high - first_column)):
        column = first_column + number % PARTS * BOX + inside
        block = _block_of(kept_ptr, column, high, BLOCK_SIZE)
        token, visible = _tokens(block, column, high, start, end, BLOCK_SIZE)
        sign = load_factor(scale_ptr, scale_sb, scale_st, batch, token, visible)
        keys = k_boxes.index(first + number)
        keys.store(with_sign(keys.load(copy), sign))
    # The product reads them by another way than threads do.
    fence_async_shared()
    barrier()


@gluon.jit(
    do_not_specialize=[
        "q_query_rows", "q_batch_rows", "k_batch_rows", "first_row", "groups", "group_columns", "S", "T", "block_topk",
    ],
    do_not_specialize_on_alignment=["scale_ptr", "k_weight_ptr"],
)  # fmt: skip
def refine_by_row_hopper_kernel(
    q_desc, q_query_rows, q_batch_rows, w_ptr, w_sr,
    k_desc, k_batch_rows,
    scale_ptr, scale_sb, scale_st,
    k_weight_ptr, k_weight_sb, k_weight_st,
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    kept_ptr, kept_count_ptr, block_scores_ptr, token_scores_ptr,
    first_row, groups, group_columns, S, T, pitch, block_topk,
    H: gl.constexpr, BLOCK_SIZE: gl.constexpr, BLOCK_TILE: gl.constexpr,
    PADDED_H: gl.constexpr, TILE_D: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """:func:`.refine.refine_by_row_kernel` with the same grid, and, as far as it has them, the same arguments.

    Where block_scores_ptr is given, the scores of no more than BLOCK_TILE blocks a row, ``pitch`` apart as those of
    tokens, it is not known yet which blocks are kept: each program of a row selects them, and writes kept_ptr and
    kept_count_ptr.

    BLOCK_SIZE divides TILE, or the other way round.  q_desc as in
    :func:`.refine_hopper.refine_by_block_hopper_kernel`; k_desc describes k as a matrix of rows of D elements, a
    sequence ``k_batch_rows`` behind the one before it, copied a block at a time, or a tile where that is less.
    """
    wait_for_kernel_before(OVERLAP)
    WARPS: gl.constexpr = gl.num_warps()
    BITS: gl.constexpr = q_desc.dtype.primitive_bitwidth
    BOX: gl.constexpr = k_desc.block_shape[0]
    PARTS: gl.constexpr = TILE // BOX
    # Of several boxes those of more than 128 bytes a key lie behind each other, 128 bytes of all keys of a tile first.
    SPAN: gl.constexpr = k_desc.block_shape[1]
    SPANS: gl.constexpr = TILE_D // SPAN
    Q_BYTES: gl.constexpr = PADDED_H * TILE_D * BITS // 8
    K_BYTES: gl.constexpr = BOX * SPAN * BITS // 8
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, PADDED_H, 256 // BITS])
    heads: gl.constexpr = gl.SliceLayout(0, product)
    q_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PADDED_H, TILE_D], q_desc.dtype)
    k_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BOX, SPAN], q_desc.dtype)

    row = gl.program_id(0) // groups
    _, batch, query = row_coordinates(first_row, row, S)
    start, end = row_window(start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, batch, query, T)
    low = gl.program_id(0) % groups * group_columns
    kept_ptr += row.to(gl.int64) * block_topk
    if block_scores_ptr is not None:
        block_scores_ptr += row.to(gl.int64) * pitch
        kept = keep_blocks(
            block_scores_ptr, kept_ptr, kept_count_ptr + row, start, end, block_topk, BLOCK_SIZE, BLOCK_TILE
        )
    else:
        kept = gl.load(kept_count_ptr + row)
    high = gl.minimum(kept * BLOCK_SIZE, low + group_columns)
    if low < high:
        k_row = (batch * k_batch_rows).to(gl.int32)
        q_tile = gl.allocate_shared_memory(q_desc.dtype, [PADDED_H, TILE_D], q_shared)
        q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(q_full, count=1)
        k_boxes = gl.allocate_shared_memory(q_desc.dtype, [STAGES * SPANS * PARTS, BOX, SPAN], k_shared)
        k_tiles = k_boxes._reinterpret(q_desc.dtype, [STAGES, TILE, TILE_D], k_shared)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(full.index(stage), count=1)
        mbarrier.expect(q_full, Q_BYTES)
        barrier()
        q_row = (batch * q_batch_rows + query * q_query_rows).to(gl.int32)
        tma.async_copy_global_to_shared(q_desc, [q_row, 0], q_full, q_tile)
        for stage in gl.static_range(STAGES - 1):
            places = _places(kept_ptr, low + stage * TILE, high, PARTS, BOX, BLOCK_SIZE)
            wanted = low + stage * TILE < high
            _fetch(k_desc, full, k_boxes, stage, k_row, places, wanted, PARTS, SPANS, K_BYTES)
        ahead = _places(kept_ptr, low + (STAGES - 1) * TILE, high, PARTS, BOX, BLOCK_SIZE)

        head = gl.arange(0, PADDED_H, layout=heads)
        weights = gl.load(w_ptr + row.to(gl.int64) * w_sr + head, mask=head < H, other=0.0)
        real = None
        if PADDED_H != H:
            real = head < H
        quads: gl.constexpr = quads_of(TILE, WARPS)
        of_quads: gl.constexpr = gl.SliceLayout(1, quads)
        lane = gl.arange(0, 4, layout=gl.SliceLayout(0, quads)) % (TILE // (8 * WARPS))
        own = gl.arange(0, TILE, layout=of_quads)
        which = own // 8 % 2 + own // (16 * WARPS) * 2
        position = one_each(own, which, lane, TILE, WARPS)
        zeros = gl.zeros([TILE, PADDED_H], gl.float32, layout=product)
        out_ptr = token_scores_ptr + row.to(gl.int64) * pitch
        # Of the tile that is scored next; numbers of blocks are read a tile earlier than what lies where they say.
        block = _block_of(kept_ptr, low + position, high, BLOCK_SIZE)
        token, visible = _tokens(block, low + position, high, start, end, BLOCK_SIZE)
        scale, factor = _factors(
            scale_ptr, scale_sb, scale_st, k_weight_ptr, k_weight_sb, k_weight_st, batch, token, visible
        )
        block = _block_of(kept_ptr, low + TILE + position, high, BLOCK_SIZE)
        mbarrier.wait(q_full, 0)
        stage = 0
        phase = 0
        for here in range(low, high, TILE):
            mbarrier.wait(full.index(stage), phase)
            if scale_ptr is not None:  # noqa: SIM102 (the one is known when the kernel is compiled, not the other)
                if is_any_negative(gl.reshape(scale, [32 * WARPS])):
                    _turn(
                        k_boxes, stage * SPANS * PARTS, kept_ptr, here, high, start, end,
                        scale_ptr, scale_sb, scale_st, batch, PARTS, SPANS, BLOCK_SIZE,
                    )  # fmt: skip
            keys = k_tiles.index(stage)
            products = warpgroup_mma(keys, q_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
            # Into the buffer of the tile before, whose product everyone has waited for.
            wanted = here + (STAGES - 1) * TILE < high
            _fetch(k_desc, full, k_boxes, (stage + STAGES - 1) % STAGES, k_row, ahead, wanted, PARTS, SPANS, K_BYTES)
            ahead = _places(kept_ptr, here + STAGES * TILE, high, PARTS, BOX, BLOCK_SIZE)
            token, next_visible = _tokens(block, here + TILE + position, high, start, end, BLOCK_SIZE)
            next_scale, next_factor = _factors(
                scale_ptr, scale_sb, scale_st, k_weight_ptr, k_weight_sb, k_weight_st, batch, token, next_visible
            )
            block = _block_of(kept_ptr, here + 2 * TILE + position, high, BLOCK_SIZE)
            products = warpgroup_mma_wait(0, deps=[products])
            scores = head_sum(products, weights, real, None, False, None)
            bits = gl.convert_layout(scores, of_quads, assert_trivial=True).to(gl.int32, bitcast=True)
            score = one_each(bits, which, lane, TILE, WARPS).to(gl.float32, bitcast=True)
            bits = gl.where(visible, score_bits(score * gl.abs(scale) * factor, None), HIDDEN_BITS)
            gl.store(out_ptr + here + position, bits, mask=here + position < high)
            visible = next_visible
            scale = next_scale
            factor = next_factor
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        # All copies have arrived: each was waited for.
        for each in gl.static_range(STAGES):
            mbarrier.invalidate(full.index(each))
        mbarrier.invalidate(q_full)
