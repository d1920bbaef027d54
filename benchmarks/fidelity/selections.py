"""Which tokens a query keeps: flat, HISA with its coarse stages, and baselines, in plain PyTorch to be read.

This is where coarse stages are tried before they become part of the operator: everything is written out, an indexer's
queries as rows, the whole matrix of scores in memory.  Dimensions in front, "..", are indexers that are asked at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hisa_compile.ops import reference
from hisa_compile.ops.coarse import sample_of

NEVER = -torch.inf
# Of the sample that tells a threshold of what was tried this many are above it.
RANK = 16


class Scored(NamedTuple):
    """Some queries of an indexer, or of several.

    q [.., N, H, D], k [.., T, D], w [.., N, H]; positions [N]: what each query sees is the tokens [0, position].
    scores [.., N, T]: sum over heads of w * relu(q . k), ``NEVER`` for what is not seen.
    """

    q: Tensor
    k: Tensor
    w: Tensor
    positions: Tensor
    scores: Tensor

    @property
    def tokens(self) -> int:
        return self.k.shape[-2]


def seen(positions: Tensor, tokens: int) -> Tensor:
    return torch.arange(tokens, device=positions.device) <= positions[:, None]


def relu_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """[.., N, vectors]; q [.., N, H, D], k [.., vectors, D], w [.., N, H]."""
    products = torch.einsum("...nhd,...vd->...nhv", q, k).relu()
    return torch.einsum("...nhv,...nh->...nv", products, w)


def scored(q: Tensor, k: Tensor, w: Tensor, positions: Tensor) -> Scored:
    scores = relu_scores(q, k, w).masked_fill(~seen(positions, k.shape[-2]), NEVER)
    return Scored(q, k, w, positions, scores)


def best(scores: Tensor, count: int) -> Tensor:
    """Of each row the ``count`` greatest that are not ``NEVER``, as bool of the same shape.

    Equal ones go by ascending position, as in the operator.  They may be many: where no head fires for its mean, a
    block scores 0, and topk takes any of these, others on a GPU than on a CPU.
    """
    last = scores.topk(min(count, scores.shape[-1]), dim=-1).values[..., -1:]
    above, equal = scores > last, scores == last
    room = count - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= room))) & (scores != NEVER)


def flat(of: Scored, topk: int) -> Tensor:
    return best(of.scores, topk)


# ---- coarse stages ---------------------------------------------------------------------------------------------

# (what is scored, tokens of a block, selected tokens) -> [.., N, blocks], the greater the better.
Coarse = Callable[[Scored, int, int], Tensor]


def in_blocks(x: Tensor, block: int) -> Tensor:
    """[.., T, D] -> [.., blocks, block, D]; T is a multiple of the block here."""
    return x.unflatten(-2, (x.shape[-2] // block, block))


def by_mean(of: Scored, block: int, topk: int) -> Tensor:
    """The paper's: the score of a block's mean key."""
    return relu_scores(of.q, in_blocks(of.k, block).mean(-2), of.w)


def by_spread(of: Scored, block: int, topk: int) -> Tensor:
    """The operator's: behind each mean key a second one, of how far the block's keys are from it."""
    keys = of.k.reshape(-1, *of.k.shape[-2:])
    of_blocks = reference.block_representatives(keys, block, spread=True)
    of_blocks = of_blocks.view(*of.k.shape[:-2], *of_blocks.shape[1:])
    return relu_scores(reference.spread_queries(of.q, of.w), of_blocks, of.w)


def probe(of: Scored) -> Tensor:
    """Every token's score as two heads see it: the heads of positive weight as one, and those of negative weight.

    relu(q+ . k) - relu(q- . k), q+ the sum of w_h q_h where w_h > 0, q- that of -w_h q_h where w_h < 0: two products a
    token instead of H.
    """
    plus, minus = ((of.q * part[..., None]).sum(-2) for part in (of.w.relu(), (-of.w).relu()))
    probed = (plus @ of.k.mT).relu() - (minus @ of.k.mT).relu()
    return probed.masked_fill(~seen(of.positions, of.tokens), NEVER)


def sampled(tokens: int, topk: int) -> Tensor:
    """Positions of the tokens whose scores tell how great the ``topk``-th one's is: one of every topk / RANK.

    The place in each stretch changes, so that nothing that repeats in the text is met every time.
    """
    stride = max(1, topk // RANK)
    number = torch.arange(-(-tokens // stride))
    return (number * stride + number * 7919 % stride).clamp_max(tokens - 1)


def threshold(tokens: Tensor, topk: int) -> Tensor:
    """About the score of the ``topk``-th token, [.., N, 1], from a sample."""
    some = tokens[..., sampled(tokens.shape[-1], topk).to(tokens.device)].sort(-1, descending=True).values
    found = (some != NEVER).sum(-1, keepdim=True)
    return some.gather(-1, found.clamp(1, max(1, topk // max(1, topk // RANK))) - 1)


def pooled(tokens: Tensor, block: int, topk: int, how: str) -> Tensor:
    """Scores of blocks from scores of their tokens: how much of each is above that of about the ``topk``-th token.

    "capped" is the operator's: each up to a cap, and half of the greatest.  What else was tried: "max", the greatest
    token's; "sum", what is above, added up; "root", square roots of that, added up, which is between the sum and the
    number of such tokens.  Blocks with none above follow by their greatest.
    """
    if how == "capped":
        return reference.probe_block_scores(tokens, tokens != NEVER, block, sample_of(tokens.shape[-1], topk))
    by_block = tokens.unflatten(-1, (tokens.shape[-1] // block, block))
    greatest = by_block.amax(-1)
    if how == "max":
        return greatest
    low = threshold(tokens, topk)
    above = (by_block - low[..., None]).relu()
    behind = greatest - low
    return torch.where(behind > 0, (above if how == "sum" else above.sqrt()).sum(-1), behind)


def by_probe(of: Scored, block: int, topk: int, *, how: str = "capped") -> Tensor:
    return pooled(probe(of), block, topk, how)


def by_token(of: Scored, block: int, topk: int, *, how: str = "capped") -> Tensor:
    """What the probe approximates: the tokens' own scores.  No coarse stage, a bound of what one can know."""
    return pooled(of.scores, block, topk, how)


def kept_blocks(block_scores: Tensor, positions: Tensor, block: int, count: int) -> Tensor:
    """bool [.., N, blocks]: the ``count`` best of the blocks that hold a token that is seen, first and last always."""
    number = torch.arange(block_scores.shape[-1], device=positions.device)
    last = positions // block
    scores = block_scores.masked_fill(number > last[:, None], NEVER)
    scores = scores.masked_fill((number == 0) | (number == last[:, None]), torch.inf)
    return best(scores, count)


def tokens_of(blocks: Tensor, block: int) -> Tensor:
    return blocks.repeat_interleave(block, dim=-1)


# ---- options ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """A way to find candidates.

    name: in tables.  coarse: scores of blocks.  finer: how many times smaller blocks are than the paper's setting has
    them.  first: blocks of the paper's size that the mean keeps before, as a multiple of the candidates; 0 for none.
    of_block: vectors of a block that all heads are multiplied with.  of_token: heads that every token is multiplied
    with, None for all.
    """

    name: str
    coarse: Coarse
    finer: int = 1
    first: int = 0
    of_block: int = 0
    of_token: int | None = 0

    def candidates(self, of: Scored, block: int, candidates: int, topk: int) -> Tensor:
        """bool [.., N, T]: at most ``candidates`` tokens, whole blocks of ``block / finer``."""
        fine = block // self.finer
        scores = self.coarse(of, fine, topk)
        if self.first:
            before = kept_blocks(by_mean(of, block, topk), of.positions, block, self.first * candidates // block)
            scores = scores.masked_fill(~before.repeat_interleave(self.finer, dim=-1), NEVER)
        return tokens_of(kept_blocks(scores, of.positions, fine, candidates // fine), fine)

    def select(self, of: Scored, block: int, candidates: int, topk: int) -> Tensor:
        """bool [.., N, T]: the best ``topk`` of the candidates."""
        kept = self.candidates(of, block, candidates, topk)
        return best(of.scores.masked_fill(~kept, NEVER), topk)

    def dots(self, tokens: int, heads: int, block: int, candidates: int) -> float:
        """Products of all heads with one vector that the coarse stage makes for a query."""
        reached = min(tokens, self.first * candidates) if self.first else tokens
        each = self.of_block / (block // self.finer) + (1 if self.of_token is None else self.of_token / heads)
        return reached * each + (tokens / block if self.first else 0)


PAPER = Option("paper: one mean", by_mean, of_block=1)
OPTIONS = (
    PAPER,
    Option("mean, blocks of B/2", by_mean, 2, 0, of_block=1),
    Option("mean, blocks of B/4", by_mean, 4, 0, of_block=1),
    Option("spread", by_spread, 1, 0, of_block=2),
    Option("spread, B/2", by_spread, 2, 0, of_block=2),
    Option("spread, B/4", by_spread, 4, 0, of_block=2),
    Option("two levels, mean, 2m then B/4", by_mean, 4, 2, of_block=1),
    Option("two levels, spread, 2m then B/4", by_spread, 4, 2, of_block=2),
    Option("probe, greatest", functools.partial(by_probe, how="max"), 1, 0, of_token=2),
    Option("probe, sum", functools.partial(by_probe, how="sum"), 1, 0, of_token=2),
    Option("probe, roots", functools.partial(by_probe, how="root"), 1, 0, of_token=2),
    Option("probe", by_probe, 1, 0, of_token=2),
    Option("probe, B/2", by_probe, 2, 0, of_token=2),
    Option("probe, B/4", by_probe, 4, 0, of_token=2),
    Option("two levels, 2m then probe, B/2", by_probe, 2, 2, of_token=2),
    Option("two levels, 2m then probe, B/4", by_probe, 4, 2, of_token=2),
    Option("two levels, 4m then probe, B/4", by_probe, 4, 4, of_token=2),
    Option("bound: tokens' own scores", by_token, 1, 0, of_token=None),
    Option("bound: tokens' own scores, B/4", by_token, 4, 0, of_token=None),
)


# ---- baselines -------------------------------------------------------------------------------------------------


def block_sparse(of: Scored, block: int, topk: int) -> Tensor:
    """Whole blocks by their mean, ``topk`` tokens in all, no second stage."""
    kept = kept_blocks(by_mean(of, block, topk), of.positions, block, max(2, topk // block))
    return tokens_of(kept, block) & seen(of.positions, of.tokens)


def recent(of: Scored, topk: int) -> Tensor:
    """The last tokens, after the first four: [N, T], the same of every indexer."""
    token = torch.arange(of.tokens, device=of.positions.device)
    return ((token > of.positions[:, None] - (topk - 4)) | (token < 4)) & seen(of.positions, of.tokens)


def random(of: Scored, topk: int) -> Tensor:
    device = of.scores.device
    drawn = torch.rand(of.scores.shape, generator=torch.Generator(device).manual_seed(0), device=device)
    return best(drawn.masked_fill(~seen(of.positions, of.tokens), NEVER), topk)
