"""Axes: what the dimensions of an intermediate are made of.

An element of a tensor is addressed by an index a dimension.  The analysis asks "which element of the input is
read for element (b, s, t) of the output?" and answers with the same axes, so two dimensions are the same axis
only if they are the same index, never because their sizes happen to agree.

A dimension's index is a tuple of axes in row-major order: ``(b, s)`` is a dimension that merges b and s, ``()``
the only position of a dimension of size 1.  A view may cut an axis; the axis then remembers its parts, and
:func:`resolved` replaces it everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    return expr.replace(FloorDiv, _exact_division) if expr.has(FloorDiv) else expr


def _exact_division(numerator: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    quotient = _quotient(numerator, divisor)
    return FloorDiv(numerator, divisor) if quotient is None else quotient


def shape_of(node: Node) -> tuple[sympy.Expr, ...]:
    return tuple(size_expr(s) for s in node.meta["val"].shape)


def same_size(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two sizes are provably equal."""
    return a == b or (not (a.is_Integer and b.is_Integer) and sympy.expand(a - b) == 0)


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


def resolved(index: Index) -> Index:
    """The index with every axis that has been cut replaced by its parts."""
    out: list[Axis] = []
    for axis in index:
        out.extend((axis,) if axis.parts is None else resolved(axis.parts))
    return tuple(out)


@dataclass(frozen=True)
class Access:
    """One element of a node's tensor, as a function of axes: ``index[d]`` addresses dimension d."""

    node: Node
    index: tuple[Index, ...]

    @property
    def axes(self) -> Index:
        """All axes it depends on, in dimension order."""
        return resolved(tuple(axis for dim in self.index for axis in dim))

    def depends_on(self, axes: Index) -> bool:
        return not set(resolved(axes)).isdisjoint(self.axes)

    def same_element(self, other: Access) -> bool:
        return self.node is other.node and all(
            resolved(a) == resolved(b) for a, b in zip(self.index, other.index, strict=True)
        )


def fresh_index(sizes: Sequence[sympy.Expr], names: str = "") -> tuple[Index, ...]:
    """A new axis for every dimension that is not of size 1."""
    padded = names.ljust(len(sizes), "_")
    return tuple(() if size == 1 else (Axis(size, name),) for size, name in zip(sizes, padded, strict=True))


def _quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    """a / b if b divides a for every value of the symbols, else None."""
    if a == b:
        return sympy.Integer(1)
    if b == 0:
        return None
    if a.is_Integer and b.is_Integer:
        return a / b if a % b == 0 else None
    ratio = sympy.cancel(a / b)
    return ratio if sympy.fraction(ratio)[1] == 1 else None


def regroup(index: Sequence[Index], sizes: Sequence[sympy.Expr]) -> tuple[Index, ...] | None:
    """The same elements addressed in another shape: what ``view`` and ``reshape`` do.

    ``index`` addresses the viewed tensor, ``sizes`` is the shape before the view.  None if the shapes can't be
    brought to a common refinement (say [6, 4] to [8, 3]); a cut that was needed on the way stays, which is
    harmless: it renames an axis.
    """
    todo = list(resolved(tuple(axis for dim in index for axis in dim)))
    todo.reverse()
    out: list[Index] = []
    for size in sizes:
        dim: list[Axis] = []
        missing: sympy.Expr | None = size
        while missing is not None and missing != 1:
            if not todo:
                return None
            axis = todo.pop()
            left = _quotient(missing, axis.size)
            if left is None:
                inner = _quotient(axis.size, missing)
                if inner is None:
                    return None
                axis, rest = axis.split(missing, inner)
                todo.append(rest)
                left = sympy.Integer(1)
            dim.append(axis)
            missing = left
        out.append(tuple(dim))
    return None if todo else tuple(out)


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
        elif statically_known_true(size != 1) or same_size(size_expr(size), size_expr(out_size)):
            out.append(dim)
        else:
            return None
    return tuple(out)
