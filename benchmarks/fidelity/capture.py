"""What a forward pass of the model shows of each layer, and the documents that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import model, sources
from .indexers import Distilled
from .selections import Scored, scored


class Layer(NamedTuple):
    """One layer's attention over a document of T tokens.

    hidden [T, HIDDEN]: its normalised input.  q [HEADS, T, D], k [GROUPS, T, D]: rotated.
    """

    number: int
    hidden: Tensor
    q: Tensor
    k: Tensor


def document(tokenizer: Any, kind: str, book: int, start: int, length: int) -> Tensor:
    """ids [1, length] of the text from character ``start`` on."""
    text = sources.texts(kind)[book][start : start + 12 * length]
    ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :length]
    if ids.shape[1] < length:
        raise ValueError(f"length: {kind} {book} has {ids.shape[1]} tokens from character {start} on, wanted {length}")
    return ids


# Kind, book and first character: those that are measured, and others that indexers are made of.
MEASURED = (("prose", 0, 1_000_000), ("prose", 1, 300_000), ("prose", 0, 3_300_000))
MEASURED += (("code", 0, 500_000), ("code", 1, 900_000), ("code", 0, 2_300_000))
OTHERS = (("prose", 0, 100_000), ("prose", 0, 2_200_000), ("prose", 1, 700_000), ("code", 0, 1_500_000))
OTHERS += (("code", 1, 1_800_000), ("prose", 0, 6_000_000), ("code", 0, 3_000_000), ("code", 1, 2_500_000))


@torch.no_grad()
def look(lm: Any, ids: Tensor, visit: Callable[[Layer], None]) -> None:
    """Run the model over one document and call ``visit`` with each layer in turn."""
    inputs: dict[int, Tensor] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        visit(Layer(layer, inputs.pop(layer), q[0], k[0]))
        return model.causal(layer, q, k, v, scaling)

    def keep(number: int) -> Callable[..., None]:
        return lambda _module, _inputs, output: inputs.__setitem__(number, output[0])

    hooks = [layer.input_layernorm.register_forward_hook(keep(i)) for i, layer in enumerate(lm.model.layers)]
    try:
        with model.attention(attend):
            lm.model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def mean_keys(lm: Any, documents: list[Tensor]) -> Tensor:
    """[LAYERS, GROUPS, D]: what centred keys are centred by."""
    total = torch.zeros(model.LAYERS, model.GROUPS, model.DIM)
    for ids in documents:
        look(lm, ids, lambda layer: total[layer.number].add_(layer.k.mean(1).cpu()))
    return total / len(documents)


def centred(layer: Layer, positions: Tensor, means: Tensor) -> Iterator[tuple[Scored, Tensor]]:
    """A layer's groups as indexers, each with the attention heads' own queries [N, heads, D]."""
    heads = model.HEADS // model.GROUPS
    for group in range(model.GROUPS):
        q = layer.q[group * heads : (group + 1) * heads, positions].transpose(0, 1)
        k = layer.k[group] - means[layer.number, group].to(layer.k.device)
        yield scored(q, k, torch.ones(q.shape[:2], device=q.device), positions), q


def distilled(layer: Layer, positions: Tensor, indexers: list[Distilled]) -> Scored:
    indexer = indexers[layer.number]
    q, w = indexer.of_queries(layer.hidden[positions], positions)
    return scored(q, indexer.of_keys(layer.hidden), w, positions)
