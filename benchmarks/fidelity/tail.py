"""The end of texts with sparse attention in place, behind prefixes that the model has read densely.

Prefixes of one length are read once and together; every method then reads the same ends, from the same cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from . import capture, model
from .indexers import Distilled
from .selections import Scored

# Of some indexers' queries which tokens are attended to: bool [.., N, T], or [N, T] for all of them.
Choose = Callable[[Scored], Tensor]


class Prefix:
    """Documents' tokens [B, T] as the model has them after reading: its cache, and the distilled indexers' keys."""

    def __init__(self, lm: Any, ids: Tensor, means: Tensor, indexers: list[Distilled] | None) -> None:
        self.lm, self.means, self.indexers = lm, means, indexers
        self.tokens = ids.shape[1]
        self.cache = transformers.DynamicCache(config=lm.config)
        self.index_keys: list[Tensor] = []
        self._read(ids, self._keep)

    @torch.no_grad()
    def _read(self, ids: Tensor, attention: model.Attention) -> Tensor:
        with model.normalised_inputs(self.lm) as self._inputs, model.attention(attention):
            hidden: Tensor = self.lm.model(ids, past_key_values=self.cache, use_cache=True).last_hidden_state
        return hidden

    def _keep(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        if self.indexers is not None:
            self.index_keys.append(self.indexers[layer].of_keys(self._inputs[layer][:, None]))
        return model.causal(layer, q, k, v, scaling)

    def logits(self, end: Tensor, kind: str, choose: Choose | None) -> Tensor:
        """float32 [B, N, vocabulary] of the tokens ``end`` [B, N] behind the prefixes; dense where ``choose`` is None.

        kind: "centred", a selection each group of heads, or "distilled", one a layer.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
            if choose is None:
                return model.causal(layer, q, k, v, scaling)
            of = self._scored(layer, kind, q, k)
            # [B, 1 or GROUPS, N, T]
            mask = choose(of).expand(of.scores.shape)
            return model.attend(q, k, v, mask.repeat_interleave(model.HEADS // mask.shape[1], dim=1), scaling)

        try:
            hidden = self._read(end, attend)
            return self.lm.lm_head(hidden).float()
        finally:
            self.cache.crop(-end.shape[1])

    def _scored(self, layer: int, kind: str, q: Tensor, k: Tensor) -> Scored:
        """Indexers [B, GROUPS], or [B, 1]."""
        positions = torch.arange(self.tokens, k.shape[2], device=q.device)
        if kind == "centred":
            return capture.centred(q, k, positions, self.means[layer])
        assert self.indexers is not None
        indexer, inputs = self.indexers[layer], self._inputs[layer][:, None]
        keys = torch.cat([self.index_keys[layer], indexer.of_keys(inputs, self.tokens)], dim=-2)
        return capture.distilled(indexer, inputs, keys, positions)
