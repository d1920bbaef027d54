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
def visible_tokens(token, start, end, valid_ptr, valid_st, mask_ptr, mask_st):
    """Whether each ``token`` (int64, any shape) is visible; the pointers are those of the row's batch and query."""
    visible = (token >= start) & (token < end)
    if valid_ptr is not None:
        visible = visible & (tl.load(valid_ptr + token * valid_st, mask=visible, other=0) != 0)
    if mask_ptr is not None:
        visible = visible & (tl.load(mask_ptr + token * mask_st, mask=visible, other=0) != 0)
    return visible


@triton.jit
def eligible_blocks(
    block, start, end, valid_ptr, valid_st, last_valid_ptr, mask_ptr, mask_st, BLOCK_SIZE: tl.constexpr
):
    """Whether each ``block`` (int64 [n]) holds a visible token.

    Without a mask that takes one look-up a block: ``last_valid_ptr`` tells the last valid token of the block up to
    a position.  A mask is free-form, so all its elements are read.
    """
    first = tl.maximum(block * BLOCK_SIZE, start)
    past = tl.minimum(block * BLOCK_SIZE + BLOCK_SIZE, end)
    eligible = first < past
    if mask_ptr is not None:
        CHUNK: tl.constexpr = 32
        found = tl.zeros(block.shape, tl.int32)
        for offset in range(0, BLOCK_SIZE, CHUNK):
            inside = offset + tl.arange(0, CHUNK)
            token = block[:, None] * BLOCK_SIZE + inside[None, :]
            # Tokens of the next block are cut off by moving them before every window.
            token = tl.where((inside < BLOCK_SIZE)[None, :], token, -1)
            visible = visible_tokens(token, start, end, valid_ptr, valid_st, mask_ptr, mask_st)
            found = tl.maximum(found, tl.max(visible.to(tl.int32), axis=1))
        eligible = eligible & (found != 0)
    elif valid_ptr is not None:
        last = tl.load(last_valid_ptr + past - 1, mask=eligible, other=-1)
        eligible = eligible & (last >= first)
    return eligible
