"""A rewritten model on a GPU: generated code around the kernels, CUDA graphs, memory."""

from __future__ import annotations

import pytest
import torch
from models import build
from torch._dynamo.utils import counters

import hisa_compile

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OPTIONS = {"hisa.block_size": 16, "hisa.block_topk": 8}


def prompt(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 97, (2, length), generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.parametrize("name", ["deepseek_v32", "deepseek_v4"])
def test_a_model_on_the_gpu_has_the_eager_models_logits(name: str) -> None:
    """All layers' indexers run as kernels inside Inductor's code; 128 candidates hold the whole context."""
    torch._dynamo.reset()
    model = build(name).cuda()
    ids = prompt(100)
    with torch.no_grad():
        logits = torch.compile(model, backend="hisa", options=OPTIONS)(ids, use_cache=False).logits
        eager = model(ids, use_cache=False).logits
    assert len(hisa_compile.reports()[-1].rewritten) == 2
    assert float((logits - eager).abs().max() / eager.abs().max()) <= 1e-4


def test_a_bfloat16_indexer_on_the_gpu_selects_what_eager_mode_selects() -> None:
    """From the same hidden states; only near ties may be decided differently."""
    torch._dynamo.reset()
    model = build("deepseek_v32", torch.bfloat16, index_topk=32).cuda()
    shares = []

    def compare(indexer, args, kwargs, eager):  # type: ignore[no-untyped-def]
        options = {**OPTIONS, "hisa.base": "aot_eager"}
        selected = torch.compile(indexer.forward, backend="hisa", options=options)(*args, **kwargs)
        # Rows before 32 see fewer tokens than are selected.
        chosen = torch.zeros(2, 100, 100, dtype=torch.bool, device="cuda").scatter_(-1, eager.long(), True)
        shares.append(chosen.gather(-1, selected.long())[:, 32:].float().mean().item())

    for layer in model.model.layers:
        layer.self_attn.indexer.register_forward_hook(compare, with_kwargs=True)
    with torch.no_grad():
        model(prompt(100), use_cache=False)
    assert len(shares) == 2
    assert min(shares) > 0.999


def test_cuda_graphs_replay_a_rewritten_model_with_new_inputs() -> None:
    """mode="reduce-overhead" captures the operator; replays with other inputs are right, and are replays."""
    from triton_cases import launched

    torch._dynamo.reset()
    counters.clear()
    # Dense layers only: in float32 transformers' experts read their offsets on the host, which no graph can capture.
    model = build("deepseek_v32", attention="sdpa", mlp_layer_types=["dense", "dense"]).cuda()
    options = {**torch._inductor.list_mode_options("reduce-overhead"), **OPTIONS}
    compiled = torch.compile(model, backend="hisa", options=options)
    with torch.no_grad():
        for seed in range(5):
            ids = prompt(100, seed)
            with launched() as kernels:
                logits = compiled(ids, use_cache=False).logits.clone()
            assert bool(kernels) == (seed < 2), "replays launch nothing from Python"
            torch.testing.assert_close(logits, model(ids, use_cache=False).logits, rtol=1e-3, atol=1e-3)
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_a_rewritten_long_prefill_needs_a_fraction_of_the_memory() -> None:
    """The S x H x T scores of one indexer are 1.75 GiB here; the rewritten program makes nothing like them."""
    torch._dynamo.reset()

    def indexer(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("bshd,btd->bsht", q, k).relu()
        return torch.einsum("bsht,bsh->bst", scores, weights).topk(256).indices

    q, k = torch.randn(1, 2048, 14, 64, device="cuda"), torch.randn(1, 16384, 64, device="cuda")
    weights = torch.randn(1, 2048, 14, device="cuda")
    compiled = torch.compile(indexer, backend="hisa", options={"hisa.block_size": 32, "hisa.block_topk": 32})
    peaks = []
    for run in (indexer, compiled):
        run(q, k, weights)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(q, k, weights)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 80 * 2**20 < peaks[0] / 20
