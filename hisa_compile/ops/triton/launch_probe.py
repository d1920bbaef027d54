"""The probe on a GPU: its four kernels for a chunk of rows, see :mod:`.probe`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..coarse import JITTER, Sample
from . import config, gpu
from .config import Launch
from .plan import Chunk
from .probe import probe_blocks_kernel, probe_sample_kernel, threshold_kernel, two_heads_kernel
from .sizes import cdiv, power_of_2

if TYPE_CHECKING:
    from .launch import _Call


def launch_probe(call: _Call, chunk: Chunk, at: dict[str, int], sample: Sample) -> None:
    """Scores of blocks by their tokens, in ``call.space.score_bits``."""
    tiles = config.probe_tiles(call.dim, call.dtype, call.block_size)
    groups = chunk.batches * cdiv(chunk.of_batch, tiles.rows)
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
    kernel: Any = probe_blocks_kernel
    how = config.probe_launch(tiles, call.dtype, call.dim, call.architecture, call.key_rows is not None)
    units = cdiv(call.plan.blocks, max(1, tiles.tile // power_of_2(call.block_size)))
    splits = max(1, min(units, how.programs // groups))
    work |= {
        "thresholds_ptr": call.space.thresholds,
        "block_scores_ptr": call.space.score_bits,
        "counts_ptr": call.space.counts,
        "splits": splits,
        "M": call.plan.blocks,
        "lists": chunk.batches * call.plan.blocks,
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
