"""Whether anybody can tell in which order a selection's k entries come.

The question: were the entries of every row permuted, each row by a permutation of its own, would an observable
result change?  It is followed forward from the selection's outputs.  A tensor that is reached is described by what
its dimensions are made of (:class:`Slots`): the axis of the slots, the axes of the rows, whatever else.  The claim
about it is always

    with the entries permuted, element (rows, slot, other) is what was element (rows, p[rows](slot), other)

for the one unknown p.  An operation keeps the claim if it treats the slots alike: all operands that have slots have
them at the same place, for the same rows, and no other operand varies along them.  It ends the claim, for good, if
it reduces over the slots by something symmetric, or scatters by the indices.  Anything else may tell the order.

To teach the analysis an operation, add a function to the file of its family (along, indexed; here what treats all
positions alike)::

    @consumer(aten.some_operation.default)
    def _some_operation(call, out):
        ...

It returns what :func:`follow` says of the elements that it reads, or None for a result that no longer depends on
the order, or raises :class:`OrderMatters`.  Results that differ by the order of a floating-point sum, or by which
of several equal numbers comes first in a sort, count as equal.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from ..axes import (
    Access,
    Axis,
    Index,
    Shifted,
    Size,
    broadcast,
    fresh_index,
    quotient,
    resolved,
    same_size,
    shape_of,
)
from ..rules import CASTS, LAYOUT, argument, open_access
from ..terms import Not, Plus, Product, Relu, Scalar, Sum, Term, Where

aten = torch.ops.aten
prims = torch.ops.prims


class OrderMatters(Exception):
    """The operation may tell the order, for all that is known here."""


@dataclass(frozen=True)
class Slots:
    """A tensor that holds one entry a slot.

    dims: what each dimension is made of; the axis of the slots and every axis of the rows occur once.
    distinct: these are the selection's indices, different from each other in every row.
    """

    dims: tuple[Index, ...]
    distinct: bool = False


@dataclass(frozen=True)
class Call:
    """One result of an operation that reads tensors with slots: of ``node``, its output ``position``."""

    order: _Order
    node: Node
    position: int = 0

    def __getitem__(self, name: str) -> Any:
        """The argument of this name in the operation's schema, None if it has none."""
        for position, spec in enumerate(self.node.target._schema.arguments):  # type: ignore[union-attr]
            if spec.name == name:
                return argument(self.node, position, name, spec.default_value)
        return None

    def has_slots(self, x: Any) -> bool:
        return isinstance(x, Node) and self.order.slots_of.get(x) is not None

    def align(self, reads: Sequence[Access]) -> tuple[Axis, dict[Axis, Axis]]:
        return self.order.align(self.node, reads)


Consumer: TypeAlias = "Callable[[Call, Node], Slots | None]"
_CONSUMERS: dict[Any, Consumer] = {}


# Those that know what an in-place variant of theirs does.
_WRITERS: set[Any] = set()


def consumer(*targets: Any, writes: bool = False) -> Callable[[Consumer], Consumer]:
    def register(function: Consumer) -> Consumer:
        _CONSUMERS.update(dict.fromkeys(targets, function))
        if writes:
            _WRITERS.update(targets)
        return function

    return register


def ops(names: str) -> tuple[Any, ...]:
    """ATen operators by name, "sum" for sum.default; without those that this version of PyTorch does not have."""
    found = []
    for name in names.split():
        packet, _, overload = name.partition(".")
        found.append(getattr(getattr(aten, packet, None), overload or "default", None))
    return tuple(op for op in found if op is not None)


def order_matters(values: Sequence[Node], indices: Sequence[Node], dim: int) -> Node | None:
    """The first node, in graph order, that may tell the order of a selection's entries; None if provably none does.

    values, indices: the nodes that take the selection's outputs, all of one shape; the indices of a row are
    different from each other.  dim: the dimension that the slots are along.
    """
    return _Order(values, indices, dim).first_that_may_tell() if values or indices else None


class _Order:
    def __init__(self, values: Sequence[Node], indices: Sequence[Node], dim: int) -> None:
        self.outputs = outputs = [*values, *indices]
        sizes = shape_of(outputs[0])
        index = fresh_index(sizes)
        self.slots = index[dim]
        self.rows = tuple(axis for d, axes in enumerate(index) if d != dim % len(sizes) for axis in axes)
        # Every node that was reached: None if it does not depend on the order.  A node with several results is not
        # described itself, its getitems are.
        self.slots_of: dict[Node, Slots | None] = {x: Slots(index, distinct=x in indices) for x in outputs}
        self._functional: bool | None = None

    def first_that_may_tell(self) -> Node | None:
        if not self.slots:  # one slot has one order
            return None
        waiting = {user for x in self.outputs for user in x.users}
        node = min(self.outputs)
        while waiting:
            node = node.next
            if node not in waiting:
                continue
            waiting.remove(node)
            if node.target is operator.getitem and not node.users:
                continue  # tracing unpacks every result
            try:
                after = self.after(node)
            except OrderMatters:
                return node
            self.slots_of[node] = after
            if after is not None or _has_several_results(node):
                waiting.update(node.users)
        return None

    def after(self, node: Node) -> Slots | None:
        """What is known of the node's result, given what is known of its operands."""
        made_by = node.args[0] if node.target is operator.getitem else node
        target = made_by.target if isinstance(made_by, Node) else None
        if not isinstance(made_by, Node) or not isinstance(target, torch._ops.OpOverload):
            raise OrderMatters  # the graph's output, a higher-order operator, ...
        if any(x in self.slots_of and _has_several_results(x) for x in made_by.all_input_nodes):
            raise OrderMatters  # results that are used all together
        if _has_several_results(node):
            return None  # each result will be asked for
        known = _CONSUMERS.get(target)
        if known is None and torch.Tag.pointwise in target.tags:
            known = _pointwise
        if target._schema.is_mutable and target not in _WRITERS:
            raise OrderMatters
        position = argument(node, 1) if made_by is not node else 0
        after = (known or by_terms)(Call(self, made_by, position), node)
        if target._schema.is_mutable and after is not None:
            # What shares memory with the tensor that was written to now holds slots, unseen.
            raise OrderMatters
        return after

    # Which axis of an operation is which ------------------------------------------------------------------------

    def align(self, node: Node, reads: Sequence[Access]) -> tuple[Axis, dict[Axis, Axis]]:
        """Which axis of an operation is the slots, and all that are slots or rows with what they are, given the
        elements that it reads.

        Fails unless the operands with slots agree, and the others do not vary along the slots.
        """
        with_slots = [(read, slots) for read in reads if (slots := self.slots_of.get(read.node)) is not None]
        if not {x for x in node.all_input_nodes if self.slots_of.get(x)} <= {read.node for read, _ in with_slots}:
            raise OrderMatters  # not read in a way that is known
        while True:
            found: dict[Axis, Axis] = {}
            cuts = [
                self.match(axes, dim, found)
                for read, slots in with_slots
                for axes, dim in zip(read.index, slots.dims, strict=True)
            ]
            # A cut axis is another name for what was matched before it: once more, until none is cut.
            if not any(cuts):
                break
        if len(set(found.values())) != len(found):  # one operand has its slots here, another one there
            raise OrderMatters
        at = next(axis for axis, tracked in found.items() if tracked in self.slots)
        if any(self.slots_of.get(read.node) is None and self.varies(read, at) for read in reads):
            raise OrderMatters
        return at, found

    def match(self, axes: Index, dim: Index, found: dict[Axis, Axis]) -> bool:
        """Note which of ``axes``, those that address a dimension, are slots or rows; whether one had to be cut."""
        ours, theirs = list(resolved(axes))[::-1], list(resolved(dim))[::-1]
        cut = False
        if any(isinstance(axis, Shifted) for axis in ours):  # a part of the dimension, at an offset
            if not {*self.slots, *resolved(self.rows)}.isdisjoint(theirs):
                raise OrderMatters
            return False
        while ours and theirs:
            a, b = ours.pop(), theirs.pop()
            if not same_size(a.size, b.size):
                cut = True
                if (inner := quotient(a.size, b.size)) is not None:
                    a, rest = a.split(b.size, inner)
                    ours.append(rest)
                elif b not in self.slots and (inner := quotient(b.size, a.size)) is not None:
                    b, rest = b.split(a.size, inner)
                    theirs.append(rest)
                else:
                    raise OrderMatters
            if b in (*self.slots, *resolved(self.rows)) and found.setdefault(a, b) is not b:
                raise OrderMatters
        if ours or theirs:
            raise OrderMatters
        return cut

    def varies(self, read: Access, axis: Axis) -> bool:
        """Whether an operand that does not depend on the order may vary along an axis.

        It is looked at through layouts, as broadcasting is often written out, down to a tensor of one number.
        """
        if any(isinstance(a, Shifted) for dim in read.index for a in resolved(dim)):
            return read.depends_on((axis,))
        # Views cut axes: they get copies.
        copies = {a: Axis(a.size) for a in read.axes}
        read = Access(read.node, tuple(tuple(copies[a] for a in resolved(dim)) for dim in read.index))
        at = (copies[axis],) if axis in copies else ()
        while at and read.depends_on(at):
            if read.node.target in _ONE_NUMBER and (self.functional or all(map(_only_reads, read.node.users))):
                return False
            opened = open_access(read) if self.functional and read.node.target in LAYOUT | CASTS else None
            if not isinstance(opened, Access):
                return True
            read = opened
        return False

    @property
    def functional(self) -> bool:
        """Whether no tensor is written to after it was made, other than the graph's inputs."""
        if self._functional is None:
            self._functional = not any(map(_writes_to_an_intermediate, self.outputs[0].graph.nodes))
        return self._functional


def _only_reads(node: Node) -> bool:
    """Whether an operation certainly neither writes to its operands nor shares their memory."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.pointwise in target.tags
        and not target._schema.is_mutable
    )


def _writes_to_an_intermediate(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return False
    first, *others = node.target._schema.arguments
    if any(spec.alias_info is not None and spec.alias_info.is_write for spec in others):
        return True
    written = argument(node, 0, first.name)
    return not isinstance(written, Node) or written.op != "placeholder"


def _has_several_results(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (tuple, list))


def follow(
    call: Call, index: tuple[Index, ...], reads: Sequence[Access], reduced: Index = (), nested: bool = False
) -> Slots | None:
    """The result of an operation whose element ``index`` is made of the elements ``reads``.

    reduced: axes of the reads that the operation is a symmetric function of all at once, as a sum is; with
    ``nested`` it is so for each of them alone, with the others fixed or reduced before.
    Axes that are neither in the index nor reduced are unknown positions: they may not be slots or rows.
    """
    slots, found = call.align(reads)
    result, gone = resolved(tuple(axis for dim in index for axis in dim)), resolved(reduced)
    rows = [axis for axis in found if axis is not slots]
    if slots in result and all(row in result for row in rows):
        return Slots(tuple(tuple(found.get(axis, axis) for axis in resolved(dim)) for dim in index))
    if slots in gone and all(row in result or (row in gone and not nested) for row in rows):
        return None
    raise OrderMatters


def tensors(call: Call) -> list[Node]:
    return [x for x in call.node.all_input_nodes if isinstance(x.meta.get("val"), torch.Tensor)]


def read_broadcast(x: Node, index: Sequence[Index], sizes: Sequence[Size]) -> Access:
    read = broadcast(index, sizes, x.meta["val"].shape)
    if read is None:
        raise OrderMatters
    return Access(x, read)


def replaced(index: tuple[Index, ...], new: dict[int, Index]) -> tuple[Index, ...]:
    return tuple(new.get(d, dim) for d, dim in enumerate(index))


def unknown(x: Node, dim: int) -> Index:
    """A position along a dimension that is not a function of the result's position, or not a known one."""
    return fresh_index(shape_of(x)[dim : dim + 1])[0]


def all_dims(dims: Any, x: Node) -> list[int]:
    """Dimensions as numbers from 0; none given means all."""
    rank = len(shape_of(x))
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(rank))
    return sorted(d % rank for d in ([dims] if isinstance(dims, int) else dims)) if rank else []


# Operations that treat all positions alike ------------------------------------------------------------------------


def by_terms(call: Call, out: Node) -> Slots | None:
    """Layouts, contractions, sums: what the rules of the score know of."""
    index = fresh_index(shape_of(out))
    term = open_access(Access(out, index))
    if term is None:
        raise OrderMatters
    after = follow(call, index, *_leaves(term))
    if after is not None and out.target in LAYOUT | CASTS:
        return Slots(after.dims, _keeps_indices(call, out))
    return after


def _keeps_indices(call: Call, out: Node) -> bool:
    slots = call.order.slots_of[call.node.all_input_nodes[0]]
    return slots is not None and slots.distinct and out.meta["val"].dtype in (torch.int32, torch.int64)


def _leaves(term: Term) -> tuple[list[Access], Index]:
    """The elements a term is made of, and the axes that it sums over."""
    match term:
        case Access():
            return [term], ()
        case Scalar():
            return [], ()
        case Product(parts) | Plus(parts):
            found = [_leaves(part) for part in parts]
        case Sum(axes, body):
            reads, reduced = _leaves(body)
            return reads, (*axes, *reduced)
        case Where(condition, then, otherwise):
            found = [_leaves(part) for part in (condition, then, otherwise)]
        case Relu(body) | Not(body):
            found = [_leaves(body)]
        case _:
            raise OrderMatters
    return [read for reads, _ in found for read in reads], tuple(axis for _, axes in found for axis in axes)


# Pointwise, though not tagged so.
@consumer(
    *ops(
        "_to_copy to.dtype masked_fill.Tensor where.ScalarSelf where.ScalarOther where.Scalar floor_divide rsub.Tensor"
    ),
    prims.device_put.default,
)
def _pointwise(call: Call, out: Node) -> Slots | None:
    index = fresh_index(shape_of(out))
    after = follow(call, index, [read_broadcast(x, index, out.meta["val"].shape) for x in tensors(call)])
    is_copy = call.node.target in LAYOUT | CASTS | {aten.to.dtype, prims.device_put.default}
    return Slots(after.dims, is_copy and _keeps_indices(call, out)) if after is not None else None


# Tensors that hold one number throughout.
_ONE_NUMBER = ops(
    "full ones zeros new_full new_ones new_zeros full_like ones_like zeros_like scalar_tensor fill.Scalar"
)


@consumer(
    *ops("new_full new_ones new_zeros full_like ones_like zeros_like fill.Scalar new_empty empty_like"),
    *ops("sym_size.int sym_size sym_numel sym_stride.int sym_stride _assert_tensor_metadata"),
)
def _shape_only(call: Call, out: Node) -> Slots | None:
    """The operand's shape and dtype are read, its numbers are not."""
    return None


@consumer(aten.view_as_complex.default)
def _view_as_complex(call: Call, out: Node) -> Slots | None:
    index, x = fresh_index(shape_of(out)), call["self"]
    return follow(call, index, [Access(x, (*index, unknown(x, -1 % len(shape_of(x)))))])


@consumer(aten.view_as_real.default)
def _view_as_real(call: Call, out: Node) -> Slots | None:
    index = fresh_index(shape_of(out))
    return follow(call, index, [Access(call["self"], index[:-1])])
