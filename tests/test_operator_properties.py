"""What holds for every call of the operator, whatever the numbers: exactness, sets, order, bits, memory."""

from __future__ import annotations

import weakref
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from strategies import DTYPES, LAYOUTS, Call, calls, make_values
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hisa_compile import indexer_topk
from hisa_compile.ops import Budget, Visibility, reference
from hisa_compile.ops.coarse import COARSE_STAGES
from hisa_compile.ops.cpu import indexer_topk_cpu


def bits(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Indices and the scores' bit patterns, so that NaN and -0.0 are compared too."""
    return result[0], result[1].view(torch.int32)


def assert_same_bits(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(bits(actual), bits(expected), strict=True):
        assert torch.equal(one, other)


def rows_of(x: Tensor, dims: int, batch: Any = slice(None), queries: Any = slice(None)) -> Tensor:
    """A selection of batch entries and queries of an argument that broadcasts to [B, S, ...] in ``dims`` dims."""
    x = x[(None,) * (dims - x.dim())]
    if x.shape[0] > 1:
        x = x[batch]
    return x[:, queries] if x.shape[1] > 1 else x


def part(call: Call, batch: Any = slice(None), queries: Any = slice(None)) -> Call:
    """The same call for some batch entries and some queries."""
    options = dict(call.options)
    for name, dims in (("window_start", 2), ("window_end", 2), ("mask", 3), ("q_segment", 2)):
        if name in options:
            options[name] = rows_of(options[name], dims, batch, queries)
    for name in ("key_valid", "k_scale", "k_segment", "k_weight"):
        if name in options:
            options[name] = options[name][batch]
    q, weights = call.q[batch][:, queries], call.weights[batch][:, queries]
    return call._replace(q=q, k=call.k[batch], weights=weights, options=options)


gaussian_calls = calls(values="gaussian", dtypes=DTYPES, layouts=LAYOUTS, max_dim=24, max_queries=9)


@settings(max_examples=15, deadline=None)
@given(gaussian_calls)
def test_repeats_give_the_same_bits(call: Call) -> None:
    """Twenty runs, one result."""
    first = call.run(indexer_topk)
    for _ in range(19):
        assert_same_bits(call.run(indexer_topk), first)


@settings(max_examples=50, deadline=None)
@given(gaussian_calls, st.randoms(use_true_random=False))
def test_the_position_in_the_batch_does_not_change_the_bits(call: Call, random: Any) -> None:
    """A permuted, repeated or shortened batch gives each entry the bits it has alone."""
    whole = call.run(indexer_topk)
    order = [random.randrange(call.q.shape[0]) for _ in range(random.randint(1, 5))]
    permuted = part(call, batch=torch.tensor(order)).run(indexer_topk)
    assert_same_bits(permuted, (whole[0][order], whole[1][order]))


@settings(max_examples=50, deadline=None)
@given(gaussian_calls, st.data())
def test_any_slicing_of_the_queries_gives_the_same_bits(call: Call, data: st.DataObject) -> None:
    """Queries in one call, in pieces, or one at a time."""
    whole = call.run(indexer_topk)
    queries = call.q.shape[1]
    cut = data.draw(st.integers(0, queries))
    pieces = [part(call, queries=slice(0, cut)), part(call, queries=slice(cut, queries))]
    results = [piece.run(indexer_topk) for piece in pieces]
    assert_same_bits((torch.cat([r[0] for r in results], 1), torch.cat([r[1] for r in results], 1)), whole)
    one = part(call, queries=slice(queries - 1, queries)).run(indexer_topk)
    assert_same_bits(one, (whole[0][:, -1:], whole[1][:, -1:]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "dim", "block_topk", "coarse"),
    [
        (16, 64, 16, "paper"),
        (64, 128, 16, "paper"),
        (3, 33, 100, "paper"),
        (1, 1, 16, "paper"),
        (16, 64, 16, "probe"),
        (64, 128, 16, "probe"),
        (3, 33, 16, "probe"),
        (1, 1, 16, "probe"),
    ],
)
def test_bits_do_not_depend_on_batch_and_slicing_at_model_sizes(
    dtype: torch.dtype, heads: int, dim: int, block_topk: int, coarse: str
) -> None:
    """The same at sizes where a BLAS changes its kernels, pruned and exact, with fills and a ragged end."""
    q, k, weights = make_values(torch.Generator().manual_seed(8), (3, 7, 3001, heads, dim), dtype, "gaussian")
    end = torch.tensor([2, 40, 700, 1500, 2900, 3001, 3001]).int()
    options = {"block_size": 32, "block_topk": block_topk, "window_end": end, "coarse": coarse}
    call = Call(q, k, weights, 128, options)
    whole = call.run(indexer_topk)
    for b in (0, 2):
        for s in (0, 1, 3, 6):
            alone = part(call, batch=slice(b, b + 1), queries=slice(s, s + 1)).run(indexer_topk)
            assert_same_bits(alone, (whole[0][b : b + 1, s : s + 1], whole[1][b : b + 1, s : s + 1]))
    assert_same_bits(call._replace(k=k.clone()).run(indexer_topk), whole)


@pytest.mark.parametrize(("heads", "dim"), [(1, 1), (1, 64), (2, 8), (3, 33), (16, 64), (5, 256), (64, 128)])
@pytest.mark.parametrize(("block_topk", "coarse"), [(10, "paper"), (10, "probe"), (100, None)])
def test_the_same_query_has_the_same_bits_in_every_row(
    heads: int, dim: int, block_topk: int, coarse: str | None
) -> None:
    """19 copies in each of 3 equal batch entries: every place in a group of rows, and groups of mixed entries."""
    q, k, weights = make_values(torch.Generator().manual_seed(9), (1, 1, 790, heads, dim), torch.float32, "gaussian")
    call = Call(q, k, weights, 64, {"block_size": 8, "block_topk": block_topk, "coarse": coarse})
    alone = call.run(indexer_topk)
    copies = call._replace(q=q.repeat(3, 19, 1, 1), k=k.repeat(3, 1, 1), weights=weights.repeat(3, 19, 1))
    assert_same_bits(copies.run(indexer_topk), tuple(x.expand(3, 19, 64) for x in alone))


@settings(max_examples=100, deadline=None)
@given(gaussian_calls)
def test_a_row_holds_distinct_tokens_in_range_in_order(call: Call) -> None:
    """k' distinct positions; descending scores, NaN first; among equal scores ascending positions."""
    call = call.with_options(sorted=True, mark_hidden=False)
    indices, scores = call.run(indexer_topk)
    tokens, width = call.k.shape[1], min(call.topk, call.k.shape[1])
    assert indices.shape == scores.shape == (*call.q.shape[:2], width)
    assert indices.is_contiguous()
    assert scores.is_contiguous()
    if width == 0:
        return
    assert (indices.min(), indices.max()) >= (0, 0)
    assert indices.max() < tokens
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all()
    best, other = scores[..., :-1], scores[..., 1:]
    tie = (best == other) | (best.isnan() & other.isnan())
    assert ((best > other) | best.isnan() | tie).all()
    assert (~tie | (indices.diff(dim=-1) > 0)).all()


@settings(max_examples=80, deadline=None)
@given(gaussian_calls)
def test_unsorted_and_marked_results_are_the_same_selection(call: Call) -> None:
    """sorted=False may permute a row, mark_hidden replaces exactly the hidden tokens' positions by -1."""
    indices, scores = call.with_options(sorted=True, mark_hidden=False).run(indexer_topk)
    unsorted, _ = call.with_options(sorted=False, mark_hidden=False).run(indexer_topk)
    assert torch.equal(unsorted.sort(-1).values, indices.sort(-1).values)
    visible = reference.visible_tokens(call.q, call.k, **call.visibility).gather(-1, indices.long())
    marked, marked_scores = call.with_options(sorted=True, mark_hidden=True).run(indexer_topk)
    assert torch.equal(marked, indices.masked_fill(~visible, -1))
    assert_same_bits((indices, marked_scores), (indices, scores))


@settings(max_examples=120, deadline=None)
@given(calls(dtypes=DTYPES, special=False))
def test_the_selection_is_the_flat_one_where_all_visible_blocks_fit(call: Call) -> None:
    """Per row: at most m eligible blocks, or T <= m * B, then positions and scores are flat_topk's."""
    call = call.with_options(sorted=True)
    budget = ("block_size", "block_topk", "coarse")
    flat_options = {name: x for name, x in call.options.items() if name not in budget}
    expected = reference.flat_topk(call.q, call.k, call.weights, call.topk, **flat_options)
    actual = call.run(indexer_topk)
    size, block_topk = call.options["block_size"], call.options["block_topk"]
    visible = reference.visible_tokens(call.q, call.k, **call.visibility)
    padded = torch.nn.functional.pad(visible, (0, -visible.shape[-1] % size)).unflatten(-1, (-1, size))
    exact = padded.any(-1).sum(-1) <= block_topk
    if call.k.shape[1] <= size * block_topk:
        assert exact.all()
    assert torch.equal(actual[1][exact].sort(-1).values, expected[1][exact].sort(-1).values)
    assert torch.equal(actual[0][exact], expected[0][exact])


@settings(max_examples=80, deadline=None)
@given(calls(masks=False))
def test_the_first_and_the_last_eligible_block_are_kept(call: Call) -> None:
    """Give topk = m * B: then all candidates are selected, and tokens of both end blocks are among them."""
    size, block_topk = call.options["block_size"], call.options["block_topk"]
    call = call._replace(topk=size * block_topk).with_options(mark_hidden=True)
    indices, _ = call.run(indexer_topk)
    visible = reference.visible_tokens(call.q, call.k, **call.visibility)
    for row, chosen in zip(visible.flatten(0, 1), indices.flatten(0, 1).tolist(), strict=True):
        seen = row.nonzero()[:, 0].tolist()
        ends = {seen[0] // size, seen[-1] // size} if seen else set()
        assert set(chosen) >= {t for t in seen if t // size in ends}


@pytest.mark.parametrize("coarse", COARSE_STAGES)
def test_the_last_of_equal_blocks_and_tokens_lose(coarse: str) -> None:
    """With equal keys all scores tie: the first blocks, the last one, and in them the lowest positions."""
    q, k, weights = torch.ones(1, 1, 2, 4), torch.ones(1, 40, 4), torch.ones(1, 1, 2)
    budget: dict[str, Any] = {"block_size": 4, "block_topk": 3, "coarse": coarse}
    indices, scores = indexer_topk(q, k, weights, 12, **budget)
    assert indices.tolist() == [[[*range(8), 36, 37, 38, 39]]]
    assert (scores == 8).all()
    assert indexer_topk(q, k, weights, 10, **budget)[0].tolist() == [[[*range(8), 36, 37]]]


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes that tensors created under the mode hold."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.numel():
                storage = x.untyped_storage()
                if storage.data_ptr() not in known or storage.data_ptr() in self._holders:
                    self._hold(x, storage.data_ptr(), storage.nbytes())
        return out

    def _hold(self, x: Tensor, pointer: int, size: int) -> None:
        holders = self._holders.get(pointer, 0)
        self._holders[pointer] = holders + 1
        if not holders:
            self.live += size
            self.peak = max(self.peak, self.live)
        weakref.finalize(x, self._release, pointer, size)

    def _release(self, pointer: int, size: int) -> None:
        self._holders[pointer] -= 1
        if not self._holders[pointer]:
            del self._holders[pointer]
            self.live -= size


def workspace(
    queries: int, tokens: int, block_topk: int = 8, dim: int = 8, coarse: str = "paper", **visibility: Any
) -> int:
    """Peak bytes of a call beyond its results, causal where ``visibility`` says nothing else."""
    shape = (1, queries, tokens, 2, dim)
    q, k, weights = make_values(torch.Generator().manual_seed(0), shape, torch.bfloat16, "gaussian")
    visibility = {"window_end": torch.linspace(1, tokens, queries).int()[None]} | visibility
    with LiveBytes() as live:
        result = indexer_topk_cpu(
            q, k, weights, 16, Budget(16, block_topk), Visibility(**visibility), None, None, True, False, None, coarse
        )
    return live.peak - sum(x.nbytes for x in result)


def test_the_byte_counter_sees_a_matrix_of_queries_times_tokens() -> None:
    """The measurement below would notice what it forbids."""
    q, k, weights = make_values(torch.Generator().manual_seed(0), (1, 64, 8192, 2, 8), torch.bfloat16, "gaussian")
    with LiveBytes() as live:
        reference.indexer_topk(q, k, weights, 16)
    assert live.peak > 4 * 64 * 8192
    assert live.live < live.peak / 10


@pytest.mark.parametrize("kind", ["causal", "holes", "short", "packed", "mixed", "mixed with holes"])
@pytest.mark.parametrize("block_topk", [8, 1024], ids=["pruned", "exact"])
def test_the_workspace_does_not_grow_with_queries_times_tokens(
    monkeypatch: pytest.MonkeyPatch, kind: str, block_topk: int
) -> None:
    """From S = 8, T = 2048 to S = 64, T = 8192 not even a byte for each query and token is added."""
    from hisa_compile.ops import cpu

    monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", 1 << 12)

    def visibility(tokens: int) -> dict[str, Tensor]:
        holes = {"key_valid": torch.arange(tokens)[None] % 5 > 0}
        packed = {"q_segment": torch.tensor(3), "k_segment": torch.arange(tokens)[None] // 700}
        # Every block is looked into: it holds segments below and above the queries' own.
        mixed = {"q_segment": torch.tensor(3), "k_segment": torch.arange(tokens)[None] % 7}
        # No row sees enough tokens, so every row is filled up.
        short = {"window_end": torch.tensor(5).int()}
        kinds = {"causal": {}, "holes": holes, "short": short, "packed": packed, "mixed": mixed}
        return kinds.get(kind, mixed | holes)

    small, large = (workspace(s, t, block_topk, **visibility(t)) for s, t in ((8, 2048), (64, 8192)))
    assert large - small < 64 * 8192 - 8 * 2048


@pytest.mark.parametrize("coarse", ["paper", "spread"])
def test_half_precision_keys_are_never_cast_up_as_a_whole(coarse: str) -> None:
    """T = 65536, D = 32: less than half of a float32 copy of the keys."""
    assert workspace(2, 65536, dim=32, coarse=coarse) < 65536 * 32 * 4 / 2


@pytest.mark.parametrize("coarse", ["paper", "spread"])
def test_the_workspace_is_small_at_the_sizes_it_is_made_for(coarse: str) -> None:
    """S = 512, T = 16384: less than a byte for each query and token."""
    assert workspace(512, 16384, coarse=coarse) < 512 * 16384
