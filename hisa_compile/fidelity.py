"""What HISA costs in selection quality for an indexer's own tensors, and which budget reaches a target.

Flat and hierarchical selections are both the operator's, the flat one with a budget that keeps every block, and are
compared for a sample of the queries.  Queries that see too little to be pruned are exact by construction; in a long
prefill they are many and would hide what happens to the others, so they are counted and never compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import check_budget
from .ops import Budget, Visibility, indexer_topk, pool_keys, resolve_budget
from .ops.budget import LARGEST_DEFAULT_BLOCK, SMALLEST_BLOCK_TOPK
from .ops.coarse import SPREAD, TWO_LEVEL, outer_of, outer_size, probes, resolve_coarse, size_of_means, vectors_of_block
from .ops.compare import compare
from .ops.seen import Seen, count_visible
from .ops.validate import check_arguments

WORST_SHARE = 0.05


@dataclass(frozen=True)
class Fidelity:
    """HISA's selections with one budget beside the flat ones.

    The figures from ``iou`` to ``exact_share`` are shares between 0 and 1 over the sampled queries; with none, when
    nothing is pruned, all are 1.  Both selections of a sampled query have topk tokens.  Tokens that score the same as
    the last one of the flat selection could have been in it as well, and count as if they were.

    topk, budget, coarse: what was asked for; budget and coarse stage are the resolved ones.
    queries: all queries, B * S.
    exact_queries: those among them whose selection is flat by construction: no more than topk tokens are visible,
        or no more than block_topk blocks hold a visible one.
    sampled: compared queries, none of them exact by construction.
    iou: mean intersection over union with the flat selection.
    worst_iou: the mean IoU of the worst 5 % of the sampled queries, of one at least.
    recall: mean share of the flat selection that was found, r.  A single query's IoU is r / (2 - r).
    score_share: mean share of the flat selection's score that HISA's has, where score is the sum of a selection's
        positive scores.  Tokens of score <= 0 are no gain to lose; NaN counts as 0, inf as the largest float32, and
        where the flat sum is 0 the share is 1.
    exact_share: share of the sampled queries with the flat selection.
    cost: keys scored a query, tokens and block means together: as many dot products a head.  Exact mean over all
        queries that see more than topk tokens, sampled or not: visible tokens where these fit in block_topk blocks,
        else block_size * block_topk, plus for "paper" the blocks that hold a visible token, for "spread" two times as
        many, for "probe" 2 / H of the visible tokens: two dot products each, shared out among the H heads; for
        "two-level" the outer blocks that hold one, and 2 / H of the visible tokens up to those of the kept outer
        blocks.  0 if there is no such query.
    flat_cost: the mean number of tokens that these queries see.
    """

    topk: int
    budget: Budget
    coarse: str
    queries: int
    exact_queries: int
    sampled: int
    iou: float
    worst_iou: float
    recall: float
    score_share: float
    exact_share: float
    cost: float
    flat_cost: float

    def __str__(self) -> str:
        pruned = self.queries - self.exact_queries
        rows = {
            "queries": f"{self.queries}, {self.exact_queries} exact by construction",
            "compared": f"{self.sampled} of {pruned}" if pruned else "none, nothing is pruned",
            "IoU": show_share(self.iou),
            "IoU, worst 5 %": show_share(self.worst_iou),
            "recall": show_share(self.recall),
            "score share": show_share(self.score_share),
            "equal to flat": show_share(self.exact_share),
            "keys scored a query": f"{self.cost:.0f}, flat {self.flat_cost:.0f}",
        }
        return "\n".join([f"HISA, {_describe(self)}"] + [f"  {k:<21}{v}" for k, v in rows.items()])


@dataclass(frozen=True)
class Recommendation:
    """Budgets measured for one indexer, and the cheapest that reaches a target.

    points: everything measured, by block size and number of blocks; last comes the exact regime, which keeps every
        block, is flat by construction and costs as much.
    best: the one of least ``cost`` whose ``recall`` reaches ``target_recall``.  Its ``coarse`` is part of what was
        measured: without it the same budget may get another coarse stage for more tokens.
    """

    target_recall: float
    points: tuple[Fidelity, ...]
    best: Fidelity

    @property
    def budget(self) -> Budget:
        """The budget of ``best``."""
        return self.best.budget

    @property
    def prunes(self) -> bool:
        """Whether ``best`` prunes anything.  If not, nothing cheaper than the exact regime reaches the target."""
        return self.best.sampled > 0

    @property
    def pareto(self) -> tuple[Fidelity, ...]:
        """The points that no other beats: none costs as little with more recall, or less with as much."""
        return tuple(
            one
            for one in self.points
            if not any(
                other.cost <= one.cost
                and other.recall >= one.recall
                and (other.cost, other.recall) != (one.cost, one.recall)
                for other in self.points
            )
        )

    def __str__(self) -> str:
        best, exact = self.best, self.points[-1]
        if self.prunes:
            verdict = (
                f"{_describe(best)} reaches a recall of {show_share(best.recall)} (target "
                f"{self.target_recall:g}) and scores {best.cost:.0f} keys a query, flat {best.flat_cost:.0f}"
            )
        elif len(self.points) == 1:
            verdict = (
                f"nothing to measure: with topk={exact.topk} and these block sizes every budget is exact for these "
                "queries, which see too few tokens"
            )
        else:
            verdict = (
                f"no budget below the exact regime reaches a recall of {self.target_recall:g} for less than the flat "
                f"indexer's {best.flat_cost:.0f} keys a query: leave this indexer flat, or lower the target"
            )
        front = self.pareto
        head = f"  {'B':>6} {'m':>6} {'m*B':>8} {'coarse':>9} {'keys':>8} "
        table = [head + f"{'recall':>7} {'IoU':>7} {'worst':>7} {'score':>7}"]
        for point in self.points:
            size, kept = point.budget
            figures = (point.recall, point.iou, point.worst_iou, point.score_share)
            marks = "*" * (point in front) + " exact" * (point.sampled == 0) + " <- best" * (point == best)
            line = f"  {size:>6} {kept:>6} {point.budget.candidates:>8} {point.coarse:>9} {point.cost:>8.0f} "
            table.append((line + " ".join(f"{show_share(figure):>7}" for figure in figures) + f" {marks}").rstrip())
        return "\n".join([verdict, *table, "  *: nothing is cheaper and as good, or better and as cheap"])


def fidelity(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    topk: int,
    *,
    block_size: int | None = None,
    block_topk: int | None = None,
    window_start: Tensor | None = None,
    window_end: Tensor | None = None,
    key_valid: Tensor | None = None,
    mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    q_segment: Tensor | None = None,
    k_segment: Tensor | None = None,
    k_weight: Tensor | None = None,
    coarse: str | None = None,
    queries: int = 64,
    seed: int = 0,
) -> Fidelity:
    """Compare HISA's selection with the flat one, for an indexer's own tensors and one budget.

    Random tensors say nothing about a model: its keys resemble their neighbours, which block means rely on.  Neither
    does a short context about a long one, since the loss grows with visible tokens / (block_size * block_topk).

    Args:
        q, k, weights, topk, block_size, block_topk, window_start, window_end, key_valid, mask, k_scale, q_segment,
            k_segment, k_weight, coarse: as :func:`hisa_compile.indexer_topk` takes them.
        queries: how many queries of each batch entry are compared at most, at least 1.  They are drawn at random,
            all alike, from those that the budget prunes.
        seed: of that draw.  The same seed draws the same queries.

    Returns:
        The figures, see :class:`Fidelity`; print it for a table.  Where B, S or T is 0, or nothing is visible, no
        query is compared.

    Raises:
        ValueError, TypeError: as :func:`hisa_compile.indexer_topk`, and for ``queries``; the message names the
            argument, what it got and expected.
    """
    check_budget(block_size, block_topk, coarse)
    options = {"window_start": window_start, "window_end": window_end, "key_valid": key_valid, "mask": mask}
    options |= {"q_segment": q_segment, "k_segment": k_segment, "k_scale": k_scale, "k_weight": k_weight}
    capture = _Capture(q, k, weights, topk, options, coarse)
    budget = resolve_budget(topk, block_size, block_topk)
    return capture.measure([budget], capture.count([budget.block_size]), queries, seed)[0]


def recommend_budget(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    topk: int,
    *,
    target_recall: float = 0.99,
    block_sizes: Iterable[int] = (16, 32, 64, 128, 256),
    window_start: Tensor | None = None,
    window_end: Tensor | None = None,
    key_valid: Tensor | None = None,
    mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    q_segment: Tensor | None = None,
    k_segment: Tensor | None = None,
    k_weight: Tensor | None = None,
    coarse: str | None = None,
    queries: int = 64,
    seed: int = 0,
) -> Recommendation:
    """Find the cheapest budget whose selection is close enough to the flat one, for an indexer's own tensors.

    For every block size, budgets of 1, 2, 3, 4, 6, 8, 12, 16, ... times topk candidates are measured, up to those that
    prune nothing.  Each measurement equals that of :func:`fidelity` with the same ``queries`` and ``seed``: it is about
    the queries that its budget prunes, so a larger budget is judged by the queries that see more.

    Args:
        q, k, weights, topk, window_start, window_end, key_valid, mask, k_scale, q_segment, k_segment, k_weight,
            coarse: as :func:`hisa_compile.indexer_topk` takes them.  Without ``coarse`` each budget is measured with
            the coarse stage that the operator chooses for it.
        target_recall: the mean recall to reach, more than 0 and at most 1.
        block_sizes: the block sizes to try, in tokens, each at least 1.
        queries, seed: as in :func:`fidelity`.

    Returns:
        The points and the best of them, see :class:`Recommendation`; print it for a table.  ``prunes`` is False where
        only the exact regime reaches the target.

    Raises:
        ValueError, TypeError: as :func:`hisa_compile.indexer_topk`, and for ``target_recall``, ``block_sizes`` and
            ``queries``; the message names the argument, what it got and expected.
    """
    if isinstance(target_recall, bool) or not isinstance(target_recall, (int, float)):
        raise TypeError(f"target_recall: got {target_recall!r} ({type(target_recall).__name__}), expected a number")
    if not 0 < target_recall <= 1:
        raise ValueError(f"target_recall: got {target_recall}, expected more than 0 and at most 1")
    if not isinstance(block_sizes, Iterable):
        raise TypeError(f"block_sizes: got {block_sizes!r} ({type(block_sizes).__name__}), expected several integers")
    sizes = list(block_sizes)
    for size in sizes:
        _check_integer("block_sizes", size, 1)
    if not sizes:
        raise ValueError("block_sizes: got none, expected one or more integers")
    sizes = sorted(set(sizes))
    check_budget(None, None, coarse)
    options = {"window_start": window_start, "window_end": window_end, "key_valid": key_valid, "mask": mask}
    options |= {"q_segment": q_segment, "k_segment": k_segment, "k_scale": k_scale, "k_weight": k_weight}
    capture = _Capture(q, k, weights, topk, options, coarse)
    seen = capture.count(sizes)
    budgets = [budget for size in sizes for budget in _candidate_budgets(topk, size, seen)]
    points = capture.measure([*budgets, capture.every_block(sizes[-1])], seen, queries, seed)
    reaching = [point for point in points if point.recall >= target_recall]
    return Recommendation(target_recall, points, min(reaching, key=lambda point: (point.cost, -point.recall)))


def show_share(share: float) -> str:
    """Cut off and not rounded up, so that 1 is 1 and what looks as if it reached a target did."""
    return f"{math.floor(share * 1e4 + 1e-6) / 1e4:.4f}"


def _describe(point: Fidelity) -> str:
    size, kept = point.budget
    budget = f"block_size={size}, block_topk={kept} ({point.budget.candidates} candidates)"
    return f"topk={point.topk}, {budget}, coarse={point.coarse}"


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected an integer >= {least}")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected an integer >= {least}")


def _candidate_budgets(topk: int, block_size: int, seen: Seen) -> list[Budget]:
    """1, 2, 3, 4, 6, 8, 12, ... times topk candidates, the paper's 4 among them, as long as some query is pruned."""
    multiples = itertools.chain([1], (digit << power for power in itertools.count() for digit in (2, 3)))
    budgets = (Budget(block_size, max(-(-m * topk // block_size), SMALLEST_BLOCK_TOPK)) for m in multiples)
    return list(dict.fromkeys(itertools.takewhile(lambda budget: bool(seen.pruned(budget).any()), budgets)))


# Queries, and what they see ------------------------------------------------------------------------------------------


def _cost(seen: Seen, heads: int, budget: Budget, stage: str, outer: Budget | None) -> tuple[float, float]:
    """``cost`` and ``flat_cost`` of :class:`Fidelity`."""
    chooses = seen.chooses
    if not chooses.any():
        return 0.0, 0.0
    blocks, tokens = seen.blocks[budget.block_size].double(), seen.tokens.double()
    share = 2 / max(heads, 1)
    coarse = tokens * share if probes(stage) else blocks * vectors_of_block(stage)
    if outer is not None:
        coarse = seen.blocks[outer.block_size] + tokens.clamp_max(outer.candidates) * share
    scored = torch.where(blocks > budget.block_topk, coarse + budget.candidates, tokens)
    return float(scored[chooses].mean()), float(tokens[chooses].mean())


class _Capture:
    """The arguments of one call of the operator, whose queries can be run in parts.

    A row of the operator's result depends on that row of q, weights, the windows, mask and q_segment alone.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        topk: int,
        options: dict[str, Tensor | None],
        coarse: str | None,
    ) -> None:
        # The operator's own checks, on the whole arguments: what it says of a sample would be about other shapes.
        check_arguments(q, k, weights, **options)
        _check_integer("topk", topk, 0)
        # Contiguous keys: every budget gathers from them, twice as fast on a CPU as from transposed ones.
        self.q, self.k, self.weights, self.topk, self.coarse = q, k.contiguous(), weights, topk, coarse
        self.batch, self.queries, self.tokens = *q.shape[:2], k.shape[1]
        shapes = dict.fromkeys(("window_start", "window_end", "q_segment"), q.shape[:2])
        shapes["mask"] = torch.Size((*q.shape[:2], self.tokens))
        given = {name: x for name, x in options.items() if x is not None}
        self._by_query = {name: x.expand(shapes[name]) for name, x in given.items() if name in shapes}
        self._by_token = {name: x for name, x in given.items() if name not in shapes}

    def every_block(self, block_size: int) -> Budget:
        """A budget that prunes nothing."""
        return Budget(block_size, max(-(-max(self.tokens, self.topk) // block_size), SMALLEST_BLOCK_TOPK))

    def stage(self, budget: Budget) -> str:
        """The coarse stage that a budget has."""
        return resolve_coarse(self.coarse, self.tokens, self.q.shape[2], budget, pooled=False)

    def outer(self, budget: Budget) -> Budget | None:
        """The outer blocks inside which it looks for a budget's, if it does."""
        return outer_of(self.stage(budget), self.tokens, budget)

    def _options(self, entry: int, rows: Tensor) -> dict[str, Tensor]:
        one = slice(entry, entry + 1)
        by_query = {name: _rows_of(x[one], rows) for name, x in self._by_query.items()}
        return by_query | {name: x[one] for name, x in self._by_token.items()}

    def _select(
        self, entry: int, rows: Tensor, budget: Budget, means: dict[int, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The operator's indices and scores for some queries of a batch entry, each [R, k'].

        ``means``: those of blocks that are known, by block size; what is missing is added.
        """
        one = slice(entry, entry + 1)
        q, k, weights = _rows_of(self.q[one], rows), self.k[one], _rows_of(self.weights[one], rows)
        options: dict[str, Any] = self._options(entry, rows) | budget._asdict()
        options["coarse"] = self.stage(budget)
        if means is not None and (not probes(options["coarse"]) or self.outer(budget)):
            size = size_of_means(options["coarse"], budget.block_size)
            if size not in means:
                means[size] = self._means(entry, size, options["coarse"] == SPREAD)
            options["k_pooled"] = means[size]
        indices, scores = indexer_topk(q, k, weights, self.topk, **options)
        return indices[0], scores[0]

    def _means(self, entry: int, block_size: int, spread: bool) -> Tensor:
        names = ("key_valid", "k_scale", "k_weight")
        one = slice(entry, entry + 1)
        factors = {name: x[one] for name, x in self._by_token.items() if name in names}
        return pool_keys(self.k[one], block_size, **factors, spread=spread)

    def count(self, block_sizes: Sequence[int]) -> Seen:
        """What every query sees."""
        given = self._by_query | self._by_token
        visibility = Visibility(**{name: x for name, x in given.items() if name in Visibility._fields})
        sizes = {*block_sizes, *(outer_size(size) for size in block_sizes if self.coarse == TWO_LEVEL)}
        return count_visible(self.q, self.k, self.topk, visibility, sorted(sizes))

    # Comparing --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, budgets: Sequence[Budget], seen: Seen, queries: int, seed: int) -> tuple[Fidelity, ...]:
        """The figures of each budget."""
        _check_integer("queries", queries, 1)
        generator = torch.Generator().manual_seed(seed)
        figures: list[list[Tensor]] = [[] for _ in budgets]
        for entry in range(self.batch):
            # A budget's sample is the first of its queries in one random order, whatever other budgets there are.
            # It is sorted because queries that lie together see much the same, which the operator makes use of.
            order = torch.randperm(self.queries, generator=generator).to(self.q.device)
            pruned = [seen.pruned(budget)[entry] for budget in budgets]
            samples = [order[among[order]][:queries].sort().values for among in pruned]
            together = torch.cat(samples).unique()
            flat = self._select(entry, together, self.every_block(LARGEST_DEFAULT_BLOCK))
            means: dict[int, Tensor] = {}
            for budget, rows, own in zip(budgets, samples, figures, strict=True):
                if rows.numel():
                    at = torch.searchsorted(together, rows)
                    found = self._select(entry, rows, budget, means)
                    own.append(compare(found, (flat[0][at], flat[1][at])).cpu())
        return tuple(self._summary(budget, seen, own) for budget, own in zip(budgets, figures, strict=True))

    def _summary(self, budget: Budget, seen: Seen, figures: list[Tensor]) -> Fidelity:
        total = self.batch * self.queries
        exact = total - int(seen.pruned(budget).sum())
        recall, share = torch.cat([*figures, torch.empty(2, 0, dtype=torch.float64)], dim=1)
        sampled = recall.shape[0]
        stage = self.stage(budget)
        cost, flat_cost = _cost(seen, self.q.shape[2], budget, stage, self.outer(budget))
        if sampled == 0:
            return Fidelity(self.topk, budget, stage, total, exact, 0, 1.0, 1.0, 1.0, 1.0, 1.0, cost, flat_cost)
        iou = (recall / (2 - recall)).sort().values
        return Fidelity(
            self.topk,
            budget,
            stage,
            queries=total,
            exact_queries=exact,
            sampled=sampled,
            iou=float(iou.mean()),
            worst_iou=float(iou[: math.ceil(WORST_SHARE * sampled)].mean()),
            recall=float(recall.mean()),
            score_share=float(share.mean()),
            exact_share=float((recall == 1).double().mean()),
            cost=cost,
            flat_cost=flat_cost,
        )


def _rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """Of [1, S, ...] some queries.  Not by indexing with a tensor, which float8 lacks on some devices."""
    return x.index_select(1, rows)
