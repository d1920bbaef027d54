"""Operations that move, repeat or cut out elements, or change their dtype."""

from __future__ import annotations

import operator

import sympy
import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..axes import (
    Access,
    Axis,
    Index,
    Shifted,
    broadcast,
    product_of_sizes,
    regroup,
    same_size,
    shape_of,
    size_expr,
)
from ..terms import Compare, Pieces, Scalar, Term
from .registry import CASTS, COPIES, LAYOUT, argument, dims_of, rule

aten = torch.ops.aten
prims = torch.ops.prims


@rule(
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    kind=COPIES,
)
def _same(node: Node, index: tuple[Index, ...]) -> Term | None:
    return Access(argument(node, 0), index)


@rule(
    prims.convert_element_type.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    kind=CASTS,
)
def _cast(node: Node, index: tuple[Index, ...]) -> Term | None:
    x = argument(node, 0)
    value, source = node.meta["val"], x.meta["val"]
    if source.device != value.device:
        return None
    if value.dtype == torch.bool != source.dtype:
        return Compare("!=", Access(x, index), Scalar(0))
    return Access(x, index)


@rule(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    kind=LAYOUT,
)
def _view(node: Node, index: tuple[Index, ...]) -> Term | None:
    x = argument(node, 0)
    read = regroup(index, shape_of(node), shape_of(x))
    return None if read is None else Access(x, read)


@rule(aten.expand.default, kind=LAYOUT)
def _expand(node: Node, index: tuple[Index, ...]) -> Term | None:
    x = argument(node, 0)
    read = broadcast(index, node.meta["val"].shape, x.meta["val"].shape)
    return None if read is None else Access(x, read)


@rule(aten.repeat.default, kind=LAYOUT)
def _repeat(node: Node, index: tuple[Index, ...]) -> Term | None:
    x, times = argument(node, 0), argument(node, 1, "repeats")
    sizes = shape_of(x)
    read: list[Index] = []
    for dim, size, count in zip(index[len(index) - len(sizes) :], sizes, times[len(times) - len(sizes) :], strict=True):
        if size == 1:
            read.append(())
        elif isinstance(count, int) and count == 1:
            read.append(dim)
        else:
            return None
    return Access(x, tuple(read))


@rule(aten.permute.default, kind=LAYOUT)
def _permute(node: Node, index: tuple[Index, ...]) -> Term | None:
    order = dims_of(argument(node, 1, "dims"), len(index))
    return Access(argument(node, 0), tuple(index[order.index(d)] for d in range(len(index))))


@rule(aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.mT.default, kind=LAYOUT)
def _transpose(node: Node, index: tuple[Index, ...]) -> Term | None:
    out = list(index)
    if node.target is aten.numpy_T.default:
        out.reverse()
    elif len(out) >= 2:
        swapped = (
            (-2, -1) if node.target is aten.mT.default else (argument(node, 1, "dim0", 0), argument(node, 2, "dim1", 1))
        )
        a, b = dims_of(swapped, len(out))
        out[a], out[b] = out[b], out[a]
    return Access(argument(node, 0), tuple(out))


@rule(aten.unsqueeze.default, kind=LAYOUT)
def _unsqueeze(node: Node, index: tuple[Index, ...]) -> Term | None:
    dim = argument(node, 1, "dim") % len(index)
    return Access(argument(node, 0), index[:dim] + index[dim + 1 :])


@rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, kind=LAYOUT)
def _squeeze(node: Node, index: tuple[Index, ...]) -> Term | None:
    x = argument(node, 0)
    sizes = shape_of(x)
    dim = argument(node, 1, "dim")
    asked = range(len(sizes)) if dim is None else dims_of(dim, len(sizes))
    gone = {d for d in asked if sizes[d] == 1}
    if len(index) + len(gone) != len(sizes):
        return None
    rest = iter(index)
    return Access(x, tuple(() if d in gone else next(rest) for d in range(len(sizes))))


# Parts of a tensor.  Not of kind LAYOUT: an operand is best read from the part that the graph has made anyway. ------


@rule(aten.slice.Tensor, aten.narrow.default)
def _slice(node: Node, index: tuple[Index, ...]) -> Term | None:
    x = argument(node, 0)
    dim = argument(node, 1, "dim", 0) % len(index)
    start, step = argument(node, 2, "start", 0), argument(node, 4, "step", 1)
    if step != 1:
        return None
    return _part(node, index, x, dim, 0 if start is None else start)


@rule(aten.select.int)
def _select(node: Node, index: tuple[Index, ...]) -> Term | None:
    x = argument(node, 0)
    dim = argument(node, 1, "dim") % (len(index) + 1)
    return _part(node, (*index[:dim], (), *index[dim:]), x, dim, argument(node, 2, "index"))


@rule(operator.getitem)
def _getitem(node: Node, index: tuple[Index, ...]) -> Term | None:
    """A part of a split or an unbind."""
    source, number = argument(node, 0), argument(node, 1)
    values = source.meta.get("val") if isinstance(source, Node) else None
    if not isinstance(values, (list, tuple)) or not isinstance(number, int):
        return None
    if source.target not in (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.chunk.default):
        return None
    x = argument(source, 0)
    number %= len(values)
    if source.target is aten.unbind.int:
        dim = argument(source, 1, "dim", 0) % (len(index) + 1)
        return _part(node, (*index[:dim], (), *index[dim:]), x, dim, number)
    dim = argument(source, 2, "dim", 0) % len(index)
    start = sum((size_expr(value.shape[dim]) for value in values[:number]), sympy.Integer(0))
    return Access(x, _at(index, dim, start, shape_of(x)[dim]))


def _part(node: Node, index: tuple[Index, ...], x: Node, dim: int, start: int | Node) -> Term | None:
    """The part of ``x`` that begins at ``start`` along ``dim``."""
    size, length = shape_of(x)[dim], product_of_sizes(index[dim])
    if same_size(size, length):
        return Access(x, index)
    first = start.meta["val"] if isinstance(start, Node) else start
    if not isinstance(first, (int, torch.SymInt)):
        return None
    # A start beyond either end is clamped when the graph runs; not so if there is something from there on.
    begin = size_expr(first)
    if statically_known_true(first < 0):
        if not (node.target is aten.select.int or same_size(length, -begin) or (size.is_Integer and begin + size >= 0)):
            return None
        begin += size
    elif not statically_known_true(first >= 0) or not (
        begin == 0 or (length.is_Integer and length > 0) or statically_known_true(first <= x.meta["val"].shape[dim])
    ):
        return None
    return Access(x, _at(index, dim, begin, size))


def _at(index: tuple[Index, ...], dim: int, start: sympy.Expr, size: sympy.Expr) -> tuple[Index, ...]:
    if same_size(size, product_of_sizes(index[dim])):
        return index
    return (*index[:dim], (Shifted(index[dim], start),), *index[dim + 1 :])


@rule(aten.cat.default)
def _cat(node: Node, index: tuple[Index, ...]) -> Term | None:
    inputs = argument(node, 0)
    dim = argument(node, 1, "dim", 0) % len(index)
    if len(inputs) == 1:
        return Access(inputs[0], index)
    along, *inside = index[dim] or (None,)
    if along is None or isinstance(along, Shifted):
        return None
    sizes = [shape_of(x)[dim] for x in inputs]
    parts: list[tuple[Index, Access]] = []
    for x, size in zip(inputs, sizes, strict=True):
        part: Index = ()
        if not inside:
            part = () if size == 1 else (Axis(size, along.name),)
        elif not same_size(size, product_of_sizes(inside)):
            # A stack, decomposed, is a cat that is viewed as one part an index; anything else is not followed.
            return None
        parts.append((part, Access(x, (*index[:dim], (*part, *inside), *index[dim + 1 :]))))
    return Pieces(along, tuple(parts))


@rule(aten.stack.default)
def _stack(node: Node, index: tuple[Index, ...]) -> Term | None:
    inputs = argument(node, 0)
    dim = argument(node, 1, "dim", 0) % len(index)
    rest = (*index[:dim], *index[dim + 1 :])
    if len(inputs) == 1:
        return Access(inputs[0], rest)
    if len(index[dim]) != 1 or isinstance(index[dim][0], Shifted):
        return None
    return Pieces(index[dim][0], tuple(((), Access(x, rest)) for x in inputs))
