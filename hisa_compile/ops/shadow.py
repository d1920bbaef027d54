"""The operator ``hisa::indexer_topk_shadow``: ``hisa::indexer_topk`` that compares itself with the flat selection.

It returns what ``hisa::indexer_topk`` returns for the same arguments, bit for bit, and adds to its site's tally
(:mod:`.tally`) how a sample of its queries compare.  It is one operator, in the place of the other, and not a second
one beside it: its results are read, so no compiler takes it for dead code, and no tensor that it writes has to be an
input of the graph, which would keep Inductor from making CUDA graphs, or a constant of it, which a cached graph would
have a copy of.

Nothing here waits for the device or has a shape that depends on data, so that the whole may be captured.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import tally
from .budget import LARGEST_DEFAULT_BLOCK, SMALLEST_BLOCK_TOPK, Budget, resolve_budget
from .coarse import PAPER
from .compare import compare
from .schema import ARGUMENTS, library, meta, no_gradient, run
from .seen import count_visible
from .visibility import Visibility

SHADOW_NAME = "hisa::indexer_topk_shadow"
# Bytes of keys that are copied at once, where the queries that are drawn are of some batch entries alone.
KEY_BYTES = 1 << 26

_SIGNATURE = inspect.signature(run)
_BY_QUERY = ("window_start", "window_end", "q_segment", "mask")
_BY_TOKEN = ("key_valid", "k_segment", "k_scale", "k_weight")

# Called with the site and the arguments of each call that the host makes.
LISTENERS: list[Callable[[tally.SiteKey, dict[str, Any]], None]] = []

library.define(
    f"indexer_topk_shadow(str site, int sample, int every, {ARGUMENTS}) -> (Tensor indices, Tensor scores)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


def _run(site: str, sample: int, every: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    selection = run(*args, **kwargs)
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    budget = resolve_budget(given["topk"], given["block_size"], given["block_topk"])
    key = tally.SiteKey(site, given["topk"], budget, given["coarse"])
    q = given["q"]
    # The host does not see a graph's replays: each of them is compared.
    captured = q.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if not captured:
        for listener in list(LISTENERS):
            listener(key, given)
    if captured or tally.takes_turn(key, every):
        sums = tally.tally_of(key, q.device)
        with tally.adding(q.device):
            _record(sums, zlib.crc32(site.encode()), sample, budget, given, selection)
    return selection


@torch.library.register_fake(SHADOW_NAME, lib=library)
def _meta(site: str, sample: int, every: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    for name, value in (("sample", sample), ("every", every)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected an integer >= 1")
    results: tuple[Tensor, Tensor] = meta(*args, **kwargs)
    return results


library.impl("indexer_topk_shadow", _run, "CPU")
library.impl("indexer_topk_shadow", _run, "CUDA")
torch.library.register_autograd(SHADOW_NAME, no_gradient, lib=library)


def _record(
    sums: Tensor, salt: int, sample: int, budget: Budget, given: dict[str, Any], selection: tuple[Tensor, Tensor]
) -> None:
    """Compare some queries of a call, and add them to ``sums``."""
    q, k, topk = given["q"], given["k"], given["topk"]
    (batch, queries), tokens = q.shape[:2], k.shape[1]
    if batch * queries and topk and tokens > max(topk, budget.candidates):
        visibility = Visibility(*(given[name] for name in Visibility._fields))
        pruned = count_visible(q, k, topk, visibility, [budget.block_size]).pruned(budget)
        entries, rows, weight = _draw(pruned, sums[tally.CALLS], salt, sample)
        found = tuple(x[entries[:, None], rows].flatten(0, 1) for x in selection)
        flat = tuple(x.flatten(0, 1) for x in _flat(given, entries, rows))
        recall, share = compare((found[0], found[1]), (flat[0], flat[1]))
        figures = torch.stack((recall, recall / (2 - recall), share, (recall == 1).double()))
        tally.add(sums, pruned.sum(), weight.flatten(), figures)
    sums[tally.QUERIES].add_(batch * queries)
    sums[tally.CALLS].add_(1)


def _draw(pruned: Tensor, calls: Tensor, salt: int, sample: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries to compare, drawn at random from the pruned ones, bool [B, S]; others at every count of ``calls``.

    Returns:
        batch entries [E], rows [E, R], at most ``sample`` in all, and weights float64 [E, R]: how many pruned queries
        each stands for, 0 where there were too few of them.  With B <= ``sample`` all batch entries take part and each
        has its own draw; else ``sample`` of those that have a pruned query are drawn, and one query of each.
    """
    batch, queries = pruned.shape
    entries = torch.arange(batch, device=pruned.device)
    numbers = _random(batch + batch * queries, calls, salt)
    weight = torch.ones((), dtype=torch.float64, device=pruned.device)
    if batch > sample:
        there = pruned.any(1)
        order = numbers[:batch].masked_fill(~there, torch.iinfo(torch.int64).max)
        entries = order.topk(sample, largest=False).indices.sort().values
        have = there.sum().double()
        weight = have / have.clamp(1, sample)
    some = pruned.index_select(0, entries)
    order = numbers[batch:].view(batch, queries).index_select(0, entries)
    order = order.masked_fill(~some, torch.iinfo(torch.int64).max)
    # Sorted because queries that lie together see much the same, which the operator makes use of.
    rows = order.topk(min(queries, max(1, sample // batch)), largest=False).indices.sort().values
    drawn = some.gather(1, rows)
    each = some.sum(1, keepdim=True).double() / drawn.sum(1, keepdim=True).clamp_min(1)
    return entries, rows, torch.where(drawn, weight * each, 0.0)


def _random(count: int, calls: Tensor, salt: int) -> Tensor:
    """``count`` numbers below 2^62 that ``calls`` [] and ``salt`` decide: rounds of a multiplicative hash."""
    x = torch.arange(count, device=calls.device) * -0x61C8864680B583EB + calls.long() * 0x3C79AC492BA7B653
    x = x ^ (salt << 24)
    for factor in (-0x4B47D0C5A1A6B947, -0x6B2FB644ECCEEE15):
        x = (x ^ (x >> 32)) * factor
    return (x ^ (x >> 31)) & (2**62 - 1)


def _flat(given: dict[str, Any], entries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The flat selection for ``rows`` [E, R] of batch entries [E]: indices and scores [E, R, k']."""
    q, k, topk = given["q"], given["k"], given["topk"]
    shapes = dict.fromkeys(_BY_QUERY, q.shape[:2]) | {"mask": torch.Size((*q.shape[:2], k.shape[1]))}
    by_query = {name: given[name].expand(shapes[name]) for name in _BY_QUERY if given[name] is not None}
    by_query |= {"q": q, "weights": given["weights"]}
    by_token = {name: given[name] for name in _BY_TOKEN if given[name] is not None} | {"k": k}
    options: dict[str, Any] = {"topk": topk, "block_size": LARGEST_DEFAULT_BLOCK, "coarse": PAPER}
    options["block_topk"] = max(-(-k.shape[1] // LARGEST_DEFAULT_BLOCK), SMALLEST_BLOCK_TOPK)
    options |= {name: _taken(x, entries[:, None], rows) for name, x in by_query.items()}
    if len(entries) == len(k):
        return run(**options, **by_token)
    step = max(1, KEY_BYTES // max(1, k[0].numel() * k.element_size()))
    parts = []
    for start in range(0, len(entries), step):
        part = slice(start, start + step)
        own = options | {name: options[name][part] for name in by_query}
        own |= {name: _taken(x, entries[part]) for name, x in by_token.items()}
        parts.append(run(**own))
    indices, scores = (torch.cat(each) for each in zip(*parts, strict=True))
    return indices, scores


def _taken(x: Tensor, *index: Tensor) -> Tensor:
    """``x[index]``, which float8 lacks on some devices."""
    return x.view(torch.uint8)[index].view(x.dtype) if x.element_size() == 1 else x[index]
