"""The operators: reference, schema and meta, CPU and Triton implementations.  Knows nothing of graphs."""

from .budget import Budget, resolve_budget
from .schema import OP_NAME, POOL_NAME, indexer_topk, pool_keys
from .shadow import SHADOW_NAME
from .visibility import Visibility

__all__ = ["OP_NAME", "POOL_NAME", "SHADOW_NAME", "Budget", "Visibility", "indexer_topk", "pool_keys", "resolve_budget"]
