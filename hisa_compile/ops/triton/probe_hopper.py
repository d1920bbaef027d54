"""The probe's scores of blocks for NVIDIA's sm_90 where windows alone say what is visible, see :mod:`.probe`.

What Triton's own version waits for, this one does not: keys are copied by the tensor memory accelerator while the tile
before is multiplied, both heads of 64 rows stay in registers, and each thread stores what it has added up.  It takes 62
microseconds for 1024 queries at 64K tokens in float8, 75 in bfloat16 (an H100, docs/kernels.md), that one 63 to 66 and
more; floor: see there.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .group import clear_counts
from .hopper import barrier
from .keys import score_bits
from .overlap import wait_for_kernel_before
from .probe import (
    difference_of_relus,
    greater,
    inverse_of,
    sees_blocks,
    share_of_cap,
    with_parts_before,
    worth,
)
from .visible import row_window


@gluon.jit
def _fetch(k_desc, full, k_tile, k_row, BYTES: gl.constexpr):
    """Start copying a tile of keys into a buffer that everyone is done with."""
    mbarrier.expect(full, BYTES)
    barrier()
    tma.async_copy_global_to_shared(k_desc, [k_row, 0], full, k_tile)


@gluon.jit
def _factor(pointer, stride_batch, stride_token, batch, low, position, T):
    """The factors of the tokens ``low`` + ``position`` as [1, TILE]; None where there is no such tensor."""
    factor = None
    if pointer is not None:
        at = pointer + batch * stride_batch + low * stride_token
        # Whole tiles are read without a question, four threads' worth of addresses apart.
        offset = position.to(gl.int64) * stride_token
        if low + position.shape[0] <= T:
            factor = gl.load(at + offset)
        else:
            factor = gl.load(at + offset, mask=low + position < T, other=0.0)
        factor = factor[None, :]
    return factor


@gluon.jit
def _rows(batch_here, group, rows_per_batch, ROWS: gl.constexpr, layout: gl.constexpr):
    """(row of the chunk, query of its batch since the chunk's first, which are some) of a group of rows."""
    each = group * ROWS + gl.arange(0, ROWS, layout=layout)
    wanted = each < rows_per_batch
    each = gl.minimum(each, rows_per_batch - 1)
    return batch_here * rows_per_batch + each, each, wanted


@gluon.jit
def _of_blocks(x, layout: gl.constexpr):
    """The columns of x [ROWS, 2 or 4], each of which a thread has for its rows."""
    if x.shape[1] == 2:
        a, b = gl.split(x)
        blocks = (gl.convert_layout(a, layout, assert_trivial=True), gl.convert_layout(b, layout, assert_trivial=True))
    else:
        even, odd = gl.split(gl.reshape(x, [x.shape[0], 2, 2]))
        first, second = _of_blocks(even, layout), _of_blocks(odd, layout)
        blocks = (first[0], second[0], first[1], second[1])
    return blocks


@gluon.jit
def _tile_number(number, listed_ptr, TILES: gl.constexpr):
    """Which tile of all a program's ``number``-th is; with a list of outer blocks one of those, of TILES tiles each."""
    tile = number
    if listed_ptr is not None:
        tile = gl.load(listed_ptr + number // TILES) * TILES + number % TILES
    return tile


@gluon.jit(
    do_not_specialize=[
        "k_batch_rows", "first_row", "rows_per_batch", "splits", "S", "T", "M", "outer_blocks", "counts",
    ],
)  # fmt: skip
def probe_blocks_hopper_kernel(
    heads_ptr, thresholds_ptr, k_desc, k_batch_rows,
    scale_ptr, scale_sb, scale_st,
    k_weight_ptr, k_weight_sb, k_weight_st,
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    outer_flag_ptr, listed_ptr, listed_count_ptr,
    block_scores_ptr, counts_ptr, first_row, rows_per_batch, splits, S, T, M, outer_blocks, pitch, counts,
    D: gl.constexpr, BLOCK_SIZE: gl.constexpr, OUTER_SIZE: gl.constexpr, ROWS: gl.constexpr, TILE_D: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """:func:`.probe.probe_blocks_kernel` with the same grid, and, as far as it has them, the same arguments.

    TILE divides BLOCK_SIZE, or the other way round.  k_desc describes k as a matrix of rows of D elements, a sequence
    ``k_batch_rows`` behind the one before it.
    """
    wait_for_kernel_before(OVERLAP)
    WARPS: gl.constexpr = gl.num_warps()
    if counts_ptr is not None:
        clear_counts(counts_ptr, counts, gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [WARPS], [0])))
    BITS: gl.constexpr = k_desc.dtype.primitive_bitwidth
    BYTES: gl.constexpr = TILE * TILE_D * BITS // 8
    VECTOR: gl.constexpr = 128 // BITS
    LANES: gl.constexpr = TILE_D // VECTOR
    # A tile is a part of a block, or several blocks.
    PARTS: gl.constexpr = max(1, BLOCK_SIZE // TILE)
    BLOCKS: gl.constexpr = max(1, TILE // BLOCK_SIZE)
    UNIT: gl.constexpr = BLOCKS * BLOCK_SIZE
    TILES: gl.constexpr = OUTER_SIZE // TILE
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE, 256 // BITS])
    of_heads: gl.constexpr = gl.DotOperandLayout(0, product, 32 // BITS)
    of_rows: gl.constexpr = gl.SliceLayout(1, product)
    of_tokens: gl.constexpr = gl.SliceLayout(0, product)
    copy: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    k_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, TILE_D], k_desc.dtype)

    groups = (rows_per_batch + ROWS - 1) // ROWS
    number = gl.program_id(0) // splits
    batch_here = number // groups
    batch = (first_row // S + batch_here).to(gl.int64)
    row, each, wanted = _rows(batch_here, number % groups, rows_per_batch, ROWS, of_rows)
    query = (first_row % S).to(gl.int64) + each
    start, end = row_window(start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, query * 0 + batch, query, T)
    seen = start < end
    all_start = gl.max(start, axis=0)
    all_end = gl.min(end, axis=0)
    first = (gl.min(gl.where(seen, start, T), axis=0) // UNIT).to(gl.int32)
    past = ((gl.max(gl.where(seen, end, 0), axis=0) + UNIT - 1) // UNIT).to(gl.int32)
    if listed_ptr is not None:
        listed_ptr += number.to(gl.int64) * outer_blocks
        first = first * 0
        past = gl.load(listed_count_ptr + number)
    share = (gl.maximum(past - first, 0) + splits - 1) // splits
    first += gl.program_id(0) % splits * share
    past = gl.minimum(first + share, past)

    if first < past:
        k_row = (batch * k_batch_rows).to(gl.int32)
        # Numbers of tiles, of the listed ones where there is a list.
        if listed_ptr is not None:
            first *= TILES
            last = past * TILES - 1
        else:
            first *= PARTS
            last = past * PARTS - 1
        k_tiles = ()
        full = ()
        for _stage in gl.static_range(STAGES):
            k_tiles = k_tiles + (gl.allocate_shared_memory(k_desc.dtype, [TILE, TILE_D], k_shared),)
            full = full + (gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),)
        for stage in gl.static_range(STAGES):
            mbarrier.init(full[stage], count=1)
        for stage in gl.static_range(STAGES - 1):
            tile = _tile_number(gl.minimum(first + stage, last), listed_ptr, TILES)
            _fetch(k_desc, full[stage], k_tiles[stage], k_row + tile * TILE, BYTES)

        from_row, _each, some = _rows(batch_here, number % groups, rows_per_batch, ROWS, gl.SliceLayout(1, copy))
        dim = gl.arange(0, TILE_D, layout=gl.SliceLayout(0, copy))
        at = heads_ptr + from_row.to(gl.int64)[:, None] * (2 * D) + dim[None, :]
        inside = some[:, None] & (dim < D)[None, :]
        plus = gl.convert_layout(gl.load(at, mask=inside, other=0.0), of_heads)
        minus = gl.convert_layout(gl.load(at + D, mask=inside, other=0.0), of_heads)
        threshold = gl.load(thresholds_ptr + 2 * row)
        cap = gl.load(thresholds_ptr + 2 * row + 1)
        inverse_cap = inverse_of(cap)
        out_ptr = block_scores_ptr + row.to(gl.int64) * pitch
        if listed_ptr is not None:
            flag_ptr = outer_flag_ptr + row.to(gl.int64) * outer_blocks
        zeros = gl.zeros([ROWS, TILE], gl.float32, layout=product)
        position = gl.arange(0, TILE, layout=of_tokens)
        total = gl.zeros([ROWS], gl.float32, layout=of_rows)
        best = total - float("inf")
        eligible = row * 0
        phase = 0
        for base in range(first, last + 1, STAGES):
            for stage in gl.static_range(STAGES):
                # Behind the last tile it is scored again, and not stored.
                i = _tile_number(gl.minimum(base + stage, last), listed_ptr, TILES)
                ahead = _tile_number(gl.minimum(base + stage + STAGES - 1, last), listed_ptr, TILES)
                mbarrier.wait(full[stage], phase)
                x = warpgroup_mma(plus, k_tiles[stage].permute((1, 0)), zeros, use_acc=False, is_async=True)
                y = warpgroup_mma(minus, k_tiles[stage].permute((1, 0)), zeros, use_acc=False, is_async=True)
                # Into the buffer of the tile before, whose products everyone has waited for.
                _fetch(
                    k_desc, full[(stage + STAGES - 1) % STAGES], k_tiles[(stage + STAGES - 1) % STAGES],
                    k_row + ahead * TILE, BYTES,
                )  # fmt: skip
                low = i.to(gl.int64) * TILE
                scale = _factor(scale_ptr, scale_sb, scale_st, batch, low, position, T)
                factor = _factor(k_weight_ptr, k_weight_sb, k_weight_st, batch, low, position, T)
                x, y = warpgroup_mma_wait(0, deps=[x, y])
                probed = difference_of_relus(x, y, scale, factor)
                sees = row * 0 + 1
                if (low < all_start) | (low + TILE > all_end):
                    token = (low + position)[None, :]
                    visible = (token >= start[:, None]) & (token < end[:, None])
                    probed = gl.where(visible, probed, float("-inf"))
                    sees = gl.max(visible.to(gl.int32), axis=1)
                shares = share_of_cap(probed, threshold[:, None], inverse_cap[:, None], True)
                if BLOCKS > 1:
                    totals = _of_blocks(gl.sum(gl.reshape(shares, [ROWS, BLOCKS, BLOCK_SIZE]), axis=2), of_rows)
                    bests = _of_blocks(gl.reduce(gl.reshape(probed, [ROWS, BLOCKS, BLOCK_SIZE]), 2, greater), of_rows)
                else:
                    total_here = gl.sum(shares, axis=1)
                    greatest = gl.reduce(probed, 1, greater)
                    if PARTS == 1:
                        total = total_here
                        best = greatest
                        eligible = sees
                    else:
                        total, best, eligible = with_parts_before(
                            i % PARTS == 0, total, best, eligible, total_here, greatest, sees
                        )
                for part in gl.static_range(BLOCKS):
                    block = i // PARTS * BLOCKS + part
                    # The last tile may hold fewer blocks, and so may the last outer one hold fewer tiles.
                    ends = (i % PARTS == PARTS - 1) & (base + stage <= last)
                    if BLOCKS > 1:
                        total = totals[part]
                        best = bests[part]
                        eligible = sees_blocks(block.to(gl.int64), start, end, BLOCK_SIZE).to(gl.int32)
                    if BLOCKS > 1 or listed_ptr is not None:
                        ends = ends & (block < M)
                    scores = worth(total, best, threshold, cap)
                    shown = eligible != 0
                    if listed_ptr is not None:
                        outer = (i // TILES).to(gl.int64)
                        touched = sees_blocks(outer, start, end, OUTER_SIZE)
                        shown = shown & (gl.load(flag_ptr + outer, mask=touched, other=0) != 0)
                    gl.store(out_ptr + block, score_bits(scores, shown), mask=wanted & ends)
            phase ^= 1
        # Copies must not arrive in the shared memory of whoever comes after.
        for stage in gl.static_range(STAGES - 1):
            mbarrier.wait(full[stage], phase)
        for stage in gl.static_range(STAGES):
            mbarrier.invalidate(full[stage])
