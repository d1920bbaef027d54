"""What the pass costs: milliseconds for DeepSeek-V3.2 graphs of growing depth, and per thousand nodes.

    python -m benchmarks.pass_cost [--layers 1 2 4 8] [--out benchmarks/results/pass_cost.md]

The graphs are transformers' DeepSeek-V3.2 (tiny sizes, half of the layers with experts, whose routers are
selections too) as Inductor's hook sees them, with static and with dynamic shapes.  Each time is the smallest of
several runs, each on a fresh copy of the graph and, as timeit does, without the garbage collector:

- analysis: finding, reading and proving all selections, nothing rewritten (scope "marked" and no mark);
- rewriting: the same and putting the operators in, most of which is torch computing the new nodes' shapes;
- no top-k: the graph's twin with every selection taken out.

A depth of 60 layers is told from the slope: capturing it would take minutes, which is what the pass is to be
compared with (the column "capture" is Dynamo's and AOTAutograd's time for the same graph).
"""

from __future__ import annotations

import argparse
import copy
import gc
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.fx import GraphModule

from hisa_compile.passes import PassSettings, rewrite_indexers

RUNS = 5
REWRITE = PassSettings(block_size=4, block_topk=16)
ANALYSE = PassSettings(block_size=4, block_topk=16, scope="marked")
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 28,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 8,
    "max_position_embeddings": 512,
}


def capture(layers: int, dynamic: bool) -> tuple[GraphModule, float]:
    """The ATen graph of a model with this many layers, and the seconds it took to get it."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, inputs: Any) -> Any:
        graphs.append(copy.deepcopy(graph))
        return graph.forward

    config = transformers.DeepseekV32Config(
        **SIZES,
        num_hidden_layers=layers,
        mlp_layer_types=["dense" if layer % 2 == 0 else "sparse" for layer in range(layers)],
        attn_implementation="sdpa",
    )
    model = transformers.DeepseekV32ForCausalLM(config).eval()
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, inference_compiler=keep, decompositions=select_decomp_table())
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic or None)
    started = time.perf_counter()
    with torch.no_grad():
        compiled(torch.randint(2, 97, (2, 20)), use_cache=False)
    return graphs[-1], time.perf_counter() - started


def milliseconds(graph: GraphModule, settings: PassSettings) -> tuple[float, int]:
    """The time of one run of the pass, and how many selections it rewrote."""
    best, rewritten = float("inf"), 0
    for _ in range(RUNS):
        fresh = copy.deepcopy(graph)
        gc.collect()
        gc.disable()
        try:
            started = time.perf_counter()
            sites = rewrite_indexers(fresh.graph, settings)
            best = min(best, (time.perf_counter() - started) * 1e3)
        finally:
            gc.enable()
        rewritten = sum(site.rewritten for site in sites)
    return best, rewritten


def without_selections(graph: GraphModule) -> GraphModule:
    """A copy in which no operation is a selection, of as many nodes."""
    twin = copy.deepcopy(graph)
    for node in twin.graph.nodes:
        if any(name in str(node.target) for name in ("topk", "sort")):
            node.target = torch.ops.aten.cummax.default
    return twin


def measure(layers: int, dynamic: bool) -> dict[str, float]:
    graph, seconds = capture(layers, dynamic)
    analysis, none = milliseconds(graph, ANALYSE)
    rewriting, rewritten = milliseconds(graph, REWRITE)
    idle, _ = milliseconds(without_selections(graph), REWRITE)
    if (none, rewritten) != (0, layers):
        raise AssertionError(f"{rewritten} of {layers} indexers rewritten, {none} without a mark")
    nodes = len(graph.graph.nodes)
    return {
        "nodes": nodes,
        "analysis": analysis,
        "rewriting": rewriting,
        "idle": idle,
        "capture": seconds,
    }


def table(depths: list[int], dynamic: bool) -> str:
    lines = [
        "| layers | nodes | analysis, ms | per 1000 nodes | rewriting, ms | per 1000 nodes | no top-k, ms "
        "| capture, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    found = {layers: measure(layers, dynamic) for layers in depths}
    for layers, row in found.items():
        thousand = row["nodes"] / 1000
        lines.append(
            f"| {layers} | {row['nodes']:.0f} | {row['analysis']:.1f} | {row['analysis'] / thousand:.1f} | "
            f"{row['rewriting']:.1f} | {row['rewriting'] / thousand:.1f} | {row['idle']:.2f} | {row['capture']:.1f} |"
        )
        print(lines[-1], flush=True)
    first, last = found[depths[0]], found[depths[-1]]
    slope = {
        name: (last[name] - first[name]) / (depths[-1] - depths[0])
        for name in ("nodes", "analysis", "rewriting", "idle")
    }
    at_60 = {name: first[name] + (60 - depths[0]) * slope[name] for name in slope}
    lines.append(
        f"\nBy the slope between {depths[0]} and {depths[-1]} layers, 60 layers ({at_60['nodes']:.0f} nodes): analysis "
        f"{at_60['analysis']:.0f} ms, rewriting {at_60['rewriting']:.0f} ms, no top-k {at_60['idle']:.1f} ms."
    )
    print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if len(options.layers) < 2 or options.layers != sorted(set(options.layers)):
        parser.error("--layers: expected at least two depths in ascending order")
    parts = [
        "# What the pass costs",
        f"`python -m benchmarks.pass_cost --layers {' '.join(map(str, options.layers))}`, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {platform.machine()}, one thread; smallest of {RUNS} runs, without "
        "garbage collection.",
    ]
    for name, dynamic in (("Static shapes", False), ("Dynamic shapes", True)):
        parts += [f"## {name}", table(options.layers, dynamic)]
    if options.out:
        options.out.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
