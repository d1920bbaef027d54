"""The programs that the GPU benchmarks compare, at DeepSeek-V3.2's sizes, and their inputs.

Each function takes what :func:`inputs` gives and returns a call without arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hisa_compile
from hisa_compile.ops.coarse import size_of_means

from .harness import FP8, Call

HEADS, DIM, TOPK, BLOCK_SIZE, BLOCK_TOPK = 64, 128, 2048, 128, 64
SIZES = f"H = {HEADS}, D = {DIM}, topk = {TOPK}, B = {BLOCK_SIZE}, m = {BLOCK_TOPK}"
Inputs = dict[str, Any]
# Queries that lie together and may be alike.
RUN = 64


def inputs(
    queries: int,
    context: int,
    dtype: torch.dtype,
    batch: int = 1,
    seed: int = 0,
    device: str = "cuda",
    heads: int = HEADS,
    dim: int = DIM,
    alike: float = 0.0,
) -> Inputs:
    """Gaussian values; the queries are the last of the context, float8 keys have a scale a token.

    ``alike``: the correlation between the RUN queries of a run, and their weights.  Without it queries are independent,
    which no model's are.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    # In bfloat16 at once: float32 values of the largest queries would take twice the place.
    q = torch.empty(batch, queries, heads, dim, dtype=torch.bfloat16, device=device)
    q.normal_(generator=generator)
    k, weights = normal(batch, context, dim), normal(batch, queries, heads)
    if alike:
        runs = -(-queries // RUN)
        for own in (q, weights):
            common = normal(batch, runs, *own.shape[2:]).repeat_interleave(RUN, 1)[:, :queries]
            own.mul_((1 - alike) ** 0.5).add_(alike**0.5 * common)
    found: Inputs = {"weights": weights}
    if dtype == FP8:
        found["k_scale"] = k.abs().amax(-1) / torch.finfo(FP8).max
        k = k / found["k_scale"][..., None]
    end = torch.arange(context - queries + 1, context + 1, device=device, dtype=torch.int32)
    return found | {"q": q.to(dtype), "k": k.to(dtype), "window_end": end}


def with_representatives(given: Inputs, stage: str = "paper", block_size: int = BLOCK_SIZE) -> Inputs:
    """With what a cache keeps of blocks beside its keys, for a coarse stage that reads any."""
    if stage == "probe":
        return given
    size = size_of_means(stage, block_size)
    pooled = hisa_compile.pool_keys(given["k"], size, k_scale=given.get("k_scale"), spread=stage == "spread")
    return given | {"k_pooled": pooled}


def hisa(
    given: Inputs,
    block_topk: int = BLOCK_TOPK,
    in_order: bool = False,
    coarse: str | None = "paper",
    block_size: int = BLOCK_SIZE,
) -> Call:
    """The operator, with the paper's coarse stage if none is named; results unsorted unless ``in_order``.

    ``coarse`` None: with the stage that a call has which names none.
    """
    options = {"block_size": block_size, "block_topk": block_topk, "sorted": in_order, "coarse": coarse}
    return lambda: hisa_compile.indexer_topk(topk=TOPK, **given, **options)


def by_default(given: Inputs) -> Call:
    """The operator as it is called without naming a coarse stage."""
    return hisa(given, coarse=None)


def topk_alone(given: Inputs) -> Call:
    """torch.topk over a flat indexer's scores, which are there already."""
    shape = given["q"].shape[0], given["q"].shape[1], given["k"].shape[1]
    scores = torch.randn(shape, device=given["k"].device)
    return lambda: scores.topk(TOPK, sorted=False)


def every_block(given: Inputs) -> Call:
    """The operator with every block kept: exact at any length."""
    return hisa(given, max(-(-given["k"].shape[1] // BLOCK_SIZE), BLOCK_TOPK))


def flat(q: Tensor, k: Tensor, weights: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """DSA's indexer as it is written in plain torch."""
    scores = torch.einsum("bshd,btd->bsht", q, k).relu()
    total = torch.einsum("bsht,bsh->bst", scores, weights)
    hidden = torch.arange(k.shape[1], device=k.device) >= end[..., None]
    best, tokens = total.masked_fill(hidden, float("-inf")).topk(TOPK, sorted=False)
    return best, tokens


def flat_arguments(given: Inputs) -> tuple[Tensor, ...]:
    return given["q"], given["k"], given["weights"].to(given["q"].dtype), given["window_end"]


def compiled(given: Inputs) -> Call:
    """torch.compile of the flat program, for these sizes."""
    torch._dynamo.reset()
    run = torch.compile(flat, dynamic=False)
    arguments = flat_arguments(given)
    return lambda: run(*arguments)


def deep_gemm(given: Inputs, topk: bool) -> Call:
    """DeepGEMM's float8 logits, and torch.topk over them or not."""
    from deep_gemm import fp8_mqa_logits

    q, keys = given["q"][0], (given["k"][0], given["k_scale"][0])
    start = torch.zeros_like(given["window_end"])

    def run() -> Any:
        logits = fp8_mqa_logits(q, keys, given["weights"][0], start, given["window_end"], clean_logits=True)
        return logits.topk(TOPK, sorted=False) if topk else logits

    return run
