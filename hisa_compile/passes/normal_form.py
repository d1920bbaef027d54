"""The one description that every spelling of the DSA score is reduced to, and the proof that it fits.

    score[b,s,t] = g[b,t] * sum_h  W[b,s,h] * ReLU( sum_d Q[b,s,h,d] * K[b,t,d] )      hidden where not visible[b,s,t]

Roles follow from the axes that a factor depends on, not from names, shapes or the order of operands: t is the
axis that the selection runs along, d what is summed inside the ReLU, h what is summed outside; of the score's
other axes those that the key depends on are batch axes and the rest are queries.  Each role may be any number
of axes.  A sum over heads that is spelled as additions is several :class:`Part`\\ s over one key.  What does not fit
raises :class:`NotAnIndexer` with the first obligation that failed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import sympy
import torch
from torch.fx import Node

from .axes import (
    Access,
    Axis,
    Index,
    Shifted,
    fresh_index,
    product_of_sizes,
    resolved,
    shape_of,
)
from .contraction import Contraction, factor_of
from .errors import NotAnIndexer, describe
from .form import SCORE_DTYPES, Factor, IndexerForm, Part, matched_features, same_factors
from .rules import constant, open_access
from .terms import Inverse, Not, Pieces, Plus, Product, Relu, Sum, Term, Where, depends_on
from .visibility import Choice, Condition, as_condition, decision

# How many operations are looked through in search of the factor that holds the ReLU.
_SEARCHED = 200


def describe_indexer(score: Node, dim: int, smallest: bool = False) -> IndexerForm:
    """The canonical form of the score that a selection ranks along ``dim``, by descending or ascending value.

    Raises:
        NotAnIndexer: the first obligation that fails.
    """
    sizes = shape_of(score)
    if any(size == 0 for size in sizes):
        raise NotAnIndexer("a dimension of the score is empty", score)
    index = fresh_index(sizes, "".join("t" if d == dim % len(sizes) else "r" for d in range(len(sizes))))
    form = IndexerForm(Access(score, index), index[dim], smallest)
    if not form.keys:
        raise NotAnIndexer("there is a single key, so there is nothing to select", score)
    _Analysis(form).run()
    return form


def hides_added(value: float) -> bool:
    """Whether a score that this number is added to is below every score that a token can have.

    That is -inf or the lowest number of bfloat16, which many models take for float32 scores too (no score that did
    not overflow is as low).  Not float16's: scores of some ten thousand, to which it is added, may exceed others.
    """
    return value <= torch.finfo(torch.bfloat16).min


def hides(value: float, dtype: torch.dtype) -> bool:
    """Whether this number in place of a score of ``dtype`` is below every score that a token can have."""
    return hides_added(value) or (dtype == torch.float16 and value <= torch.finfo(dtype).min)


@dataclass(frozen=True)
class _Outside:
    """What a ReLU is multiplied by and summed over, collected on the way to it."""

    scale: float = 1.0
    weights: tuple[Factor, ...] = ()
    key_weights: tuple[Factor, ...] = ()
    heads: Index = ()
    sums_heads: bool = False


class _Analysis:
    def __init__(self, form: IndexerForm) -> None:
        self.form = form
        # For the reason: what was met that has no rule, and the last product on the way.
        self.blockers: list[Node] = []
        self.product: Node | None = None

    def run(self) -> None:
        form = self.form
        score, scale = self.visible(form.score)
        # The sign of what multiplies the whole sum decides whether its largest or its smallest tokens are selected.
        if (scale < 0) != form.smallest:
            raise NotAnIndexer(
                "it keeps the smallest scores",
                form.score.node,
                "an indexer keeps the largest: topk(score), or topk(-score, largest=False)",
            )
        for body, outside in self.relus(score, _Outside(scale)):
            part = Part(
                heads=outside.heads,
                weights=list(outside.weights),
                key_weights=list(outside.key_weights),
                scale=outside.scale,
                sums_heads=outside.sums_heads,
            )
            Contraction(part, self.opened, self.varies, form.chain).read(body)
            form.parts.append(part)
        self.assign_roles()

    # Walking ------------------------------------------------------------------------------------------------

    def opened(self, access: Access) -> Term | None:
        """Open a node on the score's path, which the rewrite will replace."""
        dtype = access.node.meta["val"].dtype
        term = open_access(access)
        if term is not None and dtype not in SCORE_DTYPES:
            raise NotAnIndexer(
                f"the score is computed in {dtype} at {access.node.name}; the operator accumulates in float32",
                access.node,
                "compute the score in float32" if dtype == torch.float64 else "",
            )
        if term is None:
            self.blockers.append(access.node)
        else:
            self.form.chain.append(access.node)
            if isinstance(term, Sum) and isinstance(term.body, Product):
                self.product = access.node
        return term

    def varies(self, term: Term) -> bool:
        return depends_on(term, self.form.keys)

    # Visibility ---------------------------------------------------------------------------------------------

    def visible(self, term: Term) -> tuple[Term, float]:
        """Take masks and number factors off the top of the score: the score of a visible token, and its scale."""
        dtype = self.form.score.node.meta["val"].dtype
        scale = 1.0
        while True:
            # In this direction lie the scores that are not selected.
            down = -scale if self.form.smallest else scale
            match term:
                case Access() if self.varies(term):
                    opened = self.opened(term)
                    if opened is None:
                        return term, scale
                    dtype, term = term.node.meta["val"].dtype, opened
                case Product(factors) if sum(constant(factor) is None for factor in factors) == 1:
                    for factor in factors:
                        number = constant(factor)
                        if number is None:
                            term = factor
                        elif number == 0:
                            raise NotAnIndexer("the score is multiplied by 0")
                        else:
                            scale *= number
                case Where(condition, then, otherwise):
                    for fill, other, hidden_when in ((then, otherwise, True), (otherwise, then, False)):
                        number = constant(fill)
                        if number is not None and hides(number * (1 if down > 0 else -1), dtype):
                            self.form.conditions.append(Condition(condition, not hidden_when))
                            self.note_fill(number, scale)
                            term = other
                            break
                    else:
                        numbers = [x for x in map(constant, (then, otherwise)) if x is not None]
                        filled = f"{numbers[0]:g} in the place of scores" if numbers else "a choice between scores"
                        raise NotAnIndexer(
                            f"{filled} at {describe(condition)} hides no token",
                            _node(condition),
                            "hide tokens with -inf or torch.finfo(dtype).min",
                        )
                case Plus(terms):
                    masks = [part for part in terms if self.mask_term(part, down, scale)]
                    rest = [part for part in terms if part not in masks]
                    if not rest:
                        raise NotAnIndexer("masks are added to nothing that depends on the key")
                    if len(rest) == 1:
                        term = rest[0]
                    elif masks:
                        term = Plus(tuple(rest))
                    else:
                        return term, scale
                case _:
                    return term, scale

    def mask_term(self, term: Term, down: float, scale: float) -> bool:
        """Whether an added term is 0 at visible and hiding at other tokens; then its condition is noted."""
        tree = decision(term)
        if tree is None:
            return False
        numbers = tree.numbers() if isinstance(tree, Choice) else [tree]
        sign = 1 if down > 0 else -1
        if 0 not in numbers or not all(number == 0 or hides_added(number * sign) for number in numbers):
            return False
        if isinstance(tree, Choice):
            self.form.conditions.append(Condition(as_condition(tree.map(lambda number: float(number == 0))), True))
            for number in set(numbers) - {0}:
                self.note_fill(number, scale)
                self.form.traces |= math.isfinite(number)
        return True

    def note_fill(self, number: float, scale: float) -> None:
        """Note what a hidden score becomes; a scale rounds a finite one, or makes it infinite."""
        self.form.fills.add(number * scale)
        self.form.traces |= math.isfinite(number) and abs(scale) != 1

    # g * sum_h W * ReLU(...) ----------------------------------------------------------------------------------

    def relus(self, term: Term, outside: _Outside) -> Iterable[tuple[Term, _Outside]]:
        """The argument of each ReLU in the sum, with what it is multiplied by and summed over."""
        todo = [(term, outside)]
        found = []
        while todo:
            term, outside = todo.pop()
            match term:
                case Relu(body):
                    found.append((body, outside))
                case Access() if self.varies(term):
                    opened = self.opened(term)
                    if opened is None:
                        raise self.no_relu(term)
                    todo.append((opened, outside))
                case Product(factors):
                    todo.append(self.factor(factors, outside))
                case Sum(axes, body):
                    todo.append((body, replace(outside, heads=(*outside.heads, *axes), sums_heads=True)))
                case Plus(parts):
                    if not outside.heads and not outside.weights and not outside.key_weights:
                        # What heads are added to may begin with the mask.
                        down = -outside.scale if self.form.smallest else outside.scale
                        parts = tuple(part for part in parts if not self.mask_term(part, down, outside.scale))
                    missing = [part for part in parts if not self.varies(part) or not self.holds_relu(part)]
                    if len(missing) == len(parts):
                        raise self.no_relu(parts[0])
                    if missing:
                        raise NotAnIndexer(
                            f"a term is added to the score that is not provably a mask: {describe(missing[0])}",
                            _node(missing[0]),
                            'if it is a mask, make it in the graph: scores.masked_fill(hidden, float("-inf"))',
                        )
                    todo.extend((part, replace(outside, sums_heads=True)) for part in reversed(parts))
                case Where(condition, then, otherwise):
                    if any(
                        number is not None and hides_added(-abs(number)) for number in map(constant, (then, otherwise))
                    ):
                        raise NotAnIndexer(
                            f"a mask, {describe(condition)}, inside the sum over heads",
                            _node(condition),
                            "apply the mask after the sum over heads",
                        )
                    raise NotAnIndexer(
                        f"the choice by {describe(condition)} is no ReLU, which is 0 below 0 and x above",
                        _node(condition),
                    )
                case Pieces(axis, pieces):
                    if axis not in outside.heads:
                        raise NotAnIndexer("the score is put together from parts by cat", self.form.chain[-1])
                    todo.extend(reversed(list(_pieces_of_sum(axis, pieces, outside))))
                case _:
                    raise self.no_relu(term)
        return found

    def no_relu(self, term: Term) -> NotAnIndexer:
        """What stands where the ReLU should be: another function, or the product itself."""
        suggestion = "apply torch.relu to the products of queries and keys, before the sum over heads"
        for node in self.blockers:
            if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
                return NotAnIndexer(f"no ReLU: {describe(node)} is applied instead", node, suggestion)
        if self.product is not None:
            return NotAnIndexer(f"no ReLU around the product {describe(self.product)}", self.product, suggestion)
        last = self.blockers[0] if self.blockers else _node(term)
        return NotAnIndexer(f"no ReLU between the selection and {describe(last or term)}", last)

    def factor(self, factors: tuple[Term, ...], outside: _Outside) -> tuple[Term, _Outside]:
        """Sort the factors of a product; returns the one that holds the ReLU."""
        scale, weights, key_weights = outside.scale, list(outside.weights), list(outside.key_weights)
        varying: list[Term] = []
        for factor in factors:
            number = constant(factor)
            if number is not None:
                scale *= number
            elif self.varies(factor):
                varying.append(factor)
            else:
                weights.append(factor_of(factor))
        holding = varying
        if len(varying) > 1:
            holding = [factor for factor in varying if self.holds_relu(factor)]
            if len(holding) > 1:
                raise NotAnIndexer("a product of several ReLUs", _node(holding[0]))
            key_weights += [factor_of(factor) for factor in varying if factor not in holding]
        if not holding:
            raise self.no_relu(varying[0] if varying else factors[0])
        return holding[0], replace(outside, scale=scale, weights=tuple(weights), key_weights=tuple(key_weights))

    def holds_relu(self, term: Term) -> bool:
        todo, looked_at = [term], 0
        while todo and looked_at < _SEARCHED:
            looked_at += 1
            match todo.pop():
                case Relu():
                    return True
                case Access() as access if self.varies(access):
                    opened = open_access(access)
                    if opened is not None:
                        todo.append(opened)
                    else:
                        self.blockers.append(access.node)
                case Product(parts) | Plus(parts):
                    todo.extend(parts)
                case Pieces(_, pieces):
                    todo.extend(piece for _, piece in pieces)
                case Sum(_, body) | Inverse(body) | Not(body):
                    todo.append(body)
                case Where(_, then, otherwise):
                    todo += [then, otherwise]
        return False

    # Roles ------------------------------------------------------------------------------------------------------

    def assign_roles(self) -> None:
        form = self.form
        # Only now that every operand is stripped is no axis cut any more.
        form.keys = resolved(form.keys)
        for part in form.parts:
            part.heads, part.features = resolved(part.heads), resolved(part.features)
        rows = tuple(a for dim in form.score.index for a in resolved(dim) if a not in form.keys)
        for part in form.parts:
            self.check_part(part)
        form.batch = tuple(a for a in rows if a in form.key.axes)
        form.queries = tuple(a for a in rows if a not in form.key.axes)
        if (not form.queries and len(form.batch) > 1) or self.made_from_query(form.key, rows):
            raise NotAnIndexer(
                f"each query has keys of its own: {describe(form.key)}",
                form.key.node,
                "one set of keys k[b,t,d] for all queries; what a query may see is a mask",
            )
        self.unify(form.parts)
        first = form.parts[0]
        sums_heads = first.sums_heads
        weighted = any(part.weights for part in form.parts)
        if not sums_heads and not weighted:
            raise NotAnIndexer(
                "neither a sum over heads nor weights: any linear layer with a ReLU looks like this", form.score.node
            )
        if not sums_heads and len(form.queries) > 1:
            raise NotAnIndexer(
                "no sum over heads, and tokens are selected for several axes separately, as heads are", form.score.node
            )
        for factor in form.key_factors + form.key_weights:
            place = "inside" if factor in form.key_factors else "outside"
            _reject(factor.access, form.queries, f"a factor {place} the ReLU varies over keys and queries")
        if form.key_weights and not weighted:
            raise NotAnIndexer(
                f"the weights vary over the keys ({describe(form.key_weights[0].access)})",
                form.key_weights[0].access.node,
                "weights must not vary over the keys; a factor of the keys is one beside weights w[b,s,h] only",
            )
        self.check_axes()

    def check_part(self, part: Part) -> None:
        assert part.key is not None
        _reject(part.key, part.heads, "the keys carry a head axis")
        for role, axes in (("key", set(part.key.axes)), ("query", {axis for q in part.query for axis in q.axes})):
            if not set(part.features) <= axes:
                raise NotAnIndexer(
                    f"a sum inside the ReLU runs over an axis that the {role} does not have", part.key.node
                )
        if any(axis not in part.key.axes for axis in self.form.keys):
            raise NotAnIndexer("the keys do not cover the whole axis that is selected along", part.key.node)
        if not set(part.heads).isdisjoint(part.features):
            raise NotAnIndexer("one axis is summed both inside and outside the ReLU", part.key.node)
        for factor in part.key_factors + part.key_weights:
            _reject(factor.access, part.heads + part.features, "the weights vary over the keys and the heads")

    def unify(self, parts: list[Part]) -> None:
        """Bring all parts to the first one's feature axes, which their common key tells."""
        first = parts[0]
        for part in parts[1:]:
            assert first.key is not None
            assert part.key is not None
            features = matched_features(first, part, {})
            if features is None:
                raise NotAnIndexer(
                    f"the parts of the sum have different keys: {describe(first.key)} and {describe(part.key)}",
                    part.key.node,
                )
            part.features = features
            for name in ("key_factors", "key_weights"):
                if not same_factors(getattr(first, name), getattr(part, name), {}):
                    raise NotAnIndexer("the parts of the sum scale their keys differently", part.key.node)

    def check_axes(self) -> None:
        form = self.form
        around = set(form.batch + form.queries + form.keys)
        for part in form.parts:
            known = around.union(part.heads, part.features)
            accesses = [*part.query, *(f.access for f in part.row_factors + part.weights + part.key_factors)]
            for access in [*accesses, *(f.access for f in part.key_weights)]:
                if not set(access.axes) <= known:
                    raise NotAnIndexer(
                        f"{describe(access)} depends on an axis that the score does not have", access.node
                    )
            for factor in part.weights:
                _reject(factor.access, part.features, "the weights depend on the features")
        summed = tuple(axis for part in form.parts for axis in part.heads + part.features)
        for condition in form.conditions:
            if depends_on(condition.term, summed):
                raise NotAnIndexer("the mask depends on the heads", _node(condition.term))

    def made_from_query(self, key: Access, rows: Index) -> bool:
        """Whether the key is itself a contraction with something that varies over the score's rows."""
        opened = open_access(key)
        body = opened.body if isinstance(opened, Sum) else None
        factors = body.factors if isinstance(body, Product) else ()
        return any(isinstance(f, Access) and not self.varies(f) and f.depends_on(rows) for f in factors)


def _pieces_of_sum(
    axis: Axis, pieces: Iterable[tuple[Index, Access]], outside: _Outside
) -> Iterable[tuple[Term, _Outside]]:
    """A sum over what ``cat`` or ``stack`` put together, one piece at a time, with its part of the weights."""
    start: sympy.Expr = sympy.Integer(0)
    heads = tuple(head for head in outside.heads if head is not axis)
    for axes, piece in pieces:
        weights = tuple(replace(f, access=_part_of(f.access, axis, axes, start)) for f in outside.weights)
        yield piece, replace(outside, heads=(*heads, *axes), weights=weights)
        start += product_of_sizes(axes)


def _part_of(access: Access, axis: Axis, axes: Index, start: sympy.Expr) -> Access:
    """``access`` where ``axis`` is ``start`` + the position in ``axes``."""
    index = tuple((Shifted(axes, start),) if resolved(dim) == (axis,) else dim for dim in access.index)
    part = Access(access.node, index)
    if part.depends_on((axis,)):
        raise NotAnIndexer(f"a sum over parts that {describe(access)} can't be divided into", access.node)
    return part


def _reject(access: Access, axes: Index, reason: str) -> None:
    if access.depends_on(axes):
        raise NotAnIndexer(f"{reason} ({describe(access)})", access.node)


def _node(term: Term | None) -> Node | None:
    return term.node if isinstance(term, Access) else None
