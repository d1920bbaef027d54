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
def _split_four(x):
    """The four integers of the two last dimensions, each of two."""
    even, odd = tl.split(x)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _join_four(a, b, c, d):
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def before(counts):
    """The sum of ``counts``, each 0 or 1, before each column."""
    RUNS: tl.constexpr = counts.shape[0]
    RUN: tl.constexpr = counts.shape[1]
    if RUNS % 4 == 0:
        # A thread has four neighbours of a run, and of four runs one integer is made: a byte holds what a run counts.
        LANES: tl.constexpr = RUN // 4
        a, b, c, d = _split_four(tl.reshape(counts, [RUNS, LANES, 2, 2]))
        here = (a << 8) + ((a + b) << 16) + ((a + b + c) << 24)
        runs = tl.permute(tl.reshape(a + b + c + d, [2, 2, RUNS // 4, LANES]), (2, 3, 0, 1))
        first, second, third, fourth = _split_four(runs)
        packed = first + (second << 8) + (third << 16) + (fourth << 24)
        inside = tl.cumsum(packed, axis=1) - packed
        of_run = tl.sum(packed, axis=1)
        inside = _join_four(inside & 255, (inside >> 8) & 255, (inside >> 16) & 255, (inside >> 24) & 255)
        inside = tl.reshape(tl.permute(inside, (2, 3, 0, 1)), [RUNS, LANES])
        of_run = _join_four(of_run & 255, (of_run >> 8) & 255, (of_run >> 16) & 255, (of_run >> 24) & 255)
        of_run = tl.reshape(tl.permute(of_run, (1, 2, 0)), [RUNS])
        inside += (tl.cumsum(of_run, axis=0) - of_run)[:, None]
        place = _join_four(
            inside, inside + ((here >> 8) & 255), inside + ((here >> 16) & 255), inside + ((here >> 24) & 255)
        )
        place = tl.reshape(place, [RUNS, RUN])
    else:
        of_run = tl.sum(counts, axis=1)
        place = tl.cumsum(counts, axis=1) - counts + (tl.cumsum(of_run, axis=0) - of_run)[:, None]
    return place


@triton.jit
def store_columns(columns_ptr, base, place, taken, TILE: tl.constexpr):
    """Write columns base, base + 1, ... to their places < 2^15 where ``taken``."""
    # One tensor of places and columns, whose elements may change threads: the store's own layout is another.
    packed = tl.where(taken, (place << 16) + tile_columns(0, TILE), -1)
    packed = tl.reshape(packed, [TILE], can_reorder=True)
    tl.store(columns_ptr + (packed >> 16), base + (packed & 65535), mask=packed >= 0)


@triton.jit
def one_of(size):
    """1, for any number that is not negative.

    Which the compiler cannot know of a kernel's argument: sums of comparisons with 1 it makes into population counts
    of bits that it packs for them, which takes twice as many instructions as adding up does.
    """
    return tl.where(size >= 0, 1, 2)


@triton.jit
def how_many(x, one):
    """``one``: see :func:`one_of`."""
    return tl.sum(tl.where(x, one, 0), axis=None)


@triton.jit
def _eighth_root(x):
    return tl.sqrt(tl.sqrt(tl.sqrt(x)))


@triton.jit
def _quantile(count, total):
    """How far up a normal distribution's values lie of which ``count`` of ``total`` are above, in some unit.

    That of Tukey's lambda distribution for 1 / 8, which is close to it and takes no logarithm.  None and all count as
    half a value.
    """
    all_of_them = tl.maximum(total, 1).to(tl.float32)
    above = tl.minimum(tl.maximum(count.to(tl.float32), 0.5), all_of_them - 0.5)
    return _eighth_root(all_of_them - above) - _eighth_root(above)


@triton.jit
def _next_pivot(low, high, z_low, z_high, z_wanted, step, halve):
    """A key in (low, high], or high where they are equal.

    It is near the wanted one if scores are spread as a normal distribution's between the two.  ``z_low``, ``z_high``
    and ``z_wanted``: quantiles of low, of the key above high, and of the wanted one.  Every fifth guess, and where
    ``halve`` says that the last one was poor, it is the middle instead, which bounds what another spread costs.
    """
    # A quotient that may be a little off: it is a guess.
    share = (z_high - z_wanted) * (1.0 / (z_high - z_low))
    top = key_score(high)
    guess = top - tl.where(halve | (step % 5 == 4), 0.5, share) * (top - key_score(low))
    # Bits of a NaN are no key in between, or one: either is fine.
    pivot = stored_key(guess.to(tl.int32, bitcast=True))
    if (step >= _GUESSES) | (pivot <= low) | (pivot > high):
        pivot = (high.to(tl.int64) - (high.to(tl.int64) - low.to(tl.int64)) // 2).to(tl.int32)
    return pivot


@triton.jit
def _narrowed(low, high, at_low, above_high, z_low, z_high, wanted, total, step, halve, pivot, count):
    """The bracket, and what is known of it, once ``count`` keys are known to be >= ``pivot``; and ``halve``: whether
    that was a poor guess, off by an eighth of the bracket's keys.

    z_low and z_high are quantiles of at_low and above_high: of the two one is new, and each takes six square roots.
    """
    off = tl.abs(count - wanted) * 8 > at_low - above_high
    halve = off & (halve == 0) & (step % 5 != 4)
    enough = count >= wanted
    z = _quantile(count, total)
    low = tl.where(enough, pivot, low)
    at_low = tl.where(enough, count, at_low)
    z_low = tl.where(enough, z, z_low)
    high = tl.where(enough, high, pivot - 1)
    above_high = tl.where(enough, above_high, count)
    z_high = tl.where(enough, z_high, z)
    return low, high, at_low, above_high, z_low, z_high, halve


@triton.jit
def _cut(low, at_low, above_high, wanted):
    """(threshold, ties) of a bracket that is closed: take the keys above the threshold and ``ties`` equal to it."""
    whole = at_low == wanted
    # All keys >= low are taken; low is above HIDDEN_KEY unless there are none.
    return tl.where(whole, tl.maximum(low, HIDDEN_KEY + 1) - 1, low), tl.where(whole, 0, wanted - above_high)


@triton.jit
def narrow(source, low, high, total, wanted, one, COUNT: tl.constexpr, DRAW_IN: tl.constexpr):
    """(threshold, ties) for the best ``wanted`` <= ``total`` of so many keys, all of them in [low, high].

    COUNT(source, pivot, one) is how many of them are >= pivot, DRAW_IN(source, low, high) the least and the greatest
    key that there are in a bracket.
    """
    at_low = total
    above_high = wanted * 0
    z_low = _quantile(at_low, total)
    z_high = _quantile(above_high, total)
    z_wanted = _quantile(wanted, total)
    step = wanted * 0
    halve = step > 0
    while (low < high) & (at_low != wanted):
        if (step >= _DRAWN_IN) & (step % 4 == 0):
            low, high = DRAW_IN(source, low, high)
        pivot = _next_pivot(low, high, z_low, z_high, z_wanted, step, halve)
        reached = COUNT(source, pivot, one)
        low, high, at_low, above_high, z_low, z_high, halve = _narrowed(
            low, high, at_low, above_high, z_low, z_high, wanted, total, step, halve, pivot, reached
        )
        step += 1
    return _cut(low, at_low, above_high, wanted)


@triton.jit
def _count_held(keys, pivot, one):
    return how_many(keys >= pivot, one)


@triton.jit
def _draw_in_held(keys, low, high):
    drawn_in = tl.min(tl.where(keys < low, high, keys), axis=None)
    return drawn_in, tl.max(tl.where(keys > high, low, keys), axis=None)


@triton.jit
def before_least(keys):
    """Each key less one, the greatest integer of HIDDEN_KEY: the least of these is found without asking which are."""
    return tl.sub(keys, 1, sanitize_overflow=False)


@triton.jit
def kth_key(keys, wanted, one):
    """(threshold, ties, count) for the best ``wanted`` of ``keys`` int32 [.., ..].

    ``count`` is ``wanted``, or how many are not HIDDEN_KEY if these are fewer.  ``one``: see :func:`one_of`.
    """
    high = tl.max(keys, axis=None)
    # Without others it is HIDDEN_KEY itself.
    low = tl.add(tl.min(before_least(keys), axis=None), 1, sanitize_overflow=False)
    total = how_many(keys != HIDDEN_KEY, one)
    wanted = tl.minimum(wanted, total)
    threshold, ties = narrow(keys, low, high, total, wanted, one, _count_held, _draw_in_held)
    return threshold, ties, wanted


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
def _read_again(source, base):
    scores_ptr, first, past, skip_first, skip_last, columns = source
    keys = load_tile_keys(scores_ptr, base, first, past, columns.numel)
    return but(keys, base + columns, skip_first, skip_last)


@triton.jit
def _count_in_memory(source, pivot, one):
    _, first, past, _, _, columns = source
    TILE: tl.constexpr = columns.numel
    count = pivot * 0
    for base in range(first // TILE * TILE, past, TILE):
        count += how_many(_read_again(source, base) >= pivot, one)
    return count


@triton.jit
def _draw_in_memory(source, low, high):
    _, first, past, _, _, columns = source
    TILE: tl.constexpr = columns.numel
    least = high
    most = low
    for base in range(first // TILE * TILE, past, TILE):
        keys = _read_again(source, base)
        least = tl.minimum(least, tl.min(tl.where(keys < low, high, keys), axis=None))
        most = tl.maximum(most, tl.max(tl.where(keys > high, low, keys), axis=None))
    return least, most


@triton.jit
def kth_key_in_memory(wanted, scores_ptr, first, past, skip_first, skip_last, one, TILE: tl.constexpr):
    """:func:`kth_key` of a row that is read again for every step."""
    # A tuple loses what is known when a kernel is compiled; a tile of columns tells its size.
    source = (scores_ptr, first, past, skip_first, skip_last, tile_columns(0, TILE))
    total = wanted * 0
    high = wanted * 0 + HIDDEN_KEY
    low = wanted * 0 + 2147483647
    for base in range(first // TILE * TILE, past, TILE):
        keys = _read_again(source, base)
        present = keys != HIDDEN_KEY
        total += how_many(present, one)
        high = tl.maximum(high, tl.max(keys, axis=None))
        low = tl.minimum(low, tl.min(tl.where(present, keys, 2147483647), axis=None))
    wanted = tl.minimum(wanted, total)
    threshold, ties = narrow(source, tl.minimum(low, high), high, total, wanted, one, _count_in_memory, _draw_in_memory)
    return threshold, ties, wanted


@triton.jit
def are_taken(keys, threshold, ties, one):
    """Which keys of a tile are selected: those above the threshold, and of those equal to it the first ``ties``.

    No threshold with ties is HIDDEN_KEY: there are no more of them than visible keys.
    """
    taken = keys > threshold
    if ties != 0:
        equal = keys == threshold
        taken = taken | (equal & (before(tl.where(equal, one, 0)) < ties))
    return taken


@triton.jit
def count_taken(keys, threshold, ties, one):
    """(how many keys of a tile are selected, ties left)."""
    equal = how_many(keys == threshold, one)
    return how_many(keys > threshold, one) + tl.minimum(equal, ties), tl.maximum(ties - equal, 0)


@triton.jit
def store_selected(columns_ptr, base, keys, threshold, ties, one, TILE: tl.constexpr):
    """Write the columns of the selected keys, ascending."""
    if ties == 0:
        place = before(tl.where(keys > threshold, one, 0))
        # keys > threshold once more, which takes less than to keep the answers; the compiler cannot know that it is.
        store_columns(columns_ptr, base, place, keys > threshold + (one - 1), TILE)
    else:
        taken = are_taken(keys, threshold, ties, one)
        store_columns(columns_ptr, base, before(tl.where(taken, one, 0)), taken, TILE)


@triton.jit
def sum_counts(counts_ptr, segments, STEP: tl.constexpr):
    """The sum of ``segments`` counts."""
    total = tl.zeros([STEP], tl.int32)
    for base in range(0, segments, STEP):
        number = base + tl.arange(0, STEP)
        total += tl.load(counts_ptr + number, mask=number < segments, other=0)
    return tl.sum(total, axis=0)
