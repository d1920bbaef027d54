"""Representatives of blocks on a GPU, see :mod:`.pool`: for ``hisa::pool_keys``, and as the first step of a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..coarse import SPREAD_SCALE
from ..reference import most_spread, pooled_dtype
from . import gpu
from .config import Launch
from .pool import pool_kernel
from .sizes import cdiv, power_of_2


def pool_keys_triton(
    k: Tensor,
    block_size: int,
    key_valid: Tensor | None,
    k_scale: Tensor | None,
    k_weight: Tensor | None,
    spread: bool = False,
) -> Tensor:
    """``hisa::pool_keys`` on k's device; arguments are valid, any strides."""
    batch, tokens, dim = k.shape
    width = 2 * dim if spread else dim
    means = torch.empty((batch, cdiv(tokens, block_size), width), dtype=pooled_dtype(k.dtype), device=k.device)
    if means.numel():
        fp8 = gpu.fp8_mode(k)
        arguments = gpu.strided("k", k, "btd", fp8) | gpu.strided("scale", k_scale, "bt")
        arguments |= gpu.strided("k_weight", k_weight, "bt") | gpu.strided("valid", key_valid, "bt")
        arguments |= gpu.strided("k_segment", None, "bt") | {"last_valid_ptr": None, "low_ptr": None, "high_ptr": None}
        with torch.cuda.device_of(k):
            arguments["means_ptr"] = means
            launch = functools.partial(gpu.launch, OVERLAP=gpu.overlap(gpu.architecture(k)))
            launch_pool(launch, arguments, batch, tokens, dim, block_size, fp8, spread)
    return means


def launch_pool(
    launch: Callable[..., Any],
    arguments: dict[str, Any],
    batch: int,
    tokens: int,
    dim: int,
    block_size: int,
    fp8: int,
    spread: bool,
) -> None:
    """Means of blocks, spreads behind them, and the tables that :func:`.pool.pool_kernel` makes of what is given.

    ``launch``: :func:`.gpu.launch`, or one that does more.
    """
    blocks = cdiv(tokens, block_size)
    launch(
        pool_kernel,
        batch * blocks,
        Launch(1, 4),
        **arguments,
        T=tokens,
        M=blocks,
        D=dim,
        BLOCK_SIZE=block_size,
        PADDED_D=power_of_2(dim),
        TILE=min(power_of_2(block_size), 32),
        FP8=fp8,
        SPREAD_FACTOR=SPREAD_SCALE / max(dim, 1) if spread else 0.0,
        MOST_SPREAD=most_spread(arguments["k_ptr"].dtype),
    )
