"""Chunks after the first repeat its launches: the same arguments as launches of their own have.

Kernels are compiled for sm_90 and handed to a launcher that notes what it gets, so this needs no GPU.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from stand_in import NOTED, Noted, stand_in  # noqa: E402, F401
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: E402

from hisa_compile.ops import Budget, Visibility  # noqa: E402
from hisa_compile.ops.coarse import SPREAD, outer_of, probes  # noqa: E402
from hisa_compile.ops.triton import config, gpu, launch  # noqa: E402

pytestmark = [
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="compiles: needs TRITON_INTERPRET unset"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="puts another driver in place of the GPU's"),
    pytest.mark.usefixtures("stand_in"),
]


def plain(argument: Any) -> Any:
    """What two calls with buffers of their own have in common."""
    if isinstance(argument, Tensor):
        return argument.dtype, tuple(argument.shape), argument.stride(), argument.data_ptr() % 16
    if isinstance(argument, TensorDescriptor):
        return plain(argument.base), tuple(argument.shape), tuple(argument.strides), tuple(argument.block_shape)
    return argument


@pytest.mark.parametrize("in_order", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize(
    ("block_topk", "coarse"),
    [(8, "paper"), (5, "paper"), (8, "spread"), (8, "probe"), (8, "two-level"), (40, "paper"), (200, "paper")],
    ids=["pruned", "filled", "spread", "probe", "two levels", "long rows", "every block kept"],
)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("batch", "queries"), [(1, 300), (7, 40)])
def test_repeated_launches_are_those_of_a_chunk_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    queries: int,
    dtype: torch.dtype,
    block_topk: int,
    coarse: str,
    in_order: bool,
) -> None:
    tokens = 128 * 150 + 5
    q, k = torch.zeros(batch, queries, 64, 128).to(dtype), torch.zeros(batch, tokens, 128).to(dtype)
    weights = torch.arange(batch * queries * 64, dtype=torch.float32).view(batch, queries, 64)
    if dtype == torch.bfloat16:
        # Not what kernels take: each chunk's are copied.
        weights = weights.to(dtype)
    end = torch.full((batch, queries), tokens, dtype=torch.int32)
    scale = torch.ones(batch, tokens) if dtype.itemsize == 1 else None
    monkeypatch.setattr(config, "SELECT_ROW", 2048)
    monkeypatch.setattr(config, "SELECT_TILE", 2048)

    sizes = (
        batch,
        queries,
        64,
        128,
        tokens,
        512,
        Budget(128, block_topk),
        dtype,
        in_order,
        90,
        512 if probes(coarse) else None,
        outer_of(coarse, tokens, Budget(128, block_topk)),
        coarse == SPREAD,
    )
    while len(launch.Plan(*sizes).chunks) < 4:
        monkeypatch.setattr(config, "WORKSPACE_BYTES", config.WORKSPACE_BYTES * 3 // 4)

    def call() -> list[Noted]:
        NOTED.clear()
        seen = Visibility(window_end=end)
        budget = Budget(128, block_topk)
        launch.indexer_topk_triton(q, k, weights, 512, budget, seen, scale, None, in_order, False, coarse=coarse)
        return list(NOTED)

    with mock.patch.object(gpu, "launch", side_effect=gpu.launch) as launched:
        repeated = call()
    assert launched.call_count < 0.7 * len(repeated), "chunks like the first are not launched one by one"
    with monkeypatch.context() as patch:
        # Without a compiled kernel in hand each chunk is launched by itself.
        patch.setattr(gpu, "launch", lambda *arguments, real=gpu.launch, **named: real(*arguments, **named) and None)
        alone = call()
    kernels = {one.kernel for one in alone}
    assert len(alone) >= 3 * len(kernels), "several chunks"
    # Kept blocks that a window cuts at both ends may hold less than topk where there are few.
    assert ("fill_kernel" in kernels) == (block_topk == 5)
    assert len(repeated) == len(alone)
    for one, expected in zip(repeated, alone, strict=True):
        assert (one.kernel, one.programs) == (expected.kernel, expected.programs)
        assert list(map(plain, one.arguments)) == list(map(plain, expected.arguments)), one.kernel
        # The caller's weights are read in place, each chunk its own.
        for argument, other in zip(one.arguments, expected.arguments, strict=True):
            base = argument.base if isinstance(argument, TensorDescriptor) else argument
            if isinstance(base, Tensor) and base.untyped_storage().data_ptr() == weights.untyped_storage().data_ptr():
                assert base.data_ptr() == (other.base if isinstance(other, TensorDescriptor) else other).data_ptr()
