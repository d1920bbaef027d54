"""Products, sums, contractions, and the numbers in them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..axes import Access, Axis, Index, broadcast, product_of_sizes, shape_of
from ..terms import Inverse, Plus, Product, Scalar, Sum, Term
from .registry import argument, constant, dims_of, operand, operands, pointwise, rule
from .relu import gated

aten = torch.ops.aten


@rule(aten.mul.Tensor, aten.mul.Scalar)
def _mul(node: Node, index: tuple[Index, ...]) -> Term | None:
    return gated(node, index) or pointwise(lambda a, b: Product((a, b)))(node, index)


@rule(aten.div.Tensor, aten.div.Scalar)
def _div(node: Node, index: tuple[Index, ...]) -> Term | None:
    found = operands(node, index)
    if found is None:
        return None
    x, by = found
    divisor = constant(by)
    if divisor is None:
        return Product((x, Inverse(by)))
    return Product((x, Scalar(1.0 / divisor))) if divisor else None


@rule(aten.reciprocal.default)
def _reciprocal(node: Node, index: tuple[Index, ...]) -> Term | None:
    return Inverse(Access(argument(node, 0), index))


@rule(aten.neg.default)
def _neg(node: Node, index: tuple[Index, ...]) -> Term | None:
    return Product((Access(argument(node, 0), index), Scalar(-1.0)))


@rule(aten.add.Tensor, aten.add.Scalar)
def _add(node: Node, index: tuple[Index, ...]) -> Term | None:
    return _plus(node, index, argument(node, 2, "alpha", 1))


@rule(aten.sub.Tensor, aten.sub.Scalar)
def _sub(node: Node, index: tuple[Index, ...]) -> Term | None:
    alpha = argument(node, 2, "alpha", 1)
    return _plus(node, index, -alpha) if isinstance(alpha, (int, float)) else None


def _plus(node: Node, index: tuple[Index, ...], factor: Any) -> Term | None:
    found = operands(node, index)
    if found is None or not isinstance(factor, (int, float)):
        return None
    return Plus((found[0], _times(factor, found[1])))


def _times(factor: float, term: Term) -> Term:
    if factor == 1:
        return term
    return Scalar(factor * term.value) if isinstance(term, Scalar) else Product((term, Scalar(factor)))


@rule(aten.rsub.Tensor, aten.rsub.Scalar)
def _rsub(node: Node, index: tuple[Index, ...]) -> Term | None:
    found = operands(node, index)
    alpha = argument(node, 2, "alpha", 1)
    return None if found is None or alpha != 1 else Plus((found[1], _times(-1, found[0])))


@rule(aten.addcmul.default)
def _addcmul(node: Node, index: tuple[Index, ...]) -> Term | None:
    found = operands(node, index, 3)
    value = argument(node, 3, "value", 1)
    if found is None or not isinstance(value, (int, float)):
        return None
    return Plus((found[0], _times(value, Product((found[1], found[2])))))


@rule(aten.sum.dim_IntList, aten.sum.default)
def _sum(node: Node, index: tuple[Index, ...]) -> Term | None:
    x = argument(node, 0)
    sizes = shape_of(x)
    asked = argument(node, 1, "dim")
    summed = set(range(len(sizes)) if asked is None or asked == [] else dims_of(asked, len(sizes)))
    kept = iter([i for d, i in enumerate(index) if d not in summed] if argument(node, 2, "keepdim", False) else index)
    axes: list[Axis] = []
    read: list[Index] = []
    for d, size in enumerate(sizes):
        if d not in summed:
            read.append(next(kept))
        elif size == 1:
            read.append(())
        else:
            axes.append(Axis(size, "r"))
            read.append((axes[-1],))
    return Sum(tuple(axes), Access(x, tuple(read)))


def _contraction(
    a: Node,
    b: Node,
    batch_a: tuple[Index, ...],
    batch_b: tuple[Index, ...],
    row: tuple[Index, ...],
    column: tuple[Index, ...],
) -> Term:
    """sum_c a[batch, row, c] * b[batch, c, column]; row and column are empty for vectors."""
    size = shape_of(a)[-1]
    axis: Index = () if size == 1 else (Axis(size, "c"),)
    return Sum(axis, Product((Access(a, (*batch_a, *row, axis)), Access(b, (*batch_b, axis, *column)))))


@rule(aten.mean.dim, aten.mean.default)
def _mean(node: Node, index: tuple[Index, ...]) -> Term | None:
    total = _sum(node, index)
    assert isinstance(total, Sum)
    count = product_of_sizes(total.axes)
    return Product((total, Scalar(1.0 / int(count)))) if count.is_Integer else None


@rule(aten.bmm.default, aten.mm.default, aten.mv.default, aten.dot.default, aten.matmul.default)
def _matmul(node: Node, index: tuple[Index, ...]) -> Term | None:
    a, b = argument(node, 0), argument(node, 1)
    sizes_a, sizes_b, sizes = (x.meta["val"].shape for x in (a, b, node))
    columns = 0 if len(sizes_b) == 1 else 1
    rows = 0 if len(sizes_a) == 1 else 1
    batch = len(index) - rows - columns
    batch_a = broadcast(index[:batch], sizes[:batch], sizes_a[:-2])
    batch_b = broadcast(index[:batch], sizes[:batch], sizes_b[:-2])
    if batch_a is None or batch_b is None:
        return None
    return _contraction(a, b, batch_a, batch_b, index[batch : batch + rows], index[batch + rows :])


@rule(aten.baddbmm.default, aten.addmm.default)
def _add_matmul(node: Node, index: tuple[Index, ...]) -> Term | None:
    addend, a, b = (argument(node, i) for i in range(3))
    added = operand(addend, node, index)
    if added is None:
        return None
    product = _contraction(a, b, index[:-2], index[:-2], index[-2:-1], index[-1:])
    beta, alpha = argument(node, 3, "beta", 1), argument(node, 4, "alpha", 1)
    if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)):
        return None
    # With beta = 0 the addend is not read at all.
    return Plus((_times(beta, added), _times(alpha, product))) if beta else _times(alpha, product)


@rule(aten.addmv.default)
def _addmv(node: Node, index: tuple[Index, ...]) -> Term | None:
    addend, a, b = (argument(node, i) for i in range(3))
    added = operand(addend, node, index)
    if added is None or node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return None
    return Plus((added, _contraction(a, b, (), (), index, ())))


@rule(aten.linear.default)
def _linear(node: Node, index: tuple[Index, ...]) -> Term | None:
    x, weight, bias = argument(node, 0), argument(node, 1), argument(node, 2, "bias")
    if len(shape_of(weight)) != 2:
        return None
    size = shape_of(x)[-1]
    axis: Index = () if size == 1 else (Axis(size, "c"),)
    product = Sum(axis, Product((Access(x, (*index[:-1], axis)), Access(weight, (index[-1], axis)))))
    if bias is None:
        return product
    added = operand(bias, node, index)
    return None if added is None else Plus((product, added))


@rule(aten.einsum.default)
def _einsum(node: Node, index: tuple[Index, ...]) -> Term | None:
    equation, operands = argument(node, 0), argument(node, 1)
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow or "." in equation or len(output) != len(index):
        return None
    label: dict[str, Index] = dict(zip(output, index, strict=True))
    summed: list[Axis] = []
    factors: list[Term] = []
    for letters, x in zip(inputs.split(","), operands, strict=True):
        sizes = shape_of(x)
        if len(set(letters)) != len(letters) or len(letters) != len(sizes):
            return None
        read: list[Index] = []
        for letter, size in zip(letters, sizes, strict=True):
            if size == 1:
                read.append(())
                continue
            if letter not in label:
                summed.append(Axis(size, letter))
                label[letter] = (summed[-1],)
            read.append(label[letter])
        factors.append(Access(x, tuple(read)))
    body = factors[0] if len(factors) == 1 else Product(tuple(factors))
    return Sum(tuple(summed), body) if summed else body


# Constants ----------------------------------------------------------------------------------------------------


@rule(aten.full.default, aten.full_like.default, aten.new_full.default)
def _full(node: Node, index: tuple[Index, ...]) -> Term | None:
    value = argument(node, 2) if node.target is aten.new_full.default else argument(node, 1)
    return _number(node, value)


@rule(aten.scalar_tensor.default)
def _scalar_tensor(node: Node, index: tuple[Index, ...]) -> Term | None:
    return _number(node, argument(node, 0))


def _number(node: Node, value: Any) -> Scalar | None:
    """The number that fills a tensor; a float in an int or bool tensor may become another one."""
    dtype = node.meta["val"].dtype
    if not isinstance(value, (bool, int, float)) or (isinstance(value, float) and not dtype.is_floating_point):
        return None
    return Scalar(bool(value) if dtype == torch.bool else value)


@rule(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def _zeros(node: Node, index: tuple[Index, ...]) -> Term | None:
    return Scalar(0)


@rule(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(node: Node, index: tuple[Index, ...]) -> Term | None:
    return Scalar(1)
