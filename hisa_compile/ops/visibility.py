"""Which tokens a query may see, as the operator's implementations receive it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Visibility(NamedTuple):
    """What hides tokens from queries; whatever is not None is ANDed, True or inside = visible.

    window_start, window_end: int32, broadcastable to [B, S]; start inclusive, end exclusive.  Any values:
        a negative start, an end past T and an empty window (start >= end) are all meaningful.
    key_valid: bool [B, T].  mask: bool, broadcastable to [B, S, T].
    q_segment, k_segment: int32 or int64, both or neither; broadcastable to [B, S], and [B, T].  Inside are the
        tokens of the query's own segment.  Ids have any values in any order.
    """

    window_start: Tensor | None = None
    window_end: Tensor | None = None
    key_valid: Tensor | None = None
    mask: Tensor | None = None
    q_segment: Tensor | None = None
    k_segment: Tensor | None = None
