"""transformers' own DeepSeek-V3.2 code, compiled with its indexers rewritten to HISA, next to torch.compile's default.

    python examples/quickstart.py [--context 4096] [--layers 2]

A small DeepSeek-V3.2 is built from its config with RANDOM weights (nothing is downloaded).  The script shows what
is rewritten, checks that the result is exact while the context fits the budget, and then prints time, peak memory
and overlap with the flat selection at a context where pruning is active.  Every figure is from this machine and
this run; random weights say nothing about the quality of a trained model's selection.
"""

from __future__ import annotations

import argparse
import platform
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers

import hisa_compile

warnings.filterwarnings("ignore", category=UserWarning)


def build_model(layers: int) -> Any:
    """DeepSeek-V3.2 as transformers has it, at sizes that a laptop runs; the indexer keeps a realistic shape."""
    config = transformers.DeepseekV32Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=layers,
        mlp_layer_types=["dense"] + ["sparse"] * (layers - 1),
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        index_n_heads=16,
        index_head_dim=64,
        index_topk=128,
        max_position_embeddings=65536,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return transformers.DeepseekV32ForCausalLM(config).eval()


class PeakMemory:
    """Peak resident memory of this process above its level at the start, in MiB (sampled; Linux)."""

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = self._resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def mib(self) -> float:
        return (self.peak - self.start) / 2**20

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, self._resident())

    @staticmethod
    def _resident() -> int:
        try:
            with open("/proc/self/statm") as statm:
                return int(statm.read().split()[1]) * 4096
        except OSError:
            return 0


def timed(run: Callable[[], Any], repeats: int = 3) -> tuple[float, float, Any]:
    """(fastest time in s, peak extra memory in MiB, result), after one call that compiles."""
    result = run()
    times = []
    with PeakMemory() as memory:
        for _ in range(repeats):
            started = time.perf_counter()
            result = run()
            times.append(time.perf_counter() - started)
    return min(times), memory.mib, result


def selection_overlap(model: Any, ids: torch.Tensor, budget: hisa_compile.Budget) -> list[float]:
    """Mean |flat and HISA| / |flat| of each layer's selections, both computed from the same hidden states."""
    overlaps: list[float] = []

    def compare(indexer: Any, args: Any, kwargs: Any, flat: torch.Tensor) -> None:
        rewritten = torch.compile(indexer.forward, backend="hisa", options={"hisa.base": "aot_eager"})
        selected = rewritten(*args, **kwargs)
        # Early queries see fewer tokens than are selected; what fills their rows up means nothing.
        first = max(budget.candidates, flat.shape[-1])
        a, b = (x[:, first:].long() for x in (flat, selected))
        chosen = torch.zeros(*a.shape[:2], ids.shape[1], dtype=torch.bool).scatter_(-1, a, True)
        overlaps.append(float(chosen.gather(-1, b).float().mean()))

    hooks = [layer.self_attn.indexer.register_forward_hook(compare, with_kwargs=True) for layer in model.model.layers]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return overlaps


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4096, help="tokens of the long prompt")
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()

    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} CPU threads"
    )
    model = build_model(args.layers)
    ids = torch.randint(0, 512, (1, args.context), generator=torch.Generator().manual_seed(1))
    short = ids[:, :256]

    print("\n1. What is rewritten (hisa_compile.explain)\n")
    report = hisa_compile.explain(model, short, use_cache=False)
    if len(report.rewritten) != args.layers:
        sys.exit("expected one rewritten indexer a layer")
    budget = report.rewritten[0].budget
    assert budget is not None

    compiled = torch.compile(model, backend="hisa")
    flat = torch.compile(model)

    print(f"\n2. Exact while the context fits the budget of {budget.candidates} tokens: {short.shape[1]} tokens")
    eager = model(short, use_cache=False).logits
    difference = float((compiled(short, use_cache=False).logits - eager).abs().max() / eager.abs().max())
    print(f"   largest difference of the logits from eager mode, relative: {difference:.1e}")
    if difference > 1e-4:
        sys.exit("the compiled model is not exact where it must be")

    print(f"\n3. {args.context} tokens, where queries beyond position {budget.candidates} are pruned (compiling twice)")
    rows = {}
    for name, run in (("torch.compile, flat indexer", flat), ("torch.compile, backend='hisa'", compiled)):
        seconds, mib, _ = timed(lambda run=run: run(ids, use_cache=False).logits)
        rows[name] = (seconds, mib)
        print(f"   {name:32s} {seconds:8.3f} s   peak extra memory {mib:8.0f} MiB")
    (flat_time, flat_mib), (hisa_time, hisa_mib) = rows.values()
    print(f"   ratio: {flat_time / hisa_time:.2f}x in time, {flat_mib / max(hisa_mib, 1):.2f}x in memory")

    overlaps = selection_overlap(model, ids, budget)
    print("   selected tokens that the flat indexer selects too, by layer: " + ", ".join(f"{x:.3f}" for x in overlaps))
    print(
        "\nThese weights are random: this overlap says nothing about a trained model, whose keys are far from random.\n"
        "Beyond the budget the selection is approximate by design; options={'hisa.block_topk': ...} widens it."
    )


if __name__ == "__main__":
    main()
