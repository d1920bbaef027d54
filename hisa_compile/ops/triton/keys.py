"""Rank keys: scores as signed 32-bit integers whose order is the operator's ranking.

Selecting and sorting integers makes every comparison total (NaN included), lets a bisection over the 32 bits find
the exact k-th best, and leaves one value, ``HIDDEN_KEY``, below every score for what must never be selected.  The
integers are signed because Triton's interpreter does not complement unsigned ones correctly.
"""

from __future__ import annotations

import triton
import triton.language as tl

HIDDEN_KEY = tl.constexpr(-(2**31))
NAN_KEY = tl.constexpr(2**31 - 1)
# Between kernels scores travel as their bits, 0.0 and NaN always positive; these are what becomes HIDDEN_KEY.
HIDDEN_BITS = tl.constexpr(-1)


@triton.jit
def score_bits(score, visible):
    """The bits of a score as :func:`stored_key` wants them, ``HIDDEN_BITS`` where not ``visible`` (None: all are)."""
    # Not score + 0.0, which may become one operation with what made a -0.0 by rounding.
    bits = tl.where(score == 0.0, 0, score.to(tl.int32, bitcast=True))
    bits = tl.where(score != score, NAN_KEY, bits)
    if visible is not None:
        bits = tl.where(visible, bits, HIDDEN_BITS)
    return bits


@triton.jit
def stored_key(bits):
    """The rank key of what :func:`score_bits` left, in two operations."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def rank_key(score):
    """float32 -> int32, increasing with the score; -0.0 equals 0.0, NaN is above inf; never ``HIDDEN_KEY``."""
    return stored_key(score_bits(score, None))


@triton.jit
def key_score(key):
    """The score behind a rank key; ``NAN_KEY`` is itself the bit pattern of a NaN."""
    return stored_key(key).to(tl.float32, bitcast=True)


@triton.jit
def pack(key, index):
    """int64 that sorts as (key descending, position ascending) when sorted descending, all values distinct.

    ``index`` is a token's position, or -1 - position for a hidden token: hidden and visible tokens of score -inf
    are ordered by position alone, so the flag takes the lowest bit, where it decides nothing.  Flipping the 31 bits of
    a position reverses the order of positions.
    """
    hidden = index < 0
    position = tl.where(hidden, -1 - index, index)
    low = (position ^ 0x7FFFFFFF).to(tl.int64) * 2 + hidden.to(tl.int64)
    return key.to(tl.int64) * 4294967296 + low


@triton.jit
def unpack(packed, MARK_HIDDEN: tl.constexpr):
    """(index int32, score float32) of a packed entry; -1 for a hidden token if ``MARK_HIDDEN``."""
    low = packed & 4294967295
    index = ((low >> 1) ^ 0x7FFFFFFF).to(tl.int32)
    if MARK_HIDDEN:
        index = tl.where((low & 1) != 0, -1, index)
    return index, key_score((packed >> 32).to(tl.int32))
