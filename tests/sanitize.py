"""NVIDIA's compute-sanitizer over the Triton kernels: each of them at small sizes, its results checked.

    python tests/sanitize.py [--sanitizer PATH] [--tools memcheck racecheck initcheck] [--out FILE]

The calls of CASES are made by a process of its own (``--driver``): once without the tool, which compiles the kernels
into Triton's cache, then once under each tool.  Inputs and what they should give are made on the CPU, so that few
kernels of torch run beside ours.  torch's caching allocator is switched off: each tensor is an allocation of its own,
whose ends and whose first writes the tool knows.  Memory is not poisoned, as elsewhere in the tests: that would count
as a write.

Nothing is filtered or suppressed.  What the tool's own release notes say of its versions:

- false positives of racecheck where warps synchronise as a warp group, before 2026.1, and where a copy completes a
  barrier's transaction, before 2026.3;
- false positives of memcheck and initcheck for cp.async that fills with zeros, as masked loads in a pipeline do, before
  2026.4;
- copies through a tensor map: memcheck looks at them from 2026.2 on, racecheck at none; initcheck may report false
  positives for "some tensormap instructions".

``pip install nvidia-cuda-sanitizer-api`` has the tool.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import importlib.metadata
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton_cases import DEVICE, FP8, Case, assert_equal, call, canonical, launched, random_bool, whole_case

from hisa_compile.ops import reference
from hisa_compile.ops import triton as package
from hisa_compile.ops.triton import config, gpu, launch_pool

TOOLS = ("memcheck", "racecheck", "initcheck")
# Options that not every version has.  Padding: what is behind an allocation belongs to none.
OPTIONS = {"memcheck": {"--padding": "32", "--check-tensor-ops": "yes"}}
ERRORS_FOUND = 99
# What runs on sm_90 alone; every other kernel of the package runs on every GPU.
ON_HOPPER = {"refine_by_block_hopper_kernel", "coarse_hopper_kernel", "widen_queries_kernel"}
ON_HOPPER |= {"probe_blocks_hopper_kernel", "refine_by_row_hopper_kernel", "select_tokens_hopper_kernel"}
ON_HOPPER |= {"select_shared_hopper_kernel"}


class Sizes(NamedTuple):
    """Sizes of a call; the last block is ragged, heads and dims are padded, the window cuts blocks."""

    queries: int = 33
    tokens: int = 1000
    heads: int = 24
    dim: int = 80
    topk: int = 100
    block_size: int = 128
    block_topk: int = 3
    batch: int = 2


BY_BLOCK, BY_ROW, ALL_KEPT = Sizes(), Sizes(queries=3), Sizes(block_topk=8)
LONG = Sizes(queries=2, tokens=9000, heads=16, dim=32, topk=4500, block_topk=71, batch=1)
# A program holds no row as long as that; without it LONG is the longest that one holds.
LONGER = {"config": {"SELECT_ROW": 8192, "FEW_PAIRS": 0}}
# More than few, which sm_90 selects among in another way.
MANY_ROWS = {"config": {"FEW_SELECTIONS": 1}}
SMALL_BLOCKS = Sizes(block_size=32, block_topk=7)
WHOLE_TILES = Sizes(heads=64, dim=128, tokens=1024, batch=1)
# More than the eight outer blocks that are kept with block_topk = 2.
MANY_BLOCKS = Sizes(tokens=1500, block_topk=2)
PLAIN = {"plain": True}
# name -> (sizes, dtype, how): "everything" gives all optional tensors, "factors" those that multiply keys and scores,
# "pooled" means of blocks, "ties" scores of 0;
# "plain" keeps sm_90's kernel out, "config" patches the configuration; the rest are arguments of the operator.
CASES: dict[str, tuple[Sizes, torch.dtype, dict[str, Any]]] = {
    "pruned, by block, bfloat16": (BY_BLOCK, torch.bfloat16, {}),
    "pruned, by block, float8": (BY_BLOCK, FP8, {}),
    "pruned, by block, float16, everything": (BY_BLOCK, torch.float16, {"everything": True}),
    "pruned, by block, float8, everything": (BY_BLOCK, FP8, {"everything": True, "sorted": False}),
    "pruned, by block, bfloat16, whole tiles": (WHOLE_TILES, torch.bfloat16, {}),
    "pruned, by block, float8, whole tiles": (WHOLE_TILES, FP8, {}),
    "pruned, by block, in chunks": (BY_BLOCK, FP8, {"config": {"WORKSPACE_BYTES": 40_000, "FEW_ROWS": 1}}),
    "pruned, by block, pairs sorted": (BY_BLOCK, FP8, {"config": {"ROOMY": 0, "FEW_PAIRS": 0}}),
    "pruned, plain, bfloat16": (BY_BLOCK, torch.bfloat16, PLAIN),
    "pruned, plain, float8, everything": (BY_BLOCK, FP8, {"everything": True} | PLAIN),
    "pruned, plain, float8, whole tiles": (WHOLE_TILES, FP8, PLAIN),
    "pruned by spreads, bfloat16": (BY_BLOCK, torch.bfloat16, {"coarse": "spread"}),
    "pruned by spreads, float8, everything": (BY_BLOCK, FP8, {"everything": True, "coarse": "spread"}),
    "pruned by the probe, bfloat16": (BY_BLOCK, torch.bfloat16, {"coarse": "probe"}),
    "pruned by the probe, float8": (BY_BLOCK, FP8, {"coarse": "probe"}),
    "pruned by the probe, float8, everything": (BY_BLOCK, FP8, {"everything": True, "coarse": "probe"}),
    "pruned by the probe, float8, whole tiles": (WHOLE_TILES, FP8, {"coarse": "probe"}),
    "pruned by the probe, plain, float16": (BY_BLOCK, torch.float16, {"coarse": "probe"} | PLAIN),
    "pruned by the probe, float32, in chunks": (
        BY_BLOCK,
        torch.float32,
        {"coarse": "probe", "config": {"WORKSPACE_BYTES": 40_000, "FEW_ROWS": 1}},
    ),
    "pruned by two levels, bfloat16": (MANY_BLOCKS, torch.bfloat16, {"coarse": "two-level"}),
    "pruned by two levels, float8, everything": (MANY_BLOCKS, FP8, {"everything": True, "coarse": "two-level"}),
    "pruned by two levels, plain, blocks of 32, in chunks": (
        MANY_BLOCKS._replace(block_size=32, block_topk=4, topk=60),
        torch.float16,
        {"coarse": "two-level", "config": {"WORKSPACE_BYTES": 100_000, "FEW_ROWS": 1}} | PLAIN,
    ),
    "pruned, by row, bfloat16, given means": (BY_ROW, torch.bfloat16, {"pooled": True}),
    "pruned, by row, float8, everything": (BY_ROW, FP8, {"everything": True, "mark_hidden": True}),
    "pruned, by row, float32": (BY_BLOCK, torch.float32, {}),
    "pruned, by row, blocks of 32, bfloat16": (SMALL_BLOCKS, torch.bfloat16, {}),
    "pruned, by row, blocks of 16, float8, factors": (
        SMALL_BLOCKS._replace(block_size=16, block_topk=9),
        FP8,
        {"factors": True},
    ),
    "every block kept, by block, bfloat16": (ALL_KEPT, torch.bfloat16, {}),
    "every block kept, by block, float8, everything": (ALL_KEPT, FP8, {"everything": True}),
    "every block kept, plain, float16": (ALL_KEPT, torch.float16, {"sorted": False} | PLAIN),
    "every block kept, by row, float32, everything": (
        ALL_KEPT._replace(queries=3),
        torch.float32,
        {"everything": True},
    ),
    "rows in registers, merged": (LONG, torch.bfloat16, {}),
    "rows in shared memory, merged": (LONG, torch.bfloat16, MANY_ROWS),
    "rows in shared memory, ties": (LONG._replace(topk=300), torch.bfloat16, {"ties": True} | MANY_ROWS),
    "rows of candidates in shared memory": (
        LONG._replace(topk=300, block_topk=66),
        FP8,
        {"sorted": False} | MANY_ROWS,
    ),
    "long rows, merged": (LONG, torch.bfloat16, LONGER),
    "long rows, ties": (LONG._replace(topk=300), torch.bfloat16, {"ties": True} | LONGER),
    "long rows of blocks": (LONG._replace(topk=50, block_size=1, block_topk=64), torch.float16, {}),
    "long rows of candidates": (LONG._replace(topk=300, block_topk=66), FP8, LONGER),
    "windows of less than topk": (BY_BLOCK, torch.bfloat16, {"short": True, "sorted": False, "mark_hidden": True}),
    "windows of less than topk, every block kept": (ALL_KEPT, torch.float16, {"short": True}),
    "rows that have to be filled": (BY_BLOCK._replace(topk=300), torch.float16, {"everything": True}),
}


def make(sizes: Sizes, dtype: torch.dtype, how: dict[str, Any]) -> Case:
    """A call whose sums are exact: valid keys are every other one, factors powers of two.

    The means of ragged blocks are not, but such a block is the last a row sees, and kept whatever its score is.
    """
    batch, queries, tokens = sizes.batch, sizes.queries, sizes.tokens
    budget = {"topk": sizes.topk, "block_size": sizes.block_size, "block_topk": sizes.block_topk}
    padded = -(-tokens // sizes.block_size) * sizes.block_size
    case = whole_case(queries, padded, sizes.heads, sizes.dim, dtype, batch, **budget)
    # As large as it has to be: what is behind the last key is behind the allocation.
    case["k"] = case["k"][:, :tokens].cpu().clone().to(DEVICE)
    row = torch.arange(batch * queries, dtype=torch.int32).view(batch, queries)
    case["window_start"] = (5 * row - 9).to(DEVICE)
    case["window_end"] = (tokens - 3 * row).to(DEVICE)
    if how.get("short"):
        case["window_end"] = case["window_start"] + row.to(DEVICE)
    if how.get("ties"):
        case["q"] = case["q"].cpu().float().abs().to(dtype).to(DEVICE)
        case["k"] = (-case["k"].cpu().float().abs()).to(dtype).to(DEVICE)
    token = torch.arange(tokens).expand(batch, -1)
    if how.get("everything"):
        case["key_valid"] = (token % 2 == 0).to(DEVICE)
        case["mask"] = random_bool((batch, queries, tokens), 0.8)
        case["q_segment"], case["k_segment"] = (row % 2).long().to(DEVICE), (token // 300 % 2).to(DEVICE)
    if how.get("everything") or how.get("factors"):
        case["k_scale"] = torch.tensor([0.5, 1.0, 2.0, -1.0])[token * 7 // 3 % 4].to(DEVICE)
        case["k_weight"] = torch.tensor([1.0, -2.0, 0.5])[token // 2 % 3].to(DEVICE)
    if how.get("pooled"):
        case["k_pooled"] = launch_pool.pool_keys_triton(case["k"], sizes.block_size, None, None, None)
    return case | {name: how[name] for name in ("sorted", "mark_hidden", "coarse") if name in how}


def on_cpu(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) else x


def kernels_of_package() -> set[str]:
    names = [found.name for found in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def drive(wanted: str) -> None:
    """Make the calls; raise where a result is wrong or a kernel did not run."""
    seen: set[str] = set()
    on_hopper = False
    for name, (sizes, dtype, how) in CASES.items():
        if wanted not in name:
            continue
        # The tool's messages are told apart by these lines.
        print(f"case: {name}", flush=True)
        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.multiple(config, **how.get("config", {"FEW_PAIRS": 0})))
            if how.get("plain"):
                patches.enter_context(mock.patch.object(gpu, "is_hopper", return_value=False))
            kernels = patches.enter_context(launched())
            case = make(sizes, dtype, how)
            on_hopper |= gpu.is_hopper(case["q"])
            got = tuple(on_cpu(x) for x in call(case))
        seen.update(kernel.__name__ for kernel in kernels)
        expected = reference.indexer_topk(**{"coarse": "paper"} | {key: on_cpu(x) for key, x in case.items()})
        if not case.get("sorted", True):
            got, expected = canonical(*got), canonical(*expected)
        assert_equal(got, expected)
    missing = kernels_of_package() - seen - (set() if on_hopper else ON_HOPPER)
    assert wanted or not missing, missing
    print(f"driver: {len(seen)} kernels, all results as they should be", flush=True)


def find_sanitizer() -> str | None:
    """On PATH, in CUDA's folder, or in the package from PyPI."""
    if found := shutil.which("compute-sanitizer"):
        return found
    places = [Path(os.environ[home]) for home in ("CUDA_HOME", "CUDA_PATH") if home in os.environ]
    programs = [place / folder / "compute-sanitizer" for place in places for folder in ("bin", "compute-sanitizer")]
    for distribution in importlib.metadata.distributions():
        if (distribution.metadata["Name"] or "").startswith("nvidia-cuda-sanitizer-api"):
            files = [file for file in distribution.files or () if file.name == "compute-sanitizer"]
            programs += [Path(str(file.locate())) for file in files]
    return next((str(program) for program in programs if program.is_file()), None)


class Findings(NamedTuple):
    """What a tool said; ``errors`` None where it did not get as far as a summary."""

    tool: str
    errors: int | None
    warnings: int
    driver_ok: bool
    seconds: float
    where: collections.Counter[str]

    @property
    def clean(self) -> bool:
        return self.errors == 0 and self.warnings == 0 and self.driver_ok

    def cells(self) -> list[str]:
        errors = "no summary" if self.errors is None else str(self.errors)
        driver = "passed" if self.driver_ok else "**failed**"
        return [self.tool, errors, str(self.warnings), driver, f"{self.seconds:.0f}"]


def read(tool: str, output: str, seconds: float) -> Findings:
    """The counts of the tool's summary, and each message by where it points and the call it came in."""
    errors, warnings = None, 0
    where: collections.Counter[str] = collections.Counter()
    case, expecting = "start", False
    for line in output.splitlines():
        if line.startswith("case: "):
            case = line.removeprefix("case: ")
        if not line.startswith("========="):
            continue
        text = line.lstrip("= ").strip()
        if match := re.match(r"ERROR SUMMARY: (\d+) error", text):
            errors = int(match[1])
        elif match := re.match(r"RACECHECK SUMMARY: .*\((\d+) errors?, (\d+) warnings?\)", text):
            errors, warnings = int(match[1]), int(match[2])
        elif text.startswith(("Program hit", "Error:", "Warning:")):
            # Addresses and counts differ from one message to the next.
            where[f"{re.sub(r'[+]?0x[0-9a-f]+', '', text)} [{case}]"] += 1
        elif text.startswith(("Invalid", "Uninitialized", "Misaligned", "Potential")):
            kind, expecting = text, True
        elif expecting and text.startswith("at "):
            where[f"{kind} {re.sub(r'[+:]0x[0-9a-f]+', '', text)} [{case}]"] += 1
            expecting = False
    return Findings(tool, errors, warnings, "driver: " in output, seconds, where)


def sanitize(sanitizer: str, tool: str, driver: list[str], env: dict[str, str], limit: float) -> tuple[Findings, str]:
    known = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    options = [word for pair in OPTIONS.get(tool, {}).items() if pair[0] in known for word in pair]
    options += ["--tool", tool, "--target-processes", "all", "--error-exitcode", str(ERRORS_FOUND)]
    command = [sanitizer, *options, "--print-limit", "1000", *driver]
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit
        )
        output, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as expired:
        output, code = (expired.stdout or b"").decode(errors="replace") + f"\nnot done after {limit:.0f} s\n", 1
    found = read(tool, output, time.perf_counter() - began)
    # The exit code has the last word: what is not understood here counts as well.
    if code not in (0, ERRORS_FOUND):
        found = found._replace(driver_ok=False)
    if code == ERRORS_FOUND and found.errors == 0 and found.warnings == 0:
        found = found._replace(errors=None)
    return found, output


def report(sanitizer: str, found: list[Findings]) -> str:
    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True).stdout
    version = " ".join(line for line in version.splitlines() if line.startswith("Version"))
    machine = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, Compute Sanitizer: {version}"
    lines = [f"`python tests/sanitize.py`, {machine}{versions}, {len(CASES)} calls.", ""]
    rows = [["tool", "errors", "warnings", "results", "seconds"], ["---"] * 5, *(each.cells() for each in found)]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    for each in found:
        if each.where:
            lines += ["", f"{each.tool}:", ""] + [f"- {count} x {text}" for text, count in each.where.most_common()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitizer", help="the program; else it is looked for")
    parser.add_argument("--tools", nargs="+", default=TOOLS, choices=(*TOOLS, "synccheck"))
    parser.add_argument("--cases", default="", help="only calls with this in their names")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one tool")
    parser.add_argument("--out", type=Path, help="write the table here, and what each tool printed beside it")
    parser.add_argument("--driver", action="store_true", help="make the calls in this process, without a tool")
    options = parser.parse_args()
    if options.driver:
        drive(options.cases)
        return 0
    sanitizer = options.sanitizer or find_sanitizer()
    if sanitizer is None:
        parser.error("no compute-sanitizer on PATH, in CUDA_HOME or from PyPI; say where it is with --sanitizer")
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    driver = [sys.executable, str(Path(__file__).resolve()), "--driver", "--cases", options.cases]
    subprocess.run(driver, env=env, check=True)
    found = []
    for tool in options.tools:
        findings, output = sanitize(sanitizer, tool, driver, env, options.limit)
        found.append(findings)
        print(" | ".join(findings.cells()), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.with_suffix(f".{tool}.log").write_text(output)
    text = report(sanitizer, found)
    print(text)
    if options.out:
        options.out.write_text(text)
    return 0 if all(each.clean for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
