"""The operators: reference, schema and meta, CPU and Triton implementations.  Knows nothing of graphs."""

from .budget import Budget, resolve_budget
from .schema import OP_NAME, indexer_topk
from .visibility import Visibility

__all__ = ["OP_NAME", "Budget", "Visibility", "indexer_topk", "resolve_budget"]
