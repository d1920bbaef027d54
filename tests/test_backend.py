"""The backend rewrites on every base, keeps what the user has set, and says what it did."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from tiny_indexer import Attention, Indexer, hidden_states, seeded, selected_scores
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import checkpoint

import hisa_compile
from hisa_compile import Budget, Report, history
from hisa_compile.ops import schema
from hisa_compile.ops.coarse import resolve_coarse
from hisa_compile.passes import PassSettings, rewrite
from hisa_compile.passes.inductor_pass import RewritePass, compose

BASES = ("inductor", "aot_eager", "eager")


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(model, **options):
    return torch.compile(
        model,
        backend=hisa_compile.hisa_backend,
        fullgraph=True,
        options={key if key.startswith("_") else f"hisa.{key}": value for key, value in options.items()},
    )


class UserPass(CustomGraphPass):
    """A pass of the user's; remembers the top-k it saw and a setting that was active."""

    def __init__(self, uuid):
        self._uuid = uuid
        self.seen = []

    def __call__(self, graph):
        names = [str(node.target) for node in graph.nodes]
        self.seen.append((any("aten.topk" in name for name in names), inductor_config.epilogue_fusion))

    def uuid(self):
        return self._uuid


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("grad", [False, True])
def test_the_selection_is_the_flat_one_where_all_blocks_are_kept(base, grad):
    """24 visible tokens at most, 3 blocks of 8: rewritten, and equal up to ties."""
    model, x = seeded(Indexer), hidden_states(24)
    with torch.set_grad_enabled(grad):
        result = compiled(model, base=base, block_size=8, block_topk=3)(x)
    report = hisa_compile.reports()[-1]
    assert [(site.op, site.budget, site.topk) for site in report.rewritten] == [("topk", Budget(8, 3), 4)]
    assert result.dtype == torch.int64
    torch.testing.assert_close(selected_scores(model, x, result), selected_scores(model, x, model(x)))


@pytest.mark.parametrize("base", BASES)
def test_gradients_are_the_eager_ones(base):
    """The joint graph keeps its backward; a no_grad region inside the model stays one."""
    model, x = seeded(Attention), hidden_states(16).requires_grad_()
    model(x).square().sum().backward()
    expected = [x.grad.clone(), model.value.weight.grad.clone()]
    x.grad = model.value.weight.grad = None
    compiled(model, base=base, block_size=8, block_topk=2)(x).square().sum().backward()
    assert len(hisa_compile.reports()[-1].rewritten) == 1
    for got, want in zip([x.grad, model.value.weight.grad], expected, strict=True):
        torch.testing.assert_close(got, want)
    assert model.indexer.q.weight.grad is None


@pytest.mark.parametrize("base", BASES)
def test_an_indexer_inside_a_checkpoint_is_rewritten(base):
    """Dynamo keeps a checkpointed region in a graph of its own: marks and selections in it are seen."""
    model, x = seeded(Attention), hidden_states(16).requires_grad_()
    for marked, rewritten in ((model, 1), (hisa_compile.hisa(enabled=False)(model.forward), 0)):
        torch._dynamo.reset()
        run = compiled(lambda x, marked=marked: checkpoint(marked, x, use_reentrant=False), base=base)
        x.grad = None
        run(x).square().sum().backward()
        got = x.grad
        x.grad = None
        model(x).square().sum().backward()
        torch.testing.assert_close(got, x.grad)
        assert len(hisa_compile.reports()[-1].rewritten) == rewritten


@pytest.mark.parametrize("base", BASES)
def test_a_growing_context_needs_one_compile(base):
    """With a dynamic length the same compiled code is exact at each length within the budget."""
    model = seeded(Indexer)
    with torch.no_grad():
        run = compiled(model, base=base, block_size=8, block_topk=4)
        before = len(hisa_compile.reports())
        for tokens in (20, 27, 32):
            x = hidden_states(tokens)
            torch._dynamo.mark_dynamic(x, 1)
            result = run(x)
            torch.testing.assert_close(selected_scores(model, x, result), selected_scores(model, x, model(x)))
    new = hisa_compile.reports()[before:]
    assert [len(report.rewritten) for report in new] == [1]


@pytest.mark.parametrize("base", BASES)
def test_a_coarse_stage_that_is_not_given_is_chosen_at_each_length(base, monkeypatch):
    """One compiled code for all lengths: 16 heads, 16 candidates, so the probe up to 32 tokens."""
    chosen = []

    def choosing(coarse, tokens, heads, budget, pooled):
        chosen.append((coarse, resolve_coarse(coarse, tokens, heads, budget, pooled)))
        return chosen[-1][1]

    monkeypatch.setattr(schema, "resolve_coarse", choosing)
    model = seeded(Indexer, 16)
    with torch.no_grad():
        run = compiled(model, base=base, block_size=4, block_topk=4)
        before = len(hisa_compile.reports())
        results = {}
        for tokens in (32, 33):
            x = hidden_states(tokens)
            torch._dynamo.mark_dynamic(x, 1)
            results[tokens] = run(x)
        assert chosen == [(None, "probe"), (None, "paper")]
        assert len(hisa_compile.reports()) == before + 1
        for tokens, stage in ((32, "probe"), (33, "paper")):
            torch._dynamo.reset()
            asked = compiled(model, base=base, block_size=4, block_topk=4, coarse=stage)(hidden_states(tokens))
            assert torch.equal(results[tokens], asked)
        assert chosen[2:] == [("probe", "probe"), ("paper", "paper")]


@pytest.mark.parametrize("base", BASES)
def test_every_selection_is_reported(base):
    """A router's top-k and a sort of identifiers are left alone, each with a reason."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.indexer, self.gate = Indexer(), nn.Linear(12, 6)

        def forward(self, x):
            experts = self.gate(x).sigmoid().topk(2).indices
            return self.indexer(x), experts.flatten().sort().values

    model, x = seeded(Model), hidden_states(24)
    with torch.no_grad():
        _, experts = compiled(model, base=base)(x)
        assert torch.equal(experts, model(x)[1])
    report = hisa_compile.reports()[-1]
    assert len(report.sites) == 3
    assert [site.module.split()[0] for site in report.rewritten] == ["indexer"]
    assert all(site.reason for site in report.left_alone)
    assert all("tiny_indexer.py" in site.location or "test_backend.py" in site.location for site in report.sites)


def test_a_graph_without_selections_is_not_touched(monkeypatch):
    """Nothing to rewrite: the pass is not even installed, and Inductor's cache key stays its own."""

    def refuse(graph, settings):
        raise AssertionError("the pass ran")

    monkeypatch.setattr(rewrite, "rewrite_indexers", refuse)
    model, x = nn.Linear(12, 3), hidden_states(5)
    for base in ("inductor", "eager"):
        torch._dynamo.reset()
        torch.testing.assert_close(compiled(model, base=base)(x), model(x))
        assert hisa_compile.reports()[-1] == Report()


@pytest.mark.parametrize("where", ["options", "config"])
def test_the_users_own_pass_is_kept_and_runs_first(where):
    """Theirs sees the flat top-k and the options given to Inductor; ours rewrites afterwards."""
    theirs = UserPass("theirs")
    options = {"hisa.block_size": 8, "epilogue_fusion": False}
    configured = {"force_disable_caches": True, "joint_custom_pre_pass": theirs if where == "config" else None}
    with inductor_config.patch(configured), torch.no_grad():
        if where == "options":
            options["joint_custom_pre_pass"] = theirs
        torch.compile(seeded(Indexer), backend=hisa_compile.hisa_backend, options=options)(hidden_states(40))
    assert theirs.seen == [(True, False)]
    assert len(hisa_compile.reports()[-1].rewritten) == 1


def test_composed_passes_have_a_composed_identity():
    """Any change of either pass changes the id; a pass that can't be cached makes the whole uncacheable."""
    ours = RewritePass(PassSettings(), "ours")
    assert compose(None, ours).uuid() == "ours"
    ids = {compose(theirs, ours).uuid() for theirs in (UserPass("a"), UserPass("b"), [UserPass("a"), UserPass("b")])}
    assert len(ids) == 3
    for theirs in (UserPass(None), lambda graph: None, [UserPass("a"), print]):
        assert compose(theirs, ours).uuid() is None


def test_a_graph_seen_twice_is_reported_once(monkeypatch):
    """Freezing runs the joint passes twice over one graph."""
    site = hisa_compile.Site("topk", reason="not an indexer")
    monkeypatch.setattr(rewrite, "rewrite_indexers", lambda graph, settings: [site])
    ours = RewritePass(PassSettings(), "ours")
    first, second = torch.fx.Graph(), torch.fx.Graph()
    for graph in (first, first, second):
        ours(graph)
    assert ours.sites == [site, site]


def test_a_mode_is_inductors():
    """A mode sets Inductor's options; without Inductor it is an error, as is a mode that does not exist."""
    theirs = UserPass("theirs")
    gm = torch.fx.symbolic_trace(nn.Identity())
    with pytest.raises(ValueError, match=r"mode='max-autotune'.*no effect"):
        hisa_compile.hisa_backend(gm, [], mode="max-autotune", options={"hisa.base": "eager"})
    with pytest.raises(RuntimeError, match="Unrecognized mode=fastest"):
        hisa_compile.hisa_backend(gm, [], mode="fastest")
    seen = []
    theirs.seen = seen
    with inductor_config.patch(joint_custom_pre_pass=lambda graph: seen.append(inductor_config.max_autotune)):
        model = torch.compile(Indexer(), backend=hisa_compile.hisa_backend, mode="max-autotune-no-cudagraphs")
        with torch.no_grad():
            model(hidden_states(24))
    assert seen == [True]


def test_unknown_options_are_refused():
    """Ours by us, Inductor's by Inductor; both name the key."""
    for key in ("hisa.blocks", "no_such_option"):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=key):
            torch.compile(Indexer(), backend=hisa_compile.hisa_backend, options={key: 1})(hidden_states(24))


def test_a_budget_below_topk_leaves_the_site_flat_and_says_so():
    """topk = 4 does not fit into 1 * 2 candidates: the program still runs, unchanged."""
    model, x = seeded(Indexer), hidden_states(24)
    with torch.no_grad():
        assert torch.equal(compiled(model, base="aot_eager", block_size=1, block_topk=2)(x), model(x))
    (site,) = hisa_compile.reports()[-1].sites
    assert not site.rewritten
    assert "2 candidates" in site.reason


def test_one_line_is_logged_for_every_compile(caplog):
    """INFO has the summary, base and settings; DEBUG the whole report."""
    for level, expected in ((logging.INFO, 1), (logging.DEBUG, 2)):
        torch._dynamo.reset()
        caplog.clear()
        with caplog.at_level(level, logger="hisa_compile"), torch.no_grad():
            compiled(Indexer(), base="aot_eager", block_size=8, coarse="paper")(hidden_states(24))
        lines = [record.getMessage() for record in caplog.records if record.name == "hisa_compile"]
        assert len(lines) == expected
        assert "1 of 1" in lines[0]
        assert "aot_eager" in lines[0]
        assert "block_size=8" in lines[0]
        assert "coarse='paper'" in lines[0]
    assert lines[1] == str(hisa_compile.reports()[-1])


def test_reports_are_bounded_and_safe_to_read_from_threads(monkeypatch):
    """Readers get a copy of the latest ones while others append."""
    monkeypatch.setattr(history, "_reports", type(history._reports)(maxlen=5))

    def work():
        for _ in range(200):
            history.remember(Report())
            assert len(hisa_compile.reports()) <= 5

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hisa_compile.reports()) == 5


@pytest.mark.parametrize("base", ["inductor", "aot_eager", "eager"])
def test_values_keep_their_gradient_on_every_base(base):
    """Scores that a loss reads stay flat in grad mode and are rewritten without it; graph inputs as operands."""
    torch._dynamo.reset()
    q, k, w = torch.randn(1, 24, 2, 8), torch.randn(1, 24, 8), torch.randn(1, 24, 2)

    def values(q, k, w):
        scores = (torch.einsum("bshd,btd->bsht", q, k).relu() * w[..., None]).sum(2)
        return scores.topk(5).values

    compiled = torch.compile(values, backend="hisa", options={"hisa.base": base})
    torch.testing.assert_close(compiled(q, k, w), values(q, k, w))
    assert len(hisa_compile.reports()[-1].rewritten) == 1
    q.requires_grad_()
    compiled(q, k, w).sum().backward()
    assert "gradient" in hisa_compile.reports()[-1].sites[0].reason
    (expected,) = torch.autograd.grad(values(q, k, w).sum(), q)
    torch.testing.assert_close(q.grad, expected)
