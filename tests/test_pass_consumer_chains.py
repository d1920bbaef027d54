"""Whether the order of the selected entries matters, for programs made of random chains of consumers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import aten_graph
from test_pass_consumers import gathered, inputs, permuting_changes, program, selection, verdict
from torch import Tensor


class Chain:
    """A program made of a list of numbers: each is a choice of an operation, an operand, a dimension, ...

    Run eagerly first: steps whose shapes do not fit are then left out when it is traced.
    """

    def __init__(self, choices: list[int]) -> None:
        self.choices = choices
        self.fits: list[bool] | None = None

    def __call__(self, v: Tensor, i: Tensor, x: SimpleNamespace) -> Tensor:
        self.rest = list(self.choices)
        # Numbers that are exact in any order of summation; only these are compared with others.
        self.exact = {id(v), id(i)}
        pool = [i, v, gathered(i, x)][: 2 + self.pick(2)]
        self.exact.update(map(id, pool))
        others = [x.weights, x.wide, x.queries, torch.arange(x.k).double(), torch.full((x.k,), 2.0).double(),
                  x.queries[..., :1], x.queries[..., :1].expand(-1, -1, x.k), x.keys]  # fmt: skip
        known, fits = self.fits, []
        while self.rest:
            result = self.step(pool, others, x, known is None or known[len(fits)])
            fits.append(result is not None and 0 < result.numel() < 5000 and result.dim() < 6)
            if fits[-1]:
                pool.append(result)
        self.fits = fits
        last = pool[-1]
        return last if not last.dtype.is_floating_point else last.nan_to_num(7.0)

    def pick(self, n: int) -> int:
        return self.rest.pop() % n if self.rest else 0

    def step(self, pool: list[Tensor], others: list[Tensor], x: SimpleNamespace, fits: bool) -> Any:
        # Each step takes as many numbers, whether it fits or not.
        before = self.rest[8:]
        try:
            return self.applied(pool, others, x) if fits else None
        except (RuntimeError, IndexError, ValueError):  # shapes that do not fit
            return None
        finally:
            self.rest = before

    def applied(self, pool: list[Tensor], others: list[Tensor], x: SimpleNamespace) -> Any:
        a = pool[-1] if self.pick(3) else pool[self.pick(len(pool))]
        exact = id(a) in self.exact
        operations = [self.layout, self.layout, self.pointwise, self.binary, self.binary, self.reduce, self.reduce,
                      self.along, self.read, self.write, self.write, self.contract]  # fmt: skip
        operation = operations[self.pick(len(operations))]
        result = operation(a if a.dtype != torch.bool else a.double(), pool, others, x, exact)
        if result is not None and exact and operation not in (self.along, self.contract):
            self.exact.add(id(result))
        return result

    def dim(self, a: Tensor) -> int:
        return self.pick(max(a.dim(), 1)) - max(a.dim(), 1)

    def layout(self, a: Tensor, pool: list[Tensor], others: list[Tensor], x: SimpleNamespace, exact: bool) -> Any:
        d, e = self.dim(a), self.dim(a)
        match self.pick(10):
            case 0:
                return a.transpose(d, e)
            case 1:
                return a.flatten(min(d, e), max(d, e))
            case 2:
                return a.unsqueeze(d)
            case 3:
                return a.unsqueeze(d).expand(*a.shape[: d + a.dim() + 1], 2, *a.shape[d + a.dim() + 1 :])
            case 4:
                return a.unflatten(d, (2, -1))
            case 5:
                return a.reshape(sorted(a.shape))
            case 6:
                return a.flatten().view(x.b, -1)
            case 7:
                return a.narrow(d, 0, 1)
            case 8:
                return a.squeeze()
            case _:
                return a.movedim(d, e).contiguous()

    def pointwise(self, a: Tensor, pool: list[Tensor], others: list[Tensor], x: SimpleNamespace, exact: bool) -> Any:
        operations = [Tensor.neg, Tensor.abs, Tensor.double, Tensor.int, Tensor.long, lambda a: a + 1, lambda a: a * 2]
        if exact:
            operations += [lambda a: a > 1, lambda a: torch.where(a > 1, a, -1), lambda a: a.clamp(0, 2)]
        return operations[self.pick(len(operations))](a)

    def binary(self, a: Tensor, pool: list[Tensor], others: list[Tensor], x: SimpleNamespace, exact: bool) -> Any:
        b = (pool + others)[self.pick(len(pool) + len(others))]
        both = exact and (id(b) in self.exact or not any(b is p for p in pool))
        operations = [torch.add, torch.sub, lambda a, b: (a * b).clamp(-1000, 1000)]
        if both:
            operations += [torch.eq, torch.lt, lambda a, b: torch.where(a > b, a, b)]
        result = operations[self.pick(len(operations))](a, b)
        return result if both else result + 0.1

    def reduce(self, a: Tensor, pool: list[Tensor], others: list[Tensor], x: SimpleNamespace, exact: bool) -> Any:
        d, keep = self.dim(a), bool(self.pick(2))
        operations = [Tensor.sum, Tensor.amax, Tensor.any, lambda a, *r: a.double().logsumexp(*r) + 0.1]
        return operations[self.pick(3)](a, d, keep)

    def along(self, a: Tensor, pool: list[Tensor], others: list[Tensor], x: SimpleNamespace, exact: bool) -> Any:
        d = self.dim(a)
        match self.pick(9):
            case 0:
                return a.cumsum(d)
            case 1:
                return a.flip(d)
            case 2:
                return a.double().softmax(d)
            case 3:
                return a.sort(d).values if exact else None
            case 4:
                return a.argsort(d) if exact else None
            case 5:
                return torch.cat([a, a], d)
            case 6:
                return a.select(d, 0)
            case 7:
                return a.narrow(d, 0, max(1, a.shape[d] - 1))
            case _:
                return torch.stack([a, 2 * a], d)

    def read(self, a: Tensor, pool: list[Tensor], others: list[Tensor], x: SimpleNamespace, exact: bool) -> Any:
        b = (pool + others)[self.pick(len(pool) + len(others))]
        if not exact:
            return None
        d = self.dim(b)
        at = a.long().abs() % b.shape[d]
        match self.pick(3):
            case 0:
                return b.gather(d, at)
            case 1:
                return b[at] if d == -b.dim() else b.movedim(d, 0)[at]
            case _:
                return b.index_select(d, at.flatten())

    def write(self, a: Tensor, pool: list[Tensor], others: list[Tensor], x: SimpleNamespace, exact: bool) -> Any:
        if not exact:
            return None
        d = self.dim(a)
        b = (pool + others)[self.pick(len(pool) + len(others))].double()
        shape = list(a.shape)
        shape[d] = x.t
        # The selection's own indices are in range; taking them modulo would hide that they are distinct.
        at = a if a.dtype in (torch.int32, torch.int64) and a is pool[0] else a.long().abs() % x.t
        into = torch.zeros(shape).double()
        match self.pick(5):
            case 0:
                return into.scatter(d, at, 1.0)
            case 1:
                return into.scatter(d, at, b.expand(a.shape))
            case 2:
                return into.scatter_add(d, at, b.expand(a.shape))
            case 3:
                return torch.zeros(x.t).double().index_put((at,), b, accumulate=bool(self.pick(2)))
            case _:
                return into.scatter_reduce(d, at, b.expand(a.shape), "amax")

    def contract(self, a: Tensor, pool: list[Tensor], others: list[Tensor], x: SimpleNamespace, exact: bool) -> Any:
        b = (pool + others)[self.pick(len(pool) + len(others))].double()
        a = a.double()
        result = a @ (b.mT if b.dim() > 1 and self.pick(2) else b)
        return result.clamp(-1000, 1000)


def check_chain(choices: list[int], sizes: tuple[int, int, int, int, int], decompose: bool) -> bool | None:
    args = inputs(*sizes)
    run = program(Chain(choices), k=sizes[3])
    run(*args)
    graph = aten_graph(run, args, decompose=decompose)
    if verdict(graph) is not None:
        return None
    assert not permuting_changes(graph, args), graph.code
    return any(user.users for user in selection(graph).users)


@settings(max_examples=100, deadline=None)
@given(
    choices=st.lists(st.integers(0, 719), min_size=8, max_size=90),
    sizes=st.sampled_from([(2, 3, 11, 4, 6), (3, 3, 9, 3, 3), (1, 4, 8, 4, 4), (4, 1, 7, 2, 2), (2, 2, 6, 6, 2)]),
    decompose=st.booleans(),
)
def test_chains(choices: list[int], sizes: tuple[int, int, int, int, int], decompose: bool) -> None:
    check_chain(choices, sizes, decompose)
