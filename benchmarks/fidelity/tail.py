"""The end of a text with sparse attention in place, behind a prefix that the model has read densely.

The prefix is read once; every method then reads the same end, from the same cache.
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

# Of one indexer's queries which tokens are attended to: bool [N, T].
Choose = Callable[[Scored], Tensor]


class Prefix:
    """A document's tokens [1, T] as the model has them after reading: its cache, and the distilled indexers' keys."""

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
            self.index_keys.append(self.indexers[layer].of_keys(self._inputs[layer]))
        return model.causal(layer, q, k, v, scaling)

    def logits(self, end: Tensor, kind: str, choose: Choose | None) -> Tensor:
        """float32 [N, vocabulary] of the tokens ``end`` [1, N] behind the prefix; dense where ``choose`` is None.

        kind: "centred", a selection each group of heads, or "distilled", one a layer.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
            if choose is None:
                return model.causal(layer, q, k, v, scaling)
            masks = [choose(of) for of in self._scored(layer, kind, q, k)]
            return model.attend(q, k, v, self._for_heads(masks), scaling)

        try:
            hidden = self._read(end, attend)
            return self.lm.lm_head(hidden[0]).float()
        finally:
            self.cache.crop(-end.shape[1])

    def _scored(self, layer: int, kind: str, q: Tensor, k: Tensor) -> list[Scored]:
        positions = torch.arange(self.tokens, k.shape[2], device=q.device)
        if kind == "centred":
            return capture.centred(q[0], k[0], positions, self.means[layer])
        assert self.indexers is not None
        indexer, inputs = self.indexers[layer], self._inputs[layer]
        keys = torch.cat([self.index_keys[layer], indexer.of_keys(inputs, self.tokens)])
        return [capture.distilled(indexer, inputs, keys, positions)]

    def _for_heads(self, masks: list[Tensor]) -> Tensor:
        """[1, HEADS, N, T] of one mask a layer, or one a group of heads."""
        return torch.stack(masks).repeat_interleave(model.HEADS // len(masks), dim=0)[None]
