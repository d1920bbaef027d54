"""The last stages: filling rows that have too few visible candidates, and putting rows in order.

Where rows are put in order, a row of the outputs holds until then, in any order, positions (-1 - position for hidden
tokens) and the rank keys of the scores; where they are not (FINAL), the outputs themselves.

Where windows alone hide tokens the selection fills rows itself, by :func:`fill_outside_window`.  Else filling takes 2
microseconds where no row needs it.  Sorting 2048 entries a row, 1024 rows, takes 110, where the floor is 16 MiB read
and written, 11 (an H100, docs/kernels.md): tiles of 512 entries by Triton's bitonic sort of 64-bit entries, 45
exchanges of each, then merged by binary search.  A row in one tile took 300.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import pack, rank_key, score_bits, unpack
from .overlap import wait_for_kernel_before
from .score import load_query, load_weights, score_tokens
from .visible import row_coordinates, row_segment, row_window, visible_tokens


@triton.jit
def _store_hidden(indices_ptr, keys_ptr, slot, token, wanted, FINAL: tl.constexpr, MARK_HIDDEN: tl.constexpr):
    """Hidden tokens into these slots of a row."""
    key = slot.to(tl.float32) * 0.0 - float("inf")
    key = key.to(tl.int32, bitcast=True) if FINAL else rank_key(key)
    index = -1 - token
    if FINAL:
        index = token * 0 - 1 if MARK_HIDDEN else token
    tl.store(indices_ptr + slot, index.to(tl.int32), mask=wanted)
    tl.store(keys_ptr + slot, key, mask=wanted)


@triton.jit
def fill_outside_window(
    indices_ptr, keys_ptr, have, start, end, K, near, FINAL: tl.constexpr, MARK_HIDDEN: tl.constexpr
):  # fmt: skip
    """Fill up a row that has every token of its window, which alone says what is visible, with those before and then
    those behind the window; ``near``: 0, 1, 2, ... as many as a step takes."""
    STEP: tl.constexpr = near.shape[0]
    for base in range(have, K, STEP):
        slot = base + near
        token = (slot - have).to(tl.int64)
        token = tl.where(token < start, token, end + (token - start))
        _store_hidden(indices_ptr, keys_ptr, slot, token, slot < K, FINAL, MARK_HIDDEN)


@triton.jit(
    do_not_specialize=["first_row", "S", "T", "M", "block_topk", "K"],
    do_not_specialize_on_alignment=["scale_ptr", "k_weight_ptr"],
)
def fill_kernel(
    q_ptr, q_sb, q_ss, q_sh, q_sd,
    k_ptr, k_sb, k_st, k_sd,
    w_ptr, w_sr,
    scale_ptr, scale_sb, scale_st,
    k_weight_ptr, k_weight_sb, k_weight_st,
    start_ptr, start_sb, start_ss,
    end_ptr, end_sb, end_ss,
    valid_ptr, valid_sb, valid_st,
    mask_ptr, mask_sb, mask_ss, mask_st,
    q_segment_ptr, q_segment_sb, q_segment_ss,
    k_segment_ptr, k_segment_sb, k_segment_st,
    kept_count_ptr, kept_flag_ptr, selected_count_ptr,
    indices_ptr, keys_ptr,
    first_row, S, T, M, block_topk, K,
    H: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PADDED_H: tl.constexpr, TILE_D: tl.constexpr, TILE: tl.constexpr, SCAN: tl.constexpr,
    FINAL: tl.constexpr, MARK_HIDDEN: tl.constexpr, FP8: tl.constexpr, WIDEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Fill up rows whose visible candidates were fewer than K, one program a row; the others leave at once.

    Not launched where windows alone hide tokens and kept blocks hold enough, see ``launch._Call``.

    First with visible tokens outside the kept blocks, with their own scores, then with hidden tokens, both lowest
    position first.  indices_ptr and keys_ptr are int32 [B * S, K], as :func:`.select.select_tokens_kernel` left them.
    """
    wait_for_kernel_before(OVERLAP)
    row = tl.program_id(0)
    have = tl.load(selected_count_ptr + row)
    if have < K:
        r, batch, query_index = row_coordinates(first_row, row, S)
        output = r * K
        start, end = row_window(start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, batch, query_index, T)
        if valid_ptr is not None:
            valid_ptr += batch * valid_sb
        if mask_ptr is not None:
            mask_ptr += batch * mask_sb + query_index * mask_ss
        segment = row_segment(q_segment_ptr, q_segment_sb, q_segment_ss, batch, query_index)
        if k_segment_ptr is not None:
            k_segment_ptr += batch * k_segment_sb

        if kept_flag_ptr is not None:
            # Every visible candidate is selected already.  With fewer kept blocks than block_topk every eligible
            # block is kept, so there is no visible token outside.
            token_base = start
            if tl.load(kept_count_ptr + row) < block_topk:
                token_base = end
            if token_base < end:
                q_ptr += batch * q_sb + query_index * q_ss
                k_ptr += batch * k_sb
                query = load_query(q_ptr, q_sh, q_sd, 0, H, D, PADDED_H, TILE_D, FP8)
                weights = load_weights(w_ptr + row.to(tl.int64) * w_sr, H, PADDED_H)
                while (token_base < end) & (have < K):
                    token = token_base + tl.arange(0, TILE)
                    outside = visible_tokens(
                        token, start, end, valid_ptr, valid_st, mask_ptr, mask_st, k_segment_ptr, k_segment_st, segment
                    )
                    flag = tl.load(kept_flag_ptr + row.to(tl.int64) * M + token // BLOCK_SIZE, mask=outside, other=1)
                    outside = outside & (flag == 0)
                    found = tl.sum(outside.to(tl.int32), axis=0)
                    if found > 0:
                        scores = score_tokens(
                            query, weights, q_ptr, q_sh, q_sd, k_ptr, k_st, k_sd, scale_ptr, scale_sb, scale_st,
                            k_weight_ptr, k_weight_sb, k_weight_st, batch, token, outside,
                            H, D, PADDED_H, TILE_D, FP8, WIDEN,
                        )  # fmt: skip
                        slot = have + tl.cumsum(outside.to(tl.int32), axis=0) - 1
                        wanted = outside & (slot < K)
                        tl.store(indices_ptr + output + slot, token.to(tl.int32), mask=wanted)
                        key = score_bits(scores, None) if FINAL else rank_key(scores)
                        tl.store(keys_ptr + output + slot, key, mask=wanted)
                        have += found
                    token_base += TILE

        hidden_base = start * 0
        while (hidden_base < T) & (have < K):
            token = hidden_base + tl.arange(0, SCAN)
            visible = visible_tokens(
                token, start, end, valid_ptr, valid_st, mask_ptr, mask_st, k_segment_ptr, k_segment_st, segment
            )
            hidden = (token < T) & (visible == 0)
            slot = have + tl.cumsum(hidden.to(tl.int32), axis=0) - 1
            _store_hidden(indices_ptr + output, keys_ptr + output, slot, token, hidden & (slot < K), FINAL, MARK_HIDDEN)
            have += tl.sum(hidden.to(tl.int32), axis=0)
            hidden_base += SCAN


@triton.jit
def _load_packed(indices_ptr, keys_ptr, offset, wanted):
    """Packed entries, below all others where not ``wanted``."""
    packed = pack(tl.load(keys_ptr + offset, mask=wanted, other=0), tl.load(indices_ptr + offset, mask=wanted, other=0))
    return tl.where(wanted, packed, -9223372036854775807 - 1)


@triton.jit(do_not_specialize=["first_row", "K"])
def sort_kernel(
    indices_ptr, keys_ptr, scores_ptr,
    first_row, K, TILE: tl.constexpr, MARK_HIDDEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Rows of at most TILE entries to the operator's outputs, in order and in place, one program a row.

    keys_ptr int32 and scores_ptr float32 are the same memory [B * S, K].
    """
    wait_for_kernel_before(OVERLAP)
    column = tl.arange(0, TILE)
    offset = (tl.program_id(0).to(tl.int64) + first_row) * K + column
    wanted = column < K
    packed = tl.sort(_load_packed(indices_ptr, keys_ptr, offset, wanted), descending=True)
    index, score = unpack(packed, MARK_HIDDEN)
    tl.store(indices_ptr + offset, index, mask=wanted)
    tl.store(scores_ptr + offset, score, mask=wanted)


@triton.jit(do_not_specialize=["first_row", "K"])
def sort_tiles_kernel(indices_ptr, keys_ptr, packed_ptr, first_row, K, TILE: tl.constexpr, OVERLAP: tl.constexpr):
    """Rows too long for one sort: packed_ptr int64 [rows, tiles * TILE] gets tiles sorted one by one."""
    wait_for_kernel_before(OVERLAP)
    tiles = tl.cdiv(K, TILE)
    row = tl.program_id(0) // tiles
    column = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    offset = (row.to(tl.int64) + first_row) * K + column
    packed = tl.sort(_load_packed(indices_ptr, keys_ptr, offset, column < K), descending=True)
    tl.store(packed_ptr + tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE), packed)


@triton.jit(do_not_specialize=["first_row", "K"])
def merge_tiles_kernel(
    packed_ptr, indices_ptr, scores_ptr,
    first_row, K, TILE: tl.constexpr, LOG_TILE: tl.constexpr, MARK_HIDDEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Sorted tiles to the outputs, one program a tile: an entry's place is the number of entries above it.

    Entries are distinct, so that number is the entry's place in its own tile plus, by binary search, its place in
    each of the others.
    """
    wait_for_kernel_before(OVERLAP)
    tiles = tl.cdiv(K, TILE)
    row = tl.program_id(0) // tiles
    own = tl.program_id(0) % tiles
    inside = tl.arange(0, TILE)
    packed_ptr += row.to(tl.int64) * tiles * TILE
    packed = tl.load(packed_ptr + own.to(tl.int64) * TILE + inside)
    place = inside
    for other in range(tiles):
        above = tl.zeros([TILE], tl.int32)
        # Entries of the other tile before ``above`` are greater; TILE of them is possible, hence one more step.
        for step in range(LOG_TILE + 1):
            trial = above + (1 << (LOG_TILE - step))
            probe = tl.load(packed_ptr + other * TILE + trial - 1, mask=trial <= TILE, other=-9223372036854775807 - 1)
            above = tl.where((trial <= TILE) & (probe > packed), trial, above)
        place += tl.where(other == own, 0, above)
    index, score = unpack(packed, MARK_HIDDEN)
    offset = (row.to(tl.int64) + first_row) * K + place
    wanted = own * TILE + inside < K
    tl.store(indices_ptr + offset, index, mask=wanted)
    tl.store(scores_ptr + offset, score, mask=wanted)
