"""What a call's sizes alone decide: the chunks its rows go in, the widths of the workspace, which kernels run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..budget import Budget
from ..coarse import sample_of
from . import config
from .configurations import Architecture
from .sizes import cdiv, power_of_2

# A row of a chunk and the place of a kept block share an int32.
_MOST_ROWS = 2**15 - 1
_MOST_SLOTS = 2**15


class Chunk(NamedTuple):
    """Rows [first_row, first_row + rows): part of one batch's, or those of whole batches, of_batch each."""

    first_row: int
    rows: int
    of_batch: int

    @property
    def batches(self) -> int:
        return self.rows // self.of_batch


class Level(NamedTuple):
    """Blocks of ``block_size`` tokens, ``block_topk`` of which are kept, and how many there are."""

    block_size: int
    block_topk: int
    blocks: int


def chunks_of_rows(batch: int, queries: int, most: int, group: int = 1) -> Iterator[Chunk]:
    """All rows in chunks of at most ``most``, the first of them the largest; parts of a batch are whole groups of
    ``group`` rows as far as that is possible.
    """
    if queries > most:
        rows = cdiv(queries, cdiv(queries, most))
        if group <= most:
            rows = min(group * cdiv(rows, group), group * (most // group))
        for b in range(batch):
            for s in range(0, queries, rows):
                here = min(rows, queries - s)
                yield Chunk(b * queries + s, here, here)
    else:
        batches = cdiv(batch, cdiv(batch, most // queries))
        for b in range(0, batch, batches):
            yield Chunk(b * queries, min(batches, batch - b) * queries, queries)


def _most_rows(row_bytes: int) -> int:
    """Of a chunk, that take so much of the workspace each."""
    return max(1, min(config.WORKSPACE_BYTES // row_bytes, _MOST_ROWS))


def rows_past_a_tile(rows: int, tiles: int, how: config.Launch) -> int:
    """Rows that go past one tile of vectors: as many as leave work for so many programs."""
    return max(1, min(how.most_rows, rows * tiles // how.programs))


class Plan:
    """``probe_topk``: topk where blocks go by the probe; ``outer``: inside which outer blocks, see ``coarse.outer_of``;
    ``spread``: whether a spread stands behind each mean.

    Attributes, all from sizes, chunks and where scores lie from the architecture too:

    blocks, prune: how many blocks there are, and whether any is left out.
    inner, outer: the budget's blocks, and those by whose means they are looked for, if they are.
    by_means: which of the two go by their means, None where neither does.
    sample: of the probe, None where blocks go by their means or none is left out.
    tiles, probe_tiles: shapes of the products.
    columns, pitch: candidates of a row, and the length of a row of scores in memory, a multiple of 16.
    beside: of few rows the refinement on sm_90 keeps blocks itself, program by program, if windows alone say what is
        visible: scores of blocks are then behind the row's first so many columns, which those of candidates have.  0
        where both begin in one place.
    one_tile: a row's candidates fit the registers of the program that selects among them.
    window_suffices: where windows alone hide tokens, a row has as many candidates as are to be selected, or its whole
        window.
    segments: how many programs a longer row is spread over, see :mod:`.long_rows`.
    sort_tile, sort_tiles, merged: how rows are put in order; a row of several tiles is merged.
    chunks: the rows in chunks; the workspace holds one.
    by_block: queries go past tiles of keys; else keys past a query.
    box: tokens that are copied together where keys do, on sm_90: a whole block or a tile of ``row_tile``; 0 where these
        do not divide each other.
    pairs_listed, room, spacing: see :mod:`.group`; room is 0 where lists lie one behind another.
    """

    def __init__(
        self,
        batch: int,
        queries: int,
        heads: int,
        dim: int,
        tokens: int,
        width: int,
        budget: Budget,
        dtype: torch.dtype,
        sorted: bool,
        architecture: Architecture,
        probe_topk: int | None = None,
        outer: Budget | None = None,
        spread: bool = False,
    ) -> None:
        block_size, block_topk = budget
        self.blocks = cdiv(tokens, block_size)
        self.prune = self.blocks > block_topk
        self.sample = sample_of(tokens, probe_topk) if self.prune and probe_topk is not None else None
        self.inner = Level(*budget, self.blocks)
        self.outer = None if outer is None else Level(*outer, cdiv(tokens, outer.block_size))
        self.by_means = self.inner if self.prune and self.sample is None else self.outer
        self.tiles = config.score_tiles(heads, dim, dtype, block_size)
        self.probe_tiles = config.probe_tiles(dim, dtype, block_size)
        self.columns = budget.candidates if self.prune else tokens
        self.one_tile = self.columns <= config.SELECT_ROW
        # Kept blocks lie whole in the window but for the first and the last, which have at least a token there.
        self.window_suffices = not self.prune or width <= (block_topk - 2) * block_size + 2
        self.segments = cdiv(self.columns, config.SELECT_TILE)
        self.sort_tile = min(power_of_2(width), config.SORT_TILE)
        self.sort_tiles = cdiv(width, self.sort_tile)
        self.merged = sorted and self.sort_tiles > 1
        # A sample's scores are no longer needed when those of blocks are made, nor these when those of tokens are (but
        # where one kernel reads these and makes those), nor these when sorted tiles are.
        packed = 2 * self.sort_tiles * self.sort_tile if self.merged else 0
        sampled = 0 if self.sample is None else self.sample.size
        ranked = self.blocks if self.prune else 0
        few = self.prune and queries < config.FEW_ROWS and self.blocks <= config.MOST_KEPT_ROW
        self.beside = 16 * cdiv(self.columns, 16) if few and architecture == 90 else 0
        if self.beside:
            # Scoring kernels write whole tiles, none larger than this; they stop at ``pitch`` columns, which from here
            # on is past the row's end.
            ranked = self.beside + self.tiles.tile * cdiv(self.blocks, self.tiles.tile)
        self.pitch = 16 * cdiv(max(self.columns, ranked, packed, sampled), 16)

        row_bytes = 4 * self.pitch + 4 + 4 * heads
        if self.prune:
            # Kept blocks, their places among the pairs of a block, the pairs, and lists of FEW_PAIRS on average.
            row_bytes += self.blocks + 4 + 20 * block_topk
            if self.sample is not None:
                # Two heads, their dtype two bytes where float8 is taken apart; the threshold and the cap.
                row_bytes += 2 * dim * max(2, dtype.itemsize) + 8
            if self.by_means is not None and dtype.itemsize == 1 and not spread:
                # The query in the means' dtype, for the kernel that knows no spreads.
                row_bytes += 2 * heads * dim
            if self.outer is not None:
                # Which outer blocks a row keeps, and its share of the lists of those that its groups do.
                lists = cdiv(queries, self.probe_tiles.rows)
                row_bytes += self.outer.blocks + cdiv(4 * lists * self.outer.blocks, queries) + 4
        if not self.one_tile:
            # Candidates and their scores, the guess, two counts a segment.
            row_bytes += 8 * config.SELECT_TILE + 4 + 8 * self.segments
        how = config.by_block_launch(self.tiles, dtype, dim, architecture)
        # Lists with room in the place of the pairs and theirs, unless that takes more chunks.
        with_room = row_bytes + 4 * self.blocks - 8 * block_topk + cdiv(4 * config.COUNTS_APART * self.blocks, queries)
        roomy = self.prune and self.blocks <= config.ROOMY * block_topk
        if roomy:
            fewest, own = (
                sum(1 for _ in chunks_of_rows(batch, queries, _most_rows(each))) for each in (row_bytes, with_room)
            )
            roomy = own <= fewest
        most = _most_rows(with_room if roomy else row_bytes)
        cached = config.CACHED_SCORES // (4 * self.pitch)
        if not self.one_tile and cached >= how.most_rows:
            most = min(most, cached)
        # Past a tile of keys rows go in groups, where there are no lists of pairs.
        self.chunks = list(chunks_of_rows(batch, queries, most, 1 if self.prune else how.most_rows))

        rows = self.chunks[0].of_batch
        self.by_block = (
            dim <= self.tiles.tile_dim
            and rows >= config.FEW_ROWS
            and (
                not self.prune
                or (
                    block_size % self.tiles.tile == 0
                    and block_topk <= _MOST_SLOTS
                    and rows * block_topk >= config.FEW_PAIRS * self.blocks
                )
            )
        )
        self.pairs_listed = self.by_block and self.prune
        self.row_tile = config.copied_row_tile(self.tiles, dtype)
        self.box = min(block_size, self.row_tile)
        divides = max(block_size, self.row_tile) % self.box == 0 and self.box >= 16
        if self.by_block or not self.prune or not divides or dim > self.tiles.tile_dim:
            self.box = 0
        self.room = self.chunks[0].of_batch if self.pairs_listed and roomy else 0
        self.spacing = {"room": self.room, "apart": config.COUNTS_APART if self.room else 1}
        self.block_topk = block_topk

    def probe_groups(self, chunk: Chunk) -> int:
        """Groups of rows that go past the probe's tiles of tokens together."""
        return chunk.batches * cdiv(chunk.of_batch, self.probe_tiles.rows)

    def counts(self, chunk: Chunk) -> int:
        """Integers in which the pairs of each list are counted, with what lies between them."""
        return chunk.batches * self.blocks * self.spacing["apart"]
