"""Selection of blocks and tokens, exact, with the tie rule and the NaN order of the operator (see :mod:`.kth`).

Floor of the selection of tokens: a row's scores are read once and K positions and scores written, 32 and 16 MiB for
1024 rows, 16 microseconds at 3 TB/s, less from the L2 cache; it took 42, :mod:`.select_hopper` takes 37 and
:mod:`.select_shared_hopper` 36, for the search of the k-th key, some six counts one after another, and for what goes
where.  Floor of the selection of blocks: 512 scores a row, 2 MiB, nothing; it takes 7, at 8192 scores, 32 MiB and 11 of
floor, 55 (an H100, docs/kernels.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .finish import fill_outside_window
from .group import pair_of
from .keys import HIDDEN_BITS, HIDDEN_KEY, stored_key
from .kth import (
    are_taken,
    before,
    but,
    count_taken,
    kth_key,
    kth_key_in_memory,
    load_keys,
    load_tile_keys,
    one_of,
    store_columns,
    store_selected,
    sum_counts,
    tile_columns,
)
from .overlap import wait_for_kernel_before
from .visible import row_coordinates, row_window


@triton.jit
def row_range(
    start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, kept_count_ptr, first_row, row, S, T,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """The row's columns [first, past): those of its kept blocks, or, where every block is kept, its window."""
    if kept_count_ptr is not None:
        first = row * 0
        past = tl.load(kept_count_ptr + row) * BLOCK_SIZE
    else:
        _, batch, query_index = row_coordinates(first_row, row, S)
        start, end = row_window(start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, batch, query_index, T)
        first = start.to(tl.int32)
        past = end.to(tl.int32)
    return first, past


@triton.jit(do_not_specialize=["first_row", "rows_per_batch", "S", "T", "M", "block_topk", "room", "apart"])
def select_blocks_kernel(
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    block_scores_ptr, kept_ptr, kept_count_ptr, kept_flag_ptr, counts_ptr, rank_ptr, pairs_ptr,
    first_row, rows_per_batch, S, T, M, pitch, block_topk, room, apart,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, ONE_TILE: tl.constexpr, SLOTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The coarse filter, one program a row: at most block_topk blocks, the first and last eligible one among them.

    kept_ptr int32 [rows, block_topk] gets their numbers ascending (so that candidates lie in the order of their
    positions) and 0 behind them, kept_count_ptr int32 [rows] how many there are, both or neither; kept_flag_ptr int8
    [rows, M], where given, which blocks they are, as far as the row's window touches them.  In the first of its block's
    counts_ptr int32 [batches * M, apart], where given, every kept block counts its row.  The count before is the place
    of the pair, see :mod:`.group`, among those of the block: pairs_ptr int32 [batches * M, room] gets the pair, or,
    where it is None, rank_ptr int32 [rows, block_topk] its place.
    """
    wait_for_kernel_before(OVERLAP)
    row = tl.program_id(0)
    _, batch, query_index = row_coordinates(first_row, row, S)
    start, end = row_window(start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, batch, query_index, T)
    first_block = (start // BLOCK_SIZE).to(tl.int32)
    past_block = tl.where(start < end, (end + BLOCK_SIZE - 1) // BLOCK_SIZE, 0).to(tl.int32)
    block_scores_ptr += row.to(tl.int64) * pitch
    if kept_flag_ptr is not None:
        kept_flag_ptr += row.to(tl.int64) * M
    if kept_ptr is not None:
        kept_ptr += row.to(tl.int64) * block_topk
    if counts_ptr is not None:
        first_list = row // rows_per_batch * M
    if rank_ptr is not None:
        rank_ptr += row.to(tl.int64) * block_topk

    # The first and the last eligible block; none at all leaves first > last.
    first = past_block
    last = past_block * 0 - 1
    from_column = 0 if ONE_TILE else first_block // TILE * TILE
    if ONE_TILE:
        column = tile_columns(0, TILE)
        keys = load_keys(block_scores_ptr, column, first_block, past_block)
    for base in range(from_column, TILE if ONE_TILE else past_block, TILE):
        if not ONE_TILE:
            column = tile_columns(base, TILE)
            keys = load_keys(block_scores_ptr, column, first_block, past_block)
        first = tl.minimum(first, tl.min(tl.where(keys != HIDDEN_KEY, column, past_block), axis=None))
        last = tl.maximum(last, tl.max(tl.where(keys != HIDDEN_KEY, column, -1), axis=None))
    always = tl.where(first > last, 0, tl.where(first == last, 1, 2))

    one = one_of(M)
    if ONE_TILE:
        threshold, ties, count = kth_key(but(keys, column, first, last), block_topk - always, one)
    else:
        threshold, ties, count = kth_key_in_memory(
            block_topk - always, block_scores_ptr, first_block, past_block, first, last, one, TILE
        )
    kept = first * 0
    for base in range(from_column, TILE if ONE_TILE else past_block, TILE):
        if not ONE_TILE:
            column = tile_columns(base, TILE)
            keys = load_keys(block_scores_ptr, column, first_block, past_block)
        ranked = but(keys, column, first, last)
        taken = are_taken(ranked, threshold, ties, one)
        # The two that are always kept are not among the keys: nothing eligible lies before one or behind the other.
        place = before(tl.where(taken, one, 0)) + (column > first).to(tl.int32)
        if not ONE_TILE:
            count, ties = count_taken(ranked, threshold, ties, one)
        inside = (column >= first_block) & (column < past_block)
        taken = (taken | (column == first) | (column == last)) & inside
        if kept_ptr is not None:
            store_columns(kept_ptr + kept, base, place, taken, TILE)
        if kept_flag_ptr is not None:
            tl.store(kept_flag_ptr + column, taken.to(tl.int8), mask=inside)
        kept += count
    kept += always
    if kept_ptr is not None:
        tl.store(kept_count_ptr + row, kept)
        # Read before it is known how many there are.
        for first_slot in range(kept // SLOTS * SLOTS, block_topk, SLOTS):
            slot = first_slot + tl.arange(0, SLOTS)
            tl.store(kept_ptr + slot, slot * 0, mask=(slot >= kept) & (slot < block_topk))
    if counts_ptr is not None:
        tl.debug_barrier()
        for first_slot in range(0, kept, SLOTS):
            slot = first_slot + tl.arange(0, SLOTS)
            block = tl.load(kept_ptr + slot, mask=slot < kept, other=0)
            rank = tl.atomic_add(counts_ptr + (first_list + block) * apart, 1, mask=slot < kept, sem="relaxed")
            if pairs_ptr is not None:
                pair = pair_of(row, slot, block, start, end, BLOCK_SIZE)
                tl.store(pairs_ptr + (first_list + block) * room + rank, pair, mask=slot < kept)
            else:
                tl.store(rank_ptr + slot, rank, mask=slot < kept)


@triton.jit(do_not_specialize=["first_row", "S", "T", "block_topk", "K", "segments"])
def select_tokens_kernel(
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    kept_ptr, kept_count_ptr, token_scores_ptr, candidates_ptr, counts_ptr,
    indices_ptr, keys_ptr, selected_count_ptr,
    first_row, S, T, pitch, block_topk, K, segments,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, ONE_TILE: tl.constexpr, K_TILE: tl.constexpr, FINAL: tl.constexpr,
    MARK_HIDDEN: tl.constexpr, STEP: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The top K of a row's candidates, one program a row, columns as :mod:`.refine` defines them.

    indices_ptr and keys_ptr, int32 [B * S, K], get the selected positions, ascending, and their rank keys, or, FINAL,
    the bits of their scores; selected_count_ptr int32 [rows] how many there are, less than K where the row has fewer
    visible candidates.  Where it is None such a row is filled up here, from outside its window.

    A row of more than TILE columns: candidates_ptr and counts_ptr are those of :mod:`.long_rows`, and the best of the
    listed columns are selected; where its guess was wrong the row is read again for every step.
    """
    wait_for_kernel_before(OVERLAP)
    row = tl.program_id(0)
    first, past = row_range(
        start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, kept_count_ptr, first_row, row, S, T, BLOCK_SIZE
    )
    if kept_ptr is not None:
        kept_ptr += row.to(tl.int64) * block_topk
    token_scores_ptr += row.to(tl.int64) * pitch
    indices_ptr += (row.to(tl.int64) + first_row) * K
    keys_ptr += (row.to(tl.int64) + first_row) * K

    # Selected columns are first written where the positions will be: what comes after is done for these alone.
    one = one_of(K)
    bits_ptr = token_scores_ptr
    if ONE_TILE:
        keys = load_tile_keys(token_scores_ptr, 0, first, past, TILE)
        threshold, ties, selected = kth_key(keys, K, one)
        store_selected(indices_ptr, 0, keys, threshold, ties, one, TILE)
    else:
        candidates_ptr += row.to(tl.int64) * (2 * TILE)
        counts_ptr += row.to(tl.int64) * 2 * segments
        found = sum_counts(counts_ptr, segments, STEP)
        among = (found <= TILE) & (found >= tl.minimum(K, sum_counts(counts_ptr + segments, segments, STEP)))
        selected = row * 0
        if among:
            bits_ptr = candidates_ptr + TILE
            entry = tile_columns(0, TILE)
            keys = stored_key(tl.load(candidates_ptr + TILE + entry, mask=entry < found, other=HIDDEN_BITS))
            threshold, ties, selected = kth_key(keys, K, one)
            # Places among the candidates, which the last loop below replaces by the candidates.
            store_selected(indices_ptr, 0, keys, threshold, ties, one, TILE)
        else:
            threshold, ties, _ = kth_key_in_memory(K + row * 0, token_scores_ptr, first, past, -1, -1, one, TILE)
            for base in range(first // TILE * TILE, past, TILE):
                keys = load_tile_keys(token_scores_ptr, base, first, past, TILE)
                store_selected(indices_ptr + selected, base, keys, threshold, ties, one, TILE)
                taken, ties = count_taken(keys, threshold, ties, one)
                selected += taken
    if selected_count_ptr is not None:
        tl.store(selected_count_ptr + row, selected)
    elif selected < K:
        _, batch, query_index = row_coordinates(first_row, row, S)
        start, end = row_window(start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, batch, query_index, T)
        near = tl.arange(0, K_TILE)
        fill_outside_window(indices_ptr, keys_ptr, selected, start, end, K, near, FINAL, MARK_HIDDEN)

    tl.debug_barrier()
    for first_entry in range(0, selected, K_TILE):
        chosen = first_entry + tl.arange(0, K_TILE)
        wanted = chosen < selected
        place = tl.load(indices_ptr + chosen, mask=wanted, other=0)
        bits = tl.load(bits_ptr + place, mask=wanted, other=0)
        chosen_column = place
        if not ONE_TILE:
            chosen_column = tl.load(candidates_ptr + place, mask=wanted & among, other=0) + tl.where(among, 0, place)
        if kept_ptr is not None:
            # Before the store below, which would wait for the scores: both loads are under way at once.
            block = tl.load(kept_ptr + chosen_column // BLOCK_SIZE, mask=wanted, other=0)
            chosen_column = block * BLOCK_SIZE + chosen_column % BLOCK_SIZE
        tl.store(keys_ptr + chosen, bits if FINAL else stored_key(bits), mask=wanted)
        # Several warps may hold the same entries, and all of them must have read the column before it is replaced.
        tl.debug_barrier()
        if kept_ptr is not None or not ONE_TILE:
            tl.store(indices_ptr + chosen, chosen_column, mask=wanted)
