"""Shadow mode: what it costs a rewritten program, and how near its estimate is to the full comparison.

    python -m benchmarks.fidelity.shadow [--device cpu] [--out benchmarks/results/fidelity/shadow.md]

Cost: a program with one indexer, compiled with and without ``hisa.shadow``; a chunk of a prefill, at a context's end,
and a decode step of several sequences.  On a GPU the median of replays of a CUDA graph, in which every call is
compared, and calls launched from the host; on a CPU the median of calls.

Accuracy: the estimate after several calls of the prefill program, each with other tensors, against
``hisa_compile.fidelity`` of all their pruned queries.  The keys are alike in runs of some tens of tokens, plus noise;
that is no model's structure (benchmarks/fidelity/overlap.py has one), but neither are they all alike, so that queries
differ in what they find.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import hisa_compile

from ..harness import Call, Found, K, command, graph_ms, launched_ms, machine, parser, progress, ratio, table, write
from .overlap import default_device

CALLS_TIMED = 21


@dataclass(frozen=True)
class Sizes:
    """An indexer, its budget, and the shapes of its calls: queries of one sequence, or sequences of one query."""

    heads: int
    dim: int
    topk: int
    block_size: int
    block_topk: int
    tokens: int
    queries: int
    sequences: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return (
            f"T = {self.tokens}, H = {self.heads}, D = {self.dim}, topk = {self.topk}, B = {self.block_size}, "
            f"m = {self.block_topk}, {str(self.dtype).removeprefix('torch.')}"
        )


SIZES = {
    "cuda": Sizes(64, 128, 2048, 128, 64, 64 * K, 1024, 16, torch.bfloat16),
    "cpu": Sizes(8, 64, 256, 32, 32, 4 * K, 128, 8, torch.float32),
}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(of: Sizes, device: str, batch: int, queries: int, seed: int = 0) -> Inputs:
    """q, k, weights and how many tokens each query sees."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    run = 24 + 8 * (seed % 3)
    alike = normal(batch, -(-of.tokens // run), of.dim).repeat_interleave(run, 1)[:, : of.tokens]
    k = (alike + normal(batch, of.tokens, of.dim)).to(of.dtype)
    q, weights = normal(batch, queries, of.heads, of.dim).to(of.dtype), normal(batch, queries, of.heads).abs()
    end = torch.arange(of.tokens - queries + 1, of.tokens + 1, device=device)
    return q, k, weights, end


def program(of: Sizes, **options: Any) -> Any:
    """The flat program, compiled with HISA.  The base that generates no code: the indexer is all there is."""

    def indexer(q: Tensor, k: Tensor, weights: Tensor, end: Tensor) -> Tensor:
        scores = torch.einsum("bshd,btd->bsht", q.float(), k.float()).relu()
        scores = torch.einsum("bsht,bsh->bst", scores, weights)
        hidden = torch.arange(k.shape[1], device=k.device) >= end[:, None]
        return scores.masked_fill(hidden, float("-inf")).topk(of.topk).indices

    given = {"base": "eager", "block_size": of.block_size, "block_topk": of.block_topk} | options
    named = {f"hisa.{name}": value for name, value in given.items()}
    # Not by its name: that is known only where the package is installed.
    return torch.compile(indexer, backend=hisa_compile.hisa_backend, fullgraph=True, dynamic=False, options=named)


# Cost -----------------------------------------------------------------------------------------------------------------


def timed(calls: dict[str, Call], device: str) -> dict[str, Found]:
    """Milliseconds of each call.  On a CPU the calls take turns, since other work comes and goes."""
    for call in calls.values():
        call()
    if device == "cuda":
        return {name: {"ms": graph_ms([call]), "launched_ms": launched_ms(call)} for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(CALLS_TIMED):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: {"ms": statistics.median(of)} for name, of in times.items()}


def cost(of: Sizes, device: str, samples: list[int]) -> dict[str, dict[str, Found]]:
    """By kind of call and sample, "off" first."""
    found: dict[str, dict[str, Found]] = {}
    shapes = {
        f"prefill, {of.queries} queries": (1, of.queries),
        f"decode, {of.sequences} sequences": (of.sequences, 1),
    }
    for kind, (batch, queries) in shapes.items():
        given = inputs(of, device, batch, queries)
        torch._dynamo.reset()
        runs = {"off": program(of)} | {str(sample): program(of, shadow=sample) for sample in samples}
        calls = {name: lambda run=run, given=given: run(*given) for name, run in runs.items()}
        before = len(hisa_compile.reports())
        # Each program is a compile of the same code.
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=4 * len(runs)):
            found[kind] = timed(calls, device)
        rewritten = [len(report.rewritten) for report in hisa_compile.reports()[before:]]
        if rewritten != [1] * len(runs):
            raise AssertionError(f"not rewritten: {rewritten}")
        for name, row in found[kind].items():
            progress(kind, name, row)
    return found


def cost_table(found: dict[str, dict[str, Found]]) -> str:
    launched = any("launched_ms" in row for rows in found.values() for row in rows.values())
    rows = []
    for kind, by_sample in found.items():
        off = by_sample["off"]
        for name, row in by_sample.items():
            times = f"{ratio(row['ms'], off['ms']) or 0:.2f}x"
            cells = [kind, name, f"{row['ms']:.3f}", times]
            rows.append(cells + ([f"{row['launched_ms']:.3f}"] if launched else []))
    head = ["call", "`hisa.shadow`", "ms", "against off"] + (["launched from the host, ms"] if launched else [])
    return table(head, rows)


# Accuracy -------------------------------------------------------------------------------------------------------------


def whole(of: Sizes, streams: list[Inputs]) -> tuple[float, float, int]:
    """Recall and IoU over all pruned queries of the calls, and how many there are."""
    recall = iou = 0.0
    count = 0
    for q, k, weights, end in streams:
        found = hisa_compile.fidelity(
            q,
            k,
            weights,
            of.topk,
            block_size=of.block_size,
            block_topk=of.block_topk,
            window_end=end.int(),
            queries=q.shape[1],
        )
        recall, iou = recall + found.recall * found.sampled, iou + found.iou * found.sampled
        count += found.sampled
    return recall / count, iou / count, count


def accuracy(of: Sizes, streams: list[Inputs], samples: list[int]) -> list[Found]:
    """Of each sample the estimate after all the calls."""
    found: list[Found] = []
    for sample in samples:
        torch._dynamo.reset()
        run = program(of, shadow=sample)
        hisa_compile.reset_shadow()
        with torch.no_grad():
            for given in streams:
                run(*given)
        (site,) = [site for site in hisa_compile.shadow_report().sites if site.calls]
        found.append(
            {
                "sample": sample,
                "sampled": site.sampled,
                "recall": site.recall,
                "recall_error": site.recall_error,
                "iou": site.iou,
                "iou_error": site.iou_error,
                "worst_recall": site.worst_recall,
            }
        )
        progress("accuracy", str(sample), found[-1])
    return found


def accuracy_table(found: list[Found], full: tuple[float, float, int]) -> str:
    recall, iou, count = full
    rows = []
    for row in found:
        cells = [str(row["sample"]), str(row["sampled"])]
        for name, right in (("recall", recall), ("iou", iou)):
            cells.append(f"{row[name]:.4f} ± {row[f'{name}_error']:.4f}")
            cells.append(f"{row[name] - right:+.4f}")
        rows.append(cells)
    rows.append(["all, `fidelity`", str(count), f"{recall:.4f}", "", f"{iou:.4f}", ""])
    return table(["`hisa.shadow`", "queries compared", "recall ± standard error", "off by", "IoU", "off by"], rows)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--device", choices=list(SIZES), default=default_device())
    made.add_argument("--samples", type=int, nargs="+", default=[1, 4, 16, 64])
    made.add_argument("--calls", type=int, default=16, help="of the stream whose recall is estimated")
    options = made.parse_args()
    of = SIZES[options.device]
    costs = cost(of, options.device, options.samples)
    streams = [inputs(of, options.device, 1, of.queries, seed) for seed in range(options.calls)]
    full = whole(of, streams)
    found = accuracy(of, streams, options.samples)
    asked = command("fidelity.shadow", made, options)
    parts = [
        f"# Shadow mode\n\n`{asked}`, {machine()}; {of}.",
        "## Cost\n\nA call of a program with one indexer." + " Replays of a CUDA graph." * (options.device == "cuda"),
        cost_table(costs),
        f"## Accuracy\n\nEstimates after {options.calls} calls of {of.queries} queries.",
        accuracy_table(found, full),
    ]
    raw = {"command": asked, "sizes": str(of), "cost": costs, "accuracy": found}
    write(options.out, parts, raw | {"full": dict(zip(("recall", "iou", "queries"), full, strict=True))})


if __name__ == "__main__":
    main()
