"""The coarse stage "two-level" by the Triton kernels against the reference, on a GPU and without one.

Every call runs with ``torch.empty`` filled with garbage: flags of outer blocks, lists and scores of blocks are only
partly written.
"""

from __future__ import annotations

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

from triton_cases import (
    DEVICE,
    DTYPES,
    FP8,
    ON_GPU,
    RUNS,
    Case,
    assert_equal,
    call,
    cases,
    check,
    gaussian_case,
    integers,
    random_bool,
    random_segments,
    run,
    small_tiles,
    strided,
    whole_case,
)

from hisa_compile.ops import Budget, coarse, reference
from hisa_compile.ops.triton import config, gpu

pytestmark = pytest.mark.skipif(not RUNS, reason="needs a GPU, or a process started with TRITON_INTERPRET=1")

# Rows of the smallest groups: as few as a product may have.
LEAST_ROWS = 64 if ON_GPU else 16


@contextmanager
def small_outer_blocks(tokens: int, ratio: int = 2) -> Iterator[None]:
    """Outer blocks of so many tokens, and ``ratio`` times the candidates in kept ones."""
    with mock.patch.multiple(coarse, OUTER_TOKENS=tokens, LEVEL_RATIO=ratio):
        yield


def outer_of(case: Case) -> Budget:
    budget = Budget(case["block_size"], case["block_topk"])
    outer = coarse.outer_of("two-level", case["k"].shape[1], budget)
    assert outer is not None
    return outer


def with_means(case: Case, seed: int = 0) -> Case:
    """Small integers for means of outer blocks: sums over them are exact, whatever the sizes."""
    batch, tokens, dim = case["k"].shape
    size = coarse.outer_size(case["block_size"])
    means = integers(torch.Generator().manual_seed(seed), -3, 3, batch, -(-tokens // size), dim)
    return case | {"coarse": "two-level", "k_pooled": means.to(reference.pooled_dtype(case["k"].dtype)).to(DEVICE)}


@settings(max_examples=20 if ON_GPU else 40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(), tiles=st.booleans(), tokens=st.sampled_from([1, 8, 16]), seed=st.integers(0, 10**6))
def test_equals_the_reference_bit_for_bit(case: Case, tiles: bool, tokens: int, seed: int) -> None:
    """Any shapes, budget, visibility, dtype, layout and order, with the real tiles and with tiny ones."""
    with small_outer_blocks(tokens):
        case = with_means(case, seed)
        if tiles:
            with small_tiles():
                check(case)
        else:
            check(case)


def differs_from_the_probe(case: Case) -> bool:
    by_stage = [reference.indexer_topk(**case | {"coarse": stage})[0] for stage in ("two-level", "probe")]
    return not torch.equal(*by_stage)


def seen_by(kind: str, queries: int, tokens: int) -> Case:
    """What three or more queries of one batch entry see."""
    row = torch.arange(queries, dtype=torch.int32, device=DEVICE)[None]
    if kind == "windows":
        # The last two see little, and nothing.
        return {
            "window_start": 9 * row,
            "window_end": torch.where(row < queries - 2, tokens - 70 * row, 300 - 150 * row),
        }
    if kind == "mask":
        return {"mask": random_bool((1, queries, tokens), 0.2)}
    if kind == "segments":
        return random_segments("runs", torch.int64, (1, queries), 1, tokens)
    return {}


@pytest.mark.parametrize(
    ("dtype", "kind", "block_size", "tiles"),
    [
        (torch.float32, "windows", 32, "real"),
        (torch.float16, "mask", 32, "real"),
        (torch.bfloat16, "", 64, "real"),
        (FP8, "segments", 32, "real"),
        (torch.float16, "windows", 128, "real"),
        (torch.float16, "windows", 64, "tiny"),
    ],
)
def test_means_of_outer_blocks_are_its_own(dtype: torch.dtype, kind: str, block_size: int, tiles: str) -> None:
    """Outer blocks of 128 keys; blocks of a whole tile, of several, and several in a tile."""
    block_topk, tokens = {32: (4, 7 * 128), 64: (3, 9 * 128), 128: (3, 15 * 128)}[block_size]
    budget = {"topk": 20, "block_size": block_size, "block_topk": block_topk}
    made = (whole_case(3, tokens, 3, 5, dtype, seed=seed, **budget) | seen_by(kind, 3, tokens) for seed in range(99))
    # Of those in which the levels say something.
    case = next(case | {"coarse": "two-level"} for case in made if differs_from_the_probe(case))
    assert outer_of(case).block_size == 128
    if tiles == "tiny":
        with small_tiles(workspace=10**5):
            check(case)
    else:
        check(case)


@pytest.mark.parametrize(("block_size", "tokens"), [(13, 600), (40, 900), (140, 1300)])
def test_blocks_of_any_size(block_size: int, tokens: int) -> None:
    """Outer blocks that are no whole number of tiles, and blocks that are none; the last ones are ragged."""
    budget = {"topk": 30, "block_size": block_size, "block_topk": 6 if block_size == 13 else 2}
    case = with_means(gaussian_case(1, 3, tokens, 3, 5, torch.float16, **budget))
    case |= {name: case[name].sign().to(case[name].dtype) for name in ("q", "k", "weights")}
    outer_of(case)
    check(case)
    check(case | {"key_valid": random_bool((1, tokens), 0.3)})


def launches_of(case: Case) -> dict[str, list[dict[str, Any]]]:
    """Arguments of the launches, tensors as they are after each."""
    found: dict[str, list[dict[str, Any]]] = {}
    original = gpu.launch

    def note(kernel: Any, programs: int, options: config.Launch, **arguments: Any) -> None:
        original(kernel, programs, options, **arguments)
        after = {name: x.clone() if isinstance(x, Tensor) else x for name, x in arguments.items()}
        found.setdefault(kernel.__name__, []).append(after)

    with mock.patch.object(gpu, "launch", note):
        run(case)
    return found


def test_a_group_goes_past_the_outer_blocks_that_it_keeps_alone() -> None:
    """Listed once each; blocks elsewhere are hidden, and so are a row's in outer blocks that only others keep."""
    budget = {"topk": 20, "block_size": 32, "block_topk": 4}
    case = with_means(whole_case(20, 128 * 30, 2, 5, torch.float16, batch=1, **budget), seed=3)
    # Some rows see the first half, the others all.
    ends = torch.where(torch.arange(20, device=DEVICE) < 7, 15, 30).int() * 128
    case["window_end"] = ends[None].expand(1, 20)
    seen = reference.visible_tokens(case["q"], case["k"], window_end=case["window_end"])
    outer_scores = reference.indexer_scores(case["q"], case["k_pooled"], case["weights"])
    kept = reference.kept_blocks(outer_scores, seen.unflatten(-1, (30, 128)).any(-1), outer_of(case).block_topk)
    with mock.patch.object(config, "probe_tiles", small_rows(config.probe_tiles)):
        found = launches_of(case)
    (listing,), (probing,) = found["list_outer_kernel"], found["probe_blocks_kernel"]
    groups = torch.nn.functional.pad(kept, (0, 0, 0, -20 % LEAST_ROWS)).unflatten(1, (-1, LEAST_ROWS))
    wanted = groups.any(2).flatten(0, 1)
    assert wanted.sum() < wanted.numel()
    assert listing["listed_count_ptr"].tolist() == wanted.sum(-1).tolist()
    for numbers, some in zip(listing["listed_ptr"], wanted, strict=True):
        assert sorted(numbers[: int(some.sum())].tolist()) == some.nonzero()[:, 0].tolist()
    shown = probing["block_scores_ptr"].view(1, 20, -1)[..., :120].unflatten(-1, (30, 4)) != -1
    inside = torch.arange(30, device=DEVICE) * 128 < case["window_end"][..., None]
    assert torch.equal((shown & inside[..., None]), kept[..., None].expand_as(shown))
    outer, inner = found["select_blocks_kernel"]
    assert (outer["kept_ptr"], outer["counts_ptr"]) == (None, None)
    assert inner["kept_ptr"] is not None


def small_rows(probe_tiles: Any) -> Any:
    return lambda *of: probe_tiles(*of)._replace(rows=LEAST_ROWS)


def test_keys_of_other_outer_blocks_are_not_read() -> None:
    """NaN in all of them but the sample's, under given means."""
    budget = {"topk": 64, "block_size": 32, "block_topk": 4}
    case = with_means(whole_case(3, 128 * 10, 3, 5, torch.float16, **budget))
    # All rows keep the same.
    case |= {"q": case["q"][:, :1].expand(1, 3, 3, 5), "weights": case["weights"][:, :1].expand(1, 3, 3)}
    clean = run(case)
    outer_scores = reference.indexer_scores(case["q"][:, :1], case["k_pooled"], case["weights"][:, :1])
    kept = reference.kept_blocks(outer_scores, torch.ones_like(outer_scores).bool(), 4)[0, 0]
    at = reference.sample_positions(coarse.sample_of(1280, 64), 1280, case["k"].device)
    other = ~kept.repeat_interleave(128).index_fill(0, at, True)
    assert other.sum() > 500
    dirty = torch.where(other[:, None], torch.nan, case["k"].float()).to(torch.float16)
    assert_equal(run(case, k=dirty), clean)


def test_rows_of_few_kept_blocks_are_filled_up_from_others() -> None:
    """Kept blocks hold fewer visible tokens than are selected; there are more in other outer blocks."""
    case = with_means(whole_case(2, 10 * 128, 3, 5, torch.float16, topk=40, block_size=32, block_topk=4))
    case["mask"] = (torch.arange(1280, device=DEVICE) % 128 < 5)[None, None]
    assert (reference.indexer_topk(**case, mark_hidden=True)[0] >= 0).all()
    check(case)


@pytest.mark.parametrize("dtype", DTYPES if ON_GPU else (torch.float16,), ids=str)
def test_bits_depend_on_the_row_alone(dtype: torch.dtype) -> None:
    """Slicing the queries, permuting the batch, chunks of few rows and of one; gaussian values, given means or not."""
    shape = (3, 50, 1000, 5, 40) if ON_GPU else (3, 4, 120, 3, 20)
    case = gaussian_case(*shape, dtype, topk=9, block_size=4, block_topk=5)
    case["window_end"] = (
        torch.arange(shape[1], dtype=torch.int32, device=DEVICE)[None].expand(3, -1) + shape[2] * 3 // 4
    )
    case |= {"k_weight": torch.randn(3, shape[2], device=DEVICE), "coarse": "two-level"}
    with small_outer_blocks(16, ratio=2):
        outer_of(case)
        whole = run(case)
        rows = {name: case[name] for name in ("q", "weights", "window_end")}
        for part in (slice(0, 1), slice(1, None)):
            got = run(case | {name: x[:, part] for name, x in rows.items()})
            assert_equal(got, (whole[0][:, part], whole[1][:, part]))
        by_batch = {name: x for name, x in case.items() if isinstance(x, Tensor)}
        got = run(case | {name: x[[2, 0, 1]].contiguous() for name, x in by_batch.items()})
        assert_equal(got, (whole[0][[2, 0, 1]], whole[1][[2, 0, 1]]))
        with mock.patch.object(config, "WORKSPACE_BYTES", 5000):
            assert_equal(run(case), whole)
        means = reference.block_means(case["k"].cpu(), 16, None, None, case["k_weight"].cpu()).to(DEVICE)
        assert not torch.equal(run(case | {"k_pooled": strided(means.flip(1))})[0], whole[0])
        assert not torch.equal(run(case | {"coarse": "probe"})[0], whole[0])


def test_chunks_of_several_rows_cross_the_batch() -> None:
    """A chunk's rows may belong to two batch entries, and the last chunk is shorter."""
    with small_outer_blocks(8), small_tiles(workspace=3000):
        case = with_means(whole_case(3, 64, 3, 5, torch.float32, batch=3, topk=5, block_size=4, block_topk=3))
        case["window_end"] = torch.arange(4, 64, 7, dtype=torch.int32, device=DEVICE).view(3, 3)
        found = launches_of(case)
        assert [each["listed_count_ptr"].shape[0] for each in found["list_outer_kernel"]][:2] == [2, 2]
        check(case)


def test_the_workspace_stays_within_its_limit() -> None:
    """Flags and lists of outer blocks are counted: many queries, and many batch entries of one."""
    allocated: list[int] = []
    empty = torch.empty

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        x = empty(*args, **kwargs)
        allocated.append(x.numel() * x.element_size())
        return x

    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float16, device=DEVICE)
    for batch, queries in ((1, 100_000), (5000, 1)):
        q, k = zero.expand(batch, queries, 64, 128), zero[0].expand(batch, 10**6, 128)
        means = zero[0].expand(batch, -(-(10**6) // 128), 128)
        case = {"q": q, "k": k, "weights": q[..., 0].float(), "topk": 20, "block_size": 128, "block_topk": 64}
        allocated.clear()
        with mock.patch.object(torch, "empty", counting), mock.patch.object(gpu, "launch"):
            call(case | {"coarse": "two-level", "k_pooled": means})
        assert allocated[:2] == [batch * queries * 20 * 4] * 2
        blocks = -(-(10**6) // 128)
        # The lists of pairs, and a group's list of outer blocks more than its rows' shares.
        assert sum(allocated[2:]) <= config.WORKSPACE_BYTES + 16 * blocks + 8
