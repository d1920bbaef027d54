"""What must hold for a rewrite besides the form of the score."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable

import torch
from torch.fx import Graph, Node

from .axes import Access, writes
from .errors import NotAnIndexer
from .form import IndexerForm
from .rules import argument
from .selection import Selection
from .terms import leaves
from .visibility import Vectors

aten = torch.ops.aten


class GraphFacts:
    """What all selections of a graph need to know of it, found once."""

    def __init__(self, graph: Graph, under_autograd: bool) -> None:
        nodes = list(graph.nodes)
        # A joint graph takes the tangents of its outputs.
        self.differentiated = under_autograd or any(
            node.op == "placeholder" and "tangents" in str(node.target) for node in nodes
        )
        self.writes = [node for node in nodes if writes(node)]
        # The sizes that the graph computes anyway, in its order.
        self.sizes = [node for node in nodes if isinstance(node.meta.get("val"), torch.SymInt)]
        self.order = {node: number for number, node in enumerate(nodes)} if self.writes else {}


def check_obligations(facts: GraphFacts, selection: Selection, form: IndexerForm, vectors: Vectors) -> None:
    """Raises NotAnIndexer: the first obligation that fails."""
    device = selection.score.meta["val"].device
    if device.type not in ("cpu", "cuda"):
        raise NotAnIndexer(f"an indexer, but the operator has no kernel for device {device.type}")
    for part in form.parts:
        if not math.isfinite(part.scale) or not math.isfinite(part.inner_scale) or part.inner_scale == 0:
            raise NotAnIndexer(f"the score is scaled by {part.inner_scale} inside and {part.scale} outside the ReLU")
    for access in (*form.operands(), *_read_for_visibility(vectors)):
        value = access.node.meta["val"]
        if not isinstance(value, torch.Tensor):
            continue
        # A number that lives on the CPU, as dynamic shapes make of a Python float, works with any device.
        if value.device != device and not (value.dim() == 0 and value.device.type == "cpu"):
            raise NotAnIndexer(f"{access.node.name} is on another device than the score", access.node)
    if selection.values:
        if facts.differentiated:
            raise NotAnIndexer(
                "its values are used in a training graph, where a gradient may flow through them",
                selection.values[0].node,
                "detach the scores, or select under torch.no_grad()",
            )
        finite = any(math.isfinite(fill) for fill in form.fills)
        if form.traces or (finite and len(form.fills) > 1):
            raise NotAnIndexer(
                "its values are used, and the mask does not set hidden ones to one value",
                selection.values[0].node,
                'hide tokens with float("-inf")',
            )
    if facts.writes:
        _check_outputs(facts, selection)
        _check_mutations(facts, selection, form, vectors)


def _read_for_visibility(vectors: Vectors) -> Iterable[Access]:
    terms = [*vectors.first, *vectors.last, *(term for pair in vectors.segments for term in pair)]
    terms += [condition.term for condition in (*vectors.valid, *vectors.masks)]
    return [leaf for term in terms for leaf in leaves(term) if isinstance(leaf, Access)]


def _check_outputs(facts: GraphFacts, selection: Selection) -> None:
    """The parts of a sort share its memory, those of the rewritten one don't."""
    for node in facts.writes:
        for value in node.all_input_nodes:
            if len(selection.outputs) > 1 and _storage_of(value) is selection.node:
                raise NotAnIndexer(f"{value.name}, a part of the selection, is written to by {node.name}", node)


def _check_mutations(facts: GraphFacts, selection: Selection, form: IndexerForm, vectors: Vectors) -> None:
    """In a graph that is not functional: nothing read by the indexer is written to before the selection."""
    read = {access.node for access in (*form.operands(), *_read_for_visibility(vectors))}
    used = read | _between(form.score.node, read)
    first, last = min(facts.order[node] for node in used), facts.order[selection.node]
    roots = {_storage_of(node) for node in used}
    for node in facts.writes:
        if not first <= facts.order[node] < last:
            continue
        for position, spec in enumerate(node.target._schema.arguments):
            if spec.alias_info is None or not spec.alias_info.is_write:
                continue
            written = argument(node, position, spec.name)
            for value in written if isinstance(written, (list, tuple)) else [written]:
                if isinstance(value, Node) and _storage_of(value) in roots:
                    raise NotAnIndexer(f"{value.name} is written to by {node.name} before the selection", node)


def _between(score: Node, read: set[Node]) -> set[Node]:
    """What the score is made of, down to the tensors that are read in its place."""
    todo = [score]
    seen: set[Node] = set()
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            if node not in read:
                todo.extend(node.all_input_nodes)
    return seen


def _storage_of(node: Node) -> Node:
    """The node whose storage this one may share: views and in-place results are followed to their source."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        target = node.target
        aliases = target is operator.getitem or (
            isinstance(target, torch._ops.OpOverload) and any(r.alias_info is not None for r in target._schema.returns)
        )
        if not aliases and target not in (aten.reshape.default, aten.flatten.using_ints, aten.contiguous.default):
            break
        node = node.args[0]
    return node
