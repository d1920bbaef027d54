"""Exact selection among the columns of a row of rank keys: greatest keys, equal ones lowest column first.

The k-th best key is found by narrowing a bracket around it, which needs counts only, so the result is exact and the
same on every run.  The keys that a step counts stay in registers; a pass over them then writes the selected columns in
ascending order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import HIDDEN_BITS, HIDDEN_KEY, key_score, stored_key

# A row's columns are held as [TILE / 128, 128]: a warp then has neighbouring columns, and counts what is before each of
# them without other warps.
_RUN = tl.constexpr(128)
# Steps that guess in the scores' own scale; after them the bracket of keys is halved, which takes at most 32.
_GUESSES = tl.constexpr(20)
# From this step on the bracket is now and then drawn in to keys that there are: nothing else ends the search early
# among equal keys, and a guess in a bracket that ends at an outlier is poor.
_DRAWN_IN = tl.constexpr(12)


@triton.jit
def tile_columns(base, TILE: tl.constexpr):
    """Columns [base, base + TILE)."""
    RUN: tl.constexpr = _RUN if TILE > _RUN else TILE
    return base + tl.arange(0, TILE // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]


@triton.jit
def before(counts):
    """The sum of ``counts`` before each column."""
    of_run = tl.sum(counts, axis=1)
    return tl.cumsum(counts, axis=1) - counts + (tl.cumsum(of_run, axis=0) - of_run)[:, None]


@triton.jit
def store_columns(columns_ptr, base, place, taken, TILE: tl.constexpr):
    """Write columns base, base + 1, ... to their places < 2^15 where ``taken``."""
    # One tensor of places and columns, whose elements may change threads: the store's own layout is another.
    packed = tl.where(taken, (place << 16) + tile_columns(0, TILE), -1)
    packed = tl.reshape(packed, [TILE], can_reorder=True)
    tl.store(columns_ptr + (packed >> 16), base + (packed & 65535), mask=packed >= 0)


@triton.jit
def how_many(x):
    return tl.sum(x.to(tl.int32), axis=None)


@triton.jit
def _eighth_root(x):
    return tl.sqrt(tl.sqrt(tl.sqrt(x)))


@triton.jit
def _quantile(count, total):
    """How far up a normal distribution's values lie of which ``count`` of ``total`` are above, in some unit.

    That of Tukey's lambda distribution for 1 / 8, which is close to it and takes no logarithm.  None and all count as
    half a value.
    """
    above = tl.minimum(tl.maximum(count.to(tl.float32), 0.5), total.to(tl.float32) - 0.5)
    return _eighth_root(total.to(tl.float32) - above) - _eighth_root(above)


@triton.jit
def _next_pivot(low, high, at_low, above_high, wanted, total, step, halve):
    """A key in (low, high], near the wanted one if scores are spread as a normal distribution's between the two.

    ``at_low`` keys of ``total`` are >= low and ``above_high`` are > high.  Every fifth guess, and where ``halve`` says
    that the last one was poor, it is the middle instead, which bounds what another spread costs.
    """
    at_top = _quantile(above_high, total)
    # A quotient that may be a little off: it is a guess.
    share = (at_top - _quantile(wanted, total)) * (1.0 / (at_top - _quantile(at_low, total)))
    top = key_score(high)
    guess = top - tl.where(halve | (step % 5 == 4), 0.5, share) * (top - key_score(low))
    # Bits of a NaN are no key in between, or one: either is fine.
    pivot = stored_key(guess.to(tl.int32, bitcast=True))
    if (step >= _GUESSES) | (pivot <= low) | (pivot > high):
        pivot = (high.to(tl.int64) - (high.to(tl.int64) - low.to(tl.int64)) // 2).to(tl.int32)
    return pivot


@triton.jit
def _narrowed(low, high, at_low, above_high, wanted, step, halve, pivot, count):
    """The bracket, and what is counted of it, once ``count`` keys are known to be >= ``pivot``; and ``halve``: whether
    that was a poor guess, off by an eighth of the bracket's keys.
    """
    off = tl.abs(count - wanted) * 8 > at_low - above_high
    halve = off & (halve == 0) & (step % 5 != 4)
    enough = count >= wanted
    low = tl.where(enough, pivot, low)
    at_low = tl.where(enough, count, at_low)
    high = tl.where(enough, high, pivot - 1)
    above_high = tl.where(enough, above_high, count)
    return low, high, at_low, above_high, halve


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
    # HIDDEN_KEY - 1 is the greatest integer, so that the least of the others is found; without others it is itself.
    least = tl.min(tl.sub(keys, 1, sanitize_overflow=False), axis=None)
    low = tl.add(least, 1, sanitize_overflow=False)
    total = how_many(keys != HIDDEN_KEY)
    wanted = tl.minimum(wanted, total)
    at_low = total
    above_high = wanted * 0
    step = wanted * 0
    halve = step > 0
    while (low < high) & (at_low != wanted):
        if (step >= _DRAWN_IN) & (step % 4 == 0):
            drawn_in = tl.min(tl.where(keys < low, high, keys), axis=None)
            high = tl.max(tl.where(keys > high, low, keys), axis=None)
            low = drawn_in
        pivot = _next_pivot(low, high, at_low, above_high, wanted, total, step, halve)
        reached = how_many(keys >= pivot)
        low, high, at_low, above_high, halve = _narrowed(
            low, high, at_low, above_high, wanted, step, halve, pivot, reached
        )
        step += 1
    return _cut(low, at_low, above_high, wanted)


@triton.jit
def load_keys(scores_ptr, column, first, past):
    """Rank keys of the columns, HIDDEN_KEY outside [first, past).

    Whole groups of four are read, so that they can be read at once: the scoring kernels write whole tiles.
    """
    written = (column >= first // 4 * 4) & (column < (past + 3) // 4 * 4)
    bits = tl.load(scores_ptr + column, mask=written, other=HIDDEN_BITS)
    return stored_key(tl.where((column >= first) & (column < past), bits, HIDDEN_BITS))


@triton.jit
def load_tile_keys(scores_ptr, base, first, past, TILE: tl.constexpr):
    """:func:`load_keys` of the columns [base, base + TILE); a tile that is inside whole has nothing to compare."""
    column = tile_columns(base, TILE)
    if (first <= base) & (past - base >= TILE):
        keys = stored_key(tl.load(scores_ptr + column))
    else:
        keys = load_keys(scores_ptr, column, first, past)
    return keys


@triton.jit
def but(keys, column, first, last):
    """The keys without those of the two columns that are taken anyway."""
    return tl.where((column == first) | (column == last), HIDDEN_KEY, keys)


@triton.jit
def kth_key_in_memory(wanted, scores_ptr, first, past, skip_first, skip_last, TILE: tl.constexpr):
    """:func:`kth_key` of a row that is read again for every step."""
    at_low = wanted * 0
    high = wanted * 0 + HIDDEN_KEY
    low = wanted * 0 + 2147483647
    for base in range(first // TILE * TILE, past, TILE):
        column = tile_columns(base, TILE)
        keys = but(load_tile_keys(scores_ptr, base, first, past, TILE), column, skip_first, skip_last)
        present = keys != HIDDEN_KEY
        at_low += how_many(present)
        high = tl.maximum(high, tl.max(keys, axis=None))
        low = tl.minimum(low, tl.min(tl.where(present, keys, 2147483647), axis=None))
    total = at_low
    wanted = tl.minimum(wanted, total)
    low = tl.minimum(low, high)
    above_high = wanted * 0
    step = wanted * 0
    halve = step > 0
    while (low < high) & (at_low != wanted):
        if (step >= _DRAWN_IN) & (step % 4 == 0):
            least = high
            most = low
            for base in range(first // TILE * TILE, past, TILE):
                column = tile_columns(base, TILE)
                keys = but(load_tile_keys(scores_ptr, base, first, past, TILE), column, skip_first, skip_last)
                least = tl.minimum(least, tl.min(tl.where(keys < low, high, keys), axis=None))
                most = tl.maximum(most, tl.max(tl.where(keys > high, low, keys), axis=None))
            low = least
            high = most
        pivot = _next_pivot(low, high, at_low, above_high, wanted, total, step, halve)
        count = wanted * 0
        for base in range(first // TILE * TILE, past, TILE):
            column = tile_columns(base, TILE)
            keys = but(load_tile_keys(scores_ptr, base, first, past, TILE), column, skip_first, skip_last)
            count += how_many(keys >= pivot)
        low, high, at_low, above_high, halve = _narrowed(
            low, high, at_low, above_high, wanted, step, halve, pivot, count
        )
        step += 1
    return _cut(low, at_low, above_high, wanted)


@triton.jit
def places(keys, threshold, ties, TILE: tl.constexpr):
    """(taken, place, taken in all, ties left): which keys of a tile are selected, and how many before each."""
    above = keys > threshold
    equal = (keys == threshold) & (keys != HIDDEN_KEY)
    # Both counts in one scan: a tile has fewer than 2^15 keys.
    counts = above.to(tl.int32) + (equal.to(tl.int32) << 16)
    earlier = before(counts)
    equal_before = earlier >> 16
    taken = above | (equal & (equal_before < ties))
    place = (earlier & 65535) + tl.minimum(equal_before, ties)
    total = tl.sum(counts, axis=None)
    used = tl.minimum(total >> 16, ties)
    return taken, place, (total & 65535) + used, ties - used


@triton.jit
def store_selected(columns_ptr, base, keys, threshold, ties, TILE: tl.constexpr):
    """Write the columns of the selected keys, ascending; (how many, ties left)."""
    if ties == 0:
        taken = keys > threshold
        store_columns(columns_ptr, base, before(taken.to(tl.int32)), taken, TILE)
        count = how_many(taken)
    else:
        taken, place, count, ties = places(keys, threshold, ties, TILE)
        store_columns(columns_ptr, base, place, taken, TILE)
    return count, ties


@triton.jit
def sum_counts(counts_ptr, segments, STEP: tl.constexpr):
    """The sum of ``segments`` counts."""
    total = tl.zeros([STEP], tl.int32)
    for base in range(0, segments, STEP):
        number = base + tl.arange(0, STEP)
        total += tl.load(counts_ptr + number, mask=number < segments, other=0)
    return tl.sum(total, axis=0)
