"""explain of programs that torch.export made: told, and left as they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import build
from programs import Program, aten_graph
from tiny_indexer import Attention, Indexer, flat_selection, hidden_states, seeded
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hisa_compile import Budget, explain, hisa

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SMALL = {"hisa.block_size": 4, "hisa.block_topk": 3}


class Spelled(nn.Module):
    """A program of the test matrix as the indexer of a model that is exported."""

    class Indexer(nn.Module):
        def __init__(self, program: Program) -> None:
            super().__init__()
            self.program = program

        def forward(self, *inputs: Tensor) -> Any:
            with torch.no_grad():
                return self.program.run(*inputs)

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.indexer = self.Indexer(program)

    # Exported inputs are called as these are.
    def forward(self, q, k, weights, key_scale, row_scale, q_ids, k_ids, valid, offset, free):
        return self.indexer(q, k, weights, key_scale, row_scale, q_ids, k_ids, valid, offset, free)


def line_of(function: Callable[..., Any], text: str) -> int:
    """The number of the only line of ``function`` with ``text``."""
    lines, first = inspect.getsourcelines(function)
    (found,) = [number for number, line in enumerate(lines) if text in line]
    return first + found


def exported(model: nn.Module, *inputs: Any, dynamic: Any = None, strict: bool = False, grad: bool = False):
    with torch.set_grad_enabled(grad):
        return torch.export.export(model, inputs, dynamic_shapes=dynamic, strict=strict)


def everything_in(program: ExportedProgram) -> list[Any]:
    """All nodes with their provenance, of all graphs of the program."""
    modules = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    nodes = [(node, id(node), node.format_node(), str(node.meta)) for m in modules for node in m.graph.nodes]
    return [*nodes, *((id(m), m.code, "forward" in vars(m)) for m in modules), str(program.graph_signature)]


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("dynamic", [None, Dim.AUTO, Dim.DYNAMIC], ids=["static", "AUTO", "DYNAMIC"])
def test_an_exported_program_is_explained_and_not_changed(strict: bool, grad: bool, dynamic: Any, capsys) -> None:
    """Exported with gradients the indexer is in a body of its own; its module and line are told all the same."""
    shapes = None if dynamic is None else ({1: dynamic},)
    program = exported(seeded(Attention), hidden_states(40), dynamic=shapes, strict=strict, grad=grad)
    assert ("wrap_with_set_grad_enabled" in str(program)) == grad
    before = everything_in(program)
    for _ in range(2):
        report = explain(program, hisa_options={"hisa.block_size": 8})
        (site,) = report.rewritten
        assert (site.budget, site.topk, site.heads, site.head_dim) == (Budget(8, 16), 4, 16, 8)
        assert site.module == "indexer (Indexer)"
        # Non-strict export notes the frames of modules only.
        line = line_of(flat_selection, "flat_scores") if strict else line_of(Indexer.forward, "flat_selection")
        assert site.location.endswith(f"tiny_indexer.py:{line}")
        assert capsys.readouterr().out.strip() == str(report)
    assert everything_in(program) == before
    program.module()(hidden_states(40))


@pytest.mark.parametrize("table", [{}, None], ids=["inference IR", "core ATen"])
def test_a_program_that_is_decomposed_already_is_explained(table: Any) -> None:
    """Whatever was done before; what was exported without gradients keeps its module stacks through it."""
    program = exported(seeded(Attention), hidden_states(40), dynamic=({1: Dim.AUTO},)).run_decompositions(table)
    before = everything_in(program)
    (site,) = explain(program).rewritten
    assert (site.heads, site.module) == (16, "indexer (Indexer)")
    assert everything_in(program) == before
    again = exported(seeded(Attention), hidden_states(40), grad=True).run_decompositions(table)
    assert [site.heads for site in explain(again).rewritten] == [16]


EXPORTED = [
    Program(mask="everything", scale="negative"),
    Program(layout="sbhd", mask="four_dimensional", scale="key_after"),
    Program(head_sum="loop", mask="add_inf", upcast=True),
    Program(relu="in_place", mask="tensor_offset", layout="two_heads"),
    Program(selection="sort", mask="packed", outputs="both"),
    Program(chunks=2, mask="chunked"),
]


@pytest.mark.parametrize("program", EXPORTED, ids=lambda program: f"{program.mask}-{program.layout}")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_spellings_are_seen_in_exported_programs(program: Program, dynamic: bool) -> None:
    """In-place operations are made functional; S and T may be symbols where the queries are in one piece."""
    inputs = program.inputs()
    if dynamic and program.chunks > 1:
        dynamic = False
    lengths = (program.queries, program.tokens)
    shapes = tuple({d: Dim.AUTO for d, size in enumerate(x.shape) if size in lengths} for x in inputs)
    # Two of them with gradients: the other way in.
    grad = program.layout != "bshd"
    ep = exported(Spelled(program), *inputs, dynamic=shapes if dynamic else None, grad=grad)
    before = everything_in(ep)
    report = explain(ep, hisa_options=SMALL)
    assert len(report.rewritten) == len(report.sites) == program.chunks
    assert all((site.module, site.budget) == ("indexer (Indexer)", Budget(4, 3)) for site in report.sites)
    assert everything_in(ep) == before


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_transformers_model_is_explained_from_its_export(grad: bool) -> None:
    """The indexer of a DeepSeek-V3.2 is found by its module, its router and experts are left alone."""
    ids = torch.randint(2, 97, (2, 30))
    shapes = ({1: Dim.DYNAMIC}, None) if grad else None
    with torch.set_grad_enabled(grad):
        model = build("deepseek_v32", attention="sdpa", num_hidden_layers=1, mlp_layer_types=["sparse"])
        ep = torch.export.export(model, (ids,), {"use_cache": False}, dynamic_shapes=shapes, strict=not grad)
    before = [node.format_node() for node in ep.graph.nodes]
    report = explain(ep)
    (site,) = report.rewritten
    assert site.module == "model.layers.0.self_attn.indexer (DeepseekV32Indexer)"
    assert "modeling_deepseek_v32.py:" in site.location
    assert {site.module.rpartition(" ")[2] for site in report.left_alone} == {
        "(DeepseekV32TopkRouter)",
        "(DeepseekV32Experts)",
    }
    assert [node.format_node() for node in ep.graph.nodes] == before


class Stateful(Attention):
    """Counts its calls in place, runs its indexer under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            positions = self.indexer(x)
        return positions + self.calls


class Conditional(Attention):
    """An indexer in each branch of a condition."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.indexer(x), lambda x: self.indexer(x + 1), (x,))


def test_bodies_of_higher_order_operators_are_explained() -> None:
    """Autocast's with module and line; those of a condition once each."""
    program = exported(seeded(Stateful), hidden_states(40), grad=True)
    assert "wrap_with_autocast" in str(program)
    before = everything_in(program)
    (site,) = explain(program).rewritten
    assert (site.module, "tiny_indexer.py:" in site.location) == ("indexer (Indexer)", True)
    assert everything_in(program) == before
    assert float(program.state_dict["calls"]) == 0
    program = exported(seeded(Conditional), hidden_states(40), strict=True)
    assert [site.heads for site in explain(program).rewritten] == [16, 16]


def test_marks_reach_an_exported_program() -> None:
    """A region that is opted out stays so, also within a body that hides it.

    Export without Dynamo notes marks only if it is asked to keep what the code says of its nodes.
    """

    class Off(Attention):
        def __init__(self) -> None:
            super().__init__(type("OffIndexer", (Indexer,), {"forward": hisa(enabled=False)(Indexer.forward)}))

    for grad in (False, True):
        (site,) = explain(exported(seeded(Off), hidden_states(40), grad=grad, strict=True)).sites
        assert "opted out" in site.reason
        with torch.fx.traceback.preserve_node_meta():
            program = exported(seeded(Off), hidden_states(40), grad=grad)
        (site,) = explain(program).sites
        assert "opted out" in site.reason


def test_a_router_in_an_exported_program_is_left_alone() -> None:
    """With the reason, and with the graph as it was."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(12, 8, bias=False)
            self.register_buffer("bias", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            return (self.gate(x).sigmoid() + self.bias).topk(2, dim=-1).indices

    program = exported(Router(), hidden_states(24), grad=True)
    before = everything_in(program)
    (site,) = explain(program).sites
    assert "no ReLU" in site.reason
    assert site.location.endswith(f"test_explain_exported.py:{line_of(Router.forward, 'topk')}")
    assert everything_in(program) == before


def test_a_program_takes_no_inputs_and_wrong_options_are_refused() -> None:
    """Its shapes are in it."""
    program = exported(seeded(Indexer), hidden_states(24))
    with pytest.raises(TypeError, match=r"explain\(program\)"):
        explain(program, hidden_states(24))
    with pytest.raises(TypeError, match=r"explain\(program\)"):
        explain(program, x=hidden_states(24))
    with pytest.raises(ValueError, match=r"hisa\.blocks"):
        explain(program, hisa_options={"hisa.blocks": 1})
    assert explain(program, hisa_options={"hisa.scope": "marked"}).rewritten == ()


def test_a_graph_of_aten_operations_is_explained_as_it_stands() -> None:
    """It is not changed; other graphs without inputs are refused, and with inputs any graph is a model."""
    program = Program(mask="hidden")
    graph = aten_graph(program.run, program.inputs())
    before = [(id(node), node.format_node()) for node in graph.graph.nodes]
    (site,) = explain(graph, hisa_options=SMALL).rewritten
    assert site.budget == Budget(4, 3)
    assert [(id(node), node.format_node()) for node in graph.graph.nodes] == before
    torch_level = torch.fx.symbolic_trace(torch.nn.Sequential(nn.Linear(12, 8), nn.ReLU()))
    with pytest.raises(TypeError, match=r"meta\['val'\].*explain\(model, \*inputs\)"):
        explain(torch_level)
    assert explain(torch_level, hidden_states(3)).sites == ()
    module = exported(seeded(Indexer), hidden_states(24)).module()
    assert explain(module, hidden_states(24)).rewritten
