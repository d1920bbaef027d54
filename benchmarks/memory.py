"""Extra memory of one call on a GPU: what it takes besides its inputs and results, as the context grows.

    python -m benchmarks.memory [--out benchmarks/results/memory.md]

H = 64, D = 128, topk = 2048, B = 128, m = 64, causal windows, results unsorted.  Two shapes: a whole prefill in one
call (as many queries as tokens), and 1024 queries at the end of a context.  Variants: the operator in bfloat16 and
float8, with the paper's means of blocks and, as "hisa default", without naming a coarse stage; torch.compile of the
flat bfloat16 program, and DeepGEMM's float8 logits with torch.topk over them, where deep_gemm can be imported.
(``benchmarks.indexer`` has the memory of TileLang's example.)

Memory is the allocator's peak during a second call, less what was there before it and less the results, which take
8 bytes for each selected token.  Where a variant has no memory for a size, larger ones are not tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import programs
from .harness import (
    FP8,
    Call,
    Found,
    Goal,
    attempt_growing,
    command,
    extra_mib,
    goals_table,
    importable,
    machine,
    mib_text,
    parser,
    progress,
    ratio,
    ratio_text,
    raw_goals,
    table,
    write,
)
from .programs import SIZES, Inputs

DEEP_GEMM = "DeepGEMM + topk fp8"
BF16 = torch.bfloat16
# The operator first and what might break last: an illegal access would take everything after it along.
VARIANTS: dict[str, tuple[torch.dtype, Callable[[Inputs], Call]]] = {
    "hisa bf16": (BF16, programs.hisa),
    "hisa fp8": (FP8, programs.hisa),
    "hisa default bf16": (BF16, programs.by_default),
    "hisa default fp8": (FP8, programs.by_default),
    "torch.compile bf16": (BF16, programs.compiled),
    DEEP_GEMM: (FP8, lambda given: programs.deep_gemm(given, topk=True)),
}
SQUARE, TALL = "prefill", "1024 queries"
GOAL_MIB = 64
Rows = dict[int, dict[str, Found]]


def measure(name: str, queries: int, context: int) -> Found:
    dtype, make = VARIANTS[name]
    return {"mib": extra_mib(make(programs.inputs(queries, context, dtype)))}


def goals(shapes: dict[str, Rows]) -> list[Goal]:
    made = []
    for shape, rows in shapes.items():
        for name in (name for name in VARIANTS if name.startswith("hisa")):
            found = [row[name].get("mib") for row in rows.values()]
            most = max((mib for mib in found if mib is not None), default=None)
            # A size without a number is a size that was not reached.
            most = float("inf") if None in found else most
            made.append(Goal(f"{name}, {shape}, most extra memory", GOAL_MIB, most, at_most=True, unit=" MiB"))
    return made


def cell(name: str, row: dict[str, Found]) -> str:
    found = row.get(name, {})
    if "mib" not in found:
        return str(found.get("missing", ""))
    if name.startswith("hisa"):
        return mib_text(found["mib"])
    own = row["hisa " + name.rsplit(" ", 1)[1]].get("mib")
    return f"{mib_text(found['mib'])} {ratio_text(ratio(found['mib'], own))}"


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--prefills", type=int, nargs="+", default=[2**n for n in range(12, 18)])
    made.add_argument("--contexts", type=int, nargs="+", default=[2**n for n in (13, 14, 15, 16, 17, 18, 20)])
    options = made.parse_args()
    why = importable("deep_gemm")
    names = [name for name in VARIANTS if name != DEEP_GEMM or why is None]
    asked, where = command("memory", made, options), machine()
    shapes: dict[str, Rows] = {
        SQUARE: {length: {} for length in sorted(options.prefills)},
        TALL: {context: {} for context in sorted(options.contexts)},
    }
    for name in names:
        for shape, rows in shapes.items():
            for context, row in rows.items():
                queries = context if shape == SQUARE else 1024
                smaller = [rows[other][name] for other in rows if other < context]
                row[name] = attempt_growing(smaller, lambda name=name, at=(queries, context): measure(name, *at))
                progress(f"{shape}, {context}", name, row[name])

    found_goals = goals(shapes)
    parts = [
        "# Extra memory of one call",
        f"`{asked}`, {where}; {SIZES}, unsorted.  MiB besides inputs and results, and how many times that is what "
        "`hisa` takes in the same dtype; in bold where it is less." + (f"  Absent: DeepGEMM ({why})." if why else ""),
    ]
    titles = {SQUARE: "As many queries as tokens", TALL: "1024 queries at the end of a context"}
    for shape, rows in shapes.items():
        body = [[str(context), *(cell(name, row) for name in names)] for context, row in rows.items()]
        parts += [f"## {titles[shape]}", table(["tokens", *names], body)]
    raw: dict[str, Any] = {
        "command": asked,
        "absent": {"DeepGEMM": why} if why else {},
        "shapes": {shape: {str(context): row for context, row in rows.items()} for shape, rows in shapes.items()},
        "goals": raw_goals(found_goals),
    }
    write(options.out, [*parts, goals_table(found_goals)], raw)


if __name__ == "__main__":
    main()
