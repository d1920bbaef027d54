"""The pass: every selection of a graph is read, and those that are proved to be indexers are rewritten.

Works in place on a graph of ATen operations whose nodes carry ``meta["val"]``, functional (Inductor's joint
graph hook, AOTAutograd, a decomposed exported program) or not (then a mutation in between rules a site out).
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Iterable

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from ..ops.budget import Budget, resolve_budget
from ..ops.validate import KEY_DTYPES, WEIGHT_DTYPES
from .axes import Access, Index, same_size, shape_of, size_expr
from .emit import Emitter, UnknownSizeError, index_of, product_of_sizes
from .normal_form import IndexerForm, NotAnIndexer, describe_indexer
from .report import Site
from .rules import argument
from .selection import Selection, module_path, selections, source_location
from .settings import Mark, PassSettings, mark_of

aten = torch.ops.aten
prims = torch.ops.prims

log = logging.getLogger("hisa_compile")


def rewrite_indexers(graph: Graph, settings: PassSettings, *, under_autograd: bool = False) -> list[Site]:
    """Rewrite every proved indexer of ``graph`` to ``hisa::indexer_topk``; one :class:`Site` a selection.

    ``under_autograd``: the graph itself will be differentiated when it runs, as a joint graph is not.
    A graph in which nothing is rewritten comes back untouched, node for node.
    """
    found = selections(graph)
    sites = [_visit(graph, node, settings, under_autograd) for node in found]
    if any(site.rewritten for site in sites):
        graph.lint()
    return sites


def _visit(graph: Graph, node: Node, settings: PassSettings, under_autograd: bool) -> Site:
    op = "topk" if "topk" in str(node.target) else "sort"
    module, location = module_path(node), source_location(node)
    mark = mark_of(node)
    topk = heads = head_dim = budget = None
    try:
        selection = Selection.read(node)
        form = describe_indexer(selection.score, selection.dim)
        topk = selection.topk
        heads, head_dim = _number(form.heads), _number(form.features)
        _check_obligations(graph, selection, form, under_autograd)
        budget = _budget(topk, settings, mark)
        _replace(graph, selection, form, budget)
    except NotAnIndexer as reason:
        return Site(op, module, location, str(reason), topk, heads, head_dim)
    except Exception as error:
        # A bug in here, or a graph that nobody thought of, must not cost the user the compile.
        log.warning("a selection at %s could not be analysed and stays flat", location or node.name, exc_info=True)
        return Site(op, module, location, f"internal error: {type(error).__name__}: {error}", topk, heads, head_dim)
    return Site(op, module, location, "", topk, heads, head_dim, budget, _kept_alive(form))


def _number(axes: Index) -> int | None:
    size = product_of_sizes(axes)
    return int(size) if size.is_Integer else None


def _budget(topk: int, settings: PassSettings, mark: Mark | None) -> Budget:
    if mark is not None and not mark.enabled:
        raise NotAnIndexer("an indexer, opted out by its mark (enabled=False)")
    if mark is None and settings.scope == "marked":
        raise NotAnIndexer('an indexer, not in a marked region while hisa.scope is "marked"')
    try:
        return resolve_budget(topk, *settings.budget_at(mark))
    except ValueError as error:
        raise NotAnIndexer(f"an indexer, but the budget does not fit: {error}") from None


# Obligations ----------------------------------------------------------------------------------------------------


def _check_obligations(graph: Graph, selection: Selection, form: IndexerForm, under_autograd: bool) -> None:
    """What must hold besides the form of the score."""
    device = selection.score.meta["val"].device
    if device.type not in ("cpu", "cuda"):
        raise NotAnIndexer(f"an indexer, but the operator has no kernel for device {device.type}")
    if not math.isfinite(form.scale) or not math.isfinite(form.inner_scale) or form.inner_scale == 0:
        raise NotAnIndexer(f"the score is scaled by {form.inner_scale} inside and {form.scale} outside the ReLU")
    for condition in form.conditions:
        if condition.access.node.meta["val"].dtype != torch.bool:
            raise NotAnIndexer(f"the mask {condition.access.node.name} is not bool")
    for access in _operands(form):
        value = access.node.meta["val"]
        # A number that lives on the CPU, as dynamic shapes make of a Python float, works with any device.
        if value.device != device and not (value.dim() == 0 and value.device.type == "cpu"):
            raise NotAnIndexer(f"{access.node.name} is on another device than the score")
    if selection.values:
        if under_autograd or any(node.op == "placeholder" and "tangents" in str(node.target) for node in graph.nodes):
            raise NotAnIndexer("its values are used in a training graph, where a gradient may flow through them")
        if any(fill != -math.inf for fill in form.fills) and (form.additive_mask or len(form.fills) > 1):
            raise NotAnIndexer("its values are used, and the mask does not set hidden ones to one value")
    _check_mutations(graph, selection, form)


def _operands(form: IndexerForm) -> list[Access]:
    assert form.key is not None
    return [*form.query, *form.row_factors, form.key, *form.key_factors, *form.weights] + [
        condition.access for condition in form.conditions
    ]


def _check_mutations(graph: Graph, selection: Selection, form: IndexerForm) -> None:
    """In a graph that is not functional: nothing read by the indexer is written to before the selection."""
    nodes = list(graph.nodes)
    nodes = nodes[: nodes.index(selection.node)]
    used = {*form.chain, *(access.node for access in _operands(form))}
    started = False
    roots: set[Node] | None = None
    for node in nodes:
        started = started or node in used
        if started and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            roots = roots or {_storage_of(n) for n in used}
            for position, spec in enumerate(node.target._schema.arguments):
                if spec.alias_info is None or not spec.alias_info.is_write:
                    continue
                written = argument(node, position, spec.name)
                for value in written if isinstance(written, (list, tuple)) else [written]:
                    if isinstance(value, Node) and _storage_of(value) in roots:
                        raise NotAnIndexer(f"{value.name} is written to by {node.name} before the selection")


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


# Replacing ------------------------------------------------------------------------------------------------------


def _replace(graph: Graph, selection: Selection, form: IndexerForm, budget: Budget) -> None:
    sources = [access.node for access in _operands(form)]
    values = [source.meta["val"] for source in sources]
    fake_mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    emit = Emitter(graph, selection.node, sources, fake_mode)
    try:
        call = _call_operator(emit, selection, form, budget)
        outputs = _outputs(emit, selection, form, call)
    except Exception as error:
        emit.roll_back()
        if isinstance(error, UnknownSizeError):
            raise NotAnIndexer(f"an indexer, but {error}") from None
        raise
    for getter, replacement in outputs:
        getter.replace_all_uses_with(replacement)
        graph.erase_node(getter)
    _take_sizes_elsewhere(graph, form)
    _erase_unused(graph, [*emit.added, selection.node, *selection.node.users])


def _call_operator(emit: Emitter, selection: Selection, form: IndexerForm, budget: Budget) -> Node:
    assert form.key is not None
    batch, queries, heads, features, keys = form.batch, form.queries, form.heads, form.features, form.keys
    q = _product(emit, [emit.arrange(x, (batch, queries, heads, features)) for x in form.query])
    k = emit.arrange(form.key, (batch, keys, features))

    scale = form.scale * abs(form.inner_scale)
    device = k.meta["val"].device

    def factor_node(access: Access, keep_missing: bool = True) -> Node:
        x = emit.arrange(access, (batch, queries, heads), keep_missing)
        x = x if x.meta["val"].device == device else emit.call(prims.device_put.default, x, device)
        return x if x.meta["val"].dtype.is_floating_point else emit.cast(x, torch.float32)

    weights = [factor_node(x, keep_missing=len(form.weights) > 1) for x in form.weights]
    if form.inner_scale < 0:
        q = emit.call(aten.neg.default, _wide(emit, q))
    for factor in form.row_factors:
        # relu(f x) = |f| relu(sign(f) x) for any f, and a product with a sign is exact in any dtype.
        f = factor_node(factor)
        weights.append(emit.call(aten.abs.default, f))
        q = _wide(emit, q)
        sign = emit.cast(emit.call(aten.sign.default, f), q.meta["val"].dtype)
        q = emit.call(aten.mul.Tensor, q, emit.call(aten.unsqueeze.default, sign, 3))
    q, k = _same_dtype(emit, q, k)

    optional = {}
    if form.conditions:
        optional["mask"] = _mask(emit, form)
    if form.key_factors:
        factors = [emit.arrange(x, (batch, keys)) for x in form.key_factors]
        optional["k_scale"] = emit.cast(_product(emit, factors), torch.float32)
    return emit.call(
        torch.ops.hisa.indexer_topk.default,
        q,
        k,
        _weights(emit, form, weights, scale, device),
        selection.topk,
        block_size=budget.block_size,
        block_topk=budget.block_topk,
        sorted=selection.sorted,
        **optional,
    )


def _product(emit: Emitter, factors: Iterable[Node]) -> Node:
    first, *rest = factors
    for factor in rest:
        first = emit.call(aten.mul.Tensor, emit.cast(first, torch.float32), emit.cast(factor, torch.float32))
    return first


def _wide(emit: Emitter, x: Node) -> Node:
    """A dtype with signed arithmetic: float8 has none, and bfloat16 holds all its values."""
    dtype = x.meta["val"].dtype
    if not dtype.is_floating_point:
        return emit.cast(x, torch.float32)
    return emit.cast(x, torch.bfloat16) if dtype.itemsize == 1 else x


def _same_dtype(emit: Emitter, q: Node, k: Node) -> tuple[Node, Node]:
    """The operator takes q and k in one dtype: the narrowest that holds both, so that casting is exact."""
    dtypes = {q.meta["val"].dtype, k.meta["val"].dtype}
    if len(dtypes) == 1 and dtypes <= set(KEY_DTYPES):
        return q, k
    wide = {dtype for dtype in dtypes if dtype.itemsize > 1}
    common = wide.pop() if len(wide) == 1 and dtypes <= set(KEY_DTYPES) else torch.float32
    return emit.cast(q, common), emit.cast(k, common)


def _weights(emit: Emitter, form: IndexerForm, factors: list[Node], scale: float, device: torch.device) -> Node:
    sizes = [product_of_sizes(axes) for axes in (form.batch, form.queries, form.heads)]
    if not factors:
        return emit.call(
            aten.full.default,
            [emit.size(s) for s in sizes],
            scale,
            dtype=torch.float32,
            device=device,
            pin_memory=False,
        )
    weights = _product(emit, factors)
    if scale != 1 or weights.meta["val"].dtype not in WEIGHT_DTYPES:
        weights = emit.cast(weights, torch.float32)
    if scale != 1:
        weights = emit.call(aten.mul.Tensor, weights, scale)
    if any(not same_size(a, b) for a, b in zip(shape_of(weights), sizes, strict=True)):
        weights = emit.call(aten.expand.default, weights, [emit.size(s) for s in sizes])
    return weights


def _mask(emit: Emitter, form: IndexerForm) -> Node:
    mask: Node | None = None
    for condition in form.conditions:
        term = emit.arrange(condition.access, (form.batch, form.queries, form.keys), keep_missing=True)
        if not condition.visible_when:
            term = emit.call(aten.bitwise_not.default, term)
        mask = term if mask is None else emit.call(aten.bitwise_and.Tensor, mask, term)
    assert mask is not None
    return mask


def _outputs(emit: Emitter, selection: Selection, form: IndexerForm, call: Node) -> list[tuple[Node, Node]]:
    """Each node that took an output of the selection, with what takes its place: same shape and dtype."""
    replacements: list[tuple[Node, Node]] = []
    dim = selection.dim % len(form.score.index)
    for getters, position in ((selection.values, 1), (selection.indices, 0)):
        if not getters:
            continue
        out = emit.call(operator.getitem, call, position)
        index = index_of((form.batch, form.queries), out.meta["val"].shape[-1])
        dims = [index[-1] if d == dim else i for d, i in enumerate(form.score.index)]
        out = emit.arrange(Access(out, index), dims)
        fill = next(iter(form.fills), -math.inf)
        if position == 1 and fill != -math.inf:
            hidden = emit.call(aten.eq.Scalar, out, -math.inf)
            out = emit.call(aten.masked_fill.Scalar, out, hidden, fill)
        for getter in getters:
            replacements.append((getter, emit.contiguous(emit.cast(out, getter.meta["val"].dtype))))
            if any(
                not same_size(a, b) for a, b in zip(shape_of(out), shape_of(getter), strict=True)
            ):  # pragma: no cover - a disagreement would be a bug; leave the graph as it was
                raise UnknownSizeError(f"the result's shape {shape_of(out)} is not the original's {shape_of(getter)}")
    return replacements


def _take_sizes_elsewhere(graph: Graph, form: IndexerForm) -> None:
    """Read sizes that the graph takes from the replaced scores (``arange(scores.shape[-1])``) from the operands."""
    assert form.key is not None
    operands = [access.node for access in (form.key, *form.query, *form.weights)]
    for user in [user for node in form.chain for user in node.users if user.target is aten.sym_size.int]:
        size = size_expr(user.meta["val"])
        for operand in operands:
            dim = next((d for d, other in enumerate(shape_of(operand)) if same_size(size, other)), None)
            if dim is not None and operand < user:
                user.args = (operand, dim)
                break


def _erase_unused(graph: Graph, nodes: list[Node]) -> None:
    """Erase the nodes that nobody uses any more, and what only they used."""
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node.op == "call_function" and not node.users and not node.is_impure() and not node._erased:
            todo.extend(node.all_input_nodes)
            graph.erase_node(node)


def _kept_alive(form: IndexerForm) -> tuple[str, ...]:
    """A note where the score is still computed for somebody else."""
    alive = [node for node in form.chain if not node._erased]
    others = sorted({user.name for node in alive for user in node.users if user not in form.chain})
    return (f"the scores are still computed for {', '.join(others)}: no memory is saved",) if others else ()
