"""HISA, hierarchical indexed sparse attention, for torch.compile.

model = torch.compile(model, backend="hisa")     rewrite a model's indexers
hisa_compile.explain(model, *inputs)             say what is rewritten, and what not and why
@hisa_compile.hisa(block_size=64)                give a region its own budget, or opt it out
hisa_compile.indexer_topk(q, k, weights, topk)   the operator itself
hisa_compile.pool_keys(k, block_size)            the block means it reads, for a cache that keeps them
hisa_compile.fidelity(q, k, weights, topk)       what a budget costs in selection quality, for an indexer's own tensors
hisa_compile.recommend_budget(...)               the cheapest budget that reaches a target recall, for the same
hisa_compile.shadow_report()                     how rewritten indexers compare with the flat ones on live calls
"""

from .backend import hisa_backend
from .decorator import hisa
from .explain import explain
from .fidelity import Fidelity, Recommendation, fidelity, recommend_budget
from .history import reports
from .ops import Budget, indexer_topk, pool_keys, resolve_budget
from .passes.report import Report, Site
from .shadow import CapturedCall, ShadowReport, ShadowSite, capture_calls, reset_shadow, shadow_report

__all__ = [
    "Budget",
    "CapturedCall",
    "Fidelity",
    "Recommendation",
    "Report",
    "ShadowReport",
    "ShadowSite",
    "Site",
    "capture_calls",
    "explain",
    "fidelity",
    "hisa",
    "hisa_backend",
    "indexer_topk",
    "pool_keys",
    "recommend_budget",
    "reports",
    "reset_shadow",
    "resolve_budget",
    "shadow_report",
]
