"""What the tests of shadow mode share."""

from __future__ import annotations

import pytest
import torch
from strategies import Call
from torch import Tensor

from hisa_compile import Fidelity, ShadowSite, shadow_report

# More queries than any call has.
EVERY = 10**6
OPERATOR = torch.ops.hisa.indexer_topk.default
SHADOW = torch.ops.hisa.indexer_topk_shadow.default


def only_site() -> ShadowSite:
    (site,) = shadow_report().sites
    return site


def assert_same(site: ShadowSite, whole: Fidelity, calls: int = 1) -> None:
    """All pruned queries of equal calls were compared, and the figures are those of ``fidelity``."""
    assert (site.topk, site.budget, site.calls) == (whole.topk, whole.budget, calls)
    assert site.queries == calls * whole.queries
    assert site.exact_queries == calls * whole.exact_queries
    assert site.sampled == calls * whole.sampled
    for name in ("recall", "iou", "score_share", "exact_share"):
        assert getattr(site, name) == pytest.approx(getattr(whole, name), abs=1e-12), name
    assert site.recall_error == pytest.approx(0, abs=1e-7)
    assert site.iou_error == pytest.approx(0, abs=1e-7)


def operator_call(call: Call, sample: int, site: str = "here", every: int = 1) -> tuple[Tensor, Tensor]:
    return torch.ops.hisa.indexer_topk_shadow(
        site, sample, every, call.q, call.k, call.weights, call.topk, **call.options
    )
