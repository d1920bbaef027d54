"""Putting what :mod:`.visibility` found into a graph, as the operator's arguments."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from .axes import Access, Index, Shifted, product_of_sizes
from .emit import Emitter
from .terms import AnyOf, Clamped, Compare, FloorDiv, Not, Plus, Position, Product, Scalar, Symbol, Term, Where, leaves
from .visibility import Condition, Vectors

aten = torch.ops.aten

_COMPARISONS = {"<": aten.lt, "<=": aten.le, "==": aten.eq, "!=": aten.ne, ">=": aten.ge, ">": aten.gt}
# What the operator's windows are made of; a bound is brought into its range before it is cast.
_LOWEST, _HIGHEST = -(2**31), 2**31 - 2
# Times this is where a bound is cut off that multiples of positions are compared with.
_WIDE = 2**20

Value = Node | int | float


def visibility_arguments(
    emit: Emitter, vectors: Vectors, batch: Index, queries: Index, keys: Index, device: torch.device
) -> dict[str, Node]:
    """The keyword arguments of ``hisa::indexer_topk`` that say which tokens are visible."""
    values = _Values(emit, device)
    arguments: dict[str, Node] = {}
    masks = list(vectors.masks)
    rows, tokens = (batch, queries), (batch, keys)

    def bound(found: Sequence[Node], tightest: Callable[..., Any]) -> Node:
        tensor = found[0]
        for other in found[1:]:
            tensor = emit.call(tightest, tensor, other)
        return emit.cast(tensor, torch.int32)

    def past(term: Term) -> Node:
        """One position after the last one that is visible."""
        if isinstance(term, Clamped) and isinstance(term.body, Plus) and term.body.terms[-1] == Scalar(-1):
            return values.tensor(Clamped(Plus(term.body.terms[:-1])), rows)
        if isinstance(term, Scalar):
            return values.tensor(Scalar(term.value + 1), rows)
        number = term.terms[-1] if isinstance(term, Plus) else None
        if isinstance(term, Plus) and isinstance(number, Scalar):
            others = term.terms[:-1]
            return values.tensor(Plus(others if number.value == -1 else (*others, Scalar(number.value + 1))), rows)
        return emit.call(aten.add.Tensor, values.tensor(term, rows), 1)

    def per_key(x: Node) -> Node:
        return emit.expanded(x, [product_of_sizes(dim) for dim in tokens])

    if vectors.first:
        arguments["window_start"] = bound([values.tensor(term, rows) for term in vectors.first], aten.maximum.default)
    if vectors.last:
        arguments["window_end"] = bound([past(term) for term in vectors.last], aten.minimum.default)
    if vectors.segments:
        (query, key), *more = vectors.segments
        arguments["q_segment"] = values.tensor(query, rows)
        arguments["k_segment"] = per_key(values.tensor(key, tokens))
        # The operator compares one pair of ids; others are a mask.
        masks += [Condition(Compare("==", *pair), True) for pair in more if pair != (query, key)]
    if vectors.valid:
        arguments["key_valid"] = per_key(values.all_of(vectors.valid, tokens))
    if masks:
        arguments["mask"] = values.all_of(masks, (*rows, keys))
    return arguments


class _Values:
    """Nodes that compute terms, with one dimension for each of ``dims``; of size 1 where a term does not vary."""

    def __init__(self, emit: Emitter, device: torch.device) -> None:
        self.emit = emit
        self.device = device

    def all_of(self, conditions: Sequence[Condition], dims: Sequence[Index]) -> Node:
        result: Node | None = None
        for condition in conditions:
            value = self.boolean(condition.term, dims)
            if not condition.visible_when:
                value = self.emit.call(aten.bitwise_not.default, value)
            result = value if result is None else self.emit.call(aten.bitwise_and.Tensor, result, value)
        assert result is not None
        return result

    def tensor(self, term: Term, dims: Sequence[Index]) -> Node:
        """int64."""
        value = self.value(term, dims)
        if isinstance(value, Node) and isinstance(value.meta["val"], torch.Tensor):
            return self.emit.cast(value, torch.int64)
        ones = [1] * len(dims)
        return self.emit.call(aten.full.default, ones, value, dtype=torch.int64, device=self.device, pin_memory=False)

    def boolean(self, term: Term, dims: Sequence[Index]) -> Node:
        match term:
            case Not(body):
                return self.emit.call(aten.bitwise_not.default, self.boolean(body, dims))
            case Product(parts):
                return self.fold(aten.bitwise_and.Tensor, [self.boolean(part, dims) for part in parts])
            case AnyOf(parts):
                return self.fold(aten.bitwise_or.Tensor, [self.boolean(part, dims) for part in parts])
            case Where(condition, then, otherwise):
                return self.emit.call(aten.where.self, *(self.boolean(x, dims) for x in (condition, then, otherwise)))
            case Compare(kind, left, right):
                return self.emit.call(_COMPARISONS[kind].Tensor, self.tensor(left, dims), self.tensor(right, dims))
            case Access():
                return self.emit.cast(self.emit.arrange(term, dims, keep_missing=True), torch.bool)
        return self.emit.cast(self.tensor(term, dims), torch.bool)

    def fold(self, target: Callable[..., Any], nodes: Sequence[Node]) -> Node:
        result = nodes[0]
        for node in nodes[1:]:
            result = self.emit.call(target, result, node)
        return result

    def value(self, term: Term, dims: Sequence[Index]) -> Value:
        emit = self.emit
        match term:
            case Scalar(value):
                return int(value)
            case Symbol(node):
                return node
            case Access():
                # In int64 before anything is computed with it.
                return emit.cast(self.on_device(emit.arrange(term, dims, keep_missing=True)), torch.int64)
            case Position(index):
                inner = index[0] if len(index) == 1 else None
                start = inner.start if isinstance(inner, Shifted) else sympy.Integer(0)
                length = emit.size(start + product_of_sizes(index))
                count = emit.call(aten.arange.default, length, dtype=torch.int64, device=self.device, pin_memory=False)
                return emit.arrange(Access(count, (index,)), dims, keep_missing=True)
            case Plus(parts):
                return self.arithmetic(aten.add.Tensor, operator.add, parts, dims)
            case Product(parts):
                return self.arithmetic(aten.mul.Tensor, operator.mul, parts, dims)
            case FloorDiv(body, divisor):
                x = self.value(body, dims)
                if isinstance(x, Node) and isinstance(x.meta["val"], torch.Tensor):
                    return emit.call(aten.div.Tensor_mode, x, divisor, rounding_mode="floor")
                return x // divisor if not isinstance(x, Node) else emit.call(operator.floordiv, x, divisor)
            case Clamped(body, wide):
                if wide and not _is_int64(body):
                    return self.value(body, dims)
                # As Inductor's decompositions leave a clamp, which have already run.
                reach = _WIDE if wide else 1
                low = emit.call(aten.clamp_min.default, self.tensor(body, dims), _LOWEST * reach)
                return emit.call(aten.clamp_max.default, low, _HIGHEST * reach)
            case Where(condition, then, otherwise):
                branches = (self.tensor(x, dims) for x in (then, otherwise))
                return emit.call(aten.where.self, self.boolean(condition, dims), *branches)
            case Not() | Compare() | AnyOf():
                return emit.cast(self.boolean(term, dims), torch.int64)
        # No rule makes such a condition today; one that does is told so, and its site is left alone and reported.
        raise NotImplementedError(f"no vector is computed for {type(term).__name__} in a mask")

    def arithmetic(
        self,
        on_tensors: Callable[..., Any],
        on_numbers: Callable[..., Any],
        parts: Sequence[Term],
        dims: Sequence[Index],
    ) -> Value:
        total: Value | None = None
        for part in parts:
            value = self.value(part, dims)
            if total is None:
                total = value
                continue
            a, b = (total, value) if _is_tensor(total) or not _is_tensor(value) else (value, total)
            if _is_tensor(a):
                total = self.emit.call(on_tensors, a, b)
            elif isinstance(a, Node) or isinstance(b, Node):
                total = self.emit.call(on_numbers, a, b)
            else:
                total = on_numbers(a, b)
        assert total is not None
        return total

    def on_device(self, x: Node) -> Node:
        """A number that lives on the CPU is brought over; other operands are on the score's device already."""
        if x.meta["val"].device == self.device:
            return x
        return self.emit.call(torch.ops.prims.device_put.default, x, self.device)


def _is_int64(term: Term) -> bool:
    """Whether the term reads numbers that may be anything."""
    found = [leaf.node.meta["val"] for leaf in leaves(term) if isinstance(leaf, Access)]
    return any(isinstance(value, torch.Tensor) and value.dtype == torch.int64 for value in found)


def _is_tensor(x: Value) -> bool:
    return isinstance(x, Node) and isinstance(x.meta["val"], torch.Tensor)
