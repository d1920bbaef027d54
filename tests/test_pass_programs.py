"""Property tests of the pass: generated indexer programs, rewritten against original."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from programs import HEAD_SUMS, LAYOUTS, MASKS, PRODUCTS, RELUS, SCALES, SELECTIONS, Program, aten_graph, programs
from torch import Tensor
from torch.fx import GraphModule

import hisa_compile
from hisa_compile.ops import reference
from hisa_compile.passes import PassSettings, Site, rewrite_indexers

# Tracing, rewriting and running a program takes some 0.2 s, with symbols a second or more.
run_programs = settings(max_examples=40, deadline=None, phases=(Phase.explicit, Phase.generate))
SMALL = PassSettings(block_size=4, block_topk=3)


def rewritten(
    program: Program, pass_settings: PassSettings, symbolic: bool = False, decompose: bool = True
) -> tuple[GraphModule, list[Site]]:
    module = aten_graph(program.run, program.inputs(), symbolic, decompose)
    sites = rewrite_indexers(module.graph, pass_settings)
    module.recompile()
    return module, sites


def budgets(program: Program) -> st.SearchStrategy[PassSettings]:
    """Budgets with exact block means (sizes up to 4) that are large enough for the program's topk; a coarse stage."""
    return st.sampled_from([1, 2, 4]).flatmap(
        lambda size: st.builds(
            PassSettings,
            block_size=st.just(size),
            block_topk=st.integers(max(2, -(-program.topk // size)), 12),
            coarse=st.sampled_from((None, "paper", "probe", "two-level")),
        )
    )


def outputs(program: Program, result: object) -> tuple[Tensor | None, Tensor | None]:
    """(values, indices) of what the program returned."""
    if program.outputs == "both":
        return result  # type: ignore[return-value]
    return (result, None) if program.outputs == "values" else (None, result)  # type: ignore[return-value]


@settings(run_programs, max_examples=300)
@given(st.data())
def test_a_rewritten_program_is_the_direct_operator_call_bit_for_bit(data: st.DataObject) -> None:
    """Whatever the spelling, the rewritten graph computes what the operator does on the canonical operands."""
    program = data.draw(programs())
    check_program(program, *how_to_run(data, program))


def how_to_run(data: st.DataObject, program: Program) -> tuple[PassSettings, bool, bool]:
    """A budget, whether sizes are symbols (one in eight: it takes long), whether Inductor's decompositions ran."""
    symbolic = data.draw(st.integers(0, 7)) == 0 and program.takes_symbols
    return data.draw(budgets(program)), symbolic, data.draw(st.booleans())


PARTS = 10


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_ten_thousand_programs(part: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten thousand distinct programs, all parts together: a seed, and so a program, belongs to one part alone."""
    tried: set[Program] = set()
    spellings: set[Program] = set()
    matched = 0

    # Some are drawn twice.
    @settings(run_programs, max_examples=1300, database=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        nonlocal matched
        program = data.draw(programs(seed=st.integers(0, 2**20).map(lambda seed: seed * PARTS + part)))
        how = how_to_run(data, program)
        if program not in tried:
            matched += check_program(program, *how)
            tried.add(program)
            spellings.add(dataclasses.replace(program, batch=0, queries=0, tokens=0, heads=0, dim=0, topk=0, seed=0))

    check()
    none = sum(not program.rewritable for program in tried)
    with capsys.disabled():
        print(f"\nprograms, part {part}: {matched} matched / {len(tried)} tried", end="")
        print(f" ({none} are no indexers by construction), {len(spellings)} spellings whatever the sizes")
    assert len(tried) >= 1000


def check_program(program: Program, pass_settings: PassSettings, symbolic: bool, decompose: bool) -> bool:
    """Rewrite and compare; whether it was rewritten, as it must be but where the program says not."""
    module, sites = rewritten(program, pass_settings, symbolic, decompose)
    expected = program.rewritable
    if symbolic and program.tokens < program.topk:
        # Python's min() makes k the symbol T: every token is selected.  Where T shares its symbol with a size that
        # tracing takes for a number (the heads of a loop), or can only be 2, it is a number all the same.
        expected &= not all(site.reason.startswith("every token is selected: k is s") for site in sites)
    assert all(site.rewritten == expected for site in sites), sites
    if not expected:
        return False
    calls = [node for node in module.graph.nodes if node.target is torch.ops.hisa.indexer_topk.default]
    assert len(calls) == 1, "one call for all chunks, and for values and indices of a sort"
    meaning = program.meaning()
    given = {name for name in ("mask", "window_start", "window_end", "key_valid", "q_segment") if name in meaning}
    assert ("mask" in calls[0].kwargs) == ("mask" in given), "a mask of vectors is passed as vectors"
    budget = {"block_size": pass_settings.block_size, "block_topk": pass_settings.block_topk}
    assert calls[0].kwargs.get("coarse") == pass_settings.coarse
    indices, scores = hisa_compile.indexer_topk(**meaning, **budget, coarse=pass_settings.coarse)
    by_definition = reference.indexer_topk(**meaning, **budget, coarse=pass_settings.coarse)
    assert torch.equal(indices, by_definition[0])
    assert torch.equal(scores, by_definition[1])
    got_values, got_indices = outputs(program, module(*program.inputs()))
    original_values, original_indices = outputs(program, program.run(*program.inputs()))
    for got, original, expected_result, is_values in (
        (got_indices, original_indices, indices, False),
        (got_values, original_values, scores, True),
    ):
        if got is not None and original is not None:
            assert torch.equal(got, program.as_returned(expected_result, is_values).to(got.dtype))
            assert got.dtype == original.dtype
            assert got.shape == original.shape
    return True


@run_programs
@given(programs(outputs="both").filter(lambda program: program.rewritable))
def test_the_original_selection_comes_back_where_every_block_is_kept(program: Program) -> None:
    """With a budget for all tokens the selected scores are the original's, as multisets under ties."""
    module, sites = rewritten(program, PassSettings(block_size=4, block_topk=16))
    assert all(site.rewritten for site in sites), sites
    values, indices = module(*program.inputs())
    original_values, _ = program.run(*program.inputs())
    assert torch.equal(values, original_values)
    meaning = program.meaning()
    del meaning["topk"]
    every, positions = reference.flat_topk(**meaning, topk=program.tokens)[::-1]
    scores = torch.empty_like(every).scatter(-1, positions.long(), every)
    assert torch.equal(program.as_returned(scores.gather(-1, _back(program, indices)), True), values)


def _back(program: Program, indices: Tensor) -> Tensor:
    """Indices as the program returns them, as [B, S, k'] best first."""
    indices = {"sbhd": indices.transpose(0, 1), "packed": indices[None]}.get(program.layout, indices)
    return indices.flip(-1) if program.selection == "tail" else indices


@run_programs
@given(programs(outputs="both", mask="hidden", layout="bshd", selection="topk", chunks=1))
def test_no_omitted_candidate_scores_higher_than_a_returned_one(program: Program) -> None:
    """Within the kept blocks the selection is exact: first and last visible block are always among them."""
    assume(program.rewritable)
    module, _ = rewritten(program, PassSettings(block_size=4, block_topk=max(2, -(-program.topk // 4))))
    values, indices = module(*program.inputs())
    meaning = program.meaning()
    del meaning["topk"]
    every, positions = reference.flat_topk(**meaning, topk=program.tokens)[::-1]
    scores = torch.empty_like(every).scatter(-1, positions.long(), every)
    block = torch.arange(program.tokens) // 4
    last = block[meaning["window_end"].long() - 1][..., None]
    always = (block == 0) | (block == last)
    omitted = scores.scatter(-1, indices, float("-inf")).masked_fill(~always, float("-inf"))
    assert bool((omitted.amax(-1) <= values.amin(-1)).all())


@settings(run_programs, max_examples=30)
@given(programs(), st.integers(0, 7))
def test_the_pass_is_idempotent(program: Program, draw: int) -> None:
    """A second run finds nothing and leaves the rewritten graph as it is, node for node."""
    module, _ = rewritten(program, SMALL if program.topk <= 12 else PassSettings(), draw == 0 and program.takes_symbols)
    before = str(module.graph)
    assert not any(site.rewritten for site in rewrite_indexers(module.graph, SMALL))
    assert str(module.graph) == before


@settings(max_examples=25, deadline=None)
@given(programs(outputs="both", layout="bshd", batch=3, queries=6, chunks=1), st.randoms())
def test_rewritten_programs_commute_with_batch_permutation(program: Program, random) -> None:  # type: ignore[no-untyped-def]
    """The same query gets the same bits wherever in the batch it stands."""
    inputs = program.inputs()
    noisy = [x + torch.rand(x.shape) for x in inputs[:3]] + list(inputs[3:])
    module, _ = rewritten(program, SMALL)
    values, indices = module(*noisy)
    order = random.sample(range(3), 3)
    permuted = module(*(x[order] if x.dim() else x for x in noisy))
    assert torch.equal(permuted[0], values[order])
    assert torch.equal(permuted[1], indices[order])


@settings(max_examples=25, deadline=None)
@given(programs(outputs="both", layout="bshd", batch=3, queries=6, chunks=1, mask="none"))
def test_a_query_gets_the_same_bits_whatever_other_queries_come_with_it(program: Program) -> None:
    """Slicing the queries slices the result."""
    inputs = program.inputs()
    noisy = [x + torch.rand(x.shape) for x in inputs[:3]] + list(inputs[3:])
    module, _ = rewritten(program, SMALL)
    values, indices = module(*noisy)
    # Traced views, as of one head, hold for the strides that they were traced with.
    sliced = [x[:, 3:5].contiguous() if number in (0, 2, 4, 5, 9) else x for number, x in enumerate(noisy)]
    part, _ = rewritten(dataclasses.replace(program, queries=2), SMALL)
    some_values, some_indices = part(*sliced)
    assert torch.equal(some_values, values[:, 3:5])
    assert torch.equal(some_indices, indices[:, 3:5])


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
        "selection": SELECTIONS,
        "outputs": ("indices", "values", "both"),
        "chunks": (1,) if symbolic else (1, 2, 5),
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
            if not all(site.rewritten for site in sites):
                missed.append((name, choice, [site.reason for site in sites]))
    assert not missed


def test_new_nodes_have_values_and_provenance_and_nothing_else_changes() -> None:
    """meta["val"] is what the node computes, provenance is the selection's, and the rest of the graph stays."""
    program = Program(mask="hidden", outputs="both")

    def with_more(q: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        values, indices = program.run(q, *others)
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
