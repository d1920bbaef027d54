"""``hisa::indexer_topk`` on the CPU: the two stages of HISA in plain torch operations, chunk by chunk.

A row is one query of one batch entry.  Products are issued for groups of ``GROUP`` rows as one batched
product in a shape that depends on neither the batch nor the number of queries, on 64-byte aligned float32
copies; a group that is not full repeats its last row.  For a BLAS may add in another order for another
shape or alignment, and a row's bits must depend on its own inputs alone.  Groups, because every torch
operation is a parallel region that all threads enter and leave: one per row costs more than it computes.
All else (visibility, see :mod:`.cpu_rows`, filter, selection) is exact arithmetic on integers, on a chunk of
rows at once.

Half-precision and float8 keys are cast up tile by tile, and ``k_scale`` multiplies the float32 product,
``relu(k_scale * (q . k))``, so that the products themselves are exact.  ``k_weight`` multiplies the finished score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .budget import Budget
from .coarse import PAPER, SPREAD, Sample, outer_of, probes, sample_of
from .cpu_order import INT32_MIN, float32_products, kept_blocks, rank_of, sort_by_score, unique_rank
from .cpu_pool import TILE_ELEMENTS, pool_keys_cpu
from .cpu_rows import Rows, segment_bounds
from .reference import (
    in_own_units,
    probe_block_scores,
    probe_limits,
    probe_worths,
    sample_positions,
    spread_queries,
)
from .visibility import Visibility

# Rows whose products are one operation.  More would spread better over many threads, but a single query,
# as in decoding, pays for a whole group.
GROUP = 8
# Candidates (rows x columns) that are selected from at once, with about 48 bytes for each: 6 MiB.
CHUNK_ELEMENTS = 1 << 17


def _aligned_rows(like: Tensor, rows: int, columns: int) -> Tensor:
    """Uninitialised float32 [rows, columns'] of at least ``columns``; rows begin at multiples of 64 bytes."""
    return like.new_empty((rows, -(-columns // 16) * 16), dtype=torch.float32)


class _Scorer:
    """Scores of a chunk's rows against keys, tile by tile."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        k_scale: Tensor | None,
        k_weight: Tensor | None,
        relu: bool = True,
        spread: bool = False,
    ) -> None:
        """``spread``: q as :func:`.reference.spread_queries` has it, of 2 D dimensions, and so have keys."""
        self.q, self.k, self.weights, self.k_scale, self.k_weight = q, k, weights, k_scale, k_weight
        self.relu, self.spread = relu, spread
        self.heads, self.dim = q.shape[2], q.shape[3] * (2 if spread else 1)
        self._largest_tile = min(max(TILE_ELEMENTS // (GROUP * max(self.heads, self.dim, 1)) // 16, 1) * 16, 2048)
        self._batches: list[int] = []
        self._all: list[_Group] = []
        self._scratch: dict[int, tuple[Tensor, Tensor]] = {}

    def load(self, rows: Rows) -> None:
        """Make ``rows`` the chunk that the methods below know by number."""
        count = rows.batch.shape[0]
        self._queries = _aligned_rows(self.q, count, self.heads * self.dim)
        self._weights = self.weights[rows.batch, rows.query].float()
        queries = self.q[rows.batch, rows.query]
        if self.spread:
            queries = spread_queries(queries, self._weights)
        self._queries[:, : self.heads * self.dim] = queries.flatten(1)
        self._batches = rows.batch.tolist()
        self._all = self._groups(range(count))

    def all_tokens(self, spans: list[list[int]]) -> Tensor:
        """Scores of all rows against all tokens, as [R, T].  ``spans`` as :meth:`all_keys` has them."""
        return self.all_keys(self.k, spans, self.k_scale, self.k_weight)

    def all_keys(
        self, keys: Tensor, spans: list[list[int]], k_scale: Tensor | None = None, k_weight: Tensor | None = None
    ) -> Tensor:
        """Scores of all rows against ``keys`` [B, N, D], as [R, N].

        ``spans`` holds a row's first and last + 1 column of interest; a tile that no row of its group is
        interested in stays unwritten.
        """
        count = keys.shape[1]
        groups = self._all
        size, starts = self._tiles(count)
        scores = keys.new_empty((len(groups) * GROUP, size * len(starts)), dtype=torch.float32)
        tile, products = self._buffers(size)
        for first in starts:
            last = min(first + size, count)
            # A group of one batch entry shares its tile, which stays for the next group of that entry.
            shared = -1
            for group, out in zip(groups, scores[:, first : first + size].split(GROUP), strict=True):
                if all(start >= last or end <= first for start, end in (spans[number] for number in group.numbers)):
                    continue
                if group.only_batch is None or group.only_batch != shared:
                    for batch, members in group.runs:
                        members = slice(1) if group.only_batch is not None else members
                        tile[members, : last - first] = keys[batch, first:last]
                    shared = -1 if group.only_batch is None else group.only_batch
                seen = tile if group.only_batch is None else tile[:1].expand(tile.shape)
                torch.bmm(seen, group.queries, out=products)
                if k_scale is not None:
                    products[:, : last - first] *= k_scale[group.batches, first:last, None]
                if self.relu:
                    products.relu_()
                torch.sum(products.mul_(group.weights), -1, out=out)
                if k_weight is not None:
                    out[:, : last - first] *= k_weight[group.batches, first:last]
        return scores[: len(self._batches), :count]

    def keys_at(self, numbers: list[int] | None, positions: Tensor, counts: list[int]) -> Tensor:
        """Scores at ``positions`` [R, N], as [R, N]; past a row's ``counts`` anything.

        The R rows are those of ``numbers``, or all.
        """
        groups = self._all if numbers is None else self._groups(numbers)
        size, starts = self._tiles(positions.shape[1])
        padding = (0, size * len(starts) - positions.shape[1], 0, len(groups) * GROUP - len(counts))
        padded = torch.nn.functional.pad(positions, padding)
        scores = self._weights.new_empty(padded.shape)
        tile, products = self._buffers(size)
        for number, group in enumerate(groups):
            rows = slice(number * GROUP, (number + 1) * GROUP)
            longest = max(counts[rows])
            for first in starts:
                if first >= longest:
                    break
                at = padded[rows, first : first + size]
                for batch, members in group.runs:
                    keys, chosen = self.k[batch], at[members].flatten()
                    if keys.dtype == torch.float32:
                        torch.index_select(keys, 0, chosen, out=tile[members].flatten(0, 1))
                    else:
                        tile[members] = keys.index_select(0, chosen).view_as(tile[members])
                torch.bmm(tile, group.queries, out=products)
                if self.k_scale is not None:
                    products *= self.k_scale[group.batches[:, None], at][..., None]
                out = scores[rows, first : first + size]
                if self.relu:
                    products.relu_()
                torch.sum(products.mul_(group.weights), -1, out=out)
                if self.k_weight is not None:
                    out *= self.k_weight[group.batches[:, None], at]
        return scores[: len(counts), : positions.shape[1]]

    def _groups(self, numbers: Sequence[int]) -> list[_Group]:
        return [self._group(list(numbers[first : first + GROUP])) for first in range(0, len(numbers), GROUP)]

    def _group(self, numbers: list[int]) -> _Group:
        numbers += numbers[-1:] * (GROUP - len(numbers))
        chosen = torch.tensor(numbers, device=self.q.device)
        queries = self._queries.index_select(0, chosen)[:, : self.heads * self.dim]
        batches = [self._batches[number] for number in numbers]
        starts = [i for i in range(GROUP) if i == 0 or batches[i] != batches[i - 1]]
        runs = [(batches[i], slice(i, end)) for i, end in zip(starts, [*starts[1:], GROUP], strict=True)]
        return _Group(
            numbers,
            queries.unflatten(1, (self.heads, self.dim)).mT,
            self._weights.index_select(0, chosen)[:, None],
            torch.tensor(batches, device=self.q.device),
            runs,
            runs[0][0] if len(runs) == 1 else None,
        )

    def _tiles(self, count: int) -> tuple[int, range]:
        """Size, a multiple of 16, and starts of the tiles that cover ``count`` columns."""
        tiles = -(-count // self._largest_tile)
        size = -(-count // (16 * tiles)) * 16
        return size, range(0, count, size)

    def _buffers(self, size: int) -> tuple[Tensor, Tensor]:
        """Keys [GROUP, size, D] and products [GROUP, size, H] of a tile, the same ones for every tile.

        A last tile that is not full holds anything at its end, as do the scores there; zeros to begin
        with, since arithmetic on what memory happens to hold may be slow (denormal numbers).
        """
        if size not in self._scratch:
            tile = self.q.new_zeros((GROUP, size, self.dim), dtype=torch.float32)
            self._scratch[size] = tile, self.q.new_empty((GROUP, size, self.heads), dtype=torch.float32)
        return self._scratch[size]


class _Group(NamedTuple):
    """``GROUP`` rows of the chunk: queries [GROUP, D, H], weights [GROUP, 1, H], batch entries [GROUP]."""

    numbers: list[int]
    queries: Tensor
    weights: Tensor
    batches: Tensor
    runs: list[tuple[int, slice]]
    """Consecutive rows of one batch entry."""
    only_batch: int | None


class _Probe:
    """Scores of a chunk's rows by two heads: ``reference.probe_scores``."""

    def __init__(self, q: Tensor, k: Tensor, weights: Tensor, k_scale: Tensor | None, k_weight: Tensor | None) -> None:
        heads = _probe_queries(q, weights)
        one = weights.new_ones(()).expand(*q.shape[:2], 1)
        # Each product by itself, as it is.
        self.plus, self.minus = (_Scorer(heads[:, :, [i]], k, one, None, None, relu=False) for i in range(2))
        self.k_scale = k_scale
        self.k_weight = k_weight

    def load(self, rows: Rows) -> None:
        """Make ``rows`` the chunk that the methods below are about."""
        self.batch = rows.batch
        for scorer in (self.plus, self.minus):
            scorer.load(rows)

    def all_tokens(self, rows: Rows) -> Tensor:
        """[R, T]; outside a row's window anything."""
        spans = rows.spans()
        x, y = self.plus.all_tokens(spans), self.minus.all_tokens(spans)
        scale, factor = (None if of is None else of[self.batch] for of in (self.k_scale, self.k_weight))
        return _difference_of_relus(x, y, scale, factor)

    def at(self, positions: Tensor, counts: list[int]) -> Tensor:
        """At ``positions`` [R, N], as [R, N]; past a row's ``counts`` anything."""
        x, y = self.plus.keys_at(None, positions, counts), self.minus.keys_at(None, positions, counts)
        batch = self.batch[:, None]
        scale, factor = (None if of is None else of[batch, positions] for of in (self.k_scale, self.k_weight))
        return _difference_of_relus(x, y, scale, factor)


def _difference_of_relus(x: Tensor, y: Tensor, scale: Tensor | None, factor: Tensor | None) -> Tensor:
    """``factor`` * (ReLU(scale x) - ReLU(scale y)), in the memory of x, y and scale."""
    along, across = x - y, x.abs_() - y.abs_()
    if scale is None:
        probed = along.add_(across).mul_(0.5)
    else:
        probed = along.add_(across.mul_(torch.where(scale < 0, -1.0, 1.0))).mul_(scale.div_(2))
    return probed if factor is None else probed.mul_(factor)


class _TwoLevel(NamedTuple):
    """The stage "two-level": means [B, M, D] of outer blocks, the probe inside the kept ones."""

    outer: Budget
    means: Tensor
    bounds: tuple[Tensor, Tensor] | None
    probe: _Probe
    sample: Sample

    def scores(self, scorer: _Scorer, rows: Rows, block_size: int, blocks: int) -> tuple[Tensor, Tensor]:
        """Scores of all blocks and whether they are eligible, both [R, blocks]; none is outside kept outer blocks."""
        size, outers = self.outer.block_size, self.means.shape[1]
        outer_scores = scorer.all_keys(self.means, rows.spans(size))
        eligible = rows.sees_in_blocks(size, outers, self.bounds, CHUNK_ELEMENTS // 4)
        kept, count = kept_blocks(outer_scores, eligible, self.outer.block_topk)

        def probed(positions: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
            return self.probe.at(positions.clamp_max(rows.tokens - 1), counts), rows.sees(positions)

        some = sample_positions(self.sample, rows.tokens, kept.device).expand(kept.shape[0], -1)
        limits = probe_limits(*probed(some, [some.shape[1]] * some.shape[0]), self.sample.rank)
        tokens = (kept[..., None] * size + torch.arange(size, device=kept.device)).flatten(1)
        inside = (-1, block_size)
        found, seen = (x.unflatten(1, inside) for x in probed(tokens, (count * size).tolist()))
        number = tokens[:, ::block_size] // block_size
        # Past a row's kept outer blocks numbers are those of one more, which is none.
        shape = (kept.shape[0], (outers + 1) * (size // block_size))
        block_scores = found.new_full(shape, float("-inf")).scatter_(1, number, probe_worths(found, seen, *limits))
        eligible = seen.new_zeros(shape).scatter_(1, number, seen.any(-1))
        return block_scores[:, :blocks], eligible[:, :blocks]


def _probe_queries(q: Tensor, weights: Tensor) -> Tensor:
    """``reference.probe_queries``; heads are added up one after another, so that bits depend on a row's own alone."""
    heads = q.new_zeros((*q.shape[:2], 2, q.shape[3]), dtype=torch.float32)
    signed = weights.float()
    for h in range(q.shape[2]):
        head = q[:, :, h].float()
        heads[:, :, 0] += head * signed[:, :, h, None].relu()
        heads[:, :, 1] += head * (-signed[:, :, h, None]).relu()
    return in_own_units(heads, q.dtype)


def _fill_up(
    scorer: _Scorer,
    rows: Rows,
    numbers: Tensor,
    in_kept: Tensor,
    positions: Tensor,
    scores: Tensor,
    visible: Tensor,
) -> None:
    """Replace the slots that are not ``visible`` by tokens outside the kept blocks, as the contract says.

    ``rows`` are the chunk's rows of these ``numbers``, ``in_kept`` [R, T] their candidates, hidden ones
    included; ``positions``, ``scores`` and ``visible`` [R, k'] are changed in place.
    """
    seen = rows.sees_all()
    others = seen & ~in_kept
    missing = (~visible).sum(-1, keepdim=True)
    taken = others & (others.cumsum(-1, dtype=torch.int32) <= missing)
    missing -= taken.sum(-1, keepdim=True)
    taken |= ~seen & ((~seen).cumsum(-1, dtype=torch.int32) <= missing)
    row, position = taken.nonzero(as_tuple=True)
    slots = ~visible
    positions[slots] = position
    visible[slots] = seen[row, position]
    slots &= visible
    scored = slots.any(-1).nonzero()[:, 0]
    if scored.numel():
        found = scorer.keys_at(numbers[scored].tolist(), positions[scored], [positions.shape[1]] * len(scored))
        scores[scored] = torch.where(slots[scored], found, scores[scored])


def indexer_topk_cpu(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    topk: int,
    budget: Budget,
    visibility: Visibility,
    k_scale: Tensor | None,
    k_weight: Tensor | None,
    sorted: bool,
    mark_hidden: bool,
    k_pooled: Tensor | None = None,
    coarse: str = PAPER,
) -> tuple[Tensor, Tensor]:
    """``hisa::indexer_topk`` for CPU tensors that passed the argument checks; see the public function.

    The selection comes out in order anyway, so rows are sorted whether or not ``sorted`` asks for it.
    """
    batch, queries = q.shape[:2]
    tokens = k.shape[1]
    width = min(topk, tokens)
    indices = q.new_empty((batch, queries, width), dtype=torch.int32)
    scores = q.new_empty((batch, queries, width), dtype=torch.float32)
    if indices.numel() == 0:
        return indices, scores
    blocks = -(-tokens // budget.block_size)
    means = bounds = probe = levels = None
    columns = tokens
    outer = outer_of(coarse, tokens, budget)
    if blocks > budget.block_topk and probes(coarse):
        probe = _Probe(q, k, weights, k_scale, k_weight)
        sample = sample_of(tokens, topk)
        columns += budget.candidates
    if blocks > budget.block_topk and (probe is None or outer is not None):
        means, size = k_pooled, budget.block_size if outer is None else outer.block_size
        if means is None:
            means = pool_keys_cpu(k, size, visibility.key_valid, k_scale, k_weight, coarse == SPREAD)
        if visibility.k_segment is not None and visibility.mask is None:
            bounds = segment_bounds(visibility.k_segment, size, visibility.key_valid)
        # A token's visibility is a byte or two, a small part of what a candidate takes.
        by_token = visibility.mask is not None or (visibility.key_valid is not None and bounds is None)
        columns = budget.candidates + blocks + (tokens // 16 if by_token else 0)
        if outer is not None and probe is not None:
            levels = _TwoLevel(outer, means, bounds, probe, sample)
            columns += outer.candidates + sample.size
    chunk = max(1, CHUNK_ELEMENTS // (columns * GROUP)) * GROUP
    scorer = _Scorer(q, k, weights, k_scale, k_weight)
    with float32_products():
        for first in range(0, batch * queries, chunk):
            last = min(first + chunk, batch * queries)
            rows = Rows(torch.arange(first, last, device=q.device), q, tokens, visibility)
            scorer.load(rows)
            if probe is not None:
                probe.load(rows)
            if levels is not None:
                block_scores, eligible = levels.scores(scorer, rows, budget.block_size, blocks)
                found = _refined(scorer, rows, width, block_scores, eligible, budget)
            elif probe is not None:
                seen = rows.sees_all()
                block_scores = probe_block_scores(probe.all_tokens(rows), seen, budget.block_size, sample)
                in_blocks = torch.nn.functional.pad(seen, (0, blocks * budget.block_size - tokens))
                eligible = in_blocks.view(-1, blocks, budget.block_size).any(-1)
                found = _refined(scorer, rows, width, block_scores, eligible, budget)
            elif means is not None:
                spans = rows.spans(budget.block_size)
                if coarse == SPREAD:
                    block_scores = _scores_by_spread(q, k, weights, rows, means, spans)
                else:
                    block_scores = scorer.all_keys(means, spans)
                # Beside the scores and bounds of all blocks, so a part of a chunk's candidates at once.
                eligible = rows.sees_in_blocks(budget.block_size, blocks, bounds, CHUNK_ELEMENTS // 4)
                found = _refined(scorer, rows, width, block_scores, eligible, budget)
            else:
                found = _flat(scorer, rows, width)
            positions, found_scores, visible = found
            if mark_hidden:
                positions.masked_fill_(~visible, -1)
            indices.view(-1, width)[first:last] = positions
            # One NaN for all: which bits of one come through a cast depends on how it was vectorised.
            scores.view(-1, width)[first:last] = found_scores.masked_fill(found_scores.isnan(), float("nan"))
    return indices, scores


def _scores_by_spread(
    q: Tensor, k: Tensor, weights: Tensor, rows: Rows, means: Tensor, spans: list[list[int]]
) -> Tensor:
    """Scores of blocks [R, M] by a scorer of its own, whose longer queries are gone when candidates are scored."""
    scorer = _Scorer(q, k, weights, None, None, spread=True)
    scorer.load(rows)
    return scorer.all_keys(means, spans)


def _flat(scorer: _Scorer, rows: Rows, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best tokens of all: positions, scores, and whether visible, each [R, k']."""
    scores = scorer.all_tokens(rows.spans())
    found = _best(scores, rows.sees_all(), torch.arange(rows.tokens, device=scores.device).expand(scores.shape), width)
    # Hidden tokens are the last choice, but in the result they stand beside visible ones of score -inf.
    for short in _short_rows(found[2], scores.shape[0]):
        _replace(found, short, sort_by_score(*(x[short] for x in found)))
    return found


def _refined(
    scorer: _Scorer, rows: Rows, width: int, block_scores: Tensor, eligible: Tensor, budget: Budget
) -> tuple[Tensor, Tensor, Tensor]:
    """The best tokens of the best eligible blocks: positions, scores, and whether visible, each [R, k']."""
    block_size, block_topk = budget
    blocks = eligible.shape[1]
    kept, count = kept_blocks(block_scores, eligible, block_topk)
    positions = (kept[..., None] * block_size + torch.arange(block_size, device=kept.device)).flatten(1)
    readable = positions.clamp_max(rows.tokens - 1)
    scores = scorer.keys_at(None, readable, (count * block_size).tolist())
    found = _best(scores, rows.sees(positions), positions, width)
    for short in _short_rows(found[2], max(1, CHUNK_ELEMENTS // rows.tokens)):
        part = tuple(x[short] for x in found)
        in_kept = short.new_zeros((short.shape[0], blocks + 1), dtype=torch.bool).scatter_(1, kept[short], True)
        in_kept = in_kept[:, :blocks].repeat_interleave(block_size, 1)[:, : rows.tokens]
        _fill_up(scorer, rows[short], short, in_kept, *part)
        _replace(found, short, sort_by_score(*part))
    return found


def _short_rows(visible: Tensor, at_once: int) -> Iterator[Tensor]:
    """Numbers of the rows with fewer visible candidates than slots, ``at_once`` at a time."""
    short = (~visible).any(-1).nonzero()[:, 0]
    if short.numel():
        yield from short.split(at_once)


def _replace(found: tuple[Tensor, ...], rows: Tensor, parts: tuple[Tensor, ...]) -> None:
    for whole, part in zip(found, parts, strict=True):
        whole[rows] = part


def _best(scores: Tensor, visible: Tensor, positions: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``width`` columns in the order: visible by score, then hidden, each by ascending position.

    Columns must be in ascending order of position.  The scores of hidden columns may be uninitialised.
    """
    columns = torch.arange(scores.shape[1], device=scores.device)
    at_once = max(1, CHUNK_ELEMENTS // scores.shape[1])
    best = torch.cat(
        [
            unique_rank(rank_of(some_scores).masked_fill_(~some_visible, INT32_MIN), columns).topk(width).indices
            for some_scores, some_visible in zip(scores.split(at_once), visible.split(at_once), strict=True)
        ]
    )
    seen = visible.gather(-1, best)
    return positions.gather(-1, best), scores.gather(-1, best).masked_fill_(~seen, float("-inf")), seen
