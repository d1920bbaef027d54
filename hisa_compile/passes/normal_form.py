"""The one description that every spelling of the DSA score is reduced to, and the proof that it fits.

    score[b,s,t] = sum_h  W[b,s,h] * ReLU( sum_d Q[b,s,h,d] * K[b,t,d] )      hidden where not visible[b,s,t]

Roles follow from the axes that a factor depends on, not from names, shapes or the order of operands: t is the
axis that the selection runs along, d what is summed inside the ReLU, h what is summed outside; of the score's
other axes those that the key depends on are batch axes and the rest are queries.  Each role may be any number
of axes.  What does not fit raises :class:`NotAnIndexer` with the first obligation that failed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Node

from ..ops.validate import KEY_DTYPES
from .axes import Access, Axis, Index, fresh_index, resolved, shape_of
from .rules import CASTS, LAYOUT, argument, constant, exact_for_floats, hides, hides_added, open_access
from .terms import Not, Plus, Product, Relu, Scalar, Sum, Term, Where

SCORE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class NotAnIndexer(Exception):
    """The selection does not rank a DSA score, or that can't be proved.  ``str()`` is the reason."""


@dataclass(frozen=True)
class Condition:
    """A bool tensor that decides visibility: visible where it is ``visible_when``."""

    access: Access
    visible_when: bool


@dataclass
class IndexerForm:
    """The canonical description of one indexer.

    batch, queries, heads, features, keys: the axes in each role.
    query, row_factors: Q is their product; the row factors do not depend on features and may have any sign.
    key, key_factors: K is their product; the key factors are per-key scales, inside the ReLU.
    weights, scale: W is their product; no weights at all means 1.
    conditions: visible where all of them say so.
    fills: the values that hidden scores had in the original (what its consumer may see of them).
    chain: the nodes that the description replaces, from the selection's input to the product.
    """

    score: Access
    keys: Index
    batch: Index = ()
    queries: Index = ()
    heads: Index = ()
    features: Index = ()
    query: list[Access] = field(default_factory=list)
    row_factors: list[Access] = field(default_factory=list)
    inner_scale: float = 1.0
    key: Access | None = None
    key_factors: list[Access] = field(default_factory=list)
    weights: list[Access] = field(default_factory=list)
    scale: float = 1.0
    conditions: list[Condition] = field(default_factory=list)
    fills: set[float] = field(default_factory=set)
    additive_mask: bool = False
    chain: list[Node] = field(default_factory=list)


def describe_indexer(score: Node, dim: int) -> IndexerForm:
    """The canonical form of the score that a selection ranks along ``dim``.

    Raises:
        NotAnIndexer: the first obligation that fails.
    """
    sizes = shape_of(score)
    if any(size == 0 for size in sizes):
        raise NotAnIndexer("a dimension of the score is empty")
    index = fresh_index(sizes, "".join("t" if d == dim % len(sizes) else "r" for d in range(len(sizes))))
    form = IndexerForm(Access(score, index), keys=index[dim])
    if not form.keys:
        raise NotAnIndexer("there is a single key, so there is nothing to select")
    _Analysis(form).run()
    return form


def stripped(access: Access) -> Access:
    """The operand seen through layouts and exact upcasts: the same numbers, closer to where they are stored."""
    while True:
        node = access.node
        if node.target in CASTS:
            source, to = argument(node, 0).meta["val"].dtype, node.meta["val"].dtype
            if source not in KEY_DTYPES or to not in SCORE_DTYPES or torch.promote_types(source, to) != to:
                return access
        elif node.target not in LAYOUT:
            return access
        opened = open_access(access)
        if not isinstance(opened, Access):
            return access
        access = opened


class _Analysis:
    def __init__(self, form: IndexerForm) -> None:
        self.form = form
        self.relus: list[Term] = []
        self.heads: list[Axis] = []
        # A sum over a single head leaves no axis behind.
        self.sums_heads = False
        self.features: list[Axis] = []
        # Factors of the ReLU's argument that depend on the key axis.
        self.key_side: list[Access] = []
        self.blocker = ""

    def run(self) -> None:
        self.outer(self.visible(self.form.score))
        if not self.relus:
            raise NotAnIndexer(f"no ReLU between the selection and {self.blocker or 'its leaves'}")
        if len(self.relus) > 1:
            raise NotAnIndexer("a product of several ReLUs")
        self.inner(self.relus[0])
        self.assign_roles()

    # Walking ------------------------------------------------------------------------------------------------

    def opened(self, access: Access) -> Term | None:
        """Open a node on the score's path, which the rewrite will replace."""
        dtype = access.node.meta["val"].dtype
        term = open_access(access)
        if term is not None and dtype not in SCORE_DTYPES:
            raise NotAnIndexer(
                f"the score is computed in {dtype} at {access.node.name}; the operator accumulates in float32"
            )
        if term is None:
            self.blocker = self.blocker or f"{_op_name(access.node)} ({access.node.name})"
        else:
            self.form.chain.append(access.node)
        return term

    def varies(self, term: Term) -> bool:
        """Whether the term depends on the key axis."""
        match term:
            case Access():
                return term.depends_on(self.form.keys)
            case Scalar():
                return False
            case Product(parts) | Plus(parts):
                return any(map(self.varies, parts))
            case Sum(_, body) | Relu(body) | Not(body):
                return self.varies(body)
            case Where(condition, then, otherwise):
                return any(map(self.varies, (condition, then, otherwise)))

    # Visibility ---------------------------------------------------------------------------------------------

    def visible(self, term: Term) -> Term:
        """Take the masks off the top of the score; what is left is the score of a visible token."""
        dtype = self.form.score.node.meta["val"].dtype
        while True:
            match term:
                case Access() if self.varies(term):
                    opened = self.opened(term)
                    if opened is None:
                        return term
                    dtype, term = term.node.meta["val"].dtype, opened
                case Where(condition, then, otherwise):
                    fills = constant(then), constant(otherwise)
                    if hides(fills[0], dtype):
                        self.hide(condition, hidden_when=True, fill=fills[0])
                        term = otherwise
                    elif hides(fills[1], dtype):
                        self.hide(condition, hidden_when=False, fill=fills[1])
                        term = then
                    else:
                        raise NotAnIndexer(
                            f"a choice between two values at {_name(condition)}, neither of which hides a token"
                        )
                case Plus((a, b)):
                    if self.mask_term(b):
                        term = a
                    elif self.mask_term(a):
                        term = b
                    else:
                        raise NotAnIndexer(
                            f"a term is added to the score that is not provably a mask: {_name(b)} or {_name(a)}"
                        )
                case _:
                    return term

    def mask_term(self, term: Term) -> bool:
        """Whether an added term is 0 at visible and hiding at other tokens; then its conditions are noted."""
        found: list[tuple[Access, bool, float]] = []

        def read(term: Term) -> bool:
            match term:
                case Access(node):
                    opened = open_access(term)
                    known = opened is not None and (node.target not in CASTS or exact_for_floats(node))
                    return known and opened is not None and read(opened)
                case Scalar(value):
                    return value == 0
                case Plus(parts):
                    return all(map(read, parts))
                case Where(condition, then, otherwise):
                    for branch, other, hidden_when in ((then, otherwise, True), (otherwise, then, False)):
                        fill = constant(branch)
                        if fill is not None and hides_added(fill):
                            found.append((condition, hidden_when, fill))
                            return read(other)
            return False

        if not read(term):
            return False
        for condition, hidden_when, fill in found:
            self.hide(condition, hidden_when, fill)
        self.form.additive_mask = self.form.additive_mask or bool(found)
        return True

    def hide(self, condition: Access, hidden_when: bool, fill: float | None) -> None:
        while True:
            opened = open_access(condition)
            if isinstance(opened, Not):
                condition, hidden_when = opened.body, not hidden_when
            elif isinstance(opened, Access) and condition.node.target in LAYOUT:
                condition = opened
            else:
                break
        assert fill is not None
        self.form.fills.add(fill)
        self.form.conditions.append(Condition(condition, visible_when=not hidden_when))

    # sum_h W * ReLU(...) --------------------------------------------------------------------------------------

    def outer(self, term: Term) -> None:
        match term:
            case Scalar(value):
                self.form.scale *= value
            case Access() if not self.varies(term):
                self.form.weights.append(stripped(term))
            case Access():
                opened = self.opened(term)
                if opened is None:
                    self.key_side.append(term)
                else:
                    self.outer(opened)
            case Product(factors):
                for factor in factors:
                    self.outer(factor)
            case Sum(axes, body):
                self.heads.extend(axes)
                self.sums_heads = True
                self.outer(body)
            case Relu(body):
                self.relus.append(body)
            case Plus():
                raise NotAnIndexer("a sum of several terms that depend on the key, none of them provably a mask")
            case Where(condition):
                raise NotAnIndexer(f"a choice by {_name(condition)} inside the sum over heads")
            case Not():
                raise NotAnIndexer("a logical operation on the score")

    # sum_d Q * K ------------------------------------------------------------------------------------------------

    def inner(self, term: Term) -> None:
        if self.key_side:
            raise NotAnIndexer(
                f"the ReLU is multiplied by {_name(self.key_side[0])}, which varies over the keys: its sign is unknown"
            )
        self.factors(term, key_found=False)

    def factors(self, term: Term, key_found: bool) -> None:
        match term:
            case Scalar(value):
                self.form.inner_scale *= value
            case Access() if not self.varies(term):
                self.form.row_factors.append(term)
            case Access():
                if key_found:
                    term = stripped(term)
                    if not term.depends_on(tuple(self.heads)):
                        self.key_side.append(term)
                        return
                opened = self.opened(term)
                if opened is None or isinstance(opened, Relu | Plus | Where | Not):
                    self.key_side.append(term)
                else:
                    self.factors(opened, key_found)
            case Sum(axes, body):
                self.features.extend(axes)
                self.factors(body, key_found)
            case Product(parts):
                fixed = [part for part in parts if not self.varies(part)]
                # A factor with the summed axis but without the key axis is the query; what it meets is the key,
                # and is not opened further: whatever it is computed from is the model's business.
                meets_query = any(isinstance(f, Access) and f.depends_on(tuple(self.features)) for f in fixed)
                for part in fixed:
                    self.factors(part, key_found)
                for part in parts:
                    if self.varies(part):
                        self.factors(part, key_found or meets_query)
            case _:
                raise NotAnIndexer("the argument of the ReLU is not a product of a query and a key")

    # Roles ------------------------------------------------------------------------------------------------------

    def assign_roles(self) -> None:
        form = self.form
        features = tuple(self.features)
        keys = [stripped(a) for a in self.key_side if a.depends_on(features)]
        form.key_factors = [stripped(a) for a in self.key_side if not a.depends_on(features)]
        form.query = [stripped(a) for a in form.row_factors if a.depends_on(features)]
        form.row_factors = [a for a in form.row_factors if not a.depends_on(features)]
        if len(keys) != 1 or not form.query:
            raise NotAnIndexer("the argument of the ReLU is not one contraction of a query with a key")
        form.key = keys[0]
        # Only now that every operand is stripped is no axis cut any more.
        form.keys = resolved(form.keys)
        form.heads = resolved(tuple(self.heads))
        form.features = resolved(features)
        rows = tuple(a for dim in form.score.index for a in resolved(dim) if a not in form.keys)
        _reject(form.key, form.heads, "the keys carry a head axis", keys[0])
        for role, axes in (("key", set(form.key.axes)), ("query", {axis for q in form.query for axis in q.axes})):
            if not set(form.features) <= axes:
                raise NotAnIndexer(f"a sum inside the ReLU runs over an axis that the {role} does not have")
        missing = [a for a in form.keys if a not in form.key.axes]
        if missing:
            raise NotAnIndexer("the keys do not cover the whole axis that is selected along")
        form.batch = tuple(a for a in rows if a in form.key.axes)
        form.queries = tuple(a for a in rows if a not in form.key.axes)
        if (not form.queries and len(form.batch) > 1) or self.made_from_query(form.key, rows):
            raise NotAnIndexer(f"each query has keys of its own: {_name(form.key)}")
        if not self.sums_heads and not form.weights:
            raise NotAnIndexer("neither a sum over heads nor weights: any linear layer with a ReLU looks like this")
        if not self.sums_heads and len(form.queries) > 1:
            raise NotAnIndexer("no sum over heads, and tokens are selected for several axes separately, as heads are")
        for factor in form.key_factors:
            _reject(factor, form.heads + form.queries, "a factor inside the ReLU varies over keys and queries", factor)
        known = set(form.batch + form.queries + form.heads + form.features + form.keys)
        for access in (*form.query, *form.row_factors, form.key, *form.key_factors, *form.weights):
            if not set(access.axes) <= known:
                raise NotAnIndexer(f"{_name(access)} depends on an axis that the score does not have")
        for weight in form.weights:
            _reject(weight, form.features, "the weights depend on the features", weight)
        for condition in form.conditions:
            _reject(condition.access, form.heads + form.features, "the mask depends on the heads", condition.access)
        if not set(form.heads).isdisjoint(form.features):
            raise NotAnIndexer("one axis is summed both inside and outside the ReLU")

    def made_from_query(self, key: Access, rows: Index) -> bool:
        """Whether the key is itself a contraction with something that varies over the score's rows."""
        opened = open_access(key)
        body = opened.body if isinstance(opened, Sum) else None
        factors = body.factors if isinstance(body, Product) else ()
        return any(isinstance(f, Access) and not self.varies(f) and f.depends_on(rows) for f in factors)


def _reject(access: Access, axes: Index, reason: str, shown: Access) -> None:
    if access.depends_on(axes):
        raise NotAnIndexer(f"{reason} ({_name(shown)})")


def _op_name(node: Node) -> str:
    return str(node.target) if node.op == "call_function" else node.op


def _name(term: Term) -> str:
    return f"{_op_name(term.node)} ({term.node.name})" if isinstance(term, Access) else type(term).__name__.lower()
