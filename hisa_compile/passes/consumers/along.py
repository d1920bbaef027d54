"""Operations along some of a tensor's dimensions: reductions, softmax, parts, and putting together."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch.fx import Node

from ..axes import Access, Axis, fresh_index, resolved, same_size, shape_of
from ..rules import argument
from .order import Call, OrderMatters, Slots, all_dims, by_terms, consumer, follow, ops, replaced, tensors, unknown

aten = torch.ops.aten
prims = torch.ops.prims


def _reduce(call: Call, out: Node, symmetric: bool = True) -> Slots | None:
    """A reduction over the dimensions ``dim``, all of them at once."""
    x = call["self"]
    sizes, index = shape_of(x), fresh_index(shape_of(out))
    dims = all_dims(call["dim"], x)
    keepdim = len(index) == len(sizes)
    kept = [dim for d, dim in enumerate(index) if not keepdim or d not in dims]
    if len(kept) != len(sizes) - len(dims) or (keepdim and any(index[d] for d in dims)):
        raise OrderMatters
    read, others = [], iter(kept)
    for d in range(len(sizes)):
        read.append(unknown(x, d) if d in dims else next(others))
    reduced = tuple(axis for d in dims for axis in read[d])
    return follow(call, index, [Access(x, tuple(read))], reduced if symmetric else ())


@consumer(
    *ops(
        "sum sum.dim_IntList nansum mean mean.dim prod prod.dim_int amax amin max min any any.dim any.dims all "
        "all.dim all.dims logsumexp var.correction var.dim std.correction std.dim var_mean.correction "
        "linalg_vector_norm count_nonzero.dim_IntList"
    )
)
def _symmetric_reduction(call: Call, out: Node) -> Slots | None:
    return _reduce(call, out)


@consumer(aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default)
def _extremum(call: Call, out: Node) -> Slots | None:
    """The greatest value; where it is (output 1, or argmax's only one) is a position among the slots."""
    values = call.node.target in (aten.max.dim, aten.min.dim) and call.position == 0
    return _reduce(call, out, symmetric=values)


def _within(call: Call, out: Node, operands: Sequence[Node], dims: list[int], kept: bool = True) -> Slots | None:
    """An operation along ``dims`` about which nothing is known; it treats the other dimensions elementwise."""
    x = operands[0]
    index = fresh_index(shape_of(out))
    others = iter([dim for d, dim in enumerate(index) if not kept or d not in dims])
    read = tuple(unknown(x, d) if d in dims else next(others) for d in range(len(shape_of(x))))
    return follow(call, index, [Access(operand, read) for operand in operands])


@consumer(
    *ops(
        "_softmax _safe_softmax _log_softmax softmax.int log_softmax.int _softmax_backward_data "
        "_log_softmax_backward_data"
    )
)
def _softmax(call: Call, out: Node) -> Slots | None:
    """Along slots it permutes what is permuted; along anything else but the rows too."""
    index, operands = fresh_index(shape_of(out)), tensors(call)
    reads = [Access(x, index) for x in operands]
    slots, _ = call.align(reads)
    if slots in resolved(index[call["dim"]]):
        return follow(call, index, reads)
    return _within(call, out, operands, all_dims(call["dim"], out))


@consumer(*ops("slice.Tensor flip cumsum cumprod split.Tensor split_with_sizes cummax cummin"), prims.rev.default)
def _along(call: Call, out: Node) -> Slots | None:
    x = argument(call.node, 0)
    dim = call["dims"] if call["dim"] is None else call["dim"]
    if call.node.target is aten.slice.Tensor and same_size(shape_of(x)[dim], shape_of(out)[dim]) and call["step"] == 1:
        return by_terms(call, out)
    return _within(call, out, [x], all_dims(dim, x))


@consumer(aten.roll.default)
def _roll(call: Call, out: Node) -> Slots | None:
    # Without dims it rolls the flattened tensor, and no dims are all dims.
    x = call["self"]
    return _within(call, out, [x], all_dims(call["dims"], x))


@consumer(aten.select.int, aten.unbind.int)
def _select(call: Call, out: Node) -> Slots | None:
    x = call["self"]
    return _within(call, out, [x], all_dims(call["dim"], x), kept=False)


@consumer(aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)
def _sort(call: Call, out: Node) -> Slots | None:
    """Sorted slots are in an order of their own; where they came from is a position among the slots."""
    x, dim = call["self"], call["dim"]
    values = call.position == 0 and call.node.target not in (aten.argsort.default, aten.argsort.stable)
    index = fresh_index(shape_of(out))
    along = unknown(x, dim % len(index))
    read = Access(x, replaced(index, {dim % len(index): along}))
    # A position along the result is fixed, and the value there is a symmetric function of all that was sorted.
    return follow(call, index, [read], along if values else ())


@consumer(aten.constant_pad_nd.default)
def _pad(call: Call, out: Node) -> Slots | None:
    x, pads = call["self"], call["pad"]
    rank = len(shape_of(x))
    return _within(
        call, out, [x], [rank - 1 - i // 2 for i in range(0, len(pads), 2) if (pads[i], pads[i + 1]) != (0, 0)]
    )


@consumer(aten.native_layer_norm.default)
def _layer_norm(call: Call, out: Node) -> Slots | None:
    """Over the last dimensions, with weights along these."""
    x = call["input"]
    rank = len(shape_of(x))
    return _within(call, out, [x], list(range(rank - len(call["normalized_shape"]), rank)))


@consumer(aten.cat.default, aten.stack.default)
def _cat(call: Call, out: Node) -> Slots | None:
    """Elementwise in every dimension but the one that is joined, and in that too if all parts are of one size."""
    index, tensors = fresh_index(shape_of(out)), call["tensors"]
    dim = call["dim"] % len(index)
    if call.node.target is aten.stack.default:
        return follow(call, index, [Access(x, index[:dim] + index[dim + 1 :]) for x in tensors])
    sizes = [shape_of(x) for x in tensors]
    if any(len(size) != len(index) for size in sizes):  # tensors of shape [0] are skipped
        raise OrderMatters
    parts = [unknown(x, dim) for x in tensors]
    if all(same_size(size[dim], sizes[0][dim]) for size in sizes):
        parts = [parts[0]] * len(tensors)
        index = replaced(index, {dim: (Axis(sympy.Integer(len(tensors))), *parts[0])})
    return follow(
        call, index, [Access(x, replaced(index, {dim: part})) for x, part in zip(tensors, parts, strict=True)]
    )
