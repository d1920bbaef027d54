"""Finding the selections of a graph, and where in the model's code they stand."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from .axes import same_size, shape_of, size_expr
from .normal_form import NotAnIndexer
from .rules import argument

aten = torch.ops.aten

TOPK = (aten.topk.default,)
SORTS = (aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ')


def selections(graph: Graph) -> list[Node]:
    """Every top-k and sort of the graph, in graph order."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target in TOPK + SORTS]


@dataclass(frozen=True)
class Selection:
    """A top-k that an indexer could be behind.

    node: the selection.  score, dim: what it ranks and along which dimension.  topk: how many it keeps at most
    (it keeps min(topk, T)).  values, indices: the nodes that take its outputs.
    """

    node: Node
    score: Node
    dim: int
    topk: int
    sorted: bool
    values: tuple[Node, ...]
    indices: tuple[Node, ...]

    @classmethod
    def read(cls, node: Node) -> Selection:
        """Raises NotAnIndexer where the selection itself rules an indexer out."""
        if node.target not in TOPK:
            raise NotAnIndexer("a full sort, not a top-k")
        score: Node = argument(node, 0)
        dim = argument(node, 2, "dim", -1)
        if not argument(node, 3, "largest", True):
            raise NotAnIndexer("it keeps the smallest scores")
        if not shape_of(score):
            raise NotAnIndexer("the score is a single number")
        topk = _topk(argument(node, 1, "k"), shape_of(score)[dim])
        outputs: tuple[list[Node], list[Node]] = ([], [])
        for user in node.users:
            output = argument(user, 1)
            if user.target is not operator.getitem or output not in (0, 1):
                raise NotAnIndexer(f"its outputs are used as a whole by {user.name}")
            outputs[output].append(user)
        values = tuple(getter for getter in outputs[0] if getter.users)
        return cls(node, score, dim, topk, argument(node, 4, "sorted", True), values, tuple(outputs[1]))


def _topk(k: Any, tokens: sympy.Expr) -> int:
    """The number n behind k: k itself, or n of min(n, T), which dynamic shapes leave in the graph."""
    expr = size_expr(k.meta["val"] if isinstance(k, Node) else k)
    if type(expr).__name__ == "Min":
        bounds = [arg for arg in expr.args if not same_size(arg, tokens)]
        if len(bounds) == len(expr.args) - 1 and len(bounds) == 1:
            expr = bounds[0]
    if not expr.is_Integer and same_size(expr, tokens):
        raise NotAnIndexer(f"every token is selected: k is {tokens}, the number of keys")
    if not expr.is_Integer:
        raise NotAnIndexer(f"k = {expr} is neither a number nor min(number, {tokens}), the number of keys")
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
    path = re.sub(r"\._modules\['([^']+)'\]", r".\1", path)
    name = cls if isinstance(cls, str) else cls.__name__
    return f"{path} ({name.rpartition('.')[2]})".strip()


def source_location(node: Node) -> str:
    """file:line of the innermost frame of the model's code, "" if the graph does not say."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return ":".join(frames[-1]) if frames else ""
