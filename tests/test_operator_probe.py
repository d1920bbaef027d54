"""The coarse stage "probe": its definition written out in plain Python, what it finds, and when it is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from strategies import (
    DTYPES,
    FLOAT8,
    LAYOUTS,
    Call,
    assert_equal,
    calls,
    in_layout,
    integers,
    make_segments,
    make_values,
    relayout,
)
from test_operator_properties import LiveBytes, assert_same_bits
from test_operator_reference import assert_same_selection, probe_of_blocks, probe_of_tokens
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from hisa_compile import indexer_topk
from hisa_compile.ops import Budget, Visibility, cpu, cpu_pool, reference
from hisa_compile.ops.coarse import Sample, resolve_coarse, sample_of

NAN, INF = float("nan"), float("inf")
PROBE = ("probe",)
FUNCTIONS = pytest.mark.parametrize("function", [indexer_topk, reference.indexer_topk], ids=["cpu", "reference"])


def spoil(call: Call, seed: int) -> Call:
    """NaN and, where the dtype has it, inf in some queries and weights."""
    generator = torch.Generator().manual_seed(seed)

    def some(x: Tensor, seldom: int) -> Tensor:
        for value in (NAN,) if x.dtype == FLOAT8 else (NAN, INF, -INF):
            x = torch.where(integers(generator, 0, seldom, *x.shape) == 0, value, x.float()).to(x.dtype)
        return x

    return call._replace(q=some(call.q, 60), weights=some(call.weights, 15))


def assert_cpu_equals_reference(call: Call, seed: int) -> None:
    """In order; for odd seeds with buffers so small that there are chunks and tiles of a few rows."""
    call = call.with_options(sorted=True)
    with pytest.MonkeyPatch.context() as patch:
        if seed % 2:
            patch.setattr(cpu, "CHUNK_ELEMENTS", 100)
            for module in (cpu, cpu_pool):
                patch.setattr(module, "TILE_ELEMENTS", 64)
        assert_equal(call.run(indexer_topk), call.run(reference.indexer_topk))


def probed_rows(call: Call) -> Iterator[tuple[int, int, list[float], list[bool]]]:
    """Of each query the probed scores of all tokens, and which it sees."""
    visible = reference.visible_tokens(call.q, call.k, **call.visibility)
    for b in range(call.q.shape[0]):
        keys, ones = call.k[b].double().tolist(), torch.ones(call.k.shape[:2])
        scales, factors = (call.options.get(name, ones)[b].double().tolist() for name in ("k_scale", "k_weight"))
        for s in range(call.q.shape[1]):
            heads, weights = call.q[b, s].double().tolist(), call.weights[b, s].double().tolist()
            probed = probe_of_tokens(heads, weights, keys, scales, factors, call.q.dtype)
            yield b, s, probed, visible[b, s].tolist()


def assert_worths(call: Call) -> None:
    """The reference's scores of all blocks are the loop's; hidden blocks have the lowest."""
    size, visible = call.options["block_size"], reference.visible_tokens(call.q, call.k, **call.visibility)
    factors = call.options.get("k_scale"), call.options.get("k_weight")
    probed = reference.probe_scores(call.q, call.k, call.weights, *factors)
    actual = reference.probe_block_scores(probed, visible, size, sample_of(call.k.shape[1], max(1, call.topk)))
    expected = torch.full_like(actual, -INF, dtype=torch.float64)
    for b, s, tokens, seen in probed_rows(call):
        for block, worth in probe_of_blocks(tokens, seen, size, call.topk).items():
            expected[b, s, block] = worth
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=0, equal_nan=True)


# The definition -------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(calls(dtypes=DTYPES, max_tokens=30, max_queries=3, max_dim=3, coarse=PROBE), st.none() | st.integers(0, 2**32))
def test_blocks_are_worth_what_a_loop_over_the_tokens_says(call: Call, spoilt: int | None) -> None:
    """Any dtype, visibility, factors, ties, NaN and inf in keys, queries and weights; and so is the selection."""
    call = call if spoilt is None else spoil(call, spoilt)
    assert_worths(call)
    if call.q.dtype == torch.float32:
        assert_same_selection(call)


@settings(max_examples=300, deadline=None)
@given(calls(dtypes=DTYPES, layouts=LAYOUTS, max_tokens=150, max_queries=12, coarse=PROBE), st.integers(0, 2**32))
def test_the_cpu_operator_equals_the_reference_with_any_queries(call: Call, seed: int) -> None:
    """NaN and inf in queries and weights besides; with small buffers too."""
    assert_cpu_equals_reference(spoil(call, seed), seed)


def sampled(tokens: int, topk: int) -> Tensor:
    """Which tokens the sample holds, bool [T]."""
    stride, size, _ = sample_of(tokens, topk)
    at = torch.tensor([i * stride + i * 7919 % stride for i in range(size)])
    return torch.zeros(tokens).bool().index_fill(0, at[at < tokens], True)


SPARSE = ("open", "none of the sample", "one of the sample", "few", "window", "holes", "segments", "equal keys")


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("seed", range(3))
def test_a_sparse_sample_tells_the_threshold(kind: str, seed: int) -> None:
    """Every fourth to ninth token: of the loop's worths, and of the CPU as of the reference."""
    generator = torch.Generator().manual_seed(seed)
    tokens, topk = 420 + 13 * seed, (64, 100, 150)[seed]
    q, k, weights = make_values(generator, (2, 3, tokens, 2, 2), DTYPES[seed], "integers")
    options: dict[str, Any] = {"block_size": 16, "block_topk": 10, "coarse": "probe"}
    inside = sampled(tokens, topk)
    assert sample_of(tokens, topk)[::2] == ((4, 6, 9)[seed], (24, 25, 25)[seed])
    if kind == "none of the sample":
        options["mask"] = ~inside
    elif kind == "one of the sample":
        options["key_valid"] = (~inside | (torch.arange(tokens) == inside.nonzero()[7])).expand(2, tokens)
    elif kind == "few":
        options["mask"] = torch.rand(3, tokens, generator=generator) < 0.15
    elif kind == "window":
        options["window_start"] = torch.tensor([[0], [17]]).int()
        options["window_end"] = torch.tensor([tokens, 230, 300]).int()
    elif kind == "holes":
        options["key_valid"] = torch.rand(2, tokens, generator=generator) < 0.6
    elif kind == "segments":
        segments = make_segments(generator, "unsorted", torch.int32, (2, 3), 2, tokens)
        options["q_segment"], options["k_segment"] = segments
    else:
        k = k[:, :1].expand(k.shape) if kind == "equal keys" else k
        options["k_weight"] = torch.tensor([-1.0, 0.5, 1.0])[integers(generator, 0, 2, 2, tokens)]
    call = Call(q, k, weights, topk, options)
    assert_worths(call)
    assert_equal(call.run(indexer_topk), call.run(reference.indexer_topk))


@pytest.mark.parametrize("topk", [16, 32, 1024])
def test_of_many_tokens_the_sample_holds_a_limited_number(topk: int) -> None:
    """T = 20000: from 8192 tokens on the sample grows no further, and its rank follows."""
    generator = torch.Generator().manual_seed(0)
    q, k, weights = make_values(generator, (1, 1, 20000, 1, 1), torch.float32, "gaussian")
    # Different integers, so that every rank is another threshold.
    k = torch.randperm(20000, generator=generator).view(1, 20000, 1) - 9000.0
    call = Call(q.sign(), k, weights.abs().ceil(), topk, {"block_size": 256, "block_topk": 4, "coarse": "probe"})
    assert_worths(call)
    assert_equal(call.run(indexer_topk), call.run(reference.indexer_topk))
    assert int(sampled(20000, topk).sum()) == {16: 6667, 32: 6667, 1024: 313}[topk]
    assert sample_of(20000, topk)[::2] == {16: (3, 8), 32: (3, 16), 1024: (64, 24)}[topk]


@pytest.mark.parametrize("function", [reference.probe_queries, cpu._probe_queries], ids=["reference", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_two_heads_by_hand(function: Any, dtype: torch.dtype) -> None:
    """Rows of plain values, of a NaN and no weight, and of a weight that is inf, which float8 has not, or NaN."""
    q = torch.tensor([[3.0, -1.0], [5.0, 7.0], [2.0, 0.5]]).expand(1, 5, 3, 2).clone()
    q[:, 1, 2, 1] = NAN
    weights = [[1.0, -2.0, 4.0], [0.0, -0.0, -0.0], [1.0, -2.0, INF], [1.0, -INF, 4.0], [1.0, -2.0, NAN]]
    inf = [NAN if dtype == FLOAT8 else INF] * 2
    plus, minus, nan = [11.0, 1.0], [10.0, 14.0], [NAN, NAN]
    plain = [[16 * x for x in plus], [16 * x for x in minus]]
    expected = torch.tensor([plain, [[0.0, NAN]] * 2, [inf, minus], [plus, inf], [nan, nan]])
    actual = function(q.to(dtype), torch.tensor([weights])).float()[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_what_blocks_are_worth_by_hand() -> None:
    """Four blocks of three: the cap, half of the best, what is below the threshold, and what is hidden."""
    probed = torch.tensor([9.0, 1, 1, 5, 4, 4, 3, -3, -9, 2, 2, 2])
    seen = torch.ones(12).bool()
    every = Sample(stride=1, size=12, rank=4)
    # Best 9, 5, 4, 4: the threshold is 4, the cap 5 - 4.
    assert reference.probe_block_scores(probed, seen, 3, every).tolist() == [1 + 5 / 2, 1 + 1 / 2, -1, -2]
    # Without the first 5, 4, 4, 3: the threshold is 3, the cap 4 - 3.
    seen[0] = False
    assert reference.probe_block_scores(probed, seen, 3, every).tolist() == [-2, 3 + 2 / 2, 0, -1]
    # Fewer than the rank: 5, -9 of which the last is the threshold, and 14 is cut to 8.
    seen = torch.isin(torch.arange(12), torch.tensor([3, 8]))
    assert reference.probe_block_scores(probed, seen, 3, every).tolist() == [-INF, 8 + 14 / 2, 0, -INF]
    # A sample of none of them: what the best one has.  Its token 8 + 7919 % 8 is not there.
    assert reference.probe_block_scores(probed, seen, 3, Sample(8, 2, 1)).tolist() == [-INF, 5 / 2, -9, -INF]
    # A threshold of -inf is above nothing that is -inf, and below all else.
    low = torch.tensor([-INF, 2, -INF, -INF])
    worths = reference.probe_block_scores(low, seen[:4] | True, 2, Sample(1, 4, 4)).tolist()
    assert worths[0] == INF
    assert worths[1] != worths[1]
    # The last block holds one token.
    assert reference.probe_block_scores(probed[:10], seen[:10] | True, 3, every).tolist()[3] == -2


@pytest.mark.parametrize("seed", range(5))
def test_gaussian_blocks_are_ranked_as_float64_ranks_them(seed: int) -> None:
    """Signed scales and weights: no kept block is worth less than one that is not, beyond float32's error."""
    generator = torch.Generator().manual_seed(seed)
    size, block_topk = 8, 7
    q, k, weights = make_values(generator, (2, 3, 256, 3, 16), torch.float32, "gaussian")
    factors = {name: torch.randn(2, 256, generator=generator) for name in ("k_scale", "k_weight")}
    call = Call(q, k, weights, size * block_topk, {"block_size": size, "block_topk": block_topk, **factors})
    indices, by_means = (call.with_options(coarse=stage).run(indexer_topk)[0] for stage in ("probe", "paper"))
    for b, s, tokens, seen in probed_rows(call):
        worths = probe_of_blocks(tokens, seen, size, call.topk)
        # All candidates are selected.
        kept = {t // size for t in indices[b, s].tolist()}
        assert len(kept) == block_topk
        assert {0, 31} < kept != {t // size for t in by_means[b, s].tolist()}
        error = 1e-5 * size * max(map(abs, tokens))
        best_left = max(worths[block] for block in range(32) if block not in kept)
        assert min(worths[block] for block in kept - {0, 31}) >= best_left - error


# What it finds --------------------------------------------------------------------------------------------------------


def planted(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """A positive head, a negative one, and 32 blocks of 16 tokens whose score is 1."""
    q = torch.eye(2).view(1, 1, 2, 2).to(dtype)
    k = torch.tensor([1.0, -1.0]).expand(1, 512, 2).clone()
    weights = torch.tensor([1.0, -1.0]).view(1, 1, 2)
    return q, k, weights, {"block_size": 16, "block_topk": 3}


@FUNCTIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [160, 168, 175])
def test_a_needle_that_its_blocks_mean_hides_is_found(function: Any, dtype: torch.dtype, at: int) -> None:
    """One token of score 30 among fifteen bad ones."""
    q, k, weights, options = planted(dtype)
    k[:, 160:176, 0] = -5
    k[:, at, 0] = 30
    indices, scores = function(q, k.to(dtype), weights, 8, coarse="probe", **options)
    assert (int(indices[0, 0, 0]), float(scores[0, 0, 0])) == (at, 30)
    assert at not in function(q, k.to(dtype), weights, 8, coarse="paper", **options)[0]


@FUNCTIONS
@pytest.mark.parametrize("how", ["negative head", "k_weight", "k_scale", "hidden"])
def test_what_only_looks_good_is_not_kept(function: Any, how: str) -> None:
    """Of two blocks that stand out one does so by its heads' or keys' sign, or by hidden tokens: the other is kept."""
    q, k, weights, options = planted()
    k[:, 96:112, 0] = 3
    factor = torch.ones(1, 512)
    factor[:, 320:336] = -1
    if how == "negative head":
        k[:, 320:336] = torch.tensor([0.0, 50.0])
    else:
        k[:, 320:336, 0] = 50
        hidden = (torch.arange(512) // 16 == 20) & (torch.arange(512) % 16 > 0)
        k[:, 320] = k[:, 0]
        options |= {"mask": ~hidden} if how == "hidden" else {how: factor}
    indices, _ = function(q, k, weights, 48, coarse="probe", **options)
    assert {t // 16 for t in indices[0, 0].tolist()} == {0, 6, 31}


@FUNCTIONS
@pytest.mark.parametrize(("start", "end", "ends"), [(0, 512, {0, 31}), (20, 410, {1, 25})])
def test_the_first_and_the_last_eligible_block_are_kept(function: Any, start: int, end: int, ends: set[int]) -> None:
    """However bad they are; they count among the m, and the best of the others is the third."""
    q, k, weights, options = planted()
    k[:, :32, 0], k[:, 400:, 0], k[:, 203, 0] = -9, -9, 2
    # Too few for a row to be filled up.
    options |= {"window_start": torch.tensor(start).int(), "window_end": torch.tensor(end).int()}
    indices, _ = function(q, k, weights, 38, coarse="probe", **options)
    assert {t // 16 for t in indices[0, 0].tolist()} == ends | {12}


@FUNCTIONS
@pytest.mark.parametrize("name", ["k", "k_scale", "k_weight"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_visible_nan_keeps_its_block(function: Any, dtype: torch.dtype, name: str) -> None:
    """In the key or a factor; it ranks first, whether or not the sample holds it."""
    q, k, weights = make_values(torch.Generator().manual_seed(2), (2, 3, 600, 3, 8), dtype, "gaussian")
    poisoned = {"k": k.float(), "k_scale": torch.ones(2, 600), "k_weight": torch.ones(2, 600)}
    inside = sampled(600, 64)
    for at in (300, 301, int(inside.nonzero()[80]), int((~inside).nonzero()[240])):
        given_ = {key: x.clone() for key, x in poisoned.items()}
        given_[name][:, at] = NAN
        given_["k"] = given_["k"].to(dtype)
        indices, scores = function(q, weights=weights, topk=64, block_size=8, block_topk=8, coarse="probe", **given_)
        assert (indices[..., 0] == at).all()
        assert scores[..., 0].isnan().all()
        assert not scores[..., 1:].isnan().any()


@FUNCTIONS
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e6])
@pytest.mark.parametrize("how", ["window", "key_valid", "mask", "segments"])
def test_what_a_hidden_key_holds_changes_nothing(function: Any, how: str, value: float) -> None:
    """In keys, scales and weights; unlike a mean the probe reads no token that is hidden by a mask or segments."""
    generator = torch.Generator().manual_seed(4)
    q, k, weights = make_values(generator, (2, 6, 300, 3, 8), torch.float32, "gaussian")
    hidden = torch.rand(300, generator=generator) < 0.3
    if how == "window":
        hidden = (torch.arange(300) < 33) | (torch.arange(300) >= 255)
    options: dict[str, Any] = {"block_size": 8, "block_topk": 5, "coarse": "probe"}
    options |= {
        "window": {"window_start": torch.tensor(33).int(), "window_end": torch.arange(250, 256).int()},
        "key_valid": {"key_valid": (~hidden).expand(2, 300)},
        "mask": {"mask": ~hidden},
        "segments": {"q_segment": torch.tensor(0), "k_segment": hidden.long().expand(2, 300)},
    }[how]
    factor = torch.randn(2, 300, generator=generator)
    dirty = torch.where(hidden, value, factor)
    for topk in (10, 40):
        clean = function(q, k, weights, topk, k_scale=factor.abs(), k_weight=factor, **options)
        dirty_k = torch.where(hidden[:, None], value, k)
        assert_equal(function(q, dirty_k, weights, topk, k_scale=dirty.abs(), k_weight=dirty, **options), clean)
        assert not clean[1].isnan().any()


@pytest.mark.parametrize("scale", [2.0**-90, 1e-9, 1.0, 3.0, 2.0**40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_unit_of_a_querys_weights_has_no_part_in_it(dtype: torch.dtype, scale: float) -> None:
    """Weights too small or too large for float16 and float8: heads fill the dtype, and the same blocks are kept."""
    q, k, weights = make_values(torch.Generator().manual_seed(3), (2, 4, 300, 3, 8), dtype, "gaussian")
    weights = weights.float()
    weights[:, 3] = 0
    heads = reference.probe_queries(q, scale * weights)
    assert heads.dtype == dtype
    assert (heads[:, 3].float() == 0).all()
    greatest = heads[:, :3].float().abs().amax((-2, -1))
    assert greatest.min() >= 128
    assert greatest.max() <= 256
    if scale in (2.0**-90, 2.0**40):
        assert torch.equal(heads.float(), reference.probe_queries(q, weights).float())
        options: dict[str, Any] = {"block_size": 8, "block_topk": 5, "coarse": "probe"}
        expected, actual = (indexer_topk(q, k, w, 30, **options)[0] for w in (weights, scale * weights))
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
def test_arguments_of_any_layout_equal_their_copies(layout: str) -> None:
    """Every tensor of the call; the loops above have contiguous factors."""
    generator = torch.Generator().manual_seed(2)
    q, k, weights = make_values(generator, (3, 4, 200, 2, 8), torch.float32, "gaussian")
    given_: dict[str, Tensor] = {"q": q, "k": k, "weights": weights}
    given_ |= {name: torch.randn(3, 200, generator=generator) for name in ("k_scale", "k_weight")}
    given_ = {n: in_layout(x, layout) if layout == "expanded" else relayout(x, layout) for n, x in given_.items()}
    given_["key_valid"] = in_layout(torch.rand(3, 200, generator=generator) < 0.8, layout)
    given_["k_segment"] = in_layout(integers(generator, 0, 1, 3, 200), layout)
    given_["q_segment"] = torch.tensor(1)
    copies = {name: x.clone(memory_format=torch.contiguous_format) for name, x in given_.items()}
    options: dict[str, Any] = {"topk": 20, "block_size": 4, "block_topk": 6, "coarse": "probe"}
    assert_same_bits(indexer_topk(**given_, **options), indexer_topk(**copies, **options))


def workspace(queries: int) -> int:
    """Peak bytes of a causal call of T = 4096 beyond its results."""
    q, k, weights = make_values(torch.Generator().manual_seed(0), (1, queries, 4096, 2, 8), torch.bfloat16, "gaussian")
    seen = Visibility(window_end=torch.linspace(1, 4096, queries).int())
    with LiveBytes() as live:
        result = cpu.indexer_topk_cpu(q, k, weights, 16, Budget(16, 8), seen, None, None, True, False, coarse="probe")
    return live.peak - sum(x.nbytes for x in result)


def test_the_workspace_does_not_grow_with_queries_times_tokens() -> None:
    """The scores of all tokens are those of a chunk of queries: eight times as many add less than half a byte each."""
    assert workspace(512) - workspace(64) < (512 - 64) * 4096 / 2


# When it is chosen ----------------------------------------------------------------------------------------------------

# At 16 heads and 32 candidates the probe costs a quarter as much as the refinement for 64 tokens.
EDGE = {"block_size": 4, "block_topk": 8}


@pytest.mark.parametrize(
    ("coarse", "tokens", "heads", "budget", "pooled", "expected"),
    [
        (None, 65536, 64, Budget(64, 128), False, "probe"),
        (None, 65537, 64, Budget(64, 128), False, "paper"),
        (None, 0, 0, Budget(4, 8), False, "probe"),
        (None, 1, 0, Budget(4, 8), False, "paper"),
        ("paper", 64, 16, Budget(4, 8), False, "paper"),
        ("probe", 10**6, 1, Budget(4, 8), False, "probe"),
    ],
)
def test_a_stage_that_is_not_given_follows_from_costs(
    coarse: str | None, tokens: int, heads: int, budget: Budget, pooled: bool, expected: str
) -> None:
    """The probe where 2 T products are no more than a quarter of m B H."""
    assert resolve_coarse(coarse, tokens, heads, budget, pooled) == expected


CHOICES = [(64, 16, False, "probe"), (65, 16, False, "paper"), (64, 15, False, "paper"), (64, 16, True, "paper")]


@FUNCTIONS
@pytest.mark.parametrize(("tokens", "heads", "pooled", "stage"), CHOICES)
def test_the_operator_runs_the_stage_that_costs_choose(
    function: Any, tokens: int, heads: int, pooled: bool, stage: str
) -> None:
    """At both sides of the edge, and never with given means; the stages differ there."""
    q, k, weights = make_values(torch.Generator().manual_seed(1), (2, 4, tokens, heads, 8), torch.float32, "gaussian")
    assert resolve_coarse(None, tokens, heads, Budget(**EDGE), pooled) == stage
    chosen = function(q, k, weights, 20, **EDGE, k_pooled=reference.block_means(k, 4) if pooled else None)
    by_stage = {name: function(q, k, weights, 20, **EDGE, coarse=name) for name in ("paper", "probe")}
    assert_equal(chosen, by_stage[stage])
    assert not torch.equal(by_stage["paper"][0], by_stage["probe"][0])


def test_nothing_is_probed_where_every_block_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to T = m * B; one token more, and it is."""
    q, k, weights = make_values(torch.Generator().manual_seed(5), (2, 6, 33, 3, 8), torch.float32, "gaussian")
    monkeypatch.setattr(cpu, "probe_block_scores", lambda *_: pytest.fail("tokens were probed"))
    indexer_topk(q, k[:, :32], weights, 20, coarse="probe", **EDGE)
    with pytest.raises(pytest.fail.Exception, match="probed"):
        indexer_topk(q, k, weights, 20, coarse="probe", **EDGE)


OPEN = pytest.mark.parametrize("coarse", ["probe", None])


class Module(torch.nn.Module):
    def __init__(self, coarse: str | None) -> None:
        super().__init__()
        self.coarse = coarse

    def forward(self, q: Tensor, k: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return indexer_topk(q * 1.0, k, weights, 20, coarse=self.coarse, **EDGE)


def inputs_of(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return make_values(torch.Generator().manual_seed(tokens), (2, 3, tokens, 8, 8), torch.float32, "gaussian")


@OPEN
def test_growing_lengths_compile_once(coarse: str | None) -> None:
    """From the exact regime into the probe's, and where it is not given on into the paper's."""
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(Module(coarse), backend=counter, fullgraph=True)
    for tokens in (31, 32, 33, 64, 65, 100):
        inputs = inputs_of(tokens)
        torch._dynamo.mark_dynamic(inputs[1], 1)
        assert_same_bits(compiled(*inputs), Module(coarse)(*inputs))
    assert counter.frame_count == 1


@OPEN
def test_an_exported_program_names_the_stage(coarse: str | None) -> None:
    """And nothing where none is given: it is chosen at every call."""
    length = torch.export.Dim("tokens", min=16)
    program = torch.export.export(Module(coarse), inputs_of(40), dynamic_shapes=({}, {1: length}, {}))
    (node,) = (n for n in program.graph.nodes if n.target is torch.ops.hisa.indexer_topk.default)
    assert node.args[17:] == (() if coarse is None else (coarse,))
    for tokens in (31, 64, 65):
        assert_same_bits(program.module()(*inputs_of(tokens)), Module(coarse)(*inputs_of(tokens)))


def test_a_stage_that_there_is_not_is_reported_through_torch_compile() -> None:
    """In the words of the eager call; test_operator_errors has those."""
    with pytest.raises(
        Exception, match=r"coarse: got 'means', expected None or one of 'paper', 'spread', 'probe', 'two-level'"
    ):
        torch.compile(Module("means"), backend="eager", fullgraph=True)(*inputs_of(40))
