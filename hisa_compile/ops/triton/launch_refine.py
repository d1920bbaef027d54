"""The refinement on a GPU: scores of candidate tokens for a chunk of rows, by block or by row, see :mod:`.refine`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import config, gpu
from .plan import Chunk, rows_past_a_tile
from .refine import refine_by_block_kernel, refine_by_row_kernel
from .sizes import cdiv, power_of_2

if TYPE_CHECKING:
    from .launch import _Call


def launch_refine(call: _Call, chunk: Chunk, at: dict[str, int]) -> None:
    """Scores of candidate tokens."""
    work = call.query | call.keys | call.seen | at | call.shape
    work |= {"token_scores_ptr": call.space.score_bits, "pitch": call.plan.pitch}
    if call.plan.by_block:
        _by_block(call, chunk, work)
    else:
        _by_row(call, chunk, work)


def _by_row(call: _Call, chunk: Chunk, work: dict[str, Any]) -> None:
    tiles, columns = call.plan.tiles, call.plan.columns
    how = config.by_row_launch(tiles, call.dtype, call.dim, call.architecture, call.box_rows is not None)
    kernel: Any = refine_by_row_kernel
    # Programs are many and small for the memory's sake, which decoding alone waits for.
    if call.box_rows is None or call.query_rows is None:
        tile = tiles.tile if chunk.of_batch >= config.FEW_ROWS else config.row_tile(tiles, call.architecture)
        count = cdiv(columns, tile)
        programs = max(how.programs, chunk.rows)
        # Buffers that no loop fills would only keep other programs away.  Not by the share: how many queries there
        # are compiles nothing anew.
        how = how._replace(stages=min(how.stages, count))
    else:
        # Gluon is young: only who needs it depends on it.
        from .refine_row_hopper import refine_by_row_hopper_kernel as kernel

        tile = call.plan.row_tile
        count = cdiv(columns, tile)
        few = min(how.programs, chunk.rows * count // config.LEAST_ROW_TILES)
        # Of many rows each is two programs' work, so that the last ones that run are shorter.
        programs = max(how.programs // 2, few, 2 * chunk.rows)
        work = gpu.only(work | call.described(call.query_rows, call.q_desc), kernel)
        work |= {"k_desc": call.box_desc, "k_batch_rows": call.box_rows.of_batch}
        # As many blocks at least as its warps hold side by side.
        row = max(128 * how.num_warps, power_of_2(call.plan.blocks)) if call.keeps else 0
        work |= {"block_scores_ptr": call.space.block_scores if call.keeps else None, "BLOCK_TILE": row}
    share = cdiv(chunk.rows * count, programs) * tile
    groups = cdiv(columns, share)
    call.launch(
        kernel,
        chunk.rows * groups,
        how,
        **(work | {"TILE": tile}),
        **call.space.kept,
        groups=groups,
        group_columns=share,
        block_topk=call.block_topk,
        STAGES=how.stages,
    )


def _by_block(call: _Call, chunk: Chunk, work: dict[str, Any]) -> None:
    hopper = call.query_rows is not None
    how = config.by_block_launch(call.plan.tiles, call.dtype, call.dim, call.architecture, hopper)
    group = 0
    if call.plan.pairs_listed:
        programs = call.sharing["shares"] * (call.block_size // call.plan.tiles.tile)
    else:
        tiles = cdiv(call.tokens, call.plan.tiles.tile)
        group = rows_past_a_tile(chunk.rows, tiles, how)
        programs = chunk.batches * tiles * cdiv(chunk.of_batch, group)
    kernel: Any = refine_by_block_kernel
    if call.query_rows is not None:
        # Gluon is young: only who needs it depends on it.
        from .refine_hopper import refine_by_block_hopper_kernel as kernel

        work = gpu.only(work, kernel) | call.described(call.query_rows, call.q_desc)
    call.launch(
        kernel,
        programs,
        how,
        **work,
        **call.space.runs,
        pairs_ptr=call.space.pairs,
        rows_per_batch=chunk.of_batch,
        group_rows=group,
        **call.sharing,
        room=call.plan.room,
        M=call.plan.blocks,
        MOST_ROWS=how.most_rows,
        STAGES=how.stages,
    )
