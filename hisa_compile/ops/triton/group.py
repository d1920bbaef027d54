"""Kept blocks by block instead of by query: a counting sort of the pairs (query, kept block).

Neighbouring queries keep mostly the same blocks, and any 1024 queries keep each block of 64K tokens 128 times on
average.  With the pairs of a block side by side its keys are read once for many of them; query by query they are read
anew each time, which at one byte an element is more than the L2 cache delivers in the time of the products.

Floor: 64K pairs of 4 bytes, written and read: nothing; it takes 2.5 microseconds, the time of dependent loads (an H100,
docs/kernels.md).  Where that takes little memory each list has room for all rows, and who finds the kept blocks writes
the pairs; else they are sorted, which takes a second kernel.

A pair is row * 2^16 + slot: the row within the chunk and the place in its list of kept blocks, plus IS_CUT where the
row's window does not hold the whole block: all others are seen whole as far as windows go.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .overlap import wait_for_kernel_before
from .visible import row_coordinates, row_window

IS_CUT = tl.constexpr(2**15)
# Of the refinements by block, on any GPU: what changes from call to call and compiles nothing anew.
NOT_SPECIALIZED = ["first_row", "rows_per_batch", "group_rows", "shares", "least", "room", "run_cost", "S", "T", "M"]


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
def share_size(total, shares, least):
    """Of each program but perhaps the last: all of them in so many ``shares``, and not less than ``least``."""
    return tl.maximum(tl.cdiv(total, shares), least)


@triton.jit
def runs_of_program(
    lists_ptr, first_list_ptr, totals_ptr, shares, least, rows_per_batch, group_rows, T,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What a program of the refinement by block goes over: (low, high, inside, first run, past the last run).

    With lists its share [low, high), see :func:`list_runs_kernel`, of a tile ``inside`` so far into their block; each
    list is a run.  Without, the rows [low, high) of the batch as a run of their own: its number is that of a tile of
    tokens, over all batches.  None of either where the program has no work.
    """
    program = tl.program_id(0)
    if lists_ptr is not None:
        PARTS: tl.constexpr = BLOCK_SIZE // TILE
        number = program // PARTS
        inside = program % PARTS * TILE
        # The next share begins in this one's last list, or behind it.
        run = tl.load(first_list_ptr + number)
        past = tl.minimum(tl.load(first_list_ptr + number + 1) + 1, tl.load(totals_ptr + 1))
        total = tl.load(totals_ptr)
        share = share_size(total, shares, least)
        low = number * share
        high = tl.minimum(low + share, total)
    else:
        groups = (rows_per_batch + group_rows - 1) // group_rows
        inside = 0
        run = program // groups
        past = run + 1
        low = program % groups * group_rows
        high = tl.minimum(low + group_rows, rows_per_batch)
    return low, high, inside, run, past


@triton.jit
def rows_of_run(
    lists_ptr, run, low, high, inside, T, M, room, run_cost,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program's part of a run: (batch of the chunk, first token, first, last).

    The tile of tokens from the first on, and the places of the pairs [first, last), or, without lists, the rows.
    """
    if lists_ptr is not None:
        number = tl.load(lists_ptr + 2 * run)
        begin = tl.load(lists_ptr + 2 * run + 1)
        place = begin - run_cost * (run + 1)
        if room > 0:
            place = number * room
        first = place + tl.maximum(low - begin, 0)
        last = place + tl.minimum(high, tl.load(lists_ptr + 2 * run + 3) - run_cost) - begin
        batch_here = number // M
        first_token = (number % M).to(tl.int64) * BLOCK_SIZE + inside
    else:
        tiles = (T + TILE - 1) // TILE
        batch_here = run // tiles
        first_token = (run % tiles).to(tl.int64) * TILE
        first = low
        last = high
    return batch_here, first_token, first, last


@triton.jit
def clear_counts(counts_ptr, counts, near):
    """Zero counts_ptr int32 [counts], all programs together; ``near``: 0, 1, 2, ... as many as a step takes."""
    STEP: tl.constexpr = near.shape[0]
    for base in range(tl.program_id(0) * STEP, counts, tl.num_programs(0) * STEP):
        tl.store(counts_ptr + base + near, near * 0, mask=base + near < counts)


@triton.jit(do_not_specialize=["lists", "shares", "least", "run_cost", "apart"])
def list_runs_kernel(
    counts_ptr, offsets_ptr, lists_ptr, first_list_ptr, totals_ptr, lists, shares, least, run_cost, apart,
    TILE: tl.constexpr, SUM_TILE: tl.constexpr, PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(lists, TILE)).  Equal shares of the pairs of all (batch, block), list behind list, from the number of
    pairs of each, the first of its counts_ptr int32 [lists, apart].

    A pair has one place in what is shared, and before a list's first ones ``run_cost`` places are taken by getting its
    keys.  lists_ptr int32 [lists + 1, 2] gets (list, place of its first pair) of every one that has pairs, and behind
    them the place that another one's would have; totals_ptr int32 [2] the number of all places and of these lists;
    first_list_ptr int32 [shares + 1] which of them each share (see :func:`share_size`) begins in, their number where
    none is left.  offsets_ptr int32 [lists], where given, gets the pairs before each list.
    With equal shares, programs which run side by side end together, and begin their lists at different times.
    A program adds up what comes before its own lists by itself: they are few, and nobody has to wait.
    """
    wait_for_kernel_before(OVERLAP)
    base = tl.program_id(0) * TILE
    pairs = tl.zeros([SUM_TILE], tl.int32)
    some = tl.zeros([SUM_TILE], tl.int32)
    all_pairs = tl.zeros([SUM_TILE], tl.int32)
    all_some = tl.zeros([SUM_TILE], tl.int32)
    for before in range(0, lists, SUM_TILE):
        number = before + tl.arange(0, SUM_TILE)
        count = tl.load(counts_ptr + number * apart, mask=number < lists, other=0)
        is_some = (count > 0).to(tl.int32)
        all_pairs += count
        all_some += is_some
        pairs += tl.where(number < base, count, 0)
        some += tl.where(number < base, is_some, 0)
    runs = tl.sum(all_some, axis=0)
    total = tl.sum(all_pairs, axis=0) + run_cost * runs
    share = share_size(total, shares, least)
    number = base + tl.arange(0, TILE)
    count = tl.load(counts_ptr + number * apart, mask=number < lists, other=0)
    is_some = count > 0
    offset = tl.sum(pairs, axis=0) + tl.cumsum(count, axis=0) - count
    run = tl.sum(some, axis=0) + tl.cumsum(is_some.to(tl.int32), axis=0) - 1
    begin = offset + run_cost * (run + 1)
    tl.store(lists_ptr + 2 * run, number, mask=is_some)
    tl.store(lists_ptr + 2 * run + 1, begin, mask=is_some)
    if offsets_ptr is not None:
        tl.store(offsets_ptr + number, offset, mask=number < lists)
    first_share = tl.cdiv(begin - run_cost, share)
    beginning = tl.where(is_some, tl.cdiv(begin + count, share) - first_share, 0)
    for part in range(0, tl.max(beginning, axis=0), PARTS):
        each = part + tl.arange(0, PARTS)[None, :]
        tl.store(first_list_ptr + first_share[:, None] + each, run[:, None], mask=each < beginning[:, None])
    if base + TILE >= lists:
        tl.store(lists_ptr + 2 * runs + 1, total + run_cost)
        tl.store(totals_ptr, total)
        tl.store(totals_ptr + 1, runs)
        for part in range(tl.cdiv(total, share), shares + 1, PARTS):
            each = part + tl.arange(0, PARTS)
            tl.store(first_list_ptr + each, runs, mask=each <= shares)


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
