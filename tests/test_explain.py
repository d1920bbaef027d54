"""explain tells what the backend would do, and leaves everything else as it was."""

from __future__ import annotations

import pytest
import torch
from tiny_indexer import Attention, Indexer, flat_selection, hidden_states, seeded
from torch import nn

import hisa_compile
from hisa_compile import Budget, explain, hisa
from hisa_compile.ops.coarse import resolve_coarse

# Within m * B = 32 tokens, and on both sides of 64 = H * m * B / 8, where 16 heads change the coarse stage.
LENGTHS = (1, 32, 33, 63, 64, 65, 1000)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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
    """Means of blocks, spreads too, or two heads on each token, beyond 128 on outer blocks; or what a call chooses."""
    model, x = seeded(Indexer, heads), hidden_states(24)
    options = {"hisa.block_size": 8, "hisa.block_topk": 4}
    asked = {}
    for stage in (None, "paper", "spread", "probe", "two-level"):
        (site,) = explain(model, x, hisa_options={**options, "hisa.coarse": stage}).sites
        asked[stage] = [
            site.work_after.subs({symbol: tokens}) for symbol in site.work_after.free_symbols for tokens in LENGTHS
        ]
    assert asked["paper"] == [heads * 8 * (n if n <= 32 else -(-n // 8) + 32) for n in LENGTHS]
    assert asked["spread"] == [heads * 8 * (n if n <= 32 else 2 * -(-n // 8) + 32) for n in LENGTHS]
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
