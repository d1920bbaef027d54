"""The operator on a GPU: which kernels run, on what tiles, over which part of the rows.

Queries are rows r = b * S + s.  Block means, if blocks go by them, are made once; then chunks of rows go through

    scores of blocks -> kept blocks -> (pairs by block) -> token scores -> selection -> fill -> order

(the first three only where not every block is kept, the second not where the refinement of few rows does that, the fill
where selection cannot know what else is hidden).  A chunk is as many rows as the workspace allows, whatever S and T
are, and nothing here waits for the device: chunks depend on shapes only, so the whole can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from ..budget import Budget
from ..coarse import PAPER, SPREAD, outer_of, probes
from ..reference import pooled_dtype
from ..visibility import Visibility
from . import config, gpu
from .coarse import coarse_kernel, widen_queries_kernel
from .config import Launch
from .descriptor import WEIGHTS_ALIGNED, QueryRows, describe, describe_weights, key_rows, query_rows
from .finish import fill_kernel, merge_tiles_kernel, sort_kernel, sort_tiles_kernel
from .group import list_runs_kernel, sort_pairs_kernel
from .launch_pool import launch_pool
from .launch_probe import launch_probe
from .launch_refine import launch_refine
from .long_rows import guess_key_kernel, list_candidates_kernel
from .operands import FP8_BITS
from .overlap import AHEAD, BESIDE
from .plan import Chunk, Level, Plan, rows_past_a_tile
from .select import select_blocks_kernel, select_tokens_kernel
from .sizes import cdiv, power_of_2
from .workspace import Workspace

if TYPE_CHECKING:
    from .again import Record


def indexer_topk_triton(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    topk: int,
    budget: Budget,
    visibility: Visibility,
    k_scale: Tensor | None,
    k_weight: Tensor | None,
    sorted: bool,
    mark_hidden: bool,
    k_pooled: Tensor | None = None,
    coarse: str = PAPER,
    record: Record | None = None,
) -> tuple[Tensor, Tensor]:
    """``hisa::indexer_topk`` on q's device; arguments are valid (see :mod:`..validate`), any strides.

    CPU tensors are accepted under TRITON_INTERPRET=1.  ``record`` is told what the call allocates and launches.

    Returns:
        indices int32 [B, S, k'] and scores float32 [B, S, k'], contiguous, k' = min(topk, T).
    """
    batch, queries = q.shape[:2]
    tokens = k.shape[1]
    width = min(topk, tokens)
    indices = torch.empty((batch, queries, width), dtype=torch.int32, device=q.device)
    scores = torch.empty((batch, queries, width), dtype=torch.float32, device=q.device)
    if record is not None:
        record.results = indices, scores
    if indices.numel() == 0:
        return indices, scores
    with torch.cuda.device_of(q):
        call = _Call(
            q, k, weights, topk, budget, visibility, k_scale, k_weight, k_pooled, indices, scores, sorted, mark_hidden,
            coarse, record,
        )  # fmt: skip
        call.run()
    return indices, scores


class _Call:
    """One call: the kernels' arguments, the workspace, and the stages in their order."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        topk: int,
        budget: Budget,
        visibility: Visibility,
        k_scale: Tensor | None,
        k_weight: Tensor | None,
        k_pooled: Tensor | None,
        indices: Tensor,
        scores: Tensor,
        sorted: bool,
        mark_hidden: bool,
        coarse: str,
        record: Record | None,
    ) -> None:
        self.record = record
        self.batch, self.queries, heads, self.dim = q.shape
        self.tokens, self.width = k.shape[1], indices.shape[2]
        self.device, self.dtype = q.device, q.dtype
        self.block_size, self.block_topk = budget
        self.architecture = gpu.architecture(q)
        self.spread = coarse == SPREAD
        self.plan = Plan(
            self.batch, self.queries, heads, self.dim, self.tokens, self.width, budget, q.dtype, sorted,
            self.architecture, topk if probes(coarse) else None, outer_of(coarse, self.tokens, budget), self.spread,
        )  # fmt: skip
        self.sorted, self.mark_hidden, self.k_pooled = sorted, mark_hidden, k_pooled
        self.outputs = {"indices_ptr": indices, "keys_ptr": scores.view(torch.int32)}
        self.scores = scores

        def expanded(x: Tensor | None, *more: int) -> Tensor | None:
            return None if x is None else x.expand(self.batch, self.queries, *more)

        fp8 = gpu.fp8_mode(q)
        self.window = gpu.strided("start", expanded(visibility.window_start), "bs")
        self.window |= gpu.strided("end", expanded(visibility.window_end), "bs")
        self.of_keys = gpu.strided("valid", visibility.key_valid, "bt") | gpu.strided(
            "k_segment", visibility.k_segment, "bt"
        )
        self.seen = self.window | self.of_keys
        self.seen |= gpu.strided("mask", expanded(visibility.mask, self.tokens), "bst")
        self.seen |= gpu.strided("q_segment", expanded(visibility.q_segment), "bs")
        self.keys = gpu.strided("k", k, "btd", fp8) | gpu.strided("scale", k_scale, "bt")
        self.keys |= gpu.strided("k_weight", k_weight, "bt")
        self.query = gpu.strided("q", q, "bshd", fp8)
        self.weights = weights
        tiles = self.plan.tiles
        # Four warps share 64 tokens there, one product instruction takes at most 256 heads, and copies of weights begin
        # at multiples of 16 bytes.
        fits = tiles.tile >= 16 * tiles.num_warps and tiles.padded_heads <= 256 and heads % 4 == 0
        windows_only = visibility.mask is None and visibility.key_valid is None and visibility.k_segment is None
        self.hopper = gpu.is_hopper(q)
        hopper = self.hopper and q.dtype.itemsize < 4 and fits
        # By row keys are copied by the accelerator, too, where windows alone say what is visible.
        by_row = hopper and windows_only and self.plan.box > 0
        boxes = key_rows(k) if by_row else None
        self.query_rows = query_rows(q) if hopper and (self.plan.by_block or boxes is not None) else None
        self.box_rows = boxes if self.query_rows is not None else None
        if self.box_rows is not None:
            # Several boxes of a tile are copied 128 bytes of a key at a time, as products have them.
            several = self.plan.box < self.plan.row_tile
            span = min(tiles.tile_dim, 128 // q.dtype.itemsize) if several else tiles.tile_dim
            self.box_desc = describe(k[:, None], self.box_rows, self.plan.box, span)
        # Widened queries lie side by side, and rows are copied from multiples of 16 bytes.
        widened = q.dtype.itemsize > 1 or self.dim % 8 == 0
        by_means = self.plan.by_means is not None and windows_only and widened and not self.spread
        # Of few rows each load that waits for another one counts.
        many = self.plan.chunks[0].of_batch >= config.FEW_ROWS
        self.coarse_copied = self.query_rows is not None and by_means and many
        # Keys as the accelerator copies them for the probe; a tile is whole blocks or a part of one there.
        self.key_rows = None
        if self.plan.sample is not None and windows_only and self.hopper:
            whole = self.block_size % config.PROBE_TILE == 0 or self.block_size in (16, 32)
            outer = self.plan.outer is None or self.plan.outer.block_size % config.PROBE_TILE == 0
            probed = q.dtype.itemsize < 4 and 0 < self.dim <= self.plan.probe_tiles.tile_dim and whole and outer
            self.key_rows = key_rows(k) if probed else None
        if self.key_rows is not None:
            self.k_desc = describe(k[:, None], self.key_rows, config.PROBE_TILE, self.plan.probe_tiles.tile_dim)
        self.shape = {
            "H": heads,
            "D": self.dim,
            "BLOCK_SIZE": self.block_size,
            "PADDED_H": tiles.padded_heads,
            "TILE_D": tiles.tile_dim,
            "TILE": tiles.tile,
            "FP8": fp8,
            "WIDEN": triton.knobs.runtime.interpret,
        }
        self.sizes = {"S": self.queries, "T": self.tokens}
        self.overlap = gpu.overlap(self.architecture)
        self.repeatable: list[gpu.Repeatable] = []
        self.repeats = False
        means = pooled_dtype(self.dtype)
        self.wide = means if self.coarse_copied and means != self.dtype else None
        self.widened_ahead = False  # beside the kernel before it, which is then known to be one of this call
        if self.query_rows is not None:
            self.q_desc = describe(q, self.query_rows, tiles.padded_heads, tiles.tile_dim)
        of_probe = torch.float16 if fp8 == FP8_BITS else self.dtype
        filled_apart = not (windows_only and self.plan.window_suffices)
        hopper = self.query_rows is not None
        shares = config.shares_of_pairs(
            tiles, self.dtype, self.dim, self.block_size, self.architecture, hopper, gpu.multiprocessors(q)
        )
        self.sharing = {"shares": shares, "least": config.LEAST_SHARE, "run_cost": config.RUN_COST}
        self.space = Workspace(self.plan, heads, self.dim, self.wide, of_probe, filled_apart, shares, self.empty)
        # A launch less for whoever waits for little else; who fills rows up asks for flags of kept blocks.
        self.keeps = self.plan.beside > 0 and self.box_rows is not None and not filled_apart

    def run(self) -> None:
        ranked = self.plan.by_means
        means = {} if ranked is None else self.means_and_tables(ranked)
        first = self.plan.chunks[0]
        self.repeats = len(self.plan.chunks) > 1
        for chunk in self.plan.chunks:
            at = {"first_row": chunk.first_row} | self.sizes
            self.weights_of(chunk)
            # Most chunks are like the first; what they launch differs in these arguments alone.
            if self.repeatable and chunk[1:] == first[1:] and chunk.first_row < 2**31:
                changed = {"first_row": chunk.first_row, "w_ptr": self.query["w_ptr"], "w_desc": self.w_desc}
                for each in self.repeatable:
                    each.again(changed)
                    if self.record is not None:
                        self.record.launched(each)
                continue
            if self.plan.prune:
                if ranked is not None:
                    self.coarse(chunk, at, ranked, means)
                if self.plan.outer is not None:
                    self.select_blocks(chunk, at, self.plan.outer)
                if self.plan.sample is not None:
                    launch_probe(self, chunk, at, self.plan.sample)
                if not self.keeps:
                    self.select_blocks(chunk, at, self.plan.inner)
                if self.plan.pairs_listed:
                    self.list_pairs(chunk, at)
            launch_refine(self, chunk, at)
            self.select(chunk, at)
            self.finish(chunk, at)
            self.repeats = False

    def empty(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """What this call alone needs."""
        buffer = torch.empty(shape, dtype=dtype, device=self.device)
        if self.record is not None:
            self.record.allocated(buffer)
        return buffer

    def launch(self, kernel: Any, programs: int, how: Launch, **arguments: Any) -> None:
        """A launch of a stage; of the first chunk's, those after it repeat it."""
        arguments.setdefault("OVERLAP", self.overlap)
        compiled = gpu.launch(kernel, programs, how, **arguments)
        known = self.repeats or self.record is not None
        one = gpu.Repeatable(compiled, kernel, programs, arguments) if known and compiled is not None else None
        if self.repeats and one is not None:
            self.repeatable.append(one)
        if self.record is not None:
            self.record.launched(one)

    def weights_of(self, chunk: Chunk) -> None:
        """The chunk's head weights as kernels want them: float32, aligned, the heads of a row together."""
        batch, query = divmod(chunk.first_row, self.queries)
        rows = slice(batch, batch + chunk.batches), slice(query, query + chunk.of_batch)
        here = self.weights[rows]
        if here.dtype != torch.float32 or not here.is_contiguous() or here.data_ptr() % WEIGHTS_ALIGNED:
            if self.space.weights is None:
                self.space.weights = self.empty(self.plan.chunks[0].rows, here.shape[2], dtype=torch.float32)
            here = self.space.weights[: chunk.rows].view(here.shape).copy_(here)
            if self.record is not None:
                self.record.copied(rows, here)
        self.query |= {"w_ptr": here, "w_sr": here.shape[2]}
        self.w_desc = None if self.query_rows is None else describe_weights(here, self.plan.tiles)

    def means_and_tables(self, ranked: Level) -> dict[str, Any]:
        """What the coarse stage reads of blocks: representatives, and tables that tell which hold a visible token."""
        means = self.k_pooled
        if means is None:
            width = 2 * self.dim if self.spread else self.dim
            means = self.empty(self.batch, ranked.blocks, width, dtype=pooled_dtype(self.dtype))
        tables: dict[str, Tensor | None] = dict.fromkeys(("last_valid_ptr", "low_ptr", "high_ptr"))
        if self.of_keys["valid_ptr"] is not None:
            tables["last_valid_ptr"] = self.empty(self.batch, self.tokens)
        if self.of_keys["k_segment_ptr"] is not None:
            tables["low_ptr"], tables["high_ptr"] = (
                self.empty(self.batch, ranked.blocks, dtype=torch.int64) for _ in range(2)
            )
        if self.k_pooled is None or any(table is not None for table in tables.values()):
            # However many programs pool, queries that are widened need not wait for them.
            self.widened_ahead = self.wide is not None
            launch_pool(
                functools.partial(self.launch, OVERLAP=int(BESIDE)) if self.widened_ahead else self.launch,
                self.keys | self.of_keys | tables | {"means_ptr": means if self.k_pooled is None else None},
                self.batch, self.tokens, self.dim, ranked.block_size, self.shape["FP8"], self.spread,
            )  # fmt: skip
        return gpu.strided("means", means, "bmd") | tables

    def coarse(self, chunk: Chunk, at: dict[str, int], ranked: Level, means: dict[str, Any]) -> None:
        """Scores of blocks by their means."""
        # Two vectors of a block take the place of two blocks: shared memory holds as many.
        tile = min(self.plan.tiles.tile, config.SPREAD_TILE) if self.spread else self.plan.tiles.tile
        tiles = cdiv(ranked.blocks, tile)
        work = self.query | self.seen | means | at | self.shape | {"BLOCK_SIZE": ranked.block_size, "TILE": tile}
        work["SPREAD"] = self.spread
        work |= {"block_scores_ptr": self.space.block_scores, "pitch": self.plan.pitch, "M": ranked.blocks}
        work |= {"counts_ptr": self.space.counts, "counts": self.plan.counts(chunk)}
        if self.plan.outer is not None:
            work |= {"counts_ptr": self.space.listed_count, "counts": self.plan.probe_groups(chunk)}
        kernel: Any = coarse_kernel
        how = config.coarse_launch(self.plan.tiles, self.dtype, self.dim, self.architecture, self.coarse_copied)
        if self.coarse_copied:
            from .coarse_hopper import coarse_hopper_kernel as kernel

            work = self.copied_query(chunk) | gpu.only(work, kernel)
        group = rows_past_a_tile(chunk.rows, tiles, how)
        self.launch(
            kernel,
            chunk.batches * cdiv(chunk.of_batch, group) * tiles,
            how,
            **work,
            rows_per_batch=chunk.of_batch,
            group_rows=group,
            MOST_ROWS=how.most_rows,
            STAGES=how.stages,
        )

    def select_blocks(self, chunk: Chunk, at: dict[str, int], ranked: Level) -> None:
        """The kept blocks of each row, from their scores; of outer ones flags alone."""
        into = self.space.kept | {"kept_flag_ptr": self.space.kept_flag}
        pairs = self.space.pairs if self.plan.room else None
        into |= {"counts_ptr": self.space.counts, "rank_ptr": self.space.rank, "pairs_ptr": pairs}
        if ranked is self.plan.outer:
            into = dict.fromkeys(into) | {"kept_flag_ptr": self.space.outer_flag}
        self.launch(
            select_blocks_kernel,
            chunk.rows,
            config.select_launch("select_blocks", ranked.blocks, self.architecture),
            **(self.window | into | at),
            block_scores_ptr=self.space.block_scores,
            rows_per_batch=chunk.of_batch,
            M=ranked.blocks,
            pitch=self.plan.pitch,
            block_topk=ranked.block_topk,
            **self.plan.spacing,
            BLOCK_SIZE=ranked.block_size,
            SLOTS=min(power_of_2(ranked.block_topk), config.EMIT_TILE),
            TILE=min(power_of_2(ranked.blocks), config.SELECT_TILE),
            ONE_TILE=ranked.blocks <= config.SELECT_TILE,
        )

    def copied_query(self, chunk: Chunk) -> dict[str, Any]:
        """q for the coarse kernel of sm_90, in the dtype of the means: float8 is widened once for all of them."""
        assert self.query_rows is not None
        rows, described, wide = self.query_rows, self.q_desc, self.space.wide
        if wide is not None:
            shape = {name: self.shape[name] for name in ("H", "D", "PADDED_H", "TILE_D")}
            query = {name: self.query[name] for name in ("q_ptr", "q_sb", "q_ss", "q_sh", "q_sd")}
            at = {"first_row": chunk.first_row, "S": self.queries}
            # It writes what only kernels of earlier chunks have read: all have ended when the last one has waited.
            work: dict[str, Any] = query | at | shape | ({"OVERLAP": int(AHEAD)} if self.widened_ahead else {})
            self.launch(widen_queries_kernel, chunk.rows, Launch(1, 4), **work, wide_ptr=wide)
            rows, described = QueryRows(0, wide.shape[1], 0), self.space.wide_desc
        return self.described(rows, described) | {"OF_CHUNK": wide is not None}

    def described(self, rows: QueryRows, described: Any) -> dict[str, Any]:
        q = {"q_desc": described, "q_query_rows": rows.of_query, "q_batch_rows": rows.of_batch}
        return q | {"w_desc": self.w_desc}

    def list_pairs(self, chunk: Chunk, at: dict[str, int]) -> None:
        """The pairs (row, kept block) by block, and their shares."""
        lists = chunk.batches * self.plan.blocks
        work: dict[str, Any] = {"counts_ptr": self.space.counts, "lists": lists, "apart": self.plan.spacing["apart"]}
        work |= {"TILE": config.LIST_TILE, "SUM_TILE": 16 * config.LIST_TILE, "PARTS": config.LIST_PARTS}
        work |= self.space.runs | self.sharing | {"offsets_ptr": self.space.offsets}
        self.launch(list_runs_kernel, cdiv(lists, config.LIST_TILE), Launch(1, 4), **work)
        if self.plan.room:
            return
        self.launch(
            sort_pairs_kernel,
            cdiv(chunk.rows * self.block_topk, config.PAIR_TILE),
            Launch(1, 4),
            **(self.window | self.space.kept | at),
            rank_ptr=self.space.rank,
            offsets_ptr=self.space.offsets,
            pairs_ptr=self.space.pairs,
            rows=chunk.rows,
            rows_per_batch=chunk.of_batch,
            M=self.plan.blocks,
            block_topk=self.block_topk,
            BLOCK_SIZE=self.block_size,
            TILE=config.PAIR_TILE,
        )

    def select(self, chunk: Chunk, at: dict[str, int]) -> None:
        """The best tokens of each row, and others where it has too few."""
        few = self.plan.one_tile and chunk.rows <= config.FEW_SELECTIONS
        selection = "select_few_tokens" if few else "select_tokens"
        # Four neighbours are of one block.
        hopper = self.hopper and self.plan.one_tile and (self.block_size % 4 == 0 or not self.plan.prune)
        if hopper and not few and power_of_2(self.plan.columns) >= config.SHARED_COLUMNS:
            selection = "select_shared_hopper"
        how = config.select_launch(selection, self.plan.columns, self.architecture)
        of_rows = self.window | at | {"token_scores_ptr": self.space.score_bits, "pitch": self.plan.pitch}
        of_rows |= {"kept_count_ptr": self.space.kept["kept_count_ptr"], "BLOCK_SIZE": self.block_size}
        of_rows |= {"TILE": power_of_2(self.plan.columns) if self.plan.one_tile else config.SELECT_TILE}
        step = {"STEP": min(power_of_2(self.plan.segments), config.SCAN_TILE)}
        if not self.plan.one_tile:
            sample = min(config.LONG_SAMPLE, of_rows["TILE"])
            if self.plan.columns > config.LONG_COLUMNS:
                sample = of_rows["TILE"]
            work = of_rows | step | {"guess_ptr": self.space.guess, "segments": self.plan.segments}
            work |= {"counts_ptr": self.space.column_counts}
            how_sample = config.select_launch("select_few_tokens", sample, self.architecture)
            self.launch(guess_key_kernel, chunk.rows, how_sample, **work, K=self.width, SAMPLE=sample)
            programs = chunk.rows * self.plan.segments
            self.launch(list_candidates_kernel, programs, how, **work, candidates_ptr=self.space.candidates)
            # Among candidates it is a row of a tile.
            how = config.select_launch("select_few_tokens", of_rows["TILE"], self.architecture)
        kernel: Any = select_tokens_kernel
        work = of_rows | self.outputs | step | {"kept_ptr": self.space.kept["kept_ptr"], "block_topk": self.block_topk}
        work |= {"candidates_ptr": self.space.candidates, "counts_ptr": self.space.column_counts}
        work |= {"segments": self.plan.segments, "selected_count_ptr": self.space.selected_count, "K": self.width}
        work |= {"FINAL": not self.sorted, "MARK_HIDDEN": self.mark_hidden, "ONE_TILE": self.plan.one_tile}
        work["K_TILE"] = min(power_of_2(self.width), config.EMIT_TILE)
        # Gluon is young: only who needs it depends on it.  Each warp has columns.
        if selection == "select_shared_hopper" and of_rows["TILE"] >= 512 * how.num_warps:
            from .select_shared_hopper import select_shared_hopper_kernel as kernel

            work = gpu.only(work, kernel)
        elif hopper and of_rows["TILE"] >= 128 * how.num_warps:
            from .select_hopper import select_tokens_hopper_kernel as kernel

            work = gpu.only(work, kernel)
        self.launch(kernel, chunk.rows, how, **work)
        if self.space.selected_count is None:
            return
        self.launch(
            fill_kernel,
            chunk.rows,
            Launch(1, self.plan.tiles.num_warps),
            **(self.query | self.keys | self.seen | self.outputs | at | self.shape),
            kept_count_ptr=self.space.kept["kept_count_ptr"],
            kept_flag_ptr=self.space.kept_flag,
            selected_count_ptr=self.space.selected_count,
            M=self.plan.blocks,
            block_topk=self.block_topk,
            K=self.width,
            SCAN=config.SCAN_TILE,
            FINAL=not self.sorted,
            MARK_HIDDEN=self.mark_hidden,
        )

    def finish(self, chunk: Chunk, at: dict[str, int]) -> None:
        """Rows in order, if they are to be."""
        if not self.sorted:
            return
        order = {"first_row": at["first_row"], "K": self.width, "TILE": self.plan.sort_tile}
        how = config.sort_launch(self.plan.sort_tile, self.architecture)
        if not self.plan.merged:
            self.launch(sort_kernel, chunk.rows, how, **self.outputs, **order, scores_ptr=self.scores,
                   MARK_HIDDEN=self.mark_hidden)  # fmt: skip
            return
        programs = chunk.rows * self.plan.sort_tiles
        self.launch(sort_tiles_kernel, programs, how, **self.outputs, **order, packed_ptr=self.space.packed)
        self.launch(
            merge_tiles_kernel,
            programs,
            how,
            **order,
            packed_ptr=self.space.packed,
            indices_ptr=self.outputs["indices_ptr"],
            scores_ptr=self.scores,
            LOG_TILE=self.plan.sort_tile.bit_length() - 1,
            MARK_HIDDEN=self.mark_hidden,
        )
