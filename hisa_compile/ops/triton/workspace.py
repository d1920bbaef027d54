"""What the kernels of a chunk leave for each other in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import config
from .descriptor import QueryRows, describe
from .plan import Plan


class Workspace:
    """Buffers as large as the first chunk needs, which is the largest.

    score_bits int32 [rows, pitch]: scores of outer blocks, then of the probe's sample, of blocks, of candidates, as
        :func:`.keys.score_bits` says.
    block_scores: where in them those of blocks begin; rows are as far apart.
    selected_count: of the best tokens of each row, where a kernel of its own fills rows up.
    kept, kept_flag: the kept blocks, see :func:`.select.select_blocks_kernel`; none where every block is kept, no flags
        where no kernel of its own fills rows up.
    counts, pairs, runs: the pairs by block, see :mod:`.group`, where they are listed; rank, offsets: where they are
        sorted.
    candidates, guess, column_counts: of rows too long for one program, see :mod:`.long_rows`.
    packed: of rows sorted in tiles, see :func:`.finish.sort_tiles_kernel`, in the place of score_bits.
    heads, thresholds: of the probe, see :mod:`.probe`.
    outer_flag, listed, listed_count: kept outer blocks by row and by group of rows, see :mod:`.levels`.
    wide, wide_desc: float8 queries in the means' dtype, where they are copied; see
    :func:`.coarse.widen_queries_kernel`.

    ``empty(*shape, dtype=torch.int32)`` makes each.
    """

    def __init__(
        self,
        plan: Plan,
        heads: int,
        dim: int,
        wide: torch.dtype | None,
        probe: torch.dtype,
        filled_apart: bool,
        shares: int,
        empty: Callable[..., Tensor],
    ) -> None:
        rows = plan.chunks[0].rows
        lists = plan.chunks[0].batches * plan.blocks

        self.score_bits = empty(rows, plan.pitch)
        self.block_scores = self.score_bits.view(-1)[plan.beside :]
        self.selected_count = empty(rows) if filled_apart else None
        self.kept: dict[str, Tensor | None] = {"kept_ptr": None, "kept_count_ptr": None}
        self.runs: dict[str, Tensor | None] = {"lists_ptr": None, "first_list_ptr": None, "totals_ptr": None}
        self.offsets: Tensor | None = None
        self.kept_flag: Tensor | None = None
        self.counts: Tensor | None = None
        self.rank: Tensor | None = None
        self.pairs: Tensor | None = None
        self.candidates: Tensor | None = None
        self.guess: Tensor | None = None
        self.column_counts: Tensor | None = None
        self.packed: Tensor | None = None
        self.heads: Tensor | None = None
        self.thresholds: Tensor | None = None
        self.outer_flag: Tensor | None = None
        self.listed: Tensor | None = None
        self.listed_count: Tensor | None = None
        self.wide: Tensor | None = None
        self.wide_desc: Any = None
        # Of this chunk alone, see _Call.weights_of.
        self.weights: Tensor | None = None
        if plan.prune:
            self.kept = {"kept_ptr": empty(rows, plan.block_topk), "kept_count_ptr": empty(rows)}
            self.kept_flag = empty(rows, plan.blocks, dtype=torch.int8) if filled_apart else None
        if plan.sample is not None:
            self.heads = empty(rows, 2, dim, dtype=probe)
            self.thresholds = empty(rows, 2, dtype=torch.float32)
        if plan.outer is not None:
            groups = plan.probe_groups(plan.chunks[0])
            self.outer_flag = empty(rows, plan.outer.blocks, dtype=torch.int8)
            self.listed = empty(groups, plan.outer.blocks)
            self.listed_count = empty(groups)
        if plan.pairs_listed:
            self.rank = None if plan.room else empty(rows, plan.block_topk)
            self.pairs = empty(lists * plan.room if plan.room else rows * plan.block_topk)
            self.counts = empty(plan.counts(plan.chunks[0]))
            self.offsets = None if plan.room else empty(lists)
            self.runs = {"lists_ptr": empty(lists + 1, 2), "first_list_ptr": empty(shares + 1), "totals_ptr": empty(2)}
        if not plan.one_tile:
            self.candidates = empty(rows, 2, config.SELECT_TILE)
            self.guess = empty(rows)
            self.column_counts = empty(rows, 2, plan.segments)
        if plan.merged:
            self.packed = self.score_bits.view(-1).view(torch.int64)
        if wide is not None:
            self.wide = empty(rows, heads, dim, dtype=wide)
            of_rows = QueryRows(rows * heads, heads, 0)
            self.wide_desc = describe(self.wide[:, None], of_rows, plan.tiles.padded_heads, plan.tiles.tile_dim)
