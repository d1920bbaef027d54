"""q, weights and k as the tensor memory accelerator of sm_90 copies them: q and k as matrices of rows of D elements."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import Tensor

from .config import Tiles

# Coordinates of a copy are int32.
_MOST_ROWS = 2**31 - 1
# Bytes.  Copies take multiples of 16; compute-sanitizer 2026.4 calls one at an odd multiple of 32 misaligned.
WEIGHTS_ALIGNED = 128


class QueryRows(NamedTuple):
    """``rows`` rows; the next query is ``of_query`` rows on, the next batch ``of_batch``."""

    rows: int
    of_query: int
    of_batch: int


def query_rows(q: Tensor) -> QueryRows | None:
    """q [B, S, H, D] as such a matrix; None where strides are not what such copies take."""
    batch, queries, heads, dim = q.shape
    # Strides of a dimension of one element say nothing.
    of_batch, of_query = (q.stride(d) if q.shape[d] > 1 else 0 for d in (0, 1))
    row = q.stride(2)
    # Rows that overlap may not be what a descriptor can say.
    copied = q.stride(3) == 1 and row >= dim and row * q.itemsize % 16 == 0 and q.data_ptr() % 16 == 0
    if not copied or of_batch % row or of_query % row:
        return None
    rows = ((batch - 1) * of_batch + (queries - 1) * of_query) // row + heads
    return QueryRows(rows, of_query // row, of_batch // row) if rows <= _MOST_ROWS else None


@functools.cache
def _rows_layout(tile: int, tile_dim: int, itemsize: int) -> Any:
    """In shared memory, as products take it; it depends on the width of an element, not on its type."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for([tile, tile_dim], gl.int8 if itemsize == 1 else gl.int16)


@functools.cache
def _weights_layout() -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


def describe(x: Tensor, rows: QueryRows, tile: int, tile_dim: int) -> Any:
    """The descriptor of copies of ``tile`` rows, of one query padded with those behind it, or of keys; zeros past D."""
    # Gluon is young: only who needs it depends on it.
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = _rows_layout(tile, tile_dim, x.itemsize)
    return TensorDescriptor(x, [rows.rows, x.shape[3]], [x.stride(2), 1], [tile, tile_dim], layout)


def key_rows(k: Tensor) -> QueryRows | None:
    """k [B, T, D] as such a matrix: the tokens are the heads of one query.

    Also of one batch entry alone its stride must be one of whole rows, so that the same kernel reads it with others.
    """
    whole = k.stride(1) > 0 and k.stride(0) % k.stride(1) == 0
    return query_rows(k[:, None]) if whole else None


def describe_weights(weights: Tensor, tiles: Tiles) -> Any:
    """The descriptor of copies of one row of weights [rows, H], contiguous, H a multiple of 4; what follows pads it."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(weights, [weights.numel()], [1], [tiles.padded_heads], _weights_layout())
