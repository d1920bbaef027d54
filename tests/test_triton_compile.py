"""Every kernel compiles ahead of time, for every dtype and GPU architecture, on a machine without a GPU.

The launches of a real call are recorded and compiled as they would be launched, so what is compiled here is what
runs.  Under the interpreter kernels are plain Python functions, so these tests need a process without it.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from ahead_of_time import TARGETS, Recorded, compile_launch, record, resources  # noqa: E402

from hisa_compile.ops import Budget  # noqa: E402
from hisa_compile.ops.triton import configurations, gpu, launch  # noqa: E402
from hisa_compile.ops.triton.operands import FP8_BITS, FP8_NATIVE, FP8_NONE  # noqa: E402
from hisa_compile.ops.triton.overlap import AFTER, AHEAD, APART, BESIDE  # noqa: E402

pytestmark = [
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="compiles: needs TRITON_INTERPRET unset"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
# bfloat16 stands for both dtypes of 16 bits where the paper's stage and the probe have compiled for each.
ONE_OF_16_BITS = [pytest.param(d, marks=pytest.mark.slow) if d == torch.float16 else d for d in DTYPES]
# Of programmatic dependent launches: the wait for the kernel before, and what lets the next one in.
WAIT, LET_IN = "griddepcontrol.wait", "griddepcontrol.launch_dependents"


def check(launches: list[Recorded], arch: str) -> None:
    """All fit shared memory, and none rounds float32 to what tensor cores take of it (tf32; xf32 on AMD's GPUs)."""
    assert launches
    for recorded in launches:
        compiled = compile_launch(recorded, arch)
        assert compiled.metadata.shared <= TARGETS[arch][1], recorded[0].__name__
        code = compiled.asm["ptx" if arch.startswith("sm") else "amdgcn"]
        assert re.search(r"[tx]f32\b", code) is None, recorded[0].__name__


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_compiles_at_the_papers_sizes(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, arch: str
) -> None:
    """H = 64, D = 128, topk = 2048, B = 128, m = 64, a query and many, within the architecture's shared memory."""
    one, many = record(monkeypatch, dtype, arch), record(monkeypatch, dtype, arch, queries=1024)
    # The refinement for sm_90 keeps blocks itself.
    assert len(one) == 7 - (arch == "sm_90" and dtype != torch.float32)
    # Queries in float8 are widened for the coarse kernel of sm_90.
    widened = arch == "sm_90" and dtype == torch.float8_e4m3fn
    assert len(many) == (7 if dtype == torch.float32 else 8 + widened)
    # With nearly as many to select as there are candidates a kernel of its own fills rows up.
    filled = record(monkeypatch, dtype, arch, topk=8000)
    assert len(filled) == 8
    assert filled[5][0] is launch.fill_kernel
    # As few entries as one tile has are sorted by another kernel.
    few = record(monkeypatch, dtype, arch, topk=512)
    assert few[-1][0] is launch.sort_kernel
    known = {kernel for kernel, *_ in one}
    check([*one, filled[5], few[-1]] + [recorded for recorded in many if recorded[0] not in known], arch)


def test_few_rows_keep_blocks_in_the_refinement_where_windows_alone_hide_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is no launch then that selects blocks."""
    tokens = 16384
    hidden = torch.ones(1, 1, tokens, dtype=torch.bool)
    segments = torch.zeros(1, tokens, dtype=torch.int64)

    def separate(dtype: torch.dtype = torch.bfloat16, arch: str = "sm_90", **options: Any) -> bool:
        launched = [recorded[0].__name__ for recorded in record(monkeypatch, dtype, arch, sorted=False, **options)]
        return "select_blocks_kernel" in launched

    for kept in ({}, {"queries": 15}, {"tokens": 2048 * 128}, {"coarse": "probe"}, {"heads": 256}):
        assert not separate(**kept)
    others: list[dict[str, Any]] = [
        {"queries": 16},
        {"tokens": 2048 * 128 + 1},
        {"topk": 8000},
        {"dtype": torch.float32},
    ]
    others += [{"arch": "sm_80"}, {"arch": "sm_100"}, {"budget": Budget(48, 64)}]
    others += [{"optional": {"mask": hidden}}, {"optional": {"key_valid": hidden[0]}}]
    others += [{"optional": {"q_segment": segments[:, :1], "k_segment": segments}}]
    for other in others:
        assert separate(**other), other


@pytest.mark.parametrize(("queries", "groups"), [(1, 128), (4, 64), (8, 32), (10, 32), (15, 32)])
def test_programs_by_row_have_several_tiles_before_there_are_many(
    monkeypatch: pytest.MonkeyPatch, queries: int, groups: int
) -> None:
    """Of 128 tiles a row: 256 programs at first, then as many as have four tiles each, no more than 512."""
    launches = record(monkeypatch, torch.bfloat16, "sm_90", queries=queries)
    (found,) = [arguments for kernel, _, arguments in launches if kernel.__name__ == "refine_by_row_hopper_kernel"]
    assert found["groups"] == groups


@pytest.mark.parametrize("arch", TARGETS)
def test_pairs_are_sorted_where_there_are_too_many_blocks(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    kernels = {}
    for tokens in (2**17, 2**18):
        launches = record(monkeypatch, torch.bfloat16, arch, queries=1024, tokens=tokens)
        kernels[tokens] = {recorded[0].__name__: recorded for recorded in launches}
    assert kernels[2**18].keys() - kernels[2**17].keys() == {"sort_pairs_kernel"}
    check([kernels[2**18][name] for name in ("select_blocks_kernel", "sort_pairs_kernel")], arch)


@pytest.mark.parametrize(("arch", "queries"), [("sm_90", 1), ("sm_90", 1024), ("sm_80", 1), ("gfx942", 1)])
def test_kernels_wait_and_those_that_run_at_once_let_the_next_one_in(
    monkeypatch: pytest.MonkeyPatch, arch: str, queries: int
) -> None:
    """Nothing is before the wait but what tells threads apart, and the next kernel is let in behind it alone."""
    for recorded in record(monkeypatch, torch.bfloat16, arch, queries=queries, tokens=65536):
        asm = compile_launch(recorded, arch).asm
        name, overlap = recorded[0].__name__, recorded[2]["OVERLAP"]
        assert (overlap != APART.value) == (arch == "sm_90")
        if arch != "sm_90":
            assert WAIT not in asm.get("ptx", "")
            continue
        before, behind = asm["ptx"].split(WAIT)
        assert LET_IN not in before, name
        assert behind.count(LET_IN) == (overlap >= AFTER.value), name
        # The number of programs tells, where it is not known that the next one needs nothing of this one.
        assert (re.search(r"setp\.\w+\.\w+\s+%\w+, %\w+, 26[45];", behind) is not None) == (overlap == AFTER.value), (
            name
        )
        for access in ("ld.global", "st.global", "cp.async", "atom.", "red."):
            assert access not in before, name


@pytest.mark.parametrize("pooled", [False, True])
def test_queries_are_widened_beside_the_pooling_of_their_own_call(
    monkeypatch: pytest.MonkeyPatch, pooled: bool
) -> None:
    """Where the call begins with them what is before it is unknown, and they wait for it as all others do."""
    k_pooled = torch.zeros(1, 512, 128, dtype=torch.bfloat16) if pooled else None
    launches = record(
        monkeypatch, torch.float8_e4m3fn, "sm_90", queries=1024, tokens=65536, k_pooled=k_pooled, sorted=False
    )
    names = [recorded[0].__name__ for recorded in launches]
    at = names.index("widen_queries_kernel")
    assert ("pool_kernel" in names[:at]) != pooled
    assert launches[at][2]["OVERLAP"] == (AFTER.value if pooled else AHEAD.value)
    before, behind = compile_launch(launches[at], "sm_90").asm["ptx"].split(WAIT)
    for access in ("ld.global.cg", "st.global"):
        assert access in (behind if pooled else before)
        assert access not in (before if pooled else behind)
    if not pooled:
        assert names[:at] == ["pool_kernel"]
        assert launches[0][2]["OVERLAP"] == BESIDE.value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_compiles_with_all_optional_tensors_and_awkward_sizes(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Head counts and dims that are no powers of two, the largest allowed ones, a budget of odd block size."""
    check(record(monkeypatch, dtype, "sm_90", heads=128, dim=256, everything=True), "sm_90")
    odd = record(monkeypatch, dtype, "sm_90", heads=5, dim=200, topk=30, budget=Budget(7, 5), everything=True)
    assert "sort_kernel" in {kernel.__name__ for kernel, *_ in odd}
    check(odd, "sm_90")
    many = record(monkeypatch, dtype, "sm_90", heads=24, dim=16, queries=1024, everything=True)
    by_block = [recorded for recorded in many if "by_block" in recorded[0].__name__]
    assert len(by_block) == 1
    check(by_block, "sm_90")


@pytest.mark.parametrize("coarse", ["paper", "probe"])
@pytest.mark.parametrize("queries", [1, 1024])
def test_float32_stays_float32_where_flags_hide_tokens(
    monkeypatch: pytest.MonkeyPatch, queries: int, coarse: str
) -> None:
    """Triton looks for loads of fewer bits behind an operand, and finds those of the flags, which are bytes."""
    flags: dict[str, Any] = {"everything": True, "queries": queries, "coarse": coarse, "topk": 8000}
    launches = record(monkeypatch, torch.float32, "sm_100", **flags)
    assert "fill_kernel" in {kernel.__name__ for kernel, *_ in launches}
    check(launches, "sm_100")


PROBE = {"two_heads_kernel", "probe_sample_kernel", "threshold_kernel"}
PROBE |= {"probe_blocks_kernel", "probe_blocks_hopper_kernel"}
# What differs with two levels.
LEVELS = {"coarse_kernel", "coarse_hopper_kernel", "select_blocks_kernel", "list_outer_kernel"}
LEVELS |= {"probe_blocks_kernel", "probe_blocks_hopper_kernel"}


def check_probe(launches: list[Recorded], arch: str, names: set[str] = PROBE, count: int = 4) -> set[str]:
    of_probe = [recorded for recorded in launches if recorded[0].__name__ in names]
    assert len(of_probe) == count
    check(of_probe, arch)
    return {kernel.__name__ for kernel, *_ in of_probe}


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_probe_compiles(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, arch: str) -> None:
    """No means are made; sm_90 has a version of its own where windows alone say what is visible."""
    launches = record(monkeypatch, dtype, arch, queries=1024, coarse="probe")
    assert not {"pool_kernel", "coarse_kernel", "coarse_hopper_kernel"} & {kernel.__name__ for kernel, *_ in launches}
    hopper = "probe_blocks_hopper_kernel" in check_probe(launches, arch)
    assert hopper == (arch == "sm_90" and dtype != torch.float32)


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", ONE_OF_16_BITS, ids=str)
def test_spreads_compile(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, arch: str) -> None:
    """Two vectors of a block fit shared memory everywhere; no version for sm_90 has them."""
    launches = record(monkeypatch, dtype, arch, queries=1024, coarse="spread")
    launches += record(monkeypatch, dtype, arch, dim=200, heads=5, coarse="spread", everything=True)
    assert "coarse_hopper_kernel" not in {kernel.__name__ for kernel, *_ in launches}
    for kernel, switch in (("pool_kernel", "SPREAD_FACTOR"), ("coarse_kernel", "SPREAD")):
        of_blocks = [recorded for recorded in launches if recorded[0].__name__ == kernel]
        assert len(of_blocks) == 2
        assert all(arguments[switch] for *_, arguments in of_blocks)
        check(of_blocks, arch)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooling_keeps_its_keys_in_registers(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block_size: int
) -> None:
    """On a stack of 2 KiB a thread, as one way to unroll its loop had it, it takes twenty times as long."""
    budget = Budget(block_size, 2048 // block_size)
    launches = record(monkeypatch, dtype, "sm_90", coarse="spread", topk=512, budget=budget)
    (pooling,) = (recorded for recorded in launches if recorded[0].__name__ == "pool_kernel")
    assert resources(compile_launch(pooling, "sm_90")).stack == 0


@pytest.mark.parametrize("dtype", ONE_OF_16_BITS, ids=str)
def test_the_probe_compiles_with_all_optional_tensors_and_awkward_sizes(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Several blocks in a tile, or a part of one, sizes that are no power of two, and a D of several parts."""
    awkward: dict[str, Any] = {"heads": 5, "everything": True, "coarse": "probe", "topk": 300}
    check_probe(record(monkeypatch, dtype, "sm_90", dim=200, budget=Budget(13, 30), **awkward), "sm_120")
    check_probe(record(monkeypatch, dtype, "sm_90", dim=24, budget=Budget(300, 4), **awkward), "sm_120")


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", ONE_OF_16_BITS, ids=str)
def test_two_levels_compile(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, arch: str) -> None:
    """With flags and lists of outer blocks, that are blocks and that hold four; the outer selection lists no pairs."""
    for size, names_of, count in ((128, LEVELS, 5), (32, LEVELS - {"select_blocks_kernel"}, 3)):
        sizes: dict[str, Any] = {"queries": 1024, "tokens": 65536, "budget": Budget(size, 8192 // size)}
        launches = record(monkeypatch, dtype, arch, coarse="two-level", **sizes)
        names = check_probe(launches, arch, names_of, count)
        on_hopper = arch == "sm_90" and dtype != torch.float32
        assert ("probe_blocks_hopper_kernel" in names) == on_hopper
        assert ("coarse_hopper_kernel" in names) == on_hopper
        outer, inner = (args for kernel, _, args in launches if kernel.__name__ == "select_blocks_kernel")
        assert (outer["BLOCK_SIZE"], outer["block_topk"], outer["M"]) == (128, 256, 512)
        assert {outer[name] for name in ("kept_ptr", "counts_ptr", "rank_ptr", "pairs_ptr")} == {None}
        assert (inner["BLOCK_SIZE"], inner["block_topk"], inner["M"]) == (size, 8192 // size, 65536 // size)


@pytest.mark.parametrize("dtype", ONE_OF_16_BITS, ids=str)
def test_two_levels_compile_with_all_optional_tensors_and_awkward_sizes(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Outer blocks that are no whole number of tiles, a D of several parts, blocks of one token."""
    awkward: dict[str, Any] = {"heads": 5, "everything": True, "coarse": "two-level", "topk": 300, "tokens": 60000}
    check_probe(record(monkeypatch, dtype, "sm_90", dim=200, budget=Budget(13, 30), **awkward), "sm_120", LEVELS, 5)
    check_probe(record(monkeypatch, dtype, "sm_90", dim=24, budget=Budget(300, 4), **awkward), "sm_120", LEVELS, 5)
    check_probe(record(monkeypatch, dtype, "sm_90", dim=24, budget=Budget(1, 300), **awkward), "sm_120", LEVELS, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_layout_of_a_mask_does_not_decide_how_the_probe_adds_up(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Of one query an expanded mask has other strides than of many; the bits of a block's score must not."""

    def sums(mask: Tensor) -> list[str]:
        launches = record(monkeypatch, dtype, "sm_90", queries=1024, coarse="probe", optional={"mask": mask})
        (found,) = (recorded for recorded in launches if recorded[0].__name__ == "probe_blocks_kernel")
        code = compile_launch(found, "sm_90").asm["ttgir"]
        layouts = dict(re.findall(r"^(#\w+) = (#ttg.*)$", code, re.MULTILINE))
        added = re.findall(r"\}\) : \(tensor<[\dx]+xf32, (#\w+)>\) -> tensor", code)
        assert added
        return [layouts[name] for name in added]

    wide = torch.ones(1, 1024, 16385, dtype=torch.bool)
    assert sums(wide[:, :, :16384]) == sums(wide[:, :1, :16384].expand(1, 1024, 16384)) == sums(wide[:, :, 1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_two_heads_are_added_up_in_the_order_of_the_heads(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """A reduction would have the order of a layout, which follows the alignment of q: one of maxima may."""
    launches = record(monkeypatch, dtype, "sm_90", queries=1024, coarse="probe")
    (found,) = (recorded for recorded in launches if recorded[0].__name__ == "two_heads_kernel")
    code = compile_launch(found, "sm_90").asm["ttgir"]
    reductions = re.findall(r'"tt\.reduce".*?tt\.reduce\.return', code, re.DOTALL)
    assert reductions
    assert not any("addf" in each for each in reductions)


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_the_threshold_is_looked_for_in_a_loop(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    """Triton once optimised it away, where it ended when enough was found."""
    launches = record(monkeypatch, torch.bfloat16, arch, coarse="probe")
    (found,) = (recorded for recorded in launches if recorded[0].__name__ == "threshold_kernel")
    assert "scf.for" in compile_launch(found, arch).asm["ttgir"]


LOADS = {"pool_kernel", "coarse_kernel", "refine_by_row_kernel", "refine_by_block_hopper_kernel", "fill_kernel"}


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("holes", [False, True])
def test_segments_and_weights_without_a_mask_compile(monkeypatch: pytest.MonkeyPatch, holes: bool, arch: str) -> None:
    """Blocks looked into where that is needed, with and without the table of valid keys, ids of both widths."""
    ids = torch.zeros(1, 16384, dtype=torch.int32 if holes else torch.int64)
    optional: dict[str, Tensor] = {"q_segment": ids[:, :1], "k_segment": ids, "k_weight": torch.ones(1, 16384)}
    if holes:
        optional |= {"key_valid": torch.ones(1, 16384, dtype=torch.bool), "k_scale": torch.ones(1, 16384)}
    launches = record(monkeypatch, torch.bfloat16, arch, optional=optional)
    launches += record(monkeypatch, torch.bfloat16, arch, optional=optional, queries=1024)[-5:]
    check([recorded for recorded in launches if recorded[0].__name__ in LOADS | {"refine_by_block_kernel"}], arch)


def test_tensors_that_are_not_given_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each given tensor adds loads to the kernels that use it; absent ones leave nothing but unused arguments."""

    def loads(**optional: Tensor) -> dict[str, int]:
        launches = []
        # Of six heads nothing is copied by the accelerator; what the others launch too is theirs.
        for sizes in ({"heads": 6}, {}, {"queries": 1024}):
            many: dict[str, Any] = sizes | {"topk": 8100}
            launches += record(monkeypatch, torch.bfloat16, "sm_90", optional=optional, sorted=False, **many)
        compiled = {kernel.__name__: compile_launch((kernel, *rest), "sm_90").asm for kernel, *rest in launches}
        code = {name: asm.get("ttir", asm["ttgir"]) for name, asm in compiled.items()}
        if not optional:
            assert not any("!tt.ptr<i64>" in ir for ir in code.values())
        return {name: ir.count("tt.load") for name, ir in code.items()}

    ids = torch.zeros(1, 16384, dtype=torch.int64)
    plain = loads()
    with_segments = loads(q_segment=ids[:, :1], k_segment=ids)
    with_weight = loads(k_weight=torch.ones(1, 16384))
    # With segments other kernels do the coarse stage of sm_90, and the refinement by row.
    assert plain.keys() - with_segments.keys() == {"coarse_hopper_kernel", "refine_by_row_hopper_kernel"}
    assert {name for name in with_segments if with_segments[name] > plain[name]} == LOADS
    more = {name for name in plain if with_weight[name] > plain[name]}
    assert more == LOADS - {"coarse_kernel"} | {"refine_by_row_hopper_kernel"}


def sum_layout(compiled: Any) -> str:
    """The layout in which heads are summed: which thread has which."""
    code = compiled.asm["ttgir"]
    (operand,) = set(re.findall(r"\}\) : \(tensor<\d+x\d+xf32, (#\w+)>\) -> tensor<\d+xf32", code))
    return re.search(rf"^{operand} = (.*)$", code, re.MULTILINE).group(1)


@pytest.mark.parametrize(
    ("heads", "block_size"), [(64, 64), (32, 64), (16, 128), (32, 128), (64, 128), (128, 64), (128, 128)]
)
@pytest.mark.parametrize(
    ("dtype", "arch"),
    [(torch.bfloat16, arch) for arch in ("sm_80", "sm_90", "sm_100", "gfx942")] + [(torch.float8_e4m3fn, "sm_90")],
    ids=str,
)
def test_every_kernel_sums_heads_in_the_same_order(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, heads: int, block_size: int, arch: str
) -> None:
    """By row, by block and in the fill, so that no slicing of the queries changes a score's bits."""
    budget = Budget(block_size, 8192 // block_size)
    layouts: dict[str, str] = {}
    for queries in (1, 1024):
        # With so many to select a row may have to be filled up.
        for kernel, *rest in record(monkeypatch, dtype, arch, heads=heads, budget=budget, queries=queries, topk=8100):
            if kernel.__name__.startswith(("refine", "fill")):
                layouts[kernel.__name__] = sum_layout(compile_launch((kernel, *rest), arch))
    assert len(layouts) == 3
    assert len(set(layouts.values())) == 1, layouts


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_no_launch_configuration_changes_the_order_of_the_sum(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    """What the table of configurations may say of kernels that score, at its ends."""
    layouts: set[str] = set()
    for stages, maxnreg, most_rows in ((2, None, 8), (4, 168, 64)):
        row = configurations.Configuration(stages=stages, maxnreg=maxnreg, most_rows=most_rows, programs=512)
        rows = {configurations.Shape(name): row for name in configurations.FIELDS if name not in configurations.WIDE}
        monkeypatch.setitem(configurations.TABLE, TARGETS[arch][0].arch, rows)
        for queries in (1, 1024):
            for kernel, *rest in record(monkeypatch, torch.bfloat16, arch, queries=queries, topk=8100):
                if kernel.__name__.startswith(("coarse", "refine", "fill")):
                    assert rest[0].stages == (1 if kernel.__name__ == "fill_kernel" else stages)
                    layouts.add(sum_layout(compile_launch((kernel, *rest), arch)))
    assert len(layouts) == 1


def test_small_blocks_go_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of another size would sum heads in another order."""
    for block_size in (16, 32, 96, 192):
        launches = record(
            monkeypatch, torch.bfloat16, "sm_90", budget=Budget(block_size, -(-2048 // block_size)), queries=1024
        )
        names = [kernel.__name__ for kernel, *_ in launches]
        # Blocks that fill a tile together are copied by the accelerator.
        expected = {192: "refine_by_block_hopper_kernel", 96: "refine_by_row_kernel"}
        assert expected.get(block_size, "refine_by_row_hopper_kernel") in names


def test_many_long_rows_are_selected_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 4097 columns on, of more than 264 rows; elsewhere, or where four neighbours may be of two blocks, not."""
    shared = "select_shared_hopper_kernel"

    def selection(**given: Any) -> list[str]:
        arch = given.pop("arch", "sm_90")
        launches = record(monkeypatch, torch.float8_e4m3fn, arch, **({"queries": 265, "sorted": False} | given))
        selections = [recorded for recorded in launches if recorded[0].__name__.startswith("select_")][-1:]
        check(selections, arch)
        return [recorded[0].__name__ for recorded in selections]

    for budget in (Budget(128, 64), Budget(128, 128), Budget(16, 257)):
        assert selection(budget=budget) == [shared]
    assert selection(budget=Budget(128, 256), tokens=9000, sorted=True) == [shared]
    assert selection(queries=264) == selection(budget=Budget(128, 32)) == ["select_tokens_hopper_kernel"]
    assert selection(arch="sm_100") == selection(budget=Budget(26, 256)) == ["select_tokens_kernel"]


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize(("heads", "dim"), [(64, 128), (24, 80), (128, 16), (256, 128)])
@pytest.mark.parametrize("dtype", ONE_OF_16_BITS[1:], ids=str)
def test_small_blocks_and_few_rows_compile_for_sm_90(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, heads: int, dim: int, factors: bool
) -> None:
    optional = {"k_scale": torch.ones(1, 16384), "k_weight": torch.ones(1, 16384)} if factors else None
    for block_size, queries in ((16, 1024), (32, 1024), (128, 1), (256, 1)):
        launches = record(
            monkeypatch, dtype, "sm_90", heads=heads, dim=dim, budget=Budget(block_size, 2048 // block_size),
            queries=queries, optional=optional,
        )  # fmt: skip
        by_row = [recorded for recorded in launches if "by_row" in recorded[0].__name__]
        # In chunks, perhaps, which are alike.
        assert {recorded[0].__name__ for recorded in by_row} == {"refine_by_row_hopper_kernel"}
        check(by_row[:1], "sm_90")


def test_small_blocks_with_more_than_windows_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or with rows that copies do not take; the means of a few rows are loaded, too."""

    def names(**sizes: Any) -> set[str]:
        launches = record(monkeypatch, torch.bfloat16, "sm_90", budget=Budget(32, 64), **{"queries": 1024} | sizes)
        return {recorded[0].__name__ for recorded in launches}

    assert {"refine_by_row_hopper_kernel", "coarse_hopper_kernel"} <= names()
    assert {"refine_by_row_hopper_kernel", "coarse_kernel"} <= names(queries=15)
    assert {"refine_by_row_kernel", "coarse_kernel"} <= names(everything=True)
    assert {"refine_by_row_kernel", "coarse_kernel"} <= names(dim=100)


@pytest.mark.parametrize("arch", TARGETS)
def test_long_rows_compile(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    """More entries than one program sorts, more candidates than one holds, every block kept."""
    budget = Budget(128, 256)
    launches = record(monkeypatch, torch.bfloat16, arch, topk=5000, tokens=32768, budget=budget, mark_hidden=True)
    names = [recorded[0].__name__ for recorded in launches]
    long_rows = ["guess_key_kernel", "list_candidates_kernel", "select_tokens_kernel"]
    assert names == ["refine_by_row_kernel", *long_rows, "sort_tiles_kernel", "merge_tiles_kernel"]
    check(launches, arch)


@pytest.mark.parametrize(("capability", "mode"), [((8, 0), FP8_BITS), ((8, 9), FP8_NATIVE), ((9, 0), FP8_NATIVE)])
def test_float8_is_taken_apart_where_the_hardware_has_no_such_type(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], mode: Any
) -> None:
    """The choice is made on the host, by dtype and device alone; the CPU's is the interpreter's."""
    assert gpu.fp8_mode(torch.zeros(1)) == int(FP8_NONE)
    assert gpu.fp8_mode(torch.zeros(1).to(torch.float8_e4m3fn)) == int(FP8_BITS)
    on_gpu = SimpleNamespace(dtype=torch.float8_e4m3fn, is_cuda=True, device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert gpu.fp8_mode(on_gpu) == int(mode)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert gpu.fp8_mode(on_gpu) == int(FP8_BITS)
