"""The operator's argument checks, one place for the eager call, the compiled call and the meta function.

``torch._check_value`` and ``torch._check_type`` raise ValueError and TypeError, and on symbolic sizes that
are not known yet they become run-time checks of the compiled graph instead of errors or guards.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

KEY_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEGMENT_DTYPES = (torch.int32, torch.int64)
LARGEST_LENGTH = 2**31 - 1


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
    # Not for a symbolic length: it would become a bound that torch.export asks its user to declare.
    if isinstance(tokens, int) and tokens > LARGEST_LENGTH:
        raise ValueError(f"k: got {tokens} tokens, expected at most {LARGEST_LENGTH} (indices are int32)")
    _check_dims("weights", weights, "[B, S, H]", (batch, queries, heads))
    _check_dtype("q", q, KEY_DTYPES)
    _check_dtype("k", k, (q.dtype,))
    _check_dtype("weights", weights, WEIGHT_DTYPES)
    for name, window in (("window_start", window_start), ("window_end", window_end)):
        if window is not None:
            _check_dtype(name, window, (torch.int32,))
            _check_broadcasts(name, window, "[B, S]", (batch, queries))
    if key_valid is not None:
        _check_dtype("key_valid", key_valid, (torch.bool,))
        _check_dims("key_valid", key_valid, "[B, T]", (batch, tokens))
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
    for name, factor in (("k_scale", k_scale), ("k_weight", k_weight)):
        if factor is not None:
            _check_dtype(name, factor, (torch.float32,))
            _check_dims(name, factor, "[B, T]", (batch, tokens))
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
    for name, x in given.items():
        if x is not None:
            torch._check_value(
                x.device == q.device,
                lambda name=name, x=x: f"{name}: got device {x.device}, expected q's device {q.device}",
            )
