"""Between the levels of the coarse stage "two-level": the outer blocks that a group of rows keeps, see :mod:`..coarse`.

The rows of a group go past the probe's tiles of tokens together, so a tile is needed where one of them keeps its outer
block.  These are listed first, in any order: the probe's programs then share them evenly, and go past nothing else.
Floor: a byte is read, and a score or four of hidden blocks written, for each row and outer block: 40 MiB for 1024
queries at 1M tokens and B = 128, 14 microseconds at 3 TB/s; at 64K tokens it takes 4 (an H100, coarse.json).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import HIDDEN_BITS
from .overlap import wait_for_kernel_before
from .probe import rows_of_group, sees_blocks


@triton.jit(do_not_specialize=["first_row", "rows_per_batch", "S", "T", "M", "outer_blocks"])
def list_outer_kernel(
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    outer_flag_ptr, listed_ptr, listed_count_ptr, block_scores_ptr,
    first_row, rows_per_batch, S, T, M, outer_blocks, pitch,
    OUTER_SIZE: tl.constexpr, INSIDE: tl.constexpr, PADDED_INSIDE: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (batches * groups of ROWS rows * tiles of TILE outer blocks, INSIDE blocks each).

    outer_flag_ptr int8 [rows, outer_blocks] is what :func:`.select.select_blocks_kernel` leaves.  listed_ptr int32
    [groups, outer_blocks] gets the outer blocks that a row of the group keeps, in any order, listed_count_ptr int32
    [groups], zeros before, their number.  Blocks in others that a row's window touches become HIDDEN_BITS in
    block_scores_ptr int32 [rows, pitch].
    """
    wait_for_kernel_before(OVERLAP)
    tiles = tl.cdiv(outer_blocks, TILE)
    group = tl.program_id(0) // tiles
    _, _, row, wanted, start, end = rows_of_group(
        group, start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, first_row, rows_per_batch, S, T, ROWS
    )
    outer = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    row = row.to(tl.int64)[:, None]
    touched = wanted[:, None] & sees_blocks(outer.to(tl.int64)[None, :], start[:, None], end[:, None], OUTER_SIZE)
    flag = tl.load(outer_flag_ptr + row * outer_blocks + outer[None, :], mask=touched, other=0)
    kept = tl.max(flag.to(tl.int32), axis=0)
    count = tl.sum(kept, axis=0)
    if count > 0:
        first = tl.atomic_add(listed_count_ptr + group, count, sem="relaxed")
        place = first + tl.cumsum(kept, axis=0) - kept
        tl.store(listed_ptr + group.to(tl.int64) * outer_blocks + place, outer, mask=kept != 0)
    inside = tl.arange(0, PADDED_INSIDE)[None, :]
    block = outer[:, None] * INSIDE + inside
    exists = (inside < INSIDE) & (block < M)
    hidden = touched & (kept == 0)[None, :]
    at = block_scores_ptr + row[:, :, None] * pitch + block[None, :, :]
    tl.store(
        at, tl.full([ROWS, TILE, PADDED_INSIDE], HIDDEN_BITS, tl.int32), mask=hidden[:, :, None] & exists[None, :, :]
    )
