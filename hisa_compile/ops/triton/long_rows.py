"""Which columns of a long row can be among its best K: a first filter, spread over many programs.

A sample of a row of more columns than one program holds tells a key that a little more than K are expected to reach;
then every segment of TILE columns counts how many of its own reach it, and, knowing how many do in the segments before,
writes their columns in order.  :func:`.select.select_tokens_kernel` selects among these.  The
guess is checked there by their number; where it was wrong (thousands of equal keys) that kernel reads the whole row.

Floor: the row once; 1024 rows of 64K columns are 256 MiB, 90 microseconds at 3 TB/s, less where the L2 cache holds a
chunk; its two kernels take 33 a chunk of 128 rows (an H100, docs/kernels.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import HIDDEN_KEY
from .kth import how_many, kth_key, load_keys, load_tile_keys, one_of, store_selected, tile_columns
from .overlap import wait_for_kernel_before
from .select import row_range


@triton.jit(do_not_specialize=["first_row", "S", "T", "K", "segments"])
def guess_key_kernel(
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    kept_count_ptr, token_scores_ptr, guess_ptr, counts_ptr,
    first_row, S, T, pitch, K, segments,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, SAMPLE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """guess_ptr int32 [rows]: a key that few more than K columns of the row should reach, grid (rows).

    The first of counts_ptr int32 [rows, 2, segments], for :func:`list_candidates_kernel`, get -1.
    """
    wait_for_kernel_before(OVERLAP)
    row = tl.program_id(0)
    for base in range(0, segments, STEP):
        segment = base + tl.arange(0, STEP)
        tl.store(counts_ptr + row.to(tl.int64) * 2 * segments + segment, -1, mask=segment < segments)
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


@triton.jit
def _sum_when_counted(counts_ptr, past, STEP: tl.constexpr):
    """The counts before ``past``, each of which is below 0 until somebody has counted."""
    total = past * 0
    for first in range(0, past, STEP):
        entry = first + tl.arange(0, STEP)
        counts = tl.atomic_add(counts_ptr + entry, 0, mask=entry < past, sem="relaxed")
        counts = tl.where(entry < past, counts, 0)
        while tl.min(counts, axis=0) < 0:
            now = tl.atomic_add(counts_ptr + entry, 0, mask=counts < 0, sem="relaxed")
            counts = tl.where(counts < 0, now, counts)
        total += tl.sum(counts, axis=0)
    return total


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
    and the bits of their scores, which need not be looked for all over the row again.  counts_ptr int32
    [rows, 2, segments] gets how many columns of each segment reach it, and how many are visible.

    Grid (rows * segments).  A program waits for the counts of its row's segments before it, whose programs have begun
    before it: GPUs begin them in order.
    """
    wait_for_kernel_before(OVERLAP)
    row = tl.program_id(0) // segments
    segment = tl.program_id(0) % segments
    first, past = row_range(
        start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, kept_count_ptr, first_row, row, S, T, BLOCK_SIZE
    )
    counts_ptr += row.to(tl.int64) * 2 * segments
    # Few of a segment's columns are candidates: their scores are copied so many at a time.
    PART: tl.constexpr = TILE // 8
    if (segment * TILE < past) & (segment * TILE > first - TILE):
        token_scores_ptr += row.to(tl.int64) * pitch
        keys = load_tile_keys(token_scores_ptr, segment * TILE, first, past, TILE)
        one = one_of(segments)
        guess = tl.load(guess_ptr + row)
        count = how_many(keys >= guess, one)
        tl.atomic_xchg(counts_ptr + segment, count, sem="relaxed")
        tl.store(counts_ptr + segments + segment, how_many(keys != HIDDEN_KEY, one))
        if count > 0:
            before = _sum_when_counted(counts_ptr, segment, STEP)
            if before + count <= TILE:
                candidates_ptr += row.to(tl.int64) * (2 * TILE) + before
                # What reaches the guess is above one less: no guess is as low as HIDDEN_KEY.
                store_selected(candidates_ptr, segment * TILE, keys, guess - 1, 0, one, TILE)
                tl.debug_barrier()
                for first_entry in range(0, count, PART):
                    entry = first_entry + tl.arange(0, PART)
                    column = tl.load(candidates_ptr + entry, mask=entry < count, other=0)
                    bits = tl.load(token_scores_ptr + column, mask=entry < count, other=0)
                    tl.store(candidates_ptr + TILE + entry, bits, mask=entry < count)
    else:
        tl.atomic_xchg(counts_ptr + segment, 0, sem="relaxed")
        tl.store(counts_ptr + segments + segment, 0)
