"""The operator ``hisa::indexer_topk``: schema, meta function, gradient and dispatch by device.

This is the only place that chooses an implementation: CPU tensors run :mod:`.cpu`, CUDA tensors (NVIDIA or
AMD) the Triton kernels of :mod:`.triton`.  There is no fall-back from one to the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .budget import resolve_budget
from .validate import check_arguments
from .visibility import Visibility

OP_NAME = "hisa::indexer_topk"

_library = torch.library.Library("hisa", "DEF")
# Tensors that are keyword-only in the schema can't have an autograd formula; the public function below is
# where the optional arguments are keyword-only.
_library.define(
    "indexer_topk(Tensor q, Tensor k, Tensor weights, SymInt topk, int? block_size=None, int? block_topk=None, "
    "Tensor? window_start=None, Tensor? window_end=None, Tensor? key_valid=None, Tensor? mask=None, "
    "Tensor? k_scale=None, bool sorted=True, bool mark_hidden=False, "
    # Later arguments come last, so that the positions in graphs made before them stay right.
    "Tensor? q_segment=None, Tensor? k_segment=None, Tensor? k_weight=None) -> (Tensor indices, Tensor scores)",
    # Any input layout is read in place, so Inductor need not copy to fixed strides.
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


def _run(
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
) -> tuple[Tensor, Tensor]:
    visibility = Visibility(window_start, window_end, key_valid, mask, q_segment, k_segment)
    check_arguments(q, k, weights, k_scale=k_scale, k_weight=k_weight, **visibility._asdict())
    budget = resolve_budget(topk, block_size, block_topk)
    # Imported at the first call: neither Triton nor the CPU path is needed to trace or to rewrite a graph.
    if q.device.type == "cpu":
        from .cpu import indexer_topk_cpu

        return indexer_topk_cpu(q, k, weights, topk, budget, visibility, k_scale, k_weight, sorted, mark_hidden)
    from .triton.launch import indexer_topk_triton

    return indexer_topk_triton(q, k, weights, topk, budget, visibility, k_scale, k_weight, sorted, mark_hidden)


@torch.library.register_fake(OP_NAME, lib=_library)
def _meta(
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
) -> tuple[Tensor, Tensor]:
    visibility = Visibility(window_start, window_end, key_valid, mask, q_segment, k_segment)
    check_arguments(q, k, weights, k_scale=k_scale, k_weight=k_weight, **visibility._asdict())
    if isinstance(topk, int):
        resolve_budget(topk, block_size, block_topk)
    tokens = k.shape[1]
    # A plain number where it is known to be one, so that a rewritten graph's shapes stay as they were.
    width = topk if statically_known_true(topk <= tokens) else torch.sym_min(topk, tokens)
    shape = (q.shape[0], q.shape[1], width)
    return q.new_empty(shape, dtype=torch.int32), q.new_empty(shape, dtype=torch.float32)


def _no_gradient(ctx: Any, grad_indices: Tensor | None, grad_scores: Tensor | None) -> None:
    raise NotImplementedError(
        "hisa::indexer_topk: a gradient was asked for through `scores`, which the operator does not provide.  "
        "Detach the scores, or recompute them at the returned indices with differentiable operations "
        "(gather the keys, multiply, ReLU, sum over heads)."
    )


_library.impl("indexer_topk", _run, "CPU")
_library.impl("indexer_topk", _run, "CUDA")
torch.library.register_autograd(OP_NAME, _no_gradient, lib=_library)


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
) -> tuple[Tensor, Tensor]:
    """Select the ``topk`` best tokens of each query by the hierarchical indexer (HISA, arXiv 2603.28458).

    The score of token s for query t is DSA's (arXiv 2512.02556), accumulated in float32::

        I[b,t,s] = k_weight[b,s] * sum_h weights[b,t,h] * ReLU(q[b,t,h] . (k_scale[b,s] * k[b,s]))

    and is computed only for tokens in the ``block_topk`` best blocks of ``block_size`` tokens, blocks being
    ranked by the same sum on the mean of |k_weight| * k_scale * k over their valid keys.  The first and the last
    block that hold a visible token are always kept.  Where all such blocks fit, the result is the exact top-k.

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

    Returns:
        ``indices`` int32 [B, S, k'] and ``scores`` float32 [B, S, k'], both contiguous.  The indices of a
        row are distinct.  A row with fewer visible candidates than k' is filled up with visible tokens
        outside the kept blocks, then with hidden ones, lowest position first.  Scores are the tokens' own,
        -inf where hidden.  NaN ranks highest.  Neither output carries a gradient: asking for one through
        ``scores`` is an error.

    Raises:
        ValueError: a shape or device does not fit, one of q_segment and k_segment is missing, a budget
            parameter is out of range, or ``block_size * block_topk < topk``; the message names the argument,
            what it got and expected.
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
    )
    return result
