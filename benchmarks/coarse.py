"""The coarse stages: time and extra memory of a call, by block size at the same number of candidates.

    python -m benchmarks.coarse [--contexts 65536 ...] [--out benchmarks/results/coarse.md]

1024 queries at the end of the context, H = 64, D = 128, topk = 2048, m * B = 8192 candidates, gaussian values, float8
and bfloat16, results unsorted.  What each option finds is measured on a real model: benchmarks/results/fidelity.
"""

from __future__ import annotations

import hisa_compile

from . import programs
from .harness import (
    FP8,
    Call,
    Found,
    Goal,
    K,
    attempt,
    command,
    extra_mib,
    goals_table,
    graph_ms,
    kernels_ms,
    machine,
    mib_text,
    parser,
    progress,
    ratio,
    raw_goals,
    table,
    torch,
    write,
)

DTYPES = {"float8": FP8, "bfloat16": torch.bfloat16}
CANDIDATES = programs.BLOCK_SIZE * programs.BLOCK_TOPK
# The paper's setting, and what may be had for more time: (stage, B).
PAPER = ("paper", 128)
PROBE = ("probe", 128)
OPTIONS = (PAPER, PROBE, ("paper", 64), ("probe", 64), ("paper", 32))
CONTEXTS = (16 * K, 32 * K, 64 * K, 128 * K, 256 * K, 1024 * K)
# The probe at a context of 64K against the paper's stage.
MOST_TIME = 1.25


def call(given: programs.Inputs, stage: str, block_size: int) -> Call:
    budget = {"block_size": block_size, "block_topk": CANDIDATES // block_size, "coarse": stage}
    return lambda: hisa_compile.indexer_topk(topk=programs.TOPK, sorted=False, **given, **budget)


def measure(given: programs.Inputs, stage: str, block_size: int, split: bool) -> Found:
    one = call(given, stage, block_size)
    found: Found = {"mib": extra_mib(one), "ms": graph_ms([one])}
    return found | {"kernels_us": {name: 1e3 * ms for name, ms in kernels_ms(one).items()}} if split else found


def cell(found: Found, paper: Found) -> str:
    if "ms" not in found:
        return str(found.get("missing", ""))
    more = ratio(found["ms"], paper.get("ms"))
    times = "" if found is paper or more is None else f" {more:.2f}x"
    return f"{found['ms']:.3f} ({mib_text(found['mib'])}){times}"


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    options = made.parse_args()
    rows: dict[str, dict[int, dict[str, Found]]] = {name: {} for name in DTYPES}
    for name, dtype in DTYPES.items():
        for context in options.contexts:
            given = programs.inputs(1024, context, dtype)
            row = rows[name][context] = {}
            for stage, block_size in OPTIONS:
                key = f"{stage}, B = {block_size}"
                split = context == 64 * K
                row[key] = attempt(lambda s=stage, b=block_size, g=given, k=split: measure(g, s, b, k))
                progress(f"{name} {context}", key, {k: v for k, v in row[key].items() if k != "kernels_us"})
    keys = [f"{stage}, B = {block_size}" for stage, block_size in OPTIONS]
    goals = []
    for name, found in rows.items():
        at = found.get(64 * K, {})
        more = ratio(at.get(keys[1], {}).get("ms"), at.get(keys[0], {}).get("ms"))
        goals.append(Goal(f"probe over paper, {name}, 64K, B = 128", MOST_TIME, more, at_most=True))
    sizes = f"H = {programs.HEADS}, D = {programs.DIM}, topk = {programs.TOPK}, {CANDIDATES} candidates"
    parts = [
        f"# Coarse stages\n\n`{command('coarse', made, options)}`, {machine()}; 1024 queries at the end of a context, "
        f"{sizes}, unsorted.  ms of a call, replayed in a CUDA graph (MiB besides results), and how many times the "
        "paper's setting that is."
    ]
    for name, found in rows.items():
        body = [[str(at), *(cell(row[key], row[keys[0]]) for key in keys)] for at, row in found.items()]
        parts += [f"## {name}", table(["context", *keys], body)]
    parts.append(goals_table(goals))
    write(options.out, parts, {"rows": rows, "goals": raw_goals(goals), "machine": machine()})


if __name__ == "__main__":
    main()
