"""HISA, hierarchical indexed sparse attention, for torch.compile."""

from .ops import indexer_topk

__all__ = ["indexer_topk"]
