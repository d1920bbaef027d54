"""What the GPU benchmarks share: timing, memory, ceilings, tables with goals, and where results go.

Times are medians of replays of a CUDA graph, so that no launch from the host is in them; beside them stand times of
calls launched from the host, as eager code makes them.  Memory is the allocator's peak during a call, less what was
there before it and less the results.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import re
import shlex
import statistics
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

K = 2**10
FP8 = torch.float8_e4m3fn
REPLAYS = 20
OUT_OF_MEMORY, NOT_TRIED = "out of memory", "not tried"

Call = Callable[[], Any]
# "ms", "launched_ms" and "mib", or "missing": why there are none.
Found = dict[str, Any]


def graph_ms(calls: Sequence[Call]) -> float:
    """Milliseconds of a call: median over replays of a CUDA graph that holds ``calls`` one after another.

    Several calls with inputs of their own find a cold L2 cache, as long as their inputs together are larger than it.
    """

    def once() -> None:
        for call in calls:
            call()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once()
    torch.cuda.current_stream().wait_stream(stream)
    # Enough work in a graph that its own start does not count.
    rounds = max(1, min(10, round(10 / elapsed_ms(once, 2))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            once()
    graph.replay()
    return statistics.median(elapsed_ms(graph.replay, 1) for _ in range(REPLAYS)) / rounds / len(calls)


def elapsed_ms(call: Call, count: int) -> float:
    """Milliseconds between two events with ``count`` calls from the host in between, a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def launched_ms(call: Call) -> float:
    """Milliseconds of a call launched from the host, the L2 cache cleared before it."""
    return triton.testing.do_bench(call, warmup=5, rep=30, return_mode="median")


def extra_mib(call: Call) -> float:
    """MiB that a call takes besides its results, after a first one."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    tensors = [results] if isinstance(results, Tensor) else list(results)
    own = sum(x.numel() * x.element_size() for x in tensors)
    return max(0, torch.cuda.max_memory_allocated() - before - own) / 2**20


def attempt(numbers: Callable[[], Found]) -> Found:
    """What ``numbers`` gives, or why it gives nothing: a peer that breaks must not take the others' numbers along."""
    try:
        return numbers()
    except torch.OutOfMemoryError:
        return {"missing": OUT_OF_MEMORY}
    except Exception as error:
        traceback.print_exc()
        return {"missing": f"failed, {type(error).__name__}"}
    finally:
        gc.collect()
        # After an illegal access every call of CUDA fails; what was measured before is still to be written.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def attempt_growing(so_far: Iterable[Found], numbers: Callable[[], Found]) -> Found:
    """:func:`attempt` at the next size, unless the memory did not suffice for a smaller one."""
    if any(found.get("missing") in (OUT_OF_MEMORY, NOT_TRIED) for found in so_far):
        return {"missing": NOT_TRIED}
    return attempt(numbers)


def measure(make: Callable[[], Call]) -> Found:
    """Time and memory of the call that ``make`` gives."""

    def numbers() -> Found:
        call = make()
        return {"mib": extra_mib(call), "ms": graph_ms([call]), "launched_ms": launched_ms(call)}

    return attempt(numbers)


def ceiling(dtype: torch.dtype, size: int = 8192) -> float:
    """TFLOP/s of a square product."""
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    one = torch.ones((), device="cuda")

    def product() -> Tensor:
        if dtype == FP8:
            return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
        return a @ b.t()

    return 2 * size**3 / triton.testing.do_bench(product, warmup=50, rep=200, return_mode="median") / 1e9


def copy_bandwidth() -> float:
    """Bytes a second of a copy of 1 GiB, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ms = triton.testing.do_bench(lambda: target.copy_(source), warmup=10, rep=50, return_mode="median")
    return 2 * source.numel() / ms * 1e3


def kernels_ms(call: Call, count: int = 10) -> dict[str, float]:
    """Milliseconds that each kernel takes in a call, by name; empty where the profiler saw none."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / count / 1e3 for event in profile.key_averages()}


def kernel_ms(call: Call, name: str) -> float | None:
    """Milliseconds that kernels with ``name`` in theirs take in a call; None where the profiler saw none."""
    return sum(ms for kernel, ms in kernels_ms(call).items() if name in kernel) or None


class Goal(NamedTuple):
    """A figure to reach: at least, or at most, ``wanted``; ``measured`` None where there is no number."""

    name: str
    wanted: float
    measured: float | None
    at_most: bool = False
    unit: str = "x"
    note: str = ""

    @property
    def reached(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted

    def cells(self) -> list[str]:
        verdict = {None: "not measured", True: "reached", False: "**missed**"}[self.reached]
        measured = "" if self.measured is None else f"{self.measured:.2f}{self.unit}"
        measured = "∞" if self.measured == float("inf") else measured
        bound = f"at {'most' if self.at_most else 'least'} {self.wanted:g}{self.unit}"
        return [self.name, bound, measured + (f" ({self.note})" if self.note else ""), verdict]


def goals_table(goals: Iterable[Goal]) -> str:
    return "## Goals\n\n" + table(["goal", "wanted", "measured", ""], [goal.cells() for goal in goals])


def raw_goals(goals: Sequence[Goal]) -> list[dict[str, Any]]:
    finite = [goal._replace(measured=None) if goal.measured == float("inf") else goal for goal in goals]
    return [kept._asdict() | {"reached": goal.reached} for kept, goal in zip(finite, goals, strict=True)]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)


def ratio(one: float | None, other: float | None) -> float | None:
    """one / other, where there are both and the latter is not 0."""
    return one / other if one is not None and other else None


def ratio_text(value: float | None) -> str:
    """How many times slower than the operator; in bold where it is the operator that loses."""
    if value is None:
        return ""
    return f"**{value:.2f}x**" if value < 1 else f"{value:.1f}x"


def mib_text(mib: float) -> str:
    return f"{mib:.1f}" if mib < 10 else f"{mib:.0f}"


def progress(point: object, name: str, found: Found) -> None:
    """A line a measurement, so that a run that is cut off has shown what it had."""
    numbers = {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}
    print(f"{point}: {name}: {numbers}", flush=True)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="write the tables to this Markdown file, raw numbers beside it as JSON")
    return made


def command(module: str, made: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """The command as it is to be repeated: what differs from the defaults, without places of this machine."""
    words = ["python", "-m", f"benchmarks.{module}"]
    for action in made._actions:
        value = getattr(options, action.dest, None)
        if isinstance(value, Path) or value is None or value == action.default or not action.option_strings:
            continue
        words.append(action.option_strings[-1])
        if action.nargs != 0:
            words += [str(x) for x in value] if isinstance(value, list) else [str(value)]
    return shlex.join(words)


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"{device}, torch {torch.__version__}, Triton {triton.__version__}"


def importable(module: str) -> str | None:
    """None where ``module`` can be imported, else why not."""
    try:
        __import__(module)
    except ModuleNotFoundError as error:
        return str(error)
    except Exception as error:  # a library of another version can fail in any way
        traceback.print_exc()
        return f"its import fails, {type(error).__name__}"
    return None


def write(out: Path | None, parts: Sequence[str], raw: dict[str, Any]) -> None:
    """Print the parts of the report; with ``out`` keep it there, and the raw numbers beside it."""
    print("\n\n".join(parts) + "\n", flush=True)
    keep(out, parts, raw)


def keep(out: Path | None, parts: Sequence[str], raw: dict[str, Any]) -> None:
    """:func:`write` without printing: what there is so far of a long run, should it be cut off."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n\n".join(parts) + "\n")
        raw = {"machine": machine(), "python": sys.version.split()[0]} | raw
        # Numbers of a list side by side.
        text = re.sub(r"\[[-+.,\deE\s]*\]", lambda found: " ".join(found[0].split()), json.dumps(raw, indent=1))
        out.with_suffix(".json").write_text(text + "\n")
