"""The table of launch configurations: who gets which row, what a row may say, files of rows, and the script that finds
them."""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

from ahead_of_time import TARGETS  # noqa: E402

from benchmarks import tune  # noqa: E402
from hisa_compile.ops import Budget, Visibility  # noqa: E402
from hisa_compile.ops.coarse import outer_of  # noqa: E402
from hisa_compile.ops.triton import config, configurations, gpu, launch  # noqa: E402
from hisa_compile.ops.triton.configurations import (  # noqa: E402
    DEFAULT,
    FIELDS,
    TABLE,
    WIDE,
    WIDTHS,
    Configuration,
    Shape,
    lookup,
)
from hisa_compile.ops.triton.plan import Plan, chunks_of_rows  # noqa: E402

FP8 = torch.float8_e4m3fn
DTYPES = (torch.float32, torch.float16, torch.bfloat16, FP8)
ARCHITECTURES = [DEFAULT, *(target.arch for target, _ in TARGETS.values()), 75, 86, 103, 121, "gfx90a"]
COARSE = {"kernel": "coarse", "stages": 3, "maxnreg": None, "most_rows": 16, "programs": 320}


@pytest.fixture
def table() -> Iterator[dict[Any, dict[Shape, Configuration]]]:
    """The table, which is afterwards as it was."""
    before = copy.deepcopy(TABLE)
    yield TABLE
    TABLE.clear()
    TABLE.update(before)


def launches(dtype: torch.dtype, heads: int, dim: int, architecture: Any) -> dict[str, config.Launch]:
    tiles = config.score_tiles(heads, dim, dtype, 128)
    asked = (tiles, dtype, dim, architecture)
    found = {
        "coarse": config.coarse_launch(*asked),
        "by_block": config.by_block_launch(*asked),
        "by_row": config.by_row_launch(*asked),
    }
    return (
        found
        if dtype == torch.float32
        else found
        | {
            "hopper": config.by_block_launch(*asked, hopper=True),
            "coarse_hopper": config.coarse_launch(*asked, hopper=True),
            "by_row_hopper": config.by_row_launch(*asked, hopper=True),
        }
    )


# ---- lookups ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_every_architecture_has_a_row_for_every_shape(architecture: Any) -> None:
    """All dtypes, head counts and dims, all lengths of rows; the warps of kernels that score are those of the tiles."""
    for dtype in DTYPES:
        for heads in (1, 32, 64, 100, 256):
            for dim in (5, 64, 128, 200):
                tiles = config.score_tiles(heads, dim, dtype, 128)
                for how in launches(dtype, heads, dim, architecture).values():
                    assert how.num_warps == tiles.num_warps
                    assert how.stages >= 1
                    assert how.programs >= 1
    for entries in (1, 16, 512, 513, 4096, 8192, 10**6):
        for kernel in ("select_blocks", "select_tokens", "select_shared_hopper", "select_few_tokens"):
            assert config.select_launch(kernel, entries, architecture).num_warps >= 1
        assert config.sort_launch(entries, architecture).num_warps >= 1


def test_rows_of_the_field() -> None:
    """What was measured by hand on sm_90, which the others have until somebody measures there."""
    for architecture in (90, 80, "gfx942", DEFAULT):
        fp8, bf16 = (launches(dtype, 64, 128, architecture) for dtype in (FP8, torch.bfloat16))
        assert fp8["coarse"] == bf16["coarse"] == config.Launch(2, 4, None, 32, 640)
        assert fp8["coarse_hopper"] == bf16["coarse_hopper"] == config.Launch(2, 4, 168, 32, 372)
        assert fp8["by_block"] == config.Launch(3, 4, 128, 32, 2048)
        assert bf16["by_block"] == config.Launch(2, 4, None, 32, 2048)
        assert fp8["hopper"] == config.Launch(2, 4, 128, 32, 2048)
        assert bf16["hopper"] == config.Launch(2, 4, 168, 32, 2048)
        assert launches(FP8, 256, 128, architecture)["hopper"] == config.Launch(2, 8, 168, 32, 2048)
        for dtype in (FP8, torch.bfloat16):
            halves = config.score_tiles(64, 128, dtype, 64)
            assert config.by_block_launch(halves, dtype, 128, architecture, hopper=True)[:3] == (2, 4, 96)
        assert fp8["by_row"][:3] == (3, 4, None)
        assert bf16["by_row"][:3] == (2, 4, None)
        assert fp8["by_row_hopper"] == bf16["by_row_hopper"] == config.Launch(2, 4, 128, 1, 512)
        float32 = launches(torch.float32, 64, 128, architecture)
        assert {how.stages for how in float32.values()} == {1}
        for columns, expected in ((64, (1, None)), (512, (1, None)), (513, (4, None)), (2048, (4, None))):
            assert config.select_launch("select_blocks", columns, architecture)[1:3] == expected
        many = {2048: (4, None), 2049: (8, 128), 16384: (8, 128), 16385: (8, 80), 65536: (8, 80)}
        for columns, expected in many.items():
            assert config.select_launch("select_tokens", columns, architecture)[1:3] == expected
        for columns, expected in ((512, (1, None)), (2048, (4, None)), (8192, (8, 128)), (16384, (8, 128))):
            assert config.select_launch("select_few_tokens", columns, architecture)[1:3] == expected
        for columns, expected in ((8192, (4, 80)), (16384, (8, 80))):
            assert config.select_launch("select_shared_hopper", columns, architecture)[1:3] == expected
        assert [config.sort_launch(2**n, architecture).num_warps for n in (0, 9, 11, 12)] == [8, 8, 8, 8]


def test_the_narrowest_class_wins_and_the_architecture_before_the_default(table: dict[Any, Any]) -> None:
    """Of a class, of a part of it, of the kernel; a near architecture; a far one is not touched."""
    asked = Shape("coarse", 1, 64, 128)
    several = [Shape("coarse"), Shape("coarse", 1), Shape("coarse", 1, 64), asked]
    for stages, shape in enumerate(several, 3):
        table[100] = table.get(100, {}) | {shape: Configuration(stages=stages)}
        assert lookup(asked, 100).stages == stages
        assert lookup(asked, 103).stages == stages
        assert lookup(asked, 90).stages == lookup(asked, DEFAULT).stages == 2
    assert lookup(Shape("coarse", 1, 64, 64), 100).stages == 5
    assert lookup(Shape("coarse", 2, 64, 128), 100).stages == 3
    table[103] = {Shape("coarse"): Configuration(stages=8)}
    assert lookup(asked, 103).stages == 8
    with pytest.raises(KeyError, match="no launch configuration"):
        lookup(Shape("unknown"), 100)


def test_a_tile_is_narrower_than_any_tile_of_the_same_class(table: dict[Any, Any]) -> None:
    """But not than a class of more parts."""
    asked = Shape("refine_by_block_hopper", 1, 64, 128, tile=64)
    several = [Shape(asked.kernel, 1), Shape(asked.kernel, 1, tile=64), asked._replace(tile=None), asked]
    for stages, shape in enumerate(several, 3):
        table[100] = table.get(100, {}) | {shape: Configuration(stages=stages)}
        assert lookup(asked, 100).stages == stages
    assert lookup(asked._replace(tile=128), 100).stages == 5
    assert lookup(asked._replace(dim=64), 100).stages == 4
    assert lookup(asked._replace(dim=64, tile=128), 100).stages == 3


def test_groups_of_the_table_come_before_the_constants(table: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a row has none they are those of config.py, as it is at the time of the call."""
    monkeypatch.setattr(config, "MOST_ROWS", 2)
    monkeypatch.setattr(config, "MANY_PROGRAMS", 1)
    monkeypatch.setattr(config, "MANY_COARSE_PROGRAMS", 3)
    monkeypatch.setattr(config, "MANY_ROW_PROGRAMS", 5)
    found = launches(FP8, 64, 128, 90)
    assert found["coarse"][3:] == (2, 3)
    assert found["by_block"][3:] == found["hopper"][3:] == (2, 1)
    assert found["by_row"].programs == 5
    table[90][Shape("by_block_groups", 1, 64, 128)] = Configuration(most_rows=16, programs=64)
    found = launches(FP8, 64, 128, 90)
    assert found["by_block"][3:] == found["hopper"][3:] == (16, 64)
    assert launches(FP8, 32, 128, 90)["by_block"][3:] == (2, 1)
    tiles = config.score_tiles(64, 128, FP8, 128)
    monkeypatch.setattr(config, "MANY_PROGRAMS", 7)
    assert config.shares_of_pairs(tiles, FP8, 128, 128, 80, False, 132) == 7
    table[90][Shape("refine_by_block", 1)] = Configuration(programs=8)
    assert config.shares_of_pairs(tiles, FP8, 128, 128, 90, False, 10) == 80
    assert config.shares_of_pairs(tiles, FP8, 128, 512, 90, False, 10) == 20
    assert config.shares_of_pairs(tiles, FP8, 128, 128, 90, True, 114) == 4 * 114


def test_rows_with_spreads_leave_no_room_for_wide_queries() -> None:
    """A float8 query is copied in the means' dtype for the kernel of means alone, two bytes a head and dimension."""
    sizes = (1, 4096, 64, 128, 65536, 4096, Budget(128, 128), FP8, False, 90)
    means, spreads = (Plan(*sizes, spread=spread).chunks[0].rows for spread in (False, True))
    room = config.WORKSPACE_BYTES / means - config.WORKSPACE_BYTES / spreads
    assert 0.9 < room / (2 * 64 * 128) < 1.2
    other = (*sizes[:7], torch.bfloat16, *sizes[8:])
    assert Plan(*other).chunks == Plan(*other, spread=True).chunks


@pytest.mark.parametrize("heads", [8, 64, 256])
@pytest.mark.parametrize("coarse", ["paper", "spread", "probe", "two-level"])
def test_scores_of_blocks_and_of_candidates_lie_apart_where_one_kernel_has_both(coarse: str, heads: int) -> None:
    """Each row has room for whole tiles of blocks behind its candidates; elsewhere they share a place."""
    kept = {True: 0, False: 0}
    for dtype, queries, block_size, m, tokens, architecture in itertools.product(
        DTYPES, (1, 15, 16), (16, 48, 128), (2, 7, 64), (1000, 32768, 131072, 500000), (90, 80)
    ):
        budget = Budget(block_size, m)
        outer = outer_of(coarse, tokens, budget)
        probe = 50 if coarse in ("probe", "two-level") else None
        plan = Plan(
            3, queries, heads, 128, tokens, 50, budget, dtype, True, architecture, probe, outer, coarse == "spread"
        )
        blocks = -(-tokens // block_size)
        wanted = architecture == 90 and queries < 16 and m < blocks <= config.MOST_KEPT_ROW
        assert (plan.beside > 0) == wanted
        kept[wanted] += 1
        if wanted:
            assert plan.beside >= budget.candidates
            assert plan.pitch >= plan.beside + plan.tiles.tile * -(-blocks // plan.tiles.tile)
            assert plan.pitch % 16 == plan.beside % 16 == 0
    assert min(kept.values()) > 50


def test_width_classes() -> None:
    assert [configurations.width_class(n) for n in (1, 512, 513, 8192, 8193, 16384, 16385, 10**6)] == [
        512, 512, 1024, 8192, 16384, 16384, 32768, 32768,
    ]  # fmt: skip


@given(
    batch=st.integers(1, 5),
    queries=st.integers(1, 400),
    most=st.integers(1, 500),
    group=st.sampled_from([1, 4, 32]),
)
def test_chunks_hold_all_rows_in_order(batch: int, queries: int, most: int, group: int) -> None:
    """The first is the largest; what is part of a batch is whole groups, but for a batch's last rows."""
    chunks = list(chunks_of_rows(batch, queries, most, group))
    rows = [row for chunk in chunks for row in range(chunk.first_row, chunk.first_row + chunk.rows)]
    assert rows == list(range(batch * queries))
    assert max(chunk.rows for chunk in chunks) == chunks[0].rows <= most
    for chunk in chunks:
        if queries <= most:
            assert chunk.of_batch == queries
            assert chunk.first_row % queries == 0
        else:
            assert chunk.batches == 1
            last = (chunk.first_row + chunk.rows) % queries == 0
            assert last or group > most or chunk.rows % group == 0


def test_the_multiprocessors_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its own GPU, asked for once a device; the interpreter is one."""
    assert gpu.multiprocessors(torch.zeros(1)) == 1
    asked: list[Any] = []
    counts = {"cuda:0": SimpleNamespace(multi_processor_count=132), "cuda:1": SimpleNamespace(multi_processor_count=78)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda x: asked.append(x) or counts[x])
    gpu._multiprocessors.cache_clear()
    try:
        for _ in range(2):
            assert gpu.multiprocessors(SimpleNamespace(is_cuda=True, device="cuda:0")) == 132
            assert gpu.multiprocessors(SimpleNamespace(is_cuda=True, device="cuda:1")) == 78
        assert asked == ["cuda:0", "cuda:1"]
    finally:
        gpu._multiprocessors.cache_clear()


def test_the_architecture_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The capability, or AMD's name without its features, asked for once a device; the CPU's is the default."""
    assert gpu.architecture(torch.zeros(1)) == DEFAULT
    asked: list[Any] = []
    capabilities = {"cuda:0": (9, 0), "cuda:1": (12, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda x: asked.append(x) or capabilities[x])
    monkeypatch.setattr(torch.version, "hip", None)
    gpu._architecture_of.cache_clear()
    try:
        for _ in range(2):
            assert gpu.architecture(SimpleNamespace(is_cuda=True, device="cuda:0")) == 90
            assert gpu.architecture(SimpleNamespace(is_cuda=True, device="cuda:1")) == 120
        assert asked == ["cuda:0", "cuda:1"]
        gpu._architecture_of.cache_clear()
        monkeypatch.setattr(torch.version, "hip", "6.4")
        properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda x: properties)
        assert gpu.architecture(SimpleNamespace(is_cuda=True, device="cuda:0")) == "gfx942"
    finally:
        gpu._architecture_of.cache_clear()


# ---- what a row may say ----------------------------------------------------------------------------------------


def test_the_table_holds_nothing_that_changes_bits() -> None:
    """No tiles, and warps for kernels that add up nothing alone; every row is one that a file may have."""
    assert Configuration._fields == ("stages", "maxnreg", "num_warps", "most_rows", "programs")
    for kernel, fields in FIELDS.items():
        assert set(fields) <= set(Configuration._fields)
        assert ("num_warps" in fields) == (kernel in WIDE)
    for rows in TABLE.values():
        for shape, row in rows.items():
            assert configurations.parse_row(configurations.row_of(shape, row)) == (shape, row)


# ---- files -----------------------------------------------------------------------------------------------------


def write(path: Path, *rows: Any, **others: Any) -> Path:
    path.write_text(json.dumps({"architecture": 90, "rows": list(rows)} | others))
    return path


def test_rows_of_a_file_lie_over_the_table(table: dict[Any, Any], tmp_path: Path) -> None:
    """For the architecture that the file names alone; what it says nothing about stays."""
    before = launches(FP8, 64, 128, 90)
    sort = {"kernel": "sort", "width": 2048, "num_warps": 16}
    row = COARSE | {"itemsize": 1, "padded_heads": 64, "dim": 128}
    configurations.load(write(tmp_path / "a.json", row, sort, device="a GPU", found="2026-11-22", measured=[]))
    found = launches(FP8, 64, 128, 90)
    assert found.pop("coarse") == config.Launch(3, 4, None, 16, 320)
    assert before.pop("coarse") == launches(FP8, 64, 128, 80)["coarse"] == launches(FP8, 64, 64, 90)["coarse"]
    assert found == before
    assert [config.sort_launch(n, 90).num_warps for n in (1024, 2048, 4096)] == [8, 16, 8]
    configurations.load(write(tmp_path / "b.json", COARSE, architecture="gfx942"))
    assert launches(torch.bfloat16, 8, 32, "gfx942")["coarse"].stages == 3


BAD = {
    "unknown kernel 'sum'": COARSE | {"kernel": "sum"},
    "unknown kernel None": {"stages": 3},
    "coarse has no field 'num_warps'": COARSE | {"num_warps": 8},
    "coarse has no field 'TILE'": COARSE | {"TILE": 64},
    "refine_by_row has no field 'most_rows'": {"kernel": "refine_by_row", "stages": 2, "maxnreg": None, "most_rows": 8},
    "sort has no field 'itemsize'": {"kernel": "sort", "num_warps": 8, "itemsize": 1},
    "a row for sort also has num_warps": {"kernel": "sort", "width": 512},
    "stages is one of 1 to 8, not 9": COARSE | {"stages": 9},
    "stages is one of 1 to 8, not None": COARSE | {"stages": None},
    "stages is one of 1 to 8, not True": COARSE | {"stages": True},
    "stages is one of 1 to 8, not 2.0": COARSE | {"stages": 2.0},
    "maxnreg is one of 24 to 255 or null, not '128'": COARSE | {"maxnreg": "128"},
    "most_rows is one of 2, 4, .* or null, not 24": COARSE | {"most_rows": 24},
    "num_warps is one of 1, 2, 4, 8, 16, not 3": {"kernel": "sort", "num_warps": 3},
    "itemsize is one of 1, 2, 4 or null, not 8": COARSE | {"itemsize": 8},
    "padded_heads is one of .* not 48": COARSE | {"padded_heads": 48},
    "width is one of .* not 1000": {"kernel": "sort", "num_warps": 8, "width": 1000},
    "it copies a query while": {"kernel": "refine_by_block_hopper", "stages": 1},
    "a row is an object, not 'coarse'": "coarse",
}


@pytest.mark.parametrize("message", BAD)
def test_bad_rows_are_named(table: dict[Any, Any], tmp_path: Path, message: str) -> None:
    """The variable, the file, the row and what is wrong with it; no row of the file is taken."""
    before = copy.deepcopy(table)
    path = write(tmp_path / "tuned.json", COARSE, BAD[message])
    with pytest.raises(ValueError, match=f"^HISA_COMPILE_TUNED: .*tuned.json: row 1: .*{message}"):
        configurations.load(path)
    assert table == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("[]", "an object with architecture and rows"),
        ('{"rows": []}', "an object with architecture and rows"),
        ('{"architecture": 9.0, "rows": []}', "architecture is a number such as 90 or a name"),
        ('{"architecture": 90, "rows": {}}', "rows are a list"),
        ('{"architecture": 90, "rows": [], "row": []}', "unknown row; there are architecture"),
        (json.dumps({"architecture": 90, "rows": [COARSE, COARSE]}), "row 1: a second one for"),
    ],
)
def test_bad_files_are_named(table: dict[Any, Any], tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "tuned.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"^HISA_COMPILE_TUNED: .*tuned.json: .*{message}"):
        configurations.load(path)


def test_what_a_row_does_not_say_is_null(table: dict[Any, Any]) -> None:
    """As in a file from before there was such a field."""
    row = {"kernel": "refine_by_block_hopper", "stages": 3}
    assert configurations.parse_row(row) == (Shape("refine_by_block_hopper"), Configuration(stages=3))
    configurations.load(Path(__file__).parents[1] / "benchmarks" / "results" / "tuned_sm90.json")
    # Not what it was: that has a number of programs.
    asked = Shape("refine_by_block_hopper", 1, 64, 128)
    assert lookup(asked, DEFAULT).programs is not None
    assert lookup(asked, 90) == Configuration(stages=2, maxnreg=128)
    # Nor has it rows for few rows, which were selected among as many were.
    for kernel in ("select_tokens", "select_few_tokens"):
        assert config.select_launch(kernel, 8192, 90) == config.Launch(1, 8, 80)


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    """It is read when the kernels are imported; a bad one is an error there."""
    script = "from hisa_compile.ops.triton.configurations import Shape, lookup; print(lookup(Shape('coarse', 1), 90))"

    def imported(path: Path) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {configurations.VARIABLE: str(path), "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)

    good = imported(write(tmp_path / "good.json", COARSE | {"itemsize": 1}))
    assert good.stdout.strip() == str(Configuration(stages=3, most_rows=16, programs=320)), good.stderr
    bad = imported(write(tmp_path / "bad.json", COARSE | {"stages": 0}))
    assert bad.returncode != 0
    assert bad.stderr.strip().splitlines()[-1].endswith("bad.json: row 0: stages is one of 1 to 8, not 0")


# ---- the script that finds rows --------------------------------------------------------------------------------


def test_variations_are_rows_that_a_file_may_have() -> None:
    assert set(tune.VARIATIONS) == set(tune.MEASURED) == set(FIELDS)
    for kernel in FIELDS:
        widths = [Shape(kernel, width=width) for width in WIDTHS]
        shapes = widths if kernel in WIDE else [Shape(kernel, itemsize, 64, 128) for itemsize in (1, 2)]
        for shape in shapes:
            several = tune.candidates(shape)
            assert several[0] == lookup(shape, tune.current())
            assert len(several) > 1
            for row in several:
                assert configurations.parse_row(configurations.row_of(shape, row)) == (shape, row)


def test_the_best_row_gains_in_every_kind_of_call_together() -> None:
    """Kinds of calls count the same however many calls there are of one; little is not enough."""
    today, other, slight = (Configuration(stages=n) for n in (2, 3, 4))
    decode = {("decode", str(n)): 1.0 for n in range(6)}
    times = {today: decode | {("prefill", ""): 1.0}, other: decode | {("prefill", ""): 0.64}}
    assert tune.best(times, today) == (other, pytest.approx(1.25))
    times[other][("decode", "0")] = 4.0**6
    assert tune.best(times, today) == (today, 1.0)
    times[slight] = decode | {("prefill", ""): 0.98}
    assert tune.best(times, today) == (today, 1.0)
    assert tune.best({}, today) == (today, 1.0)


def make(case: tune.Case) -> Any:
    """Small calls instead of the field's."""
    dtype, heads, dim = tune.parse_shape(case.shape)
    batch, queries = (1, 32) if case.kind != tune.DECODE else (2, 1)
    q, k = torch.zeros(batch, queries, heads, dim).to(dtype), torch.zeros(batch, 4096, dim).to(dtype)
    parts = {tune.HALF: 2, tune.QUARTER: 4}.get(case.kind, 1)
    budget = Budget(128 // parts, 32 if case.kind == tune.EVERY else 16 * parts)
    coarse = "probe" if case.kind in (tune.PROBE, tune.HALF, tune.QUARTER) else "paper"
    options = (Visibility(), None, None, case.kind == tune.SORTED, False, None, coarse)
    return lambda: launch.indexer_topk_triton(q, k, torch.zeros(batch, queries, heads), 2048, budget, *options)


def test_a_run_finds_rows_and_writes_what_the_operator_reads(
    table: dict[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With times made up: the fastest row is in the file, one that does not compile is left out and named."""

    used: list[tuple[str, config.Launch]] = []

    def run(kernel: Any, programs: int, how: config.Launch, **arguments: Any) -> None:
        used.append((kernel.__name__, how))
        if kernel.__name__ == "select_tokens_kernel" and how.num_warps == 16:
            raise RuntimeError("out of resources: registers\nand a long listing")

    def timed(call: Any, kernels: tuple[str, ...]) -> float:
        used.clear()
        call()
        mine = [how for name, how in used if name in kernels]
        assert mine
        return 1.0 + (mine[-1].stages == 2) + mine[-1].programs / 2048

    monkeypatch.setattr(tune, "make", make)
    monkeypatch.setattr(tune, "timed", timed)
    monkeypatch.setattr(tune, "equal", lambda one, other: True)
    monkeypatch.setattr(tune, "machine", lambda: "a GPU")
    # The small calls have 32 rows for the field's 1024, and 2.
    monkeypatch.setattr(config, "FEW_SELECTIONS", 4)
    monkeypatch.setattr(gpu, "launch", run)
    out = tmp_path / "tuned.json"
    shapes = ["fp8-64x128", "bf16-32x64"]
    tune.main(["--out", str(out), "--workers", "0", "--shapes", *shapes, "--points", "2x4K"])
    printed = capsys.readouterr().out
    assert "RuntimeError: out of resources: registers" in printed
    assert "a long listing" not in printed
    given = json.loads(out.read_text())
    assert given["architecture"] == DEFAULT
    assert given["command"] == f"python -m benchmarks.tune --shapes {' '.join(shapes)} --points 2x4K --workers 0"
    rows = dict(configurations.parse_row(row) for row in given["rows"])
    assert {shape.kernel for shape in rows} == {name for name in FIELDS if "hopper" not in name}
    assert all(row.stages != 2 for shape, row in rows.items() if shape.kernel == "refine_by_block")
    assert rows[Shape("coarse", 1, 64, 128)].stages == 3
    assert rows[Shape("by_block_groups", 2, 32, 64)] == Configuration(most_rows=64, programs=1024)
    assert all(row.num_warps != 16 for shape, row in rows.items() if shape.kernel == "select_tokens")
    # The run itself reads the file it has written.
    assert launches(FP8, 64, 128, 90)["coarse"].stages == 2
    assert launches(FP8, 64, 128, DEFAULT)["coarse"].stages == 3


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing is compiled under the interpreter")
def test_shares_of_what_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel that a run launches is in one share, once, whatever the batch."""
    compiled: list[str] = []

    def warmup(kernel: Any, **given: Any) -> None:
        how = config.Launch(given["num_stages"], given["num_warps"], given.get("maxnreg"))
        compiled.append(str(tune.identity(kernel, how, given)))

    monkeypatch.setattr(tune, "make", make)
    monkeypatch.setattr(triton.JITFunction, "warmup", warmup)
    arguments = ["--shapes", "fp8-64x128", "bf16-32x64", "--points", "2x4K", "4x4K"]
    several: list[set[str]] = []
    for share, shares in ((0, 1), (0, 3), (1, 3), (2, 3)):
        compiled.clear()
        tune.main([*arguments, "--workers", str(shares), "--compile-share", str(share)])
        assert len(set(compiled)) == len(compiled) > 10
        several.append(set(compiled))
    whole, *parts = several
    assert set.union(*parts) == whole
    assert sum(map(len, parts)) == len(whole)


def test_shapes_and_points_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--shapes", "fp16-64x128"], ["--shapes", "fp8-64"], ["--points", "32"], ["--kernels", "pool"]):
        with pytest.raises(SystemExit):
            tune.parse(wrong)
    assert "a shape is dtype-headsxdim, such as fp8-64x128, not 'fp8-64'" in capsys.readouterr().err
