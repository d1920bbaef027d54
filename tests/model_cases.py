"""Running a transformers model compiled with HISA next to the same model in eager mode.

``python tests/model_cases.py --out docs/models.md`` runs every case and writes the table of the documentation.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from models import MODELS, build
from torch import Tensor

import hisa_compile
from hisa_compile.ops import cpu

CACHES = ("none", "dynamic", "static")
# A prompt long enough that a budget of 8 tokens prunes; DeepSeek-V4 keeps one key for 4 tokens.
PROMPT = {"deepseek_v4": 72}
DEFAULT_PROMPT = 30
FITS = {"hisa.block_size": 4, "hisa.block_topk": 10}
PRUNES = {"hisa.block_size": 2, "hisa.block_topk": 4}


@dataclass(frozen=True)
class Case:
    model: str
    attention: str = "eager"
    cache: str = "none"
    phase: str = "prefill"
    dtype: torch.dtype = torch.float32
    batch: int = 2
    dynamic: bool = False

    def __str__(self) -> str:
        shapes = "dynamic" if self.dynamic else "static"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.model}-{self.attention}-{self.cache}-{self.phase}-{dtype}-B{self.batch}-{shapes}"

    @property
    def possible(self) -> bool:
        """DeepSeek-V4 with a static cache is a KeyError of transformers' own; without a cache nothing decodes."""
        return not (self.model == "deepseek_v4" and self.cache == "static") and (
            self.phase == "prefill" or self.cache != "none"
        )


def all_cases(attentions: bool = True) -> list[Case]:
    """Model x attention x cache x phase x dtype x batch x shapes, what transformers can run of it."""
    cases = [
        Case(name, attention, cache, phase, dtype, batch, dynamic)
        for name, (_, _, _, _, implementations) in MODELS.items()
        for attention, cache, phase, dtype, batch, dynamic in itertools.product(
            implementations, CACHES, ("prefill", "decode"), (torch.float32, torch.bfloat16), (1, 2), (False, True)
        )
    ]
    return [case for case in cases if case.possible]


@dataclass
class Outcome:
    """logits of the compiled and of the eager model, the report, and every call of the operator."""

    compiled: Tensor
    eager: Tensor
    report: hisa_compile.Report
    calls: list[tuple[dict[str, Any], tuple[Tensor, Tensor]]]

    @property
    def error(self) -> float:
        """Largest difference of the logits, relative to the largest logit."""
        return float((self.compiled.float() - self.eager.float()).abs().max() / self.eager.float().abs().max())


@contextmanager
def recorded_calls() -> Iterator[list[tuple[dict[str, Any], tuple[Tensor, Tensor]]]]:
    """The arguments and results of every call that reaches the operator's CPU implementation."""
    calls: list[tuple[dict[str, Any], tuple[Tensor, Tensor]]] = []
    original = cpu.indexer_topk_cpu

    def record(q, k, weights, topk, budget, visibility, k_scale, k_weight, *rest):  # type: ignore[no-untyped-def]
        result = original(q, k, weights, topk, budget, visibility, k_scale, k_weight, *rest)
        arguments = {"q": q, "k": k, "weights": weights, "topk": topk, **budget._asdict(), **visibility._asdict()}
        arguments |= {"k_scale": k_scale, "k_weight": k_weight}
        calls.append(({n: v.clone() if isinstance(v, Tensor) else v for n, v in arguments.items()}, result))
        return result

    with mock.patch.object(cpu, "indexer_topk_cpu", record):
        yield calls


def _cache(case: Case, model: Any, length: int) -> Any:
    if case.cache == "none":
        return None
    if case.cache == "static":
        return transformers.StaticCache(config=model.config, max_cache_len=length + 6)
    return transformers.DynamicCache(config=model.config)


def run_case(case: Case, options: dict[str, Any], base: str = "aot_eager") -> Outcome:
    """Compile and run the case; the eager model gets its own cache with the same history."""
    torch._dynamo.reset()
    model = build(case.model, case.dtype, case.attention)
    length = PROMPT.get(case.model, DEFAULT_PROMPT)
    ids = torch.randint(2, 97, (case.batch, length), generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(
        model,
        backend=hisa_compile.hisa_backend,
        fullgraph=True,
        dynamic=case.dynamic or None,
        options={**options, "hisa.base": base},
    )
    logits = []
    with torch.no_grad(), warnings.catch_warnings(), recorded_calls() as calls:
        warnings.simplefilter("ignore")
        for runner in (model, compiled):
            cache = _cache(case, model, length)
            tokens = ids
            if case.phase == "decode":
                model(ids, past_key_values=cache, use_cache=True)
                tokens = ids[:, :1]
            logits.append(runner(tokens, past_key_values=cache, use_cache=cache is not None).logits)
    return Outcome(logits[1], logits[0], hisa_compile.reports()[-1], calls)


def indexers(case: Case) -> int:
    """How many layers of the model run an indexer of their own."""
    return MODELS[case.model][3]


def _table(cases: list[Case]) -> Iterator[str]:
    yield "| model | attention | cache | phase | dtype | shapes | selections | rewritten | against eager |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for case in cases:
        outcome = run_case(case, FITS)
        result = "same logits" if outcome.error == 0 else f"logits within {outcome.error:.0e}"
        yield (
            f"| {case.model} | {case.attention} | {case.cache} | {case.phase} | {str(case.dtype)[6:]} | "
            f"{'dynamic' if case.dynamic else 'static'} | {len(outcome.report.sites)} | "
            f"{len(outcome.report.rewritten)} of {indexers(case)} | {result} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    started = time.time()
    out = parser.parse_args().out
    rows = list(_table([case for case in all_cases() if case.batch == 2]))
    out.write_text(
        "# Models: sites found, rewritten, and the result against eager mode\n\n"
        f"Written by `python tests/model_cases.py --out docs/models.md`, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, CPU, in {time.time() - started:.0f} s.  Tiny models, random weights, B = 2, a "
        "context that fits the budget; base `aot_eager` with Inductor's decompositions.  Every selection that is not "
        "an indexer (MoE routers and the sort of their experts) is left alone.  The error is the largest difference "
        "of the logits over the largest logit; bfloat16 differs from eager mode by Inductor's decompositions too.\n\n"
        + "\n".join(rows)
        + "\n"
    )


if __name__ == "__main__":
    main()
