"""The Triton kernels against the reference.

With a GPU they run on it.  Without one they run under Triton's interpreter, in a process started with
TRITON_INTERPRET=1 (tests/test_triton_interpreter.py starts it); otherwise the tests here are skipped.

Inputs of the exact tests are small integers, so every sum is exact in float32 in whatever order: indices and scores
must equal the reference's bit for bit, ties (ReLU makes thousands) and fill included.  Every call runs with
``torch.empty`` filled with garbage.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from hisa_compile.ops import Budget, Visibility, reference
from hisa_compile.ops.triton import config, launch
from hisa_compile.ops.triton.operands import FP8_BITS, FP8_NATIVE
from hisa_compile.ops.triton.refine_hopper import refine_by_block_hopper_kernel

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if ON_GPU else "cpu"

pytestmark = pytest.mark.skipif(
    not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU, or a process started with TRITON_INTERPRET=1",
)


def gpu(test: Any) -> Any:
    """Marks a test that means nothing under the interpreter."""
    return pytest.mark.gpu(pytest.mark.skipif(not ON_GPU, reason="needs a GPU")(test))


FP8 = torch.float8_e4m3fn
DTYPES = (torch.float32, torch.float16, torch.bfloat16, FP8)
Case = dict[str, Any]


@contextmanager
def garbage_in_new_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN, or of large and negative numbers: nothing may be read before it is written."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() else x.random_(torch.iinfo(x.dtype).min, None)

    with mock.patch.object(torch, "empty", poisoned):
        yield


def run(case: Case, **changes: Any) -> tuple[Tensor, Tensor]:
    """The kernels on a case, whose entries are named like the arguments of the reference."""
    case = {"k_scale": None, "k_weight": None, "sorted": True, "mark_hidden": False} | case | changes
    visibility = Visibility(*(case.get(name) for name in Visibility._fields))
    budget = Budget(case["block_size"], case["block_topk"])
    with garbage_in_new_memory():
        return launch.indexer_topk_triton(
            case["q"],
            case["k"],
            case["weights"],
            case["topk"],
            budget,
            visibility,
            case["k_scale"],
            case["k_weight"],
            case["sorted"],
            case["mark_hidden"],
            case.get("k_pooled"),
        )


def canonical(indices: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """A result in any order, reordered by position."""
    indices, order = indices.sort(dim=-1, stable=True)
    return indices, scores.gather(-1, order)


def assert_equal(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Same indices, same scores, NaN equal to NaN."""
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0, equal_nan=True)


def check(case: Case) -> None:
    """The kernels' result is the reference's, bit for bit."""
    got, expected = run(case), reference.indexer_topk(**case)
    for x in got:
        assert x.is_contiguous()
    assert got[0].dtype == torch.int32
    assert got[1].dtype == torch.float32
    if not case.get("sorted", True):
        got, expected = canonical(*got), canonical(*expected)
    assert_equal(got, expected)


def integers(generator: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=generator).float()


def exact_case(
    batch: int = 2,
    queries: int = 3,
    tokens: int = 37,
    heads: int = 3,
    dim: int = 5,
    topk: int = 7,
    block_size: int = 4,
    block_topk: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    weighted: bool = False,
) -> Case:
    """q, k and weights for which every sum, in any order, is exact, also with a k_weight if ``weighted``.

    A mean is rounded to the keys' dtype (float8: bfloat16) and then is exact too, but for float32, and for bfloat16
    under the interpreter, which truncates instead of rounding, and for many heads or weighted keys, whose sum would
    need more than 24 bits: there keys are multiples of all possible counts.
    """
    g = torch.Generator().manual_seed(seed)
    rounds = heads < 8 and not weighted and (dtype == torch.float16 or (ON_GPU and dtype != torch.float32))
    multiple = 1 if rounds else math.lcm(*range(1, block_size + 1))
    return {
        "q": integers(g, -2, 2, batch, queries, heads, dim).to(dtype).to(DEVICE),
        "k": (integers(g, -2, 2, batch, tokens, dim) * multiple).to(dtype).to(DEVICE),
        "weights": integers(g, -2, 3, batch, queries, heads).to(DEVICE),
        "topk": topk,
        "block_size": block_size,
        "block_topk": block_topk,
    }


def gaussian_case(
    batch: int, queries: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, seed: int = 0, **budget: int
) -> Case:
    g = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=DEVICE)

    q, k = normal(batch, queries, heads, dim).to(dtype), normal(batch, tokens, dim).to(dtype)
    return {"q": q, "k": k, "weights": normal(batch, queries, heads), **budget}


def random_bool(shape: tuple[int, ...], density: float, seed: int = 0) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density).to(DEVICE)


def random_segments(
    kind: str, dtype: torch.dtype, q_shape: tuple[int, ...], batch: int, tokens: int, seed: int = 0
) -> dict[str, Tensor]:
    """q_segment and k_segment.

    packed: ascending runs; runs: of few ids in any order; mixed: an id for each token, so blocks hold many.  But for
    packed ids are both ends of the dtype's range and, in int64, ids that agree in their low 32 bits.
    """
    g = torch.Generator().manual_seed(seed)
    if kind == "packed":
        k_segment = (torch.rand(batch, tokens, generator=g) < 0.15).long().cumsum(1)
        q_segment = torch.randint(0, int(k_segment.max()) + 1, q_shape, generator=g)
    else:
        limits = torch.iinfo(dtype)
        ids = torch.tensor([limits.min, limits.max, 5, -5] + [5 + 2**32, 5 - 2**32] * (dtype == torch.int64))
        k_segment = ids[torch.randint(0, len(ids), (batch, tokens), generator=g)]
        k_segment = k_segment[:, torch.arange(tokens) // (5 if kind == "runs" else 1)]
        q_segment = ids[torch.randint(0, len(ids), q_shape, generator=g)]
    return {"q_segment": q_segment.to(dtype).to(DEVICE), "k_segment": k_segment.to(dtype).to(DEVICE)}


def strided(x: Tensor) -> Tensor:
    """The same values with no dimension of stride 1, and a storage offset."""
    wide = torch.zeros(tuple(2 * s + 1 for s in x.shape), dtype=torch.uint8, device=x.device)
    wide = wide.to(torch.float32).to(x.dtype) if x.is_floating_point() else wide.to(x.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


@contextmanager
def small_tiles(workspace: int = 1) -> Iterator[None]:
    """Tiles and workspace so small that every loop over tiles, groups of tiles and chunks of rows runs often."""
    tiles = config.score_tiles

    def small(heads: int, dim: int, dtype: torch.dtype, block_size: int) -> config.Tiles:
        # A product of float8 adds at least 32 at a time.
        return tiles(heads, dim, dtype, block_size)._replace(tile=16, tile_dim=32 if ON_GPU and dtype == FP8 else 16)

    values = {
        "score_tiles": small,
        "SORT_TILE": 8,
        "SELECT_TILE": 16,
        "SCAN_TILE": 16,
        "PAIR_TILE": 4,
        "MOST_ROWS": 2,
        "FEW_ROWS": 1,
        "FEW_PAIRS": 0,
        "MANY_PROGRAMS": 1,
        "MANY_COARSE_PROGRAMS": 1,
        "EMIT_TILE": 4,
        "LIST_TILE": 2,
        "LIST_PARTS": 2,
        "WORKSPACE_BYTES": workspace,
    }
    with mock.patch.multiple(config, **values):
        yield


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """All the operator's arguments.  Heads, dims and block sizes are few because each is compiled anew on a GPU."""
    batch, queries = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    tokens = draw(st.integers(1, 60))
    block_size, block_topk = draw(st.sampled_from([1, 3, 4, 6, 16])), draw(st.integers(2, 6))
    dtype = draw(st.sampled_from(DTYPES))
    weighted = draw(st.booleans())
    case = exact_case(
        batch,
        queries,
        tokens,
        heads=draw(st.sampled_from([1, 3, 17])),
        dim=draw(st.sampled_from([1, 5, 18])),
        topk=draw(st.integers(0, min(block_size * block_topk, tokens + 2))),
        block_size=block_size,
        block_topk=block_topk,
        dtype=dtype,
        seed=draw(st.integers(0, 10**6)),
        weighted=weighted,
    )
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    for name in ("window_start", "window_end"):
        shape = draw(st.sampled_from([None, (batch, queries), (batch, 1), (queries,), ()]))
        if shape is not None:
            low, high = (-3, tokens + 1) if name == "window_start" else (-1, tokens + 9)
            case[name] = torch.randint(low, high + 1, shape, generator=g).int().to(DEVICE)
    if draw(st.booleans()):
        case["key_valid"] = random_bool((batch, tokens), draw(st.sampled_from([0.1, 0.7])), seed=1)
    shape = draw(st.sampled_from([None, (batch, queries, tokens), (1, 1, tokens), (queries, 1), (batch, 1, tokens)]))
    if shape is not None:
        case["mask"] = random_bool(shape, draw(st.sampled_from([0.1, 0.7])), seed=2)
    if draw(st.booleans()):
        scales = torch.tensor([0.5, 1.0, 2.0, -1.0])
        case["k_scale"] = scales[torch.randint(0, 4, (batch, tokens), generator=g)].to(DEVICE)
    if weighted:
        factors = torch.tensor([-2.0, -0.5, 0.0, 1.0, 2.0])
        case["k_weight"] = factors[torch.randint(0, 5, (batch, tokens), generator=g)].to(DEVICE)
    kind = draw(st.sampled_from([None, "packed", "runs", "mixed"]))
    if kind is not None:
        shape = draw(st.sampled_from([(batch, queries), (batch, 1), (queries,), ()]))
        ids = draw(st.sampled_from([torch.int32, torch.int64]))
        case |= random_segments(kind, ids, shape, batch, tokens, seed=draw(st.integers(0, 10**6)))
    case["sorted"], case["mark_hidden"] = draw(st.booleans()), draw(st.booleans())
    if draw(st.booleans()):
        case |= {name: strided(x) for name, x in case.items() if isinstance(x, Tensor) and x.dim() > 1}
    return case


@settings(max_examples=20 if ON_GPU else 40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(), tiles=st.booleans())
def test_equals_the_reference_bit_for_bit(case: Case, tiles: bool) -> None:
    """Any shapes, budget, visibility, dtype, layout and order, with the real tiles and with tiny ones."""
    if tiles:
        with small_tiles():
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


def test_chunks_of_several_rows_cross_the_batch() -> None:
    """A chunk's rows may belong to two batch entries, and the last chunk is shorter."""
    case = exact_case(3, 3, 30, topk=5, block_topk=3)
    case["window_end"] = torch.arange(4, 31, 3, dtype=torch.int32, device=DEVICE).view(3, 3)
    with small_tiles(workspace=500):
        check(case)


def test_block_of_any_size() -> None:
    """One block for everything, blocks larger than a pool tile, a last block that is nearly empty."""
    for block_size, tokens in ((100, 230), (33, 133), (64, 65)):
        check(exact_case(1, 2, tokens, topk=9, block_size=block_size, block_topk=2, dtype=torch.float16))


@pytest.mark.parametrize("empty", ["batch", "queries", "tokens", "topk"])
def test_empty_sizes_give_empty_results_without_a_launch(empty: str) -> None:
    """B, S, T or topk of 0."""
    case = exact_case(**{empty: 0})
    with mock.patch.object(launch, "launch", side_effect=AssertionError):
        indices, scores = run(case)
    expected = (case["q"].shape[0], case["q"].shape[1], min(case["topk"], case["k"].shape[1]))
    assert indices.shape == scores.shape == expected
    assert indices.numel() == 0


def test_hidden_nan_and_inf_change_nothing() -> None:
    """Keys hidden by windows or key_valid, whatever they hold, in the block of visible ones and elsewhere."""
    case = exact_case(1, 2, 60, heads=3, dim=5, topk=12, block_size=4, block_topk=4)
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
    original = launch.launch

    def until_coarse(kernel: Any, programs: int, options: config.Launch, **arguments: Any) -> None:
        if kernel in (launch.pool_kernel, launch.coarse_kernel):
            original(kernel, programs, options, **arguments)
            captured.update(arguments)

    with mock.patch.object(launch, "launch", until_coarse):
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
        check(case | changes)


@pytest.mark.parametrize("dtype", DTYPES if ON_GPU else (torch.float32, torch.float16, FP8), ids=str)
@pytest.mark.parametrize("tables", [False, True], ids=["windows", "tables"])
def test_given_means_take_the_place_of_pooling(dtype: torch.dtype, tables: bool) -> None:
    """The kernel's own means, given back; means that send the coarse stage elsewhere; means that are not to be read."""
    case = exact_case(2, 5, 60, heads=3, dim=18, topk=9, block_size=4, block_topk=3, dtype=dtype)
    case["window_end"] = torch.randint(20, 61, (2, 5), generator=torch.Generator().manual_seed(0)).int().to(DEVICE)
    if tables:
        case["key_valid"] = random_bool((2, 60), 0.7)
        halves = (torch.arange(60, device=DEVICE) >= 31).long()
        case |= {"q_segment": halves[None, 29:34], "k_segment": halves[None].expand(2, -1)}
    means = launch.pool_keys_triton(case["k"], 4, case.get("key_valid"), None, None)
    assert_equal((means, means), (expected := reference.block_means(case["k"], 4, case.get("key_valid")), expected))
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
    with mock.patch.object(launch, "fp8_mode", return_value=int(mode)):
        check(case)
        check(case | {"q": (-case["q"].float()).to(FP8)})
        check(exact_case(1, 2, dtype=FP8))


@pytest.mark.parametrize("dtype", DTYPES if ON_GPU else (torch.float32, torch.float16), ids=str)
def test_bits_depend_on_the_row_alone(dtype: torch.dtype) -> None:
    """Slicing the queries, permuting the batch and chunking the rows give the same bits, gaussian inputs."""
    shape = (3, 50, 1000, 5, 40) if ON_GPU else (3, 2, 50, 5, 20)
    case = gaussian_case(*shape, dtype, topk=9, block_size=4, block_topk=5)
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


def test_workspace_does_not_grow_with_the_queries() -> None:
    """What one call allocates besides its outputs, counted at the allocations themselves."""
    allocated: list[int] = []
    empty = torch.empty

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        x = empty(*args, **kwargs)
        allocated.append(x.numel() * x.element_size())
        return x

    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float16, device=DEVICE)
    q, k = zero.expand(1, 300_000, 64, 128), zero[0].expand(1, 10**6, 128)
    with mock.patch.object(torch, "empty", counting), mock.patch.object(launch, "launch") as launched:
        launch.indexer_topk_triton(q, k, q[..., 0], 20, Budget(128, 64), Visibility(), None, None, True, False)
    assert any(call.args[0] is launch.refine_by_block_kernel for call in launched.call_args_list)
    blocks = -(-(10**6) // 128)
    assert allocated[:2] == [300_000 * 20 * 4] * 2
    allocated.remove(blocks * 128 * 2)
    # The lists of pairs: where each begins, and at most one item of work that is not full.
    assert sum(allocated[2:]) <= config.WORKSPACE_BYTES + 12 * blocks + 8


# ---- on a GPU only ----------------------------------------------------------------------------------------------


def real_case(dtype: torch.dtype, queries: int = 1024, tokens: int = 65536) -> Case:
    """The paper's sizes; keys with a common direction per stretch of text, so that block means say something."""
    case = gaussian_case(1, queries, tokens, 64, 128, torch.float32, topk=2048, block_size=128, block_topk=64)
    topic = torch.randn(tokens // 512, 128, generator=torch.Generator(DEVICE).manual_seed(7), device=DEVICE)
    k = case["k"] + topic.repeat_interleave(512, dim=0)
    if dtype == FP8:
        scale = k.abs().amax(-1) / 448.0
        case["k_scale"], k = scale, k / scale[..., None]
    case["q"], case["k"] = case["q"].to(dtype), k.to(dtype)
    case["window_end"] = (torch.arange(queries, device=DEVICE) + tokens - queries + 1).int()
    return case


def exact_scores(case: Case, row: int, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """(score, magnitude) of the vectors for one row in float64; the magnitude is the sum of absolute products."""
    q, w = case["q"][0, row].double(), case["weights"][0, row].double()
    return (vectors @ q.T).relu() @ w, (vectors.abs() @ q.abs().T) @ w.abs()


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FP8], ids=str)
def test_selection_at_the_papers_sizes(dtype: torch.dtype) -> None:
    """Sampled rows against float64: scores, kept blocks, and nothing better left out.

    The tolerance is that of float32 accumulation: a matrix unit adds 16 products at a time and truncates, D / 16
    additions and then H of them, each off by at most 2^-23 of the sum of magnitudes.  Hopper adds float8 products 32 at
    a time and keeps 13 bits behind the point of the largest.
    """
    case = real_case(dtype)
    captured: dict[str, Tensor] = {}
    original = launch.launch

    def capture(kernel: Any, programs: int, options: config.Launch, **arguments: Any) -> None:
        captured.update({name: arguments[name] for name in ("means_ptr",) if arguments.get(name) is not None})
        original(kernel, programs, options, **arguments)

    with mock.patch.object(launch, "launch", capture):
        indices, scores = run(case)
    unit = (128 / 16 + 64) * 2.0**-23 + (128 / 32 * 2.0**-13 if dtype == FP8 else 0.0)
    coarse_unit = (128 / 16 + 64) * 2.0**-23
    keys = case["k"][0].double()
    if "k_scale" in case:
        keys = keys * case["k_scale"][0].double()[:, None]
    means = captured["means_ptr"][0].double()
    exact_means = keys.view(-1, 128, 128).mean(1)
    magnitude = keys.abs().view(-1, 128, 128).mean(1)
    rounding = torch.finfo(captured["means_ptr"].dtype).eps / 2
    assert ((means - exact_means).abs() <= 1.001 * rounding * exact_means.abs() + 2.0**-17 * magnitude).all()

    for row in range(0, case["q"].shape[1], 67):
        visible = int(case["window_end"][row])
        chosen, got = indices[0, row].long(), scores[0, row].double()
        assert chosen.unique().numel() == 2048
        assert int(chosen.min()) >= 0
        assert int(chosen.max()) < visible
        assert (got[1:] <= got[:-1]).all()
        ties = got[1:] == got[:-1]
        assert (chosen[1:][ties] > chosen[:-1][ties]).all()

        expected, size = exact_scores(case, row, keys[:visible])
        error = unit * size
        assert ((got - expected[chosen]).abs() <= error[chosen]).all()

        blocks = -(-visible // 128)
        coarse, size = exact_scores(case, row, means[:blocks])
        slack = 2 * coarse_unit * size.max()
        forced = torch.zeros(blocks, dtype=torch.bool, device=DEVICE)
        forced[[0, -1]] = True
        cut = coarse[~forced].topk(62).values[-1]
        may_be_kept = forced | (coarse >= cut - slack)
        surely_kept = forced | (coarse > cut + slack)
        assert may_be_kept[chosen // 128].all()
        assert int(surely_kept.sum()) >= 60, "the tolerance swallows the block selection"
        omitted = surely_kept.repeat_interleave(128)[:visible]
        omitted[chosen] = False
        assert got[-1] >= (expected - error)[omitted].max() - error[chosen[-1]]


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
def test_peak_memory_at_a_real_size(dtype: torch.dtype) -> None:
    """Below 64 MiB besides inputs and outputs; one chunk of rows and many."""
    for queries in (1024, 8192):
        case = real_case(dtype, queries)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        visibility = Visibility(window_end=case["window_end"])
        outputs = launch.indexer_topk_triton(
            case["q"],
            case["k"],
            case["weights"],
            2048,
            Budget(128, 64),
            visibility,
            case.get("k_scale"),
            None,
            True,
            False,
        )
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - sum(x.numel() * 4 for x in outputs)
        assert extra < 64 * 2**20


@gpu
@pytest.mark.parametrize("weighted", [False, True])
def test_packed_sequences_at_the_papers_sizes(weighted: bool) -> None:
    """65536 tokens of 7 sequences, a sequence's last queries: what they get with windows instead of segments."""
    case = real_case(torch.bfloat16)
    starts = torch.tensor([0, 100, 9000, 9001, 30000, 30128, 60000, 65536], device=DEVICE)
    ids = torch.tensor([3, 1, 7 + 2**32, 7, -2, 0, 5], device=DEVICE).repeat_interleave(starts.diff())
    own = torch.randint(0, 65536, (1024,), generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
    case["window_end"] = (own + 1).int()
    if weighted:
        case["k_weight"] = torch.randn(1, 65536, generator=torch.Generator(DEVICE).manual_seed(2), device=DEVICE)
    packed = run(case, q_segment=ids[own], k_segment=ids[None])
    first = starts[torch.searchsorted(starts, own, right=True) - 1]
    expected = run(case, window_start=first.int())
    seen = ~expected[1].isneginf()
    assert torch.equal(packed[0][seen], expected[0][seen])
    assert_equal((packed[0], packed[1]), (packed[0], expected[1]))


@gpu
def test_repeats_are_bitwise_equal() -> None:
    """20 runs of the same call."""
    case = real_case(torch.bfloat16, queries=256)
    first = run(case)
    for _ in range(20):
        assert_equal(run(case), first)


@gpu
@pytest.mark.skipif(ON_GPU and torch.cuda.get_device_capability()[0] != 9, reason="needs sm_90")
@pytest.mark.parametrize("pruned", [True, False], ids=["pruned", "flat"])
@pytest.mark.parametrize("everything", [True, False], ids=["everything", "windows"])
@pytest.mark.parametrize(("heads", "dim", "block_size"), [(64, 128, 128), (24, 80, 64), (16, 32, 256), (128, 64, 128)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FP8], ids=str)
def test_hoppers_kernel_gives_the_same_bits(
    dtype: torch.dtype, heads: int, dim: int, block_size: int, everything: bool, pruned: bool
) -> None:
    """The refinement for sm_90 against the one for every GPU, negative scales, NaN and ragged ends included."""
    batch, queries, tokens = 2, 40, 2500
    case = gaussian_case(
        batch, queries, tokens, heads, dim, dtype, topk=300, block_size=block_size, block_topk=8 if pruned else 50
    )
    case["k"].view(torch.uint8 if dtype == FP8 else dtype)[1, 1234, 3] = 127 if dtype == FP8 else math.nan
    case["window_end"] = torch.randint(0, tokens + 50, (batch, queries), device=DEVICE).int()
    case["k_scale"] = torch.randn(batch, tokens, device=DEVICE)
    if everything:
        case["window_start"] = torch.randint(-5, 900, (batch, queries), device=DEVICE).int()
        case["key_valid"] = random_bool((batch, tokens), 0.9)
        case["mask"] = random_bool((batch, queries, tokens), 0.9, seed=1)
        case["k_weight"] = torch.randn(batch, tokens, device=DEVICE)
        case |= random_segments("runs", torch.int64, (batch, queries), batch, tokens, seed=2)
    used: list[Any] = []
    original = launch.launch

    def note(kernel: Any, programs: int, options: config.Launch, **arguments: Any) -> None:
        used.append(kernel)
        original(kernel, programs, options, **arguments)

    with mock.patch.object(config, "FEW_PAIRS", 0), mock.patch.object(launch, "launch", note):
        got = run(case)
        assert refine_by_block_hopper_kernel in used
        with mock.patch.object(launch, "is_hopper", return_value=False):
            used.clear()
            expected = run(case)
            assert launch.refine_by_block_kernel in used
    assert_equal(got, expected)
    with mock.patch.object(config, "FEW_ROWS", 10**6):
        assert_equal(run(case), expected)


@gpu
def test_captured_in_a_cuda_graph_and_replayed_on_other_inputs() -> None:
    """No launch depends on the values of the inputs, and nothing waits for the device."""
    case, other = (real_case(torch.bfloat16, queries=64, tokens=16384) for _ in range(2))
    other["q"] = other["q"].flip(1).contiguous()
    other["window_end"] = other["window_end"] // 3
    visibility = Visibility(window_end=case["window_end"])

    def call() -> tuple[Tensor, Tensor]:
        return launch.indexer_topk_triton(
            case["q"], case["k"], case["weights"], 2048, Budget(128, 64), visibility, None, None, True, False
        )

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for inputs in (case, other):
        expected = run(inputs)
        case["q"].copy_(inputs["q"])
        case["window_end"].copy_(inputs["window_end"])
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(captured, expected)


@gpu
def test_offsets_past_two_to_the_31() -> None:
    """More than 2^31 key elements: the far end of k gives what the same keys at the beginning give."""
    tokens, tail = 2**24 + 4096, 65536
    generator = torch.Generator(DEVICE).manual_seed(0)
    near = torch.randn(1, tail, 128, generator=generator, device=DEVICE).to(FP8)
    far = torch.zeros(1, tokens, 128, dtype=torch.uint8, device=DEVICE).view(FP8)
    far[:, -tail:] = near
    case = gaussian_case(1, 4, 1, 64, 128, FP8, topk=2048, block_size=128, block_topk=64)
    expected = run(case | {"k": near})
    start = torch.tensor(tokens - tail, dtype=torch.int32, device=DEVICE)
    indices, scores = run(case | {"k": far, "window_start": start})
    assert_equal((indices - (tokens - tail), scores), expected)


@gpu
def test_mask_of_more_than_two_to_the_31_elements() -> None:
    """The last queries of a huge mask see what their own slice of it says."""
    queries, tokens = 40_000, 65536
    case = gaussian_case(1, queries, tokens, 2, 16, torch.float16, topk=64, block_size=64, block_topk=8)
    case["mask"] = torch.ones(1, 1, tokens, dtype=torch.bool, device=DEVICE).repeat(1, queries, 1)
    case["mask"][:, -2:, 1000:60000] = False
    whole = run(case)
    tail = case | {name: case[name][:, -2:].clone() for name in ("q", "weights", "mask")}
    assert_equal((whole[0][:, -2:], whole[1][:, -2:]), run(tail))


@gpu
def test_sizes_that_change_do_not_recompile() -> None:
    """S, T and the number of blocks are not specialised: a serving loop compiles once."""
    shapes = ((1, 100, 3000), (2, 77, 3001), (1, 1, 4096), (3, 16, 2500))
    run(gaussian_case(*shapes[1], 16, 64, torch.bfloat16, topk=64, block_size=16, block_topk=16))
    kernels = (launch.coarse_kernel, launch.refine_by_block_kernel, launch.refine_by_row_kernel, launch.fill_kernel)
    # Strides are specialised on being 1 and on divisibility by 16, which these shapes leave alone.
    before = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]
    for shape in shapes:
        run(gaussian_case(*shape, 16, 64, torch.bfloat16, topk=64, block_size=16, block_topk=16))
    after = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]
    assert after == before
