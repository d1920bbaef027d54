"""What a forward pass of the model shows of each layer, and the documents that it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import model, sources
from .indexers import Distilled
from .measures import attention
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


def in_turns(count: int) -> list[tuple[str, int, int]]:
    """The first ``count`` of those that are measured, prose and code in turns."""
    half = len(MEASURED) // 2
    return [each for pair in zip(MEASURED[:half], MEASURED[half:], strict=True) for each in pair][:count]


@torch.no_grad()
def look(lm: Any, ids: Tensor, visit: Callable[[Layer], None]) -> None:
    """Run the model over one document and call ``visit`` with each layer in turn."""
    with model.normalised_inputs(lm) as inputs:

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
            visit(Layer(layer, inputs.pop(layer)[0], q[0], k[0]))
            return model.causal(layer, q, k, v, scaling)

        with model.attention(attend):
            lm.model(ids, use_cache=False)


def mean_keys(lm: Any, documents: list[Tensor]) -> Tensor:
    """[LAYERS, GROUPS, D]: what centred keys are centred by."""
    total = torch.zeros(model.LAYERS, model.GROUPS, model.DIM)
    for ids in documents:
        look(lm, ids, lambda layer: total[layer.number].add_(layer.k.mean(1).cpu()))
    return total / len(documents)


def of_groups(x: Tensor) -> Tensor:
    """[.., HEADS, N, D] of the attention's heads as [.., GROUPS, N, heads of a group, D]."""
    return x.unflatten(-3, (model.GROUPS, -1)).transpose(-3, -2)


def centred(q: Tensor, k: Tensor, positions: Tensor, means: Tensor) -> Scored:
    """A layer's groups as indexers: q [.., HEADS, N, D] at ``positions``, k [.., GROUPS, T, D], means [GROUPS, D]."""
    queries = of_groups(q)
    weights = torch.ones(queries.shape[:-1], device=q.device)
    return scored(queries, k - means.to(k.device)[:, None], weights, positions)


def group_attention(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    """[GROUPS, N, T] of the same: the mean attention of each group's heads."""
    pairs = zip(of_groups(q), k, strict=True)
    return torch.stack([attention(queries, keys, positions) for queries, keys in pairs])


def distilled(indexer: Distilled, inputs: Tensor, keys: Tensor, positions: Tensor) -> Scored:
    """A layer's indexer, of the layer's inputs [.., N, HIDDEN] at ``positions`` and its own keys [.., T, D]."""
    q, w = indexer.of_queries(inputs, positions)
    return scored(q, keys, w, positions)
