"""Who reads what a selection returns, and whether they can tell its order."""

from . import along, indexed  # noqa: F401 - each fills the table of operations
from .order import order_matters

__all__ = ["order_matters"]
