"""ReLU in its spellings, and choices by a condition, one of which is a ReLU.

They are equal to relu for finite numbers: what each makes of NaN and infinity differs.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from ..axes import Access, Index
from ..terms import Compare, Not, Relu, Term, Where
from .registry import CASTS, LAYOUT, argument, constant, open_access, operands, rule

aten = torch.ops.aten


@rule(aten.relu.default)
def _relu(node: Node, index: tuple[Index, ...]) -> Term | None:
    return Relu(Access(argument(node, 0), index))


@rule(aten.clamp.default, aten.clamp_min.default, aten.hardtanh.default)
def _clamp(node: Node, index: tuple[Index, ...]) -> Term | None:
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    if node.target is aten.hardtanh.default:
        low, high = argument(node, 1, "min_val", -1), argument(node, 2, "max_val", 1)
    return Relu(Access(argument(node, 0), index)) if low == 0 and high in (None, math.inf) else None


@rule(aten.clamp_max.default)
def _clamp_max(node: Node, index: tuple[Index, ...]) -> Term | None:
    # What is left of clamp(min, inf).
    return Access(argument(node, 0), index) if argument(node, 1) == math.inf else None


@rule(aten.maximum.default, aten.max.other, aten.clamp_min.Tensor)
def _maximum(node: Node, index: tuple[Index, ...]) -> Term | None:
    found = operands(node, index)
    if found is None:
        return None
    a, b = found
    return Relu(a) if constant(b) == 0 else Relu(b) if constant(a) == 0 else None


@rule(aten.threshold.default)
def _threshold(node: Node, index: tuple[Index, ...]) -> Term | None:
    return Relu(Access(argument(node, 0), index)) if (argument(node, 1), argument(node, 2)) == (0, 0) else None


def _sign_test(condition: Term | None) -> tuple[Term, bool] | None:
    """(x, True) for x > 0, (x, False) for x < 0.  x >= 0 gates as x > 0: at x = 0 both branches are 0."""
    positive = True
    while condition is not None:
        match condition:
            case Not(body):
                condition, positive = body, not positive
            case Compare(kind, left, right) if kind in ("<", "<=", ">", ">="):
                if constant(right) == 0:
                    return left, (kind in (">", ">=")) == positive
                return (right, (kind in ("<", "<=")) == positive) if constant(left) == 0 else None
            case Access(node) if node.target in LAYOUT | CASTS or node.meta["val"].dtype == torch.bool:
                condition = open_access(condition)
            case _:
                return None
    return None


def _is(x: Term, other: Term) -> bool:
    return isinstance(x, Access) and isinstance(other, Access) and x.same_element(other)


def gated(node: Node, index: tuple[Index, ...]) -> Term | None:
    """x * (x > 0)."""
    found = operands(node, index)
    if found is None:
        return None
    for x, gate in (found, reversed(found)):
        if isinstance(gate, Access) and _is_boolean(gate):
            test = _sign_test(gate)
            if test is not None and test[1] and _is(x, test[0]):
                return Relu(x)
    return None


def _is_boolean(gate: Access) -> bool:
    """Whether it is a bool, or one cast to a number: worth looking at."""
    node = gate.node
    while node.target in LAYOUT | CASTS:
        node = argument(node, 0)
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype == torch.bool


@rule(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def _where(node: Node, index: tuple[Index, ...]) -> Term | None:
    found = operands(node, index, 3)
    return None if found is None else _choice(*found)


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(node: Node, index: tuple[Index, ...]) -> Term | None:
    found = operands(node, index, 3)
    if found is None:
        return None
    x, condition, value = found
    return _choice(condition, value, x)


def _choice(condition: Term, then: Term, otherwise: Term) -> Term:
    for kept, zero, positive in ((then, otherwise, True), (otherwise, then, False)):
        if constant(zero) == 0:
            test = _sign_test(condition)
            if test is not None and test[1] == positive and _is(kept, test[0]):
                return Relu(kept)
    return Where(condition, then, otherwise)
