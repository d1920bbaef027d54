"""The Triton kernels at real sizes, and what only a GPU can show: memory, repeats, graphs, offsets, compilations.

What also runs without one is in tests/test_triton_kernels.py and tests/test_triton_hostile.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton_cases import (
    DEVICE,
    FP8,
    ON_GPU,
    Case,
    assert_equal,
    call,
    canonical,
    check,
    garbage_in_new_memory,
    gaussian_case,
    launched,
    random_bool,
    random_segments,
    real_case,
    run,
    whole_case,
)

import hisa_compile
from hisa_compile.ops import Budget, Visibility
from hisa_compile.ops.coarse import outer_size
from hisa_compile.ops.triton import config, configurations, gpu, launch, launch_refine
from hisa_compile.ops.triton.coarse_hopper import coarse_hopper_kernel
from hisa_compile.ops.triton.configurations import Configuration, Shape
from hisa_compile.ops.triton.refine_hopper import refine_by_block_hopper_kernel
from hisa_compile.ops.triton.refine_row_hopper import refine_by_row_hopper_kernel
from hisa_compile.ops.triton.select_hopper import select_tokens_hopper_kernel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a GPU")]


def exact_scores(case: Case, row: int, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """(score, magnitude) of the vectors for one row in float64; the magnitude is the sum of absolute products."""
    q, w = case["q"][0, row].double(), case["weights"][0, row].double()
    return (vectors @ q.T).relu() @ w, (vectors.abs() @ q.abs().T) @ w.abs()


def score_unit(case: Case) -> float:
    """The error of a token's score at the paper's sizes, as a share of its magnitude."""
    return (128 / 16 + 64) * 2.0**-23 + (128 / 32 * 2.0**-13 if case["q"].dtype == FP8 else 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FP8], ids=str)
def test_selection_at_the_papers_sizes(dtype: torch.dtype) -> None:
    """Sampled rows against float64: scores, kept blocks, and nothing better left out.

    The tolerance is that of float32 accumulation: a matrix unit adds 16 products at a time and truncates, D / 16
    additions and then H of them, each off by at most 2^-23 of the sum of magnitudes.  Hopper adds float8 products 32 at
    a time and keeps 13 bits behind the point of the largest.
    """
    case = real_case(dtype)
    captured: dict[str, Tensor] = {}
    original = gpu.launch

    def capture(kernel: Any, programs: int, options: config.Launch, **arguments: Any) -> None:
        captured.update({name: arguments[name] for name in ("means_ptr",) if arguments.get(name) is not None})
        original(kernel, programs, options, **arguments)

    with mock.patch.object(gpu, "launch", capture):
        indices, scores = run(case)
    unit = score_unit(case)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
def test_every_block_kept_is_a_topk_of_all_tokens(dtype: torch.dtype) -> None:
    """Rows of far more tokens than a program holds, against torch.topk of scores in float64.

    The tolerance is that of :func:`test_selection_at_the_papers_sizes`; tokens nearer to the last place than that may
    be in or out.
    """
    case = real_case(dtype)
    tokens, topk = case["k"].shape[1], case["topk"]
    case["block_topk"] = tokens // case["block_size"]
    indices, scores = run(case)
    unordered = run(case, sorted=False)
    assert_equal(canonical(*unordered), canonical(indices, scores))
    unit = score_unit(case)
    keys = case["k"][0].double()
    if "k_scale" in case:
        keys = keys * case["k_scale"][0].double()[:, None]
    for row in range(0, case["q"].shape[1], 7):
        visible = int(case["window_end"][row])
        chosen, got = indices[0, row].long(), scores[0, row].double()
        assert chosen.unique().numel() == topk
        assert (got[1:] <= got[:-1]).all()
        expected, size = exact_scores(case, row, keys[:visible])
        error = unit * size
        assert ((got - expected[chosen]).abs() <= error[chosen]).all()
        cut = expected.topk(topk).values[-1]
        slack = 2 * error.max()
        assert (expected[chosen] >= cut - slack).all()
        surely = expected > cut + slack
        assert int(surely.sum()) > topk // 2, "the tolerance swallows the selection"
        surely[chosen] = False
        assert not surely.any()


@pytest.mark.parametrize("coarse", ["paper", "spread", "probe", "two-level"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
def test_peak_memory_at_a_real_size(dtype: torch.dtype, coarse: str) -> None:
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
            coarse=coarse,
        )
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - sum(x.numel() * 4 for x in outputs)
        assert extra < 64 * 2**20


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


@pytest.mark.parametrize("holes", [False, True], ids=["windows", "holes"])
@pytest.mark.parametrize(("block_size", "block_topk"), [(16, 8), (64, 5), (128, 4), (192, 3), (256, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, FP8], ids=str)
def test_the_probe_with_real_tiles(dtype: torch.dtype, block_size: int, block_topk: int, holes: bool) -> None:
    """Bit for bit, with and without the version for sm_90, which windows alone reach."""
    batch, queries, tokens = 2, 100, 2048
    budget = {"topk": 100, "block_size": 16, "block_topk": block_topk}
    case = whole_case(queries, tokens, 64, 128, dtype, batch, **budget)
    row = torch.arange(batch * queries, dtype=torch.int32, device=DEVICE).view(batch, queries)
    case |= {"window_start": 5 * row - 9, "window_end": tokens - 1 - 3 * row}
    case |= {"block_size": block_size, "coarse": "probe"}
    token = torch.arange(tokens, device=DEVICE).expand(batch, -1)
    if dtype == FP8 or holes:
        case["k_scale"] = torch.tensor([0.5, 1.0, 2.0, -1.0], device=DEVICE)[token * 7 // 3 % 4]
    if holes:
        case["key_valid"] = token % 2 == 0
        case["k_weight"] = torch.tensor([1.0, -2.0, 0.5], device=DEVICE)[token // 2 % 3]
    with launched() as kernels:
        check(case)
    hopper = "probe_blocks_hopper_kernel" in {kernel.__name__ for kernel in kernels}
    expected = gpu.is_hopper(case["q"]) and dtype != torch.float32 and not holes
    assert hopper == expected


@pytest.mark.parametrize("holes", [False, True], ids=["windows", "holes"])
@pytest.mark.parametrize(("block_size", "block_topk"), [(16, 8), (64, 5), (128, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, FP8], ids=str)
def test_spreads_with_real_tiles(dtype: torch.dtype, block_size: int, block_topk: int, holes: bool) -> None:
    """Bit for bit: means of whole blocks are exact, spreads are powers of two, and blocks differ by them."""
    batch, queries, tokens = 2, 100, 4096
    budget = {"topk": 100, "block_size": block_size, "block_topk": block_topk}
    case = whole_case(queries, tokens, 64, 128, dtype, batch, **budget)
    calm = torch.arange(tokens // block_size, device=DEVICE).repeat_interleave(block_size) % 3 == 0
    case["k"] = torch.where(calm[:, None], case["k"][:, :1].float(), case["k"].float()).to(dtype)
    row = torch.arange(batch * queries, dtype=torch.int32, device=DEVICE).view(batch, queries)
    case |= {"window_start": 5 * row - 9, "window_end": tokens - 1 - 3 * row, "coarse": "spread"}
    token = torch.arange(tokens, device=DEVICE).expand(batch, -1)
    if holes:
        case["key_valid"] = token % 2 == 0
        case["k_weight"] = torch.tensor([1.0, -2.0, 0.5], device=DEVICE)[token // 2 % 3]
    check(case)
    assert not torch.equal(run(case)[0], run(case | {"coarse": "paper"})[0])


@pytest.mark.parametrize("holes", [False, True], ids=["windows", "holes"])
@pytest.mark.parametrize(("block_size", "block_topk"), [(32, 9), (64, 5), (128, 3), (192, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, FP8], ids=str)
def test_two_levels_with_real_tiles(dtype: torch.dtype, block_size: int, block_topk: int, holes: bool) -> None:
    """Bit for bit, with and without the versions for sm_90; given means, small integers, of outer blocks."""
    batch, queries, tokens = 2, 100, 4096
    budget = {"topk": 100, "block_size": 32, "block_topk": block_topk}
    case = whole_case(queries, tokens, 64, 128, dtype, batch, **budget)
    row = torch.arange(batch * queries, dtype=torch.int32, device=DEVICE).view(batch, queries)
    case |= {"window_start": 5 * row - 9, "window_end": tokens - 1 - 3 * row}
    case |= {"block_size": block_size, "coarse": "two-level"}
    size = outer_size(block_size)
    means = torch.randint(-3, 4, (batch, -(-tokens // size), 128), generator=torch.Generator().manual_seed(1))
    case["k_pooled"] = means.to(torch.bfloat16 if dtype == FP8 else dtype).to(DEVICE)
    token = torch.arange(tokens, device=DEVICE).expand(batch, -1)
    if holes:
        case["key_valid"] = token % 2 == 0
        case["k_weight"] = torch.tensor([1.0, -2.0, 0.5], device=DEVICE)[token // 2 % 3]
    with launched() as kernels:
        check(case)
    names = {kernel.__name__ for kernel in kernels}
    assert "list_outer_kernel" in names
    expected = gpu.is_hopper(case["q"]) and dtype != torch.float32 and not holes
    assert ("probe_blocks_hopper_kernel" in names) == expected


def test_repeats_are_bitwise_equal() -> None:
    """20 runs of the same call."""
    case = real_case(torch.bfloat16, queries=256)
    first = run(case)
    for _ in range(20):
        assert_equal(run(case), first)


@contextmanager
def allocations() -> Iterator[list[tuple[int, int]]]:
    """(address, bytes) of what torch.empty and torch.zeros give meanwhile."""
    found: list[tuple[int, int]] = []

    def noted(make: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            found.append((x.data_ptr(), x.numel() * x.element_size()))
            return x

        return allocate

    with mock.patch.multiple(torch, empty=noted(torch.empty), zeros=noted(torch.zeros)):
        yield found


def poison_freed_memory(sizes: list[int], pattern: int) -> list[tuple[int, int]]:
    """Allocate blocks of so many bytes, fill them and free them: who asks for the same sizes next gets these."""
    blocks = [torch.full((size,), pattern, dtype=torch.uint8, device=DEVICE) for size in sizes]
    return [(block.data_ptr(), block.numel()) for block in blocks]


@pytest.mark.parametrize("in_order", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize(
    "pruned", ["paper", "probe", "spread", "two-level", False], ids=lambda stage: stage or "every block kept"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
def test_repeats_in_poisoned_memory_are_bitwise_equal(dtype: torch.dtype, pruned: Any, in_order: bool) -> None:
    """20 runs at the paper's sizes, indices, scores and their order, in memory that the allocator hands out again.

    Bytes of FF and 7F are NaN in every dtype, and as integers -1 and a large number; 80 is the least integer.
    """
    case = real_case(dtype) | {"sorted": in_order}
    if pruned:
        case["coarse"] = pruned
    else:
        case["block_topk"] = case["k"].shape[1] // case["block_size"]
    with allocations() as found:
        first = call(case)
    sizes = [size for _, size in found]
    for repeat in range(20):
        poisoned = poison_freed_memory(sizes, (0xFF, 0x7F, 0x80, 0x00, 0x3C)[repeat % 5])
        with allocations() as found:
            again = call(case)
        assert_equal(again, first)
        del again
    # The test itself: nearly all that the last call got had been poisoned.
    inside = [any(at <= address < at + size for at, size in poisoned) for address, _ in found]
    reached = sum(size for (_, size), was in zip(found, inside, strict=True) if was)
    assert reached > 0.9 * sum(sizes)


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
    with mock.patch.object(config, "FEW_PAIRS", 0):
        with launched() as kernels:
            got = run(case)
        assert refine_by_block_hopper_kernel in kernels
        with mock.patch.object(gpu, "is_hopper", return_value=False), launched() as kernels:
            expected = run(case)
        assert launch_refine.refine_by_block_kernel in kernels
    assert_equal(got, expected)
    with mock.patch.object(config, "FEW_ROWS", 10**6):
        assert_equal(run(case), expected)


@pytest.mark.skipif(ON_GPU and torch.cuda.get_device_capability()[0] != 9, reason="needs sm_90")
@pytest.mark.parametrize("factors", ["none", "scales", "all"])
@pytest.mark.parametrize(
    ("heads", "dim", "block_size", "queries"),
    [
        (64, 128, 32, 40),
        (24, 80, 32, 40),
        (16, 32, 16, 40),
        (128, 64, 32, 40),
        (64, 128, 16, 3),
        (64, 128, 128, 3),
        (24, 80, 64, 4),
        (16, 32, 256, 1),
        (128, 64, 256, 2),
        (64, 128, 192, 2),
        (256, 64, 32, 40),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FP8], ids=str)
def test_hoppers_kernel_by_row_gives_the_same_bits(
    dtype: torch.dtype, heads: int, dim: int, block_size: int, queries: int, factors: str
) -> None:
    """Against the one for every GPU, with tiles of either size: negative scales, NaN, ragged ends, rows with few blocks
    or none, a row in two programs and in many, more copies on their way than a program has tiles."""
    batch, tokens = 2, 2500
    block_topk = 1024 // block_size
    case = gaussian_case(
        batch, queries, tokens, heads, dim, dtype, topk=300, block_size=block_size, block_topk=block_topk
    )
    case["k"].view(torch.uint8 if dtype == FP8 else dtype)[1, 1234, 3] = 127 if dtype == FP8 else math.nan
    case["window_end"] = torch.randint(0, tokens + 50, (batch, queries), device=DEVICE).int()
    case["window_start"] = torch.randint(-5, 900, (batch, queries), device=DEVICE).int()
    case["window_end"][0, :3] = torch.tensor([0, 5, 70], device=DEVICE)[:queries]
    if factors != "none":
        case["k_scale"] = torch.randn(batch, tokens, device=DEVICE)
    if factors == "all":
        case["k_weight"] = torch.randn(batch, tokens, device=DEVICE)
    with launched() as kernels:
        got = run(case)
    assert refine_by_row_hopper_kernel in kernels
    # Of few rows it keeps blocks itself.
    assert (launch.select_blocks_kernel in kernels) == (queries >= config.FEW_ROWS)
    with mock.patch.object(config, "MANY_ROW_PROGRAMS", 1), launched() as kernels:
        assert_equal(run(case), got)
    assert refine_by_row_hopper_kernel in kernels
    if heads <= 128:
        row = {Shape("refine_by_row_hopper"): Configuration(stages=3, maxnreg=168)}
        for programs in (1, 512):
            with (
                mock.patch.dict(configurations.TABLE[90], row),
                mock.patch.object(config, "MANY_ROW_PROGRAMS", programs),
            ):
                assert_equal(run(case), got)
    with mock.patch.object(gpu, "is_hopper", return_value=False), launched() as kernels:
        expected = run(case)
    assert launch_refine.refine_by_row_kernel in kernels
    assert_equal(got, expected)
    with mock.patch.object(config, "FEW_ROWS", 10**6):
        assert_equal(run(case), expected)


@pytest.mark.parametrize("workspace", [config.WORKSPACE_BYTES, 2**20], ids=["one chunk", "chunks"])
@pytest.mark.parametrize(
    "more",
    [
        {"coarse": "paper"},
        {"coarse": "probe", "sorted": False},
        {"coarse": "two-level", "mark_hidden": True},
        {"block_topk": 100, "coarse": "paper"},
        {"pooled": True, "converted": True},
    ],
    ids=["paper", "probe", "two levels", "every block kept", "given means, converted weights"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
def test_a_call_like_one_before_gives_its_own_result(dtype: torch.dtype, more: Case, workspace: int) -> None:
    """Bit for bit what a call alone gives, in memory full of garbage, also where a graph replays it with new inputs."""
    more = dict(more)
    pooled, converted = more.pop("pooled", False), more.pop("converted", False)

    def made(seed: int) -> Case:
        budget = {"topk": 300, "block_size": 64, "block_topk": 8}
        case: Case = gaussian_case(2, 100, 5000, 64, 128, dtype, seed, **budget) | more
        generator = torch.Generator(DEVICE).manual_seed(seed)
        case["window_end"] = torch.randint(0, 5000, (2, 100), generator=generator, device=DEVICE).int()
        if dtype == FP8:
            case["k_scale"] = torch.rand(2, 5000, generator=generator, device=DEVICE)
        if pooled:
            case["k_pooled"] = hisa_compile.pool_keys(case["k"], 64, k_scale=case.get("k_scale"))
        if converted:
            case["weights"] = case["weights"].bfloat16()
        return case

    with mock.patch.object(config, "WORKSPACE_BYTES", workspace):
        for seed in range(4):
            case = made(seed)
            with garbage_in_new_memory(), launched() as kernels:
                got = hisa_compile.indexer_topk(**case)
            assert ([kernel.__name__ for kernel in kernels] == ["again"]) == (seed > 0)
            assert_equal(canonical(*got), canonical(*run(case)))
        graph = torch.cuda.CUDAGraph()
        with launched() as kernels, torch.cuda.graph(graph):
            got = hisa_compile.indexer_topk(**case)
        assert [kernel.__name__ for kernel in kernels] == ["again"]
        for seed in range(4, 6):
            other = made(seed)
            for name, x in other.items():
                if isinstance(x, Tensor):
                    case[name].copy_(x)
            graph.replay()
            assert_equal(canonical(*got), canonical(*run(other)))


@pytest.mark.parametrize(
    ("batch", "queries", "tokens", "topk"), [(0, 3, 40, 7), (2, 0, 40, 7), (2, 3, 0, 7), (2, 3, 40, 0)]
)
def test_a_call_without_results(batch: int, queries: int, tokens: int, topk: int) -> None:
    """The first one and the one like it."""
    case = gaussian_case(batch, queries, tokens, 4, 16, torch.bfloat16, topk=topk, block_size=4, block_topk=3)
    shape = (batch, queries, min(topk, tokens))
    for _ in range(2):
        indices, scores = hisa_compile.indexer_topk(**case)
        assert (indices.dtype, tuple(indices.shape), indices.device) == (torch.int32, shape, case["q"].device)
        assert (scores.dtype, tuple(scores.shape), scores.device) == (torch.float32, shape, case["q"].device)


@pytest.mark.alone
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


@pytest.mark.alone
def test_queries_of_more_than_two_to_the_31_elements() -> None:
    """The last of many queries get what they get alone; sm_90's kernel takes rows of q by int32 coordinates."""
    queries, tail = 2**18 + 64, 64
    case = gaussian_case(1, tail, 1024, 64, 128, FP8, topk=64, block_size=128, block_topk=4)
    expected = run(case)
    q = torch.zeros(1, queries, 64, 128, dtype=torch.uint8, device=DEVICE).view(FP8)
    q[:, -tail:] = case["q"]
    weights = torch.zeros(1, queries, 64, device=DEVICE)
    weights[:, -tail:] = case["weights"]
    assert q.numel() > 2**31
    indices, scores = call(case, q=q, weights=weights)
    assert_equal((indices[:, -tail:], scores[:, -tail:]), expected)


@pytest.mark.alone
@pytest.mark.parametrize("in_order", [True, False], ids=["sorted", "unsorted"])
def test_results_of_more_than_two_to_the_31_elements(in_order: bool) -> None:
    """The last rows of indices and scores that 32 bits can't address; fill writes there too."""
    queries, tokens, tail = 2**20 + 64, 2048, 64
    case = gaussian_case(1, tail, tokens, 1, 16, torch.float16, topk=tokens, block_size=64, block_topk=32)
    case |= {"sorted": in_order, "window_end": tokens - 7 * torch.arange(tail, device=DEVICE).int()}
    expected = run(case)
    wide = {"q": torch.zeros(1, queries, 1, 16, dtype=torch.float16, device=DEVICE)}
    wide["weights"] = torch.zeros(1, queries, 1, device=DEVICE)
    wide["window_end"] = torch.zeros(queries, dtype=torch.int32, device=DEVICE)
    wide["q"][:, -tail:], wide["weights"][:, -tail:] = case["q"], case["weights"]
    wide["window_end"][-tail:] = case["window_end"]
    indices, scores = call(case | wide)
    assert indices.numel() > 2**31
    assert_equal((indices[:, -tail:], scores[:, -tail:]), expected)


@pytest.mark.alone
def test_mask_of_more_than_two_to_the_31_elements() -> None:
    """The last queries of a huge mask see what their own slice of it says."""
    queries, tokens = 40_000, 65536
    case = gaussian_case(1, queries, tokens, 2, 16, torch.float16, topk=64, block_size=64, block_topk=8)
    case["mask"] = torch.ones(1, 1, tokens, dtype=torch.bool, device=DEVICE).repeat(1, queries, 1)
    case["mask"][:, -2:, 1000:60000] = False
    whole = run(case)
    tail = case | {name: case[name][:, -2:].clone() for name in ("q", "weights", "mask")}
    assert_equal((whole[0][:, -2:], whole[1][:, -2:]), run(tail))


def test_sizes_that_change_do_not_recompile() -> None:
    """S, T and the number of blocks are not specialised: a serving loop compiles once."""
    shapes = ((1, 100, 3000), (2, 77, 3001), (1, 1, 4096), (3, 16, 2500))
    # So many to select that rows may have to be filled up.
    budget = {"topk": 230, "block_size": 16, "block_topk": 16}
    for shape in shapes[1:3]:
        run(gaussian_case(*shape, 16, 64, torch.bfloat16, **budget))
    kernels = (launch.coarse_kernel, launch_refine.refine_by_block_kernel, launch_refine.refine_by_row_kernel)
    kernels += (coarse_hopper_kernel, refine_by_row_hopper_kernel, select_tokens_hopper_kernel)
    kernels += (launch.select_tokens_kernel, launch.fill_kernel)
    # Strides are specialised on being 1 and on divisibility by 16, which these shapes leave alone.
    before = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]
    for shape in shapes:
        run(gaussian_case(*shape, 16, 64, torch.bfloat16, **budget))
    after = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]
    assert after == before
