"""Exact selection of the best columns of a row of rank keys: greatest keys, equal ones lowest column first.

The k-th best key is found by narrowing a bracket around it, which needs counts only, so the result is exact and the
same on every run.  The keys that a step counts stay in registers; a pass over them then writes the selected columns in
ascending order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import HIDDEN_BITS, HIDDEN_KEY, key_score, rank_key, stored_key
from .visible import row_coordinates, row_window

# A row's columns are held as [TILE / 128, 128]: a warp then has neighbouring columns, and counts what is before each of
# them without other warps.
_RUN = tl.constexpr(128)
# Steps that guess in the scores' own scale; after them the bracket of keys is halved, which takes at most 32.
_GUESSES = tl.constexpr(20)


@triton.jit
def _columns(base, TILE: tl.constexpr):
    """Columns [base, base + TILE)."""
    RUN: tl.constexpr = _RUN if TILE > _RUN else TILE
    return base + tl.arange(0, TILE // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]


@triton.jit
def _before(counts):
    """The sum of ``counts`` before each column."""
    of_run = tl.sum(counts, axis=1)
    return tl.cumsum(counts, axis=1) - counts + (tl.cumsum(of_run, axis=0) - of_run)[:, None]


@triton.jit
def _store_columns(columns_ptr, base, place, taken, TILE: tl.constexpr):
    """Write columns base, base + 1, ... to their places < 2^15 where ``taken``."""
    # One tensor of places and columns, whose elements may change threads: the store's own layout is another.
    packed = tl.where(taken, (place << 16) + _columns(0, TILE), -1)
    packed = tl.reshape(packed, [TILE], can_reorder=True)
    tl.store(columns_ptr + (packed >> 16), base + (packed & 65535), mask=packed >= 0)


@triton.jit
def _count(x):
    return tl.sum(x.to(tl.int32), axis=None)


@triton.jit
def _next_pivot(low, high, at_low, above_high, wanted, step):
    """A key in (low, high], near the wanted one if scores are spread evenly between the two.

    ``at_low`` keys are >= low and ``above_high`` are > high.  Every third guess is the middle instead, which bounds
    what an uneven spread costs.
    """
    share = tl.where(step % 3 != 2, (wanted - above_high).to(tl.float32) / (at_low - above_high).to(tl.float32), 0.5)
    top = key_score(high)
    guess = rank_key(top - share * (top - key_score(low)))
    halfway = (high.to(tl.int64) - (high.to(tl.int64) - low.to(tl.int64)) // 2).to(tl.int32)
    return tl.where((step < _GUESSES) & (guess > low) & (guess <= high), guess, halfway)


@triton.jit
def _narrowed(low, high, at_low, above_high, wanted, pivot, count):
    """The bracket, and what is counted of it, once ``count`` keys are known to be >= ``pivot``."""
    enough = count >= wanted
    low = tl.where(enough, pivot, low)
    at_low = tl.where(enough, count, at_low)
    high = tl.where(enough, high, pivot - 1)
    above_high = tl.where(enough, above_high, count)
    return low, high, at_low, above_high


@triton.jit
def _cut(low, at_low, above_high, wanted):
    """(threshold, ties) of a bracket that is closed: take the keys above the threshold and ``ties`` equal to it."""
    whole = at_low == wanted
    # All keys >= low are taken; low is above HIDDEN_KEY unless there are none.
    return tl.where(whole, tl.maximum(low, HIDDEN_KEY + 1) - 1, low), tl.where(whole, 0, wanted - above_high)


@triton.jit
def kth_key(keys, wanted):
    """(threshold, ties) for the best ``wanted`` of ``keys`` int32 [.., ..], fewer where fewer are not HIDDEN_KEY."""
    high = tl.max(keys, axis=None)
    low = tl.min(keys, axis=None)
    at_low = wanted * 0 + keys.shape[0] * keys.shape[1]
    if low == HIDDEN_KEY:
        present = keys != HIDDEN_KEY
        at_low = _count(present)
        low = tl.min(tl.where(present, keys, high), axis=None)
    wanted = tl.minimum(wanted, at_low)
    above_high = wanted * 0
    step = wanted * 0
    while (low < high) & (at_low != wanted):
        pivot = _next_pivot(low, high, at_low, above_high, wanted, step)
        count = _count(keys >= pivot)
        low, high, at_low, above_high = _narrowed(low, high, at_low, above_high, wanted, pivot, count)
        step += 1
    return _cut(low, at_low, above_high, wanted)


@triton.jit
def _load_keys(scores_ptr, column, first, past, pitch):
    """Rank keys of the columns, HIDDEN_KEY outside [first, past); ``pitch`` is the length of the row in memory."""
    bits = tl.load(scores_ptr + column, mask=column < pitch, other=HIDDEN_BITS)
    return stored_key(tl.where((column >= first) & (column < past), bits, HIDDEN_BITS))


@triton.jit
def _but(keys, column, first, last):
    """The keys without those of the two columns that are taken anyway."""
    return tl.where((column == first) | (column == last), HIDDEN_KEY, keys)


@triton.jit
def _kth_key_in_memory(wanted, scores_ptr, first, past, pitch, skip_first, skip_last, TILE: tl.constexpr):
    """:func:`kth_key` of a row that is read again for every step."""
    at_low = wanted * 0
    high = wanted * 0 + HIDDEN_KEY
    low = wanted * 0 + 2147483647
    for base in range(first // TILE * TILE, past, TILE):
        column = _columns(base, TILE)
        keys = _but(_load_keys(scores_ptr, column, first, past, pitch), column, skip_first, skip_last)
        present = keys != HIDDEN_KEY
        at_low += _count(present)
        high = tl.maximum(high, tl.max(keys, axis=None))
        low = tl.minimum(low, tl.min(tl.where(present, keys, 2147483647), axis=None))
    wanted = tl.minimum(wanted, at_low)
    low = tl.minimum(low, high)
    above_high = wanted * 0
    step = wanted * 0
    while (low < high) & (at_low != wanted):
        pivot = _next_pivot(low, high, at_low, above_high, wanted, step)
        count = wanted * 0
        for base in range(first // TILE * TILE, past, TILE):
            column = _columns(base, TILE)
            keys = _but(_load_keys(scores_ptr, column, first, past, pitch), column, skip_first, skip_last)
            count += _count(keys >= pivot)
        low, high, at_low, above_high = _narrowed(low, high, at_low, above_high, wanted, pivot, count)
        step += 1
    return _cut(low, at_low, above_high, wanted)


@triton.jit
def _places(keys, threshold, ties, TILE: tl.constexpr):
    """(taken, place, taken in all, ties left): which keys of a tile are selected, and how many before each."""
    above = keys > threshold
    equal = (keys == threshold) & (keys != HIDDEN_KEY)
    # Both counts in one scan: a tile has fewer than 2^15 keys.
    counts = above.to(tl.int32) + (equal.to(tl.int32) << 16)
    before = _before(counts)
    equal_before = before >> 16
    taken = above | (equal & (equal_before < ties))
    place = (before & 65535) + tl.minimum(equal_before, ties)
    total = tl.sum(counts, axis=None)
    used = tl.minimum(total >> 16, ties)
    return taken, place, (total & 65535) + used, ties - used


@triton.jit
def _store_selected(columns_ptr, base, keys, threshold, ties, TILE: tl.constexpr):
    """Write the columns of the selected keys, ascending; (how many, ties left)."""
    if ties == 0:
        taken = keys > threshold
        _store_columns(columns_ptr, base, _before(taken.to(tl.int32)), taken, TILE)
        count = _count(taken)
    else:
        taken, place, count, ties = _places(keys, threshold, ties, TILE)
        _store_columns(columns_ptr, base, place, taken, TILE)
    return count, ties


@triton.jit(do_not_specialize=["first_row", "rows_per_batch", "S", "T", "M", "block_topk"])
def select_blocks_kernel(
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    block_scores_ptr, kept_ptr, kept_count_ptr, kept_flag_ptr, counts_ptr, rank_ptr,
    first_row, rows_per_batch, S, T, M, pitch, block_topk,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, ONE_TILE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The coarse filter, one program a row: at most block_topk blocks, the first and last eligible one among them.

    kept_ptr int32 [rows, block_topk] gets their numbers ascending (so that candidates lie in the order of their
    positions), kept_count_ptr int32 [rows] how many there are, kept_flag_ptr int8 [rows, M] which blocks they are, as
    far as the row's window touches them.  What lies past the row's count is not written.  With counts_ptr int32
    [batches * M] every kept block counts its row there, and rank_ptr int32 [rows, block_topk] gets the count before.
    """
    row = tl.program_id(0)
    _, batch, query_index = row_coordinates(first_row, row, S)
    start, end = row_window(start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, batch, query_index, T)
    first_block = (start // BLOCK_SIZE).to(tl.int32)
    past_block = tl.where(start < end, (end + BLOCK_SIZE - 1) // BLOCK_SIZE, 0).to(tl.int32)
    block_scores_ptr += row.to(tl.int64) * pitch
    kept_flag_ptr += row.to(tl.int64) * M
    kept_ptr += row.to(tl.int64) * block_topk
    if counts_ptr is not None:
        counts_ptr += row // rows_per_batch * M
        rank_ptr += row.to(tl.int64) * block_topk

    # The first and the last eligible block; none at all leaves first > last.
    first = past_block
    last = past_block * 0 - 1
    from_column = 0 if ONE_TILE else first_block // TILE * TILE
    for base in range(from_column, TILE if ONE_TILE else past_block, TILE):
        column = _columns(base, TILE)
        keys = _load_keys(block_scores_ptr, column, first_block, past_block, pitch)
        first = tl.minimum(first, tl.min(tl.where(keys != HIDDEN_KEY, column, past_block), axis=None))
        last = tl.maximum(last, tl.max(tl.where(keys != HIDDEN_KEY, column, -1), axis=None))
    always = tl.where(first > last, 0, tl.where(first == last, 1, 2))

    if ONE_TILE:
        column = _columns(0, TILE)
        keys = _load_keys(block_scores_ptr, column, first_block, past_block, pitch)
        threshold, ties = kth_key(_but(keys, column, first, last), block_topk - always)
    else:
        threshold, ties = _kth_key_in_memory(
            block_topk - always, block_scores_ptr, first_block, past_block, pitch, first, last, TILE
        )
    kept = first * 0
    for base in range(from_column, TILE if ONE_TILE else past_block, TILE):
        column = _columns(base, TILE)
        keys = _load_keys(block_scores_ptr, column, first_block, past_block, pitch)
        taken, place, count, ties = _places(_but(keys, column, first, last), threshold, ties, TILE)
        # The two that are always kept are not among the keys: nothing eligible lies before one or behind the other.
        place += (column > first).to(tl.int32)
        inside = (column >= first_block) & (column < past_block)
        taken = (taken | (column == first) | (column == last)) & inside
        _store_columns(kept_ptr + kept, base, place, taken, TILE)
        tl.store(kept_flag_ptr + column, taken.to(tl.int8), mask=inside)
        kept += count
    kept += always
    tl.store(kept_count_ptr + row, kept)
    if counts_ptr is not None:
        tl.debug_barrier()
        for first_slot in range(0, kept, SLOTS):
            slot = first_slot + tl.arange(0, SLOTS)
            block = tl.load(kept_ptr + slot, mask=slot < kept, other=0)
            rank = tl.atomic_add(counts_ptr + block, 1, mask=slot < kept, sem="relaxed")
            tl.store(rank_ptr + slot, rank, mask=slot < kept)


@triton.jit(do_not_specialize=["first_row", "S", "T", "block_topk", "K"])
def select_tokens_kernel(
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    kept_ptr, kept_count_ptr, token_scores_ptr, candidates_ptr,
    indices_ptr, keys_ptr, selected_count_ptr,
    first_row, S, T, pitch, block_topk, K,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, ONE_TILE: tl.constexpr, K_TILE: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """The top K of a row's candidates, one program a row, columns as :mod:`.refine` defines them.

    indices_ptr and keys_ptr, int32 [B * S, K], get the selected positions, ascending, and their rank keys, or, FINAL,
    the bits of their scores; selected_count_ptr int32 [rows] how many there are, less than K where the row has fewer
    visible candidates.

    A row of more than TILE columns: a sample of TILE of them tells a key that a little more than K are expected to
    reach; their columns go to candidates_ptr int32 [rows, TILE] and the K best of them are selected.  The guess is
    checked by their number; where it was wrong (thousands of equal keys) the row is read again for every step.
    """
    row = tl.program_id(0)
    r, batch, query_index = row_coordinates(first_row, row, S)
    start, end = row_window(start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, batch, query_index, T)
    if kept_ptr is not None:
        kept_ptr += row.to(tl.int64) * block_topk
        first = row * 0
        past = tl.load(kept_count_ptr + row) * BLOCK_SIZE
    else:
        first = start.to(tl.int32)
        past = end.to(tl.int32)
    token_scores_ptr += row.to(tl.int64) * pitch
    indices_ptr += r * K
    keys_ptr += r * K

    # Selected columns are first written where the positions will be: what comes after is done for these alone.
    if ONE_TILE:
        column = _columns(0, TILE)
        keys = _load_keys(token_scores_ptr, column, first, past, pitch)
        threshold, ties = kth_key(keys, K)
        selected, ties = _store_selected(indices_ptr, 0, keys, threshold, ties, TILE)
    else:
        candidates_ptr += row.to(tl.int64) * TILE
        selected = row * 0
        found = row * 0
        present = row * 0
        if past - first > TILE:
            # Runs of 32 columns, spread evenly.
            RUNS: tl.constexpr = (TILE + 31) // 32
            sample = _columns(0, TILE)
            spread = (sample // 32).to(tl.int64) * (past - first - 32) // RUNS
            keys = _load_keys(token_scores_ptr, first + spread.to(tl.int32) + sample % 32, first, past, pitch)
            expected = K * (TILE / (past - first).to(tl.float32))
            enough = tl.minimum(expected + 4.0 * tl.sqrt(expected) + 16.0, TILE).to(tl.int32)
            guess, _ = kth_key(keys, enough)
            for base in range(first // TILE * TILE, past, TILE):
                column = _columns(base, TILE)
                keys = _load_keys(token_scores_ptr, column, first, past, pitch)
                reached = (keys >= guess) & (keys != HIDDEN_KEY)
                place = _before(reached.to(tl.int32))
                _store_columns(candidates_ptr + found, base, place, reached & (found + place < TILE), TILE)
                found += _count(reached)
                present += _count(keys != HIDDEN_KEY)
            # What other threads wrote is read below.
            tl.debug_barrier()
        else:
            found = found + TILE + 1
        if (found <= TILE) & (found >= tl.minimum(K, present)):
            entry = _columns(0, TILE)
            column = tl.load(candidates_ptr + entry, mask=entry < found, other=0)
            keys = stored_key(tl.load(token_scores_ptr + column, mask=entry < found, other=HIDDEN_BITS))
            threshold, ties = kth_key(keys, K)
            # Places among the candidates, which the last loop below replaces by the candidates.
            selected, ties = _store_selected(indices_ptr, 0, keys, threshold, ties, TILE)
            among = True
        else:
            threshold, ties = _kth_key_in_memory(K + row * 0, token_scores_ptr, first, past, pitch, -1, -1, TILE)
            for base in range(first // TILE * TILE, past, TILE):
                column = _columns(base, TILE)
                keys = _load_keys(token_scores_ptr, column, first, past, pitch)
                count, ties = _store_selected(indices_ptr + selected, base, keys, threshold, ties, TILE)
                selected += count
            among = False
    tl.store(selected_count_ptr + row, selected)

    tl.debug_barrier()
    for first_entry in range(0, selected, K_TILE):
        chosen = first_entry + tl.arange(0, K_TILE)
        wanted = chosen < selected
        chosen_column = tl.load(indices_ptr + chosen, mask=wanted, other=0)
        if not ONE_TILE:
            chosen_column = tl.load(candidates_ptr + chosen_column, mask=wanted & among, other=0) + tl.where(
                among, 0, chosen_column
            )
        bits = tl.load(token_scores_ptr + chosen_column, mask=wanted, other=0)
        tl.store(keys_ptr + chosen, bits if FINAL else stored_key(bits), mask=wanted)
        if kept_ptr is not None:
            block = tl.load(kept_ptr + chosen_column // BLOCK_SIZE, mask=wanted, other=0)
            chosen_column = block * BLOCK_SIZE + chosen_column % BLOCK_SIZE
        # Several warps may hold the same entries, and all of them must have read the column before it is replaced.
        tl.debug_barrier()
        if kept_ptr is not None or not ONE_TILE:
            tl.store(indices_ptr + chosen, chosen_column, mask=wanted)
