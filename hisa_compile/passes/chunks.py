"""Queries in chunks: several selections whose results a ``cat`` puts together again along the queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from .axes import Access, Axis, is_used, product_of_sizes, resolved, same_node, same_size, shape_of
from .emit import Emitter
from .form import IndexerForm, Part, matched_features, same_factors
from .joining import alike, join_heads, join_parts, joined_axis
from .rules import argument
from .selection import Output, Selection, is_exact_step

aten = torch.ops.aten


@dataclass(frozen=True)
class Chunks:
    """The selections, by their numbers, in the order in which the cats along ``dim`` take their outputs.

    values, indices: the cats, as outputs of one selection for all queries.
    """

    numbers: tuple[int, ...]
    dim: int
    values: tuple[Output, ...]
    indices: tuple[Output, ...]


def find_chunks(selections: Sequence[Selection | None]) -> Iterator[Chunks]:
    """Groups of selections that do nothing but make the parts of one result.  None is no candidate."""
    made_by = {
        output.node: (number, kind)
        for number, selection in enumerate(selections)
        if selection is not None
        for kind in ("values", "indices")
        for output in getattr(selection, kind)
    }
    # The parts of each cat that are such outputs: cat -> (number of the selection, kind) of each of its inputs.
    cats = {cat: None for cat in map(_cat_after, made_by) if cat is not None}
    found: dict[tuple[int, ...], dict[str, Node]] = {}
    for cat in cats:
        sources = [made_by.get(_uncast(x)) for x in argument(cat, 0)]
        numbers = tuple(source[0] for source in sources if source is not None)
        kinds = {source[1] for source in sources if source is not None}
        if len(numbers) == len(sources) == len(set(numbers)) > 1 and len(kinds) == 1:
            found.setdefault(numbers, {})[kinds.pop()] = cat
    for numbers, by_kind in found.items():
        chunks = [selection for selection in (selections[number] for number in numbers) if selection is not None]
        first = chunks[0]
        dims = {argument(cat, 1, "dim", 0) % len(shape_of(cat)) for cat in by_kind.values()}
        uniform = all(
            (chunk.dim, chunk.smallest, chunk.topk, chunk.sorted)
            == (first.dim, first.smallest, first.topk, first.sorted)
            and {kind for kind in ("values", "indices") if any(o.node.users for o in getattr(chunk, kind))}
            == set(by_kind)
            and all(len(getattr(chunk, kind)) == 1 for kind in by_kind)
            and all(output.count == first.topk for output in chunk.outputs)
            and all(_cat_after(output.node) is cat for kind, cat in by_kind.items() for output in getattr(chunk, kind))
            for chunk in chunks
        )
        tails = {output.reversed for chunk in chunks for output in chunk.outputs}
        if uniform and len(dims) == len(tails) == 1:
            tail = tails.pop()
            outputs = ((Output(by_kind[k], first.topk, tail),) if k in by_kind else () for k in ("values", "indices"))
            yield Chunks(numbers, dims.pop(), *outputs)


def _cat_after(output: Node) -> Node | None:
    node = output
    while len(users := [user for user in node.users if is_used(user)]) == 1:
        (node,) = users
        if node.target is aten.cat.default:
            return node
        if not is_exact_step(node):
            break
    return None


def _uncast(x: Node) -> Node:
    while is_exact_step(x) and len(x.users) == 1:
        x = argument(x, 0)
    return x


def join_queries(emit: Emitter, chunks: Chunks, forms: Sequence[IndexerForm]) -> IndexerForm | None:
    """One description for all chunks, its score addressed like the cat; None where they can't be proved alike.

    Conditions stay with the chunks: their visibility is put together as vectors.
    """
    first = forms[0]
    parts: list[Part] = []
    same: list[Mapping[Axis, Axis]] = []
    along = []
    for form in forms:
        joined = join_heads(emit, form)
        queries = resolved(form.score.index[chunks.dim])
        if len(joined) != 1 or queries != form.queries or form.fills != first.fills:
            return None
        others: dict[Axis, Axis] = {}
        for mine, theirs in zip(form.score.index, first.score.index, strict=True):
            if mine is form.score.index[chunks.dim]:
                continue
            a, b = resolved(mine), resolved(theirs)
            if len(a) != len(b) or not all(same_size(x.size, y.size) for x, y in zip(a, b, strict=True)):
                return None
            others.update(zip(a, b, strict=True))
        part = joined[0]
        if parts:
            features = matched_features(parts[0], part, others)
            if features is None or len(part.heads) != len(parts[0].heads):
                return None
            part = replace(part, features=features)
            others.update(zip(features, parts[0].features, strict=True))
            others.update(zip(part.heads, parts[0].heads, strict=True))
            if any(not same_size(x.size, y.size) for x, y in zip(part.heads, parts[0].heads, strict=True)):
                return None
            if not same_factors(parts[0].key_factors, part.key_factors, others):
                return None
            if not same_factors(parts[0].key_weights, part.key_weights, others):
                return None
        parts.append(part)
        same.append(others)
        along.append(queries)
    if not alike(parts):
        return None
    queries = joined_axis("s", along)
    index = list(first.score.index)
    index[chunks.dim] = queries
    return replace(
        first,
        score=Access(first.score.node, tuple(index)),
        queries=queries,
        parts=[join_parts(emit, parts, along, same, queries)],
        conditions=[],
        chain=[node for form in forms for node in form.chain],
    )


def join_visibility(
    emit: Emitter, forms: Sequence[IndexerForm], each: Sequence[Mapping[str, Node]]
) -> dict[str, Node] | None:
    """The chunks' visibility arguments side by side; None where their keys are not treated alike."""
    valid = [arguments.get("key_valid") for arguments in each]
    if any(x is None or valid[0] is None or not same_node(x, valid[0]) for x in valid):
        each = [_valid_as_mask(emit, arguments) for arguments in each]
    names = {name for arguments in each for name in arguments}
    joined: dict[str, Node] = {}
    for name in sorted(names):
        if name in ("key_valid", "k_segment"):
            # Emitted chunk by chunk, but the same computation if they are the same.
            if not all(name in arguments and same_node(arguments[name], each[0][name]) for arguments in each):
                return None
            joined[name] = each[0][name]
            continue
        parts = []
        for form, arguments in zip(forms, each, strict=True):
            if name == "q_segment" and name not in arguments:
                return None
            x = arguments.get(name) or _no_bound(emit, form, name)
            rows = [product_of_sizes(form.batch), product_of_sizes(form.queries)]
            parts.append(emit.expanded(x, [*rows, product_of_sizes(form.keys)] if name == "mask" else rows))
        joined[name] = emit.call(aten.cat.default, parts, 1)
    return joined


def _no_bound(emit: Emitter, form: IndexerForm, name: str) -> Node:
    """A window bound or a mask that hides nothing, for a chunk that has none."""
    device = form.key.node.meta["val"].device
    if name == "mask":
        return emit.call(aten.full.default, [1, 1, 1], True, dtype=torch.bool, device=device, pin_memory=False)
    value = 0 if name == "window_start" else 2**31 - 1
    return emit.call(aten.full.default, [1, 1], value, dtype=torch.int32, device=device, pin_memory=False)


def _valid_as_mask(emit: Emitter, arguments: Mapping[str, Node]) -> dict[str, Node]:
    """Keys that are valid for one chunk only are a part of its mask."""
    others = {name: node for name, node in arguments.items() if name != "key_valid"}
    if "key_valid" in arguments:
        mask = emit.call(aten.unsqueeze.default, arguments["key_valid"], 1)
        others["mask"] = emit.call(aten.bitwise_and.Tensor, mask, others["mask"]) if "mask" in others else mask
    return others
