"""Reading and writing at positions, and attention over what was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from ..axes import Access, Index, Size, fresh_index, resolved, same_size, shape_of, size_expr
from .order import Call, OrderMatters, Slots, consumer, follow, ops, read_broadcast, replaced, unknown

aten = torch.ops.aten


@consumer(aten.gather.default)
def _gather(call: Call, out: Node) -> Slots | None:
    x, where = call["self"], call["index"]
    index = fresh_index(shape_of(out))
    if not index or not shape_of(x):
        raise OrderMatters
    dim = call["dim"] % len(index)
    if call.has_slots(x):
        _same_sizes(x, where, but=dim)
    return follow(call, index, [Access(where, index), Access(x, replaced(index, {dim: unknown(x, dim)}))])


def _same_sizes(x: Node, index: Node, but: int) -> None:
    """Gather and scatter take an index that covers a part of the tensor only; its axes are then not the tensor's."""
    for d, (a, b) in enumerate(zip(shape_of(x), shape_of(index), strict=True)):
        if d != but and not same_size(a, b):
            raise OrderMatters


@consumer(aten.index_select.default)
def _index_select(call: Call, out: Node) -> Slots | None:
    x, where = call["self"], call["index"]
    index = fresh_index(shape_of(out))
    if not index or len(shape_of(where)) != 1:
        raise OrderMatters
    dim = call["dim"] % len(index)
    reads = [Access(where, (index[dim],)), Access(x, replaced(index, {dim: unknown(x, dim)}))]
    return follow(call, index, reads)


@consumer(aten.embedding.default)
def _embedding(call: Call, out: Node) -> Slots | None:
    table, where = call["weight"], call["indices"]
    index = fresh_index(shape_of(out))
    return follow(call, index, [Access(where, index[:-1]), Access(table, (unknown(table, 0), index[-1]))])


@dataclass(frozen=True)
class _Indexing:
    """``x[i, :, j]``: index, sizes address the elements that are taken; at, reads those of x and of i and j;
    steps: the axes that i and j are iterated over."""

    index: tuple[Index, ...]
    sizes: tuple[Size, ...]
    at: Access
    reads: list[Access]
    steps: Index


def _indexing(x: Node, indices: Sequence[Node | None]) -> _Indexing:
    shape = x.meta["val"].shape
    given = {d: i for d, i in enumerate(indices) if i is not None}
    if any(i.meta["val"].dtype in (torch.bool, torch.uint8) for i in given.values()):
        raise OrderMatters
    steps_sizes: list[Size] = []
    shapes = [i.meta["val"].shape for i in given.values()]
    for back in range(max(map(len, shapes)), 0, -1):
        there = [s[-back] for s in shapes if len(s) >= back]
        steps_sizes.append(next((s for s in there if size_expr(s) != 1), there[0]))
    steps = fresh_index([size_expr(s) for s in steps_sizes])
    at = tuple(unknown(x, d) for d in range(len(shape)))
    rest = [d for d in range(len(shape)) if d not in given]
    # Indices next to each other are replaced in place; otherwise theirs are the first dimensions.
    first = min(given)
    before = [d for d in rest if d < first] if max(given) - first + 1 == len(given) else []
    after = [d for d in rest if d not in before]
    return _Indexing(
        (*(at[d] for d in before), *steps, *(at[d] for d in after)),
        (*(shape[d] for d in before), *steps_sizes, *(shape[d] for d in after)),
        Access(x, at),
        [read_broadcast(i, steps, steps_sizes) for i in given.values()],
        tuple(axis for dim in steps for axis in dim),
    )


@consumer(aten.index.Tensor, aten._unsafe_index.Tensor)
def _index(call: Call, out: Node) -> Slots | None:
    taken = _indexing(call["self"], call["indices"])
    return follow(call, taken.index, [*taken.reads, taken.at])


# Writing at positions -------------------------------------------------------------------------------------------


@consumer(
    *ops(
        "scatter.value scatter.src scatter.reduce scatter.value_reduce scatter_add scatter_reduce.two "
        "scatter_.value scatter_.src scatter_.reduce scatter_.value_reduce scatter_add_ scatter_reduce_.two"
    ),
    writes=True,
)
def _scatter(call: Call, out: Node) -> Slots | None:
    """Writes to every place what was to be written there, in an order that tells only where two are to one place."""
    x, where, source = call["self"], call["index"], call["src"]
    slots = call.order.slots_of.get(where)
    if call.has_slots(x) or slots is None or not shape_of(x):
        raise OrderMatters
    steps = fresh_index(shape_of(where))
    dim = call["dim"] % len(steps)
    reads = [Access(where, steps)]
    if isinstance(source, Node):
        _same_sizes(source, where, but=-1)
        reads.append(Access(source, steps))
    at, _ = call.align(reads)
    if at in resolved(steps[dim]):
        accumulates = call["reduce"] is not None or "scatter_add" in str(call.node.target)
        distinct = slots.distinct and resolved(steps[dim]) == (at,)
        if accumulates or distinct or not isinstance(source, Node) or _is_one(call, reads[1], steps[dim]):
            return None
        raise OrderMatters
    # Each slot has a place of its own, as in a one-hot encoding.
    _same_sizes(x, where, but=dim)
    new = unknown(out, dim)
    reads += [Access(x, replaced(steps, {dim: new}))]
    return follow(call, replaced(steps, {dim: new}), reads)


def _is_one(call: Call, read: Access, axes: Index) -> bool:
    """Whether a source without slots is the same number along these axes."""
    return not call.has_slots(read.node) and not any(call.order.varies(read, axis) for axis in resolved(axes))


@consumer(
    aten.index_put.default,
    aten._unsafe_index_put.default,
    aten.index_put_.default,
    writes=True,
)
def _index_put(call: Call, out: Node) -> Slots | None:
    """Like scatter; that the places are distinct is not proved."""
    x, values = call["self"], call["values"]
    written = _indexing(x, call["indices"])
    if call.has_slots(x) or not any(call.has_slots(read.node) for read in written.reads):
        raise OrderMatters
    value = read_broadcast(values, written.index, written.sizes)
    call.align([*written.reads, value])
    if call["accumulate"] or _is_one(call, value, written.steps):
        return None
    raise OrderMatters


# Attention ------------------------------------------------------------------------------------------------------


@consumer(
    *ops(
        "scaled_dot_product_attention _scaled_dot_product_attention_math "
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
        "_scaled_dot_product_fused_attention_overrideable"
    )
)
def _attention(call: Call, out: Node) -> Slots | None:
    """Keys, values and mask in another order are the same attention."""
    query, key, value = call["query"], call["key"], call["value"]
    mask = call["attn_mask"] if call["attn_bias"] is None else call["attn_bias"]
    if call.position != 0 or call["is_causal"] or call["dropout_p"] or call["dropout_mask"] is not None:
        raise OrderMatters
    index = fresh_index(shape_of(out))
    feature, token = unknown(key, len(index) - 1), unknown(key, len(index) - 2)
    sizes = out.meta["val"].shape

    def heads(x: Node) -> tuple[Index, ...]:
        """The batch dimensions; several heads of the queries may share one of the keys."""
        pairs = zip(index[:-2], shape_of(x)[:-2], shape_of(out)[:-2], strict=True)
        return tuple(dim if same_size(a, b) else unknown(x, d) for d, (dim, a, b) in enumerate(pairs))

    reads = [
        Access(query, (*index[:-1], feature)),
        Access(key, (*heads(key), token, feature)),
        Access(value, (*heads(value), token, index[-1])),
    ]
    if mask is not None:
        reads.append(read_broadcast(mask, (*index[:-1], token), (*sizes[:-1], key.meta["val"].shape[-2])))
    return follow(call, index, reads, feature + token, nested=True)
