"""Property tests of the pass: generated indexer programs, rewritten against original."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from programs import HEAD_SUMS, LAYOUTS, MASKS, PRODUCTS, RELUS, SCALES, Program, aten_graph, programs
from torch import Tensor
from torch.fx import GraphModule

import hisa_compile
from hisa_compile.ops import reference
from hisa_compile.passes import PassSettings, Site, rewrite_indexers

# Rewriting and running a program takes some 30 ms.
run_programs = settings(max_examples=40, deadline=None, phases=(Phase.explicit, Phase.generate))
SMALL = PassSettings(block_size=4, block_topk=3)


def rewritten(program: Program, pass_settings: PassSettings, symbolic: bool = False) -> tuple[GraphModule, list[Site]]:
    module = aten_graph(program.run, program.inputs(), symbolic)
    sites = rewrite_indexers(module.graph, pass_settings)
    module.recompile()
    return module, sites


def budgets(program: Program) -> st.SearchStrategy[PassSettings]:
    """Budgets with exact block means (sizes up to 4) that are large enough for the program's topk."""
    return st.sampled_from([1, 2, 4]).flatmap(
        lambda size: st.builds(
            PassSettings,
            block_size=st.just(size),
            block_topk=st.integers(max(2, -(-program.topk // size)), 12),
        )
    )


def outputs(program: Program, result: object) -> tuple[Tensor | None, Tensor | None]:
    """(values, indices) of what the program returned."""
    if program.outputs == "both":
        return result  # type: ignore[return-value]
    return (result, None) if program.outputs == "values" else (None, result)  # type: ignore[return-value]


@run_programs
@given(st.data())
def test_a_rewritten_program_is_the_direct_operator_call_bit_for_bit(data: st.DataObject) -> None:
    """Whatever the spelling, the rewritten graph computes what the operator does on the canonical operands."""
    program = data.draw(programs())
    pass_settings = data.draw(budgets(program))
    symbolic = data.draw(st.booleans())
    module, sites = rewritten(program, pass_settings, symbolic)
    # With a symbolic T below topk, Python's min() makes k that symbol: every token is selected.
    expected = program.rewritable and not (symbolic and program.tokens < program.topk)
    assert [site.rewritten for site in sites] == [expected], sites
    if not expected:
        return
    indices, scores = hisa_compile.indexer_topk(
        **program.meaning(), block_size=pass_settings.block_size, block_topk=pass_settings.block_topk
    )
    if program.mask == "fill_min":
        scores = scores.masked_fill(scores == float("-inf"), torch.finfo(torch.float32).min)
    got_values, got_indices = outputs(program, module(*program.inputs()))
    original_values, original_indices = outputs(program, program.run(*program.inputs()))
    if got_indices is not None and original_indices is not None:
        assert torch.equal(got_indices, program.in_layout(indices))
        assert got_indices.dtype == original_indices.dtype
        assert got_indices.shape == original_indices.shape
    if got_values is not None and original_values is not None:
        assert torch.equal(got_values, program.in_layout(scores))
        assert got_values.dtype == original_values.dtype
        assert got_values.shape == original_values.shape


@run_programs
@given(programs(outputs="both").filter(lambda program: program.rewritable))
def test_the_original_selection_comes_back_where_every_block_is_kept(program: Program) -> None:
    """With a budget for all tokens the selected scores are the original's, as multisets under ties."""
    module, sites = rewritten(program, PassSettings(block_size=4, block_topk=16))
    assert [site.rewritten for site in sites] == [program.rewritable], sites
    values, indices = module(*program.inputs())
    original_values, _ = program.run(*program.inputs())
    assert torch.equal(values, original_values)
    meaning = program.meaning()
    del meaning["topk"]
    scores = reference.indexer_scores(meaning["q"], meaning["k"], meaning["weights"])
    if meaning["mask"] is not None:
        lowest = torch.finfo(torch.float32).min if program.mask == "fill_min" else float("-inf")
        scores = scores.masked_fill(~meaning["mask"], lowest)
    assert torch.equal(program.in_layout(scores).gather(-1, indices), values)


@run_programs
@given(programs(outputs="both", mask="hidden", layout="bshd"))
def test_no_omitted_candidate_scores_higher_than_a_returned_one(program: Program) -> None:
    """Within the kept blocks the selection is exact: first and last visible block are always among them."""
    module, _ = rewritten(program, PassSettings(block_size=4, block_topk=max(2, -(-program.topk // 4))))
    values, indices = module(*program.inputs())
    meaning = program.meaning()
    scores = reference.indexer_scores(meaning["q"], meaning["k"], meaning["weights"])
    scores = scores.masked_fill(~meaning["mask"], float("-inf"))
    block = torch.arange(program.tokens) // 4
    last = block[meaning["mask"].sum(-1) - 1][None, :, None]
    always = (block == 0) | (block == last)
    omitted = scores.scatter(-1, indices, float("-inf")).masked_fill(~always, float("-inf"))
    assert bool((omitted.amax(-1) <= values.amin(-1)).all())


@run_programs
@given(programs(), st.booleans())
def test_the_pass_is_idempotent(program: Program, symbolic: bool) -> None:
    """A second run finds nothing and leaves the rewritten graph as it is, node for node."""
    module, _ = rewritten(program, SMALL if program.topk <= 12 else PassSettings(), symbolic)
    before = str(module.graph)
    assert not any(site.rewritten for site in rewrite_indexers(module.graph, SMALL))
    assert str(module.graph) == before


@settings(max_examples=25, deadline=None)
@given(programs(outputs="both", layout="bshd", batch=3, queries=6), st.randoms())
def test_rewritten_programs_commute_with_batch_permutation_and_query_slicing(program: Program, random) -> None:  # type: ignore[no-untyped-def]
    """The same query gets the same bits wherever in the batch it stands and whatever other queries come with it."""
    q, k, weights = (x + torch.rand(x.shape) for x in program.inputs())
    module, _ = rewritten(program, SMALL)
    values, indices = module(q, k, weights)
    order = random.sample(range(3), 3)
    permuted = module(q[order], k[order], weights[order])
    assert torch.equal(permuted[0], values[order])
    assert torch.equal(permuted[1], indices[order])
    if program.mask in ("none", "padding"):
        part, _ = rewritten(Program(**{**vars(program), "queries": 2}), SMALL)
        sliced = part(q[:, 3:5], k, weights[:, 3:5])
        assert torch.equal(sliced[0], values[:, 3:5])
        assert torch.equal(sliced[1], indices[:, 3:5])


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("decompose", [False, True])
def test_every_spelling_is_seen_before_and_after_decompositions(symbolic: bool, decompose: bool) -> None:
    """One dimension of the space at a time, so that a gap shows by name."""
    axes = {
        "product": PRODUCTS,
        "relu": RELUS,
        "head_sum": HEAD_SUMS,
        "scale": SCALES,
        "mask": MASKS,
        "layout": LAYOUTS,
        "upcast": (False, True),
        "batch": (1, 2),
        "queries": (1, 5),
        "heads": (1, 3),
    }
    missed = []
    for name, choices in axes.items():
        for choice in choices:
            program = Program(**{name: choice})
            module = aten_graph(program.run, program.inputs(), symbolic, decompose)
            sites = rewrite_indexers(module.graph, SMALL)
            if not sites[0].rewritten:
                missed.append((name, choice, sites[0].reason))
    assert not missed


def test_new_nodes_have_values_and_provenance_and_nothing_else_changes() -> None:
    """meta["val"] is what the node computes, provenance is the selection's, and the rest of the graph stays."""
    program = Program(mask="hidden", outputs="both")

    def with_more(q: Tensor, k: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        values, indices = program.run(q, k, weights)
        return values, indices.to(torch.int32), (q.exp() + 1).sum(-1)

    module = aten_graph(with_more, program.inputs(), symbolic=True)
    for node in module.graph.nodes:
        node.meta["stack_trace"] = f"trace of {node.name}"
    selection = next(node for node in module.graph.nodes if node.target is torch.ops.aten.topk.default)
    old = {node.name: copy.copy(node.meta) for node in module.graph.nodes}
    targets = Counter(str(node.target) for node in module.graph.nodes)
    rewrite_indexers(module.graph, SMALL)
    module.recompile()
    new = [node for node in module.graph.nodes if node.name not in old]
    assert any(node.target is torch.ops.hisa.indexer_topk.default for node in new)
    assert all(node.meta["stack_trace"] == f"trace of {selection.name}" for node in new)
    for node in module.graph.nodes:
        assert "val" in node.meta or node.op == "output", node
        assert node.name not in old or (node.meta is not None and node.meta["stack_trace"] == f"trace of {node.name}")
    after = Counter(str(node.target) for node in module.graph.nodes)
    assert after["aten.topk.default"] == after["aten.bmm.default"] == after["aten.relu.default"] == 0
    assert after["aten.exp.default"] == targets["aten.exp.default"] == 1
    values = {node.name: node.meta["val"] for node in new if isinstance(node.meta["val"], torch.Tensor)}
    seen: dict[str, Tensor] = {}

    class Record(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                seen[n.name] = result
            return result

    Record(module).run(*program.inputs())
    hint = {name: tuple(int(s) for s in value.shape) for name, value in values.items()}
    assert hint == {name: tuple(seen[name].shape) for name in values}
    assert all(seen[name].dtype == value.dtype for name, value in values.items())
    assert all(seen[name].stride() == tuple(int(s) for s in value.stride()) for name, value in values.items())
