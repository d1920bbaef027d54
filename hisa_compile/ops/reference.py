"""The operator in plain torch, simple enough to check by eye.  It defines correctness.

Every tensor is materialised in full (S x H x T scores, S x T masks), so this is for small sizes and for
tests.  Inputs of any float dtype up to float64 are accepted; float64 inputs are computed in float64,
everything else in float32.  Source: HISA, arXiv 2603.28458, equations of section 3; the contract of
visibility, order and filling up is this project's own (docs/operator.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .budget import resolve_budget
from .visibility import Visibility


def pooled_dtype(key_dtype: torch.dtype) -> torch.dtype:
    """The dtype block means are stored in: the keys' own, bfloat16 for float8 keys."""
    return torch.bfloat16 if key_dtype.itemsize == 1 else key_dtype


def indexer_scores(
    q: Tensor, k: Tensor, weights: Tensor, k_scale: Tensor | None = None, k_weight: Tensor | None = None
) -> Tensor:
    """I[b,s,t] = k_weight[b,t] * sum_h w[b,s,h] * ReLU(q[b,s,h] . k_scale[b,t] k[b,t]) as [B, S, T].

    DSA (arXiv 2512.02556); the two factors of a key are 1 where not given.
    """
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype) else torch.float32
    keys = k.to(dtype)
    if k_scale is not None:
        keys = keys * k_scale.to(dtype)[..., None]
    per_head = torch.einsum("bshd,btd->bsht", q.to(dtype), keys).relu()
    scores = torch.einsum("bsh,bsht->bst", weights.to(dtype), per_head)
    return scores if k_weight is None else scores * k_weight.to(dtype)[:, None, :]


def visible_tokens(
    q: Tensor,
    k: Tensor,
    *,
    window_start: Tensor | None = None,
    window_end: Tensor | None = None,
    key_valid: Tensor | None = None,
    mask: Tensor | None = None,
    q_segment: Tensor | None = None,
    k_segment: Tensor | None = None,
) -> Tensor:
    """Which tokens each query may see, bool [B, S, T]: everything that is given, ANDed."""
    rows, tokens = q.shape[:2], k.shape[1]
    position = torch.arange(tokens, device=q.device)
    visible = torch.ones(*rows, tokens, dtype=torch.bool, device=q.device)
    if window_start is not None:
        visible &= position >= window_start.expand(rows)[..., None]
    if window_end is not None:
        visible &= position < window_end.expand(rows)[..., None]
    if key_valid is not None:
        visible &= key_valid[:, None, :]
    if mask is not None:
        visible &= mask
    if q_segment is not None and k_segment is not None:
        visible &= q_segment.expand(rows)[..., None] == k_segment[:, None, :]
    return visible


def block_means(
    k: Tensor,
    block_size: int,
    key_valid: Tensor | None = None,
    k_scale: Tensor | None = None,
    k_weight: Tensor | None = None,
) -> Tensor:
    """Mean of each block's valid keys as [B, ceil(T / block_size), D]; 0 for a block with none.

    A key counts as |k_weight| * k_scale * k.  ReLU lets a factor >= 0 through, so for weights of no sign the mean
    speaks for the scores as they are, and otherwise for their magnitude.
    """
    batch, tokens, dim = k.shape
    blocks = -(-tokens // block_size)
    keys = k.to(torch.promote_types(pooled_dtype(k.dtype), torch.float32))
    factor = None if k_scale is None else k_scale.to(keys.dtype)
    if k_weight is not None:
        magnitude = k_weight.to(keys.dtype).abs()
        factor = magnitude if factor is None else factor * magnitude
    if factor is not None:
        keys = keys * factor[..., None]
    valid = torch.ones(batch, tokens, dtype=torch.bool, device=k.device) if key_valid is None else key_valid
    # where, not a product: a NaN in an invalid key must not reach the mean.
    keys = torch.where(valid[..., None], keys, 0.0)
    padding = blocks * block_size - tokens
    keys = torch.nn.functional.pad(keys, (0, 0, 0, padding)).view(batch, blocks, block_size, dim)
    count = torch.nn.functional.pad(valid, (0, padding)).view(batch, blocks, block_size).sum(-1)
    mean = keys.sum(2) / count.clamp_min(1)[..., None]
    return mean.to(pooled_dtype(k.dtype))


def kept_blocks(block_scores: Tensor, eligible: Tensor, block_topk: int) -> Tensor:
    """The coarse filter: bool [B, S, M], at most ``block_topk`` eligible blocks a query.

    The first and the last eligible block are kept whatever their score; the rest by descending score,
    NaN highest, equal scores by ascending position.
    """
    # 64-bit sums: the first eligible block is where the count from the left is 1, the last from the right.
    from_left = eligible.cumsum(-1)
    from_right = eligible.flip(-1).cumsum(-1).flip(-1)
    always = eligible & ((from_left == 1) | (from_right == 1))
    order = _best_first(block_scores, always.int() + eligible.int())[..., :block_topk]
    return torch.zeros_like(eligible).scatter(-1, order, True) & eligible


def flat_topk(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    topk: int,
    *,
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
    """DSA's own selection: the top ``topk`` of all visible tokens.  Arguments as :func:`indexer_topk`."""
    visibility = Visibility(window_start, window_end, key_valid, mask, q_segment, k_segment)
    visible = visible_tokens(q, k, **visibility._asdict())
    scores = indexer_scores(q, k, weights, k_scale, k_weight)
    return _select(scores, visible, visible, topk, sorted, mark_hidden)


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
) -> tuple[Tensor, Tensor]:
    """HISA's selection.  Arguments, results and errors as the public ``hisa_compile.indexer_topk``."""
    budget = resolve_budget(topk, block_size, block_topk)
    visibility = Visibility(window_start, window_end, key_valid, mask, q_segment, k_segment)
    visible = visible_tokens(q, k, **visibility._asdict())
    tokens = k.shape[1]
    means = block_means(k, budget.block_size, key_valid, k_scale, k_weight) if k_pooled is None else k_pooled
    padding = means.shape[1] * budget.block_size - tokens
    in_blocks = torch.nn.functional.pad(visible, (0, padding)).unflatten(-1, (means.shape[1], budget.block_size))
    kept = kept_blocks(indexer_scores(q, means, weights), in_blocks.any(-1), budget.block_topk)
    candidates = kept.repeat_interleave(budget.block_size, dim=-1)[..., :tokens] & visible
    scores = indexer_scores(q, k, weights, k_scale, k_weight)
    return _select(scores, visible, candidates, topk, sorted, mark_hidden)


def _best_first(scores: Tensor, rank: Tensor) -> Tensor:
    """Positions by descending ``rank``, then descending score (NaN highest), then ascending position."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order.gather(-1, rank.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices)


def _select(
    scores: Tensor, visible: Tensor, candidates: Tensor, topk: int, sorted: bool, mark_hidden: bool
) -> tuple[Tensor, Tensor]:
    # Candidates by score; then visible tokens that are none, then hidden ones, lowest position first.
    rank = candidates.int() + visible.int()
    order = _best_first(torch.where(candidates, scores, 0.0), rank)[..., : min(topk, scores.shape[-1])]
    scores = torch.where(visible, scores, float("-inf"))
    if sorted:
        order = order.sort(dim=-1).values
        best = scores.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices
        order = order.gather(-1, best)
    scores = scores.gather(-1, order)
    if mark_hidden:
        order = torch.where(visible.gather(-1, order), order, -1)
    return order.int(), scores
