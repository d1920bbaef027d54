"""What a query may see, inside the kernels: its window, its tokens, its eligible blocks.

A query is a row r = b * S + s.  Optional tensors are None in the launch and cost nothing in the compiled kernel.
Positions are int64: the last block may reach past 2^31 although T does not.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_coordinates(first_row, row, S):
    """int64 (r, b, s) of the ``row``-th row of a chunk that starts at ``first_row``."""
    r = row.to(tl.int64) + first_row
    return r, r // S, r % S


@triton.jit
def row_window(start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, batch, query, T):
    """The row's window clipped to [0, T]: int64 (start, end) with start <= end.  Any window values are allowed."""
    start = (batch * 0).to(tl.int64)
    end = start + T
    if start_ptr is not None:
        start = tl.maximum(start, tl.load(start_ptr + batch * start_sb + query * start_ss).to(tl.int64))
    if end_ptr is not None:
        end = tl.minimum(end, tl.load(end_ptr + batch * end_sb + query * end_ss).to(tl.int64))
    end = tl.maximum(end, 0)
    return tl.minimum(start, end), end


@triton.jit
def group_window(
    near, low, high, start_ptr, start_sb, start_ss, end_ptr, end_sb, end_ss, batch, first_query, count, T
):  # fmt: skip
    """What the windows of ``count`` queries make of positions [low, high): (does one touch them, does one cut them).

    ``near``: 0, 1, ... as far as any count goes.  A window that does not touch them at all counts as cutting them.
    """
    query = first_query + near
    here = near < count
    touches = here & (low < T)
    cuts = here & (high > T)
    if start_ptr is not None:
        start = tl.load(start_ptr + batch * start_sb + query * start_ss, mask=here, other=0)
        touches = touches & (start < high)
        cuts = cuts | (here & (start > low))
    if end_ptr is not None:
        end = tl.load(end_ptr + batch * end_sb + query * end_ss, mask=here, other=0)
        touches = touches & (end > low)
        cuts = cuts | (here & (end < high))
    return tl.max(touches.to(tl.int32), axis=0) != 0, tl.max(cuts.to(tl.int32), axis=0) != 0


@triton.jit
def row_segment(q_segment_ptr, q_segment_sb, q_segment_ss, batch, query):
    """The row's segment, int64; None without segments."""
    segment = None
    if q_segment_ptr is not None:
        segment = tl.load(q_segment_ptr + batch * q_segment_sb + query * q_segment_ss).to(tl.int64)
    return segment


@triton.jit
def visible_tokens(token, start, end, valid_ptr, valid_st, mask_ptr, mask_st, k_segment_ptr, k_segment_st, segment):
    """Whether each ``token`` (int64, any shape) is visible; the pointers are those of the row's batch and query.

    ``segment`` is the row's own, see :func:`row_segment`.
    """
    visible = (token >= start) & (token < end)
    if valid_ptr is not None:
        visible = visible & (tl.load(valid_ptr + token * valid_st, mask=visible, other=0) != 0)
    if mask_ptr is not None:
        visible = visible & (tl.load(mask_ptr + token * mask_st, mask=visible, other=0) != 0)
    if k_segment_ptr is not None:
        other = tl.load(k_segment_ptr + token * k_segment_st, mask=visible, other=0)
        visible = visible & (other.to(tl.int64) == segment)
    return visible


@triton.jit
def _blocks_looked_into(
    block, wanted, start, end, valid_ptr, valid_st, mask_ptr, mask_st, k_segment_ptr, k_segment_st, segment,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Whether each ``wanted`` block holds a visible token, by looking at all its tokens; the others do not."""
    CHUNK: tl.constexpr = 32
    found = tl.zeros(block.shape, tl.int32)
    for offset in range(0, BLOCK_SIZE, CHUNK):
        inside = offset + tl.arange(0, CHUNK)
        token = block[:, None] * BLOCK_SIZE + inside[None, :]
        # Tokens of the next block, and of blocks not wanted, are cut off by moving them before every window.
        token = tl.where((inside < BLOCK_SIZE)[None, :] & wanted[:, None], token, -1)
        visible = visible_tokens(
            token, start, end, valid_ptr, valid_st, mask_ptr, mask_st, k_segment_ptr, k_segment_st, segment
        )
        found = tl.maximum(found, tl.max(visible.to(tl.int32), axis=1))
    return found != 0


@triton.jit
def eligible_blocks(
    block, start, end, T, valid_ptr, valid_st, last_valid_ptr, mask_ptr, mask_st,
    k_segment_ptr, k_segment_st, low_ptr, high_ptr, segment,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Whether each ``block`` (int64 [n]) holds a visible token.

    With windows and key_valid that takes one look-up a block: ``last_valid_ptr`` tells the last valid token of the
    block up to a position.  ``low_ptr`` and ``high_ptr`` tell the least and the greatest segment of a block's valid
    keys, which leaves few blocks to be looked into: those of several segments where the row's lies between the two
    or the window cuts the block.  A mask is free-form, so all its elements are read.
    """
    block_start = block * BLOCK_SIZE
    first = tl.maximum(block_start, start)
    past = tl.minimum(block_start + BLOCK_SIZE, end)
    eligible = first < past
    if low_ptr is not None:
        low = tl.load(low_ptr + block, mask=eligible, other=0)
        high = tl.load(high_ptr + block, mask=eligible, other=0)
        eligible = eligible & (low <= segment) & (segment <= high)
    if mask_ptr is not None:
        eligible = _blocks_looked_into(
            block, eligible, start, end, valid_ptr, valid_st, mask_ptr, mask_st, k_segment_ptr, k_segment_st, segment,
            BLOCK_SIZE,
        )  # fmt: skip
    else:
        if valid_ptr is not None:
            last = tl.load(last_valid_ptr + past - 1, mask=eligible, other=-1)
            eligible = eligible & (last >= first)
        if low_ptr is not None:
            # Both bounds are segments of valid keys, so a window that holds the whole block holds these keys.
            whole = (first == block_start) & (past == tl.minimum(block_start + BLOCK_SIZE, T))
            sure = (low == high) | (whole & ((low == segment) | (high == segment)))
            unsure = eligible & (sure == 0)
            if tl.max(unsure.to(tl.int32), axis=0) != 0:
                found = _blocks_looked_into(
                    block, unsure, start, end, valid_ptr, valid_st, mask_ptr, mask_st,
                    k_segment_ptr, k_segment_st, segment, BLOCK_SIZE,
                )  # fmt: skip
                eligible = eligible & (sure | found)
    return eligible
