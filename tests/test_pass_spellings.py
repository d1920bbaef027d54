"""Spellings beyond the generated programs, each written out: rewritten to one call, and the original's selection."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from programs import aten_graph
from torch import Tensor

from hisa_compile.passes import PassSettings, rewrite_indexers

B, S, T, H, D, K = 2, 5, 21, 3, 4, 6
INPUTS = (torch.randn(B, S, H, D), torch.randn(B, T, D), torch.randn(B, S, H))
EVERYTHING = PassSettings(block_size=4, block_topk=16)
HIDDEN = float("-inf")

Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]


def relus(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bshd,btd->bsht", q, k).relu()


def weighted(per_head: Tensor, w: Tensor) -> Tensor:
    return (per_head * w[..., None]).sum(2)


def scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return weighted(relus(q, k), w)


def causal() -> Tensor:
    return torch.arange(T)[None] <= torch.arange(S)[:, None] + T - S


def loop_that_begins_with_the_mask(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    total = torch.where(causal(), 0.0, HIDDEN).expand(B, S, T)
    for h in range(H):
        total = total + torch.bmm(q[:, :, h], k.mT).relu() * w[:, :, h, None]
    return total


def builtin_sum(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    heads = (torch.bmm(q[:, :, h], k.mT).relu() * w[:, :, h, None] for h in range(H))
    return sum(heads, torch.zeros(())).masked_fill(~causal(), HIDDEN)


def unbound_heads(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    total: Tensor | float = 0
    for q_head, w_head in zip(q.unbind(2), w.unbind(2), strict=True):
        total = total + (q_head @ k.mT).relu() * w_head[..., None]
    assert isinstance(total, Tensor)
    return total


def split_heads(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    parts = zip(q.split([1, 2], 2), w.split([1, 2], 2), strict=True)
    first, second = (scores(q_part, k, w_part) for q_part, w_part in parts)
    return first + second


def heads_in_another_order(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    total: Tensor | float = 0
    for h in (2, 0, 1):
        total = total + (q[:, :, h] @ k.mT).relu() * w[:, :, h, None]
    assert isinstance(total, Tensor)
    return total


def stacked_heads_weighted_at_once(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return weighted(torch.stack([(q[:, :, h] @ k.mT).relu() for h in range(H)], 2), w)


def joined_groups_weighted_at_once(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bsht,bsh->bst", torch.cat([relus(q[:, :, :1], k), relus(q[:, :, 1:], k)], 2), w)


def extended_mask(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return scores(q, k, w) + (1.0 - causal().float()) * torch.finfo(torch.float32).min


def inverted_mask(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    inverted = 1.0 - causal().float()
    return scores(q, k, w) + inverted.masked_fill(inverted.to(torch.bool), torch.finfo(torch.float32).min)


def documents(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    ids = torch.cumsum((torch.arange(T) % 7 == 0).long(), 0)
    return scores(q, k, w).masked_fill(~(causal() & (ids[-S:, None] == ids[None])), HIDDEN)


def prefix(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return scores(q, k, w).masked_fill(~(causal() | (torch.arange(T) < 3)), HIDDEN)


def counted_from_the_end(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    query = torch.arange(S)[:, None] + T - S
    return scores(q, k, w).masked_fill(9000 - torch.arange(T) < 9000 - query, HIDDEN)


# Spelling -> what the operator is told of visibility.
SPELLINGS: dict[str, tuple[Spelling, set[str]]] = {
    "a loop that begins with the mask": (loop_that_begins_with_the_mask, {"window_end"}),
    "Python's sum of a generator": (builtin_sum, {"window_end"}),
    "heads from unbind": (unbound_heads, set()),
    "heads from split": (split_heads, set()),
    "heads in another order": (heads_in_another_order, set()),
    "stacked heads, weighted at once": (stacked_heads_weighted_at_once, set()),
    "joined groups of heads, weighted at once": (joined_groups_weighted_at_once, set()),
    "the last queries of all": (lambda q, k, w: scores(q, k, w)[:, -2:], set()),
    "the last query of all": (lambda q, k, w: scores(q, k, w)[:, -1], set()),
    "keys from the fourth on": (lambda q, k, w: scores(q, k, w)[..., 3:], set()),
    "the first keys": (lambda q, k, w: scores(q, k, w)[..., :13], set()),
    "batch and queries flattened": (lambda q, k, w: scores(q, k, w).view(B * S, T), set()),
    "the mean over heads": (lambda q, k, w: relus(q, k).mean(2), set()),
    "divided by the sum of the weights": (
        lambda q, k, w: scores(q, k, w.abs()) / w.abs().sum(-1, keepdim=True),
        set(),
    ),
    "weights from a softmax": (lambda q, k, w: scores(q, k, w.softmax(-1)) * D**-0.5, set()),
    "a mask of ones and zeros, scaled": (extended_mask, {"window_end"}),
    "an inverted mask, filled": (inverted_mask, {"window_end"}),
    "documents": (documents, {"window_end", "q_segment", "k_segment"}),
    "a visible prefix": (prefix, {"mask"}),
    "positions counted from a large number": (counted_from_the_end, {"window_end"}),
    "bfloat16 scores": (lambda q, k, w: scores(q.bfloat16(), k.bfloat16(), w.bfloat16()).float(), set()),
}


@pytest.mark.parametrize("decompose", [False, True], ids=["composite", "decomposed"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_one_call_that_selects_the_same(name: str, decompose: bool) -> None:
    """Its visibility is handed over as expected, and the tokens selected have the best scores there are."""
    spelling, visibility = SPELLINGS[name]
    module = aten_graph(lambda *args: spelling(*args).topk(K).indices, INPUTS, decompose=decompose)
    (site,) = rewrite_indexers(module.graph, EVERYTHING)
    assert site.rewritten, site
    (call,) = [node for node in module.graph.nodes if node.target is torch.ops.hisa.indexer_topk.default]
    assert set(call.kwargs) - {"block_size", "block_topk", "sorted"} == visibility
    module.recompile()
    ranked = spelling(*INPUTS)
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if "bfloat16" in name else {}
    torch.testing.assert_close(ranked.gather(-1, module(*INPUTS)), ranked.topk(K).values, **tolerance)


@pytest.mark.parametrize("name", [name for name in SPELLINGS if name.startswith(("heads", "joined", "stacked"))])
def test_heads_that_are_parts_of_one_tensor_are_that_tensor(name: str) -> None:
    """Nothing is concatenated, unless the heads stand in another order than they are summed in."""
    spelling, _ = SPELLINGS[name]
    module = aten_graph(lambda *args: spelling(*args).topk(K).indices, INPUTS)
    rewrite_indexers(module.graph, EVERYTHING)
    joined = any(node.target is torch.ops.aten.cat.default for node in module.graph.nodes)
    assert joined == ("another order" in name)
