"""Equal shares of pairs, kernel code by itself: each pair is gone over once, and beside its own block.

Whole calls have lists of similar lengths; here there are empty and huge ones, and shares that begin anywhere.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton_cases import DEVICE, RUNS  # noqa: E402

from hisa_compile.ops.triton.group import list_runs_kernel, rows_of_run, runs_of_program  # noqa: E402

pytestmark = pytest.mark.skipif(not RUNS, reason="needs a GPU, or a process started with TRITON_INTERPRET=1")

BLOCK_SIZE = 16


@triton.jit(do_not_specialize=["shares", "least", "M", "room", "run_cost", "places"])
def walk_kernel(
    lists_ptr, first_list_ptr, totals_ptr, gone_ptr, token_ptr, taken_ptr, shares, least, M, room, run_cost, places,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What the refinement goes over: how often each place, of which token of which sequence, how many a program."""
    low, high, inside, first_run, past = runs_of_program(
        lists_ptr, first_list_ptr, totals_ptr, shares, least, 1, 1, M * BLOCK_SIZE, BLOCK_SIZE, TILE
    )
    taken = 0
    for run in range(first_run, past):
        batch, token, first, last = rows_of_run(
            lists_ptr, run, low, high, inside, M * BLOCK_SIZE, M, room, run_cost, BLOCK_SIZE, TILE
        )
        tile = inside // TILE
        for place in range(first, last):
            tl.atomic_add(gone_ptr + tile * places + place, 1)
            tl.store(token_ptr + tile * places + place, batch * M * BLOCK_SIZE + token)
            taken += 1
    tl.store(taken_ptr + tl.program_id(0), taken)


COUNTS = st.lists(st.one_of(st.just(0), st.integers(0, 9), st.integers(0, 60)), min_size=1, max_size=40)


@settings(max_examples=60 if DEVICE == "cpu" else 300, deadline=None)
@given(
    COUNTS, st.integers(1, 9), st.integers(1, 5), st.sampled_from([0, 1, 2, 5]), st.sampled_from([1, 3]),
    st.booleans(), st.sampled_from([1, 3, 40]), st.sampled_from([1, 2]),
)  # fmt: skip
def test_each_pair_is_gone_over_once(
    counts: list[int], shares: int, least: int, run_cost: int, apart: int, roomy: bool, blocks: int, parts: int
) -> None:
    lists, total, some = len(counts), sum(counts), sum(count > 0 for count in counts)

    def memory(*shape: int) -> torch.Tensor:
        return torch.full(shape, -(10**6), dtype=torch.int32, device=DEVICE)

    given_counts = memory(lists, apart)
    given_counts[:, 0] = torch.tensor(counts)
    offsets, listed, first, totals = memory(lists), memory(lists + 1, 2), memory(shares + 1), memory(2)
    cut = {"shares": shares, "least": least, "run_cost": run_cost}
    list_runs_kernel[(-(-lists // 4),)](
        given_counts, None if roomy else offsets, listed, first, totals, lists, **cut, apart=apart,
        TILE=4, SUM_TILE=8, PARTS=2, OVERLAP=0,
    )  # fmt: skip
    assert totals.tolist() == [total + run_cost * some, some]
    before = torch.tensor([0, *counts]).cumsum(0)[:-1]
    if not roomy:
        assert offsets.tolist() == before.tolist()

    room = max(counts) + 1 if roomy else 0
    places = lists * room if roomy else total
    gone, tokens = torch.zeros(parts, max(places, 1), dtype=torch.int32, device=DEVICE), memory(parts, max(places, 1))
    taken = memory(shares * parts)
    walk_kernel[(shares * parts,)](
        listed, first, totals, gone, tokens, taken, **cut, M=blocks, room=room, places=places,
        BLOCK_SIZE=BLOCK_SIZE, TILE=BLOCK_SIZE // parts,
    )  # fmt: skip
    expected, beside = torch.zeros(max(places, 1), dtype=torch.int32), torch.full((max(places, 1),), -(10**6))
    for number, count in enumerate(counts):
        begin = number * room if roomy else int(before[number])
        expected[begin : begin + count] = 1
        beside[begin : begin + count] = number * BLOCK_SIZE
    for part in range(parts):
        assert gone[part].tolist() == expected.tolist()
        at = torch.where(expected == 1, beside + part * BLOCK_SIZE // parts, beside)
        assert tokens[part].tolist() == at.tolist()
    share = max(least, math.ceil((total + run_cost * some) / shares))
    assert int(taken.max()) <= share
    assert int(taken.sum()) == total * parts
