"""Scores of a tile of vectors for many queries on NVIDIA's sm_90, in Gluon, Triton's lower level.

A product of 64 tokens with 64 heads and its sum over heads take 130 ns a query and half a block on one multiprocessor
of an H100 if nothing else happens, in float8; what comes on top is what this kernel is about:

- the keys, or means of blocks, which stay for many queries, are in registers: both operands in shared memory would
  take all it delivers;
- queries and their weights are copied by the tensor memory accelerator, an instruction of one thread each, while the
  product before runs.  Stages are unrolled and have buffers of their own, so that few barriers are enough;
- whether a tile is seen whole is part of the pair (see :mod:`.group`), so that windows are read where they cut one;
- each thread ends with one score, which takes a fourth of the instructions for its bits and its place, and finds it
  among its own registers;
- 128 registers a thread in float8, so that four programs share a multiprocessor and one adds up while others multiply.

Floor of the refinement: 2 * S * m * B * H * D operations, 137 GFLOP for 1024 queries, 104 microseconds at the 1326
TFLOP/s of a large float8 product; it takes 150, launched from the host 156, and products with sums alone 128: an H100
at the limit of its power (docs/kernels.md).

The bits are those of :mod:`.refine` and :mod:`.coarse`: what works on layouts that are given already is called from
the same modules, what makes layouts has to say which, and so is written here.
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

from .group import IS_CUT, pair_row, pair_slot
from .keys import HIDDEN_BITS, score_bits
from .operands import load_factor
from .score import head_sum, is_any_negative
from .visible import row_segment, row_window, visible_tokens

# Triton 3.7 renamed it.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.constexpr_function
def quads_of(TILE, WARPS):
    """The layout of [TILE, 4] in which four threads that have the same tokens' sums, two or four of them, have columns
    of their own."""
    return gl.DistributedLinearLayout(
        [[8, 0]] if TILE == 16 * WARPS else [[8, 0], [16 * WARPS, 0]],
        [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]] if WARPS == 4 else [[16, 0], [32, 0], [64, 0]],
        [],
        [TILE, 4],
    )


@gluon.jit
def _fetch(
    q_desc, w_desc, q_full, w_full, q_tile, w_tile, q_row, w_first, Q_BYTES: gl.constexpr, W_BYTES: gl.constexpr
):
    """Start copying the rows of q from ``q_row`` on, and weights; all must be past the buffers' last use.

    The compiler has everyone wait between two copies that arrive at the same place: each has its own.
    """
    mbarrier.expect(q_full, Q_BYTES)
    mbarrier.expect(w_full, W_BYTES)
    barrier()
    tma.async_copy_global_to_shared(q_desc, [q_row, 0], q_full, q_tile)
    tma.async_copy_global_to_shared(w_desc, [w_first], w_full, w_tile)


@gluon.jit
def one_each(values, which, lane, TILE: gl.constexpr, WARPS: gl.constexpr):
    """Of values that four threads have alike, TILE of them, one each: that whose number ``which`` is the ``lane``.

    Sums of one value and nothing stay in registers; a conversion of layouts would go through shared memory.
    """
    kept = gl.where(lane[None, :] == which[:, None], values[:, None], 0)
    # Rows of a warp's first product, then of its second: 8 and 8 more of each.
    kept = kept.reshape([TILE // (16 * WARPS), WARPS, 2, 8, 4]).permute([1, 3, 4, 0, 2])
    return gl.sum(kept.reshape([WARPS, 8, 4, TILE // (8 * WARPS)]), axis=3)


@gluon.jit
def with_sign(x, sign):
    """The vectors x, negative where their ``sign`` is: a bit of each element."""
    whole: gl.constexpr = gl.int8 if x.dtype.primitive_bitwidth == 8 else gl.int16
    turn = gl.where(sign < 0.0, -1, 0).to(whole) << (x.dtype.primitive_bitwidth - 1)
    return (x.to(whole, bitcast=True) ^ turn[:, None]).to(x.dtype, bitcast=True)


@gluon.jit
def score_tile_of_rows(
    q_desc, q_at, q_query_rows, w_desc,
    x_ptr, x_sx, x_sd, x_count, first_vector, inside,
    scale_ptr, scale_sb, scale_st,
    k_weight_ptr, k_weight_sb, k_weight_st,
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    valid_ptr, valid_sb, valid_st,
    mask_ptr, mask_sb, mask_ss, mask_st,
    q_segment_ptr, q_segment_sb, q_segment_ss,
    k_segment_ptr, k_segment_sb, k_segment_st,
    pairs_ptr, scores_ptr,
    batch, of_batch, query_of_row, first, last, cut, pitch, T,
    H: gl.constexpr, D: gl.constexpr, BLOCK_SIZE: gl.constexpr, UNIT: gl.constexpr,
    PADDED_H: gl.constexpr, TILE_D: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores of the vectors [first_vector, first_vector + TILE) for ``last`` - ``first`` > 0 rows.

    x_ptr: the batch's vectors, ``x_count`` of them, each one for UNIT tokens.  The rows are those of the pairs [first,
    last), and the scores' columns those of the pair's slot and ``inside`` it, or, where pairs_ptr is None, rows
    ``of_batch`` + [first, last) and the columns of the vectors' numbers; ``cut`` then tells whether a window cuts the
    tile.  ``query_of_row`` added to a row of the chunk is its query, q_at + q_query_rows * row its first row in q_desc.
    w_desc: the chunk's weights, H float32 a row, as one vector.
    """
    WARPS: gl.constexpr = gl.num_warps()
    BITS: gl.constexpr = q_desc.dtype.primitive_bitwidth
    Q_BYTES: gl.constexpr = PADDED_H * TILE_D * BITS // 8
    W_BYTES: gl.constexpr = PADDED_H * 4
    VECTOR: gl.constexpr = 128 // BITS
    LANES: gl.constexpr = TILE_D // VECTOR
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, PADDED_H, 256 // BITS])
    of_keys: gl.constexpr = gl.DotOperandLayout(0, product, 32 // BITS)
    tokens: gl.constexpr = gl.SliceLayout(1, product)
    heads: gl.constexpr = gl.SliceLayout(0, product)
    k_copy: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    w_shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    q_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PADDED_H, TILE_D], q_desc.dtype)
    quads: gl.constexpr = quads_of(TILE, WARPS)
    of_quads: gl.constexpr = gl.SliceLayout(1, quads)

    q_tiles = ()
    w_tiles = ()
    q_full = ()
    w_full = ()
    for _stage in gl.static_range(STAGES):
        q_tiles = q_tiles + (gl.allocate_shared_memory(q_desc.dtype, [PADDED_H, TILE_D], q_shared),)
        w_tiles = w_tiles + (gl.allocate_shared_memory(gl.float32, [PADDED_H], w_shared),)
        q_full = q_full + (gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),)
        w_full = w_full + (gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),)
    for stage in gl.static_range(STAGES):
        mbarrier.init(q_full[stage], count=1)
        mbarrier.init(w_full[stage], count=1)
    # The pairs, or rows, from that which is scored next to that which is copied next; the last one again behind it.
    queue = (first,)
    for stage in gl.static_range(1, STAGES):
        queue = queue + (gl.minimum(first + stage, last - 1),)
    if pairs_ptr is not None:
        pairs = ()
        for stage in gl.static_range(STAGES):
            pairs = pairs + (gl.load(pairs_ptr + queue[stage]),)
        queue = pairs
    for stage in gl.static_range(STAGES - 1):
        row = of_batch + queue[stage]
        if pairs_ptr is not None:
            row = pair_row(queue[stage])
        _fetch(
            q_desc, w_desc, q_full[stage], w_full[stage], q_tiles[stage], w_tiles[stage],
            q_at + row * q_query_rows, row * H, Q_BYTES, W_BYTES,
        )  # fmt: skip

    if valid_ptr is not None:
        valid_ptr += batch * valid_sb
    if mask_ptr is not None:
        mask_ptr += batch * mask_sb
    if k_segment_ptr is not None:
        k_segment_ptr += batch * k_segment_sb
    look: gl.constexpr = valid_ptr is not None or mask_ptr is not None or k_segment_ptr is not None
    vector = first_vector + gl.arange(0, TILE, layout=gl.SliceLayout(1, k_copy))
    dim = gl.arange(0, TILE_D, layout=gl.SliceLayout(0, k_copy))
    keys = gl.load(
        x_ptr + vector[:, None] * x_sx + dim.to(gl.int64)[None, :] * x_sd,
        mask=(vector < x_count)[:, None] & (dim < D)[None, :],
        other=0.0,
    )
    token = first_vector + gl.arange(0, TILE, layout=tokens)
    scale = load_factor(scale_ptr, scale_sb, scale_st, batch, token, token < x_count)
    factor = load_factor(k_weight_ptr, k_weight_sb, k_weight_st, batch, token, token < x_count)
    if scale is not None:  # noqa: SIM102 (the one is known when the kernel is compiled, the other is not)
        if is_any_negative(scale):
            # Of a vector its sign, which is rare, costs nothing a query; of products it is the same, bit for bit.
            sign = load_factor(scale_ptr, scale_sb, scale_st, batch, vector, vector < x_count)
            keys = with_sign(keys, sign)
    keys = gl.convert_layout(keys, of_keys)
    real = None
    if PADDED_H != H:
        real = gl.arange(0, PADDED_H, layout=heads) < H
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, quads)) % (TILE // (8 * WARPS))
    own = gl.arange(0, TILE, layout=of_quads)
    which = own // 8 % 2 + own // (16 * WARPS) * 2
    position = one_each(own, which, lane, TILE, WARPS)
    zeros = gl.zeros([TILE, PADDED_H], gl.float32, layout=product)

    # The last pair is scored again where the stages end behind it, which changes nothing.
    phase = 0
    for base in range(first, last, STAGES):
        for stage in gl.static_range(STAGES):
            pair = queue[0]
            row = of_batch + queue[0]
            ahead = of_batch + queue[STAGES - 1]
            if pairs_ptr is not None:
                row = pair_row(queue[0])
                ahead = pair_row(queue[STAGES - 1])
            mbarrier.wait(q_full[stage], phase)
            products = warpgroup_mma(keys, q_tiles[stage].permute((1, 0)), zeros, use_acc=False, is_async=True)
            mbarrier.wait(w_full[stage], phase)
            # Into the buffers of the query before, whose product everyone has waited for.
            _fetch(
                q_desc, w_desc, q_full[(stage + STAGES - 1) % STAGES], w_full[(stage + STAGES - 1) % STAGES],
                q_tiles[(stage + STAGES - 1) % STAGES], w_tiles[(stage + STAGES - 1) % STAGES],
                q_at + ahead * q_query_rows, ahead * H, Q_BYTES, W_BYTES,
            )  # fmt: skip
            # Past H they are another row's, which ``real`` keeps out.
            weights = w_tiles[stage].load(heads)
            # Before others are copied to where they are; the compiler would have everyone wait for it by itself.
            fence_async_shared()
            entry = gl.minimum(base + stage + STAGES, last - 1)
            if pairs_ptr is not None:
                entry = gl.load(pairs_ptr + entry)
            queue = queue[1:] + (entry,)
            column = first_vector.to(gl.int32)
            query = query_of_row + row
            out_ptr = scores_ptr + row * pitch
            if pairs_ptr is not None:
                column = pair_slot(pair) * BLOCK_SIZE + inside
                cut = (pair & IS_CUT) != 0
            products = warpgroup_mma_wait(0, deps=[products])
            scores = head_sum(products, weights, real, scale, False, factor)
            bits = gl.convert_layout(scores, of_quads, assert_trivial=True).to(gl.int32, bitcast=True)
            bits = score_bits(one_each(bits, which, lane, TILE, WARPS).to(gl.float32, bitcast=True), None)
            if look or cut:
                start, end = row_window(start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, batch, query, T)
                if UNIT != 1:
                    # The vectors whose tokens the window touches, none for an empty one.
                    end = gl.where(start < end, (end + UNIT - 1) // UNIT, 0)
                    start = start // UNIT
                segment = row_segment(q_segment_ptr, q_segment_sb, q_segment_ss, batch, query)
                row_mask_ptr = mask_ptr
                if mask_ptr is not None:
                    row_mask_ptr += query * mask_ss
                visible = visible_tokens(
                    first_vector + position, start, end, valid_ptr, valid_st, row_mask_ptr, mask_st,
                    k_segment_ptr, k_segment_st, segment,
                )  # fmt: skip
                bits = gl.where(visible, bits, HIDDEN_BITS)
            # Whole tiles, also past the last vector, as far as the row of scores goes: selection reads more than it
            # needs.
            if pairs_ptr is None:
                gl.store(out_ptr + (column + position), bits, mask=column + position < pitch)
            else:
                gl.store(out_ptr + (column + position), bits)
        phase ^= 1
    # Copies must not arrive in the shared memory of whoever comes after.
    for stage in gl.static_range(STAGES - 1):
        mbarrier.wait(q_full[stage], phase)
        mbarrier.wait(w_full[stage], phase)
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(q_full[stage])
        mbarrier.invalidate(w_full[stage])
