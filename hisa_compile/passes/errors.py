"""Why a selection is not rewritten, and how nodes are called in such reasons."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node


class NotAnIndexer(Exception):
    """The selection does not rank a DSA score, or that can't be proved.

    ``str()`` is the first obligation that failed; ``node`` where it failed, None if that is the selection itself;
    ``suggestion`` a change of the model's code that would make it match, "" if there is no simple one.
    """

    def __init__(self, reason: str, node: Node | None = None, suggestion: str = "") -> None:
        super().__init__(reason)
        self.node = node
        self.suggestion = suggestion


def op_name(node: Node) -> str:
    if node.op != "call_function":
        return node.op
    return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else _name_of(node.target)


def _name_of(target: Any) -> str:
    return str(getattr(target, "__name__", target))


def describe(what: Any) -> str:
    """A node, an element of one, or a term, for a message."""
    node = what if isinstance(what, Node) else getattr(what, "node", None)
    return f"{op_name(node)} ({node.name})" if isinstance(node, Node) else type(what).__name__.lower()
