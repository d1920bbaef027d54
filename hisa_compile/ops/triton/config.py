"""Tile shapes and launch configurations, which no user's first call has to search for.

What changes nothing but a kernel's speed is in the table of :mod:`.configurations`.  Tiles of products depend on H, D,
dtype and block size alone, and all kernels of a call have the same, so that no other size can change a score's bits;
:func:`row_tile` has half of one where that adds up heads in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .configurations import Architecture, Configuration, Shape, lookup, width_class
from .sizes import power_of_2

# Everything the operator allocates besides its outputs stays below this, but for what is linear in the number of keys
# (block means, the last-valid table, bounds of segments, lists of pairs) and the least that a single row needs.
WORKSPACE_BYTES = 58 * 2**20
# Scores of a chunk of long rows, as long as these are as many rows as go past a tile of keys together: an H100's L2
# cache, of 50 MB, holds them until they are read.
CACHED_SCORES = 32 * 2**20
# Entries that one program sorts; longer rows are sorted in tiles of this size and merged.
SORT_TILE = 512
# Rank keys that one program holds in registers while it selects: of a whole row at most, and of a longer one's tile.
SELECT_ROW = 16384
SELECT_TILE = 8192
# Blocks of a row whose rank keys a program of the refinement holds while it selects the kept ones.
MOST_KEPT_ROW = 2048
# Columns of a longer row that tell what its best are about, as long as the row has no more than LONG_COLUMNS: beyond
# that too few of the best K would be among them, and SELECT_TILE are taken.
LONG_SAMPLE = 2048
LONG_COLUMNS = 2**17
# No more than two rows to each of 132 multiprocessors: what selecting among them takes is waiting.
FEW_SELECTIONS = 264
# Tiles from which on sm_90 has the scores of a row in shared memory, where there are more rows than that.
SHARED_COLUMNS = 8192
# Selected entries that one step turns into positions and scores.
EMIT_TILE = 2048
# Tokens that one step of the search for hidden tokens looks at.
SCAN_TILE = 1024
# Lists of pairs whose places one program works out.
LIST_TILE = 64
# A share of the refinement by block at least, in pairs and what it takes, in pairs, to begin with a list's keys.
LEAST_SHARE = 4
RUN_COST = 2
# Lists of pairs that each have room for all rows, up to so many times as much as the pairs need and as long as rows
# then take no more chunks: else they lie one behind another, which takes a sort.
ROOMY = 16
# There counts of neighbouring blocks are so many integers apart: the L2 cache adds to one at a time in 32 bytes.
COUNTS_APART = 8
# Shares that begin in a list and are written at once.
LIST_PARTS = 16
# Pairs that one program sorts by block.
PAIR_TILE = 256
# Most rows that go past one tile of vectors, so that the tile is read once for all of them.
MOST_ROWS = 32
# Fewer rows of a batch than this share too few blocks for a sort of the pairs to pay.
FEW_ROWS = 16
# Fewer pairs than this for each block, on average, and a sort of the pairs does not pay either.
FEW_PAIRS = 2
# Programs that fill any GPU a few times: with fewer, the work is cut finer.
MANY_PROGRAMS = 2048
# Tokens that go past one query together on sm_90, where four warps share a product of either size in the same way:
# with half a tile twice as many programs find shared memory for what they copy ahead.
ROW_TILE = 64
# Programs that read keys past one query wait for memory alone: about as many as four to a multiprocessor, unless there
# are more rows.  On sm_90 as few as half of them, which leave the next kernel places, where each would have fewer tiles
# than LEAST_ROW_TILES.
MANY_ROW_PROGRAMS = 512
LEAST_ROW_TILES = 4
# A tile of means is read for fewer rows than that of a block's keys: it pays to wait for more of them.
MANY_COARSE_PROGRAMS = 640
# Blocks that rows go past together where each has a spread behind its mean.
SPREAD_TILE = 64
# Heads of a query whose elements are on their way together where they are added up.
HEADS_STEP = 32
# Programs that go over all keys for a group of rows, and the tokens that one of sm_90's looks at together.
MANY_PROBE_PROGRAMS = 792
PROBE_TILE = 64
# Blocks of a group of rows that one program hides, or lists the outer blocks of.
LEVEL_TILE = 64
# On sm_90 about as many as run at once, three on each of 132 multiprocessors: they are long enough.
MANY_COARSE_HOPPER_PROGRAMS = 372


class Tiles(NamedTuple):
    """Shapes of the products, [tile, tile_dim] @ [tile_dim, padded_heads], and the warps that share one."""

    tile: int
    tile_dim: int
    padded_heads: int
    num_warps: int


def score_tiles(heads: int, dim: int, dtype: torch.dtype, block_size: int) -> Tiles:
    """Tile shapes from H, D, dtype and the block size alone, the same for every kernel of a call.

    A block is a number of whole tiles where it has 64 tokens, 128 or a multiple.
    """
    padded_heads = max(16, power_of_2(heads))
    padded_dim = max(16, power_of_2(dim))
    num_warps = 4 if padded_heads <= 64 else 8
    if dtype == torch.float32:
        # No tensor cores: the product is unrolled into multiply-adds, a small tile keeps that in registers.
        return Tiles(64, min(padded_dim, 32), padded_heads, num_warps)
    if dtype == torch.float8_e4m3fn:
        padded_dim = max(32, padded_dim)
    tile = 64 if block_size % 128 == 64 else 128
    return Tiles(tile, padded_dim if padded_dim <= 128 else 64, padded_heads, num_warps)


class ProbeTiles(NamedTuple):
    """Shapes of the probe's products, [rows, tile_dim] @ [tile_dim, tile], and the warps that share one."""

    rows: int
    tile: int
    tile_dim: int
    num_warps: int


def probe_tiles(dim: int, dtype: torch.dtype, block_size: int) -> ProbeTiles:
    """Tile shapes from D, dtype and the block size alone: a tile is whole blocks, or a part of one."""
    padded_dim = max(32 if dtype.itemsize == 1 else 16, power_of_2(dim))
    if dtype == torch.float32:
        return ProbeTiles(32, 64, min(padded_dim, 32), 4)
    tile = min(max(64, power_of_2(block_size)), 128)
    return ProbeTiles(64, tile, padded_dim if padded_dim <= 128 else 64, 4)


class Launch(NamedTuple):
    """How a kernel is launched.  ``stages``: tiles in flight in its loop, itself included.

    Where rows go past a tile in groups: at most ``most_rows``, and as few as leave ``programs`` programs.
    """

    stages: int
    num_warps: int
    maxnreg: int | None = None
    most_rows: int = 1
    programs: int = 1


def _shape(kernel: str, tiles: Tiles | None, dtype: torch.dtype, dim: int) -> Shape:
    """``tiles``: None of a kernel that knows no heads."""
    padded_dim = min(max(16, power_of_2(dim)), 256)
    return Shape(kernel, dtype.itemsize, None if tiles is None else tiles.padded_heads, padded_dim)


# Launches of scoring kernels take their warps from the tiles, not from the table: they decide a score's bits.


def coarse_launch(
    tiles: Tiles, dtype: torch.dtype, dim: int, architecture: Architecture, hopper: bool = False
) -> Launch:
    """``hopper``: of the version for sm_90."""
    row = lookup(_shape("coarse_hopper" if hopper else "coarse", tiles, dtype, dim), architecture)
    programs = row.programs or (MANY_COARSE_HOPPER_PROGRAMS if hopper else MANY_COARSE_PROGRAMS)
    return Launch(row.stages, tiles.num_warps, row.maxnreg, row.most_rows or MOST_ROWS, programs)


def probe_launch(
    tiles: ProbeTiles, dtype: torch.dtype, dim: int, architecture: Architecture, hopper: bool = False
) -> Launch:
    """``hopper``: of the version for sm_90."""
    row = lookup(_shape("probe_blocks_hopper" if hopper else "probe_blocks", None, dtype, dim), architecture)
    # A loop over parts of D has tiles of its own in flight.
    stages = 1 if dim > tiles.tile_dim else row.stages
    return Launch(stages, tiles.num_warps, row.maxnreg, programs=row.programs or MANY_PROBE_PROGRAMS)


def _by_block_row(
    tiles: Tiles, dtype: torch.dtype, dim: int, architecture: Architecture, hopper: bool
) -> Configuration:
    shape = _shape("refine_by_block", tiles, dtype, dim)
    if hopper:
        shape = shape._replace(kernel="refine_by_block_hopper", tile=tiles.tile)
    return lookup(shape, architecture)


def shares_of_pairs(
    tiles: Tiles, dtype: torch.dtype, dim: int, block_size: int, architecture: Architecture, hopper: bool, number: int
) -> int:
    """Into how many the refinement by block cuts the pairs on a GPU of ``number`` multiprocessors; each has a program
    for every tile of a block."""
    programs = _by_block_row(tiles, dtype, dim, architecture, hopper).programs
    programs = MANY_PROGRAMS if programs is None else programs * number
    return max(1, programs // max(1, block_size // tiles.tile))


def by_block_launch(
    tiles: Tiles, dtype: torch.dtype, dim: int, architecture: Architecture, hopper: bool = False
) -> Launch:
    """``hopper``: of the version for sm_90; the groups are the same."""
    row = _by_block_row(tiles, dtype, dim, architecture, hopper)
    groups = lookup(_shape("by_block_groups", tiles, dtype, dim), architecture)
    most_rows, programs = groups.most_rows or MOST_ROWS, groups.programs or MANY_PROGRAMS
    return Launch(row.stages, tiles.num_warps, row.maxnreg, most_rows, programs)


def row_tile(tiles: Tiles, architecture: Architecture) -> int:
    """Tokens of a product of the refinement by row.  Elsewhere, or with more warps, heads would be added up in another
    order in half a tile."""
    return min(tiles.tile, ROW_TILE) if architecture == 90 and tiles.num_warps == 4 else tiles.tile


def copied_row_tile(tiles: Tiles, dtype: torch.dtype) -> int:
    """The same of the version for sm_90: as many bytes in either dtype, so that as many programs find shared memory."""
    return max(tiles.tile // dtype.itemsize, min(tiles.tile, 16 * tiles.num_warps))


def by_row_launch(
    tiles: Tiles, dtype: torch.dtype, dim: int, architecture: Architecture, hopper: bool = False
) -> Launch:
    """``hopper``: of the version for sm_90."""
    row = lookup(_shape("refine_by_row_hopper" if hopper else "refine_by_row", tiles, dtype, dim), architecture)
    return Launch(row.stages, tiles.num_warps, row.maxnreg, programs=row.programs or MANY_ROW_PROGRAMS)


def _wide_launch(kernel: str, entries: int, architecture: Architecture) -> Launch:
    row = lookup(Shape(kernel, width=width_class(entries)), architecture)
    assert row.num_warps is not None
    return Launch(1, row.num_warps, row.maxnreg)


def select_launch(kernel: str, columns: int, architecture: Architecture) -> Launch:
    """``kernel``: "select_blocks", "select_tokens", that of sm_90's many long rows, "select_shared_hopper", or
    "select_few_tokens", among so many columns."""
    return _wide_launch(kernel, columns, architecture)


def sort_launch(tile: int, architecture: Architecture) -> Launch:
    """The kernels that put rows in order, a tile of ``tile`` entries at a time."""
    return _wide_launch("sort", tile, architecture)
