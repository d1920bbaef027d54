"""q as the matrix of rows that sm_90's tensor memory accelerator copies from, in layouts that it takes and others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton_cases import (
    DEVICE,
    FP8,
    ON_GPU,
    RUNS,
    assert_equal,
    gaussian_case,
    launched,
    run,
    small_tiles,
)

from hisa_compile.ops import Budget, Visibility
from hisa_compile.ops.triton import config, gpu, launch
from hisa_compile.ops.triton.descriptor import QueryRows, query_rows
from hisa_compile.ops.triton.refine_hopper import refine_by_block_hopper_kernel


def placed(q: Tensor, before: tuple[int, ...], behind: tuple[int, ...]) -> Tensor:
    """q as a slice of a larger tensor."""
    wide = q.new_zeros([n + b + a for n, b, a in zip(q.shape, before, behind, strict=True)])
    view = wide[tuple(slice(b, b + n) for n, b in zip(q.shape, before, strict=True))]
    view.copy_(q)
    return view


def with_strides(q: Tensor, *strides: int) -> Tensor:
    """q's elements written to the given strides; where these meet, one of them is all that is left."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(q.shape, strides, strict=True))
    view = q.new_zeros(size).as_strided(q.shape, strides)
    for index in range(q.shape[0]):
        for head in range(q.shape[2]):
            view[index, :, head] = q[index, :, head]
    return view


# name -> (a layout of q [B, S, H, D], whether whole queries can be copied from it).  16 elements are at least as many
# bytes in every dtype, and D is a multiple of 16.
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "contiguous": (lambda q: q, True),
    "queries first": (lambda q: q.transpose(0, 1).contiguous().transpose(0, 1), True),
    "heads first": (lambda q: q.transpose(1, 2).contiguous().transpose(1, 2), False),
    "dims before heads": (lambda q: q.transpose(2, 3).contiguous().transpose(2, 3), False),
    "part of the dims": (lambda q: placed(q, (0, 0, 0, 16), (0, 0, 0, 16)), True),
    "part of the dims, rows not aligned": (lambda q: placed(q, (0, 0, 0, 0), (0, 0, 0, 1)), False),
    "part of the dims, base not aligned": (lambda q: placed(q, (0, 0, 0, 1), (0, 0, 0, 15)), False),
    "part of the heads": (lambda q: placed(q, (0, 0, 1, 0), (0, 0, 2, 0)), True),
    "part of everything": (lambda q: placed(q, (1, 2, 3, 16), (1, 2, 3, 16)), True),
    "every other query": (lambda q: q.repeat_interleave(2, dim=1)[:, ::2], True),
    "every other head": (lambda q: q.repeat_interleave(2, dim=2)[:, :, ::2], True),
    "every other dim": (lambda q: q.repeat_interleave(2, dim=3)[..., ::2], False),
    "one sequence for all": (lambda q: q[:1].expand_as(q), True),
    "one query for all": (lambda q: q[:, :1].expand_as(q), True),
    "one head for all": (lambda q: q[:, :, :1].expand_as(q), False),
    "queries no whole number of heads apart": (
        lambda q: with_strides(q, q[0].numel() + 16 * q.shape[1], q[0, 0].numel() + 16, q.shape[3], 1),
        False,
    ),
    "sequences no whole number of heads apart": (lambda q: with_strides(q, q[0].numel() + 16, *q.stride()[1:]), False),
    "heads that overlap": (
        lambda q: with_strides(q, 16 * q[0, :, :, 0].numel(), 16 * q.shape[2], 16, 1),
        False,
    ),
    "sequences that overlap": (lambda q: with_strides(q, *(2 * [q.stride(1)]), *q.stride()[2:]), True),
}


def laid_out(q: Tensor, layout: str) -> Tensor:
    # Not every operation on every device takes float8.
    return LAYOUTS[layout][0](q.view(torch.uint8)).view(FP8) if q.dtype == FP8 else LAYOUTS[layout][0](q)


def indexed_as_rows(q: Tensor, rows: QueryRows) -> Tensor:
    """q [B, S, H, D] as the kernel reads it: rows of a matrix, by the numbers that :func:`query_rows` gives."""
    batch, queries, heads, dim = q.shape
    matrix = q.as_strided((rows.rows, dim), (q.stride(2), 1))
    first = (torch.arange(batch) * rows.of_batch)[:, None] + torch.arange(queries) * rows.of_query
    row = first[..., None] + torch.arange(heads)
    assert int(row.max()) == rows.rows - 1
    return matrix[row]


@pytest.mark.parametrize("shape", [(2, 5, 3, 32), (1, 5, 3, 32), (2, 1, 3, 32), (3, 4, 1, 16), (1, 1, 1, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_the_matrix_are_the_heads_of_the_queries(
    layout: str, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    """No element lies outside q's own memory, which as_strided checks, and each is where plain indexing finds it."""
    taken = LAYOUTS[layout][1]
    # Bytes below 120 are numbers in float8, and numbers below 120 are some in the others: no row is like another.
    values = torch.randint(0, 120, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    q = laid_out(values.view(FP8) if dtype == FP8 else values.to(dtype), layout)
    rows = query_rows(q)
    if min(shape) > 1:
        assert (rows is not None) == taken
    elif taken:
        assert rows is not None
    if rows is not None:
        assert torch.equal(indexed_as_rows(q, rows).float(), q.float())


def test_strides_of_one_element_say_nothing() -> None:
    """One sequence or one query: whatever its stride is, the heads alone decide."""
    for shape, strides in (((1, 4, 3, 16), (7, 48, 16, 1)), ((4, 1, 3, 16), (48, 7, 16, 1))):
        q = torch.zeros(4 * 48, dtype=torch.float16).as_strided(shape, strides)
        rows = query_rows(q)
        assert rows is not None
        assert rows.rows == 12
        assert {rows.of_batch, rows.of_query} == {0, 3}


def test_more_rows_than_a_coordinate_holds_are_refused() -> None:
    """2^31 rows and more, told by the strides alone."""
    for queries, taken in ((2**27 - 1, True), (2**27, False)):
        q = torch.empty(1, queries, 16, 16, dtype=torch.float16, device="meta")
        with mock.patch.object(torch.Tensor, "data_ptr", return_value=0):
            assert (query_rows(q) is not None) == taken


@pytest.mark.parametrize(("dim", "copied"), [(24, True), (20, False), (12, False)])
def test_queries_that_cannot_be_copied_once_widened_are_loaded(dim: int, copied: bool) -> None:
    """Parts of wider rows of float8 begin at 16 bytes; widened they lie side by side, and only some dims leave that."""
    q = torch.zeros(1, 64, 4, 32).to(FP8)[..., :dim]
    assert query_rows(q) is not None
    k, end = torch.zeros(1, 4096, dim).to(FP8), torch.full((1, 64), 4096, dtype=torch.int32)
    with (
        mock.patch.object(gpu, "is_hopper", return_value=True),
        mock.patch.object(gpu, "launch", return_value=None) as to,
    ):
        launch.indexer_topk_triton(
            q, k, torch.ones(1, 64, 4), 256, Budget(64, 8), Visibility(window_end=end), None, None, False, False
        )
    names = {call.args[0].__name__ for call in to.call_args_list}
    assert "refine_by_block_hopper_kernel" in names
    assert ("coarse_hopper_kernel" in names) == copied
    assert ("coarse_kernel" in names) != copied


@pytest.mark.skipif(not RUNS, reason="needs a GPU, or a process started with TRITON_INTERPRET=1")
@pytest.mark.parametrize("how", ["pruned", "probe", "every block kept"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8] if ON_GPU else [torch.float16], ids=str)
def test_the_layout_of_the_queries_changes_no_bit(dtype: torch.dtype, how: str) -> None:
    """Copied by sm_90's kernel or loaded by the other: what a contiguous q gives."""
    batch, queries, tokens, heads, dim, size = (2, 40, 2500, 24, 80, 128) if ON_GPU else (2, 2, 40, 3, 16, 16)
    topk, block_topk = (300, 8) if ON_GPU else (7, 2)
    kept = -(-tokens // size) if how == "every block kept" else block_topk
    budget = {"topk": topk, "block_size": size, "block_topk": kept}
    case = gaussian_case(batch, queries, tokens, heads, dim, dtype, **budget)
    case["coarse"] = "probe" if how == "probe" else "paper"
    case["window_end"] = torch.randint(tokens // 3, tokens + 1, (batch, queries), device=DEVICE).int()
    with nullcontext() if ON_GPU else small_tiles(), mock.patch.object(config, "FEW_PAIRS", 0):
        # The interpreter takes its time, and knows the one kernel alone.
        for layout in LAYOUTS if ON_GPU else ("heads first", "part of everything", "one sequence for all"):
            q = laid_out(case["q"], layout)
            with launched() as kernels:
                got = run(case, q=q)
            if gpu.is_hopper(q):
                assert (refine_by_block_hopper_kernel in kernels) == LAYOUTS[layout][1], layout
            assert_equal(got, run(case, q=q.contiguous()))
