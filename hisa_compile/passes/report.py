"""What the pass saw and did: one :class:`Site` for every top-k and sort of a graph."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import sympy

from ..ops.budget import Budget
from ..ops.coarse import TWO_LEVEL, longest_probed, outer_budget, probes, vectors_of_block

# The number of tokens a query's indexer sees, in the work expressions.
T = sympy.Symbol("T", integer=True, positive=True)


def site_name(module: str, location: str) -> str:
    """What a site goes by."""
    return " ".join(part for part in (module or "(no module)", location) if part)


@dataclass(frozen=True)
class Site:
    """One selection (top-k or sort) in a graph.

    op: "topk" or "sort".  module: dotted module path and class, "" if the graph does not say.
    location: "file:line" of the model's own code, "" if the graph does not say.
    reason: why it was left alone: the first obligation that failed; "" if it was rewritten.
    topk, heads, head_dim, budget: the indexer's sizes where one was recognised (also if it was then left
        alone by choice); None where it was not.
    notes: what a reader should know besides, e.g. that the score matrix is kept for another consumer.
    at: the node where it failed, with its module and source line, "" if that is the selection itself.
    suggestion: a change of the model's code that would make it match, "" where there is no simple one.
    form: the score in index notation, if it was rewritten.
    coarse: the coarse stage that was asked for; None where none was: it is then chosen at each call.
    shadow: how many queries a call are compared with the flat selection; None where none are.
    """

    op: str
    module: str = ""
    location: str = ""
    reason: str = ""
    topk: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    budget: Budget | None = None
    notes: tuple[str, ...] = ()
    at: str = ""
    suggestion: str = ""
    form: str = ""
    coarse: str | None = None
    shadow: int | None = None

    @property
    def name(self) -> str:
        """The module and the line."""
        return site_name(self.module, self.location)

    @property
    def rewritten(self) -> bool:
        return not self.reason

    @property
    def exact_up_to(self) -> int | None:
        """Visible tokens up to which the selection is the flat one: m * B (paper section 3)."""
        return None if self.budget is None else self.budget.candidates

    @property
    def work_before(self) -> sympy.Expr | None:
        """Multiply-adds a query of the flat indexer, in T."""
        if self.heads is None or self.head_dim is None:
            return None
        return sympy.Integer(self.heads) * self.head_dim * T

    @property
    def work_after(self) -> sympy.Expr | None:
        """Multiply-adds a query of HISA, in T: every token while they fit m * B, then coarse stage and m * B tokens.

        The coarse stage is H heads on the means of blocks, on their spreads too, or the probe's two on the tokens, or
        on those of the outer blocks that H heads on their means keep; which one may depend on T.
        """
        if self.heads is None or self.head_dim is None or self.budget is None:
            return None
        candidates = self.budget.candidates
        means = vectors_of_block(self.coarse) * sympy.ceiling(T / self.budget.block_size) + candidates
        probe = sympy.Rational(2, max(self.heads, 1)) * T + candidates
        longest = longest_probed(self.heads, self.budget)
        pruned = [(probe if probes(self.coarse) else means, True)]
        if self.coarse == TWO_LEVEL:
            outer = outer_budget(self.budget)
            levels = sympy.ceiling(T / outer.block_size) + probe.subs(T, outer.candidates)
            pruned = [(probe, T <= outer.candidates), (levels, True)]
        if self.coarse is None and longest > candidates:
            pruned.insert(0, (probe, T <= longest))
        return sympy.Integer(self.heads) * self.head_dim * sympy.Piecewise((T, T <= candidates), *pruned)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Site:
        budget = data["budget"]
        return cls(**{**data, "budget": budget and Budget(*budget), "notes": tuple(data["notes"])})

    def __str__(self) -> str:
        where = self.name
        if self.rewritten:
            assert self.budget is not None
            stage = "" if self.coarse is None else f" coarse={self.coarse}"
            lines = [
                f"{where}: {self.op}({self.topk}) rewritten, block_size={self.budget.block_size} "
                f"block_topk={self.budget.block_topk}{stage}, exact up to {self.exact_up_to} visible tokens"
            ]
            lines += [f"    {line}" for line in self.form.splitlines()]
            if self.shadow is not None:
                lines.append(
                    f"    shadow mode: up to {self.shadow} queries a call are compared with the flat selection"
                )
            if self.work_before is not None:
                lines.append(f"    multiply-adds a query: {self.work_before} before, {self.work_after} after")
        else:
            lines = [f"{where}: {self.op} left alone: {self.reason}"]
            lines += [f"    at {self.at}"] if self.at else []
            lines += [f"    to be rewritten: {self.suggestion}"] if self.suggestion else []
        return "\n".join(lines + [f"    note: {note}" for note in self.notes])


@dataclass(frozen=True)
class Report:
    """All selections of one or more compiled graphs."""

    sites: tuple[Site, ...] = ()

    @property
    def rewritten(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.rewritten)

    @property
    def left_alone(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if not site.rewritten)

    def summary(self) -> str:
        """One line: how many selections were seen, how many were rewritten."""
        return f"{len(self.rewritten)} of {len(self.sites)} selections (top-k or sort) rewritten to hisa::indexer_topk"

    def __str__(self) -> str:
        return "\n".join([self.summary(), *map(str, self.sites)])
