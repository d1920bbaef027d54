"""Putting the operator's call into a graph: operands in its layout, scales folded in, results arranged back."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch.fx import Node

from ..ops.budget import Budget
from ..ops.validate import KEY_DTYPES, WEIGHT_DTYPES
from .axes import Access, Index, product_of_sizes, same_size, shape_of, size_expr
from .emit import Emitter, UnknownSizeError, index_of
from .form import Factor, IndexerForm, Part
from .joining import join_heads
from .selection import Output, Selection

aten = torch.ops.aten
prims = torch.ops.prims


class Shadow(NamedTuple):
    """What a call in shadow mode is told: its site's name, how many queries to compare, and in one call of how many."""

    site: str
    sample: int
    every: int


def indexer_call(
    emit: Emitter,
    form: IndexerForm,
    topk: int,
    budget: Budget,
    coarse: str | None,
    in_order: bool,
    visibility: dict[str, Node],
    shadow: Shadow | None = None,
) -> Node:
    """The node that calls ``hisa::indexer_topk``, in shadow mode its twin, on what the form describes."""
    k = emit.arrange(form.key, (form.batch, form.keys, form.key_features))
    device = k.meta["val"].device
    parts = [_query_and_weights(emit, form, part, device) for part in join_heads(emit, form)]
    q, weights = parts[0]
    if len(parts) > 1:
        q, weights = (_side_by_side(emit, operands) for operands in zip(*parts, strict=True))
    q, k = _same_dtype(emit, q, k)
    optional: dict[str, Node | str] = dict(visibility)
    if coarse is not None:
        optional["coarse"] = coarse
    for name, factors in (("k_scale", form.key_factors), ("k_weight", form.key_weights)):
        if factors:
            each = [_float(emit, factor, (form.batch, form.keys), device) for factor in factors]
            optional[name] = emit.cast(_product(emit, each), torch.float32)
    return emit.call(
        torch.ops.hisa.indexer_topk.default if shadow is None else torch.ops.hisa.indexer_topk_shadow.default,
        *(shadow or ()),
        q,
        k,
        weights,
        topk,
        block_size=budget.block_size,
        block_topk=budget.block_topk,
        sorted=in_order,
        **optional,
    )


def _query_and_weights(emit: Emitter, form: IndexerForm, part: Part, device: torch.device) -> tuple[Node, Node]:
    """q [B, S, H, D] and weights [B, S, H] of one part."""
    rows = (form.batch, form.queries, part.heads)
    q = _product(emit, [emit.arrange(x, (*rows, part.features)) for x in part.query])
    # The scores of a selection of the smallest are negated: the operator keeps the largest.
    scale = (-part.scale if form.smallest else part.scale) * abs(part.inner_scale)
    if part.inner_scale < 0:
        q = emit.call(aten.neg.default, _signed(emit, q))
    several = len(part.weights) > 1
    weights = [_float(emit, x, rows, device, keep_missing=several) for x in part.weights]
    for factor in part.row_factors:
        # relu(f x) = |f| relu(sign(f) x) for any f, and a product with a sign is exact in any dtype.
        f = _float(emit, factor, rows, device, keep_missing=True)
        weights.append(emit.call(aten.abs.default, f))
        q = _signed(emit, q)
        sign = emit.cast(emit.call(aten.sign.default, f), q.meta["val"].dtype)
        q = emit.call(aten.mul.Tensor, q, emit.call(aten.unsqueeze.default, sign, 3))
    return q, _weights(emit, rows, weights, scale, device)


def _float(
    emit: Emitter, factor: Factor, dims: Sequence[Index], device: torch.device, keep_missing: bool = False
) -> Node:
    """A factor as a float tensor on the score's device, with one dimension for each of ``dims``."""
    if not isinstance(factor.access.node.meta["val"], torch.Tensor):
        # A number that only the running graph knows.
        shape = [1] * len(dims) if keep_missing else [emit.size(product_of_sizes(dim)) for dim in dims]
        number = factor.access.node
        return emit.call(aten.full.default, shape, number, dtype=torch.float32, device=device, pin_memory=False)
    x = emit.arrange(factor.access, dims, keep_missing)
    x = x if x.meta["val"].device == device else emit.call(prims.device_put.default, x, device)
    if not x.meta["val"].dtype.is_floating_point or factor.inverse:
        x = emit.cast(x, torch.float32)
    return emit.call(aten.reciprocal.default, x) if factor.inverse else x


def _side_by_side(emit: Emitter, operands: Sequence[Node]) -> Node:
    """Operands of several groups of heads as one, in a dtype that holds all."""
    dtypes = {x.meta["val"].dtype for x in operands}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return emit.call(aten.cat.default, [emit.cast(x, dtype) for x in operands], 2)


def _product(emit: Emitter, factors: Iterable[Node]) -> Node:
    first, *rest = factors
    for factor in rest:
        first = emit.call(aten.mul.Tensor, emit.cast(first, torch.float32), emit.cast(factor, torch.float32))
    return first


def _signed(emit: Emitter, x: Node) -> Node:
    """A dtype with signed arithmetic: float8 has none, and bfloat16 holds all its values."""
    dtype = x.meta["val"].dtype
    if not dtype.is_floating_point:
        return emit.cast(x, torch.float32)
    return emit.cast(x, torch.bfloat16) if dtype.itemsize == 1 else x


def _same_dtype(emit: Emitter, q: Node, k: Node) -> tuple[Node, Node]:
    """The operator takes q and k in one dtype: the narrowest that holds both, so that casting is exact."""
    dtypes = {q.meta["val"].dtype, k.meta["val"].dtype}
    if len(dtypes) == 1 and dtypes <= set(KEY_DTYPES):
        return q, k
    wide = {dtype for dtype in dtypes if dtype.itemsize > 1}
    common = wide.pop() if len(wide) == 1 and dtypes <= set(KEY_DTYPES) else torch.float32
    return emit.cast(q, common), emit.cast(k, common)


def _weights(emit: Emitter, rows: Sequence[Index], factors: list[Node], scale: float, device: torch.device) -> Node:
    sizes = [product_of_sizes(axes) for axes in rows]
    if not factors:
        shape = [emit.size(size) for size in sizes]
        return emit.call(aten.full.default, shape, scale, dtype=torch.float32, device=device, pin_memory=False)
    weights = _product(emit, factors)
    if scale != 1 or weights.meta["val"].dtype not in WEIGHT_DTYPES:
        weights = emit.cast(weights, torch.float32)
    if scale != 1:
        weights = emit.call(aten.mul.Tensor, weights, scale)
    return emit.expanded(weights, sizes)


def outputs_of(emit: Emitter, selection: Selection, form: IndexerForm, call: Node, dim: int) -> list[tuple[Node, Node]]:
    """Each node that took an output of the selection, with what takes its place: same shape and dtype."""
    replacements: list[tuple[Node, Node]] = []
    for outputs, position in ((selection.values, 1), (selection.indices, 0)):
        if not outputs:
            continue
        kept = emit.call(operator.getitem, call, position)
        index = index_of((form.batch, form.queries), kept.meta["val"].shape[-1])
        dims = [index[-1] if d == dim else i for d, i in enumerate(form.score.index)]
        kept = emit.arrange(Access(kept, index), dims)
        if position == 1:
            kept = _values(emit, form, kept)
        for output in outputs:
            replacements.append((output.node, _output(emit, kept, output, dim)))
    return replacements


def _values(emit: Emitter, form: IndexerForm, scores: Node) -> Node:
    """The operator's scores as the original's: its sign, and its own number for hidden tokens."""
    hidden = -math.inf
    if form.smallest:
        scores, hidden = emit.call(aten.neg.default, scores), math.inf
    fill = next(iter(form.fills), hidden)
    if fill != hidden:
        scores = emit.call(aten.masked_fill.Scalar, scores, emit.call(aten.eq.Scalar, scores, hidden), fill)
    return scores


def _output(emit: Emitter, kept: Node, output: Output, dim: int) -> Node:
    want, have = shape_of(output.node), shape_of(kept)
    if not same_size(want[dim], have[dim]):
        kept = emit.call(aten.slice.Tensor, kept, dim, 0, emit.size(want[dim]))
    if output.reversed:
        kept = emit.call(aten.flip.default, kept, [dim])
    if any(not same_size(a, b) for a, b in zip(shape_of(kept), want, strict=True)):
        raise UnknownSizeError(f"the result's shape {shape_of(kept)} is not the original's {want}")
    return emit.contiguous(emit.cast(kept, output.node.meta["val"].dtype))


def take_sizes_elsewhere(form: IndexerForm) -> None:
    """Read sizes that the graph takes from the replaced scores (``arange(scores.shape[-1])``) from the operands."""
    for user in [user for node in form.chain for user in node.users if user.target is aten.sym_size.int]:
        size = size_expr(user.meta["val"])
        for operand in form.operands():
            dims = shape_of(operand.node)
            dim = next((d for d, other in enumerate(dims) if same_size(size, other)), None)
            if dim is not None and operand.node < user:
                user.args = (operand.node, dim)
                break
