"""Which tokens a query may see, read off a mask: windows, segment ids and valid keys instead of S x T booleans.

A mask is a condition over (batch, query, key).  It is taken apart into a conjunction; each term of it that compares
a key's position with something that depends on the query alone bounds a window, each that compares data of the query
with data of the key for equality is a segment, each that depends on the key alone is its validity.  A term that is
none of these stays the mask that it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch.fx import Node

from .axes import Access, Index, Shifted, resolved
from .rules import CASTS, LAYOUT, argument, open_access, rounded
from .terms import (
    Abs,
    AnyOf,
    Clamped,
    Compare,
    FloorDiv,
    Not,
    Plus,
    Position,
    Product,
    Scalar,
    Symbol,
    Term,
    Where,
    depends_on,
)

_NEGATED = {"<": ">=", "<=": ">", "==": "!=", "!=": "==", ">=": "<", ">": "<="}
_MIRRORED = {"<": ">", "<=": ">=", "==": "==", "!=": "!=", ">=": "<=", ">": "<"}
# What counts positions: far from the ends of int32.
_COUNTS = (
    torch.ops.aten.arange.default,
    torch.ops.aten.arange.start,
    torch.ops.aten.arange.start_step,
    torch.ops.prims.iota.default,
)
# Factors and divisors of positions up to which nothing that is computed here can leave int64.
_LARGEST_FACTOR = 2**11
_LARGEST_CONSTANT = 2**50
# Paths through nested choices between constants that are followed before giving up.
_MOST_CASES = 64


@dataclass(frozen=True)
class Condition:
    """A boolean that decides visibility: visible where it is ``visible_when``."""

    term: Term
    visible_when: bool


@dataclass
class Vectors:
    """A mask taken apart; everything is ANDed.

    first, last: a token at position t is visible where first <= t <= last, terms over batch and query.
    segments: pairs of a term over batch and query and one over batch and key; visible where they are equal.
    valid: conditions on batch and key.  masks: what depends on the query and the key in no such way.
    """

    first: list[Term] = field(default_factory=list)
    last: list[Term] = field(default_factory=list)
    segments: list[tuple[Term, Term]] = field(default_factory=list)
    valid: list[Condition] = field(default_factory=list)
    masks: list[Condition] = field(default_factory=list)

    def copy(self) -> Vectors:
        return Vectors(*(list(part) for part in vars(self).values()))


def take_apart(conditions: Sequence[Condition], queries: Index, keys: Index, one_of_many: bool = False) -> Vectors:
    """``queries`` and ``keys`` are the score's axes in these roles; its other axes are batch axes.

    ``one_of_many``: the queries are a chunk of more, so that what depends on the keys alone here, because there is
    a single query, may be a segment there.
    """
    reader = _Reader(queries, resolved(keys), one_of_many)
    for condition in conditions:
        reader.read(condition.term, condition.visible_when)
    return reader.found


class _NotVectors(Exception):
    """A term that can't be had from vectors."""


class _Reader:
    def __init__(self, queries: Index, keys: Index, one_of_many: bool) -> None:
        self.queries = queries
        self.keys = keys
        self.one_of_many = one_of_many
        self.found = Vectors()

    def read(self, term: Term, wanted: bool) -> None:
        """Note what it takes for ``term`` to be ``wanted``."""
        constant = decision(term)
        if isinstance(constant, float):
            term = Scalar(constant)
        if not depends_on(term, self.keys) and not isinstance(term, Scalar):
            # All keys or none: an empty window where it is not as wanted.
            self.found.last.append(Where(term, *((_ANY, _NONE) if wanted else (_NONE, _ANY))))
        elif not self.split(term, wanted):
            kind = self.found.masks if depends_on(term, self.queries) else self.found.valid
            kind.append(Condition(term, wanted))

    def split(self, term: Term, wanted: bool) -> bool:
        """Take one step into the term; False if there is none."""
        match term:
            case Scalar(value):
                if bool(value) != wanted:
                    self.found.last.append(_NONE)
                return True
            case Not(body):
                self.read(body, not wanted)
                return True
            case Product(parts) | AnyOf(parts):
                conjunction = isinstance(term, Product)
                # All of them where all must hold, none where any is too much; else the one that is left in doubt.
                left = parts if conjunction == wanted else _undecided(parts, conjunction)
                if conjunction != wanted and len(left) != 1:
                    return False
                for part in left:
                    self.read(part, wanted)
                return True
            case Where(condition, then, otherwise):
                return self.choice(condition, then, otherwise, wanted)
            case Compare(kind, left, right):
                before = self.found.copy()
                try:
                    self.compare(kind if wanted else _NEGATED[kind], left, right)
                except _NotVectors:
                    self.found = before
                    return False
                return True
            case Access(node) if node.meta["val"].dtype == torch.bool:
                opened = open_access(term)
                if isinstance(opened, Access):
                    self.read(opened, wanted)
                    return True
                if opened is None:
                    return False
                # Where the opened form does not help, the tensor that the graph has is the condition.
                return self.split(opened, wanted)
        return False

    def choice(self, condition: Term, then: Term, otherwise: Term, wanted: bool) -> bool:
        """where(c, a, b) with one branch that is constant is a conjunction or a disjunction."""
        for branch, other, holds in ((then, otherwise, True), (otherwise, then, False)):
            tree = decision(branch)
            if isinstance(tree, float) and bool(tree) != wanted:
                # This branch is never as wanted: the condition must lead to the other one.
                self.read(condition, not holds)
                self.read(other, wanted)
                return True
        return False

    # Comparisons ----------------------------------------------------------------------------------------------------

    def compare(self, kind: str, left: Term, right: Term) -> None:
        for value, bound, seen in ((left, right, kind), (right, left, _MIRRORED[kind])):
            tree, number = decision(value), decision(bound)
            if isinstance(tree, Choice) and isinstance(number, float):
                # A choice between numbers that is compared with a number, such as a triangle of ones with 0.
                self.read(as_condition(tree.map(lambda x, n=number, k=seen: _COMPARES[k](x, n))), True)  # type: ignore[misc]
                return
            absolute = value if isinstance(value, Abs) else open_access(value) if isinstance(value, Access) else None
            if isinstance(absolute, Abs) and seen in ("<", "<=") and depends_on(value, self.keys):
                self.compare(seen, absolute.body, bound)
                self.compare(seen, Product((absolute.body, Scalar(-1))), bound)
                return
        expression = _Linear(self.keys)
        expression.add(left, 1)
        expression.add(right, -1)
        if abs(expression.constant) > _LARGEST_CONSTANT:
            raise _NotVectors
        rows = expression.other_side()
        if len(expression.keys) == 1 and isinstance(expression.keys[0][1], Position | FloorDiv) and kind != "!=":
            before = self.found.copy()
            try:
                for one in ("<=", ">=") if kind == "==" else (kind,):
                    self.bound(one, *expression.keys[0], rows)
                return
            except _NotVectors:
                self.found = before
        if all(factor < 0 for factor, _ in expression.keys):
            # The same equation with positive factors.
            expression = expression.negated()
            rows = expression.other_side()
        key = Plus(tuple(_scaled(term, factor) for factor, term in expression.keys))
        for_queries = depends_on(rows, self.queries) or (self.one_of_many and bool(expression.rows))
        if kind != "==" or not expression.keys or not for_queries or depends_on(key, self.queries):
            raise _NotVectors
        self.found.segments.append((rows, key))

    def bound(self, kind: str, factor: int, term: Term, rows: Term) -> None:
        """Note ``factor * term kind rows`` where the term is made of the key's position."""
        # Bounds at the ends of int64 stand for no bound; cut off, they can be computed with.
        small = _is_small(rows, self.queries)
        rows = rows if small else Clamped(rows, wide=True)
        if kind == "<":
            kind, rows = "<=", _plus(rows, -1)
        elif kind == ">":
            kind, rows = ">=", _plus(rows, 1)
        if factor < 0:
            kind, factor, rows = _MIRRORED[kind], -factor, Product((rows, Scalar(-1)))
        if factor != 1:
            # The largest integer below, or the smallest above.
            rows = FloorDiv(_plus(rows, factor - 1 if kind == ">=" else 0), factor)
        if isinstance(term, Position):
            small = small and factor == 1
            (self.found.last if kind == "<=" else self.found.first).append(rows if small else Clamped(rows))
            return
        assert isinstance(term, FloorDiv)
        if term.divisor > _LARGEST_FACTOR:
            raise _NotVectors
        # floor(x / d) <= r  <=>  x <= d r + d - 1;   floor(x / d) >= r  <=>  x >= d r
        limit = Product((Clamped(rows), Scalar(term.divisor)))
        self.compare(kind, term.body, _plus(limit, term.divisor - 1 if kind == "<=" else 0))


def _undecided(parts: Sequence[Term], neutral: bool) -> tuple[Term, ...]:
    """Without those that are always ``neutral``: True in a conjunction, False in a disjunction."""
    return tuple(part for part in parts if decision(part) != float(neutral))


_ANY, _NONE = Scalar(2**31 - 2), Scalar(-1)


def _plus(term: Term, number: int) -> Term:
    """The sum with the number as its last term, if it is not 0."""
    terms = term.terms if isinstance(term, Plus) else (term,)
    if isinstance(terms[-1], Scalar):
        number += int(terms[-1].value)
        terms = terms[:-1]
    if not terms:
        return Scalar(number)
    return Plus((*terms, Scalar(number))) if number else terms[0] if len(terms) == 1 else Plus(terms)


def _scaled(term: Term, factor: int) -> Term:
    return term if factor == 1 else Product((term, Scalar(factor)))


def _keeps_integers(node: Node) -> bool:
    """Whether an operation is no cast, or one that keeps every integer: all but from int64, unless of positions."""
    if node.target not in CASTS:
        return True
    source: torch.dtype = argument(node, 0).meta["val"].dtype
    if source.is_floating_point or source == torch.bool:
        return False
    return source == node.meta["val"].dtype or source != torch.int64 or argument(node, 0).target in _COUNTS


def _integer(value: float) -> int:
    if not float(value).is_integer():
        raise _NotVectors
    return int(value)


class _Linear:
    """An integer expression as sum of factor * term, sorted by whether a term depends on the key."""

    def __init__(self, keys: Index) -> None:
        self.axes = keys
        self.keys: list[tuple[int, Term]] = []
        self.rows: list[tuple[int, Term]] = []
        self.constant = 0

    def add(self, term: Term, factor: int) -> None:
        match term:
            case Scalar(value):
                self.constant += factor * _integer(value)
            case Plus(parts):
                for part in parts:
                    self.add(part, factor)
            case Product(parts) if sum(not isinstance(part, Scalar) for part in parts) == 1:
                for part in parts:
                    if isinstance(part, Scalar):
                        factor *= _integer(part.value)
                self.add(next(part for part in parts if not isinstance(part, Scalar)), factor)
            case Position(index) if any(isinstance(axis, Shifted) for axis in index):
                (shifted,) = index
                assert isinstance(shifted, Shifted)
                if not shifted.start.is_Integer:
                    raise _NotVectors
                self.constant += factor * int(shifted.start)
                self.add(Position(shifted.of), factor)
            case Access(node):
                self.access(term, node.meta["val"].dtype, factor)
            case Symbol(node) if not isinstance(node.meta.get("val"), int | torch.SymInt):
                raise _NotVectors
            case _ if not depends_on(term, self.axes):
                self.rows.append((factor, term))
            case Position(index) if resolved(index) == resolved(self.axes):
                self.add_key(factor, term)
            case FloorDiv():
                self.add_key(factor, term)
            case _:
                raise _NotVectors

    def add_key(self, factor: int, term: Term) -> None:
        if abs(factor) > _LARGEST_FACTOR:
            raise _NotVectors
        if factor:
            self.keys.append((factor, term))

    def other_side(self) -> Term:
        """What the terms of the keys are compared with."""
        found = [_scaled(term, -factor) for factor, term in self.rows]
        if self.constant or not found:
            found.append(Scalar(-self.constant))
        return found[0] if len(found) == 1 else Plus(tuple(found))

    def negated(self) -> _Linear:
        other = _Linear(self.axes)
        other.keys = [(-factor, term) for factor, term in self.keys]
        other.rows = [(-factor, term) for factor, term in self.rows]
        other.constant = -self.constant
        return other

    def access(self, term: Access, dtype: torch.dtype, factor: int) -> None:
        if dtype.is_floating_point:
            raise _NotVectors
        if not depends_on(term, self.axes):
            self.rows.append((factor, term))
            return
        # In narrower types sums wrap around; and a cast to one may.
        opened = open_access(term) if dtype in (torch.int64, torch.int32) and _keeps_integers(term.node) else None
        before = list(self.keys), list(self.rows), self.constant
        try:
            if opened is None:
                raise _NotVectors
            self.add(opened, factor)
        except _NotVectors:
            # Data of the keys, which can still be compared for equality.
            self.keys, self.rows, self.constant = before
            self.add_key(factor, term)


def _is_small(term: Term, queries: Index) -> bool:
    """Whether the term is a position, or a small number, up to a small number: within int32 and one more."""
    found = positions(term, queries)
    parts = found.terms if isinstance(found, Plus) else (found,)
    numbers = [abs(part.value) for part in parts if isinstance(part, Scalar)]
    others = [part for part in parts if not isinstance(part, Scalar)]
    return len(others) <= 1 and all(isinstance(part, Position) for part in others) and max([0, *numbers]) < 2**30


def positions(term: Term, axes: Index) -> Term | None:
    """The term as a sum of positions along ``axes`` and a number, if it is nothing else."""
    expression = _Linear(resolved(axes))
    try:
        expression.add(term, 1)
    except _NotVectors:
        return None
    if expression.rows or not all(isinstance(part, Position) for _, part in expression.keys):
        return None
    found = Plus(tuple(_scaled(part, factor) for factor, part in expression.keys))
    return _plus(found, expression.constant) if found.terms else Scalar(expression.constant)


# Choices between numbers ----------------------------------------------------------------------------------------------

_COMPARES: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Choice:
    """One of two values by a condition, each a number or a choice again."""

    condition: Term
    then: Decision
    otherwise: Decision

    def map(self, function: Callable[[float], Decision]) -> Decision:
        """The choice with ``function`` applied to each number."""
        then, otherwise = (
            x.map(function) if isinstance(x, Choice) else function(x) for x in (self.then, self.otherwise)
        )
        return then if then == otherwise and not isinstance(then, Choice) else Choice(self.condition, then, otherwise)

    def numbers(self) -> list[float]:
        return [
            number
            for branch in (self.then, self.otherwise)
            for number in (branch.numbers() if isinstance(branch, Choice) else [branch])
        ]


Decision: TypeAlias = "Choice | float"


def decision(term: Term) -> Decision | None:
    """The term as a number, or as a choice between numbers by conditions; None if it is neither."""
    match term:
        case Scalar(value):
            return float(value)
        case Access(node):
            opened = open_access(term)
            dtype = node.meta["val"].dtype
            if isinstance(opened, Scalar):
                return rounded(opened.value, dtype)
            if dtype == torch.bool:
                return Choice(term, 1.0, 0.0)
            tree = None if opened is None else decision(opened)
            if tree is None or node.target in LAYOUT:
                return tree
            # Each operation rounds to what its result can hold.
            return _mapped(tree, lambda x: rounded(x, dtype))
        case Product(factors):
            return _fold(factors, operator.mul)
        case Plus(parts):
            return _fold(parts, operator.add)
        case Where(condition, then, otherwise):
            branches = decision(then), 0.0 if _zero_unless(condition, otherwise) else decision(otherwise)
            return None if None in branches else Choice(condition, *branches)  # type: ignore[arg-type]
        case Not() | Compare() | AnyOf():
            return Choice(term, 1.0, 0.0)
    return None


def _mapped(tree: Decision, function: Callable[[float], Decision]) -> Decision:
    return tree.map(function) if isinstance(tree, Choice) else function(tree)


def _zero_unless(condition: Term, value: Term) -> bool:
    """Whether the condition is ``value != 0``, so that where it does not hold the value is 0."""
    opened = open_access(condition) if isinstance(condition, Access) else condition
    return (
        isinstance(opened, Compare)
        and opened.kind == "!="
        and opened.right == Scalar(0)
        and isinstance(opened.left, Access)
        and isinstance(value, Access)
        and opened.left.same_element(value)
    )


def _fold(terms: Sequence[Term], combine: Callable[[float, float], float]) -> Decision | None:
    total: Decision | None = None
    for term in terms:
        each = decision(term)
        if each is None:
            return None
        total = each if total is None else _combined(total, each, combine)
        if isinstance(total, Choice) and len(total.numbers()) > _MOST_CASES:
            return None
    return total


def _combined(a: Decision, b: Decision, combine: Callable[[float, float], float]) -> Decision:
    def beside(x: float) -> Decision:
        return b.map(lambda y: combine(x, y)) if isinstance(b, Choice) else combine(x, b)

    return a.map(beside) if isinstance(a, Choice) else beside(a)


def as_condition(tree: Decision) -> Term:
    """The condition under which a choice is not 0."""
    if not isinstance(tree, Choice):
        return Scalar(bool(tree))
    then, otherwise = as_condition(tree.then), as_condition(tree.otherwise)
    if isinstance(then, Scalar) and isinstance(otherwise, Scalar):
        if then == otherwise:
            return then
        return tree.condition if then.value else Not(tree.condition)
    return Where(tree.condition, then, otherwise)
