"""What an operation computes for one element, in a handful of forms.

A rule (:mod:`.rules`) opens one node: it says of which elements of its inputs one element of its output is the
product, the sum, the ReLU, ...  The normal form (:mod:`.normal_form`) and the visibility (:mod:`.visibility`) are
read off these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

from torch.fx import Node

from .axes import Access, Axis, Index, Shifted, loops, resolved

# Arithmetic -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scalar:
    """A number; True and False are 1 and 0."""

    value: float


@dataclass(frozen=True)
class Symbol:
    """A number that only the running graph knows: a node that computes a size, say."""

    node: Node


@dataclass(frozen=True)
class Product:
    """The product; of booleans, all of them."""

    factors: tuple[Term, ...]


@dataclass(frozen=True)
class Inverse:
    """1 / body."""

    body: Term


@dataclass(frozen=True)
class Plus:
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Sum:
    """The sum of ``body`` over axes that no other term has."""

    axes: tuple[Axis, ...]
    body: Term


@dataclass(frozen=True)
class Pieces:
    """What ``cat`` or ``stack`` reads along ``axis``: its parts follow each other along it.

    Each part comes with an axis of its own in the place of ``axis`` (``()`` for a part of size 1).
    """

    axis: Axis
    parts: tuple[tuple[Index, Access], ...]


@dataclass(frozen=True)
class Relu:
    body: Term


# Conditions and what they are made of -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Where:
    condition: Term
    then: Term
    otherwise: Term


@dataclass(frozen=True)
class Not:
    body: Term


@dataclass(frozen=True)
class AnyOf:
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Compare:
    """``left kind right``, kind one of < <= == != >= >."""

    kind: str
    left: Term
    right: Term


@dataclass(frozen=True)
class Position:
    """The position within a dimension, as ``arange`` counts it."""

    index: Index


@dataclass(frozen=True)
class FloorDiv:
    """floor(body / divisor), divisor > 0."""

    body: Term
    divisor: int


@dataclass(frozen=True)
class Abs:
    body: Term


@dataclass(frozen=True)
class Clamped:
    """An integer bound on positions, brought into the range of int32: no position lies beyond it.

    ``wide``: into one that holds small multiples of positions too, and is far from the ends of int64.
    """

    body: Term
    wide: bool = False


Term: TypeAlias = (
    Access
    | Scalar
    | Symbol
    | Product
    | Inverse
    | Plus
    | Sum
    | Pieces
    | Relu
    | Where
    | Not
    | AnyOf
    | Compare
    | Position
    | FloorDiv
    | Abs
    | Clamped
)


def leaves(term: Term) -> Iterator[Access | Position | Symbol]:
    """What the term reads."""
    match term:
        case Access() | Position() | Symbol():
            yield term
        case Scalar():
            return
        case Product(parts) | Plus(parts) | AnyOf(parts):
            for part in parts:
                yield from leaves(part)
        case Pieces(_, pieces):
            for _, piece in pieces:
                yield piece
        case Where(condition, then, otherwise):
            for part in (condition, then, otherwise):
                yield from leaves(part)
        case Compare(_, left, right):
            yield from leaves(left)
            yield from leaves(right)
        case Inverse(body) | Sum(_, body) | Relu(body) | Not(body) | Abs(body) | Clamped(body, _) | FloorDiv(body, _):
            yield from leaves(body)


def signature(value: Any, labels: Mapping[Axis, Any]) -> Any:
    """The term with its axes replaced by their labels: equal for terms that differ in the names of axes only."""
    if isinstance(value, Shifted):
        return ("shifted", signature(value.of, labels), value.start)
    if isinstance(value, Axis):
        return labels.get(value, value) if value.parts is None else signature(value.parts, labels)
    if isinstance(value, tuple):
        return tuple(signature(part, labels) for part in value)
    if is_dataclass(value):
        return (type(value), *(signature(getattr(value, each.name), labels) for each in fields(value)))
    return value


def depends_on(term: Term, axes: Index) -> bool:
    """Whether the term's value may change along one of the axes."""
    wanted = set(resolved(axes))
    for leaf in leaves(term):
        found = leaf.axes if isinstance(leaf, Access) else loops(leaf.index) if isinstance(leaf, Position) else ()
        if not wanted.isdisjoint(found):
            return True
    return isinstance(term, Pieces) and term.axis in wanted
