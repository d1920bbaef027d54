"""Prefill of one decoder layer of DeepSeek-V3.2 at its real sizes: torch.compile, and torch.compile with HISA.

    python -m benchmarks.decoder_layer [--lengths 2048 ... 65536] [--out benchmarks/results/decoder_layer.md]

The program is transformers' ``DeepseekV32Model`` with one layer, given embeddings, without a cache: its mask, its
rotary embedding, the layer and the last norm.  bfloat16, one sequence, random weights; 128 attention heads, 64 indexer
heads, k = 2048, the dense MLP (18432) of the model's first three layers: 256 experts of random weights would add 21 GiB
and nothing to the comparison.  HISA has its default budget, B = 128, m = 64.

Attention is ``sdpa``, the library's default and the only one of its two that does not make heads x S x S scores
(``eager`` does, 64 GiB at S = 16384 in bfloat16).  It is dense: the library turns the selection into a mask.  So some
memory grows with S x S in both variants: the boolean mask that the selected positions are scattered into, and the same
in bfloat16, which is what the attention kernel takes (it reads one for all heads): 3 bytes an entry, 12 GiB at
S = 65536.  Queries, keys, values and the MLP's intermediates are linear in S, about 15 GiB there.  The flat indexer
adds its heads x S x S scores, 64 GiB at S = 16384: the library casts queries and keys to float32, and their product
has PyTorch's default precision, no tf32.

Memory is the allocator's peak during one call, less what was allocated before it: outputs are in it, weights and inputs
are not.  Time is the median of several calls launched from the host, after warm-up.  Everything is compiled for one
length (dynamic=False); a length that a variant has no memory for is shown, and longer ones are not tried.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Model

import hisa_compile

from .harness import (
    Found,
    Goal,
    attempt_growing,
    command,
    elapsed_ms,
    goals_table,
    machine,
    parser,
    progress,
    ratio,
    ratio_text,
    raw_goals,
    table,
    write,
)

# Not by its name: that is known only where the package is installed.
VARIANTS = {"torch.compile": "inductor", "with HISA": hisa_compile.hisa_backend}
FLAT, HISA = VARIANTS
MOST_CALLS, SECONDS = 5, 2.0
Rows = dict[int, dict[str, Found]]


def build(device: str, **sizes: Any) -> DeepseekV32Model:
    """The model with one layer; ``sizes`` other than the real ones are for trying it out."""
    given: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": 16, "attn_implementation": "sdpa"}
    config = transformers.DeepseekV32Config(**given | sizes)
    torch.manual_seed(0)
    with torch.device(device):
        return DeepseekV32Model(config).bfloat16().eval()


def program(model: DeepseekV32Model, backend: Any) -> Any:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=False)

    def call(embeddings: Tensor) -> Tensor:
        with torch.no_grad():
            result: Tensor = compiled(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return result

    return call


def measure(model: DeepseekV32Model, length: int, backend: Any) -> Found:
    embeddings = torch.randn(1, length, model.config.hidden_size, device="cuda", dtype=torch.bfloat16)
    run = program(model, backend)
    started = time.perf_counter()
    run(embeddings)
    torch.cuda.synchronize()
    found: Found = {"compile_seconds": time.perf_counter() - started}
    if backend is hisa_compile.hisa_backend and len(hisa_compile.reports()[-1].rewritten) != 1:
        raise AssertionError(f"not rewritten: {hisa_compile.reports()[-1]}")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    first = elapsed_ms(lambda: run(embeddings), 1)
    found["gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    count = max(2, min(MOST_CALLS, int(SECONDS * 1e3 / first)))
    found["ms"] = statistics.median(elapsed_ms(lambda: run(embeddings), 1) for _ in range(count))
    return found


def goals(rows: Rows) -> list[Goal]:
    flat, hisa = (rows.get(16384, {}).get(name, {}) for name in (FLAT, HISA))
    made = []
    for what, key, wanted in (("time", "ms", 0.5), ("memory", "gib", 0.2)):
        found = ratio(hisa.get(key), flat.get(key))
        made.append(Goal(f"{what} with HISA over torch.compile, 16384 tokens", wanted, found, at_most=True))
    for length in (32768, 65536):
        long = rows.get(length, {}).get(HISA)
        made.append(Goal(f"runs with HISA, {length} tokens", 1, None if long is None else float("ms" in long), unit=""))
    return made


def cells(row: dict[str, Found]) -> list[str]:
    made = []
    for key, digits in (("ms", 1), ("gib", 2)):
        numbers = [row[name].get(key) for name in VARIANTS]
        for name, number in zip(VARIANTS, numbers, strict=True):
            made.append(str(row[name]["missing"]) if number is None else f"{number:.{digits}f}")
        made.append(ratio_text(ratio(*numbers)))
    return made


def report(rows: Rows, asked: str, weights: float, out: Path | None) -> None:
    found_goals = goals(rows)
    head = ["tokens"] + [f"{name}, {unit}" for unit in ("ms", "GiB") for name in (*VARIANTS, "ratio")]
    parts = [
        "# Prefill of one DeepSeek-V3.2 decoder layer",
        f"`{asked}`, {machine()}, transformers {transformers.__version__}; one sequence, no cache, bfloat16, random "
        f"weights ({weights:.2f} GiB, not counted), sdpa attention, dense MLP.  Time and peak memory of one call; "
        "ratio: torch.compile over with HISA, in bold where HISA loses.",
        table(head, [[str(length), *cells(row)] for length, row in rows.items()]),
        goals_table(found_goals),
    ]
    raw = {
        "command": asked,
        "transformers": transformers.__version__,
        "weights_gib": weights,
        "lengths": {str(length): row for length, row in rows.items()},
        "goals": raw_goals(found_goals),
    }
    write(out, parts, raw)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(11, 17)])
    options = made.parse_args()
    model = build("cuda")
    torch.cuda.empty_cache()  # the weights in float32, before they were cast
    weights = sum(x.numel() * x.element_size() for x in model.parameters()) / 2**30
    rows: Rows = {length: {} for length in sorted(options.lengths)}
    for length, row in rows.items():
        for name, backend in VARIANTS.items():
            smaller = [rows[other][name] for other in rows if other < length]
            row[name] = attempt_growing(smaller, lambda at=length, by=backend: measure(model, at, by))
            progress(length, name, row[name])
        # Some lengths take minutes: what is there is kept if a later one never ends.
        done = {at: found for at, found in rows.items() if at <= length}
        report(done, command("decoder_layer", made, options), weights, options.out)


if __name__ == "__main__":
    main()
