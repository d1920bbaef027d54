"""Two selections of the same queries, side by side."""

from __future__ import annotations

import torch
from torch import Tensor


def compare(found: tuple[Tensor, Tensor], flat: tuple[Tensor, Tensor]) -> Tensor:
    """Recall and share of the score of each query, float64 [2, R].

    Both selections hold indices and scores [R, topk], topk at least 1; all their tokens are visible.  The flat one is
    sorted by descending score.
    """
    indices = flat[0].sort(-1).values
    at = torch.searchsorted(indices, found[0]).clamp_max_(indices.shape[1] - 1)
    # Of equal scores at the edge either choice is right.  They may be many: where no head fires, a score is 0.
    common = (indices.gather(1, at) == found[0]) | (found[1] >= flat[1][:, -1:])
    count = common.sum(-1).double()
    # By a tensor: a GPU divides by a number as it multiplies by its reciprocal, which has other bits.
    recall = count / torch.full_like(count, indices.shape[1])
    gained, total = (_positive(scores).sum(-1) for scores in (found[1], flat[1]))
    share = torch.where(total > 0, gained / total, 1.0).clamp_max_(1.0)
    # The same tokens' scores may differ in their last bits, since the two calls add up in different tiles.
    return torch.stack((recall, torch.where(recall == 1, 1.0, share)))


def _positive(scores: Tensor) -> Tensor:
    """Scores in float64, what is not a positive number as 0 and inf as the largest float32."""
    return scores.double().nan_to_num(nan=0.0, posinf=torch.finfo(torch.float32).max).clamp_min_(0.0)
