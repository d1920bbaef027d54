"""transformers' own DSA models, compiled with HISA, against the same models in eager mode."""

from __future__ import annotations

import itertools

import pytest
import torch
from model_cases import FITS, PRUNES, Case, all_cases, indexers, recorded_calls, run_case
from models import MODELS, build

import hisa_compile
from hisa_compile.ops import reference

# Compiled and eager bfloat16 differ by Inductor's decompositions even where nothing is rewritten.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def spread() -> list[Case]:
    """Every model and attention with every cache and phase; dtype, batch and shapes take turns."""
    turns = itertools.cycle(itertools.product((torch.float32, torch.bfloat16), (False, True), (2, 1)))
    cases = []
    for name, (_, _, _, _, implementations) in MODELS.items():
        for attention in implementations:
            for cache, phase in (
                ("none", "prefill"),
                ("dynamic", "prefill"),
                ("dynamic", "decode"),
                ("static", "prefill"),
                ("static", "decode"),
            ):
                dtype, dynamic, batch = next(turns)
                case = Case(name, attention, cache, phase, dtype, batch, dynamic)
                if case.possible:
                    cases.append(case)
    return cases


def check(case: Case) -> None:
    outcome = run_case(case, FITS)
    assert len(outcome.report.rewritten) == indexers(case), outcome.report
    assert len(outcome.calls) == indexers(case)
    assert outcome.error <= TOLERANCE[case.dtype]
    modules = [site.module for site in outcome.report.rewritten]
    assert all("indexer" in module.lower() for module in modules), modules
    assert all(site.location for site in outcome.report.sites)


@pytest.mark.parametrize("case", spread(), ids=str)
def test_logits_are_the_eager_models_while_the_context_fits_the_budget(case: Case) -> None:
    """All indexers and nothing else are rewritten, and the model computes what it did."""
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_every_model_cache_phase_dtype_batch_and_shape(case: Case) -> None:
    """The whole matrix of the documentation's table."""
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case("deepseek_v32", "sdpa"),
        Case("deepseek_v32", "eager", dynamic=True, dtype=torch.bfloat16),
        Case("glm_moe_dsa", "sdpa", cache="static", phase="decode"),
        Case("hy_v4", cache="dynamic", phase="decode", batch=1),
        Case("axk2", cache="dynamic"),
        Case("deepseek_v4"),
    ],
    ids=str,
)
def test_beyond_the_budget_the_selection_is_the_references(case: Case) -> None:
    """With pruning active each call returns the index set that the reference computes from its operands."""
    outcome = run_case(case, PRUNES)
    assert len(outcome.calls) == indexers(case)
    for arguments, (indices, _) in outcome.calls:
        expected, _ = reference.indexer_topk(**arguments)
        flat, _ = reference.flat_topk(
            **{name: value for name, value in arguments.items() if name not in ("block_size", "block_topk")}
        )
        assert torch.equal(indices.sort(-1).values, expected.sort(-1).values)
        if case.phase == "prefill":
            assert not torch.equal(indices.sort(-1).values, flat.sort(-1).values), "nothing was pruned"


# The first is generated for by tests/test_clients.py too.
@pytest.mark.parametrize("name", [pytest.param("deepseek_v32", marks=pytest.mark.slow), "deepseek_v4"])
def test_inductor_runs_a_rewritten_model(name: str) -> None:
    """The default base generates code around the operator; dynamic shapes, one graph, logits as in eager mode."""
    outcome = run_case(Case(name, dynamic=True), FITS, base="inductor")
    assert len(outcome.calls) == indexers(Case(name))
    assert outcome.error <= TOLERANCE[torch.float32]


def test_a_training_step_has_the_eager_models_gradients() -> None:
    """In grad mode the joint graph is rewritten; the indexer takes no gradient, everything else keeps its own."""
    ids = torch.randint(2, 97, (2, 20))
    gradients = []
    for compiled in (False, True):
        model = build("deepseek_v32", attention="sdpa")
        run = model
        if compiled:
            torch._dynamo.reset()
            run = torch.compile(model, backend="hisa", options={**FITS, "hisa.base": "aot_eager"})
        with recorded_calls() as calls:
            run(ids, labels=ids, use_cache=False).loss.backward()
        assert len(calls) == (2 if compiled else 0)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["deepseek_v32", "hy_v4"])
def test_a_marked_dimension_is_one_compile_with_vectors(name: str) -> None:
    """mark_dynamic on the sequence: all indexers rewritten once for all lengths, no mask among their arguments."""
    torch._dynamo.reset()
    model = build(name)
    before = len(hisa_compile.reports())
    run = torch.compile(model, backend="hisa", fullgraph=True, options={**FITS, "hisa.base": "aot_eager"})
    with torch.no_grad(), recorded_calls() as calls:
        for length in (20, 27, 39):
            ids = torch.randint(2, 97, (2, length))
            torch._dynamo.mark_dynamic(ids, 1)
            torch.testing.assert_close(
                run(ids, use_cache=False).logits, model(ids, use_cache=False).logits, rtol=1e-3, atol=1e-4
            )
    (report,) = hisa_compile.reports()[before:]
    assert len(report.rewritten) == indexers(Case(name))
    assert len(calls) == 3 * indexers(Case(name))
    assert all(arguments["mask"] is None and arguments["window_end"] is not None for arguments, _ in calls)


def test_a_growing_context_does_not_recompile_under_dynamic_shapes() -> None:
    """One compile serves every length once the sequence is dynamic."""
    torch._dynamo.reset()
    model = build("deepseek_v32", attention="sdpa")
    before = len(hisa_compile.reports())
    run = torch.compile(model, backend="hisa", dynamic=True, options={**FITS, "hisa.base": "aot_eager"})
    with torch.no_grad():
        for length in (20, 27, 12, 39):
            ids = torch.randint(2, 97, (2, length))
            torch.testing.assert_close(
                run(ids, use_cache=False).logits, model(ids, use_cache=False).logits, rtol=1e-3, atol=1e-4
            )
    assert len(hisa_compile.reports()) - before <= 2  # dynamic=True calls the backend once more for its scalars
