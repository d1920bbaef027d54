"""The description of an indexer's score: which tensor plays which part in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from ..ops.validate import KEY_DTYPES
from .axes import Access, Axis, Index, renamed, resolved, same_node, same_size
from .rules import CASTS, LAYOUT, argument, open_access
from .visibility import Condition

SCORE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Factor:
    """A tensor that the score is multiplied by, or divided by."""

    access: Access
    inverse: bool = False


@dataclass
class Part:
    """Heads that the graph sums in one go: ``scale * weights * ReLU(inner_scale * row factors * query . key)``.

    heads, features: the axes summed outside and inside the ReLU.
    query: Q is their product.  row_factors: factors inside the ReLU that depend on neither key nor features; they
    may have any sign.  weights, scale: W is their product, no weights at all means 1.
    key, key_factors, key_weights: as in :class:`IndexerForm`, which takes them from its first part.
    sums_heads: a sum over heads was seen, over an axis or as the terms of an addition.
    """

    heads: Index = ()
    features: Index = ()
    query: list[Access] = field(default_factory=list)
    row_factors: list[Factor] = field(default_factory=list)
    inner_scale: float = 1.0
    key: Access | None = None
    key_factors: list[Factor] = field(default_factory=list)
    key_weights: list[Factor] = field(default_factory=list)
    weights: list[Factor] = field(default_factory=list)
    scale: float = 1.0
    sums_heads: bool = False


@dataclass
class IndexerForm:
    """The canonical description of one indexer.

    batch, queries, keys: the axes in each role.  parts: at least one; all have the first one's key and factors.
    key: K is it times the key factors, per-key scales inside the ReLU.  key_weights: g is their product.
    conditions: visible where all of them say so.
    fills: the values that hidden scores have in the original (what its consumer may see of them).
    traces: hidden scores leave a trace in those values, or they are rounded.
    chain: the nodes that the description replaces, from the selection's input to the product.
    """

    score: Access
    keys: Index
    smallest: bool = False
    batch: Index = ()
    queries: Index = ()
    parts: list[Part] = field(default_factory=list)
    conditions: list[Condition] = field(default_factory=list)
    fills: set[float] = field(default_factory=set)
    traces: bool = False
    chain: list[Node] = field(default_factory=list)

    @property
    def key(self) -> Access:
        key = self.parts[0].key
        assert key is not None
        return key

    @property
    def key_features(self) -> Index:
        return self.parts[0].features

    @property
    def key_factors(self) -> list[Factor]:
        return self.parts[0].key_factors

    @property
    def key_weights(self) -> list[Factor]:
        return self.parts[0].key_weights

    def operands(self) -> list[Access]:
        """Every tensor that the score is computed from, visibility aside."""
        found = [self.key, *(factor.access for factor in self.key_factors + self.key_weights)]
        for part in self.parts:
            found += [*part.query, *(factor.access for factor in part.row_factors + part.weights)]
        return found


def stripped(access: Access) -> Access:
    """The operand seen through layouts and exact upcasts: the same numbers, closer to where they are stored."""
    while True:
        node = access.node
        if node.target in CASTS:
            source, to = argument(node, 0).meta["val"].dtype, node.meta["val"].dtype
            if source not in KEY_DTYPES or to not in SCORE_DTYPES or common_dtype(source, to) != to:
                return access
        elif node.target not in LAYOUT and node.target is not torch.ops.aten.slice.Tensor:
            return access
        opened = open_access(access)
        # A part is read from where it is; only a slice of everything is seen through.
        if not isinstance(opened, Access) or (node.target not in LAYOUT | CASTS and opened.index != access.index):
            return access
        access = opened


def common_dtype(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """A dtype that holds the values of both; torch promotes no float8."""
    if a == b:
        return a
    narrow = [dtype for dtype in (a, b) if dtype.is_floating_point and dtype.itemsize == 1]
    if len(narrow) == 1:
        return b if a in narrow else a
    return torch.bfloat16 if narrow else torch.promote_types(a, b)


def same_factors(first: Sequence[Factor], other: Sequence[Factor], same: Mapping[Axis, Axis]) -> bool:
    """Whether two lists of factors are the same; ``same``: other's axes -> first's, where they differ."""
    return len(first) == len(other) and all(
        a.inverse == b.inverse
        and a.access.same_element(Access(b.access.node, tuple(renamed(dim, same) for dim in b.access.index)))
        for a, b in zip(first, other, strict=True)
    )


def matched_features(first: Part, other: Part, same: Mapping[Axis, Axis]) -> Index | None:
    """``other``'s features in the order of ``first``'s, if both parts have the same key.

    ``same``: other's remaining axes -> first's, where they are not the same anyway.
    """
    assert first.key is not None
    assert other.key is not None
    if not same_node(first.key.node, other.key.node):
        return None
    partner: dict[Axis, Axis] = {}
    for a, b in zip(first.key.index, other.key.index, strict=True):
        mine, others = resolved(a), resolved(b)
        if len(mine) != len(others):
            return None
        for x, y in zip(mine, others, strict=True):
            if x in first.features and y in other.features and same_size(x.size, y.size):
                partner[x] = y
            elif x is not same.get(y, y):
                return None
    return tuple(partner[axis] for axis in first.features)
