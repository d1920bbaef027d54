"""Exact selection of the best columns of a row of rank keys: greatest keys, equal ones lowest column first.

The smallest key still selected is found by bisection over the 32 bits of the key, which needs counts only, so the
result is exact and the same on every run; one pass over the row then writes the selected columns in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import HIDDEN_KEY, NAN_KEY
from .visible import row_coordinates, row_window


@triton.jit
def _tile_keys(keys_ptr, column, count, skip_first, skip_last):
    """Keys of the columns, HIDDEN_KEY past the row's end and at the two columns that are taken anyway."""
    key = tl.load(keys_ptr + column, mask=column < count, other=HIDDEN_KEY)
    return tl.where((column == skip_first) | (column == skip_last), HIDDEN_KEY, key)


@triton.jit
def _count_at_least(bound, keys, keys_ptr, count, skip_first, skip_last, TILE: tl.constexpr, ONE_TILE: tl.constexpr):
    """How many keys of the row are >= bound.  ``keys`` is the row itself if it is ONE_TILE long."""
    if ONE_TILE:
        total = tl.sum((keys >= bound).to(tl.int32), axis=0)
    else:
        total = bound * 0
        for base in range(0, count, TILE):
            tile = _tile_keys(keys_ptr, base + tl.arange(0, TILE), count, skip_first, skip_last)
            total += tl.sum((tile >= bound).to(tl.int32), axis=0)
    return total


@triton.jit
def _threshold(wanted, keys_ptr, count, skip_first, skip_last, TILE: tl.constexpr, ONE_TILE: tl.constexpr):
    """(threshold, ties): select the keys above the threshold, and the first ``ties`` of those equal to it.

    At most ``wanted`` are selected, fewer only where the row has fewer that are not HIDDEN_KEY.
    """
    keys = _tile_keys(keys_ptr, tl.arange(0, TILE), count, skip_first, skip_last)
    zero = wanted * 0
    present = _count_at_least(zero + HIDDEN_KEY + 1, keys, keys_ptr, count, skip_first, skip_last, TILE, ONE_TILE)
    wanted = tl.minimum(wanted, present)
    positive = _count_at_least(zero, keys, keys_ptr, count, skip_first, skip_last, TILE, ONE_TILE)
    threshold = tl.where(positive >= wanted, 0, HIDDEN_KEY)
    for step in range(31):
        trial = threshold | (1 << (30 - step))
        above = _count_at_least(trial, keys, keys_ptr, count, skip_first, skip_last, TILE, ONE_TILE)
        threshold = tl.where(above >= wanted, trial, threshold)
    # Nothing is above the greatest key, and threshold + 1 would overflow there.
    above = _count_at_least(
        tl.minimum(threshold, NAN_KEY - 1) + 1, keys, keys_ptr, count, skip_first, skip_last, TILE, ONE_TILE
    )
    above = tl.where(threshold == NAN_KEY, 0, above)
    return threshold, wanted - above


@triton.jit
def _taken(key, threshold, ties):
    """Which keys of a tile are selected, and how many ties remain for the tiles after it."""
    equal = (key == threshold) & (key != HIDDEN_KEY)
    order = tl.cumsum(equal.to(tl.int32), axis=0)
    taken = (key > threshold) | (equal & (order <= ties))
    return taken, tl.maximum(ties - tl.sum(equal.to(tl.int32), axis=0), 0)


@triton.jit(do_not_specialize=["first_row", "S", "T", "M", "block_topk"])
def select_blocks_kernel(
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    block_keys_ptr, kept_ptr, kept_count_ptr, kept_flag_ptr,
    first_row, S, T, M, block_topk,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """The coarse filter, one program a row: at most block_topk blocks, the first and last eligible one among them.

    kept_ptr int32 [rows, block_topk] gets their numbers ascending (so that candidates lie in the order of their
    positions), kept_count_ptr int32 [rows] how many there are, kept_flag_ptr int8 [rows, M] which columns of
    block_keys_ptr they are.  What lies past the row's count is not written.
    """
    row = tl.program_id(0)
    _, batch, query_index = row_coordinates(first_row, row, S)
    start, end = row_window(start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, batch, query_index, T)
    first_block = (start // BLOCK_SIZE).to(tl.int32)
    count = tl.where(start < end, ((end + BLOCK_SIZE - 1) // BLOCK_SIZE).to(tl.int32) - first_block, 0)
    block_keys_ptr += row.to(tl.int64) * M
    kept_flag_ptr += row.to(tl.int64) * M
    kept_ptr += row.to(tl.int64) * block_topk

    # The first and the last eligible column; none at all leaves first > last.
    first = count
    last = count * 0 - 1
    for base in range(0, count, TILE):
        column = base + tl.arange(0, TILE)
        eligible = _tile_keys(block_keys_ptr, column, count, -1, -1) != HIDDEN_KEY
        first = tl.minimum(first, tl.min(tl.where(eligible, column, count), axis=0))
        last = tl.maximum(last, tl.max(tl.where(eligible, column, -1), axis=0))
    always = tl.where(first > last, 0, tl.where(first == last, 1, 2))

    threshold, ties = _threshold(block_topk - always, block_keys_ptr, count, first, last, TILE, ONE_TILE)
    kept = count * 0
    for base in range(0, count, TILE):
        column = base + tl.arange(0, TILE)
        taken, ties = _taken(_tile_keys(block_keys_ptr, column, count, first, last), threshold, ties)
        taken = (taken | (column == first) | (column == last)) & (column < count)
        slot = kept + tl.cumsum(taken.to(tl.int32), axis=0) - 1
        tl.store(kept_ptr + slot, first_block + column, mask=taken)
        tl.store(kept_flag_ptr + column, taken.to(tl.int8), mask=column < count)
        kept += tl.sum(taken.to(tl.int32), axis=0)
    tl.store(kept_count_ptr + row, kept)


@triton.jit(do_not_specialize=["first_row", "S", "T", "columns", "block_topk", "K"])
def select_tokens_kernel(
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    kept_ptr, kept_count_ptr, token_keys_ptr,
    indices_ptr, keys_ptr, selected_count_ptr,
    first_row, S, T, columns, block_topk, K,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """The top K of a row's candidates, one program a row, columns as :func:`score.refine_kernel` defines them.

    indices_ptr and keys_ptr, int32 [B * S, K], get the selected positions, ascending, and their rank keys;
    selected_count_ptr int32 [rows] how many there are, less than K where the row has fewer visible candidates.
    """
    row = tl.program_id(0)
    r, batch, query_index = row_coordinates(first_row, row, S)
    start, end = row_window(start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, batch, query_index, T)
    if kept_ptr is not None:
        count = tl.load(kept_count_ptr + row) * BLOCK_SIZE
    else:
        count = (end - start).to(tl.int32)
    token_keys_ptr += row.to(tl.int64) * columns
    output = r * K

    threshold, ties = _threshold(K + count * 0, token_keys_ptr, count, -1, -1, TILE, ONE_TILE)
    selected = count * 0
    for base in range(0, count, TILE):
        column = base + tl.arange(0, TILE)
        key = _tile_keys(token_keys_ptr, column, count, -1, -1)
        taken, ties = _taken(key, threshold, ties)
        slot = selected + tl.cumsum(taken.to(tl.int32), axis=0) - 1
        if kept_ptr is not None:
            block = tl.load(kept_ptr + row.to(tl.int64) * block_topk + column // BLOCK_SIZE, mask=taken, other=0)
            position = block * BLOCK_SIZE + column % BLOCK_SIZE
        else:
            position = start.to(tl.int32) + column
        tl.store(indices_ptr + output + slot, position, mask=taken)
        tl.store(keys_ptr + output + slot, key, mask=taken)
        selected += tl.sum(taken.to(tl.int32), axis=0)
    tl.store(selected_count_ptr + row, selected)
