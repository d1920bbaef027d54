"""How many tokens the refinement stage may look at: block size B and number of kept blocks m.

The paper (arXiv 2603.28458) uses B = 128 and m = 64 for topk = 2048: four candidates for every selected
token.  The defaults here keep that ratio for any topk, and about 64 blocks for budgets that are smaller,
because a coarse filter that chooses among few large blocks filters badly.
"""

from __future__ import annotations

from typing import NamedTuple

CANDIDATES_PER_SELECTED = 4
PAPER_BLOCK_TOPK = 64
SMALLEST_DEFAULT_BLOCK = 16
LARGEST_DEFAULT_BLOCK = 128
# Fewer leave the filter no choice: two blocks, the first and the last, are always kept.
SMALLEST_DEFAULT_BLOCK_TOPK = 16
# The first and the last eligible block are always kept, and they count among the m.
SMALLEST_BLOCK_TOPK = 2


class Budget(NamedTuple):
    """``block_size`` tokens a block (B), ``block_topk`` kept blocks a query (m)."""

    block_size: int
    block_topk: int

    @property
    def candidates(self) -> int:
        """Tokens the refinement stage may score for one query: m * B."""
        return self.block_size * self.block_topk


def check_block_size(block_size: int) -> None:
    """Raise a ValueError unless there is a token in a block."""
    if block_size < 1:
        raise ValueError(f"block_size: got {block_size}, expected an integer >= 1")


def resolve_budget(topk: int, block_size: int | None = None, block_topk: int | None = None) -> Budget:
    """The budget for ``topk`` selected tokens, with whatever was not given derived from it.

    Args:
        topk: number of selected tokens, at least 0.
        block_size: tokens a block (B), at least 1.  Default: the largest power of two that splits the
            candidate budget ``4 * topk`` into at least 64 blocks, between 16 and 128.
        block_topk: kept blocks (m), at least 2.  Default: enough blocks for ``4 * topk`` candidates, at least 16.

    Raises:
        ValueError: a value is out of its range, or ``block_size * block_topk < topk`` (HISA's
            feasibility condition, paper section 3).
    """
    if topk < 0:
        raise ValueError(f"topk: got {topk}, expected an integer >= 0")
    if block_size is not None:
        check_block_size(block_size)
    if block_topk is not None and block_topk < SMALLEST_BLOCK_TOPK:
        raise ValueError(
            f"block_topk: got {block_topk}, expected an integer >= {SMALLEST_BLOCK_TOPK} "
            "(the first and the last eligible block are always kept)"
        )
    wanted = CANDIDATES_PER_SELECTED * topk
    if block_size is None:
        blocks = PAPER_BLOCK_TOPK if block_topk is None else block_topk
        largest = LARGEST_DEFAULT_BLOCK if block_topk is None else max(wanted, 1)
        block_size = SMALLEST_DEFAULT_BLOCK
        while block_size < largest and block_size * blocks < wanted:
            block_size *= 2
    if block_topk is None:
        block_topk = max(SMALLEST_DEFAULT_BLOCK_TOPK, -(-wanted // block_size))
    budget = Budget(block_size, block_topk)
    if budget.candidates < topk:
        raise ValueError(
            f"block_topk * block_size: got {block_topk} * {block_size} = {budget.candidates} candidates, "
            f"expected at least topk = {topk}"
        )
    return budget
