"""Hostile inputs of the Triton kernels: ties by the thousand, NaN around all that may be read, windows of any values.

Sizes are real on a GPU, so that rows are longer than a program holds and sm_90's kernel runs, and tiny under the
interpreter, where tiles are so too (see tests/triton_cases.py).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton_cases import (
    DEVICE,
    DTYPES,
    FP8,
    ON_GPU,
    RUNS,
    Case,
    assert_equal,
    check,
    gaussian_case,
    launched,
    random_bool,
    run,
    small_tiles,
    whole_case,
)

from hisa_compile.ops import reference
from hisa_compile.ops.triton import config, gpu, launch_pool
from hisa_compile.ops.triton.refine_hopper import refine_by_block_hopper_kernel
from hisa_compile.ops.triton.refine_row_hopper import refine_by_row_hopper_kernel

pytestmark = pytest.mark.skipif(not RUNS, reason="needs a GPU, or a process started with TRITON_INTERPRET=1")

tiles = nullcontext if ON_GPU else small_tiles
# On a GPU all that can go by block does; the interpreter's small tiles see to that themselves.
by_block = mock.patch.object(config, "FEW_PAIRS", 0)
HALF_DTYPES = (torch.float16, torch.bfloat16, FP8) if ON_GPU else (torch.float16,)

# regime: block_size, block_topk, topk; of 65536 tokens on a GPU and 96 under the interpreter.  A program holds 16384
# columns, or 16, and sorts 512, or 8.
TOKENS = 65536 if ON_GPU else 96
REGIMES = {
    "pruned": (128, 16, 1000) if ON_GPU else (4, 4, 8),
    "long rows of candidates": (128, 192, 2048) if ON_GPU else (16, 3, 16),
    "long rows of blocks": (4, 512, 1500) if ON_GPU else (4, 6, 16),
    "every block kept": (128, 512, 2048) if ON_GPU else (16, 6, 7),
    "every block kept, merged": (128, 512, 6000) if ON_GPU else (16, 6, 30),
}


def tied_case(values: str, regime: str, dtype: torch.dtype) -> Case:
    """Scores of 0 alone, or of 3 values: each token's own, or that of its block."""
    block_size, block_topk, topk = REGIMES[regime]
    budget = {"topk": topk, "block_size": block_size, "block_topk": block_topk}
    # As many heads as are multiplied: padded ones would add 0.0 to what is to be -0.0.
    case = whole_case(32 if ON_GPU else 1, TOKENS, 16, 32 if ON_GPU else 5, dtype, **budget)
    queries = case["q"].shape[1]
    step = TOKENS // (4 * queries)
    case["window_start"] = (5 + step * torch.arange(queries, device=DEVICE))[None].int()
    case["window_end"] = (TOKENS - step * torch.arange(queries, device=DEVICE))[None].int()
    if values == "zeros":
        case["q"] = (case["q"].float().abs() + 1).to(dtype)
        case["k"] = (-case["k"].float().abs() - 1).to(dtype)
        # Weights below 0 make -0.0 of a ReLU's 0: in all tokens of every other row, and in every other token.
        case["weights"][:, ::2] = -1.0
        case["k_weight"] = 1.0 - 2.0 * (torch.arange(TOKENS, device=DEVICE) % 2)[None]
        return case
    generator = torch.Generator().manual_seed(1)
    count = TOKENS if values == "of tokens" else TOKENS // block_size
    one_of_three = torch.tensor([-1.0, 1.0, 2.0])[torch.randint(0, 3, (count,), generator=generator)]
    k = torch.zeros(case["k"].shape)
    k[0, :, 0] = one_of_three.repeat_interleave(TOKENS // count)
    q = case["q"].float()
    q[..., 0] = 1.0
    return case | {"q": q.to(dtype), "k": k.to(dtype).to(DEVICE), "weights": torch.ones_like(case["weights"])}


@pytest.mark.parametrize("dtype", (torch.bfloat16, FP8) if ON_GPU else (torch.float16,), ids=str)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("values", ["zeros", "of tokens", "of blocks"])
def test_ties_by_the_thousand_go_to_the_lowest_positions(values: str, regime: str, dtype: torch.dtype) -> None:
    """Among tokens and among blocks, in one tile and in rows that are read again for every step, in any order."""
    case = tied_case(values, regime, dtype)
    with tiles(), by_block:
        check(case)
        check(case | {"sorted": False})
        check(case | {"coarse": "probe"})
        if values != "zeros":
            assert run(case)[1].unique().numel() <= 3
            return
        # The lowest blocks are kept, besides the last one; their lowest tokens are selected.
        indices, scores = run(case)
    lowest = case["window_start"][..., None] + torch.arange(case["topk"], device=DEVICE)
    assert torch.equal(indices.long(), lowest)
    assert (scores == 0).all()
    assert not scores.signbit().any()


INT32 = torch.iinfo(torch.int32)


def hostile_windows(tokens: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Every pair of a start and an end, int32 [pairs]: empty, backwards, negative, past the last token, extreme."""
    middle = tokens // 2
    edges = [INT32.min, -1, 0, 1, block_size, middle - 1, middle, tokens - 1, tokens, tokens + 1, INT32.max]
    pairs = torch.cartesian_prod(torch.tensor(edges), torch.tensor(edges))
    return pairs[:, 0].int().to(DEVICE), pairs[:, 1].int().to(DEVICE)


@pytest.mark.parametrize("block_topk", [2, 1000], ids=["pruned", "every block kept"])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_windows_may_have_any_values(dtype: torch.dtype, block_topk: int) -> None:
    """Rows that see nothing beside rows that see all, in one call; either end alone too."""
    tokens, block_size = (9 * 1024, 128) if ON_GPU else (48, 16)
    start, end = hostile_windows(tokens, block_size)
    chosen = slice(None) if ON_GPU else slice(0, None, 7)
    start, end = start[chosen], end[chosen]
    # In an order of their own: neighbours, which share tiles, see different things.
    order = torch.randperm(len(start), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    start, end = start[order], end[order]
    budget = {"topk": 200 if ON_GPU else 9, "block_size": block_size, "block_topk": block_topk}
    case = whole_case(len(start), tokens, 16 if ON_GPU else 3, 32 if ON_GPU else 5, dtype, **budget)
    with tiles(), by_block:
        check(case | {"window_start": start[None], "window_end": end[None]})
        check(case | {"window_start": start[None], "window_end": end[None], "coarse": "probe"})
        check(case | {"window_start": start[None], "window_end": end[None], "mark_hidden": True, "sorted": False})
        if ON_GPU:
            check(case | {"window_start": start[None]})
            check(case | {"window_end": end[None]})
            check(case | {"window_end": end[None], "coarse": "probe"})


def poisoned(x: Tensor, where: Tensor, value: float) -> Tensor:
    """x with ``value`` where ``where``; float8, which has no inf, gets NaN for it."""
    return torch.where(where, value, x.float()).to(x.dtype)


# What by_block_case has: every block kept, or pruned by means, by spreads too, or by the probe, the size of a block
# behind it where blocks are small, which go by row.
NEEDS_GPU = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
SMALL = [pytest.param(x, marks=NEEDS_GPU, id=f"{x}, small blocks") for x in ("paper 32", "probe 16")]
PRUNED = pytest.mark.parametrize(
    "pruned",
    [*(pytest.param(x, id=x) for x in ("paper", "spread", "probe")), pytest.param("", id="every block kept"), *SMALL],
)


def by_block_case(dtype: torch.dtype, pruned: str) -> Case:
    """Two sequences, ragged last blocks, scales and weights; rows that go past tiles of keys together."""
    batch, queries, tokens, heads, dim, size = (2, 40, 2500, 24, 80, 128) if ON_GPU else (2, 2, 77, 3, 10, 16)
    pruned, _, small = pruned.partition(" ")
    topk, block_topk = 300 if ON_GPU else 11, 8 if ON_GPU else 3
    if small:
        size, block_topk = int(small), block_topk * size // int(small)
    blocks = -(-tokens // size)
    budget = {"topk": topk, "block_size": size, "block_topk": block_topk if pruned else blocks}
    case = gaussian_case(batch, queries, tokens, heads, dim, dtype, **budget)
    generator = torch.Generator(DEVICE).manual_seed(1)
    case["k_scale"], case["k_weight"] = torch.randn(2, batch, tokens, generator=generator, device=DEVICE)
    return case | {"coarse": pruned or "paper"}


@PRUNED
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_what_another_row_sees_is_no_affair_of_a_row_that_does_not(dtype: torch.dtype, pruned: str) -> None:
    """NaN and inf behind the window of every other row, in its own last block: they share tiles and keep their bits."""
    case = by_block_case(dtype, pruned)
    queries, tokens, size = case["q"].shape[1], case["k"].shape[1], case["block_size"]
    near = torch.arange(queries, device=DEVICE) % 2 == 0
    # Neither edge is a block's.
    low, high = size + 3, tokens - 2 * size - 5
    case["window_start"] = torch.where(near, low, 0).int()
    case["window_end"] = torch.where(near, high, tokens).int()
    position = torch.arange(tokens, device=DEVICE)
    hidden = ((position < low) | (position >= high)).expand(2, -1)
    with tiles(), by_block:
        expected = run(case)
        for value in (math.nan, math.inf, -math.inf) if ON_GPU else (math.nan,):
            factors = {name: poisoned(case[name], hidden, value) for name in ("k_scale", "k_weight")}
            indices, scores = run(case, k=poisoned(case["k"], hidden[..., None], value), **factors)
            assert_equal((indices[:, near], scores[:, near]), (expected[0][:, near], expected[1][:, near]))
            # The others did read it.
            assert scores[:, ~near, 0].isnan().all()
        case["key_valid"] = random_bool((2, tokens), 0.9)
        expected, invalid = run(case), ~case["key_valid"]
        factors = {name: poisoned(case[name], invalid, math.nan) for name in ("k_scale", "k_weight")}
        assert_equal(run(case, k=poisoned(case["k"], invalid[..., None], math.nan), **factors), expected)


@pytest.mark.parametrize("coarse", ["paper", "spread"])
@pytest.mark.parametrize("hidden_by", ["mask", "segments", "not kept"])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_given_means_leave_nothing_to_read_of_what_is_hidden_or_not_kept(
    dtype: torch.dtype, hidden_by: str, coarse: str
) -> None:
    """With ``k_pooled`` a mask and segments hide NaN as windows do, and so does the coarse stage."""
    case = by_block_case(dtype, coarse)
    queries, tokens, size = case["q"].shape[1], case["k"].shape[1], case["block_size"]
    factors = (case["k_scale"], case["k_weight"])
    case["k_pooled"] = launch_pool.pool_keys_triton(case["k"], size, None, *factors, coarse == "spread")
    blocks = case["k_pooled"].shape[1]
    position = torch.arange(tokens, device=DEVICE)
    if hidden_by == "mask":
        hidden = position % 3 == 1
        case["mask"] = (random_bool((2, queries, tokens), 0.9) & ~hidden).contiguous()
    elif hidden_by == "segments":
        hidden = position % 3 == 1
        case["k_segment"] = torch.where(hidden, 7, position // 2 % 2).expand(2, -1)
        case["q_segment"] = torch.arange(queries, device=DEVICE) % 2
    else:
        # Blocks whose mean any query likes better than the others'; the first and the last are kept anyway.
        liked = torch.arange(blocks, device=DEVICE) % 3 == 1
        liked[-1] = False
        assert int(liked.sum()) >= case["block_topk"] - 2
        best = liked.nonzero()[: case["block_topk"] - 2, 0]
        kept = torch.cat([best, best.new_tensor([0, blocks - 1])])
        hidden = ~torch.isin(position // size, kept)
        case["q"], case["weights"] = poisoned(case["q"], case["q"].float() < 0, 1.0), case["weights"].abs()
        case["k_pooled"] = torch.where(torch.isin(torch.arange(blocks, device=DEVICE), kept)[:, None], 1.0, -1.0)
        case["k_pooled"] = case["k_pooled"].to(reference.pooled_dtype(dtype)).expand(2, blocks, case["q"].shape[3])
    hidden = hidden.expand(2, -1)
    with tiles(), by_block:
        expected = run(case)
        for value in (math.nan, math.inf) if ON_GPU else (math.nan,):
            changes = {name: poisoned(case[name], hidden, value) for name in ("k_scale", "k_weight")}
            assert_equal(run(case, k=poisoned(case["k"], hidden[..., None], value), **changes), expected)
        if hidden_by != "not kept":
            every = case | {"block_topk": blocks, "k_pooled": None}
            assert_equal(run(every, k=poisoned(case["k"], hidden[..., None], math.nan), **changes), run(every))


def embedded(x: Tensor) -> Tensor:
    """The same values in the middle of a larger tensor of NaN, or of True or the largest number.

    The margin of the last dimension is a multiple of 16 bytes, so that q is as sm_90's copies take it.
    """
    margins = [1] * (x.dim() - 1) + [16]
    wide: Any = torch.empty([n + 2 * m for n, m in zip(x.shape, margins, strict=True)], dtype=x.dtype, device=x.device)
    if x.dtype == FP8:
        wide.view(torch.uint8).fill_(0x7F)
    else:
        wide.fill_(math.nan if x.is_floating_point() else True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)
    view = wide[tuple(slice(m, m + n) for n, m in zip(x.shape, margins, strict=True))]
    view.copy_(x)
    return view


@PRUNED
@pytest.mark.parametrize("dtype", DTYPES if ON_GPU else (torch.float32, torch.float16), ids=str)
def test_nothing_around_the_tensors_is_read(dtype: torch.dtype, pruned: str) -> None:
    """Every tensor is a slice of a larger one full of NaN: before and behind rows, heads, dims and sequences."""
    case = by_block_case(dtype, pruned)
    queries, tokens = case["q"].shape[1], case["k"].shape[1]
    generator = torch.Generator().manual_seed(2)
    case["window_start"] = torch.randint(-3, tokens // 2, (2, queries), generator=generator).int().to(DEVICE)
    case["window_end"] = torch.randint(tokens // 3, tokens + 9, (2, queries), generator=generator).int().to(DEVICE)
    optional = {
        "key_valid": random_bool((2, tokens), 0.9),
        "mask": random_bool((2, queries, tokens), 0.8, seed=3),
        "q_segment": torch.arange(queries, device=DEVICE)[None].expand(2, -1) % 2,
        "k_segment": torch.arange(tokens, device=DEVICE)[None].expand(2, -1) // 5 % 2,
    }
    with tiles(), by_block:
        for given in (case, case | {"key_valid": optional["key_valid"]}, case | optional):
            wide = {name: embedded(x) for name, x in given.items() if isinstance(x, Tensor)}
            with launched() as kernels:
                got = run(given | wide)
            assert_equal(got, run(given))
            if dtype != torch.float32 and gpu.is_hopper(case["q"]):
                # Small blocks are copied by the accelerator where windows alone say what is visible.
                if " " not in pruned:
                    assert refine_by_block_hopper_kernel in kernels
                else:
                    assert (refine_by_row_hopper_kernel in kernels) == (given is case)


@PRUNED
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_nan_in_a_query_stays_in_its_own_row(dtype: torch.dtype, pruned: str) -> None:
    """Also where the rows behind a query's heads, which pad them, are those of the next query."""
    case = by_block_case(dtype, pruned)
    spoilt = torch.arange(case["q"].shape[1], device=DEVICE) % 3 == 1
    with tiles(), by_block:
        expected = run(case)
        q = poisoned(case["q"], spoilt[:, None, None], math.nan)
        for changes in ({"q": q}, {"weights": poisoned(case["weights"], spoilt[:, None], math.nan)}):
            indices, scores = run(case, **changes)
            assert_equal((indices[:, ~spoilt], scores[:, ~spoilt]), (expected[0][:, ~spoilt], expected[1][:, ~spoilt]))
            assert scores[:, spoilt].isnan().all()
