"""Peak GPU memory and time of DeepSeek-V3.2's own indexer at its real sizes: compiled flat, and compiled with HISA.

    python -m benchmarks.prefill_memory [--lengths 4096 8192 16384 32768] [--out benchmarks/results/prefill_memory.md]

The module is transformers' ``DeepseekV32Indexer`` (bfloat16, H = 64, D = 128, k = 2048) with random weights, behind
the masks that its models build: causal; causal with padding on the left; causal within packed sequences.  Both
variants are ``torch.compile`` of the same module, without and with ``backend="hisa"`` (default budget: B = 128,
m = 64).  Memory is the peak of the allocator during one call, less what was allocated before it: outputs are in it,
weights and inputs are not.  Time is the median of several calls after warm-up.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

import hisa_compile

from .harness import elapsed_ms, machine

CALLS = 5
CASES = ("causal", "padded", "packed")


class Indexer(nn.Module):
    """The library's indexer with its mask; rotary embeddings are identity."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.config = transformers.DeepseekV32Config()
        self.indexer = DeepseekV32Indexer(self.config, 0)

    def forward(self, hidden: Tensor, residual: Tensor, valid: Tensor, position: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        angles = hidden.new_zeros(batch, length, self.config.qk_rope_head_dim)
        token = torch.arange(length, device=hidden.device)
        mask = (token[None] <= token[:, None])[None]
        if self.case == "padded":
            mask = mask & valid[:, None, :]
        elif self.case == "packed":
            sequence = torch.cumsum(torch.diff(position, dim=-1, prepend=position[:, :1] - 1) != 1, -1)
            mask = mask & (sequence[:, :, None] == sequence[:, None, :])
        result: Tensor = self.indexer(hidden, residual, (angles + 1, angles), mask, position)
        return result


def inputs(length: int, config: transformers.DeepseekV32Config) -> tuple[Tensor, ...]:
    hidden = torch.randn(1, length, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn(1, length, config.q_lora_rank, device="cuda", dtype=torch.bfloat16)
    token = torch.arange(length, device="cuda")[None]
    return hidden, residual, token >= length // 8, token % (length // 4)


def measure(case: str, length: int, hisa: bool) -> tuple[float, float] | None:
    """(peak MiB, milliseconds) of a call, None where the memory did not suffice."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Indexer(case).cuda().bfloat16().eval()
    run = torch.compile(model, backend="hisa") if hisa else torch.compile(model)
    arguments = inputs(length, model.config)
    try:
        with torch.no_grad():
            run(*arguments)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run(*arguments)
            peak = torch.cuda.max_memory_allocated() - before
            times = [elapsed_ms(lambda: run(*arguments), 1) for _ in range(CALLS)]
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()
    if hisa and len(hisa_compile.reports()[-1].rewritten) != 1:
        raise AssertionError(f"not rewritten: {hisa_compile.reports()[-1]}")
    return peak / 2**20, statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [
        "# Peak memory of DeepSeek-V3.2's indexer in a prefill",
        f"`python -m benchmarks.prefill_memory`, {machine()}, "
        f"transformers {transformers.__version__}, one sequence, bfloat16, random weights; MiB and ms of one call.",
        "| mask | tokens | S x T bytes, MiB | flat, MiB | HISA, MiB | ratio | flat, ms | HISA, ms | ratio |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in CASES:
        for length in options.lengths:
            flat, hisa = (measure(case, length, each) for each in (False, True))
            cells = [case, str(length), f"{length * length / 2**20:.0f}"]
            for number, digits in ((0, 0), (1, 1)):
                values = [None if found is None else found[number] for found in (flat, hisa)]
                cells += ["out of memory" if value is None else f"{value:.{digits}f}" for value in values]
                cells.append("" if None in values else f"{values[0] / values[1]:.1f}x")
            lines[-1] += "\n| " + " | ".join(cells) + " |"
            print(lines[-1].splitlines()[-1], flush=True)
    if options.out:
        options.out.write_text("\n\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
