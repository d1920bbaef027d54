"""explain tells what the backend would do, and leaves everything else as it was."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import build
from programs import Program, aten_graph
from tiny_indexer import Attention, Indexer, flat_selection, hidden_states, seeded
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

import hisa_compile
from hisa_compile import Budget, explain, hisa
from hisa_compile.ops.coarse import resolve_coarse

# Within m * B = 32 tokens, and on both sides of 64 = H * m * B / 8, where 16 heads change the coarse stage.
LENGTHS = (1, 32, 33, 63, 64, 65, 1000)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Broken(nn.Module):
    """Two indexers with a graph break between them, inside a submodule."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Indexer(), Indexer(heads=5)

        def forward(self, x):
            first = self.first(x)
            torch._dynamo.graph_break()
            return first, self.second(x)

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x):
        return self.inner(x + 1)


def test_the_report_is_the_backends_own(capsys):
    """What explain says beforehand is what compiling says afterwards, and it is printed."""
    model, x = seeded(Attention), hidden_states(40)
    options = {"hisa.block_size": 8, "hisa.scope": "all"}
    report = explain(model, x, hisa_options=options)
    assert capsys.readouterr().out.strip() == str(report)
    assert [(site.budget, site.topk, site.heads, site.head_dim) for site in report.sites] == [(Budget(8, 16), 4, 16, 8)]
    assert "tiny_indexer.py:" in report.sites[0].location
    torch.compile(model, backend=hisa_compile.hisa_backend, options={**options, "hisa.base": "aot_eager"})(x)
    (compiled,) = hisa_compile.reports()[-1].sites
    assert (compiled.budget, compiled.location) == (report.sites[0].budget, report.sites[0].location)


def test_all_graphs_of_a_broken_model_are_told_every_time():
    """In the order in which they run, from the first call to the tenth."""
    model, x = Broken(), hidden_states(24)
    for _ in range(10):
        report = explain(model, x)
        assert [site.heads for site in report.sites] == [3, 5]


def test_settings_change_the_answer_for_the_same_model():
    """A later call with other options does not see the earlier call's graphs."""
    model, x = Broken(), hidden_states(40)
    assert [site.budget for site in explain(model, x, hisa_options={"hisa.block_size": 4}).sites] == [Budget(4, 16)] * 2
    assert [site.budget for site in explain(model, x, hisa_options={"hisa.block_size": 8}).sites] == [Budget(8, 16)] * 2
    assert explain(model, x, hisa_options={"hisa.scope": "marked"}).rewritten == ()


def test_compiled_code_of_the_user_stays_compiled():
    """After many explanations of a compiled model it still runs without a recompile."""
    for make in (Attention, Broken):
        torch._dynamo.reset()
        model, x = make(), hidden_states(24)
        compiled = torch.compile(model, backend="eager")
        compiled(x)
        for tokens in (24, 25, 26):
            explain(compiled, hidden_states(tokens))
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled(x)


def test_the_call_is_an_eager_one():
    """The values are the flat model's, gradients flow, buffers change once, parameters never."""

    class Counting(Attention):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model, x = seeded(Counting), hidden_states(40).requires_grad_()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    outputs = []
    explain(lambda x: outputs.append(model(x)), x, hisa_options={"hisa.block_size": 2, "hisa.block_topk": 2})
    assert model.calls == 1
    assert torch.equal(outputs[0], model(x))
    outputs[0].sum().backward()
    assert x.grad is not None
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_callers_grad_mode_holds(mode):
    """The report is the same in each; nothing asks for gradients that the caller has switched off."""
    with mode():
        report = explain(seeded(Attention), hidden_states(24))
    assert [site.rewritten for site in report.sites] == [True]


def test_functions_keyword_arguments_and_marks():
    """Any callable will do; a decorated one is explained with its mark; the model's own kwargs reach it."""

    @hisa(enabled=False)
    def off(q, k, w, *, topk):
        return flat_selection(q, k, w, topk)

    q, k, w = torch.randn(1, 24, 2, 8), torch.randn(1, 24, 8), torch.randn(1, 24, 2)
    (site,) = explain(off, q, k, w, topk=5).sites
    assert not site.rewritten
    assert "opted out" in site.reason
    assert explain(torch.relu, q).sites == ()


def test_the_work_of_a_site_is_an_expression_in_the_context_length():
    """HISA's cost grows with T / B beyond the budget, the flat indexer's with T."""
    (site,) = explain(seeded(Indexer), hidden_states(24), hisa_options={"hisa.block_size": 8}).sites
    assert site.work_before.subs("T", 1) is not None
    (symbol,) = site.work_before.free_symbols
    at = {symbol: 1024}
    assert site.work_before.subs(at) == 3 * 8 * 1024
    assert site.work_after.subs(at) == 3 * 8 * (1024 // 8 + 128)
    assert site.work_after.subs({symbol: 16}) == site.work_before.subs({symbol: 16})


@pytest.mark.parametrize("heads", [3, 16])
def test_the_work_of_a_site_knows_the_coarse_stage(heads):
    """Means of blocks, or two heads on each token, beyond 128 on those of outer blocks; or what a call chooses."""
    model, x = seeded(Indexer, heads), hidden_states(24)
    options = {"hisa.block_size": 8, "hisa.block_topk": 4}
    asked = {}
    for stage in (None, "paper", "probe", "two-level"):
        (site,) = explain(model, x, hisa_options={**options, "hisa.coarse": stage}).sites
        asked[stage] = [
            site.work_after.subs({symbol: tokens}) for symbol in site.work_after.free_symbols for tokens in LENGTHS
        ]
    assert asked["paper"] == [heads * 8 * (n if n <= 32 else -(-n // 8) + 32) for n in LENGTHS]
    assert asked["probe"] == [8 * (heads * n if n <= 32 else 2 * n + heads * 32) for n in LENGTHS]
    levels = (heads * -(-n // 32) + 2 * 128 for n in LENGTHS)
    assert asked["two-level"] == [
        p if n <= 128 else 8 * (w + heads * 32) for n, p, w in zip(LENGTHS, asked["probe"], levels, strict=True)
    ]
    assert asked["two-level"] != asked["probe"]
    for number, n in enumerate(LENGTHS):
        assert asked[None][number] == asked[resolve_coarse(None, n, heads, Budget(8, 4), False)][number]


def test_a_coarse_stage_is_part_of_the_answer(capsys):
    """Printed where it was asked for; budget and what stays exact do not depend on it."""
    model, x, budget = seeded(Indexer, 3, 8, 512), hidden_states(600, batch=1), Budget(32, 64)
    for stage in (None, "probe", "paper"):
        (site,) = explain(model, x, hisa_options={"hisa.coarse": stage}).sites
        assert (site.budget, site.coarse, site.exact_up_to) == (budget, stage, 2048)
        size, kept = budget
        said = (
            f"block_size={size} block_topk={kept}{f' coarse={stage}' * (stage is not None)}, exact up to 2048 visible"
        )
        assert said in capsys.readouterr().out


def test_wrong_options_are_refused():
    """As in torch.compile; Inductor's options are nothing to explain and are passed over."""
    with pytest.raises(ValueError, match=r"hisa\.blocks"):
        explain(Indexer(), hidden_states(24), hisa_options={"hisa.blocks": 1})
    with pytest.raises(ValueError, match=r"hisa\.coarse: got 'mean'"):
        explain(Indexer(), hidden_states(24), hisa_options={"hisa.coarse": "mean"})
    assert explain(Indexer(), hidden_states(24), hisa_options={"max_autotune": True}).rewritten


# Exported programs ------------------------------------------------------------------------------------------------

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
        line = _line(flat_selection, "flat_scores") if strict else _line(Indexer.forward, "flat_selection")
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
    assert site.location.endswith(f"test_explain.py:{_line(Router.forward, 'topk')}")
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


# What is printed --------------------------------------------------------------------------------------------------


def _line(function: Callable[..., Any], text: str) -> int:
    """The number of the only line of ``function`` with ``text``."""
    lines, first = inspect.getsourcelines(function)
    (found,) = [number for number, line in enumerate(lines) if text in line]
    return first + found


class NearMiss:
    """Indexers but for one thing; ``# here`` is the line that the report must point at."""

    @staticmethod
    def no_relu(q, k, w):
        scores = (torch.einsum("bshd,btd->bsht", q, k) * w[..., None]).sum(2)  # here
        return scores.topk(6).indices

    @staticmethod
    def gelu(q, k, w):
        scores = (F.gelu(torch.einsum("bshd,btd->bsht", q, k)) * w[..., None]).sum(2)  # here
        return scores.topk(6).indices

    @staticmethod
    def smallest(q, k, w):
        scores = (torch.einsum("bshd,btd->bsht", q, k).relu() * w[..., None]).sum(2)
        return scores.topk(6, largest=False).indices  # here

    @staticmethod
    def finite_fill(q, k, w):
        scores = (torch.einsum("bshd,btd->bsht", q, k).relu() * w[..., None]).sum(2)
        scores = scores.masked_fill(torch.arange(21) > 9, -1.0)  # here
        return scores.topk(6).indices

    @staticmethod
    def float64(q, k, w):
        scores = (torch.einsum("bshd,btd->bsht", q.double(), k.double()).relu() * w[..., None]).sum(2)  # here
        return scores.topk(6).indices

    @staticmethod
    def mask_inside(q, k, w):
        per_head = torch.einsum("bshd,btd->bsht", q, k).relu()
        per_head = per_head.masked_fill(torch.arange(21) > 9, float("-inf"))  # here
        return (per_head * w[..., None]).sum(2).topk(6).indices

    @staticmethod
    def weights_over_keys(q, k, w):
        weights = k.sum(-1)  # here
        per_head = torch.einsum("bshd,btd->bsht", q, k).relu()
        return (per_head * weights[:, None, None]).sum(2).topk(6).indices

    @staticmethod
    def added(q, k, w):
        scores = (torch.einsum("bshd,btd->bsht", q, k).relu() * w[..., None]).sum(2)
        bias = w.sum(-1, keepdim=True) * torch.arange(21)  # here
        return (scores + bias).topk(6).indices

    @staticmethod
    def share_of_the_keys(q, k, w):
        scores = (torch.einsum("bshd,btd->bsht", q, k).relu() * w[..., None]).sum(2)
        return scores.topk(k.shape[1] // 2).indices  # here

    @staticmethod
    def whole_sort(q, k, w):
        scores = (torch.einsum("bshd,btd->bsht", q, k).relu() * w[..., None]).sum(2)
        order = scores.sort(descending=True).indices
        return order * 2  # here

    @staticmethod
    def own_keys(q, k, w):
        keys = k[:, None] * w.sum(-1)[:, :, None, None]  # here
        scores = (torch.einsum("bshd,bstd->bsht", q, keys).relu() * w[..., None]).sum(2)
        return scores.topk(6).indices

    @staticmethod
    def values(q, k, w):
        scores = (torch.einsum("bshd,btd->bsht", q, k).relu() * w[..., None]).sum(2)
        return scores.topk(6).values  # here

    @staticmethod
    def plain(q, k, w):
        scores = (torch.einsum("bshd,btd->bsht", q, k).relu() * w[..., None]).sum(2)
        return scores.topk(6).indices  # here


# program, the reason, the node, the suggestion ("" where there is none), options
PRINTED: dict[str, tuple[str, str, str, str, dict[str, Any]]] = {
    "no ReLU": ("no_relu", "no ReLU around the product", r"at aten\.bmm", r"apply torch\.relu to the products", {}),
    "another activation": ("gelu", r"aten\.erf.* is applied instead", r"at aten\.erf", r"apply torch\.relu", {}),
    "smallest": ("smallest", "keeps the smallest scores", r"at aten\.sum", r"topk\(-score, largest=False\)", {}),
    "finite fill": (
        "finite_fill",
        "-1 in the place of scores .* hides no token",
        r"at aten\.gt",
        "-inf or torch.finfo",
        {},
    ),
    "float64": ("float64", r"computed in torch\.float64", r"at aten\.", "compute the score in float32", {}),
    "mask inside": ("mask_inside", "inside the sum over heads", r"at aten\.gt", "after the sum over heads", {}),
    "weights over keys": (
        "weights_over_keys",
        "vary over the keys",
        r"at aten\.sum",
        "weights must not vary over the keys",
        {},
    ),
    "added": ("added", "added to the score that is not provably a mask", r"at aten\.", r"masked_fill\(hidden", {}),
    "k is no number": ("share_of_the_keys", "neither a number nor min", "at .*floordiv", "select a fixed number", {}),
    "whole sort": ("whole_sort", "a full sort, not a top-k", r"at aten\.mul", "", {}),
    "own keys": ("own_keys", "each query has keys of its own", r"at aten\.", "", {}),
    "values in training": ("values", "a gradient may flow", "at .*getitem", r"under torch\.no_grad\(\)", {}),
    "opted out": ("plain", "opted out by its mark", "", "", {}),
    "scope": (
        "plain",
        "not in a marked region",
        "",
        r"@hisa_compile\.hisa, or set hisa\.scope",
        {"hisa.scope": "marked"},
    ),
    "budget": (
        "plain",
        "got 2 \\* 1 = 2 candidates, expected at least topk = 6",
        "",
        "",
        {"hisa.block_size": 1, "hisa.block_topk": 2},
    ),
}


@pytest.mark.parametrize("name", PRINTED)
def test_a_near_miss_is_printed_with_reason_node_line_and_what_would_help(name: str, capsys) -> None:
    """The line is one of the user's own code."""
    function, reason, node, suggestion, options = PRINTED[name]
    run = getattr(NearMiss, function)
    line = _line(run, "# here")
    q, k, w = torch.randn(2, 5, 3, 4), torch.randn(2, 21, 4), torch.randn(2, 5, 3)
    if name == "values in training":
        q.requires_grad_()
    if name == "k is no number":
        torch._dynamo.mark_dynamic(k, 1)
    report = explain(hisa(enabled=False)(run) if name == "opted out" else run, q, k, w, hisa_options=options)
    printed = capsys.readouterr().out
    assert printed.strip() == str(report)
    assert report.summary().startswith("0 of 1 selections")
    first, *rest = printed.splitlines()[1:]
    place = f"test_explain.py:{line}"
    assert re.search(f"left alone: .*{reason}", first), printed
    assert place in printed, printed
    at = [text for text in rest if text.startswith("    at ")]
    assert bool(at) == bool(node), printed
    assert not node or re.search(node, at[0]), printed
    help_ = [text for text in rest if text.startswith("    to be rewritten: ")]
    assert not suggestion or re.search(suggestion, help_[0]), printed


NOTATION = {
    "causal prefill": (
        Program(mask="visible"),
        "score[b,s,t] = sum_h weights[b,s,h] * relu(sum_d q[b,s,h,d] * k[b,t,d])",
        "visible where t <= unsqueeze[s,0]",
    ),
    "padded and packed": (
        Program(mask="everything", scale="negative"),
        "score[b,s,t] = sum_h weights[b,s,h] * relu(-0.5 * sum_d q[b,s,h,d] * k[b,t,d])",
        "visible where t >= sub[s,0] and t <= unsqueeze[s,0] and unsqueeze[b,s,0] == k_ids[b,t] and valid[b,t]",
    ),
    "loop over heads": (
        Program(head_sum="loop", heads=2),
        "score[b,s,t] = (select[b,s] * relu(sum_d slice[b,s,0,d] * k[b,t,d])"
        " + select[b,s] * relu(sum_d slice[b,s,0,d] * k[b,t,d]))",
    ),
    "two heads axes": (
        Program(layout="two_heads", mask="free"),
        "score[b,s,t] = sum_h0h1 weights[b,s,h0h1] * relu(sum_d q[b,s,h0h1,d] * k[b,t,d])",
        "visible where free[b,s,t]",
    ),
    "sequence first, key scales": (
        Program(layout="sbhd", scale="key_on_product", upcast=True),
        "score[b,s,t] = sum_h weights[s,b,h] * relu(key_scale[b,t] * sum_d q[s,b,h,d] * k[t,b,d])",
    ),
    "weights of the keys": (
        Program(scale="key_after"),
        "score[b,s,t] = key_scale[b,t] * sum_h weights[b,s,h] * relu(sum_d q[b,s,h,d] * k[b,t,d])",
    ),
    "heads of equal weight": (
        Program(head_sum="none", scale="after_relu"),
        "score[b,s,t] = 0.5 * sum_h relu(sum_d q[b,s,h,d] * k[b,t,d])",
    ),
}


@pytest.mark.parametrize("name", NOTATION)
def test_a_match_is_printed_in_index_notation(name: str, capsys) -> None:
    """The export's inputs keep their names; what the graph computes has ATen's, whose numbers are left out here."""
    program, *expected = NOTATION[name]
    explain(exported(Spelled(program), *program.inputs()), hisa_options=SMALL)
    summary, site, *lines = capsys.readouterr().out.splitlines()
    assert summary == "1 of 1 selections (top-k or sort) rewritten to hisa::indexer_topk"
    line = _line(Spelled.Indexer.forward, "program.run")
    assert re.fullmatch(
        rf"indexer \(Indexer\) \S*test_explain\.py:{line}: topk\(6\) rewritten, block_size=4 block_topk=3, "
        r"exact up to 12 visible tokens",
        site,
    )
    form = [text.strip() for text in lines if text.startswith(("    score", "    visible"))]
    assert [re.sub(r"\b([a-z]+)_\d+\[", r"\1[", text) for text in form] == expected
    assert [text for text in lines if "multiply-adds" in text]
    assert lines[-1] == "    note: sorted, for output (output)"
