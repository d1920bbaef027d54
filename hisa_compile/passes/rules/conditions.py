"""Comparisons, logic, and the integers that masks are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..axes import Access, Index
from ..terms import Abs, AnyOf, Compare, FloorDiv, Not, Plus, Position, Product, Scalar, Symbol, Term, Where
from .registry import argument, operand, operands, pointwise, rule

aten = torch.ops.aten
prims = torch.ops.prims

_COMPARISONS = {"lt": "<", "le": "<=", "eq": "==", "ne": "!=", "ge": ">=", "gt": ">"}


def _comparison(kind: str) -> Any:
    return pointwise(lambda left, right: Compare(kind, left, right))


for _name, _kind in _COMPARISONS.items():
    _overloads = getattr(aten, _name)
    rule(_overloads.Tensor, _overloads.Scalar)(_comparison(_kind))


def _all_bool(node: Node) -> bool:
    """Whether the operation is one on booleans: on integers the same ones work bit by bit."""
    return all(
        x.meta["val"].dtype == torch.bool
        for x in (node, *node.args)
        if isinstance(x, Node) and isinstance(x.meta.get("val"), torch.Tensor)
    )


@rule(aten.bitwise_and.Tensor, aten.bitwise_and.Scalar, aten.logical_and.default, aten.__and__.Tensor)
def _and(node: Node, index: tuple[Index, ...]) -> Term | None:
    found = operands(node, index) if _all_bool(node) else None
    return None if found is None else Product(tuple(found))


@rule(aten.bitwise_or.Tensor, aten.bitwise_or.Scalar, aten.logical_or.default, aten.__or__.Tensor)
def _or(node: Node, index: tuple[Index, ...]) -> Term | None:
    found = operands(node, index) if _all_bool(node) else None
    return None if found is None else AnyOf(tuple(found))


@rule(aten.bitwise_not.default, aten.logical_not.default)
def _not(node: Node, index: tuple[Index, ...]) -> Term | None:
    return Not(Access(argument(node, 0), index)) if _all_bool(node) else None


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step, prims.iota.default)
def _arange(node: Node, index: tuple[Index, ...]) -> Term | None:
    if node.meta["val"].dtype not in (torch.int64, torch.int32):
        return None
    if node.target is prims.iota.default:
        start, step = node.kwargs["start"], node.kwargs["step"]
    elif node.target is aten.arange.default:
        start, step = 0, 1
    else:
        start, step = argument(node, 0), argument(node, 2, "step", 1)
    if not isinstance(step, int) or not isinstance(start, (int, Node)):
        return None
    position: Term = Position(index[0])
    if step != 1:
        position = Product((position, Scalar(step)))
    if start == 0:
        return position
    return Plus((position, Symbol(start) if isinstance(start, Node) else Scalar(start)))


@rule(
    aten.floor_divide.default,
    aten.floor_divide.Scalar,
    aten.div.Tensor_mode,
    aten.div.Scalar_mode,
    aten.__rshift__.Scalar,
    aten.bitwise_right_shift.Tensor_Scalar,
)
def _floor_divide(node: Node, index: tuple[Index, ...]) -> Term | None:
    x, divisor = operand(argument(node, 0), node, index), argument(node, 1)
    if "mode" in str(node.target) and argument(node, 2, "rounding_mode") != "floor":
        return None
    if x is None or not isinstance(divisor, int) or node.meta["val"].dtype.is_floating_point:
        return None
    if "shift" in str(node.target):
        return FloorDiv(x, 1 << divisor) if 0 <= divisor < 31 else None
    return FloorDiv(x, divisor) if divisor > 0 else None


@rule(aten.abs.default)
def _abs(node: Node, index: tuple[Index, ...]) -> Term | None:
    return Abs(Access(argument(node, 0), index))


@rule(aten.tril.default, aten.triu.default)
def _triangle(node: Node, index: tuple[Index, ...]) -> Term | None:
    x, diagonal = argument(node, 0), argument(node, 1, "diagonal", 0)
    kind = "<=" if node.target is aten.tril.default else ">="
    above = Plus((Position(index[-1]), Product((Position(index[-2]), Scalar(-1)))))
    inside = Compare(kind, above, Symbol(diagonal) if isinstance(diagonal, Node) else Scalar(diagonal))
    return Where(inside, Access(x, index), Scalar(0))
