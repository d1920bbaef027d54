"""One rule an operation: what an element of its result is, in terms of elements of its inputs.

To teach the analysis an operation, add a function to the file of its family::

    @rule(aten.permute.default, kind=LAYOUT)
    def _permute(node, index):
        x, order = argument(node, 0), argument(node, 1)
        ...
        return Access(x, ...)

``index`` addresses the element of ``node``'s tensor that is asked for.  A rule returns None where it can't tell;
a node without a rule is a leaf, whatever it computes.  Rules see operations both before and after Inductor's
decompositions.  Casts between float dtypes are not a form of their own: the caller looks at the dtypes of the
nodes that it opens.
"""

from . import arithmetic, conditions, layouts, relu  # noqa: F401 - each fills the table
from .registry import CASTS, COPIES, LAYOUT, argument, constant, exact_for_floats, open_access, rounded, rule

__all__ = ["CASTS", "COPIES", "LAYOUT", "argument", "constant", "exact_for_floats", "open_access", "rounded", "rule"]
