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
from .coarse import JITTER, SPREAD, SPREAD_SCALE, Sample, outer_of, probes, resolve_coarse, sample_of
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
    return block_representatives(k, block_size, key_valid, k_scale, k_weight)


def block_representatives(
    k: Tensor,
    block_size: int,
    key_valid: Tensor | None = None,
    k_scale: Tensor | None = None,
    k_weight: Tensor | None = None,
    spread: bool = False,
) -> Tensor:
    """What blocks are ranked by: :func:`block_means`, and with ``spread`` their spreads behind them, [B, M, 2 D].

    A spread says how far the block's valid keys are from their mean: in each dimension the power of two at or below
    sqrt(SPREAD_SCALE / D) standard deviations, or the dtype's greatest; 0 where keys are alike.  NaN and inf remain.
    """
    mean, variance = _moments(k, block_size, key_valid, k_scale, k_weight)
    dtype = pooled_dtype(k.dtype)
    if not spread:
        return mean.to(dtype)
    spreads = power_of_two_root(variance * (SPREAD_SCALE / max(k.shape[2], 1)), most_spread(k.dtype))
    return torch.cat((mean, spreads), -1).to(dtype)


def power_of_two_root(x: Tensor, most: float) -> Tensor:
    """The greatest power of two whose square is at most x >= 0, or ``most``; 0 below the least normal float32."""
    power = torch.ldexp(torch.ones_like(x), (torch.frexp(x).exponent - 1).div(2, rounding_mode="floor"))
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(x.isfinite(), torch.where(x >= tiny, power.clamp_max(most), 0.0), x)


def most_spread(key_dtype: torch.dtype) -> float:
    """The greatest spread: float16 has no power of two above 2^15, other dtypes all that a root of float32 can be."""
    return 2.0**15 if key_dtype == torch.float16 else 2.0**127


def spread_queries(q: Tensor, weights: Tensor) -> Tensor:
    """What meets means and spreads side by side: q, then |q| with the sign of its head's weight; [B, S, H, 2 D]."""
    q = q.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    return torch.cat((q, torch.where(weights[..., None] < 0, -q.abs(), q.abs())), -1)


def _moments(
    k: Tensor, block_size: int, key_valid: Tensor | None, k_scale: Tensor | None, k_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean and variance of each block's valid keys, 0 for a block with none, [B, M, D] in float32 or float64."""
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
    inside = torch.nn.functional.pad(valid, (0, padding)).expand(batch, -1).view(batch, blocks, block_size)
    count = inside.sum(-1)
    mean = keys.sum(2) / count.clamp_min(1)[..., None]
    offset = torch.where(inside[..., None], keys - mean[:, :, None], 0.0)
    return mean, offset.square().sum(2) / count.clamp_min(1)[..., None]


def probe_queries(q: Tensor, weights: Tensor) -> Tensor:
    """The probe's two heads as [B, S, 2, D] in q's dtype: sum_h max(w, 0) q and sum_h max(-w, 0) q."""
    dtype = torch.float64 if torch.float64 in (q.dtype, weights.dtype) else torch.float32
    signed = weights.to(dtype)
    heads = [torch.einsum("bsh,bshd->bsd", part.relu(), q.to(dtype)) for part in (signed, -signed)]
    return in_own_units(torch.stack(heads, 2), q.dtype)


def in_own_units(heads: Tensor, dtype: torch.dtype) -> Tensor:
    """The probe's two heads [.., 2, D] rounded to ``dtype``, times a power of two of each row's own.

    It brings the greatest magnitude to between 128 and 256, so that float8 and float16 hold both; scores of one row are
    compared with each other alone.  A row with a NaN or inf keeps its values; what float8 does not hold is NaN.
    """
    if heads.shape[-1] == 0:
        return heads.to(dtype)
    greatest = heads.abs().amax((-2, -1), keepdim=True)
    shift = torch.where(greatest.isfinite(), 8 - torch.frexp(greatest).exponent, 0).clamp_max(100)
    heads = torch.ldexp(heads, shift)
    if dtype.itemsize == 1:
        # From torch 2.13 on the conversion saturates.
        heads = heads.masked_fill(heads.isinf(), float("nan"))
    return heads.to(dtype)


def probe_scores(
    q: Tensor, k: Tensor, weights: Tensor, k_scale: Tensor | None = None, k_weight: Tensor | None = None
) -> Tensor:
    """p[b,s,t], see :mod:`.coarse`, as [B, S, T], in units of the row's own.

    ReLU(x) is (x + |x|) / 2, so that ReLU(c x) - ReLU(c y) is what stands here.  Where infinities meet it is NaN.
    """
    plus, minus = probe_queries(q, weights).unbind(2)
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype) else torch.float32
    x, y = (torch.einsum("bsd,btd->bst", head.to(dtype), k.to(dtype)) for head in (plus, minus))
    scale = torch.ones((), dtype=dtype, device=k.device) if k_scale is None else k_scale.to(dtype)[:, None]
    sign = torch.where(scale < 0, -1.0, 1.0)
    probed = ((x - y) + sign * (x.abs() - y.abs())) * (scale / 2)
    return probed if k_weight is None else probed * k_weight.to(dtype)[:, None]


def probe_block_scores(probed: Tensor, visible: Tensor, block_size: int, sample: Sample) -> Tensor:
    """What each block is worth, [B, S, M], from its visible tokens' probed scores [B, S, T].

    Of the sample's visible tokens, NaN aside, the ``rank``-th best tells the threshold; what the one half as far down
    has above it, rounded down to a power of two, is the cap.  A block is worth what its tokens have above the
    threshold, each at most the cap, and half of what its best one has; with none above, what its best one has, which is
    0 or less; -inf without a visible one.  With no such token in the sample, or a cap that is no positive number or
    2^127, the best one alone counts.
    """
    tokens = probed.shape[-1]
    at = sample_positions(sample, tokens, probed.device)
    limits = probe_limits(probed[..., at], visible[..., at], sample.rank)
    blocks = (-(-tokens // block_size), block_size)
    probed, visible = (torch.nn.functional.pad(x, (0, -tokens % block_size)) for x in (probed, visible))
    return probe_worths(probed.unflatten(-1, blocks), visible.unflatten(-1, blocks), *limits)


def sample_positions(sample: Sample, tokens: int, device: torch.device) -> Tensor:
    """Where the sample's tokens are, ascending."""
    number = torch.arange(sample.size, device=device)
    at = number * sample.stride + number * JITTER % sample.stride
    return at[at < tokens]


def probe_limits(probed: Tensor, visible: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Threshold and cap, both [..., 1], from the sample's probed scores [..., N]."""
    told = visible & ~probed.isnan()
    some = probed.masked_fill(~told, float("-inf")).sort(-1, descending=True).values
    found = told.sum(-1, keepdim=True)
    ranks = found.clamp(1, rank)
    threshold = torch.where(found > 0, some.gather(-1, ranks - 1), 0.0)
    cap = torch.where(found > 0, some.gather(-1, (ranks + 1) // 2 - 1) - threshold, 0.0)
    a_number = (cap >= torch.finfo(cap.dtype).tiny) & (cap < 2.0**127)
    return threshold, torch.where(a_number, torch.ldexp(torch.ones_like(cap), torch.frexp(cap).exponent - 1), 0.0)


def probe_worths(probed: Tensor, visible: Tensor, threshold: Tensor, cap: Tensor) -> Tensor:
    """What blocks are worth, [..., M], from their tokens' probed scores [..., M, block_size]."""
    best = torch.where(visible, probed, float("-inf")).amax(-1) - threshold
    offset = probed - threshold[..., None]
    above = torch.where(visible & (probed > threshold[..., None]), offset, 0.0)
    worth = torch.where(best > 0, above.minimum(cap[..., None]).sum(-1) + best / 2, best)
    return torch.where(visible.any(-1), worth, float("-inf"))


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
    coarse: str | None = None,
) -> tuple[Tensor, Tensor]:
    """HISA's selection.  Arguments, results and errors as the public ``hisa_compile.indexer_topk``."""
    budget = resolve_budget(topk, block_size, block_topk)
    visibility = Visibility(window_start, window_end, key_valid, mask, q_segment, k_segment)
    visible = visible_tokens(q, k, **visibility._asdict())
    tokens = k.shape[1]
    blocks = -(-tokens // budget.block_size)
    padding = blocks * budget.block_size - tokens
    in_blocks = torch.nn.functional.pad(visible, (0, padding)).unflatten(-1, (blocks, budget.block_size))
    eligible = in_blocks.any(-1)
    if blocks <= budget.block_topk:
        kept = eligible
    elif not probes(stage := resolve_coarse(coarse, tokens, q.shape[2], budget, k_pooled is not None)):
        spread = stage == SPREAD
        pooled = k_pooled
        if pooled is None:
            pooled = block_representatives(k, budget.block_size, key_valid, k_scale, k_weight, spread)
        queries = spread_queries(q, weights) if spread else q
        kept = kept_blocks(indexer_scores(queries, pooled, weights), eligible, budget.block_topk)
    else:
        if outer := outer_of(stage, tokens, budget):
            means = block_means(k, outer.block_size, key_valid, k_scale, k_weight) if k_pooled is None else k_pooled
            inside = outer.block_size // budget.block_size
            parts = torch.nn.functional.pad(eligible, (0, -blocks % inside)).unflatten(-1, (-1, inside))
            kept_outer = kept_blocks(indexer_scores(q, means, weights), parts.any(-1), outer.block_topk)
            eligible = (parts & kept_outer[..., None]).flatten(-2)[..., :blocks]
        probed = probe_scores(q, k, weights, k_scale, k_weight)
        block_scores = probe_block_scores(probed, visible, budget.block_size, sample_of(tokens, max(1, topk)))
        kept = kept_blocks(block_scores, eligible, budget.block_topk)
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
