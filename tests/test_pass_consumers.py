"""Whether the order of the selected entries matters to anybody: the claim is checked by permuting them.

A graph for which the analysis says that nothing depends on the order is run twice: as it is, and with the outputs of
its top-k permuted, each row by a permutation of its own.  Its outputs must be the same.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from model_cases import DEFAULT_PROMPT, PROMPT
from models import MODELS, build
from programs import aten_graph
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from hisa_compile.passes import PassSettings, rewrite
from hisa_compile.passes.consumers import order_matters
from hisa_compile.passes.normal_form import NotAnIndexer, describe_indexer

Consumer = Callable[[Tensor, Tensor, SimpleNamespace], Any]
B, S, T, K, D = 2, 3, 11, 4, 6


def inputs(b: int = B, s: int = S, t: int = T, k: int = K, d: int = D) -> tuple[Tensor, ...]:
    """Scores (all different), keys, queries, numbers for the slots, and for all rows' slots: small integers."""
    generator = torch.Generator().manual_seed(b + 2 * s + 3 * t + 5 * k)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).double()

    scores = torch.stack([torch.randperm(t, generator=generator) for _ in range(b * s)]).view(b, s, t).double() - t // 2
    return scores, integers(b, t, d), integers(b, s, d), torch.arange(k).double() + 1, integers(b, s, k)


def program(consume: Consumer, k: int = K) -> Callable[..., Any]:
    def run(scores: Tensor, keys: Tensor, queries: Tensor, weights: Tensor, wide: Tensor) -> Any:
        values, indices = scores.topk(k, dim=-1)
        (b, s, t), d = scores.shape, keys.shape[-1]
        data = SimpleNamespace(keys=keys, queries=queries, weights=weights, wide=wide, b=b, s=s, t=t, k=k, d=d)
        return consume(values, indices, data)

    return run


def selection(graph: GraphModule) -> Node:
    """The first top-k: a program may have others."""
    return next(node for node in graph.graph.nodes if node.target is torch.ops.aten.topk.default)


def verdict(graph: GraphModule) -> Node | None:
    outputs = [user for user in selection(graph).users if user.users]
    assert all(user.target is operator.getitem for user in outputs)
    return order_matters([x for x in outputs if x.args[1] == 0], [x for x in outputs if x.args[1] == 1], -1)


class Permuted(Interpreter):
    """Runs a graph with the entries of its selection permuted."""

    def __init__(self, graph: GraphModule, seed: int) -> None:
        super().__init__(graph)
        self.generator = torch.Generator().manual_seed(seed)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n is not selection(self.module):
            return result
        order = torch.rand(result[0].shape, generator=self.generator).argsort(-1)
        return tuple(x.gather(-1, order) for x in result)


def same(a: Any, b: Any) -> bool:
    return all(
        torch.allclose(x.double(), y.double(), rtol=1e-9, atol=1e-9, equal_nan=True)
        if isinstance(x, Tensor)
        else x == y
        for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True)
    )


def permuting_changes(graph: GraphModule, args: Sequence[Tensor], tries: int = 4) -> bool:
    expected = Interpreter(graph).run(*(x.clone() for x in args))
    return not all(same(expected, Permuted(graph, seed).run(*(x.clone() for x in args))) for seed in range(tries))


# What the tables are made of --------------------------------------------------------------------------------------


def gathered(i: Tensor, x: SimpleNamespace) -> Tensor:
    """The selected keys, [B, S, K, D]."""
    keys = x.keys[:, None].expand(-1, x.s, -1, -1)
    return keys.gather(2, i[..., None].expand(-1, -1, -1, x.d))


def indexed(i: Tensor, x: SimpleNamespace) -> Tensor:
    return x.keys[torch.arange(x.b)[:, None, None], i]


def attention(g: Tensor, x: SimpleNamespace) -> Tensor:
    p = (x.queries[:, :, None] * g).sum(-1).softmax(-1)
    return (p[..., None] * g).sum(2)


def mask(i: Tensor, x: SimpleNamespace) -> Tensor:
    return i.new_ones((x.b, x.s, x.t), dtype=torch.bool).scatter(-1, i, False)


def bias_v4(i: Tensor, x: SimpleNamespace) -> Tensor:
    """As DeepSeek-V4 does it: indices of hidden entries are -1, then one beyond the end."""
    i = torch.where(i >= torch.arange(x.s)[None, :, None] + 5, -1, i)
    i = torch.where(i >= 0, i, x.t)
    bias = i.new_full((x.b, 1, x.s, x.t + 1), float("-inf"), dtype=torch.float64)
    return bias.scatter(-1, i[:, None], 0.0)[..., : x.t]


def bias_v4_in_place(i: Tensor, x: SimpleNamespace) -> Tensor:
    bias = i.new_full((x.b, x.s, x.t), float("-inf"), dtype=torch.float64)
    bias.scatter_(-1, torch.where(i > 5, 0, i), 0.0)
    return bias


def sdpa(i: Tensor, x: SimpleNamespace, **kwargs: Any) -> Tensor:
    g = gathered(i, x).flatten(0, 1)[:, None].float()
    q = x.queries.flatten(0, 1)[:, None, None].float()
    if "attn_mask" in kwargs:
        kwargs["attn_mask"] = kwargs["attn_mask"].flatten(0, 1)[:, None, None]
    return F.scaled_dot_product_attention(q, g, g, **kwargs).double().round(decimals=3)


def written_later(v: Tensor, x: SimpleNamespace) -> Tensor:
    """Zeros, until they are written to."""
    zeros = torch.zeros(x.k).double()
    zeros.view(-1).add_(x.weights)
    return (v * zeros).sum(-1)


INVARIANT: dict[str, Consumer] = {
    "mask": lambda v, i, x: mask(i, x),
    "mask, int32": lambda v, i, x: mask(i.int().long(), x),
    "mask, used downstream": lambda v, i, x: (x.keys @ x.keys.mT)[:, : x.s].masked_fill(mask(i, x), -9.0).softmax(-1),
    "DeepSeek-V4's mask": lambda v, i, x: bias_v4(i, x),
    "in-place mask": lambda v, i, x: bias_v4_in_place(i, x),
    "mask by index_put": lambda v, i, x: torch.ones(x.b, x.s, x.t, dtype=torch.bool).index_put(
        (torch.arange(x.b)[:, None, None], torch.arange(x.s)[None, :, None], i), torch.tensor(False)
    ),
    "counts": lambda v, i, x: torch.zeros(x.b, x.t).scatter_add(1, i.flatten(1), torch.ones(x.b, x.s * x.k)),
    "counts by index_put": lambda v, i, x: torch.zeros(x.t).double().index_put((i,), v, accumulate=True),
    "greatest value of a place": lambda v, i, x: torch.zeros(x.b, x.t).double().scatter_reduce(
        1, i.flatten(1), v.flatten(1), "amax"
    ),
    "values at their indices": lambda v, i, x: torch.zeros(x.b, x.s, x.t).double().scatter(-1, i, v),
    "one number a row": lambda v, i, x: torch.zeros(x.b, x.s, x.t).double().scatter(
        -1, torch.where(i > 5, 0, i), x.queries[..., :1].expand(-1, -1, x.k)
    ),
    "one-hot": lambda v, i, x: torch.zeros(x.b, x.s, x.k, x.t).scatter(-1, i[..., None], 1.0).amax(2),
    "comparison with all": lambda v, i, x: (i[..., None] == torch.arange(x.t)).any(-2),
    "gathered keys": lambda v, i, x: attention(gathered(i, x), x),
    "indexed keys": lambda v, i, x: attention(indexed(i, x), x),
    "embedding": lambda v, i, x: attention(F.embedding(i, x.keys[0]), x),
    "take_along_dim": lambda v, i, x: torch.take_along_dim(x.keys[:, None, :, 0], i, 2).amax(-1),
    "index_select, flat": lambda v, i, x: attention(
        x.keys.flatten(0, 1)
        .index_select(0, (i + torch.arange(x.b)[:, None, None] * x.t).flatten())
        .view(x.b, x.s, x.k, x.d),
        x,
    ),
    "matmul": lambda v, i, x: (x.queries[:, :, None] @ gathered(i, x).mT).softmax(-1) @ gathered(i, x),
    "einsum": lambda v, i, x: torch.einsum(
        "bsk,bskd->bsd", torch.einsum("bsd,bskd->bsk", x.queries, indexed(i, x)).softmax(-1), indexed(i, x)
    ),
    "heads": lambda v, i, x: torch.einsum(
        "bshe,bskhe->bshk", x.queries.unflatten(-1, (2, -1)), gathered(i, x).unflatten(-1, (2, -1))
    ).logsumexp(-1),
    "sdpa": lambda v, i, x: sdpa(i, x),
    "sdpa with a mask": lambda v, i, x: sdpa(i, x, attn_mask=v > -2),
    "mask of hidden entries": lambda v, i, x: attention(
        gathered(torch.where(torch.isinf(v), 0, i), x).masked_fill(torch.isinf(v)[..., None], 0), x
    ),
    "reductions": lambda v, i, x: (
        v.sum(-1), v.mean(-1), v.amax(-1), i.amin(-1), v.var(-1), v.std(-1), (v > 0).any(-1), (i > 2).all(-1),
        v.prod(-1), v.logsumexp(-1), v.norm(dim=-1), v.max(-1).values, i.min(-1).values, v.sum(), v.max(),
        v.sum((0, 2)), v.sum(-1, keepdim=True), v.permute(2, 0, 1).sum(0), torch.var_mean(v, -1),
    ),
    "normalised": lambda v, i, x: ((v - v.mean(-1, keepdim=True)) * v).sum(-1),
    "sorted": lambda v, i, x: (v.sort(-1).values, i.sort(-1).values, v.topk(2, -1).values),
    "merged with the rows": lambda v, i, x: (
        v.flatten(1).sum(-1), v.flatten().amax(), v.reshape(x.b, x.s * x.k).softmax(-1).view(x.b, x.s, x.k).amax(-1)
    ),
    "merged features": lambda v, i, x: gathered(i, x).flatten(2).view(x.b, x.s, x.k, x.d).sum(2),
    "shape": lambda v, i, x: (torch.zeros_like(v), torch.ones_like(i), v.new_zeros(i.shape), i.shape[-1]),
    "numbers of one value": lambda v, i, x: (v * torch.full((x.b, x.s, x.k), 2.0) + x.weights[0]).sum(-1),
    "expanded": lambda v, i, x: (v * x.queries[..., :1].expand(-1, -1, x.k).clone()).sum(-1),
    "rotary": lambda v, i, x: (
        torch.cat([-gathered(i, x)[..., 3:], gathered(i, x)[..., :3]], -1) * x.queries[:, :, None]
    ).sum(-1).amax(-1),
    "complex rotary": lambda v, i, x: torch.view_as_real(
        torch.view_as_complex(gathered(i, x).unflatten(-1, (-1, 2))) * (1 + 2j)
    ).sum(2),
    "along features": lambda v, i, x: (
        gathered(i, x).cumsum(-1).sum(2), gathered(i, x).sort(-1).values.sum(2), gathered(i, x).flip(-1).sum(2),
        gathered(i, x).roll(1, -1).sum(2), gathered(i, x)[..., 2].sum(-1), gathered(i, x).softmax(-1).sum(2),
        gathered(i, x).argmax(-1).amax(-1), F.pad(gathered(i, x), (1, 0)).sum(2),
        *[part.sum(2) for part in gathered(i, x).split(2, -1)], *[part.amax(-1) for part in gathered(i, x).unbind(-1)],
        gathered(i, x).max(-1).indices.amax(-1), torch.stack([v, 2 * v], -2).sum(-1),
        F.layer_norm(gathered(i, x), (x.d,)).sum(2),
    ),
    "linear": lambda v, i, x: F.linear(gathered(i, x), x.keys[0]).sum(2),
    "nobody": lambda v, i, x: x.keys + 1,
}  # fmt: skip

MATTERS: dict[str, Consumer] = {
    "indices": lambda v, i, x: i,
    "values": lambda v, i, x: v,
    "one of two consumers": lambda v, i, x: (mask(i, x), i.int()),
    "gathered keys, returned": lambda v, i, x: gathered(i, x),
    "cumsum": lambda v, i, x: v.cumsum(-1),
    "arange comparison": lambda v, i, x: v.masked_fill(torch.arange(x.k) < 2, 0).sum(-1),
    "positional weights": lambda v, i, x: (v * x.weights).sum(-1),
    "weights of rows and slots": lambda v, i, x: (v * x.wide).sum(-1),
    "matrix of weights": lambda v, i, x: v @ x.weights[:, None],
    "positions after a gather": lambda v, i, x: torch.einsum("bskd,k->bsd", gathered(i, x), x.weights),
    "positional scatter": lambda v, i, x: torch.zeros(x.b, x.s, x.t).double().scatter(-1, i, x.wide),
    "padded, then scattered": lambda v, i, x: torch.zeros(x.b, x.s, x.t).double().scatter(
        -1, torch.where(v < 3, 0, i), v
    ),
    "scatter into slots": lambda v, i, x: v.scatter(-1, torch.zeros_like(i[..., :1]), 9.0).sum(-1),
    "first": lambda v, i, x: v[..., 0],
    "first by index": lambda v, i, x: v.gather(-1, torch.zeros(x.b, x.s, 1, dtype=torch.long)),
    "slice": lambda v, i, x: v[..., :2].sum(-1),
    "every other": lambda v, i, x: v[..., ::2].sum(-1),
    "flip": lambda v, i, x: v.flip(-1),
    "difference with the flipped": lambda v, i, x: (v - v.flip(-1)).abs().sum(-1),
    "differences of neighbours": lambda v, i, x: v.diff(dim=-1).abs().sum(-1),
    "roll": lambda v, i, x: (v * v.roll(1, -1)).sum(-1),
    "cat along slots": lambda v, i, x: torch.cat([v, x.wide], -1).cumsum(-1),
    "argsort": lambda v, i, x: i.argsort(-1),
    "argmax": lambda v, i, x: v.argmax(-1),
    "split differently": lambda v, i, x: v.view(x.b, x.s, 2, 2).prod(-1),
    "merged, split differently": lambda v, i, x: v.flatten(1).view(x.b, x.k, x.s).prod(-1),
    "sum over rows": lambda v, i, x: v.prod(1).sum(-1),
    "softmax over rows": lambda v, i, x: v.softmax(1).square().sum(-1),
    "cumsum over rows": lambda v, i, x: v.cumsum(1).square().sum(-1),
    "other rows": lambda v, i, x: (v * v.flip(0)).sum(-1),
    "rows against each other": lambda v, i, x: torch.einsum("bsk,btk->bst", v, v),
    "pairs of slots": lambda v, i, x: (v[..., None] * v[..., None, :])[..., 1, 2],
    "gathered by positions": lambda v, i, x: v.gather(-1, i % x.k).sum(-1),
    "index into slots": lambda v, i, x: x.weights[i % x.k],
    "two indices, one of them positional": lambda v, i, x: x.keys[0][i, torch.arange(x.k)].sum(-1),
    "gather, other operand positional": lambda v, i, x: (x.weights[:, None] * torch.arange(x.d)).expand(
        x.b, x.s, -1, -1
    ).gather(-1, (i % x.d)[..., None]).sum(2),
    "one-hot into positions": lambda v, i, x: torch.zeros(x.k, x.t).expand(x.b, x.s, -1, -1).scatter(
        -1, i[..., None], 1.0
    ),
    "selected by condition": lambda v, i, x: v[v > 0],
    "written to": lambda v, i, x: v.clone().add_(x.weights).square().sum(-1),
    "meets what is written to": lambda v, i, x: written_later(v, x),
    "in-place one-hot": lambda v, i, x: torch.zeros(x.b, x.s, x.k, x.t).scatter_(-1, i[..., None], 1.0),
    "linear over slots": lambda v, i, x: F.linear(v, x.weights[None]),
    "layer norm over slots": lambda v, i, x: F.layer_norm(v, (x.k,), x.weights).sum(-1),
    "sdpa, values of positions": lambda v, i, x: F.scaled_dot_product_attention(
        x.queries[:, :, None].float(), gathered(i, x).float(), x.wide[..., None].float()
    ).double(),
    "sdpa, mask of positions": lambda v, i, x: sdpa(i, x, attn_mask=x.wide > 0),
    "sdpa, causal": lambda v, i, x: F.scaled_dot_product_attention(
        x.queries[:, :, None].expand(-1, -1, x.k, -1).float(), gathered(i, x).float(), gathered(i, x).float(),
        is_causal=True,
    ).double().round(decimals=3),
    "lengthened": lambda v, i, x: F.pad(v, (1, 0)).cumsum(-1),
    "unknown operation": lambda v, i, x: torch.cdist(v, x.wide),
}  # fmt: skip

# Nobody can tell, but that is not proved.
CONSERVATIVE: dict[str, Consumer] = {
    "pairs of slots, all of them": lambda v, i, x: (v[..., None] - v[..., None, :]).abs().sum((-1, -2)),
    "positions of a sort, applied": lambda v, i, x: i.gather(-1, v.argsort(-1)),
    "chunks of rows": lambda v, i, x: torch.cat([v[:, :1].sum(-1), v[:, 1:].sum(-1)], 1),
    "rows of a batch to one place": lambda v, i, x: (
        torch.zeros(x.b, x.t).double().scatter(-1, i.flatten(1), v.flatten(1))
    ),
    "values at places by index_put": lambda v, i, x: torch.zeros(x.t).double().index_put((i,), v),
    "sink": lambda v, i, x: torch.cat([v, x.queries[..., :1]], -1).logsumexp(-1),
}


@pytest.mark.parametrize("decompose", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", INVARIANT)
def test_order_does_not_matter(name: str, decompose: bool) -> None:
    graph = aten_graph(program(INVARIANT[name]), inputs(), decompose=decompose)
    assert verdict(graph) is None
    assert not permuting_changes(graph, inputs())


@pytest.mark.parametrize("decompose", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", MATTERS)
def test_order_matters(name: str, decompose: bool) -> None:
    graph = aten_graph(program(MATTERS[name]), inputs(), decompose=decompose)
    assert isinstance(verdict(graph), Node)
    assert permuting_changes(graph, inputs())


@pytest.mark.parametrize("name", CONSERVATIVE)
def test_order_might_matter(name: str) -> None:
    graph = aten_graph(program(CONSERVATIVE[name]), inputs())
    assert isinstance(verdict(graph), Node)
    assert not permuting_changes(graph, inputs())


@pytest.mark.parametrize("decompose", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "name", sorted(INVARIANT.keys() - {"heads", "complex rotary"})
)  # these cut features of unknown size
def test_order_does_not_matter_with_dynamic_shapes(name: str, decompose: bool) -> None:
    graph = aten_graph(program(INVARIANT[name]), inputs(5, 7, 23, K, 6), symbolic=True, decompose=decompose)
    assert verdict(graph) is None


@pytest.mark.parametrize("name", sorted(MATTERS.keys() - {"merged, split differently"}))  # then it is split as it was
def test_order_matters_where_all_sizes_agree(name: str) -> None:
    sizes = inputs(K, K, 4 * K, K, K)
    assert isinstance(verdict(aten_graph(program(MATTERS[name]), sizes)), Node)


def test_the_first_that_may_tell_is_named() -> None:
    graph = aten_graph(program(lambda v, i, x: (mask(i, x), v.cumsum(-1), i)), inputs())
    assert str(verdict(graph)) == "cumsum"


def test_one_slot_has_one_order() -> None:
    graph = aten_graph(program(lambda v, i, x: (v, i), k=1), inputs(k=1))
    assert verdict(graph) is None
    assert order_matters([], [], -1) is None


def test_another_dimension() -> None:
    def run(scores: Tensor) -> Tensor:
        i = scores.topk(3, dim=1).indices
        return torch.zeros_like(scores).scatter(1, i, 1.0)

    graph = aten_graph(run, (torch.randn(2, 7, 5),))
    assert order_matters([], list(selection(graph).users)[1:], 1) is None
    assert order_matters([], list(selection(graph).users)[1:], 2) is not None


# Whole models -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def verdicts() -> Iterator[list[Node | None]]:
    """What is found of every top-k of every graph that is compiled in between; nothing is rewritten."""
    found: list[Node | None] = []

    def look(graph: Graph, settings: PassSettings, **kwargs: Any) -> list[Any]:
        for node in graph.nodes:
            if node.target is torch.ops.aten.topk.default:
                score, dim = node.args[0], (*node.args, -1)[2]
                taken = [user for user in node.users if user.target is operator.getitem]
                values, indices = ([x for x in taken if x.args[1] == output and x.users] for output in (0, 1))
                with contextlib.suppress(NotAnIndexer):
                    if score.op != "placeholder":
                        describe_indexer(score, dim)
                    found.append(order_matters(values, indices, dim))
        return []

    torch._dynamo.reset()
    with mock.patch.object(rewrite, "rewrite_indexers", look):
        yield found


@pytest.mark.parametrize(
    ("name", "attention", "base"),
    [
        ("deepseek_v32", "sdpa", "aot_eager"),
        ("deepseek_v4", "eager", "eager"),
        *(
            pytest.param(name, attention, base, marks=pytest.mark.slow)
            for name, spec in MODELS.items()
            for attention in spec[4]
            for base in ("aot_eager", "eager")
            if (name, attention, base) not in (("deepseek_v32", "sdpa", "aot_eager"), ("deepseek_v4", "eager", "eager"))
        ),
    ],
)
def test_models_scatter_their_indices(name: str, attention: str, base: str) -> None:
    """Real models do not care: every indexer's indices end in a mask."""
    ids = torch.arange(2, 2 + PROMPT.get(name, DEFAULT_PROMPT)).expand(2, -1)
    with verdicts() as found, torch.no_grad():
        torch.compile(build(name, attention=attention), backend="hisa", options={"hisa.base": base})(
            ids, use_cache=False
        )
    assert found == [None] * MODELS[name][3]


def test_training() -> None:
    """The indices are used by the backward graph too, where the gradient of a gather adds up."""

    def run(scores: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
        indices = scores.topk(K, dim=-1).indices
        g = keys[:, None].expand(-1, S, -1, -1).gather(2, indices[..., None].expand(-1, -1, -1, D))
        p = (queries[:, :, None] * g).sum(-1).softmax(-1)
        return (p[..., None] * g).sum()

    scores, keys, queries, *_ = inputs()
    with verdicts() as found:
        compiled = torch.compile(run, backend="hisa", options={"hisa.base": "aot_eager"}, fullgraph=True)
        compiled(scores, keys.requires_grad_(), queries.requires_grad_()).backward()
    assert found == [None]
