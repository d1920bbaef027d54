"""Shadow mode: how a compiled model's rewritten indexers compare with the flat ones, on the calls that it serves.

``torch.compile(model, backend="hisa", options={"hisa.shadow": 16})`` has every rewritten site compare 16 queries a
call, drawn from those that HISA prunes, with the flat selection.  :func:`shadow_report` says what was found so far.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .config import check_count
from .fidelity import show_share
from .ops import Budget, tally
from .ops.shadow import LISTENERS
from .passes.report import Report

# Arguments of the operator that are not what `fidelity` takes: how a call returns its selection.
_OF_THE_RESULT = ("block_size", "block_topk", "sorted", "mark_hidden", "k_pooled")


@dataclass(frozen=True)
class ShadowSite:
    """What shadow mode has found at one site.

    The shares ``recall``, ``iou``, ``score_share`` and ``exact_share`` mean what they mean in
    :class:`hisa_compile.Fidelity`, and are estimates of their mean over all pruned queries of the compared calls: a
    query counts for as many as it was drawn from.  With none, when nothing is pruned, all are 1.

    site: module and line, as in the report of the rewritten sites.
    topk, budget, coarse: of its calls; coarse is the stage that was asked for, None where each call chooses.
    calls: how many were compared.
    queries: of these calls.
    exact_queries: those among them whose selection is flat by construction; they are counted and never compared.
    sampled: compared queries.
    recall_error, iou_error: standard errors of the two, of drawing these queries and not others; 0 where all pruned
        ones were compared, NaN where one alone was, of several.
    worst_recall: the least recall of a compared query.
    """

    site: str
    topk: int
    budget: Budget
    coarse: str | None
    calls: int
    queries: int
    exact_queries: int
    sampled: int
    recall: float = 1.0
    recall_error: float = 0.0
    iou: float = 1.0
    iou_error: float = 0.0
    score_share: float = 1.0
    exact_share: float = 1.0
    worst_recall: float = 1.0

    def __str__(self) -> str:
        return str(ShadowReport((self,)))


@dataclass(frozen=True)
class ShadowReport:
    """What shadow mode has found, by site."""

    sites: tuple[ShadowSite, ...] = ()

    def __str__(self) -> str:
        if not self.sites:
            return "shadow mode: no site; compile with options={'hisa.shadow': 16}"
        head = ["topk", "B", "m", "calls", "queries", "exact", "compared", "recall", "+-", "IoU", "+-", "worst"]
        rows = [[*head, "site"]]
        for site in self.sites:
            counts = (site.topk, *site.budget, site.calls, site.queries, site.exact_queries, site.sampled)
            found = (
                show_share(site.recall),
                f"{site.recall_error:.4f}",
                show_share(site.iou),
                f"{site.iou_error:.4f}",
                show_share(site.worst_recall),
            )
            rows.append([*map(str, counts), *(found if site.sampled else "-" * len(found)), site.site])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        # All but the last, the site, are numbers.
        return "\n".join(
            " ".join([*(cell.rjust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True)), row[-1]])
            for row in rows
        )


def shadow_report() -> ShadowReport:
    """What shadow mode has found at each site since the process began, or :func:`reset_shadow`; print it for a table.

    Waits for the devices.  Sites that have not run yet have 0 calls.  Compiled code that several modules share, as
    layers do whose graph breaks, is one site; so is one line that runs several times a call.
    """
    return ShadowReport(tuple(_site(key, *found) for key, found in tally.read().items()))


def reset_shadow() -> None:
    """Forget what shadow mode has found; sites stay, with 0 calls.  What is compiled or captured goes on counting."""
    tally.reset()


def _site(key: tally.SiteKey, counts: list[float], sums: list[list[float]]) -> ShadowSite:
    calls, queries, pruned, sampled = map(int, counts[: tally.WORST])
    seen = (calls, queries, queries - pruned, sampled)
    (total, *weighted), (surplus, *firsts), (_, *seconds) = sums
    # Read while a call was adding: counted already, and its figures are yet to come.
    if not sampled or not total:
        return ShadowSite(*key, *seen)
    means = [x / total for x in weighted]
    errors = []
    for mean, first, second in zip(means, firsts, seconds, strict=True):
        variance = max(0.0, second - 2 * mean * first + mean * mean * surplus) / total**2
        # One query says nothing of how queries differ.
        errors.append(math.sqrt(variance * sampled / (sampled - 1)) if sampled > 1 else math.nan if surplus else 0.0)
    by_name = dict(zip(tally.FIGURES, zip(means, errors, strict=True), strict=True))
    return ShadowSite(
        *key,
        *seen,
        *by_name["recall"],
        *by_name["iou"],
        score_share=by_name["score_share"][0],
        exact_share=by_name["exact_share"][0],
        worst_recall=counts[tally.WORST],
    )


def prepare(report: Report, values: Iterable[Any]) -> None:
    """Make the tallies of a compiled graph's sites, on the devices of ``values`` and the current one.

    CUDA graphs have memory of their own, so that it would be too late when the first call warms one up.
    """
    shadowed = [site for site in report.rewritten if site.shadow is not None]
    if not shadowed:
        return
    devices = dict.fromkeys(value.device for value in values if isinstance(value, torch.Tensor))
    if torch.cuda.is_initialized():
        devices[torch.device("cuda", torch.cuda.current_device())] = None
    for site in shadowed:
        assert site.topk is not None
        assert site.budget is not None
        for device in devices:
            tally.tally_of(tally.SiteKey(site.name, site.topk, site.budget, site.coarse), device)


# Tensors --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CapturedCall:
    """One call: its site, and copies of its arguments, on the CPU, as :func:`hisa_compile.fidelity` takes them."""

    site: str
    budget: Budget
    arguments: dict[str, Any]


@contextmanager
def capture_calls(limit: int | None = None) -> Iterator[list[CapturedCall]]:
    """Keep the tensors of sites in shadow mode: a list that grows with each call inside the ``with``.

    ``hisa_compile.fidelity(**call.arguments)`` and ``recommend_budget`` take what a call has.  Replays of a CUDA graph
    are not seen, since the host makes no call.  A call's keys and queries are copied to the CPU, for which the host
    waits: on a GPU the calls that warm a CUDA graph up have memory that nothing may keep.

    Raises:
        ValueError, TypeError: ``limit`` is no integer of at least 1.
    """
    check_count("limit", limit)
    calls: list[CapturedCall] = []

    def listener(key: tally.SiteKey, given: dict[str, Any]) -> None:
        if limit is None or len(calls) < limit:
            kept = {name: x for name, x in given.items() if x is not None and name not in _OF_THE_RESULT}
            copies = {name: x.to("cpu", copy=True) if isinstance(x, torch.Tensor) else x for name, x in kept.items()}
            calls.append(CapturedCall(key.site, key.budget, copies))

    LISTENERS.append(listener)
    try:
        yield calls
    finally:
        LISTENERS.remove(listener)
