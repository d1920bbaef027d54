"""``hisa::pool_keys`` on the CPU: means of blocks, and their spreads."""

from __future__ import annotations

import torch
from torch import Tensor

from .coarse import SPREAD_SCALE
from .reference import most_spread, pooled_dtype, power_of_two_root

# Elements of keys that are float32 at once: 1 MiB.
TILE_ELEMENTS = 1 << 18


def pool_keys_cpu(
    k: Tensor,
    block_size: int,
    key_valid: Tensor | None,
    k_scale: Tensor | None,
    k_weight: Tensor | None,
    spread: bool = False,
) -> Tensor:
    """``hisa::pool_keys``: ``reference.block_representatives``, a float32 copy of a few blocks at a time only."""
    batch, tokens, dim = k.shape
    blocks = -(-tokens // block_size)
    means = k.new_empty((batch, blocks, 2 * dim if spread else dim), dtype=pooled_dtype(k.dtype))
    step = max(1, TILE_ELEMENTS // max(block_size * dim, 1))
    valid = k.new_ones((1, tokens), dtype=torch.bool) if key_valid is None else key_valid
    padded = torch.nn.functional.pad(valid, (0, blocks * block_size - tokens))
    counts = padded.view(valid.shape[0], blocks, block_size).sum(-1).clamp_min_(1).expand(batch, blocks)
    for entry in range(batch):
        for block in range(0, blocks, step):
            size = min(step, blocks - block)
            first, last = block * block_size, min((block + size) * block_size, tokens)
            # Contiguous, because the order of a sum may depend on the layout.
            keys = k[entry, first:last].float().contiguous()
            factor = None if k_scale is None else k_scale[entry, first:last]
            if k_weight is not None:
                magnitude = k_weight[entry, first:last].abs()
                factor = magnitude if factor is None else factor * magnitude
            if factor is not None:
                keys = keys * factor[:, None]
            if key_valid is not None:
                # where, not a product: a NaN in an invalid key must not reach the mean.
                keys = torch.where(key_valid[entry, first:last, None], keys, 0.0)
            keys = torch.nn.functional.pad(keys, (0, 0, 0, size * block_size - (last - first)))
            keys, count = keys.view(size, block_size, dim), counts[entry, block : block + size, None]
            mean = keys.sum(1) / count
            means[entry, block : block + size, :dim] = mean
            if spread:
                inside = padded[0 if key_valid is None else entry].view(blocks, block_size)[block : block + size]
                # A mean of NaN makes NaN of keys that do not count, too.
                offset = (keys - mean[:, None]).masked_fill_(~inside[..., None], 0.0)
                scaled = offset.square_().sum(1) / count * (SPREAD_SCALE / max(dim, 1))
                means[entry, block : block + size, dim:] = power_of_two_root(scaled, most_spread(k.dtype))
    return means
