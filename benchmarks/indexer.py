"""One indexer layer on a GPU: the last queries of a context, against what a user has otherwise.

    python -m benchmarks.indexer [--contexts 8192 65536 ...] [--queries 1024] [--out benchmarks/results/indexer.md]

H = 64, D = 128, topk = 2048, B = 128, m = 64, gaussian inputs, causal windows, results unsorted.  Variants:

- hisa: the operator, bfloat16 and float8 (float8 with a scale a token); from m * B = 8192 tokens on it selects among
  candidates, up to there exactly;
- flat: the operator with every block kept, which is exact at any length;
- DeepGEMM's float8 logits and torch.topk over them (exact), and the logits alone, where deep_gemm can be imported;
- torch.compile of the flat bfloat16 program.

Times are medians of replays of a CUDA graph, so that no launch from the host is in them.  Memory is the allocator's
peak during a call, less what was there before it and less the results.  The two ceilings are large products of each
dtype in the same run.  Raw numbers go beside the table, as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

import hisa_compile

HEADS, DIM, TOPK, BLOCK_SIZE, BLOCK_TOPK = 64, 128, 2048, 128, 64
FP8 = torch.float8_e4m3fn
Inputs = dict[str, Any]


def inputs(queries: int, context: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    q, k, weights = normal(1, queries, HEADS, DIM), normal(1, context, DIM), normal(1, queries, HEADS)
    found: Inputs = {"weights": weights}
    if dtype == FP8:
        found["k_scale"] = k.abs().amax(-1) / torch.finfo(FP8).max
        k = k / found["k_scale"][..., None]
    end = torch.arange(context - queries + 1, context + 1, device="cuda", dtype=torch.int32)
    return found | {"q": q.to(dtype), "k": k.to(dtype), "window_end": end}


def hisa(given: Inputs, block_topk: int = BLOCK_TOPK) -> Callable[[], Any]:
    options = {"block_size": BLOCK_SIZE, "block_topk": block_topk, "sorted": False}
    return lambda: hisa_compile.indexer_topk(topk=TOPK, **given, **options)


def compiled(given: Inputs) -> Callable[[], Any]:
    def flat(q: Tensor, k: Tensor, weights: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("bshd,btd->bsht", q, k).relu()
        total = torch.einsum("bsht,bsh->bst", scores, weights)
        hidden = torch.arange(k.shape[1], device=k.device) >= end[:, None]
        return tuple(total.masked_fill(hidden, float("-inf")).topk(TOPK, sorted=False))

    torch._dynamo.reset()
    run = torch.compile(flat, dynamic=False)
    arguments = given["q"], given["k"], given["weights"].to(given["q"].dtype), given["window_end"]
    return lambda: run(*arguments)


def deep_gemm(given: Inputs, topk: bool) -> Callable[[], Any]:
    from deep_gemm import fp8_mqa_logits

    q, keys = given["q"][0], (given["k"][0], given["k_scale"][0])
    start = torch.zeros_like(given["window_end"])

    def run() -> Any:
        logits = fp8_mqa_logits(q, keys, given["weights"][0], start, given["window_end"], clean_logits=True)
        return logits.topk(TOPK, sorted=False) if topk else logits

    return run


def measure(make: Callable[[], Callable[[], Any]]) -> dict[str, float] | None:
    """Milliseconds of a call, and MiB it takes besides its results; None where the memory did not suffice."""
    try:
        run = make()
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = run()
        torch.cuda.synchronize()
        tensors = [results] if isinstance(results, Tensor) else list(results)
        own = sum(x.numel() * x.element_size() for x in tensors)
        peak = torch.cuda.max_memory_allocated() - before - own
        del results, tensors
        ms = triton.testing.do_bench_cudagraph(run, rep=60, return_mode="median")
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()
    return {"ms": ms, "mib": max(0.0, peak / 2**20)}


def ceiling(dtype: torch.dtype, size: int = 8192) -> float:
    """TFLOP/s of a square product."""
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    one = torch.ones((), device="cuda")

    def product() -> Tensor:
        if dtype == FP8:
            return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
        return a @ b.t()

    return 2 * size**3 / triton.testing.do_bench(product, warmup=50, rep=200, return_mode="median") / 1e9


def variants(queries: int, context: int, largest_flat: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    bf16, fp8 = (inputs(queries, context, dtype) for dtype in (torch.bfloat16, FP8))
    blocks = -(-context // BLOCK_SIZE)
    found = {"hisa fp8": lambda: hisa(fp8), "hisa bf16": lambda: hisa(bf16)}
    if context <= largest_flat:
        found["flat fp8"] = lambda: hisa(fp8, blocks)
        found["DeepGEMM + topk fp8"] = lambda: deep_gemm(fp8, topk=True)
        found["DeepGEMM logits fp8"] = lambda: deep_gemm(fp8, topk=False)
        found["torch.compile bf16"] = lambda: compiled(bf16)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2**n for n in (13, 14, 15, 16, 17, 18, 20)])
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--largest-flat", type=int, default=2**17, help="no flat variant for longer contexts")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    absent = []
    try:
        import deep_gemm as _  # noqa: F401
    except ImportError as error:
        absent.append(f"DeepGEMM ({error})")
    ceilings = {"fp8": ceiling(FP8), "bf16": ceiling(torch.bfloat16)}
    raw: dict[str, Any] = {"ceilings_tflops": ceilings, "contexts": {}}
    names: list[str] = []
    for context in options.contexts:
        row = {}
        for name, make in variants(options.queries, context, options.largest_flat).items():
            if absent and name.startswith("DeepGEMM"):
                continue
            row[name] = measure(make)
            names += [] if name in names else [name]
        raw["contexts"][context] = row
        print(
            context,
            {name: found and {k: round(v, 3) for k, v in found.items()} for name, found in row.items()},
            flush=True,
        )

    def cell(found: dict[str, float] | None, own: dict[str, float]) -> str:
        if found is None:
            return "out of memory"
        ratio = found["ms"] / own["ms"]
        return f"{found['ms']:.3f} ({found['mib']:.0f}) {ratio:.1f}x"

    lines = [
        "# The indexer against its peers",
        f"`python -m benchmarks.indexer`, {torch.cuda.get_device_name()}, torch {torch.__version__}, Triton "
        f"{triton.__version__}; {options.queries} queries at the end of the context, H = {HEADS}, D = {DIM}, "
        f"topk = {TOPK}, B = {BLOCK_SIZE}, m = {BLOCK_TOPK}, unsorted.  ms of a call (MiB besides results), and the "
        f"ratio to `hisa` in the same dtype: below 1 the other is faster.  Ceilings: float8 {ceilings['fp8']:.0f}, "
        f"bfloat16 {ceilings['bf16']:.0f} TFLOP/s." + (f"  Absent: {', '.join(absent)}." if absent else ""),
        "| context | " + " | ".join(names) + " |\n| --- |" + " --- |" * len(names),
    ]
    for context, row in raw["contexts"].items():
        cells = [str(context)]
        cells += [cell(row[n], row["hisa " + n.rsplit(" ", 1)[1]]) if n in row else "" for n in names]
        lines[-1] += "\n| " + " | ".join(cells) + " |"
    print("\n\n".join(lines))
    if options.out:
        options.out.write_text("\n\n".join(lines) + "\n")
        options.out.with_suffix(".json").write_text(json.dumps(raw, indent=1) + "\n")


if __name__ == "__main__":
    main()
