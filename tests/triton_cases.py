"""What the tests of the Triton kernels share: inputs, the call itself with poisoned memory, comparisons.

With a GPU the kernels run on it, without one under Triton's interpreter, in a process started with TRITON_INTERPRET=1
(tests/test_triton_interpreter.py starts it).

Inputs of exact cases are small integers, so every sum is exact in float32 in whatever order: indices and scores
must equal the reference's bit for bit, ties (ReLU makes thousands) and fill included.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from strategies import assert_equal
from torch import Tensor

from hisa_compile.ops import Budget, Visibility, reference
from hisa_compile.ops.triton import again, config, gpu, launch

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if ON_GPU else "cpu"
# Where neither is so, modules of tests skip themselves.
RUNS = ON_GPU or os.environ.get("TRITON_INTERPRET") == "1"
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


def call(case: Case, **changes: Any) -> tuple[Tensor, Tensor]:
    """The kernels on a case, whose entries are named like the arguments of the reference."""
    case = {"k_scale": None, "k_weight": None, "sorted": True, "mark_hidden": False} | case | changes
    visibility = Visibility(*(case.get(name) for name in Visibility._fields))
    budget = Budget(case["block_size"], case["block_topk"])
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
        # The tests of the other kernels are about the paper's stage unless they say otherwise.
        case.get("coarse", "paper"),
    )


def run(case: Case, **changes: Any) -> tuple[Tensor, Tensor]:
    """:func:`call` with garbage in all memory that it allocates."""
    with garbage_in_new_memory():
        return call(case, **changes)


@contextmanager
def launched() -> Iterator[list[Any]]:
    """The kernels that are launched meanwhile, and ``Record.again`` for a call that repeats another one's launches."""
    kernels: list[Any] = []
    original, repeat = gpu.launch, again.Record.again

    def note(kernel: Any, programs: int, options: config.Launch, **arguments: Any) -> Any:
        kernels.append(kernel)
        return original(kernel, programs, options, **arguments)

    def note_repeat(record: again.Record, given: Any) -> Any:
        kernels.append(repeat)
        return repeat(record, given)

    with mock.patch.object(gpu, "launch", note), mock.patch.object(again.Record, "again", note_repeat):
        yield kernels


def canonical(indices: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """A result in any order, reordered by position."""
    indices, order = indices.sort(dim=-1, stable=True)
    return indices, scores.gather(-1, order)


def check(case: Case) -> None:
    """The kernels' result is the reference's, bit for bit."""
    got, expected = run(case), reference.indexer_topk(**{"coarse": "paper"} | case)
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


def whole_case(
    queries: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, batch: int = 1, seed: int = 0, **budget: int
) -> Case:
    """:func:`exact_case` for any number of heads, in any dtype, of whole blocks of 128 keys or a smaller power of two.

    Their means are multiples of 1 / 128 and at most 2, which bfloat16 holds as it is.
    """
    assert tokens % budget["block_size"] == 0
    assert 128 % budget["block_size"] == 0
    g = torch.Generator().manual_seed(seed)
    return {
        "q": integers(g, -2, 2, batch, queries, heads, dim).to(dtype).to(DEVICE),
        "k": integers(g, -2, 2, batch, tokens, dim).to(dtype).to(DEVICE),
        "weights": integers(g, -2, 3, batch, queries, heads).to(DEVICE),
        **budget,
    }


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
def small_tiles(workspace: int = 1, roomy: int = 0) -> Iterator[None]:
    """Tiles and workspace so small that every loop over tiles, groups of tiles and chunks of rows runs often."""
    tiles, probe_tiles = config.score_tiles, config.probe_tiles

    def small_probe(dim: int, dtype: torch.dtype, block_size: int) -> config.ProbeTiles:
        return probe_tiles(dim, dtype, block_size)._replace(rows=64 if ON_GPU else 16, tile=16, tile_dim=32)

    def small(heads: int, dim: int, dtype: torch.dtype, block_size: int) -> config.Tiles:
        # A product of float8 adds at least 32 at a time.
        return tiles(heads, dim, dtype, block_size)._replace(tile=16, tile_dim=32 if ON_GPU and dtype == FP8 else 16)

    values = {
        "score_tiles": small,
        "probe_tiles": small_probe,
        "MANY_PROBE_PROGRAMS": 3,
        "SORT_TILE": 8,
        "SELECT_ROW": 16,
        "SELECT_TILE": 16,
        "SCAN_TILE": 16,
        "PAIR_TILE": 4,
        "MOST_ROWS": 2,
        "FEW_ROWS": 1,
        "FEW_PAIRS": 0,
        "MANY_PROGRAMS": 1,
        "MANY_ROW_PROGRAMS": 1,
        "MANY_COARSE_PROGRAMS": 1,
        "EMIT_TILE": 4,
        "ROOMY": roomy,
        "LIST_TILE": 2,
        "LIST_PARTS": 2,
        "LEAST_SHARE": 2,
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
    case["coarse"] = draw(st.sampled_from(["paper", "spread", "probe"]))
    if draw(st.booleans()):
        case |= {name: strided(x) for name, x in case.items() if isinstance(x, Tensor) and x.dim() > 1}
    return case
