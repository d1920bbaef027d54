"""Calls captured in CUDA graphs, by hand and by torch.compile, and replayed on other inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

pytest.importorskip("triton")

from triton_cases import (
    DEVICE,
    FP8,
    ON_GPU,
    Case,
    assert_equal,
    call,
    gaussian_case,
    launched,
    real_case,
    run,
)

import hisa_compile
from hisa_compile.ops import Budget, Visibility
from hisa_compile.ops.triton import config, gpu, launch, launch_pool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a GPU")]


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


def prefill(dtype: torch.dtype, seed: int) -> Case:
    """128 queries with windows, segments, valid keys and factors; every kernel of the pruned path by block."""
    batch, queries, tokens = 2, 128, 8192
    case = gaussian_case(batch, queries, tokens, 64, 128, dtype, seed, topk=512, block_size=128, block_topk=16)
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=DEVICE)

    case["window_start"] = whole(-9, tokens // 2, batch, queries).int()
    case["window_end"] = whole(0, tokens + 9, batch, queries).int()
    case["key_valid"] = whole(0, 10, batch, tokens) > 0
    case["q_segment"], case["k_segment"] = whole(0, 2, batch, queries), whole(0, 2, batch, tokens)
    case["k_scale"], case["k_weight"] = torch.randn(2, batch, tokens, generator=generator, device=DEVICE)
    return case


def probe(dtype: torch.dtype, seed: int) -> Case:
    """The same by the probe, with windows alone, as sm_90's version has it."""
    case = prefill(dtype, seed) | {"coarse": "probe"}
    return {name: x for name, x in case.items() if name not in ("key_valid", "q_segment", "k_segment")}


def spread(dtype: torch.dtype, seed: int) -> Case:
    """By means and spreads."""
    return prefill(dtype, seed) | {"coarse": "spread"}


def decode(dtype: torch.dtype, seed: int) -> Case:
    """A query a sequence over a cache that keeps means; contexts of different length."""
    case = gaussian_case(4, 1, 32768, 64, 128, dtype, seed, topk=2048, block_size=128, block_topk=64)
    case["k_pooled"] = launch_pool.pool_keys_triton(case["k"], 128, None, None, None)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    case["window_end"] = torch.randint(0, 32769, (4, 1), generator=generator, device=DEVICE).int()
    return case


def flat(dtype: torch.dtype, seed: int) -> Case:
    """Every block kept, in rows longer than a program holds."""
    tokens = config.SELECT_ROW + 1024
    case = gaussian_case(2, 64, tokens, 64, 128, dtype, seed, topk=512, block_size=64, block_topk=tokens // 64)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    case["window_end"] = torch.randint(0, tokens + 20, (2, 64), generator=generator, device=DEVICE).int()
    return case


@pytest.mark.parametrize("in_order", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("shape", [prefill, spread, probe, decode, flat], ids=lambda shape: shape.__name__)
def test_a_graph_of_any_shape_replays_on_other_inputs(shape: Any, dtype: torch.dtype, in_order: bool) -> None:
    """All tensors change between replays; a replay leaves nothing behind that the next one would find."""
    cases = [shape(dtype, seed) | {"sorted": in_order} for seed in range(5)]
    static = {name: x.clone() if isinstance(x, Tensor) else x for name, x in cases[0].items()}
    call(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(static)
    for case in (*cases, cases[0]):
        for name, x in case.items():
            if isinstance(x, Tensor):
                static[name].copy_(x)
        expected = run(case)
        for _ in range(2):
            for x in captured:
                x.fill_(-7)
            graph.replay()
            torch.cuda.synchronize()
            assert_equal(captured, expected)


@pytest.mark.parametrize("graphed", [False, True])
def test_queries_are_rewritten_just_before_each_call(graphed: bool) -> None:
    """What widens queries does not wait for the kernel before it, which pools few blocks here and has done soon."""
    case = gaussian_case(1, 512, 2560, 64, 128, FP8, 3, topk=256, block_size=128, block_topk=4)
    case |= {"k_scale": torch.rand(1, 2560, device=DEVICE), "coarse": "paper"}
    queries = [torch.randn(1, 512, 64, 128, device=DEVICE).to(FP8) for _ in range(4)]
    with launched() as kernels:
        expected = [run(case | {"q": q}) for q in queries]
    assert ("widen_queries_kernel" in [kernel.__name__ for kernel in kernels]) == gpu.is_hopper(case["q"])
    static = case | {"q": queries[0].clone()}

    def every() -> list[tuple[Tensor, ...]]:
        found = []
        for q in queries:
            static["q"].copy_(q)
            found.append(call(static))
        return found

    first = every()
    torch.cuda.synchronize()
    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first = every()
    for _ in range(50):
        if graphed:
            graph.replay()
        else:
            first = every()
    torch.cuda.synchronize()
    for found, wanted in zip(first, expected, strict=True):
        assert_equal(found, wanted)


@pytest.mark.parametrize("shape", [prefill, spread, probe, decode, flat], ids=lambda shape: shape.__name__)
def test_nothing_waits_for_the_device(shape: Any) -> None:
    """torch raises at whatever of its own operations would; Triton's launches never do."""
    case = shape(torch.bfloat16, 0)
    call(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def indexer(q: Tensor, k: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The flat program, in float32."""
    scores = torch.einsum("bshd,btd->bsht", q.float(), k.float()).relu()
    values, indices = torch.einsum("bsht,bsh->bst", scores, weights).topk(256)
    return values, indices


@pytest.mark.parametrize("exact", [False, True], ids=["pruned", "exact"])
@pytest.mark.parametrize(("queries", "tokens"), [(64, 2048), (1, 4096)], ids=["prefill", "decode"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reduce_overhead_replays_the_rewritten_program(
    dtype: torch.dtype, queries: int, tokens: int, exact: bool
) -> None:
    """mode="reduce-overhead": 5 calls with new inputs give the operator's bits, and the flat program's values."""
    torch._dynamo.reset()
    counters.clear()
    block_size, block_topk = 64, tokens // 64 if exact else 8
    options = {**torch._inductor.list_mode_options("reduce-overhead")}
    options |= {"hisa.block_size": block_size, "hisa.block_topk": block_topk}
    compiled = torch.compile(indexer, backend="hisa", options=options)
    kernels_of_call = []
    for seed in range(5):
        case = gaussian_case(2, queries, tokens, 16, 64, dtype, seed)
        with torch.no_grad(), launched() as kernels:
            values, indices = (x.clone() for x in compiled(case["q"], case["k"], case["weights"]))
        kernels_of_call.append(len(kernels))
        budget = {"block_size": block_size, "block_topk": block_topk}
        expected = hisa_compile.indexer_topk(case["q"], case["k"], case["weights"], 256, **budget)
        assert_equal((indices.int(), values), expected)
        if exact:
            flat_values, _ = indexer(case["q"], case["k"], case["weights"])
            torch.testing.assert_close(values, flat_values, rtol=1e-4, atol=1e-3)
    assert len(hisa_compile.reports()[-1].rewritten) == 1
    # The first call warms up, the second is captured; graphs replay the others, and Python launches nothing.
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert kernels_of_call[0] > 0
    assert kernels_of_call[2:] == [0, 0, 0]
