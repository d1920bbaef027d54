"""Putting nodes into a graph: a tensor's elements arranged along given axes, with sizes that stay symbolic."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from .axes import Access, Axis, Index, Shifted, product_of_sizes, resolved, same_size, shape_of, size_expr

aten = torch.ops.aten
prims = torch.ops.prims


class UnknownSizeError(Exception):
    """A symbolic size that no tensor at hand has."""


class Emitter:
    """Adds nodes in front of one node, with its provenance and with ``meta["val"]``.

    Sizes that are not numbers are taken from ``known_sizes``, the graph's own size nodes, or from dimensions of
    ``sources``, tensors that stand before that node and that the new nodes read anyway (so that no other tensor is
    kept alive).
    """

    def __init__(
        self,
        graph: Graph,
        before: Node,
        sources: Sequence[Node],
        known_sizes: Sequence[Node],
        fake_mode: FakeTensorMode | None,
    ) -> None:
        self.graph = graph
        self.before = before
        self.fake_mode = fake_mode
        self.sources = sources
        self.known_sizes = known_sizes
        self.added: list[Node] = []
        self._sizes: dict[sympy.Expr, Node] = {}

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        self.added.append(node)
        node.meta = {
            key: value for key, value in self.before.meta.items() if key not in ("val", "tensor_meta", "example_value")
        }
        values = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        if self.fake_mode is None:
            node.meta["val"] = target(*values[0], **values[1])
        else:
            with self.fake_mode:
                node.meta["val"] = target(*values[0], **values[1])
        return node

    def roll_back(self) -> None:
        """Take everything that was added out again."""
        for node in reversed(self.added):
            self.graph.erase_node(node)
        self.added.clear()

    def size(self, expr: sympy.Expr) -> int | Node:
        """A size as an argument: a number, or a node that computes it."""
        if expr.is_Integer:
            return int(expr)
        if expr not in self._sizes:
            self._sizes[expr] = self._size_node(expr)
        return self._sizes[expr]

    def _size_node(self, expr: sympy.Expr) -> Node:
        for node in self.known_sizes:
            if not node._erased and node < self.before and same_size(size_expr(node.meta["val"]), expr):
                return node
        for source in self.sources:
            for dim, size in enumerate(shape_of(source)):
                if same_size(size, expr):
                    return self.call(aten.sym_size.int, source, dim)
        if isinstance(expr, (sympy.Mul, sympy.Add)):
            combine = operator.mul if isinstance(expr, sympy.Mul) else operator.add
            parts = [self.size(part) for part in expr.args]
            total = parts[0]
            for part in parts[1:]:
                total = self.call(combine, total, part)
            assert isinstance(total, Node)
            return total
        raise UnknownSizeError(f"no tensor here has a dimension of size {expr}")

    def cast(self, x: Node, dtype: torch.dtype) -> Node:
        return x if x.meta["val"].dtype == dtype else self.call(prims.convert_element_type.default, x, dtype)

    def reshape(self, x: Node, sizes: Sequence[sympy.Expr]) -> Node:
        same = len(sizes) == len(shape_of(x)) and all(same_size(a, b) for a, b in zip(shape_of(x), sizes, strict=True))
        return x if same else self.call(aten.reshape.default, x, [self.size(size) for size in sizes])

    def arrange(self, access: Access, dims: Sequence[Index], keep_missing: bool = False) -> Node:
        """The tensor with one dimension for each of ``dims``, each the merge of its axes, in this order.

        Axes that the access does not depend on are expanded (stride 0 where possible); with ``keep_missing`` a
        dimension none of whose axes it depends on stays of size 1.
        """
        access = self._cut(access)
        have = access.axes
        groups = [resolved(dim) for dim in dims]
        if keep_missing:
            groups = [() if set(group).isdisjoint(have) else group for group in groups]
        wanted = [axis for group in groups for axis in group]
        x = access.node
        if tuple(wanted) != have:
            present = [axis for axis in wanted if axis in have]
            assert len(present) == len(have), "an axis of the operand has no place in the result"
            x = self.reshape(x, [axis.size for axis in have])
            order = [have.index(axis) for axis in present]
            if order != sorted(order):
                x = self.call(aten.permute.default, x, order)
            for position, axis in enumerate(wanted):
                if axis not in have:
                    x = self.call(aten.unsqueeze.default, x, position)
            if len(present) != len(wanted):
                x = self.call(aten.expand.default, x, [self.size(axis.size) for axis in wanted])
        return self.reshape(x, [product_of_sizes(group) for group in groups])

    def _cut(self, access: Access) -> Access:
        """The access with every offset taken by a slice in front of it."""
        for dim, index in enumerate(access.index):
            if len(index) == 1 and isinstance(index[0], Shifted):
                shifted = index[0]
                start, end = self.size(shifted.start), self.size(shifted.start + shifted.size)
                node = self.call(aten.slice.Tensor, access.node, dim, start, end)
                access = Access(node, (*access.index[:dim], shifted.of, *access.index[dim + 1 :]))
        return access

    def expanded(self, x: Node, sizes: Sequence[sympy.Expr]) -> Node:
        same = all(same_size(a, b) for a, b in zip(shape_of(x), sizes, strict=True))
        return x if same else self.call(aten.expand.default, x, [self.size(size) for size in sizes])

    def contiguous(self, x: Node) -> Node:
        """The tensor in memory order of its dimensions, as the selections that it stands for return theirs."""
        stride = sympy.Integer(1)
        for size, have in zip(reversed(shape_of(x)), reversed(x.meta["val"].stride()), strict=True):
            if size != 1 and not same_size(size_expr(have), stride):
                return self.call(aten.clone.default, x, memory_format=torch.contiguous_format)
            stride *= size
        return x


def index_of(dims: Sequence[Index], last: torch.SymInt | int) -> tuple[Index, ...]:
    """How to address a tensor whose dimensions are ``dims`` and a last one of size ``last``."""
    size = size_expr(last)
    return (*map(resolved, dims), () if size == 1 else (Axis(size, "k"),))
