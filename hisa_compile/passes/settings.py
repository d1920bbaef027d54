"""What the caller decides about a rewrite, and how a marked region says it inside a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# Key of a mark in an FX node's ``meta["custom"]``; its value is ``Mark.to_annotation()``.
MARK_KEY = "hisa"


@dataclass(frozen=True)
class Mark:
    """A region's own settings, from the decorator.  None = as the backend says."""

    enabled: bool = True
    block_size: int | None = None
    block_topk: int | None = None
    coarse: str | None = None
    shadow: int | None = None

    def to_annotation(self) -> dict[str, Any]:
        """The value to put under ``MARK_KEY`` with ``torch.fx.traceback.annotate``."""
        return {
            "enabled": self.enabled,
            "block_size": self.block_size,
            "block_topk": self.block_topk,
            "coarse": self.coarse,
            "shadow": self.shadow,
        }


def mark_of(node: torch.fx.Node) -> Mark | None:
    """The innermost mark around the code that made ``node``, None where there is none."""
    annotation = (node.meta.get("custom") or {}).get(MARK_KEY)
    return None if annotation is None else Mark(**annotation)


@dataclass(frozen=True)
class PassSettings:
    """Settings of one run of the pass.

    block_size, block_topk: the budget, None = derived from topk (see ``ops.resolve_budget``).
    scope: "all" rewrites every indexer that is not opted out, "marked" only those in marked regions.
    coarse: the coarse stage, None = chosen at each call (see ``ops.coarse``).
    shadow: how many queries a call are compared with the flat selection (see ``ops.shadow``), None = none.
    shadow_every: one in so many calls does so.
    """

    block_size: int | None = None
    block_topk: int | None = None
    scope: str = "all"
    coarse: str | None = None
    shadow: int | None = None
    shadow_every: int = 1

    def budget_at(self, mark: Mark | None) -> tuple[int | None, int | None, str | None]:
        """(block_size, block_topk, coarse) for a site: the mark's where it has its own, else these."""
        if mark is None:
            return self.block_size, self.block_topk, self.coarse
        return (
            self.block_size if mark.block_size is None else mark.block_size,
            self.block_topk if mark.block_topk is None else mark.block_topk,
            self.coarse if mark.coarse is None else mark.coarse,
        )

    def shadow_at(self, mark: Mark | None) -> int | None:
        """How many queries a call are compared at a site: the mark's number where it has its own, else this one."""
        return self.shadow if mark is None or mark.shadow is None else mark.shadow
