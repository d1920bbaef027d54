"""HISA, hierarchical indexed sparse attention, for torch.compile.

model = torch.compile(model, backend="hisa")     rewrite a model's indexers
hisa_compile.explain(model, *inputs)             say what is rewritten, and what not and why
@hisa_compile.hisa(block_size=64)                give a region its own budget, or opt it out
hisa_compile.indexer_topk(q, k, weights, topk)   the operator itself
hisa_compile.pool_keys(k, block_size)            the block means it reads, for a cache that keeps them
"""

from .backend import hisa_backend
from .decorator import hisa
from .explain import explain
from .history import reports
from .ops import Budget, indexer_topk, pool_keys, resolve_budget
from .passes.report import Report, Site

__all__ = [
    "Budget",
    "Report",
    "Site",
    "explain",
    "hisa",
    "hisa_backend",
    "indexer_topk",
    "pool_keys",
    "reports",
    "resolve_budget",
]
