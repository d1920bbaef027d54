"""The table of rules, and what rules are written with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx import Node

from ..axes import Access, Index, broadcast
from ..terms import Scalar, Symbol, Term

Rule = Callable[[Node, tuple[Index, ...]], "Term | None"]
_RULES: dict[Any, Rule] = {}
# Operations that only say which element is read: an operand seen through them is the same numbers.
LAYOUT: set[Any] = set()
# Those of them that read each element at its own place.
COPIES: set[Any] = set()
# Conversions of dtype, seen through only where the caller allows it.
CASTS: set[Any] = set()


def rule(*targets: Any, kind: set[Any] | None = None) -> Callable[[Rule], Rule]:
    """Teach the analysis the operations ``targets``; ``kind`` is LAYOUT, COPIES or CASTS for those."""

    def register(function: Rule) -> Rule:
        for target in targets:
            _RULES[target] = function
        if kind is not None:
            kind.update(targets)
        if kind is COPIES:
            LAYOUT.update(targets)
        return function

    return register


def open_access(access: Access) -> Term | None:
    """What the element is made of, None for a leaf."""
    node = access.node
    if node.op == "get_attr":
        return _lifted_constant(node)
    known = _RULES.get(node.target) if node.op == "call_function" else None
    return None if known is None else known(node, access.index)


def _lifted_constant(node: Node) -> Scalar | None:
    """The number in a tensor literal of the traced code, such as ``torch.tensor(0.0)``.

    Tracing lifts literals to attributes of these names; any other attribute may be a parameter, whose value is
    not known when the graph runs.
    """
    name = str(node.target)
    value = getattr(node.graph.owning_module, name, None) if name.startswith("_tensor_constant") else None
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor) or value.numel() != 1:
        return None
    with unset_fake_temporarily():
        return Scalar(value.item())


def argument(node: Node, position: int, name: str = "", default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def dims_of(dims: int | Sequence[int], rank: int) -> list[int]:
    """Dimensions as non-negative numbers."""
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)] if rank else []


def operand(x: Any, node: Node, index: tuple[Index, ...]) -> Term | None:
    """An operand of a pointwise operation: broadcast to the result, or a number."""
    if isinstance(x, (bool, int, float)):
        return Scalar(x)
    if not isinstance(x, Node):
        return None
    value = x.meta.get("val")
    if isinstance(value, (torch.SymInt, torch.SymFloat, int, float)):
        return Symbol(x)
    if not isinstance(value, torch.Tensor):
        return None
    read = broadcast(index, node.meta["val"].shape, value.shape)
    return None if read is None else Access(x, read)


def operands(node: Node, index: tuple[Index, ...], count: int = 2) -> list[Term] | None:
    """The first ``count`` arguments of a pointwise operation; None if one of them is none of its operands."""
    found = [operand(argument(node, position), node, index) for position in range(count)]
    known = [term for term in found if term is not None]
    return known if len(known) == count else None


def pointwise(form: Callable[..., Term], count: int = 2) -> Rule:
    """A rule for an operation that is ``form`` of its operands, element by element."""

    def apply(node: Node, index: tuple[Index, ...]) -> Term | None:
        found = operands(node, index, count)
        return None if found is None else form(*found)

    return apply


def exact_for_floats(cast: Node) -> bool:
    """Whether a cast keeps what a float stands for, be it with fewer digits: not so to or from int and bool."""
    dtypes = argument(cast, 0).meta["val"].dtype, cast.meta["val"].dtype
    return all(dtype.is_floating_point for dtype in dtypes)


def rounded(value: float, dtype: torch.dtype) -> float:
    """The number as a tensor of this dtype holds it: a number too large for a float is infinite there."""
    if not dtype.is_floating_point and not math.isfinite(value):
        return math.nan
    with unset_fake_temporarily():
        return float(torch.tensor(value, dtype=torch.float64 if dtype.is_floating_point else None).to(dtype).item())


def constant(term: Term) -> float | None:
    """The number a term always is, seen through layouts, casts and fills; None if it is none."""
    dtypes: list[torch.dtype] = []
    while isinstance(term, Access):
        if term.node.target in CASTS and not exact_for_floats(term.node):
            return None
        opened = open_access(term)
        if not isinstance(opened, Access | Scalar):
            return None
        if term.node.target in CASTS or isinstance(opened, Scalar):
            dtypes.append(term.node.meta["val"].dtype)
        term = opened
    if not isinstance(term, Scalar):
        return None
    value = term.value
    for dtype in reversed(dtypes):
        value = rounded(value, dtype)
    return value
