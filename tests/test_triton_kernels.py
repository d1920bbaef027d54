"""The Triton kernels against the reference, on a GPU and without one (see tests/triton_cases.py).

Every call runs with ``torch.empty`` filled with garbage.
"""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
    canonical,
    cases,
    check,
    exact_case,
    gaussian_case,
    launched,
    random_bool,
    random_segments,
    run,
    small_tiles,
    strided,
    whole_case,
)

from hisa_compile.ops import Budget, Visibility, reference
from hisa_compile.ops.triton import config, gpu, launch, launch_pool, launch_refine
from hisa_compile.ops.triton.finish import fill_kernel
from hisa_compile.ops.triton.group import list_runs_kernel, sort_pairs_kernel
from hisa_compile.ops.triton.operands import FP8_BITS, FP8_NATIVE

pytestmark = pytest.mark.skipif(not RUNS, reason="needs a GPU, or a process started with TRITON_INTERPRET=1")


@settings(max_examples=20 if ON_GPU else 40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(), tiles=st.booleans(), roomy=st.sampled_from([0, 100]))
def test_equals_the_reference_bit_for_bit(case: Case, tiles: bool, roomy: int) -> None:
    """Any shapes, budget, visibility, dtype, layout and order, with the real tiles and with tiny ones."""
    if tiles:
        # Lists with room are of several rows.
        with small_tiles(workspace=5000 if roomy else 1, roomy=roomy):
            check(case)
    else:
        check(case)


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [
        (torch.float32, "windows"),
        (torch.float16, "mask"),
        (torch.bfloat16, "mask"),
        (FP8, "windows"),
        (torch.float16, "segments"),
        (torch.bfloat16, "segments and mask"),
    ],
)
def test_every_loop_runs_more_than_once(dtype: torch.dtype, mode: str) -> None:
    """Several tiles in the coarse filter, both selections, fill, sort and merge, and one row a chunk."""
    weighted = mode.startswith("segments")
    case = exact_case(1, 2, 100, 3, 37, topk=45, block_size=3, block_topk=20, dtype=dtype, weighted=weighted)
    case["key_valid"] = random_bool((1, 100), 0.8)
    if weighted:
        # Three segments in every block, the queries in the one between the others, and in all but a few tokens.
        near = torch.arange(100, device=DEVICE)[None] % 7 % 3
        case |= {"k_segment": near, "q_segment": torch.tensor([1, 0], device=DEVICE)}
        case["k_weight"] = torch.arange(100, device=DEVICE)[None] % 4 - 1.0
    if mode in ("windows", "segments"):
        case["window_start"] = torch.tensor([[0, 5]], dtype=torch.int32, device=DEVICE)
        case["window_end"] = torch.tensor([[100, 98]], dtype=torch.int32, device=DEVICE)
    else:
        case["mask"] = random_bool((1, 2, 100), 0.6)
    with small_tiles():
        check(case)
    if mode in ("windows", "segments"):
        with small_tiles():
            check(case | {"block_topk": 34})


@pytest.mark.parametrize("roomy", [False, True], ids=["sorted", "with room"])
@pytest.mark.parametrize("coarse", ["paper", "probe"])
def test_pairs_are_listed_by_block(roomy: bool, coarse: str) -> None:
    """Two sequences in a chunk, then chunks of parts of a sequence; shares of several lists, and of a part of one."""
    queries, tokens = (300, 640) if ON_GPU else (9, 160)
    case = whole_case(queries, tokens, 2, 16, torch.float16, 2, topk=20, block_size=16, block_topk=6)
    ends = torch.randint(0, tokens + 1, (2, queries), generator=torch.Generator().manual_seed(3))
    case |= {"coarse": coarse, "window_end": ends.int().to(DEVICE)}
    values = {"ROOMY": 1000 if roomy else 0, "FEW_ROWS": 1, "FEW_PAIRS": 0, "LEAST_SHARE": 1, "MANY_PROGRAMS": 7}
    score_tiles = config.score_tiles

    def small(*sizes: Any) -> config.Tiles:
        return score_tiles(*sizes)._replace(tile=16)

    for workspace in (config.WORKSPACE_BYTES, 150_000 if ON_GPU else 4000):
        with mock.patch.multiple(config, score_tiles=small, WORKSPACE_BYTES=workspace, **values), launched() as kernels:
            check(case)
        assert list_runs_kernel in kernels
        assert (sort_pairs_kernel in kernels) != roomy


def test_chunks_of_several_rows_cross_the_batch() -> None:
    """A chunk's rows may belong to two batch entries, and the last chunk is shorter."""
    case = exact_case(3, 3, 30, topk=5, block_topk=3)
    case["window_end"] = torch.arange(4, 31, 3, dtype=torch.int32, device=DEVICE).view(3, 3)
    with small_tiles(workspace=500):
        check(case)


@pytest.mark.parametrize("block_size", [4, 64])
def test_a_score_of_zero_is_zero_whatever_the_scale(block_size: int) -> None:
    """Where no product is above 0 the probe's are 0 too, and the lowest blocks are kept; 0.3 is no power of two."""
    budget = {"topk": 9, "block_size": block_size, "block_topk": 5}
    case = whole_case(3, 40 * block_size, 3, 5, torch.float16, **budget) | {"coarse": "probe"}
    case |= {"q": case["q"].abs() + 1, "k": -case["k"].abs() - 1}
    case["k_scale"] = torch.full(case["k"].shape[:2], 0.3, device=DEVICE)
    check(case)


def test_block_of_any_size() -> None:
    """One block for everything, blocks larger than a pool tile, a last block that is nearly empty."""
    for block_size, tokens in ((100, 230), (33, 133), (64, 65)):
        check(exact_case(1, 2, tokens, topk=9, block_size=block_size, block_topk=2, dtype=torch.float16))


@pytest.mark.parametrize("empty", ["batch", "queries", "tokens", "topk"])
def test_empty_sizes_give_empty_results_without_a_launch(empty: str) -> None:
    """B, S, T or topk of 0."""
    case = exact_case(**{empty: 0})
    with mock.patch.object(gpu, "launch", side_effect=AssertionError):
        indices, scores = run(case)
    expected = (case["q"].shape[0], case["q"].shape[1], min(case["topk"], case["k"].shape[1]))
    assert indices.shape == scores.shape == expected
    assert indices.numel() == 0


@pytest.mark.parametrize("coarse", ["paper", "spread", "probe"])
def test_hidden_nan_and_inf_change_nothing(coarse: str) -> None:
    """Keys hidden by windows or key_valid, whatever they hold, in the block of visible ones and elsewhere."""
    case = exact_case(1, 2, 60, heads=3, dim=5, topk=12, block_size=4, block_topk=4) | {"coarse": coarse}
    case["window_start"] = torch.tensor([[9, 9]], dtype=torch.int32, device=DEVICE)
    case["window_end"] = torch.tensor([[51, 51]], dtype=torch.int32, device=DEVICE)
    case["key_valid"] = random_bool((1, 60), 0.7)
    position = torch.arange(60, device=DEVICE)
    hidden = (position < 9) | (position >= 51) | ~case["key_valid"][0]
    expected = run(case)
    assert_equal(expected, reference.indexer_topk(**case))
    for value in (math.nan, math.inf, -math.inf):
        poisoned = torch.where(hidden[:, None], value, case["k"])
        scale = torch.where(hidden, value, 1.0)[None]
        assert_equal(run(case, k=poisoned, k_scale=scale), expected)
        assert_equal(run(case, k=poisoned, k_scale=scale, k_weight=scale), expected)
    case |= {"q_segment": torch.tensor([0, 1], device=DEVICE), "k_segment": (position // 3 % 3)[None]}
    case["k_weight"] = (position % 5 - 2.0)[None]
    expected = run(case)
    assert_equal(expected, reference.indexer_topk(**case))
    for value in (math.nan, math.inf):
        poisoned = torch.where(hidden[:, None], value, case["k"])
        assert_equal(run(case, k=poisoned, k_weight=torch.where(hidden, value, case["k_weight"])), expected)


def eligible_of(case: Case) -> Tensor:
    """The blocks [B, S, M] that the coarse stage ranks; no stage after it runs."""
    batch, queries, tokens = *case["q"].shape[:2], case["k"].shape[1]
    captured: dict[str, Any] = {}
    original = gpu.launch

    def until_coarse(kernel: Any, programs: int, options: config.Launch, **arguments: Any) -> None:
        if kernel in (launch_pool.pool_kernel, launch.coarse_kernel):
            original(kernel, programs, options, **arguments)
            captured.update(arguments)

    with mock.patch.object(gpu, "launch", until_coarse):
        run(case)
    size = case["block_size"]
    blocks = -(-tokens // size)
    bits = captured["block_scores_ptr"].view(batch, queries, -1)[..., :blocks]
    start = case.get("window_start", torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)).clamp(0, tokens)
    end = case.get("window_end", torch.full((1, 1), tokens, device=DEVICE)).clamp(0, tokens)
    # What lies outside the window's blocks may not be written.
    block = torch.arange(blocks, device=DEVICE)
    touched = (block >= (start // size)[..., None]) & (block < -(-end // size)[..., None]) & (start < end)[..., None]
    return touched & (bits != -1)


@pytest.mark.parametrize(("kind", "dtype"), [("packed", torch.int32), ("runs", torch.int64), ("mixed", torch.int64)])
def test_eligible_blocks_are_those_that_hold_a_visible_token(kind: str, dtype: torch.dtype) -> None:
    """Bounds, windows and valid keys decide most of them; the answer is that of looking at every token."""
    queries, tokens = (60, 330) if ON_GPU else (5, 61)
    case = exact_case(2, queries, tokens, heads=1, dim=1, topk=8, block_size=6, block_topk=3)
    case |= random_segments(kind, dtype, (2, queries), 2, tokens, seed=3)
    g = torch.Generator().manual_seed(4)
    windows = {
        "window_start": torch.randint(-5, tokens // 2, (2, queries), generator=g).int().to(DEVICE),
        "window_end": torch.randint(tokens // 4, tokens + 5, (2, queries), generator=g).int().to(DEVICE),
    }
    holes = {"key_valid": random_bool((2, tokens), 0.5, seed=5)}
    for others in ({}, windows, holes, windows | holes, {"mask": random_bool((1, queries, tokens), 0.3)}):
        visibility = {name: x for name, x in (case | others).items() if name in Visibility._fields}
        visible = reference.visible_tokens(case["q"], case["k"], **visibility)
        expected = torch.nn.functional.pad(visible, (0, -tokens % 6)).unflatten(-1, (-1, 6)).any(-1)
        assert torch.equal(eligible_of(case | others), expected)


def test_a_packed_call_gives_each_sequence_what_it_gets_alone() -> None:
    """Sequences one after the other, causal: the bits of a call of their own where blocks begin with them."""
    lengths = [96, 16, 48] if ON_GPU else [24, 8, 16]
    total = sum(lengths)
    case = gaussian_case(1, total, total, 3, 16, torch.float16, topk=6, block_size=4, block_topk=3)
    if not ON_GPU:
        # The interpreter takes its time: every third query.
        case |= {name: case[name][:, ::3] for name in ("q", "weights")}
    position = torch.arange(total, device=DEVICE)[:: 1 if ON_GPU else 3]
    ids = torch.tensor([8, -1, 8 + 2**32]).repeat_interleave(torch.tensor(lengths)).to(DEVICE)
    case["window_end"] = (position + 1).int()
    indices, scores = run(case, q_segment=ids[position], k_segment=ids[None])
    for start, length in zip((0, lengths[0], total - lengths[2]), lengths, strict=True):
        rows = (position >= start) & (position < start + length)
        alone = {name: case[name][:, rows] for name in ("q", "weights")}
        alone |= {"k": case["k"][:, start : start + length], "window_end": case["window_end"][rows] - start}
        expected = run(case | alone)
        seen = ~expected[1].isneginf()
        assert torch.equal(indices[:, rows][seen], expected[0][seen] + start)
        assert_equal((indices, scores[:, rows]), (indices, expected[1]))


def test_a_score_is_rounded_once_by_its_weight() -> None:
    """The score without k_weight, times k_weight in float32, of either sign."""
    case = gaussian_case(1, 3, 40, 5, 20, torch.float16, topk=40, block_size=4, block_topk=10)
    plain = canonical(*run(case))[1]
    k_weight = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert torch.equal(canonical(*run(case, k_weight=k_weight))[1], plain * k_weight[:, None])


def test_visible_nan_and_inf_rank_as_in_the_reference() -> None:
    """NaN first, +inf next, -inf among hidden tokens by position; padded heads and dims don't turn inf into NaN."""
    case = exact_case(1, 2, 40, heads=3, dim=5, topk=40, block_size=4, block_topk=10)
    case["q"], case["weights"] = case["q"].abs() + 1, case["weights"].abs() + 1
    case["weights"][:, 1] *= -1
    case["k"][0, 17, 2] = math.nan
    case["k"][0, [3, 30]] = math.inf
    case["window_end"] = torch.tensor([[36, 36]], dtype=torch.int32, device=DEVICE)
    case["key_valid"] = torch.arange(40, device=DEVICE)[None] != 1
    indices, scores = run(case)
    assert indices[0, :, 0].tolist() == [17, 17]
    assert scores[0, :, 0].isnan().all()
    assert indices[0, 0, 1:3].tolist() == [3, 30]
    assert scores[0, 0, 1:3].isposinf().all()
    for changes in ({}, {"block_topk": 4, "topk": 14}, {"mark_hidden": True}, {"block_topk": 3, "topk": 12}):
        for coarse in ("paper", "spread"):
            check(case | changes | {"coarse": coarse})


def test_spreads_are_powers_of_two_at_every_border() -> None:
    """One key in a dimension of two: variances on both sides of each border between two powers, and beyond floats."""
    exponent = torch.arange(-149, 128, device=DEVICE)
    sizes = torch.ldexp(torch.ones(277, 1, device=DEVICE), exponent[:, None])
    sizes = (sizes * torch.tensor([1.0, 1.999, 1.4142, 2 / 31**0.5, 1.999 / 31**0.5], device=DEVICE)).flatten()
    k = torch.stack((sizes, -sizes), 1).view(1, -1, 1)
    pooling = (k, 2, None, None, None, True)
    got, expected = launch_pool.pool_keys_triton(*pooling), reference.block_representatives(*pooling)
    assert_equal((got, got), (expected, expected))
    spreads = set(got[0, :, 1].tolist())
    assert {0.0, 2.0**-63, 1.0, 2.0**63, math.inf} <= spreads
    half = k[:, (k[0, :, 0].abs() < 60000) & (k[0, :, 0].abs() > 1e-7)].half()
    pooling = (torch.cat((half, torch.tensor([[[-65504.0], [65504.0]]], device=DEVICE).half()), 1), *pooling[1:])
    got, expected = launch_pool.pool_keys_triton(*pooling), reference.block_representatives(*pooling)
    assert_equal((got, got), (expected, expected))
    assert got[0, -1].tolist() == [0.0, 2.0**15]


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_a_key_that_is_no_number_leaves_its_block_no_spread(value: float) -> None:
    """NaN, whatever its sign: that of inf - inf has one on some machines."""
    k = torch.ones(1, 12, 2, device=DEVICE)
    k[0, 5, 0] = value
    for keys in (k, k.half()):
        both = launch_pool.pool_keys_triton(keys, 4, None, None, None, True)
        assert both[0, 1, 2].isnan()
        assert both[0, :, 3].tolist() == [0.0, 0.0, 0.0]
        assert both[0, [0, 2], 2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES if ON_GPU else (torch.float16, FP8), ids=str)
@pytest.mark.parametrize("tables", [False, True], ids=["windows", "tables"])
@pytest.mark.parametrize("coarse", ["paper", "spread"])
def test_given_means_take_the_place_of_pooling(dtype: torch.dtype, tables: bool, coarse: str) -> None:
    """The kernel's own means, given back; means that send the coarse stage elsewhere; means that are not to be read."""
    case = exact_case(2, 5, 60, heads=3, dim=18, topk=9, block_size=4, block_topk=3, dtype=dtype) | {"coarse": coarse}
    case["window_end"] = torch.randint(20, 61, (2, 5), generator=torch.Generator().manual_seed(0)).int().to(DEVICE)
    if tables:
        case["key_valid"] = random_bool((2, 60), 0.7)
        halves = (torch.arange(60, device=DEVICE) >= 31).long()
        case |= {"q_segment": halves[None, 29:34], "k_segment": halves[None].expand(2, -1)}
    pooling = (case["k"], 4, case.get("key_valid"), None, None, coarse == "spread")
    means, expected = launch_pool.pool_keys_triton(*pooling), reference.block_representatives(*pooling)
    assert_equal((means, means), (expected, expected))
    pooled = run(case)
    assert_equal(run(case, k_pooled=strided(means)), pooled)
    other = case | {"k_pooled": means.flip(1) * 2}
    assert not torch.equal(run(other)[0], pooled[0])
    check(other)
    assert_equal(
        run(case | {"block_topk": 15}, k_pooled=torch.full_like(means, math.nan)), run(case | {"block_topk": 15})
    )


def test_fill_takes_visible_tokens_with_their_scores_then_hidden_ones() -> None:
    """A mask with holes leaves fewer visible candidates than topk in the two kept blocks."""
    case = exact_case(1, 3, 48, topk=16, block_size=8, block_topk=2)
    case["mask"] = random_bool((1, 3, 48), 0.3)
    case["mask"][0, 2, 4:40] = False
    check(case)
    check(case | {"mark_hidden": True})
    indices, scores = run(case)
    every = reference.indexer_scores(case["q"], case["k"], case["weights"])
    every = torch.where(case["mask"], every, -math.inf)
    assert torch.equal(scores, every.gather(-1, indices.long()))
    assert (scores[0, 2] == -math.inf).any()
    assert (scores[0, 0] > -math.inf).all()


@pytest.mark.parametrize("options", [{}, {"sorted": False}, {"mark_hidden": True, "sorted": False}], ids=str)
def test_rows_of_short_windows_are_filled_without_a_kernel_where_windows_tell_all(options: Case) -> None:
    """Kept blocks that a window cuts at both ends: up to 10 tokens are then among the candidates of any row."""
    windows = [(start, start + length) for start in range(8) for length in (0, 1, 2, 5, 9, 10, 11, 16, 29)]
    starts, ends = torch.tensor(windows, dtype=torch.int32, device=DEVICE).unbind(-1)
    case = exact_case(1, len(windows), 40, block_size=4, block_topk=4) | options
    case |= {"window_start": starts[None], "window_end": ends[None]}
    for changes, apart in (
        ({"topk": 10}, False),
        ({"topk": 11}, True),
        ({"topk": 14, "block_topk": 10}, False),
        ({"topk": 10, "key_valid": random_bool((1, 40), 0.9)}, True),
    ):
        with launched() as kernels:
            check(case | changes)
        assert (fill_kernel in kernels) == apart, changes


def test_a_row_that_sees_nothing_is_filled_from_the_left() -> None:
    """No visible token: positions 0, 1, 2, ... with -inf, or -1."""
    for hiding in (
        {"window_start": torch.tensor(9, dtype=torch.int32, device=DEVICE),
         "window_end": torch.tensor(3, dtype=torch.int32, device=DEVICE)},
        {"window_end": torch.tensor(-(2**31), dtype=torch.int32, device=DEVICE)},
        {"window_start": torch.tensor(2**31 - 1, dtype=torch.int32, device=DEVICE)},
        {"key_valid": random_bool((1, 37), 0.0)},
        {"q_segment": torch.tensor(2, device=DEVICE), "k_segment": torch.arange(37, device=DEVICE)[None] % 3 * 2 + 1},
        {"mask": random_bool((37,), 0.0)},
    ):  # fmt: skip
        case = exact_case(1, 1) | hiding
        indices, scores = run(case)
        assert indices.tolist() == [[list(range(7))]]
        assert scores.isneginf().all()
        assert (run(case, mark_hidden=True)[0] == -1).all()


@pytest.mark.parametrize("mode", [FP8_NATIVE, FP8_BITS] if ON_GPU else [FP8_BITS])
def test_every_float8_value_is_converted_exactly(mode: Any) -> None:
    """By the hardware, and bit by bit for hardware without float8: every finite value and NaN."""
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FP8).to(DEVICE)
    case = {
        "q": torch.ones(1, 1, 1, 1, device=DEVICE).to(FP8),
        "k": values.view(1, 256, 1),
        "weights": torch.ones(1, 1, 1, device=DEVICE),
        "topk": 256,
        "block_size": 4,
        "block_topk": 64,
    }
    with mock.patch.object(gpu, "fp8_mode", return_value=int(mode)):
        check(case)
        check(case | {"q": (-case["q"].float()).to(FP8)})
        check(exact_case(1, 2, dtype=FP8))


@pytest.mark.parametrize("coarse", ["paper", "spread", "probe"])
@pytest.mark.parametrize("dtype", DTYPES if ON_GPU else (torch.float32, torch.float16), ids=str)
def test_bits_depend_on_the_row_alone(dtype: torch.dtype, coarse: str) -> None:
    """Slicing the queries, permuting the batch and chunking the rows give the same bits, gaussian inputs.

    The mask is one for all queries, so that its strides are others for one of them than for many.
    """
    shape = (3, 50, 1000, 5, 40) if ON_GPU else (3, 2, 50, 5, 20)
    case = gaussian_case(*shape, dtype, topk=9, block_size=4, block_topk=5) | {"coarse": coarse}
    case["mask"] = random_bool((shape[0], 1, shape[2]), 0.9)
    case["key_valid"] = random_bool(shape[::2][:2], 0.8)
    case["k_scale"] = torch.rand(shape[0], shape[2], device=DEVICE) + 0.5
    case["k_weight"] = torch.randn(shape[0], shape[2], device=DEVICE)
    case |= random_segments("runs", torch.int64, shape[:2], shape[0], shape[2])
    case["window_end"] = torch.arange(shape[1], dtype=torch.int32, device=DEVICE)[None].expand(3, -1) + shape[2] // 2
    whole = run(case)
    rows = {name: case[name] for name in ("q", "weights", "window_end", "q_segment")}
    for part in (slice(0, 1), slice(1, None)):
        got = run(case | {name: x[:, part] for name, x in rows.items()})
        assert_equal(got, (whole[0][:, part], whole[1][:, part]))
    order = [2, 0, 1]
    by_batch = {name: x for name, x in case.items() if isinstance(x, Tensor)}
    got = run(case | {name: x[order].contiguous() for name, x in by_batch.items()})
    assert_equal(got, (whole[0][order], whole[1][order]))
    got = run(case | {name: x[1:2] for name, x in by_batch.items()})
    assert_equal(got, (whole[0][1:2], whole[1][1:2]))
    with mock.patch.object(config, "WORKSPACE_BYTES", 1):
        assert_equal(run(case), whole)


@pytest.mark.parametrize(
    ("queries", "tokens", "block_topk", "refinement"),
    [
        (300_000, 10**6, 64, launch_refine.refine_by_block_kernel),
        (300_000, 2**16, 64, launch_refine.refine_by_block_kernel),
        # Lists with room.
        (4096, 2**16, 64, launch_refine.refine_by_block_kernel),
        (300_000, 2**16, 512, launch_refine.refine_by_block_kernel),
        # Rows so long that a chunk is too few of them.
        (300_000, 10**6, 7813, launch_refine.refine_by_row_kernel),
    ],
)
def test_workspace_does_not_grow_with_the_queries(queries: int, tokens: int, block_topk: int, refinement: Any) -> None:
    """What one call allocates besides its outputs, counted at the allocations themselves."""
    allocated: list[int] = []
    empty = torch.empty

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        x = empty(*args, **kwargs)
        allocated.append(x.numel() * x.element_size())
        return x

    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float16, device=DEVICE)
    q, k = zero.expand(1, queries, 64, 128), zero[0].expand(1, tokens, 128)
    with mock.patch.object(torch, "empty", counting), mock.patch.object(gpu, "launch") as launched:
        launch.indexer_topk_triton(q, k, q[..., 0], 20, Budget(128, block_topk), Visibility(), None, None, True, False)
    kernels = {call.args[0] for call in launched.call_args_list}
    blocks = -(-tokens // 128)
    pruned = blocks > block_topk
    assert refinement in kernels
    assert (launch.list_candidates_kernel in kernels) != pruned
    assert allocated[:2] == [queries * 20 * 4] * 2
    if pruned:
        allocated.remove(blocks * 128 * 2)
    assert (pruned and launch.sort_pairs_kernel not in kernels) == (queries == 4096)
    # The lists of pairs, as far as rows do not account for them.
    assert sum(allocated[2:]) <= config.WORKSPACE_BYTES + 12 * blocks + 8
