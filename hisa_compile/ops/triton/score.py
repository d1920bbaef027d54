"""What the scoring kernels share: I = factor * |scale| * sum_h w[h] * ReLU(sign(scale) * (q[h] . x)).

Vectors (tokens, block means) are the rows of the product [TILE, D] @ [D, heads], so that a score depends on nothing but
its own vector and query, and heads are summed within a few threads.  Shapes of the product depend on H, D, the dtype
and the block size only: the bits of a score are the same for every batch position, every slicing of the queries and
every kernel here.  Loads whose layout could reach the sum over heads are never specialised on an alignment
that may vary (k_scale, k_weight), or always have the same (weights).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .operands import dot, load_factor, load_operand


@triton.jit
def load_query(q_ptr, q_sh, q_sd, first, H: tl.constexpr, D: tl.constexpr,
               PADDED_H: tl.constexpr, TILE_D: tl.constexpr, FP8: tl.constexpr):  # fmt: skip
    """A row's q, dims [first, first + TILE_D), as [TILE_D, PADDED_H], 0 in the padding."""
    h = tl.arange(0, PADDED_H)
    d = first + tl.arange(0, TILE_D)
    wanted = (d < D)[:, None] & (h < H)[None, :]
    return load_operand(q_ptr + d.to(tl.int64)[:, None] * q_sd + h.to(tl.int64)[None, :] * q_sh, wanted, FP8)


@triton.jit
def load_weights(w_ptr, H: tl.constexpr, PADDED_H: tl.constexpr):
    """A row's head weights, float32 [PADDED_H], 0 in the padding."""
    h = tl.arange(0, PADDED_H)
    return tl.load(w_ptr + h, mask=h < H, other=0.0)


@triton.jit
def load_vectors(x_ptr, x_sd, wanted, first, D: tl.constexpr, TILE_D: tl.constexpr, FP8: tl.constexpr):
    """Dims [first, first + TILE_D) of the vectors at ``x_ptr`` ([TILE] pointers), 0 where not ``wanted``."""
    d = first + tl.arange(0, TILE_D)
    at = x_ptr[:, None] + d.to(tl.int64)[None, :] * x_sd
    mask = wanted[:, None] & (d < D)[None, :]
    if x_ptr.dtype.element_ty == tl.float32:
        # For sm_100 Triton makes a float32 product tf32, "ieee" or not, where it finds a load of fewer bits on the way
        # back from an operand, be it that of a flag in this load's mask (triton-lang/triton issue 10176, Triton 3.7.1).
        # It looks no further than a condition, be it one that always holds.
        x = tl.zeros(at.shape, tl.float32)
        if tl.program_id(0) >= 0:
            x = load_operand(at, mask, FP8)
    else:
        x = load_operand(at, mask, FP8)
    return x


@triton.jit
def multiply(x, query, products, WIDEN: tl.constexpr):
    """``products`` + x @ query.  A float8 query meets float8 vectors as it is and others, means, in their dtype."""
    return dot(x, query.to(x.dtype), products, WIDEN)


@triton.jit
def real_heads(H: tl.constexpr, PADDED_H: tl.constexpr):
    """Which of the padded heads are some; None where all are."""
    real = None
    if PADDED_H != H:
        real = tl.arange(0, PADDED_H) < H
    return real


@triton.jit
def head_sum(products, weights, real, scale, any_negative, factor):
    """Scores float32 [TILE] from products [TILE, PADDED_H]; ``real`` as :func:`real_heads` gives it.

    ``scale``, which multiplies the vector, and ``factor``, which multiplies its score: float32 [TILE] or None.
    ``any_negative``: whether any scale is below 0.  A magnitude is taken out of the ReLU, which saves a
    multiplication a head; a sign can't be, and is rare.
    """
    if scale is not None:  # noqa: SIM102 (the one is known when the kernel is compiled, the other is not)
        if any_negative:
            products = products * tl.where(scale < 0.0, -1.0, 1.0)[:, None]
    # NaN must stay NaN.
    products = tl.maximum(products, 0.0, propagate_nan=tl.PropagateNan.ALL) * weights[None, :]
    # Padded heads would turn an infinite key into 0 * inf.
    if real is not None:
        products = tl.where(real[None, :], products, 0.0)
    scores = tl.sum(products, axis=1)
    if scale is not None:
        scores = scores * tl.abs(scale)
    if factor is not None:
        scores = scores * factor
    return scores


@triton.jit
def is_any_negative(scale):
    """Whether a scale is below 0; None where there is none."""
    negative = None
    if scale is not None:
        negative = tl.min(scale, axis=0) < 0.0
    return negative


@triton.jit
def score_tokens(
    query, weights, q_ptr, q_sh, q_sd,
    k_ptr, k_st, k_sd,
    scale_ptr, scale_sb, scale_st,
    k_weight_ptr, k_weight_sb, k_weight_st,
    batch, token, wanted,
    H: tl.constexpr, D: tl.constexpr, PADDED_H: tl.constexpr, TILE_D: tl.constexpr,
    FP8: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Scores float32 [TILE] of the batch's tokens int64 [TILE] for one row, those not ``wanted`` unread.

    q_ptr is the row's, k_ptr the batch's, the others everybody's.
    ``query`` is the whole q where D fits one TILE_D, else its first part, and the others are loaded here.
    """
    scale = load_factor(scale_ptr, scale_sb, scale_st, batch, token, wanted)
    factor = load_factor(k_weight_ptr, k_weight_sb, k_weight_st, batch, token, wanted)
    x_ptr = k_ptr + token * k_st
    TILE: tl.constexpr = x_ptr.shape[0]
    products = tl.zeros([TILE, PADDED_H], tl.float32)
    if D <= TILE_D:
        x = load_vectors(x_ptr, k_sd, wanted, 0, D, TILE_D, FP8)
        products = multiply(x, query, products, WIDEN)
    else:
        for first in range(0, D, TILE_D):
            x = load_vectors(x_ptr, k_sd, wanted, first, D, TILE_D, FP8)
            part = load_query(q_ptr, q_sh, q_sd, first, H, D, PADDED_H, TILE_D, FP8)
            products = multiply(x, part, products, WIDEN)
    return head_sum(products, weights, real_heads(H, PADDED_H), scale, is_any_negative(scale), factor)
