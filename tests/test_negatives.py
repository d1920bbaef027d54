"""Selections that are no indexers are seen, left alone and change nothing, in real models and by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from negatives import CASES, ROUTERS, Case
from programs import aten_graph
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import hisa_compile
from hisa_compile.passes import PassSettings, Site, rewrite, rewrite_indexers

DETECTORS = ("deformable_detr, two stages", "rt_detr", "rt_detr_v2", "d_fine", "grounding_dino")
FUNCTIONS = [name for name in CASES if "router" not in name and name not in DETECTORS]
# Large graphs; others among the cases have the same selections.
SLOW = ("rt_detr_v2", "d_fine", "grounding_dino", "router of longcat_flash")


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@contextmanager
def watched_pass(active: bool = True) -> Iterator[list[Site]]:
    """The sites of all graphs; each graph is compared with what it was before.  Inactive: the pass is skipped."""
    seen: list[Site] = []
    original = rewrite.rewrite_indexers

    def run(graph: torch.fx.Graph, settings: PassSettings, **options: Any) -> list[Site]:
        if not active:
            return []
        before = [(id(node), node.format_node()) for node in graph.nodes]
        sites = original(graph, settings, **options)
        seen.extend(sites)
        assert [(id(node), node.format_node()) for node in graph.nodes] == before
        return sites

    with mock.patch.object(rewrite, "rewrite_indexers", run):
        yield seen


def tensors(result: Any) -> list[Tensor]:
    """All tensors of a result, model outputs included."""
    if hasattr(result, "to_tuple"):
        result = result.to_tuple()
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]


def run_compiled(case: Case, dynamic: bool | None = None, base: str = "aot_eager") -> list[Tensor]:
    torch._dynamo.reset()
    options = {"hisa.base": base, "hisa.block_size": 4, "hisa.block_topk": 16}
    with torch.no_grad():
        return tensors(
            torch.compile(case.run, backend="hisa", dynamic=dynamic, options=options)(*case.args, **case.kwargs)
        )


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_a_negative_runs_as_if_the_pass_were_not_there(name: str) -> None:
    """Every selection is reported with a reason, every graph is the same node for node, every output bit for bit."""
    case = CASES[name]()
    with watched_pass(active=False):
        want = run_compiled(case)
    with watched_pass() as sites:
        got = run_compiled(case)
    assert sites, "no selection was seen: the case says nothing"
    assert all(site.reason for site in sites), [str(site) for site in sites if site.rewritten]
    assert not any("internal error" in site.reason for site in sites), sites
    assert len(got) == len(want) > 0
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs) or bool((mine.isnan() & theirs.isnan() | (mine == theirs)).all())


@pytest.mark.parametrize("name", [*FUNCTIONS, "router of deepseek_v3", "router of minimax_m3_vl"])
def test_a_negative_is_left_alone_with_dynamic_shapes(name: str) -> None:
    """Unknown sizes are no reason to take one thing for another."""
    case = CASES[name]()
    with watched_pass() as sites:
        got = run_compiled(case, dynamic=True)
    assert sites
    assert all(site.reason and "internal error" not in site.reason for site in sites), list(map(str, sites))
    with torch.no_grad():
        for mine, theirs in zip(got, tensors(case.run(*case.args, **case.kwargs)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("decompose", [False, True], ids=["composite", "decomposed"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_graph_of_a_negative_comes_back_node_for_node(name: str, decompose: bool, symbolic: bool) -> None:
    """Decomposed or not, with sizes or symbols: the pass looks and leaves."""
    case = CASES[name]()
    run = case.run
    parameters = dict(run.named_parameters()) if isinstance(run, nn.Module) else {}

    def functional(*args: Tensor) -> Any:
        if not parameters:
            return run(*args)
        given = dict(zip(parameters, args, strict=False))
        return torch.func.functional_call(run, given, args[len(parameters) :])  # type: ignore[arg-type]

    with torch.no_grad():
        module = aten_graph(functional, (*parameters.values(), *case.args), symbolic, decompose)
    before = str(module.graph)
    sites = rewrite_indexers(module.graph, PassSettings(block_size=4, block_topk=16))
    assert sites
    assert all(site.reason and "internal error" not in site.reason for site in sites), list(map(str, sites))
    assert str(module.graph) == before


@pytest.mark.parametrize("name", ["router of mixtral", "router of deepseek_v3", "product keys", "token pruning"])
def test_training_through_a_negative_is_untouched(name: str) -> None:
    """In grad mode the joint graph comes back as it was, and with it the gradients."""
    case = CASES[name]()
    if hasattr(case.run, "set_experts_implementation"):
        case.run.set_experts_implementation("batched_mm")  # the default breaks the graph in grad mode on a CPU
    inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for x in case.args]
    gradients = []
    for active in (False, True):
        torch._dynamo.reset()
        with watched_pass(active) as sites:
            run = torch.compile(case.run, backend="hisa", options={"hisa.base": "aot_eager"})
            floats = [x for x in tensors(run(*inputs, **case.kwargs)) if x.requires_grad]
            parameters = list(case.run.parameters()) if isinstance(case.run, nn.Module) else []
            leaves = [x for x in (*inputs, *parameters) if x.requires_grad]
            gradients.append(torch.autograd.grad(sum(x.square().sum() for x in floats), leaves, allow_unused=True))
    assert sites
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("base", ["inductor", "eager"])
@pytest.mark.parametrize("name", ["router of qwen3_moe", "product keys", "suppression"])
def test_the_other_bases_leave_a_negative_alone(name: str, base: str) -> None:
    """Generated code and the graph that is not functional: nothing rewritten, eager mode's results."""
    case = CASES[name]()
    before = len(hisa_compile.reports())
    got = run_compiled(case, base=base)
    reports = hisa_compile.reports()[before:]
    assert any(report.sites for report in reports)
    assert not any(report.rewritten for report in reports)
    with torch.no_grad():
        for mine, theirs in zip(got, tensors(case.run(*case.args, **case.kwargs)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_at_least_six_routers_of_transformers_are_among_the_cases() -> None:
    """The table can't shrink to nothing unnoticed."""
    assert len(ROUTERS) >= 6
    assert len(FUNCTIONS) >= 10
