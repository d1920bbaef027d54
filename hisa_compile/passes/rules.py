"""One rule an operation: what an element of its result is, in terms of elements of its inputs.

To teach the analysis an operation, add a function here::

    @rule(aten.permute.default)
    def _permute(node, index):
        x, order = argument(node, 0), argument(node, 1)
        ...
        return Access(x, ...)

``index`` addresses the element of ``node``'s tensor that is asked for.  A rule returns None where it can't tell;
a node without a rule is a leaf, whatever it computes.  Rules see operations both before and after Inductor's
decompositions.  Casts between float dtypes are not a form of their own: the caller looks at the dtypes of the
nodes that it opens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx import Node

from .axes import Access, Axis, Index, broadcast, regroup, same_size, shape_of
from .terms import Not, Plus, Product, Relu, Scalar, Sum, Term, Where

aten = torch.ops.aten
prims = torch.ops.prims

Rule = Callable[[Node, tuple[Index, ...]], "Term | None"]
_RULES: dict[Any, Rule] = {}
# Operations that only say which element is read: an operand seen through them is the same numbers.
LAYOUT: set[Any] = set()
# Conversions of dtype, seen through only where the caller allows it.
CASTS: set[Any] = set()


def rule(*targets: Any, kind: set[Any] | None = None) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for target in targets:
            _RULES[target] = function
        if kind is not None:
            kind.update(targets)
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
    if not value.dtype.is_floating_point:
        return None
    with unset_fake_temporarily():
        return Scalar(float(value))


def argument(node: Node, position: int, name: str = "", default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _dims(dims: int | Sequence[int], rank: int) -> list[int]:
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)] if rank else []


def _operand(x: Any, node: Node, index: tuple[Index, ...]) -> Term | None:
    """An operand of a pointwise operation: broadcast to the result, or a number."""
    if isinstance(x, (bool, int, float)):
        return Scalar(float(x))
    if not isinstance(x, Node) or not isinstance(x.meta.get("val"), torch.Tensor):
        return None
    read = broadcast(index, node.meta["val"].shape, x.meta["val"].shape)
    return None if read is None else Access(x, read)


def _pointwise(form: Callable[..., Term]) -> Rule:
    """A rule for a binary pointwise operation."""

    def apply(node: Node, index: tuple[Index, ...]) -> Term | None:
        a, b = _operand(argument(node, 0), node, index), _operand(argument(node, 1), node, index)
        return None if a is None or b is None else form(a, b)

    return apply


def exact_for_floats(cast: Node) -> bool:
    """Whether a cast keeps what a float stands for, be it with fewer digits: not so to or from int and bool."""
    dtypes = argument(cast, 0).meta["val"].dtype, cast.meta["val"].dtype
    return all(dtype.is_floating_point for dtype in dtypes)


def constant(term: Term) -> float | None:
    """The number a term always is, seen through layouts, casts and fills; None if it is none."""
    while isinstance(term, Access):
        if term.node.target in CASTS and not exact_for_floats(term.node):
            return None
        opened = open_access(term)
        if not isinstance(opened, Access | Scalar):
            return None
        term = opened
    return term.value if isinstance(term, Scalar) else None


# Layouts ------------------------------------------------------------------------------------------------------


@rule(
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    kind=LAYOUT,
)
def _same(node: Node, index: tuple[Index, ...]) -> Term | None:
    return Access(argument(node, 0), index)


@rule(prims.convert_element_type.default, aten._to_copy.default, kind=CASTS)
def _cast(node: Node, index: tuple[Index, ...]) -> Term | None:
    x = argument(node, 0)
    same_device = x.meta["val"].device == node.meta["val"].device
    return Access(x, index) if same_device else None


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
    read = regroup(index, shape_of(x))
    return None if read is None else Access(x, read)


@rule(aten.expand.default, kind=LAYOUT)
def _expand(node: Node, index: tuple[Index, ...]) -> Term | None:
    x = argument(node, 0)
    read = broadcast(index, node.meta["val"].shape, x.meta["val"].shape)
    return None if read is None else Access(x, read)


@rule(aten.permute.default, kind=LAYOUT)
def _permute(node: Node, index: tuple[Index, ...]) -> Term | None:
    order = _dims(argument(node, 1, "dims"), len(index))
    return Access(argument(node, 0), tuple(index[order.index(d)] for d in range(len(index))))


@rule(aten.transpose.int, aten.t.default, kind=LAYOUT)
def _transpose(node: Node, index: tuple[Index, ...]) -> Term | None:
    out = list(index)
    if len(out) >= 2:
        a, b = _dims((argument(node, 1, "dim0", 0), argument(node, 2, "dim1", 1)), len(out))
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
    asked = range(len(sizes)) if dim is None else _dims(dim, len(sizes))
    gone = {d for d in asked if sizes[d] == 1}
    if len(index) + len(gone) != len(sizes):
        return None
    rest = iter(index)
    return Access(x, tuple(() if d in gone else next(rest) for d in range(len(sizes))))


@rule(aten.slice.Tensor, kind=LAYOUT)
def _slice(node: Node, index: tuple[Index, ...]) -> Term | None:
    # Only the slice that keeps everything, which real graphs are full of.
    x = argument(node, 0)
    dim = argument(node, 1, "dim", 0) % len(index)
    whole = same_size(shape_of(x)[dim], shape_of(node)[dim]) and argument(node, 4, "step", 1) == 1
    return Access(x, index) if whole else None


@rule(aten.select.int, kind=LAYOUT)
def _select(node: Node, index: tuple[Index, ...]) -> Term | None:
    x = argument(node, 0)
    sizes = shape_of(x)
    dim = argument(node, 1, "dim") % len(sizes)
    return Access(x, (*index[:dim], (), *index[dim:])) if sizes[dim] == 1 else None


# Products and sums --------------------------------------------------------------------------------------------


@rule(aten.mul.Tensor, aten.mul.Scalar)
def _mul(node: Node, index: tuple[Index, ...]) -> Term | None:
    gated = _gated(node, index)
    return gated or _pointwise(lambda a, b: Product((a, b)))(node, index)


@rule(aten.div.Tensor, aten.div.Scalar)
def _div(node: Node, index: tuple[Index, ...]) -> Term | None:
    x, by = _operand(argument(node, 0), node, index), _operand(argument(node, 1), node, index)
    divisor = None if by is None else constant(by)
    return None if x is None or not divisor else Product((x, Scalar(1.0 / divisor)))


@rule(aten.neg.default)
def _neg(node: Node, index: tuple[Index, ...]) -> Term | None:
    return Product((Access(argument(node, 0), index), Scalar(-1.0)))


@rule(aten.add.Tensor, aten.add.Scalar)
def _add(node: Node, index: tuple[Index, ...]) -> Term | None:
    return _pointwise(lambda a, b: Plus((a, b)))(node, index) if node.kwargs.get("alpha", 1) == 1 else None


@rule(aten.sum.dim_IntList, aten.sum.default)
def _sum(node: Node, index: tuple[Index, ...]) -> Term | None:
    x = argument(node, 0)
    sizes = shape_of(x)
    asked = argument(node, 1, "dim")
    summed = set(range(len(sizes)) if asked is None or asked == [] else _dims(asked, len(sizes)))
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
    added = _operand(addend, node, index)
    if added is None:
        return None
    product = _contraction(a, b, index[:-2], index[:-2], index[-2:-1], index[-1:])
    beta, alpha = argument(node, 3, "beta", 1), argument(node, 4, "alpha", 1)
    return Plus(
        (
            added if beta == 1 else Product((added, Scalar(beta))),
            product if alpha == 1 else Product((product, Scalar(alpha))),
        )
    )


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


# ReLU, in its spellings ---------------------------------------------------------------------------------------


@rule(aten.relu.default)
def _relu(node: Node, index: tuple[Index, ...]) -> Term | None:
    return Relu(Access(argument(node, 0), index))


@rule(aten.clamp.default, aten.clamp_min.default)
def _clamp(node: Node, index: tuple[Index, ...]) -> Term | None:
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    return Relu(Access(argument(node, 0), index)) if low == 0 and high is None else None


@rule(aten.maximum.default, aten.clamp_min.Tensor)
def _maximum(node: Node, index: tuple[Index, ...]) -> Term | None:
    a, b = _operand(argument(node, 0), node, index), _operand(argument(node, 1), node, index)
    if a is None or b is None:
        return None
    return Relu(a) if constant(b) == 0 else Relu(b) if constant(a) == 0 else None


@rule(aten.threshold.default)
def _threshold(node: Node, index: tuple[Index, ...]) -> Term | None:
    return Relu(Access(argument(node, 0), index)) if (argument(node, 1), argument(node, 2)) == (0, 0) else None


# x > 0 and x >= 0 gate alike: at x = 0 both branches are 0.
_POSITIVE = (aten.gt.Scalar, aten.ge.Scalar)
_NOT_POSITIVE = (aten.le.Scalar, aten.lt.Scalar)


def _compared_with_zero(condition: Term | None, signs: Sequence[Any]) -> Access | None:
    """x if the condition is a comparison of x with 0, by one of the operations ``signs``."""
    while isinstance(condition, Access):
        node = condition.node
        if node.target in signs:
            return Access(argument(node, 0), condition.index) if argument(node, 1) == 0 else None
        condition = open_access(condition) if node.target in LAYOUT | CASTS else None
    return None


def _is(x: Term | None, other: Access | None) -> bool:
    return isinstance(x, Access) and other is not None and x.same_element(other)


def _gated(node: Node, index: tuple[Index, ...]) -> Term | None:
    """x * (x > 0)."""
    a, b = _operand(argument(node, 0), node, index), _operand(argument(node, 1), node, index)
    for x, gate in ((a, b), (b, a)):
        if _is(x, _compared_with_zero(gate, _POSITIVE)):
            assert x is not None
            return Relu(x)
    return None


# Selection by a condition -------------------------------------------------------------------------------------


@rule(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def _where(node: Node, index: tuple[Index, ...]) -> Term | None:
    condition, a, b = (_operand(argument(node, i), node, index) for i in range(3))
    if not isinstance(condition, Access) or a is None or b is None:
        return None
    if _is(a, _compared_with_zero(condition, _POSITIVE)) and constant(b) == 0:
        return Relu(a)
    if _is(b, _compared_with_zero(condition, _NOT_POSITIVE)) and constant(a) == 0:
        return Relu(b)
    return Where(condition, a, b)


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(node: Node, index: tuple[Index, ...]) -> Term | None:
    x, condition, value = (_operand(argument(node, i), node, index) for i in range(3))
    if not isinstance(condition, Access) or x is None or value is None:
        return None
    return Where(condition, value, x)


@rule(aten.bitwise_not.default, aten.logical_not.default)
def _not(node: Node, index: tuple[Index, ...]) -> Term | None:
    x = argument(node, 0)
    return Not(Access(x, index)) if x.meta["val"].dtype == torch.bool else None


# Constants ----------------------------------------------------------------------------------------------------


@rule(aten.full.default, aten.full_like.default, aten.new_full.default)
def _full(node: Node, index: tuple[Index, ...]) -> Term | None:
    value = argument(node, 2) if node.target is aten.new_full.default else argument(node, 1)
    return _number(node, value)


@rule(aten.scalar_tensor.default)
def _scalar_tensor(node: Node, index: tuple[Index, ...]) -> Term | None:
    return _number(node, argument(node, 0))


def _number(node: Node, value: Any) -> Scalar | None:
    """The number that fills a tensor; in an int or bool tensor it may be another one than was given."""
    known = isinstance(value, (bool, int, float)) and node.meta["val"].dtype.is_floating_point
    return Scalar(float(value)) if known else None


@rule(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def _zeros(node: Node, index: tuple[Index, ...]) -> Term | None:
    return Scalar(0.0)


def hides_added(value: float | None) -> bool:
    """Whether a score that this number is added to is below every score that a token can have.

    That is -inf or the lowest number of bfloat16, which many models take for float32 scores too (no score that did
    not overflow is as low).  Not float16's: scores of some ten thousand, to which it is added, may exceed others.
    """
    return value is not None and value <= torch.finfo(torch.bfloat16).min


def hides(value: float | None, dtype: torch.dtype) -> bool:
    """Whether this number in place of a score of ``dtype`` is below every score that a token can have."""
    return hides_added(value) or (value is not None and dtype == torch.float16 and value <= torch.finfo(dtype).min)
