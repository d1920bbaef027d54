"""The exact selection among rank keys, kernel code by itself: a row of any keys, against a stable sort.

The rows of whole calls rarely have keys at the ends of the integers, thousands of equal ones or one visible; and small
tiles, as the tests of whole calls take them, are one run of columns where real ones are many.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton_cases import DEVICE, RUNS  # noqa: E402

from hisa_compile.ops.triton.keys import HIDDEN_KEY, NAN_KEY  # noqa: E402
from hisa_compile.ops.triton.kth import (  # noqa: E402
    count_taken,
    kth_key,
    kth_key_in_memory,
    load_tile_keys,
    one_of,
    store_selected,
    tile_columns,
)

pytestmark = pytest.mark.skipif(not RUNS, reason="needs a GPU, or a process started with TRITON_INTERPRET=1")

HIDDEN, NAN = int(HIDDEN_KEY.value), int(NAN_KEY.value)
TILES = (16, 64, 128, 256, 512, 1024, 8192, 16384)


@triton.jit(do_not_specialize=["K"])
def select_kernel(keys_ptr, columns_ptr, count_ptr, K, TILE: tl.constexpr):
    keys = tl.load(keys_ptr + tile_columns(0, TILE))
    one = one_of(K)
    threshold, ties, count = kth_key(keys, K, one)
    store_selected(columns_ptr, 0, keys, threshold, ties, one, TILE)
    tl.store(count_ptr, count)


@triton.jit(do_not_specialize=["K", "past"])
def select_in_tiles_kernel(keys_ptr, columns_ptr, count_ptr, K, past, TILE: tl.constexpr):
    one = one_of(K)
    threshold, ties, _ = kth_key_in_memory(K + past * 0, keys_ptr, past * 0, past, -1, -1, one, TILE)
    count = past * 0
    for base in range(0, past, TILE):
        keys = load_tile_keys(keys_ptr, base, past * 0, past, TILE)
        store_selected(columns_ptr + count, base, keys, threshold, ties, one, TILE)
        taken, ties = count_taken(keys, threshold, ties, one)
        count += taken
    tl.store(count_ptr, count)


def turned(bits: Tensor) -> Tensor:
    """Bits of scores to rank keys, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def selected(keys: Tensor, k: int, tile: int | None = None) -> Tensor:
    """The columns that a kernel writes, in tiles or with all keys in registers; it writes nothing else."""
    columns = torch.full([keys.numel() + 1], -7, dtype=torch.int32, device=DEVICE)
    count = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    if tile is None:
        select_kernel[(1,)](keys.to(DEVICE), columns, count, k, keys.numel())
    else:
        # A whole tile is read.
        padded = torch.full([-(-keys.numel() // tile) * tile], HIDDEN, dtype=torch.int32)
        padded[: keys.numel()] = keys
        select_in_tiles_kernel[(1,)](turned(padded).to(DEVICE), columns, count, k, keys.numel(), tile)
    found = int(count)
    assert (columns[found:] == -7).all()
    return columns[:found].cpu()


def wanted(keys: Tensor, k: int) -> Tensor:
    """The greatest keys, of equal ones the first columns; hidden ones never.  Ascending."""
    order = keys.long().argsort(descending=True, stable=True)
    order = order[keys[order] != HIDDEN]
    return order[:k].sort().values.int()


def gaussian(size: int, generator: torch.Generator) -> Tensor:
    return turned(torch.randn(size, generator=generator).view(torch.int32))


def of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


KINDS = {
    "gaussian": gaussian,
    "whole range": lambda size, g: torch.randint(-(2**31), 2**31, [size], generator=g).int(),
    "few values": lambda size, g: of(-5, 0, 7, NAN)[torch.randint(0, 4, [size], generator=g)],
    "ends": lambda size, g: of(HIDDEN + 1, NAN, NAN - 1, -1, 0)[torch.randint(0, 5, [size], generator=g)],
    "all equal": lambda size, g: of(12345).repeat(size),
    "all NaN": lambda size, g: of(NAN).repeat(size),
    "an outlier": lambda size, g: torch.cat([of(NAN - 1), gaussian(size - 1, g) // 2**20]),
    "rising": lambda size, g: torch.arange(size, dtype=torch.int32) - size // 2,
}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    tile=st.sampled_from(TILES),
    share=st.floats(0.0, 1.2),
    visible=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_the_best_keys_are_selected_first_columns_first(
    kind: str, tile: int, share: float, visible: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = KINDS[kind](tile, generator)
    hidden = torch.rand(tile, generator=generator) >= visible
    keys = torch.where(hidden, HIDDEN, keys)
    k = max(1, int(share * tile))
    assert torch.equal(selected(keys, k), wanted(keys, k))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    size=st.integers(1, 2000),
    tile=st.sampled_from([16, 128, 512]),
    share=st.floats(0.0, 1.2),
    visible=st.sampled_from([0.01, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_tiles_that_are_read_again_give_the_same(
    kind: str, size: int, tile: int, share: float, visible: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.where(torch.rand(size, generator=generator) >= visible, HIDDEN, KINDS[kind](size, generator))
    k = max(1, int(share * size))
    assert torch.equal(selected(keys, k, tile), wanted(keys, k))


@pytest.mark.parametrize("tile", TILES)
def test_one_visible_key_among_hidden_ones(tile: int) -> None:
    for column in (0, tile // 2, tile - 1):
        for key in (HIDDEN + 1, 0, NAN):
            keys = torch.full([tile], HIDDEN, dtype=torch.int32)
            keys[column] = key
            for k in (1, tile):
                assert selected(keys, k).tolist() == [column]
