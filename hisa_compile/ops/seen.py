"""What queries see: how many tokens, and how many blocks that hold one of them.

Shapes depend on shapes alone and nothing waits for the device, so that a CUDA graph may capture it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .budget import Budget
from .reference import visible_tokens
from .visibility import Visibility

# Elements of queries x tokens that are looked at together where a mask has to be.
MASK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Seen:
    """What the queries see: tokens int64 [B, S], and by block size the blocks that hold one of them, int64 [B, S]."""

    topk: int
    tokens: Tensor
    blocks: dict[int, Tensor]

    @property
    def chooses(self) -> Tensor:
        """Which queries see more tokens than are selected, bool [B, S]; all others select whatever they see."""
        return self.tokens > self.topk if self.topk else torch.zeros_like(self.tokens, dtype=torch.bool)

    def pruned(self, budget: Budget) -> Tensor:
        """Which queries may be selected for otherwise than by the flat indexer, bool [B, S]."""
        return self.chooses & (self.blocks[budget.block_size] > budget.block_topk)


def count_visible(q: Tensor, k: Tensor, topk: int, visibility: Visibility, block_sizes: Sequence[int]) -> Seen:
    """What every query sees.  No tensor of S x T elements is made, but for a mask, which is one."""
    tokens = torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device)
    blocks = {size: torch.zeros_like(tokens) for size in block_sizes}
    if tokens.numel() and k.shape[1]:
        counting = _count_in_vectors if visibility.mask is None else _count_in_mask
        counting(q, k, visibility, tokens, blocks)
    return Seen(topk, tokens, blocks)


def _count_in_mask(q: Tensor, k: Tensor, visibility: Visibility, tokens: Tensor, blocks: dict[int, Tensor]) -> None:
    """Token by token, for some queries at a time.  Writes ``tokens`` [B, S] and ``blocks`` [B, S]."""
    by_query = dict.fromkeys(("window_start", "window_end", "q_segment"), tokens.shape)
    by_query["mask"] = torch.Size((*tokens.shape, k.shape[1]))
    given = {
        name: x.expand(by_query[name]) if name in by_query else x
        for name, x in visibility._asdict().items()
        if x is not None
    }
    step = max(1, MASK_ELEMENTS // (k.shape[0] * k.shape[1]))
    for start in range(0, tokens.shape[1], step):
        rows = slice(start, start + step)
        visible = visible_tokens(
            q[:, rows], k, **{name: x[:, rows] if name in by_query else x for name, x in given.items()}
        )
        tokens[:, rows] = visible.sum(-1)
        for size, count in blocks.items():
            padded = torch.nn.functional.pad(visible, (0, -k.shape[1] % size))
            count[:, rows] = padded.unflatten(-1, (-1, size)).any(-1).sum(-1)


def _count_in_vectors(q: Tensor, k: Tensor, visibility: Visibility, tokens: Tensor, blocks: dict[int, Tensor]) -> None:
    """Windows are intervals of the tokens, or of the tokens by segment, then position, if a query has a segment.

    Writes ``tokens`` [B, S] and ``blocks`` [B, S].
    """
    length, shape = k.shape[1], tokens.shape

    def bound(x: Tensor | None, default: int) -> Tensor:
        return torch.full_like(tokens, default) if x is None else x.expand(shape).long().clamp(0, length)

    first, last = bound(visibility.window_start, 0), bound(visibility.window_end, length)
    if visibility.key_valid is None and visibility.k_segment is None:
        tokens.copy_((last - first).clamp_min_(0))
        for size, count in blocks.items():
            between = torch.div(last - 1, size, rounding_mode="floor") - first // size + 1
            count.copy_(torch.where(tokens > 0, between, 0))
        return

    position = torch.arange(length, device=q.device).expand(k.shape[:2])
    valid = torch.ones_like(position) if visibility.key_valid is None else visibility.key_valid.long()
    segment = torch.zeros_like(position)
    if visibility.k_segment is not None and visibility.q_segment is not None:
        ids, position = visibility.k_segment.contiguous().sort(stable=True)
        valid = valid.gather(1, position)
        # A segment's number is the place of its first token.
        segment = torch.searchsorted(ids, ids)
        asked = visibility.q_segment.expand(shape).contiguous()
        own = torch.searchsorted(ids, asked).clamp_max_(length - 1)
        known = ids.gather(1, own) == asked
        ordered = segment * (length + 1) + position
        first, last = (torch.searchsorted(ordered, own * (length + 1) + x) for x in (first, last))
        last = torch.where(known, last, first)
    last = last.maximum(first)

    # Valid tokens up to each one, and before each place.
    up_to = valid.contiguous().cumsum(1)
    before = torch.nn.functional.pad(up_to, (1, 0))
    tokens.copy_(before.gather(1, last) - before.gather(1, first))
    # The place of the first valid token that is seen.
    start = torch.searchsorted(up_to, before.gather(1, first), right=True).clamp_max_(length - 1)
    place = torch.arange(length, device=q.device).expand_as(position)
    for size, count in blocks.items():
        # Parts of one block and segment; one that has a valid token is numbered where its first valid one stands.
        block = position // size
        begins = torch.nn.functional.pad((block.diff() != 0) | (segment.diff() != 0), (1, 0), value=True)
        begin = torch.where(begins, place, 0).cummax(1).values
        number = (valid.bool() & (before[:, :-1] == before.gather(1, begin))).cumsum(1)
        between = number.gather(1, (last - 1).clamp_min(0)) - number.gather(1, start) + 1
        count.copy_(torch.where(tokens > 0, between, 0))
