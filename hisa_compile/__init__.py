"""HISA, hierarchical indexed sparse attention, for torch.compile.

model = torch.compile(model, backend="hisa")     rewrite a model's indexers
hisa_compile.explain(model, *inputs)             say what is rewritten, and what not and why
@hisa_compile.hisa(block_size=64)                give a region its own budget, or opt it out
hisa_compile.indexer_topk(q, k, weights, topk)   the operator itself
"""

from .backend import hisa_backend
from .decorator import hisa
from .explain import explain
from .history import reports
from .ops import Budget, indexer_topk, resolve_budget
from .passes.report import Report, Site

__all__ = [
    "Budget",
    "Report",
    "Site",
    "explain",
    "hisa",
    "hisa_backend",
    "indexer_topk",
    "reports",
    "resolve_budget",
]
