"""The operators' argument checks, one place for the eager call, the compiled call and the meta function.

``torch._check_value`` and ``torch._check_type`` raise ValueError and TypeError, and on symbolic sizes that
are not known yet they become run-time checks of the compiled graph instead of errors or guards.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .coarse import PROBE, check_coarse, size_of_means, vectors_of_block
from .reference import pooled_dtype

KEY_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEGMENT_DTYPES = (torch.int32, torch.int64)
# Positions are int32, and kernels count past the last one.
LARGEST_LENGTH = 2**31 - 2**21


def _shape(x: Tensor) -> str:
    return f"[{', '.join(str(s) for s in x.shape)}]"


def _check_dtype(name: str, x: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    torch._check_type(
        x.dtype in allowed, lambda: f"{name}: got dtype {x.dtype}, expected {' or '.join(map(str, allowed))}"
    )


def _check_dims(name: str, x: Tensor, dims: str, sizes: tuple[int | torch.SymInt, ...]) -> None:
    def message() -> str:
        return f"{name}: got shape {_shape(x)}, expected {dims} = [{', '.join(map(str, sizes))}]"

    torch._check_value(x.dim() == len(sizes), message)
    for got, expected in zip(x.shape, sizes, strict=True):
        torch._check_value(got == expected, message)


def _check_broadcasts(name: str, x: Tensor, dims: str, sizes: tuple[int | torch.SymInt, ...]) -> None:
    def message() -> str:
        return f"{name}: got shape {_shape(x)}, expected one that broadcasts to {dims} = [{', '.join(map(str, sizes))}]"

    torch._check_value(x.dim() <= len(sizes), message)
    for got, expected in zip(reversed(x.shape), reversed(sizes), strict=False):
        if not statically_known_true(got == 1):
            torch._check_value(got == expected, message)


def _check_length(tokens: int | torch.SymInt) -> None:
    # Not for a symbolic length: it would become a bound that torch.export asks its user to declare.
    if isinstance(tokens, int) and tokens > LARGEST_LENGTH:
        raise ValueError(f"k: got {tokens} tokens, expected at most {LARGEST_LENGTH} (indices are int32)")


def _check_by_token(k: Tensor, key_valid: Tensor | None, k_scale: Tensor | None, k_weight: Tensor | None) -> None:
    rows = tuple(k.shape[:2])
    if key_valid is not None:
        _check_dtype("key_valid", key_valid, (torch.bool,))
        _check_dims("key_valid", key_valid, "[B, T]", rows)
    for name, factor in (("k_scale", k_scale), ("k_weight", k_weight)):
        if factor is not None:
            _check_dtype(name, factor, (torch.float32,))
            _check_dims(name, factor, "[B, T]", rows)


def _check_devices(given: dict[str, Tensor | None], owner: str, device: torch.device) -> None:
    for name, x in given.items():
        if x is not None:
            torch._check_value(
                x.device == device,
                lambda name=name, x=x: f"{name}: got device {x.device}, expected {owner}'s device {device}",
            )


def check_pool_arguments(
    k: Tensor, *, key_valid: Tensor | None, k_scale: Tensor | None, k_weight: Tensor | None
) -> None:
    """Check shapes, dtypes and devices of ``hisa::pool_keys``'s tensors; errors as :func:`check_arguments`."""
    torch._check_value(k.dim() == 3, lambda: f"k: got shape {_shape(k)}, expected [B, T, D]")
    _check_length(k.shape[1])
    _check_dtype("k", k, KEY_DTYPES)
    _check_by_token(k, key_valid, k_scale, k_weight)
    _check_devices({"key_valid": key_valid, "k_scale": k_scale, "k_weight": k_weight}, "k", k.device)


def check_pooled(k_pooled: Tensor, k: Tensor, coarse: str | None, block_size: int | None) -> None:
    """Check the given representatives of ``k``'s blocks, k's own checks passed; errors as :func:`check_arguments`.

    ``block_size`` is the budget's, None where a symbolic topk leaves it open.
    """
    batch, tokens, dim = k.shape
    vectors = vectors_of_block(coarse)
    if block_size is not None:
        block_size = size_of_means(coarse, block_size)
    _check_dtype("k_pooled", k_pooled, (pooled_dtype(k.dtype),))
    blocks = tokens if block_size is None else -(-tokens // block_size)
    if k_pooled.dim() == 3 and (block_size is None or not statically_known_true(k_pooled.shape[1] != blocks)):
        # Right, or symbolic and not known to be wrong.  To check how a symbolic number of blocks follows from a
        # symbolic length would be a guard, and one that torch.export refuses; the call itself has plain sizes.
        blocks = k_pooled.shape[1]
    size = "block_size" if block_size is None else block_size
    dims = f"[B, ceil(T / {size}), {'D' if vectors == 1 else f'{vectors} D'}]"
    _check_dims("k_pooled", k_pooled, dims, (batch, blocks, vectors * dim))
    _check_devices({"k_pooled": k_pooled}, "q", k.device)


def check_stage(coarse: str | None, k_pooled: Tensor | None) -> None:
    """Check the name of the coarse stage, and that it reads the means that are given; errors as in the public one."""
    check_coarse(coarse)
    if coarse == PROBE and k_pooled is not None:
        raise ValueError(f"k_pooled: got means of blocks, expected None, since coarse={PROBE!r} does not rank by them")


def check_arguments(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    window_start: Tensor | None,
    window_end: Tensor | None,
    key_valid: Tensor | None,
    mask: Tensor | None,
    q_segment: Tensor | None,
    k_segment: Tensor | None,
    k_scale: Tensor | None,
    k_weight: Tensor | None,
) -> None:
    """Check shapes, dtypes and devices of ``hisa::indexer_topk``'s tensors (see its docstring).

    Raises:
        ValueError: a shape or a device does not fit, or one of q_segment and k_segment is missing; names the
            argument, what it got and what it needs.
        TypeError: a dtype does not fit, likewise.
    """
    torch._check_value(q.dim() == 4, lambda: f"q: got shape {_shape(q)}, expected [B, S, H, D]")
    batch, queries, heads, dim = q.shape
    torch._check_value(k.dim() == 3, lambda: f"k: got shape {_shape(k)}, expected [B, T, D]")
    tokens = k.shape[1]
    _check_dims("k", k, "[B, T, D]", (batch, tokens, dim))
    _check_length(tokens)
    _check_dims("weights", weights, "[B, S, H]", (batch, queries, heads))
    _check_dtype("q", q, KEY_DTYPES)
    _check_dtype("k", k, (q.dtype,))
    _check_dtype("weights", weights, WEIGHT_DTYPES)
    for name, window in (("window_start", window_start), ("window_end", window_end)):
        if window is not None:
            _check_dtype(name, window, (torch.int32,))
            _check_broadcasts(name, window, "[B, S]", (batch, queries))
    _check_by_token(k, key_valid, k_scale, k_weight)
    if mask is not None:
        _check_dtype("mask", mask, (torch.bool,))
        _check_broadcasts("mask", mask, "[B, S, T]", (batch, queries, tokens))
    if q_segment is not None and k_segment is not None:
        _check_dtype("q_segment", q_segment, SEGMENT_DTYPES)
        _check_broadcasts("q_segment", q_segment, "[B, S]", (batch, queries))
        _check_dtype("k_segment", k_segment, (q_segment.dtype,))
        _check_dims("k_segment", k_segment, "[B, T]", (batch, tokens))
    elif q_segment is not None:
        raise ValueError(f"k_segment: got None, expected [B, T] = [{batch}, {tokens}], since q_segment is given")
    elif k_segment is not None:
        raise ValueError(
            "q_segment: got None, expected one that broadcasts to "
            f"[B, S] = [{batch}, {queries}], since k_segment is given"
        )
    given = {
        "k": k,
        "weights": weights,
        "window_start": window_start,
        "window_end": window_end,
        "key_valid": key_valid,
        "mask": mask,
        "q_segment": q_segment,
        "k_segment": k_segment,
        "k_scale": k_scale,
        "k_weight": k_weight,
    }
    _check_devices(given, "q", q.device)
