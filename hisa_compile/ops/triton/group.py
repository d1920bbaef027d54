"""Kept blocks by block instead of by query: a counting sort of the pairs (query, kept block).

Neighbouring queries keep mostly the same blocks, and any 1024 queries keep each block of 64K tokens 128 times on
average.  With the pairs of a block side by side its keys are read once for many of them; query by query they are read
anew each time, which at one byte an element is more than the L2 cache delivers in the time of the products.

Floor: 64K pairs of 4 bytes, written and read: nothing; its two kernels take 6 microseconds, the time of their
dependent loads (an H100, docs/kernels.md).  Where there are not too many blocks each list has room for all rows, and
who finds the kept blocks writes the pairs; else they are sorted, so that memory does not grow with the context.

A pair is row * 2^16 + slot: the row within the chunk and the place in its list of kept blocks, plus IS_CUT where the
row's window does not hold the whole block: all others are seen whole as far as windows go.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .overlap import wait_for_kernel_before
from .visible import row_coordinates, row_window

IS_CUT = tl.constexpr(2**15)


@triton.jit
def pair_of(row, slot, block, start, end, BLOCK_SIZE: tl.constexpr):
    """Of a row of the chunk, whose window is [start, end), and a block that it keeps."""
    token = block.to(tl.int64) * BLOCK_SIZE
    cut = (token < start) | (token + BLOCK_SIZE > end)
    return row * 65536 + slot + tl.where(cut, IS_CUT, 0)


@triton.jit
def pair_row(pair):
    return pair >> 16


@triton.jit
def pair_slot(pair):
    return pair & 32767


@triton.jit
def rows_of_program(
    items_ptr, item_count_ptr, offsets_ptr, rows_per_batch, group_rows, T, M,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program's part of the refinement by block: (batch of the chunk, first token, inside, first, last).

    The tile of tokens from the first on, ``inside`` so far into their block, and the pairs [first, last) of an item,
    or, without items, the rows [first, last) of the batch; none of either where the program has no work.
    """
    program = tl.program_id(0)
    inside = 0
    if items_ptr is not None:
        PARTS: tl.constexpr = BLOCK_SIZE // TILE
        item = program // PARTS
        inside = program % PARTS * TILE
        first = 0
        last = 0
        number = 0
        if item < tl.load(item_count_ptr):
            number = tl.load(items_ptr + 2 * item)
            first = tl.load(items_ptr + 2 * item + 1)
            last = tl.minimum(first + group_rows, tl.load(offsets_ptr + number + 1))
        batch_here = number // M
        first_token = (number % M).to(tl.int64) * BLOCK_SIZE + inside
    else:
        groups = (rows_per_batch + group_rows - 1) // group_rows
        tiles = (T + TILE - 1) // TILE
        batch_here = program // groups // tiles
        first_token = (program // groups % tiles).to(tl.int64) * TILE
        first = program % groups * group_rows
        last = tl.minimum(first + group_rows, rows_per_batch)
    return batch_here, first_token, inside, first, last


@triton.jit
def clear_counts(counts_ptr, counts, near):
    """Zero counts_ptr int32 [counts], all programs together; ``near``: 0, 1, 2, ... as many as a step takes."""
    STEP: tl.constexpr = near.shape[0]
    for base in range(tl.program_id(0) * STEP, counts, tl.num_programs(0) * STEP):
        tl.store(counts_ptr + base + near, near * 0, mask=base + near < counts)


@triton.jit(do_not_specialize=["lists", "most_pairs", "room", "apart"])
def list_items_kernel(
    counts_ptr, offsets_ptr, items_ptr, item_count_ptr, lists, most_pairs, room, apart,
    TILE: tl.constexpr, SUM_TILE: tl.constexpr, PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(lists, TILE)).  From the number of pairs of each (batch, block), the first of its counts_ptr int32
    [lists, apart]:

    offsets_ptr int32 [lists + 1] gets, behind a 0, where each list of pairs ends, items_ptr int32 [items, 2] (list,
    first pair) of every item of work, which is at most ``most_pairs`` pairs of one list, and item_count_ptr their
    number.  Lists begin every ``room`` pairs, or, where that is 0, each where the one before ends.  Items of fewer
    pairs come last: a GPU that has no more work is then idle for a short one's time at most.
    A program adds up what comes before its own lists by itself: they are few, and nobody has to wait.
    """
    wait_for_kernel_before(OVERLAP)
    base = tl.program_id(0) * TILE
    pairs = tl.zeros([SUM_TILE], tl.int32)
    full = tl.zeros([SUM_TILE], tl.int32)
    short = tl.zeros([SUM_TILE], tl.int32)
    all_full = tl.zeros([SUM_TILE], tl.int32)
    for before in range(0, lists, SUM_TILE):
        number = before + tl.arange(0, SUM_TILE)
        count = tl.load(counts_ptr + number * apart, mask=number < lists, other=0)
        all_full += count // most_pairs
        count = tl.where(number < base, count, 0)
        pairs += count
        full += count // most_pairs
        short += (count % most_pairs != 0).to(tl.int32)
    first = tl.sum(pairs, axis=0)
    total_full = tl.sum(all_full, axis=0)
    number = base + tl.arange(0, TILE)
    count = tl.load(counts_ptr + number * apart, mask=number < lists, other=0)
    first_pair = first + tl.cumsum(count, axis=0) - count
    first_pair = tl.where(room > 0, number * room, first_pair)
    tl.store(offsets_ptr + number + 1, first_pair + count, mask=number < lists)
    parts = count // most_pairs
    rest = (count % most_pairs != 0).to(tl.int32)
    item = tl.sum(full, axis=0) + tl.cumsum(parts, axis=0) - parts
    short_item = total_full + tl.sum(short, axis=0) + tl.cumsum(rest, axis=0) - rest
    for part in range(0, tl.max(parts, axis=0), PARTS):
        each = part + tl.arange(0, PARTS)[None, :]
        place = items_ptr + 2 * (item[:, None] + each)
        tl.store(place, number[:, None] + each * 0, mask=each < parts[:, None])
        tl.store(place + 1, first_pair[:, None] + each * most_pairs, mask=each < parts[:, None])
    tl.store(items_ptr + 2 * short_item, number, mask=rest != 0)
    tl.store(items_ptr + 2 * short_item + 1, first_pair + parts * most_pairs, mask=rest != 0)
    if base == 0:
        tl.store(offsets_ptr, 0)
    if base + TILE >= lists:
        tl.store(item_count_ptr, total_full + tl.sum(short, axis=0) + tl.sum(rest, axis=0))


@triton.jit(do_not_specialize=["first_row", "rows", "rows_per_batch", "S", "T", "M", "block_topk"])
def sort_pairs_kernel(
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    kept_ptr, kept_count_ptr, rank_ptr, offsets_ptr, pairs_ptr,
    first_row, rows, rows_per_batch, S, T, M, block_topk, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(rows * block_topk, TILE)).  kept_ptr, rank_ptr int32 [rows, block_topk]: a row's kept blocks, and each
    one's place among the pairs of that block, in any order; pairs_ptr int32 [rows * block_topk] gets the pairs.
    """
    wait_for_kernel_before(OVERLAP)
    entry = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = (entry // block_topk).to(tl.int32)
    slot = (entry % block_topk).to(tl.int32)
    count = tl.load(kept_count_ptr + row, mask=row < rows, other=0)
    listed = slot < count
    block = tl.load(kept_ptr + entry, mask=listed, other=0)
    place = tl.load(offsets_ptr + row // rows_per_batch * M + block, mask=listed, other=0)
    place += tl.load(rank_ptr + entry, mask=listed, other=0)
    # Entries past the last row have no window to be read.
    _, batch, query = row_coordinates(first_row, tl.minimum(row, rows - 1), S)
    start, end = row_window(start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, batch, query, T)
    tl.store(pairs_ptr + place, pair_of(row, slot, block, start, end, BLOCK_SIZE), mask=listed)
