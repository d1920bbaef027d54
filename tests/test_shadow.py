"""Shadow mode in compiled models: every call is recorded, on every base, and nothing else changes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from models import build
from shadow_cases import EVERY, OPERATOR, SHADOW, assert_same, only_site
from test_fidelity import causal, smooth
from tiny_indexer import Attention, Indexer, hidden_states, seeded
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import checkpoint

import hisa_compile
from hisa_compile import (
    Budget,
    ShadowReport,
    ShadowSite,
    backend,
    capture_calls,
    fidelity,
    reset_shadow,
    shadow_report,
)
from hisa_compile.ops import shadow, tally
from hisa_compile.passes import Mark, PassSettings

BASES = ("inductor", "aot_eager", "eager")
SMALL = {"hisa.block_size": 4, "hisa.block_topk": 4}


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(model: Any, **options: Any) -> Any:
    named = {f"hisa.{name}": value for name, value in options.items()}
    return torch.compile(model, backend=hisa_compile.hisa_backend, fullgraph=True, options=SMALL | named)


# Compiled models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_call_is_recorded_and_the_result_stays(base: str, mode: Any) -> None:
    """What is recorded was not taken for dead code; results are those without shadow mode, bit for bit."""
    model = seeded(Indexer)
    with mode():
        plain, shadowed = (compiled(model, base=base, **own) for own in ({}, {"shadow": EVERY}))
        results = []
        for run in (plain, shadowed):
            torch._dynamo.reset()
            results.append([run(hidden_states(tokens)) for tokens in (60, 60, 60)])
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
        x = hidden_states(60)
        whole = fidelity(*model.project(x), 4, window_end=causal(60, 60), block_size=4, block_topk=4, queries=EVERY)
    site = only_site()
    assert_same(site, whole, calls=3)
    assert 0.1 < site.recall < 0.9
    (reported,) = hisa_compile.reports()[-1].rewritten
    assert site.site == reported.name
    assert "tiny_indexer.py:" in site.site
    assert reported.shadow == EVERY
    assert f"shadow mode: up to {EVERY} queries a call" in str(reported)


@pytest.mark.parametrize("base", BASES)
def test_without_it_nothing_is_recorded_and_graphs_are_what_they_were(base: str) -> None:
    """No site, no operator but the usual one; and with it that one alone differs."""
    targets: dict[Any, list[Any]] = {}

    def noting(graph: torch.fx.Graph, settings: PassSettings, **options: Any) -> Any:
        sites = rewrite_indexers(graph, settings, **options)
        calls = [node for node in graph.nodes if node.op == "call_function"]
        targets[settings.shadow] = [node.target for node in calls]
        return sites

    from hisa_compile.passes import rewrite

    rewrite_indexers = rewrite.rewrite_indexers
    with pytest.MonkeyPatch.context() as patch, fresh_cache(), torch.no_grad():
        patch.setattr(rewrite, "rewrite_indexers", noting)
        compiled(seeded(Indexer), base=base)(hidden_states(60))
        assert shadow_report() == ShadowReport()
        assert "no site" in str(shadow_report())
        torch._dynamo.reset()
        compiled(seeded(Indexer), base=base, shadow=3)(hidden_states(60))
    assert SHADOW not in targets[None]
    assert targets[None] == [OPERATOR if target is SHADOW else target for target in targets[3]]
    assert targets[3].count(SHADOW) == 1


@pytest.mark.parametrize("base", BASES)
def test_a_training_step_records_its_forward_once(base: str) -> None:
    """The joint graph is cut in two, and the operator is in one part."""
    model, x = seeded(Attention), hidden_states(40).requires_grad_()
    compiled(model, base=base, shadow=4)(x).square().sum().backward()
    assert x.grad is not None
    site = only_site()
    assert (site.calls, site.queries, site.sampled) == (1, 80, 4)


@pytest.mark.parametrize("base", ["inductor", "aot_eager"])
def test_an_indexer_inside_a_checkpoint_is_recorded(base: str) -> None:
    """Whether or not it is computed again for the backward: it did run."""
    model, x = seeded(Attention), hidden_states(40).requires_grad_()
    compiled(lambda x: checkpoint(model, x, use_reentrant=False), base=base, shadow=4)(x).sum().backward()
    assert only_site().calls >= 1


@pytest.mark.parametrize("base", BASES)
def test_dynamic_lengths_share_one_site(base: str) -> None:
    """One compiled code: short calls prune nothing, long ones do, and all add up."""
    model = seeded(Indexer)
    with torch.no_grad():
        run = compiled(model, base=base, shadow=EVERY)
        before = len(hisa_compile.reports())
        total = pruned = 0.0
        for tokens in (12, 40, 57):
            x = hidden_states(tokens)
            torch._dynamo.mark_dynamic(x, 1)
            run(x)
            ends = causal(tokens, tokens)
            whole = fidelity(*model.project(x), 4, window_end=ends, block_size=4, block_topk=4, queries=EVERY)
            total += whole.recall * whole.sampled
            pruned += whole.sampled
    assert len(hisa_compile.reports()) == before + 1
    site = only_site()
    assert (site.calls, site.queries, site.sampled) == (3, 2 * (12 + 40 + 57), pruned)
    assert site.recall == pytest.approx(total / pruned)


def decode_step(q: Tensor, k: Tensor, w: Tensor, valid: Tensor) -> Tensor:
    scores = (torch.einsum("bshd,btd->bsht", q, k).relu() * w[..., None]).sum(2)
    return scores.masked_fill(~valid[:, None], float("-inf")).topk(8).indices


@pytest.mark.parametrize("base", BASES)
def test_a_decode_step_draws_sequences(base: str) -> None:
    """Twelve sequences of one query each, of which four a call are compared; a sequence of few tokens is exact."""
    generator = torch.Generator().manual_seed(0)
    q, w = torch.randn(12, 1, 4, 16, generator=generator), torch.rand(12, 1, 4, generator=generator)
    k = torch.randn(12, 64, 16, generator=generator)
    valid = torch.arange(64) < torch.tensor([9, *range(40, 62, 2)])[:, None]
    with torch.no_grad():
        run = compiled(decode_step, base=base, shadow=4)
        expected = compiled(decode_step, base=base)(q, k, w, valid)
        for _ in range(40):
            assert torch.equal(run(q, k, w, valid), expected)
    site = only_site()
    assert (site.calls, site.queries, site.exact_queries, site.sampled) == (40, 480, 40, 160)
    whole = fidelity(q, k, w, 8, key_valid=valid, block_size=4, block_topk=4, queries=EVERY)
    assert whole.sampled == 11
    assert abs(site.recall - whole.recall) < 4 * site.recall_error
    assert 0 < site.recall_error < 0.05


def test_each_layer_is_a_site() -> None:
    """transformers' DeepSeek-V3.2 with two layers; the figures are those of the tensors that each one had."""
    model = build("deepseek_v32")
    ids = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    options = SMALL | {"hisa.base": "aot_eager", "hisa.shadow": EVERY, "hisa.block_size": 2}
    run = torch.compile(model, backend=hisa_compile.hisa_backend, fullgraph=True, options=options)
    with torch.no_grad(), warnings.catch_warnings(), capture_calls() as kept:
        warnings.simplefilter("ignore")
        run(ids, use_cache=False)
    sites = shadow_report().sites
    assert [site.site for site in sites] == [site.name for site in hisa_compile.reports()[-1].rewritten]
    assert [site.site for site in sites] == [call.site for call in kept]
    assert len({site.site for site in sites}) == 2
    for number, (site, call) in enumerate(zip(sites, kept, strict=True)):
        assert f"layers.{number}." in site.site
        assert site.sampled > 0
        assert_same(site, fidelity(**call.arguments, **call.budget._asdict(), queries=EVERY))
    table = str(shadow_report()).splitlines()
    assert len(table) == 3
    assert all(line.endswith(site.site) for line, site in zip(table[1:], sites, strict=True))
    assert str(sites[0]) in (f"{table[0]}\n{table[1]}", str(ShadowReport(sites[:1])))


def test_chunks_in_one_call_are_one_site() -> None:
    """It goes by the name of the first."""

    def chunked(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        parts = []
        for rows in (slice(0, 8), slice(8, 16)):
            scores = (torch.einsum("bshd,btd->bsht", q[:, rows], k).relu() * w[:, rows, :, None]).sum(2)
            parts.append(scores.topk(8).indices)
        return torch.cat(parts, 1)

    q, k, w = torch.randn(1, 16, 4, 8), torch.randn(1, 60, 8), torch.rand(1, 16, 4)
    with torch.no_grad():
        compiled(chunked, base="aot_eager", shadow=EVERY)(q, k, w)
    site = only_site()
    assert (site.calls, site.queries) == (1, 16)
    assert [site.shadow for site in hisa_compile.reports()[-1].rewritten] == [EVERY, None]


def test_a_region_has_its_own_sample() -> None:
    """The decorator turns it on for a region, or gives it another number; the rest goes by the options."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Indexer(), hisa_compile.hisa(shadow=2)(type("Own", (Indexer,), {}))()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.first(x), self.second(x)

    model, x = seeded(Two), hidden_states(60)
    for shadow_of_all, expected in ((None, [("second", 2)]), (7, [("first", 7 // 2 * 2), ("second", 2)])):
        torch._dynamo.reset()
        tally._tallies.clear()
        with torch.no_grad():
            compiled(model, base="aot_eager", shadow=shadow_of_all)(x)
        assert [(site.site.split()[0], site.sampled) for site in shadow_report().sites] == expected
        assert [site.shadow for site in hisa_compile.reports()[-1].rewritten] == [shadow_of_all, 2]
    assert Mark(**Mark(shadow=3).to_annotation()) == Mark(shadow=3)


def test_cached_code_goes_on_recording() -> None:
    """Under the site's name, which stands in the code."""
    with fresh_cache(), torch.no_grad():
        for calls in (1, 2):
            torch._dynamo.reset()
            counters.clear()
            compiled(seeded(Indexer), shadow=4)(hidden_states(60))
            assert counters["aot_autograd"]["autograd_cache_hit"] == calls - 1
            assert (only_site().calls, only_site().site) == (calls, hisa_compile.reports()[-1].sites[0].name)


def test_code_of_other_lines_is_not_taken_from_the_cache() -> None:
    """Two functions of one graph: each has its own name in its code, where without shadow mode they share it."""

    def one(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        return (torch.einsum("bshd,btd->bsht", q, k).relu() * w[..., None]).sum(2).topk(4).indices

    def other(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        return (torch.einsum("bshd,btd->bsht", q, k).relu() * w[..., None]).sum(2).topk(4).indices

    given = torch.randn(1, 5, 3, 8), torch.randn(1, 60, 8), torch.rand(1, 5, 3)
    rewritten_id = backend.rewrite_id
    ids: dict[int | None, set[str]] = {None: set(), 2: set()}

    def noting(gm: torch.fx.GraphModule, settings: PassSettings) -> str:
        found = rewritten_id(gm, settings)
        ids[settings.shadow].add(found)
        return found

    with fresh_cache(), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "rewrite_id", noting)
        for number in ids:
            for function in (one, other):
                torch._dynamo.reset()
                compiled(function, shadow=number)(*given)
    assert [len(each) for each in ids.values()] == [1, 2]
    assert [site.calls for site in shadow_report().sites] == [1, 1]


@pytest.mark.parametrize("base", BASES)
def test_a_site_is_there_before_its_first_call(base: str) -> None:
    """A CUDA graph may be warmed up next, in memory that is not to stay."""
    sites: list[ShadowSite] = []

    def looking(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        made = hisa_compile.hisa_backend(gm, inputs, options=SMALL | {"hisa.base": base, "hisa.shadow": 2})
        sites.extend(shadow_report().sites)
        return made

    with torch.no_grad():
        torch.compile(seeded(Indexer), backend=looking)(hidden_states(60))
    (site,) = sites
    assert (site.calls, only_site().calls) == (0, 1)
    assert (site.site, site.topk, site.budget) == (only_site().site, 4, Budget(4, 4))


def test_explaining_records_nothing() -> None:
    """It says what would be compared, and runs the model's own code."""
    report = hisa_compile.explain(seeded(Indexer), hidden_states(60), hisa_options=SMALL | {"hisa.shadow": 5})
    assert report.sites[0].shadow == 5
    assert shadow_report() == ShadowReport()


def test_it_begins_anew_in_the_same_memory() -> None:
    """What was compiled goes on, and so would what a CUDA graph captured."""
    with torch.no_grad():
        run = compiled(seeded(Indexer), base="aot_eager", shadow=EVERY)
        run(hidden_states(60))
        before, memory = only_site(), dict(tally._tallies)
        reset_shadow()
        assert (only_site().calls, only_site().sampled, only_site().recall) == (0, 0, 1.0)
        run(hidden_states(60))
    assert only_site() == before
    # One tally a device that there is.
    assert all(tally._tallies[key] is tensor for key, tensor in memory.items())


def test_calls_are_captured_up_to_a_limit() -> None:
    """Copies of what sites in shadow mode are called with, for ``fidelity``; none after the end."""
    model = seeded(Indexer)
    x = hidden_states(60)
    with torch.no_grad():
        run = compiled(model, base="aot_eager", shadow=1)
        with capture_calls(2) as kept:
            for _ in range(3):
                run(x)
        run(x)
        assert [call.budget for call in kept] == [Budget(4, 4)] * 2
        assert sorted(kept[0].arguments) == ["k", "q", "topk", "weights", "window_end"]
        expected = fidelity(*model.project(x), 4, window_end=causal(60, 60))
        assert fidelity(**kept[0].arguments) == expected
    assert not shadow.LISTENERS
    for value, error in ((0, ValueError), ("3", TypeError)):
        with pytest.raises(error, match="limit: got"), capture_calls(value):
            pass


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "got"),
    [
        (0, ValueError, "0"),
        (-3, ValueError, "-3"),
        (True, TypeError, r"True \(bool\)"),
        ("4", TypeError, r"'4' \(str\)"),
    ],
)
def test_a_sample_is_a_positive_integer(value: Any, error: type[Exception], got: str) -> None:
    """The message names the option, what it got and expected; in the decorator likewise."""
    from hisa_compile.config import parse_options

    with pytest.raises(error, match=rf"^hisa\.shadow: got {got}, expected an integer >= 1 or None$"):
        parse_options({"hisa.shadow": value})
    with pytest.raises(error, match=rf"^hisa\.shadow_every: got {got}, expected an integer >= 1$"):
        parse_options({"hisa.shadow": 1, "hisa.shadow_every": value})
    with pytest.raises(error, match=rf"^hisa: shadow: got {got}, expected an integer >= 1 or None$"):
        hisa_compile.hisa(shadow=value)


def test_options_are_parsed() -> None:
    """Absent or None is off; one call in one is the default."""
    from hisa_compile.config import parse_options

    assert parse_options({"hisa.shadow": None}).settings == parse_options(None).settings == PassSettings()
    settings = parse_options({"hisa.shadow": 16, "hisa.shadow_every": 8}).settings
    assert (settings.shadow, settings.shadow_every) == (16, 8)
    assert settings.shadow_at(Mark()) == 16
    assert settings.shadow_at(Mark(shadow=2)) == 2
    with pytest.raises(TypeError, match=r"shadow_every: got None"):
        parse_options({"hisa.shadow_every": None})


def test_one_call_in_some_by_option() -> None:
    """The option reaches the operator."""
    with torch.no_grad():
        run = compiled(seeded(Indexer), base="aot_eager", shadow=1, shadow_every=4)
        for _ in range(12):
            run(hidden_states(60))
    # Evenly spread, by one more or less.
    assert 2 <= only_site().calls <= 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_reduce_overhead_goes_on_recording() -> None:
    """mode="reduce-overhead" still makes CUDA graphs, each call is counted, and results stay."""
    q, k, weights = (x.cuda() for x in smooth(queries=64, tokens=640, batch=1))

    def run_flat(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        return (torch.einsum("bshd,btd->bsht", q, k).relu() * w[..., None]).sum(2).topk(32).indices

    options = {**torch._inductor.list_mode_options("reduce-overhead"), "hisa.block_size": 16, "hisa.block_topk": 3}
    counters.clear()
    with torch.no_grad():
        shadowed = torch.compile(run_flat, backend=hisa_compile.hisa_backend, options=options | {"hisa.shadow": 8})
        with capture_calls() as kept:
            results = [shadowed(q, k, weights).clone() for _ in range(6)]
        assert counters["inductor"]["cudagraph_skips"] == 0
        site = only_site()
        torch._dynamo.reset()
        plain = torch.compile(run_flat, backend=hisa_compile.hisa_backend, options=options)
        assert all(torch.equal(result, plain(q, k, weights)) for result in results)
    assert (site.calls, site.sampled) == (6, 48)
    # Those of the host; a replay is none.
    assert 1 <= len(kept) < 6
    assert all(x.device.type == "cpu" for call in kept for x in call.arguments.values() if isinstance(x, Tensor))
    assert torch.equal(kept[0].arguments["k"], k.cpu())
