"""Selection of many long rows for NVIDIA's sm_90, in Gluon: scores in shared memory, counted and placed as numbers.

What binds the selection in registers of :mod:`.select_hopper` are its integers: a multiprocessor compares and adds 64 a
cycle, of floating point twice as many.  So counts are of multiply-adds that saturate, see :func:`_reaches`, and what
goes where is added up in floating point as well, as long as it is exact: scores that are NaN or infinite, a k-th score
near 0.0 and more scores equal to it than are wanted go another way.  And of three rows on a multiprocessor much of the
time is waiting, for a count over all threads and for the next pivot that follows from it; six find room in shared
memory.

Floor: see :mod:`.select`; reading 32 KiB of shared memory for each of seven counts is 8 microseconds for 1024 rows on
132 multiprocessors.  2048 of 8192 columns of 1024 rows take 36, of 16384 78, in registers 37 and 94 (an H100,
docs/kernels.md).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .keys import HIDDEN_KEY, key_score, stored_key
from .kth import before_least, load_keys, narrow, one_of
from .overlap import wait_for_kernel_before
from .select import row_range
from .select_hopper import (
    add,
    before_each,
    before_fours,
    count_or_fill,
    held_columns,
    held_layout,
    lanes_layout,
    of_each_run,
    write_selected,
)

# Bits of the least and the greatest distance of neighbouring scores whose inverse is no subnormal and finite: 2 ** -126
# and 2 ** 126.
_NEAREST = gl.constexpr(0x00800000)
_FARTHEST = gl.constexpr(0x7E800000)
_INFINITY_BITS = gl.constexpr(0x7F800000)
# 2 ** 23: the bits of a number from it to twice as much, less these, are the number less 2 ** 23.
_COUNTER = gl.constexpr(8388608.0)
_COUNTER_BITS = gl.constexpr(0x4B000000)
# Columns of a part: four runs of 128 for each warp.
_PART = gl.constexpr(512)


@gluon.jit
def _step(below, above):
    """(factor, offset, are they exact) for :func:`_reaches`, of neighbouring scores."""
    distance = (above - below).to(gl.int32, bitcast=True)
    factor = (0x7F000000 - distance).to(gl.float32, bitcast=True)
    return factor, -below * factor, (distance >= _NEAREST) & (distance <= _FARTHEST)


@gluon.jit
def _reaches(score, factor, offset):
    """1.0 where score * factor + offset >= 1, 0.0 where it is <= 0, or NaN.

    With the inverse of the distance of two neighbouring scores, a power of 2, and the lower of them times that,
    negated: 1.0 from the upper one on, 0.0 up to the lower one, and nothing is in between.  One rounding keeps order.
    """
    return gl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [score, factor, offset], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _is_finite(score):
    """1.0 where it is, otherwise 0.0."""
    return gl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, 0f00000000, 0f3F800000;", "=f,f", [score], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.constexpr_function
def _flat(warps):
    return gl.BlockedLayout([4], [32], [warps], [0])


@gluon.constexpr_function
def _threads(warps):
    """The layout of [warps, 32], one for each thread."""
    return gl.SliceLayout(0, gl.SliceLayout(1, lanes_layout(warps)))


@gluon.jit
def _of_each_thread(x):
    """[.., FOUR, warps, 32, 4] -> [warps, 32], a sum in each thread alone."""
    return gl.sum(gl.sum(gl.sum(x, axis=4), axis=1), axis=0)


@gluon.jit
def _least_of_each_thread(x):
    return gl.min(gl.min(gl.min(x, axis=4), axis=1), axis=0)


@gluon.jit
def _most_of_each_thread(x):
    return gl.max(gl.max(gl.max(x, axis=4), axis=1), axis=0)


@gluon.jit
def _read(parts, part):
    """The bits of a part's scores, int32 [1, FOUR, warps, 32, 4] as :func:`.select_hopper.held_layout` has them."""
    WARPS: gl.constexpr = gl.num_warps()
    SIZE: gl.constexpr = parts.shape[1]
    bits = parts.index(part).load(_flat(WARPS)).reshape([1, SIZE // (128 * WARPS), WARPS, 32, 4])
    return gl.convert_layout(bits, held_layout(WARPS), assert_trivial=True)


@gluon.jit
def _count_shared(source, pivot, one):
    parts, finite = source
    WARPS: gl.constexpr = gl.num_warps()
    PARTS: gl.constexpr = parts.shape[0]
    # The greatest score below the pivot's, which is -0.0 below 0.0: no distance, as that of infinities.
    factor, offset, exact = _step(key_score(pivot - 1), key_score(pivot))
    if finite & exact:
        reached = gl.zeros([WARPS, 32], gl.float32, layout=_threads(WARPS))
        for part in gl.static_range(PARTS):
            scores = _read(parts, part).to(gl.float32, bitcast=True)
            reached += _of_each_thread(_reaches(scores, factor, offset))
        count = gl.sum(reached, axis=None).to(gl.int32)
    else:
        each = gl.zeros([WARPS, 32], gl.int32, layout=_threads(WARPS))
        for part in range(PARTS):
            each += _of_each_thread(gl.where(stored_key(_read(parts, part)) >= pivot, one, 0))
        count = gl.sum(each, axis=None)
    return count


@gluon.jit
def _draw_in_shared(source, low, high):
    parts, _ = source
    PARTS: gl.constexpr = parts.shape[0]
    least = high
    most = low
    for part in range(PARTS):
        keys = stored_key(_read(parts, part))
        least = gl.minimum(least, gl.min(gl.where(keys < low, high, keys), axis=None))
        most = gl.maximum(most, gl.max(gl.where(keys > high, low, keys), axis=None))
    return least, most


@gluon.jit
def _bounds(parts, one):
    """(the least key, the greatest, how many are not hidden, whether all these are finite and some not negative)."""
    WARPS: gl.constexpr = gl.num_warps()
    PARTS: gl.constexpr = parts.shape[0]
    # Bits of what is not negative rise with it, those of all else are negative.
    most = gl.full([WARPS, 32], -1, gl.int32, layout=_threads(WARPS))
    lowest = gl.full([WARPS, 32], float("inf"), gl.float32, layout=_threads(WARPS))
    number = gl.zeros([WARPS, 32], gl.float32, layout=_threads(WARPS))
    for part in range(PARTS):
        bits = _read(parts, part)
        scores = bits.to(gl.float32, bitcast=True)
        most = gl.maximum(most, _most_of_each_thread(bits))
        lowest = gl.minimum(lowest, _least_of_each_thread(scores))
        number += _of_each_thread(_is_finite(scores))
    high = gl.max(most, axis=None)
    score = gl.min(lowest, axis=None)
    finite = (high >= 0) & (high < _INFINITY_BITS) & (score > float("-inf"))
    low = stored_key(score.to(gl.int32, bitcast=True))
    total = gl.sum(number, axis=None).to(gl.int32)
    if not finite:
        highest = gl.full([WARPS, 32], HIDDEN_KEY, gl.int32, layout=_threads(WARPS))
        least = gl.full([WARPS, 32], 2147483647, gl.int32, layout=_threads(WARPS))
        present = gl.zeros([WARPS, 32], gl.int32, layout=_threads(WARPS))
        for part in range(PARTS):
            keys = stored_key(_read(parts, part))
            highest = gl.maximum(highest, _most_of_each_thread(keys))
            least = gl.minimum(least, _least_of_each_thread(before_least(keys)))
            present += _of_each_thread(gl.where(keys != HIDDEN_KEY, one, 0))
        high = gl.max(highest, axis=None)
        low = gl.min(least, axis=None) + 1
        total = gl.sum(present, axis=None)
    return low, high, total, finite


@gluon.jit
def _positions(kept_ptr, block_topk, first, BLOCK_SIZE: gl.constexpr, SIZE: gl.constexpr):
    """Of the columns [first, first + SIZE)."""
    of_four, element = held_columns(SIZE)
    column = first + of_four
    if kept_ptr is not None:
        block = gl.load(kept_ptr + gl.minimum(column // BLOCK_SIZE, block_topk - 1))
        column = block * BLOCK_SIZE + column % BLOCK_SIZE
    return column[:, :, :, :, None] + element


@gluon.jit(do_not_specialize=["first_row", "S", "T", "block_topk", "K"])
def select_shared_hopper_kernel(
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    kept_ptr, kept_count_ptr, token_scores_ptr,
    indices_ptr, keys_ptr, selected_count_ptr,
    first_row, S, T, pitch, block_topk, K,
    BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr, FINAL: gl.constexpr, MARK_HIDDEN: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """:func:`.select_hopper.select_tokens_hopper_kernel`, with the same arguments; TILE is a multiple of 512 columns a
    warp."""
    WARPS: gl.constexpr = gl.num_warps()
    SIZE: gl.constexpr = _PART * WARPS
    PARTS: gl.constexpr = TILE // SIZE
    FOUR: gl.constexpr = 4
    wait_for_kernel_before(OVERLAP)
    row = gl.program_id(0)
    first, past = row_range(
        start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, kept_count_ptr, first_row, row, S, T, BLOCK_SIZE
    )
    token_scores_ptr += row.to(gl.int64) * pitch
    indices_ptr += (row.to(gl.int64) + first_row) * K
    keys_ptr += (row.to(gl.int64) + first_row) * K
    if kept_ptr is not None:
        kept_ptr += row.to(gl.int64) * block_topk

    parts = gl.allocate_shared_memory(gl.int32, [PARTS, SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    column = gl.arange(0, SIZE, layout=_flat(WARPS))
    # Each thread reads what it wrote, or had copied, itself.
    if (first <= 0) & (past >= TILE):
        for part in gl.static_range(PARTS):
            async_copy.async_copy_global_to_shared(parts.index(part), token_scores_ptr + part * SIZE + column)
        async_copy.commit_group()
        async_copy.wait_group(0)
    else:
        for part in range(PARTS):
            keys = load_keys(token_scores_ptr, part * SIZE + column, first, past)
            parts.index(part).store(stored_key(keys))
    one = one_of(K)
    low, high, total, finite = _bounds(parts, one)
    selected = gl.minimum(K, total)
    threshold, ties = narrow((parts, finite), low, high, total, selected, one, _count_shared, _draw_in_shared)

    least = key_score(threshold + 1)
    factor, offset, exact = _step(key_score(threshold), least)
    if finite & exact & (ties == 0):
        so_far = gl.to_tensor(0.0)
        for part in range(PARTS):
            bits = _read(parts, part)
            scores = bits.to(gl.float32, bitcast=True)
            counts = _reaches(scores, factor, offset)
            of_fours = (gl.sum(counts, axis=4) + _COUNTER).to(gl.int32, bitcast=True) & 255
            packed = gl.sum(of_fours << of_each_run(FOUR)[:, :, :, None], axis=1)
            inside, earlier, count = before_fours(packed, FOUR)
            base = (inside | _COUNTER_BITS).to(gl.float32, bitcast=True)
            base += (earlier.to(gl.float32) + so_far)[:, :, :, None]
            place = base[:, :, :, :, None] + gl.associative_scan(counts, 4, add) - counts
            place = place.to(gl.int32, bitcast=True)
            position = _positions(kept_ptr, block_topk, part * SIZE, BLOCK_SIZE, SIZE)
            gl.store(indices_ptr - _COUNTER_BITS + place, position, mask=scores >= least)
            gl.store(keys_ptr - _COUNTER_BITS + place, bits if FINAL else stored_key(bits), mask=scores >= least)
            so_far += count.to(gl.float32)
    else:
        before = row * 0
        for part in range(PARTS):
            keys = stored_key(_read(parts, part))
            above = threshold
            if ties != 0:
                # Of those equal to it the first are selected, as if they were above it.
                equal = keys == threshold
                rank, equals = before_each(gl.where(equal, one, 0))
                keys = gl.where(equal & (rank >= ties), HIDDEN_KEY, keys)
                above = threshold - 1
                ties = gl.maximum(ties - equals, 0)
            position = _positions(kept_ptr, block_topk, part * SIZE, BLOCK_SIZE, SIZE)
            values = stored_key(keys) if FINAL else keys
            before += write_selected(indices_ptr + before, keys_ptr + before, position, keys, values, above, one)
    count_or_fill(
        start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, indices_ptr, keys_ptr, selected_count_ptr,
        selected, first_row, row, S, T, K, FINAL, MARK_HIDDEN,
    )  # fmt: skip
