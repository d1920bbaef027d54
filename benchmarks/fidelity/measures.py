"""What a selection loses against the flat one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def overlap(selected: Tensor, flat: Tensor) -> Tensor:
    """Intersection over union of bool [N, T], one number a query."""
    both = (selected & flat).sum(1)
    either = (selected | flat).sum(1)
    return both / either.clamp_min(1)


def attention(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    """The model's attention, mean over heads [N, T]; q [N, heads, D], k [T, D], softmax of q . k / sqrt(D)."""
    products = torch.einsum("nhd,td->nht", q, k) * q.shape[-1] ** -0.5
    hidden = torch.arange(len(k), device=k.device) > positions[:, None]
    return products.masked_fill(hidden[:, None], -torch.inf).softmax(-1).mean(1)


class Loss(NamedTuple):
    """Of some queries of one indexer: each [N].

    iou: with the flat selection.  mass: share of the attention that falls on the selected tokens.
    flat_mass: on the flat selection's.  found: share of the flat selection that is selected.
    """

    iou: Tensor
    mass: Tensor
    flat_mass: Tensor
    found: Tensor


def loss(selected: Tensor, flat: Tensor, attended: Tensor) -> Loss:
    found = (selected & flat).sum(1) / flat.sum(1).clamp_min(1)
    return Loss(overlap(selected, flat), (attended * selected).sum(1), (attended * flat).sum(1), found)


class Summary(NamedTuple):
    """Means over queries, and of the worst twentieth of them by overlap."""

    iou: float
    worst_iou: float
    found: float
    mass: float
    flat_mass: float

    @property
    def lost(self) -> float:
        """Attention mass that the flat selection has and this one does not, net."""
        return self.flat_mass - self.mass


def summary(losses: Sequence[Loss]) -> Summary:
    iou, mass, flat_mass, found = (torch.cat([part.float() for part in parts]) for parts in zip(*losses, strict=True))
    worst = iou.sort().values[: max(1, len(iou) // 20)]
    means = (x.mean().item() for x in (iou, worst, found, mass, flat_mass))
    return Summary(*means)
