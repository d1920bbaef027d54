"""Every error of the contract, and the budgets.  A message names the argument, what it got and what it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from hisa_compile import indexer_topk, pool_keys
from hisa_compile.ops import reference, resolve_budget

B, S, T, H, D = 2, 3, 40, 2, 8


def arguments(**changes: Any) -> dict[str, Any]:
    """A right call with something changed."""
    right = {"q": torch.zeros(B, S, H, D), "k": torch.zeros(B, T, D), "weights": torch.zeros(B, S, H), "topk": 8}
    return right | {"block_size": 4, "block_topk": 4} | changes


def int32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def true(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


half, wide, signed, float8 = torch.float16, torch.float64, torch.int64, torch.float8_e4m3fn
WRONG_TENSORS: dict[str, tuple[type[Exception], dict[str, Any], tuple[str, ...]]] = {
    "q of 3 dims": (ValueError, {"q": torch.zeros(B, S, D)}, ("q:", "[2, 3, 8]", "[B, S, H, D]")),
    "k of 4 dims": (ValueError, {"k": torch.zeros(B, T, H, D)}, ("k:", "[2, 40, 2, 8]", "[B, T, D]")),
    "k of another batch": (ValueError, {"k": torch.zeros(B + 1, T, D)}, ("k:", "[3, 40, 8]", "[2, 40, 8]")),
    "k of another dim": (ValueError, {"k": torch.zeros(B, T, 2 * D)}, ("k:", "[2, 40, 16]", "[2, 40, 8]")),
    "weights of 4 dims": (ValueError, {"weights": torch.zeros(B, S, H, 1)}, ("weights:", "[2, 3, 2, 1]", "[2, 3, 2]")),
    "weights of other heads": (ValueError, {"weights": torch.zeros(B, S, 1)}, ("weights:", "[2, 3, 1]", "[2, 3, 2]")),
    "q of float64": (TypeError, {"q": torch.zeros(B, S, H, D, dtype=wide)}, ("q:", "float64", "float8_e4m3fn")),
    "q of integers": (TypeError, {"q": torch.zeros(B, S, H, D, dtype=signed)}, ("q:", "int64", "float32")),
    "k unlike q": (TypeError, {"k": torch.zeros(B, T, D, dtype=half)}, ("k:", "float16", "float32")),
    "weights of float64": (
        TypeError,
        {"weights": torch.zeros(B, S, H, dtype=wide)},
        ("weights:", "float64", "bfloat16"),
    ),
    "window_start of int64": (TypeError, {"window_start": int32(B, S).long()}, ("window_start:", "int64", "int32")),
    "window_end of int64": (TypeError, {"window_end": int32(B, S).long()}, ("window_end:", "int64", "int32")),
    "window_start too long": (ValueError, {"window_start": int32(S + 1)}, ("window_start:", "[4]", "[2, 3]")),
    "window_end of 3 dims": (ValueError, {"window_end": int32(1, B, S)}, ("window_end:", "[1, 2, 3]", "[2, 3]")),
    "key_valid of integers": (TypeError, {"key_valid": int32(B, T)}, ("key_valid:", "int32", "bool")),
    "key_valid without batch": (ValueError, {"key_valid": true(T)}, ("key_valid:", "[40]", "[2, 40]")),
    "key_valid to broadcast": (ValueError, {"key_valid": true(1, T)}, ("key_valid:", "[1, 40]", "[2, 40]")),
    "mask of float32": (TypeError, {"mask": torch.ones(B, S, T)}, ("mask:", "float32", "bool")),
    "mask too short": (ValueError, {"mask": true(B, S, T - 1)}, ("mask:", "[2, 3, 39]", "[2, 3, 40]")),
    "mask of 4 dims": (ValueError, {"mask": true(B, 1, S, T)}, ("mask:", "[2, 1, 3, 40]", "[2, 3, 40]")),
    "k_scale of float16": (TypeError, {"k_scale": torch.ones(B, T, dtype=half)}, ("k_scale:", "float16", "float32")),
    "k_weight of float64": (TypeError, {"k_weight": torch.ones(B, T, dtype=wide)}, ("k_weight:", "float64", "float32")),
    "k_weight to broadcast": (ValueError, {"k_weight": torch.ones(1, T)}, ("k_weight:", "[1, 40]", "[2, 40]")),
    "q_segment alone": (
        ValueError,
        {"q_segment": int32(B, S)},
        ("k_segment:", "None", "[B, T] = [2, 40]", "q_segment"),
    ),
    "k_segment alone": (ValueError, {"k_segment": int32(B, T)}, ("q_segment:", "None", "[B, S] = [2, 3]", "k_segment")),
    "q_segment of int16": (
        TypeError,
        {"q_segment": int32(S).short(), "k_segment": int32(B, T).short()},
        ("q_segment:", "int16", "int32 or torch.int64"),
    ),
    "k_segment unlike q_segment": (
        TypeError,
        {"q_segment": int32(S), "k_segment": int32(B, T).long()},
        ("k_segment:", "int64", "expected torch.int32"),
    ),
    "q_segment too long": (
        ValueError,
        {"q_segment": int32(B, S + 1), "k_segment": int32(B, T)},
        ("q_segment:", "[2, 4]", "[2, 3]"),
    ),
    "k_segment without batch": (
        ValueError,
        {"q_segment": int32(S), "k_segment": int32(T)},
        ("k_segment:", "[40]", "[2, 40]"),
    ),
    "k_segment to broadcast": (
        ValueError,
        {"q_segment": int32(S), "k_segment": int32(1, T)},
        ("k_segment:", "[1, 40]", "[2, 40]"),
    ),
    "k_pooled of float16": (
        TypeError,
        {"k_pooled": torch.zeros(B, T // 4, D, dtype=half)},
        ("k_pooled:", "float16", "expected torch.float32"),
    ),
    "k_pooled of float64": (
        TypeError,
        {"k_pooled": torch.zeros(B, T // 4, D, dtype=wide)},
        ("k_pooled:", "float64", "expected torch.float32"),
    ),
    "k_pooled of a block less": (
        ValueError,
        {"k_pooled": torch.zeros(B, 9, D)},
        ("k_pooled:", "[2, 9, 8]", "[B, ceil(T / 4), D] = [2, 10, 8]"),
    ),
    "k_pooled of a block more": (ValueError, {"k_pooled": torch.zeros(B, 11, D)}, ("[2, 11, 8]", "[2, 10, 8]")),
    "k_pooled without the ragged block": (
        ValueError,
        {"k_pooled": torch.zeros(B, 13, D), "block_size": 3, "block_topk": 3},
        ("k_pooled:", "[2, 13, 8]", "[B, ceil(T / 3), D] = [2, 14, 8]"),
    ),
    "k_pooled of another budget than the derived": (
        ValueError,
        {"k_pooled": torch.zeros(B, 10, D), "block_size": None, "block_topk": None},
        ("k_pooled:", "[2, 10, 8]", "[B, ceil(T / 16), D] = [2, 3, 8]"),
    ),
    "k_pooled that is not read": (
        ValueError,
        {"k_pooled": torch.zeros(B, 11, D), "block_topk": 10},
        ("k_pooled:", "[2, 11, 8]", "[2, 10, 8]"),
    ),
    "k_pooled of no query": (
        ValueError,
        {
            "q": torch.zeros(B, 0, H, D),
            "weights": torch.zeros(B, 0, H),
            "k_pooled": torch.zeros(B, 9, D),
        },
        ("k_pooled:", "[2, 9, 8]", "[2, 10, 8]"),
    ),
    "k_pooled of another dim": (ValueError, {"k_pooled": torch.zeros(B, 10, 1)}, ("k_pooled:", "[2, 10, 1]", "10, 8]")),
    "k_pooled to broadcast": (ValueError, {"k_pooled": torch.zeros(1, 10, D)}, ("k_pooled:", "[1, 10, 8]", "[2, 10")),
    "k_pooled without batch": (ValueError, {"k_pooled": torch.zeros(10, D)}, ("k_pooled:", "[10, 8]", "[2, 10, 8]")),
    "k_pooled of 4 dims": (ValueError, {"k_pooled": torch.zeros(B, 10, 1, D)}, ("[2, 10, 1, 8]", "[2, 10, 8]")),
    "k_pooled of float8 for float8": (
        TypeError,
        {
            "q": torch.zeros(B, S, H, D).to(float8),
            "k": torch.zeros(B, T, D).to(float8),
            "k_pooled": torch.zeros(B, 10, D).to(float8),
        },
        ("k_pooled:", "float8_e4m3fn", "expected torch.bfloat16"),
    ),
    "k_pooled for the probe": (
        ValueError,
        {"k_pooled": torch.zeros(B, 10, D), "coarse": "probe"},
        ("k_pooled: got means of blocks, expected None", "coarse='probe'"),
    ),
    "k_scale of 3 dims": (ValueError, {"k_scale": torch.ones(B, T, 1)}, ("k_scale:", "[2, 40, 1]", "[2, 40]")),
}
WRONG_BUDGETS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "negative topk": ({"topk": -1}, ("topk:", "-1", ">= 0")),
    "block_size 0": ({"block_size": 0}, ("block_size:", "0", ">= 1")),
    "block_topk 1": ({"block_topk": 1}, ("block_topk:", "1", ">= 2", "first and the last")),
    "coarse of no stage": (
        {"coarse": "mean"},
        ("coarse: got 'mean', expected None or one of 'paper', 'spread', 'probe', 'two-level'",),
    ),
    "coarse of no name": (
        {"coarse": ""},
        ("coarse: got '', expected None or one of 'paper', 'spread', 'probe', 'two-level'",),
    ),
    "too few candidates": ({"topk": 17}, ("block_topk * block_size:", "4 * 4 = 16", "topk = 17")),
}


def assert_says(error: pytest.ExceptionInfo[Exception], parts: tuple[str, ...]) -> None:
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("where", ["eager", "meta", "fake"])
@pytest.mark.parametrize(("expected", "changes", "parts"), WRONG_TENSORS.values(), ids=WRONG_TENSORS.keys())
def test_a_wrong_tensor_is_named_with_what_was_needed(
    expected: type[Exception], changes: dict[str, Any], parts: tuple[str, ...], where: str
) -> None:
    """Shapes are ValueErrors and dtypes TypeErrors, the same on real, meta and fake tensors."""
    call = arguments(**changes)
    with pytest.raises(expected) as error:
        run(call, where)
    assert_says(error, parts)


def run(call: dict[str, Any], where: str, function: Callable[..., Any] = indexer_topk) -> None:
    if where == "fake":
        with FakeTensorMode() as mode:
            function(**tree_map_only(Tensor, mode.from_tensor, call))
    else:
        function(**tree_map_only(Tensor, lambda x: x.to("meta"), call) if where == "meta" else call)


@pytest.mark.parametrize("where", ["eager", "meta", "fake"])
@pytest.mark.parametrize(("changes", "parts"), WRONG_BUDGETS.values(), ids=WRONG_BUDGETS.keys())
def test_an_impossible_budget_is_named_with_what_was_needed(
    changes: dict[str, Any], parts: tuple[str, ...], where: str
) -> None:
    """Parameters out of range, stages that there are not, and m * B < topk."""
    with pytest.raises(ValueError, match=":") as error:
        run(arguments(**changes), where)
    assert_says(error, parts)


WRONG_POOLS: dict[str, tuple[type[Exception], dict[str, Any], tuple[str, ...]]] = {
    "k of 2 dims": (ValueError, {"k": torch.zeros(T, D)}, ("k:", "[40, 8]", "[B, T, D]")),
    "k of 4 dims": (ValueError, {"k": torch.zeros(B, T, H, D)}, ("k:", "[2, 40, 2, 8]", "[B, T, D]")),
    "k of float64": (TypeError, {"k": torch.zeros(B, T, D, dtype=wide)}, ("k:", "float64", "float8_e4m3fn")),
    "k of integers": (TypeError, {"k": torch.zeros(B, T, D, dtype=signed)}, ("k:", "int64", "float32")),
    "block_size 0": (ValueError, {"block_size": 0}, ("block_size:", "0", ">= 1")),
    "block_size -3": (ValueError, {"block_size": -3}, ("block_size:", "-3", ">= 1")),
    "key_valid of integers": (TypeError, {"key_valid": int32(B, T)}, ("key_valid:", "int32", "bool")),
    "key_valid to broadcast": (ValueError, {"key_valid": true(1, T)}, ("key_valid:", "[1, 40]", "[2, 40]")),
    "k_scale of float16": (TypeError, {"k_scale": torch.ones(B, T, dtype=half)}, ("k_scale:", "float16", "float32")),
    "k_scale of 3 dims": (ValueError, {"k_scale": torch.ones(B, T, 1)}, ("k_scale:", "[2, 40, 1]", "[2, 40]")),
    "k_weight of float64": (TypeError, {"k_weight": torch.ones(B, T, dtype=wide)}, ("k_weight:", "float64", "float32")),
    "k_weight too short": (ValueError, {"k_weight": torch.ones(B, T - 1)}, ("k_weight:", "[2, 39]", "[2, 40]")),
}


@pytest.mark.parametrize("where", ["eager", "meta", "fake"])
@pytest.mark.parametrize(("expected", "changes", "parts"), WRONG_POOLS.values(), ids=WRONG_POOLS.keys())
def test_what_pool_keys_cannot_take_is_named_with_what_was_needed(
    expected: type[Exception], changes: dict[str, Any], parts: tuple[str, ...], where: str
) -> None:
    """The same words as the selection's."""
    call: dict[str, Any] = {"k": torch.zeros(B, T, D), "block_size": 4} | changes
    with pytest.raises(expected) as error:
        run(call, where, pool_keys)
    assert_says(error, parts)


@pytest.mark.parametrize("name", ["key_valid", "k_scale", "k_weight"])
def test_what_is_not_where_the_pooled_keys_are_is_named(name: str) -> None:
    """Here k is what the others are compared with."""
    call = {"key_valid": true(B, T), "k_scale": torch.ones(B, T), "k_weight": torch.ones(B, T)}
    call[name] = call[name].to("meta")
    with pytest.raises(ValueError, match=rf"{name}: got device meta, expected k's device cpu"):
        pool_keys(torch.zeros(B, T, D), 4, **call)


def test_more_tokens_than_int32_holds_are_not_pooled() -> None:
    """No selection could use the means."""
    with pytest.raises(ValueError, match=r"k: got 2147483648 tokens, expected at most 2145386496"):
        pool_keys(torch.empty(B, 2**31, D, device="meta"), 4)


OTHER_TENSORS = ("window_start", "window_end", "key_valid", "mask", "k_scale", "q_segment", "k_segment", "k_weight")


@pytest.mark.parametrize("name", ["k", "weights", *OTHER_TENSORS, "k_pooled"])
def test_an_argument_on_another_device_is_named(name: str) -> None:
    """Everything lives where q lives; here the meta device stands for another one."""
    optional = {"window_start": int32(S), "window_end": int32(S), "key_valid": true(B, T), "mask": true(T)}
    segments = {"q_segment": int32(S), "k_segment": int32(B, T)}
    factors = {"k_scale": torch.ones(B, T), "k_weight": torch.ones(B, T), "k_pooled": torch.zeros(B, T // 4, D)}
    call = arguments(**optional, **segments, **factors)
    call[name] = call[name].to("meta")
    with pytest.raises(ValueError, match=rf"{name}: got device meta, expected q's device cpu"):
        indexer_topk(**call)


def test_errors_reach_the_user_through_torch_compile() -> None:
    """A wrong shape inside a compiled program is reported with the same words."""
    call = arguments(key_valid=true(T))
    with pytest.raises(Exception, match=r"key_valid: got shape \[40\], expected \[B, T\] = \[2, 40\]"):
        torch.compile(indexer_topk, backend="eager", fullgraph=True)(**call)


def test_more_tokens_than_int32_holds_are_refused() -> None:
    """Indices are int32."""
    call = arguments(k=torch.empty(B, 2**31, D, device="meta"))
    call = tree_map_only(Tensor, lambda x: x.to("meta"), call)
    with pytest.raises(ValueError, match=r"k: got 2147483648 tokens, expected at most 2145386496"):
        indexer_topk(**call)


def test_broadcast_shapes_that_fit_are_no_errors() -> None:
    """Scalars, single rows and single columns mean what they mean expanded."""

    def check(small: dict[str, Tensor], full: dict[str, Tensor]) -> None:
        for actual, expected in zip(indexer_topk(**arguments(**small)), indexer_topk(**arguments(**full)), strict=True):
            assert torch.equal(actual, expected)

    for shape in ((), (1,), (S,), (B, 1), (1, S), (B, S)):
        end = torch.randint(0, T + 1, shape, dtype=torch.int32)
        check({"window_end": end}, {"window_end": end.expand(B, S).contiguous()})
        own, other = torch.randint(0, 3, shape), torch.randint(0, 3, (B, T))
        full = {"q_segment": own.expand(B, S).contiguous(), "k_segment": other}
        check({"q_segment": own, "k_segment": other}, full)
    for shape in ((), (1,), (T,), (S, 1), (S, T), (B, 1, 1), (1, 1, T), (B, S, T)):
        mask = torch.rand(shape) < 0.5
        check({"mask": mask}, {"mask": mask.expand(B, S, T).contiguous()})


@pytest.mark.parametrize(
    ("topk", "block_size", "block_topk", "expected"),
    [
        (0, None, None, (16, 16)),
        (1, None, None, (16, 16)),
        (16, None, None, (16, 16)),
        (64, None, None, (16, 16)),
        (512, None, None, (32, 64)),
        (2048, None, None, (128, 64)),
        (4096, None, None, (128, 128)),
        (16, 64, None, (64, 16)),
        (64, 64, None, (64, 16)),
        (512, 64, None, (64, 32)),
        (2048, 64, None, (64, 128)),
        (4096, 1000, None, (1000, 17)),
        (16, None, 64, (16, 64)),
        (64, None, 4, (64, 4)),
        (512, None, 32, (64, 32)),
        (2048, None, 128, (64, 128)),
        (4096, None, 2, (8192, 2)),
        (512, 128, 8, (128, 8)),
        (16, 8, 2, (8, 2)),
    ],
)
def test_budgets_are_derived_from_what_is_given(
    topk: int, block_size: int | None, block_topk: int | None, expected: tuple[int, int]
) -> None:
    """Four candidates for each selected token in 16 blocks or more, the paper's 128 x 64 at topk = 2048."""
    budget = resolve_budget(topk, block_size, block_topk)
    assert budget == expected
    assert budget.candidates >= topk


def test_the_operator_uses_the_derived_budget() -> None:
    """A call without a budget equals the call with the derived one, and differs from a smaller one."""
    generator = torch.Generator().manual_seed(0)
    q, k, weights = (torch.randn(size, generator=generator) for size in ((1, 4, 2, 8), (1, 600, 8), (1, 4, 2)))
    derived = resolve_budget(16)
    actual = indexer_topk(q, k, weights, 16)
    same = indexer_topk(q, k, weights, 16, block_size=derived.block_size, block_topk=derived.block_topk)
    assert torch.equal(actual[0], same[0])
    assert torch.equal(actual[0], reference.indexer_topk(q, k, weights, 16)[0])
    assert not torch.equal(actual[0], indexer_topk(q, k, weights, 16, block_size=8, block_topk=2)[0])
