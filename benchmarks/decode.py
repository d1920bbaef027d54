"""Decoding: few queries a sequence over a cache, against the flat program compiled and against the memory's bandwidth.

    python -m benchmarks.decode [--points 1x32K 8x128Kx4 ...] [--out benchmarks/results/decode.md]

H = 64, D = 128, topk = 2048, B = 128, m = 64, gaussian inputs, a point is batch x context, or batch x context x queries
where a sequence has more than one, the last of its context.  Each sequence has a window over its whole context.  Means
of blocks are given (``k_pooled``), as a cache keeps them; results unsorted.  Variants:

- hisa: the operator, bfloat16 and float8 (float8 with a scale a token);
- flat: the operator with every block kept, bfloat16, which is exact;
- torch.compile of the flat bfloat16 program, captured in a CUDA graph like the operator;
- the same with mode="reduce-overhead", which makes CUDA graphs itself: called from the host, 50 calls between two
  events, its inputs marked as static addresses so that it does not copy them.

Times are medians of replays of CUDA graphs.  A graph holds calls on several sets of inputs in turn, as many as are
needed for what they read to exceed the L2 cache well, so that no call finds its keys there: in a model the other
layers come between two calls of one.  (Reduce-overhead has one set.)  The goals take the faster of the two compiled
variants.

The floor of a call is what it must move (queries, weights, means, the keys of m blocks of each query, results) at the
bandwidth that a copy of 1 GiB reaches in the same run.  Gaussian queries of a sequence share few blocks.  Raw numbers
go beside the table, as JSON.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from typing import Any, NamedTuple

import torch

from . import programs
from .harness import (
    FP8,
    Call,
    Found,
    Goal,
    K,
    attempt,
    command,
    copy_bandwidth,
    elapsed_ms,
    goals_table,
    graph_ms,
    machine,
    parser,
    progress,
    ratio,
    ratio_text,
    raw_goals,
    table,
    write,
)
from .programs import BLOCK_SIZE, BLOCK_TOPK, DIM, HEADS, SIZES, TOPK, Inputs

POINTS = ("1x32K", "1x128K", "8x32K", "8x128K", "32x32K", "32x128K", "1x1024K", "128x32K")
POINTS += ("8x1024K", "128x128K", "1x128Kx8", "8x128Kx4")
HISA, HISA_FP8, FLAT = "hisa bf16", "hisa fp8", "flat bf16"
GRAPHED, MANAGED = "torch.compile bf16", "torch.compile bf16, reduce-overhead"
NAMES = (HISA, HISA_FP8, FLAT, GRAPHED, MANAGED)
# What the calls of one graph read together, at least; four times the L2 cache of an H100.
COLD_BYTES = 200 * 2**20
MOST_SETS, MOST_KEY_BYTES = 64, 8 * 2**30


class Size(NamedTuple):
    batch: int
    context: int
    queries: int


def size(point: str) -> Size:
    """Of a point such as 32x128K, or 8x128Kx4."""
    batch, context, *queries = point.split("x")
    return Size(int(batch), int(context.removesuffix("K")) * K, int(queries[0]) if queries else 1)


def moved_bytes(at: Size, width: int) -> int:
    """Bytes that a call must read and write; ``width``: bytes of an element of queries and keys."""
    query = HEADS * (DIM * width + 4)  # with its weights, float32
    keys = min(BLOCK_TOPK * BLOCK_SIZE, at.context) * (DIM * width + (4 if width == 1 else 0))  # with their scales
    keys = min(at.queries * keys, keys * -(-at.context // (BLOCK_TOPK * BLOCK_SIZE)))  # each of them once
    means = -(-at.context // BLOCK_SIZE) * DIM * 2
    results = TOPK * 8
    return at.batch * (at.queries * (query + results) + keys + means)


def sets_of(at: Size) -> int:
    """Sets of inputs that a graph's calls take in turn."""
    enough = -(-COLD_BYTES // moved_bytes(at, 2))
    fitting = MOST_KEY_BYTES // (at.batch * at.context * DIM * 2)
    return max(1, min(enough, fitting, MOST_SETS))


def decode_inputs(at: Size, dtype: torch.dtype, seed: int = 0, heads: int = HEADS, dim: int = DIM) -> Inputs:
    """The window has a row a sequence, as a batch of contexts of different length needs."""
    given = programs.inputs(at.queries, at.context, dtype, at.batch, seed, heads=heads, dim=dim)
    return given | {"window_end": given["window_end"].expand(at.batch, at.queries).contiguous()}


def graphed(given: list[Inputs]) -> list[Call]:
    """torch.compile of the flat program on several sets of inputs, compiled once."""
    torch._dynamo.reset()
    run = torch.compile(programs.flat, dynamic=False)
    arguments = [programs.flat_arguments(each) for each in given]
    return [lambda each=each: run(*each) for each in arguments]


def managed_ms(given: Inputs) -> float:
    """Milliseconds of a call under mode="reduce-overhead"."""
    torch._dynamo.reset()
    run = torch.compile(programs.flat, dynamic=False, mode="reduce-overhead")
    arguments = programs.flat_arguments(given)
    for each in arguments:
        torch._dynamo.mark_static_address(each)

    def call() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        run(*arguments)

    for _ in range(5):  # compiles, warms up, records, replays
        call()
    torch.cuda.synchronize()
    return statistics.median(elapsed_ms(call, 50) for _ in range(5))


def measure_point(point: str) -> dict[str, Found]:
    """Each variant's milliseconds; inputs are made once a dtype."""
    at = size(point)
    found: dict[str, Found] = {}

    def timed(name: str, milliseconds: Any) -> None:
        found[name] = attempt(lambda: {"ms": milliseconds()})
        progress(point, name, found[name])

    for dtype, name in ((FP8, HISA_FP8), (torch.bfloat16, HISA)):
        given = [decode_inputs(at, dtype, seed) for seed in range(sets_of(at))]
        pooled = [programs.with_representatives(each) for each in given]
        timed(name, lambda pooled=pooled: graph_ms([programs.hisa(each) for each in pooled]))
    timed(FLAT, lambda: graph_ms([programs.every_block(each) for each in given]))
    timed(GRAPHED, lambda: graph_ms(graphed(given)))
    timed(MANAGED, lambda: managed_ms(given[0]))
    return found


def fastest_compiled(row: dict[str, Found]) -> float | None:
    return min((row[name]["ms"] for name in (GRAPHED, MANAGED) if "ms" in row.get(name, {})), default=None)


def goals(rows: dict[str, dict[str, Found]]) -> list[Goal]:
    made = []
    for point, wanted in (("32x128K", 25), ("8x32K", 8), ("1x128K", 4)):
        row = rows.get(point, {})
        found = ratio(fastest_compiled(row), row.get(HISA, {}).get("ms"))
        made.append(Goal(f"torch.compile bf16 over hisa bf16, {point}", wanted, found))
    for point, row in rows.items():
        share = row.get(HISA, {}).get("share")
        made.append(Goal(f"share of the bandwidth floor, hisa bf16, {point}", 50, share, unit=" %"))
    return made


def cell(name: str, row: dict[str, Found]) -> str:
    found = row[name]
    if "ms" not in found:
        return str(found["missing"])
    if "share" in found:
        return f"{found['ms']:.4f} ({found['share']:.0f} %)"
    return f"{found['ms']:.4f} {ratio_text(ratio(found['ms'], row[HISA].get('ms')))}"


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    made = parser(__doc__)
    made.add_argument("--points", nargs="+", default=list(POINTS), help="batch x context, such as 32x128K")
    return made, made.parse_args()


def main() -> None:
    made, options = parse()
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e9:.0f} GB/s", flush=True)
    rows: dict[str, dict[str, Found]] = {}
    floors: dict[str, float] = {}
    for point in options.points:
        row = rows[point] = measure_point(point)
        gc.collect()
        torch.cuda.empty_cache()
        for name, width in ((HISA, 2), (HISA_FP8, 1)):
            floor = moved_bytes(size(point), width) / bandwidth * 1e3
            if "ms" in row[name]:
                row[name] |= {"floor_ms": floor, "share": 100 * floor / row[name]["ms"]}
            if name == HISA:
                floors[point] = floor

    asked = command("decode", made, options)
    found_goals = goals(rows)
    body = []
    for point, row in rows.items():
        sizes = [point.split("x")[0], point.split("x")[1], str(size(point).queries)]
        body.append([*sizes, f"{floors[point]:.4f}", *(cell(name, row) for name in NAMES)])
    parts = [
        "# Decoding, few queries a sequence",
        f"`{asked}`, {machine()}; {SIZES}, unsorted, means of blocks given.  ms of a call; for `hisa` its share of the "
        "bandwidth floor in brackets, for others how many times `hisa bf16` they take, in bold where they are faster.  "
        f"Floor: bytes that a bfloat16 call must move at the {bandwidth / 1e9:.0f} GB/s of a copy; a float8 call's "
        "share is of its own bytes.",
        table(["batch", "context", "queries", "floor bf16", *NAMES], body),
        goals_table(found_goals),
    ]
    raw = {
        "command": asked,
        "copy_bytes_per_second": bandwidth,
        "points": rows,
        "sets_of_inputs": {point: sets_of(size(point)) for point in rows},
        "goals": raw_goals(found_goals),
    }
    write(options.out, parts, raw)


if __name__ == "__main__":
    main()
