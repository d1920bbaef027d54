"""The CPU implementation against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from strategies import DTYPES, FLOAT8, LAYOUTS, Call, assert_equal, calls, make_values, relayout
from torch import Tensor

from hisa_compile import indexer_topk
from hisa_compile.ops import reference
from hisa_compile.ops.coarse import COARSE_STAGES
from hisa_compile.ops.cpu_order import rank_of

STAGES = pytest.mark.parametrize("coarse", COARSE_STAGES)


@settings(max_examples=400, deadline=None)
@given(calls(dtypes=DTYPES, layouts=LAYOUTS))
def test_the_cpu_operator_equals_the_reference_where_sums_are_exact(call: Call) -> None:
    """Indices and scores are equal for every dtype, layout, budget, visibility and fill."""
    call = call.with_options(sorted=True)
    assert_equal(call.run(indexer_topk), call.run(reference.indexer_topk))


@settings(max_examples=60, deadline=None)
@given(calls(dtypes=DTYPES, max_tokens=400, max_queries=40))
def test_chunks_and_tiles_of_any_size_give_the_reference(call: Call) -> None:
    """With buffers far smaller than the input, the seams between chunks, tiles and blocks leave no trace."""
    from hisa_compile.ops import cpu, cpu_pool

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "CHUNK_ELEMENTS", 100)
        for module in (cpu, cpu_pool):
            patch.setattr(module, "TILE_ELEMENTS", 64)
        actual = call.run(indexer_topk)
    assert_equal(actual, call.with_options(sorted=True).run(reference.indexer_topk))


def score_tolerance(call: Call) -> Tensor:
    """Most that float32 accumulation in any order can be off, [B, S, T]: (D + H + 4) roundings of every term."""
    roundings = call.q.shape[3] + call.q.shape[2] + 4
    factors = (call.options[name].abs() if name in call.options else None for name in ("k_scale", "k_weight"))
    sizes = (call.q.double().abs(), call.k.double().abs(), call.weights.double().abs())
    return roundings * torch.finfo(torch.float32).eps * reference.indexer_scores(*sizes, *factors)


@settings(max_examples=150, deadline=None)
@given(calls(values="gaussian", dtypes=DTYPES, layouts=LAYOUTS, max_dim=40, special=False, coarse=("paper",)))
def test_scores_are_the_tokens_own_and_no_better_candidate_is_left_out(call: Call) -> None:
    """Against float64, within the error that float32 accumulation has for these very numbers."""
    call = call.with_options(mark_hidden=False, sorted=True)
    indices, scores = call.run(indexer_topk)
    exact = call.q.double(), call.k.double(), call.weights.double()
    k_scale, k_weight = call.options.get("k_scale"), call.options.get("k_weight")
    own, tolerance = reference.indexer_scores(*exact, k_scale, k_weight), score_tolerance(call)
    visible = reference.visible_tokens(call.q, call.k, **call.visibility)
    chosen = indices.long()
    own_chosen = own.masked_fill(~visible, float("-inf")).gather(-1, chosen)
    assert torch.equal(scores.isneginf(), own_chosen.isneginf())
    error = (scores - own_chosen).nan_to_num(nan=0.0).abs()  # -inf minus -inf
    assert (error <= tolerance.gather(-1, chosen)).all()
    assert (scores[..., 1:] <= scores[..., :-1]).all()

    # Candidates as float64 sees them, for rows where the coarse filter was no close call.
    means = reference.block_means(call.k, call.options["block_size"], call.options.get("key_valid"), k_scale, k_weight)
    block_scores = reference.indexer_scores(exact[0], means.double(), exact[2])
    in_blocks = pad_to_blocks(visible, call.options["block_size"])
    block_error = 4 * score_tolerance(call._replace(k=means, options={})).amax(-1, keepdim=True) + means_error(call)
    # In a row with a close call another block may have been kept: two blocks of near-equal score.
    lower, upper = block_scores - block_error, block_scores + block_error
    surely = kept(lower, upper, in_blocks.any(-1), call.options["block_topk"])
    candidate = surely.repeat_interleave(call.options["block_size"], -1)[..., : visible.shape[-1]] & visible
    left_out = candidate.scatter(-1, chosen, False)
    best_left_out = (own - tolerance).masked_fill(~left_out, float("-inf")).amax(-1)
    if chosen.shape[-1]:
        # Fills come from outside the kept blocks only once no candidate is left.
        worst_chosen = (scores + tolerance.gather(-1, chosen)).amin(-1)
        assert (worst_chosen >= best_left_out).all()


def pad_to_blocks(visible: Tensor, block_size: int) -> Tensor:
    padding = -visible.shape[-1] % block_size
    return torch.nn.functional.pad(visible, (0, padding)).unflatten(-1, (-1, block_size))


def means_error(call: Call) -> Tensor:
    """What another order of summation in a mean can change in a block score, generously, [B, S, 1].

    The mean of half-precision keys is rounded to their own dtype: one unit there, whatever the sum's order.
    """
    eps = torch.finfo(reference.pooled_dtype(call.k.dtype)).eps
    keys = call.k.double().abs()
    for name in ("k_scale", "k_weight"):
        if name in call.options:
            keys = keys * call.options[name].abs()[..., None]
    largest = keys.amax(1, keepdim=True)
    return 16 * eps * reference.indexer_scores(call.q.double().abs(), largest, call.weights.double().abs())


def kept(lower: Tensor, upper: Tensor, eligible: Tensor, block_topk: int) -> Tensor:
    """Blocks that every filter keeps whose scores lie between ``lower`` and ``upper``."""
    number = torch.arange(eligible.shape[-1])
    first = torch.where(eligible, number, eligible.shape[-1]).amin(-1, keepdim=True)
    last = torch.where(eligible, number, -1).amax(-1, keepdim=True)
    ends = (number == first) | (number == last)
    inner = eligible & ~ends
    # How many inner blocks might be ranked before this one.
    rivals = (inner[..., None, :] & (upper[..., None, :] >= lower[..., :, None])).sum(-1) - 1
    room = block_topk - (ends & eligible).sum(-1, keepdim=True)
    return eligible & (ends | (rivals < room))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@STAGES
def test_poison_in_hidden_keys_changes_nothing(coarse: str, dtype: torch.dtype, value: float) -> None:
    """Keys hidden by key_valid or by every window may hold NaN or inf in value and scale."""
    generator = torch.Generator().manual_seed(5)
    q, k, weights = make_values(generator, (2, 6, 200, 3, 8), dtype, "gaussian")
    key_valid = torch.rand(2, 200, generator=generator) > 0.3
    start, end = torch.full((6,), 33, dtype=torch.int32), torch.arange(150, 156, dtype=torch.int32)
    k_scale = torch.rand(2, 200, generator=generator) + 0.5
    options: dict[str, Any] = {"block_size": 8, "block_topk": 4, "key_valid": key_valid}
    options |= {"window_start": start, "window_end": end, "coarse": coarse}
    hidden = ~key_valid | (torch.arange(200) < 33) | (torch.arange(200) >= 155)
    poisoned = torch.where(hidden[..., None], value, k.float()).to(dtype)
    poisoned_scale = torch.where(hidden, value, k_scale)
    for topk in (20, 32):
        clean = indexer_topk(q, k, weights, topk, k_scale=k_scale, **options)
        assert_equal(indexer_topk(q, poisoned, weights, topk, k_scale=poisoned_scale, **options), clean)
        assert not clean[1].isnan().any()


@STAGES
def test_a_key_hidden_from_some_queries_only_leaves_those_untouched(coarse: str) -> None:
    """A NaN key behind the causal edge does not reach the queries before it, and ranks first after it."""
    q, k, weights = make_values(torch.Generator().manual_seed(6), (1, 100, 100, 2, 4), torch.float32, "integers")
    end = torch.arange(1, 101, dtype=torch.int32)
    poisoned = k.clone()
    poisoned[:, 50] = float("nan")
    options: dict[str, Any] = {"block_size": 4, "block_topk": 4, "window_end": end, "coarse": coarse}
    clean, dirty = (indexer_topk(q, x, weights, 8, **options) for x in (k, poisoned))
    assert_equal((dirty[0][:, :50], dirty[1][:, :50]), (clean[0][:, :50], clean[1][:, :50]))
    assert (dirty[0][:, 50:, 0] == 50).all()
    assert dirty[1][:, 50:, 0].isnan().all()


@pytest.mark.parametrize("empty", range(5), ids=["no batch", "no query", "no token", "no head", "no dim"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@STAGES
def test_empty_sizes_give_results_of_the_right_shape(coarse: str, empty: int, dtype: torch.dtype) -> None:
    """B, S, T, H or D of 0 is no error; with H or D of 0 all scores are 0 and positions ascend."""
    shape = tuple(0 if i == empty else size for i, size in enumerate((2, 3, 20, 2, 4)))
    q, k, weights = make_values(torch.Generator().manual_seed(0), shape, dtype, "integers")
    options: dict[str, Any] = {"block_size": 2, "block_topk": 3, "coarse": coarse}
    actual = indexer_topk(q, k, weights, 5, **options)
    assert actual[0].shape == actual[1].shape == (*shape[:2], min(5, shape[2]))
    assert (actual[0].dtype, actual[1].dtype) == (torch.int32, torch.float32)
    assert_equal(actual, reference.indexer_topk(q, k, weights, 5, **options))


def test_topk_of_zero_and_fewer_tokens_than_topk() -> None:
    """k' = min(topk, T) columns."""
    q, k, weights = make_values(torch.Generator().manual_seed(0), (2, 3, 20, 2, 4), torch.float32, "integers")
    assert indexer_topk(q, k, weights, 0)[0].shape == (2, 3, 0)
    indices, _ = indexer_topk(q, k, weights, 64)
    assert torch.equal(indices.sort(-1).values, torch.arange(20).expand(2, 3, 20).int())


@pytest.mark.parametrize(
    ("start", "end"),
    [(-(2**31), 2**31 - 1), (2**31 - 1, -(2**31)), (30, 10), (-5, 0), (40, 90), (7, 7), (100, 200), (-9, 3)],
)
@STAGES
def test_hostile_windows_mean_what_they_say(coarse: str, start: int, end: int) -> None:
    """Any int32 is a valid bound, also where adding to it would overflow."""
    q, k, weights = make_values(torch.Generator().manual_seed(1), (1, 2, 50, 2, 4), torch.float32, "integers")
    options: dict[str, Any] = {"window_start": torch.tensor(start).int(), "window_end": torch.tensor(end).int()}
    options |= {"block_size": 4, "block_topk": 3, "coarse": coarse}
    actual = indexer_topk(q, k, weights, 12, **options)
    assert_equal(actual, reference.indexer_topk(q, k, weights, 12, **options))
    visible = [t for t in range(50) if start <= t < end]
    if not visible:
        assert actual[0].tolist() == [[list(range(12))] * 2]
        assert actual[1].isneginf().all()
        assert (indexer_topk(q, k, weights, 12, mark_hidden=True, **options)[0] == -1).all()


def test_rows_are_filled_with_visible_tokens_before_hidden_ones() -> None:
    """Fills from outside the kept blocks carry their true scores, hidden ones -inf, lowest position first."""
    q = torch.ones(1, 1, 1, 1)
    k = torch.tensor([1.0, 9.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]).view(1, 8, 1)
    # Visible are 0, 2, 5, 7; blocks of two; the first (0, 1) and the last (6, 7) are all that may be kept.
    mask = torch.tensor([1, 0, 1, 0, 0, 1, 0, 1]).bool()
    options: dict[str, Any] = {"mask": mask, "block_size": 2, "block_topk": 2}
    indices, scores = indexer_topk(q, k, torch.ones(1, 1, 1), 3, **options)
    assert indices.tolist() == [[[7, 2, 0]]]
    assert scores.tolist() == [[[8.0, 3.0, 1.0]]]
    options |= {"mask": mask & (torch.arange(8) != 2) & (torch.arange(8) != 5), "mark_hidden": True}
    indices, scores = indexer_topk(q, k, torch.ones(1, 1, 1), 4, **options)
    assert indices.tolist() == [[[7, 0, -1, -1]]]
    assert scores.tolist() == [[[8.0, 1.0, float("-inf"), float("-inf")]]]


@pytest.mark.parametrize("block_topk", [2, 4], ids=["pruned", "exact"])
def test_hidden_tokens_stand_beside_visible_ones_of_score_minus_infinity(block_topk: int) -> None:
    """They are the last choice, yet in the order of the result they tie with -inf, so position decides."""
    k = torch.tensor([1.0, 1.0, float("inf"), 2.0, 3.0, 1.0, 1.0, 4.0]).view(1, 8, 1)
    mask = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1]).bool()
    options: dict[str, Any] = {"mask": mask, "block_size": 2, "block_topk": block_topk}
    call = Call(torch.ones(1, 1, 1, 1), k, -torch.ones(1, 1, 1), 4, options)
    actual = call.run(indexer_topk)
    assert actual[0].tolist() == [[[3, 7, 0, 2]]]
    assert actual[1].tolist() == [[[-2.0, -4.0, float("-inf"), float("-inf")]]]
    assert_equal(actual, call.run(reference.indexer_topk))


def test_the_integer_rank_orders_scores_as_the_contract_does() -> None:
    """-0.0 ties with 0.0, NaN of either sign is above inf, and both ends of int32 stay free."""
    ascending = [float("-inf"), -1.5, -1e-45, 0.0, 1e-45, 1.5, float("inf"), float("nan")]
    rank = rank_of(torch.tensor(ascending))
    assert (rank.diff() > 0).all()
    assert torch.equal(rank_of(torch.tensor([-0.0, -float("nan")])), rank[[3, 7]])
    assert rank.min() > -(2**31)
    assert rank.max() < 2**31 - 1


@pytest.mark.parametrize("name", ["q", "k", "weights", "key_valid", "mask", "window_end", "k_scale"])
@STAGES
def test_expanded_arguments_equal_their_copies(coarse: str, name: str) -> None:
    """A stride of 0, in the batch or anywhere, is a layout as any other."""
    shape = (3, 4, 60, 2, 8)
    generator = torch.Generator().manual_seed(2)
    q, k, weights = make_values(generator, shape, torch.float32, "gaussian")
    given_: dict[str, Tensor] = {"q": q, "k": k, "weights": weights}
    given_["key_valid"] = torch.rand(3, 60, generator=generator) > 0.2
    given_["mask"] = torch.rand(3, 4, 60, generator=generator) > 0.2
    given_["window_end"] = torch.randint(0, 70, (3, 4), generator=generator).int()
    given_["k_scale"] = torch.rand(3, 60, generator=generator)
    given_[name] = given_[name][:1].expand(3, *given_[name].shape[1:])
    copies = {key: x.clone(memory_format=torch.contiguous_format) for key, x in given_.items()}
    options: dict[str, Any] = {"topk": 10, "block_size": 4, "block_topk": 4, "coarse": coarse}
    assert_equal(indexer_topk(**given_, **options), indexer_topk(**copies, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@STAGES
def test_no_argument_is_written_to(coarse: str, dtype: torch.dtype) -> None:
    """Inputs hold the same bits afterwards."""
    q, k, weights = make_values(torch.Generator().manual_seed(0), (2, 3, 70, 2, 8), dtype, "integers")
    k = relayout(k, "strided")
    before = [x.clone() for x in (q, k, weights)]
    end = torch.tensor([3, 50, 90]).int()
    indexer_topk(q, k, weights, 12, block_size=4, block_topk=3, window_end=end, coarse=coarse)
    for x, copy in zip((q, k, weights), before, strict=True):
        assert torch.equal(x.float(), copy.float())
    assert end.tolist() == [3, 50, 90]


@STAGES
def test_float32_products_do_not_follow_the_process_wide_precision(coarse: str) -> None:
    """set_float32_matmul_precision("medium") allows bfloat16 products; the operator does not use them."""
    q, k, weights = make_values(torch.Generator().manual_seed(4), (1, 8, 512, 8, 64), torch.float32, "gaussian")
    expected = indexer_topk(q, k, weights, 64, coarse=coarse)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        allowed = torch.backends.mkldnn.matmul.fp32_precision
        assert_equal(indexer_topk(q, k, weights, 64, coarse=coarse), expected)
        assert torch.backends.mkldnn.matmul.fp32_precision == allowed != "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@STAGES
def test_the_default_device_and_dtype_have_no_part_in_it(coarse: str) -> None:
    """Tensors that the operator makes for itself follow its inputs, not torch's defaults."""
    call = make_values(torch.Generator().manual_seed(4), (2, 3, 90, 2, 8), torch.float32, "gaussian")
    end = torch.tensor([1, 60, 90]).int()
    options: dict[str, Any] = {"block_size": 4, "block_topk": 4, "window_end": end, "mask": torch.arange(90) % 3 > 0}
    options["coarse"] = coarse
    for topk in (8, 16):
        expected = indexer_topk(*call, topk, **options)
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                actual = indexer_topk(*call, topk, **options)
        finally:
            torch.set_default_dtype(torch.float32)
        assert_equal(actual, expected)


def test_float8_keys_with_their_scale_equal_dequantised_keys() -> None:
    """k_scale multiplies the key: powers of two give the same bits as scaled float32 keys."""
    q, k, weights = make_values(torch.Generator().manual_seed(4), (2, 4, 96, 2, 16), FLOAT8, "integers")
    k_scale = 2.0 ** torch.randint(-1, 2, (2, 96), generator=torch.Generator().manual_seed(1))
    options = {"block_size": 32, "block_topk": 3}  # all blocks are kept: the rounding of means has no part in it
    actual = indexer_topk(q, k, weights, 40, k_scale=k_scale, **options)
    scaled = k.float() * k_scale[..., None]
    assert_equal(actual, indexer_topk(q.float(), scaled, weights, 40, **options))
