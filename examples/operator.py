"""The operator by itself: a prefill, a decode step with windows, and a comparison with the flat top-k.

    python examples/operator.py

The values are random.  Real keys resemble their neighbours, which is what block means rely on; random ones do
not, so the overlap printed here says nothing about quality.
"""

import torch

from hisa_compile import indexer_topk, resolve_budget
from hisa_compile.ops.reference import flat_topk

HEADS, DIM, TOPK = 8, 32, 64


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean share of a row's selection that the other selection has too."""
    rows = zip(one.flatten(0, 1).tolist(), other.flatten(0, 1).tolist(), strict=True)
    return sum(len(set(a) & set(b)) / len(a) for a, b in rows) / one.shape[:2].numel()


def main() -> None:
    torch.manual_seed(0)
    budget = resolve_budget(TOPK)
    print(f"budget for topk = {TOPK}: {budget}, exact up to {budget.candidates} tokens")

    # Prefill: query t sees tokens 0 to t.
    tokens = 1024
    q, weights = torch.randn(2, tokens, HEADS, DIM), torch.randn(2, tokens, HEADS)
    k = torch.randn(2, tokens, DIM)
    causal_end = torch.arange(1, tokens + 1, dtype=torch.int32)
    indices, _ = indexer_topk(q, k, weights, TOPK, window_end=causal_end)
    flat, _ = flat_topk(q, k, weights, TOPK, window_end=causal_end)
    print(f"prefill of {tokens} tokens: indices {list(indices.shape)}")
    for first, last in ((TOPK, budget.candidates), (budget.candidates, tokens)):
        common = overlap(indices[:, first:last], flat[:, first:last])
        print(f"  queries {first} to {last - 1}: {common:.1%} in common with the flat top-k")

    # Decode: one query a sequence, a cache of 900 and one of 40 tokens, and of those the last 512 at most.
    length = torch.tensor([[900], [40]], dtype=torch.int32)
    indices, scores = indexer_topk(
        q[:, -1:], k, weights[:, -1:], TOPK, window_start=length - 512, window_end=length, mark_hidden=True
    )
    for row, own in zip(indices[:, 0], scores[:, 0], strict=True):
        found = row[row >= 0].tolist()
        print(f"decode: {len(found)} tokens from {min(found)} to {max(found)}, best {found[0]} with {own[0]:.2f}")


if __name__ == "__main__":
    main()
