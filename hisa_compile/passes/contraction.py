"""The inside of a ReLU: one contraction of a query with a key, times factors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch.fx import Node

from .axes import Access, Axis
from .errors import NotAnIndexer, describe
from .form import Factor, Part, stripped
from .rules import constant
from .terms import Compare, Inverse, Not, Pieces, Plus, Product, Relu, Sum, Symbol, Term, Where


class Contraction:
    """Reads one ReLU's argument: sum_d Q * K, times factors."""

    def __init__(
        self, part: Part, opened: Callable[[Access], Term | None], varies: Callable[[Term], bool], chain: list[Node]
    ) -> None:
        self.part = part
        self.opened = opened
        self.varies = varies
        self.chain = chain
        self.features: list[Axis] = []
        self.row_side: list[Factor] = []
        self.key_side: list[Factor] = []

    def read(self, body: Term) -> None:
        part = self.part
        self.factors(body, key_found=False)
        features = part.features = tuple(self.features)
        keys = [f for f in self.key_side if f.access.depends_on(features)]
        query = [f for f in self.row_side if f.access.depends_on(features)]
        if len(keys) != 1 or not query or any(f.inverse for f in keys + query):
            raise self.no_contraction()
        part.key = stripped(keys[0].access)
        part.key_factors = [_stripped(f) for f in self.key_side if f not in keys]
        part.query = [stripped(f.access) for f in query]
        part.row_factors = [_stripped(f) for f in self.row_side if f not in query]
        part.weights = [_stripped(f) for f in part.weights]
        part.key_weights = [_stripped(f) for f in part.key_weights]

    def no_contraction(self) -> NotAnIndexer:
        return NotAnIndexer("the argument of the ReLU is not one contraction of a query with a key", self.chain[-1])

    def factors(self, term: Term, key_found: bool, inverse: bool = False) -> None:
        varies = self.varies(term)
        number = None if varies else constant(term)
        match term:
            case _ if number is not None:
                self.part.inner_scale *= (1 / number if number else math.inf) if inverse else number
            case Access() | Symbol() if not varies:
                factor = factor_of(term)
                self.row_side.append(replace(factor, inverse=factor.inverse != inverse))
            case Access():
                if key_found:
                    term = stripped(term)
                    if not term.depends_on(self.part.heads):
                        self.key_side.append(Factor(term, inverse))
                        return
                opened = self.opened(term)
                if opened is None or isinstance(opened, Relu | Plus | Where | Not | Pieces | Compare):
                    self.key_side.append(Factor(term, inverse))
                else:
                    self.factors(opened, key_found, inverse)
            case Sum(axes, body) if not inverse:
                self.features.extend(axes)
                self.factors(body, key_found)
            case Inverse(body):
                self.factors(body, key_found, not inverse)
            case Product(parts):
                fixed = [part for part in parts if not self.varies(part)]
                # A factor with the summed axis but without the key axis is the query; what it meets is the key,
                # and is not opened further: whatever it is computed from is the model's business.
                meets_query = any(isinstance(f, Access) and f.depends_on(tuple(self.features)) for f in fixed)
                for part in fixed:
                    self.factors(part, key_found, inverse)
                for part in parts:
                    if part not in fixed:
                        self.factors(part, key_found or meets_query, inverse)
            case _:
                raise self.no_contraction()


def factor_of(term: Term) -> Factor:
    inverse = False
    while isinstance(term, Inverse):
        term, inverse = term.body, not inverse
    if isinstance(term, Symbol):
        term = Access(term.node, ())
    if not isinstance(term, Access):
        raise NotAnIndexer(f"the score is multiplied by {describe(term)}")
    return Factor(term, inverse)


def _stripped(factor: Factor) -> Factor:
    return replace(factor, access=stripped(factor.access))
