"""The coarse stages: time and extra memory of a call, by block size at the same number of candidates.

    python -m benchmarks.coarse [--points 64Kx2048 ...] [--out benchmarks/results/coarse.md]

1024 queries at the end of the context, H = 64, D = 128, gaussian values, float8 and bfloat16, results unsorted.  A
point is context x topk; candidates are m * B = 4 topk, so that 64K x 2048 is the paper's setting and 64K x 4096 its 4:1
compression.  What each option finds is measured on a real model: benchmarks/results/fidelity.

Gaussian queries have nothing in common.  A second table has long contexts where those that lie together are alike, and
a third decode steps, one query a sequence, with the representatives of blocks given where a stage takes any.
"""

from __future__ import annotations

import argparse
import functools

import torch

import hisa_compile
from hisa_compile.ops.coarse import COARSE_STAGES

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
    write,
)

DTYPES = {"float8": FP8, "bfloat16": torch.bfloat16}
CANDIDATES_PER_SELECTED = 4
# The paper's setting, and what may be had for more time: (stage, B).
PAPER = ("paper", 128)
SIZES = (128, 64, 32)
OPTIONS = tuple((stage, size) for size in SIZES for stage in COARSE_STAGES)
# The correlation of queries that lie together, and the stages beside the paper's that it may matter to.
ALIKE = 0.9
ALIKE_POINTS = ("256Kx2048", "1024Kx2048")
# Sequences x context, one query each.
DECODE_POINTS = ("32x128K", "8x1024K")
WHOLE = OPTIONS[: len(COARSE_STAGES)]
POINTS = ("16Kx2048", "32Kx2048", "64Kx2048", "64Kx4096", "128Kx2048", "256Kx2048", "1024Kx2048")
# What finds more may take so many times as long as the paper's stage, at a context of 64K.
MOST_TIME = 1.25
LIMITED = (("probe", 128), ("probe", 64))
SPLIT = 64 * K


def parse_point(point: str) -> tuple[int, int]:
    """(context, topk) of a point such as 64Kx2048."""
    context, _, topk = point.partition("x")
    if not topk.isdecimal() or not context.removesuffix("K").isdecimal():
        raise argparse.ArgumentTypeError(f"a point is context x topk, such as 64Kx2048, not {point!r}")
    return int(context.removesuffix("K")) * (K if context.endswith("K") else 1), int(topk)


def key_of(stage: str, block_size: int) -> str:
    return f"{stage}, B = {block_size}"


def call(given: programs.Inputs, topk: int, stage: str, block_size: int) -> Call:
    blocks = CANDIDATES_PER_SELECTED * topk // block_size
    budget = {"block_size": block_size, "block_topk": blocks, "coarse": stage}
    return lambda: hisa_compile.indexer_topk(topk=topk, sorted=False, **given, **budget)


def measured(
    where: str,
    given: programs.Inputs,
    topk: int,
    stages: tuple[tuple[str, int], ...],
    cached: bool = False,
) -> dict[str, Found]:
    """By stage and B; ``cached``: representatives of blocks are given."""
    row: dict[str, Found] = {}
    for stage in stages:

        def run(stage: tuple[str, int] = stage) -> Found:
            own = programs.with_representatives(given, *stage) if cached else given
            one = call(own, topk, *stage)
            return {"mib": extra_mib(one), "ms": graph_ms([one])}

        row[key_of(*stage)] = found = attempt(run)
        progress(where, key_of(*stage), found)
    return row


def kernels_us(one: Call) -> Found:
    return {"kernels_us": {kernel: 1e3 * ms for kernel, ms in kernels_ms(one).items()}}


def split(rows: dict[str, dict[str, dict[str, Found]]]) -> None:
    """Add microseconds by kernel at the context of SPLIT.

    Behind all times: once torch.profiler has run, CUDA graphs take some microseconds longer for good.
    """
    for name, found in rows.items():
        given = programs.inputs(1024, SPLIT, DTYPES[name])
        for point, row in found.items():
            context, topk = parse_point(point)
            for stage in OPTIONS if context == SPLIT else ():
                row[key_of(*stage)] |= attempt(functools.partial(kernels_us, call(given, topk, *stage)))


def cell(found: Found, paper: Found) -> str:
    if "ms" not in found:
        return str(found.get("missing", ""))
    more = ratio(found["ms"], paper.get("ms"))
    times = "" if found is paper or more is None else f" {more:.2f}x"
    return f"{found['ms']:.3f} ({mib_text(found['mib'])}){times}"


def goals_of(rows: dict[str, dict[str, dict[str, Found]]]) -> list[Goal]:
    goals = []
    for name, found in rows.items():
        for point, row in found.items():
            context, topk = parse_point(point)
            for option in LIMITED if context == SPLIT else ():
                more = ratio(row.get(key_of(*option), {}).get("ms"), row.get(key_of(*PAPER), {}).get("ms"))
                where = f"64K, {context // (CANDIDATES_PER_SELECTED * topk)}:1, {name}"
                goals.append(Goal(f"{key_of(*option)} over {key_of(*PAPER)}, {where}", MOST_TIME, more, at_most=True))
    return goals


def tables(rows: dict[str, dict[str, dict[str, Found]]], what: str, keys: list[str]) -> str:
    """Markdown, a table a dtype; ``what`` a point is."""
    parts = []
    for name, found in rows.items():
        body = [[point, *(cell(row[key], row[keys[0]]) for key in keys)] for point, row in found.items()]
        parts.append(f"## {name}\n\n" + table([what, *keys], body))
    return "\n\n".join(parts)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--points", nargs="+", default=list(POINTS))
    made.add_argument("--alike", nargs="*", default=list(ALIKE_POINTS))
    made.add_argument("--decode", nargs="*", default=list(DECODE_POINTS))
    options = made.parse_args()
    rows: dict[str, dict[str, dict[str, Found]]] = {name: {} for name in DTYPES}
    try:
        points, alike_points = ({at: parse_point(at) for at in given} for given in (options.points, options.alike))
        # Sequences x context.
        decode_points = {at: parse_point("x".join(reversed(at.split("x")))) for at in options.decode}
    except argparse.ArgumentTypeError as error:
        made.error(str(error))
    others: dict[str, dict[str, dict[str, dict[str, Found]]]] = {"alike": {}, "decode": {}}
    for name, dtype in DTYPES.items():
        for point, (context, topk) in points.items():
            given = programs.inputs(1024, context, dtype)
            rows[name][point] = measured(f"{name} {point}", given, topk, OPTIONS)
        alike, decode = (others[kind].setdefault(name, {}) for kind in others)
        for point, (context, topk) in alike_points.items():
            given = programs.inputs(1024, context, dtype, alike=ALIKE)
            alike[point] = measured(f"{name} {point} alike", given, topk, WHOLE)
        for point, (context, batch) in decode_points.items():
            given = programs.inputs(1, context, dtype, batch)
            decode[point] = measured(f"{name} {point} decode", given, programs.TOPK, WHOLE, cached=True)
    split(rows)
    keys = [key_of(*option) for option in OPTIONS]
    goals = goals_of(rows)
    sizes = f"H = {programs.HEADS}, D = {programs.DIM}, {CANDIDATES_PER_SELECTED} candidates for each selected token"
    parts = [
        f"# Coarse stages\n\n`{command('coarse', made, options)}`, {machine()}; 1024 queries at the end of a context, "
        f"{sizes}, unsorted.  ms of a call, replayed in a CUDA graph (MiB besides results), and how many times the "
        "paper's setting that is."
    ]
    parts += [tables(rows, "context x topk", keys)]
    if options.alike:
        parts += [
            f"# Queries that are alike\n\nThe {programs.RUN} queries of a run have a correlation of {ALIKE}.",
            tables(others["alike"], "context x topk", [key_of(*option) for option in WHOLE]),
        ]
    if options.decode:
        parts += [
            f"# Decoding\n\nOne query a sequence, topk = {programs.TOPK}; means, and spreads, of blocks given.",
            tables(others["decode"], "sequences x context", [key_of(*option) for option in WHOLE]),
        ]
    parts.append(goals_table(goals))
    write(options.out, parts, {"rows": rows, **others, "goals": raw_goals(goals), "machine": machine()})


if __name__ == "__main__":
    main()
