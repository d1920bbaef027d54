"""Which columns of a long row can be among its best K: a first filter, spread over many programs.

A row of more columns than one program holds is read twice.  A sample tells a key that a little more than K are
expected to reach; then every segment of TILE columns counts how many of its own reach it, and, knowing how many do in
the segments before, writes their columns in order.  :func:`.select.select_tokens_kernel` selects among these.  The
guess is checked there by their number; where it was wrong (thousands of equal keys) that kernel reads the whole row.

Floor: the row twice; 1024 rows of 64K columns are 256 MiB, 180 microseconds at 3 TB/s, less where the L2 cache holds
a chunk; the three kernels take 340, six chunks of 171 rows (an H100, docs/kernels.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import HIDDEN_KEY
from .kth import how_many, kth_key, load_keys, load_tile_keys, one_of, store_selected, sum_counts, tile_columns
from .overlap import wait_for_kernel_before
from .select import row_range


@triton.jit(do_not_specialize=["first_row", "S", "T", "K"])
def guess_key_kernel(
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    kept_count_ptr, token_scores_ptr, guess_ptr,
    first_row, S, T, pitch, K,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, SAMPLE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """guess_ptr int32 [rows]: a key that few more than K columns of the row should reach, grid (rows)."""
    wait_for_kernel_before(OVERLAP)
    row = tl.program_id(0)
    first, past = row_range(
        start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, kept_count_ptr, first_row, row, S, T, BLOCK_SIZE
    )
    # Where all visible columns fit one tile, all of them are candidates.
    guess = row * 0 + HIDDEN_KEY + 1
    if past - first > TILE:
        # Runs of 32 columns, spread evenly.
        RUNS: tl.constexpr = (SAMPLE + 31) // 32
        sample = tile_columns(0, SAMPLE)
        spread = (sample // 32).to(tl.int64) * (past - first - 32) // RUNS
        column = first + spread.to(tl.int32) + sample % 32
        keys = load_keys(token_scores_ptr + row.to(tl.int64) * pitch, column, first, past)
        expected = K * (SAMPLE / (past - first).to(tl.float32))
        # As many that the sample of exactly K of them is below that but for one row in thousands.
        enough = expected + 4.0 * tl.sqrt(expected) + 16.0
        # But no more than leave it likely that all of them fit a tile.
        enough = tl.minimum(enough, (K + TILE) // 2 * (SAMPLE / (past - first).to(tl.float32)))
        enough = tl.minimum(tl.maximum(enough, 1.0), SAMPLE).to(tl.int32)
        guess, _, _ = kth_key(keys, enough, one_of(K))
    tl.store(guess_ptr + row, tl.maximum(guess, HIDDEN_KEY + 1))


@triton.jit(do_not_specialize=["first_row", "S", "T", "segments"])
def count_candidates_kernel(
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    kept_count_ptr, token_scores_ptr, guess_ptr, counts_ptr,
    first_row, S, T, pitch, segments,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """counts_ptr int32 [rows, 2, segments]: columns of each segment that reach the guess, and visible ones at all.

    Grid (rows * segments).
    """
    wait_for_kernel_before(OVERLAP)
    row = tl.program_id(0) // segments
    segment = tl.program_id(0) % segments
    first, past = row_range(
        start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, kept_count_ptr, first_row, row, S, T, BLOCK_SIZE
    )
    reached = row * 0
    present = row * 0
    if (segment * TILE < past) & (segment * TILE > first - TILE):
        keys = load_tile_keys(token_scores_ptr + row.to(tl.int64) * pitch, segment * TILE, first, past, TILE)
        reached = how_many(keys >= tl.load(guess_ptr + row), one_of(segments))
        present = how_many(keys != HIDDEN_KEY, one_of(segments))
    counts_ptr += row.to(tl.int64) * 2 * segments + segment
    tl.store(counts_ptr, reached)
    tl.store(counts_ptr + segments, present)


@triton.jit(do_not_specialize=["first_row", "S", "T", "segments"])
def list_candidates_kernel(
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    kept_count_ptr, token_scores_ptr, guess_ptr, counts_ptr, candidates_ptr,
    first_row, S, T, pitch, segments,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """candidates_ptr int32 [rows, 2, TILE]: the columns that reach the guess, ascending, where they are at most TILE,
    and the bits of their scores, which need not be looked for all over the row again.

    Grid (rows * segments).
    """
    wait_for_kernel_before(OVERLAP)
    row = tl.program_id(0) // segments
    segment = tl.program_id(0) % segments
    counts_ptr += row.to(tl.int64) * 2 * segments
    # Few of a segment's columns are candidates: their scores are copied so many at a time.
    PART: tl.constexpr = TILE // 8
    listed = sum_counts(counts_ptr, segments, STEP) <= TILE
    count = tl.load(counts_ptr + segment)
    if listed & (count > 0):
        first, past = row_range(
            start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, kept_count_ptr, first_row, row, S, T, BLOCK_SIZE
        )
        token_scores_ptr += row.to(tl.int64) * pitch
        keys = load_tile_keys(token_scores_ptr, segment * TILE, first, past, TILE)
        one = one_of(segments)
        guess = tl.load(guess_ptr + row)
        candidates_ptr += row.to(tl.int64) * (2 * TILE) + sum_counts(counts_ptr, segment, STEP)
        # What reaches the guess is above one less: no guess is as low as HIDDEN_KEY.
        store_selected(candidates_ptr, segment * TILE, keys, guess - 1, 0, one, TILE)
        tl.debug_barrier()
        for first_entry in range(0, count, PART):
            entry = first_entry + tl.arange(0, PART)
            column = tl.load(candidates_ptr + entry, mask=entry < count, other=0)
            bits = tl.load(token_scores_ptr + column, mask=entry < count, other=0)
            tl.store(candidates_ptr + TILE + entry, bits, mask=entry < count)
