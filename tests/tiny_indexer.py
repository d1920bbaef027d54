"""A DSA indexer in a few lines, for tests of everything around the pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def flat_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """[B,S,H,D], [B,S,D], [B,S,H] -> [B,S,S], -inf above the diagonal."""
    scores = torch.einsum("bshd,btd->bsht", q, k).relu()
    scores = (scores * w[..., None]).sum(2)
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, float("-inf"))


def flat_selection(q: Tensor, k: Tensor, w: Tensor, topk: int) -> Tensor:
    """Positions int64 [B,S,min(topk,S)] of the best visible keys, spelt as in transformers."""
    return flat_scores(q, k, w).topk(min(topk, k.shape[1]), dim=-1).indices


class Indexer(nn.Module):
    """Hidden states [B,S,12] -> positions [B,S,topk]."""

    def __init__(self, heads: int = 3, head_dim: int = 8, topk: int = 4) -> None:
        super().__init__()
        self.heads, self.topk = heads, topk
        self.q = nn.Linear(12, heads * head_dim, bias=False)
        self.k = nn.Linear(12, head_dim, bias=False)
        self.w = nn.Linear(12, heads, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x).unflatten(-1, (self.heads, -1)), self.k(x), self.w(x)

    def forward(self, x: Tensor) -> Tensor:
        return flat_selection(*self.project(x), self.topk)


class Attention(nn.Module):
    """Mean of the selected tokens' values: differentiable in x and ``value``, not in the indexer.

    So many heads leave no equal scores, and queries with fewer than topk visible tokens are left out: what is
    selected is unambiguous.
    """

    def __init__(self, indexer: type[Indexer] = Indexer) -> None:
        super().__init__()
        self.indexer = indexer(heads=16)
        self.value = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            positions = self.indexer(x)
        values = self.value(x)[:, None].expand(-1, x.shape[1], -1, -1)
        return values.gather(2, positions[..., None].expand(-1, -1, -1, 5)).mean(2)[:, self.indexer.topk - 1 :]


def hidden_states(tokens: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, tokens, 12, generator=torch.Generator().manual_seed(tokens))


def seeded(make: type[nn.Module], *args: object) -> nn.Module:
    torch.manual_seed(0)
    return make(*args)


@torch.no_grad()
def selected_scores(indexer: Indexer, x: Tensor, positions: Tensor) -> Tensor:
    """The scores at ``positions`` in descending order: what two selections share where they differ by ties."""
    assert all(len(set(row)) == len(row) for sequence in positions.tolist() for row in sequence)
    return flat_scores(*indexer.project(x)).gather(2, positions).sort(descending=True).values
