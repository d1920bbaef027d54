"""Indexers as public projects write them: found, rewritten, and selecting what eager mode or the reference selects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clients import (
    CLIENTS,
    DIM,
    HEADS,
    RATIO,
    TOPK,
    Client,
    DeepSeekV4,
    fla_attention,
    fla_indexer,
    megatron_without_relu,
    numbers,
    operands,
    packed_bounds,
    sequence_first,
    square,
)
from model_cases import FITS, recorded_calls
from models import build
from programs import aten_graph
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CompileConfig, GenerationConfig

import hisa_compile
from hisa_compile.ops import reference
from hisa_compile.passes import PassSettings, rewrite_indexers

# Lengths at which the fullest row has 32 keys (8 blocks of 4 fit) and 9 or more blocks of 2 (4 of them are kept).
LENGTH = {name: 128 if "V4" in name or "glm5" in name else 32 for name in CLIENTS}
PRUNES = {"hisa.block_size": 2, "hisa.block_topk": 4}


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(run: Any, options: dict[str, Any], dynamic: bool | None = None, base: str = "aot_eager") -> Any:
    return torch.compile(run, backend="hisa", dynamic=dynamic, options={**options, "hisa.base": base})


def in_order(client: Client, indices: Tensor) -> Tensor:
    """The selected set of each row; a hidden token is -1, whichever it was."""
    return client.hidden(indices.long()).sort(-1).values


def expected(client: Client, inputs: tuple[Any, ...], select: Any, **budget: int) -> Tensor:
    """What the client means, computed by the reference: sorted indices, -1 where nothing visible was left."""
    parts = [select(**call, **budget, mark_hidden=True)[0].long() for call in client.meaning(*inputs)]
    return client.assemble(parts).sort(-1).values


@pytest.mark.parametrize("name", CLIENTS)
def test_the_reference_computes_what_the_client_does(name: str) -> None:
    """The oracle of the tests below: in eager mode the client's sets are the flat selection of its meaning."""
    client = CLIENTS[name]
    inputs = client.inputs(LENGTH[name])
    got = in_order(client, client.build(LENGTH[name])(*inputs))
    assert torch.equal(got, expected(client, inputs, reference.flat_topk))


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CLIENTS)
def test_a_compiled_client_selects_what_eager_mode_selects(name: str, dynamic: bool | None) -> None:
    """Within the budget every indexer is rewritten and every row has the same set of visible tokens."""
    client = CLIENTS[name]
    inputs = client.inputs(LENGTH[name])
    before = len(hisa_compile.reports())
    with torch.no_grad(), recorded_calls() as calls:
        got = compiled(client.build(LENGTH[name]), FITS, dynamic)(*inputs)
    sites = [str(site) for report in hisa_compile.reports()[before:] for site in report.left_alone]
    assert len(calls) == client.sites, sites
    want = client.build(LENGTH[name])(*inputs)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert torch.equal(in_order(client, got), in_order(client, want))


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CLIENTS)
def test_beyond_the_budget_a_client_selects_what_the_reference_selects(name: str, dynamic: bool | None) -> None:
    """Pruned, each row has HISA's set for the client's meaning, and every call HISA's set for its operands."""
    client = CLIENTS[name]
    inputs = client.inputs(LENGTH[name])
    with torch.no_grad(), recorded_calls() as calls:
        got = compiled(client.build(LENGTH[name]), PRUNES, dynamic)(*inputs)
    for arguments, (indices, _) in calls:
        assert torch.equal(indices.sort(-1).values, reference.indexer_topk(**arguments)[0].sort(-1).values)
    want = expected(client, inputs, reference.indexer_topk, block_size=2, block_topk=4)
    assert torch.equal(in_order(client, got), want)
    assert not torch.equal(want, expected(client, inputs, reference.flat_topk)), "nothing was pruned"


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("decompose", [False, True], ids=["composite", "decomposed"])
@pytest.mark.parametrize("name", [name for name in CLIENTS if name != "glm5_next"])
def test_the_graph_of_a_client_has_its_indexers_and_nothing_else(name: str, decompose: bool, symbolic: bool) -> None:
    """Each selection of the functional graph is rewritten, with the client's sizes, decomposed or not."""
    client = CLIENTS[name]
    run, inputs = client.build(LENGTH[name]), client.inputs(LENGTH[name])
    buffers = dict(run.named_buffers()) if isinstance(run, nn.Module) else {}
    numbers = tuple(x for x in inputs if not isinstance(x, Tensor))

    def functional(*tensors: Tensor) -> Tensor:
        given, state = tensors[len(buffers) :], dict(zip(buffers, tensors, strict=False))
        return functional_call(run, state, given + numbers) if buffers else run(*given, *numbers)

    tensors = (*buffers.values(), *(x for x in inputs if isinstance(x, Tensor)))
    with torch.no_grad():
        module = aten_graph(functional, tensors, symbolic, decompose)
    sites = rewrite_indexers(module.graph, PassSettings(block_size=4, block_topk=10))
    assert [site.reason for site in sites] == [""] * client.sites
    sizes = (None, None) if symbolic else (HEADS, DIM)
    assert {(site.topk, site.heads, site.head_dim) for site in sites} == {(TOPK, *sizes)}


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("fla, packed sequences", "inductor"),
        ("fla, packed sequences", "eager"),
        ("Megatron-LM, packed sequences", "inductor"),
        ("Megatron-LM, packed sequences", "eager"),
        ("DeepSeek-V4", "inductor"),
    ],
)
def test_the_other_bases_select_the_same(name: str, base: str) -> None:
    """Generated code and the graph that is not functional agree with eager mode, rewritten in both."""
    client = CLIENTS[name]
    inputs = client.inputs(LENGTH[name])
    with torch.no_grad(), recorded_calls() as calls:
        got = compiled(client.build(LENGTH[name]), FITS, base=base)(*inputs)
    assert len(calls) == client.sites, str(hisa_compile.reports()[-1])
    assert torch.equal(in_order(client, got), in_order(client, client.build(LENGTH[name])(*inputs)))


def test_scores_updated_in_place_stay_flat_in_the_base_that_is_not_functional() -> None:
    """Base eager keeps in-place updates as they are: DeepSeek-V4's is left alone, and the report names the update."""
    client = CLIENTS["DeepSeek-V4"]
    inputs = client.inputs(LENGTH["DeepSeek-V4"])
    with torch.no_grad(), recorded_calls() as calls:
        got = compiled(client.build(LENGTH["DeepSeek-V4"]), FITS, base="eager")(*inputs)
    assert not calls
    assert all("aten.add_" in site.reason for site in hisa_compile.reports()[-1].sites)
    assert torch.equal(got, client.build(LENGTH["DeepSeek-V4"])(*inputs))


def test_bounds_in_a_tensor_break_the_graph_and_each_sequence_is_rewritten() -> None:
    """fla reads cu_seqlens on the host: the code between the breaks is compiled, once a length, and rewritten."""
    bounds = packed_bounds(32)
    inputs = square(32, batch=1)
    with torch.no_grad(), recorded_calls() as calls:
        got = compiled(fla_indexer, FITS)(*inputs, torch.tensor(bounds))
    assert [arguments["k"].shape[1] for arguments, _ in calls] == [8, 10, 14]
    assert torch.equal(got.sort(-1).values, fla_indexer(*inputs, bounds).sort(-1).values)


def test_a_width_that_is_an_argument_is_any_number() -> None:
    """Dynamic shapes make a variable of it, so nothing is known of the budget: whatever is done, eager's sets."""
    run = compiled(lambda q, k, w, topk: fla_indexer(q, k, w, topk=topk), FITS, dynamic=True)
    for topk in (5, 7):
        want = fla_indexer(*square(24), topk=topk)
        assert torch.equal(run(*square(24), topk).sort(-1).values, want.sort(-1).values)


def test_flas_attention_over_a_rewritten_selection_has_eager_modes_output_and_gradients() -> None:
    """The -1 that hidden slots get keep falling into the spare column; a training step differs in nothing."""
    results = []
    for run in (fla_attention, compiled(fla_attention, FITS)):
        leaves = [x.requires_grad_() for x in (*square(24), numbers(2, 24, 5, seed=9))]
        with recorded_calls() as calls:
            out = run(*leaves)
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    assert all(site.reason == "" or "gradient" in site.reason for site in hisa_compile.reports()[-1].sites)
    assert len(calls) in (0, 2)
    for want, got in zip(*results, strict=True):
        assert (want is None) == (got is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_compressed_keys_decode_one_token_at_a_time() -> None:
    """DeepSeek-V4 after the prefill: the cache holds the keys, the one query sees them all, indices are shifted."""
    q, k, weights = operands(2, 40, 11)
    eager, model = DeepSeekV4(2, 44), DeepSeekV4(2, 44)
    run = compiled(model, FITS)
    step = operands(2, 1, 1)
    with torch.no_grad():
        for each in (eager, model):
            each(q, k[:, :10], weights)
        for start, added in ((43, k[:, 10:]),):
            want = eager(step[0], added, step[2], start, 100)
            with recorded_calls() as calls:
                got = run(step[0], added, step[2], start, 100)
    assert len(calls) == 1, str(hisa_compile.reports()[-1])
    assert calls[0][0]["k"].shape[1] == 44 // RATIO
    assert torch.equal(got.sort(-1).values, want.sort(-1).values)
    assert torch.equal(model.cache, eager.cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["fla, a loop over the batch", "Megatron-LM, added triangle", "DeepSeek-V3.2"])
def test_half_precision_clients_are_rewritten(name: str, dtype: torch.dtype) -> None:
    """Operands in two bytes: rewritten, and selecting what the scores of the same operands select in float32."""
    client = CLIENTS[name]
    inputs = tuple(x.to(dtype) for x in client.inputs(32))
    with torch.no_grad(), recorded_calls() as calls:
        compiled(client.build(32), FITS)(*inputs)
    assert len(calls) == client.sites, str(hisa_compile.reports()[-1])
    for (arguments, (indices, _)), call in zip(calls, client.meaning(*(x.float() for x in inputs)), strict=True):
        assert arguments["k"].shape == call["k"].shape
        scores = reference.indexer_scores(call["q"], call["k"], call["weights"])
        flat = reference.flat_topk(**call)[0].long()
        visible = call["mask"].expand_as(scores)
        best = torch.where(visible, scores, 0.0).gather(-1, flat).sum(-1)
        got = torch.where(visible, scores, 0.0).gather(-1, indices.long()).sum(-1)
        torch.testing.assert_close(got, best, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("run", "inputs"),
    [
        (lambda q, k, w: fla_indexer(q, k, w, activation=None), square(16)),
        (lambda q, k, w: fla_indexer(q, k, w, activation="gelu"), square(16)),
        (megatron_without_relu, sequence_first(16)),
    ],
    ids=["fla's default activation", "fla with GELU", "Megatron-LM for GLM-5"],
)
def test_the_same_clients_without_the_relu_are_left_alone(run: Any, inputs: tuple[Tensor, ...]) -> None:
    """The ReLU can be switched off in both projects; then the score is another and stays as it is."""
    assert torch.equal(compiled(run, FITS)(*inputs), run(*inputs))
    report = hisa_compile.reports()[-1]
    assert report.sites
    assert not report.rewritten
    module = aten_graph(run, inputs)
    before = str(module.graph)
    assert not any(site.rewritten for site in rewrite_indexers(module.graph, PassSettings()))
    assert str(module.graph) == before


def generated(
    name: str, ids: Tensor, compile_config: CompileConfig | None, attention: str = "sdpa", **settings: Any
) -> Tensor:
    config = GenerationConfig(
        cache_implementation="static",
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        compile_config=compile_config,
        disable_compile=compile_config is None,
        **settings,
    )
    model = build(name, attention=attention)
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)


def compile_config(base: str = "aot_eager") -> CompileConfig:
    """transformers' default mode and options exclude each other in torch.compile: the mode is taken away."""
    config = CompileConfig(backend="hisa", mode=None, options={**FITS, "hisa.base": base})
    config._compile_all_devices = True  # generate compiles on a CPU only if asked to
    return config


@pytest.mark.parametrize("chunk", [None, 5], ids=["eager prefill", "compiled prefill in chunks"])
@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa", "axk2"])
def test_generate_with_a_static_cache_compiles_and_rewrites(name: str, chunk: int | None) -> None:
    """The backend given to transformers' generate: the greedy tokens are eager mode's, every step is rewritten.

    generate prefills in eager mode unless the prompt is cut into chunks.
    """
    ids = torch.randint(2, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    want = generated(name, ids, None)
    before = len(hisa_compile.reports())
    with recorded_calls() as calls:
        got = generated(name, ids, compile_config(), prefill_chunk_size=chunk)
    assert torch.equal(got, want)
    reports = hisa_compile.reports()[before:]
    assert [len(report.rewritten) for report in reports] == [2] * len(reports), reports[0]
    lengths = [arguments["q"].shape[1] for arguments, _ in calls]
    assert lengths == [5] * 4 + [2] * 2 + [1] * 10 if chunk else [1] * 10


@pytest.mark.parametrize("name", ["deepseek_v32", "hy_v4"])
def test_a_float_mask_that_generate_makes_outside_the_graph_is_no_mask_that_can_be_proved(name: str) -> None:
    """With eager attention generate hands the model numbers to add to its scores: nothing is rewritten."""
    ids = torch.randint(2, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    with recorded_calls() as calls:
        got = generated(name, ids, compile_config(), "eager")
    assert torch.equal(got, generated(name, ids, None, "eager"))
    assert not calls
    reasons = [site.reason for site in hisa_compile.reports()[-1].sites if "Indexer" in site.module]
    assert len(reasons) == 2
    assert all("not provably a mask" in reason for reason in reasons), reasons


def test_generate_runs_on_inductor() -> None:
    """The default base under generate: code is generated once for all steps, the tokens stay the same."""
    ids = torch.randint(2, 97, (1, 9), generator=torch.Generator().manual_seed(2))
    before = len(hisa_compile.reports())
    with recorded_calls() as calls:
        got = generated("deepseek_v32", ids, compile_config("inductor"))
    assert torch.equal(got, generated("deepseek_v32", ids, None))
    assert len(calls) == 10
    assert len(hisa_compile.reports()) - before == 1
