"""What transformers' own DSA models hide from their indexers reaches the operator as vectors, never as S x T elements.

Each case is one model in one situation (a padded batch, packed sequences, a cache, ...), compiled once.  The graph is
read right after the pass, the operator's arguments are read at its call.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from model_cases import recorded_calls
from models import build
from test_models import TOLERANCE
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask
from visibility_cases import (
    FITS,
    SITUATIONS,
    Case,
    assert_calls_see,
    assert_no_pairs,
    assert_vectors,
    every_case,
    graphs_after_the_pass,
    in_turn,
    spread,
)

import hisa_compile

# Whole models ---------------------------------------------------------------------------------------------------------


def compiled(module: nn.Module, dynamic: bool, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(
        module,
        backend=hisa_compile.hisa_backend,
        fullgraph=True,
        dynamic=dynamic or None,
        options={"hisa.base": "aot_eager", **FITS, **{f"hisa.{name}": value for name, value in options.items()}},
    )


def flat(module: nn.Module, case: Case) -> Any:
    """The program before it is rewritten.

    Eager mode; in bfloat16 compiled with the same decompositions, which round otherwise and so select others among
    tokens of nearly the same score.
    """
    return module if case.dtype == torch.float32 else compiled(module, case.dynamic, scope="marked")


def runs(module: nn.Module, case: Case) -> Iterator[Any]:
    """The module flat, then rewritten."""
    yield flat(module, case)
    yield compiled(module, case.dynamic)


def random_ids(case: Case) -> Tensor:
    return torch.randint(2, 97, (case.batch, case.tokens), generator=torch.Generator().manual_seed(1))


def filled_cache(case: Case, model: Any) -> Any:
    """A cache of the case's kind that holds its history."""
    cache = case.make_cache(model)
    if case.history:
        ids = random_ids(case)[:, : case.history]
        model(ids, past_key_values=cache, use_cache=True, **case.inputs(0, case.history))
    return cache


def check_model(case: Case) -> None:
    model = case.make_model()
    logits = []
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        recorded_calls() as calls,
        graphs_after_the_pass() as graphs,
    ):
        warnings.simplefilter("ignore")
        for run in runs(model, case):
            cache = filled_cache(case, model)
            tokens = random_ids(case)[:, case.history :]
            logits.append(
                run(
                    tokens, past_key_values=cache, use_cache=cache is not None, **case.inputs(case.history, case.tokens)
                ).logits
            )
    assert len(calls) == case.layers, hisa_compile.reports()[-1]
    assert graphs
    for graph in graphs:
        assert len(graph.calls) == case.layers
        assert_vectors(case, graph)
        if case.tokens - case.history > 1:
            assert_no_pairs(graph.for_indexers_alone(), graph.pairs)
    assert_calls_see(case, calls)
    real = case.real_queries()
    expected, ours = (each[real].float() for each in logits)
    assert float((ours - expected).abs().max() / expected.abs().max()) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", spread(), ids=str)
def test_a_model_hands_its_indexers_vectors(case: Case) -> None:
    """No mask at the call, nothing of S x T for the indexer alone, the visibility and the logits are the model's."""
    check_model(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", every_case(), ids=str)
def test_every_model_situation_dtype_and_shape(case: Case) -> None:
    """The whole matrix."""
    check_model(case)


# Indexers alone: nothing else needs their masks -----------------------------------------------------------------------


class IndexerAlone(nn.Module):
    """A model's first indexer with the mask that the model makes for it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        self.rotary = model.model.rotary_emb
        self.layer = next(number for number, layer in enumerate(model.model.layers) if find_indexer(layer) is not None)
        self.indexer = find_indexer(model.model.layers[self.layer])

    def forward(
        self,
        x: Tensor,
        q_residual: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        """The positions that it selects.  Masks and positions as in the ``forward`` of transformers' models."""
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(x.shape[1], device=x.device) + past).unsqueeze(0)
        if self.config.model_type == "deepseek_v4":
            return self.indexer(x, q_residual, position_ids, past_key_values, self.layer)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            allow_is_causal_skip=False,
        )
        rotary = self.rotary(x, position_ids=position_ids)
        return self.indexer(x, q_residual, rotary, mask[:, 0], position_ids, past_key_values=past_key_values)


def find_indexer(layer: nn.Module) -> nn.Module | None:
    return next((module for module in layer.modules() if type(module).__name__.endswith("Indexer")), None)


def indexer_inputs(config: Any, batch: int, queries: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    sizes = config.hidden_size, config.q_lora_rank
    return tuple(torch.randn(batch, queries, size, generator=generator).to(dtype) for size in sizes)  # type: ignore[return-value]


def selected_and_visible(case: Case, indices: Tensor, visible: Tensor) -> Tensor:
    """bool [B, S, T]; hidden tokens fill a selection up, in any order, or are -1."""
    chosen = torch.zeros(*visible.shape[:2], visible.shape[2] + 1, dtype=torch.bool)
    chosen.scatter_(-1, indices.long() % (visible.shape[2] + 1), True)
    return (chosen[..., :-1] & visible)[case.real_queries()]


def check_indexer(case: Case) -> None:
    model = case.make_model()
    alone = IndexerAlone(model).eval()
    inputs = indexer_inputs(model.config, case.batch, case.tokens - case.history, case.dtype)
    selections = []
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        recorded_calls() as calls,
        graphs_after_the_pass() as graphs,
    ):
        warnings.simplefilter("ignore")
        for run in runs(alone, case):
            selections.append(
                run(*inputs, past_key_values=filled_cache(case, model), **case.inputs(case.history, case.tokens))
            )
    assert len(calls) == 1, hisa_compile.reports()[-1]
    assert graphs
    for graph in graphs:
        assert len(graph.calls) == 1
        assert_vectors(case, graph)
        if case.tokens - case.history > 1:
            # Not only what the indexer alone needs: there is nothing else.  (The caches bring the attention's keys.)
            nodes = [node for node in graph.nodes if node.users or node.op != "placeholder"]
            assert_no_pairs(nodes, graph.pairs)
    assert_calls_see(case, calls)
    visible = case.visible(calls[0][0]["k"].shape[1])
    expected, ours = (selected_and_visible(case, each, visible) for each in selections)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("case", in_turn(itertools.product(SITUATIONS, (False, True)), whole=False), ids=str)
def test_a_mask_that_only_the_indexer_needs_is_gone(case: Case) -> None:
    """No node of the whole graph has S x T elements, and the selection is the flat program's."""
    check_indexer(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [replace(case, whole=False) for case in every_case()], ids=str)
def test_every_indexer_alone_situation_dtype_and_shape(case: Case) -> None:
    """The whole matrix."""
    check_indexer(case)


# Memory ---------------------------------------------------------------------------------------------------------------


@dataclass
class Memory:
    """Bytes that a call allocated: the most at a time, and the largest single allocation."""

    peak: int
    largest: int


def memory_of(call: Callable[[], Tensor]) -> Memory:
    """From the profiler's events of the CPU's allocator, which sees what operators allocate inside, too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    assert result is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return Memory(max(held), max(event.nbytes() for event in events))


@pytest.mark.parametrize("situation", ["causal", "left", "packed"])
def test_the_memory_does_not_grow_with_queries_times_keys(situation: str) -> None:
    """Flat, an indexer allocates S x T x H scores; rewritten, nothing as large as S x T booleans."""
    tokens, heads = 2048, 4
    case = Case("deepseek_v32", "sdpa", situation, batch=1, whole=False, length=tokens)
    model = build(case.model, case.dtype, case.attention, index_n_heads=heads)
    alone = IndexerAlone(model).eval()
    inputs = indexer_inputs(model.config, 1, tokens, case.dtype)
    # A context beyond the budget: pruning is on.
    rewritten = compiled(alone, False, block_size=32, block_topk=8)
    with torch.no_grad(), recorded_calls() as calls:
        rewritten(*inputs, **case.inputs(0, tokens))
        assert len(calls) == 1
    with torch.no_grad():
        before, after = (memory_of(partial(run, *inputs, **case.inputs(0, tokens))) for run in (alone, rewritten))
    pairs = tokens * tokens
    assert before.largest >= 4 * pairs * heads, "the measurement misses the scores of the flat program"
    assert after.largest < pairs
    assert after.peak < before.peak / 4
