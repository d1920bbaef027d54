"""Graphs that once broke the pass or fooled it: crashes, lossy casts, strides, cut axes, mixed devices."""

from __future__ import annotations

import pytest
import torch
from programs import aten_graph
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from hisa_compile.passes import PassSettings, Site, rewrite_indexers

B, S, T, H, D, K = 2, 5, 21, 3, 4, 6
Q, KEYS, W = torch.randn(B, S, H, D), torch.randn(B, T, D), torch.randn(B, S, H)
EVERYTHING = PassSettings(block_size=4, block_topk=64)


def score(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (torch.einsum("bshd,btd->bsht", q, k).relu() * w[..., None]).sum(2)


def visit(run, *inputs: Tensor, symbolic: bool = False):  # type: ignore[no-untyped-def]
    """The rewritten module and its sites."""
    module = aten_graph(run, inputs, symbolic)
    sites: list[Site] = rewrite_indexers(module.graph, EVERYTHING)
    module.recompile()
    return module, sites


@pytest.mark.parametrize(
    ("run", "inputs"),
    [
        (lambda x: (x.softmax(-1) / x.shape[-1]).topk(3).indices, (torch.randn(4, 9),)),
        (lambda x: (x.softmax(-1) / x.shape[-1] ** 0.5).topk(3).indices, (torch.randn(4, 9),)),
        (
            lambda x, y: (x.view(5, 0, 2).flatten(1) @ y.view(2, 0, 9).flatten(0, 1)).relu().topk(3),
            (torch.randn(5, 0), torch.randn(0, 9)),
        ),
        (lambda x: (x / torch.tensor(1j)).real.topk(3).indices, (torch.randn(4, 9),)),
        (lambda x: x.topk(2, dim=0).indices, (torch.randn(7),)),
        (lambda x: x.topk(1).indices, (torch.randn(()),)),
        (lambda x: (x > 0).topk(2).indices, (torch.randn(3, 8),)),
    ],
)
def test_a_graph_that_is_no_indexer_never_raises(run, inputs) -> None:  # type: ignore[no-untyped-def]
    """Whatever stands before a top-k, the pass comes back with a reason of its own, not an internal error."""
    for symbolic in (False, True):
        _, (site, *_) = visit(run, *inputs, symbolic=symbolic)
        assert not site.rewritten
        assert "internal error" not in site.reason


def test_an_error_inside_the_pass_leaves_the_graph_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in emitting is reported and logged, everything that was put in is taken out, the graph stays."""
    module = aten_graph(lambda q, k, w: score(q, k, w).topk(K).indices, (Q, KEYS, W))
    before = str(module.graph)

    def fail(*args: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr("hisa_compile.passes.rewrite.outputs_of", fail)
    (site,) = rewrite_indexers(module.graph, EVERYTHING)
    assert site.reason == "internal error: RuntimeError: planted"
    assert str(module.graph) == before


NOT_PROVABLE = {
    "a mask that went through bool": lambda q, k, w: (
        score(q, k, w) + torch.where(torch.arange(T) > 9, float("-inf"), 0.0).bool().float()
    ),
    "a fill that went through bool": lambda q, k, w: torch.where(
        torch.arange(T) > 9, torch.full((), float("-inf")).bool().float(), score(q, k, w)
    ),
    "float16's lowest number added to float32 scores": lambda q, k, w: (
        score(q, k, w)
        + torch.where(
            torch.arange(T) > 9, torch.full((), -65504.0, dtype=torch.float16), torch.zeros((), dtype=torch.float16)
        ).float()
    ),
    "a linear layer with a ReLU": lambda q, k, w: (q[:, 0, 0] @ k[0].T).relu(),
    "a scaled linear layer with a ReLU": lambda q, k, w: (q[:, 0, 0] @ k[0].T).relu() * 3,
}


@pytest.mark.parametrize("name", NOT_PROVABLE)
def test_what_only_looks_like_an_indexer_stays(name: str) -> None:
    """Lossy casts and numbers that do not surely hide are no masks; a ReLU layer alone is no indexer."""
    _, (site,) = visit(lambda q, k, w: NOT_PROVABLE[name](q, k, w).topk(K).indices, Q * 30, KEYS * 30, W * 10)
    assert not site.rewritten


@pytest.mark.parametrize(
    "run",
    [
        lambda q, k, w: score(q, k, w).transpose(0, 1).topk(K).indices.view(-1),
        lambda q, k, w: score(q, k, w).transpose(1, 2).topk(K, dim=1).indices.view(B * K, S),
        lambda q, k, w: score(q, k, w).transpose(1, 2).topk(K, dim=1).values.view(B * K, S),
    ],
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_outputs_keep_the_selections_strides(run, symbolic: bool) -> None:  # type: ignore[no-untyped-def]
    """A view of the original's result is a view of the rewritten one's."""
    module, (site,) = visit(run, Q, KEYS, W, symbolic=symbolic)
    assert site.rewritten, site
    expected, actual = run(Q, KEYS, W), module(Q, KEYS, W)
    assert actual.stride() == expected.stride()
    assert actual.dtype == expected.dtype
    if expected.is_floating_point():  # equal scores, zeros above all, may be chosen differently
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "run",
    [
        lambda q, k, w: score(torch.stack([q[..., :2], q[..., 2:]], -1).flatten(-2), k, w),
        lambda q, k, w: score(q, torch.stack([k[..., :2], k[..., 2:]], -1).flatten(-2), w),
        lambda q, k, w: score(torch.stack([q, -q], 3).flatten(2, 3), k, torch.stack([w, w], 3).flatten(2)),
    ],
)
def test_operands_that_merge_axes_are_seen(run) -> None:  # type: ignore[no-untyped-def]
    """Interleaved rotary halves and merged heads cut the axes of the contraction; the roles follow."""
    module, (site,) = visit(lambda *inputs: run(*inputs).topk(K).values, Q, KEYS, W)
    assert site.rewritten, site
    torch.testing.assert_close(module(Q, KEYS, W), run(Q, KEYS, W).topk(K).values)


def test_a_bool_factor_inside_the_relu_is_a_factor() -> None:
    """Casts are put in where arithmetic on the factor's dtype does not exist."""

    def run(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        per_head = (torch.einsum("bshd,btd->bsht", q, k) * (w > 0)[..., None]).relu()
        return (per_head * w[..., None]).sum(2).topk(K).values

    module, (site,) = visit(run, Q, KEYS, W)
    assert site.rewritten, site
    torch.testing.assert_close(module(Q, KEYS, W), run(Q, KEYS, W))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="traces on a CUDA device")
def test_a_scale_on_the_cpu_works_with_scores_on_the_gpu() -> None:
    """Dynamic shapes make a 0-d CPU tensor of a Python float; it is moved, not refused."""
    inputs = [x.cuda() for x in (Q, KEYS, W)]
    scale = torch.tensor(0.5, dtype=torch.float64)

    def run(q: Tensor, k: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        per_head = (torch.einsum("bshd,btd->bsht", q, k) * scale).relu()
        return (per_head * w[..., None]).sum(2).topk(K).indices

    module = make_fx(run, tracing_mode="fake")(*inputs, scale)
    (site,) = rewrite_indexers(module.graph, EVERYTHING)
    assert site.rewritten, site
    (call,) = module.graph.find_nodes(op="call_function", target=torch.ops.hisa.indexer_topk.default)
    assert {arg.meta["val"].device.type for arg in call.all_input_nodes} == {"cuda"}
    module.recompile()
    selected = score(*inputs).gather(-1, module(*inputs, scale))
    torch.testing.assert_close(selected, score(*inputs).topk(K).values)


@pytest.mark.parametrize(
    "write", [lambda k: torch.mul(k, -1.0, out=k), lambda k: torch._foreach_mul_([k], -1.0)], ids=["out=", "list"]
)
def test_writes_by_keyword_and_through_lists_are_seen(write) -> None:  # type: ignore[no-untyped-def]
    """A graph that is not functional may write to an operand in ways that are no positional argument."""

    def run(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        k = k + 1
        scores = score(q, k, w)
        write(k)
        return scores.topk(K).indices

    module = make_fx(run)(Q, KEYS, W)
    (site,) = rewrite_indexers(module.graph, EVERYTHING)
    assert "written to" in site.reason
