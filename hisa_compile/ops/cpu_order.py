"""What the CPU path compares and selects by: ranks of scores that have no ties, the kept blocks; float32 products."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

INT32_MIN = -(1 << 31)
_INT32_MAX = (1 << 31) - 1
_LOW_BITS = (1 << 32) - 1

_precision_lock = threading.Lock()


@contextmanager
def float32_products() -> Iterator[None]:
    """Products in full float32 although the process may allow less (``set_float32_matmul_precision``)."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at run time
    if setting.fp32_precision not in ("bf16", "tf32"):
        yield
        return
    # The setting is the process's, so calls from two threads must not restore each other's value.
    with _precision_lock:
        before = setting.fp32_precision
        setting.fp32_precision = "ieee"
        try:
            yield
        finally:
            # "none" follows the wider settings; what was read may have come from them.
            setting.fp32_precision = "none"
            if setting.fp32_precision != before:
                setting.fp32_precision = before


def rank_of(scores: Tensor) -> Tensor:
    """int32 of the same order as the scores: equal for equal scores, NaN above all, free at both ends."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    rank = bits ^ ((bits >> 31) & _INT32_MAX)
    return rank.masked_fill_(scores.isnan(), _INT32_MAX - 1)


def unique_rank(rank: Tensor, positions: Tensor) -> Tensor:
    """int64 that orders by ``rank``, then by ascending position; no two are equal, so there are no ties."""
    return (rank.long() << 32) | (_LOW_BITS - positions)


def kept_blocks(block_scores: Tensor, eligible: Tensor, block_topk: int) -> tuple[Tensor, Tensor]:
    """The coarse filter: the kept blocks [R, m] in ascending order, and their number [R].

    A row that keeps fewer has the number of all blocks, which is no block, in its last slots.
    """
    blocks = eligible.shape[1]
    rank = rank_of(block_scores).masked_fill_(~eligible, INT32_MIN)
    number = torch.arange(blocks, device=eligible.device)
    first = torch.where(eligible, number, blocks).amin(-1, keepdim=True)
    last = torch.where(eligible, number, -1).amax(-1, keepdim=True)
    rank.masked_fill_((number == first) | (number == last), _INT32_MAX)
    best = unique_rank(rank, number).topk(block_topk).indices
    count = eligible.sum(-1).clamp_max_(block_topk)
    best = best.masked_fill(number[:block_topk] >= count[:, None], blocks)
    return best.sort(-1).values, count


def sort_by_score(positions: Tensor, scores: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    order = unique_rank(rank_of(scores), positions).sort(-1, descending=True).indices
    return positions.gather(-1, order), scores.gather(-1, order), visible.gather(-1, order)
