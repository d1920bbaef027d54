"""Launch configurations for the GPU at hand, in a file that the operator reads.

    python -m benchmarks.tune [--out tuned.json] [--kernels coarse ...] [--shapes fp8-64x128 ...] [--points 1x32K ...]
                              [--workers 8]
    HISA_COMPILE_TUNED=tuned.json python your_program.py

A shape is a dtype, heads and D.  For each, the calls of the field, topk = 2048, B = 128, m = 64, gaussian inputs:

- prefill: 1024 queries at the end of 65536 tokens;
- every: the same with every block kept, at H = 64, D = 128 alone;
- probe, half, quarter: the prefill with blocks found by the probe, and that with blocks of 64 and of 32, m = 128, 256;
- decoding, one query a sequence, means of blocks given, a point is batch x context;
- sorted: the prefill with results in order, for the kernels that sort, at the first shape alone.  Selection does not
  know heads, and is timed at the first shape alone too.

In each call every kernel that runs is timed (torch.profiler, the L2 cache cleared before each call) under the row of
``hisa_compile/ops/triton/configurations.py`` that it has today and under those that VARIATIONS makes of it.  Of a shape
class the best row is the one with the best geometric mean of times over today's, each kind of call (prefill, every,
probe, half, quarter, decode, sorted) counting the same; it is kept if it gains 2 %.  A row that does not compile, that
asks for more registers or shared memory than there are, or that changes a result is listed and left out.

A row varies one thing at a time: a second run under the first one's file goes on from there.  By default about 160
kernels are compiled, most in less than a second; --workers processes that share Triton's cache do that ahead, with 0 of
them each is compiled when it is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from hisa_compile.ops.triton import again, config, configurations, gpu
from hisa_compile.ops.triton.configurations import DEFAULT, FIELDS, WIDE, Architecture, Configuration, Shape

from . import programs
from .decode import decode_inputs, size
from .harness import FP8, Call, K, command, kernels_ms, machine, table

DTYPES = {"fp8": FP8, "bf16": torch.bfloat16}
SHAPES = tuple(f"{dtype}-{sizes}" for sizes in ("64x128", "32x128", "64x64", "32x64") for dtype in DTYPES)
POINTS = ("1x32K", "8x32K", "32x32K", "1x128K", "8x128K", "32x128K")
PREFILL, EVERY, DECODE, SORTED = "prefill", "every", "decode", "sorted"
PROBE, HALF, QUARTER = "probe", "half", "quarter"
QUERIES, CONTEXT = 1024, 64 * K
# A row that gains less than this is as good as today's.
LEAST_GAIN = 1.02
# More than any L2 cache.
FLUSH_BYTES = 256 * 2**20

# Kernels whose times tell about a row of the table.
BY_BLOCK = ("refine_by_block_kernel", "refine_by_block_hopper_kernel")
MEASURED = {name: (f"{name}_kernel",) for name in FIELDS} | {
    "by_block_groups": BY_BLOCK,
    "refine_by_block": (BY_BLOCK[0], "list_runs_kernel"),
    "refine_by_block_hopper": (BY_BLOCK[1], "list_runs_kernel"),
    "select_tokens": ("select_tokens_kernel", "select_tokens_hopper_kernel", "list_candidates_kernel"),
    # Of rows longer than one tile, too; among their sample as in a row of that length.
    "select_few_tokens": ("select_tokens_kernel", "select_tokens_hopper_kernel", "guess_key_kernel"),
    "sort": ("sort_kernel", "sort_tiles_kernel", "merge_tiles_kernel"),
}
# What is tried instead of today's values.  A number of programs compiles nothing anew.
VARIATIONS: dict[str, tuple[dict[str, int | None], ...]] = {
    "coarse": ({"stages": 3}, {"programs": 320}, {"programs": 1280}),
    "coarse_hopper": ({"stages": 3}, {"maxnreg": 128}, {"programs": 186}, {"programs": 744}),
    "probe_blocks": ({"stages": 2}, {"stages": 3}, {"programs": 528}, {"programs": 1584}),
    "probe_blocks_hopper": ({"stages": 4}, {"maxnreg": 128}, {"programs": 528}, {"programs": 1584}),
    "refine_by_block": ({"stages": 2}, {"stages": 3}, {"maxnreg": None}, {"maxnreg": 128}, {"programs": 4}),
    "refine_by_block_hopper": ({"stages": 3}, {"maxnreg": 96}, {"maxnreg": 128}, {"maxnreg": 168}, {"programs": 8}),
    "by_block_groups": ({"programs": 4096}, {"programs": 1024, "most_rows": 64}),
    "refine_by_row": ({"stages": 2}, {"stages": 3}, {"stages": 4}, {"programs": 512}),
    "refine_by_row_hopper": ({"stages": 3}, {"stages": 3, "maxnreg": 168, "programs": 384}, {"maxnreg": 96}),
    "select_blocks": ({"num_warps": 1}, {"num_warps": 2}, {"num_warps": 4}),
    "select_tokens": ({"num_warps": 4}, {"num_warps": 8}, {"num_warps": 16}),
    "select_shared_hopper": ({"maxnreg": 96}, {"num_warps": 4}, {"num_warps": 8, "maxnreg": 64}),
    "select_few_tokens": ({"num_warps": 4}, {"num_warps": 16}),
    "sort": ({"num_warps": 4}, {"num_warps": 16}),
}

# Milliseconds by (kind of call, call).
Times = dict[tuple[str, str], float]
Row = tuple[Shape, Configuration]


class Case(NamedTuple):
    """A call to time: its kind, its name, what makes it, and the rows of the table that it tells about."""

    kind: str
    name: str
    shape: str
    point: str
    kernels: tuple[str, ...]


def cases(shapes: Sequence[str], points: Sequence[str], kernels: Sequence[str]) -> list[Case]:
    made = []
    for number, shape in enumerate(shapes):
        whole = tuple(name for name in kernels if name != "sort" and (number == 0 or name not in WIDE))
        made.append(Case(EVERY, f"{shape} {EVERY}", shape, "", whole))
        # These have lists of pairs, which are cut into shares instead.
        known = tuple(name for name in whole if name != "by_block_groups")
        made.append(Case(PREFILL, f"{shape} {PREFILL}", shape, "", known))
        if shape.endswith("-64x128"):
            made += [Case(kind, f"{shape} {kind}", shape, "", known) for kind in (PROBE, HALF, QUARTER)]
        made += [Case(DECODE, f"{shape} {point}", shape, point, known) for point in points]
        if number == 0 and "sort" in kernels:
            made.append(Case(SORTED, f"{shape} {SORTED}", shape, "", ("sort",)))
    return [case for case in made if case.kernels]


def parse_shape(shape: str) -> tuple[torch.dtype, int, int]:
    """(dtype, heads, dim) of a shape such as fp8-64x128."""
    dtype, _, sizes = shape.partition("-")
    heads, _, dim = sizes.partition("x")
    if dtype not in DTYPES or not heads.isdecimal() or not dim.isdecimal():
        raise argparse.ArgumentTypeError(f"a shape is dtype-headsxdim, such as fp8-64x128, not {shape!r}")
    return DTYPES[dtype], int(heads), int(dim)


def make(case: Case) -> Call:
    """The operator's call, which launches what the table says now."""
    call = call_of(case)

    def anew() -> Any:
        again.forget()
        return call()

    return anew


def call_of(case: Case) -> Call:
    dtype, heads, dim = parse_shape(case.shape)
    if case.kind == DECODE:
        given = decode_inputs(size(case.point), dtype, heads=heads, dim=dim)
        return programs.hisa(programs.with_representatives(given))
    given = programs.inputs(QUERIES, CONTEXT, dtype, heads=heads, dim=dim)
    if case.kind == EVERY:
        return programs.every_block(given)
    if case.kind == PROBE:
        return programs.hisa(given, coarse="probe")
    if case.kind in (HALF, QUARTER):
        parts = 2 if case.kind == HALF else 4
        block_size = programs.BLOCK_SIZE // parts
        return programs.hisa(given, parts * programs.BLOCK_TOPK, coarse="probe", block_size=block_size)
    return programs.hisa(given, in_order=case.kind == SORTED)


def current() -> Architecture:
    return gpu.architecture(torch.empty(0, device="cuda")) if torch.cuda.is_available() else DEFAULT


@contextlib.contextmanager
def installed(shape: Shape, row: Configuration) -> Iterator[None]:
    """The table with this row for this architecture and this very class."""
    with mock.patch.dict(configurations.TABLE.setdefault(current(), {}), {shape: row}):
        yield


def shapes_of(call: Call, kernels: Sequence[str]) -> list[Shape]:
    """The classes that a call looks up for kernels that it launches; nothing runs."""
    looked_up: set[Shape] = set()
    launched: set[str] = set()

    def look_up(shape: Shape, architecture: Architecture) -> Configuration:
        looked_up.add(shape)
        return configurations.lookup(shape, architecture)

    with (
        mock.patch.object(config, "lookup", look_up),
        mock.patch.object(gpu, "launch", lambda kernel, *_, **__: launched.add(kernel.__name__)),
    ):
        call()
    return sorted(
        (x for x in looked_up if x.kernel in kernels and launched & set(MEASURED[x.kernel])),
        key=lambda x: (kernels.index(x.kernel), [number or 0 for number in x[1:]]),
    )


def candidates(shape: Shape) -> list[Configuration]:
    """Today's row, then its variations."""
    today = configurations.lookup(shape, current())
    varied = [Configuration(**(today._asdict() | variation)) for variation in VARIATIONS[shape.kernel]]
    return list(dict.fromkeys([today, *varied]))


def text(row: Configuration, kernel: str) -> str:
    return ", ".join(f"{name} {value}" for name in FIELDS[kernel] if (value := getattr(row, name)) is not None) or "-"


def class_text(shape: Shape) -> str:
    named = {name: getattr(shape, name) for name in configurations.classes_of(shape.kernel)}
    return ", ".join(f"{name} {value}" for name, value in named.items() if value is not None)


# ---- compiling ahead -------------------------------------------------------------------------------------------


def identity(kernel: Any, how: config.Launch, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """The same for two launches that Triton compiles as one."""
    parts: list[Any] = [kernel.__name__, how.stages, how.num_warps, how.maxnreg]
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            parts.append(value.dtype)
        elif parameter.is_constexpr or value is None:
            parts.append(value)
        elif type(value) is int and not parameter.do_not_specialize:
            parts.append((value == 1, value % 16 == 0))
    return tuple(parts)


def compile_share(todo: Sequence[Case], share: int, shares: int) -> None:
    """Compile every ``shares``-th of the kernels that :func:`tune` launches, and launch none.

    What fails here fails again where it is timed, and is listed there.
    """
    numbers: dict[tuple[Any, ...], int] = {}
    wanted: tuple[str, ...] | None = None

    def compile_one(kernel: Any, programs: int, how: config.Launch, **arguments: Any) -> None:
        known = identity(kernel, how, arguments)
        if known in numbers or (wanted is not None and kernel.__name__ not in wanted):
            return
        number = numbers.setdefault(known, len(numbers))
        if number % shares == share:
            with contextlib.suppress(Exception):
                options = gpu.launch_options(how, torch.version.hip is not None)
                kernel.warmup(**arguments, **options, grid=(programs,))

    for case in todo:
        with contextlib.suppress(torch.OutOfMemoryError):
            call = make(case)
            with mock.patch.object(gpu, "launch", compile_one):
                wanted = None
                call()
                for shape in shapes_of(call, case.kernels):
                    wanted = MEASURED[shape.kernel]
                    for row in candidates(shape)[1:]:
                        with installed(shape, row):
                            call()


def compile_ahead(arguments: Sequence[str], workers: int) -> None:
    """Fill Triton's cache from several processes at once."""
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.tune", *arguments, "--compile-share", str(share)],
            stdout=subprocess.DEVNULL,
            # Otherwise each of them would have as many threads as there are cores.
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for share in range(workers)
    ]
    codes = [worker.wait() for worker in running]
    if any(codes):
        print("a process that compiles ahead failed; what it left is compiled when it is timed", flush=True)


# ---- timing ----------------------------------------------------------------------------------------------------


@functools.cache
def large_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def timed(call: Call, kernels: Sequence[str]) -> float:
    """Milliseconds of the ``kernels`` in a call that finds nothing in the L2 cache; 0 where the profiler saw none."""

    def after_flush() -> None:
        large_buffer().zero_()
        call()

    return sum(ms for name, ms in kernels_ms(after_flush, count=5).items() if name.startswith(tuple(kernels)))


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def reason(error: Exception) -> str:
    # Triton's messages can be a whole program long.
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def tune(todo: Sequence[Case]) -> tuple[dict[Shape, dict[Configuration, Times]], dict[Row, str]]:
    """Times of every row in every call that has its class, today's first; and the rows that failed, with the reason."""
    found: dict[Shape, dict[Configuration, Times]] = {}
    failed: dict[Row, str] = {}
    for case in todo:
        try:
            call = make(case)
            expected = call()
        except Exception as error:
            # Too little memory, say.
            print(f"{case.name}: left out, {reason(error)}", flush=True)
            continue
        for shape in shapes_of(call, case.kernels):
            rows = found.setdefault(shape, {})
            for row in candidates(shape):
                if (shape, row) in failed:
                    continue
                try:
                    with installed(shape, row):
                        if not equal(call(), expected):
                            raise ValueError("results differ from those of today's row")
                        ms = timed(call, MEASURED[shape.kernel])
                except Exception as error:
                    failed[shape, row] = reason(error)
                    rows.pop(row, None)
                    # Nothing works after an illegal access: this raises then, and the run ends.
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    continue
                if ms == 0:
                    raise RuntimeError(f"the profiler saw no {' or '.join(MEASURED[shape.kernel])}")
                rows.setdefault(row, {})[case.kind, case.name] = ms
        print(f"{case.name}: {sum(map(len, found.values()))} rows, {len(failed)} failed", flush=True)
        del call, expected
    return found, failed


def gain(times: Times, today: Times) -> float:
    """How many times faster than today's row, over the calls that both have; kinds of calls count the same."""
    kinds: dict[str, list[float]] = {}
    for (kind, name), ms in times.items():
        if (kind, name) in today:
            kinds.setdefault(kind, []).append(math.log(today[kind, name] / ms))
    return math.exp(statistics.mean(statistics.mean(logs) for logs in kinds.values())) if kinds else 0.0


def best(rows: dict[Configuration, Times], today: Configuration) -> tuple[Configuration, float]:
    """(row, gain): the fastest, or today's where none gains LEAST_GAIN."""
    gains = {row: gain(times, rows.get(today, {})) for row, times in rows.items()}
    fastest = max(gains, key=lambda row: gains[row], default=today)
    return (fastest, gains[fastest]) if gains.get(fastest, 0.0) >= LEAST_GAIN else (today, 1.0)


def report(
    found: dict[Shape, dict[Configuration, Times]], failed: dict[Row, str]
) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """(tables, rows of the file, what was measured)."""
    body, rows, raw = [], [], []
    for shape, times in found.items():
        today = configurations.lookup(shape, current())
        row, gained = best(times, today)
        rows.append(configurations.row_of(shape, row))
        for each, ms in times.items():
            named = {name: round(value, 5) for (_, name), value in ms.items()}
            raw.append(configurations.row_of(shape, each) | {"ms": named, "today": each == today})
        pairs = []
        for at, before in times.get(today, {}).items():
            after = f" > {1e3 * times[row][at]:.1f}" if row != today and at in times[row] else ""
            pairs.append(f"{at[1]} {1e3 * before:.1f}{after}")
        kept = "the same" if row == today else text(row, shape.kernel)
        cells = [shape.kernel, class_text(shape), text(today, shape.kernel), kept, f"{gained:.2f}x", "; ".join(pairs)]
        body.append(cells)
    head = ["kernel", "class", "today", "best", "faster", "microseconds, today's > the best row's"]
    parts = [table(head, body)]
    if failed:
        body = [[x.kernel, class_text(x), text(row, x.kernel), why] for (x, row), why in failed.items()]
        parts.append("Left out:\n\n" + table(["kernel", "class", "row", "why"], body))
    return "\n\n".join(parts), rows, raw


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help=f"the file for {configurations.VARIABLE}")
    made.add_argument("--kernels", nargs="+", choices=list(FIELDS), default=list(FIELDS))
    made.add_argument("--shapes", nargs="+", default=list(SHAPES), help="dtype-headsxdim, such as bf16-32x128")
    made.add_argument("--points", nargs="*", default=list(POINTS), help="decoding, batch x context, such as 32x128K")
    made.add_argument("--workers", type=int, default=8, help="processes that compile ahead")
    made.add_argument("--compile-share", type=int, help=argparse.SUPPRESS)
    options = made.parse_args(arguments)
    try:
        for shape in options.shapes:
            parse_shape(shape)
        for point in options.points:
            size(point)
    except (argparse.ArgumentTypeError, ValueError) as error:
        made.error(str(error))
    return made, options


def main(arguments: Sequence[str] | None = None) -> None:
    made, options = parse(arguments)
    todo = cases(options.shapes, options.points, options.kernels)
    if options.compile_share is not None:
        # A larger batch compiles nothing anew, and several processes share the memory.
        smallest = {size(point)[1:]: point for point in sorted(options.points, key=size, reverse=True)}
        todo = cases(options.shapes, list(smallest.values()), options.kernels)
        try:
            compile_share(todo, options.compile_share, options.workers)
        except Exception:
            traceback.print_exc()
            sys.exit(1)
        return
    print(f"{machine()}; {len(todo)} calls", flush=True)
    if options.workers:
        compile_ahead(sys.argv[1:] if arguments is None else arguments, options.workers)
        print("compiled", flush=True)
    found, failed = tune(todo)
    tables, rows, raw = report(found, failed)
    print(tables, flush=True)
    # A number of programs is an argument of a kernel; the other values are compiled into it.
    tried = [(x, row) for x, several in found.items() for row in several] + list(failed)
    compiled = {(x, row._replace(programs=None)) for x, row in tried}
    print(f"\n{len(tried)} rows of {len(found)} classes, {len(compiled)} of them compiled, {len(failed)} left out")
    if options.out:
        file = {
            "architecture": current(),
            "device": machine(),
            "found": datetime.date.today().isoformat(),
            "command": command("tune", made, options),
            "rows": rows,
            "measured": raw,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(file, indent=1) + "\n")
        configurations.load(options.out)


if __name__ == "__main__":
    main()
