"""The operator on a GPU: which kernels run, on what tiles, over which part of the rows.

Queries are rows r = b * S + s.  Block means are made once; then chunks of rows go through

    coarse scores -> kept blocks -> token scores -> selection -> fill -> order

(the first two only where not every block is kept).  A chunk is as many rows as the workspace allows, whatever S
and T are, and nothing here waits for the device: chunks depend on shapes only, so the whole can be captured in a
CUDA graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..budget import Budget
from ..reference import pooled_dtype
from ..visibility import Visibility
from .finish import emit_kernel, fill_kernel, merge_tiles_kernel, sort_tiles_kernel
from .operands import FP8_BITS, FP8_NATIVE, FP8_NONE
from .pool import pool_kernel
from .score import coarse_kernel, refine_kernel
from .select import select_blocks_kernel, select_tokens_kernel

# Everything the operator allocates besides its outputs stays below this, but for what is linear in the keys (block
# means, the last-valid table, the bounds of blocks' segments) and the least a single row needs.
WORKSPACE_BYTES = 48 * 2**20
# Entries that one program sorts; longer rows are sorted in tiles of this size and merged.
SORT_TILE = 4096
# Rank keys that one program holds in registers while it selects; longer rows are read again for each bit.
SELECT_TILE = 8192
# Tokens that one step of the search for hidden tokens looks at.
SCAN_TILE = 1024
# Score tiles a program computes for one row, so that the row's q is loaded once for all of them.
TILES_PER_PROGRAM = 8


class Tiles(NamedTuple):
    """Shapes of the score kernels: [tile, tile_dim] @ [tile_dim, padded_heads]."""

    tile: int
    tile_dim: int
    padded_heads: int
    num_warps: int


def score_tiles(heads: int, dim: int, dtype: torch.dtype) -> Tiles:
    """Tile shapes from H, D and dtype alone, so that no other size can change a score's bits."""
    padded_heads = max(16, triton.next_power_of_2(heads))
    padded_dim = max(16, triton.next_power_of_2(dim))
    if dtype == torch.float32:
        # No tensor cores: the product is unrolled into multiply-adds, a small tile keeps that in registers.
        return Tiles(64, min(padded_dim, 32), padded_heads, 4 if padded_heads <= 64 else 8)
    return Tiles(128, padded_dim if padded_dim <= 128 else 64, padded_heads, 4 if padded_heads <= 64 else 8)


def fp8_mode(q: Tensor) -> int:
    """How kernels convert float8: by the hardware from sm_89 on, else bit by bit.

    Else is older NVIDIA, AMD, and the interpreter, which reads a float8 NaN as 480.
    """
    if q.dtype != torch.float8_e4m3fn:
        return int(FP8_NONE)
    native = q.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(q.device) >= (8, 9)
    return int(FP8_NATIVE if native else FP8_BITS)


def launch(kernel: Any, programs: int, num_warps: int, **arguments: Any) -> None:
    """Every kernel launch of the operator goes through here (tests record and compile them)."""
    kernel[(programs,)](**arguments, num_warps=num_warps)


def _strided(name: str, x: Tensor | None, dims: str) -> dict[str, Any]:
    """Kernel arguments ``name``_ptr and ``name``_s<dim>; None and zeros for a tensor that is not given."""
    if x is None:
        return {f"{name}_ptr": None} | {f"{name}_s{dim}": 0 for dim in dims}
    # bool and float8 travel as bytes: every backend loads those.
    if x.dtype in (torch.bool, torch.float8_e4m3fn):
        x = x.view(torch.uint8)
    return {f"{name}_ptr": x} | {f"{name}_s{dim}": stride for dim, stride in zip(dims, x.stride(), strict=True)}


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
) -> tuple[Tensor, Tensor]:
    """``hisa::indexer_topk`` on q's device; arguments are valid (see :mod:`..validate`), any strides.

    CPU tensors are accepted under TRITON_INTERPRET=1.

    Returns:
        indices int32 [B, S, k'] and scores float32 [B, S, k'], contiguous, k' = min(topk, T).
    """
    batch, queries = q.shape[:2]
    tokens = k.shape[1]
    width = min(topk, tokens)
    indices = torch.empty((batch, queries, width), dtype=torch.int32, device=q.device)
    scores = torch.empty((batch, queries, width), dtype=torch.float32, device=q.device)
    if indices.numel() == 0:
        return indices, scores
    with torch.cuda.device_of(q):
        _run(q, k, weights, budget, visibility, k_scale, k_weight, sorted, mark_hidden, indices, scores)
    return indices, scores


def _run(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    budget: Budget,
    visibility: Visibility,
    k_scale: Tensor | None,
    k_weight: Tensor | None,
    sorted: bool,
    mark_hidden: bool,
    indices: Tensor,
    scores: Tensor,
) -> None:
    batch, queries, heads, dim = q.shape
    tokens, width = k.shape[1], indices.shape[2]
    device = q.device
    block_size, block_topk = budget
    blocks = triton.cdiv(tokens, block_size)
    prune = blocks > block_topk

    def expanded(x: Tensor | None, *shape: int) -> Tensor | None:
        return None if x is None else x.expand(shape)

    window = _strided("start", expanded(visibility.window_start, batch, queries), "bs") | _strided(
        "end", expanded(visibility.window_end, batch, queries), "bs"
    )
    valid = _strided("valid", visibility.key_valid, "bt")
    mask = _strided("mask", expanded(visibility.mask, batch, queries, tokens), "bst")
    q_segment = _strided("q_segment", expanded(visibility.q_segment, batch, queries), "bs")
    k_segment = _strided("k_segment", visibility.k_segment, "bt")
    seen = window | valid | mask | q_segment | k_segment
    keys = _strided("k", k, "btd") | _strided("scale", k_scale, "bt") | _strided("k_weight", k_weight, "bt")
    query = _strided("q", q, "bshd") | _strided("w", weights, "bsh")
    sizes = {"S": queries, "T": tokens}
    fp8 = fp8_mode(q)
    tiles = score_tiles(heads, dim, q.dtype)
    score_shape = {
        "H": heads,
        "D": dim,
        "BLOCK_SIZE": block_size,
        "PADDED_H": tiles.padded_heads,
        "TILE_D": tiles.tile_dim,
        "TILE": tiles.tile,
        "FP8": fp8,
        "WIDEN": triton.knobs.runtime.interpret,
    }

    means = last_valid = low = high = None
    if prune:
        means = torch.empty((batch, blocks, dim), dtype=pooled_dtype(k.dtype), device=device)
        if visibility.key_valid is not None:
            last_valid = torch.empty((batch, tokens), dtype=torch.int32, device=device)
        if visibility.k_segment is not None:
            low, high = (torch.empty((batch, blocks), dtype=torch.int64, device=device) for _ in range(2))
        launch(
            pool_kernel,
            batch * blocks,
            4,
            **keys,
            **valid,
            **k_segment,
            means_ptr=means,
            last_valid_ptr=last_valid,
            low_ptr=low,
            high_ptr=high,
            T=tokens,
            M=blocks,
            D=dim,
            BLOCK_SIZE=block_size,
            PADDED_D=triton.next_power_of_2(dim),
            TILE=min(triton.next_power_of_2(block_size), 32),
            FP8=fp8,
        )

    columns = budget.candidates if prune else tokens
    # Longer rows than one program can sort are sorted in tiles beside the outputs.
    merged = sorted and width > SORT_TILE
    sort_tile = min(triton.next_power_of_2(width), SORT_TILE)
    sort_tiles = triton.cdiv(width, sort_tile)
    row_bytes = 4 * columns + 4 + (5 * blocks + 4 * block_topk + 4) * prune + 8 * sort_tiles * sort_tile * merged
    rows = batch * queries
    chunk = min(rows, max(1, WORKSPACE_BYTES // row_bytes))

    token_keys = torch.empty((chunk, columns), dtype=torch.int32, device=device)
    selected_count = torch.empty(chunk, dtype=torch.int32, device=device)
    block_keys = kept = kept_count = kept_flag = packed = None
    if prune:
        block_keys = torch.empty((chunk, blocks), dtype=torch.int32, device=device)
        kept = torch.empty((chunk, block_topk), dtype=torch.int32, device=device)
        kept_count = torch.empty(chunk, dtype=torch.int32, device=device)
        kept_flag = torch.empty((chunk, blocks), dtype=torch.int8, device=device)
    if merged:
        packed = torch.empty((chunk, sort_tiles * sort_tile), dtype=torch.int64, device=device)
    # The rank keys of selected tokens live where the scores will be.
    selected_keys = scores.view(torch.int32)

    for first_row in range(0, rows, chunk):
        here = min(chunk, rows - first_row)
        common = {"first_row": first_row} | sizes
        if prune:
            groups = triton.cdiv(blocks, tiles.tile * TILES_PER_PROGRAM)
            launch(
                coarse_kernel,
                here * groups,
                tiles.num_warps,
                **query,
                **seen,
                **common,
                **score_shape,
                means_ptr=means,
                last_valid_ptr=last_valid,
                low_ptr=low,
                high_ptr=high,
                block_keys_ptr=block_keys,
                groups=groups,
                M=blocks,
                TILES=TILES_PER_PROGRAM,
            )
            launch(
                select_blocks_kernel,
                here,
                _select_warps(blocks),
                **window,
                **common,
                block_keys_ptr=block_keys,
                kept_ptr=kept,
                kept_count_ptr=kept_count,
                kept_flag_ptr=kept_flag,
                M=blocks,
                block_topk=block_topk,
                BLOCK_SIZE=block_size,
                **_select_tile(blocks),
            )
        groups = triton.cdiv(columns, tiles.tile * TILES_PER_PROGRAM)
        launch(
            refine_kernel,
            here * groups,
            tiles.num_warps,
            **query,
            **keys,
            **seen,
            **common,
            **score_shape,
            kept_ptr=kept,
            kept_count_ptr=kept_count,
            token_keys_ptr=token_keys,
            groups=groups,
            columns=columns,
            block_topk=block_topk,
            TILES=TILES_PER_PROGRAM,
        )
        launch(
            select_tokens_kernel,
            here,
            _select_warps(columns),
            **window,
            **common,
            kept_ptr=kept,
            kept_count_ptr=kept_count,
            token_keys_ptr=token_keys,
            indices_ptr=indices,
            keys_ptr=selected_keys,
            selected_count_ptr=selected_count,
            columns=columns,
            block_topk=block_topk,
            K=width,
            BLOCK_SIZE=block_size,
            **_select_tile(columns),
        )
        launch(
            fill_kernel,
            here,
            tiles.num_warps,
            **query,
            **keys,
            **seen,
            **common,
            **score_shape,
            kept_count_ptr=kept_count,
            kept_flag_ptr=kept_flag,
            selected_count_ptr=selected_count,
            indices_ptr=indices,
            keys_ptr=selected_keys,
            M=blocks,
            block_topk=block_topk,
            K=width,
            SCAN=SCAN_TILE,
        )
        order = {"indices_ptr": indices, "first_row": first_row, "K": width, "TILE": sort_tile}
        sort_warps = 8 if sort_tile >= 2048 else 4
        if merged:
            launch(sort_tiles_kernel, here * sort_tiles, sort_warps, **order, keys_ptr=selected_keys, packed_ptr=packed)
            launch(
                merge_tiles_kernel,
                here * sort_tiles,
                sort_warps,
                **order,
                packed_ptr=packed,
                scores_ptr=scores,
                LOG_TILE=sort_tile.bit_length() - 1,
                MARK_HIDDEN=mark_hidden,
            )
        else:
            launch(
                emit_kernel,
                here * sort_tiles,
                sort_warps,
                **order,
                keys_ptr=selected_keys,
                scores_ptr=scores,
                SORT=sorted,
                MARK_HIDDEN=mark_hidden,
            )


def _select_tile(columns: int) -> dict[str, Any]:
    return {"TILE": min(triton.next_power_of_2(columns), SELECT_TILE), "ONE_TILE": columns <= SELECT_TILE}


def _select_warps(columns: int) -> int:
    return 8 if columns > 2048 else 4
