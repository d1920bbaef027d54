"""Masks of the indexer programs: how each is spelled, and the vectors that it means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Masks that depend on the query and the key in a way that no vectors have.
FREE_FORM = ("free", "free_or_causal")
MASKS = (
    "none",
    "hidden",
    "visible",
    "fill_min",
    "add_inf",
    "add_min_bf16",
    "padding",
    "stacked",
    "sliding",
    "distance",
    "chunked",
    "segments",
    "packed",
    "tril",
    "triu_added",
    "float_triangle",
    "valid_keys",
    "tensor_offset",
    "compressed",
    "compressed_key",
    "rows",
    "everything",
    "four_dimensional",
    *FREE_FORM,
)

_INF = float("inf")
WINDOW, CHUNK, RATIO = 4, 3, 4


def masked(
    mask: str,
    scores: Tensor,
    rows: slice,
    queries: int,
    q_ids: Tensor,
    k_ids: Tensor,
    valid: Tensor,
    offset: Tensor,
    free: Tensor,
) -> Tensor:
    """The scores [B, S, T] of the queries ``rows`` of ``queries``, masked."""
    tokens = scores.shape[-1]
    # The last query stands at the last token.
    whole = q_ids.shape[1] if rows == slice(None) else queries
    query = ((torch.arange(whole) + tokens - whole).clamp_min(0))[rows, None]
    token = torch.arange(tokens)[None]
    q_ids, free = q_ids[:, rows, None], free[:, rows]
    k_ids = k_ids[:, None]
    causal = token <= query
    match mask:
        case "none":
            return scores
        case "hidden":
            return scores.masked_fill(token > query, -_INF)
        case "visible":
            return torch.where(causal, scores, -_INF)
        case "fill_min":
            return scores.masked_fill(~causal, torch.finfo(scores.dtype).min)
        case "add_inf":
            return scores + torch.where(token > query, -_INF, 0.0)
        case "add_min_bf16":
            lowest = torch.finfo(torch.bfloat16).min
            return scores + torch.where(token > query, lowest, 0.0).to(torch.bfloat16)
        case "padding":
            return scores.masked_fill((token < 3)[None], -_INF)
        case "stacked":
            scores = scores.masked_fill((token > query)[None], -_INF)
            return torch.where((token % 5 != 1)[None], scores, -_INF)
        case "sliding":
            return scores.masked_fill(~(causal & (token > query - WINDOW)), -_INF)
        case "distance":
            return torch.where((query - token).abs() < WINDOW, scores, -_INF)
        case "chunked":
            same = torch.div(query, CHUNK, rounding_mode="floor") == token // CHUNK
            return scores.masked_fill(torch.logical_not(same), -_INF)
        case "segments":
            return torch.where(q_ids == k_ids, scores, -_INF)
        case "packed":
            return scores.masked_fill(torch.logical_or(token > query, q_ids != k_ids), -_INF)
        case "tril":
            triangle = torch.ones(whole, tokens, dtype=torch.bool).tril(tokens - whole)
            return scores.masked_fill(~triangle[rows], -_INF)
        case "triu_added":
            return scores + torch.full((whole, tokens), -_INF).triu(tokens - whole + 1)[rows]
        case "float_triangle":
            triangle = torch.tril(torch.ones(whole, tokens), diagonal=tokens - whole)[rows]
            return scores.masked_fill(triangle == 0, -_INF)
        case "valid_keys":
            return scores.masked_fill(~valid[:, None], -_INF)
        case "tensor_offset":
            return torch.where(token <= torch.arange(whole)[rows, None] + offset, scores, -_INF)
        case "compressed":
            return scores.masked_fill(token >= (query + 1) // RATIO, -_INF)
        case "compressed_key":
            return torch.where((token + 1) * RATIO - 1 <= query, scores, -_INF)
        case "rows":
            return torch.where((q_ids > 0) & causal, scores, -_INF)
        case "everything":
            seen = causal & (q_ids == k_ids) & valid[:, None] & (token >= query - WINDOW)
            return scores.masked_fill(~seen, -_INF)
        case "four_dimensional":
            seen = (causal[None, None] & valid[:, None, None]).expand(-1, 1, scores.shape[1], -1)
            hidden = torch.where(seen, 0.0, -_INF)
            return scores + hidden[:, 0]
        case "free":
            return scores.masked_fill(~free, -_INF)
        case "free_or_causal":
            return torch.where(causal | free, scores, -_INF)
    raise AssertionError(mask)


def vectors(
    mask: str, sizes: tuple[int, int, int], q_ids: Tensor, k_ids: Tensor, valid: Tensor, offset: Tensor, free: Tensor
) -> dict[str, Any]:
    """The operator's arguments that the mask means for B, S, T = ``sizes``."""
    batch, queries, tokens = sizes
    query = (torch.arange(queries) + tokens - queries).clamp_min(0)[None].int()
    token = torch.arange(tokens)
    end = {"window_end": query + 1}
    segments = {"q_segment": q_ids, "k_segment": k_ids}
    if queries == 1:
        # What depends on one query only is a property of the key.
        segments = {"key_valid": q_ids == k_ids}
    unclamped = {"window_end": (torch.arange(queries)[None] + offset + 1).int()}
    match mask:
        case "none":
            return {}
        case "padding":
            return {"window_start": torch.full((1, 1), 3, dtype=torch.int32)}
        case "stacked":
            return end | {"key_valid": (token % 5 != 1).expand(batch, -1)}
        case "sliding":
            return end | {"window_start": query - WINDOW + 1}
        case "distance":
            return {"window_start": query - WINDOW + 1, "window_end": query + WINDOW}
        case "chunked":
            start = query // CHUNK * CHUNK
            return {"window_start": start, "window_end": start + CHUNK}
        case "segments":
            return segments
        case "packed":
            return end | segments
        case "tril" | "triu_added" | "float_triangle" | "tensor_offset":
            return unclamped
        case "valid_keys":
            return {"key_valid": valid}
        case "compressed" | "compressed_key":
            return {"window_end": (query + 1) // RATIO}
        case "rows":
            return {"window_end": torch.where(q_ids > 0, query + 1, 0).int()}
        case "everything":
            seen = valid & segments.pop("key_valid", torch.tensor(True))
            return end | segments | {"key_valid": seen, "window_start": query - WINDOW}
        case "four_dimensional":
            return end | {"key_valid": valid}
        case "free":
            return {"mask": free} if queries > 1 else {"key_valid": free[:, 0]}
        case "free_or_causal":
            seen = free | (token <= query[..., None])
            return {"mask": seen} if queries > 1 else {"key_valid": seen[:, 0]}
    return end
