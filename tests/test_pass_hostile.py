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


# False rewrites once found by reading the analysis: each is what the original computes, or it is left alone ----

_INT64 = torch.iinfo(torch.int64)
_LIMITS = torch.tensor([_INT64.min, 3, 9, 20, _INT64.max])[None].expand(B, S).contiguous()
_Q_IDS = (torch.arange(B * S) % 3).view(B, S)
_K_IDS = ((torch.arange(B * T) % 3) + 256 * (torch.arange(B * T) % 2)).view(B, T)
_INF = float("inf")


def _hide(scores: Tensor, hidden: Tensor) -> Tensor:
    return scores.masked_fill(hidden, -_INF)


def _positions() -> Tensor:
    return torch.arange(T)


WRONG_ONCE = {
    "-inf for every token": lambda q, k, w, *data: score(q, k, w) + torch.full((T,), -_INF),
    "-inf as a number": lambda q, k, w, *data: score(q, k, w) + -_INF,
    "a fill that a cast makes infinite": lambda q, k, w, *data: torch.where(
        _positions() > 3, torch.full((), torch.finfo(torch.float32).min).to(torch.bfloat16).float(), score(q, k, w)
    ),
    "a fill of float64 that float32 does not have": lambda q, k, w, *data: torch.where(
        _positions() > 3, torch.full((), -1e300, dtype=torch.float64).float(), score(q, k, w)
    ),
    "a fill that a scale makes infinite": lambda q, k, w, *data: (
        score(q, k, w).masked_fill(_positions() > 3, torch.finfo(torch.float32).min) * 2
    ),
    "a strict bound at the end of int64": lambda q, k, w, limits, q_ids, k_ids: _hide(
        score(q, k, w), torch.logical_not(_positions() > limits[..., None])
    ),
    "a strict bound at the start of int64": lambda q, k, w, limits, q_ids, k_ids: _hide(
        score(q, k, w), _positions() >= limits[..., None]
    ),
    "ids that a cast makes equal": lambda q, k, w, limits, q_ids, k_ids: _hide(
        score(q, k, w), q_ids.to(torch.uint8)[..., None] != k_ids.to(torch.uint8)[:, None]
    ),
    "unsigned ids that wrap": lambda q, k, w, limits, q_ids, k_ids: _hide(
        score(q, k, w), (q_ids - 1).to(torch.uint8)[..., None] != (k_ids % 3).to(torch.uint8)[:, None] - 1
    ),
    "positions that wrap": lambda q, k, w, *data: _hide(
        score(q, k, w), (_positions() * 20).to(torch.uint8) > torch.arange(S)[:, None] * 40
    ),
    "a choice that a cast makes 0": lambda q, k, w, *data: _hide(
        score(q, k, w), torch.where(_positions() > 9, 256, 0).to(torch.uint8) == 0
    ),
    "a choice that underflows": lambda q, k, w, *data: _hide(
        score(q, k, w), torch.where(_positions() > 9, 1e-30, 0.0).half() != 0
    ),
    "positions times 0": lambda q, k, w, *data: _hide(score(q, k, w), _positions() * 0 > torch.arange(S)[:, None] - 2),
    "positions below infinity": lambda q, k, w, *data: _hide(score(q, k, w), torch.logical_not(_positions() < _INF)),
    "positions below NaN": lambda q, k, w, *data: _hide(score(q, k, w), torch.logical_not(_positions() < float("nan"))),
    "a triangle of a part of the rows, side by side": lambda q, k, w, *data: _hide(
        score(q, k, w),
        torch.ones(S + 2, 7, dtype=torch.bool).tril(1)[2:][:, None].expand(S, 3, 7).reshape(S, T),
    ),
    "masks and no score": lambda q, k, w, *data: (
        torch.where(_positions() > 9, -_INF, 0.0) + torch.where(_positions() < 3, -_INF, 0.0)
    ),
}

LOSSY = {
    "sorted, through int": lambda scores: scores.sort(descending=True).values.int().float()[..., :K],
    "sorted, through half": lambda scores: scores.sort(descending=True).values.half().float()[..., :K],
    "sorted, through bool": lambda scores: scores.sort(descending=True).values.bool().float()[..., :K],
    "indices through bool": lambda scores: scores.sort(descending=True).indices.bool().long()[..., :K],
    "all but the last, sorted": lambda scores: scores.sort(descending=True).values[..., :-3],
}


def _equals_the_original(run, *inputs: Tensor, functional: bool = True) -> None:  # type: ignore[no-untyped-def]
    for decompose in (False, True):
        module = aten_graph(run, inputs, decompose=decompose, functional=functional)
        sites = rewrite_indexers(module.graph, EVERYTHING)
        module.recompile()
        assert not any("internal error" in site.reason for site in sites), sites
        expected, actual = run(*inputs), module(*inputs)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, equal_nan=True, msg=f"{expected}\n{actual}\n{sites}")


@pytest.mark.parametrize("name", WRONG_ONCE)
def test_what_was_rewritten_wrongly_is_right_or_left_alone(name: str) -> None:
    """Bounds, ids and fills at the ends of their types, casts that lose something, sums that are all mask."""
    data = (Q, KEYS, W, _LIMITS, _Q_IDS, _K_IDS)
    _equals_the_original(lambda *inputs: WRONG_ONCE[name](*inputs).topk(K).values, *data)


def _shared_masks_of_chunks(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    hidden = [
        (torch.arange(T) > torch.arange(S)[rows, None] + 10) | (torch.arange(T) % 7 == 3)
        for rows in (slice(0, 3), slice(3, S))
    ]
    layers = []
    for scale in (1.0, 2.0):
        parts = [(slice(0, 3), hidden[0]), (slice(3, S), hidden[1])]
        chunks = [_hide(score(q[:, rows] * scale, k, w[:, rows]), mask).topk(K).values for rows, mask in parts]
        layers.append(torch.cat(chunks, 1))
    return torch.stack(layers)


def _chunks_backwards(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    found: list[Tensor] = []
    for rows in (slice(3, S), slice(0, 3)):
        found.insert(0, score((q[:, rows] * 2).tanh(), k, w[:, rows]).topk(K).values)
    return torch.cat(found, 1)


def _write_between_chunks(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    queries = q * 1.0
    first, second = queries[:, :3], queries[:, 3:]
    found = [score(first, k, w[:, :3]).topk(K).values]
    first.zero_()
    return torch.cat([*found, score(second, k, w[:, 3:]).topk(K).values], 1)


def _chunk_used_twice(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    first, second = (score(q[:, rows], k, w[:, rows]).topk(K).values for rows in (slice(0, 3), slice(3, S)))
    return torch.cat([first, second, first * 2], 1)


@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize("run", [_shared_masks_of_chunks, _chunks_backwards, _write_between_chunks, _chunk_used_twice])
def test_chunks_stay_what_they_were(run, functional: bool) -> None:  # type: ignore[no-untyped-def]
    """Masks that layers share, chunks in another order, a write in between, a chunk that is used elsewhere too."""
    _equals_the_original(run, Q, KEYS, W, functional=functional)


def _inverse_permutation(x: Tensor) -> Tensor:
    return x.sort(-1).indices.sort(-1).indices


def _overlapping_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second, third = (x[rows].topk(2).indices for rows in (0, 1, 2))
    return torch.cat([first, second]), torch.cat([first, third])


@pytest.mark.parametrize(
    "run",
    [
        _inverse_permutation,
        _overlapping_groups,
        lambda x: x.sort(-1).values.max(-1),
        lambda x: x.sort(-1).indices.split(2, -1),
        lambda x: x.sort(-1).values[..., :-2],
        lambda x: x.argsort(-1, descending=True),
    ],
)
def test_sorts_and_groups_of_any_graph_never_raise(run) -> None:  # type: ignore[no-untyped-def]
    """What ordinary graphs do with a sort or with several top-ks is none of the pass's business."""
    for decompose in (False, True):
        module = aten_graph(run, (torch.randn(4, 6),), decompose=decompose)
        before = str(module.graph)
        sites = rewrite_indexers(module.graph, EVERYTHING)
        assert not any(site.rewritten or "internal error" in site.reason for site in sites), sites
        assert str(module.graph) == before


@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_cast_between_a_selection_and_its_part_stays(name: str) -> None:
    """What stands between a sort and its slice may change the numbers."""
    _equals_the_original(lambda q, k, w: LOSSY[name](score(q, k, w)), Q, KEYS, W)


def test_a_lossy_cast_between_chunks_and_their_cat_stays() -> None:
    """So may what stands between the selections of chunks and the cat that joins them."""

    def run(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        parts = [score(q[:, rows], k, w[:, rows]).topk(K).values for rows in (slice(0, 2), slice(2, S))]
        return torch.cat([part.int().float() for part in parts], 1)

    _equals_the_original(run, Q, KEYS, W)


def _zeros_and_slices(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    mask = torch.zeros(S, T)
    mask[:, 5:] = -_INF
    return score(q, k, w) + mask


def _infinities_and_slices(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    mask = torch.full((S, T), -_INF)
    mask[:, :9] = 0
    return score(q, k, w) + mask


def _hidden_and_slices(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    hidden = torch.zeros(S, T, dtype=torch.bool)
    hidden[:, 5:] = True
    return _hide(score(q, k, w), hidden)


def _number_that_changes(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    number = torch.ones(1)
    view = number.view(())
    number.mul_(-1)
    return score(q, k, w) * view


def _zeros_that_change(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    floor = torch.zeros(T)
    floor[3:] = 1.0
    return (torch.maximum(torch.einsum("bshd,btd->bsht", q, k), floor) * w[..., None]).sum(2)


@pytest.mark.parametrize(
    "run", [_zeros_and_slices, _infinities_and_slices, _hidden_and_slices, _number_that_changes, _zeros_that_change]
)
def test_constants_that_are_written_to_are_none(run) -> None:  # type: ignore[no-untyped-def]
    """In a graph that is not functional, ``zeros`` is not 0 where a slice of it was written to."""
    _equals_the_original(lambda q, k, w: run(q, k, w).topk(K).values, Q, KEYS, W, functional=False)


def test_a_python_sum_over_heads_is_one() -> None:
    """``sum(... for h in heads)`` starts at 0, which is no term of the score."""

    def run(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        heads = (torch.einsum("bsd,btd->bst", q[:, :, h], k).relu() * w[:, :, h, None] for h in range(H))
        return sum(heads, start=0).topk(K).values  # type: ignore[union-attr]

    module, (site,) = visit(run, Q, KEYS, W)
    assert site.rewritten, site
    torch.testing.assert_close(module(Q, KEYS, W), run(Q, KEYS, W))
