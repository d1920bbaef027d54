"""A mark reaches the pass through every base, in every grad mode, and changes nothing else."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import pickle

import pytest
import torch
from tiny_indexer import Attention, Indexer, flat_selection, hidden_states, seeded, selected_scores
from torch import nn

import hisa_compile
from hisa_compile import Budget, hisa
from hisa_compile.ops import reference
from hisa_compile.ops.coarse import COARSE_STAGES

BASES = ("inductor", "aot_eager", "eager")


@hisa(block_size=8, block_topk=3)
class MarkedIndexer(Indexer):
    """At module level, so that instances can be pickled."""


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled_sites(function, *args, fullgraph=True, **options):
    """Compile ``function``, call it, and return (result, sites of all its graphs)."""
    options = {"hisa.base": "aot_eager", **{f"hisa.{name}": value for name, value in options.items()}}
    before = len(hisa_compile.reports())
    result = torch.compile(function, backend=hisa_compile.hisa_backend, fullgraph=fullgraph, options=options)(*args)
    new = hisa_compile.reports()[before:]
    return result, [site for report in new for site in report.sites]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("grad_mode", ["train", "no_grad", "inference_mode"])
def test_a_marked_class_gets_its_own_budget(base, grad_mode):
    """The annotation reaches the ATen top-k in the joint graph and in both kinds of inference graph."""
    mode = {"train": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with mode[grad_mode]():
        result, sites = compiled_sites(Attention(MarkedIndexer), hidden_states(40), base=base, block_size=32)
    assert [site.budget for site in sites] == [Budget(8, 3)]
    assert result.requires_grad == (grad_mode == "train")


@pytest.mark.parametrize("base", BASES)
def test_an_opted_out_region_stays_flat(base):
    """enabled=False holds against a backend that rewrites everything."""

    @hisa(enabled=False)
    class Off(Indexer):
        pass

    _, sites = compiled_sites(Off(), hidden_states(40), base=base)
    assert [site.rewritten for site in sites] == [False]


def test_the_marked_scope_rewrites_marked_regions_alone():
    """One of two equal indexers is marked: it alone is rewritten."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.marked = Indexer(), MarkedIndexer()

        def forward(self, x):
            return self.plain(x), self.marked(x)

    _, sites = compiled_sites(Two(), hidden_states(40), scope="marked")
    assert {site.module.split()[0]: site.rewritten for site in sites} == {"plain": False, "marked": True}


def test_what_a_mark_leaves_open_comes_from_the_options():
    """block_size from the mark, block_topk from the backend."""
    marked = hisa(block_size=4)(flat_selection)
    q, k, w = torch.randn(1, 40, 2, 8), torch.randn(1, 40, 8), torch.randn(1, 40, 2)
    _, sites = compiled_sites(marked, q, k, w, 4, block_size=32, block_topk=6)
    assert [site.budget for site in sites] == [Budget(4, 6)]


@pytest.mark.parametrize("base", BASES)
def test_a_coarse_stage_reaches_the_call_from_marks_and_options(base):
    """What is compiled selects as the operator does with the mark's stage, else the backend's, else its own choice."""
    generator = torch.Generator().manual_seed(1)
    q, k, w = (
        torch.randint(-3, 4, size, generator=generator).float() for size in ((1, 64, 2, 8), (1, 64, 8), (1, 64, 2))
    )
    budget = {"block_size": 4, "block_topk": 4}
    window_end = torch.arange(1, 65, dtype=torch.int32)
    wanted = {
        stage: reference.indexer_topk(q, k, w, 4, **budget, window_end=window_end, coarse=stage)[0].long()
        for stage in (*COARSE_STAGES, None)
    }
    # Two heads are too few for the probe to be chosen.
    assert torch.equal(wanted[None], wanted["paper"])
    # No two of the others are the same; two levels hold all blocks, and are the probe.
    assert torch.equal(wanted["two-level"], wanted["probe"])
    for one, other in itertools.combinations(("paper", "spread", "probe"), 2):
        assert not torch.equal(wanted[one], wanted[other])
    for own, given in itertools.product(("paper", "spread", "probe", None), repeat=2):
        torch._dynamo.reset()
        marked = hisa(coarse=own)(flat_selection)
        result, sites = compiled_sites(marked, q, k, w, 4, base=base, coarse=given, **budget)
        assert torch.equal(result, wanted[own or given])
        assert [(site.budget, site.coarse) for site in sites] == [(Budget(4, 4), own or given)]


def test_the_innermost_mark_counts():
    """A mark inside another one replaces it whole."""
    inner = hisa(block_size=4, block_topk=5)(flat_selection)

    @hisa(enabled=False)
    def outer(q, k, w):
        return inner(q, k, w, 4), flat_selection(q, k, w, 4)

    q, k, w = torch.randn(1, 40, 2, 8), torch.randn(1, 40, 8), torch.randn(1, 40, 2)
    _, sites = compiled_sites(outer, q, k, w)
    assert [site.budget for site in sites] == [Budget(4, 5), None]


@pytest.mark.parametrize("scope", ["all", "marked"])
def test_a_graph_break_in_a_region_does_not_lose_the_mark(scope):
    """Dynamo compiles the parts of a broken region one by one; an opt-out must hold in each, a budget and stage too."""

    def broken(x, indexer):
        first = indexer(x)
        torch._dynamo.graph_break()
        return first, indexer(2 * x)

    off, small = hisa(enabled=False)(broken), hisa(block_size=8, block_topk=3, coarse="paper")(broken)

    def model(x, indexer):
        return off(x + 1, indexer), small(x, indexer), broken(x, indexer)

    _, sites = compiled_sites(model, hidden_states(40), Indexer(), fullgraph=False, scope=scope, block_size=16)
    unmarked = [Budget(16, 16)] * 2 if scope == "all" else [None] * 2
    assert [site.budget for site in sites] == [None] * 2 + [Budget(8, 3)] * 2 + unmarked
    assert [site.coarse for site in sites] == [None] * 2 + ["paper"] * 2 + [None] * 2


def test_a_function_decorated_inside_a_model_is_marked():
    """Dynamo traces the decoration itself."""
    indexer = Indexer()

    def model(x):
        @hisa(block_size=8, block_topk=3)
        def inner(x):
            return indexer(x)

        return inner(x)

    _, sites = compiled_sites(model, hidden_states(40))
    assert [site.budget for site in sites] == [Budget(8, 3)]


def test_without_compilation_nothing_changes():
    """Eagerly the decorated class computes the flat selection, and no annotation is made."""
    x = hidden_states(40)
    plain, marked = seeded(Indexer), seeded(MarkedIndexer)
    assert torch.equal(plain(x), marked(x))
    seen = []
    hisa(lambda: seen.append(dict(torch.fx.traceback.current_meta)))()
    assert seen == [{}]


def test_a_marked_region_selects_what_it_should():
    """Where every block fits in the mark's budget, the marked and compiled selection is the flat one."""
    x = hidden_states(24)
    model = seeded(MarkedIndexer)
    result, sites = compiled_sites(model, x)
    assert sites[0].exact_up_to == 24
    torch.testing.assert_close(selected_scores(model, x, result), selected_scores(model, x, model(x)))


def test_a_marked_class_is_the_same_class():
    """isinstance, pickling, state_dict, subclassing and super().forward work as without the mark."""
    assert inspect.isclass(MarkedIndexer)
    assert MarkedIndexer.__mro__[1] is Indexer
    assert "forward" in MarkedIndexer.__dict__
    assert Indexer.forward is not MarkedIndexer.forward
    model = seeded(MarkedIndexer)
    copy = pickle.loads(pickle.dumps(model))
    assert type(copy) is MarkedIndexer
    assert list(copy.state_dict()) == list(Indexer().state_dict())

    class Sub(MarkedIndexer):
        def forward(self, x):
            return super().forward(x) + 1

    x = hidden_states(12)
    assert torch.equal(seeded(Sub)(x), model(x) + 1)


def test_a_decorated_function_keeps_its_identity():
    """Name, docstring and signature are the function's own, bare or with arguments, as a method too."""
    for marked in (hisa(flat_selection), hisa(block_size=4)(flat_selection)):
        assert marked.__name__ == "flat_selection"
        assert marked.__doc__ == flat_selection.__doc__
        assert inspect.signature(marked) == inspect.signature(flat_selection)

    class Net(Indexer):
        @hisa(block_size=4, block_topk=4)
        def forward(self, x):
            return super().forward(x)

    _, sites = compiled_sites(Net(), hidden_states(40))
    assert [site.budget for site in sites] == [Budget(4, 4)]


def test_a_wrong_target_is_a_type_error_that_says_what_to_do():
    """Instances, compiled functions, wrapped methods, generators and plain values can't be marked."""

    def generator():
        yield 1

    async def coroutine():
        pass

    for target, message in (
        (Indexer(), "instance of Indexer.*decorate the class"),
        (torch.compile(flat_selection), "compiled by torch.compile; mark it first"),
        (staticmethod(flat_selection), "put @staticmethod above @hisa"),
        (generator, "generator or coroutine"),
        (coroutine, "generator or coroutine"),
        (64, "keyword arguments"),
        (type("Empty", (nn.Module,), {}), "no forward"),
        (int, "expected a function"),
    ):
        with pytest.raises(TypeError, match=message):
            hisa(target)


def test_a_wrong_argument_fails_where_it_is_written():
    """Budget values are checked at decoration, before anything is compiled."""
    with pytest.raises(ValueError, match="block_size: got 0"):
        hisa(block_size=0)
    with pytest.raises(ValueError, match="block_topk: got 1"):
        hisa(block_topk=1)
    with pytest.raises(TypeError, match="block_size: got '64'"):
        hisa(block_size="64")
    with pytest.raises(TypeError, match="enabled: got 1"):
        hisa(enabled=1)
    with pytest.raises(
        ValueError, match="hisa: coarse: got 'mean', expected None or one of 'paper', 'spread', 'probe', 'two-level'"
    ):
        hisa(coarse="mean")
    with pytest.raises(TypeError, match=r"hisa: coarse: got 64 \(int\), expected None or one of"):
        hisa(coarse=64)
