"""Indexers of the model: its own attention keys, centred, and lightning indexers distilled from its attention.

Centred keys: each (layer, group of heads) is an indexer of three heads, q the attention's queries, k its keys less
their mean over other documents, w = 1.  The softmax of attention does not see a constant in all keys; under a ReLU, raw
keys leave 5 % of tokens above zero, centred ones half.

Distilled: as DeepSeek-V3.2's, of the layer's normalised input: 8 heads of 64 for queries, one LayerNormed key for all
of them, the first half of the dimensions rotated, head weights of either sign.  Trained to the mean attention of the
layer's heads by the Kullback-Leibler divergence, on texts that ask at their ends for facts hidden in them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from . import model

HEADS, DIM, ROTATED = 8, 64, 32


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of the first ``ROTATED`` of the last dimension; positions broadcast against the others."""
    half = ROTATED // 2
    rates = 1e5 ** (-torch.arange(half, device=x.device) / half)
    angles = positions[..., None] * rates
    a, b, rest = x[..., :half], x[..., half:ROTATED], x[..., ROTATED:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos(), rest], dim=-1)


class Distilled(nn.Module):
    """One layer's indexer."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Linear(model.HIDDEN, HEADS * DIM, bias=False)
        self.keys = nn.Linear(model.HIDDEN, DIM, bias=False)
        self.norm = nn.LayerNorm(DIM)
        self.weights = nn.Linear(model.HIDDEN, HEADS, bias=False)

    def of_keys(self, hidden: Tensor, first: int = 0) -> Tensor:
        """k [.., T, D] of the layer's input hidden [.., T, HIDDEN], whose tokens begin at position ``first``."""
        positions = torch.arange(first, first + hidden.shape[-2], device=hidden.device)
        return rotate(self.norm(self.keys(hidden)), positions)

    def of_queries(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """q [.., N, H, D] and w [.., N, H] of the input [.., N, HIDDEN] at ``positions`` [N]."""
        q = rotate(self.queries(hidden).unflatten(-1, (HEADS, DIM)), positions[:, None])
        return q, self.weights(hidden) * (HEADS * DIM) ** -0.5


def train_step(indexer: Distilled, hidden: Tensor, positions: Tensor, attended: Tensor) -> Tensor:
    """The divergence of one document's queries: attended [N, T] is the attention they should rank by."""
    q, w = indexer.of_queries(hidden[positions], positions)
    k = indexer.of_keys(hidden)
    scores = torch.einsum("nht,nh->nt", torch.einsum("nhd,td->nht", q, k).relu(), w)
    hide = torch.arange(len(k), device=k.device) > positions[:, None]
    log = scores.masked_fill(hide, -1e30).log_softmax(-1).clamp_min(-100)
    return (attended * ((attended + 1e-9).log() - log)).sum(-1).mean()


def load_distilled(path: Path, device: str = "cpu") -> list[Distilled]:
    """All layers', as :mod:`.distil` left them."""
    states = torch.load(path, map_location=device, weights_only=True)
    made = []
    for state in states:
        indexer = Distilled().to(device).requires_grad_(False)
        indexer.load_state_dict(state)
        made.append(indexer)
    return made
