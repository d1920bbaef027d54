"""Segments and weights of keys: what they hide, what they cost, and what they multiply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from strategies import DTYPES, LAYOUTS, SEGMENTS, Call, assert_equal, calls, make_segments, make_values
from torch import Tensor

from hisa_compile import indexer_topk
from hisa_compile.ops import reference
from hisa_compile.ops.cpu_rows import Rows, segment_bounds

NAN, INF = float("nan"), float("inf")


def values(tokens: int = 200, queries: int = 6, kind: str = "gaussian") -> tuple[Tensor, Tensor, Tensor]:
    return make_values(torch.Generator().manual_seed(5), (2, queries, tokens, 3, 8), torch.float32, kind)


@settings(max_examples=300, deadline=None)
@given(calls(dtypes=DTYPES, layouts=LAYOUTS, segments=True, max_queries=9))
def test_the_cpu_operator_equals_the_reference_with_segments(call: Call) -> None:
    """With any ids, and whatever else is given."""
    call = call.with_options(sorted=True)
    assert_equal(call.run(indexer_topk), call.run(reference.indexer_topk))


@settings(max_examples=200, deadline=None)
@given(calls(segments=True, special=False))
def test_segments_are_the_mask_that_compares_them(call: Call) -> None:
    """[B, S, T] of q_segment == k_segment gives the same bits."""
    segments = {name: call.options[name] for name in ("q_segment", "k_segment")}
    rows = call.q.shape[:2]
    mask = segments["q_segment"].expand(rows)[..., None] == segments["k_segment"][:, None]
    others = {name: x for name, x in call.options.items() if name not in segments}
    masked = call._replace(options=others | {"mask": others.get("mask", mask) & mask})
    assert_equal(call.run(indexer_topk), masked.run(indexer_topk))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", SEGMENTS)
def test_a_block_is_eligible_where_it_holds_a_visible_token(kind: str, dtype: torch.dtype) -> None:
    """Bounds, windows and valid keys decide most blocks; the answer is that of looking at every token."""
    generator = torch.Generator().manual_seed(1)
    for seed in range(60):
        tokens, size = 1 + seed % 41, 1 + seed % 7
        blocks = -(-tokens // size)
        q_segment, k_segment = make_segments(generator, kind, dtype, (2, 8), 2, tokens)
        options: dict[str, Any] = {"q_segment": q_segment, "k_segment": k_segment}
        if seed % 2:
            options["key_valid"] = torch.rand(2, tokens, generator=generator) < 0.6
        if seed % 3:
            options["window_start"] = torch.randint(-3, tokens + 3, (2, 8), generator=generator).int()
            options["window_end"] = torch.randint(-3, tokens + 3, (2, 8), generator=generator).int()
        q, k = torch.zeros(2, 8, 1, 1), torch.zeros(2, tokens, 1)
        rows = Rows(torch.arange(16), q, tokens, reference.Visibility(**options))
        bounds = segment_bounds(k_segment, size, options.get("key_valid"))
        visible = reference.visible_tokens(q, k, **options)
        padded = torch.nn.functional.pad(visible, (0, blocks * size - tokens))
        expected = padded.view(16, blocks, size).any(-1)
        for at_once in (1, 20, 10**6):
            assert torch.equal(rows.sees_in_blocks(size, blocks, bounds, at_once), expected)


def tokens_looked_at(monkeypatch: pytest.MonkeyPatch, k_segment: Tensor, causal: bool = False, **options: Any) -> int:
    """Tokens that 64 queries, each in the segment of its own token, look at to tell which blocks are eligible."""
    tokens = k_segment.shape[1]
    q, k, weights = make_values(torch.Generator().manual_seed(0), (1, 64, tokens, 1, 4), torch.float32, "gaussian")
    looked: list[int] = []
    sees = Rows.sees

    def counting(self: Rows, positions: Tensor) -> Tensor:
        looked.append(positions.numel())
        return sees(self, positions)

    # None of them is a hole, so no row has to be filled up, which takes a look at every token.
    own = torch.linspace(0, tokens - 5, 64).long() // 5 * 5 + 1
    options |= {"q_segment": k_segment[:, own], "k_segment": k_segment}
    if causal:
        options["window_end"] = own.int() + 1
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "sees", counting)
        patch.setattr(Rows, "sees_all", lambda self: pytest.fail("every token was looked at"))
        indexer_topk(q, k, weights, 1, block_size=16, block_topk=4, **options)
    return sum(looked) - 64 * 16 * 4


@pytest.mark.parametrize("holes", [False, True])
def test_blocks_of_one_or_two_segments_are_not_looked_into(monkeypatch: pytest.MonkeyPatch, holes: bool) -> None:
    """Packed sequences: what a query costs does not grow with T; with a window, no more than its two end blocks."""
    for tokens in (1024, 8192):
        position = torch.arange(tokens)[None]
        options = {"key_valid": position % 5 > 0} if holes else {}
        assert tokens_looked_at(monkeypatch, position // 100, **options) == 0
        assert tokens_looked_at(monkeypatch, position // 100, causal=True, **options) <= 64 * 2 * 16
    # Where a block holds four segments, the two in the middle look into every block.
    assert tokens_looked_at(monkeypatch, torch.arange(1024)[None] % 4) >= 64 * 1024 / 4


def test_ids_that_agree_in_their_low_bits_are_different() -> None:
    """int64 ids stay 64 bits wide."""
    q, k, weights = values(tokens=12, queries=3)
    ids = torch.tensor([5, 5 + 2**32, 5 - 2**32])
    k_segment = ids.repeat_interleave(4).expand(2, 12)
    indices, scores = indexer_topk(q, k, weights, 4, q_segment=ids, k_segment=k_segment, block_size=2, block_topk=2)
    assert torch.equal(indices.sort(-1).values, torch.arange(12).view(1, 3, 4).expand(2, 3, 4).int())
    assert scores.isfinite().all()


def test_packed_segments_are_windows() -> None:
    """Sorted ids, each query in its own run: bounds of that run as a window say the same."""
    q, k, weights = values()
    lengths = torch.tensor([7, 50, 3, 100, 40])
    k_segment = torch.arange(5).repeat_interleave(lengths).expand(2, 200)
    ends = lengths.cumsum(0)
    own = torch.tensor([0, 1, 1, 3, 4, 2])
    windows = {"window_start": (ends - lengths)[own].int(), "window_end": ends[own].int()}
    options: dict[str, Any] = {"block_size": 8, "block_topk": 4}
    expected = indexer_topk(q, k, weights, 20, **windows, **options)
    assert_equal(indexer_topk(q, k, weights, 20, q_segment=own, k_segment=k_segment, **options), expected)


def test_a_query_of_an_unknown_segment_sees_nothing() -> None:
    """It is filled up from the left; visible tokens come first where a segment is smaller than topk."""
    q, k, weights = values(tokens=40, queries=2)
    k_segment = (torch.arange(40) == 30).long().expand(2, 40)
    options: dict[str, Any] = {"block_size": 4, "block_topk": 3, "mark_hidden": True}
    options |= {"q_segment": torch.tensor([1, 7]), "k_segment": k_segment}
    indices, scores = indexer_topk(q, k, weights, 5, **options)
    assert indices.tolist() == [[[30, -1, -1, -1, -1], [-1] * 5]] * 2
    assert scores[:, 0, 0].isfinite().all()
    unmarked = indexer_topk(q, k, weights, 5, **options | {"mark_hidden": False})[0]
    assert unmarked.tolist() == [[[30, 0, 1, 2, 3], [0, 1, 2, 3, 4]]] * 2


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_poison_that_key_valid_or_windows_hide_changes_nothing(value: float) -> None:
    """In keys, scales and weights, with segments besides."""
    q, k, weights = values()
    generator = torch.Generator().manual_seed(6)
    key_valid = torch.rand(2, 200, generator=generator) > 0.3
    hidden = ~key_valid | (torch.arange(200) < 33) | (torch.arange(200) >= 155)
    options: dict[str, Any] = {"block_size": 8, "block_topk": 4, "key_valid": key_valid}
    options |= {"window_start": torch.tensor(33).int(), "window_end": torch.arange(150, 156).int()}
    options |= {"q_segment": torch.arange(6) % 3, "k_segment": torch.randint(0, 3, (2, 200), generator=generator)}
    k_weight = torch.randn(2, 200, generator=generator)
    poisoned = torch.where(hidden, value, k_weight)
    for topk in (20, 32):
        clean = indexer_topk(q, k, weights, topk, k_scale=k_weight.abs(), k_weight=k_weight, **options)
        dirty_k = torch.where(hidden[..., None], value, k)
        dirty = indexer_topk(q, dirty_k, weights, topk, k_scale=poisoned.abs(), k_weight=poisoned, **options)
        assert_equal(dirty, clean)
        assert not clean[1].isnan().any()


def test_poison_in_another_segment_moves_no_more_than_its_own_block() -> None:
    """Where segments lie together not even that; else the block it is in may be kept, as with a mask."""
    q, k, weights = values()
    poisoned = k.clone()
    poisoned[:, [0, 33, 111, 199]] = NAN
    options: dict[str, Any] = {"block_size": 8, "block_topk": 4, "q_segment": torch.tensor(1)}
    packed = torch.zeros(2, 200).long()
    packed[:, 34:111] = 1
    clean, dirty = (indexer_topk(q, x, weights, 20, k_segment=packed, **options) for x in (k, poisoned))
    assert_equal(dirty, clean)

    apart = torch.ones(2, 200).long()
    apart[:, [0, 33, 111, 199]] = 0
    indices, scores = indexer_topk(q, poisoned, weights, 20, k_segment=apart, **options)
    assert not scores.isnan().any()
    own = {0, 33, 111, 199}
    assert not own & set(indices.flatten().tolist())
    assert not torch.equal(indices, indexer_topk(q, k, weights, 20, k_segment=apart, **options)[0])


def test_weights_multiply_the_score_and_not_the_key() -> None:
    """A negative weight turns a score around, which a factor under the ReLU cannot."""
    q, weights = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1)
    k = torch.tensor([3.0, 2.0, -1.0, 5.0]).view(1, 4, 1)
    k_weight = torch.tensor([[-1.0, 0.5, -2.0, -0.25]])
    k_scale = torch.tensor([[1.0, 2.0, -1.0, 1.0]])
    indices, scores = indexer_topk(q, k, weights, 4, k_weight=k_weight, k_scale=k_scale)
    assert indices.tolist() == [[[1, 3, 2, 0]]]
    assert scores.tolist() == [[[2.0, -1.25, -2.0, -3.0]]]


def test_a_score_is_rounded_once_by_its_weight() -> None:
    """The float32 score times the float32 weight, nothing else: in pruned and in exact calls, and in fills."""
    q, k, weights = values()
    k_weight = torch.randn(2, 200, generator=torch.Generator().manual_seed(3))
    for options in ({"block_size": 8, "block_topk": 25}, {"block_size": 8, "block_topk": 20}):
        mask = torch.rand(200, generator=torch.Generator().manual_seed(4)) < 0.6
        options = {"mask": mask, **options}
        indices, scores = indexer_topk(q, k, weights, 150, k_weight=k_weight, **options)
        own, plain = indexer_topk(q, k, weights, 150, sorted=False, **options)
        whole = torch.full((2, 6, 200), NAN).scatter(-1, own.long(), plain) * k_weight[:, None]
        expected = whole.gather(-1, indices.long())
        known = ~expected.isnan() & scores.isfinite() & expected.isfinite()
        assert known.sum() > 1000
        assert torch.equal(scores[known], expected[known])


@pytest.mark.parametrize("scaled", [False, True])
def test_weights_of_no_sign_represent_blocks_as_scales_do(scaled: bool) -> None:
    """Folded into k_scale a weight >= 0 gives the same block means, bit for bit, hence the same candidates."""
    q, k, weights = values()
    generator = torch.Generator().manual_seed(4)
    k_weight = torch.rand(2, 200, generator=generator)
    k_scale = torch.rand(2, 200, generator=generator) if scaled else None
    folded = k_weight if k_scale is None else k_weight * k_scale
    assert torch.equal(reference.block_means(k, 8, None, k_scale, k_weight), reference.block_means(k, 8, None, folded))
    budget = {"block_size": 8, "block_topk": 4}
    chosen = indexer_topk(q, k, weights, 32, k_scale=k_scale, k_weight=k_weight, **budget)[0]
    expected = indexer_topk(q, k, weights, 32, k_scale=folded, **budget)[0]
    assert torch.equal(chosen.sort(-1).values, expected.sort(-1).values)
    # A sign has no part in which blocks are kept.
    signed = k_weight * torch.randn(2, 200, generator=generator).sign()
    chosen = indexer_topk(q, k, weights, 32, k_scale=k_scale, k_weight=signed, **budget)[0]
    assert torch.equal(chosen.sort(-1).values, expected.sort(-1).values)


@pytest.mark.parametrize("name", ["q_segment", "k_segment", "k_weight"])
def test_expanded_arguments_equal_their_copies(name: str) -> None:
    """A stride of 0 is a layout as any other."""
    q, k, weights = values(tokens=60)
    generator = torch.Generator().manual_seed(2)
    options: dict[str, Any] = {"q_segment": torch.randint(0, 2, (2, 6), generator=generator).int()}
    options["k_segment"] = torch.randint(0, 2, (2, 60), generator=generator).int()
    options["k_weight"] = torch.randn(2, 60, generator=generator)
    options[name] = options[name][:1].expand(2, -1)
    copies = {key: x.clone(memory_format=torch.contiguous_format) for key, x in options.items()}
    budget = {"topk": 10, "block_size": 4, "block_topk": 4}
    before = [x.clone() for x in options.values()]
    assert_equal(indexer_topk(q, k, weights, **options, **budget), indexer_topk(q, k, weights, **copies, **budget))
    for x, copy in zip(options.values(), before, strict=True):
        assert torch.equal(x, copy)


def test_one_segment_and_weights_of_one_change_no_bit() -> None:
    """What is neutral gives the bits of a call without it."""
    q, k, weights = values()
    budget = {"topk": 20, "block_size": 8, "block_topk": 4}
    plain = indexer_topk(q, k, weights, **budget)
    neutral = {"q_segment": torch.tensor(9), "k_segment": torch.full((2, 200), 9), "k_weight": torch.ones(2, 200)}
    assert_equal(indexer_topk(q, k, weights, **neutral, **budget), plain)
