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
from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton_cases import DEVICE, ON_GPU, RUNS  # noqa: E402

from hisa_compile.ops.triton import config, gpu  # noqa: E402
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
from hisa_compile.ops.triton.overlap import APART  # noqa: E402
from hisa_compile.ops.triton.select import select_blocks_kernel, select_tokens_kernel  # noqa: E402
from hisa_compile.ops.triton.select_hopper import keep_blocks, select_tokens_hopper_kernel  # noqa: E402
from hisa_compile.ops.triton.select_shared_hopper import select_shared_hopper_kernel  # noqa: E402
from hisa_compile.ops.triton.sizes import power_of_2  # noqa: E402

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
    # Scores that are 1.0, -1.0 and the next few to them; and those next to 0.0, most of them subnormal.
    "neighbours": lambda size, g: (
        of(2**30 - 2**23, 2**23 - 2**30 - 1)[torch.randint(0, 2, [size], generator=g)]
        + torch.randint(-3, 4, [size], generator=g).int()
    ),
    "tiny": lambda size, g: torch.randint(-(2**24), 2**24, [size], generator=g).int(),
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


def rows_of_kinds(columns: int, generator: torch.Generator) -> Tensor:
    """A row of each kind, all of it visible, half, and next to nothing; keys that scores have: of NaN there is one."""
    rows = torch.stack([KINDS[kind](columns, generator) for kind in sorted(KINDS)]).repeat(3, 1)
    infinity = 0x7F800000
    rows = torch.where(rows > infinity, NAN, rows).clamp(min=-1 - infinity)
    visible = torch.tensor([1.0, 0.5, 3 / columns]).repeat_interleave(len(KINDS))[:, None]
    return torch.where(torch.rand(rows.shape, generator=generator) < visible, rows, HIDDEN)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU or torch.cuda.get_device_capability()[0] != 9, reason="needs sm_90")
@pytest.mark.parametrize("rows_class", ["select_tokens", "select_few_tokens", "select_shared_hopper"])
@pytest.mark.parametrize("final", [True, False], ids=["final", "to be sorted"])
@pytest.mark.parametrize("block_size", [0, 4, 16, 32, 128, 256])
@pytest.mark.parametrize("columns", [128, 200, 256, 512, 700, 1024, 2048, 4000, 8192, 9000, 16384])
def test_hoppers_selection_writes_the_same(columns: int, block_size: int, final: bool, rows_class: str) -> None:
    """Bit for bit, slot for slot; columns are tokens, or those of kept blocks, of which a row may have few."""
    generator = torch.Generator().manual_seed(columns + block_size)
    kept_blocks = max(1, columns // max(block_size, 1))
    columns = kept_blocks * block_size if block_size else columns
    keys = rows_of_kinds(columns, generator).to(DEVICE)
    rows = len(keys)
    scores = torch.full((rows, columns + 16), -1, dtype=torch.int32, device=DEVICE)
    scores[:, :columns] = turned(keys)
    kept = count = None
    if block_size:
        every = torch.rand(rows, 3 * kept_blocks, generator=generator).argsort(1)
        kept = every[:, :kept_blocks].sort(1).values.int().to(DEVICE)
        count = torch.randint(0, kept_blocks + 1, [rows], generator=generator).int().to(DEVICE)
        count[::2] = kept_blocks
    start, end = torch.randint(0, columns + 1, [2, rows, 1], generator=generator).int().to(DEVICE)
    start[::2], end[::2] = 0, columns
    tile = power_of_2(columns)
    how = config.select_launch(rows_class, columns, 90)
    shared = rows_class == "select_shared_hopper"
    # Of tiles that a call has only on other GPUs, or by other kernels, as many warps as have columns.
    tile = max(tile, 512) if shared else tile
    how = how._replace(num_warps=min(how.num_warps, tile // (512 if shared else 128)))
    of_hopper = select_shared_hopper_kernel if shared else select_tokens_hopper_kernel
    for k in sorted({1, columns // 4, columns}):
        for mark_hidden, counted in ((False, False), (True, False), (False, True)):
            written = []
            for kernel in (select_tokens_kernel, of_hopper):
                indices, out = torch.full((2, rows, k), -7, dtype=torch.int32, device=DEVICE)
                selected_count = torch.full([rows], -7, dtype=torch.int32, device=DEVICE) if counted else None
                work = gpu.strided("start", start, "bs") | gpu.strided("end", end, "bs")
                work |= {"kept_ptr": kept, "kept_count_ptr": count, "token_scores_ptr": scores, "pitch": columns + 16}
                work |= {"indices_ptr": indices, "keys_ptr": out, "selected_count_ptr": selected_count}
                work |= {"candidates_ptr": None, "counts_ptr": None, "segments": 1, "STEP": 1, "K_TILE": 1024}
                work |= {"first_row": 0, "S": 1, "T": 4 * columns, "block_topk": kept_blocks, "K": k}
                work |= {"BLOCK_SIZE": block_size or 16, "TILE": tile, "ONE_TILE": True}
                work |= {"FINAL": final, "MARK_HIDDEN": mark_hidden, "OVERLAP": int(APART)}
                gpu.launch(kernel, rows, how, **gpu.only(work, kernel))
                written.append((indices, out, selected_count))
            for plain, hopper in zip(*written, strict=True):
                assert plain is hopper is None or torch.equal(plain, hopper)


@gluon.jit(do_not_specialize=["pitch", "block_topk"])
def keep_kernel(
    start_ptr, end_ptr, scores_ptr, kept_ptr, count_ptr, read_ptr, pitch, block_topk,
    BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Each row by two programs; read_ptr [2 * rows, block_topk] gets what each of them reads of what was kept."""
    row = gl.program_id(0) // 2
    start, end = gl.load(start_ptr + row), gl.load(end_ptr + row)
    kept_ptr += row * block_topk
    keep_blocks(scores_ptr + row * pitch, kept_ptr, count_ptr + row, start, end, block_topk, BLOCK_SIZE, TILE)
    near = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    for first in range(0, block_topk, 32):
        slot = first + near
        block = gl.load(kept_ptr + slot, mask=slot < block_topk)
        gl.store(read_ptr + gl.program_id(0) * block_topk + slot, block, mask=slot < block_topk)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU or torch.cuda.get_device_capability()[0] != 9, reason="needs sm_90")
@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("block_topk", [2, 3, 64, 200])
@pytest.mark.parametrize("blocks", [4, 200, 512, 700, 1024, 2048])
def test_blocks_are_kept_by_several_programs_as_by_one(blocks: int, block_topk: int, warps: int) -> None:
    """Slot for slot, rows with windows that are whole, cut and empty; hidden and equal keys, one or none eligible."""
    generator = torch.Generator().manual_seed(blocks + block_topk)
    size = 128
    keys = rows_of_kinds(blocks, generator).repeat(3, 1)
    rows = len(keys)
    scores = torch.full((rows, blocks + 16), -1, dtype=torch.int32)
    scores[:, :blocks] = turned(keys)
    start, end = torch.randint(0, blocks * size + 1, [2, rows], generator=generator).int()
    start[:48], end[:48] = 0, blocks * size
    start[1:24:3], end[2:24:3] = 3, blocks * size - 5
    end[-1] = start[-1]
    scores, start, end = scores.to(DEVICE), start.to(DEVICE), end.to(DEVICE)
    kept, again, read = torch.full((4, rows, block_topk), -7, dtype=torch.int32, device=DEVICE).split([1, 1, 2])
    count, count_again = torch.full((2, rows), -7, dtype=torch.int32, device=DEVICE)
    work = gpu.strided("start", start[:, None], "bs") | gpu.strided("end", end[:, None], "bs")
    work |= {"kept_ptr": kept, "kept_count_ptr": count, "block_scores_ptr": scores, "pitch": blocks + 16}
    work |= dict.fromkeys(("kept_flag_ptr", "counts_ptr", "rank_ptr", "pairs_ptr"))
    work |= {"first_row": 0, "rows_per_batch": 1, "S": 1, "T": blocks * size, "M": blocks, "room": 0, "apart": 1}
    work |= {"block_topk": block_topk, "BLOCK_SIZE": size, "TILE": power_of_2(blocks), "ONE_TILE": True}
    work |= {"SLOTS": power_of_2(block_topk), "OVERLAP": int(APART)}
    gpu.launch(select_blocks_kernel, rows, config.select_launch("select_blocks", blocks, 90), **work)
    tile = max(128 * warps, power_of_2(blocks))
    keep_kernel[(2 * rows,)](
        start.long(), end.long(), scores, again, count_again, read, blocks + 16, block_topk, size, tile,
        num_warps=warps,
    )  # fmt: skip
    assert torch.equal(count, count_again)
    assert torch.equal(kept, again)
    assert torch.equal(read.view(rows, 2, block_topk), kept.view(rows, 1, block_topk).expand(rows, 2, block_topk))
    assert int(count[-1]) == 0
    assert int(count.max()) == min(block_topk, blocks)
