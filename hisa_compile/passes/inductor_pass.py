"""The rewriting pass as an Inductor custom pass.  Imports Inductor: import it only when compiling with it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from . import rewrite
from .report import Site
from .settings import PassSettings


class RewritePass(CustomGraphPass):
    """Rewrites the indexers of every graph it is called on and keeps their sites.

    Made for one compile of one torch-level graph.  ``ran`` stays False where Inductor took the compiled graph
    from its cache.
    """

    def __init__(self, settings: PassSettings, uuid: str) -> None:
        self.settings = settings
        self.sites: list[Site] = []
        self.ran = False
        self._uuid = uuid
        self._seen: weakref.WeakSet[torch.fx.Graph] = weakref.WeakSet()

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.ran = True
        sites = rewrite.rewrite_indexers(graph, self.settings)
        if graph in self._seen:
            # Freezing runs the joint passes twice over one graph: what was left alone is seen again.
            sites = [site for site in sites if site not in self.sites]
        self._seen.add(graph)
        self.sites.extend(sites)

    def uuid(self) -> str:
        return self._uuid


class ComposedPass(CustomGraphPass):
    """Several passes in one slot, in order: torch 2.11 takes a single pass in each of its hooks."""

    def __init__(self, passes: Sequence[Any]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: torch.fx.Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> tuple[Any, ...] | None:
        """All passes' ids; None, which turns Inductor's caches off, where a pass has none."""
        ids = tuple(each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.passes)
        return ids if all(ids) else None


def compose(before: Any, last: RewritePass) -> CustomGraphPass:
    """``last`` after whatever a hook of Inductor's configuration holds: nothing, a pass, or a list of passes."""
    if before is None:
        return last
    return ComposedPass([*(before if isinstance(before, (list, tuple)) else [before]), last])
