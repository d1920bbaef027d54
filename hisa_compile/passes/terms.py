"""What an operation computes for one element, in a handful of forms.

A rule (:mod:`.rules`) opens one node: it says of which elements of its inputs one element of its output is the
product, the sum, the ReLU, ...  The normal form (:mod:`.normal_form`) is read off these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from .axes import Access, Axis


@dataclass(frozen=True)
class Scalar:
    """A number."""

    value: float


@dataclass(frozen=True)
class Product:
    factors: tuple[Term, ...]


@dataclass(frozen=True)
class Plus:
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Sum:
    """The sum of ``body`` over axes that no other term has."""

    axes: tuple[Axis, ...]
    body: Term


@dataclass(frozen=True)
class Relu:
    body: Term


@dataclass(frozen=True)
class Where:
    condition: Access
    then: Term
    otherwise: Term


@dataclass(frozen=True)
class Not:
    body: Access


Term: TypeAlias = Access | Scalar | Product | Plus | Sum | Relu | Where | Not
