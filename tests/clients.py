"""DSA indexers as public projects write them in plain torch, re-expressed: the operations and their order are
theirs, everything around them is left out.

A :class:`Client` is one of them with inputs of a given length, and with what it means: the arguments of the
operator for each of its indexers, and how its indices follow from theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Enough heads that no score is exactly 0 because all ReLUs are: eager mode breaks such ties as it likes.
HEADS, DIM, TOPK = 12, 8, 6
RATIO = 4  # tokens a compressed key
INFINITY = float("inf")


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operands(batch: int, queries: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [B,S,H,D], k [B,T,D], weights [B,S,H]."""
    return (
        numbers(batch, queries, HEADS, DIM, seed=1),
        numbers(batch, tokens, DIM, seed=2),
        numbers(batch, queries, HEADS, seed=3),
    )


def causal(queries: int, tokens: int) -> Tensor:
    """Who sees whom where the last query is the last token."""
    return torch.arange(tokens) <= torch.arange(queries)[:, None] + tokens - queries


# flash-linear-attention, fla/ops/dsa/naive.py --------------------------------------------------------------------


def fla_select(q: Tensor, k: Tensor, w: Tensor | None, topk: int, scale: float, activation: str | None) -> Tensor:
    """One sequence, [T,H,D] and [T,D]: heads first, hidden slots told by their values, padded to topk columns."""
    length = q.shape[0]
    per_head = torch.einsum("m h d, n d -> h m n", q, k) * scale
    if activation is not None:
        per_head = getattr(F, activation)(per_head)
    scores = per_head.sum(0) if w is None else torch.einsum("h m n, m h -> m n", per_head, w)
    at = torch.arange(length, device=q.device)
    scores = scores.masked_fill(at[:, None] < at[None, :], float("-inf"))
    width = min(topk, length)
    values, indices = torch.topk(scores, width, dim=-1)
    indices = indices.masked_fill(torch.isinf(values), -1)
    if topk > width:
        indices = torch.cat([indices, indices.new_full((length, topk - width), -1)], dim=-1)
    return indices


def fla_indexer(
    q: Tensor,
    k: Tensor,
    w: Tensor | None = None,
    bounds: Any = None,
    activation: str | None = "relu",
    topk: int = TOPK,
) -> Tensor:
    """All sequences: a loop over the batch, or over the bounds of a packed one, results written into slices."""
    scale = q.shape[-1] ** -0.5
    q, k = q.float(), k.float()
    w = None if w is None else w.float()
    if bounds is None:
        rows = [fla_select(q[i], k[i], None if w is None else w[i], topk, scale, activation) for i in range(q.shape[0])]
        return torch.stack(rows, 0)
    out = q.new_full((1, q.shape[1], topk), -1, dtype=torch.long)
    for i in range(len(bounds) - 1):
        first, last = bounds[i], bounds[i + 1]
        part = None if w is None else w[0, first:last]
        out[0, first:last] = fla_select(q[0, first:last], k[0, first:last], part, topk, scale, activation)
    return out


class FlaLayer(nn.Module):
    """A layer that knows the width, which dynamic shapes leave a number; an argument of a function they do not."""

    topk = TOPK

    def forward(self, q: Tensor, k: Tensor, w: Tensor | None = None, bounds: Any = None) -> Tensor:
        return fla_indexer(q, k, w, bounds, topk=self.topk)


def fla_attention(q: Tensor, k: Tensor, w: Tensor, value: Tensor) -> Tensor:
    """Its consumer: the indices scattered into a mask with a spare column that takes the -1."""
    indices = fla_indexer(q, k, w)
    outputs = []
    for i in range(q.shape[0]):
        length = q.shape[1]
        mask = q.new_zeros(length, length + 1, dtype=torch.bool)
        mask.scatter_(1, indices[i].masked_fill(indices[i] < 0, length), True)
        at = torch.arange(length, device=q.device)
        mask = mask[:, :length] & (at[:, None] >= at[None, :])
        scores = torch.einsum("m h d, n d -> h m n", q[i], k[i]).masked_fill(~mask[None], float("-inf"))
        outputs.append(torch.einsum("h m n, n d -> m h d", scores.softmax(-1), value[i]))
    return torch.stack(outputs, 0)


# Megatron-LM, megatron/core/ops/attention/dsa/reference.py (before: experimental_attention_variant/dsa.py) ---------


def megatron_scores(q: Tensor, weights: Tensor, k: Tensor, use_relu: bool = True) -> Tensor:
    """[S,B,H,D], [S,B,H], [T,B,D] -> [B,S,T], one statement a step."""
    scores = torch.einsum("sbhd,tbd->sbht", q.float(), k.float())
    if use_relu:
        scores = torch.relu(scores)
    scores = scores * weights.unsqueeze(-1)
    scores = scores.sum(dim=2)
    return scores.transpose(0, 1)


def megatron_topk(scores: Tensor, topk: int = TOPK) -> Tensor:
    values, indices = scores.topk(min(topk, scores.shape[-1]), dim=-1)
    return indices.masked_fill(values == float("-inf"), -1)


def megatron_additive(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """The default mask: the upper triangle of a matrix of -inf, added."""
    queries, tokens = q.shape[0], k.shape[0]
    mask = torch.triu(torch.full((queries, tokens), float("-inf"), dtype=torch.float32), diagonal=1)
    scores = megatron_scores(q, weights, k)
    return megatron_topk(scores + mask)


def megatron_positions(q: Tensor, k: Tensor, weights: Tensor, query_at: Tensor, key_at: Tensor) -> Tensor:
    """Explicit positions (context parallelism): zeros filled in place with -inf, added."""
    mask = torch.zeros((query_at.numel(), key_at.numel()), dtype=torch.float32, device=q.device)
    mask.masked_fill_(key_at.unsqueeze(0) > query_at.unsqueeze(-1), float("-inf"))
    return megatron_topk(megatron_scores(q, weights, k) + mask)


def megatron_packed(q: Tensor, k: Tensor, weights: Tensor, bounds: Tensor) -> Tensor:
    """Packed sequences: each query's [start, end), the sequence looked up with searchsorted."""
    query_at = torch.arange(q.shape[0], dtype=torch.int64, device=q.device)
    sequence = torch.searchsorted(bounds, query_at, right=True) - 1
    starts, ends = bounds[sequence], query_at + 1
    key_at = torch.arange(k.shape[0], dtype=torch.int64, device=q.device)
    valid = (key_at.unsqueeze(0) >= starts.unsqueeze(-1)) & (key_at.unsqueeze(0) < ends.unsqueeze(-1))
    scores = megatron_scores(q, weights, k)
    return megatron_topk(scores.masked_fill(~valid.unsqueeze(0), float("-inf")))


def megatron_without_relu(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """What Megatron-LM runs for GLM-5: the ReLU is switched off, so this is no DSA score."""
    return megatron_topk(megatron_scores(q, weights, k, use_relu=False))


# DeepSeek's reference implementations ---------------------------------------------------------------------------


class DeepSeekV4(nn.Module):
    """V4's inference/model.py: a cache of compressed keys written in place, in-place ReLU and mask."""

    def __init__(self, batch: int, length: int, topk: int = TOPK, fill: float = -INFINITY) -> None:
        super().__init__()
        self.topk, self.fill = topk, fill
        self.register_buffer("cache", torch.zeros(batch, length // RATIO + 2, DIM))

    def forward(self, q: Tensor, k: Tensor, weights: Tensor, start: int = 0, offset: int = 0) -> Tensor:
        batch, queries = q.shape[:2]
        end = start + queries
        self.cache[:batch, start // RATIO : end // RATIO] = k
        weights = weights * (DIM**-0.5 * HEADS**-0.5)
        score = torch.einsum("bshd,btd->bsht", q, self.cache[:batch, : end // RATIO])
        score = (score.relu_() * weights.unsqueeze(-1)).sum(dim=2)
        if start == 0:
            mask = torch.arange(queries // RATIO).repeat(queries, 1) >= (
                torch.arange(1, queries + 1).unsqueeze(1) // RATIO
            )
            score += torch.where(mask, self.fill, 0)
        indices = score.topk(min(self.topk, end // RATIO), dim=-1)[1]
        if start == 0:
            mask = indices >= torch.arange(1, queries + 1).unsqueeze(1) // RATIO
            indices = torch.where(mask, -1, indices + offset)
        else:
            indices += offset
        return indices


def deepseek_v32(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """V3.2's inference/model.py with the fp8 kernel spelled out: two einsums, a triangle of -inf added in place."""
    queries, tokens = q.shape[1], k.shape[1]
    mask = torch.full((queries, queries), float("-inf"), device=q.device).triu_(1)
    logits = F.relu(torch.einsum("bthd, bsd -> btsh", q, k))
    score = torch.einsum("btsh, bth -> bts", logits, weights * DIM**-0.5)
    score += mask
    return score.topk(min(TOPK, tokens), dim=-1)[1]


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """One float8 scale a row, as DeepSeek's act_quant."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448.0
    return (x / scale).to(torch.float8_e4m3fn), scale.squeeze(-1)


def deepseek_v32_fp8(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """The kernel's own order: float8 products, q's scale in the weights, k's scale after the sum over heads."""
    queries = q.shape[1]
    q8, q_scale = quantised(q)
    k8, k_scale = quantised(k)
    weights = weights * q_scale * DIM**-0.5
    logits = torch.einsum("bshd,btd->bsht", q8.float(), k8.float()).relu()
    score = (logits * weights.unsqueeze(-1)).sum(2) * k_scale.unsqueeze(1)
    score += torch.full((queries, queries), float("-inf")).triu_(1)
    return score.topk(TOPK, dim=-1)[1]


# transformers, models/glm5_next ---------------------------------------------------------------------------------


class PooledIndexer(nn.Module):
    """glm5_next: keys are pooled from the first valid one on, pools that no sequence has are dropped (a size that
    depends on data), hidden pools get finfo.min, selected pools become tokens again."""

    def __init__(self, pool: int = RATIO, topk: int = TOPK * RATIO) -> None:
        super().__init__()
        self.pool, self.topk = pool, topk
        self.position = nn.Parameter(numbers(pool, DIM, seed=7))

    def pools(self, keys: Tensor, gates: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens = keys.shape[:2]
        count = (tokens + self.pool - 1) // self.pool
        first = torch.where(valid.any(-1), valid.long().argmax(-1), torch.full((batch,), tokens, dtype=torch.long))
        offsets = torch.arange(count * self.pool).view(1, count, self.pool)
        members = first[:, None, None] + offsets
        row = torch.arange(batch)[:, None, None]
        inside = members.clamp(0, tokens - 1)
        valid = valid[row, inside] & (members < tokens)
        logits = (gates[row, inside].float() + self.position.float()[None, None]).masked_fill(
            ~valid[..., None], float("-inf")
        )
        share = torch.nan_to_num(logits.softmax(dim=2)).to(keys.dtype)
        pooled = (share * keys[row, inside]).sum(dim=2)
        complete = valid.all(-1)
        keep = complete.any(0)
        return pooled[:, keep], members.masked_fill(~valid, -1)[:, keep], complete[:, keep]

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, weights: Tensor, gates: Tensor, valid: Tensor) -> Tensor:
        batch, queries = q.shape[:2]
        tokens = k.shape[1]
        visible = (torch.arange(tokens)[None, None] <= torch.arange(queries)[None, :, None]) & valid[:, None]
        keys, members, complete = self.pools(k, gates, valid)
        scores = torch.matmul(q.float(), keys.transpose(-1, -2).float().unsqueeze(1))
        scores = F.relu(scores * DIM**-0.5)
        scores = torch.matmul((weights.float() * HEADS**-0.5).unsqueeze(-2), scores).squeeze(-2)
        ends = members[..., -1].clamp(0, tokens - 1)
        candidates = visible.gather(-1, ends[:, None, :].expand(batch, queries, -1)) & complete[:, None]
        scores = scores.masked_fill(~candidates, torch.finfo(scores.dtype).min)
        selected = scores.topk(min(self.topk // self.pool, scores.shape[-1]), dim=-1).indices
        row = torch.arange(batch)[:, None, None]
        chosen = members[row, selected]
        found = candidates.gather(-1, selected)[..., None].expand_as(chosen)
        indices = chosen.flatten(-2).masked_fill(~found.flatten(-2), -1)
        indices = F.pad(indices, (0, self.topk - indices.shape[-1]), value=-1)
        return indices.masked_fill(~valid[..., None], -1).to(torch.int32)


# The table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Client:
    """One indexer of a public project.

    build: length -> the function.  inputs: length -> its arguments.
    meaning: the function's inputs -> the operator's arguments for each of its indexers, in order.
    assemble: the operator's indices and visibilities, one each -> what the function returns, hidden = -1.
    hidden: the function's own indices -> the same with -1 where a hidden token was selected.
    """

    build: Callable[[int], Callable[..., Tensor]]
    inputs: Callable[[int], tuple[Any, ...]]
    sites: int
    meaning: Callable[..., list[dict[str, Any]]]
    assemble: Callable[[list[Tensor]], Tensor] = field(default=lambda parts: parts[0])
    hidden: Callable[[Tensor], Tensor] = field(default=lambda indices: indices)


def plain(run: Callable[..., Tensor]) -> Callable[[int], Callable[..., Tensor]]:
    return lambda length: run


def one_call(q: Tensor, k: Tensor, weights: Tensor, mask: Tensor) -> list[dict[str, Any]]:
    return [{"q": q, "k": k, "weights": weights, "topk": TOPK, "mask": mask}]


def hide_the_future(indices: Tensor) -> Tensor:
    return torch.where(indices > torch.arange(indices.shape[1])[:, None], -1, indices)


def square(length: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return operands(batch, length, length)


def sequence_first(length: int) -> tuple[Tensor, ...]:
    """Megatron-LM's layout; it runs in bfloat16, here values that bfloat16 holds."""
    q, k, weights = square(length)
    return tuple(x.transpose(0, 1).contiguous() for x in (q, k, weights))


def batch_first(q: Tensor, k: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.transpose(0, 1), k.transpose(0, 1), weights.transpose(0, 1)


def packed_bounds(length: int) -> list[int]:
    """Three sequences, none of them of the same length."""
    return [0, length // 4, length // 4 + length // 3, length]


def of_each_row(q: Tensor, k: Tensor, w: Tensor | None = None, *_: Any) -> list[dict[str, Any]]:
    w = torch.ones(q.shape[:3]) if w is None else w
    mask = causal(q.shape[1], k.shape[1])
    scaled = q * DIM**-0.5
    return [call for i in range(q.shape[0]) for call in one_call(scaled[i : i + 1], k[i : i + 1], w[i : i + 1], mask)]


def of_each_sequence(q: Tensor, k: Tensor, w: Tensor, bounds: Any) -> list[dict[str, Any]]:
    cuts = [int(bound) for bound in bounds]
    return [
        call
        for first, last in itertools.pairwise(cuts)
        for call in of_each_row(q[:, first:last], k[:, first:last], w[:, first:last])
    ]


def padded(parts: list[Tensor]) -> list[Tensor]:
    return [F.pad(part, (0, TOPK - part.shape[-1]), value=-1) for part in parts]


def bounded(q: Tensor, k: Tensor, weights: Tensor, bounds: Tensor) -> list[dict[str, Any]]:
    at = torch.arange(q.shape[0])
    start = bounds[torch.searchsorted(bounds, at, right=True) - 1]
    return one_call(*batch_first(q, k, weights), (at >= start[:, None]) & (at <= at[:, None]))


def positioned(q: Tensor, k: Tensor, weights: Tensor, query_at: Tensor, key_at: Tensor) -> list[dict[str, Any]]:
    return one_call(*batch_first(q, k, weights), key_at <= query_at[:, None])


def compressed(q: Tensor, k: Tensor, weights: Tensor) -> list[dict[str, Any]]:
    mask = torch.arange(k.shape[1]) < (torch.arange(q.shape[1])[:, None] + 1) // RATIO
    return one_call(q, k, weights * (DIM**-0.5 * HEADS**-0.5), mask)


def from_float8(q: Tensor, k: Tensor, weights: Tensor) -> list[dict[str, Any]]:
    (q8, q_scale), (k8, k_scale) = quantised(q), quantised(k)
    # Of float8 keys the means are bfloat16.
    call = one_call(q8, k8, weights * q_scale * DIM**-0.5, causal(q.shape[1], k.shape[1]))
    return [{**call[0], "k_weight": k_scale}]


def pooling(length: int) -> tuple[Tensor, ...]:
    """The second row is padded on its left."""
    valid = torch.arange(length) >= torch.tensor([0, 5])[:, None]
    return *square(length), numbers(2, length, DIM, seed=8), valid


def of_pools(q: Tensor, k: Tensor, weights: Tensor, gates: Tensor, valid: Tensor) -> list[dict[str, Any]]:
    tokens = k.shape[1]
    keys, members, complete = PooledIndexer().pools(k, gates, valid)
    mask = complete[:, None] & (members[:, None, :, -1] <= torch.arange(tokens)[None, :, None])
    return one_call(q * DIM**-0.5, keys.detach(), weights * HEADS**-0.5, mask)


def tokens_of_pools(pools: list[Tensor]) -> Tensor:
    """Pool p of a row is tokens first + 4 p to first + 4 p + 3; padded queries have none."""
    first = torch.tensor([0, 5])[:, None, None]
    tokens = pools[0][..., None] * RATIO + torch.arange(RATIO)
    tokens = torch.where(pools[0][..., None] < 0, -1, tokens + first[..., None]).flatten(-2)
    return torch.where(torch.arange(tokens.shape[1])[:, None] < first, -1, tokens)


CLIENTS: dict[str, Client] = {
    "fla, a loop over the batch": Client(
        lambda length: FlaLayer(),
        square,
        2,
        of_each_row,
        lambda parts: torch.cat(padded(parts)),
    ),
    "fla, heads of equal weight": Client(
        lambda length: FlaLayer(),
        lambda length: square(length)[:2],
        2,
        of_each_row,
        lambda parts: torch.cat(padded(parts)),
    ),
    "fla, packed sequences": Client(
        lambda length: FlaLayer(),
        lambda length: (*square(length, batch=1), packed_bounds(length)),
        3,
        of_each_sequence,
        lambda parts: torch.cat(padded(parts), 1),
    ),
    "Megatron-LM, added triangle": Client(
        plain(megatron_additive),
        sequence_first,
        1,
        lambda *args: one_call(*batch_first(*args), causal(args[0].shape[0], args[1].shape[0])),
    ),
    "Megatron-LM, positions": Client(
        plain(megatron_positions),
        # Context parallelism: this rank has the second and the fifth sixth of the queries.
        lambda length: (
            *(x[length // 6 :][: length // 3] if i != 1 else x for i, x in enumerate(sequence_first(length))),
            torch.cat([torch.arange(length // 6) + length // 6, torch.arange(length // 6) + 4 * (length // 6)]),
            torch.arange(length),
        ),
        1,
        positioned,
    ),
    "Megatron-LM, packed sequences": Client(
        plain(megatron_packed),
        lambda length: (*sequence_first(length), torch.tensor(packed_bounds(length))),
        1,
        bounded,
    ),
    "DeepSeek-V4": Client(
        lambda length: DeepSeekV4(2, length),
        lambda length: operands(2, length, length // RATIO),
        1,
        compressed,
    ),
    "DeepSeek-V4 with a finite fill": Client(
        lambda length: DeepSeekV4(2, length, fill=torch.finfo(torch.float32).min),
        lambda length: operands(2, length, length // RATIO),
        1,
        compressed,
    ),
    "DeepSeek-V3.2": Client(
        plain(deepseek_v32),
        square,
        1,
        lambda q, k, weights: one_call(q, k, weights * DIM**-0.5, causal(q.shape[1], k.shape[1])),
        hidden=hide_the_future,
    ),
    "DeepSeek-V3.2 in float8": Client(plain(deepseek_v32_fp8), square, 1, from_float8, hidden=hide_the_future),
    "glm5_next": Client(
        lambda length: PooledIndexer(), pooling, 1, of_pools, tokens_of_pools, hidden=lambda indices: indices
    ),
}
