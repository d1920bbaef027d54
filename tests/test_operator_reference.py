"""The reference against another formulation of the contract: one query at a time, in plain Python floats."""

from __future__ import annotations

import math
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from strategies import Call, calls, make_values, with_means

from hisa_compile.ops import reference

INF = float("inf")


def relu(x: float) -> float:
    return x if x > 0 or math.isnan(x) else 0.0


def score(query: Sequence[Sequence[float]], weights: Sequence[float], key: Sequence[float]) -> float:
    """sum_h w[h] * ReLU(q[h] . key)."""
    products = (sum(a * b for a, b in zip(head, key, strict=True)) for head in query)
    return sum((w * relu(p) for w, p in zip(weights, products, strict=True)), 0.0)


def spread_of(column: Sequence[float], mean: float, dims: int) -> float:
    """The power of two at or below sqrt(31 / D) standard deviations of a block's keys in one dimension."""
    variance = sum((x - mean) ** 2 for x in column) / len(column) * 31 / dims
    if not math.isfinite(variance):
        return variance
    return 2.0 ** math.floor(math.log2(variance) / 2) if variance >= 2.0**-126 else 0.0


def score_with_spread(query: Sequence[Sequence[float]], weights: Sequence[float], both: Sequence[float]) -> float:
    """sum_h w[h] * ReLU(q[h] . mean + sign(w[h]) |q[h]| . spread), the mean and the spread one after the other."""
    longer = [[*head, *(abs(x) if w >= 0 else -abs(x) for x in head)] for w, head in zip(weights, query, strict=True)]
    return score(longer, weights, both)


def by_score(scores: dict[int, float]) -> list[int]:
    """Positions by descending score, NaN first, equal scores by ascending position."""
    return sorted(scores, key=lambda p: (not math.isnan(scores[p]), 0.0 if math.isnan(scores[p]) else -scores[p], p))


def probe_of_tokens(
    heads: Sequence[Sequence[float]],
    weights: Sequence[float],
    keys: Sequence[Sequence[float]],
    scales: Sequence[float],
    factors: Sequence[float],
    dtype: torch.dtype,
) -> list[float]:
    """p of every token (ops/coarse.py): two heads, of no more digits than ``dtype`` has, in units of their own."""
    sums = []
    for sign in (1.0, -1.0):
        own = [(relu(sign * w), head) for w, head in zip(weights, heads, strict=True)]
        sums.append([sum((w * head[d] for w, head in own), 0.0) for d in range(len(heads[0]))])
    greatest = max((abs(x) for x in sums[0] + sums[1]), key=lambda x: (math.isnan(x), x))
    unit = 1.0
    if 0 < greatest < INF:
        while greatest * unit < 128:
            unit *= 2
        while greatest * unit >= 256:
            unit /= 2
    both = torch.tensor(sums, dtype=torch.float64) * unit
    if dtype.itemsize == 1:
        # torch's own rounding of inf depends on its version.
        both = both.masked_fill(both.isinf(), math.nan)
    plus, minus = both.to(dtype).double().tolist()
    probed = []
    for f, scale, key in zip(factors, scales, keys, strict=True):
        x, y = (sum((a * b for a, b in zip(head, key, strict=True)), 0.0) for head in (plus, minus))
        # ReLU(scale x) - ReLU(scale y), and NaN where infinities meet.
        probed.append(f * ((x - y) + (-1 if scale < 0 else 1) * (abs(x) - abs(y))) * scale / 2)
    return probed


def probe_of_blocks(probed: Sequence[float], visible: Sequence[bool], size: int, topk: int) -> dict[int, float]:
    """What every eligible block is worth to the probe (reference.probe_block_scores)."""
    tokens, topk = len(probed), max(1, topk)
    stride = max(1, topk // 16, math.ceil(tokens / 8192))
    places = [i * stride + i * 7919 % stride for i in range(math.ceil(tokens / stride))]
    sample = {t: probed[t] for t in places if t < tokens and visible[t] and not math.isnan(probed[t])}
    threshold = cap = 0.0
    if sample:
        best_first = [sample[t] for t in by_score(sample)]
        rank = min(len(sample), max(1, 3 * topk // (2 * stride)))
        threshold = best_first[rank - 1]
        more = best_first[(rank + 1) // 2 - 1] - threshold
        cap = 2.0 ** math.floor(math.log2(more)) if 0 < more < 2.0**127 else 0.0
    worths = {}
    for first in range(0, tokens, size):
        seen = [probed[t] for t in range(first, min(first + size, tokens)) if visible[t]]
        if seen:
            best = math.nan if any(map(math.isnan, seen)) else max(seen) - threshold
            capped = (min(x - threshold, cap) for x in seen if x > threshold)
            worths[first // size] = sum(capped, 0.0) + best / 2 if best > 0 else best
    return worths


def stage_of(call: Call) -> str:
    """The coarse stage: what is given, else the means where they are at hand or the probe is not cheap."""
    budget = call.options["block_size"] * call.options["block_topk"]
    cheap = 2 * call.k.shape[1] <= 0.25 * call.q.shape[2] * budget
    return call.options.get("coarse") or ("probe" if cheap and "k_pooled" not in call.options else "paper")


def select_for_one_query(call: Call, batch: int, query: int) -> tuple[list[int], list[float]]:
    """The contract (docs/operator.md) for one query: positions and scores in sorted order."""
    tokens, options = call.k.shape[1], call.options
    rows = call.q.shape[:2]
    plain: list[list[float]] = call.k[batch].double().tolist()
    keys, scales = plain, [1.0] * tokens
    if "k_scale" in options:
        scales = options["k_scale"][batch].tolist()
        keys = [[x * scale for x in key] for key, scale in zip(keys, scales, strict=True)]
    valid = options["key_valid"][batch].tolist() if "key_valid" in options else [True] * tokens
    start = int(options["window_start"].expand(rows)[batch, query]) if "window_start" in options else 0
    end = int(options["window_end"].expand(rows)[batch, query]) if "window_end" in options else tokens
    allowed = options["mask"].expand(*rows, tokens)[batch, query].tolist() if "mask" in options else [True] * tokens
    together = [True] * tokens
    if "q_segment" in options:
        own_segment = int(options["q_segment"].expand(rows)[batch, query])
        together = [segment == own_segment for segment in options["k_segment"][batch].tolist()]
    visible = [start <= t < end and valid[t] and allowed[t] and together[t] for t in range(tokens)]
    factors = options["k_weight"][batch].tolist() if "k_weight" in options else [1.0] * tokens
    heads, weights = call.q[batch, query].double().tolist(), call.weights[batch, query].double().tolist()

    size, block_topk = options["block_size"], options["block_topk"]
    eligible = sorted({t // size for t in range(tokens) if visible[t]})

    def by_means(size: int, eligible: list[int], spread: bool = False) -> dict[int, float]:
        worths = {}
        for b in eligible:
            block = range(b * size, min((b + 1) * size, tokens))
            held = [[abs(factors[t]) * x for x in keys[t]] for t in block if valid[t]]
            columns = list(zip(*held, strict=True))
            mean = [sum(column) / len(held) for column in columns]
            if spread:
                mean += [spread_of(column, mean[d], len(columns)) for d, column in enumerate(columns)]
            if "k_pooled" in options:
                mean = options["k_pooled"][batch, b].double().tolist()
            worths[b] = (score_with_spread if spread else score)(heads, weights, mean)
        return worths

    def kept_of(worths: dict[int, float], eligible: list[int], most: int) -> set[int]:
        ends = {eligible[0], eligible[-1]} if eligible else set()
        inner = by_score({b: worths[b] for b in eligible if b not in ends})
        return ends | set(inner[: most - len(ends)])

    if stage_of(call) == "two-level":
        outer = size * max(1, min(4, 128 // size))
        most = max(2, math.ceil(4 * block_topk * size / outer))
        if math.ceil(tokens / outer) > most:
            outers = sorted({b * size // outer for b in eligible})
            kept_outers = kept_of(by_means(outer, outers), outers, most)
            eligible = [b for b in eligible if b * size // outer in kept_outers]
    if stage_of(call) in ("paper", "spread"):
        worths = by_means(size, eligible, stage_of(call) == "spread")
    else:
        probed = probe_of_tokens(heads, weights, plain, scales, factors, call.q.dtype)
        worths = probe_of_blocks(probed, visible, size, call.topk)
    kept = kept_of(worths, eligible, block_topk)

    own = {t: factors[t] * score(heads, weights, keys[t]) for t in range(tokens)}
    candidates = [t for t in range(tokens) if visible[t] and t // size in kept]
    others = [t for t in range(tokens) if visible[t] and t // size not in kept]
    hidden = [t for t in range(tokens) if not visible[t]]
    chosen = (by_score({t: own[t] for t in candidates}) + others + hidden)[: min(call.topk, tokens)]
    shown = {t: own[t] if visible[t] else -INF for t in chosen}
    order = by_score(shown)
    marked = [t if visible[t] or not options["mark_hidden"] else -1 for t in order]
    return marked, [shown[t] for t in order]


def assert_same_selection(call: Call) -> None:
    indices, scores = call.with_options(sorted=True).run(reference.indexer_topk)
    for batch in range(call.q.shape[0]):
        for query in range(call.q.shape[1]):
            positions, own = select_for_one_query(call, batch, query)
            assert indices[batch, query].tolist() == positions
            torch.testing.assert_close(scores[batch, query], torch.tensor(own).float(), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=250, deadline=None)
@given(calls(max_tokens=24, max_queries=3, max_dim=3))
def test_the_reference_is_the_contract_written_out_for_each_query(call: Call) -> None:
    """Budget, visibility, fills, ties, NaN, inf, order and marks: equal to a loop that knows no tensors."""
    assert_same_selection(call)


@settings(max_examples=150, deadline=None)
@given(calls(max_tokens=40, max_queries=3, max_dim=3), st.integers(0, 2**32))
def test_given_means_take_the_place_of_the_keys_own(call: Call, seed: int) -> None:
    """Means that have nothing to do with the keys, NaN among them: the loop keeps blocks by them too."""
    assert_same_selection(with_means(call, seed))


def test_float64_means_are_compared_in_float64() -> None:
    """Blocks whose given means differ by one part in 2^40 are told apart."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    k = torch.arange(10, dtype=torch.float64).view(1, 10, 1)
    assert reference.block_means(k, 2).dtype == reference.pooled_dtype(torch.float64) == torch.float64
    for best in (1, 2, 3):
        means = 1 + 2.0**-40 * (torch.arange(5) == best).double().view(1, 5, 1)
        indices, _ = reference.indexer_topk(one, k, one[0], 6, block_size=2, block_topk=3, k_pooled=means)
        assert indices.tolist() == [[[9, 8, 2 * best + 1, 2 * best, 1, 0]]]


def test_float64_heads_are_summed_in_float64() -> None:
    """A head of 2^-40 beside one of 1 tells the best block, and float32 inputs would tie them."""
    q = torch.tensor([[1.0, 1.0], [2.0**-40, 0.0]], dtype=torch.float64).view(1, 1, 2, 2)
    for best in (1, 2, 3):
        # (1, 0) in the best block, else (0, 1).
        k = torch.eye(2, dtype=torch.float64)[(torch.arange(10) // 2 != best).long()][None]
        for dtype, kept in ((torch.float64, best), (torch.float32, 1)):
            call = Call(q.to(dtype), k.to(dtype), torch.ones(1, 1, 2).to(dtype), 6, {"block_size": 2, "block_topk": 3})
            indices, _ = call.with_options(coarse="probe").run(reference.indexer_topk)
            assert sorted(indices[0, 0].tolist()) == [0, 1, 2 * kept, 2 * kept + 1, 8, 9]


def test_the_reference_computes_float64_in_float64() -> None:
    """Tokens whose scores differ by one part in 2^40 are told apart, and float32 inputs would tie them."""
    k = 1 + torch.arange(6, dtype=torch.float64).view(1, 6, 1) * 2.0**-40
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    indices, scores = reference.indexer_topk(one, k, one[0], 4, block_size=2, block_topk=2)
    assert indices.tolist() == [[[5, 4, 1, 0]]]
    assert scores.dtype == torch.float64
    assert scores[0, 0, 0] - 1 == 5 * 2.0**-40
    assert reference.indexer_topk(one.float(), k.float(), one[0].float(), 4)[0].tolist() == [[[0, 1, 2, 3]]]


@pytest.mark.parametrize("sorted_", [True, False])
def test_unsorted_results_hold_the_same_tokens_with_their_own_scores(sorted_: bool) -> None:
    """sorted=False may only change the order of a row."""
    q, k, weights = make_values(torch.Generator().manual_seed(3), (2, 3, 40, 2, 4), torch.float32, "integers")
    options = {"block_size": 4, "block_topk": 4, "window_end": torch.tensor([5, 30, 40]).int()}
    expected, own = reference.indexer_topk(q, k, weights, 10, **options)
    indices, scores = reference.indexer_topk(q, k, weights, 10, sorted=sorted_, **options)
    by_position, expected_by_position = indices.sort(-1), expected.sort(-1)
    assert torch.equal(by_position.values, expected_by_position.values)
    assert torch.equal(scores.gather(-1, by_position.indices), own.gather(-1, expected_by_position.indices))


def test_flat_topk_is_torch_topk_where_scores_differ() -> None:
    """Without ties the flat reference is the program that the rewrite replaces."""
    q, k, weights = (
        x.double() for x in make_values(torch.Generator().manual_seed(0), (2, 3, 50, 2, 4), torch.float32, "gaussian")
    )
    indices, scores = reference.flat_topk(q, k, weights, 7)
    values, expected = torch.einsum("bsh,bsht->bst", weights, torch.einsum("bshd,btd->bsht", q, k).relu()).topk(7)
    assert torch.equal(indices.long(), expected)
    assert torch.equal(scores, values)
