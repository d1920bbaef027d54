"""The coarse stages, by which blocks are kept: their names, the choice between them, and the probe's sample.

"paper" is HISA's own (arXiv 2603.28458): the score of a block's mean key.  A mean hides a token that stands out.

"spread" adds how far a block's keys are from their mean.  Each head's product with the block is

    q[t,h] . mean + sign(w[t,h]) |q[t,h]| . spread,    spread[d] = 2^floor(log2(sigma[d] sqrt(SPREAD_SCALE / D)))

where sigma is the keys' standard deviation and |q| goes by dimension: a second product with a second vector.  It gives
the score of a key that is some four standard deviations of q . k away from the mean, if dimensions are independent and
alike, in the direction that raises the block's score.  Two or eight in place of four change little, so a power of two
is fine enough, and exact.  ``reference.block_representatives`` has the definition.

"probe" is this project's: every visible token is scored with two heads instead of H, which add up those of positive
weight and those of negative,

    p[t,s] = ReLU(q+[t] . k[s]) - ReLU(q-[t] . k[s])
    q+[t] = sum_h max(w[t,h], 0) q[t,h],    q-[t] = sum_h max(-w[t,h], 0) q[t,h]

and a block is worth what its tokens have above a threshold, the score of the token 1.5 topk from the top.
``reference.probe_block_scores`` has the definition, docs/fidelity.md what each costs and finds.

"two-level" is the one inside the other: means choose outer blocks of up to 128 tokens, with LEVEL_RATIO times as many
tokens as are kept in the end, and the probe ranks the blocks inside these, see :func:`outer_budget`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .budget import Budget

PAPER, SPREAD, PROBE, TWO_LEVEL = "paper", "spread", "probe", "two-level"
COARSE_STAGES = (PAPER, SPREAD, PROBE, TWO_LEVEL)
# Twice the square of about four standard deviations: rounded down, a power of two is half a factor of two too small.
# A prime, so that the variance of small integers is hardly ever just at the border between two powers.
SPREAD_SCALE = 31
# Tokens of an outer block, or less: blocks that are not smaller are outer blocks themselves.
OUTER_TOKENS = 128
# Tokens in kept outer blocks for each one in kept blocks.
LEVEL_RATIO = 4
# So many tokens of the sample, or a few more, are among the topk best ones, and half as many again above the threshold.
_RANK = 16
# What one program of a GPU selects among.
_LARGEST_SAMPLE = 8192
# By default the probe may cost this share of the refinement's arithmetic: at it a call took 1.21 times as long as with
# means in float8, 1.25 in bfloat16; with half of it 1.12 and 1.10 (an H100, benchmarks/results/coarse.md).
PROBE_SHARE = 0.25
# Neighbouring tokens of the sample are not a fixed distance apart, so that nothing that repeats is always met.
JITTER = 7919


class Sample(NamedTuple):
    """Tokens whose probed scores tell the threshold.

    Token i < ``size`` is at i * stride + (i * JITTER) % stride, and not there at all where that is T or more.  The
    ``rank``-th best of those that are visible is the threshold.
    """

    stride: int
    size: int
    rank: int


def sample_of(tokens: int, topk: int) -> Sample:
    """The sample for T tokens of which ``topk`` >= 1 are to be selected."""
    stride = max(1, topk // _RANK, -(-tokens // _LARGEST_SAMPLE))
    return Sample(stride, -(-tokens // stride), max(1, 3 * topk // (2 * stride)))


def check_coarse(coarse: object, prefix: str = "") -> None:
    """Raise a ValueError unless ``coarse`` is the name of a coarse stage, or None."""
    if coarse is not None and coarse not in COARSE_STAGES:
        raise ValueError(
            f"{prefix}coarse: got {coarse!r}, expected None or one of {', '.join(map(repr, COARSE_STAGES))}"
        )


def longest_probed(heads: int, budget: Budget) -> int:
    """The most tokens T that the probe is the default for: its products, 2 T, are PROBE_SHARE of the refinement's."""
    return math.floor(PROBE_SHARE * heads * budget.candidates / 2)


def outer_size(block_size: int) -> int:
    """Tokens of an outer block, O = B * max(1, min(4, 128 // B)): whole blocks, no more of them than LEVEL_RATIO."""
    return block_size * max(1, min(LEVEL_RATIO, OUTER_TOKENS // block_size))


def outer_budget(budget: Budget) -> Budget:
    """The outer blocks of "two-level": their size O, and ceil(4 m B / O) that are kept.

    These are m at least, so that whenever no more than m blocks hold a visible token all of them are kept.
    """
    size = outer_size(budget.block_size)
    return Budget(size, -(-LEVEL_RATIO * budget.candidates // size))


def outer_of(coarse: str | None, tokens: int, budget: Budget) -> Budget | None:
    """The outer blocks of a call whose stage is resolved; None where there are none, or all of them are kept."""
    if coarse != TWO_LEVEL:
        return None
    outer = outer_budget(budget)
    return outer if -(-tokens // outer.block_size) > outer.block_topk else None


def probes(coarse: str | None) -> bool:
    """Whether a stage scores tokens by the probe's two heads; else blocks go by representatives alone."""
    return coarse in (PROBE, TWO_LEVEL)


def vectors_of_block(coarse: str | None) -> int:
    """Of how many vectors side by side, each of D numbers, a block's representative in ``k_pooled`` is made."""
    return 2 if coarse == SPREAD else 1


def size_of_means(coarse: str | None, block_size: int) -> int:
    """Tokens of the blocks whose means a stage ranks by: those that ``k_pooled`` holds."""
    return outer_size(block_size) if coarse == TWO_LEVEL else block_size


def resolve_coarse(coarse: str | None, tokens: int, heads: int, budget: Budget, pooled: bool) -> str:
    """The coarse stage of a call; one that was not given is chosen by what the probe would cost.

    Its two products a token are 2 T / H of those that a token of the refinement takes, of which there are m B.  Where
    that is more than PROBE_SHARE of them, or the means are at hand, blocks go by their means.
    """
    if coarse is not None:
        return coarse
    return PAPER if pooled or tokens > longest_probed(heads, budget) else PROBE
