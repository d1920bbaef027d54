"""The operators ``hisa::indexer_topk`` and ``hisa::pool_keys``: schema, meta function, gradient, dispatch by device.

This is the only place that chooses an implementation: CPU tensors run :mod:`.cpu`, CUDA tensors (NVIDIA or
AMD) the Triton kernels of :mod:`.triton`.  There is no fall-back from one to the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .budget import check_block_size, resolve_budget
from .coarse import resolve_coarse
from .reference import pooled_dtype
from .validate import check_arguments, check_pool_arguments, check_pooled, check_stage
from .visibility import Visibility

OP_NAME = "hisa::indexer_topk"
POOL_NAME = "hisa::pool_keys"

library = torch.library.Library("hisa", "DEF")
# Tensors that are keyword-only in the schema can't have an autograd formula; the public function below is
# where the optional arguments are keyword-only.
ARGUMENTS = (
    "Tensor q, Tensor k, Tensor weights, SymInt topk, int? block_size=None, int? block_topk=None, "
    "Tensor? window_start=None, Tensor? window_end=None, Tensor? key_valid=None, Tensor? mask=None, "
    "Tensor? k_scale=None, bool sorted=True, bool mark_hidden=False, "
    # Later arguments come last, so that the positions in graphs made before them stay right.
    "Tensor? q_segment=None, Tensor? k_segment=None, Tensor? k_weight=None, Tensor? k_pooled=None, str? coarse=None"
)
library.define(
    f"indexer_topk({ARGUMENTS}) -> (Tensor indices, Tensor scores)",
    # Any input layout is read in place, so Inductor need not copy to fixed strides.
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
library.define(
    "pool_keys(Tensor k, int block_size, Tensor? key_valid=None, Tensor? k_scale=None, Tensor? k_weight=None, "
    "bool spread=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


def run(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    topk: int,
    block_size: int | None = None,
    block_topk: int | None = None,
    window_start: Tensor | None = None,
    window_end: Tensor | None = None,
    key_valid: Tensor | None = None,
    mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    sorted: bool = True,
    mark_hidden: bool = False,
    q_segment: Tensor | None = None,
    k_segment: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_pooled: Tensor | None = None,
    coarse: str | None = None,
) -> tuple[Tensor, Tensor]:
    given = (
        q, k, weights, topk, block_size, block_topk, window_start, window_end, key_valid, mask, k_scale, sorted,
        mark_hidden, q_segment, k_segment, k_weight, k_pooled, coarse,
    )  # fmt: skip
    # Imported at the first call: neither Triton nor the CPU path is needed to trace or to rewrite a graph.
    if q.device.type == "cpu":
        from .cpu import indexer_topk_cpu

        return indexer_topk_cpu(*_checked(*given))
    from .triton.again import indexer_topk

    return indexer_topk(given, _checked)


def _checked(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    topk: int,
    block_size: int | None,
    block_topk: int | None,
    window_start: Tensor | None,
    window_end: Tensor | None,
    key_valid: Tensor | None,
    mask: Tensor | None,
    k_scale: Tensor | None,
    sorted: bool,
    mark_hidden: bool,
    q_segment: Tensor | None,
    k_segment: Tensor | None,
    k_weight: Tensor | None,
    k_pooled: Tensor | None,
    coarse: str | None,
) -> tuple[Any, ...]:
    """What an implementation takes, of arguments that fit."""
    visibility = Visibility(window_start, window_end, key_valid, mask, q_segment, k_segment)
    check_arguments(q, k, weights, k_scale=k_scale, k_weight=k_weight, **visibility._asdict())
    check_stage(coarse, k_pooled)
    budget = resolve_budget(topk, block_size, block_topk)
    if k_pooled is not None:
        check_pooled(k_pooled, k, coarse, budget.block_size)
    stage = resolve_coarse(coarse, k.shape[1], q.shape[2], budget, k_pooled is not None)
    return q, k, weights, topk, budget, visibility, k_scale, k_weight, sorted, mark_hidden, k_pooled, stage


@torch.library.register_fake(OP_NAME, lib=library)
def meta(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    topk: int | torch.SymInt,
    block_size: int | None = None,
    block_topk: int | None = None,
    window_start: Tensor | None = None,
    window_end: Tensor | None = None,
    key_valid: Tensor | None = None,
    mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    sorted: bool = True,
    mark_hidden: bool = False,
    q_segment: Tensor | None = None,
    k_segment: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_pooled: Tensor | None = None,
    coarse: str | None = None,
) -> tuple[Tensor, Tensor]:
    visibility = Visibility(window_start, window_end, key_valid, mask, q_segment, k_segment)
    check_arguments(q, k, weights, k_scale=k_scale, k_weight=k_weight, **visibility._asdict())
    check_stage(coarse, k_pooled)
    if isinstance(topk, int):
        block_size = resolve_budget(topk, block_size, block_topk).block_size
    if k_pooled is not None:
        check_pooled(k_pooled, k, coarse, block_size)
    tokens = k.shape[1]
    # A plain number where it is known to be one, so that a rewritten graph's shapes stay as they were.
    width = topk if statically_known_true(topk <= tokens) else torch.sym_min(topk, tokens)
    shape = (q.shape[0], q.shape[1], width)
    return q.new_empty(shape, dtype=torch.int32), q.new_empty(shape, dtype=torch.float32)


def no_gradient(ctx: Any, grad_indices: Tensor | None, grad_scores: Tensor | None) -> None:
    raise NotImplementedError(
        "hisa::indexer_topk: a gradient was asked for through `scores`, which the operator does not provide.  "
        "Detach the scores, or recompute them at the returned indices with differentiable operations "
        "(gather the keys, multiply, ReLU, sum over heads)."
    )


library.impl("indexer_topk", run, "CPU")
library.impl("indexer_topk", run, "CUDA")
torch.library.register_autograd(OP_NAME, no_gradient, lib=library)


def _run_pool(
    k: Tensor,
    block_size: int,
    key_valid: Tensor | None = None,
    k_scale: Tensor | None = None,
    k_weight: Tensor | None = None,
    spread: bool = False,
) -> Tensor:
    check_pool_arguments(k, key_valid=key_valid, k_scale=k_scale, k_weight=k_weight)
    check_block_size(block_size)
    if k.device.type == "cpu":
        from .cpu_pool import pool_keys_cpu

        return pool_keys_cpu(k, block_size, key_valid, k_scale, k_weight, spread)
    from .triton.launch_pool import pool_keys_triton

    return pool_keys_triton(k, block_size, key_valid, k_scale, k_weight, spread)


@torch.library.register_fake(POOL_NAME, lib=library)
def _meta_pool(
    k: Tensor,
    block_size: int,
    key_valid: Tensor | None = None,
    k_scale: Tensor | None = None,
    k_weight: Tensor | None = None,
    spread: bool = False,
) -> Tensor:
    check_pool_arguments(k, key_valid=key_valid, k_scale=k_scale, k_weight=k_weight)
    check_block_size(block_size)
    batch, tokens, dim = k.shape
    width = 2 * dim if spread else dim
    return k.new_empty((batch, -(-tokens // block_size), width), dtype=pooled_dtype(k.dtype))


def _no_gradient_of_means(ctx: Any, grad_means: Tensor | None) -> None:
    raise NotImplementedError(
        "hisa::pool_keys: a gradient was asked for through the means, which the operator does not provide.  "
        "Detach them, or compute them with differentiable operations (pad the keys, divide each block's sum by the "
        "number of its keys)."
    )


library.impl("pool_keys", _run_pool, "CPU")
library.impl("pool_keys", _run_pool, "CUDA")
torch.library.register_autograd(POOL_NAME, _no_gradient_of_means, lib=library)


def indexer_topk(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    topk: int,
    *,
    block_size: int | None = None,
    block_topk: int | None = None,
    window_start: Tensor | None = None,
    window_end: Tensor | None = None,
    key_valid: Tensor | None = None,
    mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    sorted: bool = True,
    mark_hidden: bool = False,
    q_segment: Tensor | None = None,
    k_segment: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_pooled: Tensor | None = None,
    coarse: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Select the ``topk`` best tokens of each query by the hierarchical indexer (HISA, arXiv 2603.28458).

    The score of token s for query t is DSA's (arXiv 2512.02556), accumulated in float32::

        I[b,t,s] = k_weight[b,s] * sum_h weights[b,t,h] * ReLU(q[b,t,h] . (k_scale[b,s] * k[b,s]))

    and is computed only for tokens in the ``block_topk`` best blocks of ``block_size`` tokens, as a ``coarse`` stage
    ranks them.  The first and the last block that hold a visible token are always kept.  Where all such blocks fit,
    the result is the exact top-k.

    Args:
        q: [B, S, H, D] float32, float16, bfloat16 or float8_e4m3fn.  Any strides.
        k: [B, T, D], one key a token, shared by the heads; q's dtype.  Any strides.
        weights: [B, S, H] float32, float16 or bfloat16.
        topk: tokens to select, at least 0; k' = min(topk, T) come back.
        block_size, block_topk: the budget, B tokens a block and m >= 2 kept blocks.  What is not given is
            derived from topk: 4 * topk candidates, B = 128 for large budgets (see :func:`resolve_budget`).
        window_start, window_end: int32, broadcastable to [B, S]: token s is visible where
            window_start <= s < window_end.  Any values are allowed; an empty window hides everything.
        key_valid: bool [B, T], True = visible to all queries.  Only valid keys count in a block's mean.
        mask: bool, broadcastable to [B, S, T], True = visible.  Windows and key_valid are cheaper.
        k_scale: float32 [B, T], multiplies the key (dequantisation of float8 keys).
        sorted: by descending score, equal scores by ascending position; otherwise in any order.
        mark_hidden: return -1 instead of the position of a token that is not visible.
        q_segment, k_segment: int32 or int64, of one dtype, both or neither: broadcastable to [B, S], and [B, T].
            Token s is visible where k_segment[b,s] == q_segment[b,t]: packed sequences, chunks, any classes.  Ids
            may have any values in any order.
        k_weight: float32 [B, T] of any sign, multiplies the token's score (dequantisation after the ReLU).
        k_pooled: what blocks are ranked by, as :func:`pool_keys` gives it, in k's dtype, bfloat16 for float8.  Any
            strides.  With "paper", or no ``coarse``, the blocks' means, [B, M, D], M = ceil(T / B) for the budget's B;
            with "spread" means and spreads, [B, M, 2 D], from ``pool_keys(spread=True)``;
            with "two-level" the means of its outer blocks, [B, ceil(T / O), D].
            The keys are then not averaged, which reads all T of them.  Whether these are the keys' own is the caller's
            affair: others, older ones say, change which blocks are kept and nothing else.  Those of a block with no
            visible token never matter.  Where T <= m * B all blocks are kept, with "two-level" where all outer ones
            are, and they are checked but not read.
        coarse: "paper" ranks blocks by the sum above on the mean of |k_weight| * k_scale * k over their valid keys.
            "spread" adds to each head's product with the mean one of |q| with how far the keys are from it, in the
            direction of the head's weight: some four standard deviations
            (``reference.block_representatives``).
            "probe" ranks them by what their visible tokens' scores with two heads, which add up those of positive and
            those of negative weight, have above a threshold, which finds more of the flat selection
            (docs/fidelity.md).  "two-level" ranks outer blocks of O = B * max(1, min(4, 128 // B)) tokens by their
            means, keeps ceil(4 * m * B / O) of them, and ranks the blocks inside these as "probe" does, which costs
            less for many tokens.  None: "paper" with k_pooled, and where the probe, 2 T / H products a query, would
            take more than a quarter as many as the refinement, m * B; else "probe".

    Returns:
        ``indices`` int32 [B, S, k'] and ``scores`` float32 [B, S, k'], both contiguous.  The indices of a
        row are distinct.  A row with fewer visible candidates than k' is filled up with visible tokens
        outside the kept blocks, then with hidden ones, lowest position first.  Scores are the tokens' own,
        -inf where hidden.  NaN ranks highest.  Neither output carries a gradient: asking for one through
        ``scores`` is an error.

    Raises:
        ValueError: a shape or device does not fit, one of q_segment and k_segment is missing, a budget
            parameter is out of range, ``block_size * block_topk < topk``, ``coarse`` is no stage, or it is "probe"
            and k_pooled is given; the message names the argument, what it got and expected.
        TypeError: a dtype does not fit, likewise.
    """
    result: tuple[Tensor, Tensor] = torch.ops.hisa.indexer_topk.default(
        q,
        k,
        weights,
        topk,
        block_size=block_size,
        block_topk=block_topk,
        window_start=window_start,
        window_end=window_end,
        key_valid=key_valid,
        mask=mask,
        k_scale=k_scale,
        sorted=sorted,
        mark_hidden=mark_hidden,
        q_segment=q_segment,
        k_segment=k_segment,
        k_weight=k_weight,
        k_pooled=k_pooled,
        coarse=coarse,
    )
    return result


def pool_keys(
    k: Tensor,
    block_size: int,
    *,
    key_valid: Tensor | None = None,
    k_scale: Tensor | None = None,
    k_weight: Tensor | None = None,
    spread: bool = False,
) -> Tensor:
    """The mean of each block's keys, by which :func:`indexer_topk` ranks blocks (HISA, arXiv 2603.28458, step 1).

    A cache that keeps these means beside its keys passes them to :func:`indexer_topk` as ``k_pooled``.  A new token
    changes the mean of its own block only: pooling ``k[:, n * block_size :]`` gives the means of blocks n and later.

    Args:
        k: [B, T, D] float32, float16, bfloat16 or float8_e4m3fn.  Any strides.
        block_size: tokens a block, at least 1.  For :func:`indexer_topk` that of its budget, see
            :func:`resolve_budget`.
        key_valid: bool [B, T].  Only valid keys count; what the others hold, NaN say, changes nothing.
        k_scale: float32 [B, T], multiplies the key.
        k_weight: float32 [B, T], its magnitude multiplies the key.
        spread: what ``coarse="spread"`` ranks by, which is this project's: behind each mean how far the keys are from
            it, in each dimension the power of two at or below sqrt(31 / D) standard deviations.

    Returns:
        [B, ceil(T / block_size), D], or 2 D with ``spread``, contiguous, in k's dtype, bfloat16 for float8: of each
        block the mean of |k_weight| * k_scale * k over its valid keys, accumulated in float32 and rounded once; 0 for a
        block with none.  Then, of the D dimensions in the same order, its spread: 0 where these keys are equal or there
        is none, or where 31 / D times their variance is below 2^-126; at most 2^15 in float16, which has nothing below
        2^-24; NaN where one is NaN or inf, inf where the variance is more than a float32.
        The last block may hold fewer than ``block_size`` tokens.  The means carry no gradient: asking for one is an
        error.

    Raises:
        ValueError: a shape or device does not fit, or ``block_size`` is less than 1; the message names the
            argument, what it got and expected.
        TypeError: a dtype does not fit, likewise.
    """
    means: Tensor = torch.ops.hisa.pool_keys.default(
        k, block_size, key_valid=key_valid, k_scale=k_scale, k_weight=k_weight, spread=spread
    )
    return means
