"""The probe on a GPU: its four kernels for a chunk of rows, see :mod:`.probe`, and that of :mod:`.levels` with two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..coarse import JITTER, Sample
from . import config, gpu
from .config import Launch
from .levels import list_outer_kernel
from .plan import Chunk
from .probe import probe_blocks_kernel, probe_sample_kernel, threshold_kernel, two_heads_kernel
from .sizes import cdiv, power_of_2

if TYPE_CHECKING:
    from .launch import _Call


def launch_probe(call: _Call, chunk: Chunk, at: dict[str, int], sample: Sample) -> None:
    """Scores of blocks by their tokens, in ``call.space.block_scores``."""
    tiles, groups = call.plan.probe_tiles, call.plan.probe_groups(chunk)
    heads = {"heads_ptr": call.space.heads}
    names = ("q_ptr", "q_sb", "q_ss", "q_sh", "q_sd", "w_ptr", "w_sr")
    query = {name: call.query[name] for name in names} | heads | at
    shape = {name: call.shape[name] for name in ("H", "D", "FP8")} | {"PADDED_D": power_of_2(call.dim)}
    del query["T"]
    step = min(config.HEADS_STEP, call.shape["PADDED_H"])
    call.launch(two_heads_kernel, chunk.rows, Launch(1, 1), **query, **shape, STEP=step)
    work = heads | call.keys | call.seen | at | {"pitch": call.plan.pitch, "rows_per_batch": chunk.of_batch}
    work |= {name: call.shape[name] for name in ("D", "FP8", "WIDEN")}
    work |= {"ROWS": tiles.rows, "TILE": tiles.tile, "TILE_D": tiles.tile_dim}
    call.launch(
        probe_sample_kernel,
        groups * cdiv(sample.size, tiles.tile),
        Launch(1, tiles.num_warps),
        **work,
        scores_ptr=call.space.score_bits,
        size=sample.size,
        stride=sample.stride,
        JITTER=JITTER,
    )
    call.launch(
        threshold_kernel,
        chunk.rows,
        config.select_launch("select_blocks", sample.size, call.architecture),
        scores_ptr=call.space.score_bits,
        thresholds_ptr=call.space.thresholds,
        pitch=call.plan.pitch,
        size=sample.size,
        rank=sample.rank,
        TILE=power_of_2(sample.size),
    )
    levels = list_outer(call, chunk, at, groups)
    kernel: Any = probe_blocks_kernel
    how = config.probe_launch(tiles, call.dtype, call.dim, call.architecture, call.key_rows is not None)
    units = cdiv(call.plan.blocks, max(1, tiles.tile // power_of_2(call.block_size)))
    splits = max(1, min(units, how.programs // groups))
    work |= levels | {
        "thresholds_ptr": call.space.thresholds,
        "block_scores_ptr": call.space.block_scores,
        "counts_ptr": call.space.counts,
        "splits": splits,
        "M": call.plan.blocks,
        "counts": call.plan.counts(chunk),
        "BLOCK_SIZE": call.block_size,
        "PADDED_BLOCK": power_of_2(call.block_size),
        "STAGES": how.stages,
        # An instruction of NVIDIA's; the interpreter and AMD have names.
        "ONE_INSTRUCTION": isinstance(call.architecture, int),
    }
    if call.key_rows is not None:
        # Gluon is young: only who needs it depends on it.
        from .probe_hopper import probe_blocks_hopper_kernel as kernel

        work |= {"k_desc": call.k_desc, "k_batch_rows": call.key_rows.of_batch, "TILE": config.PROBE_TILE}
        work = gpu.only(work, kernel)
    call.launch(kernel, groups * splits, how, **work)


def list_outer(call: _Call, chunk: Chunk, at: dict[str, int], groups: int) -> dict[str, Any]:
    """The kept outer blocks of each group of rows, if blocks are looked for in these; what the probe takes of them."""
    space, outer = call.space, call.plan.outer
    work: dict[str, Any] = {"outer_flag_ptr": space.outer_flag}
    work |= {"listed_ptr": space.listed, "listed_count_ptr": space.listed_count}
    if outer is None:
        return work | {"outer_blocks": 0, "OUTER_SIZE": call.block_size}
    work |= {"outer_blocks": outer.blocks, "OUTER_SIZE": outer.block_size}
    inside = outer.block_size // call.block_size
    tile = max(1, config.LEVEL_TILE // power_of_2(inside))
    call.launch(
        list_outer_kernel,
        groups * cdiv(outer.blocks, tile),
        Launch(1, 4),
        **call.window,
        **at,
        **work,
        block_scores_ptr=space.block_scores,
        rows_per_batch=chunk.of_batch,
        M=call.plan.blocks,
        pitch=call.plan.pitch,
        INSIDE=inside,
        PADDED_INSIDE=power_of_2(inside),
        ROWS=call.plan.probe_tiles.rows,
        TILE=tile,
    )
    return work
