"""A call like one before it launches what a call of its own would: the same kernels, with its own tensors' addresses.

As in ``test_triton_repeat.py`` kernels are compiled for sm_90 and launches noted, so this needs no GPU; what a GPU
makes of repeated calls is in ``test_triton_gpu.py``.
"""

from __future__ import annotations

import gc
import inspect
import itertools
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from stand_in import NOTED, Noted, stand_in  # noqa: E402, F401

from hisa_compile.ops import schema  # noqa: E402
from hisa_compile.ops.triton import again, config, gpu, launch  # noqa: E402

pytestmark = [
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="compiles: needs TRITON_INTERPRET unset"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="puts another driver in place of the GPU's"),
    pytest.mark.usefixtures("stand_in"),
]

PARAMETERS = inspect.signature(schema.run).parameters
TENSORS = [name for name, parameter in PARAMETERS.items() if "Tensor" in parameter.annotation]
FP8 = torch.float8_e4m3fn
Given = dict[str, Any]


def aligned(x: Tensor, at: int = 0) -> Tensor:
    """A copy ``at`` bytes past a multiple of 512, as on a GPU: memory of the CPU begins anywhere."""
    room = torch.empty(x.nbytes + 1024, dtype=torch.uint8)
    start = -room.data_ptr() % 512 + at
    return room[start : start + x.nbytes].view(x.dtype).view(x.shape).copy_(x)


def case(
    seed: int, dtype: torch.dtype, batch: int = 2, queries: int = 40, tokens: int = 128 * 20 + 5, **more: Any
) -> Given:
    g = torch.Generator().manual_seed(seed)
    given: Given = {
        "q": torch.randn(batch, queries, 64, 128, generator=g).to(dtype),
        "k": torch.randn(batch, tokens, 128, generator=g).to(dtype),
        "weights": torch.randn(batch, queries, 64, generator=g),
        "window_end": torch.randint(0, max(tokens, 1), (batch, queries), generator=g).int(),
    }
    if dtype == FP8:
        given["k_scale"] = torch.randn(batch, tokens, generator=g)
    made = {name: make(g, batch, queries, tokens) for name, make in more.items() if callable(make)}
    tensors = {name: aligned(x) for name, x in (given | made).items()}
    options = {"topk": 512, "block_size": 128, "block_topk": 8, "sorted": True, "mark_hidden": False}
    return options | {name: x for name, x in more.items() if not callable(x)} | tensors


MORE: dict[str, Given] = {
    "paper": {"coarse": "paper"},
    "spread": {"coarse": "spread"},
    "probe": {"coarse": "probe"},
    "two levels": {"coarse": "two-level", "block_size": 64, "block_topk": 16},
    "small blocks": {"coarse": "paper", "block_size": 32, "block_topk": 32},
    "unsorted": {"coarse": "paper", "sorted": False, "mark_hidden": True},
    "every block kept": {"coarse": "paper", "block_topk": 40},
    "long rows": {"coarse": "paper", "block_topk": 130, "tokens": 128 * 150},
    "decode": {"coarse": "paper", "queries": 1},
    "given means": {"k_pooled": lambda g, b, s, t: torch.randn(b, -(-t // 128), 128, generator=g).bfloat16()},
    "weights are converted": {
        "coarse": "paper",
        "weights": lambda g, b, s, t: torch.randn(b, s, 64, generator=g).bfloat16(),
    },
    "everything": {
        "coarse": "paper",
        "window_start": lambda g, b, s, t: torch.randint(0, t, (b, s), generator=g).int(),
        "key_valid": lambda g, b, s, t: torch.rand(b, t, generator=g) < 0.9,
        "mask": lambda g, b, s, t: torch.rand(b, s, t, generator=g) < 0.9,
        "q_segment": lambda g, b, s, t: torch.randint(0, 3, (b, s), generator=g),
        "k_segment": lambda g, b, s, t: torch.randint(0, 3, (b, t), generator=g),
        "k_weight": lambda g, b, s, t: torch.randn(b, t, generator=g),
    },
}


def in_order(given: Given) -> tuple[Any, ...]:
    return tuple(given.get(name) for name in PARAMETERS)


def noted(call: Any) -> tuple[tuple[Tensor, Tensor], list[Noted]]:
    NOTED.clear()
    results = call()
    return results, list(NOTED)


def alone(given: Given) -> tuple[tuple[Tensor, Tensor], list[Noted]]:
    return noted(lambda: launch.indexer_topk_triton(*schema._checked(*in_order(given))))


def through(given: Given) -> tuple[tuple[Tensor, Tensor], list[Noted]]:
    return noted(lambda: again.indexer_topk(in_order(given), schema._checked))


def repeated(given: Given) -> tuple[tuple[Tensor, Tensor], list[Noted]]:
    """The call, which plans nothing of its own."""
    with mock.patch.object(launch, "indexer_topk_triton", side_effect=AssertionError("is like one before")):
        return through(given)


def assert_same_launches(
    given: Given, got: tuple[tuple[Tensor, Tensor], list[Noted]], expected: tuple[tuple[Tensor, Tensor], list[Noted]]
) -> None:
    """Launches that differ only in where the call's own memory lies, in which nothing lies upon another thing."""
    assert len(got[1]) == len(expected[1]) > 0
    owner = {x.untyped_storage().data_ptr(): name for name in TENSORS if (x := given.get(name)) is not None}
    results = [
        {x.data_ptr(): name for x, name in zip(pair, ("indices", "scores"), strict=True)}
        for pair in (got[0], expected[0])
    ]
    there: dict[int, tuple[int, int]] = {}
    for one, other in zip(got[1], expected[1], strict=True):
        assert (one.kernel, one.programs, one.names) == (other.kernel, other.programs, other.names)
        assert one.weights == other.weights, one.kernel
        for name, argument, real in zip(one.names, one.arguments, other.arguments, strict=True):
            where = f"{name} of {one.kernel}"
            if hasattr(real, "base"):
                assert vars(argument) | {"base": None} == vars(real) | {"base": None}, where
                argument, real = argument.base.data_ptr(), real.base
            if not isinstance(real, Tensor):
                assert argument == real, where
                assert type(argument) is type(real), where
                continue
            address = real.data_ptr()
            argument = argument.data_ptr() if isinstance(argument, Tensor) else argument
            if real.untyped_storage().data_ptr() in owner:
                assert argument == address, where
            elif address in results[1]:
                assert results[0].get(argument) == results[1][address], where
            else:
                storage = real.untyped_storage()
                begin = -(-storage.data_ptr() // 512) * 512
                span = argument - (address - begin), storage.nbytes() - 512
                assert there.setdefault(begin, span) == span, where
                place = span[0]
                assert place % again.ALIGNED == 0, where
    spans = sorted(there.values())
    for (start, size), (following, _) in itertools.pairwise(spans):
        assert start + size <= following


class Memory:
    """Memory at multiples of 512, as a GPU's allocator gives it, kept for the test."""

    def __init__(self) -> None:
        self.empty, self.kept = torch.empty, []

    def __call__(self, shape: Any, dtype: torch.dtype, device: Any = None) -> Tensor:
        shape = (shape,) if isinstance(shape, int) else shape
        size = torch.Size(shape).numel() * dtype.itemsize
        room = self.empty(size + 512, dtype=torch.uint8)
        self.kept.append(room)
        start = -room.data_ptr() % 512
        return room[start : start + size].view(dtype).view(shape)


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    made = Memory()
    monkeypatch.setattr(torch, "empty", made)
    return made


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16, torch.float32], ids=str)
def test_launches_are_those_of_a_call_of_its_own(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, more: Given, chunks: int
) -> None:
    long_rows = more is MORE["long rows"]
    more = dict(more)
    if "k_pooled" in more and dtype == torch.float32:
        more["k_pooled"] = lambda g, b, s, t: torch.randn(b, -(-t // 128), 128, generator=g)
    if chunks > 1:
        monkeypatch.setattr(config, "WORKSPACE_BYTES", config.WORKSPACE_BYTES // 60)
        more |= {"batch": 3} if more.get("queries") == 1 else {"queries": 70}
    first, second, third = (case(seed, dtype, **more) for seed in range(3))
    made = alone(first)
    assert any(one.kernel == "list_candidates_kernel" for one in made[1]) == long_rows
    assert_same_launches(first, through(first), made)
    for given in (second, third, first):
        assert_same_launches(given, repeated(given), alone(given))


NOTHING: dict[str, Given] = {
    "nothing selected": {"topk": 0},
    "no queries": {"queries": 0},
    "no sequences": {"batch": 0},
    "no tokens": {"tokens": 0},
}


@pytest.mark.parametrize("more", NOTHING.values(), ids=NOTHING)
def test_a_call_without_results_launches_nothing(more: Given) -> None:
    given = case(0, FP8, **more)
    shape = (*given["q"].shape[:2], min(given["topk"], given["k"].shape[1]))
    for call in (alone, through, repeated):
        results, launches = call(given)
        assert [(x.dtype, tuple(x.shape)) for x in results] == [(torch.int32, shape), (torch.float32, shape)]
        assert not launches


@pytest.mark.parametrize("coarse", ["paper", "probe"])
def test_arguments_that_were_one_tensor_may_be_two(coarse: str) -> None:
    first, second = (case(seed, torch.bfloat16, coarse=coarse) for seed in range(2))
    first["window_start"] = first["window_end"]
    second["window_start"] = aligned(second["window_end"] // 2)
    through(first)
    assert_same_launches(second, repeated(second), alone(second))


def strided(x: Tensor) -> Tensor:
    return aligned(torch.cat((x, x), -1))[..., : x.shape[-1]]


CHANGES: dict[str, Given] = {
    "batch": {"batch": 1},
    "tokens": {"tokens": 128 * 21},
    "topk": {"topk": 500},
    "budget": {"block_topk": 9},
    "order": {"sorted": False},
    "marks": {"mark_hidden": True},
    "stage": {"coarse": "probe"},
    "no scale": {"k_scale": None},
    "strides of keys": {"k": strided},
    "strides of weights": {"weights": strided},
    "dtype of weights": {"weights": lambda x: aligned(x.half())},
    "alignment of weights": {"weights": lambda x: aligned(x, at=16)},
    "alignment of queries": {"q": lambda x: aligned(x, at=8)},
    "a window for all": {"window_end": lambda x: x[:1, :1]},
    "a window's other side": {"window_end": None, "window_start": lambda x: torch.zeros(2, 40, dtype=torch.int32)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_call_that_differs_is_made_anew(change: Given) -> None:
    first = case(0, FP8, coarse="paper")
    through(first)
    plain = {name: x for name, x in change.items() if not callable(x)}
    other = case(0, FP8, **{"coarse": "paper"} | plain)
    other |= {
        name: make(first.get(name)) if callable(make) else None for name, make in change.items() if name in TENSORS
    }
    with mock.patch.object(launch, "indexer_topk_triton", side_effect=launch.indexer_topk_triton) as planned:
        made = through(other)
        assert planned.call_count == 1
    assert_same_launches(other, made, alone(other))
    assert_same_launches(other, repeated(other), alone(other))
    assert_same_launches(first, repeated(first), alone(first))


def test_what_does_not_fit_is_refused_every_time() -> None:
    wrong = case(0, torch.bfloat16, coarse="paper") | {"block_topk": 1}
    for _ in range(2):
        with pytest.raises(ValueError, match="block_topk"):
            through(wrong)
    assert not again._records


def test_the_latest_kinds_are_kept_without_their_tensors() -> None:
    alive = []
    with mock.patch.object(again, "MOST_RECORDS", 2):
        for topk in (100, 200, 300):
            given = case(0, torch.bfloat16, coarse="paper", topk=topk)
            through(given)
            alive += [weakref.ref(given[name]) for name in ("q", "k", "weights", "window_end")]
    NOTED.clear()
    del given
    gc.collect()
    assert [x() for x in alive] == [None] * 12
    for topk in (200, 300):
        repeated(case(0, torch.bfloat16, coarse="paper", topk=topk))
    with pytest.raises(AssertionError, match="like one before"):
        repeated(case(0, torch.bfloat16, coarse="paper", topk=100))


def test_a_call_of_many_launches_is_not_kept() -> None:
    given = case(0, torch.bfloat16, coarse="paper")
    with mock.patch.object(again, "MOST_STEPS", len(alone(given)[1]) - 1):
        through(given)
    assert not again._records
    through(given)
    assert len(again._records) == 1


def test_no_record_without_a_compiled_kernel() -> None:
    with mock.patch.object(gpu, "launch", return_value=None):
        through(case(0, torch.bfloat16, coarse="paper"))
    assert not again._records


def test_forgotten_calls_are_made_anew() -> None:
    given = case(0, torch.bfloat16, coarse="paper")
    through(given)
    repeated(given)
    again.forget()
    with pytest.raises(AssertionError, match="like one before"):
        repeated(given)
