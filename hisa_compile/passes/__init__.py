"""Analysis and rewriting of graphs.  Knows the operators' schemas, no kernels."""

from .report import Report, Site
from .rewrite import rewrite_indexers
from .settings import MARK_KEY, Mark, PassSettings, mark_of

__all__ = ["MARK_KEY", "Mark", "PassSettings", "Report", "Site", "mark_of", "rewrite_indexers"]
