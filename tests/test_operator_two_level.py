"""The coarse stage "two-level": outer blocks by their means, the probe inside the kept ones."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from strategies import DTYPES, LAYOUTS, Call, calls, make_values, with_means
from test_operator_probe import FUNCTIONS, assert_cpu_equals_reference, assert_equal, planted, sampled, spoil
from test_operator_properties import LiveBytes, assert_same_bits
from test_operator_reference import assert_same_selection
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from hisa_compile import fidelity, indexer_topk, pool_keys
from hisa_compile.ops import Budget, Visibility, cpu, reference
from hisa_compile.ops.coarse import outer_budget, outer_of, resolve_coarse

NAN, INF = float("nan"), float("inf")
TWO_LEVEL = ("two-level",)


@st.composite
def two_level_calls(draw: st.DrawFn, **sizes: Any) -> Call:
    """Calls of more outer blocks than are kept; their own means only where these are exact in any order of summation.

    So of 128 keys, none of them left out: the last block may be ragged, and is kept whatever its mean is.
    """
    call = draw(calls(coarse=TWO_LEVEL, min_tokens=257, max_dim=3, **sizes))
    whole = 128 % call.options["block_size"] == 0 and "key_valid" not in call.options
    if not whole or draw(st.booleans(), label="given means"):
        call = with_means(call, draw(st.integers(0, 2**32)), draw(st.sampled_from(LAYOUTS)))
    budget = Budget(call.options["block_size"], call.options["block_topk"])
    assert outer_of("two-level", call.k.shape[1], budget) is not None
    return call


# The definition -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "outer"),
    [
        ((128, 64), (128, 256)),
        ((64, 128), (128, 256)),
        ((32, 256), (128, 256)),
        ((16, 16), (64, 16)),
        ((16, 17), (64, 17)),
        ((256, 32), (256, 128)),
        ((129, 5), (129, 20)),
        ((100, 2), (100, 8)),
        ((48, 7), (96, 14)),
        ((13, 30), (52, 30)),
        ((1, 2), (4, 2)),
        ((4, 8), (16, 8)),
    ],
)
def test_outer_blocks_are_of_up_to_128_tokens_and_four_times_the_candidates(
    budget: tuple[int, int], outer: tuple[int, int]
) -> None:
    """And m at least.  They are there where not all of them are kept, for this stage alone."""
    assert outer_budget(Budget(*budget)) == outer
    most = outer[0] * outer[1]
    for tokens, expected in ((most, None), (most + 1, outer)):
        assert outer_of("two-level", tokens, Budget(*budget)) == expected
        assert outer_of("probe", tokens, Budget(*budget)) is None
        assert outer_of("paper", tokens, Budget(*budget)) is None
    assert resolve_coarse("two-level", 10**6, 1, Budget(*budget), True) == "two-level"


@settings(max_examples=60, deadline=None)
@given(two_level_calls(max_tokens=420, max_queries=2))
def test_the_reference_is_the_definition_written_out_for_each_query(call: Call) -> None:
    """Any visibility, factors, given means, ties, NaN and inf in keys: equal to a loop that knows no tensors."""
    assert_same_selection(call)


@settings(max_examples=200, deadline=None)
@given(two_level_calls(dtypes=DTYPES, layouts=LAYOUTS, max_tokens=700, max_queries=12), st.integers(0, 2**32))
def test_the_cpu_operator_equals_the_reference(call: Call, seed: int) -> None:
    """NaN and inf in queries and weights too; with small buffers too."""
    call = spoil(call, seed) if seed % 3 else call
    assert_cpu_equals_reference(call, seed)


def gaussian(tokens: int, queries: int = 5, heads: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return make_values(generator, (2, queries, tokens, heads, 8), torch.float32, "gaussian")


@FUNCTIONS
@pytest.mark.parametrize(("block_size", "block_topk", "most"), [(8, 20, 5 * 128), (100, 3, 1200), (16, 4, 4 * 64)])
def test_it_is_the_probe_while_all_outer_blocks_are_kept(
    function: Any, block_size: int, block_topk: int, most: int
) -> None:
    """Bit for bit; with one outer block more it is not, even where that holds one token."""
    budget = {"topk": 40, "block_size": block_size, "block_topk": block_topk}
    differ = []
    for tokens in (most - 1, most, most + 1):
        inputs = gaussian(tokens)
        levels, probe = (function(*inputs, **budget, coarse=stage) for stage in ("two-level", "probe"))
        differ.append(not torch.equal(levels[0], probe[0]))
        if tokens <= most:
            assert_same_bits(levels, probe)
    assert differ == [False, False, True]


@FUNCTIONS
def test_all_that_fits_is_kept(function: Any) -> None:
    """T = m * B in more than two outer blocks: the flat selection; one token more, and it is not."""
    for tokens, exact in ((512, True), (513, False)):
        inputs = gaussian(tokens)
        indices = function(*inputs, 40, block_size=128, block_topk=4, coarse="two-level")[0]
        assert torch.equal(indices, reference.flat_topk(*inputs, 40)[0]) == exact


def needles(strong: int, weak: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Ten outer blocks of 128 tokens, four blocks each: one of score 30 in each of two, the second's mean is low."""
    q, _, weights, _ = planted()
    k = torch.tensor([1.0, -1.0]).expand(1, 1280, 2).clone()
    k[:, strong // 128 * 128 : strong // 128 * 128 + 128, 0] = 2
    k[:, weak // 128 * 128 : weak // 128 * 128 + 128, 0] = -5
    k[:, [strong, weak], 0] = 30
    # Four outer blocks are kept.
    return q, k, weights, {"topk": 8, "block_size": 32, "block_topk": 4}


@FUNCTIONS
@pytest.mark.parametrize("place", [0, 70, 127])
def test_a_needle_is_found_inside_kept_outer_blocks_alone(function: Any, place: int) -> None:
    """Where the mean of its block is nothing special; in an outer block of a low mean the probe alone finds it."""
    strong, weak = 3 * 128 + place, 6 * 128 + place
    q, k, weights, options = needles(strong, weak)
    found = {
        stage: function(q, k, weights, **options, coarse=stage)[0].tolist()[0][0] for stage in ("two-level", "probe")
    }
    assert strong in found["two-level"]
    assert weak not in found["two-level"]
    assert {strong, weak} <= set(found["probe"])


@FUNCTIONS
def test_the_probe_ranks_inside_outer_blocks(function: Any) -> None:
    """Of four blocks of one outer block that is kept that with the needle is, however low its mean is."""
    q, k, weights, options = needles(3 * 128 + 70, 6 * 128)
    k[:, 448:480, 0] = -2
    k[:, 454, 0] = 100
    options |= {"block_topk": 3, "topk": 80}
    kept = {
        stage: {t // 32 for t in function(q, k, weights, **options, coarse=stage)[0][0, 0].tolist()}
        for stage in ("two-level", "paper")
    }
    assert kept["two-level"] == {0, 14, 39}
    assert 14 not in kept["paper"]


@FUNCTIONS
@pytest.mark.parametrize(
    ("start", "end", "ends", "kept"), [(0, 1280, {0, 39}, 128), (150, 1100, {4, 34}, 2 * 32 + 10 + 12)]
)
def test_the_first_and_the_last_eligible_block_are_kept(
    function: Any, start: int, end: int, ends: set[int], kept: int
) -> None:
    """However bad they and their outer blocks are; all ``kept`` tokens of four blocks are selected."""
    q, k, weights, options = needles(3 * 128 + 70, 6 * 128)
    k[:, :256, 0] = k[:, 1024:, 0] = -9
    options |= {"window_start": torch.tensor(start).int(), "window_end": torch.tensor(end).int(), "topk": kept}
    indices, _ = function(q, k, weights, **options, coarse="two-level")
    blocks = {t // 32 for t in indices[0, 0].tolist()}
    assert len(blocks) == 4
    assert ends < blocks
    assert blocks - ends <= set(range(8, 32))


@FUNCTIONS
def test_what_lies_in_other_outer_blocks_is_not_looked_at(function: Any) -> None:
    """Without a sample that holds it, even a NaN there changes nothing, while it decides the probe."""
    q, k, weights, options = needles(3 * 128 + 70, 6 * 128)
    means = reference.block_means(k, 128)
    options |= {"topk": 64, "coarse": "two-level"}
    clean = function(q, k, weights, **options, k_pooled=means)
    at = int((~sampled(1280, 64) & (torch.arange(1280) // 128 == 6)).nonzero()[40])
    k[:, at] = NAN
    assert_equal(function(q, k, weights, **options, k_pooled=means), clean)
    assert at in function(q, k, weights, **options)[0]
    assert at in function(q, k, weights, **options | {"coarse": "probe"})[0]


@FUNCTIONS
@pytest.mark.parametrize("how", ["sample", "no sample"])
def test_the_threshold_is_that_of_all_visible_tokens(function: Any, how: str) -> None:
    """A sample full of high scores outside kept outer blocks leaves but the best token of a block to count."""
    q, k, weights, options = needles(0, 0)
    # In the one outer block that means keep one block has many tokens of score 2, another a single one of 3.
    k[:, :, 0] = -1
    k[:, 384:400, 0], k[:, 420, 0] = 2, 3
    # Of every sixth token, some twenty are above 0: twice the cap's rank, and less than the threshold's, 24.
    k[:, 256:346, 0] = 1
    if how == "sample":
        k[:, 768:1152, 0] = 50
    means = torch.zeros(1, 10, 2)
    means[:, 3, 0] = 9
    options |= {"topk": 96, "block_size": 32, "block_topk": 3, "coarse": "two-level", "k_pooled": means}
    blocks = {t // 32 for t in function(q, k, weights, **options)[0][0, 0].tolist()}
    assert blocks == {0, 39, 13 if how == "sample" else 12}


# Given means ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("budget", [(16, 8), (32, 4), (40, 3), (130, 3)])
def test_given_means_of_outer_blocks_are_those_it_makes(dtype: torch.dtype, budget: tuple[int, int]) -> None:
    """Bit for bit; others change what is kept."""
    generator = torch.Generator().manual_seed(3)
    q, k, weights = make_values(generator, (2, 6, 2500, 3, 8), dtype, "gaussian")
    factors = {name: torch.randn(2, 2500, generator=generator) for name in ("k_scale", "k_weight")}
    factors["key_valid"] = torch.rand(2, 2500, generator=generator) < 0.8
    options: dict[str, Any] = {"block_size": budget[0], "block_topk": budget[1], "coarse": "two-level", **factors}
    means = pool_keys(k, outer_budget(Budget(*budget)).block_size, **factors)
    own = indexer_topk(q, k, weights, 30, **options)
    assert_same_bits(indexer_topk(q, k, weights, 30, **options, k_pooled=means), own)
    assert not torch.equal(indexer_topk(q, k, weights, 30, **options, k_pooled=means.flip(1))[0], own[0])


def test_keys_are_not_pooled_where_means_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what they are given for; without them outer blocks are, and nothing where all of these are kept."""
    pooled: list[int] = []
    pool = cpu.pool_keys_cpu

    def pooling(k: Tensor, block_size: int, *others: Any) -> Tensor:
        pooled.append(block_size)
        return pool(k, block_size, *others)

    monkeypatch.setattr(cpu, "pool_keys_cpu", pooling)
    options: dict[str, Any] = {"topk": 20, "block_size": 8, "block_topk": 4, "coarse": "two-level"}
    indexer_topk(*gaussian(300), **options, k_pooled=torch.zeros(2, 10, 8))
    indexer_topk(*gaussian(128), **options)
    assert pooled == []
    indexer_topk(*gaussian(300), **options)
    assert pooled == [32]


def test_means_of_inner_blocks_are_an_error() -> None:
    """In the eager call, on meta tensors and under torch.compile; "probe" takes none at all."""
    q, k, weights = gaussian(300)
    options: dict[str, Any] = {"topk": 20, "block_size": 8, "block_topk": 4}
    wrong = pool_keys(k, 8)
    expected = r"k_pooled: got shape \[2, 38, 8\], expected \[B, ceil\(T / 32\), D\] = \[2, 10, 8\]"
    for x in ((q, k, weights, wrong), tuple(x.to("meta") for x in (q, k, weights, wrong))):
        with pytest.raises(ValueError, match=expected):
            indexer_topk(*x[:3], **options, k_pooled=x[3], coarse="two-level")
    compiled = torch.compile(
        lambda *x: indexer_topk(*x[:3], **options, k_pooled=x[3], coarse="two-level"), backend="eager"
    )
    with pytest.raises(Exception, match=expected):
        compiled(q, k, weights, wrong)
    with pytest.raises(ValueError, match=r"k_pooled: got shape \[2, 10, 8\], expected \[B, ceil\(T / 8\), D\]"):
        indexer_topk(q, k, weights, **options, k_pooled=pool_keys(k, 32), coarse="paper")
    with pytest.raises(ValueError, match="k_pooled: got means of blocks, expected None, since coarse='probe'"):
        indexer_topk(q, k, weights, **options, k_pooled=pool_keys(k, 32), coarse="probe")


# Bits, memory, compilation, figures -----------------------------------------------------------------------------------


def test_bits_depend_on_the_row_alone() -> None:
    """Slices of the queries and of the batch, many rows and one."""
    q, k, weights = gaussian(900, queries=40)
    ends = torch.linspace(1, 900, 40).int().expand(2, 40)
    options: dict[str, Any] = {"topk": 24, "block_size": 8, "block_topk": 5, "coarse": "two-level"}
    whole = indexer_topk(q, k, weights, window_end=ends, **options)
    for part in (slice(0, 1), slice(39, 40), slice(7, 30)):
        got = indexer_topk(q[:, part], k, weights[:, part], window_end=ends[:, part], **options)
        assert_same_bits(got, tuple(x[:, part] for x in whole))
    assert_same_bits(
        indexer_topk(q[1:], k[1:], weights[1:], window_end=ends[1:], **options), tuple(x[1:] for x in whole)
    )


def workspace(queries: int, tokens: int) -> int:
    """Peak bytes of a causal call beyond its results, its means and its two heads."""
    q, k, weights = make_values(
        torch.Generator().manual_seed(0), (1, queries, tokens, 2, 8), torch.bfloat16, "gaussian"
    )
    seen = Visibility(window_end=torch.linspace(1, tokens, queries).int())
    with LiveBytes() as live:
        result = cpu.indexer_topk_cpu(
            q, k, weights, 16, Budget(16, 8), seen, None, None, True, False, coarse="two-level"
        )
    return live.peak - sum(x.nbytes for x in result)


def test_no_scores_of_all_tokens_are_made() -> None:
    """Eight times as many queries add less than half a byte for each token, and eight times as many tokens little."""
    assert workspace(512, 4096) - workspace(64, 4096) < (512 - 64) * 4096 / 2
    assert workspace(64, 32768) - workspace(64, 4096) < 64 * (32768 - 4096)


class Module(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, weights: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        return indexer_topk(q * 1.0, k, weights, 20, block_size=4, block_topk=60, k_pooled=means, coarse="two-level")


def test_growing_lengths_compile_once() -> None:
    """From the exact regime into the probe's and on into that of two levels, with their means."""
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(Module(), backend=counter, fullgraph=True)
    for tokens in (200, 240, 241, 960, 961, 1300):
        q, k, weights = gaussian(tokens)
        inputs = (q, k, weights, pool_keys(k, 16))
        for x in (k, inputs[3]):
            torch._dynamo.mark_dynamic(x, 1)
        assert_same_bits(compiled(*inputs), Module()(*inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize("function", [indexer_topk, reference.indexer_topk], ids=["cpu", "reference"])
def test_as_many_blocks_as_are_kept_are_exact_however_far_apart(function: Any) -> None:
    """Eight blocks of four visible tokens in eight of 64 outer blocks."""
    q, k, weights = gaussian(1024, queries=6)
    mask = torch.zeros(1024).bool()
    mask[torch.arange(8)[:, None] * 128 + 64 + torch.arange(4)] = True
    budget = {"block_size": 4, "block_topk": 8, "coarse": "two-level"}
    assert outer_of("two-level", 1024, Budget(4, 8)) == (16, 8)
    found, flat = function(q, k, weights, 16, mask=mask, **budget), reference.flat_topk(q, k, weights, 16, mask=mask)
    assert torch.equal(found[0], flat[0])
    torch.testing.assert_close(found[1], flat[1])
    assert fidelity(q, k, weights, 16, mask=mask, **budget).exact_queries == q.shape[0] * q.shape[1]
