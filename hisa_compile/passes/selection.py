"""Finding the selections of a graph, and where in the model's code they stand."""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from .axes import is_used, same_size, shape_of, size_expr
from .errors import NotAnIndexer
from .form import common_dtype
from .rules import CASTS, COPIES, LAYOUT, argument

aten = torch.ops.aten
prims = torch.ops.prims

TOPK = (aten.topk.default,)
SORTS = (aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)

# What stands between a selection and those who use it.
FLIPS = {aten.flip.default, prims.rev.default}
TAKES_PART = CASTS | LAYOUT | FLIPS | {operator.getitem, aten.slice.Tensor}

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ')


def selections(graph: Graph) -> list[Node]:
    """Every top-k and sort of the graph, in graph order."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target in TOPK + SORTS]


@dataclass(frozen=True)
class Output:
    """A node that takes the first ``count`` of what a selection keeps, best first or, ``reversed``, best last."""

    node: Node
    count: int
    reversed: bool = False


@dataclass(frozen=True)
class Selection:
    """A top-k that an indexer could be behind.

    node: the selection.  score, dim: what it ranks and along which dimension.  smallest: by ascending score.
    topk: how many it keeps at most (it keeps min(topk, T)).  values, indices: what takes its outputs.
    """

    node: Node
    score: Node
    dim: int
    smallest: bool
    topk: int
    sorted: bool
    values: tuple[Output, ...]
    indices: tuple[Output, ...]

    @classmethod
    def read(cls, node: Node) -> Selection:
        """Raises NotAnIndexer where the selection itself rules an indexer out."""
        score: Node = argument(node, 0)
        if not shape_of(score):
            raise NotAnIndexer("the score is a single number", score)
        return _read_topk(node, score) if node.target in TOPK else _read_sort(node, score)

    @property
    def outputs(self) -> tuple[Output, ...]:
        return self.values + self.indices


def _read_topk(node: Node, score: Node) -> Selection:
    dim = argument(node, 2, "dim", -1)
    topk = _topk(argument(node, 1, "k"), shape_of(score)[dim])
    values, indices = ([Output(getter, topk) for getter in getters] for getters in _getters(node))
    smallest = not argument(node, 3, "largest", True)
    in_order = argument(node, 4, "sorted", True)
    return Selection(node, score, dim, smallest, topk, in_order, tuple(values), tuple(indices))


def _getters(node: Node) -> tuple[list[Node], list[Node]]:
    """The nodes that take values and indices; those of values that nobody uses are left out."""
    outputs: tuple[list[Node], list[Node]] = ([], [])
    for user in node.users:
        output = argument(user, 1)
        if user.target is not operator.getitem or output not in (0, 1):
            raise NotAnIndexer(f"its outputs are used as a whole by {user.name}", user)
        if is_used(user) or output == 1:
            outputs[output].append(user)
    return outputs


def _read_sort(node: Node, score: Node) -> Selection:
    """A sort of which only the first or the last few are used."""
    argsort = node.target in (aten.argsort.default, aten.argsort.stable)
    if node.target in (aten.sort.stable, aten.argsort.stable):
        # Both are keyword-only, behind "stable".
        positions = (len(node.args), len(node.args))
    else:
        positions = (1, 2)
    dim, descending = argument(node, positions[0], "dim", -1), argument(node, positions[1], "descending", False)
    dim %= len(shape_of(score))
    getters = ([], [node]) if argsort else _getters(node)
    ends: set[bool] = set()
    values, indices = ([output for getter in each for output in _parts(getter, dim, ends)] for each in getters)
    if not ends:
        raise NotAnIndexer("its result is not used")
    if len(ends) == 2:
        raise NotAnIndexer("both ends of a sort are used")
    # The last of an ascending order are the largest, and so are the first of a descending one.
    smallest = ends.pop() == descending
    topk = max(output.count for output in (*values, *indices))
    return Selection(node, score, dim, smallest, topk, True, tuple(values), tuple(indices))


def _parts(sorted_: Node, dim: int, ends: set[bool], flipped: bool = False) -> Iterator[Output]:
    """The parts of a sorted tensor that are used; adds to ``ends`` from which end of it they are, True = the last.

    From whichever end a part is taken, it lists that end's outermost element first, or last if it is a tail.
    """
    size = shape_of(sorted_)[dim]
    for user in sorted_.users:
        if not is_used(user):
            continue
        if not isinstance(user.meta.get("val"), torch.Tensor):
            raise NotAnIndexer(f"a full sort, not a top-k: {user.name} uses all of it", user, "select with topk(k)")
        rank = len(shape_of(user))
        if user.target in FLIPS and [d % rank for d in argument(user, 1)] == [dim]:
            yield from _parts(user, dim, ends, not flipped)
            continue
        if is_exact_step(user) or (user.target is aten.slice.Tensor and _keeps_all(user)):
            yield from _parts(user, dim, ends, flipped)
            continue
        if user.target is not aten.slice.Tensor or argument(user, 1, "dim", 0) % rank != dim:
            raise NotAnIndexer(
                f"a full sort, not a top-k: {user.name} uses all of it",
                user,
                "select with topk(k), or use nothing but the first k of the sort",
            )
        start, end = argument(user, 2, "start"), argument(user, 3, "end")
        if argument(user, 4, "step", 1) != 1:
            raise NotAnIndexer(f"a sort of which {user.name} takes every other token", user)
        if isinstance(end, int) and end < 0:
            raise NotAnIndexer(f"a sort of which {user.name} drops the last {-end}", user, "select with topk(k)")
        first, kept = _expr(0 if start is None else start), shape_of(user)[dim]
        if first == 0:
            count, at_end = _topk(end, size), False
        elif same_size(first, -kept) or same_size(first + kept, size):
            count, at_end = _topk(int(kept) if kept.is_Integer else None, size), True
        else:
            raise NotAnIndexer(f"a sort of which {user.name} takes tokens from the middle", user)
        ends.add(at_end != flipped)
        yield Output(user, count, at_end)


def is_exact_step(user: Node) -> bool:
    """Whether what stands between a selection and its part, a copy or a cast, keeps scores and positions."""
    if user.target in COPIES:
        return True
    if user.target not in CASTS:
        return False
    source, to = argument(user, 0).meta["val"].dtype, user.meta["val"].dtype
    if source.is_floating_point:
        return bool(to.is_floating_point and common_dtype(source, to) == to)
    return to in (torch.int64, torch.int32)


def _keeps_all(part: Node) -> bool:
    """Whether a slice is of all of its operand, written ``[:]``."""
    ends = argument(part, 2, "start"), argument(part, 3, "end"), argument(part, 4, "step", 1)
    return ends[0] in (None, 0) and ends[1] in (None, sys.maxsize) and ends[2] == 1


def _expr(size: Any) -> sympy.Expr:
    return size_expr(size.meta["val"] if isinstance(size, Node) else size)


def _topk(k: Any, tokens: sympy.Expr) -> int:
    """The number n behind k: k itself, or n of min(n, T), which dynamic shapes leave in the graph."""
    if k is None:
        raise NotAnIndexer(f"every token is selected, or a part of {tokens} that is not a number")
    expr = _expr(k)
    if type(expr).__name__ == "Min":
        bounds = [arg for arg in expr.args if not same_size(arg, tokens)]
        if len(bounds) == len(expr.args) - 1 and len(bounds) == 1:
            expr = bounds[0]
    if not expr.is_Integer and same_size(expr, tokens):
        raise NotAnIndexer(
            f"every token is selected: k is {tokens}, the number of keys",
            suggestion="compile or export with more keys than k, so that min(k, keys) stays k",
        )
    if not expr.is_Integer:
        raise NotAnIndexer(
            f"k = {expr} is neither a number nor min(number, {tokens}), the number of keys",
            k if isinstance(k, Node) else None,
            "select a fixed number: topk(min(k, scores.shape[-1]))",
        )
    if expr == 0:
        raise NotAnIndexer("k is 0")
    return int(expr)


def module_path(node: Node) -> str:
    """Dotted path and class of the innermost module that made the node, "" if the graph does not say."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, cls = list(stack.values())[-1]
    path = re.sub(r"^L\['\w+'\]\.?", "", path)
    path = path.removeprefix("_export_root.")
    path = re.sub(r"\._modules\['([^']+)'\]", r".\1", path)
    name = cls if isinstance(cls, str) else cls.__name__
    return f"{path} ({name.rpartition('.')[2]})".strip()


def source_location(node: Node) -> str:
    """file:line of the innermost frame of the model's code, "" if the graph does not say."""
    # Generated code, such as the body of an exported branch, is no file that one could open.
    frames = [f for f in _FRAME.findall(node.meta.get("stack_trace") or "") if not f[0].startswith("<")]
    return ":".join(frames[-1]) if frames else ""
