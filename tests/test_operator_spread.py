"""The coarse stage "spread": its definition, the representatives that it ranks by, and what it finds."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from strategies import DTYPES, FLOAT8, LAYOUTS, Call, calls, make_values, relayout, with_means
from test_operator_probe import FUNCTIONS, assert_cpu_equals_reference, spoil
from test_operator_properties import assert_same_bits
from test_operator_reference import assert_same_selection, spread_of
from torch import Tensor

from hisa_compile import indexer_topk, pool_keys
from hisa_compile.ops import reference

NAN, INF = float("nan"), float("inf")
SPREAD = ("spread",)
POOLS = pytest.mark.parametrize("pool", [pool_keys, reference.block_representatives], ids=["cpu", "reference"])


# The definition -------------------------------------------------------------------------------------------------------


@settings(max_examples=250, deadline=None)
@given(calls(max_tokens=40, max_queries=3, max_dim=4, coarse=SPREAD), st.none() | st.integers(0, 2**32))
def test_the_reference_is_the_definition_written_out_for_each_query(call: Call, seed: int | None) -> None:
    """Any visibility, factors, given representatives, ties, NaN and inf: equal to a loop that knows no tensors."""
    assert_same_selection(call if seed is None else with_means(call, seed))


@settings(max_examples=300, deadline=None)
@given(calls(dtypes=DTYPES, layouts=LAYOUTS, max_queries=12, coarse=SPREAD), st.integers(0, 2**32))
def test_the_cpu_operator_equals_the_reference(call: Call, seed: int) -> None:
    """NaN and inf in queries and weights, given representatives in any layout; with small buffers too."""
    call = spoil(call, seed) if seed % 3 else call
    if seed % 5 == 0:
        call = with_means(call, seed, LAYOUTS[seed % len(LAYOUTS)])
    assert_cpu_equals_reference(call, seed)


# What blocks are ranked by --------------------------------------------------------------------------------------------


@POOLS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 5, 64])
def test_a_spread_is_the_power_of_two_at_or_below_the_deviation(pool: Any, dtype: torch.dtype, dim: int) -> None:
    """Behind the means that there are without it; of valid keys, scaled and weighted; ragged last block."""
    generator = torch.Generator().manual_seed(dim)
    k = (torch.randn(2, 75, dim, generator=generator) * torch.logspace(-2, 2, dim)).to(dtype)
    factors = {name: torch.randn(2, 75, generator=generator) for name in ("k_scale", "k_weight")}
    factors["key_valid"] = torch.rand(2, 75, generator=generator) < 0.7
    factors["key_valid"][1, 20:40] = False
    both = pool(k, 20, **factors, spread=True)
    assert both.shape == (2, 4, 2 * dim)
    assert both.dtype == reference.pooled_dtype(dtype)
    assert torch.equal(both[..., :dim], pool_keys(k, 20, **factors))
    keys = k.double() * (factors["k_scale"] * factors["k_weight"].abs()).double()[..., None]
    for b in range(2):
        for block in range(4):
            inside = keys[b, 20 * block : 20 * block + 20][factors["key_valid"][b, 20 * block : 20 * block + 20]]
            for d in range(dim):
                column = inside[:, d].tolist()
                expected = spread_of(column, sum(column) / len(column), dim) if column else 0.0
                assert float(both[b, block, dim + d]) == expected


@POOLS
def test_equal_keys_have_no_spread_and_far_ones_much(pool: Any) -> None:
    """Nor has a key by itself.  31 / D = 31 / 2, so two keys at a distance of 2 have sqrt(15.5), that is 2."""
    k = torch.tensor([[3.0, 1], [3, 3], [7, 7], [7, 7], [5, 5]])[None]
    assert pool(k, 2, spread=True).tolist() == [[[3, 2, 0, 2], [7, 7, 0, 0], [5, 5, 0, 0]]]


@POOLS
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_an_invalid_key_holds_reaches_no_spread(pool: Any, value: float) -> None:
    """In the key, its scale and its weight; a valid one makes its block's NaN."""
    k = torch.randn(1, 24, 3, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1, 24)
    valid = torch.arange(24)[None] % 5 != 2
    clean = pool(k, 8, key_valid=valid, k_scale=ones, k_weight=ones, spread=True)
    dirty = k.masked_fill(~valid[..., None], value)
    spoiled = ones.masked_fill(~valid, value)
    assert_same_bits(
        (pool(dirty, 8, key_valid=valid, k_scale=spoiled, k_weight=spoiled, spread=True), clean), (clean,) * 2
    )
    seen = pool(dirty, 8, spread=True)
    # Positions 2, 7, 12, 17 and 22: some in every block.
    assert seen[..., 3:].isnan().all()


def test_tiny_and_huge_keys() -> None:
    """Squares beyond float32 make the spread inf, those below its least normal number 0, as in the reference."""
    for size, expected in ((1e25, INF), (1e-25, 0.0), (1e-18, 2.0**-58), (1e18, 2.0**62)):
        k = torch.tensor([-size, size]).view(1, 2, 1)
        assert pool_keys(k, 2, spread=True)[0, 0, 1] == expected
        assert reference.block_representatives(k, 2, spread=True)[0, 0, 1] == expected


# Given ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(calls(values="gaussian", dtypes=DTYPES, layouts=LAYOUTS, max_dim=24, coarse=SPREAD), st.sampled_from(LAYOUTS))
def test_the_keys_own_representatives_change_no_bit(call: Call, layout: str) -> None:
    """On the CPU: with any budget, visibility, factors, NaN and inf, and in any layout of theirs."""
    names = ("key_valid", "k_scale", "k_weight")
    given = {name: call.options[name] for name in names if name in call.options}
    pooled = relayout(pool_keys(call.k, call.options["block_size"], **given, spread=True), layout)
    assert_same_bits(call.with_options(k_pooled=pooled).run(indexer_topk), call.run(indexer_topk))


def test_means_without_spreads_are_an_error() -> None:
    """In the eager call, on meta tensors and under torch.compile; and "paper" takes none with them."""
    q, k, weights = make_values(torch.Generator().manual_seed(0), (2, 3, 300, 2, 8), torch.float32, "gaussian")
    options: dict[str, Any] = {"topk": 20, "block_size": 8, "block_topk": 4}
    message = r"k_pooled: got shape \[2, 38, 8\], expected \[B, ceil\(T / 8\), 2 D\] = \[2, 38, 16\]"
    given = (q, k, weights, pool_keys(k, 8))
    for x in (given, tuple(x.to("meta") for x in given)):
        with pytest.raises(ValueError, match=message):
            indexer_topk(*x[:3], **options, k_pooled=x[3], coarse="spread")
    both = pool_keys(k, 8, spread=True)
    with pytest.raises(ValueError, match=r"k_pooled: got shape \[2, 38, 16\], expected .* = \[2, 38, 8\]"):
        indexer_topk(q, k, weights, **options, k_pooled=both)
    # A message of the meta function's own, whether or not sizes are symbols.
    call = torch.compile(indexer_topk, backend="eager", fullgraph=True)
    for dynamic in (False, True):
        torch._dynamo.reset()
        if dynamic:
            torch._dynamo.mark_dynamic(k, 1)
        with pytest.raises(Exception, match=r"k_pooled: got shape .*, expected \[B, ceil\(T / 8\), 2 D\]"):
            call(q, k, weights, **options, k_pooled=given[3], coarse="spread")


def test_a_compiled_cache_of_means_and_spreads() -> None:
    """Pooled inside the compiled function; "paper" selects otherwise."""
    q, k, weights = make_values(torch.Generator().manual_seed(0), (2, 3, 300, 2, 8), torch.float32, "gaussian")
    options: dict[str, Any] = {"topk": 20, "block_size": 8, "block_topk": 4}

    def pooled(k: Tensor) -> tuple[Tensor, Tensor]:
        return indexer_topk(q, k, weights, **options, k_pooled=pool_keys(k, 8, spread=True), coarse="spread")

    torch._dynamo.reset()
    found = torch.compile(pooled, backend="aot_eager", fullgraph=True)(k)
    assert_same_bits(found, indexer_topk(q, k, weights, **options, coarse="spread"))
    assert not torch.equal(found[0], indexer_topk(q, k, weights, **options, coarse="paper")[0])


# What it finds --------------------------------------------------------------------------------------------------------


@FUNCTIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [160, 168, 175])
def test_a_needle_that_its_blocks_mean_hides_is_found(function: Any, dtype: torch.dtype, at: int) -> None:
    """One token of score 30 among fifteen bad ones, in a block that differs by it from all others."""
    q = torch.eye(2).view(1, 1, 2, 2).to(dtype)
    k = torch.tensor([1.0, -1.0]).expand(1, 512, 2).clone()
    weights = torch.tensor([1.0, -1.0]).view(1, 1, 2)
    k[:, 160:176, 0] = -5
    k[:, at, 0] = 30
    options: dict[str, Any] = {"block_size": 16, "block_topk": 3}
    indices, scores = function(q, k.to(dtype), weights, 8, coarse="spread", **options)
    assert (int(indices[0, 0, 0]), float(scores[0, 0, 0])) == (at, 30)
    assert at not in function(q, k.to(dtype), weights, 8, coarse="paper", **options)[0]


@FUNCTIONS
def test_a_spread_lowers_what_a_head_of_negative_weight_takes_away(function: Any) -> None:
    """Of blocks with one mean the one with tokens that such a head does not see is worth more, not less."""
    q, k = torch.ones(1, 1, 1, 1), torch.full((1, 64, 1), 8.0)
    k[0, 24:32, 0] = torch.tensor([0.0, 16.0]).repeat(4)
    indices, _ = function(q, k, -torch.ones(1, 1, 1), 24, block_size=8, block_topk=3, coarse="spread")
    assert {t // 8 for t in indices.flatten().tolist()} == {0, 3, 7}
    # With a positive weight it is worth more as well: 16 counts there.
    indices, _ = function(q, k, torch.ones(1, 1, 1), 24, block_size=8, block_topk=3, coarse="spread")
    assert {t // 8 for t in indices.flatten().tolist()} == {0, 3, 7}


@FUNCTIONS
def test_all_that_fits_is_kept(function: Any) -> None:
    """T = m * B: the flat selection; one token more, and it is not."""
    for tokens, exact in ((128, True), (129, False)):
        inputs = make_values(torch.Generator().manual_seed(tokens), (2, 4, tokens, 3, 8), torch.float32, "gaussian")
        indices = function(*inputs, 40, block_size=32, block_topk=4, coarse="spread")[0]
        assert torch.equal(indices, reference.flat_topk(*inputs, 40)[0]) == exact


def test_float8_representatives_are_bfloat16() -> None:
    """Where a spread may be greater than any float8."""
    k = torch.tensor([0.0, 448.0]).view(1, 2, 1).to(FLOAT8)
    both = pool_keys(k, 2, spread=True)
    assert (both.dtype, both.tolist()) == (torch.bfloat16, [[[224.0, 1024.0]]])
