"""``hisa_compile.fidelity`` and ``recommend_budget``: every figure, computed again query by query."""

from __future__ import annotations

import importlib
import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, LAYOUTS, Call, calls, make_values
from torch import Tensor

from hisa_compile import Budget, Fidelity, Recommendation, fidelity, indexer_topk, recommend_budget, resolve_budget
from hisa_compile.ops import reference, seen
from hisa_compile.ops.coarse import COARSE_STAGES, resolve_coarse

# The package has the function under this name.
MODULE = importlib.import_module("hisa_compile.fidelity")
FIGURES = ("iou", "worst_iou", "recall", "score_share", "exact_share")
STAGES = st.sampled_from((None, *COARSE_STAGES))
LARGEST = torch.finfo(torch.float32).max


def figures(result: Fidelity) -> dict[str, float]:
    return {name: getattr(result, name) for name in FIGURES}


def positive(score: float) -> float:
    return 0.0 if math.isnan(score) or score <= 0 else min(score, LARGEST)


def by_query(call: Call) -> list[dict[str, Any]]:
    """Each query in plain Python, from the reference's selections: what it sees, and how both selections compare."""
    size = call.options["block_size"]
    budget = resolve_budget(call.topk, size, call.options["block_topk"])
    heads = call.q.shape[2]
    stage = resolve_coarse(call.options.get("coarse"), call.k.shape[1], heads, budget, False)
    visible = reference.visible_tokens(call.q, call.k, **call.visibility).flatten(0, 1)
    options = {name: x for name, x in call.options.items() if name not in ("block_size", "block_topk", "coarse")}
    flat = call._replace(options=options | {"sorted": True, "mark_hidden": True}).run(reference.flat_topk)
    found = call.with_options(sorted=True, mark_hidden=True).run(reference.indexer_topk)
    rows = []
    for number, row in enumerate(visible.tolist()):
        wanted, own = (
            {
                t: s
                for t, s in zip(x[0].flatten(0, 1)[number].tolist(), x[1].flatten(0, 1)[number].tolist(), strict=True)
                if t >= 0
            }
            for x in (flat, found)
        )
        least = list(wanted.values())[-1] if wanted else 0.0
        # The last score may be shared: then either token is right.
        common = sum(t in wanted or s >= least for t, s in own.items())
        total = sum(map(positive, wanted.values()))
        share = min(sum(map(positive, own.values())) / total, 1.0) if total else 1.0
        seen = sum(row)
        blocks = len({t // size for t, sees in enumerate(row) if sees})
        chooses = call.topk > 0 and seen > call.topk
        scored: float = {"paper": blocks, "spread": 2 * blocks}.get(stage, 2 * seen / heads)
        outer = size * max(1, min(4, 128 // size))
        kept_outer = math.ceil(4 * budget.candidates / outer)
        if stage == "two-level" and math.ceil(len(row) / outer) > kept_outer:
            outers = len({t // outer for t, sees in enumerate(row) if sees})
            scored = outers + 2 * min(seen, kept_outer * outer) / heads
        pruned = chooses and blocks > budget.block_topk
        rows.append(
            {
                "pruned": pruned,
                "chooses": chooses,
                "recall": common / len(wanted) if wanted else 1.0,
                "iou": common / (len(wanted) + len(own) - common) if wanted else 1.0,
                "share": share,
                "seen": seen,
                "cost": scored + budget.candidates if chooses and blocks > budget.block_topk else seen,
            }
        )
    return rows


def mean(values: list[float], empty: float) -> float:
    return sum(values) / len(values) if values else empty


def expected(rows: list[dict[str, Any]]) -> dict[str, float]:
    pruned = [row for row in rows if row["pruned"]]
    ious = sorted(row["iou"] for row in pruned)
    chooses = [row for row in rows if row["chooses"]]
    return {
        "queries": len(rows),
        "exact_queries": len(rows) - len(pruned),
        "sampled": len(pruned),
        "iou": mean(ious, 1.0),
        "worst_iou": mean(ious[: math.ceil(len(ious) / 20)], 1.0),
        "recall": mean([row["recall"] for row in pruned], 1.0),
        "score_share": mean([1.0 if row["recall"] == 1 else row["share"] for row in pruned], 1.0),
        "exact_share": mean([float(row["recall"] == 1) for row in pruned], 1.0),
        "cost": mean([row["cost"] for row in chooses], 0.0),
        "flat_cost": mean([row["seen"] for row in chooses], 0.0),
    }


def measured(call: Call, function: Any = fidelity, **options: Any) -> Any:
    kept = {name: x for name, x in call.options.items() if name not in ("sorted", "mark_hidden")}
    return function(call.q, call.k, call.weights, call.topk, **kept | options)


def smooth(queries: int = 40, tokens: int = 640, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and weights whose keys resemble their neighbours, so that finer blocks and more of them find more."""
    q, k, weights = make_values(
        torch.Generator().manual_seed(seed), (batch, queries, tokens + 24, 4, 16), torch.float32, "gaussian"
    )
    k = torch.nn.functional.avg_pool1d(k.mT, 25, 1).mT * 5 + 0.3 * k[:, 12:-12]
    return q, k.contiguous(), weights.abs()


def causal(queries: int, tokens: int) -> Tensor:
    return torch.arange(tokens - queries + 1, tokens + 1).int()


# Figures --------------------------------------------------------------------------------------------------------------


@settings(max_examples=600, deadline=None)
@given(calls(dtypes=DTYPES, layouts=LAYOUTS, max_queries=9, coarse=(None,)), STAGES)
def test_every_figure_is_that_of_a_loop_over_the_queries(call: Call, stage: str | None) -> None:
    """Any visibility, factors, dtypes, coarse stage, ties, NaN and inf; no query that is left out differs from flat."""
    call = call.with_options(coarse=stage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seen, "MASK_ELEMENTS", 200)
        result = measured(call)
    rows = by_query(call)
    assert result.budget == (call.options["block_size"], call.options["block_topk"])
    # With four heads or fewer the probe is nothing to choose beyond m * B tokens.
    assert result.coarse == (stage or "paper") or result.sampled == 0
    for name, value in expected(rows).items():
        assert getattr(result, name) == pytest.approx(value, rel=1e-12, abs=1e-12), name
    assert all(row["recall"] == 1 for row in rows if not row["pruned"])
    assert all(0 <= value <= 1 for value in figures(result).values())


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("how", ["windows", "holes", "mask", "segments"])
@pytest.mark.parametrize("stage", COARSE_STAGES)
def test_figures_of_gaussian_values(stage: str, how: str, seed: int, dtype: torch.dtype) -> None:
    """Sizes at which most queries are pruned, some are not, and no selection is all right or all wrong."""
    q, k, weights = (x.to(dtype) for x in smooth(queries=60, tokens=500, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"block_size": 8, "block_topk": 12, "window_end": causal(60, 500) * 2 // 3 - 60}
    options["coarse"] = stage
    options["window_end"][:7] = torch.tensor([0, 3, 20, 90, 96, 97, 104])
    if how == "holes":
        options["key_valid"] = torch.rand(2, 500, generator=generator) < 0.7
        options["window_start"] = torch.tensor([[5], [60]]).int()
    elif how == "mask":
        options["mask"] = torch.rand(60, 500, generator=generator) < 0.8
    elif how == "segments":
        options["k_segment"] = torch.randint(0, 2, (2, 500), generator=generator)
        options["q_segment"] = torch.randint(0, 3, (60,), generator=generator)
    call = Call(q, k, weights, 24, options)
    result, wanted = measured(call), expected(by_query(call))
    assert 20 < result.sampled < 113
    assert 0.2 < result.worst_iou < result.iou < result.recall < result.score_share < 1
    # float32 sums in another order may swap two tokens at the edge of a selection, a share of 1 / 24 of one query.
    for name in ("recall", "iou", "worst_iou", "score_share"):
        assert getattr(result, name) == pytest.approx(wanted[name], abs=2e-3 if dtype == torch.float32 else 5e-3), name
    for name in ("queries", "exact_queries", "sampled", "cost", "flat_cost"):
        assert getattr(result, name) == pytest.approx(wanted[name], rel=1e-12), name


def test_keeping_every_block_is_exact() -> None:
    """1 everywhere with one query compared or none; one block less, and it is not."""
    q, k, weights = smooth()
    every, fewer = (fidelity(q, k, weights, 32, block_size=32, block_topk=m) for m in (20, 19))
    assert figures(every) == dict.fromkeys(FIGURES, 1.0)
    assert (every.queries, every.exact_queries, every.sampled) == (80, 80, 0)
    assert every.cost == every.flat_cost == 640
    assert fewer.sampled == 80
    assert fewer.cost == 20 + 19 * 32
    assert all(value < 1 for value in figures(fewer).values())


def test_more_blocks_never_find_less() -> None:
    """The kept blocks of a larger budget hold those of a smaller one; all queries see all tokens, so all are alike."""
    q, k, weights = smooth()
    found = [fidelity(q, k, weights, 32, block_size=8, block_topk=m) for m in range(4, 80, 5)]
    for less, more in itertools.pairwise(found):
        assert all(getattr(less, name) <= getattr(more, name) for name in FIGURES)
    assert found[0].recall < 0.6
    assert found[-1].recall > 0.98


def test_a_default_budget_is_the_operators() -> None:
    """Resolved from topk, and from what is given of it."""
    q, k, weights = smooth()
    assert fidelity(q, k, weights, 8).budget == resolve_budget(8)
    assert fidelity(q, k, weights, 8, block_size=4).budget == resolve_budget(8, 4)
    assert fidelity(q, k, weights, 8, block_topk=3).budget == resolve_budget(8, None, 3)
    assert fidelity(q, k, weights, 8, coarse="paper").budget == resolve_budget(8)


def test_a_default_coarse_stage_is_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen for each budget by T, H and m * B; the probe is never given means, means are made for the other alone."""
    stages: list[tuple[int, str, bool]] = []

    def selecting(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        stages.append((options["block_size"] * options["block_topk"], options["coarse"], "k_pooled" in options))
        return indexer_topk(*args, **options)

    monkeypatch.setattr(MODULE, "indexer_topk", selecting)
    q, k, weights = make_values(torch.Generator().manual_seed(0), (1, 9, 640, 32, 8), torch.float32, "gaussian")
    # 2 * 640 products, and 32 * m * B / 4: the probe from 160 candidates on.
    result = recommend_budget(q, k, weights, 16, block_sizes=(4, 16, 64))
    assert {point.coarse for point in result.points} == {"paper", "probe"}
    for point in result.points:
        assert point.coarse == ("probe" if point.budget.candidates >= 160 else "paper")
        asked = fidelity(q, k, weights, 16, **point.budget._asdict(), coarse=point.coarse)
        assert point == asked
        if point.sampled:
            blocks = -(-640 // point.budget.block_size)
            coarse = 2 * 640 / 32 if point.coarse == "probe" else blocks
            assert point.cost == coarse + point.budget.candidates
    pruned = [call for call in stages if call[0] < 640]
    assert all(pooled == (stage == "paper") == (candidates < 160) for candidates, stage, pooled in pruned)
    assert not any(pooled for candidates, _, pooled in stages if candidates >= 640)


@pytest.mark.parametrize("stage", COARSE_STAGES)
def test_a_coarse_stage_that_is_asked_for_is_measured(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every budget, whatever the operator would choose; keys are averaged for means alone, once for each size."""
    pooled: list[int] = []

    def pooling(keys: Tensor, block_size: int, **options: Any) -> Tensor:
        pooled.append(block_size)
        return reference.block_representatives(keys, block_size, **options)

    monkeypatch.setattr(MODULE, "pool_keys", pooling)
    q, k, weights = make_values(torch.Generator().manual_seed(0), (2, 9, 640, 16, 8), torch.float32, "gaussian")
    result = recommend_budget(q, k, weights, 16, block_sizes=(4, 64), coarse=stage)
    assert {point.coarse for point in result.points} == {stage}
    assert sorted(pooled) == {"probe": [], "two-level": [16, 16, 128, 128]}.get(stage, [4, 4, 64, 64])
    budget = {"block_size": 4, "block_topk": 24}
    flat = reference.flat_topk(q, k, weights, 16)[0].tolist()
    found = reference.indexer_topk(q, k, weights, 16, **budget, coarse=stage)[0].tolist()
    rows = [(set(a), set(b)) for one, other in zip(flat, found, strict=True) for a, b in zip(one, other, strict=True)]
    assert fidelity(q, k, weights, 16, **budget, coarse=stage).recall == pytest.approx(
        sum(len(a & b) / 16 for a, b in rows) / len(rows)
    )


def test_equal_scores_at_the_edge_are_interchangeable() -> None:
    """Two tokens score; all others 0, in blocks that are kept or not.  Whichever fills up the selection is right."""
    k = torch.full((1, 96, 1), -1.0)
    k[0, [40, 41]] = 5.0
    q, weights = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1)
    flat = indexer_topk(q, k, weights, 8, block_size=8, block_topk=12)[0]
    pruned = indexer_topk(q, k, weights, 8, block_size=2, block_topk=4)[0]
    assert set(flat.flatten().tolist()) != set(pruned.flatten().tolist())
    assert figures(fidelity(q, k, weights, 8, block_size=2, block_topk=4)) == dict.fromkeys(FIGURES, 1.0)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_special_scores_are_figures_all_the_same(special: float) -> None:
    """In a key, with weights of both signs."""
    q, k, weights = smooth()
    k[:, 333] = special
    weights[:, ::2] *= -1
    result = fidelity(q, k, weights, 32, block_size=8, block_topk=8)
    assert all(0 <= value <= 1 for value in figures(result).values())
    assert recommend_budget(q, k, weights, 32, block_sizes=(4, 8)).best.recall >= 0.99


@pytest.mark.parametrize("shape", [(0, 3, 40, 2, 8), (2, 0, 40, 2, 8), (2, 3, 0, 2, 8), (2, 3, 40, 0, 8)])
def test_empty_tensors_lose_nothing(shape: tuple[int, ...]) -> None:
    """B, S, T or H of 0; without heads all scores are 0."""
    batch, queries, tokens, heads, dim = shape
    q, k, weights = (
        torch.ones(batch, queries, heads, dim),
        torch.ones(batch, tokens, dim),
        torch.ones(shape[:2] + (heads,)),
    )
    for options in ({}, {"mask": torch.ones(queries, tokens).bool()}, {"key_valid": torch.ones(batch, tokens).bool()}):
        result = fidelity(q, k, weights, 4, block_size=4, block_topk=2, **options)
        assert figures(result) == dict.fromkeys(FIGURES, 1.0)
        assert result.queries == batch * queries
        assert result.sampled == (6 if heads == 0 else 0)
        assert recommend_budget(q, k, weights, 4, **options).best.recall == 1


def test_queries_that_see_nothing_and_selections_of_nothing() -> None:
    """Empty windows, no valid key, segments of no token, topk of 0: exact by construction."""
    q, k, weights = smooth()
    none = torch.zeros(2, 640).bool()
    hidden: list[dict[str, Any]] = [
        {"window_start": torch.tensor(9).int(), "window_end": torch.tensor(5).int()},
        {"key_valid": none},
        {"mask": none[:, None]},
        {"q_segment": torch.tensor(3), "k_segment": torch.zeros(2, 640).long()},
        {"q_segment": torch.tensor(0), "k_segment": torch.zeros(2, 640).long(), "key_valid": none},
    ]
    for options in hidden:
        result = fidelity(q, k, weights, 8, **options)
        assert (result.exact_queries, result.sampled, result.cost, result.flat_cost) == (80, 0, 0.0, 0.0)
    assert fidelity(q, k, weights, 0).exact_queries == 80
    assert not recommend_budget(q, k, weights, 0).prunes


# Sampling -------------------------------------------------------------------------------------------------------------


def test_a_sample_is_drawn_from_the_pruned_queries_alone() -> None:
    """With one query a draw, every pruned query's share turns up and no other; the seed decides which."""
    q, k, weights = make_values(torch.Generator().manual_seed(0), (1, 12, 300, 4, 16), torch.float32, "gaussian")
    window_end = torch.arange(20, 260, 20).int()
    options: dict[str, Any] = {"block_size": 8, "block_topk": 4, "window_end": window_end}
    wanted = {round(row["share"], 4) for row in by_query(Call(q, k, weights, 24, options)) if row["pruned"]}
    assert len(wanted) == 12 - 1
    drawn = [fidelity(q, k, weights, 24, queries=1, seed=seed, **options) for seed in range(120)]
    assert {round(one.score_share, 4) for one in drawn} == wanted
    assert all((one.sampled, one.worst_iou) == (1, one.iou) for one in drawn)
    assert drawn[5] == fidelity(q, k, weights, 24, queries=1, seed=5, **options)


def test_every_batch_entry_has_its_own_sample() -> None:
    """At most ``queries`` of each; an entry with fewer that are pruned gives all of them."""
    q, k, weights = smooth()
    window_end = torch.stack((causal(40, 640), torch.full((40,), 50).int()))
    window_end[1, 20:27] = 640
    options: dict[str, Any] = {"block_size": 8, "block_topk": 12, "window_end": window_end}
    result = fidelity(q, k, weights, 24, queries=15, **options)
    assert (result.sampled, result.queries, result.exact_queries) == (15 + 7, 80, 33)
    # What is sampled has no part in what is counted of all queries.
    assert result.cost == fidelity(q, k, weights, 24, queries=1, **options).cost


def test_without_a_mask_nothing_is_looked_at_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """What queries see is counted from vectors: a whole prefill of 100000 tokens needs no 10 GB, nor minutes."""
    monkeypatch.setattr(seen, "visible_tokens", lambda *_, **__: pytest.fail("token by token"))
    tokens = 100_000
    q, k, weights = torch.ones(1, tokens, 1, 2), torch.randn(1, tokens, 2), torch.ones(1, tokens, 1)
    segment = torch.arange(tokens)[None] // 1000
    valid = torch.arange(tokens)[None] % 2 == 0
    options: dict[str, Any] = {"q_segment": segment, "k_segment": segment, "key_valid": valid}
    options["window_end"] = torch.arange(1, tokens + 1).int()
    result = fidelity(q, k, weights, 8, block_size=10, block_topk=4, queries=2, **options)
    # In each segment the first 40 queries see 4 blocks at most, the others up to 100.
    assert (result.queries, result.exact_queries) == (tokens, 40 * 100)
    # Of a segment's 1000 queries the first 16 see 8 tokens at most: one every 2 positions.
    assert result.flat_cost == pytest.approx(sum(p // 2 + 1 for p in range(16, 1000)) / 984)


def test_gradients_and_inputs_are_left_alone() -> None:
    """Tensors that require a gradient are read; nothing is written."""
    q, k, weights = (x.requires_grad_() for x in smooth())
    before = [x.detach().clone() for x in (q, k, weights)]
    k_weight = torch.rand(2, 640, requires_grad=True)
    with warnings.catch_warnings():
        # torch warns when a tensor that carries a gradient becomes a number.
        warnings.simplefilter("error")
        assert fidelity(q, k, weights, 16, block_size=8, block_topk=8, k_weight=k_weight).sampled == 80
    assert all(torch.equal(x, y) for x, y in zip((q, k, weights), before, strict=True))
    assert q.grad is None


# Recommendations ------------------------------------------------------------------------------------------------------


def needles() -> dict[str, Any]:
    """One query; 8 tokens of score 10 in the middle of 8 blocks of 64, whose other tokens' keys are -1, all else 0.5.

    The mean of n tokens around a needle is (11 - n) / n, and must be above 0.5: blocks of 4 find it, blocks of 8 or
    more don't.
    """
    k = torch.full((1, 1024, 1), 0.5)
    for block in range(3, 11):
        k[0, block * 64 : block * 64 + 64] = -1.0
        k[0, block * 64 + 30] = 10.0
    return {"q": torch.ones(1, 1, 1, 1), "k": k, "weights": torch.ones(1, 1, 1), "topk": 8}


def test_a_needle_that_one_mean_loses() -> None:
    """Blocks of 64 find none of the 8; of HISA's 8 tokens each scores 0.5 where flat's score 10."""
    lost = fidelity(**needles(), block_size=64, block_topk=8)
    assert figures(lost) == dict(zip(FIGURES, (0.0, 0.0, 0.0, 0.05, 0.0), strict=True))
    assert (lost.cost, lost.flat_cost) == (16 + 8 * 64, 1024)
    some = fidelity(**needles(), block_size=4, block_topk=8)
    # The first and the last block are always kept, and 6 of the needles' 8.
    assert figures(some) == dict(zip(FIGURES, (6 / 10, 6 / 10, 6 / 8, 61 / 80, 0.0), strict=True))
    assert figures(fidelity(**needles(), block_size=4, block_topk=10)) == dict.fromkeys(FIGURES, 1.0)


def test_needles_that_the_probe_finds() -> None:
    """In blocks of any size: it scores every token, and two heads of one are one product too many."""
    lost = fidelity(**needles(), block_size=64, block_topk=10, coarse="paper")
    found = fidelity(**needles(), block_size=64, block_topk=10, coarse="probe")
    # All blocks without a needle, and two of the needles'.
    assert (lost.recall, lost.cost) == (2 / 8, 16 + 640)
    assert figures(found) == dict.fromkeys(FIGURES, 1.0)
    assert found.cost == 2 * 1024 + 640


def test_a_recommendation_finds_the_block_size_that_does_not_lose_it() -> None:
    """Blocks of 2 find them as well, of 8 candidates times 3 instead of 6, but score 512 means."""
    result = recommend_budget(**needles(), block_sizes=(64, 2, 8, 4, 4))
    assert result.prunes
    assert result.budget == (4, 12)
    assert result.best.cost == 256 + 48
    assert result.best.recall == 1
    assert str(result).startswith(
        "topk=8, block_size=4, block_topk=12 (48 candidates), coarse=paper reaches a recall of 1.0000 (target 0.99) "
        "and scores 304 keys a query, flat 1024\n"
    )
    budgets = [point.budget for point in result.points]
    assert [m for size, m in budgets if size == 64] == [2, 3, 4, 6, 8, 12, 16]
    assert [m for size, m in budgets if size == 4] == [2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192]
    assert result.points[-1].budget == (64, 16)
    lower = recommend_budget(**needles(), block_sizes=(64, 2, 8, 4), target_recall=0.75)
    assert lower.budget == (4, 8)
    assert lower.points == result.points


def test_a_target_that_only_the_exact_regime_reaches() -> None:
    """Said plainly, with what it costs; the budget keeps every block."""
    result = recommend_budget(**needles(), block_sizes=(16, 64))
    assert not result.prunes
    assert result.budget == (64, 16)
    assert (result.best.recall, result.best.cost) == (1.0, 1024.0)
    assert len(result.points) > 2
    assert "no budget below the exact regime reaches a recall of 0.99" in str(result)
    assert "1024 keys a query" in str(result)
    assert str(result).splitlines()[-2].endswith("* exact <- best")


def test_queries_that_see_too_little_for_any_budget() -> None:
    """Nothing is recommended from nothing."""
    q, k, weights = smooth()
    result = recommend_budget(q, k, weights, 32, window_end=torch.tensor(32).int())
    assert not result.prunes
    assert len(result.points) == 1
    assert str(result).startswith("nothing to measure: with topk=32 ")
    # More than there are tokens: a budget that the operator accepts all the same.
    budget = recommend_budget(q, k, weights, 1000, block_sizes=(16,)).budget
    assert resolve_budget(1000, *budget) == budget


@settings(max_examples=60, deadline=None)
@given(calls(values="gaussian", dtypes=DTYPES, max_queries=9, coarse=(None,)), STAGES)
def test_a_point_is_what_fidelity_gives_for_its_budget(call: Call, stage: str | None) -> None:
    """Also where samples of several budgets differ, bit for bit; and the best and the front are what they say."""
    options = {name: x for name, x in call.options.items() if name not in ("block_size", "block_topk")}
    options["coarse"] = stage
    call = call._replace(topk=call.topk % 12, options=options)
    result: Recommendation = measured(call, recommend_budget, block_sizes=(2, 3, 8), queries=2, target_recall=0.7)
    for point in result.points:
        size, kept = point.budget
        assert point == measured(call, block_size=size, block_topk=kept, queries=2)
        assert (point.sampled == 0) == (point is result.points[-1])
        beaten = [
            other
            for other in result.points
            if (other.cost < point.cost and other.recall >= point.recall)
            or (other.cost <= point.cost and other.recall > point.recall)
        ]
        assert (point in result.pareto) == (not beaten)
        assert result.best.cost <= point.cost or point.recall < 0.7
    assert result.best.recall >= 0.7
    assert result.best in result.points
    assert str(result).count("*\n") + str(result).count("* exact") + str(result).count("* <-") >= len(result.pareto)


def test_flat_runs_once_and_keys_are_averaged_once_a_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each batch entry, however many budgets there are."""
    q, k, weights = smooth()
    budgets: list[Budget] = []
    pooled: list[int] = []

    def selecting(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        budgets.append(Budget(options["block_size"], options["block_topk"]))
        return indexer_topk(*args, **options)

    def pooling(keys: Tensor, block_size: int, **options: Any) -> Tensor:
        pooled.append(block_size)
        return reference.block_representatives(keys, block_size, **options)

    monkeypatch.setattr(MODULE, "indexer_topk", selecting)
    monkeypatch.setattr(MODULE, "pool_keys", pooling)
    result = recommend_budget(q, k, weights, 16, block_sizes=(8, 32), window_end=causal(40, 640))
    assert len(result.points) > 8
    assert len(budgets) == 2 * len(result.points)
    assert sum(budget.candidates >= 640 for budget in budgets) == 2
    assert sorted(pooled) == [8, 8, 32, 32]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@settings(max_examples=20, deadline=None)
@given(calls(dtypes=DTYPES, max_queries=9, coarse=(None,)))
def test_a_gpu_gives_the_same_figures(call: Call) -> None:
    """Values whose sums are exact, so that both devices select the same."""
    there = call._replace(
        q=call.q.cuda(),
        k=call.k.cuda(),
        weights=call.weights.cuda(),
        options={name: x.cuda() if isinstance(x, Tensor) else x for name, x in call.options.items()},
    )
    assert measured(there) == measured(call)
