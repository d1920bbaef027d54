"""Perplexity, and divergence from the dense model, of the last tokens with sparse attention in place.

    python -m benchmarks.fidelity.language [--documents 6] [--last 1024] [--ratio 4] [--out language.md]
    python -m benchmarks.fidelity.language --length 16384 --stretch 2 [--out language_16384.md]

The tokens before the last ones are read densely, as a prefill would be; the last ones select in every layer.  Beyond
the model's 8192 tokens positions are interpolated; what that alone costs is told by the dense perplexity of the same
last tokens with nothing but the native length before them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..harness import Goal, command, goals_table, keep, machine, parser, raw_goals, write
from . import capture, model
from .overlap import BLOCK, Setting, budget, default_device, methods, setting
from .selections import PAPER, Scored, flat
from .tail import Choose, Prefix

DENSE = "dense"
# What the operator has, and baselines; every option would take long.
COMPARED = (PAPER.name, "mean, blocks of B/2", "mean, blocks of B/4", "spread", "spread, B/2", "spread, B/4")
COMPARED += ("probe", "probe, B/2", "probe, B/4", "two levels, 4m then probe, B/4")
COMPARED += ("block-sparse", "recent tokens", "random tokens")
# How much more of flat's perplexity an option may have, in %, and those that are to reach it.
MOST_OVER = 1.0
PROBES = ("probe", "probe, B/2", "probe, B/4")
NATIVE = f"dense, {model.NATIVE_LENGTH} tokens, as trained"


class Read(NamedTuple):
    """Of one method on one document: mean negative log likelihood, and divergence from dense, nats a token."""

    loss: float
    divergence: float | None


def choosers(tokens: int, ratio: int, compared: Sequence[str] = COMPARED) -> dict[str, Choose | None]:
    """By name, dense and flat first: what :meth:`.tail.Prefix.logits` takes, at this compression of ``tokens``."""
    candidates, topk = budget(tokens, ratio)
    made: dict[str, Choose | None] = {DENSE: None, "flat": lambda of: flat(of, topk)}
    every = methods()
    for name in compared:
        made[name] = lambda of, by=every[name]: by(_whole_blocks(of), candidates, topk)[..., : of.tokens]
    return made


def _whole_blocks(of: Scored) -> Scored:
    """With keys up to a whole number of blocks; what is added is never seen, and repeats the last key in means."""
    more = -of.tokens % BLOCK
    if not more:
        return of
    k = torch.cat([of.k, of.k[..., -1:, :].expand(*of.k.shape[:-2], more, -1)], dim=-2)
    scores = torch.nn.functional.pad(of.scores, (0, more), value=-torch.inf)
    return of._replace(k=k, scores=scores)


def read(prefix: Prefix, end: Tensor, kind: str, named: dict[str, Choose | None]) -> dict[str, Read]:
    """Of one document; dense comes first."""
    found = {}
    for name, choose in named.items():
        logs = prefix.logits(end, kind, choose)[0, :-1].log_softmax(-1)
        if choose is None:
            dense = logs
        divergence = (dense.exp() * (dense - logs)).sum(-1).mean().item()
        found[name] = Read(cross_entropy(logs, end[0, 1:]).item(), divergence)
    return found


def native(at: Setting, ids: Tensor, last: int, stretch: float) -> Read:
    """The last tokens of a document with the native length of it in sight and no interpolation, dense."""
    model.interpolate(at.lm, 1)
    prefix = Prefix(at.lm, ids[:, -model.NATIVE_LENGTH : -last], at.means, None)
    found = read(prefix, ids[:, -last:], "centred", {DENSE: None})[DENSE]
    model.interpolate(at.lm, stretch)
    return found._replace(divergence=None)


# By text and kind of indexer, then by method: one entry a document.
Found = dict[tuple[str, str], dict[str, list[Read]]]


def add(found: Found, at: Setting, text: str, ids: Tensor, options: argparse.Namespace) -> None:
    """What one document adds to ``found``."""
    prefix = Prefix(at.lm, ids[:, : -options.last], at.means, at.indexers)
    # What a trained indexer is like comes first, should the time not suffice.
    for kind in ["distilled"] * (at.indexers is not None) + ["centred"]:
        named = choosers(ids.shape[1], options.ratio, options.methods)
        reads = read(prefix, ids[:, -options.last :], kind, named)
        if options.stretch != 1:
            reads = {NATIVE: native(at, ids, options.last, options.stretch)} | reads
        for name, one in reads.items():
            found.setdefault((text, kind), {}).setdefault(name, []).append(one)


class Line(NamedTuple):
    """A method over documents; over: its perplexity over flat's, in %."""

    perplexity: float
    over: float
    divergence: float | None


def lines(found: dict[str, list[Read]]) -> dict[str, Line]:
    losses = {name: statistics.fmean(one.loss for one in reads) for name, reads in found.items()}
    made = {}
    for name, reads in found.items():
        divergences = [one.divergence for one in reads if one.divergence is not None]
        over = 100 * math.expm1(losses[name] - losses["flat"])
        made[name] = Line(math.exp(losses[name]), over, statistics.fmean(divergences) if divergences else None)
    return made


def table(found: dict[str, Line]) -> str:
    rows = ["| attention | perplexity | over flat | divergence from dense |", "| --- | --- | --- | --- |"]
    for name, line in found.items():
        divergence = "" if line.divergence is None else f"{line.divergence:.4f}"
        rows.append(f"| {name} | {line.perplexity:.2f} | {line.over:+.2f} % | {divergence} |")
    return "\n".join(rows)


def goals(found: Found) -> list[Goal]:
    """Of the distilled indexers, which are what a trained model has; none where there are none."""
    made = []
    for (text, kind), reads in found.items():
        of = lines(reads)
        for name in PROBES:
            if kind == "distilled" and name in of:
                goal = f"perplexity over flat's, {text}, distilled, {name}"
                paper = of.get(PAPER.name)
                note = f"with one mean {paper.over:+.2f} %" if paper else ""
                made.append(Goal(goal, MOST_OVER, of[name].over, at_most=True, unit=" %", note=note))
    return made


def report(found: Found, asked: str, options: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The page and the raw numbers, of as many documents as there are."""
    parts = ["# Perplexity, and divergence from dense", f"`{asked}`, {machine()}"]
    setting = f"{options.ratio}:1, the last {options.last} of {options.length} tokens"
    if options.stretch != 1:
        setting += f", positions interpolated by {options.stretch:g}"
    rows = []
    for (text, kind), reads in sorted(found.items(), reverse=True):
        of, documents = lines(reads), len(reads["flat"])
        parts += [f"### {text}, {kind}, {setting}", f"Documents: {documents}.", table(of)]
        for name, line in of.items():
            by_document = [one.loss for one in reads[name]]
            rows.append({"text": text, "kind": kind, "method": name, **line._asdict(), "losses": by_document})
    wanted = goals(found)
    if wanted:
        parts.append(goals_table(wanted))
    given = {name: getattr(options, name) for name in ("length", "last", "ratio", "stretch")}
    return parts, {"command": asked, **given, "rows": rows, "goals": raw_goals(wanted)}


def methods_of(made: argparse.ArgumentParser) -> None:
    """The option --methods."""
    every = list(methods())
    made.add_argument(
        "--methods", nargs="+", default=list(COMPARED), choices=every, metavar="METHOD", help=", ".join(every)
    )


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--documents", type=int, default=len(capture.MEASURED), help="prose and code in turns")
    made.add_argument("--length", type=int, default=model.NATIVE_LENGTH)
    made.add_argument("--stretch", type=float, default=1.0, help="interpolate positions to so many times the native")
    made.add_argument("--last", type=int, default=1024)
    made.add_argument("--ratio", type=int, default=4)
    made.add_argument("--device", default=default_device())
    methods_of(made)
    options = made.parse_args()
    asked = command("fidelity.language", made, options)
    at = setting(options.device, options.stretch)
    found: Found = {}
    for each in capture.in_turns(options.documents):
        began = time.perf_counter()
        (ids,) = at.read([each], options.length)
        add(found, at, each[0], ids, options)
        keep(options.out, *report(found, asked, options))
        print(f"{each}: {time.perf_counter() - began:.1f} s", flush=True)
    write(options.out, *report(found, asked, options))


if __name__ == "__main__":
    main()
