"""TileLang's own HISA, the example ``examples/dsa_hisa`` of tile-ai/tilelang, as a peer of ``benchmarks.indexer``.

    python -m benchmarks.tilelang_hisa --example PATH [--contexts 65536] [--queries 1024] [--compile-only]

``benchmarks.indexer`` runs this in a process of its own: TileLang and DeepGEMM want different versions of a library
that both load.  The example is imported from ``--example``, a folder outside this repository, and called as a user
calls it, ``hisa_indexer``: all of its pipeline, which returns positions in order of score and no scores.  Its own
kernels (TileLang, float8) are the pooling, the scores of blocks, the marking of the first and the last block, and the
scores of tokens; both selections are ``torch.topk`` (of blocks on bfloat16 scores, of tokens on float32 scores and
sorted, which it always is), and the positions are worked out by plain torch operations.  Its block means are float8
with a scale a block, where the operator's are bfloat16.

A line of JSON a context goes to standard output.  ``common`` is the share of the operator's selection that is in the
example's too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .harness import FP8, Call, Found, attempt, extra_mib, graph_ms, launched_ms
from .programs import BLOCK_SIZE, BLOCK_TOPK, TOPK, Inputs, hisa, inputs

NAME = "TileLang HISA fp8"
# A kernel is compiled for each shape, by nvcc: four of them a context.
COMPILE_SECONDS, MEASURE_SECONDS = 180, 240


def example_call(given: Inputs) -> Call:
    from hisa import hisa_indexer

    tensors = [given["q"][0], given["k"][0], given["k_scale"][0].contiguous(), given["weights"][0]]
    end = given["window_end"]
    sizes = {"k_block_size": BLOCK_SIZE, "block_topk": BLOCK_TOPK, "topk_tokens": TOPK}
    start = torch.zeros_like(end)
    return lambda: hisa_indexer(*tensors, start, end, **sizes)


def common(one: Tensor, other: Tensor, tokens: int) -> float:
    """The mean share of a row of ``one`` that is in the same row of ``other``; -1 is nothing."""

    def chosen(rows: Tensor) -> Tensor:
        marks = torch.zeros(rows.shape[0], tokens, dtype=torch.bool, device=rows.device)
        return marks.scatter_(1, rows.clamp(min=0).long(), rows >= 0)

    return ((chosen(one) & chosen(other)).sum(1) / one.shape[1]).mean().item()


def measure(context: int, queries: int, graphs: bool) -> Found:
    def numbers() -> Found:
        given = inputs(queries, context, FP8)
        call = example_call(given)
        found: Found = {"mib": extra_mib(call), "launched_ms": launched_ms(call)}
        found["common"] = common(hisa(given)()[0][0], call(), context)
        if graphs:
            try:
                found["ms"] = graph_ms([call])
            except RuntimeError:  # it need not be made for a graph; then its launches are in its time
                traceback.print_exc()
        return found

    return attempt(numbers)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--example", type=Path, required=True)
    parser.add_argument("--contexts", type=int, nargs="+", default=[65536])
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--compile-only", action="store_true", help="call it once, which fills TileLang's cache")
    return parser.parse_args()


def main() -> None:
    options = parse()
    sys.path.insert(0, str(options.example.resolve()))
    graphs = True
    for context in options.contexts:
        if options.compile_only:
            example_call(inputs(options.queries, context, FP8))()
            torch.cuda.synchronize()
            continue
        found = measure(context, options.queries, graphs)
        graphs = graphs and "ms" in found
        print(json.dumps({"context": context, "found": found}), flush=True)
        print(f"{context}: {NAME}: {found}", file=sys.stderr, flush=True)


class Peer:
    """The example in other processes: ``compile_ahead`` and ``compiled``, then ``results``."""

    def __init__(self, example: Path | None, site: Path | None, contexts: Iterable[int], queries: int) -> None:
        self.contexts, self.queries, self.example = list(contexts), queries, example
        paths = [str(site.resolve())] if site else []
        paths += [path for path in [os.environ.get("PYTHONPATH")] if path]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TILELANG_PRINT_ON_COMPILATION": "0"}
        self.compiling: list[subprocess.Popen[bytes]] = []

    def absent(self) -> str | None:
        """Why the example can't be run here, if it can't."""
        if self.example is None:
            return "no --tilelang-example"
        if not (self.example / "hisa.py").is_file():
            return "no hisa.py in --tilelang-example"
        check = "from benchmarks.harness import importable; raise SystemExit(importable('tilelang') and 3)"
        code = subprocess.run([sys.executable, "-c", check], env=self.environment, check=False).returncode
        return {0: None, 3: "tilelang can't be imported"}.get(code, f"importing tilelang ends with {code}")

    def command(self, contexts: Iterable[int], *more: str) -> list[str]:
        words = [sys.executable, "-m", "benchmarks.tilelang_hisa", "--example", str(self.example)]
        return [*words, "--queries", str(self.queries), *more, "--contexts", *map(str, contexts)]

    def compile_ahead(self) -> None:
        """Start compiling for all contexts at once; results come from TileLang's cache on disk."""
        for context in self.contexts:
            command = self.command([context], "--compile-only")
            self.compiling.append(subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL))

    def compiled(self) -> None:
        """Wait for what ``compile_ahead`` started: it must not run beside a measurement."""
        deadline = time.monotonic() + COMPILE_SECONDS
        for process in self.compiling:
            try:
                process.wait(max(1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def results(self) -> Iterator[tuple[int, Found]]:
        """What each context gave, also where the other process came to no result."""
        results: dict[int, Found] = {context: {"missing": "no result"} for context in self.contexts}
        try:
            said: Any = subprocess.run(
                self.command(self.contexts),
                env=self.environment,
                stdout=subprocess.PIPE,
                timeout=MEASURE_SECONDS,
                check=False,
            ).stdout
        except subprocess.TimeoutExpired as error:
            said = error.stdout or b""
        for line in said.decode().splitlines():
            if line.startswith('{"context"'):
                one = json.loads(line)
                results[one["context"]] = one["found"]
        yield from results.items()


if __name__ == "__main__":
    main()
