"""``hisa::indexer_topk_shadow``: what it finds of a sample is what ``fidelity`` finds of these queries."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shadow_cases import EVERY, OPERATOR, SHADOW, assert_same, only_site, operator_call
from strategies import DTYPES, LAYOUTS, Call, calls
from test_fidelity import causal, smooth
from torch import Tensor

from hisa_compile import (
    Budget,
    fidelity,
    reset_shadow,
    shadow_report,
)
from hisa_compile.ops import shadow, tally


@settings(max_examples=300, deadline=None)
@given(calls(dtypes=DTYPES, layouts=LAYOUTS, max_queries=9))
def test_a_sample_of_all_queries_is_the_full_comparison(call: Call) -> None:
    """Any visibility, factors, dtypes, layouts, stages, NaN and inf; the selection is the operator's, bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tally, "_tallies", {})
        found = operator_call(call, EVERY)
        expected = call.run(OPERATOR)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1].view(torch.int32), expected[1].view(torch.int32))
        options = {name: x for name, x in call.options.items() if name not in ("sorted", "mark_hidden")}
        assert_same(only_site(), fidelity(call.q, call.k, call.weights, call.topk, **options, queries=EVERY))


@settings(max_examples=200, deadline=None)
@given(calls(dtypes=DTYPES, layouts=LAYOUTS, max_queries=9), st.integers(1, 8), st.integers(0, 50))
def test_each_query_that_is_drawn_has_the_figures_that_it_has_among_all(call: Call, sample: int, count: int) -> None:
    """Also where the keys of some batch entries are copied, one at a time."""
    added: list[tuple[Tensor, Tensor]] = []
    drawn: list[tuple[Tensor, Tensor]] = []
    draw = shadow._draw

    def drawing(pruned: Tensor, calls: Tensor, salt: int, sample: int) -> tuple[Tensor, Tensor, Tensor]:
        entries, rows, weight = draw(pruned, calls + count, salt, sample)
        assert (weight > 0).sum() <= sample
        assert all(len({*row}) == len(row) for row in rows.tolist())
        drawn.append((entries, rows))
        return entries, rows, weight

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tally, "_tallies", {})
        patch.setattr(tally, "add", lambda tally, pruned, weight, figures: added.append((weight, figures)))
        patch.setattr(shadow, "_draw", drawing)
        patch.setattr(shadow, "KEY_BYTES", 1)
        operator_call(call, EVERY)
        operator_call(call, sample)
    if added:
        (all_weights, of_all), (weights, of_some) = added
        entries, rows = drawn[1]
        at = (entries[:, None] * call.q.shape[1] + rows).flatten()
        assert (all_weights <= 1).all()
        assert ((weights > 0) <= (all_weights[at] > 0)).all()
        assert torch.equal(torch.where(weights > 0, of_some, 0.0), torch.where(weights > 0, of_all[:, at], 0.0))


@pytest.mark.parametrize(("shape", "sample"), [((1, 40), 6), ((3, 20), 7), ((3, 4), 12), ((9, 3), 4), ((30, 1), 5)])
def test_draws_are_random_and_weights_make_up_for_them(shape: tuple[int, int], sample: int) -> None:
    """Over 3000 calls each pruned query's weights add up to one a call, and no other query is drawn."""
    pruned = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6
    pruned[0] = False
    pruned[-1] = True
    rounds = 3000
    total = torch.zeros(shape, dtype=torch.float64)
    for count in range(rounds):
        entries, rows, weight = shadow._draw(pruned, torch.tensor(float(count)), 7, sample)
        assert rows.numel() <= max(sample, shape[0] if shape[0] <= sample else 0)
        total.index_put_((entries[:, None], rows), weight, accumulate=True)
    assert (total[~pruned] == 0).all()
    mean = total[pruned] / rounds
    # A weight of w comes with probability 1 / w, so its mean varies by w - 1; entries and queries are both drawn.
    most = shape[0] * shape[1] / min(sample, shape[0])
    assert (mean - 1).abs().max() < 5 * math.sqrt(most / rounds)


@pytest.mark.parametrize("shape", [(1, 40), (2, 30), (12, 4), (30, 1)])
@pytest.mark.parametrize("sample", [2, 6])
def test_the_estimate_is_as_near_as_its_error_says(shape: tuple[int, int], sample: int) -> None:
    """Over 200 estimates of 20 calls each, the differences over their standard errors are about 1.

    Less where sequences differ and each has its share of the draws, which the error does not count on.
    """
    deviations = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        # Sequences differ more than their queries do, and not all queries are pruned.
        figures = torch.rand((4, shape[0], 1), generator=generator) + torch.rand((4, *shape), generator=generator) / 3
        figures = figures.double() / (4 / 3)
        pruned = torch.rand(shape, generator=generator) < 0.8
        sums = tally.tally_of(tally.SiteKey(f"site {seed}", 32, Budget(16, 3), None), pruned.device)
        for _ in range(20):
            entries, rows, weight = shadow._draw(pruned, sums[tally.CALLS], seed, sample)
            tally.add(sums, pruned.sum(), weight.flatten(), figures[:, entries[:, None], rows].flatten(1))
            sums[tally.CALLS] += 1
        site = shadow_report().sites[-1]
        assert site.site == f"site {seed}"
        assert site.worst_recall >= figures[0][pruned].min()
        recall, iou = figures[:2, pruned].mean(1).tolist()
        deviations.append((site.recall - recall) / site.recall_error)
        deviations.append((site.iou - iou) / site.iou_error)
    assert abs(statistics.mean(deviations)) < 0.2
    assert 0.5 < statistics.pstdev(deviations) < 1.25


def test_calls_add_up_and_count_for_as_many_queries_as_they_prune() -> None:
    """A long prefill and some decode steps at one site: the estimate is of all their pruned queries together."""
    q, k, weights = smooth(queries=64, tokens=640, batch=1)
    budget = {"block_size": 16, "block_topk": 3, "coarse": "paper"}
    total = pruned = 0.0
    worst = 1.0
    for rows in (slice(0, 64), slice(3, 4), slice(60, 61), slice(10, 20)):
        call = Call(q[:, rows], k, weights[:, rows], 32, budget | {"window_end": causal(64, 640)[rows]})
        operator_call(call, EVERY)
        whole = fidelity(call.q, call.k, call.weights, 32, **call.options, queries=EVERY)
        total += whole.recall * whole.sampled
        pruned += whole.sampled
        for number in range(call.q.shape[1]):
            one = Call(call.q[:, number : number + 1], k, call.weights[:, number : number + 1], 32, call.options)
            one = one.with_options(window_end=call.options["window_end"][number : number + 1])
            worst = min(worst, fidelity(one.q, k, one.weights, 32, **one.options).recall)
    site = only_site()
    assert (site.calls, site.queries, site.sampled) == (4, 76, pruned)
    assert site.recall == pytest.approx(total / pruned)
    assert site.worst_recall == pytest.approx(worst)
    assert worst < site.recall < 1


def test_keys_without_dims_are_compared() -> None:
    """More sequences than queries to compare, so that keys are copied, which have no bytes."""
    q, k, weights = torch.zeros(3, 2, 1, 0), torch.zeros(3, 64, 0), torch.ones(3, 2, 1)
    call = Call(q, k, weights, 4, {"block_size": 4, "block_topk": 3})
    assert torch.equal(operator_call(call, 1)[0], call.run(OPERATOR)[0])


def test_a_report_that_meets_half_an_addition_has_no_figures_yet() -> None:
    """A thread may read while another has counted a query and not yet added its figures."""
    call = Call(*smooth(), 16, {"block_size": 16, "block_topk": 4})
    operator_call(call, 4)
    ((_, sums),) = tally._tallies.items()
    sums[tally.WORST + 1 :].zero_()
    site = only_site()
    assert site.sampled > 0
    assert (site.recall, site.iou) == (1.0, 1.0)
    reset_shadow()


def test_one_query_alone_has_no_error() -> None:
    """Of several it says nothing of how they differ; of one it is all there is."""
    q, k, weights = smooth(queries=4, batch=1)
    call = Call(q, k, weights, 32, {"block_size": 16, "block_topk": 3})
    operator_call(call, 1)
    assert math.isnan(only_site().recall_error)
    assert "nan" in str(shadow_report())
    reset_shadow()
    operator_call(Call(q[:, :1], k, weights[:, :1], 32, call.options), 1)
    assert only_site().recall_error == 0


def test_a_call_that_prunes_nothing_is_counted_and_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more tokens than the budget has; nor are empty calls compared."""
    monkeypatch.setattr(shadow, "count_visible", None)
    monkeypatch.setattr(shadow, "_flat", None)
    q, k, weights = smooth(queries=8, tokens=640, batch=2)
    whole = {"block_size": 16, "block_topk": 40}
    operator_call(Call(q, k, weights, 32, whole), 4)
    operator_call(Call(q[:, :0], k, weights[:, :0], 32, {"block_size": 16, "block_topk": 3}), 4)
    operator_call(Call(q, k, weights, 0, {"block_size": 16, "block_topk": 3}), 4)
    assert [(site.queries, site.exact_queries, site.sampled) for site in shadow_report().sites] == [
        (16, 16, 0),
        (0, 0, 0),
        (16, 16, 0),
    ]
    assert {site.recall for site in shadow_report().sites} == {1.0}
    assert " - " in str(shadow_report())


def test_one_call_in_some_is_compared() -> None:
    """A fifth of them, the first among them, and at no fixed distance."""
    q, k, weights = smooth(queries=4, batch=1)
    call = Call(q, k, weights, 32, {"block_size": 16, "block_topk": 3})
    compared = []
    for _ in range(200):
        before = only_site().calls if shadow_report().sites else 0
        operator_call(call, 1, every=5)
        compared.append(only_site().calls - before)
    assert compared[0] == 1
    assert abs(sum(compared) - 40) <= 1
    at = [number for number, one in enumerate(compared) if one]
    assert len({b - a for a, b in itertools.pairwise(at)}) > 1


def test_the_operators_own_arguments_are_checked() -> None:
    """At compile time, by the meta function."""
    q, k, weights = (x.to("meta") for x in smooth(queries=4))
    for sample, every, name in ((0, 1, "sample"), (1, 0, "every")):
        with pytest.raises(ValueError, match=f"{name}: got 0, expected an integer >= 1"):
            torch.ops.hisa.indexer_topk_shadow("here", sample, every, q, k, weights, 4)


def test_the_operator_keeps_the_contract_of_torch() -> None:
    """Schema, autograd registration and fake tensors agree with what it does."""
    q, k, weights = smooth(queries=4)
    torch.library.opcheck(SHADOW, ("here", 2, 1, q, k, weights, 32), {"block_size": 16, "block_topk": 3})
    with pytest.raises(NotImplementedError, match="gradient"):
        SHADOW("here", 2, 1, q.requires_grad_(), k, weights, 32)[1].sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("batch", [1, 12])
def test_replays_of_a_cuda_graph_go_on_recording(batch: int) -> None:
    """Each replay draws other queries and adds to the same memory; nothing waits for the device."""
    q, k, weights = (x.cuda() for x in smooth(queries=40 // batch, tokens=640, batch=batch))
    call = Call(q, k, weights, 32, {"block_size": 16, "block_topk": 3, "coarse": "paper"})
    # Once before, so that nothing is compiled during the capture.
    operator_call(call, 8)
    with (
        pytest.raises(RuntimeError, match="captured in a CUDA graph before its first call"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        operator_call(call, 8, "never called")
    torch.cuda.set_sync_debug_mode("error")
    try:
        operator_call(call, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operator_call(call, 8, every=5)
    for _ in range(30):
        graph.replay()
    site = only_site()
    assert (site.calls, site.queries) == (32, 32 * q.shape[0] * q.shape[1])
    whole = fidelity(q, k, weights, 32, block_size=16, block_topk=3, coarse="paper", queries=EVERY)
    # As many draws of 8 queries reach all of them: the estimate is near the mean, and is not one draw's over and over.
    assert abs(site.recall - whole.recall) < 4 * site.recall_error
    assert site.recall_error < 0.03
    reset_shadow()
    graph.replay()
    assert only_site().calls == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_shape_that_was_never_compared_is_captured() -> None:
    """With ``every`` most calls of the host are not: a capture may be the first to need some of the kernels."""
    budget = {"block_size": 16, "block_topk": 3, "coarse": "paper"}
    operator_call(Call(*(x.cuda() for x in smooth(queries=40, tokens=640, batch=1)), 32, budget), 8, every=1000)
    # Longer rows, another dtype, so other kernels of the flat selection.
    q, k, weights = (x.cuda() for x in smooth(queries=40, tokens=9000, batch=1))
    call = Call(q.half(), k.half(), weights, 32, budget)
    operator_call(call, 8, every=1000)
    before = only_site().sampled
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operator_call(call, 8, every=1000)
    reset_shadow()
    for _ in range(30):
        graph.replay()
    site = only_site()
    assert (before, site.calls, site.sampled) == (8, 30, 240)
    whole = fidelity(*call[:4], **budget, queries=EVERY)
    assert abs(site.recall - whole.recall) < 4 * site.recall_error
