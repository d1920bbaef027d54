"""Time and peak memory of one indexer call on the CPU: the flat program compiled, and HISA.

    python -m benchmarks.cpu_indexer [--out benchmarks/results/cpu_indexer.md]

Both variants are the same flat program (products per head, ReLU, weighted sum over heads, causal mask, top-k),
compiled with ``torch.compile``: once as it is, once with ``backend=hisa_compile.hisa_backend``.  Every
measurement runs in a fresh process, the variants in turn, so that a machine that changes its speed changes
it for both.  Time: median of all calls after warm-up.  Memory: after warm-up the heap is trimmed and the
kernel's peak of the resident set (VmHWM) is reset; what one call raises it to, less the resident set just
before, is the peak extra memory.  Outputs are in it, inputs and compiled code are not.  Linux only.

Needs an idle machine: every parallel operation waits for all threads, so a core that another process uses
slows down both variants, and the operator, which has many small ones, up to a hundredfold.  On a machine in
use OMP_NUM_THREADS=1 gives the steadier comparison.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VARIANTS = ("flat", "hisa")


def flat_indexer(q: Tensor, k: Tensor, weights: Tensor, visible_end: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """DSA's indexer as it is written in plain torch."""
    per_head = torch.einsum("bshd,btd->bsht", q, k).relu()
    scores = torch.einsum("bsh,bsht->bst", weights, per_head)
    hidden = torch.arange(k.shape[1], device=k.device) >= visible_end[..., None]
    return scores.masked_fill(hidden, float("-inf")).topk(topk)


def inputs(size: argparse.Namespace) -> tuple[Tensor, ...]:
    """The last ``queries`` positions of a causal prefill over ``tokens`` tokens; seeded gaussian values."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, size.queries, size.heads, size.dim, generator=generator)
    k = torch.randn(1, size.tokens, size.dim, generator=generator)
    weights = torch.randn(1, size.queries, size.heads, generator=generator)
    visible_end = torch.arange(size.tokens - size.queries, size.tokens, dtype=torch.int32)[None] + 1
    return q, k, weights, visible_end


def resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure(size: argparse.Namespace, variant: str, selection: Path) -> dict[str, Any]:
    """Seconds of each call and peak extra bytes of one, in this process."""
    if variant == "hisa":
        from hisa_compile import hisa_backend

        options = {"hisa.block_size": size.block_size, "hisa.block_topk": size.block_topk}
        program = torch.compile(flat_indexer, backend=hisa_backend, options=options, fullgraph=True)
    else:
        program = torch.compile(flat_indexer, fullgraph=True)
    args = inputs(size)
    for _ in range(3):
        indices = program(*args, size.topk)[1]
    torch.save(indices, selection)
    del indices
    seconds = []
    for _ in range(size.calls):
        begin = time.perf_counter()
        program(*args, size.topk)
        seconds.append(time.perf_counter() - begin)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident_bytes("VmRSS")
    result = program(*args, size.topk)
    peak = resident_bytes("VmHWM") - before
    del result
    return {"seconds": seconds, "peak_bytes": peak, "rewritten": rewritten(variant)}


def rewritten(variant: str) -> str:
    """What the backend said it did, so that the table can't show a program that was left alone."""
    if variant != "hisa":
        return ""
    import hisa_compile

    return "; ".join(report.summary() for report in hisa_compile.reports())


def measure_in_fresh_process(arguments: list[str], variant: str, selection: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.cpu_indexer", *arguments]
    command += ["--variant", variant, "--selection", str(selection)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def multiply_rate() -> float:
    """float32 operations a second of a large matrix product, the yardstick of the floor."""
    a = torch.randn(2048, 2048)
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begin)
    return 2 * 2048**3 / min(seconds)


def floor(size: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Operations of the products, and the bytes that the largest intermediate of each variant takes."""
    per_key = 2 * size.queries * size.heads * size.dim
    blocks = -(-size.tokens // size.block_size)
    candidates = size.block_size * size.block_topk
    flops = {"flat": per_key * size.tokens, "hisa": per_key * (blocks + candidates)}
    # Flat: the products of all heads.  HISA: one query's gathered candidate keys.
    held = {"flat": 4 * size.queries * size.heads * size.tokens, "hisa": 4 * candidates * size.dim}
    return flops, held


def expectation(size: argparse.Namespace) -> str:
    flops, held = floor(size)
    rate = multiply_rate()
    lines = [
        "Stated before measuring:",
        "",
        f"- a 2048 x 2048 float32 product runs at {rate / 1e9:.0f} GFLOP/s here;",
    ]
    for variant in VARIANTS:
        lines.append(
            f"- {variant}: {flops[variant] / 1e9:.2f} GFLOP of products, so at least "
            f"{flops[variant] / rate * 1e3:.1f} ms; largest intermediate {held[variant] / 1e6:.1f} MB;"
        )
    lines.append(
        f"- by operations the ratio can't be expected to pass {flops['flat'] / flops['hisa']:.1f}; expected are 4 to 8 "
        "times the speed (small products, the gather and the selection take their share) and a tenth of the memory."
    )
    return "\n".join(lines)


def overlap(one: Tensor, other: Tensor) -> float:
    """Mean share of a row's selection that the other selection has too."""
    pairs = zip(one.flatten(0, 1).tolist(), other.flatten(0, 1).tolist(), strict=True)
    return statistics.mean(len(set(a) & set(b)) / len(a) for a, b in pairs)


def table(results: dict[str, list[dict[str, Any]]], common: float) -> str:
    lines = ["| program | median | fastest | slowest | peak extra memory |", "|---|---|---|---|---|"]
    medians, peaks = {}, {}
    names = {"flat": "`torch.compile`", "hisa": "`torch.compile(backend=hisa_backend)`"}
    for variant in VARIANTS:
        seconds = [s for result in results[variant] for s in result["seconds"]]
        medians[variant] = statistics.median(seconds)
        peaks[variant] = max(result["peak_bytes"] for result in results[variant])
        numbers = " | ".join(f"{x * 1e3:.1f} ms" for x in (medians[variant], min(seconds), max(seconds)))
        lines.append(f"| {names[variant]} | {numbers} | {peaks[variant] / 1e6:.1f} MB |")
    lines.append(
        f"| ratio | {medians['flat'] / medians['hisa']:.1f} | | | {peaks['flat'] / max(peaks['hisa'], 1):.1f} |"
    )
    lines += [
        "",
        f"Common part of the two selections: {common:.1%} of a row on average.  The keys are random and without the",
        "local structure that block means rely on, so this says nothing about the quality on a model.",
        "",
        f"The backend's report: {results['hisa'][0]['rewritten']}",
    ]
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"tokens": 32768, "queries": 64, "heads": 16, "dim": 64, "topk": 512, "block-size": 64, "block-topk": 32}
    for name, default in (sizes | {"calls": 11, "rounds": 3}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="also write the result to this Markdown file")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--selection", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    size = parse(arguments)
    if size.variant:
        print(json.dumps(measure(size, size.variant, size.selection)))
        return
    load = os.getloadavg()[0]
    head = [
        "# One indexer call on the CPU",
        "",
        f"`python -m benchmarks.cpu_indexer`: T = {size.tokens}, S = {size.queries}, H = {size.heads}, D = {size.dim}, "
        f"topk = {size.topk}, B = {size.block_size}, m = {size.block_topk}, float32, causal; "
        f"{size.rounds} processes of {size.calls} calls each.",
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, load before: {load:.1f}.",
        "",
        expectation(size),
        "",
    ]
    print("\n".join(head), flush=True)
    results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        selections = {variant: Path(folder) / variant for variant in VARIANTS}
        for _ in range(size.rounds):
            for variant in VARIANTS:
                results[variant].append(measure_in_fresh_process(arguments, variant, selections[variant]))
        common = overlap(*(torch.load(selections[variant]) for variant in VARIANTS))
    body = table(results, common)
    print(body)
    if size.out:
        size.out.write_text("\n".join(head) + "\n" + body + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
