"""Block means: ``hisa::pool_keys`` itself, and selections that read given means instead of pooling the keys."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from strategies import (
    DTYPES,
    FLOAT8,
    LAYOUTS,
    Call,
    assert_equal,
    calls,
    in_layout,
    integers,
    make_values,
    relayout,
    with_means,
)
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_map_only

from hisa_compile import indexer_topk, pool_keys
from hisa_compile.ops import cpu, cpu_pool, reference

NAN, INF = float("nan"), float("inf")
POOL = torch.ops.hisa.pool_keys.default
SELECT = torch.ops.hisa.indexer_topk.default


def pool_arguments(call: Call) -> dict[str, Any]:
    names = ("key_valid", "k_scale", "k_weight")
    return {"block_size": call.options["block_size"]} | {n: call.options[n] for n in names if n in call.options}


def pool_in_float64(call: Call) -> tuple[Tensor, Tensor]:
    """The means token by token in float64, and the mean magnitude of their terms, both [B, M, D]."""
    batch, tokens, dim = call.k.shape
    size = call.options["block_size"]
    means = torch.zeros(batch, -(-tokens // size), dim, dtype=torch.float64)
    magnitudes = means.clone()
    for b in range(batch):
        counts = [0] * means.shape[1]
        for t in range(tokens):
            if "key_valid" in call.options and not call.options["key_valid"][b, t]:
                continue
            term = call.k[b, t].double()
            if "k_scale" in call.options:
                term = term * call.options["k_scale"][b, t].double()
            if "k_weight" in call.options:
                term = term * call.options["k_weight"][b, t].double().abs()
            means[b, t // size] += term
            magnitudes[b, t // size] += term.abs()
            counts[t // size] += 1
        divisor = torch.tensor(counts).clamp_min(1)[:, None]
        means[b] /= divisor
        magnitudes[b] /= divisor
    return means, magnitudes


@settings(max_examples=200, deadline=None)
@given(calls(dtypes=DTYPES, layouts=LAYOUTS), st.booleans())
def test_means_are_those_of_the_valid_keys_rounded_once(call: Call, small_tiles: bool) -> None:
    """Where sums are exact the bits are known, NaN and inf included; the seams between tiles leave no trace."""
    with pytest.MonkeyPatch.context() as patch:
        if small_tiles:
            patch.setattr(cpu_pool, "TILE_ELEMENTS", 40)
        actual = pool_keys(call.k, **pool_arguments(call))
    expected = pool_in_float64(call)[0].float().to(reference.pooled_dtype(call.k.dtype))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert actual.is_contiguous()
    from_reference = reference.block_means(call.k, **pool_arguments(call))
    torch.testing.assert_close(from_reference, expected, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=100, deadline=None)
@given(calls(values="gaussian", dtypes=DTYPES, layouts=LAYOUTS, max_dim=40, special=False))
def test_means_of_any_keys_are_accumulated_in_float32(call: Call) -> None:
    """Within float32's error for these terms, and half a unit of the dtype they are stored in."""
    exact, magnitudes = pool_in_float64(call)
    actual = pool_keys(call.k, **pool_arguments(call))
    dtype = reference.pooled_dtype(call.k.dtype)
    bound = (call.options["block_size"] + 4) * torch.finfo(torch.float32).eps * magnitudes
    if dtype != torch.float32:
        bound += 0.5 * torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal
    assert actual.dtype == dtype
    assert ((actual.double() - exact).abs() <= bound).all()


def test_float8_means_keep_the_digits_of_bfloat16() -> None:
    """The mean of 1 and 1.125 is no float8 number; in float64 the reference keeps 52 bits."""
    k = torch.tensor([1.0, 1.125]).view(1, 2, 1)
    assert pool_keys(k.to(FLOAT8), 2).tolist() == [[[1.0625]]]
    assert pool_keys(k.to(FLOAT8), 2).dtype == torch.bfloat16
    wide = torch.tensor([1.0, 1 + 2.0**-40], dtype=torch.float64).view(1, 2, 1)
    assert reference.block_means(wide, 2).tolist() == [[[1 + 2.0**-41]]]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_an_invalid_key_holds_reaches_no_mean(value: float) -> None:
    """In the key, its scale and its weight; a block with no valid key has the mean 0."""
    k = make_values(torch.Generator().manual_seed(0), (2, 1, 22, 1, 4), torch.float32, "gaussian")[1]
    valid = torch.arange(22).expand(2, 22) % 3 > 0
    valid = valid & (torch.arange(22) // 4 != 2)
    factor = torch.rand(2, 22, generator=torch.Generator().manual_seed(1))
    clean = pool_keys(k, 4, key_valid=valid, k_scale=factor, k_weight=-factor)
    poisoned = torch.where(valid, factor, value)
    dirty_k = torch.where(valid[..., None], k, value)
    assert torch.equal(pool_keys(dirty_k, 4, key_valid=valid, k_scale=poisoned, k_weight=-poisoned), clean)
    assert (clean[:, 2] == 0).all()
    assert (clean[:, [0, 1, 3, 4, 5]] != 0).all()


@pytest.mark.parametrize("shape", [(0, 9, 4), (2, 0, 4), (2, 9, 0), (0, 0, 0)])
@pytest.mark.parametrize("given_", [False, True])
def test_empty_keys_have_empty_means(shape: tuple[int, int, int], given_: bool) -> None:
    """B, T or D of 0, with and without all options, beside a ragged last block."""
    k = torch.ones(shape, dtype=torch.float16)
    options = {"key_valid": torch.ones(shape[:2]).bool(), "k_scale": torch.ones(shape[:2])} if given_ else {}
    means = pool_keys(k, 4, **options)
    assert means.shape == (shape[0], -(-shape[1] // 4), shape[2])
    assert means.dtype == torch.float16


POOLS: dict[str, tuple[Tensor, int, dict[str, Tensor]]] = {
    **{f"{dtype}": (torch.arange(-88.0, 88.0).view(2, 11, 8).to(dtype), 4, {}) for dtype in DTYPES},
    **{layout: (relayout(torch.arange(176.0).view(2, 11, 8), layout), 4, {}) for layout in LAYOUTS[1:]},
    "every option": (
        torch.arange(176.0).view(2, 11, 8),
        3,
        {
            "key_valid": torch.arange(11).expand(2, 11) % 3 > 0,
            "k_scale": torch.arange(22.0).view(2, 11),
            "k_weight": -torch.arange(22.0).view(2, 11),
        },
    ),
    "no token": (torch.zeros(2, 0, 8), 4, {}),
    "no batch": (torch.zeros(0, 11, 8), 4, {}),
    "one block": (torch.ones(2, 11, 8), 100, {}),
}


@pytest.mark.parametrize(("k", "block_size", "options"), POOLS.values(), ids=POOLS.keys())
def test_opcheck_passes(k: Tensor, block_size: int, options: dict[str, Tensor]) -> None:
    """Schema, autograd registration, fake tensors and AOT dispatch with dynamic sizes, as torch checks them."""
    checks: tuple[str, ...] = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    # test_schema compares tensors before and after, which torch can't do in float8.
    torch.library.opcheck(
        POOL, (k, block_size), options, test_utils=checks if k.dtype == FLOAT8 else ("test_schema", *checks)
    )
    real = pool_keys(k, block_size, **options)
    meta = pool_keys(k.to("meta"), block_size, **tree_map_only(Tensor, lambda x: x.to("meta"), options))
    assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)


def test_a_gradient_through_means_is_refused_with_advice() -> None:
    """Eagerly when it is asked for, compiled at the first call; as an argument of a selection they need none."""
    k = torch.randn(1, 12, 4, requires_grad=True)
    means = pool_keys(k, 4)
    with pytest.raises(NotImplementedError, match=r"gradient.*means.*[Dd]etach"):
        means.sum().backward()
    with pytest.raises(BackendCompilerFailed, match=r"gradient.*means.*[Dd]etach") as error:
        torch.compile(pool_keys, backend="aot_eager")(k, 4)
    assert isinstance(error.value.inner_exception, NotImplementedError)
    q, weights = torch.randn(1, 2, 2, 4), torch.ones(1, 2, 2)
    indices, scores = indexer_topk(q, k.detach(), weights, 4, block_size=4, block_topk=2, k_pooled=means)
    assert not indices.requires_grad
    with pytest.raises(NotImplementedError, match=r"gradient.*scores"):
        scores.sum().backward()


PAPER = ("paper",)


@settings(max_examples=200, deadline=None)
@given(calls(values="gaussian", dtypes=DTYPES, layouts=LAYOUTS, max_dim=24, coarse=PAPER), st.sampled_from(LAYOUTS))
def test_the_keys_own_means_change_no_bit(call: Call, layout: str) -> None:
    """On the CPU: with any budget, visibility, factors, NaN and inf, and in any layout of the means."""
    means = relayout(pool_keys(call.k, **pool_arguments(call)), layout)
    before = means.clone()
    actual, expected = call.with_options(k_pooled=means).run(indexer_topk), call.run(indexer_topk)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1].view(torch.int32), expected[1].view(torch.int32))
    torch.testing.assert_close(means, before, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(calls(values="gaussian", dtypes=(*DTYPES, torch.float64), layouts=LAYOUTS[:2], max_dim=24, coarse=PAPER))
def test_the_keys_own_means_change_no_bit_of_the_reference(call: Call) -> None:
    """float64 included, whose means are float64."""
    means = reference.block_means(call.k, **pool_arguments(call))
    assert_equal(call.with_options(k_pooled=means).run(reference.indexer_topk), call.run(reference.indexer_topk))


@settings(max_examples=300, deadline=None)
@given(calls(dtypes=DTYPES, layouts=LAYOUTS, max_queries=9), st.integers(0, 2**32), st.sampled_from(LAYOUTS))
def test_the_cpu_operator_equals_the_reference_with_any_means(call: Call, seed: int, layout: str) -> None:
    """Means that are not the keys', some NaN; the reference with them equals a loop in test_operator_reference."""
    call = with_means(call.with_options(sorted=True), seed, layout)
    assert_equal(call.run(indexer_topk), call.run(reference.indexer_topk))


def kept_blocks(indices: Tensor, block_size: int) -> list[list[int]]:
    """Of each row that has all its candidates selected."""
    return [sorted({t // block_size for t in row}) for row in indices.flatten(0, 1).tolist()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_are_kept_by_the_given_means(dtype: torch.dtype) -> None:
    """Strong keys, scaled, weighted; yet the blocks are those whose given means score highest in float64."""
    tokens, size, block_topk = 198, 8, 6
    generator = torch.Generator().manual_seed(3)
    q, k, weights = make_values(generator, (2, 5, tokens, 3, 8), dtype, "gaussian")
    means = torch.randn(2, 25, 8, generator=generator).to(reference.pooled_dtype(dtype))
    options: dict[str, Any] = {"block_size": size, "block_topk": block_topk}
    options["k_scale"] = 10 * torch.rand(2, tokens, generator=generator)
    options["k_weight"] = torch.rand(2, tokens, generator=generator) - 0.5
    # The last block holds 6 tokens, so 46 candidates: all of them are selected.
    indices, scores = indexer_topk(q, k, weights, 46, k_pooled=means, **options)
    expected = []
    for b in range(2):
        for s in range(5):
            products = q[b, s].double() @ means[b].double().T
            block_scores = (weights[b, s].double()[:, None] * products.clamp_min(0)).sum(0)
            inner = block_scores[1:-1].argsort(descending=True, stable=True)[: block_topk - 2] + 1
            expected.append(sorted([0, 24, *inner.tolist()]))
    assert kept_blocks(indices, size) == expected
    assert kept_blocks(indexer_topk(q, k, weights, 46, **options)[0], size) != expected
    # Scores are the tokens' own, whatever selected their block.
    flat = indexer_topk(q, k, weights, tokens, block_size=size, block_topk=25, sorted=False, **{
        name: options[name] for name in ("k_scale", "k_weight")
    })  # fmt: skip
    own = torch.zeros(2, 5, tokens).scatter(-1, flat[0].long(), flat[1])
    torch.testing.assert_close(scores, own.gather(-1, indices.long()), rtol=1e-5, atol=1e-5)


def test_a_mean_of_nan_keeps_its_block_and_one_of_zero_does_not() -> None:
    """NaN ranks highest among the given means as among computed ones."""
    q, k, weights = torch.ones(1, 1, 1, 2), torch.ones(1, 40, 2), torch.ones(1, 1, 1)
    means = torch.arange(10.0).view(1, 10, 1).repeat(1, 1, 2)
    options: dict[str, Any] = {"block_size": 4, "block_topk": 4}
    assert kept_blocks(indexer_topk(q, k, weights, 16, k_pooled=means, **options)[0], 4) == [[0, 7, 8, 9]]
    means[0, 2], means[0, 8] = NAN, 0
    assert kept_blocks(indexer_topk(q, k, weights, 16, k_pooled=means, **options)[0], 4) == [[0, 2, 7, 9]]


@pytest.mark.parametrize("function", [indexer_topk, reference.indexer_topk], ids=["cpu", "reference"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_means_are_not_read_where_every_block_is_kept(function: Any, value: float) -> None:
    """Up to T = m * B, also where queries see little; one token more, and they decide."""
    for tokens, read in ((5, False), (32, False), (33, True)):
        q, k, weights = make_values(torch.Generator().manual_seed(5), (2, 6, tokens, 3, 8), torch.float32, "gaussian")
        poisoned = torch.randn(2, -(-tokens // 8), 8, generator=torch.Generator().manual_seed(1))
        poisoned[:, 1:2] = value
        for visibility in ({}, {"window_end": torch.tensor([0, 3, 20, 31, 32, 40]).int()}):
            call = Call(q, k, weights, 20, {"block_size": 8, "block_topk": 4, **visibility})
            clean, dirty = call.run(function), call.with_options(k_pooled=poisoned).run(function)
            if read and not visibility:
                assert not torch.equal(clean[0], dirty[0])
            elif not read:
                assert_equal(dirty, clean)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("how", ["key_valid", "window", "segments", "mask"])
def test_the_mean_of_a_block_with_no_visible_token_never_matters(how: str, value: float) -> None:
    """Such a block is not eligible, whatever its mean."""
    q, k, weights = make_values(torch.Generator().manual_seed(5), (2, 6, 200, 3, 8), torch.float32, "gaussian")
    hidden = torch.arange(200) // 8 % 4 == 1
    visibility = {
        "key_valid": {"key_valid": (~hidden).expand(2, 200)},
        "mask": {"mask": ~hidden},
        "segments": {"q_segment": torch.tensor(0), "k_segment": hidden.long().expand(2, 200)},
    }
    if how == "window":
        hidden = torch.arange(200) >= 128
        visibility["window"] = {"window_end": torch.tensor(128).int()}
    call = Call(q, k, weights, 32, {"block_size": 8, "block_topk": 4, **visibility[how]})
    means = pool_keys(k, 8)
    dirty = torch.where(hidden[::8, None], value, means)
    clean = call.with_options(k_pooled=means).run(indexer_topk)
    assert_equal(call.with_options(k_pooled=dirty).run(indexer_topk), clean)
    assert not hidden[clean[0].long()].any()
    open_call = call._replace(options={"block_size": 8, "block_topk": 4})
    assert not torch.equal(open_call.with_options(k_pooled=dirty).run(indexer_topk)[0], open_call.run(indexer_topk)[0])


def test_no_block_is_ranked_where_every_block_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given means are no reason to run the coarse filter."""
    q, k, weights = make_values(torch.Generator().manual_seed(5), (2, 6, 33, 3, 8), torch.float32, "gaussian")
    monkeypatch.setattr(cpu, "kept_blocks", lambda *_: pytest.fail("blocks were ranked"))
    indexer_topk(q, k[:, :32], weights, 20, block_size=8, block_topk=4, k_pooled=pool_keys(k[:, :32], 8))
    with pytest.raises(pytest.fail.Exception, match="ranked"):
        indexer_topk(q, k, weights, 20, block_size=8, block_topk=4, k_pooled=pool_keys(k, 8))


def test_keys_are_not_pooled_where_means_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what they are given for; without them the same call pools."""
    q, k, weights = make_values(torch.Generator().manual_seed(5), (2, 6, 200, 3, 8), torch.float32, "gaussian")
    means = pool_keys(k, 8)
    monkeypatch.setattr(cpu, "pool_keys_cpu", lambda *_: pytest.fail("keys were pooled"))
    indexer_topk(q, k, weights, 20, block_size=8, block_topk=4, k_pooled=means)
    with pytest.raises(pytest.fail.Exception, match="pooled"):
        indexer_topk(q, k, weights, 20, block_size=8, block_topk=4)


@pytest.mark.parametrize("empty", range(5), ids=["no batch", "no query", "no token", "no head", "no dim"])
def test_empty_sizes_take_their_means(empty: int) -> None:
    """B, S, T, H or D of 0: as without means."""
    shape = tuple(0 if i == empty else size for i, size in enumerate((2, 3, 20, 2, 4)))
    q, k, weights = make_values(torch.Generator().manual_seed(0), shape, torch.float32, "integers")
    call = Call(q, k, weights, 5, {"block_size": 2, "block_topk": 3})
    given_ = call.with_options(k_pooled=pool_keys(k, 2))
    assert_equal(given_.run(indexer_topk), call.run(indexer_topk))
    assert_equal(given_.run(reference.indexer_topk), call.run(reference.indexer_topk))


@pytest.mark.parametrize("kind", ["strided", "expanded"])
def test_expanded_means_equal_their_copies(kind: str) -> None:
    """Strides of 0 in the batch or over the blocks, and gaps between them."""
    q, k, weights = make_values(torch.Generator().manual_seed(5), (3, 6, 200, 3, 8), torch.float32, "gaussian")
    call = Call(q, k, weights, 20, {"block_size": 8, "block_topk": 4})
    for means in (in_layout(pool_keys(k, 8), kind), pool_keys(k, 8)[:, :1].expand(3, 25, 8)):
        assert not means.is_contiguous()
        copy = means.clone(memory_format=torch.contiguous_format)
        actual = call.with_options(k_pooled=means).run(indexer_topk)
        assert_equal(actual, call.with_options(k_pooled=copy).run(indexer_topk))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", [1, 5, 40])
def test_a_cache_that_pools_only_new_blocks_serves_the_same_selections(dtype: torch.dtype, step: int) -> None:
    """Decoding: the blocks from the one that the new tokens begin in are pooled, the others are what they were."""
    size, topk, heads, dim, longest = 8, 24, 3, 33, 300
    generator = torch.Generator().manual_seed(7)
    _, keys, _ = make_values(generator, (2, 1, longest, heads, dim), dtype, "gaussian")
    scales = torch.rand(2, longest, generator=generator)
    cache = torch.full((2, -(-longest // size), dim), NAN).to(reference.pooled_dtype(dtype))
    for before in range(0, longest, step):
        tokens = min(before + step, longest)
        k, k_scale = keys[:, :tokens], scales[:, :tokens]
        first, blocks = before // size, -(-tokens // size)
        cache[:, first:blocks] = pool_keys(k[:, first * size :], size, k_scale=k_scale[:, first * size :])
        q, _, weights = make_values(generator, (2, 1, 0, heads, dim), dtype, "gaussian")
        call = Call(q, k, weights, topk, {"block_size": size, "block_topk": 5, "k_scale": k_scale})
        assert_equal(call.with_options(k_pooled=cache[:, :blocks]).run(indexer_topk), call.run(indexer_topk))


def inputs_of(tokens: int, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, weights, and means that are not the keys', for blocks of 4 tokens."""
    q, k, weights = make_values(torch.Generator().manual_seed(seed), (2, 3, tokens, 2, 8), torch.float32, "gaussian")
    return q, k, weights, integers(torch.Generator().manual_seed(tokens), -3, 3, 2, -(-tokens // 4), 8).float()


class Given(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, weights: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        return indexer_topk(q, k, weights, 8, block_size=4, block_topk=4, k_pooled=means)


class Pooled(torch.nn.Module):
    """Pools in the graph, and gives each block the mean of another one."""

    def forward(self, q: Tensor, k: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        means = pool_keys(k, 4, k_scale=k[..., 0].abs()).flip(1)
        return indexer_topk(q, k, weights, 8, block_size=4, block_topk=4, k_pooled=means)


LENGTHS = (15, 16, 17, 18, 40, 41, 77)
MODULES = pytest.mark.parametrize(("module", "count"), [(Given(), 4), (Pooled(), 3)], ids=["given", "pooled"])


@MODULES
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_growing_lengths_compile_once(module: torch.nn.Module, count: int, backend: str) -> None:
    """T and M marked dynamic: one graph from the exact regime into pruning."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for tokens in LENGTHS:
        inputs = inputs_of(tokens)[:count]
        for x in inputs[1::2]:
            torch._dynamo.mark_dynamic(x, 1)
        assert_equal(compiled(*inputs), module(*inputs))
    assert counter.frame_count == 1


@MODULES
def test_an_exported_program_runs_at_other_lengths(module: torch.nn.Module, count: int) -> None:
    """Nothing has to be said about how T and M belong together; the call says what is wrong with them."""
    shapes = ({}, {1: torch.export.Dim("tokens", min=15)}, {}, {1: torch.export.Dim("blocks", min=4)})
    program = torch.export.export(module, inputs_of(40)[:count], dynamic_shapes=shapes[:count])
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(SELECT) == 1
    assert targets.count(POOL) == isinstance(module, Pooled)
    for tokens in LENGTHS:
        assert_equal(program.module()(*inputs_of(tokens)[:count]), module(*inputs_of(tokens)[:count]))
    if isinstance(module, Given):
        q, k, weights, means = inputs_of(40)
        with pytest.raises(ValueError, match=r"k_pooled: got shape \[2, 9, 8\], expected .* = \[2, 10, 8\]"):
            program.module()(q, k, weights, means[:, 1:])


def test_a_wrong_number_of_blocks_is_reported_through_torch_compile() -> None:
    """When the graph is made where sizes are plain, when it runs where they are symbolic; in the same words."""
    q, k, weights, means = inputs_of(40)
    message = r"k_pooled: got shape \[2, 9, 8\], expected \[B, ceil\(T / 4\), D\] = \[2, 10, 8\]"
    for dynamic in (False, True):
        compiled = torch.compile(Given(), backend="aot_eager", fullgraph=True, dynamic=dynamic)
        with pytest.raises(Exception, match=message):
            compiled(q, k, weights, means[:, 1:])
        torch._dynamo.reset()


@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.parametrize("unbacked", [False, True])
def test_symbolic_lengths_get_no_guard(unbacked: bool, derived: bool) -> None:
    """Whether a number stands behind T and M or none: nothing is assumed of either, and nothing of their relation."""
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env) as mode:

        def dynamic(tensor: Tensor) -> Tensor:
            if unbacked:
                size = env.create_unbacked_symint()
                return torch.empty(tensor.shape[0], size, tensor.shape[2])
            sizes = [DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]
            return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

        k, means = dynamic(torch.zeros(2, 40, 8)), dynamic(torch.zeros(2, 3 if derived else 10, 8))
        q, weights = torch.empty(2, 3, 2, 8), torch.empty(2, 3, 2)
        guards, asserts = len(env.guards), dict(env.deferred_runtime_asserts)
        budget = {} if derived else {"block_size": 4, "block_topk": 4}
        indexer_topk(q, k, weights, 8, k_pooled=means, **budget)
        pooled = pool_keys(k, 16 if derived else 4)
        indexer_topk(q, k, weights, 8, k_pooled=pooled, **budget)
        assert len(env.guards) == guards
        assert dict(env.deferred_runtime_asserts) == asserts
        with pytest.raises(ValueError, match="k_pooled: got shape"):
            indexer_topk(q, k, weights, 8, k_pooled=means.new_empty(2, pooled.shape[1] + 1, 8), **budget)


def test_a_symbolic_topk_leaves_the_blocks_to_the_call() -> None:
    """What block size a budget derives is not known before topk is; the running graph checks the means."""

    def program(q: Tensor, k: Tensor, weights: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        return indexer_topk(q, k, weights, k.shape[1] // 8, k_pooled=means)

    compiled = torch.compile(program, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (700, 800):
        q, k, weights, _ = inputs_of(tokens)
        means = pool_keys(k, 16)
        assert_equal(compiled(q, k, weights, means), program(q, k, weights, means))
    with pytest.raises(ValueError, match=r"k_pooled: got shape .* expected \[B, ceil\(T / 16\), D\]"):
        compiled(q, k, weights, means[:, 1:])
