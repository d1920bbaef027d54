"""Selection for NVIDIA's sm_90, in Gluon: of tokens, written as they are to be, from registers; of blocks, by who needs
them next.

:mod:`.select`, for any GPU, first writes columns and then reads these, their scores and their blocks again: which
thread writes what is not its to say.  That is a quarter of its instructions and three waits for memory.  Floor: see
there; 37 microseconds for 2048 of 8192 columns, 1024 rows (an H100, docs/kernels.md).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from .finish import fill_outside_window
from .hopper import barrier
from .keys import HIDDEN_KEY, stored_key
from .kth import but, kth_key, load_keys, one_of
from .overlap import wait_for_kernel_before
from .select import row_range
from .visible import row_coordinates, row_window

# Columns that the threads of a warp hold side by side, four each.
_RUN = gl.constexpr(128)


@gluon.constexpr_function
def held_layout(warps):
    """The layout of a row's columns as [.., FOUR, warps, 32, 4]: runs go to the warps in turn."""
    return gl.BlockedLayout([1, 1, 1, 1, 4], [1, 1, 1, 32, 1], [1, 1, warps, 1, 1], [4, 3, 2, 1, 0])


@gluon.jit
def add(a, b):
    return a + b


@gluon.constexpr_function
def lanes_layout(warps):
    """That of [.., FOUR, warps, 32], a value for each four columns."""
    return gl.SliceLayout(4, held_layout(warps))


@gluon.jit
def of_each_run(FOUR: gl.constexpr):
    """[1, FOUR, 1]: how far up the byte is in which each of four runs counts."""
    of_runs: gl.constexpr = gl.SliceLayout(3, lanes_layout(gl.num_warps()))
    return 8 * gl.arange(0, FOUR, layout=gl.SliceLayout(0, gl.SliceLayout(2, of_runs)))[None, :, None]


@gluon.jit
def before_fours(packed, FOUR: gl.constexpr):
    """(what is counted before each four columns of their run, [.., FOUR, warps, 32]; before each run,
    [.., FOUR, warps]; in all) of what each thread counts in FOUR runs: bytes of integers [.., warps, 32].
    """
    OUTER: gl.constexpr = packed.shape[0]
    WARPS: gl.constexpr = packed.shape[1]
    RUNS: gl.constexpr = OUTER * FOUR * WARPS
    of_lanes: gl.constexpr = lanes_layout(WARPS)
    of_runs: gl.constexpr = gl.SliceLayout(3, of_lanes)
    shift = of_each_run(FOUR)
    # The same layout by another name, of which the compiler knows how to add up.
    flat: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 1, 32], [1, WARPS, 1], [2, 1, 0])
    inside = gl.associative_scan(gl.convert_layout(packed, flat, assert_trivial=True), 2, add)
    inside = gl.convert_layout(inside, gl.SliceLayout(1, of_lanes), assert_trivial=True) - packed
    inside = (inside[:, None, :, :] >> shift[:, :, :, None]) & 255
    # Of each run what the runs before it count, which each warp adds up for itself.
    total = (gl.sum(packed[:, None, :, :], axis=3) >> shift) & 255
    near: gl.constexpr = gl.BlockedLayout([max(1, RUNS // 32)], [32], [WARPS], [0])
    total = gl.convert_layout(gl.reshape(total, [RUNS]), near)
    so_far = gl.associative_scan(total, 0, add)
    earlier = gl.reshape(so_far - total, [OUTER, FOUR, WARPS])
    return inside, gl.convert_layout(earlier, of_runs), gl.max(so_far, axis=0)


@gluon.jit
def before_each(counts):
    """(the sum of ``counts``, each 0 or 1, before each column; of all), see :func:`held_layout`."""
    FOUR: gl.constexpr = counts.shape[1]
    # Of four runs one integer is made: a byte holds what a run counts.
    packed = gl.sum(gl.sum(counts, axis=4) << of_each_run(FOUR)[:, :, :, None], axis=1)
    inside, earlier, total = before_fours(packed, FOUR)
    inside += earlier[:, :, :, None]
    return inside[:, :, :, :, None] + gl.associative_scan(counts, 4, add) - counts, total


@gluon.jit
def held_columns(TILE: gl.constexpr):
    """(the first of each four columns [.., FOUR, warps, 32], 0 to 3 along the last dimension): :func:`held_layout`."""
    WARPS: gl.constexpr = gl.num_warps()
    FOUR: gl.constexpr = min(4, TILE // (_RUN * WARPS))
    OUTER: gl.constexpr = TILE // (_RUN * WARPS * FOUR)
    held: gl.constexpr = held_layout(WARPS)
    of_lanes: gl.constexpr = lanes_layout(WARPS)
    of_runs: gl.constexpr = gl.SliceLayout(3, of_lanes)
    outer = gl.arange(0, OUTER, layout=gl.SliceLayout(1, gl.SliceLayout(2, of_runs)))
    four = gl.arange(0, FOUR, layout=gl.SliceLayout(0, gl.SliceLayout(2, of_runs)))
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(0, gl.SliceLayout(1, of_runs)))
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, of_lanes))))
    element = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, held)))))
    run = (outer[:, None] * FOUR + four[None, :])[:, :, None] * WARPS + warp[None, None, :]
    return run[:, :, :, None] * _RUN + lane[None, None, None, :] * 4, element[None, None, None, None, :]


@gluon.jit
def one_a_thread():
    """0, 1, 2, ..., one for each thread."""
    WARPS: gl.constexpr = gl.num_warps()
    return gl.arange(0, 32 * WARPS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))


@gluon.jit
def write_selected(columns_ptr, values_ptr, column, keys, values, threshold, one):
    """Columns and values of the keys above the threshold, side by side; returns how many there are."""
    place, count = before_each(gl.where(keys > threshold, one, 0))
    # Once more, which takes less than to keep the answers; the compiler cannot know that it is.
    taken = keys > threshold + (one - 1)
    gl.store(columns_ptr + place, column, mask=taken)
    gl.store(values_ptr + place, values, mask=taken)
    return count


@gluon.jit
def _first_of_equal(keys, threshold, ties, one):
    """(keys, threshold) without ties: of those equal to it the first are selected, as if they were above it."""
    if ties != 0:
        equal = keys == threshold
        rank, _ = before_each(gl.where(equal, one, 0))
        keys = gl.where(equal & (rank >= ties), HIDDEN_KEY, keys)
        threshold -= 1
    return keys, threshold


@gluon.jit
def keep_blocks(
    scores_ptr, kept_ptr, kept_count_ptr, start, end, block_topk, BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr
):
    """:func:`.select.select_blocks_kernel` for one row, with the window [start, end), by a program that goes on.

    TILE is a multiple of 128 blocks a warp, and no less than the row has.  scores_ptr, kept_ptr, kept_count_ptr: the
    row's.  Several programs of a row write the same values, and each reads what it wrote itself.  Returns how many
    blocks are kept; all threads of the program can read which, and the accelerator may write where this had something
    in shared memory.
    """
    first_block = (start // BLOCK_SIZE).to(gl.int32)
    past_block = gl.where(start < end, (end + BLOCK_SIZE - 1) // BLOCK_SIZE, 0).to(gl.int32)
    of_four, element = held_columns(TILE)
    column = of_four[:, :, :, :, None] + element
    keys = load_keys(scores_ptr, column, first_block, past_block)
    # The first and the last eligible block; none at all leaves first > last.
    first = gl.min(gl.where(keys != HIDDEN_KEY, column, past_block), axis=None)
    last = gl.max(gl.where(keys != HIDDEN_KEY, column, -1), axis=None)
    always = gl.where(first > last, 0, gl.where(first == last, 1, 2))
    one = one_of(block_topk)
    keys = but(keys, column, first, last)
    threshold, ties, count = kth_key(keys, block_topk - always, one)
    keys, threshold = _first_of_equal(keys, threshold, ties, one)
    # The two that are always kept are not among the keys: nothing eligible lies before one or behind the other.
    place, _ = before_each(gl.where(keys > threshold, one, 0))
    place += gl.where(column > first, 1, 0)
    inside = (column >= first_block) & (column < past_block)
    taken = (keys > threshold + (one - 1)) | ((column == first) | (column == last)) & inside
    gl.store(kept_ptr + place, column, mask=taken)
    kept = count + always
    gl.store(kept_count_ptr, kept)
    # Read before it is known how many there are.
    near = one_a_thread()
    THREADS: gl.constexpr = near.shape[0]
    for base in range(kept // THREADS * THREADS, block_topk, THREADS):
        slot = base + near
        gl.store(kept_ptr + slot, slot * 0, mask=(slot >= kept) & (slot < block_topk))
    fence_async_shared()
    barrier()
    return kept


@gluon.jit
def count_or_fill(
    start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, indices_ptr, keys_ptr, selected_count_ptr,
    selected, first_row, row, S, T, K, FINAL: gl.constexpr, MARK_HIDDEN: gl.constexpr,
):  # fmt: skip
    """How many of a row are selected, for who fills it up; or, without a place for it, a row of too few is filled here,
    from outside its window.  indices_ptr, keys_ptr: the row's."""
    if selected_count_ptr is not None:
        gl.store(selected_count_ptr + row, selected)
    elif selected < K:
        _, batch, query_index = row_coordinates(first_row, row, S)
        start, end = row_window(start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, batch, query_index, T)
        fill_outside_window(indices_ptr, keys_ptr, selected, start, end, K, one_a_thread(), FINAL, MARK_HIDDEN)


@gluon.jit(do_not_specialize=["first_row", "S", "T", "block_topk", "K"])
def select_tokens_hopper_kernel(
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    kept_ptr, kept_count_ptr, token_scores_ptr,
    indices_ptr, keys_ptr, selected_count_ptr,
    first_row, S, T, pitch, block_topk, K,
    BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr, FINAL: gl.constexpr, MARK_HIDDEN: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """:func:`.select.select_tokens_kernel` for rows of no more than TILE columns, with the same grid, and, as far as it
    has them, the same arguments.  TILE is a multiple of 128 columns a warp, BLOCK_SIZE of 4.
    """
    wait_for_kernel_before(OVERLAP)
    row = gl.program_id(0)
    first, past = row_range(
        start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, kept_count_ptr, first_row, row, S, T, BLOCK_SIZE
    )
    token_scores_ptr += row.to(gl.int64) * pitch
    indices_ptr += (row.to(gl.int64) + first_row) * K
    keys_ptr += (row.to(gl.int64) + first_row) * K

    of_four, element = held_columns(TILE)
    column = of_four[:, :, :, :, None] + element
    one = one_of(K)
    if (first <= 0) & (past >= TILE):
        keys = stored_key(gl.load(token_scores_ptr + column))
    else:
        keys = load_keys(token_scores_ptr, column, first, past)
    threshold, ties, selected = kth_key(keys, K, one)
    keys, threshold = _first_of_equal(keys, threshold, ties, one)
    position = column
    if kept_ptr is not None:
        block = gl.load(kept_ptr + row.to(gl.int64) * block_topk + gl.minimum(of_four // BLOCK_SIZE, block_topk - 1))
        position = (block * BLOCK_SIZE + of_four % BLOCK_SIZE)[:, :, :, :, None] + element
    # From 0.0 on a score's key is its bits.
    if FINAL and threshold < 0:
        write_selected(indices_ptr, keys_ptr, position, keys, stored_key(keys), threshold, one)
    else:
        write_selected(indices_ptr, keys_ptr, position, keys, keys, threshold, one)
    count_or_fill(
        start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, indices_ptr, keys_ptr, selected_count_ptr,
        selected, first_row, row, S, T, K, FINAL, MARK_HIDDEN,
    )  # fmt: skip
