"""Several descriptions made one: heads that are summed one by one, queries that are scored chunk by chunk.

The operands of the pieces are laid side by side along the joined role.  Where they are consecutive parts of one
tensor, that tensor is what they are parts of, and nothing is computed; where they are not, they are concatenated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch

from .axes import Access, Axis, Index, Shifted, product_of_sizes, renamed, resolved, same_index, same_size, shape_of
from .emit import Emitter
from .form import Factor, IndexerForm, Part, common_dtype, stripped
from .rules import open_access

aten = torch.ops.aten


@dataclass(frozen=True)
class Piece:
    """An operand of one of the descriptions.

    along: its axes in the joined role.  same: its other axes -> those of the first piece.
    """

    access: Access
    along: Index
    same: Mapping[Axis, Axis]


def join(emit: Emitter, pieces: Sequence[Piece], axes: Index) -> Access:
    """One operand for all pieces; ``axes`` are its own along the joined role."""
    whole = _common(pieces) or _consecutive(pieces, axes)
    if whole is not None:
        return stripped(whole)
    others: list[Axis] = []
    for piece in pieces:
        mine = [axis for axis in renamed(piece.access.axes, piece.same) if axis not in resolved(piece.along)]
        others += [axis for axis in mine if axis not in others]
    dtype = pieces[0].access.node.meta["val"].dtype
    for piece in pieces[1:]:
        dtype = common_dtype(dtype, piece.access.node.meta["val"].dtype)
    parts = []
    for piece in pieces:
        own = {theirs: mine for mine, theirs in piece.same.items()}
        dims = [*((own.get(axis, axis),) for axis in others), piece.along]
        parts.append(emit.cast(emit.arrange(piece.access, dims), dtype))
    return Access(emit.call(aten.cat.default, parts, len(others)), (*((axis,) for axis in others), axes))


def _common(pieces: Sequence[Piece]) -> Access | None:
    """The operand if it is one and the same for all pieces."""
    first = pieces[0]
    for piece in pieces:
        if piece.access.node is not first.access.node or piece.access.depends_on(piece.along):
            return None
        for mine, theirs in zip(piece.access.index, first.access.index, strict=True):
            if not same_index(renamed(mine, piece.same), theirs):
                return None
    return first.access


def _consecutive(pieces: Sequence[Piece], axes: Index) -> Access | None:
    """The tensor that the pieces are consecutive parts of."""
    sources = []
    for piece in pieces:
        # The part may be cut out already, or be what a slice or a select makes.
        is_part = any(isinstance(axis, Shifted) for dim in piece.access.index for axis in dim)
        source = piece.access if is_part else open_access(piece.access)
        if not isinstance(source, Access):
            return None
        sources.append(source)
    first = sources[0]
    if any(source.node is not first.node for source in sources):
        return None
    cut = [d for d, index in enumerate(first.index) if len(index) == 1 and isinstance(index[0], Shifted)]
    if len(cut) != 1:
        return None
    (dim,) = cut
    start = end = None
    for piece, source in zip(pieces, sources, strict=True):
        for d, index in enumerate(source.index):
            if d != dim:
                if not same_index(renamed(index, piece.same), first.index[d]):
                    return None
                continue
            part = index[0] if len(index) == 1 else None
            if not isinstance(part, Shifted) or resolved(part.of) != resolved(piece.along):
                return None
            if end is not None and not same_size(part.start, end):
                return None
            start = part.start if start is None else start
            end = part.start + part.size
    assert start is not None
    assert end is not None
    whole: Index = axes
    if start != 0 or not same_size(end, shape_of(first.node)[dim]):
        whole = (Shifted(axes, start),)
    return Access(first.node, (*first.index[:dim], whole, *first.index[dim + 1 :]))


def joined_axis(name: str, indices: Sequence[Index]) -> Index:
    """The axis of a role that holds those of all pieces, one after the other."""
    size = sympy.Add(*(product_of_sizes(index) for index in indices))
    return () if size == 1 else (Axis(size, name),)


def alike(parts: Sequence[Part]) -> bool:
    """Whether the parts differ in nothing but which tensors their factors are."""
    first = parts[0]
    shapes = {
        (
            len(part.query),
            tuple(f.inverse for f in part.row_factors),
            tuple(f.inverse for f in part.weights),
            part.inner_scale,
            part.scale,
        )
        for part in parts
    }
    return len(shapes) == 1 and all(len(part.features) == len(first.features) for part in parts)


def join_parts(
    emit: Emitter, parts: Sequence[Part], along: Sequence[Index], same: Sequence[Mapping[Axis, Axis]], axes: Index
) -> Part:
    """One part for several that are :func:`alike`, in the first one's axes but for ``axes``."""

    def one(accesses: Sequence[Access]) -> Access:
        return join(emit, [Piece(*piece) for piece in zip(accesses, along, same, strict=True)], axes)

    def factors(lists: Sequence[Sequence[Factor]]) -> list[Factor]:
        return [
            Factor(one([factor.access for factor in group]), group[0].inverse) for group in zip(*lists, strict=True)
        ]

    return replace(
        parts[0],
        query=[one(group) for group in zip(*(part.query for part in parts), strict=True)],
        row_factors=factors([part.row_factors for part in parts]),
        weights=factors([part.weights for part in parts]),
    )


def join_heads(emit: Emitter, form: IndexerForm) -> list[Part]:
    """The form's parts as one part with all heads, or as they are if they are not alike."""
    if len(form.parts) == 1 or not alike(form.parts):
        return form.parts
    first = form.parts[0]
    along = [part.heads for part in form.parts]
    same = [dict(zip(part.features, first.features, strict=True)) for part in form.parts]
    heads = joined_axis("h", along)
    return [replace(join_parts(emit, form.parts, along, same, heads), heads=heads)]
