"""Axes: what the dimensions of an intermediate are made of.

An element of a tensor is addressed by an index a dimension.  The analysis asks "which element of the input is
read for element (b, s, t) of the output?" and answers with the same axes, so two dimensions are the same axis
only if they are the same index, never because their sizes happen to agree.

A dimension's index is a tuple of axes in row-major order: ``(b, s)`` is a dimension that merges b and s, ``()``
the only position of a dimension of size 1.  A view may cut an axis; the axis then remembers its parts, and
:func:`resolved` replaces it everywhere.  A slice reads at an offset: its dimension's index is one :class:`Shifted`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.functions import FloorDiv

Size: TypeAlias = "int | torch.SymInt"


def size_expr(size: Size) -> sympy.Expr:
    """The size as a sympy expression.  Never guards: a symbol stays a symbol, backed or not."""
    if isinstance(size, int):
        return sympy.Integer(size)
    expr: sympy.Expr = size.node.expr
    # Inferred dimensions of views come as divisions that leave no remainder, such as s*s // s.
    return expr if expr.is_Symbol else _without_remainders(expr)


@functools.lru_cache(maxsize=4096)
def _without_remainders(expr: sympy.Expr) -> sympy.Expr:
    return expr.replace(FloorDiv, _exact_division) if expr.has(FloorDiv) else expr


def _exact_division(numerator: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    exact = quotient(numerator, divisor)
    return FloorDiv(numerator, divisor) if exact is None else exact


def shape_of(node: Node) -> tuple[sympy.Expr, ...]:
    return tuple(size_expr(s) for s in node.meta["val"].shape)


def same_size(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two sizes are provably equal."""
    return a is b or a == b or (not (a.is_Integer and b.is_Integer) and sympy.expand(a - b) == 0)


class Axis:
    """One loop of the computation.  Compared by identity."""

    __slots__ = ("name", "parts", "size")

    def __init__(self, size: sympy.Expr, name: str = "") -> None:
        self.size = size
        self.name = name
        self.parts: tuple[Axis, ...] | None = None

    def split(self, outer: sympy.Expr, inner: sympy.Expr) -> tuple[Axis, Axis]:
        """Cut into an outer and an inner axis, outer * inner = size."""
        cut = Axis(outer, self.name + "0"), Axis(inner, self.name + "1")
        self.parts = cut
        return cut

    def __repr__(self) -> str:
        return f"{self.name or 'axis'}:{self.size}"


Index: TypeAlias = tuple[Axis, ...]


class Shifted(Axis):
    """The index ``start + of`` of a dimension that is longer than the part that is read.

    The sizes of the part don't make up the shape of the whole, so a :func:`regroup` treats it apart.
    """

    __slots__ = ("of", "start")

    def __init__(self, of: Index, start: sympy.Expr) -> None:
        inner = of[0] if len(of) == 1 else None
        if isinstance(inner, Shifted):
            of, start = inner.of, start + inner.start
        super().__init__(product_of_sizes(of), "+".join([*(axis.name for axis in of), str(start)]))
        self.of: Index = of
        self.start: sympy.Expr = start


def resolved(index: Index) -> Index:
    """The index with every axis that has been cut replaced by its parts."""
    out: list[Axis] = []
    for axis in index:
        out.extend((axis,) if axis.parts is None else resolved(axis.parts))
    return tuple(out)


def product_of_sizes(axes: Iterable[Axis]) -> sympy.Expr:
    """The size of the dimension that merges the axes."""
    return sympy.Mul(*(axis.size for axis in axes))


def loops(index: Index) -> Index:
    """The axes that the index depends on, whatever the offsets."""
    out: list[Axis] = []
    for axis in resolved(index):
        out.extend(loops(axis.of) if isinstance(axis, Shifted) else (axis,))
    return tuple(out)


@dataclass(frozen=True)
class Access:
    """One element of a node's tensor, as a function of axes: ``index[d]`` addresses dimension d."""

    node: Node
    index: tuple[Index, ...]

    @property
    def axes(self) -> Index:
        """All axes it depends on, in dimension order."""
        return loops(tuple(axis for dim in self.index for axis in dim))

    def depends_on(self, axes: Index) -> bool:
        return not set(resolved(axes)).isdisjoint(self.axes)

    def same_element(self, other: Access) -> bool:
        return same_node(self.node, other.node) and all(map(same_index, self.index, other.index))


# How far back two nodes are compared.
_COMPARED = 64


def writes(node: Node) -> bool:
    """Whether an operation writes to one of its operands."""
    # What detach_ changes is what autograd knows of the tensor.
    mutable = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    return mutable and node.target is not torch.ops.aten.detach_.default


def is_used(node: Node) -> bool:
    """Whether anybody sees what the node does: not so for what tracing left behind."""
    return bool(node.users) or node.op == "output" or writes(node)


def same_node(a: Node, b: Node) -> bool:
    """Whether two nodes are one, or the same function of the same inputs: ``k[0]`` written twice."""
    if a is b:
        return True
    node, last = (a, b) if a < b else (b, a)
    while node is not last:
        # Whatever is written to in between may be what one of them is made from.
        if node.op == "root" or writes(node):
            return False
        node = node.next
    todo = [(a, b)]
    for _ in range(_COMPARED):
        if not todo:
            return True
        a, b = todo.pop()
        if a is b:
            continue
        if a.op != "call_function" or a.target is not b.target or len(a.args) != len(b.args) or a.kwargs != b.kwargs:
            return False
        target = a.target
        if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
            return False
        for x, y in zip(a.args, b.args, strict=True):
            if isinstance(x, Node) and isinstance(y, Node):
                todo.append((x, y))
            elif x != y:
                return False
    return not todo


def renamed(index: Index, names: Mapping[Axis, Axis]) -> Index:
    """The index in other axes, where they have other names."""
    return tuple(names.get(axis, axis) for axis in resolved(index))


def same_index(a: Index, b: Index) -> bool:
    """Whether two indices of one dimension are the same position."""
    a, b = resolved(a), resolved(b)
    if len(a) == len(b) == 1 and isinstance(a[0], Shifted) and isinstance(b[0], Shifted):
        return same_size(a[0].start, b[0].start) and same_index(a[0].of, b[0].of)
    return a == b


def fresh_index(sizes: Sequence[sympy.Expr], names: str = "") -> tuple[Index, ...]:
    """A new axis for every dimension that is not of size 1."""
    padded = names.ljust(len(sizes), "_")
    return tuple(() if size == 1 else (Axis(size, name),) for size, name in zip(sizes, padded, strict=True))


def quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    """a / b if b divides a for every value of the symbols, else None."""
    if a == b:
        return sympy.Integer(1)
    if b == 0:
        return None
    if a.is_Integer and b.is_Integer:
        return a / b if a % b == 0 else None
    return _symbolic_quotient(a, b)


@functools.lru_cache(maxsize=4096)
def _symbolic_quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    # Every layer of a model asks for the same few.
    ratio = sympy.cancel(a / b)
    return ratio if sympy.fraction(ratio)[1] == 1 else None


def regroup(
    index: Sequence[Index], viewed: Sequence[sympy.Expr], sizes: Sequence[sympy.Expr]
) -> tuple[Index, ...] | None:
    """The same elements addressed in another shape: what ``view`` and ``reshape`` do.

    ``index`` addresses the tensor of shape ``viewed``, the result the one of shape ``sizes`` that it is a view of.
    None if the shapes can't be brought to a common refinement (say [6, 4] to [8, 3]); a cut that was needed on the
    way stays, which is harmless: it renames an axis.
    """
    # Dimensions that stay as they are at either end, an offset in them included.
    shorter = min(len(viewed), len(sizes))
    first = 0
    while first < shorter and same_size(viewed[first], sizes[first]):
        first += 1
    last = 0
    while last < shorter - first and same_size(viewed[-1 - last], sizes[-1 - last]):
        last += 1
    middle = _regroup(index[first : len(viewed) - last], sizes[first : len(sizes) - last])
    return None if middle is None else (*index[:first], *middle, *index[len(viewed) - last :])


def _regroup(index: Sequence[Index], sizes: Sequence[sympy.Expr]) -> tuple[Index, ...] | None:
    todo = list(resolved(tuple(axis for dim in index for axis in dim)))
    if any(isinstance(axis, Shifted) for axis in todo):
        return _regroup_part(todo, sizes)
    todo.reverse()
    out: list[Index] = []
    for size in sizes:
        dim: list[Axis] = []
        missing: sympy.Expr | None = size
        while missing is not None and missing != 1:
            if not todo:
                return None
            axis = todo.pop()
            left = quotient(missing, axis.size)
            if left is None:
                inner = quotient(axis.size, missing)
                if inner is None:
                    return None
                axis, rest = axis.split(missing, inner)
                todo.append(rest)
                left = sympy.Integer(1)
            dim.append(axis)
            missing = left
        out.append(tuple(dim))
    return None if todo else tuple(out)


def _regroup_part(axes: Sequence[Axis], sizes: Sequence[sympy.Expr]) -> tuple[Index, ...] | None:
    """A regroup where the outermost axis is an offset: (start + i) * n + j is start * n + (i * n + j)."""
    first, *inside = axes
    if not isinstance(first, Shifted) or any(isinstance(axis, Shifted) for axis in inside) or not sizes:
        return None
    row = sympy.Mul(*sizes[1:])
    start = quotient(first.start * product_of_sizes(inside), row) if first.start != 0 else first.start
    length = quotient(first.size * product_of_sizes(inside), row)
    if start is None or length is None:
        return None
    out = _regroup([first.of, tuple(inside)], [length, *sizes[1:]])
    return None if out is None else ((Shifted(out[0], start),), *out[1:])


def broadcast(index: Sequence[Index], out_sizes: Sequence[Size], sizes: Sequence[Size]) -> tuple[Index, ...] | None:
    """The element of an operand of shape ``sizes`` that broadcasting reads for ``index`` of the result.

    None where the sizes don't tell: an unknown size that may or may not be 1.
    """
    lead = len(out_sizes) - len(sizes)
    if lead < 0:
        return None
    out: list[Index] = []
    for dim, out_size, size in zip(index[lead:], out_sizes[lead:], sizes, strict=True):
        if size_expr(size) == 1:
            out.append(())
        elif same_size(size_expr(size), size_expr(out_size)) or statically_known_true(size != 1):
            out.append(dim)
        else:
            return None
    return tuple(out)
