"""Perplexity, and divergence from the dense model, of the last tokens with sparse attention in place.

    python -m benchmarks.fidelity.language [--documents 4] [--last 1024] [--ratio 4] [--out language.md]

The tokens before the last ones are read densely, as a prefill would be; the last ones select in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..harness import command, machine, parser, write
from . import capture, model
from .overlap import BLOCK, Setting, budget, default_device, methods, setting
from .selections import PAPER, Scored, flat
from .tail import Choose, Prefix

DENSE = "dense"
# Every option would take long: the paper's, the best ones, bounds and baselines.
COMPARED = (PAPER.name, "mean, blocks of B/4", "mean + spread, B/4", "probe", "probe, B/2", "probe, B/4")
COMPARED += ("two levels, 2m then probe, B/4", "block-sparse", "recent tokens")


class Read(NamedTuple):
    """Of one method on one document: mean negative log likelihood, and divergence from dense, nats a token."""

    loss: float
    divergence: float


def choosers(tokens: int, ratio: int, compared: Sequence[str] = COMPARED) -> dict[str, Choose | None]:
    """By name, dense and flat first: what :meth:`.tail.Prefix.logits` takes, at this compression of ``tokens``."""
    candidates, topk = budget(tokens, ratio)
    made: dict[str, Choose | None] = {DENSE: None, "flat": lambda of: flat(of, topk)}
    every = methods()
    for name in compared:
        made[name] = lambda of, by=every[name]: by(_whole_blocks(of), candidates, topk)[:, : len(of.k)]
    return made


def _whole_blocks(of: Scored) -> Scored:
    """With keys up to a whole number of blocks; what is added is never seen, and repeats the last key in means."""
    more = -len(of.k) % BLOCK
    if not more:
        return of
    k = torch.cat([of.k, of.k[-1:].expand(more, -1)])
    scores = torch.nn.functional.pad(of.scores, (0, more), value=-torch.inf)
    return of._replace(k=k, scores=scores)


def read(prefix: Prefix, end: Tensor, kind: str, named: dict[str, Choose | None]) -> dict[str, Read]:
    found = {}
    for name, choose in named.items():
        logs = prefix.logits(end, kind, choose)[:-1].log_softmax(-1)
        if choose is None:
            dense = logs
        divergence = (dense.exp() * (dense - logs)).sum(-1).mean().item()
        found[name] = Read(cross_entropy(logs, end[0, 1:]).item(), divergence)
    return found


def measure(at: Setting, documents: list[Tensor], last: int, ratio: int) -> dict[str, dict[str, list[Read]]]:
    """By kind of indexer and method, one entry a document."""
    kinds = ["centred"] + ["distilled"] * (at.indexers is not None)
    found: dict[str, dict[str, list[Read]]] = {kind: {} for kind in kinds}
    for number, ids in enumerate(documents):
        prefix = Prefix(at.lm, ids[:, :-last], at.means, at.indexers)
        for kind in kinds:
            for name, one in read(prefix, ids[:, -last:], kind, choosers(ids.shape[1], ratio)).items():
                found[kind].setdefault(name, []).append(one)
        print(f"document {number + 1} of {len(documents)}", flush=True)
    return found


def table(found: dict[str, list[Read]]) -> str:
    lines = ["| attention | perplexity | over flat | divergence from dense |", "| --- | --- | --- | --- |"]
    losses = {name: torch.tensor([one.loss for one in reads]).mean() for name, reads in found.items()}
    for name, reads in found.items():
        over = (losses[name] - losses["flat"]).exp() - 1
        divergence = sum(one.divergence for one in reads) / len(reads)
        lines.append(f"| {name} | {losses[name].exp():.2f} | {100 * over:+.2f} % | {divergence:.4f} |")
    return "\n".join(lines)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--documents", type=int, default=4)
    made.add_argument("--length", type=int, default=model.NATIVE_LENGTH)
    made.add_argument("--last", type=int, default=1024)
    made.add_argument("--ratio", type=int, default=4)
    made.add_argument("--device", default=default_device())
    options = made.parse_args()
    at = setting(options.device)
    parts: list[str] = []
    raw: dict[str, Any] = {}
    for text in ("prose", "code"):
        chosen = [each for each in capture.MEASURED if each[0] == text][: (options.documents + 1) // 2]
        found = measure(at, at.read(chosen, options.length), options.last, options.ratio)
        for kind, reads in found.items():
            parts += [f"### {text}, {kind}, {options.ratio}:1, the last {options.last} of {options.length} tokens"]
            parts += [table(reads)]
            raw[f"{text} {kind}"] = {name: [one._asdict() for one in ones] for name, ones in reads.items()}
    asked = command("fidelity.language", made, options)
    write(
        options.out,
        ["# Perplexity, and divergence from dense", f"`{asked}`, {machine()}", *parts],
        raw | {"command": asked},
    )


if __name__ == "__main__":
    main()
