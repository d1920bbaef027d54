"""One indexer layer on a GPU: the last queries of a context, against what a user has otherwise.

    python -m benchmarks.indexer [--contexts 8192 65536 ...] [--queries 1024] [--out benchmarks/results/indexer.md]
                                 [--tilelang-example PATH] [--tilelang-site PATH]

H = 64, D = 128, topk = 2048, B = 128, m = 64, gaussian inputs, causal windows, results unsorted.  Variants:

- hisa: the operator, bfloat16 and float8 (float8 with a scale a token), with the paper's means of blocks; from
  m * B = 8192 tokens on it selects among candidates, up to there exactly;
- default: the same without naming a coarse stage, which has the probe up to 65536 tokens and means beyond;
- flat: the operator with every block kept, which is exact at any length;
- TileLang's HISA example (``examples/dsa_hisa`` of tile-ai/tilelang, tried with tilelang 0.1.15), float8 with the same
  budget: its pooling, block scores and token scores are TileLang kernels of its own, both of its selections are
  torch.topk; what it does is said in ``benchmarks/tilelang_hisa.py``.  The folder with the example's files is given by
  --tilelang-example or TILELANG_DSA_HISA.  It runs in a process of its own, and --tilelang-site or TILELANG_SITE is
  a folder with tilelang and its libraries for that process alone: DeepGEMM wants another version of apache-tvm-ffi;
- DeepGEMM's float8 logits and torch.topk over them (exact), and the logits alone, where deep_gemm can be imported;
- torch.topk alone, over float32 scores that are there already;
- torch.compile of the flat bfloat16 program.

Not among them: TileLang's flat indexer, which takes longer than DeepGEMM's, and transformers' own float32 graph, which
``benchmarks.prefill_memory`` has.

Times are medians of replays of a CUDA graph, so that no launch from the host is in them; a second table has times of
calls launched from the host.  Memory is the allocator's peak during a call, less what was there before it and less the
results.  The two ceilings are large products of each dtype in the same run.  The refinement's time is that of its
kernel as torch.profiler gives it.  Raw numbers go beside the table, as JSON.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from . import programs
from .harness import (
    FP8,
    Call,
    Found,
    Goal,
    K,
    attempt,
    ceiling,
    command,
    goals_table,
    importable,
    kernel_ms,
    machine,
    measure,
    mib_text,
    parser,
    progress,
    ratio,
    ratio_text,
    raw_goals,
    table,
    write,
)
from .programs import BLOCK_SIZE, BLOCK_TOPK, DIM, HEADS, SIZES
from .tilelang_hisa import NAME as TILELANG
from .tilelang_hisa import Peer

DEEP_GEMM, LOGITS, COMPILED = "DeepGEMM + topk fp8", "DeepGEMM logits fp8", "torch.compile bf16"
DEFAULT = ("default fp8", "default bf16")
TOPK_ALONE = "torch.topk alone"
NAMES = ("hisa fp8", "hisa bf16", *DEFAULT, "flat fp8", TILELANG, DEEP_GEMM, LOGITS, TOPK_ALONE, COMPILED)
DTYPES = {"fp8": FP8, "bf16": torch.bfloat16}
Rows = dict[int, dict[str, Found]]


def variants(queries: int, context: int, largest_flat: int, deep_gemm: bool) -> dict[str, Any]:
    """What makes each variant's call, all on the same inputs."""
    bf16, fp8 = (programs.inputs(queries, context, dtype) for dtype in (torch.bfloat16, FP8))
    found: dict[str, Any] = {"hisa fp8": lambda: programs.hisa(fp8), "hisa bf16": lambda: programs.hisa(bf16)}
    found |= {
        name: lambda given=given: programs.by_default(given) for name, given in zip(DEFAULT, (fp8, bf16), strict=True)
    }
    if context <= largest_flat:
        found["flat fp8"] = lambda: programs.every_block(fp8)
        found[TOPK_ALONE] = lambda: programs.topk_alone(fp8)
        if deep_gemm:
            found[DEEP_GEMM] = lambda: programs.deep_gemm(fp8, topk=True)
            found[LOGITS] = lambda: programs.deep_gemm(fp8, topk=False)
        found[COMPILED] = lambda: programs.compiled(bf16)
    return found


def warm_up(options: argparse.Namespace, deep_gemm: bool) -> None:
    """Every variant once, so that what compiles here does so while TileLang compiles elsewhere."""
    for context in options.contexts:
        for make in variants(options.queries, context, options.largest_flat, deep_gemm).values():
            attempt(lambda make=make: {"results": make()()})
    torch.cuda.synchronize()


def refinement_ms(options: argparse.Namespace) -> dict[str, float | None]:
    """Milliseconds of the refinement's kernel in each dtype."""
    found: dict[str, float | None] = {}
    for name, dtype in DTYPES.items():
        call: Call = programs.hisa(programs.inputs(options.queries, 64 * K, dtype))
        found[name] = attempt(lambda call=call: {"ms": kernel_ms(call, "refine_by_block")}).get("ms")
        progress(64 * K, f"refinement {name}", {"ms": found[name]})
    return found


def same_kind(found: Found, own: Found) -> tuple[float | None, float | None]:
    """Two times taken in the same way: of graphs, or launched from the host where one of the two has no other."""
    key = "ms" if "ms" in found and "ms" in own else "launched_ms"
    return found.get(key), own.get(key)


def own_of(name: str, row: dict[str, Found]) -> Found:
    """What ``name`` is compared with: the operator in its dtype, in float8 if it has none in its name."""
    dtype = name.rsplit(" ", 1)[1]
    return row.get(f"hisa {dtype if dtype in DTYPES else 'fp8'}", {})


def cell(name: str, row: dict[str, Found]) -> str:
    if name not in row:
        return ""
    found = row[name]
    if "missing" in found:
        return str(found["missing"])
    mine, hisas = same_kind(found, own_of(name, row))
    if mine is None:
        return ""
    text = f"{mine:.3f} ({mib_text(found['mib'])})" + ("" if "ms" in found else " launched")
    return text if name.startswith("hisa") else f"{text} {ratio_text(ratio(mine, hisas))}"


def goals(rows: Rows, ceilings: dict[str, float], refinement: dict[str, float | None], queries: int) -> list[Goal]:
    def number(context: int, name: str, key: str = "ms") -> float | None:
        return rows.get(context, {}).get(name, {}).get(key)

    def slower(context: int, name: str, key: str = "ms") -> float | None:
        row = rows.get(context, {})
        if key != "ms":
            return ratio(number(context, name, key), own_of(name, row).get(key))
        return ratio(*same_kind(row.get(name, {}), own_of(name, row)))

    def launched(context: int) -> str:
        found = slower(context, TILELANG, "launched_ms")
        return "" if found is None else f"launched from the host {found:.2f}x"

    per_key = 2 * queries * HEADS * DIM
    refined = per_key * BLOCK_SIZE * BLOCK_TOPK
    floor = (per_key * 64 * K / BLOCK_SIZE + refined) / ceilings["fp8"] / 1e9
    made = [
        Goal(f"{TILELANG} over hisa, {context // K}K", wanted, slower(context, TILELANG), note=launched(context))
        for context, wanted in ((8 * K, 3), (16 * K, 3), (32 * K, 3), (64 * K, 4), (128 * K, 4), (256 * K, 3))
    ]
    for context, wanted in ((8 * K, 1.5), (16 * K, 2.8), (32 * K, 5), (64 * K, 9), (128 * K, 17)):
        made.append(Goal(f"{DEEP_GEMM} over hisa, {context // K}K", wanted, slower(context, DEEP_GEMM)))
    made += [
        Goal(f"{COMPILED} over hisa, 64K", 40, slower(64 * K, COMPILED)),
        Goal(f"{COMPILED} over hisa, extra memory, 64K", 100, slower(64 * K, COMPILED, "mib")),
        Goal("hisa fp8 over its floor, 64K", 2, ratio(number(64 * K, "hisa fp8"), floor), at_most=True),
    ]
    for name in ("hisa fp8", "hisa bf16"):
        growth = ratio(number(1024 * K, name), number(64 * K, name))
        made.append(Goal(f"{name}, 1M over 64K", 2.5, growth, at_most=True))
        most = [row[name]["mib"] for row in rows.values() if "mib" in row.get(name, {})]
        made.append(Goal(f"{name}, most extra memory", 64, max(most, default=None), at_most=True, unit=" MiB"))
    for context in (8 * K, 16 * K, 32 * K, 64 * K):
        found = ratio(number(context, DEEP_GEMM), number(context, "flat fp8"))
        made.append(Goal(f"{DEEP_GEMM} over flat fp8, {context // K}K", 1, found))
    over_logits = ratio(number(64 * K, "flat fp8"), number(64 * K, LOGITS))
    made.append(Goal("flat fp8 over DeepGEMM's logits alone, 64K", 1.3, over_logits, at_most=True))
    for name, wanted in (("fp8", 75), ("bf16", 65)):
        ms = refinement.get(name)
        share = None if not ms else 100 * refined / ms / 1e9 / ceilings[name]
        made.append(Goal(f"refinement {name}, share of the ceiling, 64K", wanted, share, unit=" %"))
    return made


def launched_table(rows: Rows, names: list[str]) -> str:
    def text(found: Found) -> str:
        return f"{found['launched_ms']:.3f}" if "launched_ms" in found else str(found.get("missing", ""))

    body = [[str(context), *(text(row.get(name, {})) for name in names)] for context, row in rows.items()]
    return table(["context", *names], body)


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    made = parser(__doc__)
    made.add_argument("--contexts", type=int, nargs="+", default=[2**n for n in (13, 14, 15, 16, 17, 18, 20)])
    made.add_argument("--queries", type=int, default=1024)
    made.add_argument("--largest-flat", type=int, default=2**20, help="no flat variant for longer contexts")
    for option, variable in (("--tilelang-example", "TILELANG_DSA_HISA"), ("--tilelang-site", "TILELANG_SITE")):
        given = os.environ.get(variable)
        made.add_argument(option, type=Path, default=Path(given) if given else None, help=f"else {variable}")
    return made, made.parse_args()


def main() -> None:
    made, options = parse()
    absent = {}
    peer = Peer(options.tilelang_example, options.tilelang_site, options.contexts, options.queries)
    if (why := importable("deep_gemm")) is not None:
        absent["DeepGEMM"] = why
    if (why := peer.absent()) is not None:
        absent["TileLang HISA"] = why
    else:
        peer.compile_ahead()
    print(f"absent: {absent or 'none'}; compiling", flush=True)
    warm_up(options, deep_gemm="DeepGEMM" not in absent)
    peer.compiled()
    print("compiled", flush=True)

    ceilings = {name: ceiling(dtype) for name, dtype in DTYPES.items()}
    print(f"ceilings, TFLOP/s: {ceilings}", flush=True)
    rows: Rows = {context: {} for context in options.contexts}
    for context, row in rows.items():
        makes = variants(options.queries, context, options.largest_flat, deep_gemm="DeepGEMM" not in absent)
        for name, make in makes.items():
            row[name] = measure(make)
            progress(context, name, row[name])
        del makes, make  # the inputs with them
    refinement = refinement_ms(options) if 64 * K in rows else {}
    if "TileLang HISA" not in absent:
        for context, found in peer.results():
            rows[context][TILELANG] = found
            progress(context, TILELANG, found)

    names = [name for name in NAMES if any(name in row for row in rows.values())]
    asked = command("indexer", made, options)
    found_goals = goals(rows, ceilings, refinement, options.queries)
    parts = [
        "# The indexer against its peers",
        f"`{asked}`, {machine()}; {options.queries} queries at the end of the context, {SIZES}, unsorted.  ms of a "
        "call (MiB besides results), replayed in a CUDA graph, and how many times that is what `hisa` takes in the "
        f"same dtype; in bold where the other is faster.  Ceilings: float8 {ceilings['fp8']:.0f}, bfloat16 "
        f"{ceilings['bf16']:.0f} TFLOP/s." + "".join(f"  Absent: {name} ({why})." for name, why in absent.items()),
        table(["context", *names], [[str(at), *(cell(name, row) for name in names)] for at, row in rows.items()]),
        "The same launched from the host one by one, the L2 cache cleared before each, ms:",
        launched_table(rows, names),
        goals_table(found_goals),
    ]
    raw = {
        "command": asked,
        "absent": absent,
        "ceilings_tflops": ceilings,
        "refinement_ms": refinement,
        "contexts": {str(context): row for context, row in rows.items()},
        "goals": raw_goals(found_goals),
    }
    write(options.out, parts, raw)


if __name__ == "__main__":
    main()
