"""Digests of what decides a rewrite, and of what decides a report.

Inductor and AOTAutograd cache compiled graphs under a key that covers the torch-level graph, the inputs, the
configuration and the ``uuid`` of custom passes, but no annotation of a node.  So the marks of a graph are
part of :func:`rewrite_id`, or a marked and an unmarked model would share one compiled result.

A report says more than compiled code does (module paths, source lines), so its key, :func:`report_key`,
is finer: whatever could change the report changes the key.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .passes.settings import PassSettings, mark_of


def rewrite_id(gm: torch.fx.GraphModule, settings: PassSettings) -> str:
    """Digest of what decides a rewrite besides the graph: our sources, the settings, the marks on ``gm``.

    In shadow mode the names of sites are in the rewritten graph, and so whatever they are made of counts as well.
    """
    nodes = [node for module in graph_modules(gm) for node in module.graph.nodes]
    marks = [mark_of(node) for node in nodes]
    named = any(settings.shadow_at(mark) is not None for mark in [None, *marks])
    places = (line for node in nodes for line in _describe_node(node)) if named else ()
    return _digest([source_id(), repr(settings), *map(repr, marks), *places])


def report_key(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], parts: Iterable[str]) -> str:
    """Digest of what decides the report of compiling ``gm``; take it before compiling.

    ``parts``: what is not to be seen here: the rewrite's id, other passes' ids, the configuration.
    """
    return _digest(
        [
            torch.__version__,
            *parts,
            *_ambient_state(),
            *_describe_inputs(gm, example_inputs),
            *(line for module in graph_modules(gm) for node in module.graph.nodes for line in _describe_node(node)),
        ]
    )


@functools.cache
def source_id() -> str:
    """Digest of all Python files of this package."""
    root = Path(__file__).parent
    paths = sorted(root.rglob("*.py"))
    return _digest(part for path in paths for part in (path.relative_to(root).as_posix(), path.read_text("utf-8")))


def graph_modules(gm: torch.fx.GraphModule) -> Iterator[torch.fx.GraphModule]:
    """``gm`` and the graphs of its higher-order operators (checkpoint, cond, ...)."""
    for module in gm.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield module


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _ambient_state() -> Iterator[str]:
    yield f"grad {torch.is_grad_enabled()} inference {torch.is_inference_mode_enabled()}"
    yield f"dtype {torch.get_default_dtype()} deterministic {torch.are_deterministic_algorithms_enabled()}"
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            yield f"autocast {device} {torch.get_autocast_dtype(device)}"


def _describe_inputs(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Iterator[str]:
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    # Dynamo's placeholders know symbolic sizes; the example inputs of other callers do.
    values = [node.meta.get("example_value") for node in placeholders]
    if None in [type(value) if value is not None else None for value in values]:
        values = list(example_inputs)
    shape_env = None
    for value in values:
        yield _describe_value(value)
        sizes = [value] if isinstance(value, torch.SymInt) else getattr(value, "shape", ())
        for size in sizes:
            if isinstance(size, torch.SymInt):
                shape_env = size.node.shape_env
    for name, tensor in [*gm.named_parameters(), *gm.named_buffers()]:
        yield f"{name} {_describe_value(tensor)}"
    if shape_env is not None:
        # What is statically known of the sizes can decide a rewrite.
        for symbol, bounds in sorted(shape_env.var_to_range.items(), key=lambda item: str(item[0])):
            yield f"{symbol} in {bounds}"
        for guard in shape_env.guards:
            yield str(guard.expr)


def _describe_value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        strides = tuple(value.stride()) if value.layout is torch.strided else ()
        return (
            f"{type(value).__name__} {value.dtype} {tuple(value.shape)} {strides} {value.device} {value.layout} "
            f"{value.requires_grad}"
        )
    return f"{type(value).__name__} {value}"


def _describe_node(node: torch.fx.Node) -> Iterator[str]:
    target = node.target
    if callable(target) and hasattr(target, "__qualname__"):
        target = f"{target.__module__}.{target.__qualname__}"
    yield f"{node.op} {node.name} {target} {node.args} {node.kwargs}"
    yield node.meta.get("stack_trace") or ""
    yield str(list((node.meta.get("nn_module_stack") or {}).values()))
