"""Marking regions: a budget of their own, opting out, and rewriting marked regions only.

python examples/decorator.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import hisa_compile


class Indexer(nn.Module):
    """Hidden states [B, S, 32] -> positions [B, S, 16] of the tokens to attend to."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(32, 24 * 16, bias=False)
        self.k = nn.Linear(32, 16, bias=False)
        self.weights = nn.Linear(32, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x).unflatten(-1, (24, 16)), self.k(x)
        per_head = torch.einsum("bshd,btd->bsht", q, k).relu()
        scores = (per_head * self.weights(x).unsqueeze(-1)).sum(2)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, float("-inf")).topk(16, dim=-1).indices


@hisa_compile.hisa(block_size=8, block_topk=64)
class FineIndexer(Indexer):
    """Its own budget: 64 blocks of 8 tokens, whatever the backend is told."""


@hisa_compile.hisa(enabled=False)
class FlatIndexer(Indexer):
    """Opted out: stays flat."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.fine, self.flat = Indexer(), FineIndexer(), FlatIndexer()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.plain(x), self.fine(x), self.flat(x)


def main() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(1, 400, 32)
    with torch.no_grad():
        for scope in ("all", "marked"):
            print(f'\nhisa.scope = "{scope}"')
            hisa_compile.explain(model, x, hisa_options={"hisa.scope": scope})
        compiled = torch.compile(model, backend="hisa", options={"hisa.base": "aot_eager"})
        # The first 15 queries see fewer than 16 tokens; what fills their rows up means nothing.
        pairs = [(a[:, 15:], b[:, 15:]) for a, b in zip(compiled(x), model(x), strict=True)]
    same = [torch.equal(a.sort(-1).values, b.sort(-1).values) for a, b in pairs]
    print(
        f"\nequal to eager mode at 400 tokens: plain (256 candidates) {same[0]}, fine (512) {same[1]}, flat {same[2]}"
    )


if __name__ == "__main__":
    main()
